"""Mean and spread of columns, weighted: what standardisation needs to know of X."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.group_lasso.reading import Index, positions

_DELICATE = 100.0
_TINY_SD = 1e-140
_MOST_EXPONENT = 1000
_FARTHEST = 1e15
_SLAB_BYTES = 8 * 2**20


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
    mean, sd = _mean_and_sd(columns, weights)
    extreme = ~((sd > _TINY_SD) & sd.isfinite())
    if bool(extreme.any()):
        # Squares may be out of range; a power of two per column brings them back and changes no digit.
        chosen = columns[extreme]
        exponent = torch.frexp(chosen.abs().amax(1))[1].clamp_(-_MOST_EXPONENT, _MOST_EXPONENT)
        moments = _mean_and_sd(torch.ldexp(chosen, -exponent[:, None]), weights)
        mean[extreme], sd[extreme] = (torch.ldexp(moment, exponent) for moment in moments)
    rounding = max(4.0 * precision, columns.shape[1] * torch.finfo(torch.float64).eps)
    return mean, torch.where(sd <= rounding * mean.abs(), 0.0, sd)


def _mean_and_sd(columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = columns @ weights
    return mean, ((columns - mean[:, None]).square_() @ weights).sqrt()


class Moments:
    """Centre and scale of every column, gathered block by block."""

    def __init__(self, n_features: int, weights: Tensor, *, standardize: bool, center: bool) -> None:
        self.weights = weights
        self._standardize, self._center = standardize, center
        self._mean = torch.zeros(n_features, dtype=torch.float64, device=weights.device)
        self._sd = torch.zeros_like(self._mean)
        self._given = torch.zeros(n_features, dtype=torch.int64)

    def add(self, index: slice | Tensor, columns: Tensor, precision: float) -> None:
        """Take the moments of columns (width, n_samples) at ``index``, in slabs that stay in cache when doubled."""
        mean, sd = [], []
        for slab in torch.split(columns, max(1, _SLAB_BYTES // (8 * columns.shape[1]))):
            moments = column_moments(slab.double(), self.weights, precision)
            mean.append(moments[0])
            sd.append(moments[1])
        self._mean[index], self._sd[index] = torch.cat(mean), torch.cat(sd)
        self._given[index] += 1
        finite = torch.isfinite(self._sd[index])
        if not bool(finite.all()):
            raise ValueError(f"X holds NaN or infinity in {column_name(index, ~finite)}; it must be finite.")

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centre, inverse scale, and the columns whose mean drowns their spread in float32."""
        if not bool((self._given == 1).all()):
            raise ValueError(
                f"X.column_blocks must give each of its {len(self._given)} columns once; "
                f"{int((self._given != 1).sum())} came never or more than once."
            )
        mean, sd = self._mean, self._sd
        varying = sd > 0
        if not self._standardize:
            size = mean.abs() + sd
            largest = float(size.max())
            if largest > 0.0 and not 1.0 / _FARTHEST < largest < _FARTHEST:
                raise ValueError(
                    f"X holds values of about {largest:.0e} in {column_name(slice(0, len(size)), size == largest)}: "
                    f"where features are not standardised, the largest must lie between {1.0 / _FARTHEST:g} and "
                    f"{_FARTHEST:g}. Scale X, or standardise it (normalization='standard')."
                )
        scale = torch.where(varying, 1.0 / sd, 0.0) if self._standardize else varying.double()
        center = mean if self._standardize and self._center else torch.zeros_like(mean)
        return center, scale, varying & (mean.abs() > _DELICATE * sd)


def column_name(index: Index, bad: Tensor) -> str:
    """The first bad column of a block, for messages."""
    return f"column {int(positions(index, torch.device('cpu'))[bad.cpu()][0])}"
