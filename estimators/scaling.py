"""Which normalization scales what, and the lengths that layers are scaled by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from estimators.features import ColumnSource, FeatureMatrix, is_feature_matrix, iterate_blocks

_TINY_SQUARE = 1e-280

NORMALIZATIONS = ("standard", "layer", "layer+standard")


def scales_layers(normalization: str | None) -> bool:
    """Whether each layer's vector of a row is scaled to unit length."""
    return normalization in ("layer", "layer+standard")


def standardizes(normalization: str | None) -> bool:
    """Whether each feature is scaled to zero mean and unit variance."""
    return normalization in ("standard", "layer+standard")


def layer_scaling(normalization: str | None, part: str) -> str:
    """Whose length each layer's part of a row is divided by: ``part``'s, or "" for nothing."""
    return part if scales_layers(normalization) else ""


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
            lengths = np.zeros(X.shape[0])
            for columns, block in iterate_blocks(X):
                part = np.asarray(block)[:, layers[columns] == layer]
                lengths = np.hypot(lengths, np.hypot.reduce(part, axis=1, initial=0.0))
            inverse[:, layer] = _inverse(lengths)
    return inverse


def _inverse(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse = np.zeros_like(lengths)
    np.divide(1.0, lengths, out=inverse, where=lengths > 0)
    return inverse
