"""What tells the images of a data set from others."""

import os
from typing import Any

from ltrp_timm.data.images import Images
from ltrp_timm.scoring import ImageIds


def image_ids(images: Images) -> ImageIds:
    """Names and sizes of files; numbers where images lie in no files of their own."""
    samples = getattr(images.reader, "samples", None)
    if samples is not None:
        names = [images.name(index) for index in range(len(images))]
        return ImageIds(names, [_size(sample) for sample in samples])
    table: Any = getattr(images.reader, "dataset", None)
    mark = getattr(table, "_fingerprint", None)  # of Hugging Face's: what it holds and how
    count = len(images)
    identity = f"{mark or type(images.dataset).__name__}, {count} images"
    return ImageIds([str(index) for index in range(count)], [-1] * count, identity)


def _size(sample: Any) -> int:
    """Bytes of a file on the disk (path, label) or in an archive (entry, …)."""
    place = sample[0]
    if isinstance(place, (str, os.PathLike)):
        try:
            return os.stat(place).st_size
        except OSError:  # said when it is read
            return -1
    return int(getattr(place, "size", -1))
