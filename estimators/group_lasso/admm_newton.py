"""Inner solver for a working set: ADMM finds which rows are nonzero, Newton's method then finds their values.

The multinomial Hessian is majorised by one scalar per sample, which gives a single weighted Gram matrix for all
classes; ADMM solves the group lasso of that quadratic with one factorisation. On the rows it leaves nonzero the
penalty is smooth, so preconditioned Newton-CG converges fast there. Both steps decrease the objective or are refused,
and the duality gap restricted to the working set says when to stop. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.group_lasso.problem import (
    Evaluation,
    Problem,
    evaluate,
    intercept_hessian,
    loss,
    objective_and_gap,
    penalty,
)

_ADMM_STEPS = 60
_ADMM_TOLERANCE = 3e-3
_NEWTON_STEPS = 12
_CG_STEPS = 60
_CG_FORCING = 0.1
_SMALLEST_STEP = 1e-4
# Near the optimum a step halves the gap while its decrease, of second order, drowns in the objective's rounding.
_ROUNDING = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class _Point:
    """A coefficient matrix with what the loss says there."""

    coef: Tensor
    evaluation: Evaluation
    gradient: Tensor
    objective: float
    gap: float


def solve(
    problem: Problem, columns: Tensor, coef: Tensor, intercept: Tensor, alpha: float, *, gap: float, max_iter: int
) -> tuple[Tensor, Tensor, int]:
    """Minimise the objective over the given features until the gap restricted to them is small.

    Parameters
    ----------
    problem : Problem
    columns : Tensor of shape (n_features, n_samples), float64
        The working set's columns of X, standardised.
    coef : Tensor of shape (n_features, n_classes), float64
        Where to start.
    intercept : Tensor of shape (n_classes,), float64
        Where to start.
    alpha : float
        Positive.
    gap : float
        Stop once the duality gap is at most this (not relative).
    max_iter : int
        Largest number of steps, ADMM and Newton together.

    Returns
    -------
    coef : Tensor of shape (n_features, n_classes), float64
    intercept : Tensor of shape (n_classes,), float64
    n_iter : int
        Fewer than ``max_iter`` with the gap not reached if no step decreases the objective any more.
    """
    point = _at(problem, columns, coef, intercept, alpha)
    n_iter = effort = 0
    while point.gap > gap and n_iter < max_iter and effort < 8:
        identified = _identify(problem, columns, point, alpha, effort)
        n_iter += 1
        before = point
        if identified is not None:
            point = identified
        goal = max(gap, 0.1 * point.gap) if point.gap < float("inf") else gap
        point, steps = _polish(problem, columns, point, alpha, goal, min(_NEWTON_STEPS, max_iter - n_iter))
        n_iter += steps
        if identified is None or point.gap > 0.5 * before.gap:
            effort += 1
        else:
            effort = max(0, effort - 1)
    return point.coef, point.evaluation.intercept, n_iter


def _at(problem: Problem, columns: Tensor, coef: Tensor, intercept: Tensor, alpha: float) -> _Point:
    evaluation = evaluate(problem, columns.T @ coef, intercept)
    gradient = columns @ evaluation.residual
    objective, gap = objective_and_gap(problem, evaluation, coef.norm(dim=1), gradient.norm(dim=1), alpha)
    return _Point(coef, evaluation, gradient, objective, gap)


class _RidgeInverse:
    """(A A' + diag(d))^-1 for A (r, n) and d (r,) > 0, through the smaller of the r x r and n x n systems."""

    def __init__(self, factor: Tensor, diagonal: Tensor) -> None:
        r, n = factor.shape
        self._wide = r > n
        self._diagonal = diagonal[:, None]
        self._factor = factor
        if self._wide:
            system = factor.T @ (factor / self._diagonal)
            system.diagonal().add_(1.0)
        else:
            system = factor @ factor.T
            system.diagonal().add_(diagonal)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))

    def __call__(self, right: Tensor) -> Tensor:
        if not self._wide:
            return self._inverse @ right
        scaled = right / self._diagonal
        return scaled - self._factor @ (self._inverse @ (self._factor.T @ scaled)) / self._diagonal


def _scaled_columns(problem: Problem, columns: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor | None]:
    """Columns times sqrt(curvature), centred by it where the intercept is free to follow; and those centres."""
    if not problem.fit_intercept:
        return columns * curvature.sqrt(), None
    centers = columns @ curvature / curvature.sum()
    return (columns - centers[:, None]) * curvature.sqrt(), centers


def _identify(problem: Problem, columns: Tensor, point: _Point, alpha: float, effort: int) -> _Point | None:
    """One proximal step on the scalar majoriser, solved by over-relaxed ADMM; None if it brings no decrease."""
    probabilities, coef = point.evaluation.probabilities, point.coef
    bend = (1.5 * (probabilities * (1.0 - probabilities)).amax(1)).clamp_min(1e-4)
    factor, centers = _scaled_columns(problem, columns, problem.weights * bend)
    step = 2.0 * float(factor.square().sum()) / len(factor)
    inverse = _RidgeInverse(factor, torch.full_like(factor[:, 0], step))
    linear = factor @ (factor.T @ coef) - point.gradient
    shrink, damp = alpha * problem.l1_ratio / step, 1.0 + alpha * (1.0 - problem.l1_ratio) / step
    tolerance = _ADMM_TOLERANCE * 0.25**effort

    target, dual = coef, -point.gradient / step
    for count in range(_ADMM_STEPS * 2**effort):
        smooth = inverse(linear + step * (target - dual))
        mixed = 1.6 * smooth - 0.6 * target + dual
        norms = mixed.norm(dim=1, keepdim=True)
        proposal = mixed * ((1.0 - shrink / norms.clamp_min(1e-300)).clamp_min(0.0) / damp)
        dual = mixed - proposal
        change, target = proposal - target, proposal
        if count % 5 == 4:
            limit = tolerance * max(float(target.norm()), 1e-12)
            if float((smooth - target).norm()) < limit and float(change.norm()) < limit:
                break

    direction = target - coef
    expected = float((point.gradient * direction).sum())
    expected += penalty(problem, target.norm(dim=1), alpha) - penalty(problem, coef.norm(dim=1), alpha)
    if not expected < 0.0:
        return None
    drift = torch.zeros_like(point.evaluation.intercept) if centers is None else -(centers @ direction)
    products, change = columns.T @ coef + point.evaluation.intercept, columns.T @ direction + drift
    size = 1.0
    while size > _SMALLEST_STEP:
        trial = target if size == 1.0 else coef + size * direction
        objective = loss(problem, products + size * change) + penalty(problem, trial.norm(dim=1), alpha)
        if objective <= point.objective + 1e-4 * size * expected + _ROUNDING * abs(point.objective):
            return _at(problem, columns, trial, point.evaluation.intercept + size * drift, alpha)
        size /= 2
    return None


def _polish(
    problem: Problem, columns: Tensor, point: _Point, alpha: float, goal: float, max_steps: int
) -> tuple[_Point, int]:
    """Newton steps on the nonzero rows until the gap restricted to them is at most ``goal``."""
    active = (point.coef.norm(dim=1) > 0).nonzero().flatten()
    if not len(active) or max_steps < 1:
        return point, 0
    kept = columns[active]
    inner = _at(problem, kept, point.coef[active], point.evaluation.intercept, alpha)
    steps = 0
    while inner.gap > goal and steps < max_steps:
        following = _newton_step(problem, kept, inner, alpha)
        steps += 1
        if following is None:
            break
        inner = following
        alive = inner.coef.norm(dim=1) > 0
        if not bool(alive.all()):
            active, kept = active[alive], kept[alive]
            if not len(active):
                break
            inner = _at(problem, kept, inner.coef[alive], inner.evaluation.intercept, alpha)
    coef = torch.zeros_like(point.coef)
    if len(active):
        coef[active] = inner.coef
    return _at(problem, columns, coef, inner.evaluation.intercept, alpha), steps


class _Hessian:
    """The Hessian of the objective on nonzero rows, with the intercept following its optimum."""

    def __init__(self, problem: Problem, columns: Tensor, point: _Point, alpha: float) -> None:
        coef, rho = point.coef, problem.l1_ratio
        norms = coef.norm(dim=1, keepdim=True)
        self._columns = columns
        self._units: Tensor = coef / norms
        self._radial = alpha * (1.0 - rho)
        self.tangential: Tensor = (alpha * rho / norms).clamp_max(1e8 * alpha) + self._radial
        self._probabilities = point.evaluation.probabilities
        self._weighted = problem.weights[:, None] * self._probabilities
        self._follow: Tensor | None = None
        if problem.fit_intercept:
            self._follow = torch.linalg.inv(intercept_hessian(problem, self._probabilities))

    def _curve(self, scores: Tensor) -> Tensor:
        bent: Tensor = self._weighted * scores
        return bent - self._probabilities * bent.sum(1, keepdim=True)

    def drift(self, scores: Tensor) -> Tensor:
        """Change of the optimal intercept, to first order, when XW changes by ``scores``."""
        if self._follow is None:
            return torch.zeros_like(scores[0])
        return -(self._follow @ self._curve(scores).sum(0))

    def __call__(self, direction: Tensor) -> Tensor:
        scores = self._columns.T @ direction
        along = self._units * (self._units * direction).sum(1, keepdim=True)
        smooth = self._columns @ self._curve(scores + self.drift(scores))
        return smooth + self.tangential * (direction - along) + self._radial * along


def _newton_step(problem: Problem, columns: Tensor, point: _Point, alpha: float) -> _Point | None:
    """One damped Newton step on rows that are all nonzero; rows that it turns round become zero. None if stuck."""
    coef, rho, intercept = point.coef, problem.l1_ratio, point.evaluation.intercept
    norms = coef.norm(dim=1, keepdim=True)
    gradient = point.gradient + alpha * (rho * coef / norms + (1.0 - rho) * coef)
    hessian = _Hessian(problem, columns, point, alpha)
    spread = (1.0 - point.evaluation.probabilities.square().sum(1)) / (coef.shape[1] - 1)
    factor, _ = _scaled_columns(problem, columns, problem.weights * spread.clamp_min(1e-6))
    direction = _conjugate_gradient(hessian, _RidgeInverse(factor, 0.9 * hessian.tangential[:, 0] + 1e-8), -gradient)
    slope = float((gradient * direction).sum())
    if not slope < 0.0:
        return None
    drift = hessian.drift(columns.T @ direction)
    size = 1.0
    while size > _SMALLEST_STEP:
        trial = coef + size * direction
        trial = torch.where((trial * coef).sum(1, keepdim=True) <= 0.0, 0.0, trial)
        scores = columns.T @ trial + intercept + size * drift
        objective = loss(problem, scores) + penalty(problem, trial.norm(dim=1), alpha)
        if objective <= point.objective + 1e-4 * size * slope + _ROUNDING * abs(point.objective):
            return _at(problem, columns, trial, intercept + size * drift, alpha)
        size /= 2
    return None


def _conjugate_gradient(hessian: _Hessian, preconditioner: _RidgeInverse, right: Tensor) -> Tensor:
    """Approximately hessian^-1 right, to a tenth of its size in the preconditioner's norm."""
    solution, residual = torch.zeros_like(right), right
    search = scaled = preconditioner(residual)
    size = first = float((residual * scaled).sum())
    for _ in range(_CG_STEPS):
        product = hessian(search)
        curvature = float((search * product).sum())
        if curvature <= 0.0:
            break
        solution = solution + (size / curvature) * search
        residual = residual - (size / curvature) * product
        scaled = preconditioner(residual)
        previous, size = size, float((residual * scaled).sum())
        if size <= _CG_FORCING**2 * first:
            break
        search = scaled + (size / previous) * search
    return solution
