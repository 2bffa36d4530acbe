"""Image files in folders or in a list: the folder of a file is its class, by its path, so equal leaf names stay apart.

The readers of torchvision, timm and `datasets` leave out other extensions and empty folders without a word, and the
latter two merge classes with equal leaf names.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError
from h2t_store.images.formats import advice_on_name, is_image_name, notes_on_left_out
from h2t_store.images.names import counted, encode, encode_words, notes_on, shown
from h2t_store.images.source import Reader, Source, Stamp, read_file, stamp_file
from h2t_store.images.splits import choose_split, find_split

_PATH_AND_LABEL = re.compile(r"(.*[^ \t])[ \t]+([^ \t]+)")


class FileReader(Reader):
    """Files, whose identifiers are their paths, relative to ``root`` where they are not absolute."""

    has_stamps = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)

    def where(self, number: int, sample_id: str) -> str:
        return os.path.join(self.root, sample_id)

    def read(self, number: int, where: str) -> bytes:
        return read_file(where)

    def stamp(self, number: int, where: str) -> Stamp:
        return stamp_file(where)


def open_folder(root: Path, split: str | None) -> Source:
    """All images below a folder, or below the folder of a split in it."""
    try:
        if split is not None:
            root = root / find_split(split, lambda folder: _folders_in(root / folder), repr(str(root)))
        found = _walk(root)
    except OSError as error:
        raise DataError(f"data: {shown(error.filename)}: {error.strerror}") from error
    where = f"data {str(root)!r}"
    if found["broken links"]:
        raise DataError(f"data: {counted(found['broken links'], f'links in {shown(root)} lead nowhere')}")
    images = sorted(found["images"])
    require_images(images, found["other"], where)
    inside, notes = choose_split(images, where)
    ids = [os.path.relpath(path, inside) if inside else path for path in images]
    y, classes, unlabelled = classes_of([os.path.dirname(path) for path in ids], ids, where)
    left_out = notes_on_left_out(found["other"], "files are not images and were left out")
    left_out += notes_on(
        (found["empty"], "folders hold no images"),
        (found["hidden"], "hidden files and folders were left out"),
        (found["circular links"], "links to a folder above were left out"),
    )
    notes = [*left_out, *notes, *unlabelled]
    return Source.of(FileReader(root / inside), ids, y, classes, notes=notes, origin={"kind": "folder"})


def require_images(images: Sequence[str], other: Sequence[str], where: str) -> None:
    """Raise `DataError` where there are no images, with what there is instead."""
    if not images:
        held = f"; it holds {len(other)} other files, such as {sorted(other)[0]!r}" if other else ""
        advice = next((f": {advice}" for name in sorted(other) if (advice := advice_on_name(name))), "")
        raise DataError(f"{where} holds no images{held}{advice}")


def classes_of(
    folders: Sequence[str], images: Sequence[str], where: str
) -> tuple[NDArray[np.int64], tuple[str | int, ...], list[str]]:
    """Labels of ``images`` by their folders, classes and notes; unlabelled where all lie at the top."""
    loose = [path for path, folder in zip(images, folders, strict=True) if not folder]
    if not loose:
        return *encode(folders, len(folders)), []
    if len(loose) == len(images):
        return *encode(None, len(images)), [f"{len(images)} images without class folders: unlabelled"]
    raise DataError(
        f"{where} holds class folders and {len(loose)} images beside them, such as {loose[0]!r}: "
        "move them into a class folder"
    )


def _walk(root: Path) -> dict[str, list[str]]:
    """Paths below ``root`` by what they are; links are followed, but not to a folder above."""
    found: dict[str, list[str]] = {"images": [], "other": [], "hidden": [], "empty": []}
    found |= {"broken links": [], "circular links": []}
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while folders:
        folder, above = folders.pop()
        status = os.stat(os.path.join(root, folder))
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            found["circular links"].append(folder)
            continue
        before = len(folders) + len(found["images"])
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    found["hidden"].append(path)
                elif entry.is_dir():
                    folders.append((path, above | {identity}))
                elif is_image_name(entry.name) and entry.is_file():
                    found["images"].append(path)
                elif is_image_name(entry.name) and entry.is_symlink() and not os.path.exists(entry.path):
                    found["broken links"].append(path)
                else:
                    found["other"].append(path)
        if folder and len(folders) + len(found["images"]) == before:
            found["empty"].append(folder)
    return found


def _folders_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]


def open_list(path: Path, root: Path) -> Source:
    """Images of a list file, in its order: ``images/train/0000.jpg 12`` on each line, as in the VTAB-1k benchmark.

    The label is what follows the last space or tab. Where every line ends in the extension of an image, there are no
    labels. Blank lines and those that begin with ``#`` are left out.
    """
    lines, notes = _lines(path)
    if not lines:
        raise DataError(f"data {str(path)!r} lists no images")
    if all(is_image_name(line) or advice_on_name(line) for line in lines.values()):
        paths = list(lines.values())
        y, classes = encode(None, len(paths))
        notes.append(f"{len(paths)} images without labels")
    else:
        pairs = [_PATH_AND_LABEL.fullmatch(line) for line in lines.values()]
        if None in pairs:
            number, line = list(lines.items())[pairs.index(None)]
            raise DataError(
                f"{shown(path)}, line {number}: {line!r} has no label; accepted is 'path label' on every line, or only "
                "paths"
            )
        paths = [pair[1] for pair in pairs if pair]
        y, classes = encode_words([pair[2] for pair in pairs if pair])
    missing = [(number, image) for number, image in zip(lines, paths, strict=True) if not os.path.isfile(root / image)]
    if missing:
        number, image = missing[0]
        more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{shown(path)}, line {number}: no file {shown(os.path.join(root, image))!r}{more}")
    return Source.of(FileReader(root), paths, y, classes, notes=notes, origin={"kind": "list"})


def _lines(path: Path) -> tuple[dict[int, str], list[str]]:
    """The lines that count by their numbers, and notes on the others."""
    content = read_file(str(path))
    accepted = "accepted is a list of images in UTF-8, or a .tar"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{shown(path)}, line {number}: not UTF-8; {accepted}") from None
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{shown(path)}, line {number}: not a text; {accepted}")
    lines = {number: line.strip(" \t\r") for number, line in enumerate(text.removesuffix("\n").split("\n"), 1) if text}
    blank = [f"line {number}" for number, line in lines.items() if not line]
    comments = [line for line in lines.values() if line.startswith("#")]
    return (
        {number: line for number, line in lines.items() if line and not line.startswith("#")},
        notes_on((blank, "blank lines were left out"), (comments, "comments were left out")),
    )
