"""What tells data apart: a digest per image or, where reading all of it costs too much, its size and time of change."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h2t_store.images.names import Classes, Names

__all__ = ["Digests", "Stamp", "as_stamps", "digest_of_rows", "read_file", "stamp", "stamps_of_files"]

_BYTES = 16
_ROWS_AT_ONCE = 10_000

Stamp = tuple[int, int]
"""Size in bytes, and time of the last change in nanoseconds."""


class Digests:
    """Digests and stamps of images by number, each found out when first asked for.

    A pickled copy knows what this one knows: workers hold what they decode against it.

    Parameters
    ----------
    n : int
        How many images there are.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._digests: NDArray[np.uint8] | None = None
        self._digested = np.zeros(0, dtype=bool)
        self._stamps: NDArray[np.int64] | None = None
        self._stamped = np.zeros(0, dtype=bool)

    def of(self, numbers: NDArray[np.int64], content: Callable[[int], Any]) -> NDArray[np.uint8]:
        """Digests of the images ``numbers``; ``content(i)`` gives the bytes of image ``numbers[i]``."""
        if self._digests is None:
            self._digests, self._digested = np.zeros((self._n, _BYTES), np.uint8), np.zeros(self._n, dtype=bool)
        for i in np.flatnonzero(~self._digested[numbers]).tolist():
            self._digests[numbers[i]] = _digest(content(i))
            self._digested[numbers[i]] = True
        return self._digests[numbers]

    def stamps_of(self, numbers: NDArray[np.int64], stamps: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        """Stamps (n, 2) of the images ``numbers``, as they were first; ``stamps()`` gives them as they are."""
        if self._stamps is None:
            self._stamps, self._stamped = np.zeros((self._n, 2), np.int64), np.zeros(self._n, dtype=bool)
        new = ~self._stamped[numbers]
        if new.any():
            self._stamps[numbers[new]] = stamps()[new]
            self._stamped[numbers] = True
        return self._stamps[numbers]

    def agree(self, number: int, content: Any) -> bool:
        """Whether the bytes of an image are those that were digested, if it was."""
        if self._digests is None or not self._digested[number]:
            return True
        return bool((self._digests[number] == _digest(content)).all())

    def agree_on_stamp(self, number: int, found: Stamp) -> bool:
        """Whether an image has the stamp it had first, if it had one and no digest, which says more."""
        if self._stamps is None or not self._stamped[number]:
            return True
        if self._digests is not None and self._digested[number]:
            return True
        return bool((self._stamps[number] == found).all())


def _digest(content: Any) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.blake2b(content, digest_size=_BYTES).digest(), dtype=np.uint8)


def stamp(status: os.stat_result) -> Stamp:
    """Of a file."""
    return status.st_size, status.st_mtime_ns


def stamps_of_files(paths: Iterable[str]) -> NDArray[np.int64]:
    """Stamps (n, 2) of files."""
    return as_stamps(stamp(os.stat(path)) for path in paths)


def as_stamps(stamps: Iterable[Stamp]) -> NDArray[np.int64]:
    """An array (n, 2) of them."""
    return np.fromiter((number for pair in stamps for number in pair), dtype=np.int64).reshape(-1, 2)


def read_file(path: str | os.PathLike[str]) -> tuple[bytes, Stamp]:
    """The content of a file, and its stamp after that was read."""
    with open(path, "rb") as file:
        return file.read(), stamp(os.fstat(file.fileno()))


def digest_of_rows(sample_ids: Names, y: NDArray[np.int64], classes: Classes, images: NDArray[Any]) -> str:
    """SHA-256 over identifiers, names of labels and images, in order.

    How the classes are numbered does not matter, nor do classes without images.
    """
    numbers, first = np.unique(y, return_index=True)
    by_appearance = np.argsort(first)
    rank = np.empty_like(by_appearance)
    rank[by_appearance] = np.arange(len(rank))
    names = [str(classes[number]) if number >= 0 else None for number in numbers[by_appearance].tolist()]
    sha = hashlib.sha256(json.dumps([len(y), names]).encode())
    sha.update(rank[np.searchsorted(numbers, y)].astype("<i8").tobytes())
    for start in range(0, len(sample_ids), _ROWS_AT_ONCE):
        sha.update(json.dumps(sample_ids[start : start + _ROWS_AT_ONCE].tolist()).encode())
    sha.update(np.ascontiguousarray(images).tobytes())
    return sha.hexdigest()
