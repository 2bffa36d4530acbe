"""The group-lasso path: solutions along decreasing alpha, each certified by its duality gap.

Each alpha starts from the solution before it. Only a working set of features is solved for: first the strongest of
those the strong rule lets through, then those that a full pass over X shows to violate the optimality conditions,
until the certified gap of the whole problem is small enough.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from estimators.device import resolve_device
from estimators.features import Features, as_features
from estimators.group_lasso.newton import solve
from estimators.group_lasso.operators import Operator, make_operator
from estimators.group_lasso.problem import (
    Evaluation,
    Problem,
    alpha_max,
    evaluate,
    null_objective,
    null_probabilities,
    objective_and_gap,
    row_violations,
)
from estimators.group_lasso.progress import PathProgress
from estimators.group_lasso.result import GroupLassoPath, PathPoint
from estimators.labels import as_labels, check_sample_weight
from estimators.sklearn_private import Interval, checked
from estimators.switches import full_precision

_DOUBLE_BELOW = 1e-5
_SMALLEST_GROWTH = 64
_FRUITLESS_ROUNDS = 3
# The gap is first order in the violation of rows that dominate it; this keeps all others from lagging far behind.
_VIOLATION_PER_TOL = 200.0

_CONSTRAINTS: dict[str, list[Any]] = {
    "alphas": ["array-like", None],
    "alpha_ratios": ["array-like", None],
    "branch": ["array-like", None],
    "n_alphas": [Interval(Integral, 1, None, closed="left")],
    "alpha_min_ratio": [Interval(Real, 0, 1, closed="right")],
    "l1_ratio": [Interval(Real, 0, 1, closed="both")],
    "sample_weight": ["array-like", None],
    "standardize": ["boolean"],
    "fit_intercept": ["boolean"],
    "tol": [Interval(Real, 0, None, closed="neither")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "device": [str, torch.device],
    "dtype": [str, torch.dtype, None],
    "max_memory": [Interval(Real, 0, None, closed="neither"), str, None],
    "warm_start": [GroupLassoPath, None],
    "callback": [callable, None],
    "verbose": ["verbose"],
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
    seconds: float = 0.0


@checked(_CONSTRAINTS)
def group_lasso_path(
    X: Features | ArrayLike,
    y: ArrayLike,
    *,
    alphas: ArrayLike | None = None,
    alpha_ratios: ArrayLike | None = None,
    branch: ArrayLike | None = None,
    n_alphas: int = 50,
    alpha_min_ratio: float = 5e-3,
    l1_ratio: float = 1.0,
    sample_weight: ArrayLike | None = None,
    standardize: bool = True,
    fit_intercept: bool = True,
    tol: float = 1e-4,
    max_iter: int = 1000,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    max_memory: int | str | None = None,
    warm_start: GroupLassoPath | None = None,
    callback: Callable[[PathPoint], object] | None = None,
    verbose: bool | int = 0,
) -> GroupLassoPath:
    r"""Solve the multinomial group lasso for a decreasing sequence of alphas.

    With weights p_i = s_i / sum(s), P = softmax(XW + b), W (n_features, n_classes), b unpenalised::

        min_{W, b} sum_i p_i CE(y_i, x_i W + b)
                   + alpha * [l1_ratio * sum_d ||W_d||_2 + (1 - l1_ratio)/2 * ||W||_F^2]

    Parameters
    ----------
    X : array-like, Tensor or FeatureMatrix of shape (n_samples, n_features)
        Finite. Copied once to the device, or read there at every pass where it does not fit ``max_memory``.
    y : array-like of shape (n_samples,)
        Labels of any kind that sorts.
    alphas : array-like of shape (n_alphas,), default=None
        Positive strengths, solved in decreasing order; None for ``n_alphas`` spaced geometrically from alpha_max to
        ``alpha_min_ratio * alpha_max``.
    alpha_ratios : array-like of shape (n_alphas,), default=None
        The strengths as fractions of alpha_max instead.
    branch : array-like of shape (n_alphas,), bool, default=None
        Given strengths that no other one starts from: with or without them, the other solutions are the same.
    n_alphas : int, default=50
    alpha_min_ratio : float in (0, 1], default=5e-3
    l1_ratio : float in (0, 1], default=1.0
        0 (ridge), which has no alpha_max, is taken with explicit ``alphas``.
    sample_weight : array-like of shape (n_samples,), default=None
        Non-negative; only ratios matter. Rows and classes of zero weight are left out.
    standardize : bool, default=True
        Solve for columns scaled to unit weighted variance (and, with an intercept, zero weighted mean). Constant
        columns get zero in any case.
    fit_intercept : bool, default=True
    tol : float, default=1e-4
        Certified duality gap to reach, relative to the objective of W = 0. Below 1e-5 all products are in float64.
        Rows are also made to satisfy the optimality conditions to about ``200 * tol`` of alpha.
    max_iter : int, default=1000
        Newton steps per alpha.
    device : str or torch.device, default="auto"
        ``"auto"`` is CUDA where there is one, else the CPU.
    dtype : {"float16", "bfloat16", "float32", "float64"}, torch.dtype or None, default=None
        How X is held. None: float32, or float64 where X is wider. "float32" rounds wider values; the 16-bit types
        halve the memory and are accepted where they hold X exactly. Arithmetic is in float32 or wider.
    max_memory : int or str, default=None
        Bytes, or a number with a unit ("4GB", "512MiB"), that X may take on the device; beyond it X is read block by
        block at each pass. None for 80 % of what is free.
    warm_start : GroupLassoPath, default=None
        Solutions for the same classes and number of features; the one for the first alpha or the next above (else the
        nearest) is the start if it is no worse than zero. A path of the same problem is continued exactly.
    callback : callable, default=None
        Called with a `PathPoint` after every alpha; a true return value ends the path there.
    verbose : bool or int, default=0
        Print a line per alpha.

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
    if alphas is not None and alpha_ratios is not None:
        raise ValueError("alphas and alpha_ratios both say which strengths to solve for: give one of them.")
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
    if warm_start is not None:
        _check_warm_start(warm_start, classes, features.shape[1])
    _check_alphas("alphas", alphas)
    _check_alphas("alpha_ratios", alpha_ratios)

    problem = _pose(kept_codes, weight[rows], float(l1_ratio), bool(fit_intercept), resolve_device(device))
    with full_precision():
        operator = make_operator(
            features,
            rows=torch.as_tensor(rows),
            weights=problem.weights,
            standardize=standardize,
            center=fit_intercept,
            double=tol < _DOUBLE_BELOW,
            dtype=dtype,
            max_memory=max_memory,
        )
        start = _zero_solution(problem, operator)
        largest = alpha_max(problem, start.gradient_norms) if l1_ratio > 0 else math.inf
        grid, branches = _grid(alphas, alpha_ratios, branch, largest, n_alphas, alpha_min_ratio)
        previous = min(largest, float(grid[0]))
        if warm_start is not None and len(warm_start.alphas):
            start, previous = _better_start(problem, operator, start, warm_start, present, float(grid[0]))
        report = _reporter(grid, null_objective(problem), callback, verbose)
        solutions = _sweep(problem, operator, start, previous, grid, branches, tol, max_iter, report)
        path = _collect(problem, operator, solutions, grid[: len(solutions)], largest, classes, present)
    warn_unconverged(path, tol, max_iter)
    return path


def _encode(y: ArrayLike, n_samples: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    labels = as_labels(y)
    check_classification_targets(labels)
    if len(labels) != n_samples:
        raise ValueError(f"y must have one label per row of X: got {len(labels)} labels for {n_samples} rows.")
    classes, codes = np.unique(labels, return_inverse=True)
    return classes, codes


def _pose(
    codes: NDArray[np.int64], weight: NDArray[np.float64], l1_ratio: float, fit_intercept: bool, device: torch.device
) -> Problem:
    targets = torch.nn.functional.one_hot(torch.as_tensor(codes)).double().T.contiguous()
    weights = torch.as_tensor(weight / weight.sum())
    return Problem(targets.to(device), weights.to(device), l1_ratio, fit_intercept)


def _check_alphas(name: str, alphas: ArrayLike | None) -> None:
    if alphas is None:
        return
    grid = np.asarray(alphas)
    numeric = grid.ndim == 1 and len(grid) and grid.dtype.kind in "fiu"
    if not numeric or not np.isfinite(grid).all() or (grid <= 0).any():
        raise ValueError(f"{name} must be a non-empty 1-d sequence of positive finite numbers, got {alphas!r}.")


def _grid(
    alphas: ArrayLike | None,
    ratios: ArrayLike | None,
    branch: ArrayLike | None,
    largest: float,
    n_alphas: int,
    smallest: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    if alphas is None:
        chosen = np.geomspace(1.0, smallest, n_alphas) if ratios is None else np.asarray(ratios, dtype=np.float64)
        alphas = largest * chosen
    grid = np.asarray(alphas, dtype=np.float64)
    branches = np.zeros(len(grid), dtype=bool) if branch is None else np.asarray(branch)
    if branches.shape != grid.shape or branches.dtype != bool:
        raise ValueError(f"branch must hold {len(grid)} booleans, one per alpha, got {branch!r}.")
    order = np.argsort(-grid, kind="stable")
    return grid[order], branches[order]


def _zero_solution(problem: Problem, operator: Operator) -> _Solution:
    empty = torch.zeros(0, dtype=torch.int64, device=problem.weights.device)
    start = null_probabilities(problem).log()
    return _certify(problem, operator, empty, operator.columns(empty), start.new_zeros((len(start), 0)), start)


def _certify(
    problem: Problem,
    operator: Operator,
    index: Tensor,
    columns: Tensor,
    coef: Tensor,
    intercept: Tensor,
    watch: float = math.inf,
) -> _Solution:
    """See coefficients of some features, in float64, against every feature: one full pass."""
    nonzero = coef.norm(dim=0) > 0
    active, kept, columns = index[nonzero], coef[:, nonzero].double().contiguous(), columns[nonzero]
    evaluation = evaluate(problem, kept @ columns, intercept)
    norms = operator.correlate(evaluation.residual, active, watch)
    gradient = evaluation.residual @ columns.T
    norms[active] = gradient.norm(dim=0)
    return _Solution(active, kept, evaluation, gradient, norms)


def _check_warm_start(path: GroupLassoPath, classes: NDArray[Any], n_features: int) -> None:
    if path.n_features != n_features or not np.array_equal(path.classes, classes):
        raise ValueError(
            f"warm_start must be a path for {n_features} features and the classes {classes}, got one for "
            f"{path.n_features} features and the classes {path.classes}."
        )


def _better_start(
    problem: Problem,
    operator: Operator,
    zero: _Solution,
    path: GroupLassoPath,
    present: NDArray[np.int64],
    alpha: float,
) -> tuple[_Solution, float]:
    """The path's solution for the alpha next to ``alpha``, and that alpha, unless zero is the better start.

    Where the path was solved for the same problem the sweep goes on as if it had never ended.
    """
    above = np.flatnonzero(path.alphas >= alpha)
    chosen = int(above[-1]) if len(above) else int(np.abs(np.log(path.alphas / alpha)).argmin())
    device = operator.inverse_scale.device
    index = torch.as_tensor(path.active[chosen], device=device)
    coef = torch.as_tensor(path.standardized_coefs[chosen][:, present].T, device=device).contiguous()
    given = torch.as_tensor(path.inverse_scale, device=device)[index]
    scale = operator.inverse_scale[index]
    varies = scale > 0
    if not bool((given == scale).all()):
        index, coef = index[varies], coef[:, varies] * (given / scale)[varies]
    intercept = torch.nan_to_num(torch.as_tensor(path.standardized_intercepts[chosen][present], device=device))
    warm = _certify(problem, operator, index, operator.columns(index), coef, intercept)
    if _at_alpha(problem, warm, alpha).objective > _at_alpha(problem, zero, alpha).objective:
        return zero, alpha
    return warm, max(alpha, float(path.alphas[chosen]))


def _reporter(
    grid: NDArray[np.float64], null: float, callback: Callable[[PathPoint], object] | None, verbose: bool | int
) -> Callable[[int, _Solution], bool]:
    """What is to happen after every alpha; the result says whether the path ends there."""
    progress = PathProgress(len(grid)) if verbose else None

    def report(index: int, solution: _Solution) -> bool:
        point = PathPoint(
            index=index,
            alpha=float(grid[index]),
            n_active=len(solution.active),
            objective=solution.objective,
            relative_gap=solution.gap / null,
            n_iter=solution.n_iter,
            n_passes=solution.n_passes,
            seconds=solution.seconds,
        )
        if progress is not None:
            progress(point)
        return callback is not None and bool(callback(point))

    return report


def _sweep(
    problem: Problem,
    operator: Operator,
    start: _Solution,
    previous: float,
    grid: NDArray[np.float64],
    branches: NDArray[np.bool_],
    tol: float,
    max_iter: int,
    report: Callable[[int, _Solution], bool],
) -> list[_Solution]:
    solutions, current = [], start
    for index, alpha in enumerate(map(float, grid)):
        following = float(grid[min(index + 1, len(grid) - 1)])
        began = time.perf_counter()
        solution = _solve_one(problem, operator, current, alpha, previous, following, tol, max_iter)
        solution = replace(solution, seconds=time.perf_counter() - began)
        solutions.append(solution)
        if not branches[index]:
            current, previous = solution, min(previous, alpha)
        if report(index, solution):
            break
    return solutions


def _solve_one(
    problem: Problem,
    operator: Operator,
    warm: _Solution,
    alpha: float,
    previous: float,
    following: float,
    tol: float,
    max_iter: int,
) -> _Solution:
    current = _at_alpha(problem, warm, alpha)
    target, kkt_target = tol * null_objective(problem), _VIOLATION_PER_TOL * tol
    inner_target, inner_kkt, n_iter, n_passes, fruitless, refined = 0.5 * target, 0.5 * kkt_target, 0, 0, 0, False
    work = torch.float32 if operator.single else torch.float64
    threshold, strength = problem.l1_ratio * (2.0 * alpha - previous), problem.l1_ratio * alpha
    watch = min(strength, problem.l1_ratio * (2.0 * following - alpha))
    while n_iter < max_iter and fruitless < _FRUITLESS_ROUNDS:
        certified = current.gap <= target
        if certified and (refined or current.kkt <= kkt_target):
            break
        before, refined = current, certified
        working = _working_set(current, operator, threshold)
        columns = operator.columns(working)
        coef = current.coef.new_zeros((len(current.coef), len(working)))
        coef[:, torch.searchsorted(working, current.active)] = current.coef
        coef, intercept, steps = solve(
            problem,
            columns.to(work),
            coef.to(work),
            current.evaluation.intercept,
            alpha,
            gap=inner_target,
            kkt=inner_kkt,
            max_iter=max_iter - n_iter,
        )
        n_iter, n_passes = n_iter + max(1, steps), n_passes + 1
        found = _certify(problem, operator, working, columns, coef, intercept, watch)
        current = _at_alpha(problem, found, alpha)
        threshold, inner_target, inner_kkt = strength, 0.5 * inner_target, 0.5 * inner_kkt
        if current.gap >= before.gap and current.objective >= before.objective:
            # Where rounding is in the way, go on in full precision.
            fruitless, work, current = fruitless + 1, torch.float64, before
    return replace(current, n_iter=n_iter, n_passes=n_passes)


def _at_alpha(problem: Problem, solution: _Solution, alpha: float) -> _Solution:
    """The same coefficients judged at another alpha, which needs no pass over X."""
    objective, gap = objective_and_gap(
        problem, solution.evaluation, solution.coef.norm(dim=0), solution.gradient_norms, alpha
    )
    excess = solution.gradient_norms - alpha * problem.l1_ratio
    excess[solution.active] = row_violations(problem, solution.coef, solution.gradient, alpha)
    worst = float(excess.max())
    return replace(solution, objective=objective, gap=gap, kkt=worst / alpha if worst > 0.0 else 0.0)


def _working_set(current: _Solution, operator: Operator, threshold: float) -> Tensor:
    """The nonzero rows, and the largest gradients at or above the threshold, as sorted indices."""
    candidates = (current.gradient_norms >= threshold) & (operator.inverse_scale > 0)
    candidates[current.active] = False
    added = candidates.nonzero().flatten()
    room = max(_SMALLEST_GROWTH, len(current.active) // 4)
    if len(added) > room:
        added = added[torch.topk(current.gradient_norms[added], room).indices]
    return torch.cat([current.active, added]).sort().values


def _collect(
    problem: Problem,
    operator: Operator,
    solutions: list[_Solution],
    grid: NDArray[np.float64],
    largest: float,
    classes: NDArray[Any],
    present: NDArray[np.int64],
) -> GroupLassoPath:
    """Put absent classes back, move everything to numpy."""
    coefs = []
    intercepts = np.full((len(grid), len(classes)), -np.inf)
    for row, solution in enumerate(solutions):
        full = np.zeros((len(solution.active), len(classes)))
        full[:, present] = solution.coef.T.cpu().numpy()
        coefs.append(full)
        intercepts[row, present] = solution.evaluation.intercept.cpu().numpy()
    null = null_objective(problem)
    return GroupLassoPath(
        alphas=grid,
        alpha_max=largest,
        classes=classes,
        center=operator.center.cpu().numpy(),
        inverse_scale=operator.inverse_scale.cpu().numpy(),
        active=[solution.active.cpu().numpy() for solution in solutions],
        standardized_coefs=coefs,
        standardized_intercepts=intercepts,
        gradient_norms=np.stack([solution.gradient_norms.float().cpu().numpy() for solution in solutions]),
        objective=np.array([solution.objective for solution in solutions]),
        relative_gap=np.array([solution.gap / null for solution in solutions]),
        kkt_violation=np.array([solution.kkt for solution in solutions]),
        n_iter=np.array([solution.n_iter for solution in solutions]),
        n_passes=np.array([solution.n_passes for solution in solutions]),
        seconds=np.array([solution.seconds for solution in solutions]),
    )


def warn_unconverged(path: GroupLassoPath, tol: float, max_iter: int) -> None:
    """Warn where gaps are above ``tol``, and say what to change."""
    missed = path.relative_gap > tol
    if missed.any():
        worst = int(np.argmax(path.relative_gap))
        warnings.warn(
            f"{int(missed.sum())} of {len(path.alphas)} alphas did not reach tol={tol:g} within max_iter={max_iter} "
            "steps or the limits of rounding: "
            f"the largest relative duality gap is {path.relative_gap[worst]:.2e}, at alpha={path.alphas[worst]:.4g}. "
            "Raise max_iter, tol or the smallest alpha.",
            ConvergenceWarning,
            stacklevel=4,  # past the check of the parameters
        )
