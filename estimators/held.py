"""Stored features in memory: read once, for a fit that goes through them several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from joblib import effective_n_jobs
from joblib.parallel import BACKENDS, get_active_backend
from numpy.typing import NDArray

from estimators.device import memory_limit, resolve_device
from estimators.features import FeatureMatrix, is_feature_matrix
from estimators.group_lasso.operators import dense_bytes, storage_dtype
from estimators.paths import PathOptions
from estimators.training import Training

_BLOCK_BYTES = 2**20
_LOCAL = ("loky", "multiprocessing")

Index = NDArray[np.int64] | None


@dataclass
class _Values:
    """All values of a matrix, once they were needed."""

    stored: FeatureMatrix
    array: NDArray[Any] | None = None

    def load(self) -> NDArray[Any]:
        if self.array is None:
            self.array = np.asarray(self.stored)
        return self.array


class HeldFeatures:
    """A FeatureMatrix whose values stay in memory once all of them were read.

    Rows and columns of it share the values. Until then, rows and columns are read from where they are stored. Names,
    layers, norms and all else are those of the stored matrix.

    Parameters
    ----------
    stored : FeatureMatrix
    """

    ndim = 2

    def __init__(self, stored: FeatureMatrix) -> None:
        self._stored, self._values = stored, _Values(stored)
        self._rows: Index = None
        self._columns: Index = None

    def load(self) -> None:
        """Read what is not in memory yet."""
        self._values.load()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._stored, name)

    @property
    def shape(self) -> tuple[int, int]:
        return self._stored.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._stored.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        stored = self._stored[key]
        if len(getattr(stored, "shape", ())) != 2:
            return stored
        rows, columns = key if isinstance(key, tuple) else (key, ...)
        n_rows, n_columns = self._values.stored.shape
        taken = HeldFeatures(stored)
        taken._values = self._values
        taken._rows, taken._columns = _of(self._rows, rows, n_rows), _of(self._columns, columns, n_columns)
        return taken

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = self._held()
        if values is None:
            return np.asarray(self._stored, dtype)
        return np.array(self._take(values, slice(None)), dtype, copy=copy)

    def column_blocks(self, max_bytes: int) -> Iterator[tuple[Any, NDArray[Any]]]:
        """Blocks of whole columns, as the stored matrix gives them."""
        values = self._held()
        if values is None:
            yield from self._stored.column_blocks(max_bytes)
            return
        n_rows, n_columns = self.shape
        width = max(1, min(max_bytes, _BLOCK_BYTES) // max(1, n_rows * self.dtype.itemsize))
        for start in range(0, n_columns, width):
            part = slice(start, min(start + width, n_columns))
            yield part, self._take(values, part)

    def layer_norms(self) -> NDArray[np.float32]:
        return self._stored.layer_norms()

    def _held(self) -> NDArray[Any] | None:
        """All values, where they were read before or are wanted now."""
        whole = self._rows is None and self._columns is None
        return self._values.load() if whole else self._values.array

    def _take(self, values: NDArray[Any], part: slice) -> NDArray[Any]:
        block = values[:, part] if self._columns is None else np.take(values, self._columns[part], axis=1)
        return block if self._rows is None else block[self._rows]


def hold(training: Training, options: PathOptions, copies: int = 1, n_fits: int = 1) -> tuple[Training, PathOptions]:
    """A training set whose stored features are read once, where memory allows it, and options for what is left of it.

    They are held where they take no more than half of the memory and keep no solver from holding its own copy.

    Parameters
    ----------
    training : Training
    options : PathOptions
    copies : int, default=1
        How many there will be, besides those of the solvers.
    n_fits : int, default=1
        How many solvers work at the same time, on about as many rows as there are.
    """
    features = training.features
    if not is_feature_matrix(features) or isinstance(features, HeldFeatures):
        return training, options
    size = features.shape[0] * features.shape[1] * np.dtype(features.dtype).itemsize
    limit = memory_limit(options.max_memory, torch.device("cpu"))
    left = limit - copies * size
    if left < n_fits * size or left < n_fits * dense_bytes(*features.shape, storage_dtype(features, None)) <= limit:
        return training, options
    if resolve_device(options.device).type == "cpu":
        options = replace(options, max_memory=left)
    return replace(training, features=HeldFeatures(features)), options


def hold_for_folds(
    training: Training, options: PathOptions, n_jobs: int | None, n_folds: int
) -> tuple[Training, PathOptions, PathOptions]:
    """The same for folds of a training set that joblib works on, and options for each of them.

    Processes on this machine share one more copy, which joblib maps into their memory. Workers that may be elsewhere
    get the address of what is stored, and read their folds themselves.
    """
    backend, _ = get_active_backend()
    n_fits = min(effective_n_jobs(n_jobs), n_folds)
    processes = n_fits > 1 and not getattr(backend, "supports_sharedmem", False)
    if processes and type(backend) not in map(BACKENDS.get, _LOCAL):
        return training, options, options
    training, options = hold(training, options, 2 if processes else 1, n_fits)
    if isinstance(training.features, HeldFeatures):
        training.features.load()
    if n_fits == 1:
        return training, options, options
    limit = memory_limit(options.max_memory, resolve_device(options.device))
    return training, options, replace(options, max_memory=max(1, limit // n_fits))


def _of(chosen: Index, key: Any, size: int) -> Index:
    """What ``key`` takes of the rows or columns chosen before; None for all, in order."""
    if key is Ellipsis or (isinstance(key, slice) and key == slice(None)):
        return chosen
    index: NDArray[np.int64] = (np.arange(size) if chosen is None else chosen)[key]
    return None if np.array_equal(index, np.arange(size)) else index
