"""The group-lasso path: solutions along decreasing alpha, each certified by its duality gap.

Each alpha starts from the solution before it. Only a working set of features is solved for: first those the strong
rule lets through, then those that a full pass over X shows to violate the optimality conditions, until the certified
gap of the whole problem is small enough.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import column_or_1d
from sklearn.utils._param_validation import Interval, validate_parameter_constraints
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from estimators.group_lasso.admm_newton import solve
from estimators.group_lasso.operators import DenseOperator, Features, as_features, resolve_device
from estimators.group_lasso.problem import (
    Evaluation,
    Problem,
    alpha_max,
    evaluate,
    kkt_violation,
    null_objective,
    null_probabilities,
    objective_and_gap,
)
from estimators.group_lasso.result import GroupLassoPath

_DOUBLE_BELOW = 1e-5
_SMALLEST_GROWTH = 64
_FRUITLESS_ROUNDS = 3

_CONSTRAINTS: dict[str, list[Any]] = {
    "alphas": ["array-like", None],
    "n_alphas": [Interval(Integral, 1, None, closed="left")],
    "alpha_min_ratio": [Interval(Real, 0, 1, closed="right")],
    "l1_ratio": [Interval(Real, 0, 1, closed="both")],
    "sample_weight": ["array-like", None],
    "standardize": ["boolean"],
    "fit_intercept": ["boolean"],
    "tol": [Interval(Real, 0, None, closed="neither")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "device": [str, torch.device],
}


@dataclass(frozen=True, slots=True)
class _Solution:
    """Where the sweep stands: the nonzero rows, and the whole of X seen from there."""

    active: Tensor
    coef: Tensor
    evaluation: Evaluation
    gradient: Tensor
    gradient_norms: Tensor
    objective: float = math.nan
    gap: float = math.inf
    kkt: float = math.nan
    n_iter: int = 0
    n_passes: int = 0


def group_lasso_path(
    X: Features | ArrayLike,
    y: ArrayLike,
    *,
    alphas: ArrayLike | None = None,
    n_alphas: int = 50,
    alpha_min_ratio: float = 5e-3,
    l1_ratio: float = 1.0,
    sample_weight: ArrayLike | None = None,
    standardize: bool = True,
    fit_intercept: bool = True,
    tol: float = 1e-4,
    max_iter: int = 1000,
    device: str | torch.device = "auto",
) -> GroupLassoPath:
    r"""Solve the multinomial group lasso for a decreasing sequence of alphas.

    With weights p_i = s_i / sum(s), P = softmax(XW + b), W (n_features, n_classes), b unpenalised::

        min_{W, b} sum_i p_i CE(y_i, x_i W + b)
                   + alpha * [l1_ratio * sum_d ||W_d||_2 + (1 - l1_ratio)/2 * ||W||_F^2]

    Parameters
    ----------
    X : array-like, Tensor or FeatureMatrix of shape (n_samples, n_features)
        Finite. Held once on the device, as float32 unless its dtype is wider than that.
    y : array-like of shape (n_samples,)
        Labels of any kind that sorts.
    alphas : array-like of shape (n_alphas,), default=None
        Positive strengths, solved in decreasing order; None for ``n_alphas`` spaced geometrically from alpha_max to
        ``alpha_min_ratio * alpha_max``.
    n_alphas : int, default=50
    alpha_min_ratio : float in (0, 1], default=5e-3
    l1_ratio : float in [0, 1], default=1.0
        0 (ridge) has no alpha_max and needs explicit ``alphas``.
    sample_weight : array-like of shape (n_samples,), default=None
        Non-negative; only ratios matter. Rows and classes of zero weight are left out.
    standardize : bool, default=True
        Solve for columns scaled to unit weighted variance (and, with an intercept, zero weighted mean). Constant
        columns get zero in any case.
    fit_intercept : bool, default=True
    tol : float, default=1e-4
        Certified duality gap to reach, relative to the objective of W = 0. Below 1e-5 all products are in float64.
    max_iter : int, default=1000
        Steps of the inner solver per alpha.
    device : str or torch.device, default="auto"
        ``"auto"`` is CUDA where there is one, else the CPU.

    Returns
    -------
    GroupLassoPath

    Raises
    ------
    ValueError
        If an argument is not as described, or fewer than two classes have positive weight.

    Warns
    -----
    ConvergenceWarning
        If some alpha's gap is above ``tol`` after ``max_iter`` steps, or when rounding allows no more progress; its
        solution is returned with the gap reached.
    """
    given = dict(locals())
    validate_parameter_constraints(
        _CONSTRAINTS, {name: given[name] for name in _CONSTRAINTS}, caller_name="group_lasso_path"
    )
    if alphas is None and l1_ratio == 0:
        raise ValueError("l1_ratio=0 has no alpha_max to start from: give explicit alphas, or an l1_ratio in (0, 1].")
    features = as_features(X)
    classes, codes = _encode(y, features.shape[0])
    weight = check_sample_weight(sample_weight, len(codes))
    rows = np.flatnonzero(weight > 0)
    present, kept_codes = np.unique(codes[rows], return_inverse=True)
    if len(present) < 2:
        raise ValueError(
            f"y must hold at least two classes with positive weight, got {len(present)} class: {classes[present]}."
        )

    problem = _pose(kept_codes, weight[rows], float(l1_ratio), bool(fit_intercept), resolve_device(device))
    operator = DenseOperator(
        features,
        rows=torch.as_tensor(rows),
        weights=problem.weights,
        standardize=standardize,
        center=fit_intercept,
        double=tol < _DOUBLE_BELOW,
    )
    start = _zero_solution(problem, operator)
    largest = alpha_max(problem, start.gradient_norms) if l1_ratio > 0 else math.inf
    grid = _grid(alphas, largest, n_alphas, alpha_min_ratio)
    solutions = _sweep(problem, operator, start, grid, largest, tol, max_iter)
    path = _collect(problem, operator, solutions, grid, largest, classes, present)
    _warn_unconverged(path, tol, max_iter)
    return path


def _encode(y: ArrayLike, n_samples: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    labels = column_or_1d(y, warn=True)
    check_classification_targets(labels)
    if len(labels) != n_samples:
        raise ValueError(f"y must have one label per row of X: got {len(labels)} labels for {n_samples} rows.")
    classes, codes = np.unique(labels, return_inverse=True)
    return classes, codes


def check_sample_weight(sample_weight: ArrayLike | None, n_samples: int) -> NDArray[np.float64]:
    """Sample weights as float64 of shape (n_samples,), ones for None.

    Raises
    ------
    ValueError
        If the shape is another, or the weights are not finite and non-negative with a positive one among them.
    """
    if sample_weight is None:
        return np.ones(n_samples)
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.shape != (n_samples,):
        raise ValueError(f"sample_weight must have shape ({n_samples},), got {weight.shape}.")
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise ValueError("sample_weight must be finite, non-negative and not all zero.")
    return weight


def _pose(
    codes: NDArray[np.int64], weight: NDArray[np.float64], l1_ratio: float, fit_intercept: bool, device: torch.device
) -> Problem:
    targets = torch.nn.functional.one_hot(torch.as_tensor(codes)).double()
    weights = torch.as_tensor(weight / weight.sum())
    return Problem(targets.to(device), weights.to(device), l1_ratio, fit_intercept)


def _grid(alphas: ArrayLike | None, largest: float, n_alphas: int, ratio: float) -> NDArray[np.float64]:
    if alphas is None:
        return largest * np.geomspace(1.0, ratio, n_alphas)
    grid = np.asarray(alphas, dtype=np.float64)
    if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all() or (grid <= 0).any():
        raise ValueError(f"alphas must be a non-empty 1-d sequence of positive finite numbers, got {alphas!r}.")
    return np.sort(grid)[::-1]


def _zero_solution(problem: Problem, operator: DenseOperator) -> _Solution:
    n_samples, n_classes = problem.targets.shape
    start = null_probabilities(problem).log()
    evaluation = evaluate(problem, problem.targets.new_zeros((n_samples, n_classes)), start)
    return _Solution(
        active=torch.zeros(0, dtype=torch.int64, device=start.device),
        coef=start.new_zeros((0, n_classes)),
        evaluation=evaluation,
        gradient=start.new_zeros((0, n_classes)),
        gradient_norms=operator.correlate(evaluation.residual).norm(dim=1),
    )


def _sweep(
    problem: Problem,
    operator: DenseOperator,
    start: _Solution,
    grid: NDArray[np.float64],
    largest: float,
    tol: float,
    max_iter: int,
) -> list[_Solution]:
    target = tol * null_objective(problem)
    solutions, current, previous = [], start, min(largest, float(grid[0]))
    for alpha in map(float, grid):
        current = _solve_one(problem, operator, current, alpha, previous, target, max_iter)
        solutions.append(current)
        previous = min(previous, alpha)
    return solutions


def _solve_one(
    problem: Problem,
    operator: DenseOperator,
    warm: _Solution,
    alpha: float,
    previous: float,
    target: float,
    max_iter: int,
) -> _Solution:
    current = _at_alpha(problem, warm, alpha)
    inner_target, n_iter, n_passes, fruitless = 0.5 * target, 0, 0, 0
    threshold = problem.l1_ratio * (2.0 * alpha - previous)
    while current.gap > target and n_iter < max_iter and fruitless < _FRUITLESS_ROUNDS:
        before = current
        working = _working_set(current, operator, threshold)
        columns = operator.columns(working)
        coef = current.coef.new_zeros((len(working), current.coef.shape[1]))
        coef[torch.searchsorted(working, current.active)] = current.coef
        coef, intercept, steps = solve(
            problem,
            columns,
            coef,
            current.evaluation.intercept,
            alpha,
            gap=inner_target,
            max_iter=max_iter - n_iter,
        )
        n_iter, n_passes = n_iter + max(1, steps), n_passes + 1
        current = _full_pass(problem, operator, working, columns, coef, intercept, alpha)
        fruitless = fruitless + 1 if current.gap >= before.gap and current.objective >= before.objective else 0
        threshold = problem.l1_ratio * alpha
        inner_target *= 0.5
    return replace(current, n_iter=n_iter, n_passes=n_passes)


def _at_alpha(problem: Problem, solution: _Solution, alpha: float) -> _Solution:
    """The same coefficients judged at another alpha, which needs no pass over X."""
    objective, gap = objective_and_gap(
        problem, solution.evaluation, solution.coef.norm(dim=1), solution.gradient_norms, alpha
    )
    resting = torch.ones_like(solution.gradient_norms, dtype=torch.bool)
    resting[solution.active] = False
    rest_norms = solution.gradient_norms[resting]
    violation = kkt_violation(problem, solution.coef, solution.gradient, rest_norms, alpha)
    return replace(solution, objective=objective, gap=gap, kkt=violation)


def _working_set(current: _Solution, operator: DenseOperator, threshold: float) -> Tensor:
    """The nonzero rows, and the largest gradients at or above the threshold, as sorted indices."""
    candidates = (current.gradient_norms >= threshold) & (operator.inverse_scale > 0)
    candidates[current.active] = False
    added = candidates.nonzero().flatten()
    room = max(_SMALLEST_GROWTH, len(current.active))
    if len(added) > room:
        added = added[torch.topk(current.gradient_norms[added], room).indices]
    return torch.cat([current.active, added]).sort().values


def _full_pass(
    problem: Problem,
    operator: DenseOperator,
    working: Tensor,
    columns: Tensor,
    coef: Tensor,
    intercept: Tensor,
    alpha: float,
) -> _Solution:
    """Certify coefficients against every feature."""
    evaluation = evaluate(problem, columns.T @ coef, intercept)
    gradient = operator.correlate(evaluation.residual)
    gradient[working] = columns @ evaluation.residual
    norms = gradient.norm(dim=1)
    nonzero = coef.norm(dim=1) > 0
    active, kept = working[nonzero], coef[nonzero]
    return _at_alpha(problem, _Solution(active, kept, evaluation, gradient[active], norms), alpha)


def _collect(
    problem: Problem,
    operator: DenseOperator,
    solutions: list[_Solution],
    grid: NDArray[np.float64],
    largest: float,
    classes: NDArray[Any],
    present: NDArray[np.int64],
) -> GroupLassoPath:
    """Undo the standardisation, put absent classes back, move everything to numpy."""
    active, coefs, norms = [], [], []
    intercepts = np.full((len(grid), len(classes)), -np.inf)
    for row, solution in enumerate(solutions):
        raw = solution.coef * operator.inverse_scale[solution.active, None]
        full = np.zeros((len(raw), len(classes)))
        full[:, present] = raw.cpu().numpy()
        active.append(solution.active.cpu().numpy())
        coefs.append(full)
        norms.append(solution.coef.norm(dim=1).cpu().numpy())
        shifted = solution.evaluation.intercept - operator.center[solution.active] @ raw
        intercepts[row, present] = shifted.cpu().numpy()
    null = null_objective(problem)
    return GroupLassoPath(
        alphas=grid,
        alpha_max=largest,
        classes=classes,
        n_features=operator.shape[1],
        active=active,
        active_coefs=coefs,
        active_norms=norms,
        intercepts=intercepts,
        gradient_norms=np.stack([solution.gradient_norms.float().cpu().numpy() for solution in solutions]),
        objective=np.array([solution.objective for solution in solutions]),
        relative_gap=np.array([solution.gap / null for solution in solutions]),
        kkt_violation=np.array([solution.kkt for solution in solutions]),
        n_iter=np.array([solution.n_iter for solution in solutions]),
        n_passes=np.array([solution.n_passes for solution in solutions]),
    )


def _warn_unconverged(path: GroupLassoPath, tol: float, max_iter: int) -> None:
    missed = path.relative_gap > tol
    if missed.any():
        worst = int(np.argmax(path.relative_gap))
        warnings.warn(
            f"{int(missed.sum())} of {len(path.alphas)} alphas did not reach tol={tol:g} within max_iter={max_iter} "
            "steps or the limits of rounding: "
            f"the largest relative duality gap is {path.relative_gap[worst]:.2e}, at alpha={path.alphas[worst]:.4g}. "
            "Raise max_iter, tol or the smallest alpha.",
            ConvergenceWarning,
            stacklevel=3,
        )
