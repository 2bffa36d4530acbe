"""Images in tars, read where they lie: an index of offsets is made once, and nothing is unpacked or cached.

timm's reader is not used here: it merges classes with equal leaf names, keeps its index in a pickle, and where forked
workers share its open file, it reads at each other's positions and puts other images in the place of those.
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
from h2t_store.images.fingerprint import Digests, Stamp, stamp
from h2t_store.images.folder import classes_of, require_images
from h2t_store.images.foreign import left_out
from h2t_store.images.names import Classes, Names, as_names, count, shown
from h2t_store.images.pictures import is_image_name
from h2t_store.images.source import Source
from h2t_store.images.splits import choose_split, find_split

__all__ = ["Archives", "Members", "TarSource", "open_tar", "read_members", "tar_source"]

_BLOCK = 512
_READ_AT_ONCE = 1 << 20


class _Descriptor:
    """An open file, closed with the last reference to it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Archives:
    """Files read at any offset by any process and thread; the one used last stays open.

    Parameters
    ----------
    paths : sequence of str
        Of the files.
    stamps : sequence of Stamp
        Of the files as indexed; one that has changed since is not read.
    """

    def __init__(self, paths: tuple[str, ...], stamps: tuple[Stamp, ...]) -> None:
        self.paths = paths
        self.stamps = stamps
        self._last: tuple[int, _Descriptor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Archives, (self.paths, self.stamps)

    def read(self, archive: int, offset: int, size: int) -> bytes:
        """``size`` bytes of a file; `DataError` where they cannot be read."""
        try:
            file = self._opened(archive).number
            content = os.pread(file, size, offset)
            found = stamp(os.fstat(file))
        except OSError as error:
            raise DataError(f"{shown(self.paths[archive])}: {error.strerror}") from error
        if found != self.stamps[archive]:
            self._last = None
            raise DataError(f"{shown(self.paths[archive])}: it has changed since it was opened")
        if len(content) < size:
            raise DataError(f"{shown(self.paths[archive])}: it ends within an image")
        return content

    def _opened(self, archive: int) -> _Descriptor:
        last = self._last
        if last is not None and last[0] == archive:
            return last[1]
        opened = _Descriptor(self.paths[archive])
        self._last = archive, opened
        return opened


@dataclass(frozen=True, eq=False, kw_only=True)
class TarSource(Source):
    """Images in tars; ``archive``, ``offset`` and ``size`` (n_images,) say where each lies as opened."""

    archives: Archives
    archive: NDArray[np.int32] = field(repr=False)
    offset: NDArray[np.int64] = field(repr=False)
    size: NDArray[np.int64] = field(repr=False)

    def where(self, row: int) -> str:
        return f"{self.archives.paths[self.archive[self.numbers[row]]]}: {self.sample_ids[row]}"

    def content(self, row: int) -> bytes:
        number = self.numbers[row]
        return self.archives.read(int(self.archive[number]), int(self.offset[number]), int(self.size[number]))

    def stamps(self) -> NDArray[np.int64]:
        times = np.array([changed for _, changed in self.archives.stamps], dtype=np.int64)
        return np.stack([self.size[self.numbers], times[self.archive[self.numbers]]], axis=1)


@dataclass
class Members:
    """What a tar holds: the files that can be read in place, and the names of everything else."""

    stamp: Stamp
    names: list[str] = field(default_factory=list)
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    folders: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)


def open_tar(path: Path, split: str | None) -> TarSource:
    """All images of a tar, or those in the folder of a split.

    Classes are the folders they lie in, without the folders above that all have in common.
    """
    where = f"data {str(path)!r}"
    members = read_members(path)
    latest = {name: i for i, name in enumerate(members.names)}
    replaced = [name for i, name in enumerate(members.names) if latest[name] != i]
    hidden = [name for name in latest if _is_hidden(name)]
    images = sorted(name for name in latest if is_image_name(name) and not _is_hidden(name))
    other = [name for name in latest if not is_image_name(name) and not _is_hidden(name)]
    require_images(images, other, where)
    inside = ""
    if split is not None:
        inside = f"{find_split(split, lambda folder: _folders_in(images, folder), where)}/"
        images = [name for name in images if name.startswith(inside)]
        other = [name for name in other if name.startswith(inside)]
    chosen_split, notes = choose_split(images, where)
    folders = [os.path.dirname(name) for name in images]
    below = [folder[len(chosen_split) :].lstrip("/") for folder in folders]
    y, classes = classes_of(_below_what_is_common(below), images, where)
    held = [folder for folder in members.folders if folder.startswith(inside)]
    notes = [
        *left_out(other, "files are not images and were left out"),
        *count(_without_images(held, folders), "folders hold no images"),
        *count(hidden, "hidden files were left out"),
        *count(members.special, "links, devices and sparse files were left out"),
        *count(replaced, "files were left out, as the tar holds later ones of the same name"),
        *notes,
    ]
    if not classes:
        notes.append(f"{len(images)} images without class folders: unlabelled")
    chosen = [latest[name] for name in images]
    return tar_source(
        Archives((str(path.absolute()),), (members.stamp,)),
        np.zeros(len(images), dtype=np.int32),
        np.array(members.offsets, dtype=np.int64)[chosen],
        np.array(members.sizes, dtype=np.int64)[chosen],
        origin={"kind": "tar"},
        sample_ids=as_names(images),
        y=y,
        classes=classes,
        notes=notes,
    )


def tar_source(
    archives: Archives,
    archive: NDArray[np.int32],
    offset: NDArray[np.int64],
    size: NDArray[np.int64],
    *,
    origin: dict[str, Any],
    sample_ids: Names,
    y: NDArray[np.int64],
    classes: Classes,
    notes: list[str],
) -> TarSource:
    """All images, in order."""
    return TarSource(
        origin=origin,
        sample_ids=sample_ids,
        y=y,
        classes=classes,
        notes=notes,
        numbers=np.arange(len(y)),
        digests=Digests(len(y)),
        archives=archives,
        archive=archive,
        offset=offset,
        size=size,
    )


def read_members(path: Path) -> Members:
    """Index a tar; `DataError` where it is cut off, damaged or compressed."""
    try:
        with open(path, "rb") as file:
            return _read_members(file, path)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"data {str(path)!r}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # tarfile and, on damaged headers, what it calls
        raise DataError(f"data {str(path)!r}: a damaged tar: {one_line(error)}") from error


def _read_members(file: Any, path: Path) -> Members:
    found = Members(stamp(os.fstat(file.fileno())))
    position = -1
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            if member.offset <= position or member.size < 0:
                raise DataError(f"data {str(path)!r}: a damaged tar: a member of negative size")
            position = member.offset
            name = _without_dot(member.name)
            if member.isdir():
                found.folders.append(name)
            elif member.isreg() and not member.issparse():
                found.names.append(name)
                found.offsets.append(member.offset_data)
                found.sizes.append(member.size)
            else:
                found.special.append(name)
        _require_end(file, archive.offset, path)
    return found


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


def _without_dot(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


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
    if "" in parents:
        return folders
    common = os.path.commonpath(parents) if len({parent.startswith("/") for parent in parents}) == 1 else ""
    return [folder[len(common) :].lstrip("/") for folder in folders] if common else folders


def _without_images(folders: list[str], with_images: list[str]) -> list[str]:
    """Those that hold neither images nor folders."""
    full = {""}
    for folder in {*with_images, *(os.path.dirname(folder) for folder in folders)}:
        while folder not in full:
            full.add(folder)
            folder = os.path.dirname(folder)
    return [folder for folder in set(folders) - full if folder != "."]
