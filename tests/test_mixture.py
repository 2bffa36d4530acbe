"""Mixing weights against an independent optimum."""

import cvxpy as cp
import numpy as np
import pytest

from estimators.mixture import mixture_weights


def likelihoods(seed, n_models=6, n_samples=80):
    rng = np.random.default_rng(seed)
    return rng.beta(2, 1, (n_models, n_samples)), rng.uniform(0.1, 2.0, n_samples)


def mean_log(weights, likelihood, sample_weight):
    return np.average(np.log(weights @ likelihood), weights=sample_weight)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_weights_make_the_labels_more_likely(seed):
    likelihood, sample_weight = likelihoods(seed)
    variable = cp.Variable(len(likelihood), nonneg=True)
    share = sample_weight / sample_weight.sum()
    problem = cp.Problem(cp.Maximize(share @ cp.log(likelihood.T @ variable)), [cp.sum(variable) == 1])
    problem.solve(solver=cp.CLARABEL)
    weights = mixture_weights(likelihood, sample_weight)
    assert weights.sum() == pytest.approx(1)
    assert mean_log(weights, likelihood, sample_weight) == pytest.approx(problem.value, abs=3e-4)


def test_a_model_that_is_better_everywhere_gets_all_the_weight():
    likelihood, sample_weight = likelihoods(4)
    likelihood[2] = likelihood.max(axis=0) + 0.2
    np.testing.assert_array_equal(mixture_weights(likelihood, sample_weight), np.eye(6)[2])


def test_models_that_complement_each_other_share():
    likelihood = np.array([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9], [0.3, 0.3, 0.3, 0.3]])
    np.testing.assert_allclose(mixture_weights(likelihood, np.ones(4)), [0.5, 0.5, 0.0], atol=0.01)
    assert mixture_weights(likelihood, np.array([3.0, 3.0, 1.0, 1.0]))[0] > 0.7


def test_copies_of_a_model_change_nothing():
    likelihood, sample_weight = likelihoods(5)
    weights = mixture_weights(likelihood, sample_weight)
    again = mixture_weights(np.concatenate([likelihood, np.repeat(likelihood[:1], 40, axis=0)]), sample_weight)
    assert np.count_nonzero(again) == np.count_nonzero(weights)
    assert again[0] + again[6:].sum() == pytest.approx(weights[0])
    np.testing.assert_allclose(again[1:6], weights[1:])


def test_samples_that_no_model_explains_or_that_weigh_nothing_have_no_say():
    likelihood, sample_weight = likelihoods(6)
    expected = mixture_weights(likelihood[:, 2:], sample_weight[2:])
    likelihood[:, 0], sample_weight[1] = 0.0, 0.0
    np.testing.assert_allclose(mixture_weights(likelihood, sample_weight), expected)
    np.testing.assert_allclose(mixture_weights(np.zeros((2, 3)), np.ones(3)).sum(), 1)


def test_no_weight_is_below_a_hundredth():
    rng = np.random.default_rng(7)
    weights = mixture_weights(rng.beta(5, 1, (60, 400)), np.ones(400))
    assert weights[weights > 0].min() >= 0.01
