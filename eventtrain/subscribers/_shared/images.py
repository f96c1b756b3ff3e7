"""Images as pixels and as PNG files, without an imaging library. Pure."""

from __future__ import annotations

import struct
import zlib
from typing import Any, cast

import numpy as np

Array = np.ndarray[Any, Any]

COLOUR_TYPES = {1: 0, 3: 2, 4: 6}
"""Number of channels -> colour type of PNG: grey, RGB, RGB with alpha."""


def is_image(array: Array) -> bool:
    """Returns whether an array may be an image: [height, width] or [height, width, 1, 3 or 4], of numbers."""
    return array.dtype.kind in "biuf" and (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in COLOUR_TYPES)
    )


def pixels(array: Array) -> Array:
    """Returns an image as uint8[height, width, channels]. Floats are from 0 to 1, integers from 0 to 255."""
    array = array[:, :, None] if array.ndim == 2 else array
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        return cast("Array", (np.clip(np.nan_to_num(array), 0.0, 1.0) * 255 + 0.5).astype(np.uint8))
    return np.clip(array, 0, 255).astype(np.uint8)


def png(image: Array) -> bytes:
    """Returns a PNG file of uint8[height, width, 1, 3 or 4]."""
    height, width, channels = image.shape
    filters = np.zeros((height, 1), np.uint8)
    rows = np.concatenate([filters, image.reshape(height, width * channels)], axis=1).tobytes()
    header = struct.pack(">2I5B", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
