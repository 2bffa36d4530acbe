"""What the path returns: coefficients and certificates along alpha, in numpy."""

from __future__ import annotations

from dataclasses import dataclass
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

    Coefficients and intercepts apply to X as it was given. Alphas, objectives, gaps, row norms and gradient norms are
    those of the standardised problem.

    Attributes
    ----------
    alphas : ndarray of shape (n_alphas,), float64
        Decreasing.
    alpha_max : float
        Smallest alpha whose solution is zero; 0 if no column varies, infinity for ``l1_ratio=0``.
    classes : ndarray of shape (n_classes,)
        The sorted labels; columns of the coefficients follow this order.
    n_features : int
    active : list of ndarray of shape (n_active,), int64
        Per alpha the sorted indices of the nonzero rows of W.
    active_coefs : list of ndarray of shape (n_active, n_classes), float64
        Per alpha those rows.
    active_norms : list of ndarray of shape (n_active,), float64
        Per alpha ||W_d|| of those rows for the standardised X.
    intercepts : ndarray of shape (n_alphas, n_classes), float64
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
    """

    alphas: NDArray[np.float64]
    alpha_max: float
    classes: NDArray[Any]
    n_features: int
    active: list[NDArray[np.int64]]
    active_coefs: list[NDArray[np.float64]]
    active_norms: list[NDArray[np.float64]]
    intercepts: NDArray[np.float64]
    gradient_norms: NDArray[np.float32]
    objective: NDArray[np.float64]
    relative_gap: NDArray[np.float64]
    kkt_violation: NDArray[np.float64]
    n_iter: NDArray[np.int64]
    n_passes: NDArray[np.int64]
    seconds: NDArray[np.float64]

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
