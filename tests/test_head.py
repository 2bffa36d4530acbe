"""The ridge head against scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from _estimator_data import DEVICES, FakeFeatures, make_problem, standardize
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from estimators.head import RidgeHead
from estimators.head.solver import solve_ridge
from estimators.head.space import held_space
from estimators.training import Training


def head(X, y, weight, device="cpu", standardized=False, **options):
    layers, classes = np.zeros(X.shape[1], dtype=np.int64), np.arange(y.max() + 1)
    training = Training(X, layers, np.array(["X"], dtype=object), classes, y, weight)
    normalization = "standard" if standardized else None
    return RidgeHead(training, np.arange(X.shape[1]), normalization, torch.device(device), **options)


def fit(X, y, weight, C, device="cpu", standardized=False, **options):
    linear = head(X, y, weight, device, standardized, **options).fit(C)
    return linear.coef, linear.intercept


def solve(X, y, weight, C, **options):
    """Scores of the solver itself."""
    Z, targets = torch.as_tensor(X), torch.as_tensor(np.eye(y.max() + 1)[:, y])
    space = held_space([(slice(None), Z)], *X.shape, Z.device)
    solution = solve_ridge(space, targets, torch.as_tensor(weight), C, **options)
    return (space.scores(solution.coordinates) + solution.intercept[:, None]).T.numpy()


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
    one, similar = (head(columns, y, weight, standardized=True) for columns in (X, X[:, :-3]))
    cold, cold_offset = fit(X, y, weight, 0.1, standardized=True)
    one.fit(100.0)
    similar.fit(0.1)
    for start in (None, similar.solution):
        coef, offset, *_ = one.fit(0.1, start)
        np.testing.assert_allclose(X @ coef + offset, X @ cold + cold_offset, atol=1e-3)


@pytest.mark.parametrize("d", [10, 80])
def test_row_norms_are_those_of_standardised_features(d):
    X, y, weight = make_problem(9, n=30, d=d, k=3)
    X[:, 4] = 2.0
    linear = head(X, y, weight, standardized=True).fit(0.1)
    sd = np.sqrt(np.cov(X.T, aweights=weight, ddof=0).diagonal())
    np.testing.assert_allclose(linear.row_norms, np.linalg.norm(linear.coef, axis=1) * sd, atol=1e-9)
    assert linear.row_norms[4] == 0 < np.delete(linear.row_norms, 4).min()


@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
def test_sizes_beyond_the_largest_inverse_are_solved_with_a_diagonal(n, d):
    X, y, weight = make_problem(6, n=n, d=d, k=3)
    expected = solve(X, y, weight, 1.0)
    scores = solve(X, y, weight, 1.0, largest_inverse=5)
    np.testing.assert_allclose(scores, expected, atol=1e-3 * np.abs(expected).max())
    coef, intercept = fit(X, y, weight, 1.0)
    np.testing.assert_allclose(expected, X @ coef + intercept, atol=1e-6)


def test_no_convergence_is_a_warning():
    X, y, weight = make_problem(7)
    with pytest.warns(ConvergenceWarning, match="ridge head stopped"):
        solve(X, y, weight, 1.0, max_iter=2)


def test_products_that_overflow_are_an_error():
    X, y, weight = make_problem(7, n=20, d=30)
    with pytest.raises(ValueError, match="too large for the ridge head"):
        fit(X * 1e160, y, weight, 1.0)


@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
@pytest.mark.parametrize("max_bytes", [np.inf, 100])
def test_columns_beyond_max_bytes_are_read_in_blocks_with_the_same_result(n, d, max_bytes):
    X, y, weight = make_problem(8, n=n, d=d, k=3)
    X = X.astype(np.float32)
    expected, offset = fit(X, y, weight, 1.0, standardized=True)
    stored = FakeFeatures(X, (d - 7, 7))
    coef, intercept = fit(stored, y, weight, 1.0, standardized=True, max_bytes=max_bytes)
    np.testing.assert_allclose(coef, expected, atol=1e-6)
    np.testing.assert_allclose(intercept, offset, atol=1e-6)
    assert (stored.n_passes > 2) == (max_bytes < np.inf)


@pytest.mark.parametrize(("n", "d"), [(60, 10), (30, 80)])
def test_features_that_are_all_constant_leave_the_class_frequencies(n, d):
    _, y, weight = make_problem(10, n=n)
    coef, intercept = fit(np.full((n, d), 3.0), y, weight, 1.0, standardized=True)
    np.testing.assert_array_equal(coef, 0)
    np.testing.assert_allclose(softmax(intercept), np.bincount(y, weight) / weight.sum(), rtol=1e-12)
