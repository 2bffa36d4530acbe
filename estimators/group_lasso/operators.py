"""X as an operator on a device: what the path needs of X is a few of its columns and the pass X'R.

X is held once, feature-major, in the precision it came in; standardisation is applied to results, never to X.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 32 * 2**20
_DELICATE = 100.0

Columns: TypeAlias = slice | NDArray[np.int64]


class Layer(Protocol):
    """One layer of a network: the columns ``[start, stop)`` of a feature matrix."""

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
    """Stored features, read lazily: the one contract with whatever stores them."""

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


def iterate_blocks(X: Features, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Columns, NDArray[Any] | Tensor]]:
    """Blocks of whole columns of any supported X, each at most ``max_bytes`` (but at least one column).

    Yields
    ------
    columns : slice or ndarray of int64
    block : ndarray or Tensor of shape (n_rows, width)
    """
    if not isinstance(X, (np.ndarray, Tensor)):
        yield from X.column_blocks(max_bytes)
        return
    n_rows, n_features = X.shape
    width = max(1, max_bytes // max(1, n_rows * X.itemsize))
    for start in range(0, n_features, width):
        columns = slice(start, min(start + width, n_features))
        yield columns, X[:, columns]


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to compute on: ``"auto"`` is CUDA where there is one, else the CPU.

    Raises
    ------
    ValueError
        If the device is unknown to torch, not there, or cannot compute in float64.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, dtype=torch.float64, device=resolved)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={device!r} cannot be used here ({reason}); accepted: 'auto', 'cpu', or a CUDA device that exists."
        ) from error
    return resolved


def column_moments(columns: Tensor, weights: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation of columns: m = p'X, sd^2 = sum_i p_i (x_i - m)^2.

    Parameters
    ----------
    columns : Tensor of shape (n_columns, n_samples), float64
    weights : Tensor of shape (n_samples,), float64
        Positive, summing to one.
    precision : float
        Relative rounding of the values (the machine epsilon of the dtype they were stored in).

    Returns
    -------
    mean, sd : Tensor of shape (n_columns,), float64
        sd is exactly 0 for a constant column: one whose spread is within rounding of its mean.
    """
    mean = columns @ weights
    sd = ((columns - mean[:, None]).square_() @ weights).sqrt()
    rounding = max(4.0 * precision, columns.shape[1] * torch.finfo(torch.float64).eps)
    return mean, torch.where(sd <= rounding * mean.abs(), 0.0, sd)


class DenseOperator:
    """X, optionally standardised, in the memory of one device.

    Column d of the standardised matrix is (x_d - m_d) / sd_d; constant columns count as zero.

    Parameters
    ----------
    X : ndarray, Tensor or FeatureMatrix of shape (n_rows, n_features)
        Held as float32, or as float64 where its dtype is neither float32 nor narrower; copied block by block.
    rows : Tensor of shape (n_samples,), int64, on the CPU
        The rows of X that take part.
    weights : Tensor of shape (n_samples,), float64, on the device to compute on
        Weights of these rows, summing to one.
    standardize : bool
        Divide each column by its weighted standard deviation.
    center : bool
        Subtract each column's weighted mean; has effect only with ``standardize``.
    double : bool
        Form X'R in float64 even where X is held in float32.

    Attributes
    ----------
    shape : tuple of int
        (n_samples, n_features).
    center, inverse_scale : Tensor of shape (n_features,), float64
        What is subtracted from, and then multiplied into, each column; constant columns have inverse scale 0.

    Raises
    ------
    ValueError
        If X holds a value that is not finite, or its blocks do not give every column once.
    """

    def __init__(
        self, X: Features, *, rows: Tensor, weights: Tensor, standardize: bool, center: bool, double: bool
    ) -> None:
        device, n_features = weights.device, X.shape[1]
        self.shape = (len(rows), n_features)
        self._columns = torch.empty((n_features, len(rows)), dtype=_storage_dtype(X), device=device)
        self._double = double or self._columns.dtype == torch.float64
        precision = torch.finfo(self._columns.dtype).eps
        mean = torch.zeros(n_features, dtype=torch.float64, device=device)
        sd = torch.zeros_like(mean)
        all_rows = len(rows) == X.shape[0]
        given = torch.zeros(n_features, dtype=torch.int64)
        for columns, block in iterate_blocks(X):
            index = columns if isinstance(columns, slice) else torch.as_tensor(columns, dtype=torch.int64)
            taken = block if all_rows else block[rows.to(block.device) if isinstance(block, Tensor) else rows.numpy()]
            values = _feature_major(taken, self._columns)
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"X holds NaN or infinity in {_first_bad_column(index, values)}; it must be finite.")
            self._columns[index] = values
            mean[index], sd[index] = column_moments(values.double(), weights, precision)
            given[index] += 1
        if not bool((given == 1).all()):
            raise ValueError(
                f"X.column_blocks must give each of its {n_features} columns once; "
                f"{int((given != 1).sum())} came never or more than once."
            )
        varying = sd > 0
        self.inverse_scale = torch.where(varying, 1.0 / sd, 0.0) if standardize else varying.double()
        self.center = mean if standardize and center else torch.zeros_like(mean)
        self._delicate = (varying & (mean.abs() > _DELICATE * sd)).nonzero().flatten()

    def columns(self, index: Tensor) -> Tensor:
        """Standardised columns, (len(index), n_samples) float64."""
        chosen = self._columns[index].double()
        return chosen.sub_(self.center[index, None]).mul_(self.inverse_scale[index, None])

    def correlate(self, residual: Tensor) -> Tensor:
        """The full pass X'R over the standardised X.

        Columns whose mean is over 100 times their spread lose their signal to rounding in float32; these few are
        always formed in float64.

        Parameters
        ----------
        residual : Tensor of shape (n_samples, n_classes), float64

        Returns
        -------
        Tensor of shape (n_features, n_classes), float64
        """
        width = max(1, BLOCK_BYTES // (8 * self.shape[0]))
        if self._double:
            product = torch.cat([block.double() @ residual for block in torch.split(self._columns, width)])
            total = residual.sum(0)
        else:
            # Class-major R: BLAS runs this layout at twice the speed of the row-major one.
            class_major = residual.T.float().contiguous().T
            product = (self._columns @ class_major).double()
            total = class_major.double().sum(0)
        product.sub_(self.center[:, None] * total).mul_(self.inverse_scale[:, None])
        if not self._double and len(self._delicate):
            for index in torch.split(self._delicate, width):
                product[index] = self.columns(index) @ residual
        return product


def _storage_dtype(X: Features) -> torch.dtype:
    if isinstance(X, Tensor):
        narrow = X.dtype in (torch.float32, torch.float16, torch.bfloat16)
    else:
        narrow = np.dtype(X.dtype) in (np.dtype(np.float32), np.dtype(np.float16))
    return torch.float32 if narrow else torch.float64


def _feature_major(block: NDArray[Any] | Tensor, like: Tensor) -> Tensor:
    if isinstance(block, Tensor):
        return block.T.to(like)
    # A copy, because torch takes no read-only array and joblib's memory maps are read-only.
    dtype = np.float32 if like.dtype == torch.float32 else np.float64
    return torch.from_numpy(np.array(block.T, dtype=dtype, order="C")).to(like.device)


def _first_bad_column(index: slice | Tensor, values: Tensor) -> str:
    bad = int((~torch.isfinite(values)).any(dim=1).nonzero()[0])
    return f"column {index.start + bad if isinstance(index, slice) else int(index[bad])}"
