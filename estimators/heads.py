"""The linear head on kept features: L2 multinomial logistic regression in the smaller of sample and feature space.

With fewer samples than features the solution V is a combination of rows, A'Z: only their products ZZ' are needed. In
either space the scores are coordinates times a matrix. Newton's method takes its steps from preconditioned conjugate
gradients, in the precision the features came in, and looks at where they lead in float64. The intercept is eliminated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from estimators.group_lasso.problem import (
    Problem,
    evaluate,
    intercept_hessian,
    loss,
    null_objective,
    null_probabilities,
)

_TOLERANCE = 1e-8
_FINEST = 1e-18
_MAX_ITER = 100
_CG_STEPS = 30
_STALE = 20
_FORCING = 0.2
_LOOSEST = 0.5
_SMALLEST_STEP = 1e-6
_LEAST_CURVATURE = 1e-6
_JITTER = 1e-7
_LARGEST_INVERSE = 4096
_PANEL = 256


@dataclass(frozen=True, slots=True)
class HeadSpace:
    """Features Z (n_samples, n_features) as the head needs them.

    Attributes
    ----------
    matrix : Tensor of shape (size, n_samples), float64
        What coordinates (n_classes, size) are multiplied with for scores: Z', where they are V', or ZZ', where they
        are A'.
    dual : bool
        Whether it is ZZ'.
    """

    matrix: Tensor
    dual: bool

    def pull(self, residual: Tensor) -> Tensor:
        """The gradient in the coordinates (in those of V = A'Z up to a factor ZZ') from that in the scores."""
        return residual if self.dual else residual @ self.matrix.T

    def to(self, dtype: torch.dtype) -> HeadSpace:
        return HeadSpace(self.matrix.to(dtype), self.dual)


def head_space(blocks: Iterable[tuple[slice | Tensor, Tensor]], n_samples: int, n_features: int) -> HeadSpace:
    """Gather features by blocks of columns.

    Parameters
    ----------
    blocks : iterable of (columns, block of shape (n_samples, width))
        Standardised as they are to be penalised, float32 or float64; products are made in that precision.
    n_samples, n_features : int

    Raises
    ------
    ValueError
        If products of features overflow.
    """
    dual, gathered = n_features > n_samples, None
    for index, block in blocks:
        if gathered is None:
            size = min(n_features, n_samples)
            gathered = torch.zeros((size, n_samples), dtype=torch.float64, device=block.device)
        if dual:
            _add_products(gathered, block)
        else:
            gathered[index] = block.T.double()
    assert gathered is not None
    if dual:
        gathered = torch.tril(gathered) + torch.tril(gathered, -1).T
        definite = _shift_to_definite(gathered, _JITTER)
        if definite is None:
            raise ValueError("The kept features are too large for the ridge head: their products overflow. Scale them.")
        gathered = definite[0]
    return HeadSpace(gathered, dual)


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the products of rows with each other to the lower triangle, leaving most of the upper one alone."""
    for start in range(0, len(rows), _PANEL):
        stop = start + _PANEL
        total[start:stop, :stop] += rows[start:stop] @ rows[:stop].T


def _shift_to_definite(matrix: Tensor, jitter: float) -> tuple[Tensor, Tensor] | None:
    """The matrix, whose diagonal has been raised until it has a Cholesky factor, and that factor.

    By as little as it takes, at least ``jitter`` times the diagonal's mean.
    """
    mean = float(matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny))
    for _ in range(10):
        shifted = matrix.clone()
        shifted.diagonal().add_(jitter * mean)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return shifted, factor
        jitter = max(_JITTER, 10.0 * jitter)
    return None


@dataclass(frozen=True, slots=True)
class RidgeSolution:
    """A ridge head in the space it was solved in.

    Attributes
    ----------
    coordinates : Tensor of shape (n_classes, size), float64
    intercept : Tensor of shape (n_classes,), float64
    residual : Tensor of shape (n_classes, n_samples), float64
        s_i (P_i - Y_i) / sum_i s_i.
    """

    coordinates: Tensor
    intercept: Tensor
    residual: Tensor


def fit_ridge_head(
    space: HeadSpace,
    targets: Tensor,
    sample_weight: Tensor,
    C: float,
    start: RidgeSolution | None = None,
    similar: RidgeSolution | None = None,
    work: torch.dtype = torch.float64,
) -> RidgeSolution:
    """Minimise C * sum_i s_i CE(y_i, V z_i + c) + ||V||_F^2 / 2, as scikit-learn's LogisticRegression does.

    Two classes have the penalty of scikit-learn's one logit w, which is softmax columns -w/2, w/2.

    Parameters
    ----------
    space : HeadSpace
        From `head_space`.
    targets : Tensor of shape (n_classes, n_samples), float64
        Y', one-hot; two classes or more, all present.
    sample_weight : Tensor of shape (n_samples,), float64
        Positive.
    C : float
        Inverse strength of the penalty.
    start : RidgeSolution, default=None
        A solution in this space for another C.
    similar : RidgeSolution, default=None
        A solution for this C and these samples with other features.
    work : torch.dtype, default=torch.float64
        Of the conjugate gradients: float32 is twice as fast and loses nothing, as the gradient is in float64. Where
        it is not enough, float64 takes over.

    Returns
    -------
    RidgeSolution
        Its objective is within 1e-8 of the optimum, relative to that of V = 0.

    Warns
    -----
    ConvergenceWarning
        If rounding or 100 Newton steps are in the way of that.
    """
    total = float(sample_weight.sum())
    problem = Problem(targets, sample_weight / total, 0.0, True)
    strength = (2.0 if len(targets) == 2 else 1.0) / (C * total)
    null = null_objective(problem)
    coordinates, products, intercept = _first_guess(space, problem, strength, start, similar)
    point = evaluate(problem, products, intercept)
    rough = space.to(work)
    preconditioner: _Preconditioner | None = None
    # What float32 cannot resolve is not worth more steps; in float64 a few make results independent of the way there.
    fine = work == torch.float64
    n_products, gap = _STALE, np.inf
    for _ in range(_MAX_ITER):
        gradient = space.pull(point.residual) + strength * coordinates
        images = gradient @ space.matrix if space.dual else gradient
        # With the best intercept, what remains is strongly convex in V: no optimum is further below than this.
        previous = gap
        gap = abs(float((gradient * images).sum())) / (2.0 * strength) if point.exact else np.inf
        solved = gap <= _TOLERANCE * null
        if solved and (not fine or gap <= _FINEST * null or gap > 0.5 * previous):
            break
        if n_products >= _STALE:
            preconditioner = _Preconditioner.at(rough, problem.weights, point.probabilities, strength)
        if preconditioner is None:
            break
        if fine:
            forcing = min(_FORCING, math.sqrt(gap / null))
        else:
            forcing = max(_FORCING, min(_LOOSEST, math.sqrt(_TOLERANCE * null / gap)))
        direction, n_products = _newton_direction(
            rough, problem, point.probabilities, preconditioner, gradient, forcing
        )
        moved, step = direction @ space.matrix, 1.0
        slope = float((gradient * (moved if space.dual else direction)).sum())
        value = point.loss + _ridge(space, coordinates, products, strength)
        while step > _SMALLEST_STEP:
            trial, trial_products = coordinates + step * direction, products + step * moved
            reached = evaluate(problem, trial_products, point.intercept)
            trial_value = reached.loss + _ridge(space, trial, trial_products, strength)
            if trial_value <= value + 1e-4 * step * slope + 1e-14:
                break
            step /= 2
        if step <= _SMALLEST_STEP:
            break
        coordinates, products, point = trial, trial_products, reached
    reached_here = RidgeSolution(coordinates, point.intercept, point.residual)
    if gap > _TOLERANCE * null:
        if not fine:
            return fit_ridge_head(space, targets, sample_weight, C, reached_here)
        warnings.warn(
            f"The ridge head stopped within {gap / null:.1e} of its optimum, relative to the objective of zero "
            f"coefficients, instead of {_TOLERANCE:.0e}. Lower C, or scale the features.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return reached_here


def _first_guess(
    space: HeadSpace, problem: Problem, strength: float, start: RidgeSolution | None, similar: RidgeSolution | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates, their scores and an intercept: those that another solution suggests, if better than zero."""
    zero = torch.zeros((len(problem.targets), len(space.matrix))).to(space.matrix)
    nothing = zero, torch.zeros_like(problem.targets), null_probabilities(problem).log()
    if similar is not None:
        # At the optimum the gradient vanishes: pull(R) = -strength * V.
        guess, intercept = space.pull(similar.residual) / -strength, similar.intercept
    elif start is not None:
        guess, intercept = start.coordinates, start.intercept
    else:
        return nothing
    scores = guess @ space.matrix
    value = loss(problem, scores + intercept[:, None]) + _ridge(space, guess, scores, strength)
    return (guess, scores, intercept) if value < null_objective(problem) else nothing


def _ridge(space: HeadSpace, coordinates: Tensor, products: Tensor, strength: float) -> float:
    """strength / 2 * ||V||_F^2."""
    return 0.5 * strength * float((coordinates * (products if space.dual else coordinates)).sum())


@dataclass(frozen=True, slots=True)
class _Preconditioner:
    """Inverse of what the Hessian would be if every sample had one curvature h for all classes.

    That is (Z'HZ + strength)^-1 for V and (ZZ'H + strength)^-1 for A, to be multiplied from the right. Beyond a size of
    4096 it is that of the diagonal.
    """

    inverse: Tensor
    curvature: Tensor
    strength: float

    @classmethod
    def at(cls, space: HeadSpace, weights: Tensor, probabilities: Tensor, strength: float) -> _Preconditioner | None:
        """None if rounding makes it indefinite."""
        matrix = space.matrix
        mean = (probabilities * (1.0 - probabilities)).sum(0) / (len(probabilities) - 1)
        curvature = (weights * mean.clamp_min(_LEAST_CURVATURE)).to(matrix.dtype)
        if len(matrix) > _LARGEST_INVERSE:
            diagonal = matrix.diagonal() * curvature if space.dual else matrix.square() @ curvature
            return cls(1.0 / (diagonal + strength), curvature, strength)
        root = curvature.sqrt()
        if space.dual:
            bent = matrix * root * root[:, None]
        else:
            bent = torch.zeros((len(matrix), len(matrix))).to(matrix)
            _add_products(bent, matrix * root)
        bent.diagonal().add_(strength)
        definite = _shift_to_definite(bent, torch.finfo(matrix.dtype).eps)
        if definite is None:
            return None
        inverse = torch.cholesky_inverse(definite[1])
        return cls(inverse * root / root[:, None] if space.dual else inverse, curvature, strength)

    def __call__(self, space: HeadSpace, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What they become, and the scores of that."""
        if self.inverse.ndim == 1:
            ahead = rows * self.inverse
            return ahead, ahead @ space.matrix
        ahead = rows @ self.inverse
        if space.dual:
            # A product saved: ahead (ZZ'H + strength) = rows.
            return ahead, torch.sub(rows, ahead, alpha=self.strength).div_(self.curvature)
        return ahead, ahead @ space.matrix


def _newton_direction(
    space: HeadSpace,
    problem: Problem,
    probabilities: Tensor,
    preconditioner: _Preconditioner,
    gradient: Tensor,
    forcing: float,
) -> tuple[Tensor, int]:
    """Minus the inverse Hessian times the gradient, roughly, and how many products it took."""
    work = space.matrix.dtype
    likely, weighted = probabilities.to(work), (problem.weights * probabilities).to(work)
    hessian = intercept_hessian(problem, probabilities)
    # Classes that every sample is sure about: what float32 makes of them would be divided by nothing.
    hessian.diagonal().add_(torch.finfo(torch.float64).eps)
    balance = torch.linalg.inv(hessian).to(work)

    def bend(scores: Tensor) -> Tensor:
        """The loss's Hessian times scores whose intercept follows."""
        bent = weighted * (scores - (likely * scores).sum(0))
        shift = balance @ bent.sum(1)
        return bent.sub_(weighted * (shift[:, None] - shift @ likely))

    def square(rows: Tensor, coordinates: Tensor, scores: Tensor) -> float:
        return float((rows * (scores if space.dual else coordinates)).sum())

    residual = -gradient.to(work)
    solution = torch.zeros_like(residual)
    search, scores = preconditioner(space, residual)
    size = square(residual, search, scores)
    goal = forcing**2 * size
    n_products = 0
    while n_products < _CG_STEPS:
        n_products += 1
        product = space.pull(bend(scores)).add_(search, alpha=preconditioner.strength)
        curvature = square(product, search, scores)
        if not curvature > 0.0:
            break
        step = size / curvature
        solution.add_(search, alpha=step)
        residual.sub_(product, alpha=step)
        ahead, ahead_scores = preconditioner(space, residual)
        previous, size = size, square(residual, ahead, ahead_scores)
        if not size > goal:
            break
        search, scores = ahead.add_(search, alpha=size / previous), ahead_scores.add_(scores, alpha=size / previous)
    return solution.double(), n_products
