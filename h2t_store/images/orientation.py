"""The EXIF orientation of a picture, applied as `PIL.ImageOps.exif_transpose` does.

The tag is read here because PIL silently drops all tags if one of them is damaged.
"""

import re
import struct
from typing import Any

from PIL import Image

_TAG = 0x0112
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_TYPES = {1: "B", 3: "H", 4: "I"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGED = -1
_XMP = re.compile(rb'tiff:Orientation(?:\s*=\s*["\']|>)\s*([0-9])')
_UNKNOWN = "have an EXIF orientation that cannot be read: taken as stored, which may be sideways"


def transposition(image: Image.Image) -> tuple[Image.Transpose | None, list[str]]:
    """Load a picture; return how to turn it by its EXIF or XMP, and a remark if that cannot be read.

    PIL itself turns TIFFs while it loads them, and drops the tag.
    """
    is_tiff = image.format == "TIFF"
    orientation = image.tag_v2.get(_TAG) if is_tiff else None  # type: ignore[attr-defined]
    image.load()
    if not is_tiff:
        try:
            orientation = _orientation(image.info)
        except (ValueError, struct.error):
            orientation = _DAMAGED
    if orientation in (None, 0, 1):
        return None, []
    if orientation not in _TRANSPOSE:
        return None, [_UNKNOWN]
    return None if is_tiff else _TRANSPOSE[orientation], []


def _orientation(info: dict[Any, Any]) -> int | None:
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:
        exif = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
    found = _in_exif(exif.removeprefix(b"Exif\0\0")) if exif else None
    if found is not None:
        return found
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    match = _XMP.search(xmp.encode() if isinstance(xmp, str) else xmp)
    return int(match[1]) if match else None


def _in_exif(exif: bytes) -> int | None:
    """The tag in the first directory of a TIFF structure; `ValueError` or `struct.error` where that is damaged."""
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None:
        raise ValueError("no TIFF structure")
    (start,) = struct.unpack_from(order + "I", exif, 4)
    (n_tags,) = struct.unpack_from(order + "H", exif, start)
    for entry in range(start + 2, start + 2 + 12 * n_tags, 12):
        tag, kind, n_values = struct.unpack_from(order + "HHI", exif, entry)
        if tag == _TAG:
            if kind not in _TYPES or n_values != 1:
                raise ValueError("an orientation of another type")
            return int(struct.unpack_from(order + _TYPES[kind], exif, entry + 8)[0])
    return None
