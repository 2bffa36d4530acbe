"""Which rows are computed and committed together."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["RowBlock", "batches", "plan", "rows_per_block"]

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

    A chunk is a file, and making one costs as much as writing a megabyte, so large sets get up to 2048 rows; sets of up
    to 16384 images get 512, which loses less work to a crash. A block stays below 128 MiB as far as 16 rows do, which
    bounds memory whatever the number of images. Blocks share the rows evenly, because the last chunk is stored whole.
    """
    most = _ROWS_OF_FEW if n_samples <= _FEW_SAMPLES else _ROWS_OF_MANY
    most = max(_ROW_STEP, min(most, _MAX_BYTES // row_bytes // _ROW_STEP * _ROW_STEP))
    even = -(-n_samples // -(-n_samples // most))
    return -(-even // _ROW_STEP) * _ROW_STEP


def plan(n_samples: int, rows: int) -> Iterator[RowBlock]:
    """All row blocks in order; the last one may be short."""
    for number, start in enumerate(range(0, n_samples, rows)):
        yield RowBlock(number, start, min(start + rows, n_samples))


def batches(blocks: Iterable[RowBlock], batch_size: int, segments: Sequence[int] = ()) -> Iterator[range]:
    """Rows of each batch; none crosses a block or a segment, so a row has the same values whenever it is computed."""
    for block in blocks:
        borders = [block.start, *(row for row in segments if block.start < row < block.stop), block.stop]
        for first, last in pairwise(borders):
            for start in range(first, last, batch_size):
                yield range(start, min(start + batch_size, last))
