"""Decoding: the bytes of an image file become eight-bit RGB pixels, or one line that says why not.

Only formats with decoders in PIL itself are tried, whatever a file is called: PIL hands EPS to Ghostscript, which would
run what the file says.
"""

import io
from functools import cache

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from h2t_store.datasets.names import shown
from h2t_store.errors import DataError, one_line

__all__ = ["IMAGE_EXTENSIONS", "as_rgb", "decode", "is_image_name"]

_EXTENSIONS = "jpg jpeg jpe jfif png bmp dib gif webp tif tiff ppm pgm pbm pnm jp2 avif tga ico"
IMAGE_EXTENSIONS = frozenset("." + extension for extension in _EXTENSIONS.split(" "))
_FORMATS = ["JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA"]
_LONGEST = 1000
_MODES_BEFORE_RGB = {"P": "RGBA", "LA": "RGBA", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}


def is_image_name(name: str) -> bool:
    """Whether the extension, in either case, is one of an image."""
    dot = name.rfind(".")
    return dot > name.rfind("/") + 1 and name[dot:].lower() in IMAGE_EXTENSIONS


def decode(content: bytes, name: str) -> Image.Image:
    """Decode an image file.

    Parameters
    ----------
    content : bytes
        Of the file, in any of PIL's own formats; its extension does not matter. Of several frames the first is taken.
    name : str
        What errors call it.

    Returns
    -------
    Image
        RGB; see `as_rgb`.

    Raises
    ------
    DataError
        Where it is not an image, is cut off or damaged, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, from
        where PIL itself warns of a decompression bomb, or is a thousand times as long as wide.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so cut-off images would pass unseen: switch it off")
    if not content:
        raise DataError(f"{shown(name)}: not an image: it is empty")
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            _require_few_pixels(image)
            if image.format == "JPEG2000":
                _require_end_of_jpeg2000(content)
            return as_rgb(image)
    except UnidentifiedImageError:
        raise DataError(f"{shown(name)}: not an image") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise DataError(f"{shown(name)}: {one_line(error)}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits per channel: the upper eight of 16.

    Colours under transparency are kept and the transparency dropped; orientation tags are ignored, both as in timm.
    """
    if image.mode.startswith("I"):
        if image.mode == "I" and image.format == "TIFF":
            raise ValueError("whole numbers of more than 16 bits; accepted are 8 and 16 bits per channel")
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers from {values.min()} to {values.max()}; accepted are 8 and 16 bits per channel")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels; accepted are 8 and 16 bits per channel")
    while image.mode in _MODES_BEFORE_RGB:
        image = image.convert(_MODES_BEFORE_RGB[image.mode])
    return image.convert("RGB")


@cache
def _formats() -> tuple[str, ...]:
    """Those that this build of PIL can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _require_few_pixels(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{image.width} x {image.height} pixels may be a decompression bomb; accepted are {limit} pixels "
            "(PIL.Image.MAX_IMAGE_PIXELS)"
        )
    if max(image.size) > _LONGEST * min(image.size):
        raise ValueError(
            f"{image.width} x {image.height} pixels is too long: scaled so that the shorter side fits a network, it "
            f"would fill the memory; accepted are sides that differ {_LONGEST} times"
        )


def _require_end_of_jpeg2000(content: bytes) -> None:
    """PIL decodes what is there of a JPEG 2000 that is cut off, and leaves the rest black."""
    if not _codestream(content).rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("image file is truncated")


def _codestream(content: bytes) -> bytes:
    """What is in the box ``jp2c``, or everything where there are no boxes (ISO/IEC 15444-1, annex I)."""
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
