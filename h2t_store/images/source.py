"""A source: pictures by row, with labels and with identifiers that stay the same on every run."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from h2t_store.errors import DataError
from h2t_store.images.names import UNLABELLED, Classes, Names, shown
from h2t_store.images.pictures import DIGEST_BYTES, Picture, decode, digest_of

_ROWS_AT_ONCE = 10_000

Stamp = tuple[int, int]
"""Size in bytes, and time of the last change in nanoseconds."""


class Known:
    """A row of numbers for each picture, found out when first asked for and kept; pickles with what is known.

    Parameters
    ----------
    n, width : int
        How many pictures there are, and numbers for each.
    """

    def __init__(self, n: int, width: int, dtype: type) -> None:
        self._shape, self._dtype = (n, width), dtype
        self._rows: NDArray[Any] | None = None
        self._is_known = np.zeros(0, dtype=bool)

    def of(self, numbers: NDArray[np.int64], find: Callable[[int], Any]) -> NDArray[Any]:
        """Those of the pictures ``numbers``; ``find(i)`` gives that of ``numbers[i]``."""
        if self._rows is None:
            self._rows, self._is_known = np.zeros(self._shape, self._dtype), np.zeros(self._shape[0], dtype=bool)
        for i in np.flatnonzero(~self._is_known[numbers]).tolist():
            self._rows[numbers[i]] = find(i)
            self._is_known[numbers[i]] = True
        return self._rows[numbers]

    def get(self, number: int) -> list[int] | None:
        """That of one picture, if it is known."""
        return None if self._rows is None or not self._is_known[number] else self._rows[number].tolist()


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(ABC):
    """Pictures, labels and identifiers. Pickles without the pictures that are on disk.

    Attributes
    ----------
    origin : dict
        What kind of data it is, and which part of it.
    sample_ids : ndarray of shape (n,), StringDType
        One per row: relative paths where there are any, else a number.
    y : ndarray of shape (n,), int64
        Index into ``classes``; -1 where unlabelled.
    classes : tuple of str or of int
        The labels themselves: names, or integers where the data has integers.
    notes : list of str
        What was left out, for a person to read.
    numbers : ndarray of shape (n,), int64
        Number of each row's picture in the data as it was opened.
    digests, stamps : Known
        Of all pictures as opened, shared by every selection of rows: digests, and size and time of change.
    """

    origin: dict[str, Any]
    sample_ids: Names
    y: NDArray[np.int64]
    classes: Classes
    notes: list[str] = field(default_factory=list)
    numbers: NDArray[np.int64] = field(default=None, repr=False)  # type: ignore[assignment]
    digests: Known = field(default=None, repr=False)  # type: ignore[assignment]
    stamps: Known = field(default=None, repr=False)  # type: ignore[assignment]

    max_digested_bytes: ClassVar[int] = 1 << 30

    def __post_init__(self) -> None:
        if self.numbers is None:
            n = len(self.y)
            object.__setattr__(self, "numbers", np.arange(n))
            object.__setattr__(self, "digests", Known(n, DIGEST_BYTES, np.uint8))
            object.__setattr__(self, "stamps", Known(n, 2, np.int64))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def in_memory(self) -> bool:
        """Whether reading a picture costs nothing."""
        return False

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width where all pictures share them and it is known."""
        return None

    @cached_property
    def description(self) -> dict[str, Any]:
        """Goes into the provenance; equal descriptions mean equal pictures, identifiers and names of labels, in order.

        How the classes are numbered does not matter. Pictures are held against it when they are decoded.
        """
        key, identity = self.identity()
        names = np.array([*self.classes, None], dtype=object)
        sha = hashlib.sha256(str(len(self)).encode())
        for start in range(0, len(self), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            labels = [None if label is None else str(label) for label in names[self.y[rows]]]
            sha.update(json.dumps([self.sample_ids[rows].tolist(), labels]).encode())
        sha.update(np.ascontiguousarray(identity).tobytes())
        return {**self.origin, "n": len(self), key: sha.hexdigest()}

    def identity(self) -> tuple[str, NDArray[Any]]:
        """What tells the pictures from others, and how that is called.

        The digests of all up to 1 GiB in total; beyond, where reading twice costs, sizes and times of change, so that a
        copy is known again if it keeps the times.
        """
        stamps = self.stamps.of(self.numbers, self.stamp)
        if stamps[:, 0].sum() <= self.max_digested_bytes:
            return "contents_sha256", self.digests.of(self.numbers, self.digest)
        return "paths_sizes_and_times_sha256", stamps.astype("<i8")

    def picture(self, row: int) -> Picture:
        """The picture as RGB; `DataError` where it cannot be read, or is not what `description` is of."""
        content, stamp = self.read(row)
        number = int(self.numbers[row])
        digest = content.digest if isinstance(content, Picture) else digest_of(content)
        known, found = self.digests.get(number), list(digest)
        if known is None:
            known, found = self.stamps.get(number), list(stamp)
        if known not in (None, found):
            raise DataError(f"{shown(self.where(row))}: {self.changed}")
        return content if isinstance(content, Picture) else decode(content, self.where(row))

    @property
    def changed(self) -> str:
        """What to say of a picture that is no longer what it was."""
        return "it has changed since the extraction began: extract again"

    def image(self, row: int) -> Image.Image:
        """`picture` without remarks and digest."""
        return self.picture(row).image

    def digest(self, row: int) -> NDArray[np.uint8]:
        """The digest of a picture as it is now."""
        content, _ = self.read(row)
        digest = content.digest if isinstance(content, Picture) else digest_of(content)
        return np.frombuffer(digest, dtype=np.uint8)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """The same data, restricted to ``rows`` in the order given."""
        rows = np.asarray(rows, dtype=np.int64)
        return replace(self, sample_ids=self.sample_ids[rows], y=self.y[rows], numbers=self.numbers[rows])

    def relabelled(self, classes: Classes) -> Self:
        """The same data with labels counted in ``classes``, which hold all that occur; 3 and "3" are one class."""
        if any(isinstance(label, str) for label in classes):
            classes = tuple(map(str, classes))
        index = {str(label): i for i, label in enumerate(classes)}
        missing = [self.classes[i] for i in np.unique(self.y[self.y >= 0]) if str(self.classes[i]) not in index]
        if missing:
            raise DataError(f"classes: {missing[0]!r} is not among {len(classes)} classes, but the data has it")
        codes = [index.get(str(label), UNLABELLED) for label in self.classes]
        return replace(self, y=np.array([*codes, UNLABELLED], dtype=np.int64)[self.y], classes=tuple(classes))

    @abstractmethod
    def where(self, row: int) -> str:
        """What errors call the picture."""

    @abstractmethod
    def read(self, row: int) -> tuple[bytes | Picture, Stamp]:
        """The file's bytes, or the picture where there is no file, and its stamp; `DataError` where that fails."""

    @abstractmethod
    def stamp(self, row: int) -> Stamp:
        """Size and time of change of a picture as it is now."""


def read_file(path: str, offset: int = 0, size: int = -1) -> tuple[bytes, Stamp]:
    """A part of a file, by default all, and the stamp of the file after that was read."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size), stamp_of(os.fstat(file.fileno()))
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}") from error


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_size, status.st_mtime_ns
