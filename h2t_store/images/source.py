"""A source: pictures by row, with labels and with identifiers that stay the same on every run."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from h2t_store.errors import DataError
from h2t_store.images.names import UNLABELLED, Classes, Names, as_names, counted, shown
from h2t_store.images.pictures import DIGEST_BYTES, Picture, decode, digest_of

_ROWS_AT_ONCE = 10_000
_MOST_SAMPLED = 1000

Stamp = tuple[int, int]
"""Size in bytes, and time of the last change in nanoseconds."""


class Reader(ABC):
    """Gives the pictures of a source by number, in any process."""

    in_memory = False  # whether reading a picture costs nothing
    image_size: tuple[int, int] | None = None  # height and width where all pictures share them and it is known
    has_stamps = False  # whether size and time of change can be told without reading

    def where(self, number: int, sample_id: str) -> str:
        """Name of a picture in error messages."""
        return sample_id

    @abstractmethod
    def read(self, number: int, where: str) -> bytes | Picture:
        """The bytes of a file, or the picture where there is no file; `DataError` where that fails."""

    def digest(self, number: int, where: str) -> bytes:
        """Digest of a picture, see `digest_of`."""
        return digest_of(self.read(number, where))

    def stamp(self, number: int, where: str) -> Stamp:
        """Current size and time of change of a picture."""
        raise NotImplementedError


class Known:
    """A value of 16 bytes for each of ``n`` pictures, computed when first asked for and pickled from then on."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._rows = np.zeros((0, DIGEST_BYTES), np.uint8)
        self._is_known = np.zeros(0, bool)

    def of(self, numbers: NDArray[np.int64], find: Callable[[int], bytes]) -> NDArray[np.uint8]:
        """Values of the pictures ``numbers``; ``find(i)`` computes that of ``numbers[i]``."""
        if not len(self._rows):
            self._rows, self._is_known = np.zeros((self._n, DIGEST_BYTES), np.uint8), np.zeros(self._n, bool)
        for i in np.flatnonzero(~self._is_known[numbers]).tolist():
            self._rows[numbers[i]] = np.frombuffer(find(i), np.uint8)
            self._is_known[numbers[i]] = True
        return self._rows[numbers]

    def get(self, number: int) -> bytes | None:
        """Value of one picture; None if it was not computed yet."""
        return self._rows[number].tobytes() if len(self._rows) and self._is_known[number] else None


@dataclass(frozen=True, eq=False)
class Source:
    """Pictures, labels and identifiers. Pickles without the pictures that are on disk."""

    reader: Reader
    origin: dict[str, Any]  # what kind of data it is, and which part of it
    sample_ids: Names  # relative paths where there are any, else numbers
    y: NDArray[np.int64]  # index into the classes, -1 where unlabelled
    classes: Classes
    notes: list[str]  # what was left out, for a person to read
    numbers: NDArray[np.int64]  # of each row's picture for the reader
    digests: Known  # of all pictures, shared by every selection of rows
    stamps: Known

    max_digested_bytes: ClassVar[int] = 1 << 30

    @classmethod
    def of(
        cls,
        reader: Reader,
        sample_ids: Sequence[str],
        y: NDArray[np.int64],
        classes: Classes,
        *,
        origin: dict[str, Any],
        notes: Sequence[str] = (),
        numbers: NDArray[np.int64] | None = None,
    ) -> Self:
        """A source as it is opened; ``numbers`` are by default all in order."""
        numbers = np.arange(len(y)) if numbers is None else numbers
        n = int(numbers.max()) + 1
        return cls(reader, origin, as_names(sample_ids), y, classes, list(notes), numbers, Known(n), Known(n))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def in_memory(self) -> bool:
        """Whether reading a picture costs nothing."""
        return self.reader.in_memory

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width where all pictures share them and it is known."""
        return self.reader.image_size

    @cached_property
    def description(self) -> dict[str, Any]:
        """Part of the provenance; equal descriptions mean equal pictures, identifiers and names of labels, in order.

        It contains the digests of all pictures up to 1 GiB in total. Beyond that, reading everything twice costs too
        much: it then contains sizes and times of change (a copy must keep the times), or the digests of 1000 pictures
        if there are no times. `picture` checks each picture against what is known here.
        """
        key, identity = self._identity()
        names = [*map(str, self.classes), None]
        sha = hashlib.sha256(str(len(self)).encode())
        for start in range(0, len(self), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            labels = [names[code] for code in self.y[rows].tolist()]
            sha.update(json.dumps([self.sample_ids[rows].tolist(), labels]).encode())
        sha.update(identity.tobytes())
        return {**self.origin, "n": len(self), key: sha.hexdigest()}

    def _identity(self) -> tuple[str, NDArray[np.uint8]]:
        """Name and values of what identifies the pictures."""
        n = len(self)
        if self.reader.has_stamps:
            stamps = self.stamps.of(self.numbers, self._stamp)
            if stamps.view("<i8")[:, 0].sum() > self.max_digested_bytes:
                return "paths_sizes_and_times_sha256", stamps
        elif not self.in_memory and n > _MOST_SAMPLED and n * self._size(0) > self.max_digested_bytes:
            some = np.linspace(0, n - 1, _MOST_SAMPLED).astype(np.int64)
            return "some_contents_sha256", self.digests.of(self.numbers[some], lambda i: self._digest(int(some[i])))
        return "contents_sha256", self.digests.of(self.numbers, self._digest)

    def picture(self, row: int) -> Picture:
        """The picture as RGB; `DataError` where it cannot be read, or is not what `description` is of."""
        content, number = self.read(row), int(self.numbers[row])
        found = digest_of(content)
        known = self.digests.get(number)
        if known is None and (known := self.stamps.get(number)) is not None:
            found = self._stamp(row)
        if known not in (None, found):
            advice = "extract again" + ("" if self.reader.has_stamps else ", from a dataset without random transforms")
            raise DataError(f"{shown(self.where(row))}: it has changed since the extraction began: {advice}")
        return content if isinstance(content, Picture) else decode(content, self.where(row))

    def image(self, row: int) -> Image.Image:
        """`picture` without remarks and digest."""
        return self.picture(row).image

    def where(self, row: int) -> str:
        """Name of the picture in error messages."""
        return self.reader.where(int(self.numbers[row]), str(self.sample_ids[row]))

    def read(self, row: int) -> bytes | Picture:
        """The bytes of a file, or the picture where there is no file."""
        return self.reader.read(int(self.numbers[row]), self.where(row))

    def _digest(self, row: int) -> bytes:
        try:
            return self.reader.digest(int(self.numbers[row]), self.where(row))
        except DataError:
            if self.reader.has_stamps:
                raise
            return bytes(DIGEST_BYTES)  # one picture of a dataset, which may be skipped later on

    def _size(self, row: int) -> int:
        try:
            content = self.read(row)
        except DataError:
            return self.max_digested_bytes  # unknown, so the data may be large
        return 3 * content.image.width * content.image.height if isinstance(content, Picture) else len(content)

    def _stamp(self, row: int) -> bytes:
        return np.array(self.reader.stamp(int(self.numbers[row]), self.where(row)), "<i8").tobytes()

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


def arrange(source: Source, sample_ids: Sequence[str], classes: Classes) -> Source:
    """Put a source into the order in which it was read before; `DataError` if earlier rows are no longer in it.

    Earlier rows come first, in their order (those that share an identifier, in the order of the source), then the
    others in the order of the source; ``classes`` begin with the earlier ones.
    """
    earlier = _rows_of(as_names(sample_ids).tolist(), source.sample_ids.tolist())
    is_new = np.ones(len(source), dtype=bool)
    is_new[earlier] = False
    known = set(map(str, classes))
    new_classes = tuple(label for label in source.classes if str(label) not in known)
    rows = np.concatenate([earlier, np.flatnonzero(is_new)])
    return source.take(rows).relabelled((*classes, *new_classes))


def _rows_of(wanted: list[str], present: list[str]) -> NDArray[np.int64]:
    """Where the names ``wanted`` are ``present``; equal names are taken in order."""
    if present[: len(wanted)] == wanted:
        return np.arange(len(wanted))
    left: dict[str, list[int]] = {}  # rows of each name, last first
    for row in reversed(range(len(present))):
        left.setdefault(present[row], []).append(row)
    rows = np.array([left[name].pop() if left.get(name) else -1 for name in wanted], dtype=np.int64)
    missing = [wanted[i] for i in np.flatnonzero(rows < 0)]
    if missing:
        raise DataError(f"data: {counted(missing, f'of {len(wanted)} images are no longer there')}")
    return rows


def read_file(path: str, offset: int = 0, size: int = -1) -> bytes:
    """A part of a file, by default all."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}") from error


def stamp_file(path: str) -> Stamp:
    """Size and time of change of a file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns
