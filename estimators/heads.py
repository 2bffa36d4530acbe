"""The ridge head: L2 multinomial logistic regression on kept features Z, in as few coordinates as there are.

With fewer samples than features, Z is replaced by the Cholesky factor L of ZZ' = LL': the same problem for L has the
solution for Z turned into other axes. Newton's method takes its steps from preconditioned conjugate gradients, which
may run in float32. The gradient, by which the solution is certified, is always in float64, and so are the products it
rests on. The intercept is eliminated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf as pstrf
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

TOLERANCE = 1e-8
_MAX_ITER = 100
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
_LARGEST_INVERSE = 4096
_PANEL = 256

Block = tuple[slice | Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class HeldSpace:
    """Features Z (n_samples, n_features), or the Cholesky factor L of ZZ', held for products.

    Attributes
    ----------
    matrix : Tensor of shape (size, n_samples)
        Z' or L'.
    pivots : Tensor of shape (size,), int64, default=None
        The samples that the rows of L' belong to, where it is L'.
    """

    matrix: Tensor
    pivots: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of coordinates per class."""
        return len(self.matrix)

    def scores(self, coordinates: Tensor) -> Tensor:
        """(n_classes, n_samples) from (n_classes, size)."""
        return coordinates @ self.matrix

    def pull(self, residual: Tensor) -> Tensor:
        """The gradient in the coordinates from that in the scores."""
        return residual @ self.matrix.T

    def to(self, dtype: torch.dtype) -> HeldSpace:
        """In another precision."""
        return self if dtype == self.matrix.dtype else HeldSpace(self.matrix.to(dtype), self.pivots)

    def diagonal(self, curvature: Tensor) -> Tensor:
        """Of Z'HZ for the diagonal matrix H, (size,)."""
        return torch.cat([rows.square() @ curvature for rows in torch.split(self.matrix, _PANEL)])

    def combination(self, coordinates: Tensor) -> Tensor:
        """A (n_classes, n_samples) with A Z the coefficients of the features, for coordinates on L."""
        assert self.pivots is not None
        combined = coordinates.new_zeros((len(coordinates), self.matrix.shape[1]))
        triangle = self.matrix[:, self.pivots]
        combined[:, self.pivots] = torch.linalg.solve_triangular(triangle, coordinates.T, upper=True).T
        return combined


@dataclass(frozen=True, slots=True)
class StreamedSpace:
    """Features Z that are made again by blocks of columns for every product, as there is no room to hold them.

    Attributes
    ----------
    blocks : callable
        Gives (columns, block of shape (n_samples, width), float64) until every column was given once.
    shape : (n_samples, n_features)
    """

    blocks: Callable[[], Iterator[Block]]
    shape: tuple[int, int]
    pivots = None

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

    def to(self, dtype: torch.dtype) -> StreamedSpace:
        """Itself: its products are in float64."""
        return self

    def diagonal(self, curvature: Tensor) -> Tensor:
        """Of Z'HZ for the diagonal matrix H, (size,)."""
        diagonal = curvature.new_empty(self.size)
        for index, block in self.blocks():
            diagonal[index] = curvature @ block.square()
        return diagonal


HeadSpace = HeldSpace | StreamedSpace


def held_space_bytes(n_samples: int, n_features: int) -> int:
    """Bytes that making and using a `HeldSpace` takes, with its copy in float32 and what preconditions it."""
    size = min(n_samples, n_features)
    factoring = 16 * n_samples**2 if n_features > n_samples else 0
    inverse = 32 * size**2 if size <= _LARGEST_INVERSE else 0
    return 8 * size * n_samples + max(factoring, 4 * size * n_samples + inverse)


def held_space(blocks: Iterable[Block], n_samples: int, n_features: int) -> HeldSpace:
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
    wide, gathered = n_features > n_samples, None
    for index, block in blocks:
        if gathered is None:
            size = min(n_features, n_samples)
            gathered = torch.zeros((size, n_samples), dtype=torch.float64, device=block.device)
        if wide:
            _add_products(gathered, block)
        else:
            gathered[index] = block.T
    assert gathered is not None
    if not bool(gathered.norm().isfinite()):
        raise ValueError("The kept features are too large for the ridge head: their products overflow. Scale them.")
    return _factored(gathered) if wide else HeldSpace(gathered)


def _factored(products: Tensor) -> HeldSpace:
    """The space of L' for products ZZ', of which the lower triangle is given; as many rows as Z has rank."""
    factor, order, rank, _ = pstrf(products.cpu().numpy(), lower=1)
    pivots = torch.as_tensor(order - 1, dtype=torch.int64, device=products.device)
    matrix = products.new_empty((rank, len(products)))
    matrix[:, pivots] = torch.as_tensor(np.tril(factor)[:, :rank].T, device=products.device)
    return HeldSpace(matrix, pivots[:rank])


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
    tolerance: float = 0.0,
) -> RidgeSolution:
    """Minimise C * sum_i s_i CE(y_i, V z_i + c) + ||V||_F^2 / 2, as scikit-learn's LogisticRegression does.

    Two classes have the penalty of scikit-learn's one logit w, which is softmax columns -w/2, w/2.

    Parameters
    ----------
    space : HeldSpace or StreamedSpace
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
    tolerance : float, default=0.0
        How far the objective may be from the optimum, relative to that of V = 0, at most 1e-8. 0 goes on as far as
        float64 allows, which takes a few times as long: results then do not depend on the start. At 1e-8 probabilities
        may be off by 1e-3 where C is large.

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
    finest = 0.0 if tolerance < TOLERANCE else INTERCEPT_TOLERANCE
    point = evaluate(problem, products, intercept, finest)
    rough = space.to(work)
    preconditioner: _Preconditioner | None = None
    gap = best = lowest = math.inf
    stalled, stale, most = 0, True, _CG_STEPS
    for _ in range(_MAX_ITER):
        gradient = space.pull(point.residual) + strength * coordinates
        # With the best intercept, what remains is strongly convex in V: the optimum is no further below than this.
        gap = float(gradient.square().sum()) / (2.0 * strength) if point.exact else math.inf
        value = point.loss + _ridge(coordinates, strength)
        better = gap < 0.5 * best or value < lowest - TOLERANCE * null
        best, lowest, stalled = min(gap, best), min(value, lowest), 0 if better else stalled + 1
        solved = gap <= TOLERANCE * null
        if gap <= tolerance * null or (rough is space and stalled > _PATIENCE):
            break
        if rough is not space and (solved or stalled > _PATIENCE):
            rough, stalled, stale = space, 0, True
        if stale:
            preconditioner = _Preconditioner.at(rough, problem.weights, point.probabilities, strength)
        if preconditioner is None:
            if rough is space:
                break
            rough, stale = space, True
            continue
        if solved:
            forcing = max(_FINEST_FORCING, math.sqrt(gap / null), 0.5 * math.sqrt(tolerance * null / gap))
        else:
            forcing = max(_FORCING, min(_LOOSEST, math.sqrt(TOLERANCE * null / gap)))
        direction, n_products = _newton_direction(
            rough, problem, point.probabilities, preconditioner, gradient, forcing, most
        )
        if n_products == most and not solved:
            most = min(2 * most, _MOST_CG_STEPS)
        # Where it is solved, steps are long because they are to be exact.
        stale = n_products >= _STALE and not solved
        moved, step = space.scores(direction), 1.0
        slope = float((gradient * direction).sum())
        while step > _SMALLEST_STEP:
            trial, trial_products = coordinates + step * direction, products + step * moved
            reached = evaluate(problem, trial_products, point.intercept, finest)
            trial_value = reached.loss + _ridge(trial, strength)
            if trial_value <= value + 1e-4 * step * slope + 1e-14:
                break
            step /= 2
        if step > _SMALLEST_STEP:
            coordinates, products, point = trial, trial_products, reached
        elif rough is space:
            break
        else:
            rough, stale = space, True
    if not gap <= TOLERANCE * null:
        warnings.warn(
            f"The ridge head stopped within {gap / null:.1e} of its optimum, relative to the objective of zero "
            f"coefficients, instead of {TOLERANCE:.0e}. Lower C, or scale the features.",
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
    value = loss(problem, scores + intercept[:, None]) + _ridge(guess, strength)
    return (guess, scores, intercept) if value < null_objective(problem) else nothing


def _ridge(coordinates: Tensor, strength: float) -> float:
    """strength / 2 * ||V||_F^2."""
    return 0.5 * strength * float(coordinates.square().sum())


@dataclass(frozen=True, slots=True)
class _Preconditioner:
    """(Z'HZ + strength)^-1, the inverse Hessian if every sample had one curvature h for all classes.

    Beyond a size of 4096, and where Z is not held, it is that of the diagonal.
    """

    inverse: Tensor
    strength: float

    @classmethod
    def at(cls, space: HeadSpace, weights: Tensor, probabilities: Tensor, strength: float) -> _Preconditioner | None:
        """None if rounding makes it indefinite."""
        mean = (probabilities * (1.0 - probabilities)).sum(0) / (len(probabilities) - 1)
        curvature = weights * mean.clamp_min(_LEAST_CURVATURE)
        if isinstance(space, StreamedSpace):
            return cls(1.0 / (space.diagonal(curvature) + strength), strength)
        matrix, curvature = space.matrix, curvature.to(space.matrix.dtype)
        if space.size > _LARGEST_INVERSE:
            return cls(1.0 / (space.diagonal(curvature) + strength), strength)
        bent = matrix.new_zeros((space.size, space.size))
        _add_products(bent, matrix * curvature.sqrt())
        bent.diagonal().add_(strength)
        factor = _positive_factor(bent)
        return None if factor is None else cls(torch.cholesky_inverse(factor), strength)

    def __call__(self, rows: Tensor) -> Tensor:
        return rows * self.inverse if self.inverse.ndim == 1 else rows @ self.inverse


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


def _newton_direction(
    space: HeadSpace,
    problem: Problem,
    probabilities: Tensor,
    preconditioner: _Preconditioner,
    gradient: Tensor,
    forcing: float,
    most: int,
) -> tuple[Tensor, int]:
    """Minus the inverse Hessian times the gradient, roughly, and how many products it took, ``most`` if need be."""
    work = preconditioner.inverse.dtype
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

    residual = -gradient.to(work)
    solution = torch.zeros_like(residual)
    search = preconditioner(residual)
    size = float((residual * search).sum())
    goal = forcing**2 * size
    n_products = 0
    while n_products < most:
        n_products += 1
        product = space.pull(bend(space.scores(search))).add_(search, alpha=preconditioner.strength)
        curvature = float((search * product).sum())
        if not curvature > 0.0:
            break
        step = size / curvature
        solution.add_(search, alpha=step)
        residual.sub_(product, alpha=step)
        ahead = preconditioner(residual)
        previous, size = size, float((residual * ahead).sum())
        if not size > goal:
            break
        search = ahead.add_(search, alpha=size / previous)
    return solution.double(), n_products
