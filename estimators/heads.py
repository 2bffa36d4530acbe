"""The linear head on kept features: L2 logistic regression, solved in the smaller of sample and feature space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

_TOLERANCE = 1e-6
_MAX_ITER = 10_000


def fit_ridge_head(
    X: NDArray[np.float64], codes: NDArray[np.int64], sample_weight: NDArray[np.float64], C: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Minimise C * sum_i s_i CE(y_i, x_i V + c) + ||V||_F^2 / 2, as scikit-learn's LogisticRegression does.

    The solution is a combination of rows of X. With fewer samples than features, X' = QT (thin QR) and the problem is
    solved for T', whose rows are as many numbers as there are samples; V = Q V_T is the same solution.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features), float64
        At least one feature.
    codes : ndarray of shape (n_samples,), int64
        Classes 0 .. n_classes - 1, all present, two or more.
    sample_weight : ndarray of shape (n_samples,), float64
        Positive.
    C : float
        Inverse strength of the penalty.

    Returns
    -------
    coef : ndarray of shape (n_features, n_classes), float64
        For two classes, scikit-learn's one logit w as softmax columns -w/2, w/2.
    intercept : ndarray of shape (n_classes,), float64

    Warns
    -----
    ConvergenceWarning
        From scikit-learn, if L-BFGS does not converge.
    """
    basis = None
    if X.shape[0] < X.shape[1]:
        basis, triangle = np.linalg.qr(X.T)
        X = triangle.T
    model = LogisticRegression(C=C, tol=_TOLERANCE, max_iter=_MAX_ITER).fit(X, codes, sample_weight=sample_weight)
    coef, intercept = model.coef_.T, model.intercept_
    if coef.shape[1] == 1:
        coef, intercept = np.hstack([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    return (coef if basis is None else basis @ coef), intercept
