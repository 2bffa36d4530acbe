"""What a store needs of the place where it lies: files that appear whole, folders, and a lock."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray


class LockedError(Exception):
    """Another process holds the lock; the message names it."""


class Lost(Protocol):
    """Whether a lock was lost to another process, as can happen to a process that stood still."""

    def __call__(self, *, ask: bool = False) -> bool:
        """As far as this process knows; with ``ask``, look now."""


class Place(Protocol):
    """Address of a file or folder on a `Disk` or in a `Bucket`, whether it exists or not.

    Attributes
    ----------
    name : str
        Last part of the path.
    concurrency : int
        How many files are best read or written at once.
    keeps_what_it_has : bool
        Whether a written file stays whole, even if a machine fails.
    cache : Path or None
        Local folder for copies of chunks.
    """

    @property
    def name(self) -> str: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def keeps_what_it_has(self) -> bool: ...
    @property
    def cache(self) -> Path | None: ...
    def __hash__(self) -> int: ...
    def __truediv__(self, path: str) -> Self: ...
    def exists(self) -> bool:
        """Whether a file is here."""

    def read(self, last: int | None = None) -> bytes:
        """Read a file, or its ``last`` bytes; `FileNotFoundError` if there is none."""

    def fill(self, buffer: NDArray[np.uint8], start: int = 0) -> int:
        """Fill a buffer with the bytes of a file from ``start``, if it has enough; how many it has from there."""

    def write(self, parts: Sequence[memoryview]) -> None:
        """Write a file and the folders above it.

        A new file may be seen before it is whole. An existing one is replaced at once, since others may rely on it.
        """

    def write_whole(self, content: bytes, *, durable: bool = True) -> None:
        """Write a small file that is either whole or absent; ``durable``: on disk before this returns."""

    def remove(self) -> None:
        """Remove a file, if there is one."""

    def folders(self) -> list[Self]:
        """Folders in this one."""

    def files(self) -> Iterator[tuple[str, int]]:
        """(path, size) of every finished file below this folder."""

    def discard(self) -> None:
        """Remove a folder, if there is one; no part of it is left as an extraction, whenever this is interrupted."""

    def lock(self, who: str) -> AbstractContextManager[Lost]:
        """Hold the lock of this name, or raise `LockedError` with ``who`` of its holder; dead holders are replaced."""
