"""Ridge heads on the kept features of a training set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from estimators.group_lasso.moments import column_moments
from estimators.group_lasso.operators import stored_precision
from estimators.head.kept import KeptFeatures
from estimators.head.solver import TOLERANCE, RidgeSolution, solve_ridge
from estimators.head.space import Block, HeadSpace, held_space, held_space_bytes
from estimators.scaling import layer_scaling, standardizes
from estimators.switches import full_precision
from estimators.training import Training

_FINE_TOLERANCE = 1e-14


class LinearModel(NamedTuple):
    """A linear classifier on kept features, as it is solved for them after scaling by layer.

    ``coef`` (n_kept, n_classes) has standardisation undone; classes left out have coefficients 0 and the ``intercept``
    -inf. ``row_norms`` (n_kept,) are ||W_d||_2 on the scale of the problem solved, in ``n_iter`` steps.
    """

    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    row_norms: NDArray[np.float64]
    n_iter: int


class RidgeHead:
    """L2 logistic regression on kept features, which are gathered once for as many values of C as wanted.

    Rows of weight 0, and classes that have no others, are left out. ``selected`` is sorted and not empty. The columns
    held on the host take up to ``max_bytes``, the head twice that; where it does not suffice, its features are made
    again for every product. ``solution`` is that for the last C.
    """

    def __init__(
        self,
        training: Training,
        selected: NDArray[np.int64],
        normalization: str | None,
        device: torch.device,
        max_bytes: float = np.inf,
    ) -> None:
        scaling = layer_scaling(normalization, "kept")
        kept = KeptFeatures(training.features, selected, training.layers, scaling, max_bytes)
        self._kept, self._n_classes, self._device = kept, len(training.classes), device
        self._rows = np.flatnonzero(training.sample_weight > 0)
        self._present, codes = np.unique(training.codes[self._rows], return_inverse=True)
        self._weight = torch.as_tensor(training.sample_weight[self._rows], device=device)
        self._targets = torch.nn.functional.one_hot(torch.as_tensor(codes, device=device)).T.double()
        self._precision = stored_precision(kept)
        self._mean = torch.zeros(kept.shape[1], dtype=torch.float64, device=device)
        self._sd = torch.ones_like(self._mean)
        self._moments_known = not standardizes(normalization)
        self._space = self._gather(2 * max_bytes)
        self.solution: RidgeSolution | None = None

    @full_precision()
    def _gather(self, max_bytes: float) -> HeadSpace:
        shape = len(self._rows), self._kept.shape[1]
        if held_space_bytes(*shape) > max_bytes:
            return HeadSpace(self._standardized, shape)
        return held_space(self._standardized(), *shape, self._device)

    def _standardized(self) -> Iterator[Block]:
        """The features as they are penalised, in float64: rounded ones have other solutions where C is large."""
        weights = self._weight / self._weight.sum()
        for columns, block in self._kept.finite_blocks():
            index = columns if isinstance(columns, slice) else torch.as_tensor(columns, device=self._device)
            rows = block if len(self._rows) == len(block) else block[self._rows]
            # Torch takes no negative strides, and warns where it may not write, as joblib maps arrays for its workers.
            shared = rows.flags.writeable and min(rows.strides) >= 0
            values = torch.from_numpy(rows if shared else rows.copy()).to(self._device)
            if not self._moments_known:
                self._mean[index], self._sd[index] = column_moments(values.T.double(), weights, self._precision)
            yield index, torch.sub(values, self._mean[index]).mul_(_inverse(self._sd[index]))
        self._moments_known = True

    @full_precision()
    def fit(self, C: float, similar: RidgeSolution | None = None, rough: bool = False) -> LinearModel:
        """Solve for one C, from the solution for the C before, or a ``similar`` one of other features for this C.

        ``rough`` stops at 1e-8 of the objective where features are narrower than float64: enough to compare heads.
        """
        work, tolerance = torch.float32, TOLERANCE if rough else _FINE_TOLERANCE
        if self._precision <= np.finfo(np.float64).eps:
            work, tolerance = torch.float64, 0.0
        self.solution = solve_ridge(
            self._space,
            self._targets,
            self._weight,
            C,
            start=self.solution,
            similar=similar,
            work=work,
            tolerance=tolerance,
        )
        n_kept = self._kept.shape[1]
        solved = self._space.coefficients(self.solution.coordinates, self._standardized(), n_kept)
        raw = solved * _inverse(self._sd)[:, None]
        coef, intercept = np.zeros((n_kept, self._n_classes)), np.full(self._n_classes, -np.inf)
        coef[:, self._present] = raw.cpu().numpy()
        intercept[self._present] = (self.solution.intercept - self._mean @ raw).cpu().numpy()
        return LinearModel(coef, intercept, solved.norm(dim=1).cpu().numpy(), self.solution.n_iter)


def _inverse(sd: Tensor) -> Tensor:
    """1 / sd; 0 for a constant column."""
    return torch.where(sd > 0.0, 1.0 / sd, 0.0)
