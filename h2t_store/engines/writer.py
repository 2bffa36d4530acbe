"""Row blocks: filled batch by batch, then written in the background."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from h2t_store.engines.forward import Features, Forward
from h2t_store.engines.loading import Batch
from h2t_store.engines.plan import RowBlock
from h2t_store.storage.extraction import Extraction

__all__ = ["Filling", "Writer"]

_BLOCKS_BEING_WRITTEN = 2


class Filling:
    """A row block in memory; rows without an image stay zero."""

    def __init__(self, forward: Forward, block: RowBlock) -> None:
        n = block.stop - block.start
        self.block = block
        self.features = [torch.zeros((n, layer.width), dtype=forward.dtype) for layer in forward.layers]
        self.norms = torch.zeros((n, len(forward.layers)))
        self.digests = np.zeros((n, 16), np.uint8)
        self.failures: dict[int, str] = {}
        self.n_filled = 0

    def add(self, batch: Batch, features: Features | None) -> None:
        """Put in the next rows; ``features`` are of those that did not fail."""
        first, stop = self.n_filled, self.n_filled + len(batch.rows)
        self.digests[first:stop] = batch.digests
        rows: Any = slice(first, stop)
        if batch.failed:
            self.failures |= {first + i: reason for i, reason in batch.failed.items()}
            rows = torch.tensor([row for row in range(first, stop) if row not in self.failures], dtype=torch.long)
        if features is not None:
            for layer, values in zip(self.features, features.stored, strict=True):
                layer[rows] = values
            self.norms[rows] = features.norms
        self.n_filled = stop


class Writer:
    """Writes row blocks in the background, two at a time at most; all are on disk once it is left.

    ``written`` is called, in another thread, with each block that is committed.
    """

    def __init__(self, extraction: Extraction, written: Callable[[RowBlock], None]) -> None:
        self._extraction, self._written = extraction, written
        self._thread = ThreadPoolExecutor(1)
        self._under_way: deque[Future[None]] = deque()

    def write(self, filled: Filling) -> None:
        """Hand over a block; waits while two others are being written."""
        while len(self._under_way) >= _BLOCKS_BEING_WRITTEN:
            self._under_way.popleft().result()
        self._under_way.append(self._thread.submit(self._write, filled))

    def _write(self, filled: Filling) -> None:
        block = filled.block
        known = block.start - block.number * self._extraction.header.rows_per_block
        self._extraction.write_block(
            block.number,
            [layer.numpy() for layer in filled.features],
            filled.norms.numpy(),
            filled.digests,
            filled.failures,
            known=known,
        )
        self._written(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        for written in self._under_way:
            written.result()
