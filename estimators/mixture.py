"""Weights for mixing the predictions of several models, from how they predict samples they were not fitted on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-4
_MAX_ITER = 2000
_LEAST_WEIGHT = 0.01


def mixture_weights(likelihood: NDArray[np.float64], sample_weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Maximise sum_i s_i log(sum_m w_m L_mi) over weights w >= 0 that sum to one.

    The problem is concave, and expectation-maximisation climbs: w_m grows by the factor g_m = mean_i L_mi / (w'L)_i.
    No weights are better by more than log(max_m g_m) per sample, which ends the iterations at 1e-4 (or after 2000).
    Weights below 1 % are then dropped.

    Parameters
    ----------
    likelihood : ndarray of shape (n_models, n_samples), float64
        Probability that each model gave the true class of a sample it was not fitted on.
    sample_weight : ndarray of shape (n_samples,), float64
        Non-negative.

    Returns
    -------
    ndarray of shape (n_models,), float64
        Of models with equal likelihoods one has weight. Uniform if no model gives any sample of positive weight a
        positive probability.
    """
    # Models that are the same in all but name count once.
    first = np.unique(likelihood, axis=0, return_index=True)[1]
    weights = np.zeros(len(likelihood))
    weights[first] = 1.0 / len(first)
    seen = (sample_weight > 0) & (likelihood.max(axis=0) > 0)
    if not seen.any():
        return weights
    held_out, share = likelihood[:, seen], sample_weight[seen] / sample_weight[seen].sum()
    held_out = held_out / held_out.max(axis=0)
    for _ in range(_MAX_ITER):
        growth = held_out @ (share / (weights @ held_out))
        if growth.max() <= 1.0 + _TOLERANCE:
            break
        weights *= growth
    weights[weights < min(_LEAST_WEIGHT, weights.max())] = 0.0
    return np.asarray(weights / weights.sum())
