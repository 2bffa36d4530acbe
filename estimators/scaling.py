"""Scaling of features: per feature by its spread, and per layer and row to unit length, as the paper does.

Layer scaling is applied to blocks of columns as they are read, so that no scaled copy of X is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.features import (
    READ_BYTES,
    Columns,
    ColumnSource,
    FeatureMatrix,
    Layer,
    is_feature_matrix,
    iterate_blocks,
)
from estimators.group_lasso.moments import column_moments

_TINY_SQUARE = 1e-280

NORMALIZATIONS = ("standard", "layer", "layer+standard")


def scales_layers(normalization: str | None) -> bool:
    """Whether each layer's vector of a row is scaled to unit length."""
    return normalization in ("layer", "layer+standard")


def kept_scaling(normalization: str | None) -> str:
    """What the head divides each layer's kept part of a row by: its length, "kept", or nothing, ""."""
    return "kept" if scales_layers(normalization) else ""


def standardizes(normalization: str | None) -> bool:
    """Whether each feature is scaled to zero mean and unit variance."""
    return normalization in ("standard", "layer+standard")


def layer_index(X: FeatureMatrix | NDArray[Any]) -> NDArray[np.int64]:
    """Which layer each column of X belongs to; a plain array is one layer.

    Runs of columns that carry one layer's name are one layer, in whatever order the columns were taken.

    Returns
    -------
    ndarray of shape (n_features,), int64
        Numbered by first appearance.

    Raises
    ------
    ValueError
        If the layers of a FeatureMatrix do not cover its columns in order.
    """
    if not is_feature_matrix(X):
        return np.zeros(X.shape[1], dtype=np.int64)
    starts = [layer.start for layer in X.layers]
    stops = [layer.stop for layer in X.layers]
    if [*starts, X.shape[1]] != [0, *stops]:
        raise ValueError("X.layers must cover the columns of X one after the other, without gaps or overlaps.")
    numbers = {name: number for number, name in enumerate(layer_names(X))}
    return np.repeat(np.array([numbers[layer.name] for layer in X.layers], dtype=np.int64), np.subtract(stops, starts))


def layer_names(X: FeatureMatrix | NDArray[Any]) -> NDArray[Any]:
    """Names of the layers that `layer_index` numbers, (n_layers,) object; a plain array is the layer "X"."""
    names = dict.fromkeys(layer.name for layer in X.layers) if is_feature_matrix(X) else ["X"]
    return np.array(list(names), dtype=object)


def columns_by_size(X: FeatureMatrix | NDArray[Any]) -> dict[int, NDArray[np.int64]]:
    """Columns of X that belong to each target size, for the sizes that every activation was pooled to.

    Returns
    -------
    dict of int to ndarray of int64
        Sorted; empty where X does not say what it was pooled to.
    """
    pooled: dict[int, list[Layer]] = {}
    for layer in X.layers if is_feature_matrix(X) else ():
        for size in getattr(layer, "target_sizes", ()):
            pooled.setdefault(size, []).append(layer)
    names = {size: {_stem(layer) for layer in layers} for size, layers in pooled.items()}
    every = set().union(*names.values())
    return {
        size: np.concatenate([np.arange(layer.start, layer.stop) for layer in pooled[size]])
        for size in sorted(pooled)
        if names[size] == every
    }


def _stem(layer: Any) -> str:
    """A layer's name without the "@size" that tells apart what one activation was pooled to."""
    return str(layer.name.removesuffix(f"@{layer.target_sizes[0]}"))


def inverse_layer_norms(X: FeatureMatrix | NDArray[Any], layers: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / ||x_layer||_2 per row and layer, 0 where the layer is zero.

    A FeatureMatrix has its norms stored; an array is cut by ``layers``.

    Parameters
    ----------
    X : ndarray or FeatureMatrix of shape (n_rows, n_features)
    layers : ndarray of shape (n_features,), int64
        From `layer_index`.

    Returns
    -------
    ndarray of shape (n_rows, n_layers), float64
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
    """1 / the L2 norm of the chosen columns where squares may not be finite or not be normal numbers, (n_rows,)."""
    blocks = [np.asarray(block, dtype=np.float64)[:, chosen[columns]] for columns, block in iterate_blocks(X)]
    values = np.concatenate(blocks, axis=1)
    exponents = np.frexp(np.abs(values).max(axis=1))[1]
    with np.errstate(over="ignore"):
        scaled = _inverse(np.linalg.norm(np.ldexp(values, -exponents[:, None]), axis=1))
        return np.asarray(np.ldexp(scaled, -exponents))


def weighted_moments(
    values: NDArray[np.float64], sample_weight: NDArray[np.float64], precision: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted mean and inverse standard deviation of columns; constant columns have inverse 0.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_columns), float64
    sample_weight : ndarray of shape (n_rows,), float64
        Rows of weight 0 have no say in what is constant.
    precision : float
        Relative rounding of the values.

    Returns
    -------
    mean, inverse_sd : ndarray of shape (n_columns,), float64
    """
    rows = sample_weight > 0
    weights = torch.from_numpy(sample_weight[rows] / sample_weight.sum())
    mean, sd = column_moments(torch.from_numpy(np.ascontiguousarray(values[rows].T)), weights, precision)
    return mean.numpy(), _inverse(sd.numpy())


class LayerScaled:
    """X with each layer's columns of a row scaled, read by blocks of columns.

    Parameters
    ----------
    X : ndarray or ColumnSource of shape (n_rows, n_features)
    layers : ndarray of shape (n_features,), int64
        From `layer_index`.
    inverse : ndarray of shape (n_rows, n_layers), float64
        What to scale by.
    """

    def __init__(self, X: ColumnSource | NDArray[Any], layers: NDArray[np.int64], inverse: NDArray[np.float64]) -> None:
        self._source = X
        self._layers = layers
        self._inverse = inverse
        self.shape: tuple[int, int] = (X.shape[0], X.shape[1])
        self.stored_dtype: np.dtype[Any] = np.dtype(getattr(X, "stored_dtype", X.dtype))
        self.dtype: np.dtype[Any] = np.result_type(X.dtype, np.float32)

    def column_blocks(self, max_bytes: int = READ_BYTES) -> Iterator[tuple[Columns, NDArray[Any]]]:
        """Blocks of whole columns, scaled, in the dtype of X, or in float32 where that is narrower."""
        for columns, block in iterate_blocks(self._source, max_bytes):
            scale = self._inverse[:, self._layers[columns]]
            yield columns, np.multiply(block, scale).astype(self.dtype, copy=False)


def _inverse(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse = np.zeros_like(lengths)
    np.divide(1.0, lengths, out=inverse, where=lengths > 0)
    return inverse
