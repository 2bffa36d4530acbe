"""The ridge head: L2 multinomial logistic regression on kept features, in the smaller of sample and feature space.

With fewer samples than features the solution V is a combination of rows, A'Z, and only the products ZZ' are needed.
Newton's method takes its steps from preconditioned conjugate gradients, which may run in float32. The gradient, by
which the solution is certified, is always in float64, and so are the products it rests on. The intercept is eliminated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

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
_PATIENCE = 3
_STRONGEST = 1e200
_LEAST_CURVATURE = 1e-6
_LARGEST_INVERSE = 4096
_PANEL = 256

Block = tuple[slice | Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class DenseSpace:
    """Features Z (n_samples, n_features) held as the head needs them.

    Attributes
    ----------
    matrix : Tensor of shape (size, n_samples)
        What coordinates (n_classes, size) are multiplied with for scores: Z', where they are V', or ZZ', where they
        are A'.
    dual : bool
        Whether it is ZZ'.
    """

    matrix: Tensor
    dual: bool

    @property
    def size(self) -> int:
        """Number of coordinates per class."""
        return len(self.matrix)

    def scores(self, coordinates: Tensor) -> Tensor:
        """(n_classes, n_samples) from (n_classes, size)."""
        return coordinates @ self.matrix

    def pull(self, residual: Tensor) -> Tensor:
        """The gradient in the coordinates (in those of V = A'Z up to a factor ZZ') from that in the scores."""
        return residual if self.dual else residual @ self.matrix.T

    def to(self, dtype: torch.dtype) -> DenseSpace:
        """In another precision."""
        return DenseSpace(self.matrix.to(dtype), self.dual)

    def diagonal(self, curvature: Tensor) -> Tensor:
        """Of Z'HZ or ZZ'H for the diagonal matrix H, (size,)."""
        return self.matrix.diagonal() * curvature if self.dual else self.matrix.square() @ curvature


@dataclass(frozen=True, slots=True)
class ColumnSpace:
    """Features Z that are made again by blocks of columns for every product, as there is no room to hold them.

    Attributes
    ----------
    blocks : callable
        Gives (columns, block of shape (n_samples, width), float64) until every column was given once.
    shape : (n_samples, n_features)
    """

    blocks: Callable[[], Iterator[Block]]
    shape: tuple[int, int]
    dual = False

    @property
    def size(self) -> int:
        """Number of coordinates per class."""
        return self.shape[1]

    def scores(self, coordinates: Tensor) -> Tensor:
        """(n_classes, n_samples) from (n_classes, size)."""
        total = coordinates.new_zeros((len(coordinates), self.shape[0]))
        for index, block in self.blocks():
            total += coordinates[:, index] @ block.T
        return total

    def pull(self, residual: Tensor) -> Tensor:
        """The gradient in the coordinates from that in the scores."""
        pulled = residual.new_empty((len(residual), self.size))
        for index, block in self.blocks():
            pulled[:, index] = residual @ block
        return pulled

    def to(self, dtype: torch.dtype) -> ColumnSpace:
        """Itself: its products are in float64."""
        return self

    def diagonal(self, curvature: Tensor) -> Tensor:
        """Of Z'HZ for the diagonal matrix H, (size,)."""
        diagonal = curvature.new_empty(self.size)
        for index, block in self.blocks():
            diagonal[index] = curvature @ block.square()
        return diagonal


HeadSpace = DenseSpace | ColumnSpace


def dense_bytes(n_samples: int, n_features: int) -> int:
    """Bytes that a `DenseSpace` takes with its copy in float32 and the inverse that preconditions it."""
    size = min(n_samples, n_features)
    inverse = 32 * size**2 if size <= _LARGEST_INVERSE else 0
    return 12 * size * n_samples + inverse


def dense_space(blocks: Iterable[Block], n_samples: int, n_features: int) -> DenseSpace:
    """Gather features by blocks of columns.

    Parameters
    ----------
    blocks : iterable of (columns, block of shape (n_samples, width), float64)
        Standardised as they are to be penalised.
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
            gathered[index] = block.T
    assert gathered is not None
    if dual:
        gathered = torch.tril(gathered) + torch.tril(gathered, -1).T
    if not bool(gathered.square().sum().isfinite()):
        raise ValueError("The kept features are too large for the ridge head: their products overflow. Scale them.")
    return DenseSpace(gathered, dual)


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the products of rows with each other to the lower triangle, leaving most of the upper one alone."""
    for start in range(0, len(rows), _PANEL):
        stop = start + _PANEL
        total[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T)


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
    polish: bool = True,
) -> RidgeSolution:
    """Minimise C * sum_i s_i CE(y_i, V z_i + c) + ||V||_F^2 / 2, as scikit-learn's LogisticRegression does.

    Two classes have the penalty of scikit-learn's one logit w, which is softmax columns -w/2, w/2.

    Parameters
    ----------
    space : DenseSpace or ColumnSpace
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
        Of the conjugate gradients: float32 is twice as fast. Where it makes no more progress, float64 takes over.
    polish : bool, default=True
        Go on from 1e-8 as far as float64 allows. The objective is then exact to 1e-15 or so, and the probabilities,
        for which 1e-8 may mean 1e-3, to 1e-6 or better whatever C.

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
    strength = (2.0 if len(targets) == 2 else 1.0) / min(max(C * total, 1.0 / _STRONGEST), _STRONGEST)
    null = null_objective(problem)
    coordinates, products, intercept = _first_guess(space, problem, strength, start, similar)
    point = evaluate(problem, products, intercept)
    rough = space.to(work)
    preconditioner: _Preconditioner | None = None
    n_products, gap, best, lowest, stalled = _STALE, math.inf, math.inf, math.inf, 0
    for _ in range(_MAX_ITER):
        gradient = space.pull(point.residual) + strength * coordinates
        images = space.scores(gradient) if space.dual else gradient
        # With the best intercept, what remains is strongly convex in V: no optimum is further below than this.
        previous = gap
        gap = abs(float((gradient * images).sum())) / (2.0 * strength) if point.exact else math.inf
        solved = gap <= _TOLERANCE * null
        if solved and (not polish or gap <= _FINEST * null or (rough is space and gap > 0.5 * previous)):
            break
        value = point.loss + _ridge(space, coordinates, products, strength)
        better = gap < 0.5 * best or value < lowest - _TOLERANCE * null
        best, lowest, stalled = min(gap, best), min(value, lowest), 0 if better else stalled + 1
        if stalled > _PATIENCE and rough is space:
            break
        if rough is not space and (solved or stalled > _PATIENCE):
            rough, n_products, stalled = space, _STALE, 0
        if n_products >= _STALE:
            preconditioner = _Preconditioner.at(rough, problem.weights, point.probabilities, strength)
        if preconditioner is None:
            if rough is space:
                break
            rough, n_products = space, _STALE
            continue
        if polish and rough is space:
            forcing = min(_FORCING, math.sqrt(gap / null))
        else:
            forcing = max(_FORCING, min(_LOOSEST, math.sqrt(_TOLERANCE * null / gap)))
        direction, n_products = _newton_direction(
            rough, problem, point.probabilities, preconditioner, gradient, forcing
        )
        moved, step = space.scores(direction), 1.0
        slope = float((gradient * (moved if space.dual else direction)).sum())
        while step > _SMALLEST_STEP:
            trial, trial_products = coordinates + step * direction, products + step * moved
            reached = evaluate(problem, trial_products, point.intercept)
            trial_value = reached.loss + _ridge(space, trial, trial_products, strength)
            if trial_value <= value + 1e-4 * step * slope + 1e-14:
                break
            step /= 2
        if step > _SMALLEST_STEP:
            coordinates, products, point = trial, trial_products, reached
        elif rough is space:
            break
        else:
            rough, n_products = space, _STALE
    if gap > _TOLERANCE * null:
        warnings.warn(
            f"The ridge head stopped within {gap / null:.1e} of its optimum, relative to the objective of zero "
            f"coefficients, instead of {_TOLERANCE:.0e}. Lower C, or scale the features.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return RidgeSolution(coordinates, point.intercept, point.residual)


def _first_guess(
    space: HeadSpace, problem: Problem, strength: float, start: RidgeSolution | None, similar: RidgeSolution | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates, their scores and an intercept: those that another solution suggests, if better than zero."""
    zero = problem.targets.new_zeros((len(problem.targets), space.size))
    nothing = zero, torch.zeros_like(problem.targets), null_probabilities(problem).log()
    if similar is not None:
        # At the optimum the gradient vanishes: pull(R) = -strength * V.
        guess, intercept = space.pull(similar.residual) / -strength, similar.intercept
    elif start is not None:
        guess, intercept = start.coordinates, start.intercept
    else:
        return nothing
    scores = space.scores(guess)
    value = loss(problem, scores + intercept[:, None]) + _ridge(space, guess, scores, strength)
    return (guess, scores, intercept) if value < null_objective(problem) else nothing


def _ridge(space: HeadSpace, coordinates: Tensor, products: Tensor, strength: float) -> float:
    """strength / 2 * ||V||_F^2."""
    return 0.5 * strength * float((coordinates * (products if space.dual else coordinates)).sum())


@dataclass(frozen=True, slots=True)
class _Preconditioner:
    """Inverse of what the Hessian would be if every sample had one curvature h for all classes.

    That is (Z'HZ + strength)^-1 for V and (ZZ'H + strength)^-1 for A, to be multiplied from the right. Beyond a size of
    4096, and where Z is not held, it is that of the diagonal.
    """

    inverse: Tensor
    curvature: Tensor
    strength: float

    @classmethod
    def at(cls, space: HeadSpace, weights: Tensor, probabilities: Tensor, strength: float) -> _Preconditioner | None:
        """None if rounding makes it indefinite."""
        mean = (probabilities * (1.0 - probabilities)).sum(0) / (len(probabilities) - 1)
        curvature = weights * mean.clamp_min(_LEAST_CURVATURE)
        if isinstance(space, ColumnSpace) or space.size > _LARGEST_INVERSE:
            curvature = curvature if isinstance(space, ColumnSpace) else curvature.to(space.matrix.dtype)
            return cls(1.0 / (space.diagonal(curvature) + strength), curvature, strength)
        matrix, curvature = space.matrix, curvature.to(space.matrix.dtype)
        root = curvature.sqrt()
        if space.dual:
            bent = matrix * root * root[:, None]
        else:
            bent = torch.zeros((len(matrix), len(matrix))).to(matrix)
            _add_products(bent, matrix * root)
        bent.diagonal().add_(strength)
        factor = _positive_factor(bent)
        if factor is None:
            return None
        inverse = torch.cholesky_inverse(factor)
        return cls(inverse * root / root[:, None] if space.dual else inverse, curvature, strength)

    def __call__(self, space: HeadSpace, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What they become, and the scores of that."""
        if self.inverse.ndim == 1:
            ahead = rows * self.inverse
            return ahead, space.scores(ahead)
        ahead = rows @ self.inverse
        if space.dual:
            # A product saved: ahead (ZZ'H + strength) = rows.
            return ahead, torch.sub(rows, ahead, alpha=self.strength).div_(self.curvature)
        return ahead, space.scores(ahead)


def _positive_factor(matrix: Tensor) -> Tensor | None:
    """Cholesky factor, once the diagonal has been raised by as little as rounding makes necessary."""
    mean = float(matrix.diagonal().mean())
    jitter = torch.finfo(matrix.dtype).eps
    for _ in range(10):
        matrix.diagonal().add_(jitter * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor
        jitter *= 10.0
    return None


def _newton_direction(
    space: HeadSpace,
    problem: Problem,
    probabilities: Tensor,
    preconditioner: _Preconditioner,
    gradient: Tensor,
    forcing: float,
) -> tuple[Tensor, int]:
    """Minus the inverse Hessian times the gradient, roughly, and how many products it took."""
    work = preconditioner.curvature.dtype
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
