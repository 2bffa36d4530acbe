"""Convert pixels of any mode and depth to 8-bit RGB, with remarks on what is lost or guessed."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_ACCEPTED = "accepted are unsigned 8 and 16 bits per channel"
_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _DESCRIPTION, _MAX_SAMPLE = 254, 258, 262, 270, 281  # tags of TIFF
_PLANES, _SAMPLE_FORMAT, _SMAX_SAMPLE, _DNG_VERSION = 284, 339, 341, 50706
_SIGNED = 2
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_NOT_MULTIPLIED = {"La": "LA", "RGBa": "RGBA"}

_TRANSPARENT = "are transparent in part: transparency is dropped and the colours under it are used, as in timm"
_GUESSED = "are 16-bit grey without a value above {}: taken for {}-bit (if that is wrong, convert to 8 bits)"
_FAINT = "are 16-bit grey without a value above 16383, so dark (if they have fewer bits, convert to 8 bits)"
_DARK = "are 16-bit colour without a value above 4095, so nearly black: convert to 8 bits"
_SIGNIFICANT_BITS = re.compile(r'SignificantBits="(\d+)"')
_LIKELY = (8, 12)
_MOST = 16
_JPEG2000_PRECISION_AT = 42  # of the first component, in the segment SIZ that follows the start of the codestream


def require_readable(image: Image.Image) -> None:
    """Raise `ValueError` if PIL would silently give wrong pixels of this image, which is not loaded yet."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (1,))
    if tags.get(_SUBFILE_TYPE, 0) & 1 or _DNG_VERSION in tags:
        raise ValueError("a preview comes first, as in camera raw: develop to JPEG or TIFF")
    if max(bits) == 8 and _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError(f"signed pixels; {_ACCEPTED}")
    if max(bits) == 16 and len(bits) > 1 and tags.get(_PLANES) == 2:
        raise ValueError("16 bits of colour in planes; accepted are planes of 8 bits")


def as_rgb(image: Image.Image, bits: int | None) -> tuple[Image.Image, list[str]]:
    """RGB and remarks; ``bits`` per channel are declared, None where 16 bits are there and nothing is declared."""
    if image.mode == "F":
        raise ValueError(f"floating-point pixels; {_ACCEPTED}")
    if image.mode.startswith("I"):
        return _from_grey(image, bits)
    narrow = bits is not None and 8 < bits < 16
    if narrow and image.format == "TIFF":
        raise ValueError(f"{bits}-bit colour in 16 bits; {_ACCEPTED}")
    if image.mode in _NOT_MULTIPLIED:
        image = image.convert(_NOT_MULTIPLIED[image.mode])
    remarks = _transparency(image, bits)
    if image.mode in ("P", *_WITH_ALPHA):
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if (bits is None or narrow) and max(high for _, high in image.getextrema()) < 16:  # type: ignore[misc]
        remarks.append(_DARK)
    return image, remarks


def _from_grey(image: Image.Image, bits: int | None) -> tuple[Image.Image, list[str]]:
    """The upper eight of the bits that the values stand for."""
    if image.mode == "I" and image.format == "TIFF":
        raise ValueError(f"signed pixels or more than 16 bits; {_ACCEPTED}")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integers from {values.min()} to {values.max()}; {_ACCEPTED}")
    values = values.astype(np.uint16)
    key = image.info.get("transparency")
    remarks = [_TRANSPARENT] if isinstance(key, int) and (values == key).any() else []
    found = _grey_bits(values, bits, image.format == "PNG")
    if found < 16 and found != bits and values.any():
        remarks.append(_GUESSED.format((1 << found) - 1, found))
    if found == 16 and bits is None and values.max() < 1 << 14:
        remarks.append(_FAINT)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
        values = np.uint16((1 << found) - 1) - values  # white is zero
    return Image.fromarray((values >> (found - 8)).astype(np.uint8)).convert("RGB"), remarks


def _transparency(image: Image.Image, bits: int | None) -> list[str]:
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return []
    if image.mode in ("L", "RGB") and bits != 8:
        return [_TRANSPARENT]  # PIL scales the pixels, but not the transparent colour
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return [_TRANSPARENT] if lowest < 255 else []  # type: ignore[operator]


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


def _grey_bits(values: NDArray[np.integer], declared: int | None, is_png: bool) -> int:
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
    """Raise `ValueError` if the file is cut off: PIL leaves the missing part black."""
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
