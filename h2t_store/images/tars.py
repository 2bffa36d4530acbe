"""Images in tars, read where they lie: an index of offsets is made once, and nothing is unpacked or cached.

Rows are read in any order and from many processes, which neither webdataset's nor timm's iterators give; `datasets`
copies shards into its cache first. timm's reader of tars merges classes with equal leaf names, and forked workers that
share its open file put other images in the place of those asked for.
"""

import os
import tarfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError, one_line
from h2t_store.images.files import classes_of, require_images
from h2t_store.images.formats import is_image_name, notes_on_left_out
from h2t_store.images.names import as_names, notes_on, shown
from h2t_store.images.source import Source, Stamp, read_file, stamp_of
from h2t_store.images.splits import choose_split, find_split

_BLOCK = 512
_READ_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class TarSource(Source):
    """Images in tars.

    Attributes
    ----------
    tars : tuple of (str, Stamp)
        Paths of the tars, and their stamps when they were indexed.
    places : ndarray of shape (n_images, 3), int64
        For each image the number of its tar, offset and size.
    """

    tars: tuple[tuple[str, Stamp], ...]
    places: NDArray[np.int64] = field(repr=False)

    def where(self, row: int) -> str:
        return f"{self.tars[self.places[self.numbers[row], 0]][0]}: {self.sample_ids[row]}"

    def read(self, row: int) -> tuple[bytes, Stamp]:
        tar, offset, size = self.places[self.numbers[row]].tolist()
        return read_part(*self.tars[tar], offset, size), self.stamp(row)

    def stamp(self, row: int) -> Stamp:
        tar, _, size = self.places[self.numbers[row]].tolist()
        return size, self.tars[tar][1][1]


def read_part(path: str, stamp: Stamp, offset: int, size: int) -> bytes:
    """``size`` bytes of a tar that had this stamp; `DataError` where it has changed since, or is cut off."""
    content, found = read_file(path, offset, size)
    if found != stamp:
        raise DataError(f"{shown(path)}: it has changed since it was opened")
    if len(content) < size:
        raise DataError(f"{shown(path)}: it ends within an image")
    return content


@dataclass
class Index:
    """What a tar holds: files with offset and size, folders, and names of what cannot be read in place."""

    stamp: Stamp
    names: list[str] = field(default_factory=list)
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    folders: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)


def open_tar(path: Path, split: str | None) -> TarSource:
    """All images of a tar, or those in the folder of a split.

    Classes are the folders they lie in, without the folders above that all have in common.
    """
    where = f"data {str(path)!r}"
    index = index_tar(path)
    latest = {name: i for i, name in enumerate(index.names)}
    replaced = [name for i, name in enumerate(index.names) if latest[name] != i]
    hidden = [name for name in latest if _is_hidden(name)]
    visible = sorted(latest.keys() - hidden)
    images = [name for name in visible if is_image_name(name)]
    other = [name for name in visible if not is_image_name(name)]
    require_images(images, other, where)
    inside = ""
    if split is not None:
        inside = f"{find_split(split, lambda folder: _folders_in(images, folder), where)}/"
        images = [name for name in images if name.startswith(inside)]
    chosen_split, notes = choose_split(images, where)
    folders = [os.path.dirname(name) for name in images]
    below = _below_what_is_common([folder[len(chosen_split) :].lstrip("/") for folder in folders])
    y, classes, unlabelled = classes_of(below, images, where)
    without_images = _leaves(index.folders) - _with_those_above(folders)
    return TarSource(
        origin={"kind": "tar"},
        sample_ids=as_names(images),
        y=y,
        classes=classes,
        notes=[
            *notes_on_left_out(
                [name for name in other if name.startswith(inside)], "files are not images and were left out"
            ),
            *notes_on(
                ([name for name in without_images if name.startswith(inside)], "folders hold no images"),
                (hidden, "hidden files were left out"),
                (index.special, "links, devices and sparse files were left out"),
                (replaced, "files were left out, as the tar holds later ones of the same name"),
            ),
            *notes,
            *unlabelled,
        ],
        tars=((str(path.absolute()), index.stamp),),
        places=np.insert(index.places[[latest[name] for name in images]], 0, 0, axis=1),
    )


def index_tar(path: Path) -> Index:
    """What a tar holds; `DataError` where it is cut off, damaged or compressed."""
    try:
        with open(path, "rb") as file:
            return _index(file, path)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"data {str(path)!r}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # tarfile and, on damaged headers, what it calls
        raise DataError(f"data {str(path)!r}: a damaged tar: {one_line(error)}") from error


def _index(file: Any, path: Path) -> Index:
    index = Index(stamp_of(os.fstat(file.fileno())))
    places, position = array("q"), -1
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            if member.offset <= position or member.size < 0:
                raise DataError(f"data {str(path)!r}: a damaged tar: a member of negative size")
            position = member.offset
            name = member.name
            while name.startswith("./"):
                name = name[2:].lstrip("/")
            if member.isdir():
                index.folders.append(name)
            elif member.isreg() and not member.issparse():
                index.names.append(name)
                places.extend((member.offset_data, member.size))
            else:
                index.special.append(name)
        _require_end(file, archive.offset, path)
    index.places = np.array(places, dtype=np.int64).reshape(-1, 2)
    return index


def _require_end(file: Any, offset: int, path: Path) -> None:
    """`tarfile` takes a header that is cut off or damaged for the end, and stops at the first end of several."""
    file.seek(offset)
    mark = file.read(_BLOCK)
    if len(mark) < _BLOCK or any(mark):
        raise DataError(f"data {str(path)!r}: the tar is cut off or damaged at byte {offset}")
    while rest := file.read(_READ_AT_ONCE):
        if any(rest):
            raise DataError(
                f"data {str(path)!r}: the tar ends at byte {offset}, but more follows, such as another tar: split them"
            )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _folders_in(images: list[str], above: str) -> list[str]:
    """Names of the folders in a folder that hold images."""
    start = f"{above}/" if above else ""
    below = (name[len(start) :].partition("/") for name in images if name.startswith(start))
    return sorted({name for name, slash, _ in below if slash})


def _below_what_is_common(folders: list[str]) -> list[str]:
    """Without the leading folders that all share, so that ``train/cat`` of one tar is ``test/cat`` of another."""
    parents = {os.path.dirname(folder) for folder in set(folders)}
    if "" in parents or len({parent.startswith("/") for parent in parents}) > 1:
        return folders
    common = os.path.commonpath(parents)
    return [folder[len(common) :].lstrip("/") for folder in folders]


def _with_those_above(folders: list[str]) -> set[str]:
    found: set[str] = set()
    for folder in set(folders):
        while folder and folder not in found:
            found.add(folder)
            folder = os.path.dirname(folder)
    return found


def _leaves(folders: list[str]) -> set[str]:
    """Folders that hold no others."""
    return set(folders) - _with_those_above([os.path.dirname(folder) for folder in folders]) - {"", "."}
