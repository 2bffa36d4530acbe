"""The curvature of the objective, with that of the loss modelled by one scalar per sample.

The Hessian of the multinomial loss couples classes within each sample, diag(P_i) - P_i P_i'. Replacing that block by a
scalar bend_i leaves one weighted Gram matrix F F' for all classes; with the penalty's curvature on nonzero rows the
model has an exact inverse, made of two matrices as large as the rows are many. It preconditions Newton's method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.group_lasso.problem import Problem

_MAJORANT = 1.5
_LEAST_BEND = 1e-4
_LEAST_SIZE = 1e-8
LEAST_DAMPING = 1e-3
_SLICE = 4096


@dataclass(frozen=True, slots=True)
class PenaltyCurvature:
    """The penalty's Hessian on nonzero rows: tangential (I - (1 - damping) u u') + radial I for each row.

    The penalty does not bend along u, and where there are more rows than the samples can tell apart neither does the
    loss: a Newton step may have no end there. Damping, a share of the tangential curvature left along u, gives it one.

    Attributes
    ----------
    units : Tensor of shape (n_classes, n_rows)
        u = W_d / ||W_d||.
    tangential : Tensor of shape (n_rows,)
        alpha rho / ||W_d||.
    radial : float
        alpha (1 - rho).
    damping : float
    """

    units: Tensor
    tangential: Tensor
    radial: float
    damping: float = 0.0

    @classmethod
    def at(cls, units: Tensor, norms: Tensor, strength: float, radial: float, damping: float = 0.0) -> PenaltyCurvature:
        """From directions u and norms ||W_d|| of the rows, for strength alpha rho."""
        return cls(units, strength / norms.clamp_min(_LEAST_SIZE), radial, damping)

    def add_product(self, product: Tensor, rows: Tensor) -> Tensor:
        """product + Hessian(rows), all (n_classes, n_rows)."""
        along = (self.units * rows).sum(0).mul_((self.damping - 1.0) * self.tangential)
        return torch.addcmul(product, rows, self.tangential + self.radial).addcmul_(self.units, along)

    def restrict(self, rows: Tensor) -> PenaltyCurvature:
        return PenaltyCurvature(self.units[:, rows], self.tangential[rows], self.radial, self.damping)


@dataclass(frozen=True, slots=True)
class ScalarCurvature:
    """The loss's Hessian in the model: F F' for every class, F_di = sqrt(bend_i) (x_id - center_d).

    Attributes
    ----------
    columns : Tensor of shape (n_rows, n_samples)
    root : Tensor of shape (n_samples,)
        sqrt(bend_i).
    center : Tensor of shape (n_rows,)
        Means of the columns under the weights bend_i, which eliminates the intercept; zero where there is none.
    gram : Tensor of shape (n_rows, n_rows), or None
        F F', formed beforehand where it is of moderate size.
    """

    columns: Tensor
    root: Tensor
    center: Tensor
    gram: Tensor | None

    @classmethod
    def at(cls, problem: Problem, columns: Tensor, probabilities: Tensor) -> ScalarCurvature:
        """The model at probabilities P of shape (n_classes, n_samples), float64."""
        worst = (probabilities * (1.0 - probabilities)).amax(0)
        bend = (problem.weights * (_MAJORANT * worst).clamp_min(_LEAST_BEND)).to(columns.dtype)
        center = columns @ bend / bend.sum() if problem.fit_intercept else torch.zeros_like(columns[:, 0])
        model = cls(columns, bend.sqrt(), center, None)
        return cls(columns, model.root, center, model.form_gram()) if len(columns) <= _SLICE else model

    def total(self) -> Tensor:
        """sum_i bend_i, the curvature along the intercept."""
        return self.root.square().sum()

    def diagonal(self) -> Tensor:
        """Curvature along each row alone, (n_rows,), positive."""
        if self.gram is not None:
            return self.gram.diagonal().clamp_min(1e-12)
        return ((self.columns - self.center[:, None]) * self.root).square().sum(1).clamp_min(1e-12)

    def form_gram(self) -> Tensor:
        """F F', in slices of samples so that no single call runs for seconds."""
        factor = (self.columns - self.center[:, None]).mul_(self.root)
        parts = torch.split(factor, _SLICE, dim=1)
        total: Tensor = parts[0] @ parts[0].T
        for part in parts[1:]:
            total.addmm_(part, part.T)
        return total

    def restrict(self, rows: Tensor) -> ScalarCurvature:
        """The same model on some of its rows."""
        gram = None if self.gram is None else self.gram[rows][:, rows]
        return ScalarCurvature(self.columns[rows], self.root, self.center[rows], gram)


class Preconditioner:
    """Inverse of the model plus the penalty's Hessian, on rows and (last, where it is free) the intercept.

    Beyond a few thousand rows they are taken in blocks, and coupling between blocks is left out.

    Parameters
    ----------
    model : ScalarCurvature
    penalty : PenaltyCurvature
        Of the same rows.
    free : bool
        Whether the intercept is free.
    """

    def __init__(self, model: ScalarCurvature, penalty: PenaltyCurvature, free: bool) -> None:
        self._center, self._total, self._free = model.center, model.total(), free
        parts = torch.split(torch.arange(len(model.columns), device=model.columns.device), _SLICE)
        if len(parts) == 1:
            self._blocks = [_BlockInverse(model, penalty)]
        else:
            self._blocks = [_BlockInverse(model.restrict(part), penalty.restrict(part)) for part in parts]

    def __call__(self, vector: Tensor) -> Tensor:
        rows = torch.addr(vector[:, :-1], vector[:, -1], self._center, alpha=-1.0) if self._free else vector
        solved = [block(part) for block, part in zip(self._blocks, torch.split(rows, _SLICE, dim=1), strict=True)]
        if not self._free:
            return solved[0] if len(solved) == 1 else torch.cat(solved, 1)
        center = torch.split(self._center, _SLICE)
        pull = sum(part @ middle for part, middle in zip(solved, center, strict=True))
        return torch.cat([*solved, (vector[:, -1] / self._total - pull)[:, None]], 1)


class _BlockInverse:
    """Inverse of F F' plus the penalty's Hessian.

    The penalty hardly bends along u. With M = F F' + tangential + radial, the same for all classes, Woodbury's formula
    corrects M^-1 for that on the rows' radial directions: a system with the matrix
    1 / tangential - M^-1 * (u_d'u_e), elementwise.
    """

    def __init__(self, model: ScalarCurvature, penalty: PenaltyCurvature) -> None:
        self._units = penalty.units
        system = model.form_gram() if model.gram is None else model.gram.clone()
        system.diagonal().add_(penalty.tangential + penalty.radial)
        self._inverse = _positive_inverse(system)
        self._root = penalty.tangential.sqrt()
        coupling = (self._inverse * self._root).mul_(self._root[:, None]).mul_(self._units.T @ self._units).neg_()
        coupling.diagonal().add_(1.0 / (1.0 - max(penalty.damping, LEAST_DAMPING)))
        self._correction = _positive_inverse(coupling)

    def __call__(self, rows: Tensor) -> Tensor:
        solved = rows @ self._inverse
        along = (self._units * solved).sum(0).mul_(self._root) @ self._correction
        return torch.addmm(solved, self._units * along.mul_(self._root), self._inverse)


def _positive_inverse(system: Tensor) -> Tensor:
    """Inverse of a positive definite matrix, its diagonal raised as far as rounding makes necessary."""
    factor, failed = torch.linalg.cholesky_ex(system)
    lift = torch.finfo(system.dtype).eps * system.diagonal().abs().mean()
    while bool(failed):
        lift = 10.0 * lift
        system.diagonal().add_(lift)
        factor, failed = torch.linalg.cholesky_ex(system)
    return torch.cholesky_inverse(factor)
