"""Mixing weights against an independent optimum."""

import cvxpy as cp
import numpy as np
import pytest
from scipy.special import log_softmax

from estimators.mixture import drawn, held_out_scores, mixture_weights, share_to_predict

RATE = 5.0


def predictions(seed, n_models=6, n_samples=80, n_classes=3):
    """Log-probabilities of models that are right more often than not, each in its own way; codes; weights."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, n_classes, n_samples)
    scores = rng.normal(size=(n_models, n_samples, n_classes)) + 1.5 * np.eye(n_classes)[codes]
    scores *= rng.uniform(0.3, 2.0, (n_models, 1, 1))
    return log_softmax(scores, axis=2), codes, rng.uniform(0.1, 2.0, n_samples)


def frequencies(codes, n_classes=3, counts=None):
    """Logarithms of class frequencies for every sample; uniform where no counts are given."""
    counts = np.ones(n_classes) if counts is None else np.asarray(counts)
    return np.tile(np.log(counts / counts.sum()), (len(codes), 1))


def weights_of(log_probabilities, codes, sample_weight, base=None):
    base = frequencies(codes, log_probabilities.shape[2]) if base is None else base
    return mixture_weights(log_probabilities, base, codes, sample_weight)


def objective(weights, log_probabilities, codes, sample_weight, base=None):
    base = frequencies(codes, log_probabilities.shape[2]) if base is None else base
    mixed = log_softmax(base + np.tensordot(weights, log_probabilities - base, 1), axis=1)
    mean = np.average(mixed[np.arange(len(codes)), codes], weights=sample_weight)
    return mean - RATE / sample_weight.sum() * (weights.sum() + 0.01 * weights @ weights)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_weights_make_the_labels_more_likely(seed, n_classes):
    log_probabilities, codes, sample_weight = predictions(seed, n_classes=n_classes)
    base = frequencies(codes, n_classes, 1 + np.arange(n_classes))
    variable = cp.Variable(len(log_probabilities), nonneg=True)
    share, loss = sample_weight / sample_weight.sum(), 0
    for sample, code in enumerate(codes):
        scores = base[sample] + (log_probabilities[:, sample] - base[sample]).T @ variable
        loss += share[sample] * (cp.log_sum_exp(scores) - scores[code])
    prior = cp.sum(variable) + 0.01 * cp.sum_squares(variable)
    problem = cp.Problem(cp.Minimize(loss + RATE / sample_weight.sum() * prior))
    problem.solve(solver=cp.CLARABEL)
    weights = weights_of(log_probabilities, codes, sample_weight, base)
    assert objective(weights, log_probabilities, codes, sample_weight, base) == pytest.approx(-problem.value, abs=1e-3)
    np.testing.assert_allclose(weights, variable.value, atol=0.03)


def test_models_that_know_different_classes_share():
    codes = np.repeat(np.arange(4), 100)
    sure = np.full((2, 400, 4), 0.0)
    # One tells the first two classes from each other and from the rest, the other the last two.
    sure[0, np.arange(200), codes[:200]] = 4
    sure[0, 200:, 2:] = 3
    sure[1, np.arange(200, 400), codes[200:]] = 4
    sure[1, :200, :2] = 3
    chance = np.zeros((1, 400, 4))
    weights = weights_of(log_softmax(np.concatenate([sure, chance]), axis=2), codes, np.ones(400))
    assert weights[0] == pytest.approx(weights[1], rel=1e-3)
    assert weights[0] > 0.5
    assert weights[2] == 0


def test_weights_sharpen_models_that_are_less_sure_than_right():
    log_probabilities, codes, sample_weight = predictions(3, n_models=1, n_samples=2000)
    flat = log_softmax(0.2 * log_probabilities, axis=2)
    one, five = (weights_of(given, codes, sample_weight)[0] for given in (log_probabilities, flat))
    assert five == pytest.approx(5 * one, rel=0.05)


def test_copies_of_a_model_change_nothing():
    log_probabilities, codes, sample_weight = predictions(5)
    weights = weights_of(log_probabilities, codes, sample_weight)
    copies = np.concatenate([log_probabilities, np.repeat(log_probabilities[:1], 40, axis=0)])
    again = weights_of(copies, codes, sample_weight)
    np.testing.assert_array_equal(again, [*weights, *np.zeros(40)])


def test_a_sample_given_twice_weighs_twice():
    log_probabilities, codes, _ = predictions(2)
    times = 1 + np.arange(80) % 3
    repeated = np.repeat(log_probabilities, times, axis=1), np.repeat(codes, times), np.ones(times.sum())
    weights = weights_of(log_probabilities, codes, times.astype(np.float64))
    np.testing.assert_allclose(weights_of(*repeated), weights, rtol=1e-9)


def test_the_order_of_models_samples_and_classes_does_not_matter():
    log_probabilities, codes, sample_weight = predictions(6, n_classes=4)
    weights = weights_of(log_probabilities, codes, sample_weight)
    rng = np.random.default_rng(0)
    models, rows, classes = rng.permutation(6), rng.permutation(80), rng.permutation(4)
    moved = log_probabilities[models][:, rows][:, :, classes]
    again = weights_of(moved, np.argsort(classes)[codes][rows], sample_weight[rows])
    np.testing.assert_allclose(again, weights[models], rtol=1e-7)


def test_samples_that_weigh_nothing_have_no_say():
    log_probabilities, codes, sample_weight = predictions(7)
    expected = weights_of(log_probabilities[:, 10:], codes[10:], sample_weight[10:])
    sample_weight[:10] = 0.0
    log_probabilities[:, :10] = np.nan
    np.testing.assert_array_equal(weights_of(log_probabilities, codes, sample_weight), expected)
    np.testing.assert_array_equal(weights_of(log_probabilities, codes, np.zeros(80)), np.eye(6)[0])


@pytest.mark.parametrize("impossible", [-np.inf, -1e30, -745.0])
def test_classes_that_no_model_has_met_have_no_say(impossible):
    log_probabilities, codes, sample_weight = predictions(8, n_samples=400)
    log_probabilities[:, :40][:, np.arange(40), codes[:40]] = impossible
    weights = weights_of(log_probabilities, codes, sample_weight)
    np.testing.assert_array_equal(weights, weights_of(log_probabilities[:, 40:], codes[40:], sample_weight[40:]))
    one_knows = log_probabilities.copy()
    one_knows[2, :40] = log_probabilities[2, 40:80]
    assert np.isfinite(weights_of(one_knows, codes, sample_weight)).all()


def test_of_very_many_weak_models_some_have_weight():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 3000)
    scores = rng.normal(size=(150, 3000, 3)) + 0.05 * np.eye(3)[codes]
    weak = log_softmax(scores, axis=2)
    weights = weights_of(weak, codes, np.ones(3000))
    singles = [objective(one, weak, codes, np.ones(3000)) for one in np.eye(150)]
    assert objective(weights, weak, codes, np.ones(3000)) > max(singles)


def test_where_no_mixture_is_worth_its_weights_the_most_likely_model_predicts():
    codes = np.array([0, 1, 0, 1])
    right = np.log(np.array([[[0.6, 0.4], [0.4, 0.6]] * 2, [[0.9, 0.1], [0.1, 0.9]] * 2]))
    np.testing.assert_array_equal(weights_of(right, codes, np.ones(4)), [0, 1])


def test_models_that_are_worse_than_the_class_frequencies_get_nothing():
    codes = np.array([0, 1, 0, 1])
    wrong = np.log(np.array([[[0.4, 0.6], [0.6, 0.4]] * 2, [[0.1, 0.9], [0.9, 0.1]] * 2]))
    np.testing.assert_array_equal(weights_of(wrong, codes, np.ones(4)), [0, 0])
    codes = np.repeat([0, 1], [300, 900])
    base = frequencies(codes, 2, [1, 3])
    noise = log_softmax(base + np.random.default_rng(0).normal(size=(5, 1200, 2)), axis=2)
    assert weights_of(noise, codes, np.ones(1200), base).sum() < 0.3


def test_a_model_that_says_nothing_gets_nothing():
    """Though any negative weight of it would do."""
    log_probabilities, codes, sample_weight = predictions(10)
    nothing = np.full((1, 80, 3), np.log(1 / 3))
    weights = weights_of(np.concatenate([nothing, log_probabilities]), codes, sample_weight)
    np.testing.assert_allclose(weights, [0, *weights_of(log_probabilities, codes, sample_weight)], rtol=1e-9)
    np.testing.assert_array_equal(weights_of(nothing, codes, sample_weight), [0])


def test_no_weight_is_below_a_hundredth():
    log_probabilities, codes, sample_weight = predictions(9, n_models=60, n_samples=3000)
    weights = weights_of(log_probabilities, codes, sample_weight)
    assert weights[weights > 0].min() >= 0.01 * weights.sum()


@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-7])
def test_models_that_are_almost_the_same_share_what_one_would_have(apart):
    log_probabilities, codes, sample_weight = predictions(11, n_samples=300, n_classes=4)
    noise = apart * np.random.default_rng(0).normal(size=log_probabilities.shape)
    twice = np.concatenate([log_probabilities, log_softmax(log_probabilities + noise, axis=2)])
    weights, alone = (weights_of(given, codes, sample_weight) for given in (twice, log_probabilities))
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights[:6] + weights[6:], alone, atol=0.02)
    assert (
        objective(weights, twice, codes, sample_weight)
        >= objective(alone, log_probabilities, codes, sample_weight) - 1e-3
    )


def test_few_of_very_many_held_out_predictions_are_used():
    assert share_to_predict(300 * 1000 * 100) == 1
    share = share_to_predict(300 * 100_000 * 1000)
    assert 300 * share * 100_000 * 1000 * 8 == pytest.approx(2**28)


def test_samples_are_drawn_whatever_pattern_their_labels_follow():
    labels = np.arange(4000) % 40
    rows = np.arange(100, 3900)
    few = drawn(rows, 1 / 20)
    assert len(few) == 190
    assert (np.diff(few) > 0).all()
    assert set(few) <= set(rows)
    assert len(np.unique(labels[few])) > 35
    np.testing.assert_array_equal(drawn(rows, 1 / 20), few)
    np.testing.assert_array_equal(drawn(rows, 1.0), rows)


def held_out_problem(seed=4, n_folds=4):
    log_probabilities, codes, sample_weight = predictions(seed)
    return [log_probabilities, frequencies(codes), codes, sample_weight], np.arange(80) % n_folds


def test_scores_of_a_fold_do_not_depend_on_its_own_labels():
    problem, folds = held_out_problem()
    scores = held_out_scores(*problem, np.arange(80), folds)
    own = folds == 2
    problem[2] = np.where(own, (problem[2] + 1) % 3, problem[2])
    again = held_out_scores(*problem, np.arange(80), folds)
    np.testing.assert_array_equal(again[own], scores[own])
    assert np.abs(again[~own] - scores[~own]).max() > 1e-3
    (log_probabilities, base, codes, sample_weight), rest = held_out_problem()[0], ~own
    weights = mixture_weights(log_probabilities[:, rest], base[rest], codes[rest], sample_weight[rest])
    mixed = base[own] + np.tensordot(weights, log_probabilities[:, own] - base[own], 1)
    np.testing.assert_allclose(log_softmax(scores[own], axis=1), log_softmax(mixed, axis=1), atol=1e-12)


def test_a_sample_held_out_twice_has_no_say_in_its_own_scores():
    """As in repeated cross-validation."""
    problem, folds = held_out_problem()
    samples = np.where(np.arange(80) < 20, np.arange(80), np.arange(80) + 100)
    samples[40:60] = samples[:20]
    folds[:20], folds[20:40], folds[40:60], folds[60:] = 0, 1, 2, 3
    scores = held_out_scores(*problem, samples, folds)
    problem[2] = np.where(np.isin(samples, samples[:20]), (problem[2] + 1) % 3, problem[2])
    np.testing.assert_array_equal(held_out_scores(*problem, samples, folds)[:20], scores[:20])


def test_an_only_fold_is_scored_by_its_halves():
    problem, _ = held_out_problem()
    scores = held_out_scores(*problem, np.arange(80), np.zeros(80, dtype=int))
    different = []
    for sample in range(6):
        changed = [*problem[:2], problem[2].copy(), problem[3]]
        changed[2][sample] = (changed[2][sample] + 1) % 3
        again = held_out_scores(*changed, np.arange(80), np.zeros(80, dtype=int))
        np.testing.assert_array_equal(again[sample], scores[sample])
        different.append((again != scores).any(axis=1).sum())
    assert different == [40] * 6


def test_a_class_that_was_not_there_to_be_learned_stays_out():
    problem, folds = held_out_problem()
    problem[1][folds == 0, 2] = problem[0][:, folds == 0, 2] = -np.inf
    scores = held_out_scores(*problem, np.arange(80), folds)
    assert np.isneginf(scores[folds == 0, 2]).all()
    assert np.isfinite(scores[folds != 0]).all()
