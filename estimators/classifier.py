"""Head2Toe as a scikit-learn classifier: score all features, keep those that matter, fit a linear head on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from estimators.adam import train
from estimators.device import resolve_device
from estimators.features import ColumnSource
from estimators.group_lasso.result import GroupLassoPath
from estimators.held import hold
from estimators.kept import KeptFeatures, held_bytes
from estimators.labels import as_labels
from estimators.paths import PathOptions, solve_path
from estimators.refit import fit_ridge
from estimators.scaling import (
    NORMALIZATIONS,
    LayerScaled,
    inverse_layer_norms,
    kept_scaling,
    scales_layers,
    standardizes,
    weighted_moments,
)
from estimators.selection import (
    PATH_CONSTRAINTS,
    SelectedFeatures,
    count_kept,
    warn_nothing_selected,
)
from estimators.sklearn_private import Interval, StrOptions
from estimators.switches import cpu_threads
from estimators.training import Training, check_features, check_training

_SEEDS = 2**31 - 1


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

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Accuracy of `predict` for the labels y, none of which may be missing."""
        return float(super().score(X, as_labels(y), sample_weight))


class Head2ToeClassifier(SelectedFeatures, ScoresClassifier, BaseEstimator):  # type: ignore[misc]
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
    solver : {"newton", "adam"}, default="newton"
        "newton" solves the group lasso along its path. "adam" is the published scoring: it trains a linear head on all
        features with the same penalty, of strength ``alpha * alpha_max_``, by Adam on batches of 128 for ``max_iter``
        steps.
    head : {"ridge", "path", "adam"}, default="ridge"
        "ridge" fits L2 logistic regression on the kept features, to 1e-8 of its objective; "path" uses the group
        lasso's own coefficients (with ``keep_fraction``, ``last_layers`` or ``layer``, those of the kept features;
        not with ``solver="adam"``); "adam" is the published head, trained on the kept features for ``max_iter`` steps
        without a penalty.
    C : float, default=1.0
        Inverse penalty of the ridge head, as in scikit-learn's LogisticRegression.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, as elsewhere in scikit-learn; they multiply ``sample_weight``.
    tol : float, default=1e-3
        Duality gap to certify, relative to the objective of zero coefficients. Adam has none.
    max_iter : int, default=1000
        Steps of the group-lasso solver per alpha of the path; training steps of Adam.
    device : str or torch.device, default="auto"
        Where the path is solved, the head fitted and Adam trains: "auto" is CUDA where there is one, else the CPU.
        Fitted attributes are on the host.
    memory : str, path, joblib.Memory or None, default=None
        Folder or URL (``s3://bucket/paths``, for searches on several machines) where solved paths are kept. Fits on the
        same rows then solve one path, whatever their ``alpha``, ``keep_fraction``, ``head`` and ``C``: what
        `GridSearchCV` tries costs one path per fold.
    n_jobs : int or None, default=None
        CPU threads; None is torch's setting, -1 one per core.
    random_state : int, RandomState instance or None, default=None
        Start and order of the samples in Adam's trainings; the other solvers are deterministic.
    verbose : int, default=0
        Print a line per alpha of the path.
    learning_rate : float, default=0.01
        Adam's at the first step; it decays to 0 along a cosine.
    max_memory : int or str, default=None
        What X may take in memory ("4GB"); None for 80 % of what is free. Stored features are read once and held where
        that leaves as much again for the solver. What the solver cannot hold is read in blocks; Adam holds X whole.
        Fits at the same time do not know of each other: in a `GridSearchCV` with ``n_jobs``, give each its share.
    last_layers : int or None, default=None
        Keep all features of so many last layers instead, whatever ``alpha`` says: a linear probe. A plain array is one
        layer. Not with ``keep_fraction``, nor with ``solver="adam"``.
    layer : int or None, default=None
        Keep all features of this one layer instead, counted from 0 in network order. Not with ``keep_fraction`` or
        ``last_layers``, nor with ``solver="adam"``.
    target_size : int or None, default=None
        Of a FeatureMatrix that was extracted for several target sizes, use the features of this one only, as
        ``X.select_target_size`` gives them. ``keep_fraction``, ``last_layers`` and ``layer`` count within it.

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
        ||W_d||_2 at ``alpha`` on the scale of the problem solved (standardised features with "standard"); with
        ``solver="adam"``, of the trained weights.
    feature_layers_ : ndarray of shape (n_features_in_,), int64
        Position in ``layer_names_`` of each feature's layer.
    layer_names_ : ndarray of shape (n_layers,), object
        In network order; a plain array is one layer, "X".
    coef_ : ndarray of shape (n_classes, n_features_in_), or (1, n_features_in_) for two classes, float64
        Zero for features that are not selected; made on access, as only the others are kept. For features as given,
        standardisation undone. With a "layer" normalization, for features after scaling to unit length
        (``head="path"``: of the whole layer, else: of the kept part of each layer).
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
        "keep_fraction": [Interval(Real, 0, 1, closed="right"), None],
        "last_layers": [Interval(Integral, 1, None, closed="left"), None],
        "layer": [Interval(Integral, 0, None, closed="left"), None],
        "target_size": [Interval(Integral, 1, None, closed="left"), None],
        "normalization": [StrOptions(set(NORMALIZATIONS)), None],
        "solver": [StrOptions({"newton", "adam"})],
        "head": [StrOptions({"ridge", "path", "adam"})],
        "C": [Interval(Real, 0, None, closed="neither")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "random_state": ["random_state"],
        **PATH_CONSTRAINTS,
    }

    def __init__(
        self,
        alpha: float = 0.05,
        l1_ratio: float = 1.0,
        keep_fraction: float | None = None,
        solver: str = "newton",
        normalization: str | None = "standard",
        head: str = "ridge",
        C: float = 1.0,
        class_weight: dict[Any, float] | str | None = None,
        tol: float = 1e-3,
        max_iter: int = 1000,
        device: str | torch.device = "auto",
        memory: Any = None,
        n_jobs: int | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
        learning_rate: float = 0.01,
        max_memory: int | str | None = None,
        last_layers: int | None = None,
        layer: int | None = None,
        target_size: int | None = None,
    ) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.keep_fraction = keep_fraction
        self.solver = solver
        self.normalization = normalization
        self.head = head
        self.C = C
        self.class_weight = class_weight
        self.learning_rate = learning_rate
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.max_memory = max_memory
        self.memory = memory
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose
        self.last_layers = last_layers
        self.layer = layer
        self.target_size = target_size

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
        training = check_training(self, X, y, sample_weight, self.class_weight)
        part = training.of_size(self.target_size)
        n_layers = len(part.layer_names)
        if self.layer is not None and self.layer >= n_layers:
            raise ValueError(f"layer={self.layer}: X has {n_layers} layers, counted from 0.")
        with cpu_threads(self.n_jobs):
            self._fit(part)
        self._widen(training, self.target_size)
        return self

    def _fit(self, training: Training) -> None:
        options = PathOptions.of(self)
        if self.head != "path":  # which needs nothing after the path
            training, options = hold(training, options)
        # Adam takes only alpha_max from the path, which then ends where it starts.
        path = solve_path(training, [float(self.alpha) if self.solver == "newton" else 1.0], options)[0]
        random = check_random_state(self.random_state)
        self._take_path(training, path)
        if self.solver == "adam" and self.keep_fraction is not None:
            self.duality_gap_, self.n_iter_ = math.nan, int(self.max_iter)
            self.feature_scores_ = self._train_scores(training, random)
            count = count_kept(self.keep_fraction, path.n_features)
            self.selected_features_ = np.sort(np.argsort(-self.feature_scores_, kind="stable")[:count])
        if not len(self.selected_features_):
            warn_nothing_selected(self.alpha, self.alpha_max_, "predictions are the class frequencies")
        if self.head == "path" or not len(self.selected_features_):
            coef = path.coef(-1)[self.selected_features_]
            intercept = path.standardized_intercepts[-1] - path.center[self.selected_features_] @ coef
        else:
            coef, intercept = self._fit_head(training, path, random, held_bytes(options.max_memory))
        self._set_linear(coef, intercept)

    def _take_path(self, training: Training, path: GroupLassoPath) -> None:
        """Select features at the end of the path."""
        self._select(training, path, self.keep_fraction, self.last_layers, self.layer)
        self.classes_ = training.classes
        self._layer_scaling = kept_scaling(self.normalization)
        if self._layer_scaling and self.head == "path":
            self._layer_scaling = "whole"

    def _set_linear(self, coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> None:
        """Take coefficients (n_selected, n_classes) of the selected features."""
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

    def _check_combination(self) -> None:
        deciding = [name for name in ("layer", "last_layers", "keep_fraction") if getattr(self, name) is not None]
        if deciding not in ([], ["keep_fraction"]) and (len(deciding) > 1 or self.solver == "adam"):
            raise ValueError(
                f"{deciding[0]}={getattr(self, deciding[0])} decides what is kept and goes neither with "
                f"{' nor with '.join([*deciding[1:], 'solver=' + repr('adam')])}: leave them at None and 'newton'."
            )
        if self.solver == "newton":
            return
        if self.keep_fraction is None:
            raise ValueError(
                "keep_fraction must be given with solver='adam', which leaves no weight at exactly zero, got None."
            )
        if self.head == "path":
            raise ValueError("head='path' needs solver='newton': with solver='adam' it must be 'ridge' or 'adam'.")
        if self.l1_ratio != 1:
            raise ValueError(f"l1_ratio must be 1 with solver='adam', got {self.l1_ratio!r}.")

    def _scores(self, features: Any, selected: NDArray[np.int64], layers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Linear scores (n_samples, n_classes or 1) from the columns ``selected`` of ``features``, of these layers."""
        kept = KeptFeatures(features, selected, layers, self._layer_scaling, held_bytes(self.max_memory))
        return kept.scores(self._kept_coef.T, self.intercept_)

    def _train_scores(self, training: Training, random: np.random.RandomState) -> NDArray[np.float64]:
        """||W_d||_2 of the published training on all features, (n_features,)."""
        scored: ColumnSource | NDArray[Any] = training.features
        if scales_layers(self.normalization):
            scored = LayerScaled(scored, training.layers, inverse_layer_norms(training.features, training.layers))
        coef, _ = train(
            scored,
            training.codes,
            len(training.classes),
            sample_weight=training.sample_weight,
            standardize=standardizes(self.normalization),
            coef=self.alpha * self.alpha_max_,
            learning_rate=self.learning_rate,
            n_steps=self.max_iter,
            seed=int(random.randint(_SEEDS)),
            device=self.device,
        )
        return np.asarray(np.linalg.norm(coef, axis=1))

    def _fit_head(
        self, training: Training, path: GroupLassoPath, random: np.random.RandomState, limit: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Fresh head on the kept features: (n_selected, n_classes), (n_classes,)."""
        if self.head == "ridge":
            device, selected = resolve_device(self.device), self.selected_features_
            return fit_ridge(training, path, selected, self.normalization, self.C, device, limit, self.memory)
        kept = KeptFeatures(training.features, self.selected_features_, training.layers, self._layer_scaling, limit)
        values = kept.values()
        mean, scale = np.zeros(kept.shape[1]), np.ones(kept.shape[1])
        if standardizes(self.normalization):
            mean, scale = weighted_moments(values, training.sample_weight, kept.precision)
        solved, offset = train(
            (values - mean) * scale,
            training.codes,
            len(training.classes),
            sample_weight=training.sample_weight,
            learning_rate=self.learning_rate,
            n_steps=self.max_iter,
            seed=int(random.randint(_SEEDS)),
            device=self.device,
        )
        coef = solved * scale[:, None]
        return coef, offset - mean @ coef

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
        features = check_features(self, X, reset=False)
        scores = self._scores(features, self.selected_features_, self.feature_layers_)
        return scores[:, 0] if len(self.classes_) == 2 else scores
