"""Image files in folders: the folder that a file lies in is its class, by its path, so equal leaf names stay apart."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError
from h2t_store.images.fingerprint import Digests, read_file, stamps_of_files
from h2t_store.images.foreign import foreign_name, left_out
from h2t_store.images.names import as_names, count, shown
from h2t_store.images.pictures import is_image_name
from h2t_store.images.source import UNLABELLED, Source
from h2t_store.images.splits import choose_split, find_split

__all__ = ["FolderSource", "Found", "classes_of", "open_folder", "require_images", "walk"]


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderSource(Source):
    """Image files; ``sample_ids`` are their paths, relative to ``root`` where they are not absolute."""

    root: Path

    def where(self, row: int) -> str:
        return os.path.join(self.root, self.sample_ids[row])

    def content(self, row: int) -> bytes:
        try:
            content, found = read_file(self.where(row))
        except OSError as error:
            _cannot_read(error)
        self.require_stamp(row, found)
        return content

    def stamps(self) -> NDArray[np.int64]:
        try:
            return stamps_of_files(os.path.join(self.root, name) for name in self.sample_ids)
        except OSError as error:
            _cannot_read(error)


@dataclass
class Found:
    """What lies below a folder; paths are relative to it."""

    images: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    without_images: list[str] = field(default_factory=list)
    broken_links: list[str] = field(default_factory=list)
    circular_links: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """One line for each kind of thing that is left out."""
        return [
            *left_out(self.other, "files are not images and were left out"),
            *count(self.without_images, "folders hold no images"),
            *count(self.hidden, "hidden files and folders were left out"),
            *count(self.circular_links, "links to a folder above were left out"),
        ]


def open_folder(root: Path, split: str | None) -> FolderSource:
    """All images below a folder, or below the folder of a split in it."""
    if split is not None:
        root = root / find_split(split, lambda folder: _folders_in(os.path.join(root, folder)), repr(str(root)))
    found = walk(root)
    if found.broken_links:
        raise DataError(f"data: {count(found.broken_links, f'links in {shown(root)} lead nowhere')[0]}")
    require_images(found.images, found.other, f"data {str(root)!r}")
    inside, notes = choose_split(found.images, f"data {str(root)!r}")
    root = root / inside
    images = sorted(os.path.relpath(path, inside) if inside else path for path in found.images)
    y, classes = classes_of([os.path.dirname(path) for path in images], images, f"data {str(root)!r}")
    notes = [*found.notes(), *notes]
    if not classes:
        notes.append(f"{len(images)} images without class folders: unlabelled")
    return FolderSource(
        origin={"kind": "folder"},
        sample_ids=as_names(images),
        y=y,
        classes=classes,
        notes=notes,
        numbers=np.arange(len(images)),
        digests=Digests(len(images)),
        root=root,
    )


def require_images(images: list[str], other: list[str], where: str) -> None:
    """Raise `DataError` where there are none, with what there is instead."""
    if not images:
        held = f"; it holds {len(other)} other files, such as {sorted(other)[0]!r}" if other else ""
        advice = next((f": {advice}" for name in sorted(other) if (advice := foreign_name(name))), "")
        raise DataError(f"{where} holds no images{held}{advice}")


def classes_of(folders: list[str], images: list[str], where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels of ``images`` by their folders; none where all lie at the top, an error where some do."""
    labels = set(folders)
    if "" in labels and len(labels) > 1:
        loose = [path for path, label in zip(images, folders, strict=True) if not label]
        raise DataError(
            f"{where} holds class folders and {len(loose)} images beside them, such as {loose[0]!r}: "
            "move them into a class folder"
        )
    classes = tuple(sorted(labels - {""}))
    index = {"": UNLABELLED} | {label: i for i, label in enumerate(classes)}
    return np.fromiter((index[label] for label in folders), dtype=np.int64, count=len(folders)), classes


def walk(root: Path) -> Found:
    """Everything below ``root``; links are followed, but not to a folder above."""
    found = Found()
    try:
        status = os.stat(root)
        folders = [("", frozenset([(status.st_dev, status.st_ino)]))]
        while folders:
            folder, above = folders.pop()
            folders += _list(root, folder, above, found)
    except OSError as error:
        _cannot_read(error)
    return found


_Identity = tuple[int, int]


def _list(root: Path, folder: str, above: frozenset[_Identity], found: Found) -> list[tuple[str, frozenset[_Identity]]]:
    """Sort the entries of one folder into ``found``; the folders in it, each with what lies above its entries."""
    folders: list[tuple[str, frozenset[_Identity]]] = []
    any_image = any_folder = False
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                found.hidden.append(path)
            elif entry.is_dir():
                any_folder = True
                status = entry.stat()
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    found.circular_links.append(path)
                else:
                    folders.append((path, above | {identity}))
            elif not is_image_name(entry.name):
                found.other.append(path)
            elif entry.is_file():
                any_image = True
                found.images.append(path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                found.broken_links.append(path)
            else:
                found.other.append(path)
    if not any_image and not any_folder and folder:
        found.without_images.append(folder)
    return folders


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        _cannot_read(error)


def _cannot_read(error: OSError) -> NoReturn:
    raise DataError(f"data: {shown(error.filename)}: {error.strerror}") from error
