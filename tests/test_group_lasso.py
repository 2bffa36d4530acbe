"""The path against an independent convex solver, and what must not change it."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from _estimator_data import DEVICES, FakeFeatures, cvxpy_optimum, gradient, kkt, make_problem, objective, standardize
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning

from estimators import group_lasso_path

CASES = [(2, 1.0, True), (3, 1.0, False), (4, 0.3, True), (5, 1.0, True), (3, 0.3, False), (2, 0.3, True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "rho", "fit_intercept"), CASES)
def test_objective_gap_and_kkt_against_cvxpy(k, rho, fit_intercept, device):
    X, y, weight = make_problem(20 + k, k=k)
    path = group_lasso_path(
        X,
        y,
        n_alphas=6,
        alpha_min_ratio=0.02,
        l1_ratio=rho,
        sample_weight=weight,
        fit_intercept=fit_intercept,
        tol=1e-11,
        device=device,
    )
    Z = standardize(X, weight, center=fit_intercept)
    null = path.objective[0]
    assert len(path.active[0]) == 0
    assert len(path.active[-1]) > 1
    for i in (1, 3, 5):
        alpha = path.alphas[i]
        best = cvxpy_optimum(Z, y, weight, alpha, rho, fit_intercept)
        assert path.objective[i] == pytest.approx(best, rel=1e-5)
        gap = path.relative_gap[i] * null
        assert gap >= path.objective[i] - best - 1e-7
        assert path.relative_gap[i] <= 1e-11
        # The returned coefficients, for X as given, say the same as the standardised problem's.
        sd = np.sqrt((weight / weight.sum()) @ (X - (weight / weight.sum()) @ X) ** 2)
        mean = (weight / weight.sum()) @ X * fit_intercept
        W, b = path.coef(i) * sd[:, None], path.intercepts[i] + mean @ path.coef(i)
        assert objective(Z, y, weight, W, b, alpha, rho) == pytest.approx(path.objective[i], rel=1e-10)
        np.testing.assert_allclose(path.row_norms(i), np.linalg.norm(W, axis=1), rtol=1e-9)
        G, slope = gradient(Z, y, weight, W, b)
        np.testing.assert_allclose(path.gradient_norms[i], np.linalg.norm(G, axis=1), rtol=1e-5)
        assert kkt(Z, y, weight, W, b, alpha, rho) < 1e-3
        assert kkt(Z, y, weight, W, b, alpha, rho) == pytest.approx(path.kkt_violation[i], rel=1e-3, abs=1e-9)
        if fit_intercept:
            assert np.abs(slope).max() < 1e-9
        else:
            np.testing.assert_array_equal(path.intercepts[i], 0)


def test_loose_tolerance_still_bounds_the_distance_to_the_optimum():
    X, y, weight = make_problem(11)
    path = group_lasso_path(X, y, n_alphas=8, alpha_min_ratio=0.02, sample_weight=weight, tol=3e-2)
    Z = standardize(X, weight)
    for i in range(1, 8):
        excess = path.objective[i] - cvxpy_optimum(Z, y, weight, path.alphas[i], 1.0, True)
        assert -1e-7 <= excess <= path.relative_gap[i] * path.objective[0] + 1e-7
        assert path.relative_gap[i] <= 3e-2


def test_ridge_alone_with_more_features_than_samples():
    X, y, weight = make_problem(12, n=30, d=90)
    path = group_lasso_path(X, y, alphas=[0.5, 0.05], l1_ratio=0.0, sample_weight=weight, standardize=False, tol=1e-8)
    for i, alpha in enumerate(path.alphas):
        assert path.objective[i] == pytest.approx(cvxpy_optimum(X, y, weight, alpha, 0.0, True), rel=1e-6)
    assert path.alpha_max == np.inf
    assert len(path.active[0]) == 90


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.sampled_from([0.4, 1.0]))
def test_row_order_class_names_and_weight_scale_do_not_matter(seed, rho):
    X, y, weight = make_problem(seed, n=30, d=8)
    options = dict(n_alphas=4, alpha_min_ratio=0.05, l1_ratio=rho, tol=1e-9)
    path = group_lasso_path(X, y, sample_weight=weight, **options)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    names = np.array(["dog", "ant", "cat"])
    other = group_lasso_path(X[order], names[y][order], sample_weight=37.5 * weight[order], **options)
    np.testing.assert_allclose(other.alphas, path.alphas, rtol=1e-9)
    np.testing.assert_allclose(other.objective, path.objective, rtol=1e-7)
    assert other.classes.tolist() == ["ant", "cat", "dog"]
    np.testing.assert_allclose(other.coef(3)[:, [2, 0, 1]], path.coef(3), atol=1e-2)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_column_scale_and_shift_do_not_matter_once_standardised(seed, data):
    X, y, weight = make_problem(seed, n=30, d=6)
    scale = np.array(data.draw(st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6)))
    options = dict(n_alphas=4, alpha_min_ratio=0.05, sample_weight=weight, tol=1e-8)
    path, other = (group_lasso_path(V, y, **options) for V in (X, X * scale + 5 * scale))
    np.testing.assert_allclose(other.alphas, path.alphas, rtol=1e-8)
    np.testing.assert_allclose(other.objective, path.objective, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_duplicated_and_constant_columns_leave_the_objective(seed):
    X, y, weight = make_problem(seed, n=30, d=6)
    options = dict(n_alphas=4, alpha_min_ratio=0.05, sample_weight=weight, tol=1e-8)
    path = group_lasso_path(X, y, **options)
    more = group_lasso_path(np.hstack([X, X[:, :3], np.full((30, 1), 1e3)]), y, **options)
    np.testing.assert_allclose(more.alphas, path.alphas, rtol=1e-10)
    np.testing.assert_allclose(more.objective, path.objective, rtol=1e-6)
    assert all(9 not in active for active in more.active)


def test_entry_order_is_the_first_alpha_with_weight():
    X, y, _ = make_problem(13)
    path = group_lasso_path(np.hstack([X, np.ones((len(X), 1))]), y, n_alphas=12, alpha_min_ratio=0.05)
    dense = np.array([np.linalg.norm(path.coef(i), axis=1) > 0 for i in range(12)])
    expected = np.where(dense.any(0), path.alphas[dense.argmax(0)], 0.0)
    np.testing.assert_array_equal(path.entry_order, expected)
    assert path.entry_order[-1] == 0
    assert len(set(path.entry_order)) > 4


def test_first_feature_enters_just_below_alpha_max():
    X, y, weight = make_problem(14)
    top = group_lasso_path(X, y, n_alphas=1, sample_weight=weight, tol=1e-9)
    assert top.alphas.tolist() == [top.alpha_max]
    path = group_lasso_path(X, y, alphas=np.array([0.99, 1.01, 1.5]) * top.alpha_max, sample_weight=weight, tol=1e-9)
    assert path.alphas.tolist() == sorted(path.alphas, reverse=True)
    assert [len(active) for active in path.active] == [0, 0, 1]


def test_rows_and_classes_of_zero_weight_are_left_out():
    X, y, weight = make_problem(15, n=60, k=4)
    weight[::3] = 0
    weight[y == 1] = 0
    options = dict(n_alphas=5, alpha_min_ratio=0.05, tol=1e-8)
    path = group_lasso_path(X, y, sample_weight=weight, **options)
    kept = weight > 0
    alone = group_lasso_path(X[kept], y[kept], sample_weight=weight[kept], **options)
    np.testing.assert_allclose(path.objective, alone.objective, rtol=1e-12)
    np.testing.assert_allclose(path.coef(4)[:, [0, 2, 3]], alone.coef(4), rtol=1e-9)
    np.testing.assert_array_equal(path.coef(4)[:, 1], 0)
    assert (path.intercepts[:, 1] == -np.inf).all()
    assert np.isfinite(path.intercepts[:, [0, 2, 3]]).all()


def test_nothing_varies():
    path = group_lasso_path(np.full((6, 3), 0.1), [0, 0, 1, 1, 1, 1], n_alphas=3)
    assert path.alpha_max == 0
    assert all(len(active) == 0 for active in path.active)
    np.testing.assert_allclose(path.relative_gap, 0, atol=1e-15)
    np.testing.assert_allclose(np.diff(path.intercepts), np.log(2))


@pytest.mark.parametrize("tol", [1e-4, 1e-7])
def test_float32_and_a_feature_matrix_give_the_same_path(tol):
    X, y, _ = make_problem(16, n=60, d=200)
    X = X.astype(np.float32)
    wide = group_lasso_path(X.astype(np.float64), y, n_alphas=6, alpha_min_ratio=0.05, tol=tol)
    for source in (X, torch.as_tensor(X), FakeFeatures(X, (120, 80)), FakeFeatures(X, (120, 80), scattered=True)):
        path = group_lasso_path(source, y, n_alphas=6, alpha_min_ratio=0.05, tol=tol)
        np.testing.assert_allclose(path.objective, wide.objective, atol=2 * tol)
        assert path.relative_gap.max() <= tol
        np.testing.assert_allclose(path.alphas, wide.alphas, rtol=1e-5)


def test_separable_data_at_small_alpha_warns_with_the_gap_reached():
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    X = rng.normal(size=(40, 30)) + 10 * y[:, None]
    with pytest.warns(ConvergenceWarning) as caught:
        path = group_lasso_path(X, y, alphas=[1e-6], tol=1e-9, max_iter=3)
    assert path.relative_gap[0] > 1e-9
    assert path.n_iter[0] == 3
    assert f"gap is {path.relative_gap[0]:.2e}" in str(caught[0].message)
    assert "1 of 1 alphas did not reach tol=1e-09 within max_iter=3 " in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert group_lasso_path(X, y, alphas=[1e-6], tol=1e-9).relative_gap[0] <= 1e-9


def test_a_tolerance_below_rounding_ends_with_a_warning_instead_of_using_up_max_iter():
    X, y, _ = make_problem(19)
    with pytest.warns(ConvergenceWarning, match="limits of rounding"):
        path = group_lasso_path(X, y, n_alphas=4, alpha_min_ratio=0.02, tol=1e-30, max_iter=10**6)
    assert path.relative_gap.max() < 1e-10
    assert path.n_iter.max() < 10**4


def test_the_path_pickles_and_holds_no_tensors():
    X, y, _ = make_problem(17)
    path = group_lasso_path(X, y, n_alphas=4)
    again = pickle.loads(pickle.dumps(path))
    np.testing.assert_array_equal(again.coef(3), path.coef(3))
    held = [item for value in vars(path).values() for item in (value if isinstance(value, list) else [value])]
    assert all(isinstance(item, (np.ndarray, float, int)) for item in held)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(l1_ratio=1.5), "'l1_ratio' parameter of group_lasso_path must be a float in the range"),
        (dict(l1_ratio=0.0), "l1_ratio=0 has no alpha_max"),
        (dict(tol=0.0), "'tol' parameter"),
        (dict(max_iter=0), "'max_iter' parameter"),
        (dict(alphas=[0.1, -1.0]), "alphas must be a non-empty 1-d sequence of positive"),
        (dict(alphas=[]), "alphas must be"),
        (dict(sample_weight=[1.0, 2.0]), r"sample_weight must have shape \(40,\), got \(2,\)"),
        (dict(sample_weight=-np.ones(40)), "sample_weight must be finite, non-negative"),
        (dict(sample_weight=np.zeros(40)), "not all zero"),
        (dict(y=np.zeros(40)), "at least two classes with positive weight, got 1 class"),
        (dict(y=np.arange(39) % 2), "y must have one label per row of X: got 39 labels for 40 rows"),
        (dict(y=np.linspace(0, 1, 40)), "Unknown label type"),
        (dict(X=np.zeros(40)), r"X must have shape \(n_samples, n_features\)"),
        (dict(X=np.array([["a"]] * 40)), "X must hold real numbers"),
        (dict(X=np.full((40, 2), np.nan)), "NaN or infinity in column 0"),
        (dict(device="tpu"), "device='tpu' cannot be used here"),
    ],
)
def test_errors_name_the_argument(change, message):
    X, y, _ = make_problem(18)
    options = dict(X=X, y=y) | change
    with pytest.raises(ValueError, match=message):
        group_lasso_path(**options)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(6, 50),
    d=st.integers(1, 70),
    k=st.integers(2, 5),
    rho=st.sampled_from([0.05, 0.5, 1.0]),
    tol=st.sampled_from([1e-3, 1e-9]),
    standardized=st.booleans(),
    spread=st.floats(0.0, 3.0),
)
def test_every_point_of_any_path_is_certified(seed, n, d, k, rho, tol, standardized, spread):
    X, y, weight = make_problem(seed, n, d, k)
    X = X * np.random.default_rng(seed).lognormal(0, spread, d)
    options = dict(n_alphas=6, alpha_min_ratio=5e-3, l1_ratio=rho, sample_weight=weight, tol=tol)
    path = group_lasso_path(X, y, standardize=standardized, **options)
    assert path.relative_gap.max() <= tol
