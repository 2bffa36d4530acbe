"""Decode image files and pixels to 8-bit RGB, the right way up; errors are one line.

Only formats that PIL decodes itself are accepted, whatever the extension: PIL passes EPS to Ghostscript, which would
execute the file.
"""

import io
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from h2t_store.errors import DataError, one_line
from h2t_store.images.formats import advice_on_content, advice_on_name
from h2t_store.images.names import shown
from h2t_store.images.orientation import transposition
from h2t_store.images.pixels import as_rgb, declared_bits, require_end_of_jpeg2000, require_readable

DECODING = {"orientation": "exif", "transparency": "dropped", "depth": "declared, else 8, 12 or 16 bits by range"}
"""The rules of `decode`, for the provenance: other rules give other features."""

DIGEST_BYTES = 16

_FORMATS = ["JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA"]
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHER_TIFF = "a kind of TIFF that is not read, or damaged: convert it to PNG"
_LONGEST = 1000
_SEVERAL = "have several frames or pages: the first is read"


class Picture(NamedTuple):
    """A decoded picture."""

    image: Image.Image  # RGB
    remarks: list[str]  # what was lost or guessed, as the end of a sentence that begins with "12 images"
    digest: bytes  # 16 bytes: XXH3 of the file's bytes, or of shape and pixels where there is no file


def decode(content: bytes, name: str) -> Picture:
    """Decode the content of an image file; its extension does not matter. Of several frames the first is taken.

    `DataError` where it is not an image, is cut off or damaged, has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``
    (where PIL warns of a decompression bomb), or is a thousand times as long as wide.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so cut-off images would pass unseen: switch it off")
    if not content:
        raise DataError(f"{shown(name)}: not an image: it is empty")
    advice = advice_on_content(content) or advice_on_name(name)
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if image.format == "TIFF" and advice:
                raise ValueError(advice)  # PIL would read its preview
            _require_few_pixels(image)
            if image.format == "JPEG2000":
                require_end_of_jpeg2000(content)
            pixels, remarks = _rendered(image, declared_bits(image, content))
    except UnidentifiedImageError:
        unknown = _OTHER_TIFF if content.startswith(_TIFF_STARTS) else "not an image"
        raise DataError(f"{shown(name)}: {advice or unknown}") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise DataError(f"{shown(name)}: {one_line(error)}") from error
    return Picture(pixels, remarks, digest_of(content))


def from_pixels(image: Any, name: str) -> Picture:
    """The picture in an image of PIL or a uint8 array of shape (h, w, 3) or (h, w); `DataError` at anything else."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size and image.shape[2:] in ((), (3,)):
        return Picture(Image.fromarray(image).convert("RGB"), [], digest_of_pixels(image))
    if not isinstance(image, Image.Image):
        kind = type(image).__name__ + (f", {image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else "")
        advice = "" if isinstance(image, np.ndarray) else " (a dataset is passed without transform to tensors)"
        raise DataError(
            f"{shown(name)} is of type {kind}; accepted are an image of PIL and a uint8 array (h, w, 3){advice}"
        )
    try:
        pixels, remarks = _rendered(image, None if image.mode.startswith("I") else 8)
    except Exception as error:  # files that are opened, but not read yet, may be damaged
        raise DataError(f"{shown(name)}: {one_line(error)}") from error
    return Picture(pixels, remarks, digest_of_pixels(np.asarray(pixels)))


def digest_of(content: bytes | Picture) -> bytes:
    """Digest of the content of a file, or the digest of a picture that comes from no file."""
    return content.digest if isinstance(content, Picture) else xxhash.xxh3_128_digest(content)


def digest_of_pixels(pixels: NDArray[np.uint8]) -> bytes:
    """Digest of pixels that come from no file; grey pixels have that of the three equal channels."""
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    return digest_of(repr(rgb.shape).encode() + rgb.tobytes())


def _rendered(image: Image.Image, bits: int | None) -> tuple[Image.Image, list[str]]:
    """An image of PIL as eight-bit RGB, the right way up, and remarks; `ValueError` where that cannot be done.

    Colours under transparency are kept, as in timm. Of grey values the upper eight bits are taken: of the ``bits`` that
    the file declares, else of 8, 12 or 16, the first that hold all values. 16 bits of colour are cut to their upper 8.
    """
    require_readable(image)
    several = [_SEVERAL] if image.format != "MPO" and getattr(image, "is_animated", False) else []
    turn, remarks = transposition(image)
    pixels, more = as_rgb(image, bits)
    return pixels if turn is None else pixels.transpose(turn), [*several, *remarks, *more]


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of PIL can open."""
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
