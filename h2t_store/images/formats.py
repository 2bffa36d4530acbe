"""Image formats: which extensions are read, and how to convert other formats."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence

from h2t_store.images.names import notes_on

_READ = "jpg jpeg jpe jfif png apng bmp dib gif webp tif tiff ppm pgm pbm pnm jp2 j2k jpc jpx jpf avif tga ico"
IMAGE_EXTENSIONS = frozenset("." + extension for extension in _READ.split())

_NOT_READ = [  # advice, extensions, how such a file begins
    (
        "HEIC is not read: convert to JPEG (heif-convert, or pillow-heif in Python)",
        "heic heif hif heics heifs",
        rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)",
    ),
    ("DICOM is not read: convert to PNG (dcmj2pnm, or pydicom in Python)", "dcm dicom dic", rb".{128}DICM"),
    (
        "camera raw is not read: develop to JPEG or TIFF (darktable-cli, or rawpy in Python)",
        "3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f",
        rb".{4}ftypcrx |FUJIFILMCCD-RAW|II(RO|RS|U\0)|MMOR|FOVb|II\*\0.{4}CR",
    ),
    ("AVIF is read from Pillow 11.3 on: update Pillow", "", rb".{4}ftypavi[fs]"),
    ("JPEG XL is not read: convert to PNG (djxl)", "jxl", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("SVG is not read: draw it as PNG (rsvg-convert)", "svg svgz", rb"<svg"),
    ("Photoshop files are not read: export as PNG", "psd psb", rb"8BPS"),
]
_ADVICE = {"." + extension: advice for advice, extensions, _ in _NOT_READ for extension in extensions.split()}
_STARTS = [(re.compile(start, re.DOTALL), advice) for advice, _, start in _NOT_READ]


def is_image_name(name: str) -> bool:
    """Whether the extension, in either case, is one of an image."""
    dot = name.rfind(".")
    return dot > name.rfind("/") + 1 and name[dot:].lower() in IMAGE_EXTENSIONS


def advice_on_name(name: str) -> str | None:
    """How to convert a file with this extension; None if its format is read, or unknown."""
    return _ADVICE.get(os.path.splitext(name)[1].lower())


def advice_on_content(content: bytes) -> str | None:
    """How to convert a file with this content; None if its format is read, or unknown."""
    return next((advice for start, advice in _STARTS if start.match(content)), None)


def notes_on_left_out(names: Sequence[str], what: str) -> list[str]:
    """One line for each format that can be converted, and ``WHAT`` for the rest."""
    by_advice = defaultdict(list)
    for name in names:
        by_advice[advice_on_name(name) or ""].append(name)
    rest = by_advice.pop("", [])
    return notes_on(
        *((by_advice[advice], f"files were left out: {advice}") for advice in sorted(by_advice)), (rest, what)
    )
