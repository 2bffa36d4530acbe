"""Decoding: the bytes of an image file become eight-bit RGB pixels the right way up, or one line that says why not.

Only formats with decoders in PIL itself are tried, whatever a file is called: PIL hands EPS to Ghostscript, which would
run what the file says.
"""

import io
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

from h2t_store.errors import DataError, one_line
from h2t_store.images.colours import as_rgb, require_readable
from h2t_store.images.depth import declared_bits
from h2t_store.images.foreign import foreign_content, foreign_name
from h2t_store.images.jpeg2000 import require_end
from h2t_store.images.names import shown
from h2t_store.images.orientation import transposition

__all__ = ["DECODING", "IMAGE_EXTENSIONS", "Picture", "decode", "is_image_name", "rendered"]

DECODING = {"orientation": "exif", "transparency": "dropped", "depth": "declared, else 8, 12 or 16 bits by range"}
"""The rules of `decode`, for the provenance: features of pictures decoded by other rules are others."""

_EXTENSIONS = "jpg jpeg jpe jfif png apng bmp dib gif webp tif tiff ppm pgm pbm pnm jp2 j2k jpc jpx jpf avif tga ico"
IMAGE_EXTENSIONS = frozenset("." + extension for extension in _EXTENSIONS.split(" "))
_FORMATS = ["JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA"]
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHER_TIFF = "a kind of TIFF that is not read, or damaged: convert it to PNG"
_LONGEST = 1000
_SEVERAL = "have several frames or pages: the first is read"


class Picture(NamedTuple):
    """A decoded image file.

    Attributes
    ----------
    image : Image
        RGB.
    remarks : list of str
        What was lost or guessed, as the end of a sentence that begins with "12 images".
    """

    image: Image.Image
    remarks: list[str]


def is_image_name(name: str) -> bool:
    """Whether the extension, in either case, is one of an image."""
    dot = name.rfind(".")
    return dot > name.rfind("/") + 1 and name[dot:].lower() in IMAGE_EXTENSIONS


def decode(content: bytes, name: str) -> Picture:
    """Decode an image file.

    Parameters
    ----------
    content : bytes
        Of the file, in any of PIL's own formats; its extension does not matter. Of several frames the first is taken.
    name : str
        What errors call it.

    Returns
    -------
    Picture
        See `rendered`.

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
    advice = foreign_content(content) or foreign_name(name)
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if image.format == "TIFF" and advice:
                raise ValueError(advice)  # PIL would read its preview
            _require_few_pixels(image)
            if image.format == "JPEG2000":
                require_end(content)
            return rendered(image, declared_bits(image, content))
    except UnidentifiedImageError:
        unknown = _OTHER_TIFF if content.startswith(_TIFF_STARTS) else "not an image"
        raise DataError(f"{shown(name)}: {advice or unknown}") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise DataError(f"{shown(name)}: {one_line(error)}") from error


def rendered(image: Image.Image, bits: int | None) -> Picture:
    """An image of PIL as eight-bit RGB, the right way up.

    Colours under transparency are kept and the transparency dropped, as in timm. Of grey values the upper eight bits
    are taken: of the ``bits`` that the file declares, else of 8, 12 or 16, the first that hold all values. 16 bits of
    colour are cut to their upper eight.

    Raises
    ------
    ValueError
        Where the pixels cannot be converted.
    """
    require_readable(image)
    several = [_SEVERAL] if image.format != "MPO" and getattr(image, "is_animated", False) else []
    turn, remarks = transposition(image)
    pixels, more = as_rgb(image, bits)
    return Picture(pixels if turn is None else pixels.transpose(turn), [*several, *remarks, *more])


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
