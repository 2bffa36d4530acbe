"""Image files in folders or in a list: the folder of a file is its class, by its path, so equal leaf names stay apart.

torchvision's and timm's readers, and `datasets`' image folder, leave out other extensions and empty folders without a
word, and the latter two merge classes with equal leaf names.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError
from h2t_store.images.formats import advice_on_name, is_image_name, notes_on_left_out
from h2t_store.images.names import as_names, counted, encode, encode_words, notes_on, shown
from h2t_store.images.source import Source, Stamp, read_file, stamp_of
from h2t_store.images.splits import choose_split, find_split

_PATH_AND_LABEL = re.compile(r"(.*[^ \t])[ \t]+([^ \t]+)")


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSource(Source):
    """Image files; ``sample_ids`` are their paths, relative to ``root`` where they are not absolute."""

    root: Path

    def where(self, row: int) -> str:
        return os.path.join(self.root, self.sample_ids[row])

    def read(self, row: int) -> tuple[bytes, Stamp]:
        return read_file(self.where(row))

    def stamp(self, row: int) -> Stamp:
        try:
            return stamp_of(os.stat(self.where(row)))
        except OSError as error:
            raise _unreadable(error) from error


def open_folder(root: Path, split: str | None) -> FileSource:
    """All images below a folder, or below the folder of a split in it."""
    if split is not None:
        root = root / find_split(split, lambda folder: _folders_in(os.path.join(root, folder)), repr(str(root)))
    found = _walk(root)
    where = f"data {str(root)!r}"
    if found.broken_links:
        raise DataError(f"data: {counted(found.broken_links, f'links in {shown(root)} lead nowhere')}")
    require_images(found.images, found.other, where)
    inside, notes = choose_split(found.images, where)
    images = sorted(os.path.relpath(path, inside) if inside else path for path in found.images)
    y, classes, unlabelled = classes_of([os.path.dirname(path) for path in images], images, where)
    return FileSource(
        origin={"kind": "folder"},
        sample_ids=as_names(images),
        y=y,
        classes=classes,
        notes=[
            *notes_on_left_out(found.other, "files are not images and were left out"),
            *notes_on(
                (found.without_images, "folders hold no images"),
                (found.hidden, "hidden files and folders were left out"),
                (found.circular_links, "links to a folder above were left out"),
            ),
            *notes,
            *unlabelled,
        ],
        root=root / inside,
    )


def require_images(images: Sequence[str], other: Sequence[str], where: str) -> None:
    """Raise `DataError` where there are no images, with what there is instead."""
    if not images:
        held = f"; it holds {len(other)} other files, such as {sorted(other)[0]!r}" if other else ""
        advice = next((f": {advice}" for name in sorted(other) if (advice := advice_on_name(name))), "")
        raise DataError(f"{where} holds no images{held}{advice}")


def classes_of(
    folders: Sequence[str], images: Sequence[str], where: str
) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
    """Labels of ``images`` by their folders, classes and notes; unlabelled where all lie at the top."""
    labels = set(folders)
    if labels == {""}:
        y, _ = encode(None, len(images))
        return y, (), [f"{len(images)} images without class folders: unlabelled"]
    if "" in labels:
        loose = [path for path, label in zip(images, folders, strict=True) if not label]
        raise DataError(
            f"{where} holds class folders and {len(loose)} images beside them, such as {loose[0]!r}: "
            "move them into a class folder"
        )
    classes = tuple(sorted(labels))
    index = {label: i for i, label in enumerate(classes)}
    return np.array([index[label] for label in folders], dtype=np.int64), classes, []


@dataclass
class _Found:
    """What lies below a folder; paths are relative to it."""

    images: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    without_images: list[str] = field(default_factory=list)
    broken_links: list[str] = field(default_factory=list)
    circular_links: list[str] = field(default_factory=list)


def _walk(root: Path) -> _Found:
    """Everything below ``root``; links are followed, but not to a folder above."""
    found = _Found()
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    try:
        while folders:
            folder, above = folders.pop()
            status = os.stat(os.path.join(root, folder))
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                found.circular_links.append(folder)
            else:
                folders += [(path, above | {identity}) for path in _list(root, folder, found)]
    except OSError as error:
        raise _unreadable(error) from error
    return found


def _list(root: Path, folder: str, found: _Found) -> list[str]:
    """Sort the entries of one folder into ``found``; the folders in it."""
    folders, n_images = [], len(found.images)
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                found.hidden.append(path)
            elif entry.is_dir():
                folders.append(path)
            elif is_image_name(entry.name) and entry.is_file():
                found.images.append(path)
            elif is_image_name(entry.name) and entry.is_symlink() and not os.path.exists(entry.path):
                found.broken_links.append(path)
            else:
                found.other.append(path)
    if folder and not folders and len(found.images) == n_images:
        found.without_images.append(folder)
    return folders


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> DataError:
    return DataError(f"data: {shown(error.filename)}: {error.strerror}")


def open_list(path: Path, root: Path) -> FileSource:
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
        pairs = {number: _PATH_AND_LABEL.fullmatch(line) for number, line in lines.items()}
        for number, pair in pairs.items():
            if pair is None:
                raise DataError(
                    f"{shown(path)}, line {number}: {lines[number]!r} has no label; accepted is 'path label' on every "
                    "line, or only paths"
                )
        paths = [pair[1] for pair in pairs.values() if pair]
        y, classes = encode_words([pair[2] for pair in pairs.values() if pair])
    missing = [(number, image) for number, image in zip(lines, paths, strict=True) if not _is_file(root, image)]
    if missing:
        number, image = missing[0]
        more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{shown(path)}, line {number}: no file {shown(os.path.join(root, image))!r}{more}")
    return FileSource(origin={"kind": "list"}, sample_ids=as_names(paths), y=y, classes=classes, notes=notes, root=root)


def _lines(path: Path) -> tuple[dict[int, str], list[str]]:
    """The lines that count by their numbers, and notes on the others."""
    content, _ = read_file(str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{shown(path)}, line {number}: not UTF-8; accepted is a text, or a .tar") from None
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{shown(path)}, line {number}: not a text; accepted is a list of images in UTF-8, or a .tar")
    lines = {number: line.strip(" \t\r") for number, line in enumerate(text.removesuffix("\n").split("\n"), 1) if text}
    blank = [f"line {number}" for number, line in lines.items() if not line]
    comments = [line for line in lines.values() if line.startswith("#")]
    return (
        {number: line for number, line in lines.items() if line and not line.startswith("#")},
        notes_on((blank, "blank lines were left out"), (comments, "comments were left out")),
    )


def _is_file(root: Path, image: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(os.path.join(root, image)).st_mode)
    except (OSError, ValueError):
        return False
