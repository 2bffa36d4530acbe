"""Which way up a picture is: its EXIF orientation, read and applied as `PIL.ImageOps.exif_transpose` does.

The tag is read here and not by PIL, which gives up on all tags where one of them is damaged, and then says nothing.
"""

import re

from PIL import Image

__all__ = ["transposition"]

_TAG = 0x0112
_SIZES = {1: 1, 3: 2, 4: 4}  # of the types BYTE, SHORT and LONG
_BYTE_ORDERS = {b"II*\0": "little", b"MM\0*": "big"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UPRIGHT = (None, 0, 1)
_XMP = re.compile(rb'tiff:Orientation(?:\s*=\s*["\']|>)\s*([0-9])')
_UNKNOWN = "have an EXIF orientation that cannot be read: taken as stored, which may be sideways"


def transposition(image: Image.Image) -> tuple[Image.Transpose | None, list[str]]:
    """How to turn a picture as its EXIF or XMP says, and a remark where that cannot be read.

    TIFFs are turned by PIL while they are loaded.
    """
    is_tiff = image.format == "TIFF"
    try:
        orientation = image.tag_v2.get(_TAG) if is_tiff else None  # type: ignore[attr-defined]  # gone once it is loaded
        image.load()
        orientation = orientation if is_tiff else _orientation(image)
    except _DamagedExifError:
        return None, [_UNKNOWN]
    if orientation not in _UPRIGHT and orientation not in _TRANSPOSE:
        return None, [_UNKNOWN]
    return (None if is_tiff or orientation is None else _TRANSPOSE.get(orientation)), []


class _DamagedExifError(Exception):
    """The orientation cannot be read."""


def _orientation(image: Image.Image) -> int | None:
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:
        try:
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        except ValueError as error:
            raise _DamagedExifError from error
    orientation = _in_exif(exif.removeprefix(b"Exif\0\0")) if exif else None
    if orientation is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        found = _XMP.search(xmp.encode() if isinstance(xmp, str) else xmp)
        orientation = int(found[1]) if found else None
    return orientation


def _in_exif(exif: bytes) -> int | None:
    """The tag in the first directory of a TIFF structure; `_DamagedExifError` where that is damaged."""
    if exif[:4] not in _BYTE_ORDERS:
        raise _DamagedExifError
    order = _BYTE_ORDERS[exif[:4]]

    def number(at: int, size: int) -> int:
        if at + size > len(exif):
            raise _DamagedExifError
        return int.from_bytes(exif[at : at + size], order)  # type: ignore[arg-type]

    start = number(4, 4)
    for entry in range(start + 2, start + 2 + 12 * number(start, 2), 12):
        if number(entry, 2) == _TAG:
            kind = number(entry + 2, 2)
            if kind not in _SIZES or number(entry + 4, 4) != 1:
                raise _DamagedExifError
            return number(entry + 8, _SIZES[kind])
    return None
