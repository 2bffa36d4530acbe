"""A source: images by row, with labels and with identifiers that stay the same on every run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NoReturn, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from h2t_store.errors import DataError
from h2t_store.images.fingerprint import Digests, Stamp, digest_of_rows
from h2t_store.images.names import Classes, Names, shown
from h2t_store.images.pictures import Picture, decode

__all__ = ["UNLABELLED", "Source"]

UNLABELLED = -1
_MAX_DIGESTED_BYTES = 1 << 30


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(ABC):
    """Images, labels and identifiers. Pickles without the images that are on disk.

    Attributes
    ----------
    origin : dict
        What kind of data it is, and which part of it.
    sample_ids : ndarray of shape (n,), StringDType
        One per row: relative paths where there are any, else ``SPLIT/index``.
    y : ndarray of shape (n,), int64
        Index into ``classes``; -1 where unlabelled.
    classes : tuple of str or of int
        The labels themselves: names, or integers where the data has integers.
    notes : list of str
        What was left out, for a person to read.
    numbers : ndarray of shape (n,), int64
        Number of each row's image in the data as it was opened.
    digests : Digests
        Digests and stamps of all images as opened, shared by every selection of rows.
    in_memory : bool
        Whether reading an image costs nothing.
    """

    origin: dict[str, Any]
    sample_ids: Names
    y: NDArray[np.int64]
    classes: Classes
    notes: list[str] = field(default_factory=list)
    numbers: NDArray[np.int64] = field(repr=False)
    digests: Digests = field(repr=False)

    in_memory: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.y)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width where all images share them and it is known."""
        return None

    @cached_property
    def description(self) -> dict[str, Any]:
        """Goes into the provenance; equal descriptions mean equal images, identifiers and names of labels, in order.

        It digests all contents up to 1 GiB in total; beyond that, where reading twice costs, identifiers, sizes and
        times of change, so that a copy is known again if it keeps the times. Images are held against it when they are
        decoded.
        """
        identity: NDArray[Any]
        stamps = self.digests.stamps_of(self.numbers, self.stamps)
        if self.in_memory or stamps[:, 0].sum() <= _MAX_DIGESTED_BYTES:
            key, identity = "contents_sha256", self.digests.of(self.numbers, self.content)
        else:
            key, identity = "paths_sizes_and_times_sha256", stamps.astype("<i8")
        digest = digest_of_rows(self.sample_ids, self.y, self.classes, identity)
        return {**self.origin, "n": len(self), key: digest}

    def picture(self, row: int) -> Picture:
        """The image as RGB, with remarks; `DataError` where it cannot be read, or is not what `description` is of."""
        content = self.content(row)
        if not self.digests.agree(int(self.numbers[row]), content):
            self._refuse_changed(row)
        return self.decoded(content, row)

    def image(self, row: int) -> Image.Image:
        """`picture` without the remarks."""
        return self.picture(row).image

    def decoded(self, content: Any, row: int) -> Picture:
        """The image that the bytes hold."""
        return decode(content, self.where(row))

    def require_stamp(self, row: int, found: Stamp) -> None:
        """Raise `DataError` where an image changed since its stamp was taken."""
        if not self.digests.agree_on_stamp(int(self.numbers[row]), found):
            self._refuse_changed(row)

    def _refuse_changed(self, row: int) -> NoReturn:
        raise DataError(f"{shown(self.where(row))}: it has changed since the extraction began: extract again")

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
        renumbered = np.array([*codes, UNLABELLED], dtype=np.int64)
        return replace(self, y=renumbered[self.y], classes=classes)

    @abstractmethod
    def where(self, row: int) -> str:
        """What errors call the image."""

    @abstractmethod
    def content(self, row: int) -> Any:
        """The bytes that the image is decoded from; `DataError` where they cannot be read."""

    @abstractmethod
    def stamps(self) -> NDArray[np.int64]:
        """Size and time of change (n, 2) of each image as it is now, see `Stamp`."""
