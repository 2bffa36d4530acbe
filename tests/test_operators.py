"""X as an operator, in memory or read at every pass: implicit standardisation, the full pass, any source, limits."""

import threading
import warnings

import numpy as np
import pytest
import torch
from _estimator_data import FakeFeatures, make_problem, standardize
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_cuda import pretended_cuda

from estimators.device import memory_limit, resolve_device
from estimators.features import as_features, iterate_blocks
from estimators.group_lasso import operators
from estimators.group_lasso.moments import column_moments
from estimators.group_lasso.operators import DenseOperator, StreamedOperator, make_operator

KINDS = {DenseOperator: "1GB", StreamedOperator: "1kB"}
NONE = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(params=list(KINDS), ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The CPU, and a card, pretended where there is none."""
    if request.param == "cpu" or torch.cuda.is_available():
        yield request.param
        return
    with pretended_cuda():
        yield request.param


def build(
    X, weight, kind=DenseOperator, *, rows=None, standardized=True, center=True, double=False, dtype=None, device="cpu"
):
    operator = make_operator(
        X,
        rows=torch.arange(X.shape[0]) if rows is None else torch.as_tensor(rows),
        weights=torch.as_tensor(weight / weight.sum(), device=device),
        standardize=standardized,
        center=center,
        double=double,
        dtype=dtype,
        max_memory=KINDS.get(kind, kind),
    )
    assert kind not in KINDS or isinstance(operator, kind)
    return operator


def random_residual(n, device="cpu", k=3):
    return torch.randn((k, n), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


def full_pass(operator, residual, keep=NONE, watch=np.inf):
    return operator.correlate(residual, keep.to(residual.device), watch)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    ("dtype", "double", "rtol"), [(np.float32, False, 1e-5), (np.float32, True, 1e-12), (np.float64, False, 1e-12)]
)
def test_pass_and_columns_are_those_of_the_standardised_matrix(kind, device, center, dtype, double, rtol):
    X, _, weight = make_problem(0)
    X = X.astype(dtype)
    expected = standardize(X.astype(np.float64), weight, center)
    operator = build(X, weight, kind, center=center, double=double, device=device)
    assert operator.shape == X.shape
    assert operator.single == (rtol == 1e-5)
    R = random_residual(len(X), device)
    norms = full_pass(operator, R)
    assert norms.dtype == torch.float64
    np.testing.assert_allclose(norms.cpu(), np.linalg.norm(R.cpu().numpy() @ expected, axis=0), rtol=rtol)
    columns = operator.columns(torch.tensor([7, 2], device=device))
    assert columns.dtype == torch.float64
    np.testing.assert_allclose(columns.cpu(), expected[:, [7, 2]].T, rtol=1e-6 if operator.single else 1e-12)
    assert operator.columns(NONE.to(device)).shape == (0, len(X))


@pytest.mark.parametrize("held", ["float16", "float32", "float64"])
@pytest.mark.parametrize("n_features", [1, 31, 32, 33, 100])
def test_any_number_of_columns_and_any_division_of_the_work(held, n_features, monkeypatch):
    monkeypatch.setattr(operators, "_CALL_FLOPS", 1)
    monkeypatch.setattr(operators, "_SLAB_BYTES", 1)
    rng = np.random.default_rng(0)
    X, weight = rng.normal(size=(20, n_features)).astype(np.float16), rng.uniform(0.5, 2, 20)
    expected = standardize(X.astype(np.float64), weight)
    operator, R = build(X, weight, dtype=held), random_residual(20)
    np.testing.assert_allclose(full_pass(operator, R), np.linalg.norm(R.numpy() @ expected, axis=0), rtol=1e-5)
    np.testing.assert_allclose(operator.columns(torch.arange(n_features)), expected.T, rtol=1e-12)


def test_without_standardising_columns_are_as_given(kind):
    X, _, weight = make_problem(1)
    operator = build(X, weight, kind, standardized=False)
    np.testing.assert_array_equal(operator.columns(torch.arange(X.shape[1])), X.T)


def test_a_large_mean_does_not_drown_the_pass_in_rounding(kind):
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(200, 6)) + np.array([0, 10, 99, 1e3, 1e4, 1e5])).astype(np.float32)
    weight = rng.uniform(0.5, 2, 200)
    R = random_residual(200) / 200
    expected = np.linalg.norm(R.numpy() @ standardize(X.astype(np.float64), weight), axis=0)
    np.testing.assert_allclose(full_pass(build(X, weight, kind), R), expected, rtol=5e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_scale_of_a_column_in_float32_does_not_matter(kind, scale):
    X, _, weight = make_problem(9)
    X, R = (scale * X).astype(np.float32), random_residual(len(X))
    expected = np.linalg.norm(R.numpy() @ standardize(X.astype(np.float64), weight), axis=0)
    np.testing.assert_allclose(full_pass(build(X, weight, kind), R), expected, rtol=1e-5)


def test_constant_columns_count_as_zero(kind):
    X, _, weight = make_problem(2)
    X = X.astype(np.float32)
    X[:, 3] = 0.1
    X[:, 5] = np.where(np.arange(len(X)) % 2, np.float32(1), np.nextafter(np.float32(1), np.float32(2)))
    X[:, 7] = 0
    for standardized in (True, False):
        operator = build(X, weight, kind, standardized=standardized)
        norms = full_pass(operator, random_residual(len(X)))
        assert (norms[[3, 5, 7]] == 0).all()
        assert (norms[[0, 1, 2, 4, 6, 8, 9]] > 0).all()
        assert (operator.inverse_scale == 0).nonzero().flatten().tolist() == [3, 5, 7]


def test_a_column_that_varies_only_in_rows_left_out_is_constant(kind):
    X, _, weight = make_problem(3)
    X[:, 1] = 2.0
    X[0, 1] = 7.0
    operator = build(X, weight[1:], kind, rows=np.arange(1, len(X)))
    assert operator.shape == (len(X) - 1, X.shape[1])
    assert operator.inverse_scale[1] == 0
    assert operator.inverse_scale[0] > 0


def test_moments_are_weighted():
    X, _, weight = make_problem(4)
    p = weight / weight.sum()
    mean, sd = column_moments(torch.as_tensor(X.T.copy()), torch.as_tensor(p), 1e-16)
    np.testing.assert_allclose(mean, p @ X, rtol=1e-12)
    np.testing.assert_allclose(sd, np.sqrt(p @ (X - p @ X) ** 2), rtol=1e-12)


def read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


SOURCES = {
    "fortran": np.asfortranarray,
    "tensor": torch.as_tensor,
    "transposed tensor": lambda X: torch.as_tensor(X.T.copy()).T,
    "backwards": lambda X: X[::-1, ::-1].copy()[::-1, ::-1],
    "big endian": lambda X: X.astype(">f4"),
    "slices": lambda X: FakeFeatures(X, (4, 1, 5)),
    "scattered": lambda X: FakeFeatures(X, (4, 1, 5), scattered=True),
    "read-only": read_only,
    "float16": lambda X: X.astype(np.float16),
    "bfloat16 tensor": lambda X: torch.as_tensor(X).bfloat16(),
    "float64": lambda X: X.astype(np.float64),
    "int64": lambda X: X.astype(np.int64),
    "uint8 tensor": lambda X: torch.as_tensor(X).to(torch.uint8),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_operator_without_complaint(kind, source, device, monkeypatch):
    rng = np.random.default_rng(5)
    X, weight = rng.integers(0, 200, (40, 10)).astype(np.float32), rng.uniform(0.5, 2, 40)
    rows = np.flatnonzero(np.arange(len(X)) % 3)
    R = random_residual(len(rows), device)
    expected = np.linalg.norm(R.cpu().numpy() @ standardize(X[rows].astype(np.float64), weight[rows]), axis=0)
    monkeypatch.setattr(operators, "READ_BYTES", 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = build(SOURCES[source](X), weight[rows], kind, rows=rows, device=device)
        np.testing.assert_allclose(full_pass(operator, R).cpu(), expected, rtol=1e-5)
        found = operator.columns(torch.tensor([9, 0, 4], device=device))
    exact = standardize(X[rows].astype(np.float64), weight[rows])
    np.testing.assert_allclose(found.cpu(), exact[:, [9, 0, 4]].T, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(n_rows=st.integers(1, 9), n_features=st.integers(1, 30), most=st.integers(1, 400), tensor=st.booleans())
def test_blocks_are_no_larger_than_asked_and_cover_every_column(n_rows, n_features, most, tensor):
    X = np.arange(float(n_rows * n_features)).reshape(n_rows, n_features)
    blocks = list(iterate_blocks(torch.as_tensor(X) if tensor else X, max_bytes=most))
    assert all(block.shape[1] == 1 or block.shape[0] * block.shape[1] * 8 <= most for _, block in blocks)
    np.testing.assert_array_equal(np.hstack([np.asarray(block) for _, block in blocks]), X)
    assert np.hstack([np.arange(n_features)[columns] for columns, _ in blocks]).tolist() == list(range(n_features))


def test_what_is_no_matrix_of_real_numbers_is_refused():
    assert as_features([[1, 2], [3, 4]]).shape == (2, 2)
    for X in (np.zeros(3), np.zeros((3, 0)), np.zeros((0, 3)), torch.zeros(2, 2, 2), 1.0):
        with pytest.raises(ValueError, match=r"X must have shape \(n_samples, n_features\)"):
            as_features(X)
    for X in ([["a"]], np.ones((2, 2), dtype=complex), np.array([[None, 1]])):
        with pytest.raises(ValueError, match="X must hold real numbers"):
            as_features(X)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_value_that_is_not_finite_is_refused_by_column(kind, bad, scattered, dtype):
    X, _, weight = make_problem(6)
    X = X.astype(np.float16)
    X[2, 6] = bad
    threads = threading.enumerate()
    with pytest.raises(ValueError, match="NaN or infinity in column 6"):
        build(FakeFeatures(X, (4, 6), scattered=scattered), weight, kind, dtype=dtype)
    assert threading.enumerate() == threads


@pytest.mark.parametrize(
    "blocks", [[slice(0, 4)], [slice(0, 10), slice(4, 10)], [np.r_[0, 2, 3, 4]], [np.r_[0, 1, 2, 3], np.r_[0, 4:9]]]
)
def test_column_blocks_that_do_not_give_every_column_once_are_noticed(kind, blocks):
    X, _, weight = make_problem(7)
    features = FakeFeatures(X, (4, 6))
    features.column_blocks = lambda max_bytes: ((columns, features.values[:, columns]) for columns in blocks)
    with pytest.raises(ValueError, match=r"each of its 10 columns once; [62] came"):
        build(features, weight, kind)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_sixteen_bits_are_accepted_where_they_hold_x_exactly(kind, dtype):
    X, _, weight = make_problem(8)
    exact = torch.as_tensor(X).to(dtype if dtype != "float16" else torch.float16).double().numpy()
    R = random_residual(len(X))
    for source in (exact, exact.astype(np.float32)):
        operator = build(source, weight, kind, dtype=dtype)
        assert operator.single
        np.testing.assert_allclose(full_pass(operator, R), full_pass(build(exact, weight), R), rtol=1e-5)
        double = build(source, weight, kind, dtype=dtype, double=True)
        assert not double.single
        np.testing.assert_allclose(full_pass(double, R), full_pass(build(exact, weight), R), rtol=1e-12)
        np.testing.assert_array_equal(double.columns(torch.arange(10)), build(exact, weight).columns(torch.arange(10)))


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 1 + 2.0**-11), ("float16", 1e5), ("float16", 1e-8), (torch.bfloat16, 1 + 2.0**-8)]
)
@pytest.mark.parametrize("scattered", [False, True])
def test_sixteen_bits_that_would_round_x_are_refused_by_column(kind, dtype, value, scattered):
    X = np.tile(np.arange(4.0), (10, 3)).T
    X[3, 7] = value
    with pytest.raises(ValueError, match=r"would round X in column 7.*use 'float32'"):
        build(FakeFeatures(X, (4, 6), scattered=scattered), np.ones(len(X)), kind, dtype=dtype)


@pytest.mark.parametrize("double", [False, True])
def test_float64_held_as_float32_is_the_rounded_matrix(kind, double):
    """Rounding moves a column of large mean visibly; pass, moments and columns must agree on where to."""
    rng = np.random.default_rng(1)
    X, weight = rng.normal(size=(30, 8)) + np.r_[0, 0, 1e4, 0, 0, 1e5, 0, 10], np.ones(30)
    rounded, R = X.astype(np.float32), random_residual(30)
    operator = build(X, weight, kind, dtype="float32", double=double)
    expected = standardize(rounded.astype(np.float64), weight)
    assert np.abs(expected - standardize(X, weight)).max() > 1e-3
    norms = np.linalg.norm(R.numpy() @ expected, axis=0)
    np.testing.assert_allclose(full_pass(operator, R), norms, rtol=1e-9 if double else 1e-5)
    np.testing.assert_allclose(operator.columns(torch.arange(8)), expected.T, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["int8", "half", "", "float128", torch.int64, torch.complex64])
def test_a_dtype_that_cannot_hold_x_is_named(dtype):
    X, _, weight = make_problem(0)
    with pytest.raises(ValueError, match=rf"dtype={dtype!r} cannot hold X; accepted: None, 'float16'"):
        build(X, weight, dtype=dtype)


@pytest.mark.parametrize(
    ("given_as", "size"),
    [
        ("4GB", 4 * 10**9),
        ("512MiB", 512 * 2**20),
        (1e9, 10**9),
        ("1.5 gb", 15 * 10**8),
        ("2TiB", 2**41),
        ("3k", 3000),
        (" 7 kib ", 7 * 1024),
        ("100", 100),
        ("1e9", 10**9),
        (np.int64(5), 5),
    ],
)
def test_amounts_of_memory(given_as, size):
    assert memory_limit(given_as, torch.device("cpu")) == size


@pytest.mark.parametrize("wrong", ["", "GB", "-1GB", 0, "0", "lots", "nan", np.nan, "inf", np.inf, -1, True, "1.2.3GB"])
def test_what_is_no_amount_of_memory_is_named(wrong):
    X, _, weight = make_problem(0)
    with pytest.raises(ValueError, match=r"max_memory=.* is no amount of memory; accepted: None.*'4GB' or '512MiB'"):
        build(X, weight, wrong)


def test_memory_decides_whether_x_is_held():
    X, _, weight = make_problem(0)
    assert isinstance(build(X, weight, None), DenseOperator)
    assert isinstance(build(X, weight, 10**9), DenseOperator)
    assert isinstance(build(X, weight, 1), StreamedOperator)


def test_streamed_columns_are_read_once_and_then_held(device):
    X, _, weight = make_problem(10, d=30)
    features, R = FakeFeatures(X, (10, 20)), random_residual(len(X), device)
    expected = torch.as_tensor(standardize(features.values.astype(np.float64), weight).T)
    operator = build(features, weight, 100_000, device=device)
    assert isinstance(operator, StreamedOperator)
    assert features.n_passes == 1

    def check(index, n_reads):
        before = features.n_passes
        found = operator.columns(torch.tensor(index, device=device))
        np.testing.assert_allclose(found.cpu(), expected[index], rtol=1e-12)
        assert features.n_passes - before == n_reads

    check([3, 20, 29], 1)  # none held
    check([29, 3], 0)  # all held, in another order
    check([0, 3, 20, 21, 29], 1)  # some held
    check([21, 0, 20], 0)
    norms = full_pass(operator, R, keep=torch.tensor([4, 25]))
    check([4, 25], 0)
    largest = int(norms.argmax())
    full_pass(operator, R, keep=torch.tensor([4, 25]), watch=float(norms.max()))
    check(sorted({4, 25, largest}), 0)


def test_streamed_columns_held_between_passes_are_bounded_by_memory():
    rng = np.random.default_rng(0)
    X, weight, limit = rng.normal(size=(50, 400)).astype(np.float32), np.ones(50), 40_000
    assert X.nbytes > limit
    features, R = FakeFeatures(X, (50,) * 8), random_residual(50)
    operator = build(features, weight, limit)
    keep = torch.tensor([5, 399])
    for _ in range(3):
        norms = full_pass(operator, R, keep=keep, watch=-np.inf)
        held = operator._columns.numel() * operator._columns.element_size()
        assert 0 < held <= limit / 2
        reads = features.n_passes
        strongest = norms.argsort(descending=True)[:5]
        operator.columns(torch.cat([keep, strongest]).sort().values)
        assert features.n_passes == reads
        operator.columns(torch.arange(0, 400, 5))
        assert features.n_passes == reads + 1


@pytest.mark.parametrize("call", ["build", "pass", "columns"])
@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()])
def test_an_error_while_reading_propagates_and_leaves_no_thread(call, error):
    X, _, weight = make_problem(11, d=30)
    features, threads = FakeFeatures(X, (10, 10, 10)), threading.enumerate()

    def broken(max_bytes):
        yield slice(0, 10), features.values[:, :10]
        yield slice(10, 20), features.values[:, 10:20]
        raise error

    operator = build(features, weight, StreamedOperator)
    features.column_blocks = broken
    calls = {
        "build": lambda: build(features, weight, StreamedOperator),
        "pass": lambda: full_pass(operator, random_residual(len(X))),
        "columns": lambda: operator.columns(torch.tensor([1, 2])),
    }
    with pytest.raises(type(error)) as caught:
        calls[call]()
    assert caught.value is error
    assert threading.enumerate() == threads


@pytest.mark.parametrize("device", ["gpu", "cuda:999", "meta", "", 3.5])
def test_a_device_that_cannot_be_used_is_named(device):
    with pytest.raises(ValueError, match=r"device=.*accepted: 'auto'"):
        resolve_device(device)


def test_auto_device_is_cuda_where_there_is_one():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
