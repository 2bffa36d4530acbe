"""Weights for mixing the predictions of several models, from how they predict samples they were not fitted on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls
from scipy.special import log_softmax

_RATE = 5.0
_RIDGE = 0.02
_LEAST_WEIGHT = 0.01
_LEAST_LOG = -30.0
_SAME = 1e-7
_MAX_BYTES = 2**28
_ROUGH_STEPS = 500
_NEWTON_STEPS = 50
_NNLS_STEPS = 30
_SMALLEST_STEP = 1e-6
_CONVERGED = 1e-18
_ROUNDING = 1e-15
_VIOLATION = 1e-9
_NOTICEABLE = 1e-9
_LEAST_RIDGE = 1e-13


def mixture_weights(
    log_probabilities: NDArray[np.float64],
    log_frequencies: NDArray[np.float64],
    codes: NDArray[np.int64],
    sample_weight: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Weights w >= 0 with which models predict best together what they were not fitted on.

    They maximise, for the class frequencies f that the models know,

        sum_i s_i log softmax(log f_i + sum_m w_m (log P_mi - log f_i))[y_i] - 5 sum_m w_m - 0.05 sum_m w_m^2

    so that models without weight leave the class frequencies. This mixes probabilities as a product of their powers;
    for linear models that is a linear model again. The problem is concave. The second term, the logarithm of an
    exponential prior, decides among many models where there are few samples, and weighs, as C does, against the sum of
    the sample weights. The third shares weight among models that are almost the same. Weights need not sum to one:
    where models are less sure than they should be, the sum is greater. Those below 1 % of the sum are dropped, and the
    others fitted again.

    Parameters
    ----------
    log_probabilities : ndarray of shape (n_models, n_samples, n_classes), float64
        Of samples that the models were not fitted on. What is below -30 counts as that; samples whose class no model
        thinks more likely are left out.
    log_frequencies : ndarray of shape (n_samples, n_classes), float64
        Logarithms of the class frequencies in what each sample's models were fitted on.
    codes : ndarray of shape (n_samples,), int64
        The true classes.
    sample_weight : ndarray of shape (n_samples,), float64
        Non-negative.

    Returns
    -------
    ndarray of shape (n_models,), float64
        Of models whose log-probabilities agree to 1e-7 the first has weight. Where no mixture is worth its weights, the
        most likely model has weight 1 if it is more likely than the class frequencies; else all are 0.
    """
    weights, right = np.zeros(len(log_probabilities)), log_probabilities[:, np.arange(len(codes)), codes]
    # A class that no model has met says nothing about any of them.
    seen = (sample_weight > 0) & (right.max(axis=0) > _LEAST_LOG)
    if not seen.any():
        weights[0] = 1.0
        return weights
    base = np.maximum(log_frequencies[seen], _LEAST_LOG)
    held_out = np.ascontiguousarray(log_probabilities[:, seen])
    np.maximum(held_out, _LEAST_LOG, out=held_out)
    held_out -= base
    kept = _different(held_out)
    problem = _Mixture(held_out[kept], base, codes[seen], sample_weight[seen])
    found = _best(problem, _rough(problem) > 0)
    while found.any() and not (large := found >= min(_LEAST_WEIGHT * found.sum(), found.max())).all():
        kept, problem = kept[large], problem.of(large)
        found = _best(problem, np.ones(len(kept), dtype=bool))
    weights[kept] = found
    if not weights.any():
        rows, share = np.arange(len(base)), problem.share
        likelihoods = np.maximum(right[:, seen], _LEAST_LOG) @ share
        if likelihoods.max() > base[rows, problem.codes] @ share + _NOTICEABLE:
            weights[np.argmax(likelihoods)] = 1.0
    return weights


def share_to_predict(n_models: int, n_samples: int, n_classes: int) -> float:
    """What share of the samples weights are fitted to, so that predictions of them take about 256 MiB at most."""
    return min(1.0, _MAX_BYTES / max(1, 8 * n_models * n_samples * n_classes))


def drawn(rows: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """That share of the rows, at random and always the same, in their order: labels may follow a pattern."""
    count = math.ceil(share * len(rows))
    return rows if share == 1.0 else rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:count])]


def _different(held_out: NDArray[np.float64]) -> NDArray[np.int64]:
    """Models that differ from each one before them, sorted."""
    # Models that are close have close projections.
    direction = np.random.default_rng(0).choice([-1.0, 1.0], held_out[0].shape)
    projections, reach = np.tensordot(held_out, direction, 2), _SAME * held_out[0].size
    kept: list[int] = []
    for number, model in enumerate(held_out):
        near = [other for other in kept if abs(projections[other] - projections[number]) <= reach]
        if not any(np.abs(model - held_out[other]).max() <= _SAME for other in near):
            kept.append(number)
    return np.array(kept)


@dataclass(frozen=True)
class _Mixture:
    """The problem of `mixture_weights`, divided by the sum of the sample weights, with its sign changed.

    ``held_out`` are log P - log f, ``base`` is log f.
    """

    held_out: NDArray[np.float64]
    base: NDArray[np.float64]
    codes: NDArray[np.int64]
    sample_weight: NDArray[np.float64]

    @property
    def share(self) -> NDArray[np.float64]:
        """Of each sample in the sum of the weights."""
        return np.asarray(self.sample_weight / self.sample_weight.sum())

    def of(self, models: NDArray[np.bool_]) -> _Mixture:
        return replace(self, held_out=self.held_out[models])

    def evaluate(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Value, gradient (n_models,) and probabilities (n_samples, n_classes)."""
        share, rows, rate = self.share, np.arange(len(self.codes)), _RATE / self.sample_weight.sum()
        logarithms = log_softmax(self.base + np.tensordot(weights, self.held_out, 1), axis=1)
        probabilities = np.exp(logarithms)
        excess = share[:, None] * probabilities
        excess[rows, self.codes] -= share
        value = rate * (weights.sum() + 0.5 * _RIDGE * weights @ weights) - logarithms[rows, self.codes] @ share
        return float(value), np.tensordot(self.held_out, excess, 2) + rate * (1.0 + _RIDGE * weights), probabilities

    def hessian(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n_models, n_models), positive definite."""
        centred = self.held_out - (self.held_out * probabilities).sum(axis=2, keepdims=True)
        root = (centred * np.sqrt(self.share[:, None] * probabilities)).reshape(len(self.held_out), -1)
        hessian: NDArray[np.float64] = root @ root.T
        # The ridge of very large sample weights is lost in rounding, and models may be as many as samples.
        least = _LEAST_RIDGE * np.trace(hessian)
        hessian[np.diag_indices_from(hessian)] += max(_RATE / self.sample_weight.sum() * _RIDGE, least)
        return hessian


def _rough(problem: _Mixture) -> NDArray[np.float64]:
    """About the best weights, many of them zero."""
    found = minimize(
        lambda weights: problem.evaluate(weights)[:2],
        np.zeros(len(problem.held_out)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * len(problem.held_out),
        options={"maxiter": _ROUGH_STEPS, "ftol": 1e-12, "gtol": 1e-8},
    )
    return np.asarray(found.x)


def _best(problem: _Mixture, support: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The best weights, by Newton's method on the models that may have some: the same to many digits from any start."""
    weights = np.zeros(len(support))
    while True:
        if support.any():
            weights[support] = _newton(problem.of(support), weights[support])
        missing = (problem.evaluate(weights)[1] < -_VIOLATION) & ~support
        if not missing.any():
            return weights
        support |= missing


def _newton(problem: _Mixture, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    value, gradient, probabilities = problem.evaluate(weights)
    before = np.inf
    for _ in range(_NEWTON_STEPS):
        # The quadratic model's best point w >= 0 is a least-squares problem in its root.
        root = np.linalg.cholesky(problem.hessian(probabilities)).T
        goal = root @ weights - np.linalg.solve(root.T, gradient)
        direction = nnls(root, goal, maxiter=_NNLS_STEPS * len(weights))[0] - weights
        slope, size = float(gradient @ direction), 1.0
        if -slope <= _CONVERGED and -slope >= 0.5 * before:
            break
        before = -slope
        while size > _SMALLEST_STEP:
            trial, *others = problem.evaluate(weights + size * direction)
            if trial <= value + 1e-4 * size * slope + _ROUNDING * abs(value):
                break
            size /= 2
        if size <= _SMALLEST_STEP:
            break
        weights, value, (gradient, probabilities) = weights + size * direction, trial, others
    return weights
