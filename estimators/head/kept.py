"""The kept features: selected columns of X, scaled by layer as a head sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.features import READ_BYTES, Columns, ColumnSource, FeatureMatrix, is_feature_matrix
from estimators.group_lasso.operators import memory_limit
from estimators.scaling import LayerScaled, inverse_layer_norms, inverse_norms

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
    """Selected columns of X, scaled by layer. No other column is read.

    Parameters
    ----------
    X : ndarray or FeatureMatrix of shape (n_samples, n_features)
    selected : ndarray of shape (n_kept,), int64
        Sorted.
    layers : ndarray of shape (n_features,), int64
        From `layer_index`.
    scaling : {"", "kept", "whole"}
        What each layer's part of a row is divided by: nothing, its length, or the length of the whole layer.
    max_bytes : float, default=infinity
        The columns are held if they take no more than this, else read again wherever they are needed.
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
        columns: ColumnSource | NDArray[Any]
        if is_feature_matrix(X):
            columns = in_memory(X[:, selected], max_bytes)
        else:
            columns = X if self.shape == X.shape else np.take(X, selected, axis=1)
        if scaling == "kept":
            columns = LayerScaled(columns, layers[selected], inverse_norms(columns, layers[selected]))
        elif scaling == "whole":
            columns = LayerScaled(columns, layers[selected], inverse_layer_norms(X, layers))
        self._columns = columns
        self.dtype: np.dtype[Any] = np.dtype(columns.dtype)
        self.stored_dtype: np.dtype[Any] = np.dtype(getattr(X, "stored_dtype", X.dtype))

    def column_blocks(self, max_bytes: int = READ_BYTES) -> Iterator[tuple[Columns, NDArray[Any]]]:
        """Blocks of the kept columns, (which of them, values of shape (n_samples, width)).

        Raises
        ------
        ValueError
            If a value is not finite.
        """
        for index, block in self._blocks(max_bytes):
            # The sum is finite only if all terms are, but finite terms may overflow it.
            with np.errstate(over="ignore", invalid="ignore"):
                suspicious = not np.isfinite(block.sum())
            if suspicious and not np.isfinite(block).all():
                raise ValueError("X holds NaN or infinity in the selected features; they must be finite.")
            yield index, block

    def _blocks(self, max_bytes: int) -> Iterator[tuple[Columns, NDArray[Any]]]:
        if not isinstance(self._columns, np.ndarray):
            yield from self._columns.column_blocks(max_bytes)
            return
        width = max(1, min(max_bytes, _BLOCK_BYTES) // max(1, self.shape[0] * self.dtype.itemsize))
        for start in range(0, self.shape[1], width):
            yield slice(start, start + width), self._columns[:, start : start + width]

    def scores(self, coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> NDArray[np.float64]:
        """Linear scores for coefficients (n_kept, n_outputs), (n_samples, n_outputs) float64."""
        total = torch.zeros((self.shape[0], len(intercept)), dtype=torch.float64)
        # By torch like all else: the threads of numpy's BLAS would go on waiting for work beside torch's.
        for index, block in self.column_blocks():
            total += torch.from_numpy(block.astype(np.float64)) @ torch.from_numpy(np.array(coef[index]))
        return total.numpy() + intercept
