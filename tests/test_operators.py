"""X as an operator: implicit standardisation, the full pass, filling from any source."""

import warnings

import numpy as np
import pytest
import torch
from _estimator_data import DEVICES, FakeFeatures, make_problem, standardize

from estimators.group_lasso import operators
from estimators.group_lasso.operators import DenseOperator, column_moments, iterate_blocks, resolve_device


def build(X, weight, *, rows=None, standardized=True, center=True, double=False, device="cpu"):
    rows = np.arange(X.shape[0]) if rows is None else rows
    weights = torch.as_tensor(weight / weight.sum(), device=device)
    return DenseOperator(
        X, rows=torch.as_tensor(rows), weights=weights, standardize=standardized, center=center, double=double
    )


def random_residual(n, device="cpu", k=3):
    return torch.randn((n, k), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    ("dtype", "double", "rtol"), [(np.float32, False, 1e-5), (np.float32, True, 1e-12), (np.float64, False, 1e-12)]
)
def test_pass_and_columns_are_those_of_the_standardised_matrix(device, center, dtype, double, rtol):
    X, _, weight = make_problem(0)
    X = X.astype(dtype)
    expected = standardize(X.astype(np.float64), weight, center)
    operator = build(X, weight, center=center, double=double, device=device)
    R = random_residual(len(X), device)
    product = operator.correlate(R)
    assert product.dtype == torch.float64
    np.testing.assert_allclose(product.cpu(), expected.T @ R.cpu().numpy(), rtol=rtol, atol=rtol)
    index = torch.tensor([7, 2], device=device)
    np.testing.assert_allclose(operator.columns(index).cpu(), expected[:, [7, 2]].T, rtol=1e-10, atol=1e-10)


def test_without_standardising_columns_are_as_given():
    X, _, weight = make_problem(1)
    operator = build(X, weight, standardized=False)
    np.testing.assert_array_equal(operator.columns(torch.arange(X.shape[1])), X.T)


def test_a_large_mean_does_not_drown_the_pass_in_rounding():
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(200, 5)) + np.array([0, 10, 1e3, 1e4, 1e5])).astype(np.float32)
    weight = rng.uniform(0.5, 2, 200)
    R = random_residual(200) / 200
    expected = standardize(X.astype(np.float64), weight).T @ R.numpy()
    np.testing.assert_allclose(build(X, weight).correlate(R), expected, rtol=1e-4, atol=1e-6)


def test_constant_columns_count_as_zero():
    X, _, weight = make_problem(2)
    X = X.astype(np.float32)
    X[:, 3] = 0.1
    X[:, 5] = np.where(np.arange(len(X)) % 2, np.float32(1), np.nextafter(np.float32(1), np.float32(2)))
    for standardized in (True, False):
        operator = build(X, weight, standardized=standardized)
        product = operator.correlate(random_residual(len(X)))
        assert (product[[3, 5]] == 0).all()
        assert (product[[0, 1, 2, 4]] != 0).any(dim=1).all()


def test_a_column_that_varies_only_in_rows_left_out_is_constant():
    X, _, weight = make_problem(3)
    X[:, 1] = 2.0
    X[0, 1] = 7.0
    operator = build(X, weight[1:], rows=np.arange(1, len(X)))
    assert operator.shape == (len(X) - 1, X.shape[1])
    assert operator.inverse_scale[1] == 0
    assert operator.inverse_scale[0] > 0


def test_moments_are_weighted():
    X, _, weight = make_problem(4)
    p = weight / weight.sum()
    mean, sd = column_moments(torch.as_tensor(X.T.copy()), torch.as_tensor(p), 1e-16)
    np.testing.assert_allclose(mean, p @ X, rtol=1e-12)
    np.testing.assert_allclose(sd, np.sqrt(p @ (X - p @ X) ** 2), rtol=1e-12)


@pytest.mark.parametrize("scattered", [False, True])
def test_every_source_gives_the_same_operator(scattered, monkeypatch):
    X, _, weight = make_problem(5)
    X = X.astype(np.float32)
    rows = np.flatnonzero(np.arange(len(X)) % 3)
    R = random_residual(len(rows))
    expected = build(X, weight[rows], rows=rows).correlate(R)
    monkeypatch.setattr(operators, "BLOCK_BYTES", 400)
    features = FakeFeatures(X, (4, 1, 5), scattered=scattered)
    for source in (X, np.asfortranarray(X), torch.as_tensor(X), features):
        np.testing.assert_allclose(build(source, weight[rows], rows=rows).correlate(R), expected, rtol=1e-6)


def test_a_read_only_array_is_copied_without_complaint():
    X, _, weight = make_problem(8)
    R = random_residual(len(X))
    expected = build(X, weight).correlate(R)
    X.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(build(X, weight).correlate(R), expected)


def test_blocks_are_no_larger_than_asked_and_cover_every_column():
    X = np.arange(60.0).reshape(6, 10)
    blocks = list(iterate_blocks(X, max_bytes=6 * 8 * 3))
    assert [block.shape[1] for _, block in blocks] == [3, 3, 3, 1]
    np.testing.assert_array_equal(np.hstack([block for _, block in blocks]), X)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_value_that_is_not_finite_is_refused_by_column(bad, scattered):
    X, _, weight = make_problem(6)
    X[2, 6] = bad
    with pytest.raises(ValueError, match="NaN or infinity in column 6"):
        build(FakeFeatures(X, (4, 6), scattered=scattered), weight)


def test_missing_column_blocks_are_noticed():
    X, _, weight = make_problem(7)
    features = FakeFeatures(X, (4, 6))
    features.column_blocks = lambda max_bytes: iter([(slice(0, 4), X[:, :4])])
    with pytest.raises(ValueError, match="each of its 10 columns once; 6 came"):
        build(features, weight)


@pytest.mark.parametrize("device", ["gpu", "cuda:999", 3.5])
def test_a_device_that_cannot_be_used_is_named(device):
    with pytest.raises(ValueError, match=r"device=.*accepted: 'auto'"):
        resolve_device(device)


def test_auto_device_is_cuda_where_there_is_one():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
