"""What the path returns: coefficients and certificates along alpha, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PathPoint:
    """What is known about one alpha as soon as it is solved."""

    index: int
    alpha: float
    n_active: int
    objective: float
    relative_gap: float
    n_iter: int
    n_passes: int
    seconds: float


@dataclass(frozen=True)
class GroupLassoPath:
    """Solutions of the multinomial group lasso along a decreasing sequence of alphas.

    Alphas, objectives, gaps, row norms and gradient norms are those of the problem with standardised features; the
    coefficients and intercepts that apply to X as it was given follow from its solutions, and nothing is lost by
    continuing a path from those.

    Parameters
    ----------
    alphas : ndarray of shape (n_alphas,), float64
        Decreasing.
    alpha_max : float
        Smallest alpha whose solution is zero; 0 if no column varies, infinity for ``l1_ratio=0``.
    classes : ndarray of shape (n_classes,)
        The sorted labels; columns of the coefficients follow this order.
    center, inverse_scale : ndarray of shape (n_features,), float64
        The standardised X is (X - center) * inverse_scale, with 0 for constant columns.
    active : list of ndarray of shape (n_active,), int64
        Per alpha the sorted indices of the nonzero rows of W.
    standardized_coefs : list of ndarray of shape (n_active, n_classes), float64
        Per alpha those rows, for the standardised X.
    standardized_intercepts : ndarray of shape (n_alphas, n_classes), float64
        -inf for a class whose samples all have zero weight.
    gradient_norms : ndarray of shape (n_alphas, n_features), float32
        ||X_d'R|| of every feature at every alpha.
    objective : ndarray of shape (n_alphas,), float64
    relative_gap : ndarray of shape (n_alphas,), float64
        Duality gap divided by the objective of W = 0: the objective is within this of the optimum.
    kkt_violation : ndarray of shape (n_alphas,), float64
        Largest violation of the optimality conditions, as a fraction of alpha.
    n_iter : ndarray of shape (n_alphas,), int64
        Steps of the inner solver.
    n_passes : ndarray of shape (n_alphas,), int64
        Full passes over X; one more was made before the first alpha.
    seconds : ndarray of shape (n_alphas,), float64
        Wall time of each alpha; copying X and the first pass come on top.

    Attributes
    ----------
    n_features : int
    active_coefs : list of ndarray of shape (n_active, n_classes), float64
        Per alpha the nonzero rows of W for X as given.
    active_norms : list of ndarray of shape (n_active,), float64
        Per alpha ||W_d|| of those rows for the standardised X.
    intercepts : ndarray of shape (n_alphas, n_classes), float64
        For X as given.
    """

    alphas: NDArray[np.float64]
    alpha_max: float
    classes: NDArray[Any]
    center: NDArray[np.float64]
    inverse_scale: NDArray[np.float64]
    active: list[NDArray[np.int64]]
    standardized_coefs: list[NDArray[np.float64]]
    standardized_intercepts: NDArray[np.float64]
    gradient_norms: NDArray[np.float32]
    objective: NDArray[np.float64]
    relative_gap: NDArray[np.float64]
    kkt_violation: NDArray[np.float64]
    n_iter: NDArray[np.int64]
    n_passes: NDArray[np.int64]
    seconds: NDArray[np.float64]

    @property
    def n_features(self) -> int:
        return len(self.center)

    @cached_property
    def active_coefs(self) -> list[NDArray[np.float64]]:
        return [
            coef * self.inverse_scale[active, None]
            for active, coef in zip(self.active, self.standardized_coefs, strict=True)
        ]

    @cached_property
    def active_norms(self) -> list[NDArray[np.float64]]:
        return [np.linalg.norm(coef, axis=1) for coef in self.standardized_coefs]

    @cached_property
    def intercepts(self) -> NDArray[np.float64]:
        shifts = [self.center[active] @ coef for active, coef in zip(self.active, self.active_coefs, strict=True)]
        return self.standardized_intercepts - np.array(shifts).reshape(self.standardized_intercepts.shape)

    def take(self, indices: Sequence[int]) -> GroupLassoPath:
        """The path with the alphas at ``indices``, increasing, only."""
        chosen = list(indices)
        return replace(self, **{name: _pick(getattr(self, name), chosen) for name in _PER_ALPHA})

    def join(self, other: GroupLassoPath) -> GroupLassoPath:
        """This path and another one of the same problem, with no alpha in common, as one."""
        order = np.argsort(-np.concatenate([self.alphas, other.alphas]), kind="stable").tolist()
        both = {name: (getattr(self, name), getattr(other, name)) for name in _PER_ALPHA}
        return replace(
            self,
            **{
                name: _pick(a + b if isinstance(a, list) else np.concatenate([a, b]), order)
                for name, (a, b) in both.items()
            },
        )

    def coef(self, index: int) -> NDArray[np.float64]:
        """Coefficients W at ``alphas[index]`` for X as given, dense, (n_features, n_classes) float64."""
        dense = np.zeros((self.n_features, len(self.classes)))
        dense[self.active[index]] = self.active_coefs[index]
        return dense

    def predict_logits(self, X: Any, index: int) -> NDArray[np.float64]:
        """X W + b at ``alphas[index]``, (n_samples, n_classes) float64, up to a constant per row.

        Parameters
        ----------
        X : array-like or FeatureMatrix of shape (n_samples, n_features)
            Only the active columns of a FeatureMatrix are read.
        index : int

        Raises
        ------
        ValueError
            If X has another number of features than the path.
        """
        matrix = X if isinstance(X, Tensor) or hasattr(X, "column_blocks") else np.asarray(X)
        if len(matrix.shape) != 2 or matrix.shape[1] != self.n_features:
            raise ValueError(f"X must have shape (n_samples, {self.n_features}), got {tuple(matrix.shape)}.")
        active = self.active[index]
        kept = matrix[:, active]
        kept = kept.double().cpu() if isinstance(kept, Tensor) else kept
        logits: NDArray[np.float64] = np.asarray(kept, dtype=np.float64) @ self.active_coefs[index]
        logits += self.intercepts[index]
        return logits

    def row_norms(self, index: int) -> NDArray[np.float64]:
        """||W_d|| at ``alphas[index]`` for the standardised X, (n_features,) float64."""
        norms = np.zeros(self.n_features)
        norms[self.active[index]] = self.active_norms[index]
        return norms

    @property
    def entry_order(self) -> NDArray[np.float64]:
        """Largest alpha at which each feature is nonzero, 0 if it never is, (n_features,) float64."""
        entered = np.zeros(self.n_features)
        for alpha, active in zip(self.alphas[::-1], self.active[::-1], strict=True):
            entered[active] = alpha
        return entered


_PER_PROBLEM = ("alpha_max", "classes", "center", "inverse_scale")
_PER_ALPHA = [field.name for field in fields(GroupLassoPath) if field.name not in _PER_PROBLEM]


def _pick(values: Any, indices: list[int]) -> Any:
    return [values[index] for index in indices] if isinstance(values, list) else values[indices]
