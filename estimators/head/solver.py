"""Newton's method for the ridge head.

Its steps come from preconditioned conjugate gradients, which may run in float32. The gradient, by which the solution is
certified, is always in float64, and so are the products it rests on. The intercept is eliminated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from estimators.group_lasso.problem import (
    INTERCEPT_TOLERANCE,
    Problem,
    evaluate,
    intercept_hessian,
    loss,
    null_objective,
    null_probabilities,
)
from estimators.head.space import LARGEST_INVERSE, HeadSpace, add_products

TOLERANCE = 1e-8
_CG_STEPS = 30
_MOST_CG_STEPS = 960
_FINEST_FORCING = 1e-4
_STALE = 20
_FORCING = 0.2
_LOOSEST = 0.5
_SMALLEST_STEP = 1e-6
_PATIENCE = 2
_STRONGEST = 1e200
_LEAST_CURVATURE = 1e-6


@dataclass(frozen=True, slots=True)
class RidgeSolution:
    """A ridge head in the space it was solved in, float64."""

    coordinates: Tensor  # (n_classes, size)
    intercept: Tensor  # (n_classes,)
    residual: Tensor  # s_i (P_i - Y_i) / sum_i s_i, (n_classes, n_samples)
    n_iter: int


def solve_ridge(
    space: HeadSpace,
    targets: Tensor,
    sample_weight: Tensor,
    C: float,
    *,
    start: RidgeSolution | None = None,
    similar: RidgeSolution | None = None,
    work: torch.dtype = torch.float64,
    tolerance: float = 0.0,
    max_iter: int = 100,
    largest_inverse: int = LARGEST_INVERSE,
) -> RidgeSolution:
    """Minimise C * sum_i s_i CE(y_i, V z_i + c) + ||V||_F^2 / 2, as scikit-learn's LogisticRegression does.

    Two classes have the penalty of scikit-learn's one logit w, which is softmax columns -w/2, w/2. Warns if the
    objective is not within 1e-8 of the optimum, relative to that of V = 0, because of rounding or ``max_iter``.

    Parameters
    ----------
    targets : Tensor of shape (n_classes, n_samples), float64
        Y', one-hot, all classes present.
    sample_weight : Tensor of shape (n_samples,), float64
        Positive.
    start, similar : RidgeSolution, default=None
        Solutions to start from: in this space for another C, or for this C and these samples with other features.
    work : torch.dtype, default=torch.float64
        Of the conjugate gradients: float32 is twice as fast. Where it makes no more progress, float64 takes over.
    tolerance : float, default=0.0
        Distance from the optimum to stop at, at most 1e-8. At 1e-8 probabilities may be off by 1e-3 where C is large;
        0 goes on as far as float64 allows, which takes a few times as long.
    max_iter : int, default=100
        Newton steps.
    largest_inverse : int, default=4096
        Up to this size the preconditioner is a full inverse; beyond, the inverse of the diagonal.
    """
    total = float(sample_weight.sum())
    problem = Problem(targets, sample_weight / total, 0.0, True)
    strength = (2.0 if len(targets) == 2 else 1.0) / min(max(C * total, 1.0 / _STRONGEST), _STRONGEST)
    newton = _Newton(space, problem, strength, work, tolerance, largest_inverse)
    newton.begin(start, similar)
    n_iter = newton.run(max_iter)
    if not newton.solved:
        warnings.warn(
            f"The ridge head stopped within {newton.gap / newton.null:.1e} of its optimum, relative to the objective "
            f"of zero coefficients, instead of {TOLERANCE:.0e}. Lower C, or scale the features.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return RidgeSolution(newton.coordinates, newton.point.intercept, newton.point.residual, n_iter)


def _ridge(coordinates: Tensor, strength: float) -> float:
    """strength / 2 * ||V||_F^2."""
    return 0.5 * strength * float(coordinates.square().sum())


class _Newton:
    """Where Newton's method stands. Steps are found in ``rough``, everything else is computed in ``space``."""

    def __init__(
        self,
        space: HeadSpace,
        problem: Problem,
        strength: float,
        work: torch.dtype,
        tolerance: float,
        largest_inverse: int,
    ) -> None:
        self.space, self.rough = space, space.to(work)
        self.problem, self.strength, self.null = problem, strength, null_objective(problem)
        self.tolerance, self.largest_inverse = tolerance, largest_inverse
        self.finest = 0.0 if tolerance < TOLERANCE else INTERCEPT_TOLERANCE
        self.gap = self.best_gap = self.lowest = math.inf
        self.stalled, self.stale, self.most_products = 0, True, _CG_STEPS
        self.preconditioner: Tensor | None = None

    def begin(self, start: RidgeSolution | None, similar: RidgeSolution | None) -> None:
        """Start from what another solution suggests, if it is better than zero."""
        self.coordinates = self.problem.targets.new_zeros((len(self.problem.targets), self.space.shape[1]))
        self.products, intercept = torch.zeros_like(self.problem.targets), null_probabilities(self.problem).log()
        other = similar or start
        if other is not None:
            # At the optimum the gradient vanishes: pull(R) = -strength * V.
            guess = other.coordinates if similar is None else self.space.pull(other.residual) / -self.strength
            products = self.space.scores(guess)
            value = loss(self.problem, products + other.intercept[:, None]) + _ridge(guess, self.strength)
            if value < self.null:
                self.coordinates, self.products, intercept = guess, products, other.intercept
        self.point = evaluate(self.problem, self.products, intercept, self.finest)

    @property
    def solved(self) -> bool:
        return self.gap <= TOLERANCE * self.null

    def run(self, max_iter: int) -> int:
        """Take steps until the tolerance is met or no step helps, and return how many."""
        for n_iter in range(max_iter):
            self._measure()
            exact = self.rough is self.space
            if self.gap <= self.tolerance * self.null or (exact and self.stalled > _PATIENCE):
                return n_iter
            if not exact and (self.solved or self.stalled > _PATIENCE):
                self._use_float64()
            if not self._step():
                if self.rough is self.space:
                    return n_iter
                self._use_float64()
        return max_iter

    def _measure(self) -> None:
        """The gradient, how far the optimum may be, and whether that still improves."""
        self.gradient = self.space.pull(self.point.residual) + self.strength * self.coordinates
        # With the best intercept, what remains is strongly convex in V: the optimum is no further below than this.
        self.gap = float(self.gradient.square().sum()) / (2.0 * self.strength) if self.point.exact else math.inf
        self.value = self.point.loss + _ridge(self.coordinates, self.strength)
        better = self.gap < 0.5 * self.best_gap or self.value < self.lowest - TOLERANCE * self.null
        self.best_gap, self.lowest = min(self.gap, self.best_gap), min(self.value, self.lowest)
        self.stalled = 0 if better else self.stalled + 1

    def _use_float64(self) -> None:
        self.rough, self.stalled, self.stale = self.space, 0, True

    def _step(self) -> bool:
        """Move along a Newton direction; False where there is none, or it does not lead down."""
        if self.stale:
            self.preconditioner = self._precondition()
        if self.preconditioner is None:
            return False
        direction, n_products = self._direction(self.preconditioner)
        if n_products == self.most_products and not self.solved:
            self.most_products = min(2 * self.most_products, _MOST_CG_STEPS)
        # Once it is solved, many products are wanted, and no sign of a bad preconditioner.
        self.stale = n_products >= _STALE and not self.solved
        return self._search_line(direction)

    def _precondition(self) -> Tensor | None:
        """(Z'HZ + strength)^-1, the inverse Hessian if every sample had one curvature h for all classes.

        Of the diagonal only where that is too large or Z is not held; None if rounding makes it indefinite.
        """
        probabilities = self.point.probabilities
        mean = (probabilities * (1.0 - probabilities)).sum(0) / (len(probabilities) - 1)
        curvature = (self.problem.weights * mean.clamp_min(_LEAST_CURVATURE)).to(self.rough.dtype)
        held, size = self.rough.held, self.rough.shape[1]
        if held is None or size > self.largest_inverse:
            return 1.0 / (self.rough.diagonal(curvature) + self.strength)
        bent = held.new_zeros((size, size))
        add_products(bent, held * curvature.sqrt())
        bent.diagonal().add_(self.strength)
        factor = _positive_factor(bent)
        return None if factor is None else torch.cholesky_inverse(factor)

    def _forcing(self) -> float:
        """To what share of its size conjugate gradients reduce the residual of the Newton system."""
        if self.solved:
            wanted = 0.5 * math.sqrt(self.tolerance * self.null / self.gap)
            return max(_FINEST_FORCING, math.sqrt(self.gap / self.null), wanted)
        return max(_FORCING, min(_LOOSEST, math.sqrt(TOLERANCE * self.null / self.gap)))

    def _direction(self, inverse: Tensor) -> tuple[Tensor, int]:
        """Minus the inverse Hessian times the gradient, roughly, and how many products with Z it took."""
        bend = _hessian_of_scores(self.problem, self.point.probabilities, inverse.dtype)
        residual = -self.gradient.to(inverse.dtype)
        solution = torch.zeros_like(residual)
        search = _applied(inverse, residual)
        size = float((residual * search).sum())
        goal, n_products = self._forcing() ** 2 * size, 0
        while n_products < self.most_products:
            n_products += 1
            product = self.rough.pull(bend(self.rough.scores(search))).add_(search, alpha=self.strength)
            curvature = float((search * product).sum())
            if not curvature > 0.0:
                break
            step = size / curvature
            solution.add_(search, alpha=step)
            residual.sub_(product, alpha=step)
            ahead = _applied(inverse, residual)
            previous, size = size, float((residual * ahead).sum())
            if not size > goal:
                break
            search = ahead.add_(search, alpha=size / previous)
        return solution.double(), n_products

    def _search_line(self, direction: Tensor) -> bool:
        """Take the first of 1, 1/2, 1/4, ... of the direction that lowers the objective enough."""
        moved, step = self.space.scores(direction), 1.0
        slope = float((self.gradient * direction).sum())
        while step > _SMALLEST_STEP:
            coordinates, products = self.coordinates + step * direction, self.products + step * moved
            point = evaluate(self.problem, products, self.point.intercept, self.finest)
            if point.loss + _ridge(coordinates, self.strength) <= self.value + 1e-4 * step * slope + 1e-14:
                self.coordinates, self.products, self.point = coordinates, products, point
                return True
            step /= 2
        return False


def _applied(inverse: Tensor, rows: Tensor) -> Tensor:
    return rows * inverse if inverse.ndim == 1 else rows @ inverse


def _positive_factor(matrix: Tensor) -> Tensor | None:
    """Cholesky factor, once the diagonal has been raised by as little as rounding makes necessary."""
    mean = float(matrix.diagonal().mean())
    jitter = torch.finfo(matrix.dtype).eps
    for _ in range(10):
        matrix.diagonal().add_(jitter * mean)
        factored = torch.linalg.cholesky_ex(matrix)
        if not int(factored.info):
            factor: Tensor = factored.L
            return factor
        jitter *= 10.0
    return None


def _hessian_of_scores(problem: Problem, probabilities: Tensor, work: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The loss's Hessian as a product with scores whose intercept follows."""
    likely, weighted = probabilities.to(work), (problem.weights * probabilities).to(work)
    hessian = intercept_hessian(problem, probabilities)
    # Classes that every sample is sure about: what float32 makes of them would be divided by nothing.
    hessian.diagonal().add_(torch.finfo(torch.float64).eps)
    balance = torch.linalg.inv(hessian).to(work)

    def bend(scores: Tensor) -> Tensor:
        bent = weighted * (scores - (likely * scores).sum(0))
        shift = balance @ bent.sum(1)
        return bent.sub_(weighted * (shift[:, None] - shift @ likely))

    return bend
