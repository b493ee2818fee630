"""``ltrp-timm evaluate``: accuracy on a labelled set beside throughput, at several keep ratios."""
