"""Weights that mix the predictions of several models, from how these predict samples they were not fitted on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import log_softmax

_RATE = 5.0
_RIDGE = 0.02
_LEAST_WEIGHT = 0.01
_LEAST_LOG = -30.0
_MAX_BYTES = 2**28
_MOST_ADDED = 32
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
    exponential prior, decides among many models where there are few samples. The third shares weight among models that
    are almost the same. Weights need not sum to one: where models are less sure than they should be, the sum is
    greater. Those below 1 % of the sum are dropped, and the others fitted again.

    Copies of a model have no weight. Where no mixture is worth its weights, the most likely model has weight 1 if it is
    more likely than the class frequencies; else all are 0.

    Parameters
    ----------
    log_probabilities : ndarray of shape (n_models, n_samples, n_classes)
        What is below -30 counts as that; samples whose class no model thinks more likely are left out.
    log_frequencies : ndarray of shape (n_samples, n_classes)
        Of the classes in what each sample's models were fitted on.
    codes, sample_weight : ndarray of shape (n_samples,)
        True classes, and weights.
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
    total = sample_weight[seen].sum()
    problem = _Mixture(held_out[kept], base, codes[seen], sample_weight[seen] / total, _RATE / total)
    found = _best(problem)
    while found.any() and not (large := found >= min(_LEAST_WEIGHT * found.sum(), found.max())).all():
        kept, problem = kept[large], problem.of(large)
        found = _best(problem)
    weights[kept] = found
    if not weights.any():
        likelihoods = np.maximum(right[:, seen], _LEAST_LOG) @ problem.share
        if likelihoods.max() > base[np.arange(len(base)), problem.codes] @ problem.share + _NOTICEABLE:
            weights[np.argmax(likelihoods)] = 1.0
    return weights


def held_out_scores(
    log_probabilities: NDArray[np.float64],
    log_frequencies: NDArray[np.float64],
    codes: NDArray[np.int64],
    sample_weight: NDArray[np.float64],
    samples: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Scores (n_samples, n_classes) of mixtures whose weights were fitted on other samples than they are applied to.

    Those of a fold are fitted on samples of other folds; where there are none, on one half of the fold for the other.
    ``samples`` tells which predictions are of the same sample; all else is as in `mixture_weights`.
    """
    scores = np.empty_like(log_frequencies)
    for fold in np.unique(folds):
        own = folds == fold
        others = ~np.isin(samples, samples[own])
        half = np.random.default_rng(0).permutation(len(own)) % 2 == 0
        parts = [(others, own)] if others.any() else [(own & half, own & ~half), (own & ~half, own & half)]
        for fitted, applied in parts:
            weights = mixture_weights(
                log_probabilities[:, fitted], log_frequencies[fitted], codes[fitted], sample_weight[fitted]
            )
            scores[applied] = _mixed(weights, log_probabilities[:, applied], log_frequencies[applied])
    return scores


def _mixed(
    weights: NDArray[np.float64], log_probabilities: NDArray[np.float64], log_frequencies: NDArray[np.float64]
) -> NDArray[np.float64]:
    scores = np.tensordot(weights[weights > 0], log_probabilities[weights > 0], 1)
    with np.errstate(invalid="ignore"):
        scores += (1.0 - weights.sum()) * log_frequencies
    # A class that was not there to be learned stays out, whatever the sign of what the weights leave over.
    return np.where(np.isfinite(log_frequencies), scores, -np.inf)


def share_to_predict(n_probabilities: int) -> float:
    """Share of all predictions that weights are fitted to, so that they take about 256 MiB at most."""
    return min(1.0, _MAX_BYTES / (8 * n_probabilities))


def drawn(rows: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """That share of the rows, in their order, at random (labels may follow a pattern) but always the same."""
    count = math.ceil(share * len(rows))
    return rows if share == 1.0 else rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:count])]


def _different(models: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers of the models that are not copies of one before them, sorted."""
    first: dict[bytes, int] = {}
    for number, model in enumerate(models):
        first.setdefault(xxhash.xxh3_128_digest(model.tobytes()), number)
    return np.array(list(first.values()))


@dataclass(frozen=True)
class _Mixture:
    """The problem of `mixture_weights`, divided by the sum of the sample weights, with its sign changed.

    ``held_out`` are log P - log f, ``base`` is log f; ``share`` and ``rate`` are weights of the samples and the prior.
    """

    held_out: NDArray[np.float64]
    base: NDArray[np.float64]
    codes: NDArray[np.int64]
    share: NDArray[np.float64]
    rate: float

    def of(self, models: NDArray[np.bool_]) -> _Mixture:
        return replace(self, held_out=self.held_out[models])

    def evaluate(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Value, gradient (n_models,) and probabilities (n_samples, n_classes)."""
        share, rows, rate = self.share, np.arange(len(self.codes)), self.rate
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
        hessian[np.diag_indices_from(hessian)] += max(self.rate * _RIDGE, least)
        return hessian


def _best(problem: _Mixture) -> NDArray[np.float64]:
    """The best weights, by Newton's method on a growing set of models: those missed most join until none is missed."""
    weights = np.zeros(len(problem.held_out))
    support = np.zeros(len(weights), dtype=bool)
    while True:
        gradient = problem.evaluate(weights)[1]
        missed = np.flatnonzero((gradient < -_VIOLATION) & ~support)
        if not len(missed):
            return weights
        support[missed[np.argsort(gradient[missed])[:_MOST_ADDED]]] = True
        weights[support] = _newton(problem.of(support), weights[support])


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
