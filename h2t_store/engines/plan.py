"""Which rows are computed and committed together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Plan", "RowBlock", "batches", "rows_per_block"]

_FEW_SAMPLES = 16384
_ROWS_OF_FEW, _ROWS_OF_MANY = 512, 2048
_ROW_STEP = 16
_MAX_BYTES = 128 << 20


class RowBlock(NamedTuple):
    """Rows ``start:stop``, the ``number``-th block."""

    number: int
    start: int
    stop: int


def rows_per_block(n_samples: int, row_bytes: int) -> int:
    """Height of a block, which is the height of every chunk: a multiple of 16.

    Making a file costs as much as writing a megabyte, so large sets get up to 2048 rows; sets of up to 16384 images get
    512, which loses less work to a crash. A block stays below 128 MiB as far as 16 rows do. Blocks share the rows
    evenly, because the last chunk is stored whole.
    """
    most = _ROWS_OF_FEW if n_samples <= _FEW_SAMPLES else _ROWS_OF_MANY
    most = max(_ROW_STEP, min(most, _MAX_BYTES // row_bytes // _ROW_STEP * _ROW_STEP))
    even = -(-n_samples // -(-n_samples // most))
    return -(-even // _ROW_STEP) * _ROW_STEP


@dataclass(frozen=True)
class Plan:
    """Row blocks in order, made one at a time: a billion images take no more memory than a thousand."""

    n_samples: int
    height: int  # rows of each block; the last one may be shorter
    numbers: Sequence[int] | NDArray[np.int64] | None = None  # which blocks; by default all
    known: Mapping[int, int] = field(default_factory=dict)  # first rows of blocks that are stored already

    def __iter__(self) -> Iterator[RowBlock]:
        for number in map(int, self.numbers_of_blocks):
            start, stop = number * self.height, min((number + 1) * self.height, self.n_samples)
            yield RowBlock(number, start + self.known.get(number, 0), stop)

    @property
    def numbers_of_blocks(self) -> Sequence[int] | NDArray[np.int64]:
        """Which blocks."""
        return range(-(-self.n_samples // self.height)) if self.numbers is None else self.numbers

    @property
    def n_rows(self) -> int:
        """Rows of all blocks together."""
        return sum(block.stop - block.start for block in self)


def batches(blocks: Iterable[RowBlock], batch_size: int, segments: Sequence[int] = ()) -> Iterator[range]:
    """Rows of each batch; none crosses a block or a segment, so a row has the same values whenever it is computed."""
    for block in blocks:
        borders = [block.start, *(row for row in segments if block.start < row < block.stop), block.stop]
        for first, last in pairwise(borders):
            for start in range(first, last, batch_size):
                yield range(start, min(start + batch_size, last))
