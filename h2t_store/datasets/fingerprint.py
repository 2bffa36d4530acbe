"""Digests that tell data apart: one per image, computed once, and one over the rows of a source."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h2t_store.datasets.names import Classes, Names

__all__ = ["Digests", "digest_of_rows"]

_BYTES = 16
_ROWS_AT_ONCE = 10_000


class Digests:
    """Digests of images by number, each computed when first asked for.

    Parameters
    ----------
    n : int
        How many images there are. A pickled copy begins empty: it is not what workers need.
    """

    def __init__(self, n: int) -> None:
        self._values = np.zeros((n, _BYTES), dtype=np.uint8)
        self._known = np.zeros(n, dtype=bool)

    def __reduce__(self) -> tuple[type["Digests"], tuple[int]]:
        return Digests, (len(self._known),)

    def of(self, numbers: NDArray[np.int64], content: Callable[[int], Any]) -> NDArray[np.uint8]:
        """Digests of the images ``numbers``; ``content(i)`` gives the bytes of image ``numbers[i]``."""
        for i in np.flatnonzero(~self._known[numbers]).tolist():
            digest = hashlib.blake2b(content(i), digest_size=_BYTES).digest()
            self._values[numbers[i]] = np.frombuffer(digest, dtype=np.uint8)
            self._known[numbers[i]] = True
        return self._values[numbers]


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
