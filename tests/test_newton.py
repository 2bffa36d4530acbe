"""The inner solver on whole small problems: the goals it reaches, from anywhere, and its Hessian against autograd."""

import numpy as np
import pytest
import torch
from _estimator_data import DEVICES, as_problem, cvxpy_optimum, gradient, kkt, make_problem, objective, standardize
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators.group_lasso.curvature import PenaltyCurvature
from estimators.group_lasso.newton import _Hessian, solve
from estimators.group_lasso.problem import evaluate, loss, objective_and_gap, penalty


class Small:
    """A standardised problem, an alpha well below alpha_max, and what numpy says about coefficients."""

    def __init__(self, seed, *, n=60, d=20, k=3, rho=1.0, free=True, share=0.1, dtype=torch.float64, device="cpu"):
        X, self.y, self.weight = make_problem(seed, n, d, k)
        self.Z, self.rho, self.k, self.d = standardize(X, self.weight), rho, k, d
        self.problem = as_problem(self.y, self.weight, rho, free, device)
        self.columns = torch.as_tensor(self.Z.T.copy(), dtype=dtype, device=device)
        q = np.bincount(self.y, self.weight) / self.weight.sum()
        start = np.log(q) if free else np.zeros(k)
        slopes = np.linalg.norm(gradient(self.Z, self.y, self.weight, np.zeros((d, k)), start)[0], axis=1)
        self.alpha = share * slopes.max()

    def solve(self, coef=None, *, gap=1e-6, kkt=1e-3, max_iter=200, intercept=None):
        start = self.columns.new_zeros((self.k, self.d))
        start += 0.0 if coef is None else torch.as_tensor(coef).to(start)
        intercept = torch.zeros(self.k, dtype=torch.float64, device=start.device) if intercept is None else intercept
        return solve(self.problem, self.columns, start, intercept, self.alpha, gap=gap, kkt=kkt, max_iter=max_iter)

    def judge(self, coef, intercept):
        """Objective, duality gap and largest violation, all in float64."""
        W, b = coef.double().cpu().numpy().T, intercept.cpu().numpy()
        found = evaluate(self.problem, (coef.double() @ self.columns.double()), intercept)
        norms = (found.residual @ self.columns.double().T).norm(dim=0)
        value, gap = objective_and_gap(self.problem, found, coef.double().norm(dim=0), norms, self.alpha)
        assert value == pytest.approx(objective(self.Z, self.y, self.weight, W, b, self.alpha, self.rho), rel=1e-6)
        return value, gap, kkt(self.Z, self.y, self.weight, W, b, self.alpha, self.rho)


GOALS = {torch.float64: (1e-11, 1e-7), torch.float32: (1e-5, 1e-3)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", GOALS)
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("rho", "k", "d"), [(1.0, 3, 20), (0.5, 2, 20), (1.0, 10, 150)])
def test_gap_and_violation_reach_their_goals(rho, k, d, free, dtype, device):
    small, (gap, violation) = Small(0, d=d, k=k, rho=rho, free=free, dtype=dtype, device=device), GOALS[dtype]
    coef, intercept, n_iter = small.solve(gap=gap, kkt=violation)
    assert coef.dtype == dtype
    assert intercept.dtype == torch.float64
    assert 0 < n_iter < 60
    _, reached, worst = small.judge(coef, intercept)
    rounding = 0.0 if dtype == torch.float64 else 1e-6
    assert reached <= gap + rounding
    assert worst <= violation + 100 * rounding
    assert free or not intercept.any()
    assert (coef.norm(dim=0) > 0).any()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    rho=st.sampled_from([0.3, 1.0]),
    share=st.floats(0.02, 1.5),
    offset=st.floats(-5, 5),
)
def test_the_same_optimum_is_reached_from_any_start(seed, size, rho, share, offset):
    """Among them starts whose nonzero rows are not those of the solution, or far too large."""
    small = Small(seed, n=40, d=12, rho=rho, share=share)
    rng = np.random.default_rng(seed)
    start = size * rng.normal(size=(3, 12)) * (rng.random(12) < 0.5)
    value, gap, _ = small.judge(
        *small.solve(start, gap=1e-9, kkt=1e-6, intercept=offset * torch.arange(3.0).double())[:2]
    )
    assert gap <= 1e-9
    best, _, _ = small.judge(*small.solve(gap=1e-11, kkt=1e-8)[:2])
    assert value == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(("n", "k", "d"), [(4, 2, 30), (12, 2, 100), (10, 3, 200)])
@pytest.mark.parametrize("dtype", GOALS)
@pytest.mark.parametrize("free", [True, False])
def test_more_rows_than_the_samples_tell_apart(n, k, d, dtype, free):
    """The loss does not bend along some directions, and without a ridge neither does the penalty."""
    small, (gap, violation) = Small(n, n=n, k=k, d=d, dtype=dtype, free=free, share=0.01), GOALS[dtype]
    coef, intercept, _ = small.solve(gap=gap, kkt=violation)
    # How far rounding lets a singular system be solved differs between processors.
    assert small.judge(coef, intercept)[1] <= gap + (1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("rho", [0.4, 1.0])
def test_the_optimum_is_that_of_an_interior_point_method(rho):
    small = Small(1, rho=rho)
    value, _, _ = small.judge(*small.solve(gap=1e-11, kkt=1e-8)[:2])
    best, _, _ = cvxpy_optimum(small.Z, small.y, small.weight, small.alpha, rho, True)
    assert value == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [0.0, 0.5])
def test_every_step_decreases_the_objective(rho, size):
    small = Small(2, d=40, rho=rho, share=0.03)
    start = size * np.random.default_rng(0).normal(size=(3, 40))
    n_steps = small.solve(start, gap=1e-10, kkt=1e-6)[2]
    values = [small.judge(*small.solve(start, gap=1e-10, kkt=1e-6, max_iter=i)[:2])[0] for i in range(n_steps + 1)]
    assert len(values) > 4
    assert (np.diff(values) < 1e-12).all()
    assert values[-1] < values[0] - 1e-3


@pytest.mark.parametrize("dtype", GOALS)
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_rows_that_are_zero_at_the_optimum_are_exactly_zero(dtype, size):
    small = Small(3, share=0.3, dtype=dtype)
    gap, violation = GOALS[dtype]
    coef, _, _ = small.solve(size * np.ones((3, 20)) * np.arange(3)[:, None], gap=gap, kkt=violation)
    exact = small.solve(gap=1e-12, kkt=1e-9)[0] if dtype == torch.float64 else Small(3, share=0.3).solve(gap=1e-12)[0]
    zero = exact.norm(dim=0) == 0
    assert 4 < int(zero.sum()) < 19
    assert (coef[:, zero] == 0).all()
    assert (coef[:, ~zero].norm(dim=0) > 0).all()


def test_above_the_largest_useful_alpha_everything_goes_to_zero():
    small = Small(4, share=1.01)
    coef, intercept, _ = small.solve(np.random.default_rng(0).normal(size=(3, 20)), gap=1e-9, kkt=1e-6)
    assert (coef == 0).all()
    q = np.bincount(small.y, small.weight) / small.weight.sum()
    np.testing.assert_allclose(intercept - intercept[0], np.log(q / q[0]), atol=1e-9)


@pytest.mark.parametrize("dtype", GOALS)
def test_ridge_is_solved_through_rows_that_turn_round(dtype):
    """From minus the optimum every row has to pass through zero, where ridge has no kink to stop it."""
    small = Small(5, rho=0.0, dtype=dtype)
    gap, violation = GOALS[dtype]
    coef, intercept, _ = small.solve(gap=gap, kkt=violation)
    best, _, _ = cvxpy_optimum(small.Z, small.y, small.weight, small.alpha, 0.0, True)
    assert small.judge(coef, intercept)[0] == pytest.approx(best, abs=1e-6)
    again, intercept, _ = small.solve(-coef, gap=gap, kkt=violation)
    assert small.judge(again, intercept)[0] == pytest.approx(best, abs=1e-6)
    np.testing.assert_allclose(again, coef, atol=1e-5 if dtype == torch.float64 else 1e-2)


def test_a_start_that_meets_the_goals_is_returned_as_it_is():
    small = Small(6)
    coef, intercept, _ = small.solve(gap=1e-8, kkt=1e-4)
    again, same, n_iter = small.solve(coef, intercept=intercept, gap=1e-8, kkt=1e-4)
    assert n_iter == 0
    assert torch.equal(again, coef)
    np.testing.assert_allclose(same, intercept, atol=1e-12)


def test_no_more_steps_are_taken_than_allowed_nor_than_are_of_use():
    small = Small(7)
    assert small.solve(gap=0.0, kkt=0.0, max_iter=3)[2] == 3
    coef, intercept, n_iter = small.solve(gap=0.0, kkt=0.0, max_iter=10**6)
    assert n_iter < 100
    assert small.judge(coef, intercept)[1] < 1e-11


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("rho", [0.0, 0.6, 1.0])
def test_the_hessian_is_that_of_autograd(rho, free, device):
    small = Small(8, d=5, rho=rho, free=free, device=device)
    problem, alpha, width = small.problem, small.alpha, 5 + free
    point, direction = torch.randn((2, 3, width), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W = point[:, :5].to(device)
    found = evaluate(problem, W @ small.columns, torch.zeros(3, device=device).double())
    norms = W.norm(dim=0)
    bent = PenaltyCurvature.at(W / norms, norms, alpha * rho, alpha * (1 - rho))
    product = _Hessian(problem, small.columns, found, bent)(direction.to(device))

    def value(flat):
        rows, intercept = flat[:, :5], flat[:, 5:] if free else 0.0
        scores = rows @ small.columns + intercept
        losses = torch.logsumexp(scores, 0) - (scores * problem.targets).sum(0)
        norms = rows.norm(dim=0)
        return losses @ problem.weights + alpha * (rho * norms.sum() + (1 - rho) / 2 * norms.square().sum())

    at = torch.cat([W, found.intercept[:, None]], 1) if free else W
    scores = W @ small.columns + found.intercept[:, None]
    assert float(value(at)) == pytest.approx(loss(problem, scores) + penalty(problem, norms, alpha), rel=1e-12)
    hessian = torch.autograd.functional.hessian(value, at)
    expected = torch.einsum("abcd,cd->ab", hessian, direction.to(device))
    np.testing.assert_allclose(product.cpu(), expected.cpu(), rtol=1e-9, atol=1e-12)
