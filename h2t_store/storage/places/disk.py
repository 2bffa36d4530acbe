"""Files and folders on a local or shared disk."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from h2t_store.storage.places.interface import LockedError, Lost

_TRASH, _PARTIAL = ".trash-", ".partial"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Disk:
    """A path; see `h2t_store.storage.places.Place`."""

    path: Path

    concurrency: ClassVar[int] = min(8, os.cpu_count() or 1)
    keeps_what_it_has: ClassVar[bool] = False
    cache: ClassVar[None] = None

    @property
    def name(self) -> str:
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, path: str) -> "Disk":
        return Disk(self.path / path)

    def exists(self) -> bool:
        return self.path.exists()

    def read(self, last: int | None = None) -> bytes:
        with open(self.path, "rb") as file:
            if last is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last))
            return file.read()

    def fill(self, buffer: NDArray[np.uint8], start: int = 0) -> int:
        with open(self.path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size - start
            if found < len(buffer):
                return found
            file.seek(start)
            read = 0
            while read < len(buffer) and (more := file.readinto(buffer[read:].data)):
                read += more
            return found if read == len(buffer) else read

    def write(self, parts: Sequence[memoryview]) -> None:
        try:
            _write_new(self.path, parts)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_new(self.path, parts)
        except FileExistsError:
            self._replace(parts)

    def write_whole(self, content: bytes, *, durable: bool = True) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._replace([memoryview(content)], durable)

    def _replace(self, parts: Sequence[memoryview], durable: bool = False) -> None:
        """Write under a name that only this call uses, because other processes may write the same file."""
        partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}{_PARTIAL}")
        _write_new(partial, parts, durable)
        os.replace(partial, self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def folders(self) -> list["Disk"]:
        return [Disk(path) for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []

    def files(self) -> Iterator[tuple[str, int]]:
        for file in self.path.rglob("*"):
            if file.is_file() and file.suffix != _PARTIAL:
                yield file.relative_to(self.path).as_posix(), file.stat().st_size

    def discard(self) -> None:
        with suppress(FileNotFoundError):
            self.path.rename(self.path.with_name(f"{_TRASH}{uuid.uuid4().hex}"))
        for trash in self.path.parent.glob(f"{_TRASH}*"):  # including what an interrupted removal left
            shutil.rmtree(trash, ignore_errors=True)

    @contextmanager
    def lock(self, who: str) -> Iterator[Lost]:
        """Hold a file lock, which the system frees when the process dies."""
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


def _write_new(path: Path, parts: Sequence[memoryview], durable: bool = False) -> None:
    file = os.open(path, _NEW_FILE, 0o666)
    try:
        for part in parts:
            left = part
            while left:
                left = left[os.write(file, left) :]
        if durable:
            os.fsync(file)
    finally:
        os.close(file)
