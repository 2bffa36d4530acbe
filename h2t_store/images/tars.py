"""Images in tars, read in place by an index of offsets; nothing is unpacked or cached.

Any process can read any row, which iterators such as webdataset's do not allow. `datasets` copies shards into its
cache and reads a cut-off shard as a shorter one. timm's tar reader merges classes with equal leaf names, and returns
wrong images in forked workers, which share its open file.
"""

import os
import tarfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError, one_line
from h2t_store.images.files import classes_of, require_images
from h2t_store.images.formats import is_image_name, notes_on_left_out
from h2t_store.images.names import notes_on, shown
from h2t_store.images.source import Reader, Source, Stamp, read_file, stamp_file
from h2t_store.images.splits import choose_split, find_split

_BLOCK = 512
_READ_AT_ONCE = 1 << 20


@dataclass
class Tar:
    """What a tar holds: files with offset and size (n, 2), folders, and what cannot be read in place."""

    path: str
    stamp: Stamp
    names: list[str] = field(default_factory=list)
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    folders: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)


class TarReader(Reader):
    """Images in tars, whose ``places`` (n, 3) are the number of the tar, offset and size."""

    has_stamps = True

    def __init__(self, tars: Sequence[Tar], places: NDArray[np.int64]) -> None:
        self.tars = [(tar.path, tar.stamp) for tar in tars]
        self.places = places

    def where(self, number: int, sample_id: str) -> str:
        return f"{self.tars[self.places[number, 0]][0]}: {sample_id}"

    def read(self, number: int, where: str) -> bytes:
        tar, offset, size = self.places[number].tolist()
        path, stamp = self.tars[tar]
        return read_part(path, stamp, offset, size)

    def stamp(self, number: int, where: str) -> Stamp:
        tar, _, size = self.places[number].tolist()
        return size, self.tars[tar][1][1]


def read_part(path: str, stamp: Stamp, offset: int, size: int) -> bytes:
    """Read ``size`` bytes of a tar; `DataError` if its stamp has changed, or it is cut off."""
    content = read_file(path, offset, size)
    if stamp_file(path) != stamp:
        raise DataError(f"{shown(path)}: it has changed since it was opened")
    if len(content) < size:
        raise DataError(f"{shown(path)}: it ends within an image")
    return content


def open_tar(path: Path, split: str | None) -> Source:
    """All images of a tar, or those in the folder of a split.

    Classes are the folders they lie in, without the folders above that all have in common.
    """
    where = f"data {str(path)!r}"
    tar = index_tar(path)
    latest = {name: i for i, name in enumerate(tar.names)}
    hidden = [name for name in latest if any(part[:1] == "." and part not in (".", "..") for part in name.split("/"))]
    visible = sorted(latest.keys() - hidden)
    images = [name for name in visible if is_image_name(name)]
    other = [name for name in visible if not is_image_name(name)]
    require_images(images, other, where)
    inside = ""
    if split is not None:
        inside = f"{find_split(split, lambda folder: _folders_in(images, folder), where)}/"
        images = [name for name in images if name.startswith(inside)]
    chosen, notes = choose_split(images, where)
    folders = [os.path.dirname(name) for name in images]
    below = _below_what_is_common([folder[len(chosen) :].lstrip("/") for folder in folders])
    y, classes, unlabelled = classes_of(below, images, where)
    other = [name for name in other if name.startswith(inside)]
    full = _with_those_above([*folders, *map(os.path.dirname, tar.folders)])
    left_out = notes_on(
        ([folder for folder in set(tar.folders) - full if folder.startswith(inside)], "folders hold no images"),
        (hidden, "hidden files were left out"),
        (tar.special, "links, devices and sparse files were left out"),
        (
            [name for i, name in enumerate(tar.names) if latest[name] != i],
            "files were left out, as the tar holds later ones of the same name",
        ),
    )
    notes = [*notes_on_left_out(other, "files are not images and were left out"), *left_out, *notes, *unlabelled]
    places = np.insert(tar.places[[latest[name] for name in images]], 0, 0, axis=1)
    return Source.of(TarReader([tar], places), images, y, classes, notes=notes, origin={"kind": "tar"})


def index_tar(path: Path) -> Tar:
    """What a tar holds; `DataError` where it is cut off, damaged or compressed."""
    where = f"data {str(path)!r}"
    tar = Tar(str(path.absolute()), stamp_file(str(path)))
    try:
        with open(path, "rb") as file:
            _read_headers(file, tar, where)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{where}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # tarfile and, on damaged headers, what it calls
        raise DataError(f"{where}: a damaged tar: {one_line(error)}") from error
    return tar


def _read_headers(file: Any, tar: Tar, where: str) -> None:
    places, position = array("q"), -1
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            if member.offset <= position or member.size < 0:
                raise DataError(f"{where}: a damaged tar: a member of negative size")
            position = member.offset
            name = member.name
            while name.startswith("./"):
                name = name[2:].lstrip("/")
            if member.isdir():
                tar.folders.append(name)
            elif member.isreg() and not member.issparse():
                tar.names.append(name)
                places.extend((member.offset_data, member.size))
            else:
                tar.special.append(name)
        offset = archive.offset
    tar.places = np.array(places, dtype=np.int64).reshape(-1, 2)
    file.seek(offset)
    mark = file.read(_BLOCK)
    if len(mark) < _BLOCK or any(mark):  # which tarfile takes for the end
        raise DataError(f"{where}: the tar is cut off or damaged at byte {offset}")
    while rest := file.read(_READ_AT_ONCE):
        if any(rest):
            raise DataError(f"{where}: the tar ends at byte {offset}, but more follows, as another tar: split them")


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
    found = {"", "."}
    for folder in set(folders):
        while folder not in found:
            found.add(folder)
            folder = os.path.dirname(folder)
    return found
