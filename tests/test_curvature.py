"""The model of the curvature and its inverse against dense matrices, the penalty's curvature against autograd."""

import numpy as np
import pytest
import torch
from _estimator_data import DEVICES, as_problem, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators.group_lasso import curvature
from estimators.group_lasso.curvature import PenaltyCurvature, Preconditioner, ScalarCurvature
from estimators.group_lasso.problem import evaluate


def make_model(
    seed, d=7, k=3, free=True, strength=0.05, radial=0.01, damping=0.0, dtype=torch.float64, device="cpu", n=40
):
    """Both curvatures at a random point, the latter's rows far apart in norm."""
    X, y, weight = make_problem(seed, n=n, d=d, k=k)
    rng = np.random.default_rng(seed)
    problem = as_problem(y, weight, fit_intercept=free, device=device)
    coef = torch.as_tensor(rng.normal(size=(k, d)) * rng.lognormal(0, 2, d), device=device, dtype=dtype)
    columns = torch.as_tensor(X.T.copy(), device=device, dtype=dtype)
    found = evaluate(
        problem, 0.1 * (coef / coef.norm(dim=0) @ columns).double(), torch.zeros(k, device=device).double()
    )
    norms = coef.norm(dim=0)
    model = ScalarCurvature.at(problem, columns, found.probabilities)
    return model, PenaltyCurvature.at(coef / norms, norms, strength, radial, damping)


def dense_system(model, penalty, free, block=None):
    """F F' kron I + penalty, damped by 0.001 at least, on rows and intercept, class by class."""
    d, k = len(model.columns), len(penalty.units)
    F, center, units = model.columns.double(), model.center.double(), penalty.units.double()
    tangential, total = penalty.tangential.double(), float(model.total())
    F = (F - center[:, None]) * model.root.double()
    gram = F @ F.T
    if block:
        part = torch.arange(d) // block
        gram = gram * (part[:, None] == part)
    # With F centred, the intercept's row and column appear when the centre is put back.
    arrow = torch.zeros(d + free, d + free, dtype=torch.float64)
    arrow[:d, :d] = gram + total * torch.outer(center, center) * free
    if free:
        arrow[:d, d] = arrow[d, :d] = total * center
        arrow[d, d] = total
    system = torch.kron(torch.eye(k, dtype=torch.float64), arrow).view(k, d + free, k, d + free)
    for row in range(d):
        bend = (tangential[row] + penalty.radial) * torch.eye(k, dtype=torch.float64)
        along = (1 - max(penalty.damping, 1e-3)) * tangential[row]
        system[:, row, :, row] += bend - along * torch.outer(units[:, row], units[:, row])
    return system.reshape(k * (d + free), -1)


def dense_inverse(preconditioner, k, width, dtype=torch.float64):
    """The matrix of the linear map that the preconditioner is."""
    unit = torch.eye(k * width, dtype=dtype).view(-1, k, width)
    return torch.stack([preconditioner(direction).flatten() for direction in unit], 1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 12),
    k=st.integers(2, 5),
    free=st.booleans(),
    strength=st.sampled_from([0.0, 1e-3, 1.0]),
    radial=st.sampled_from([0.0, 0.1]),
    damping=st.sampled_from([0.0, 1e-3, 0.1, 0.9]),
)
def test_the_preconditioner_is_the_exact_inverse_of_the_model(seed, d, k, free, strength, radial, damping):
    model, penalty = make_model(seed, d, k, free, strength, radial, damping)
    system = dense_system(model, penalty, free)
    inverse = dense_inverse(Preconditioner(model, penalty, free), k, d + free)
    np.testing.assert_allclose(inverse @ system, np.eye(len(system)), atol=1e-7)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_beyond_a_few_thousand_rows_only_coupling_between_blocks_is_left_out(free, size, monkeypatch):
    monkeypatch.setattr(curvature, "_SLICE", size)
    model, penalty = make_model(0, free=free)
    inverse = dense_inverse(Preconditioner(model, penalty, free), 3, 7 + free)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-9 * inverse.abs().max())
    assert torch.linalg.eigvalsh((inverse + inverse.T) / 2).min() > 0
    system = dense_system(model, penalty, free, block=size)
    np.testing.assert_allclose(inverse @ system, np.eye(len(system)), atol=1e-9)


@pytest.mark.parametrize("n_rows", [3, 200])
def test_the_model_is_the_same_whatever_is_formed_beforehand_and_in_which_slices(n_rows, monkeypatch):
    whole, _ = make_model(1, d=n_rows)
    monkeypatch.setattr(curvature, "_SLICE", 2)
    other, _ = make_model(1, d=n_rows)
    assert other.gram is None
    np.testing.assert_allclose(other.form_gram(), whole.gram, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(other.diagonal(), whole.diagonal(), rtol=1e-12)


@pytest.mark.parametrize("free", [True, False])
def test_the_model_of_some_rows_is_that_of_their_columns_alone(free):
    model, penalty = make_model(2, free=free)
    rows = torch.tensor([5, 0, 3])
    parts = model.restrict(rows), penalty.restrict(rows)
    keep = torch.cat([c * (7 + free) + torch.cat([rows, torch.arange(7, 7 + free)]) for c in range(3)])
    system = dense_system(model, penalty, free)[keep][:, keep]
    inverse = dense_inverse(Preconditioner(*parts, free), 3, 3 + free)
    np.testing.assert_allclose(inverse @ system, np.eye(len(system)), atol=1e-9)
    np.testing.assert_allclose(parts[0].diagonal(), model.diagonal()[rows], rtol=1e-12)


def test_the_scalar_bends_at_least_as_much_as_the_loss_does_on_average():
    """Along the intercept and every row, the model's curvature is no less than that of any class."""
    X, y, weight = make_problem(3)
    problem = as_problem(y, weight)
    found = evaluate(problem, torch.as_tensor(np.random.default_rng(0).normal(size=(3, 40))), torch.zeros(3).double())
    model = ScalarCurvature.at(problem, torch.as_tensor(X.T.copy()), found.probabilities)
    P = found.probabilities
    bend = problem.weights * P * (1 - P)
    assert (model.total() >= bend.sum(1)).all()
    X = torch.as_tensor(X)
    for c in range(3):
        centered = X - bend[c] @ X / bend[c].sum()
        assert (model.diagonal() >= (bend[c][:, None] * centered**2).sum(0)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_stays_positive_where_rounding_makes_the_model_singular(dtype, device):
    """Twice the same columns, more of them than samples, and no penalty to tell them apart."""
    model, penalty = make_model(4, d=60, n=20, strength=1e-12, radial=0.0, dtype=dtype, device=device)
    rows = torch.arange(120, device=device) % 60
    preconditioner = Preconditioner(model.restrict(rows), penalty.restrict(rows), True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        right = torch.randn((3, 121), generator=generator).to(device, dtype)
        solution = preconditioner(right)
        assert torch.isfinite(solution).all()
        assert (right * solution).sum() > 0


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(2, 5),
    strength=st.floats(0, 2),
    radial=st.floats(0, 2),
    damping=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_curvature_of_the_penalty_is_that_of_autograd_and_damped_along_the_rows(seed, k, strength, radial, damping):
    W, V, start = torch.randn((3, k, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def penalty(W):
        return strength * W.norm(dim=0).sum() + radial / 2 * W.square().sum()

    norms = W.norm(dim=0)
    units = W / norms
    hessian = torch.autograd.functional.hessian(penalty, W)
    expected = start + torch.einsum("abcd,cd->ab", hessian, V) + damping * strength / norms * units * (units * V).sum(0)
    product = PenaltyCurvature.at(units, norms, strength, radial, damping).add_product(start, V)
    np.testing.assert_allclose(product, expected, rtol=1e-9, atol=1e-12)


def test_the_curvature_of_rows_next_to_zero_is_finite():
    units = torch.eye(3)[:, :2]
    bent = PenaltyCurvature.at(units, torch.zeros(2), 0.1, 0.0)
    assert torch.isfinite(bent.tangential).all()
    assert (bent.add_product(torch.zeros(3, 2), units).abs() < 1e-3).all()
