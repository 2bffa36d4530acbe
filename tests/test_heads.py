"""The ridge head: the same solution in either space, and scikit-learn's."""

import numpy as np
import pytest
from _estimator_data import make_problem
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from estimators import heads
from estimators.heads import fit_ridge_head


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("C", [0.01, 1.0])
@pytest.mark.parametrize("d", [10, 80])
def test_solution_is_the_optimum_in_feature_space(k, C, d):
    """n = 40 samples: d = 80 is solved in sample space, d = 10 in feature space."""
    X, y, weight = make_problem(0, d=d, k=k)
    coef, intercept = fit_ridge_head(X, y, weight, C)
    P = softmax(X @ coef + intercept, axis=1)
    R = C * weight[:, None] * (P - np.eye(k)[y])
    # One logit w stands in two columns -w/2 and w/2: the penalty ||w||^2 / 2 is then the sum of both, squared.
    ridge = coef if k > 2 else 2 * coef
    scale = np.abs(C * weight[:, None] * X).sum()
    assert np.abs(X.T @ R + ridge).max() < 1e-5 * scale
    assert np.abs(R.sum(axis=0)).max() < 1e-5 * scale


@pytest.mark.parametrize("k", [2, 4])
def test_sample_space_and_feature_space_agree_with_scikit_learn(k):
    X, y, weight = make_problem(1, d=80, k=k)
    coef, intercept = fit_ridge_head(X, y, weight, 0.5)
    reference = LogisticRegression(C=0.5, tol=1e-8, max_iter=10_000).fit(X, y, sample_weight=weight)
    ours = coef.T if k > 2 else (coef[:, 1:] - coef[:, :1]).T
    np.testing.assert_allclose(ours, reference.coef_, atol=1e-4)
    np.testing.assert_allclose(softmax(X @ coef + intercept, axis=1), reference.predict_proba(X), atol=1e-4)


def test_repeating_a_sample_is_doubling_its_weight():
    X, y, _ = make_problem(2)
    weight = np.ones(len(y))
    weight[:10] = 2
    double = np.concatenate([np.arange(len(y)), np.arange(10)])
    one, two = fit_ridge_head(X, y, weight, 1.0), fit_ridge_head(X[double], y[double], np.ones(len(double)), 1.0)
    np.testing.assert_allclose(one[0], two[0], atol=1e-4)


def test_a_solver_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(heads, "_MAX_ITER", 1)
    X, y, weight = make_problem(3)
    with pytest.warns(ConvergenceWarning):
        fit_ridge_head(X, y, weight, 1.0)
