"""What a store needs of where it lies: files that appear whole, folders, and a lock."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["LockedError", "Lost", "Place"]


class LockedError(Exception):
    """Another process holds a lock; the message says who."""


class Lost(Protocol):
    """Whether a lock was lost to another process, as happens where this one stood still for long."""

    def __call__(self, *, ask: bool = False) -> bool:
        """As far as this process knows; or found out now, where it would do harm (``ask``)."""


class Place(Protocol):
    """A file or a folder: `h2t_store.storage.places.disk.Disk` or `h2t_store.storage.places.bucket.Bucket`.

    It is an address, whether something is there or not, and pickles as one.

    Attributes
    ----------
    name : str
        Its last part.
    concurrency : int
        How many files are best read or written at once.
    keeps_what_it_has : bool
        Whether a file that was written is there whole until it is removed, whatever machine fails.
    """

    @property
    def name(self) -> str: ...

    @property
    def concurrency(self) -> int: ...

    @property
    def keeps_what_it_has(self) -> bool: ...

    def __truediv__(self, path: str) -> Self:
        """What lies below, by its path."""

    def exists(self) -> bool:
        """Whether a file is there."""

    def read(self) -> bytes:
        """All bytes of a file; raises `FileNotFoundError` where there is none."""

    def fill(self, allocate: Callable[[int], NDArray[np.uint8] | None]) -> int:
        """Read a file into the memory given for its size, if some is given; how many bytes it has.

        Raises
        ------
        FileNotFoundError
            Where there is no such file.
        """

    def write(self, parts: Sequence[memoryview]) -> None:
        """Write a file, with the folders above it.

        A new file may be seen before it is whole; one that is there already is replaced at once, because another
        process may have written it and count on it.
        """

    def write_whole(self, content: bytes, *, durable: bool = True, shared: bool = False) -> None:
        """Write a small file that is there whole or not at all.

        ``durable``: for good before anything that follows; ``shared``: other processes may write the same at once.
        """

    def remove(self) -> None:
        """Remove a file, if it is there."""

    def take(self, other: Self) -> None:
        """Become a copy of another file of the same store; raises `FileNotFoundError` where it is missing."""

    def occupied(self) -> bool:
        """Whether something lies in this folder, other than what a crash left of a file."""

    def folders(self) -> list[Self]:
        """The folders in this one."""

    def files(self) -> Iterator[tuple[str, int]]:
        """(path, size) of every file below this folder."""

    def discard(self, store: Self) -> None:
        """Remove this folder of a store with all that is in it: it is gone as an extraction at once."""

    def put_in_place_of(self, folder: Self, store: Self) -> None:
        """Have an extraction that is complete take the place of another; a crash between leaves this one, complete."""

    def lock(self, who: str) -> AbstractContextManager[Lost]:
        """Hold the lock of this name for the time being.

        Parameters
        ----------
        who : str
            What others are told.

        Returns
        -------
        context manager
            Gives a function that says whether the lock was lost since.

        Raises
        ------
        LockedError
            Where another process holds it. That of one that died is taken over.
        """

    def kept(self) -> "Place | None":
        """Where a copy of this file is kept for reading, if one is."""
