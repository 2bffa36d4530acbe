"""Head2Toe as a scikit-learn classifier: score all features, keep those that matter, fit a linear head on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_expit, log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from estimators.device import resolve_device
from estimators.group_lasso.result import GroupLassoPath
from estimators.head import KeptFeatures, LinearModel, RidgeHead, held_bytes
from estimators.held import hold
from estimators.labels import as_labels
from estimators.paths import PathOptions, solve_path
from estimators.scaling import layer_scaling
from estimators.selection import select_features
from estimators.selector import PATH_CONSTRAINTS, SelectedFeatures, warn_nothing_selected
from estimators.sklearn_private import Interval, StrOptions
from estimators.training import Training, check_features, check_training


class ScoresClassifier(ClassifierMixin):  # type: ignore[misc]
    """Labels and probabilities from ``decision_function`` and ``classes_``."""

    classes_: NDArray[Any]
    decision_function: Callable[[Any], NDArray[np.float64]]

    def predict(self, X: Any) -> NDArray[Any]:
        """Most probable class of each row, (n_samples,)."""
        scores = self.decision_function(X)
        labels: NDArray[Any] = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
        return labels

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities, (n_samples, n_classes) float64 in the order of ``classes_``."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Logarithms of the class probabilities, (n_samples, n_classes) float64."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([log_expit(-scores), log_expit(scores)], axis=1)
        return np.asarray(log_softmax(scores, axis=1))

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Accuracy of `predict` for the labels y, none of which may be missing."""
        return float(super().score(X, as_labels(y), sample_weight))


class SparseLinearClassifier(SelectedFeatures, ScoresClassifier, BaseEstimator):  # type: ignore[misc]
    """A linear model of the selected features; subclasses fit it."""

    max_memory: int | str | None

    def _set_linear(self, training: Training, linear: LinearModel, scaling: str) -> None:
        """Take the coefficients of the selected features, and how their layers are scaled."""
        self.classes_, self._layer_scaling = training.classes, scaling
        coef, intercept = linear.coef, linear.intercept
        if len(self.classes_) == 2:
            coef, intercept = coef[:, 1:] - coef[:, :1], intercept[1:] - intercept[:1]
        self._kept_coef, self.intercept_ = np.ascontiguousarray(coef.T), intercept

    @property
    def coef_(self) -> NDArray[np.float64]:
        """Coefficients of all features, (n_classes, n_features_in_), or (1, n_features_in_) for two classes."""
        check_is_fitted(self)
        coef = np.zeros((len(self._kept_coef), self.n_features_in_))
        coef[:, self.selected_features_] = self._kept_coef
        return coef

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Scores of the classes, (n_samples, n_classes), or of the second of two classes, (n_samples,).

        Of a FeatureMatrix only the selected columns are read.
        """
        check_is_fitted(self)
        features = check_features(self, X, reset=False)
        scores = self._scores(features, self.selected_features_, self.feature_layers_)
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def _scores(self, features: Any, selected: NDArray[np.int64], layers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Linear scores (n_samples, n_classes or 1) from the columns ``selected`` of ``features``, of these layers."""
        kept = KeptFeatures(features, selected, layers, self._layer_scaling, held_bytes(self.max_memory))
        return kept.scores(self._kept_coef.T, self.intercept_)


class Head2ToeClassifier(SparseLinearClassifier):
    """Linear classifier on the features that a group lasso selects from all layers of a network.

    The multinomial group lasso is solved along a path down to ``alpha * alpha_max``, certified by its duality gap.
    The features it keeps get a fresh linear head.

    Parameters
    ----------
    alpha : float in (0, 1], default=0.05
        Strength of the group lasso as a fraction of alpha_max, the smallest strength that keeps nothing.
    l1_ratio : float in (0, 1], default=1.0
        Share of the penalty on sum_d ||W_d||_2; the rest is on ||W||_F^2 / 2.
    keep_fraction : float in (0, 1] or None, default=None
        None keeps the features with nonzero weight at ``alpha``. A fraction keeps
        ceil(keep_fraction * n_features) features: by weight, then by the alpha at which they enter the path, then by
        the loss's gradient. 1.0 keeps all; with the ridge head no path is then solved, and ``alpha`` has no effect.
    layers : str, sequence of str or None, default=None
        Use only the layers whose name matches any of these globs, as ``X.select_layers`` does; None for all.
        ``keep_fraction`` counts within them, and other layers are never read. With ``keep_fraction=1.0``, the last
        layer's name gives a linear probe. A plain array is one layer, "X".
    normalization : {"standard", "layer", "layer+standard"} or None, default="standard"
        "standard" scales each feature to zero mean and unit variance. "layer" scales each layer's vector of a sample to
        unit length before scoring, and the kept part of each layer again for the head. "layer+standard" does the first,
        then the second.
    head : {"ridge", "path"}, default="ridge"
        "ridge" fits L2 logistic regression on the kept features, to 1e-8 of its objective. "path" uses the group
        lasso's own coefficients of the kept features.
    C : float, default=1.0
        Inverse penalty of the ridge head, as in scikit-learn's LogisticRegression.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, as elsewhere in scikit-learn; they multiply ``sample_weight``.
    tol : float, default=1e-3
        Duality gap to certify, relative to the objective of zero coefficients.
    max_iter : int, default=1000
        Newton steps per alpha of the path.
    device : str or torch.device, default="auto"
        Where to compute; "auto" is CUDA where there is one, else the CPU. Fitted attributes are on the host.
    max_memory : int or str, default=None
        What X may take in memory ("4GB"); None for 80 % of what is free. Stored features are read once and held where
        that leaves as much again for the solver. What the solver cannot hold is read in blocks. Fits at the same time
        do not know of each other: in a `GridSearchCV` with ``n_jobs``, give each its share.
    memory : str, path, joblib.Memory or None, default=None
        Folder or URL (``s3://bucket/paths``, for searches on several machines) where solved paths are kept. Fits on the
        same rows then solve one path, whatever their ``alpha``, ``keep_fraction``, ``head`` and ``C``: a `GridSearchCV`
        costs one path per fold.
    verbose : int, default=0
        Print a line per alpha of the path.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,), object
        Where X has names: a DataFrame with string columns, or a FeatureMatrix.
    recipe_ : dict or None
        How the features of fit were made, where X is a FeatureMatrix that says so; features of another recipe are
        refused.
    selected_features_ : ndarray of shape (n_selected,), int64
        Sorted columns that prediction reads.
    feature_scores_ : ndarray of shape (n_features_in_,), float64
        ||W_d||_2 at ``alpha``, or of the ridge head where no path was solved, on the scale of the problem solved
        (standardised features with "standard"); 0 outside ``layers``.
    feature_layers_ : ndarray of shape (n_features_in_,), int64
        Position in ``layer_names_`` of each feature's layer.
    layer_names_ : ndarray of shape (n_layers,), object
        In network order.
    coef_ : ndarray of shape (n_classes, n_features_in_), or (1, n_features_in_) for two classes, float64
        Zero for features that are not selected; made on access. For features as given, standardisation undone. With a
        "layer" normalization, for features after scaling to unit length (``head="path"``: of the whole layer, else: of
        the kept part of each layer).
    intercept_ : ndarray of shape (n_classes,), or (1,) for two classes, float64
    alpha_max_, duality_gap_ : float
        The strength that ``alpha`` is a fraction of, and the relative duality gap; nan where no path was solved.
    n_iter_ : int
        Most solver steps that any alpha of the path took, or the steps of the ridge head where no path was solved.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from estimators import Head2ToeClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> Head2ToeClassifier().fit(X, y).score(X, y) > 0.9
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **PATH_CONSTRAINTS,
        "head": [StrOptions({"ridge", "path"})],
        "C": [Interval(Real, 0, None, closed="neither")],
    }

    def __init__(
        self,
        alpha: float = 0.05,
        l1_ratio: float = 1.0,
        keep_fraction: float | None = None,
        layers: str | Sequence[str] | None = None,
        normalization: str | None = "standard",
        head: str = "ridge",
        C: float = 1.0,
        class_weight: dict[Any, float] | str | None = None,
        tol: float = 1e-3,
        max_iter: int = 1000,
        device: str | torch.device = "auto",
        max_memory: int | str | None = None,
        memory: Any = None,
        verbose: int = 0,
    ) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.keep_fraction = keep_fraction
        self.layers = layers
        self.normalization = normalization
        self.head = head
        self.C = C
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.max_memory = max_memory
        self.memory = memory
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Select features and fit the head.

        Parameters
        ----------
        X : array-like or FeatureMatrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
            Labels of two classes or more.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative. The path sees only ratios; the ridge head weighs them against 1 / C.

        Warns
        -----
        ConvergenceWarning
            If the path does not reach ``tol``, or the head does not converge.
        UserWarning
            If no feature is selected; predictions are then the class frequencies.
        """
        self._validate_params()
        training = check_training(self, X, y, sample_weight, self.class_weight)
        columns = training.columns_of(self.layers)
        part, options = training.take(columns), PathOptions.of(self)
        if self.head == "ridge":
            part, left = hold(part, self.max_memory, self.device)
            options = replace(options, max_memory=left)
        path, selected = None, np.arange(len(columns))
        if self.head == "path" or self.keep_fraction != 1.0:
            path = solve_path(part, [float(self.alpha)], options)[0]
            selected = select_features(path, -1, self.keep_fraction)
            if not len(selected):
                warn_nothing_selected(self.alpha, path.alpha_max, "predictions are the class frequencies")
        if path is not None and (self.head == "path" or not len(selected)):
            linear = _path_head(path, selected)
        else:
            device, limit = resolve_device(self.device), held_bytes(options.max_memory)
            linear = RidgeHead(part, selected, self.normalization, device, limit).fit(self.C)
        self._set_fit(training, columns, path, selected, linear)
        return self

    def _set_fit(
        self,
        training: Training,
        columns: NDArray[np.int64],
        path: GroupLassoPath | None,
        selected: NDArray[np.int64],
        linear: LinearModel,
    ) -> None:
        """Take a head on what a path, or None for no path, selected among ``columns`` of a training set."""
        if path is None:
            self.alpha_max_, self.duality_gap_, self.n_iter_ = math.nan, math.nan, max(1, linear.n_iter)
        else:
            self._set_path(path)
        self._set_selection(training, columns, selected, linear.row_norms if path is None else path.row_norms(-1))
        part = "whole" if self.head == "path" else "kept"
        self._set_linear(training, linear, layer_scaling(self.normalization, part))


def _path_head(path: GroupLassoPath, selected: NDArray[np.int64]) -> LinearModel:
    """The end of the path, restricted to the selected features; the others count as their means."""
    coef = path.coef(-1)[selected]
    intercept = path.standardized_intercepts[-1] - path.center[selected] @ coef
    return LinearModel(coef, intercept, path.row_norms(-1)[selected], int(path.n_iter.max()))
