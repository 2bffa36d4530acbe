"""Where X comes from: an array, a tensor, or stored features that are read lazily, all by blocks of whole columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

READ_BYTES = 32 * 2**20
_CACHE_BYTES = 2**20

Columns: TypeAlias = slice | NDArray[np.int64]


class Layer(Protocol):
    """One layer of a network: the columns ``[start, stop)`` of a feature matrix.

    ``target_sizes``, the sizes it was pooled to, tell what belongs together where there are several; the name then ends
    in "@" and the first of them.
    """

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class ColumnSource(Protocol):
    """A matrix that can be read by blocks of columns."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def column_blocks(self, max_bytes: int) -> Iterator[tuple[Columns, NDArray[Any]]]:
        """Yield (columns, block of shape (n_rows, width)) until every column was given once."""
        ...


class FeatureMatrix(ColumnSource, Protocol):
    """Stored features, read lazily: the one contract with whatever stores them.

    A ``fingerprint``, text that no other features share, saves `memory` from reading all of them to tell.
    """

    @property
    def ndim(self) -> int: ...
    @property
    def layers(self) -> Sequence[Layer]: ...
    @property
    def feature_names(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any) -> Any:
        """Rows, or rows and columns, as another feature matrix."""
        ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...
    def layer_norms(self) -> NDArray[np.float32]:
        """L2 norm of each layer's features per row, (n_rows, n_layers)."""
        ...


Features: TypeAlias = ColumnSource | NDArray[Any] | Tensor


def as_features(X: Any) -> Features:
    """X itself if it is a tensor or can be read by blocks of columns, else as an array.

    Raises
    ------
    ValueError
        If X is not a matrix of real numbers with at least one row and column.
    """
    features: Features = X
    if not isinstance(X, Tensor) and not hasattr(X, "column_blocks"):
        features = np.asarray(X)
        if features.dtype.kind not in "fiub":
            raise ValueError(f"X must hold real numbers, got dtype {features.dtype}.")
    if len(features.shape) != 2 or 0 in features.shape:
        raise ValueError(f"X must have shape (n_samples, n_features), neither of them 0, got {tuple(features.shape)}.")
    return features


def is_feature_matrix(X: object) -> TypeGuard[FeatureMatrix]:
    """Whether X follows the FeatureMatrix protocol rather than being an array."""
    return hasattr(X, "column_blocks") and hasattr(X, "layer_norms")


def iterate_blocks(X: Features, max_bytes: int = READ_BYTES) -> Iterator[tuple[Columns, NDArray[Any] | Tensor]]:
    """Blocks of whole columns of any supported X, each at most ``max_bytes`` (but at least one column).

    Blocks of what lies in memory already are views, small enough for a processor's cache.

    Yields
    ------
    columns : slice or ndarray of int64
    block : ndarray or Tensor of shape (n_rows, width)
    """
    if not isinstance(X, (np.ndarray, Tensor)):
        yield from X.column_blocks(max_bytes)
        return
    n_rows, n_features = X.shape
    width = max(1, min(max_bytes, _CACHE_BYTES) // max(1, n_rows * X.itemsize))
    for start in range(0, n_features, width):
        columns = slice(start, min(start + width, n_features))
        yield columns, X[:, columns]
