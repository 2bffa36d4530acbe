"""X by blocks of columns: where it is stored, or on the device, the next block read while one is used.

Blocks for a card pass through two pinned buffers, whatever the layout of X, and are copied on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from estimators.features import Features, iterate_blocks

Item = TypeVar("Item")

# Which columns a block has; a tensor is int64 and on the CPU.
Index: TypeAlias = slice | Tensor
Blocks: TypeAlias = Generator[tuple[Index, Tensor], None, None]


class BlockReader:
    """Some rows of X by blocks of columns, (len(rows), width), and which columns they are.

    Parameters
    ----------
    X : ndarray, Tensor or FeatureMatrix of shape (n_rows, n_features)
    rows : Tensor of shape (n_samples,), int64, on the CPU
        Distinct.
    max_bytes : int
        Largest size of a block of all rows.
    device : torch.device
        Where `on_device` gives them.
    """

    def __init__(self, X: Features, rows: Tensor, max_bytes: int, device: torch.device) -> None:
        self._source, self._max_bytes, self._device = X, max_bytes, device
        self._on_card = isinstance(X, Tensor) and X.is_cuda
        self._rows = None if len(rows) == X.shape[0] else rows
        if self._rows is not None and isinstance(X, Tensor):
            self._rows = self._rows.to(X.device)
        self._staging = _Staging(device) if device.type == "cuda" and not self._on_card else None

    def where_stored(self) -> Blocks:
        """On the device that X is on, read while the one before is used if they come from the host."""
        return self.plain() if self._on_card else ahead(self.plain())

    def on_device(self) -> Blocks:
        """On the device to compute on. A block is valid until the next one is asked for."""
        if self._staging is not None:
            return self._staging.copied(_from_host(self._source, self._max_bytes), self._rows)
        if self._device.type == "cpu" and not self._on_card:
            return self.where_stored()
        return ((index, block.to(self._device)) for index, block in self.plain())

    def plain(self) -> Blocks:
        """On the device that X is on, each read when it is asked for."""
        for index, block in _from_host(self._source, self._max_bytes):
            yield index, block if self._rows is None else block[self._rows]


class _Slot:
    """Where one block at a time passes: pinned memory, and memory of the card."""

    def __init__(self) -> None:
        self.pinned, self.there = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
        self.copied: torch.cuda.Event | None = None
        self.used: torch.cuda.Event | None = None

    def views(self, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        size = shape[0] * shape[1] * dtype.itemsize
        if len(self.pinned) < size:
            self.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.there = torch.empty(size, dtype=torch.uint8, device=device)
        return self.pinned[:size].view(dtype).view(shape), self.there[:size].view(dtype).view(shape)


class _Staging:
    """From the host to a card by turns through two slots, on a stream of its own.

    A pinned buffer is written once its last copy has ended, the card's once its last block was used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots = (_Slot(), _Slot())

    def copied(self, blocks: Blocks, rows: Tensor | None) -> Blocks:
        """Blocks of the rows on the card, the next one being read and copied while one is used."""
        computing = torch.cuda.current_stream(self._device)

        def sent() -> Generator[tuple[Index, Tensor, _Slot], None, None]:
            with closing(blocks):
                for turn, (index, block) in enumerate(blocks):
                    slot = self._slots[turn % 2]
                    yield index, self._send(block, rows, slot), slot

        with closing(ahead(sent())) as arriving:
            for index, block, slot in arriving:
                assert slot.copied is not None
                computing.wait_event(slot.copied)
                slot.there.record_stream(computing)
                try:
                    yield index, block
                finally:
                    slot.used = computing.record_event()

    def _send(self, block: Tensor, rows: Tensor | None, slot: _Slot) -> Tensor:
        """Copy the rows of a block to the card, in the order that it has in memory."""
        by_column = block.T.is_contiguous()
        lines, axis = (block.T, 1) if by_column else (block, 0)
        shape = [*lines.shape]
        shape[axis] = shape[axis] if rows is None else len(rows)
        with torch.cuda.stream(self._stream):
            if slot.copied is not None:
                slot.copied.synchronize()
            if slot.used is not None:
                self._stream.wait_event(slot.used)
            pinned, there = slot.views(block.dtype, (shape[0], shape[1]), self._device)
            if rows is None:
                pinned.copy_(lines)
            else:
                torch.index_select(lines, axis, rows, out=pinned)
            there.copy_(pinned, non_blocking=True)
            slot.copied = self._stream.record_event()
        return there.T if by_column else there


def ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same items, each made in a thread while the one before is used.

    Closing this, as an error does, waits for the item in the making and closes the given generator.
    """
    end = object()
    with closing(items), ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item  # type: ignore[misc]
            del item


def positions(index: Index, device: torch.device) -> Tensor:
    """Which columns a block has, as a tensor on the device."""
    if isinstance(index, slice):
        return torch.arange(index.start, index.stop, device=device)
    return sent(index, device)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A few values of the host on the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _from_host(X: Features, max_bytes: int) -> Blocks:
    """Blocks of all rows as tensors."""
    for columns, block in iterate_blocks(X, max_bytes):
        index = columns if isinstance(columns, slice) else torch.as_tensor(columns, dtype=torch.int64)
        yield index, block if isinstance(block, Tensor) else torch.from_numpy(_Shared.of(_native(block)))


def _native(block: NDArray[Any]) -> NDArray[Any]:
    """In a dtype, byte order and direction that torch knows."""
    if any(stride < 0 for stride in block.strides):
        block = np.ascontiguousarray(block)
    if block.dtype.kind == "f" and block.dtype.itemsize in (2, 4, 8):
        return block.astype(block.dtype.newbyteorder("="), copy=False)
    return block.astype(np.float64)


class _Shared:
    """The memory of an array that may not be written, as joblib's maps may not; torch, which only reads, would warn.

    Filters of warnings are for the whole process, and blocks are read in a thread.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = array.__array_interface__ | {"data": (address, False)}

    @classmethod
    def of(cls, array: NDArray[Any]) -> NDArray[Any]:
        return array if array.flags.writeable else np.asarray(cls(array))
