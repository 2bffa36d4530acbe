"""The path against an independent convex solver and an independent certificate, and what must not change it."""

import pickle
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from _estimator_data import (
    DEVICES,
    FakeFeatures,
    certificate,
    cvxpy_optimum,
    gradient,
    kkt,
    make_problem,
    objective,
    standardize,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning

from estimators import group_lasso_path

CASES = [
    # classes, l1_ratio, fit_intercept, features
    (2, 1.0, True, 10),
    (2, 0.7, True, 60),
    (3, 1.0, False, 10),
    (3, 0.7, True, 10),
    (3, 1.0, True, 60),
    (4, 0.3, False, 10),
    (10, 1.0, True, 10),
    (10, 0.7, True, 20),
]


def correlated_problem(seed, n=40, d=10, k=3):
    """Every column half what its neighbour is."""
    X, y, weight = make_problem(seed, n, d, k)
    for j in range(1, d):
        X[:, j] = 0.7 * X[:, j - 1] + 0.7 * X[:, j]
    return X, y, weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "rho", "fit_intercept", "d"), CASES)
def test_objective_is_within_its_tolerance_of_an_interior_point_method(k, rho, fit_intercept, d, device):
    X, y, weight = correlated_problem(20 + k, d=d, k=k)
    options = dict(l1_ratio=rho, sample_weight=weight, fit_intercept=fit_intercept, tol=1e-7, device=device)
    path = group_lasso_path(X, y, n_alphas=6, alpha_min_ratio=0.02, **options)
    Z = standardize(X, weight, center=fit_intercept)
    null = path.objective[0]
    assert len(path.active[0]) == 0
    assert len(path.active[-1]) > 1
    assert path.relative_gap.max() <= 1e-7
    for i in (2, 5):
        best, _, _ = cvxpy_optimum(Z, y, weight, path.alphas[i], rho, fit_intercept, accuracy=1e-9)
        assert (path.objective[i] - best) / null <= 1e-6
        assert path.relative_gap[i] * null >= path.objective[i] - best - 1e-8


@pytest.mark.parametrize(("k", "rho"), [(2, 1.0), (3, 0.7), (3, 1.0), (10, 1.0)])
def test_coefficients_are_those_of_an_interior_point_method_where_they_are_unique(k, rho):
    X, y, weight = make_problem(k, n=120, d=8, k=k)
    X = standardize(X, weight)
    path = group_lasso_path(X, y, alphas=[0.03], l1_ratio=rho, sample_weight=weight, standardize=False, tol=1e-11)
    _, W, b = cvxpy_optimum(X, y, weight, 0.03, rho, True, accuracy=1e-9)
    np.testing.assert_allclose(path.coef(0), W, atol=1e-4)
    np.testing.assert_allclose(path.intercepts[0], b, atol=1e-4)
    loose = group_lasso_path(X, y, alphas=[0.03], l1_ratio=rho, sample_weight=weight, standardize=False, tol=1e-7)
    np.testing.assert_allclose(loose.coef(0), W, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("standardized", [True, False])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("rho", [1.0, 0.7])
@pytest.mark.parametrize(
    ("dtype", "tol", "rounding"),
    [(np.float64, 1e-8, 1e-12), (np.float32, 1e-8, 1e-12), (np.float32, 1e-5, 1e-6), (np.float16, 1e-4, 1e-6)],
)
def test_certificate_is_that_of_the_coefficients_returned(
    dtype, tol, rounding, rho, fit_intercept, standardized, device
):
    X, y, weight = make_problem(1, n=100, d=150, k=4)
    X[:, 3], X[:, 5] = 0.0, 0.25
    X = X.astype(dtype)
    options = dict(l1_ratio=rho, fit_intercept=fit_intercept, standardize=standardized)
    path = group_lasso_path(
        X, y, n_alphas=5, alpha_min_ratio=0.02, sample_weight=weight, tol=tol, device=device, **options
    )
    assert len(path.active[-1]) > 20
    for i in range(5):
        value, gap = certificate(X, y, weight, path, i, rho, fit_intercept, standardized)
        assert gap <= tol + rounding
        assert gap == pytest.approx(path.relative_gap[i], abs=rounding)
        assert value == pytest.approx(path.objective[i], rel=max(1e-12, 1e-2 * rounding))


@pytest.mark.parametrize(("share", "tol"), [(1e-4, 1e-5), (1e-7, 1e-4)])
def test_certificate_in_float32_holds_at_a_tiny_fraction_of_alpha_max(share, tol):
    """There a gradient is next to nothing beside what it is the sum of: rounding standardised values would show."""
    X, y, _ = make_problem(0, n=1000, d=20)
    y = np.where(np.arange(1000) % 3, y, np.random.default_rng(0).permutation(y))
    X = X.astype(np.float32)
    path = group_lasso_path(X, y, n_alphas=2, alpha_min_ratio=share, tol=tol)
    _, gap = certificate(X, y, np.ones(1000), path, 1, 1.0, True, True)
    assert gap == pytest.approx(path.relative_gap[1], abs=1e-6)
    X, y, _ = make_problem(0, n=4, d=1, k=4)
    X = (X + 82 * (y[:, None] == 0)).astype(np.float32)
    path = group_lasso_path(X, y, n_alphas=2, alpha_min_ratio=share, tol=tol)
    _, gap = certificate(X, y, np.ones(4), path, 1, 1.0, True, True)
    assert gap == pytest.approx(path.relative_gap[1], abs=1e-6)


def test_the_half_precision_types_hold_x_without_changing_the_path():
    X, y, weight = make_problem(2, n=60, d=100)
    X = X.astype(np.float16)
    options = dict(n_alphas=5, alpha_min_ratio=0.05, sample_weight=weight)
    path, narrow = (group_lasso_path(X, y, dtype=dtype, **options) for dtype in ("float32", "float16"))
    np.testing.assert_allclose(narrow.objective, path.objective, atol=1e-4)
    value, gap = certificate(X, y, weight, narrow, 4, 1.0, True, True)
    assert gap <= 1e-4 + 1e-6
    assert value == pytest.approx(narrow.objective[4], rel=1e-8)


def test_what_is_reported_of_the_standardised_problem_follows_from_the_coefficients():
    X, y, weight = make_problem(3)
    p = weight / weight.sum()
    Z, sd = standardize(X, weight), np.sqrt(p @ (X - p @ X) ** 2)
    path = group_lasso_path(X, y, n_alphas=5, alpha_min_ratio=0.02, l1_ratio=0.6, sample_weight=weight, tol=1e-9)
    for i in range(1, 5):
        W, b = path.coef(i) * sd[:, None], path.intercepts[i] + (p @ X) @ path.coef(i)
        assert objective(Z, y, weight, W, b, path.alphas[i], 0.6) == pytest.approx(path.objective[i], rel=1e-10)
        np.testing.assert_allclose(path.row_norms(i), np.linalg.norm(W, axis=1), rtol=1e-9)
        G, slope = gradient(Z, y, weight, W, b)
        np.testing.assert_allclose(path.gradient_norms[i], np.linalg.norm(G, axis=1), rtol=1e-6)
        violation = kkt(Z, y, weight, W, b, path.alphas[i], 0.6)
        assert violation == pytest.approx(path.kkt_violation[i], rel=1e-3, abs=1e-10)
        assert np.abs(slope).max() < 1e-11
    without = group_lasso_path(X, y, n_alphas=3, fit_intercept=False)
    np.testing.assert_array_equal(without.intercepts, 0)


def test_loose_tolerance_still_bounds_the_distance_to_the_optimum():
    X, y, weight = make_problem(11)
    path = group_lasso_path(X, y, n_alphas=5, alpha_min_ratio=0.02, sample_weight=weight, tol=3e-2)
    Z = standardize(X, weight)
    for i in range(1, 5):
        excess = path.objective[i] - cvxpy_optimum(Z, y, weight, path.alphas[i], 1.0, True)[0]
        assert -1e-7 <= excess <= path.relative_gap[i] * path.objective[0] + 1e-7
        assert path.relative_gap[i] <= 3e-2


@pytest.mark.parametrize(("tol", "n", "d"), [(1e-3, 40, 200), (1e-4, 60, 200), (1e-4, 200, 50), (1e-7, 60, 100)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_satisfy_the_optimality_conditions_in_proportion_to_the_tolerance(tol, n, d, dtype):
    X, y, weight = correlated_problem(4, n, d, k=4)
    path = group_lasso_path(X.astype(dtype), y, n_alphas=10, alpha_min_ratio=0.02, sample_weight=weight, tol=tol)
    assert path.kkt_violation.max() <= 200 * tol


def test_ridge_alone_with_more_features_than_samples():
    X, y, weight = make_problem(12, n=30, d=90)
    path = group_lasso_path(X, y, alphas=[0.5, 0.05], l1_ratio=0.0, sample_weight=weight, standardize=False, tol=1e-8)
    for i, alpha in enumerate(path.alphas):
        assert path.objective[i] == pytest.approx(cvxpy_optimum(X, y, weight, alpha, 0.0, True)[0], rel=1e-6)
    assert path.alpha_max == np.inf
    assert len(path.active[0]) == 90


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.sampled_from([0.4, 1.0]), scale=st.floats(1e-30, 1e30))
def test_order_of_rows_and_columns_class_names_and_weight_scale_do_not_matter(seed, rho, scale):
    X, y, weight = make_problem(seed, n=30, d=8)
    options = dict(n_alphas=4, alpha_min_ratio=0.05, l1_ratio=rho, tol=1e-9)
    path = group_lasso_path(X, y, sample_weight=weight, **options)
    rng = np.random.default_rng(seed)
    order, columns = rng.permutation(len(y)), rng.permutation(8)
    names = np.array(["dog", "ant", "cat"])
    other = group_lasso_path(X[order][:, columns], names[y][order], sample_weight=scale * weight[order], **options)
    np.testing.assert_allclose(other.alphas, path.alphas, rtol=1e-9)
    np.testing.assert_allclose(other.objective, path.objective, rtol=1e-8)
    assert other.classes.tolist() == ["ant", "cat", "dog"]
    np.testing.assert_allclose(other.coef(3)[:, [2, 0, 1]], path.coef(3)[columns], atol=1e-2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_column_scale_and_shift_do_not_matter_once_standardised(seed, data):
    X, y, weight = make_problem(seed, n=30, d=6)
    scale = np.array(data.draw(st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6)))
    options = dict(n_alphas=4, alpha_min_ratio=0.05, sample_weight=weight, tol=1e-8)
    path, other = (group_lasso_path(V, y, **options) for V in (X, X * scale + 5 * scale))
    np.testing.assert_allclose(other.alphas, path.alphas, rtol=1e-8)
    np.testing.assert_allclose(other.objective, path.objective, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.sampled_from([0.4, 1.0]))
def test_repeating_rows_is_weighting_them(seed, rho):
    X, y, _ = make_problem(seed, n=25, d=8)
    times = np.random.default_rng(seed).integers(1, 4, len(y))
    options = dict(n_alphas=4, alpha_min_ratio=0.05, l1_ratio=rho, tol=1e-10)
    path = group_lasso_path(X, y, sample_weight=times, **options)
    repeated = group_lasso_path(np.repeat(X, times, axis=0), np.repeat(y, times), **options)
    np.testing.assert_allclose(repeated.alphas, path.alphas, rtol=1e-9)
    np.testing.assert_allclose(repeated.objective, path.objective, rtol=1e-9)
    np.testing.assert_allclose(repeated.predict_logits(X, 3), path.predict_logits(X, 3), atol=1e-2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_duplicated_and_constant_columns_leave_objective_and_logits(seed):
    X, y, weight = make_problem(seed, n=30, d=6)
    options = dict(n_alphas=4, alpha_min_ratio=0.05, sample_weight=weight, tol=1e-11)
    path = group_lasso_path(X, y, **options)
    wide = np.hstack([X, X[:, :3], np.full((30, 1), 1e3), np.zeros((30, 1))])
    more = group_lasso_path(wide, y, **options)
    np.testing.assert_allclose(more.alphas, path.alphas, rtol=1e-10)
    np.testing.assert_allclose(more.objective, path.objective, rtol=1e-9)
    for i in range(4):
        np.testing.assert_allclose(more.predict_logits(wide, i), path.predict_logits(X, i), atol=1e-3)
        assert not np.isin([9, 10], more.active[i]).any()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 50),
    d=st.integers(1, 70),
    k=st.integers(2, 5),
    rho=st.sampled_from([0.05, 0.5, 1.0]),
    tol=st.sampled_from([1e-3, 1e-9]),
    standardized=st.booleans(),
    fit_intercept=st.booleans(),
    spread=st.floats(0.0, 3.0),
)
def test_every_point_of_any_path_is_certified(seed, n, d, k, rho, tol, standardized, fit_intercept, spread):
    """Down to two samples, as many classes as samples, and a single feature."""
    k = min(n, k)
    X, y, weight = make_problem(seed, n, d, k)
    X = X * np.random.default_rng(seed).lognormal(0, spread, d)
    options = dict(l1_ratio=rho, standardize=standardized, fit_intercept=fit_intercept)
    path = group_lasso_path(X, y, n_alphas=6, alpha_min_ratio=5e-3, sample_weight=weight, tol=tol, **options)
    assert path.relative_gap.max() <= tol
    for i in range(6):
        value, gap = certificate(X, y, weight, path, i, rho, fit_intercept, standardized)
        assert gap == pytest.approx(path.relative_gap[i], abs=1e-10)
        assert value == pytest.approx(path.objective[i], rel=1e-9)


@pytest.mark.parametrize(("n", "k", "d"), [(6, 2, 20), (10, 2, 1000), (20, 2, 500), (9, 3, 300)])
@pytest.mark.parametrize("grid", [dict(n_alphas=12), dict(n_alphas=3)])
def test_a_handful_of_samples_and_many_features(n, k, d, grid):
    """More rows move at once than the samples tell apart, so that the loss does not bend along some of them."""
    rng = np.random.default_rng(n)
    y = np.arange(n) % k
    X = rng.normal(size=(n, d)).astype(np.float32) + y[:, None] * (np.arange(d) < 20)
    path = group_lasso_path(X, y, **grid)
    assert path.relative_gap.max() <= 1e-4
    assert certificate(X, y, np.ones(n), path, -1, 1.0, True, True)[1] <= 1e-4 + 1e-6


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
    assert (path.predict_logits(X, 4)[:, 1] == -np.inf).all()


def test_nothing_varies():
    path = group_lasso_path(np.full((6, 3), 0.1), [0, 0, 1, 1, 1, 1], n_alphas=3)
    assert path.alpha_max == 0
    assert all(len(active) == 0 for active in path.active)
    np.testing.assert_allclose(path.relative_gap, 0, atol=1e-12)
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("subset", [False, True])
def test_a_path_that_reads_x_at_every_pass_is_that_of_x_in_memory(subset, scattered, device):
    X, y, weight = make_problem(5, n=60, d=300)
    if subset:
        weight[::4] = 0
    options = dict(n_alphas=8, alpha_min_ratio=0.02, sample_weight=weight, device=device)
    held, streamed = (FakeFeatures(X, (100, 50, 150), scattered=scattered) for _ in range(2))
    path = group_lasso_path(held, y, **options)
    assert held.n_passes == 1
    for memory in (10_000, "40 kB"):
        before = streamed.n_passes
        other = group_lasso_path(streamed, y, max_memory=memory, **options)
        np.testing.assert_allclose(other.objective, path.objective, rtol=1e-5)
        np.testing.assert_allclose(other.alphas, path.alphas, rtol=1e-6)
        assert other.relative_gap.max() <= 1e-4
        rows = weight > 0
        value, gap = certificate(held.values[rows], y[rows], weight[rows], other, 7, 1.0, True, True)
        assert gap == pytest.approx(other.relative_gap[7], abs=1e-6)
        assert value == pytest.approx(other.objective[7], rel=1e-8)
        assert streamed.n_passes - before >= 2 + other.n_passes.sum()


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


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(4, 40),
    d=st.integers(1, 80),
    k=st.integers(2, 4),
    apart=st.floats(0, 100),
    share=st.sampled_from([1e-4, 1e-7, 1e-10]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@example(seed=0, n=4, d=4, k=2, apart=0.0, share=1e-7, dtype=np.float32)
@example(seed=0, n=4, d=1, k=4, apart=0.0, share=1e-10, dtype=np.float32)
def test_at_very_small_alpha_either_the_tolerance_is_reached_or_a_warning_states_the_gap(
    seed, n, d, k, apart, share, dtype
):
    X, y, _ = make_problem(seed, n, d, k)
    X = (X + apart * (y[:, None] == np.arange(d) % k)).astype(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = group_lasso_path(X, y, alpha_min_ratio=share, n_alphas=2)
    assert all(warning.category is ConvergenceWarning for warning in caught)
    assert bool(caught) == (path.relative_gap.max() > 1e-4)
    assert not caught or f"gap is {path.relative_gap.max():.2e}" in str(caught[0].message)
    value, gap = certificate(X, y, np.ones(n), path, 1, 1.0, True, True)
    assert gap == pytest.approx(path.relative_gap[1], rel=1e-2, abs=1e-5)
    assert value == pytest.approx(path.objective[1], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("share", [None, 10.0])
def test_a_tolerance_below_rounding_ends_with_a_warning_instead_of_using_up_max_iter(share):
    X, y, _ = make_problem(19)
    largest = group_lasso_path(X, y, n_alphas=1).alpha_max
    alphas = largest * (np.geomspace(1, 0.02, 4) if share is None else np.array([share]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = group_lasso_path(X, y, alphas=alphas, tol=1e-30, max_iter=10**6)
    assert path.relative_gap.max() < 1e-10
    assert path.n_iter.max() < 10**4
    assert not (path.relative_gap > 1e-30).any() or "limits of rounding" in str(caught[0].message)


@pytest.mark.parametrize("device", DEVICES)
def test_a_path_warm_started_from_a_coarser_one_is_as_good_and_quicker_to_begin(device):
    X, y, weight = make_problem(21, n=80, d=200, k=4)
    options = dict(sample_weight=weight, l1_ratio=0.9, device=device)
    coarse = group_lasso_path(X, y, n_alphas=6, alpha_min_ratio=0.01, **options)
    alphas = coarse.alpha_max * np.array([0.009, 0.008])
    cold = group_lasso_path(X, y, alphas=alphas, tol=1e-6, **options)
    warm = group_lasso_path(X, y, alphas=alphas, tol=1e-6, warm_start=coarse, **options)
    assert warm.relative_gap.max() <= 1e-6
    np.testing.assert_allclose(warm.objective, cold.objective, atol=1e-6 * np.log(4))
    assert warm.n_iter[0] < cold.n_iter[0]
    same = group_lasso_path(X, y, alphas=coarse.alphas[-1:], warm_start=coarse, **options)
    assert same.n_iter.tolist() == [0]
    np.testing.assert_allclose(same.coef(0), coarse.coef(5), rtol=1e-9)


def test_a_warm_start_worse_than_zero_does_no_harm():
    X, y, weight = make_problem(22, n=60, d=30)
    other = group_lasso_path(1e-3 * X[:, ::-1].copy(), (y + 1) % 3, n_alphas=5, alpha_min_ratio=1e-3)
    options = dict(n_alphas=5, alpha_min_ratio=0.02, sample_weight=weight)
    cold, warm = group_lasso_path(X, y, **options), group_lasso_path(X, y, warm_start=other, **options)
    np.testing.assert_allclose(warm.objective, cold.objective, rtol=1e-12)


def test_a_warm_start_may_lack_a_class_that_now_has_weight():
    X, y, weight = make_problem(23)
    some = group_lasso_path(X, y, n_alphas=5, sample_weight=weight * (y != 1))
    path = group_lasso_path(X, y, alphas=[0.05], sample_weight=weight, warm_start=some)
    assert path.relative_gap[0] <= 1e-4
    assert np.isfinite(path.intercepts).all()
    back = group_lasso_path(X, y, alphas=[0.05], sample_weight=weight * (y != 1), warm_start=path)
    assert back.relative_gap[0] <= 1e-4


def test_a_warm_start_for_another_problem_is_refused():
    X, y, _ = make_problem(24)
    path = group_lasso_path(X, y, n_alphas=2)
    with pytest.raises(ValueError, match="warm_start must be a path for 9 features and the classes"):
        group_lasso_path(X[:, :9], y, warm_start=path)
    with pytest.raises(ValueError, match=r"for 10 features and the classes \['a' 'b' 'c'\], got one .*\[0 1 2\]"):
        group_lasso_path(X, np.array(["a", "b", "c"])[y], warm_start=path)
    with pytest.raises(ValueError, match="'warm_start' parameter"):
        group_lasso_path(X, y, warm_start=path.coef(0))


def test_the_callback_sees_every_alpha_in_order_as_it_is_solved():
    X, y, _ = make_problem(25)
    seen = []
    path = group_lasso_path(X, y, n_alphas=5, callback=seen.append)
    assert [point.index for point in seen] == list(range(5))
    for name, values in (
        ("alpha", path.alphas),
        ("n_active", [len(active) for active in path.active]),
        ("objective", path.objective),
        ("relative_gap", path.relative_gap),
        ("n_iter", path.n_iter),
        ("n_passes", path.n_passes),
        ("seconds", path.seconds),
    ):
        np.testing.assert_array_equal([getattr(point, name) for point in seen], values)


def test_a_true_value_from_the_callback_ends_the_path_there():
    X, y, _ = make_problem(26)
    whole = group_lasso_path(X, y, n_alphas=6)
    path = group_lasso_path(X, y, n_alphas=6, callback=lambda point: point.n_active >= 3)
    count = len(path.alphas)
    assert 1 < count < 6
    assert len(path.active[-1]) >= 3 > len(path.active[-2])
    np.testing.assert_array_equal(path.alphas, whole.alphas[:count])
    np.testing.assert_array_equal(path.objective, whole.objective[:count])
    assert_shapes(path, count, 10, 3)


def test_verbose_prints_a_line_per_alpha(capsys):
    X, y, _ = make_problem(27)
    group_lasso_path(X, y, n_alphas=4)
    assert capsys.readouterr() == ("", "")
    path = group_lasso_path(X, y, n_alphas=4, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for i, line in enumerate(lines):
        assert line.startswith(f"alpha {i + 1}/4 = {path.alphas[i]:.4g}: {len(path.active[i])} active")
        assert f"{path.n_iter[i]} steps, {path.n_passes[i]} passes" in line


def assert_shapes(path, n_alphas, n_features, n_classes):
    for name in ("alphas", "objective", "relative_gap", "kkt_violation", "seconds"):
        assert getattr(path, name).shape == (n_alphas,)
        assert getattr(path, name).dtype == np.float64
    for name in ("n_iter", "n_passes"):
        assert getattr(path, name).shape == (n_alphas,)
        assert getattr(path, name).dtype == np.int64
    assert path.intercepts.shape == (n_alphas, n_classes)
    assert path.gradient_norms.shape == (n_alphas, n_features)
    assert len(path.active) == len(path.active_coefs) == len(path.active_norms) == n_alphas
    for active, coefs, norms in zip(path.active, path.active_coefs, path.active_norms, strict=True):
        assert active.dtype == np.int64
        assert (np.diff(active) > 0).all()
        assert coefs.shape == (len(active), n_classes)
        assert norms.shape == (len(active),)
        assert (norms > 0).all()


def test_what_is_returned_has_the_documented_shapes_and_counts():
    X, y, _ = make_problem(28, d=30)
    path = group_lasso_path(X, y, n_alphas=7)
    assert_shapes(path, 7, 30, 3)
    assert path.coef(6).shape == (30, 3)
    assert (path.n_iter >= 0).all()
    assert path.n_iter[0] == path.n_passes[0] == 0
    assert (path.n_passes[1:] >= 1).all()
    assert (path.n_passes <= path.n_iter).all()
    assert (path.seconds > 0).all()


@pytest.mark.parametrize("index", [0, 3, -1])
def test_logits_are_those_of_the_coefficients_for_any_kind_of_x(index):
    X, y, _ = make_problem(29, d=20)
    X = X.astype(np.float16).astype(np.float32)
    path = group_lasso_path(X, y, n_alphas=5, alpha_min_ratio=0.1)
    expected = X @ path.coef(index) + path.intercepts[index]
    features, half = FakeFeatures(X, (8, 12)), torch.as_tensor(X).half()
    for source in (X, X.tolist(), np.asfortranarray(X), torch.as_tensor(X), half, half.numpy(), features):
        np.testing.assert_allclose(path.predict_logits(source, index), expected, rtol=1e-12, atol=1e-12)
    assert features.columns_read == set(path.active[index].tolist())


def test_logits_are_for_every_x_that_a_path_is_for():
    X, y, _ = make_problem(29, d=20)
    X = torch.as_tensor(X).bfloat16().double().numpy()
    for source in (pd.DataFrame(X), torch.as_tensor(X).bfloat16(), X[:, ::-1].copy()[:, ::-1]):
        path = group_lasso_path(source, y, n_alphas=5, alpha_min_ratio=0.1)
        expected = X @ path.coef(4) + path.intercepts[4]
        np.testing.assert_allclose(path.predict_logits(source, 4), expected, rtol=1e-12, atol=1e-12)


def test_logits_of_another_number_of_features_are_refused():
    X, y, _ = make_problem(30)
    path = group_lasso_path(X, y, n_alphas=2)
    for wrong in (X[:, :9], X[0], torch.zeros(3, 11), FakeFeatures(X[:, :9], (4, 5))):
        with pytest.raises(ValueError, match=r"X must have shape \(n_samples, 10\), got"):
            path.predict_logits(wrong, 1)


@pytest.mark.parametrize("memory", [None, 10_000])
def test_two_runs_are_identical_to_the_bit(memory):
    X, y, weight = make_problem(31, n=50, d=300)
    features = FakeFeatures(X, (100, 200))
    one, two = (
        group_lasso_path(features, y, n_alphas=6, sample_weight=weight, max_memory=memory, device="cpu")
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.coef(5), two.coef(5))
    for name in ("intercepts", "gradient_norms", "objective", "relative_gap", "kkt_violation", "n_iter", "n_passes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_reduced_precision_of_products_outside_neither_changes_the_path_nor_is_changed():
    X, y, _ = make_problem(32, n=50, d=100)
    X = X.astype(np.float32)
    path = group_lasso_path(X, y, n_alphas=4)
    inside = []

    def stop(point):
        inside.append(torch.get_float32_matmul_precision())
        if len(inside) > 4:
            raise RuntimeError("enough")

    torch.set_float32_matmul_precision("medium")
    try:
        other = group_lasso_path(X, y, n_alphas=4, callback=stop)
        after = torch.get_float32_matmul_precision()
        with pytest.raises(RuntimeError, match="enough"):
            group_lasso_path(X, y, n_alphas=4, callback=stop)
        after_error = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (after, after_error) == ("medium", "medium")
    assert set(inside) == {"highest"}
    np.testing.assert_array_equal(other.objective, path.objective)


@pytest.mark.parametrize("memory", [None, 10_000])
@pytest.mark.parametrize("during", ["first reading", "pass", "callback"])
def test_an_interruption_propagates_and_leaves_no_thread(during, memory):
    X, y, _ = make_problem(33, n=50, d=300)
    features, threads = FakeFeatures(X, (100, 100, 100)), threading.enumerate()
    n_alphas_seen, blocks = [], features.column_blocks

    def interrupted(max_bytes):
        for block in blocks(max_bytes):
            if during == "first reading" or (during == "pass" and n_alphas_seen):
                raise KeyboardInterrupt
            yield block

    def callback(point):
        n_alphas_seen.append(point)
        if during == "callback" and point.index == 2:
            raise KeyboardInterrupt

    features.column_blocks = interrupted
    if during == "pass" and memory is None:
        group_lasso_path(features, y, n_alphas=4, max_memory=memory, callback=callback)
        assert features.n_passes == 1
    else:
        with pytest.raises(KeyboardInterrupt):
            group_lasso_path(features, y, n_alphas=4, max_memory=memory, callback=callback)
    assert threading.enumerate() == threads
    assert torch.get_float32_matmul_precision() == "highest"


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
        (dict(l1_ratio=-0.1), "'l1_ratio' parameter"),
        (dict(l1_ratio=np.nan), "'l1_ratio' parameter"),
        (dict(l1_ratio=0.0), "l1_ratio=0 has no alpha_max"),
        (dict(tol=0.0), "'tol' parameter"),
        (dict(max_iter=0), "'max_iter' parameter"),
        (dict(n_alphas=0), "'n_alphas' parameter"),
        (dict(alpha_min_ratio=0.0), "'alpha_min_ratio' parameter"),
        (dict(alphas=[0.1, -1.0]), "alphas must be a non-empty 1-d sequence of positive"),
        (dict(alphas=[0.0]), "alphas must be"),
        (dict(alphas=[-1]), "alphas must be"),
        (dict(alphas=[]), "alphas must be"),
        (dict(alphas=["0.1", "a"]), "alphas must be"),
        (dict(alphas=[np.nan]), "alphas must be"),
        (dict(alphas=[[0.1]]), "alphas must be"),
        (dict(alphas="0.1"), "'alphas' parameter"),
        (dict(sample_weight=[1.0, 2.0]), r"sample_weight must have shape \(40,\), got \(2,\)"),
        (dict(sample_weight=np.r_[-1.0, np.ones(39)]), "sample_weight must be finite, non-negative"),
        (dict(sample_weight=np.r_[np.nan, np.ones(39)]), "sample_weight must be finite"),
        (dict(sample_weight=np.zeros(40)), "not all zero"),
        (dict(sample_weight=np.r_[1.0, np.zeros(39)]), "at least two classes with positive weight, got 1 class"),
        (dict(y=np.zeros(40)), "at least two classes with positive weight, got 1 class"),
        (dict(y=np.arange(39) % 2), "y must have one label per row of X: got 39 labels for 40 rows"),
        (dict(y=np.linspace(0, 1, 40)), "Unknown label type"),
        (dict(y=np.r_[np.nan, np.ones(39)]), "NaN"),
        (dict(X=np.zeros(40)), r"X must have shape \(n_samples, n_features\)"),
        (dict(X=np.array([["a"]] * 40)), "X must hold real numbers"),
        (dict(X=np.full((40, 2), np.nan)), "NaN or infinity in column 0"),
        (dict(X=np.eye(40) + np.where(np.arange(40) == 3, np.inf, 0.0)), "NaN or infinity in column 3"),
        (dict(device="tpu"), "device='tpu' cannot be used here"),
        (dict(device="cuda:99"), "device='cuda:99' cannot be used here"),
        (dict(dtype="int8"), "dtype='int8' cannot hold X"),
        (dict(dtype="float16"), "dtype='float16' would round X in column 0"),
        (dict(max_memory="lots"), "max_memory='lots' is no amount of memory"),
        (dict(max_memory=0), "'max_memory' parameter"),
        (dict(callback=1), "'callback' parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_errors_name_the_argument(change, message):
    X, y, _ = make_problem(18)
    options = dict(X=X, y=y) | change
    with pytest.raises(ValueError, match=message):
        group_lasso_path(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none():
    X, y, _ = make_problem(18)
    with pytest.raises(ValueError, match="device='cuda' cannot be used here"):
        group_lasso_path(X, y, device="cuda")
