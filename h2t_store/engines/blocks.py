"""Which rows are computed and committed together."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["RowBlock", "batches", "plan", "rows_per_block"]

_MAX_ROWS = 512
_ROW_STEP = 16
_MAX_BYTES = 128 << 20


class RowBlock(NamedTuple):
    """Rows ``start:stop``, the ``number``-th block."""

    number: int
    start: int
    stop: int


def rows_per_block(n_samples: int, row_bytes: int) -> int:
    """Height of a block, which is the height of every chunk: a multiple of 16, at most 512.

    With 1024 columns of float16, 512 rows make chunks of 1 MiB. A block stays below 128 MiB as far as 16 rows do, which
    bounds memory whatever the number of images. Blocks share the rows evenly, because the last chunk is stored whole.
    """
    most = max(_ROW_STEP, min(_MAX_ROWS, _MAX_BYTES // row_bytes // _ROW_STEP * _ROW_STEP))
    even = -(-n_samples // -(-n_samples // most))
    return -(-even // _ROW_STEP) * _ROW_STEP


def plan(n_samples: int, rows: int) -> Iterator[RowBlock]:
    """All row blocks in order; the last one may be short."""
    for number, start in enumerate(range(0, n_samples, rows)):
        yield RowBlock(number, start, min(start + rows, n_samples))


def batches(blocks: Sequence[RowBlock], batch_size: int) -> Iterator[list[int]]:
    """Rows of each batch. No batch crosses a block, so a block gives the same values whenever it is computed."""
    for block in blocks:
        for start in range(block.start, block.stop, batch_size):
            yield list(range(start, min(start + batch_size, block.stop)))
