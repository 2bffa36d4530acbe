"""How many bits a channel has: what the file declares, else what its values fit into."""

import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from h2t_store.images.jpeg2000 import precision

__all__ = ["declared_bits", "grey_bits"]

_BITS_PER_SAMPLE, _DESCRIPTION, _MAX_SAMPLE, _SMAX_SAMPLE = 258, 270, 281, 341
_SIGNIFICANT_BITS = re.compile(r'SignificantBits="(\d+)"')
_LIKELY = (8, 12)
_MOST = 16


def declared_bits(image: Image.Image, content: bytes) -> int | None:
    """Bits per channel that the file declares, before it is loaded; None where 16 bits are there and nothing is said.

    They are those of TIFF's BitsPerSample, (S)MaxSampleValue and OME-XML's SignificantBits, and of PNG's sBIT. PIL
    scales what a PNM or JPEG 2000 declares to 16 bits itself.
    """
    if image.format == "TIFF":
        return _of_tiff(image.tag_v2)  # type: ignore[attr-defined]
    if image.format == "PNG":
        return _of_png(content)
    if image.format == "PPM":
        args = image.tile[0][3]  # type: ignore[attr-defined]  # what the decoder is told, at the end the largest value
        return None if args in ("I;16B", ("I;16B", 0, 1)) or args[-1] == 65535 else _MOST
    if image.format == "JPEG2000":
        return None if precision(content) == _MOST else _MOST
    return 8


def grey_bits(values: NDArray[np.integer], declared: int | None, is_png: bool) -> int:
    """Bits that grey values up to 65535 stand for: those declared if they fit, else the first likely number that does.

    A PNG that keeps to the standard has its values scaled to 16 bits, whatever sBIT says, so that lower bits are zero.
    """
    largest = int(values.max())
    if declared is not None and largest < 1 << declared:
        scaled = is_png and not (values & ((1 << (_MOST - declared)) - 1)).any()
        return _MOST if scaled else declared
    if declared is not None and is_png:
        return _MOST
    return next((bits for bits in _LIKELY if largest < 1 << bits), _MOST)


def _of_tiff(tags: object) -> int | None:
    bits = _first(tags, _BITS_PER_SAMPLE)
    if bits != _MOST:
        return bits
    for tag in (_SMAX_SAMPLE, _MAX_SAMPLE):
        largest = _first(tags, tag)
        if largest is not None and (largest + 1).bit_count() == 1 and largest >= 255:
            return largest.bit_length()
    described = _SIGNIFICANT_BITS.search(str(tags.get(_DESCRIPTION, "")))  # type: ignore[attr-defined]
    return int(described[1]) if described and 8 <= int(described[1]) <= _MOST else None


def _first(tags: object, tag: int) -> int | None:
    value = tags.get(tag)  # type: ignore[attr-defined]
    value = value[0] if isinstance(value, tuple) and value else value
    return int(value) if isinstance(value, int | float) else None


def _of_png(content: bytes) -> int | None:
    """The chunk sBIT stands before the pixels (PNG, third edition, 11.3.2.6)."""
    depth, start = content[24], 8
    if depth < _MOST:
        return depth
    while start + 8 < len(content):
        size, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        if kind == b"sBIT" and size and 8 <= content[start + 8] <= _MOST:
            return content[start + 8]
        if kind == b"IDAT":
            break
        start += 12 + size
    return None
