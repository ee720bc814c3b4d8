"""Image files as videos of one frame."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from arvideo_ds.decoding.video import RejectedError

# What a file contains decides, not its suffix.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def read_image(file: BinaryIO, max_pixels: int) -> np.ndarray:
    """The picture of an image file, H W 3, uint8: upright (EXIF), without transparency, 16 bits
    reduced to 8; of an animation the first.

    Errors: `RejectedError`, for a file of more than `max_pixels` before it is decoded.
    """
    try:
        # Only the header.
        image = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise RejectedError("too_large", str(error)) from None
    except UnidentifiedImageError:
        raise RejectedError("cannot_open", f"none of {', '.join(_FORMATS)}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise RejectedError("cannot_open", str(error)) from None
    if image.width * image.height > max_pixels:
        what = f"{image.width} x {image.height} pixels; the limit is {max_pixels:,}"
        raise RejectedError("too_large", f"{what} (make_shards.py --max_pixels)")
    try:
        image.verify()  # the checksums of a PNG, which its decoder ignores
        file.seek(0)
        image = Image.open(file, formats=_FORMATS)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        reason = "truncated" if "truncated" in str(error) else "damaged"
        raise RejectedError(reason, str(error)) from None
