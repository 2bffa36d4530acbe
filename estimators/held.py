"""Stored features held in memory: read once, for a fit that goes through them several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from joblib import effective_n_jobs
from joblib.parallel import BACKENDS, get_active_backend
from numpy.typing import NDArray

from estimators.device import memory_limit, resolve_device
from estimators.features import FeatureMatrix, column_slices, is_feature_matrix
from estimators.group_lasso.operators import dense_bytes, storage_dtype
from estimators.training import Training

_BLOCK_BYTES = 2**20
_LOCAL = ("loky", "multiprocessing")

Memory = int | str | None
Index = NDArray[np.int64] | None


class HeldFeatures:
    """A FeatureMatrix whose values stay in memory once all of them were read; its rows and columns share them."""

    ndim = 2

    def __init__(
        self, stored: FeatureMatrix, whole: HeldFeatures | None = None, rows: Index = None, columns: Index = None
    ) -> None:
        self._stored, self._rows, self._columns = stored, rows, columns
        self._whole = self if whole is None else whole
        self._values: NDArray[Any] | None = None
        self.shape, self.dtype = stored.shape, stored.dtype

    def load(self) -> NDArray[Any]:
        """All values of the whole matrix, read if they are not in memory yet."""
        whole = self._whole
        if whole._values is None:
            whole._values = np.asarray(whole._stored)
        return whole._values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._stored, name)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        stored = self._stored[key]
        if len(getattr(stored, "shape", ())) != 2:
            return stored
        rows, columns = key if isinstance(key, tuple) else (key, ...)
        n_rows, n_columns = self._whole.shape
        return HeldFeatures(
            stored, self._whole, _composed(self._rows, rows, n_rows), _composed(self._columns, columns, n_columns)
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = self._held()
        if values is None:
            return np.asarray(self._stored, dtype)
        return np.array(self._take(values, slice(None)), dtype, copy=copy)

    def column_blocks(self, max_bytes: int) -> Iterator[tuple[Any, NDArray[Any]]]:
        values = self._held()
        if values is None:
            yield from self._stored.column_blocks(max_bytes)
            return
        for part in column_slices(self.shape, self.dtype.itemsize, min(max_bytes, _BLOCK_BYTES)):
            yield part, self._take(values, part)

    def layer_norms(self) -> NDArray[np.float32]:
        return self._stored.layer_norms()

    def _held(self) -> NDArray[Any] | None:
        """All values, where they were read before or are wanted now."""
        everything = self._rows is None and self._columns is None
        return self.load() if everything else self._whole._values

    def _take(self, values: NDArray[Any], part: slice) -> NDArray[Any]:
        block = values[:, part] if self._columns is None else np.take(values, self._columns[part], axis=1)
        return block if self._rows is None else block[self._rows]


def _composed(chosen: Index, key: Any, size: int) -> Index:
    """What ``key`` takes of the rows or columns chosen before; None for all, in order."""
    if key is Ellipsis or (isinstance(key, slice) and key == slice(None)):
        return chosen
    index: NDArray[np.int64] = (np.arange(size) if chosen is None else chosen)[key]
    return None if np.array_equal(index, np.arange(size)) else index


def hold(
    training: Training,
    max_memory: Memory,
    device: str | torch.device,
    *,
    copies: int = 1,
    n_fits: int = 1,
    load: bool = False,
) -> tuple[Training, Memory]:
    """The training set with its stored features held, where that leaves memory for solvers, and the memory left.

    ``copies`` of them will be held, for ``n_fits`` solvers at the same time. They are read now (``load``) or when all
    of them are first wanted.
    """
    features = training.features
    if not is_feature_matrix(features) or isinstance(features, HeldFeatures):
        return training, max_memory
    size = features.shape[0] * features.shape[1] * np.dtype(features.dtype).itemsize
    limit = memory_limit(max_memory, torch.device("cpu"))
    left = limit - copies * size
    # Not held either where a solver could hold its own copy only without this one.
    if left < n_fits * size or left < n_fits * dense_bytes(*features.shape, storage_dtype(features, None)) <= limit:
        return training, max_memory
    held = HeldFeatures(features)
    if load:
        held.load()
    return replace(training, features=held), left if resolve_device(device).type == "cpu" else max_memory


def hold_for_folds(
    training: Training, max_memory: Memory, device: str | torch.device, n_jobs: int | None, n_folds: int
) -> tuple[Training, Memory, Memory]:
    """The same for folds that joblib works on, and what memory is left in total and for each fold.

    Processes on this machine share one more copy, which joblib maps into their memory. Workers that may be elsewhere
    get the address of what is stored, and read their folds themselves.
    """
    backend, _ = get_active_backend()
    n_fits = min(effective_n_jobs(n_jobs), n_folds)
    processes = n_fits > 1 and not getattr(backend, "supports_sharedmem", False)
    if processes and type(backend) not in map(BACKENDS.get, _LOCAL):
        return training, max_memory, max_memory
    training, left = hold(training, max_memory, device, copies=2 if processes else 1, n_fits=n_fits, load=True)
    if n_fits == 1:
        return training, left, left
    return training, left, max(1, memory_limit(left, resolve_device(device)) // n_fits)
