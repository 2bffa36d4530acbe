"""Folders and files of a local or a shared disk."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from h2t_store.storage.places.interface import LockedError, Lost

__all__ = ["Disk"]

_TRASH = ".trash-"
_MAX_THREADS = 8


@dataclass(frozen=True)
class Disk:
    """A path, as `h2t_store.storage.places.Place` has it."""

    path: Path

    concurrency: ClassVar[int] = min(_MAX_THREADS, os.cpu_count() or 1)
    keeps_what_it_has: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, path: str) -> "Disk":
        return Disk(self.path / path)

    def exists(self) -> bool:
        return self.path.exists()

    def read(self) -> bytes:
        return self.path.read_bytes()

    def fill(self, allocate: Callable[[int], NDArray[np.uint8] | None]) -> int:
        size = os.stat(self.path).st_size
        buffer = allocate(size)
        if buffer is None:
            return size
        file = os.open(self.path, os.O_RDONLY)
        try:
            read = 0
            while read < size and (more := os.readv(file, [buffer[read:].data])):
                read += more
            return read
        finally:
            os.close(file)

    def write(self, parts: Sequence[memoryview]) -> None:
        try:
            _write_new(self.path, parts)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_new(self.path, parts)
        except FileExistsError:
            partial = self._partial(shared=True)
            _write_new(partial, parts)
            os.replace(partial, self.path)

    def write_whole(self, content: bytes, *, durable: bool = True, shared: bool = False) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._partial(shared=shared)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, self.path)

    def _partial(self, *, shared: bool) -> Path:
        """Where a file takes shape; where several processes may write it, under a name that is this call's alone."""
        return self.path.with_name(f".{self.path.name}{f'.{uuid.uuid4().hex}' if shared else ''}.partial")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def take(self, other: "Disk") -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(other.path, self.path)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(other.path, self.path)

    def occupied(self) -> bool:
        if self.path.is_dir():
            return any(file.suffix != ".partial" for file in self.path.iterdir())
        return self.path.exists()

    def folders(self) -> list["Disk"]:
        return [Disk(path) for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []

    def files(self) -> Iterator[tuple[str, int]]:
        for file in self.path.rglob("*"):
            if file.is_file():
                yield file.relative_to(self.path).as_posix(), file.stat().st_size

    def discard(self, store: "Disk") -> None:
        self._set_aside(store)
        for trash in store.path.glob(f"{_TRASH}*"):  # with what an interrupted removal left
            shutil.rmtree(trash, ignore_errors=True)

    def _set_aside(self, store: "Disk") -> Path:
        return self.path.rename(store.path / f"{_TRASH}{uuid.uuid4().hex}")

    def put_in_place_of(self, folder: "Disk", store: "Disk") -> None:
        trash = folder._set_aside(store) if folder.path.exists() else None
        try:
            self.path.rename(folder.path)
        except OSError:
            if trash is not None:
                trash.rename(folder.path)
            raise
        if trash is not None:
            shutil.rmtree(trash, ignore_errors=True)

    @contextmanager
    def lock(self, who: str) -> Iterator[Lost]:
        """The system frees the lock of a process that died."""
        lock = FileLock(f"{self.path}.lock", blocking=False)
        self.path.parent.mkdir(exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            holder = "another process"
            with suppress(OSError):
                holder = self.path.read_text()
            raise LockedError(holder) from None
        try:
            self.path.write_text(who)
            yield lambda *, ask=False: False
        finally:
            with suppress(OSError):
                self.path.unlink()
            lock.release()

    def kept(self) -> None:
        return None


def _write_new(path: Path, parts: Sequence[memoryview]) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        left = list(parts)
        while left:
            written = os.writev(file, left)
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left:
                left[0] = left[0][written:]
    finally:
        os.close(file)
