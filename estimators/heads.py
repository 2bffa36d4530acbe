"""The linear head on kept features: L2 multinomial logistic regression in the smaller of sample and feature space.

With fewer samples than features the solution is a combination of rows: only their products ZZ' are needed, whose
Cholesky factor L stands for the features. Newton's method takes its steps from preconditioned conjugate gradients, in
the precision the features came in, and looks at where they lead in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from estimators.group_lasso.problem import Problem, evaluate, null_objective, null_probabilities

_TOLERANCE = 1e-6
_MAX_ITER = 100
_CG_STEPS = 30
_STALE = 20
_FORCING = 0.3
_SMALLEST_STEP = 1e-6
_LEAST_CURVATURE = 1e-6
_JITTER = 1e-7
_LARGEST_FACTOR = 4096
_PANEL = 256


@dataclass(frozen=True, slots=True)
class SampleSpace:
    """Features Z (n_samples, n_features) as as many numbers per sample as there are samples or features, the fewer.

    Attributes
    ----------
    columns : Tensor of shape (size, n_samples), float64
        Z' itself, or L' with LL' = ZZ'.
    factor : Tensor of shape (n_samples, n_samples), float64, or None
        L, where it stands for Z.
    """

    columns: Tensor
    factor: Tensor | None

    def duals(self, coef: Tensor) -> Tensor:
        """A with Z V = ZZ'A, so that V = Z'A, from the coefficients (n_classes, size) of L, (n_samples, n_classes)."""
        assert self.factor is not None
        solved: Tensor = torch.linalg.solve_triangular(self.factor.T, coef.T, upper=True)
        return solved


def sample_space(blocks: Iterable[tuple[slice | Tensor, Tensor]], n_samples: int, n_features: int) -> SampleSpace:
    """Gather features by blocks of columns.

    Parameters
    ----------
    blocks : iterable of (columns, block of shape (n_samples, width))
        Standardised as they are to be penalised, float32 or float64; products are made in that precision.
    n_samples, n_features : int
    """
    gathered: Tensor | None = None
    size = min(n_features, n_samples)
    for index, block in blocks:
        if gathered is None:
            gathered = torch.zeros((size, n_samples), dtype=torch.float64, device=block.device)
        if n_features <= n_samples:
            gathered[index] = block.T.double()
        else:
            _add_products(gathered, block)
    assert gathered is not None
    if n_features <= n_samples:
        return SampleSpace(gathered, None)
    factor = _factor(gathered, _JITTER)
    if factor is None:
        raise ValueError("The kept features are too large for the ridge head: their products overflow. Scale them.")
    return SampleSpace(factor.T.contiguous(), factor)


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the products of rows with each other to the lower triangle, leaving most of the upper one alone."""
    for start in range(0, len(rows), _PANEL):
        stop = start + _PANEL
        total[start:stop, :stop] += rows[start:stop] @ rows[:stop].T


def _factor(lower: Tensor, jitter: float) -> Tensor | None:
    """Cholesky factor of a matrix, of which the lower triangle is read.

    As little is added to the diagonal as it takes, at least ``jitter`` times its mean.
    """
    mean = float(lower.diagonal().mean().clamp_min(torch.finfo(lower.dtype).tiny))
    for _ in range(10):
        factor: Tensor
        shifted = lower.clone()
        shifted.diagonal().add_(jitter * mean)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return factor
        jitter = max(_JITTER, 10.0 * jitter)
    return None


@dataclass(frozen=True, slots=True)
class RidgeSolution:
    """A ridge head in the space it was solved in.

    Attributes
    ----------
    coef : Tensor of shape (n_classes, size), float64
    intercept : Tensor of shape (n_classes,), float64
    """

    coef: Tensor
    intercept: Tensor


def fit_ridge_head(
    columns: Tensor,
    targets: Tensor,
    sample_weight: Tensor,
    C: float,
    start: RidgeSolution | None = None,
    work: torch.dtype = torch.float64,
) -> RidgeSolution:
    """Minimise C * sum_i s_i CE(y_i, V z_i + c) + ||V||_F^2 / 2, as scikit-learn's LogisticRegression does.

    Two classes have the penalty of scikit-learn's one logit w, which is softmax columns -w/2, w/2.

    Parameters
    ----------
    columns : Tensor of shape (size, n_samples), float64
        Z', or what `sample_space` made of it.
    targets : Tensor of shape (n_classes, n_samples), float64
        Y', one-hot; two classes or more, all present.
    sample_weight : Tensor of shape (n_samples,), float64
        Positive.
    C : float
        Inverse strength of the penalty.
    start : RidgeSolution, default=None
        A solution for a similar C.
    work : torch.dtype, default=torch.float64
        Of the conjugate gradients: float32 is twice as fast and loses nothing, as the gradient is in float64.

    Returns
    -------
    RidgeSolution
        Its objective is within 1e-6 of the optimum, relative to that of V = 0.

    Warns
    -----
    ConvergenceWarning
        If rounding or 100 Newton steps are in the way of that.
    """
    total = float(sample_weight.sum())
    problem = Problem(targets, sample_weight / total, 0.0, True)
    strength = (2.0 if len(targets) == 2 else 1.0) / (C * total)
    null = null_objective(problem)
    if start is None:
        frequencies = null_probabilities(problem).log()
        start = RidgeSolution(torch.zeros((len(targets), len(columns))).to(columns), frequencies - frequencies.mean())
    coef, products = start.coef, start.coef @ columns
    point = evaluate(problem, products, start.intercept)
    hessian: _Curvature | None = None
    n_products, gap = _STALE, np.inf
    for _ in range(_MAX_ITER):
        gradient = point.residual @ columns.T + strength * coef
        # With the best intercept, what remains is strongly convex in V: no optimum is further below than this.
        gap = float(gradient.square().sum()) / (2.0 * strength) if point.exact else np.inf
        if gap <= _TOLERANCE * null:
            return RidgeSolution(coef, point.intercept)
        if hessian is None or n_products >= _STALE:
            hessian = _Curvature.at(columns.to(work), problem.weights, point.probabilities, strength)
            if hessian is None:
                break
        direction, turn, n_products = hessian.newton_direction(problem.weights, point.probabilities, gradient)
        slope, moved, step = float((gradient * direction).sum()), direction @ columns, 1.0
        value = point.loss + 0.5 * strength * float(coef.square().sum())
        while step > _SMALLEST_STEP:
            trial = coef + step * direction
            reached = evaluate(problem, products + step * moved, point.intercept + step * turn)
            trial_value = reached.loss + 0.5 * strength * float(trial.square().sum())
            if trial_value <= value + 1e-4 * step * slope + 1e-15:
                break
            step /= 2
        if step <= _SMALLEST_STEP:
            break
        coef, products, point = trial, products + step * moved, reached
    warnings.warn(
        f"The ridge head stopped within {gap / null:.1e} of its optimum, relative to the objective of zero "
        f"coefficients, instead of {_TOLERANCE:.0e}. Lower C, or scale the features.",
        ConvergenceWarning,
        stacklevel=2,
    )
    return RidgeSolution(coef, point.intercept)


@dataclass(frozen=True, slots=True)
class _Curvature:
    """The Hessian as conjugate gradients need it: products with features, and an approximate inverse.

    The inverse is that of M = F diag(h) F' + diag(penalty), the Hessian if every sample had one curvature h for all
    classes. Beyond 4096 features only the diagonal of M is inverted.
    """

    features: Tensor
    penalty: Tensor
    inverse: Tensor

    @classmethod
    def at(cls, columns: Tensor, weights: Tensor, probabilities: Tensor, strength: float) -> _Curvature | None:
        features = torch.cat([columns, torch.ones_like(columns[:1])])
        penalty = torch.full_like(features[:, 0], strength)
        penalty[-1] = 0.0
        mean = (probabilities * (1.0 - probabilities)).sum(0) / (len(probabilities) - 1)
        curvature = (weights * mean.clamp_min(_LEAST_CURVATURE)).to(features.dtype)
        if len(features) > _LARGEST_FACTOR:
            return cls(features, penalty, 1.0 / (features.square() @ curvature + penalty))
        squared = torch.diag(penalty)
        _add_products(squared, features * curvature.sqrt())
        factor = _factor(squared, torch.finfo(features.dtype).eps)
        return None if factor is None else cls(features, penalty, torch.cholesky_inverse(factor))

    def _precondition(self, rows: Tensor) -> Tensor:
        return rows * self.inverse if self.inverse.ndim == 1 else rows @ self.inverse

    def newton_direction(self, weights: Tensor, probabilities: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, int]:
        """Minus the inverse Hessian times the gradient, roughly; that of the intercept; how many products it took.

        The gradient in the intercept is zero.
        """
        work = self.features.dtype
        likely, weighted = probabilities.to(work), (weights * probabilities).to(work)
        residual = torch.nn.functional.pad(-gradient.to(work), (0, 1))
        solution, search = torch.zeros_like(residual), self._precondition(residual)
        size = float((residual * search).sum())
        goal = _FORCING**2 * size
        n_products = 0
        while n_products < _CG_STEPS:
            n_products += 1
            scores = search @ self.features
            bent = weighted * (scores - (likely * scores).sum(0))
            product = torch.addcmul(bent @ self.features.T, search, self.penalty)
            curvature = float((search * product).sum())
            if not curvature > 0.0:
                break
            step = size / curvature
            solution.add_(search, alpha=step)
            residual.sub_(product, alpha=step)
            scaled = self._precondition(residual)
            previous, size = size, float((residual * scaled).sum())
            if not size > goal:
                break
            search = scaled.add_(search, alpha=size / previous)
        direction = solution.double()
        return direction[:, :-1], direction[:, -1], n_products
