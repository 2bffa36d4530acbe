"""What a store needs of the place where it lies: files that appear whole, folders, and a lock."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["LockedError", "Lost", "Place"]


class LockedError(Exception):
    """Another process holds the lock; the message names it."""


class Lost(Protocol):
    """Tells whether a lock was lost to another process, which can happen after this one stood still."""

    def __call__(self, *, ask: bool = False) -> bool:
        """As far as this process knows; with ``ask``, look now."""


class Place(Protocol):
    """The address of a file or a folder, on a disk (`Disk`) or in an object store (`Bucket`).

    It pickles as an address, whether something exists there or not.

    Attributes
    ----------
    name : str
        Last part of the path.
    concurrency : int
        How many files are best read or written at once.
    keeps_what_it_has : bool
        Whether a written file stays whole until it is removed, even if a machine fails.
    cache : Path or None
        Local folder for copies of chunks read from here.
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

    def __truediv__(self, path: str) -> Self:
        """The place at a path below."""

    def exists(self) -> bool:
        """Whether a file is here."""

    def read(self, last: int | None = None) -> bytes:
        """Read a file, or its ``last`` bytes; `FileNotFoundError` if there is none."""

    def fill(self, allocate: Callable[[int], NDArray[np.uint8] | None], within: tuple[int, int] | None = None) -> int:
        """Read a file, or its bytes ``within`` (start, stop), into memory.

        Parameters
        ----------
        allocate : callable
            Called with the number of bytes; returns the memory to fill, or None to read nothing.
        within : (int, int), optional
            Start and stop of the bytes to read.

        Returns
        -------
        int
            Number of bytes found.
        """

    def write(self, parts: Sequence[memoryview]) -> None:
        """Write a file and the folders above it.

        A new file may be seen before it is whole. An existing one is replaced at once, because another process may have
        written it and rely on it.
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
        """Remove this folder, if there is one; its zarr.json disappears first or with everything else."""

    def lock(self, who: str) -> AbstractContextManager[Lost]:
        """Hold the lock of this name; the lock of a dead process is taken over.

        Parameters
        ----------
        who : str
            Description of the holder, shown to others.

        Raises
        ------
        LockedError
            If another process holds it.
        """
