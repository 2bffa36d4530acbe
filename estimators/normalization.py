"""Scaling of features: per feature by its spread, and per layer and row to unit length, as the paper does.

Layer scaling is applied to blocks of columns as they are read, so that no scaled copy of X is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.group_lasso.operators import (
    BLOCK_BYTES,
    Columns,
    FeatureMatrix,
    column_moments,
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


def layer_starts(X: FeatureMatrix | NDArray[Any]) -> NDArray[np.int64]:
    """First column of every layer of X; a plain array is one layer.

    Returns
    -------
    ndarray of shape (n_layers,), int64
        Increasing, starting at 0.

    Raises
    ------
    ValueError
        If the layers of a FeatureMatrix do not cover its columns in order.
    """
    if not is_feature_matrix(X):
        return np.zeros(1, dtype=np.int64)
    starts = [layer.start for layer in X.layers]
    stops = [layer.stop for layer in X.layers]
    if [*starts, X.shape[1]] != [0, *stops]:
        raise ValueError("X.layers must cover the columns of X one after the other, without gaps or overlaps.")
    return np.array(starts, dtype=np.int64)


def layer_of(columns: Columns, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the layer that each of the given columns belongs to."""
    index = np.arange(columns.start, columns.stop) if isinstance(columns, slice) else columns
    return np.searchsorted(starts, index, side="right") - 1


def inverse_layer_norms(X: FeatureMatrix | NDArray[Any], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / ||x_layer||_2 per row and layer, 0 where the layer is zero.

    A FeatureMatrix has its norms stored; an array is cut at ``starts``.

    Returns
    -------
    ndarray of shape (n_rows, n_layers), float64
    """
    if is_feature_matrix(X):
        norms = np.asarray(X.layer_norms(), dtype=np.float64)
    else:
        squares = np.zeros((X.shape[0], len(starts)))
        for columns, block in iterate_blocks(X):
            values = np.asarray(block, dtype=np.float64)
            squares += values**2 @ _membership(layer_of(columns, starts), len(starts))
        norms = np.sqrt(squares)
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
    starts : ndarray of shape (n_layers,), int64
        From `layer_starts`.
    """

    def __init__(self, X: FeatureMatrix | NDArray[Any], starts: NDArray[np.int64]) -> None:
        self._source = X
        self._starts = starts
        self._inverse = inverse_layer_norms(X, starts)
        self.shape: tuple[int, int] = (X.shape[0], X.shape[1])
        self.dtype: np.dtype[Any] = np.dtype(X.dtype)

    def column_blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Columns, NDArray[Any]]]:
        """Blocks of whole columns, scaled, in the dtype of X."""
        for columns, block in iterate_blocks(self._source, max_bytes):
            scale = self._inverse[:, layer_of(columns, self._starts)]
            yield columns, np.multiply(block, scale).astype(self.dtype, copy=False)


def _membership(layers: NDArray[np.int64], n_layers: int) -> NDArray[np.float64]:
    return np.asarray(layers[:, None] == np.arange(n_layers), dtype=np.float64)


def _inverse(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse = np.zeros_like(lengths)
    np.divide(1.0, lengths, out=inverse, where=lengths > 0)
    return inverse
