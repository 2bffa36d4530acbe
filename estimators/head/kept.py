"""The kept features: selected columns of X, scaled by layer as a head sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.device import memory_limit
from estimators.features import READ_BYTES, Columns, FeatureMatrix, column_slices, is_feature_matrix
from estimators.scaling import inverse_layer_norms, inverse_norms

_HELD_SHARE = 4
_BLOCK_BYTES = 2 * 2**20


def held_bytes(max_memory: int | str | None) -> int:
    """What columns read from a store may take on the host: a quarter of ``max_memory``."""
    return memory_limit(max_memory, torch.device("cpu")) // _HELD_SHARE


def in_memory(X: FeatureMatrix | NDArray[Any], max_bytes: float) -> FeatureMatrix | NDArray[Any]:
    """Stored features as an array if they take no more than ``max_bytes``, else as they are."""
    if not isinstance(X, np.ndarray) and X.shape[0] * X.shape[1] * np.dtype(X.dtype).itemsize <= max_bytes:
        return np.asarray(X)
    return X


class KeptFeatures:
    """Selected columns of X, with each layer's part of a row scaled as the blocks are read. No other column is read.

    ``selected`` is sorted, ``layers`` the `layer_index` of X. A layer's part of a row is divided by its own length
    (``scaling="kept"``), by that of the whole layer ("whole") or by nothing (""). The columns are held if they take no
    more than ``max_bytes``, else read again wherever they are needed.
    """

    def __init__(
        self,
        X: FeatureMatrix | NDArray[Any],
        selected: NDArray[np.int64],
        layers: NDArray[np.int64],
        scaling: str,
        max_bytes: float = np.inf,
    ) -> None:
        self.shape = (X.shape[0], len(selected))
        self._columns = X
        if is_feature_matrix(X):
            self._columns = in_memory(X if self.shape == X.shape else X[:, selected], max_bytes)
        elif self.shape != X.shape:
            self._columns = np.take(X, selected, axis=1)
        self._layers, self._inverse = layers[selected], None
        if scaling:
            whole = scaling == "whole"
            self._inverse = inverse_layer_norms(X, layers) if whole else inverse_norms(self._columns, self._layers)
        self.dtype = np.result_type(X.dtype, np.float32) if scaling else np.dtype(X.dtype)
        self.stored_dtype = np.dtype(getattr(X, "stored_dtype", X.dtype))

    def column_blocks(self, max_bytes: int = READ_BYTES) -> Iterator[tuple[Columns, NDArray[Any]]]:
        """Blocks of the kept columns, (which of them, values of shape (n_samples, width))."""
        if isinstance(self._columns, np.ndarray):
            parts = column_slices(self.shape, self._columns.itemsize, min(max_bytes, _BLOCK_BYTES))
            blocks: Iterator[tuple[Columns, NDArray[Any]]] = ((part, self._columns[:, part]) for part in parts)
        else:
            blocks = self._columns.column_blocks(max_bytes)
        for columns, block in blocks:
            if self._inverse is not None:
                block = np.multiply(block, self._inverse[:, self._layers[columns]]).astype(self.dtype, copy=False)
            yield columns, block

    def finite_blocks(self) -> Iterator[tuple[Columns, NDArray[Any]]]:
        """The same, with an error where a value is not finite."""
        for columns, block in self.column_blocks():
            # The sum is finite only if all terms are, but finite terms may overflow it.
            with np.errstate(over="ignore", invalid="ignore"):
                suspicious = not np.isfinite(block.sum())
            if suspicious and not np.isfinite(block).all():
                raise ValueError("X holds NaN or infinity in the selected features; they must be finite.")
            yield columns, block

    def scores(self, coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> NDArray[np.float64]:
        """Linear scores for coefficients (n_kept, n_outputs), (n_samples, n_outputs) float64."""
        total = torch.zeros((self.shape[0], len(intercept)), dtype=torch.float64)
        # By torch like all else: the threads of numpy's BLAS would go on waiting for work beside torch's.
        for index, block in self.finite_blocks():
            total += torch.from_numpy(block.astype(np.float64)) @ torch.from_numpy(np.array(coef[index]))
        return total.numpy() + intercept
