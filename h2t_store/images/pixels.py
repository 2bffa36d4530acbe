"""Pixels of any mode of PIL become eight-bit RGB; what is lost or guessed on the way is told."""

import numpy as np
from PIL import Image

from h2t_store.images.depth import grey_bits

_ACCEPTED = "accepted are unsigned 8 and 16 bits per channel"
_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT, _DNG_VERSION = 254, 258, 262, 284, 339, 50706
_SIGNED = 2
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_NOT_MULTIPLIED = {"La": "LA", "RGBa": "RGBA"}

_TRANSPARENT = "are transparent in part: transparency is dropped and the colours under it are used, as in timm"
_GUESSED = "are 16-bit grey without a value above {}: taken for {}-bit (if that is wrong, convert to 8 bits)"
_FAINT = "are 16-bit grey without a value above 16383, so dark (if they have fewer bits, convert to 8 bits)"
_DARK = "are 16-bit colour without a value above 4095, so nearly black: convert to 8 bits"


def require_readable(image: Image.Image) -> None:
    """Raise `ValueError` at an image, not loaded yet, of which PIL would make other pixels without a word."""
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
    found = grey_bits(values, bits, image.format == "PNG")
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
