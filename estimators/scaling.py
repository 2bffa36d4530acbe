"""Which normalization scales what, and the scaling of each layer's vector of a row to unit length.

Layers are scaled block by block as they are read; no scaled copy of X is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from estimators.features import (
    READ_BYTES,
    Columns,
    ColumnSource,
    FeatureMatrix,
    is_feature_matrix,
    iterate_blocks,
)

_TINY_SQUARE = 1e-280

NORMALIZATIONS = ("standard", "layer", "layer+standard")


def scales_layers(normalization: str | None) -> bool:
    """Whether each layer's vector of a row is scaled to unit length."""
    return normalization in ("layer", "layer+standard")


def standardizes(normalization: str | None) -> bool:
    """Whether each feature is scaled to zero mean and unit variance."""
    return normalization in ("standard", "layer+standard")


def kept_scaling(normalization: str | None) -> str:
    """What the head divides each layer's kept part of a row by: its length, "kept", or nothing, ""."""
    return "kept" if scales_layers(normalization) else ""


def scale_layers(
    X: FeatureMatrix | NDArray[Any], layers: NDArray[np.int64], normalization: str | None
) -> FeatureMatrix | LayerScaled | NDArray[Any]:
    """X with its layers scaled to unit length where the normalization says so, else X itself."""
    return LayerScaled(X, layers, inverse_layer_norms(X, layers)) if scales_layers(normalization) else X


def inverse_layer_norms(X: FeatureMatrix | NDArray[Any], layers: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / ||x_layer||_2 per row and layer, 0 where the layer is zero, (n_rows, n_layers) float64.

    A FeatureMatrix has its norms stored; the columns of an array belong to ``layers``, as `layer_index` numbers them.
    """
    if not is_feature_matrix(X):
        return inverse_norms(X, layers)
    norms = np.zeros((X.shape[0], int(layers.max(initial=-1)) + 1))
    norms[:, layers[[layer.start for layer in X.layers]]] = X.layer_norms()
    return _inverse(norms)


def inverse_norms(X: ColumnSource | NDArray[Any], layers: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / the L2 norm of each layer's columns of X, 0 where they are zero, (n_rows, n_layers) float64."""
    squares = np.zeros((X.shape[0], int(layers.max(initial=-1)) + 1))
    with np.errstate(over="ignore", under="ignore"):
        for columns, block in iterate_blocks(X):
            values = np.asarray(block, dtype=np.float64)
            present, which = np.unique(layers[columns], return_inverse=True)
            squares[:, present] += values**2 @ np.eye(len(present))[which]
    inverse = _inverse(np.sqrt(squares))
    if np.dtype(X.dtype).itemsize == 8:  # squares of float32 are in range
        out_of_range = ~((squares > _TINY_SQUARE) & (squares < np.inf)).all(axis=0)
        for layer in np.intersect1d(np.flatnonzero(out_of_range), layers):
            inverse[:, layer] = _inverse_norm_out_of_range(X, layers == layer)
    return inverse


def _inverse_norm_out_of_range(X: ColumnSource | NDArray[Any], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 / the L2 norm of the chosen columns, whose squares may overflow or underflow, (n_rows,)."""
    blocks = [np.asarray(block, dtype=np.float64)[:, chosen[columns]] for columns, block in iterate_blocks(X)]
    values = np.concatenate(blocks, axis=1)
    exponents = np.frexp(np.abs(values).max(axis=1))[1]
    with np.errstate(over="ignore"):
        scaled = _inverse(np.linalg.norm(np.ldexp(values, -exponents[:, None]), axis=1))
        return np.asarray(np.ldexp(scaled, -exponents))


def _inverse(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse = np.zeros_like(lengths)
    np.divide(1.0, lengths, out=inverse, where=lengths > 0)
    return inverse


class LayerScaled:
    """X with each layer's columns of a row multiplied by ``inverse`` (n_rows, n_layers), read by blocks of columns."""

    def __init__(self, X: ColumnSource | NDArray[Any], layers: NDArray[np.int64], inverse: NDArray[np.float64]) -> None:
        self._source, self._layers, self._inverse = X, layers, inverse
        self.shape: tuple[int, int] = (X.shape[0], X.shape[1])
        self.stored_dtype: np.dtype[Any] = np.dtype(getattr(X, "stored_dtype", X.dtype))
        self.dtype: np.dtype[Any] = np.result_type(X.dtype, np.float32)

    def column_blocks(self, max_bytes: int = READ_BYTES) -> Iterator[tuple[Columns, NDArray[Any]]]:
        """Blocks of whole columns, in the dtype of X or float32, whichever is wider."""
        for columns, block in iterate_blocks(self._source, max_bytes):
            scale = self._inverse[:, self._layers[columns]]
            yield columns, np.multiply(block, scale).astype(self.dtype, copy=False)
