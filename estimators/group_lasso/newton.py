"""Inner solver for a working set: Newton's method on the rows that are, or are about to be, nonzero.

Where a row is nonzero the penalty is smooth. A row that is zero but violates optimality enters along its steepest
descent, bent as if it had the norm one proximal step would give it; a row that a step would turn round goes to zero.
This is the semismooth Newton method for the proximal fixed point, made safe by a line search. Each linear system takes
a handful of conjugate-gradient steps, preconditioned by the exact inverse for one scalar curvature per sample.
Matrices are in the dtype of the columns, sums and the intercept in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from estimators.group_lasso.curvature import LEAST_DAMPING, PenaltyCurvature, Preconditioner, ScalarCurvature
from estimators.group_lasso.problem import (
    Evaluation,
    Problem,
    evaluate,
    loss,
    objective_and_gap,
    penalty,
    row_violations,
)

_CG_STEPS = 60
_ROUGH_FORCING = 0.3
_FORCING = 0.1
_STALE = 30
_MOST_DAMPING = 0.5
_FIXINGS = 8
_SMALLEST_STEP = 1e-4
_FRUITLESS = 3


@dataclass(frozen=True, slots=True)
class _Point:
    """A coefficient matrix with what the loss says there."""

    coef: Tensor
    evaluation: Evaluation
    gradient: Tensor
    violations: Tensor
    objective: float
    gap: float
    kkt: float


def solve(
    problem: Problem,
    columns: Tensor,
    coef: Tensor,
    intercept: Tensor,
    alpha: float,
    *,
    gap: float,
    kkt: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, int]:
    """Minimise the objective over the given features until they are certified.

    Parameters
    ----------
    problem : Problem
        With ``l1_ratio`` > 0 or 0.
    columns : Tensor of shape (n_features, n_samples), float32 or float64
        The working set's columns of X, standardised. Their dtype is the precision of the arithmetic.
    coef : Tensor of shape (n_classes, n_features), the dtype of columns
        Where to start.
    intercept : Tensor of shape (n_classes,), float64
        Where to start.
    alpha : float
        Positive.
    gap, kkt : float
        Stop once the duality gap (not relative) and the largest violation of optimality (as a fraction of alpha), both
        restricted to these features, are at most this.
    max_iter : int
        Largest number of Newton steps.

    Returns
    -------
    coef : Tensor of shape (n_classes, n_features), the dtype of columns
    intercept : Tensor of shape (n_classes,), float64
    n_iter : int
        Fewer than ``max_iter`` with the goals not reached if no step makes progress any more.
    """
    point = _at(problem, columns, coef @ columns, coef, intercept, alpha)
    model: ScalarCurvature | None = None
    n_iter, fruitless, damping = 0, 0, 0.0
    while (point.gap > gap or point.kkt > kkt) and n_iter < max_iter and fruitless < _FRUITLESS:
        if model is None:
            model = ScalarCurvature.at(problem, columns, point.evaluation.probabilities)
        n_iter += 1
        following, n_products = _step(problem, columns, model, point, alpha, damping)
        if n_products > _STALE:
            model = None
        if following is None and damping == _MOST_DAMPING:
            break
        if following is None or n_products >= _CG_STEPS:
            damping = min(_MOST_DAMPING, max(LEAST_DAMPING, 10.0 * damping))
        else:
            damping = 0.1 * damping if damping > LEAST_DAMPING else 0.0
        if following is None:
            continue
        useful = (
            point.objective - following.objective > 1e-3 * gap
            or following.gap < 0.5 * point.gap
            or following.kkt < 0.5 * point.kkt
        )
        point, fruitless = following, 0 if useful else fruitless + 1
    return point.coef, point.evaluation.intercept, n_iter


def _at(problem: Problem, columns: Tensor, products: Tensor, coef: Tensor, intercept: Tensor, alpha: float) -> _Point:
    evaluation = evaluate(problem, products.double(), intercept)
    gradient = evaluation.residual.to(columns.dtype) @ columns.T
    objective, gap = objective_and_gap(
        problem, evaluation, coef.norm(dim=0).double(), gradient.norm(dim=0).double(), alpha
    )
    violations = row_violations(problem, coef, gradient, alpha)
    kkt = float(violations.max()) / alpha if len(violations) else 0.0
    return _Point(coef, evaluation, gradient, violations, objective, gap, kkt)


def _rows_to_move(point: _Point) -> Tensor:
    """The nonzero rows, and those zero rows that violate optimality more than the nonzero ones do on average.

    Until the nonzero rows have settled at a new alpha, most violations are passing.
    """
    nonzero: Tensor = point.coef.norm(dim=0) > 0.0
    unsettled = torch.where(nonzero, point.violations, 0.0).norm() / nonzero.sum().clamp_min(1).sqrt()
    rows: Tensor = (nonzero | (point.violations > unsettled)).nonzero().flatten()
    return rows


def _step(
    problem: Problem, columns: Tensor, model: ScalarCurvature, point: _Point, alpha: float, damping: float
) -> tuple[_Point | None, int]:
    """One damped Newton step, or None if none decreases the objective; and the Hessian products it took."""
    strength, radial, free = alpha * problem.l1_ratio, alpha * (1.0 - problem.l1_ratio), problem.fit_intercept
    rows = _rows_to_move(point)
    if not len(rows):
        return None, 0
    model, coef, gradient = model.restrict(rows), point.coef[:, rows], point.gradient[:, rows]
    norms, slopes = coef.norm(dim=0), gradient.norm(dim=0)
    entering = norms == 0.0
    units = torch.where(entering, -gradient / slopes, coef / norms)
    # Without a kink at zero (ridge) a row may turn round.
    kinks = units if strength > 0.0 else torch.zeros_like(units)
    bent = PenaltyCurvature.at(
        units, torch.where(entering, (slopes - strength) / model.diagonal(), norms), strength, radial, damping
    )
    downhill = -(gradient + strength * units + radial * coef)
    hessian = _Hessian(problem, model.columns, point.evaluation, bent)
    right = pad(downhill, (0, 1)) if free else downhill
    solutions, n_products = _directions(hessian, Preconditioner(model, bent, free), right, coef, kinks)
    # Near the optimum a step halves the gap while its decrease, of second order, drowns in the objective's rounding.
    rounding = 8 * torch.finfo(coef.dtype).eps * abs(point.objective)
    for solution in solutions:
        direction = solution[:, : len(rows)]
        drift = solution[:, -1].double() if free else torch.zeros_like(point.evaluation.intercept)
        slope = -float((downhill * direction).sum())
        size = 1.0 if slope < 0.0 else 0.0
        while size > _SMALLEST_STEP:
            trial = torch.add(coef, direction, alpha=size)
            trial *= (trial * kinks).sum(0) >= 0.0
            products, intercept = trial @ model.columns, point.evaluation.intercept + size * drift
            value = loss(problem, products.double() + intercept[:, None])
            value += penalty(problem, trial.norm(dim=0).double(), alpha)
            if value <= point.objective + 1e-4 * size * slope + rounding:
                whole = torch.zeros_like(point.coef)
                whole[:, rows] = trial
                return _at(problem, columns, products, whole, intercept, alpha), n_products
            size /= 2
    return None, n_products


class _Hessian:
    """The Hessian of the objective on nonzero rows; its last row is the intercept, where that is free."""

    def __init__(self, problem: Problem, columns: Tensor, evaluation: Evaluation, bent: PenaltyCurvature) -> None:
        self._columns, self._penalty, self._free = columns, bent, problem.fit_intercept
        self._probabilities = evaluation.probabilities.to(columns.dtype)
        self._weighted = problem.weights.to(columns.dtype) * self._probabilities

    def __call__(self, direction: Tensor) -> Tensor:
        rows = direction[:, : len(self._columns)]
        scores = rows @ self._columns
        if self._free:
            scores += direction[:, -1:]
        scores -= (self._probabilities * scores).sum(0)
        scores *= self._weighted
        product = self._penalty.add_product(scores @ self._columns.T, rows)
        return torch.cat([product, scores.sum(1, keepdim=True)], 1) if self._free else product


def _directions(
    hessian: _Hessian, preconditioner: Preconditioner, right: Tensor, coef: Tensor, kinks: Tensor
) -> tuple[list[Tensor], int]:
    """The Newton direction with rows that it would turn round going to zero instead, and, to fall back on, without.

    Conjugate gradients, to a tenth of the residual in the preconditioner's norm. Whenever rows are turned round they
    are fixed on their way to zero, and the rest is solved for anew; the first fixings need no more than a rough
    solution. Also returns the number of products with the Hessian.
    """
    n_rows, n_products = coef.shape[1], 0
    # On CUDA each look at a number waits for the device; steps beyond the goal cost less.
    stride = 5 if right.is_cuda else 1
    solution, residual, plain = torch.zeros_like(right), right, None
    left = torch.ones_like(right[0])
    forcing, first = _ROUGH_FORCING, math.nan
    for _ in range(_FIXINGS):
        scaled = preconditioner(residual) * left
        search, size = scaled, (residual * scaled).sum()
        reached = float(size)
        first = reached if math.isnan(first) else first
        while reached > forcing**2 * first and n_products < _CG_STEPS:
            for _ in range(stride):
                product = hessian(search) * left
                curvature = (search * product).sum()
                step = torch.where(curvature > 0.0, size / curvature, 0.0)
                solution = torch.addcmul(solution, search, step)
                residual = torch.addcmul(residual, product, -step)
                scaled = preconditioner(residual) * left
                previous, size = size, (residual * scaled).sum()
                search = torch.addcmul(scaled, search, torch.where(previous > 0.0, size / previous, 0.0))
            n_products += stride
            reached = float(size)
        turned = (((coef + solution[:, :n_rows]) * kinks).sum(0) < 0.0) & (left[:n_rows] > 0.0)
        plain = solution if plain is None else plain
        if bool(turned.any()):
            left[:n_rows].masked_fill_(turned, 0.0)
            solution = solution.clone()
            solution[:, :n_rows] = torch.where(turned, -coef, solution[:, :n_rows])
            residual = (right - hessian(solution)) * left
        elif forcing == _FORCING:
            break
        else:
            forcing = _FORCING
    return [solution, plain] if plain is not None and plain is not solution else [solution], n_products
