"""Which features a path keeps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from estimators.group_lasso.result import GroupLassoPath


def rank_features(path: GroupLassoPath, index: int) -> NDArray[np.int64]:
    """Features from most to least important at ``path.alphas[index]``, (n_features,).

    By ||W_d||; features without weight by the alpha at which they enter the path; those that never do by ||X_d'R||;
    ties by column.
    """
    gradient = path.gradient_norms[index]
    return np.lexsort((np.arange(path.n_features), -gradient, -path.entry_order, -path.row_norms(index)))


def select_features(path: GroupLassoPath, index: int, keep_fraction: float | None) -> NDArray[np.int64]:
    """Features kept at ``path.alphas[index]``, sorted: those with nonzero weight, or a fraction of `rank_features`."""
    if keep_fraction is None:
        return path.active[index]
    return np.sort(rank_features(path, index)[: count_kept(keep_fraction, path.n_features)])


def count_kept(keep_fraction: float, n_features: int) -> int:
    """ceil(keep_fraction * n_features), at least 1."""
    # The products 0.07 * 100 and 0.29 * 100 are off by an ulp; that must not add a feature.
    return max(1, math.ceil(keep_fraction * n_features * (1.0 - 1e-12)))
