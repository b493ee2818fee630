"""``ltrp-timm rank``: scores and kept patches of whole folders of images, in parts, resumable."""
