"""Pictures in formats that PIL does not read, or reads only the preview of: named, with what to do about them."""

import os
from collections import defaultdict
from collections.abc import Sequence

from h2t_store.images.names import count

__all__ = ["foreign_content", "foreign_name", "left_out"]

_HEIC = "HEIC is not read: convert to JPEG (heif-convert, or pillow-heif in Python)"
_DICOM = "DICOM is not read: convert to PNG (dcmj2pnm, or pydicom in Python)"
_RAW = "camera raw is not read: develop to JPEG or TIFF (darktable-cli, or rawpy in Python)"
_AVIF = "AVIF is read from Pillow 11.3 on: update Pillow"
_JXL = "JPEG XL is not read: convert to PNG (djxl)"
_SVG = "SVG is not read: draw it as PNG (rsvg-convert)"
_PSD = "Photoshop files are not read: export as PNG"

_EXTENSIONS = {
    extension: advice
    for advice, extensions in {
        _HEIC: "heic heif hif heics heifs",
        _DICOM: "dcm dicom dic",
        _RAW: "3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw "
        "x3f",
        _JXL: "jxl",
        _SVG: "svg svgz",
        _PSD: "psd psb",
    }.items()
    for extension in extensions.split()
}
_MAGIC = {
    b"FUJIFILMCCD-RAW": _RAW,
    b"IIRO": _RAW,
    b"IIRS": _RAW,
    b"MMOR": _RAW,
    b"IIU\0": _RAW,
    b"FOVb": _RAW,
    b"\xff\x0a": _JXL,
    b"\0\0\0\x0cJXL ": _JXL,
    b"<svg": _SVG,
    b"8BPS": _PSD,
}
_BRANDS = dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), _HEIC)
_BRANDS |= {b"avif": _AVIF, b"avis": _AVIF, b"crx ": _RAW}


def foreign_name(name: str) -> str | None:
    """What to do about a file with this extension; None where it is no picture, or one that is read."""
    return _EXTENSIONS.get(os.path.splitext(name)[1][1:].lower())


def foreign_content(content: bytes) -> str | None:
    """What to do about a file that holds this, whatever it is called."""
    if content[4:8] == b"ftyp":
        return _BRANDS.get(content[8:12])
    if content[128:132] == b"DICM":
        return _DICOM
    if content[:4] == b"II*\0" and content[8:10] == b"CR":
        return _RAW
    return next((advice for magic, advice in _MAGIC.items() if content.startswith(magic)), None)


def left_out(names: Sequence[str], what: str) -> list[str]:
    """Notes on files that are not read: a line for each format that can be converted, and ``WHAT`` for the rest."""
    by_advice = defaultdict(list)
    for name in names:
        by_advice[foreign_name(name) or ""].append(name)
    rest = by_advice.pop("", [])
    lines = [count(found, f"files were left out: {advice}")[0] for advice, found in sorted(by_advice.items())]
    return [*lines, *count(rest, what)]
