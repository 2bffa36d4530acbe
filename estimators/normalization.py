"""Scaling of features: per feature by its spread, and per layer and row to unit length, as the paper does.

Layer scaling is applied to blocks of columns as they are read, so that no scaled copy of X is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.group_lasso.operators import column_moments
from estimators.group_lasso.sources import (
    READ_BYTES,
    Columns,
    FeatureMatrix,
    is_feature_matrix,
    iterate_blocks,
)

NORMALIZATIONS = ("standard", "layer", "layer+standard")


def scales_layers(normalization: str | None) -> bool:
    """Whether each layer's vector of a row is scaled to unit length."""
    return normalization in ("layer", "layer+standard")


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
    names = [layer.name for layer in X.layers]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.repeat(np.array([numbers[name] for name in names], dtype=np.int64), np.subtract(stops, starts))


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
    norms = np.zeros((X.shape[0], int(layers.max()) + 1))
    if is_feature_matrix(X):
        norms[:, layers[[layer.start for layer in X.layers]]] = X.layer_norms()
    else:
        for columns, block in iterate_blocks(X):
            values = np.asarray(block, dtype=np.float64)
            norms += values**2 @ _membership(layers[columns], norms.shape[1])
        norms = np.sqrt(norms)
    return _inverse(norms)


def normalize_kept(kept: NDArray[np.float64], layers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scale the kept part of each layer to unit length in every row; zero stays zero.

    Parameters
    ----------
    kept : ndarray of shape (n_rows, n_kept), float64
    layers : ndarray of shape (n_kept,), int64
        Layer of each kept column.

    Returns
    -------
    ndarray of shape (n_rows, n_kept), float64
    """
    squares = kept**2 @ _membership(layers, int(layers.max(initial=-1)) + 1)
    return kept * _inverse(np.sqrt(squares))[:, layers]


def weighted_moments(
    kept: NDArray[np.float64], sample_weight: NDArray[np.float64], precision: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted mean and inverse standard deviation of columns; constant columns have inverse 0.

    Parameters
    ----------
    kept : ndarray of shape (n_rows, n_kept), float64
    sample_weight : ndarray of shape (n_rows,), float64
        Positive.
    precision : float
        Relative rounding of the values.

    Returns
    -------
    mean, inverse_sd : ndarray of shape (n_kept,), float64
    """
    weights = torch.from_numpy(sample_weight / sample_weight.sum())
    mean, sd = column_moments(torch.from_numpy(np.ascontiguousarray(kept.T)), weights, precision)
    return mean.numpy(), _inverse(sd.numpy())


class LayerScaled:
    """X with each layer's vector of a row scaled to unit length, read by blocks of columns.

    Parameters
    ----------
    X : ndarray or FeatureMatrix of shape (n_rows, n_features)
    layers : ndarray of shape (n_features,), int64
        From `layer_index`.
    """

    def __init__(self, X: FeatureMatrix | NDArray[Any], layers: NDArray[np.int64]) -> None:
        self._source = X
        self._layers = layers
        self._inverse = inverse_layer_norms(X, layers)
        self.shape: tuple[int, int] = (X.shape[0], X.shape[1])
        self.dtype: np.dtype[Any] = np.dtype(X.dtype)

    def column_blocks(self, max_bytes: int = READ_BYTES) -> Iterator[tuple[Columns, NDArray[Any]]]:
        """Blocks of whole columns, scaled, in the dtype of X."""
        for columns, block in iterate_blocks(self._source, max_bytes):
            scale = self._inverse[:, self._layers[columns]]
            yield columns, np.multiply(block, scale).astype(self.dtype, copy=False)


def _membership(layers: NDArray[np.int64], n_layers: int) -> NDArray[np.float64]:
    return np.asarray(layers[:, None] == np.arange(n_layers), dtype=np.float64)


def _inverse(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse = np.zeros_like(lengths)
    np.divide(1.0, lengths, out=inverse, where=lengths > 0)
    return inverse
