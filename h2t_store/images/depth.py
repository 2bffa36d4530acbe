"""How many bits a channel has: what the file declares, else what its values fit into."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BITS_PER_SAMPLE, _DESCRIPTION, _MAX_SAMPLE, _SMAX_SAMPLE = 258, 270, 281, 341
_SIGNIFICANT_BITS = re.compile(r'SignificantBits="(\d+)"')
_LIKELY = (8, 12)
_MOST = 16
_JPEG2000_PRECISION_AT = 42  # of the first component, in the segment SIZ that follows the start of the codestream


def declared_bits(image: Image.Image, content: bytes) -> int | None:
    """Bits per channel that the file declares, before it is loaded; None where 16 bits are there and nothing is said.

    PIL itself scales what a PNM or JPEG 2000 declares to 16 bits.
    """
    if image.format == "TIFF":
        return _of_tiff(image.tag_v2)  # type: ignore[attr-defined]
    if image.format == "PNG":
        return _of_png(content)
    if image.format == "PPM":
        args = image.tile[0][3]  # type: ignore[attr-defined]  # ends with the largest value, where that is not usual
        return None if args in ("I;16B", ("I;16B", 0, 1)) or args[-1] == 65535 else _MOST
    if image.format == "JPEG2000":
        precision = (_codestream(content)[_JPEG2000_PRECISION_AT] & 0x7F) + 1
        return None if precision == _MOST else _MOST
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


def require_end_of_jpeg2000(content: bytes) -> None:
    """Raise `ValueError` where it is cut off: PIL decodes what is there and leaves the rest black."""
    if not _codestream(content).rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("image file is truncated")


def _of_tiff(tags: Any) -> int | None:
    """BitsPerSample, or what (S)MaxSampleValue or OME-XML say of 16 bits."""

    def first(tag: int) -> int | None:
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) and value else value
        return int(value) if isinstance(value, int | float) else None

    bits = first(_BITS_PER_SAMPLE)
    if bits != _MOST:
        return bits
    for largest in (first(_SMAX_SAMPLE), first(_MAX_SAMPLE)):
        if largest is not None and (largest + 1).bit_count() == 1 and largest >= 255:
            return largest.bit_length()
    described = _SIGNIFICANT_BITS.search(str(tags.get(_DESCRIPTION, "")))
    return int(described[1]) if described and 8 <= int(described[1]) <= _MOST else None


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


def _codestream(content: bytes) -> bytes:
    """What is in the box ``jp2c`` of a JPEG 2000, or everything where there are no boxes (ISO/IEC 15444-1, annex I)."""
    if not content.startswith(b"\0\0\0\x0cjP"):
        return content
    start = 0
    while start < len(content):
        size, kind, header = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8], 8
        if size == 1:
            size, header = int.from_bytes(content[start + 8 : start + 16], "big"), 16
        end = start + max(size, header) if size else len(content)
        if kind == b"jp2c":
            return content[start + header : end]
        start = end
    return b""
