"""The linear head on kept features: L2 multinomial logistic regression in the smaller of sample and feature space.

With fewer samples than features the solution is a combination of rows: only their products ZZ' are needed, whose
Cholesky factor L stands for the features. Newton's method takes its steps from conjugate gradients on whitened
features, in the precision the features came in, and looks at where they lead in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

_TOLERANCE = 1e-6
_SLOPE_TOLERANCE = 1e-7
_MAX_ITER = 100
_CG_STEPS = 30
_STALE = 20
_FORCING = 0.3
_SMALLEST_STEP = 1e-6
_LEAST_CURVATURE = 1e-6
_JITTER = 1e-7
_LARGEST_FACTOR = 4096


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
    if n_features <= n_samples:
        gathered: Tensor | None = None
        for index, block in blocks:
            if gathered is None:
                gathered = torch.empty((n_features, n_samples), dtype=torch.float64, device=block.device)
            gathered[index] = block.T.double()
        assert gathered is not None
        return SampleSpace(gathered, None)
    gram = sum((block @ block.T).double() for _, block in blocks)
    assert isinstance(gram, Tensor)
    factor = _factor(gram, _JITTER)
    if factor is None:
        raise ValueError("The kept features are too large for the ridge head: their products overflow. Scale them.")
    return SampleSpace(factor.T.contiguous(), factor)


def _factor(gram: Tensor, jitter: float) -> Tensor | None:
    """Cholesky factor with as little added to the diagonal as it takes, at least ``jitter`` times its mean."""
    mean = float(gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
    for _ in range(10):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(gram + jitter * mean * torch.eye(len(gram)).to(gram))
        if not int(failed):
            return factor
        jitter = max(_JITTER, 10.0 * jitter)
    return None


def fit_ridge_head(
    columns: Tensor,
    targets: Tensor,
    sample_weight: Tensor,
    C: float,
    start: Tensor | None = None,
    work: torch.dtype = torch.float64,
) -> Tensor:
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
    start : Tensor of shape (n_classes, size + 1), float64, default=None
        A solution for a similar C.
    work : torch.dtype, default=torch.float64
        Of the conjugate gradients: float32 is twice as fast and loses nothing, as the gradient is in float64.

    Returns
    -------
    Tensor of shape (n_classes, size + 1), float64
        V and, last, the intercept. The objective is within 1e-6 of its optimum, relative to that of V = 0.

    Warns
    -----
    ConvergenceWarning
        If rounding or 100 Newton steps are in the way of that.
    """
    total = float(sample_weight.sum())
    weights = sample_weight / total
    strength = (2.0 if len(targets) == 2 else 1.0) / (C * total)
    size = len(columns)
    features = torch.cat([columns, torch.ones_like(columns[:1])])
    penalty = torch.full((size + 1,), strength, dtype=torch.float64, device=columns.device)
    penalty[-1] = 0.0
    frequencies = targets @ weights
    null = float(torch.special.entr(frequencies).sum())
    if start is None:
        coef = torch.zeros((len(targets), size + 1), dtype=torch.float64, device=columns.device)
        coef[:, -1] = frequencies.log() - frequencies.log().mean()
    else:
        coef = start
    value, probabilities = _evaluate(features, targets, weights, penalty, coef)
    white: _Whitened | None = None
    n_products, gap = _STALE, np.inf
    for _ in range(_MAX_ITER):
        gradient = (weights * (probabilities - targets)) @ features.T + coef * penalty
        # The loss is convex and the penalty strongly so: no optimum is further below than this.
        gap = float(gradient[:, :-1].square().sum()) / (2.0 * strength)
        if gap <= _TOLERANCE * null and float(gradient[:, -1].abs().max()) <= _SLOPE_TOLERANCE:
            return coef
        if white is None or n_products >= _STALE:
            white = _Whitened.at(features.to(work), weights, probabilities, penalty)
            if white is None:
                break
        direction, n_products = white.newton_direction(weights, probabilities, gradient)
        slope, step = float((gradient * direction).sum()), 1.0
        while step > _SMALLEST_STEP:
            trial = coef + step * direction
            trial_value, trial_probabilities = _evaluate(features, targets, weights, penalty, trial)
            if trial_value <= value + 1e-4 * step * slope + 1e-15:
                break
            step /= 2
        if step <= _SMALLEST_STEP:
            break
        coef, value, probabilities = trial, trial_value, trial_probabilities
    warnings.warn(
        f"The ridge head stopped within {gap / null:.1e} of its optimum, relative to the objective of zero "
        f"coefficients, instead of {_TOLERANCE:.0e}. Lower C, or scale the features.",
        ConvergenceWarning,
        stacklevel=2,
    )
    return coef


def _evaluate(
    features: Tensor, targets: Tensor, weights: Tensor, penalty: Tensor, coef: Tensor
) -> tuple[float, Tensor]:
    """The objective over C * sum_i s_i, and the class probabilities."""
    scores = coef @ features
    normalizer = torch.logsumexp(scores, 0)
    value = weights @ (normalizer - (scores * targets).sum(0)) + 0.5 * (coef.square() @ penalty).sum()
    return float(value), (scores - normalizer).exp_()


@dataclass(frozen=True, slots=True)
class _Whitened:
    """Features in which the Hessian is the identity, if every sample has one curvature h for all classes.

    With M = F diag(h) F' + diag(penalty) = LL' these are L^-1 F. Beyond 4096 features only the diagonal of M is used.
    """

    factor: Tensor
    features: Tensor
    curvature: Tensor
    penalty: Tensor

    @classmethod
    def at(cls, features: Tensor, weights: Tensor, probabilities: Tensor, penalty: Tensor) -> _Whitened | None:
        work = features.dtype
        mean = (probabilities * (1.0 - probabilities)).sum(0) / (len(probabilities) - 1)
        curvature = (weights * mean.clamp_min(_LEAST_CURVATURE)).to(work)
        if len(features) > _LARGEST_FACTOR:
            scale = (features.square() @ curvature + penalty.to(work)).sqrt()
            return cls(scale, features / scale[:, None], curvature, penalty.to(work) / scale.square())
        squared = (features * curvature) @ features.T
        squared.diagonal().add_(penalty.to(work))
        factor = _factor(squared, 0.0)
        if factor is None:
            return None
        white = torch.linalg.solve_triangular(factor, features, upper=False)
        return cls(factor, white, curvature, torch.zeros(0, device=features.device))

    def _back(self, right: Tensor) -> Tensor:
        """L^-1 applied to rows."""
        if self.factor.ndim == 1:
            return right / self.factor
        solved: Tensor = torch.linalg.solve_triangular(self.factor, right.T, upper=False)
        return solved.T

    def _forth(self, solution: Tensor) -> Tensor:
        """L'^-1 applied to rows."""
        if self.factor.ndim == 1:
            return solution / self.factor
        solved: Tensor = torch.linalg.solve_triangular(self.factor.T, solution.T, upper=True)
        return solved.T

    def newton_direction(self, weights: Tensor, probabilities: Tensor, gradient: Tensor) -> tuple[Tensor, int]:
        """Minus the inverse Hessian times the gradient, roughly, and how many products that took."""
        work = self.features.dtype
        likely, weighted = probabilities.to(work), (weights * probabilities).to(work)
        residual = self._back(-gradient.to(work)).contiguous()
        solution = torch.zeros_like(residual)
        search, size = residual.clone(), float(residual.square().sum())
        goal = _FORCING**2 * size
        n_products = 0
        while n_products < _CG_STEPS:
            n_products += 1
            scores = search @ self.features
            bent = weighted * (scores - (likely * scores).sum(0))
            if self.factor.ndim == 1:
                product = torch.addcmul(bent @ self.features.T, search, self.penalty)
            else:
                product = search + (bent - self.curvature * scores) @ self.features.T
            curvature = float((search * product).sum())
            if not curvature > 0.0:
                break
            step = size / curvature
            solution.add_(search, alpha=step)
            residual.sub_(product, alpha=step)
            previous, size = size, float(residual.square().sum())
            if size <= goal:
                break
            search = residual + (size / previous) * search
        return self._forth(solution).double(), n_products
