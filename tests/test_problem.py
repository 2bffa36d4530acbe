"""The mathematics of the group lasso: loss, intercept, dual value, gap."""

import math

import numpy as np
import pytest
import torch
from _estimator_data import gradient, kkt, log_softmax, make_problem, objective
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators.group_lasso.problem import (
    Evaluation,
    Problem,
    alpha_max,
    dual_value,
    evaluate,
    kkt_violation,
    loss,
    null_objective,
    null_probabilities,
    objective_and_gap,
)


def as_problem(y, weight, k, rho=1.0, fit_intercept=True):
    return Problem(torch.eye(k).double()[y], torch.as_tensor(weight / weight.sum()), rho, fit_intercept)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 6), scale=st.floats(0.0, 50.0))
def test_intercept_is_exact_for_any_scores(seed, k, scale):
    _, y, weight = make_problem(seed, k=k)
    products = torch.as_tensor(np.random.default_rng(seed).normal(size=(len(y), k)) * scale)
    found = evaluate(as_problem(y, weight, k), products, torch.zeros(k).double())
    assert found.exact
    assert found.residual.sum(0).abs().max() <= 1e-12
    assert abs(float(found.intercept.sum())) < 1e-9 * (1 + scale)
    nudged = found.intercept + 1e-3 * torch.randn(k, generator=torch.Generator().manual_seed(seed)).double()
    assert loss(as_problem(y, weight, k), products + nudged) >= found.loss - 1e-12 * (1 + scale)


def test_without_intercept_it_stays_zero_and_needs_no_condition():
    _, y, weight = make_problem(0)
    products = torch.as_tensor(np.random.default_rng(0).normal(size=(len(y), 3)))
    found = evaluate(as_problem(y, weight, 3, fit_intercept=False), products, torch.ones(3).double())
    assert found.exact
    assert torch.equal(found.intercept, torch.zeros(3).double())


def test_null_objective_is_entropy_of_the_weighted_frequencies():
    _, y, weight = make_problem(1)
    q = np.bincount(y, weight) / weight.sum()
    problem = as_problem(y, weight, 3)
    np.testing.assert_allclose(null_probabilities(problem), q, rtol=1e-14)
    assert null_objective(problem) == pytest.approx(-(q * np.log(q)).sum(), rel=1e-13)
    assert null_objective(as_problem(y, weight, 3, fit_intercept=False)) == pytest.approx(math.log(3), rel=1e-13)


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.7])
def test_dual_value_below_one_is_the_best_on_the_segment(rho):
    X, y, weight = make_problem(3)
    problem = as_problem(y, weight, 3, rho)
    W = 0.3 * np.random.default_rng(3).normal(size=(X.shape[1], 3))
    found = evaluate(problem, torch.as_tensor(X @ W), torch.zeros(3).double())
    norms = np.linalg.norm(X.T @ found.residual.numpy(), axis=1)
    Y, P, p = problem.targets.numpy(), found.probabilities.numpy(), problem.weights.numpy()
    for alpha in (0.005, 0.05, 0.5, 5.0):

        def at(c, alpha=alpha):
            Q = (1 - c) * Y + c * P
            entropy = -(p @ np.where(Q > 0, Q * np.log(np.where(Q > 0, Q, 1)), 0).sum(1))
            excess = np.maximum(c * norms - alpha * rho, 0)
            return entropy - (excess**2).sum() / (2 * alpha * (1 - rho))

        scanned = max(at(c) for c in np.linspace(0, 1, 20001))
        value = dual_value(problem, found.probabilities, torch.as_tensor(norms), alpha)
        assert scanned <= value + 1e-12
        assert value == pytest.approx(scanned, abs=1e-6)


def test_dual_value_at_one_scales_into_the_feasible_ball():
    X, y, weight = make_problem(4)
    problem = as_problem(y, weight, 3)
    found = evaluate(problem, torch.zeros(len(y), 3).double(), torch.zeros(3).double())
    norms = (torch.as_tensor(X).T @ found.residual).norm(dim=1)
    largest = alpha_max(problem, norms)
    c = 0.4
    Q = (1 - c) * problem.targets + c * found.probabilities
    expected = float(-(problem.weights @ (Q * Q.log()).sum(1)))
    assert dual_value(problem, found.probabilities, norms, c * largest) == pytest.approx(expected, rel=1e-12)
    _, gap = objective_and_gap(problem, found, torch.zeros(0).double(), norms, largest)
    assert gap < 1e-14


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rho=st.sampled_from([0.0, 0.3, 1.0]),
    alpha=st.floats(1e-3, 10.0),
    size=st.floats(0.0, 5.0),
    fit_intercept=st.booleans(),
)
def test_dual_value_of_one_point_bounds_the_objective_of_any_other(seed, rho, alpha, size, fit_intercept):
    X, y, weight = make_problem(seed, n=20, d=6)
    problem = as_problem(y, weight, 3, rho, fit_intercept)
    rng = np.random.default_rng(seed)
    W, V = size * rng.normal(size=(2, 6, 3))
    found = evaluate(problem, torch.as_tensor(X @ W), torch.zeros(3).double())
    bound = dual_value(problem, found.probabilities, (torch.as_tensor(X).T @ found.residual).norm(dim=1), alpha)
    assert bound <= objective(X, y, weight, V, rng.normal(size=3) * fit_intercept, alpha, rho) + 1e-10


def test_gap_is_infinite_without_an_exact_intercept():
    _, y, weight = make_problem(5)
    uniform = torch.full((len(y), 3), 1 / 3).double()
    rough = Evaluation(torch.zeros(3).double(), uniform, torch.zeros_like(uniform), 1.0, exact=False)
    assert objective_and_gap(as_problem(y, weight, 3), rough, torch.ones(2), torch.ones(2), 1.0)[1] == math.inf


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_loss_objective_and_kkt_agree_with_numpy(rho):
    X, y, weight = make_problem(6)
    W = np.random.default_rng(6).normal(size=(X.shape[1], 3))
    W[::2] = 0
    problem = as_problem(y, weight, 3, rho)
    found = evaluate(problem, torch.as_tensor(X @ W), torch.zeros(3).double())
    b = found.intercept.numpy()
    assert found.loss == pytest.approx(-(weight @ log_softmax(X @ W + b)[np.arange(len(y)), y]) / weight.sum())
    G = torch.as_tensor(gradient(X, y, weight, W, b)[0])
    value, _ = objective_and_gap(problem, found, torch.as_tensor(np.linalg.norm(W, axis=1)), G.norm(dim=1), 0.1)
    assert value == pytest.approx(objective(X, y, weight, W, b, 0.1, rho), rel=1e-12)
    violation = kkt_violation(problem, torch.as_tensor(W[1::2]), G[1::2], G[::2].norm(dim=1), 0.1)
    assert violation == pytest.approx(kkt(X, y, weight, W, b, 0.1, rho), rel=1e-10)
