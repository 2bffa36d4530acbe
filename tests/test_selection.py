"""Which features are kept, and in which order."""

import numpy as np
import pytest
from _estimator_data import make_problem

from estimators import GroupLassoPath, group_lasso_path
from estimators.selection import rank_features, select_features


def handmade_path():
    """Six features: 4 and 1 have weight at the last alpha, 5 had some before, 2 and 3 tie in gradient, 0 has least."""
    ones = np.ones(2)
    return GroupLassoPath(
        alphas=np.array([2.0, 1.0]),
        alpha_max=3.0,
        classes=np.arange(2),
        center=np.zeros(6),
        inverse_scale=np.ones(6),
        active=[np.array([4, 5]), np.array([1, 4])],
        standardized_coefs=[np.array([[0.5, 0.0], [0.0, 9.0]]), np.array([[0.3, 0.0], [0.0, 0.7]])],
        standardized_intercepts=np.zeros((2, 2)),
        gradient_norms=np.array([[1, 1, 1, 1, 1, 1], [0.1, 1.0, 0.6, 0.6, 1.0, 0.2]], dtype=np.float32),
        objective=ones,
        relative_gap=0 * ones,
        kkt_violation=0 * ones,
        n_iter=np.ones(2, dtype=np.int64),
        n_passes=np.ones(2, dtype=np.int64),
        seconds=ones,
    )


def test_rank_is_by_weight_then_entry_then_gradient_then_column():
    assert rank_features(handmade_path(), 1).tolist() == [4, 1, 5, 2, 3, 0]


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [
        (None, [1, 4]),
        (1e-9, [4]),
        (1 / 3, [1, 4]),
        (0.34, [1, 4, 5]),
        (0.5, [1, 4, 5]),
        (2 / 3, [1, 2, 4, 5]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_fraction_keeps_the_first_of_the_ranking_sorted(fraction, kept):
    assert select_features(handmade_path(), 1, fraction).tolist() == kept


@pytest.mark.parametrize(("fraction", "n_features", "count"), [(0.07, 100, 7), (0.29, 100, 29), (0.071, 100, 8)])
def test_count_is_the_ceiling_of_the_exact_product(fraction, n_features, count):
    X, y, _ = make_problem(0, d=n_features)
    path = group_lasso_path(X, y, n_alphas=3, alpha_min_ratio=0.5)
    assert len(select_features(path, 2, fraction)) == count


def test_the_best_features_are_kept_first():
    X, y, _ = make_problem(1, n=60, d=40)
    path = group_lasso_path(X, y, n_alphas=8, alpha_min_ratio=0.1)
    norms = path.row_norms(7)
    kept = select_features(path, 7, 0.1)
    assert len(kept) == 4
    assert norms[kept].min() >= np.delete(norms, kept).max() > 0
