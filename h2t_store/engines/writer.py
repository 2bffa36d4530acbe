"""Row blocks: filled batch by batch, then written in the background."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from h2t_store.engines.forward import Features, Forward
from h2t_store.engines.loading import Batch
from h2t_store.engines.plan import RowBlock
from h2t_store.storage.extraction import Extraction

__all__ = ["Filling", "writing"]

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


@contextmanager
def writing(extraction: Extraction, written: Callable[[RowBlock], None]) -> Iterator[Callable[[Filling], None]]:
    """Write row blocks in the background, two at a time at most; all are committed when this is left.

    ``written`` is called, in another thread, with each block that is committed.
    """
    under_way: deque[Future[None]] = deque()

    def commit(filled: Filling) -> None:
        block, features = filled.block, [layer.numpy() for layer in filled.features]
        known = block.start - block.number * extraction.header.rows_per_block
        norms = filled.norms.numpy()
        extraction.write_block(block.number, features, norms, filled.digests, filled.failures, known=known)
        written(block)

    def write(filled: Filling) -> None:
        while len(under_way) >= _BLOCKS_BEING_WRITTEN:
            under_way.popleft().result()
        under_way.append(thread.submit(commit, filled))

    with ThreadPoolExecutor(1) as thread:
        yield write
    for each in under_way:
        each.result()
