"""Where X comes from: an array, a tensor, or stored features that are read lazily, all by blocks of whole columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
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

    What it may have besides: a ``fingerprint``, text that no other features share, saves `memory` from reading all of
    them to tell. A ``recipe``, plain JSON that says how the features are made, is remembered by what is fitted; then
    ``recipe_differences(recipe)`` lists in words what keeps other features apart from these, and those are refused.
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
    """X itself if it can be read by blocks of columns, a tensor without its gradient, anything else as an array."""
    features: Features = X
    if issparse(X) or (isinstance(X, Tensor) and X.layout != torch.strided):
        dense = "to_dense" if isinstance(X, Tensor) else "toarray"
        raise TypeError(f"X is sparse ({type(X).__name__}), but dense data is required: pass X.{dense}().")
    if isinstance(X, Tensor):
        features, real = X.detach(), not X.is_complex()
    elif hasattr(X, "column_blocks"):
        real = True
    else:
        features = np.asarray(X)
        real = features.dtype.kind in "fiub"
    if not real:
        raise ValueError(f"X must hold real numbers, got dtype {features.dtype}.")
    if len(features.shape) != 2 or 0 in features.shape:
        raise ValueError(f"X must have shape (n_samples, n_features), neither of them 0, got {tuple(features.shape)}.")
    return features


def as_host_array(X: Any) -> Any:
    """A tensor as an array on the host, without its gradient; anything else as it is."""
    if not isinstance(X, Tensor):
        return X
    values = X.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def is_feature_matrix(X: object) -> TypeGuard[FeatureMatrix]:
    """Whether X follows the FeatureMatrix protocol rather than being an array."""
    return hasattr(X, "column_blocks") and hasattr(X, "layer_norms")


def iterate_blocks(X: Features, max_bytes: int = READ_BYTES) -> Iterator[tuple[Columns, NDArray[Any] | Tensor]]:
    """Blocks of whole columns of any supported X, each at most ``max_bytes`` (but at least one column).

    Blocks of what lies in memory already are views, small enough for a processor's cache.
    """
    if not isinstance(X, (np.ndarray, Tensor)):
        yield from X.column_blocks(max_bytes)
        return
    for columns in column_slices(X.shape, X.itemsize, min(max_bytes, _CACHE_BYTES)):
        yield columns, X[:, columns]


def column_slices(shape: Sequence[int], itemsize: int, max_bytes: int) -> Iterator[slice]:
    """Cut a matrix into blocks of whole columns, each at most ``max_bytes`` (but at least one column)."""
    n_rows, n_columns = shape
    width = max(1, max_bytes // max(1, n_rows * itemsize))
    for start in range(0, n_columns, width):
        yield slice(start, min(start + width, n_columns))
