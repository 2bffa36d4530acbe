"""Head2Toe as a scikit-learn classifier: score all features, keep those that matter, fit a linear head on them."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from estimators.group_lasso.adam import train
from estimators.group_lasso.path import check_sample_weight, group_lasso_path
from estimators.group_lasso.sources import FeatureMatrix, Features, is_feature_matrix
from estimators.heads import fit_ridge_head
from estimators.normalization import (
    NORMALIZATIONS,
    LayerScaled,
    inverse_layer_norms,
    layer_index,
    normalize_kept,
    scales_layers,
    standardizes,
    weighted_moments,
)
from estimators.selection import count_kept, select_features

_ALPHA_STEP = 0.85
_SEEDS = 2**31 - 1


class Head2ToeClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Linear classifier on the features that a group lasso picks from all layers of a network.

    The multinomial group lasso is solved along a path down to ``alpha * alpha_max``, certified by its duality gap;
    the features it keeps get a fresh linear head. Both steps can be trained by Adam instead, as published.

    Parameters
    ----------
    alpha : float in (0, 1], default=0.05
        Strength of the group lasso as a fraction of alpha_max, the smallest strength that keeps nothing.
    l1_ratio : float in (0, 1], default=1.0
        Share of the penalty on sum_d ||W_d||_2; the rest is on ||W||_F^2 / 2. Must be 1 with ``solver="adam"``.
    keep_fraction : float in (0, 1] or None, default=None
        None keeps the features with nonzero weight at ``alpha``. A fraction keeps
        ceil(keep_fraction * n_features) features: by weight, then by the alpha at which they enter the path, then by
        the loss's gradient. ``solver="adam"``, which leaves no weight at zero, needs one.
    normalization : {"standard", "layer", "layer+standard"} or None, default="standard"
        "standard" scales each feature to zero mean and unit variance. "layer" scales each layer's vector of a sample to
        unit length before scoring, and the kept part of each layer again for the head (a plain array is one layer).
        "layer+standard" does the first, then the second.
    solver : {"path", "adam"}, default="path"
        "path" solves the group lasso. "adam" is the published scoring: it trains a linear head on all features with
        the same penalty, of strength ``alpha * alpha_max_``, by Adam on batches of 128 for ``max_iter`` steps.
    head : {"ridge", "path", "adam"}, default="ridge"
        "ridge" fits L2 logistic regression on the kept features; "path" uses the group lasso's own coefficients
        (with ``keep_fraction``, those of the kept features; not with ``solver="adam"``); "adam" is the published
        head, trained on the kept features for ``max_iter`` steps without a penalty.
    C : float, default=1.0
        Inverse penalty of the ridge head, as in scikit-learn's LogisticRegression.
    learning_rate : float, default=0.01
        Adam's at the first step; it decays to 0 along a cosine.
    tol : float, default=1e-3
        Duality gap to certify, relative to the objective of zero coefficients. Adam has none.
    max_iter : int, default=1000
        Steps of the group-lasso solver per alpha of the path; training steps of Adam.
    device : str or torch.device, default="auto"
        Where the path is solved and Adam trains: "auto" is CUDA where there is one, else the CPU. Fitted attributes
        are on the host.
    random_state : int, RandomState instance or None, default=None
        Start and order of the samples in Adam's trainings; the other solvers are deterministic.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,), object
        Where X has names: a DataFrame with string columns, or a FeatureMatrix.
    selected_features_ : ndarray of shape (n_selected,), int64
        Sorted columns that prediction reads.
    feature_scores_ : ndarray of shape (n_features_in_,), float64
        ||W_d||_2 at ``alpha`` on the scale of the problem solved (standardised features with "standard"); with
        ``solver="adam"``, of the trained weights.
    coef_ : ndarray of shape (n_classes, n_selected), or (1, n_selected) for two classes, float64
        For the selected features as given; with a "layer" normalization, for them after scaling to unit length
        (``head="path"``: of the whole layer, else: of the kept part of each layer). Standardisation is already
        contained.
    intercept_ : ndarray of shape (n_classes,), or (1,) for two classes, float64
    alpha_max_ : float
        The strength that ``alpha`` is a fraction of.
    duality_gap_ : float
        Relative duality gap at ``alpha``; nan with ``solver="adam"``, which certifies nothing.
    n_iter_ : int
        Most solver steps that any alpha of the path took; ``max_iter`` with ``solver="adam"``.

    Notes
    -----
    The published settings are ``Head2ToeClassifier(solver="adam", head="adam", normalization="layer",
    keep_fraction=0.2, max_iter=500)``, or ``keep_fraction=0.01, max_iter=5000``; the penalty's strength, 1e-5 there, is
    here ``alpha * alpha_max_``.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from estimators import Head2ToeClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> Head2ToeClassifier().fit(X, y).score(X, y) > 0.9
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "alpha": [Interval(Real, 0, 1, closed="right")],
        "l1_ratio": [Interval(Real, 0, 1, closed="right")],
        "keep_fraction": [Interval(Real, 0, 1, closed="right"), None],
        "normalization": [StrOptions(set(NORMALIZATIONS)), None],
        "solver": [StrOptions({"path", "adam"})],
        "head": [StrOptions({"ridge", "path", "adam"})],
        "C": [Interval(Real, 0, None, closed="neither")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "tol": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "device": [str, torch.device],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        alpha: float = 0.05,
        l1_ratio: float = 1.0,
        keep_fraction: float | None = None,
        normalization: str | None = "standard",
        solver: str = "path",
        head: str = "ridge",
        C: float = 1.0,
        learning_rate: float = 0.01,
        tol: float = 1e-3,
        max_iter: int = 1000,
        device: str | torch.device = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.keep_fraction = keep_fraction
        self.normalization = normalization
        self.solver = solver
        self.head = head
        self.C = C
        self.learning_rate = learning_rate
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Select features and fit the head.

        Parameters
        ----------
        X : array-like or FeatureMatrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
            Class labels.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative. The path and Adam see only ratios; the ridge head weighs them against 1 / C.

        Returns
        -------
        self : Head2ToeClassifier

        Raises
        ------
        ValueError
            If a parameter or input is not as described, or there are fewer than two classes.

        Warns
        -----
        ConvergenceWarning
            If the path does not reach ``tol``, or the head does not converge.
        UserWarning
            If no feature is selected; predictions are then the class frequencies.
        """
        self._validate_params()
        self._check_combination()
        features, labels, weight = self._check_training(X, y, sample_weight)
        layers = layer_index(features)
        scored = LayerScaled(features, layers) if scales_layers(self.normalization) else features
        # Adam takes only alpha_max from the path, which then ends where it starts.
        last = self.alpha if self.solver == "path" else 1.0
        path = group_lasso_path(
            scored,
            labels,
            n_alphas=1 + math.ceil(math.log(last) / math.log(_ALPHA_STEP)),
            alpha_min_ratio=last,
            l1_ratio=self.l1_ratio,
            sample_weight=weight,
            standardize=standardizes(self.normalization),
            tol=self.tol,
            max_iter=self.max_iter,
            device=self.device,
        )
        self.classes_ = path.classes
        self.alpha_max_ = path.alpha_max
        random = check_random_state(self.random_state)
        if self.solver == "adam" and self.keep_fraction is not None:
            self.duality_gap_, self.n_iter_ = math.nan, int(self.max_iter)
            self.feature_scores_ = self._train_scores(scored, labels, weight, random)
            count = count_kept(self.keep_fraction, self.n_features_in_)
            self.selected_features_ = np.sort(np.argsort(-self.feature_scores_, kind="stable")[:count])
        else:
            self.duality_gap_ = float(path.relative_gap[-1])
            self.n_iter_ = int(path.n_iter.max())
            self.feature_scores_ = path.row_norms(-1)
            self.selected_features_ = select_features(path, -1, self.keep_fraction)
        self._layers = layers
        self._layer_scaling = ""
        if scales_layers(self.normalization):
            self._layer_scaling = "whole" if self.head == "path" else "kept"
        if not len(self.selected_features_):
            warnings.warn(
                f"No feature was selected at alpha={self.alpha} (alpha_max_={self.alpha_max_:.3g}): predictions are "
                "the class frequencies. Lower alpha, or set keep_fraction.",
                UserWarning,
                stacklevel=2,
            )
        if self.head == "path" or not len(self.selected_features_):
            coef, intercept = path.coef(-1)[self.selected_features_], path.intercepts[-1]
        else:
            coef, intercept = self._fit_head(features, labels, weight, random)
        if len(self.classes_) == 2:
            coef, intercept = coef[:, 1:] - coef[:, :1], intercept[1:] - intercept[:1]
        self.coef_, self.intercept_ = np.ascontiguousarray(coef.T), intercept
        return self

    def _check_combination(self) -> None:
        if self.solver == "path":
            return
        if self.keep_fraction is None:
            raise ValueError(
                "keep_fraction must be given with solver='adam', which leaves no weight at exactly zero, got None."
            )
        if self.head == "path":
            raise ValueError("head='path' needs solver='path': with solver='adam' it must be 'ridge' or 'adam'.")
        if self.l1_ratio != 1:
            raise ValueError(f"l1_ratio must be 1 with solver='adam', got {self.l1_ratio!r}.")

    def _check_training(
        self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[FeatureMatrix | NDArray[Any], NDArray[Any], NDArray[np.float64]]:
        if is_feature_matrix(X):
            features, labels = self._check_features(X, reset=True), column_or_1d(y, warn=True)
        else:
            features, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        return features, labels, check_sample_weight(sample_weight, features.shape[0])

    def _check_features(self, X: Any, *, reset: bool) -> FeatureMatrix | NDArray[Any]:
        if not is_feature_matrix(X):
            array: NDArray[Any] = validate_data(self, X, dtype=[np.float64, np.float32], reset=reset)
            return array
        names = np.asarray(X.feature_names, dtype=object)
        if reset:
            self.n_features_in_, self.feature_names_in_ = X.shape[1], names
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input."
            )
        elif hasattr(self, "feature_names_in_") and not np.array_equal(names, self.feature_names_in_):
            first = int(np.flatnonzero(names != self.feature_names_in_)[0])
            raise ValueError(
                "X holds other features than those seen in fit (another network, taps or pooling?): feature "
                f"{first} is {names[first]!r}, expected {self.feature_names_in_[first]!r}."
            )
        return X

    def _read_kept(self, features: FeatureMatrix | NDArray[Any]) -> NDArray[np.float64]:
        """The selected features, scaled by layer where the normalization says so, (n_samples, n_selected)."""
        selected = self.selected_features_
        kept = np.asarray(features[:, selected], dtype=np.float64)
        if not np.isfinite(kept).all():
            raise ValueError("X holds NaN or infinity in the selected features; they must be finite.")
        layers = self._layers[selected]
        if self._layer_scaling == "kept":
            return normalize_kept(kept, layers)
        if self._layer_scaling == "whole":
            return kept * inverse_layer_norms(features, self._layers)[:, layers]
        return kept

    def _train_scores(
        self,
        scored: Features,
        labels: NDArray[Any],
        weight: NDArray[np.float64],
        random: np.random.RandomState,
    ) -> NDArray[np.float64]:
        """||W_d||_2 of the published training on all features, (n_features,)."""
        coef, _ = train(
            scored,
            np.searchsorted(self.classes_, labels),
            len(self.classes_),
            sample_weight=weight,
            standardize=standardizes(self.normalization),
            coef=self.alpha * self.alpha_max_,
            learning_rate=self.learning_rate,
            n_steps=self.max_iter,
            seed=int(random.randint(_SEEDS)),
            device=self.device,
        )
        return np.asarray(np.linalg.norm(coef, axis=1))

    def _fit_head(
        self,
        features: FeatureMatrix | NDArray[Any],
        labels: NDArray[Any],
        weight: NDArray[np.float64],
        random: np.random.RandomState,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Fresh head on the kept features as `_read_kept` gives them: (n_selected, n_classes), (n_classes,)."""
        rows = weight > 0
        weight, kept = weight[rows], self._read_kept(features)[rows]
        present, codes = np.unique(np.searchsorted(self.classes_, labels[rows]), return_inverse=True)
        mean, scale = np.zeros(kept.shape[1]), np.ones(kept.shape[1])
        if standardizes(self.normalization):
            mean, scale = weighted_moments(kept, weight, float(np.finfo(features.dtype).eps))
        kept = (kept - mean) * scale
        if self.head == "ridge":
            solved, offset = fit_ridge_head(kept, codes, weight, self.C)
        else:
            solved, offset = train(
                kept,
                codes,
                len(present),
                sample_weight=weight,
                learning_rate=self.learning_rate,
                n_steps=self.max_iter,
                seed=int(random.randint(_SEEDS)),
                device=self.device,
            )
        coef = np.zeros((kept.shape[1], len(self.classes_)))
        intercept = np.full(len(self.classes_), -np.inf)
        coef[:, present] = solved * scale[:, None]
        intercept[present] = offset - mean @ coef[:, present]
        return coef, intercept

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Scores of the classes; of the second class only where there are two.

        Parameters
        ----------
        X : array-like or FeatureMatrix of shape (n_samples, n_features)
            Only ``X[:, selected_features_]`` of a FeatureMatrix is read.

        Returns
        -------
        ndarray of shape (n_samples, n_classes) or (n_samples,), float64

        Raises
        ------
        ValueError
            If X has another number of features, or other feature names, than in `fit`.
        """
        check_is_fitted(self)
        features = self._check_features(X, reset=False)
        scores: NDArray[np.float64] = self._read_kept(features) @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> NDArray[Any]:
        """Most probable class of each row, (n_samples,)."""
        scores = self.decision_function(X)
        labels: NDArray[Any] = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
        return labels

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities, (n_samples, n_classes) float64 in the order of ``classes_``."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([expit(-scores), expit(scores)], axis=1)
        return np.asarray(softmax(scores, axis=1))

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Logarithms of the class probabilities, (n_samples, n_classes) float64."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([log_expit(-scores), log_expit(scores)], axis=1)
        return np.asarray(log_softmax(scores, axis=1))
