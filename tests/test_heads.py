"""The ridge head against scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from _estimator_data import DEVICES, make_problem, standardize
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from estimators.kept import KeptFeatures, RidgeHead


def fit(X, y, weight, C, device="cpu", standardized=False, **options):
    kept = KeptFeatures(X, np.arange(X.shape[1]), np.zeros(X.shape[1], dtype=np.int64), "", **options)
    return RidgeHead(kept, y, int(y.max()) + 1, weight, standardized, torch.device(device)).fit(C)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_head_is_the_logistic_regression_of_scikit_learn(n, d, k, C, dtype, device):
    X, y, weight = make_problem(0, n=n, d=d, k=k)
    coef, intercept = fit(X.astype(dtype), y, weight, C, device)
    reference = LogisticRegression(C=C, tol=1e-10, max_iter=100_000).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(softmax(X @ coef + intercept, axis=1), reference.predict_proba(X), atol=2e-3)


def objective(X, y, weight, C, coef, intercept):
    scores = X @ coef + intercept
    loss = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(y)), y]
    return C * weight @ loss + 0.5 * (coef**2).sum()


@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
def test_objective_is_within_a_millionth_of_the_optimum(n, d):
    X, y, weight = make_problem(1, n=n, d=d, k=3)
    reference = LogisticRegression(C=0.5, tol=1e-12, max_iter=100_000).fit(X, y, sample_weight=weight)
    best = objective(X, y, weight, 0.5, reference.coef_.T, reference.intercept_)
    coef, intercept = fit(X, y, weight, 0.5)
    null = objective(X, y, weight, 0.5, 0 * coef, np.log(np.bincount(y, weight)))
    assert objective(X, y, weight, 0.5, coef, intercept) - best <= 1.1e-6 * null


def test_weights_are_repetitions_and_rows_of_zero_weight_are_not_there():
    X, y, _ = make_problem(2, n=40, d=60, k=3)
    counts = np.random.default_rng(0).integers(0, 4, len(y)).astype(float)
    counts[y == 2] = 0
    repeated = np.repeat(np.arange(len(y)), counts.astype(int))
    weighted, _ = fit(X, y, counts, 1.0, standardized=True)
    plain, _ = fit(X[repeated], y[repeated], np.ones(len(repeated)), 1.0, standardized=True)
    np.testing.assert_allclose(weighted[:, :2], plain, atol=1e-4)
    np.testing.assert_array_equal(weighted[:, 2], 0)


def test_a_class_without_weight_is_never_predicted():
    X, y, weight = make_problem(3, k=3)
    _, intercept = fit(X, y, weight * (y != 1), 1.0)
    assert intercept[1] == -np.inf
    assert np.isfinite(intercept[[0, 2]]).all()


@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
def test_standardising_within_is_standardising_before(n, d):
    X, y, weight = make_problem(4, n=n, d=d, k=3)
    X[:, 3] = 7.0
    coef, intercept = fit(X, y, weight, 0.3, standardized=True)
    with np.errstate(invalid="ignore"):
        Z = np.nan_to_num(standardize(X, weight))
    expected, offset = fit(Z, y, weight, 0.3)
    np.testing.assert_allclose(X @ coef + intercept, Z @ expected + offset, atol=1e-5)
    np.testing.assert_array_equal(coef[3], 0)


@pytest.mark.parametrize("d", [10, 80])
def test_a_solution_is_the_same_from_any_start(d):
    X, y, weight = make_problem(5, n=30, d=d, k=3)
    kept = KeptFeatures(X, np.arange(d), np.zeros(d, dtype=np.int64), "")
    fewer = KeptFeatures(X, np.arange(d - 3), np.zeros(d, dtype=np.int64), "")
    head, similar = (RidgeHead(columns, y, 3, weight, True, torch.device("cpu")) for columns in (kept, fewer))
    cold, cold_offset = fit(X, y, weight, 0.1, standardized=True)
    head.fit(100.0)
    similar.fit(0.1)
    for start in (None, similar.solution):
        coef, offset = head.fit(0.1, start)
        np.testing.assert_allclose(X @ coef + offset, X @ cold + cold_offset, atol=1e-3)


def test_known_moments_are_those_of_the_features():
    X, y, weight = make_problem(9, n=30, d=80, k=3)
    expected, offset = fit(X, y, weight, 0.1, standardized=True)
    mean = weight @ X / weight.sum()
    deviation = np.sqrt(weight @ (X - mean) ** 2 / weight.sum())
    kept = KeptFeatures(X, np.arange(80), np.zeros(80, dtype=np.int64), "")
    coef, intercept = RidgeHead(kept, y, 3, weight, True, torch.device("cpu"), (mean, 1 / deviation)).fit(0.1)
    np.testing.assert_allclose(coef, expected, atol=1e-9)
    np.testing.assert_allclose(intercept, offset, atol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
def test_columns_beyond_the_largest_inverse_are_solved_with_a_diagonal(n, d, monkeypatch):
    X, y, weight = make_problem(6, n=n, d=d, k=3)
    expected, _ = fit(X, y, weight, 1.0)
    monkeypatch.setattr("estimators.heads._LARGEST_INVERSE", 5)
    coef, _ = fit(X, y, weight, 1.0)
    np.testing.assert_allclose(coef, expected, atol=1e-3 * np.abs(expected).max())


def test_no_convergence_is_a_warning(monkeypatch):
    X, y, weight = make_problem(7)
    monkeypatch.setattr("estimators.heads._MAX_ITER", 2)
    with pytest.warns(ConvergenceWarning, match="ridge head stopped"):
        fit(X, y, weight, 1.0)


def test_products_that_overflow_are_an_error():
    X, y, weight = make_problem(7, n=20, d=30)
    with pytest.raises(ValueError, match="too large for the ridge head"):
        fit(X * 1e160, y, weight, 1.0)


@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
def test_columns_beyond_max_bytes_are_read_in_blocks_with_the_same_result(n, d, monkeypatch):
    X, y, weight = make_problem(8, n=n, d=d, k=3)
    expected, _ = fit(X, y, weight, 1.0, standardized=True)
    monkeypatch.setattr("estimators.kept._BLOCK_BYTES", 8 * n * 7)
    coef, _ = fit(X, y, weight, 1.0, standardized=True)
    np.testing.assert_allclose(coef, expected, atol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
def test_features_that_are_all_constant_leave_the_class_frequencies(n, d):
    _, y, weight = make_problem(10, n=n)
    coef, intercept = fit(np.full((n, d), 3.0), y, weight, 1.0, standardized=True)
    np.testing.assert_array_equal(coef, 0)
    np.testing.assert_allclose(softmax(intercept), np.bincount(y, weight) / weight.sum(), rtol=1e-12)
