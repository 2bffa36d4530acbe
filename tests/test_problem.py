"""The mathematics of the group lasso: loss, intercept, dual value, gap, optimality of each row."""

import math

import numpy as np
import pytest
import torch
from _estimator_data import as_problem, gradient, kkt, log_softmax, make_problem, objective
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators.group_lasso.problem import (
    Evaluation,
    alpha_max,
    dual_value,
    evaluate,
    intercept_hessian,
    loss,
    null_objective,
    null_probabilities,
    objective_and_gap,
    row_violations,
)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 6), scale=st.floats(0.0, 50.0), offset=st.floats(-10.0, 10.0))
def test_intercept_is_exact_for_any_scores_and_start(seed, k, scale, offset):
    _, y, weight = make_problem(seed, k=k)
    rng = np.random.default_rng(seed)
    problem, products = as_problem(y, weight), torch.as_tensor(rng.normal(size=(k, len(y))) * scale)
    found = evaluate(problem, products, torch.as_tensor(offset * rng.normal(size=k)))
    assert found.exact
    assert found.residual.sum(1).abs().max() <= 1e-12
    assert abs(float(found.intercept.sum())) < 1e-9 * (1 + scale)
    scores = (products + found.intercept[:, None]).T
    np.testing.assert_allclose(found.probabilities.T, np.exp(log_softmax(scores.numpy())), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.residual, problem.weights * (found.probabilities - problem.targets), atol=1e-15)
    nudged = found.intercept + 1e-3 * torch.as_tensor(rng.normal(size=k))
    assert loss(problem, products + nudged[:, None]) >= found.loss - 1e-12 * (1 + scale)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("k", [2, 5, 16])
def test_saturated_probabilities_have_a_definite_hessian(k, scale):
    """Where every sample is sure of a class, right or wrong, the curvature all but vanishes."""
    rng = np.random.default_rng(k)
    y = np.arange(10 * k) % k
    guesses = np.where(np.arange(10 * k) % 7 == 0, (y + 1) % k, y)
    products = torch.as_tensor(scale * np.eye(k)[:, guesses] + 1e-3 * rng.normal(size=(k, 10 * k)))
    problem = as_problem(y, np.ones(10 * k))
    probabilities = torch.softmax(products, 0)
    hessian = intercept_hessian(problem, probabilities)
    assert (hessian.diagonal() > 0).all()
    assert torch.isfinite(torch.linalg.inv(hessian)).all()
    found = evaluate(problem, products, torch.zeros(k).double())
    assert np.isfinite(found.loss)
    assert found.loss <= loss(problem, products) + 1e-12


def test_without_intercept_it_stays_zero_and_needs_no_condition():
    _, y, weight = make_problem(0)
    products = torch.as_tensor(np.random.default_rng(0).normal(size=(3, len(y))))
    found = evaluate(as_problem(y, weight, fit_intercept=False), products, torch.ones(3).double())
    assert found.exact
    assert torch.equal(found.intercept, torch.zeros(3).double())


def test_null_objective_is_entropy_of_the_weighted_frequencies():
    _, y, weight = make_problem(1)
    q = np.bincount(y, weight) / weight.sum()
    problem = as_problem(y, weight)
    np.testing.assert_allclose(null_probabilities(problem), q, rtol=1e-14)
    assert null_objective(problem) == pytest.approx(-(q * np.log(q)).sum(), rel=1e-13)
    assert null_objective(as_problem(y, weight, fit_intercept=False)) == pytest.approx(math.log(3), rel=1e-13)


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.7])
def test_dual_value_below_one_is_the_best_on_the_segment(rho):
    X, y, weight = make_problem(3)
    problem = as_problem(y, weight, rho)
    W = 0.3 * np.random.default_rng(3).normal(size=(X.shape[1], 3))
    found = evaluate(problem, torch.as_tensor(X @ W).T, torch.zeros(3).double())
    norms = np.linalg.norm(found.residual.numpy() @ X, axis=0)
    Y, P, p = problem.targets.numpy(), found.probabilities.numpy(), problem.weights.numpy()
    for alpha in (0.005, 0.05, 0.5, 5.0):

        def at(c, alpha=alpha):
            Q = (1 - c) * Y + c * P
            entropy = -np.where(Q > 0, Q * np.log(np.where(Q > 0, Q, 1)), 0).sum(0) @ p
            excess = np.maximum(c * norms - alpha * rho, 0)
            return entropy - (excess**2).sum() / (2 * alpha * (1 - rho))

        scanned = max(at(c) for c in np.linspace(0, 1, 20001))
        value = dual_value(problem, found.probabilities, torch.as_tensor(norms), alpha)
        assert scanned <= value + 1e-12
        assert value == pytest.approx(scanned, abs=1e-6)


def test_dual_value_at_one_scales_into_the_feasible_ball():
    X, y, weight = make_problem(4)
    problem = as_problem(y, weight)
    found = evaluate(problem, torch.zeros(3, len(y)).double(), torch.zeros(3).double())
    norms = (found.residual @ torch.as_tensor(X)).norm(dim=0)
    largest = alpha_max(problem, norms)
    c = 0.4
    Q = (1 - c) * problem.targets + c * found.probabilities
    expected = float(-((Q * Q.log()).sum(0) @ problem.weights))
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
    problem = as_problem(y, weight, rho, fit_intercept)
    rng = np.random.default_rng(seed)
    W, V = size * rng.normal(size=(2, 6, 3))
    found = evaluate(problem, torch.as_tensor(X @ W).T, torch.zeros(3).double())
    bound = dual_value(problem, found.probabilities, (found.residual @ torch.as_tensor(X)).norm(dim=0), alpha)
    assert bound <= objective(X, y, weight, V, rng.normal(size=3) * fit_intercept, alpha, rho) + 1e-10


def test_gap_is_infinite_without_an_exact_intercept():
    _, y, weight = make_problem(5)
    uniform = torch.full((3, len(y)), 1 / 3).double()
    rough = Evaluation(torch.zeros(3).double(), uniform, torch.zeros_like(uniform), 1.0, exact=False)
    assert objective_and_gap(as_problem(y, weight), rough, torch.ones(2), torch.ones(2), 1.0)[1] == math.inf


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_loss_objective_and_optimality_of_each_row_agree_with_numpy(rho):
    X, y, weight = make_problem(6)
    W = np.random.default_rng(6).normal(size=(X.shape[1], 3))
    W[::2] = 0
    problem, alpha = as_problem(y, weight, rho), 0.1
    found = evaluate(problem, torch.as_tensor(X @ W).T, torch.zeros(3).double())
    b = found.intercept.numpy()
    assert found.loss == pytest.approx(-(weight @ log_softmax(X @ W + b)[np.arange(len(y)), y]) / weight.sum())
    G = gradient(X, y, weight, W, b)[0]
    norms = torch.as_tensor(np.linalg.norm(W, axis=1))
    value, _ = objective_and_gap(problem, found, norms, torch.as_tensor(np.linalg.norm(G, axis=1)), alpha)
    assert value == pytest.approx(objective(X, y, weight, W, b, alpha, rho), rel=1e-12)
    violations = row_violations(problem, torch.as_tensor(W).T, torch.as_tensor(G).T, alpha)
    assert violations.max() / alpha == pytest.approx(kkt(X, y, weight, W, b, alpha, rho), rel=1e-10)
    # Of a row that is zero, what is left of its gradient after the best point of the ball alpha rho.
    np.testing.assert_allclose(violations[::2], np.maximum(np.linalg.norm(G[::2], axis=1) - alpha * rho, 0), rtol=1e-12)
    unit = W[1] / np.linalg.norm(W[1])
    stationarity = G[1] + alpha * (rho * unit + (1 - rho) * W[1])
    assert violations[1] == pytest.approx(np.linalg.norm(stationarity), rel=1e-10)
