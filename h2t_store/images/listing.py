"""List files: one image per line, as the VTAB-1k benchmark writes them, ``images/train/0000.jpg 12``."""

import os
import re
import stat
from pathlib import Path

import numpy as np

from h2t_store.errors import DataError
from h2t_store.images.fingerprint import Digests
from h2t_store.images.folder import FolderSource
from h2t_store.images.foreign import foreign_name
from h2t_store.images.labels import encode, encode_words
from h2t_store.images.names import as_names, count, shown
from h2t_store.images.pictures import is_image_name

__all__ = ["open_list"]

_PATH_AND_LABEL = re.compile(r"(.*[^ \t])[ \t]+([^ \t]+)")


def open_list(path: Path, root: Path) -> FolderSource:
    """Images of a list file, in its order.

    The label is what follows the last space or tab. Where every line ends in the extension of an image, there are no
    labels. Blank lines and those that begin with ``#`` are left out.
    """
    lines, notes = _lines(path)
    if not lines:
        raise DataError(f"data {str(path)!r} lists no images")
    if all(is_image_name(line) or foreign_name(line) for line in lines.values()):
        paths = list(lines.values())
        y, classes = encode(None, len(paths))
        notes.append(f"{len(paths)} images without labels")
    else:
        pairs = [_split(line, f"{shown(path)}, line {number}") for number, line in lines.items()]
        paths = [image for image, _ in pairs]
        y, classes = encode_words([label for _, label in pairs])
    _require_files(path, root, list(lines), paths)
    return FolderSource(
        origin={"kind": "list"},
        sample_ids=as_names(paths),
        y=y,
        classes=classes,
        notes=notes,
        numbers=np.arange(len(paths)),
        digests=Digests(len(paths)),
        root=root,
    )


def _lines(path: Path) -> tuple[dict[int, str], list[str]]:
    """The lines that count by their numbers, and notes on the others."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data {str(path)!r}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{shown(path)}, line {number}: not UTF-8; accepted is a text, or a .tar") from None
    lines = {number: line.strip(" \t\r") for number, line in enumerate(text.split("\n"), 1)}
    if lines[len(lines)] == "":
        del lines[len(lines)]
    blank = [f"line {number}" for number, line in lines.items() if not line]
    comments = [line for line in lines.values() if line.startswith("#")]
    odd = next((number for number, line in lines.items() if not line.replace("\t", " ").isprintable()), None)
    if odd is not None and "\0" in text:
        raise DataError(f"{shown(path)}, line {odd}: not a text; accepted is a list of images in UTF-8, or a .tar")
    return (
        {number: line for number, line in lines.items() if line and not line.startswith("#")},
        [*count(blank, "blank lines were left out"), *count(comments, "comments were left out")],
    )


def _split(line: str, where: str) -> tuple[str, str]:
    match = _PATH_AND_LABEL.fullmatch(line)
    if match is None:
        raise DataError(f"{where}: {line!r} has no label; accepted is 'path label' on every line, or only paths")
    return match[1], match[2]


def _require_files(path: Path, root: Path, numbers: list[int], images: list[str]) -> None:
    missing = [(number, image) for number, image in zip(numbers, images, strict=True) if not _is_file(root, image)]
    if missing:
        number, image = missing[0]
        more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{shown(path)}, line {number}: no file {shown(os.path.join(root, image))!r}{more}")


def _is_file(root: Path, image: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(os.path.join(root, image)).st_mode)
    except (OSError, ValueError):
        return False
