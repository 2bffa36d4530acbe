"""From scores to kept features."""

from __future__ import annotations

import math
import os
import warnings
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.utils import Tags
from sklearn.utils.validation import assert_all_finite, check_is_fitted

from estimators.features import is_feature_matrix
from estimators.group_lasso.result import GroupLassoPath
from estimators.paths import PathOptions, solve_path
from estimators.scaling import NORMALIZATIONS
from estimators.sklearn_private import Interval, StrOptions, check_feature_names_in
from estimators.switches import cpu_threads
from estimators.training import Training, check_features, check_training

if TYPE_CHECKING:
    import pandas as pd

PATH_CONSTRAINTS: dict[str, list[Any]] = {
    "l1_ratio": [Interval(Real, 0, 1, closed="right")],
    "class_weight": [dict, StrOptions({"balanced"}), None],
    "tol": [Interval(Real, 0, None, closed="neither")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "device": [str, torch.device],
    "max_memory": [Interval(Real, 0, None, closed="neither"), str, None],
    "memory": "no_validation",  # type: ignore[dict-item]
    "n_jobs": [Interval(Integral, 1, None, closed="left"), Interval(Integral, None, -1, closed="right"), None],
    "verbose": ["verbose"],
}


def rank_features(path: GroupLassoPath, index: int) -> NDArray[np.int64]:
    """Features from most to least important at ``path.alphas[index]``.

    By ||W_d||; features without weight by the alpha at which they enter the path; those that never do by
    ||X_d'R||; ties by column.

    Parameters
    ----------
    path : GroupLassoPath
    index : int

    Returns
    -------
    ndarray of shape (n_features,), int64
    """
    gradient = path.gradient_norms[index]
    return np.lexsort((np.arange(path.n_features), -gradient, -path.entry_order, -path.row_norms(index)))


def select_features(path: GroupLassoPath, index: int, keep_fraction: float | None) -> NDArray[np.int64]:
    """Features kept at ``path.alphas[index]``.

    Parameters
    ----------
    path : GroupLassoPath
    index : int
    keep_fraction : float in (0, 1] or None
        None keeps the features with nonzero weight; a fraction keeps the first ceil(keep_fraction * n_features) of
        `rank_features`.

    Returns
    -------
    ndarray of shape (n_kept,), int64
        Sorted.
    """
    if keep_fraction is None:
        return path.active[index]
    return np.sort(rank_features(path, index)[: count_kept(keep_fraction, path.n_features)])


def kept_features(
    path: GroupLassoPath,
    layers: NDArray[np.int64],
    keep_fraction: float | None,
    last_layers: int | None,
    layer: int | None,
) -> NDArray[np.int64]:
    """Features kept at the end of the path, sorted: all of the last layers, or of one, or those of `select_features`.

    ``layers`` is the (n_features,) layer of each feature.
    """
    if layer is not None:
        return np.flatnonzero(layers == layer)
    if last_layers is not None:
        return np.flatnonzero(layers > layers.max() - last_layers)
    return select_features(path, -1, keep_fraction)


def count_kept(keep_fraction: float, n_features: int) -> int:
    """ceil(keep_fraction * n_features), at least 1."""
    # The products 0.07 * 100 and 0.29 * 100 are off by an ulp; that must not add a feature.
    return max(1, math.ceil(keep_fraction * n_features * (1.0 - 1e-12)))


def layer_totals(estimator: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Per layer of a fitted estimator: features, selected ones, and the sum of the scores of the selected ones."""
    n_layers, selected = len(estimator.layer_names_), estimator.selected_features_
    owners = estimator.feature_layers_[selected]
    return (
        np.bincount(estimator.feature_layers_, minlength=n_layers),
        np.bincount(owners, minlength=n_layers),
        np.bincount(owners, estimator.feature_scores_[selected], minlength=n_layers).astype(np.float64, copy=False),
    )


class SelectedFeatures:
    """What every fitted estimator can say about the features it selected.

    It reads ``selected_features_``, ``feature_scores_``, ``feature_layers_`` and ``layer_names_``.
    """

    selected_features_: NDArray[np.int64]
    feature_scores_: NDArray[np.float64]
    feature_layers_: NDArray[np.int64]
    layer_names_: NDArray[Any]

    def __getstate__(self) -> dict[str, Any]:
        """With ``memory`` as text where it is a path, so that what is saved holds arrays and plain values only."""
        state: Any = super().__getstate__()
        path = isinstance(state.get("memory"), os.PathLike)
        return {**state, "memory": os.fspath(state["memory"])} if path else state

    def _select(
        self,
        training: Training,
        path: GroupLassoPath,
        keep_fraction: float | None,
        last_layers: int | None = None,
        layer: int | None = None,
    ) -> None:
        """Set what the end of the path says."""
        self.alpha_max_ = path.alpha_max
        self.duality_gap_ = float(path.relative_gap[-1])
        self.n_iter_ = int(path.n_iter.max())
        self.feature_scores_ = path.row_norms(-1)
        self.feature_layers_, self.layer_names_ = training.layers, training.layer_names
        self.selected_features_ = kept_features(path, training.layers, keep_fraction, last_layers, layer)

    def _widen(self, training: Training, target_size: int | None) -> None:
        """Count features and layers as ``training`` does, where they were selected among those of one target size."""
        if target_size is None:
            return
        columns, scores = training.sizes[target_size], np.zeros(len(training.layers))
        scores[columns] = self.feature_scores_
        self.feature_scores_, self.selected_features_ = scores, columns[self.selected_features_]
        self.feature_layers_, self.layer_names_ = training.layers, training.layer_names

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[Any]:
        """Names of the selected features, (n_selected,) object.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Names of all features where X had none in `fit`; without, they are ``x0``, ``x1``, ...
        """
        check_is_fitted(self)
        names: NDArray[Any] = check_feature_names_in(self, input_features)[self.selected_features_]
        return names

    def layer_summary(self) -> pd.DataFrame:
        """How much each layer contributes, one row per layer in network order.

        Returns
        -------
        pandas.DataFrame
            Indexed by ``layer``: ``n_features``, ``n_selected``, ``selected_share`` (of all selected features),
            ``score`` (sum of ``feature_scores_`` over the layer's selected features) and ``score_share`` (of all such
            scores).

        Raises
        ------
        ImportError
            If pandas is not installed: ``pip install 'head2toe[table]'``.
        """
        check_is_fitted(self)
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("layer_summary() needs pandas: pip install 'head2toe[table]'.") from error
        n_features, n_selected, score = layer_totals(self)
        return pd.DataFrame(
            {
                "n_features": n_features,
                "n_selected": n_selected,
                "selected_share": n_selected / max(1, n_selected.sum()),
                "score": score,
                "score_share": score / (score.sum() or 1.0),
            },
            index=pd.Index(self.layer_names_, name="layer"),
        )


class Head2ToeSelector(SelectedFeatures, SelectorMixin, BaseEstimator):  # type: ignore[misc]
    """Transformer that keeps the features a group lasso picks, for any head behind it.

    Parameters
    ----------
    alpha : float in (0, 1], default=0.05
        Strength of the group lasso as a fraction of alpha_max, the smallest strength that keeps nothing.
    l1_ratio : float in (0, 1], default=1.0
        Share of the penalty on sum_d ||W_d||_2; the rest is on ||W||_F^2 / 2.
    keep_fraction : float in (0, 1] or None, default=None
        None keeps the features with nonzero weight at ``alpha``; a fraction keeps
        ceil(keep_fraction * n_features) features: by weight, then by the alpha at which they enter the path, then by
        the loss's gradient.
    normalization : {"standard", "layer", "layer+standard"} or None, default="standard"
        How features are scaled for the group lasso, as in `Head2ToeClassifier`. Those that come out are as given.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, as elsewhere in scikit-learn.
    tol : float, default=1e-3
        Duality gap to certify, relative to the objective of zero coefficients.
    max_iter : int, default=1000
        Newton steps per alpha of the path.
    device : str or torch.device, default="auto"
        "auto" is CUDA where there is one, else the CPU.
    max_memory : int or str, default=None
        What X may take on the device ("4GB"), beyond which it is read in blocks; None for 80 % of what is free.
    memory : str, path, joblib.Memory or None, default=None
        Folder or URL where solved paths are kept, so that fits on the same data solve them once.
    n_jobs : int or None, default=None
        CPU threads; None is torch's setting, -1 one per core.
    verbose : int, default=0
        Print a line per alpha of the path.

    Attributes
    ----------
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,), object
        Where X has names.
    recipe_ : dict or None
        How the features of fit were made, where X is a FeatureMatrix that says so; features of another recipe are
        refused.
    selected_features_ : ndarray of shape (n_selected,), int64
        Sorted.
    feature_scores_ : ndarray of shape (n_features_in_,), float64
        ||W_d||_2 at ``alpha`` on the scale of the problem solved.
    feature_layers_ : ndarray of shape (n_features_in_,), int64
        Position in ``layer_names_`` of each feature's layer.
    layer_names_ : ndarray of shape (n_layers,), object
        In network order; a plain array is one layer, "X".
    alpha_max_ : float
    duality_gap_ : float
        Relative duality gap at ``alpha``.
    n_iter_ : int
        Most Newton steps that any alpha of the path took.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from estimators import Head2ToeSelector
    >>> X, y = load_digits(return_X_y=True)
    >>> model = make_pipeline(Head2ToeSelector(alpha=0.2), LogisticRegression(max_iter=1000))
    >>> model.fit(X / 16, y).score(X / 16, y) > 0.9
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "alpha": [Interval(Real, 0, 1, closed="right")],
        "keep_fraction": [Interval(Real, 0, 1, closed="right"), None],
        "normalization": [StrOptions(set(NORMALIZATIONS)), None],
        **PATH_CONSTRAINTS,
    }

    def __init__(
        self,
        alpha: float = 0.05,
        l1_ratio: float = 1.0,
        keep_fraction: float | None = None,
        normalization: str | None = "standard",
        class_weight: dict[Any, float] | str | None = None,
        tol: float = 1e-3,
        max_iter: int = 1000,
        device: str | torch.device = "auto",
        max_memory: int | str | None = None,
        memory: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.keep_fraction = keep_fraction
        self.normalization = normalization
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.max_memory = max_memory
        self.memory = memory
        self.n_jobs = n_jobs
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike | None = None, sample_weight: ArrayLike | None = None) -> Self:
        """Select features.

        Parameters
        ----------
        X : array-like or FeatureMatrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
            Class labels.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative; only ratios matter.

        Returns
        -------
        self : Head2ToeSelector

        Raises
        ------
        ValueError
            If a parameter or input is not as described, or there are fewer than two classes.

        Warns
        -----
        ConvergenceWarning
            If the path does not reach ``tol``.
        """
        self._validate_params()
        training = check_training(self, X, y, sample_weight, self.class_weight)
        with cpu_threads(self.n_jobs):
            path = solve_path(training, [float(self.alpha)], PathOptions.of(self))[0]
        self._select(training, path, self.keep_fraction)
        if not len(self.selected_features_):
            warn_nothing_selected(self.alpha, self.alpha_max_, "transform gives no columns")
        return self

    def transform(self, X: Any) -> Any:
        """The selected features.

        Parameters
        ----------
        X : array-like or FeatureMatrix of shape (n_samples, n_features)
            Only the selected columns of a FeatureMatrix are read.

        Returns
        -------
        ndarray of shape (n_samples, n_selected), or what `set_output` asks for

        Raises
        ------
        ValueError
            If X has another number of features, or other feature names, than in `fit`, or is not finite.
        """
        check_is_fitted(self)
        features = check_features(self, X, reset=False)
        kept = np.asarray(features[:, self.selected_features_])
        if is_feature_matrix(features):
            assert_all_finite(kept, input_name="X")
        return kept

    def _get_support_mask(self) -> NDArray[np.bool_]:
        check_is_fitted(self)
        mask = np.zeros(self.n_features_in_, dtype=bool)
        mask[self.selected_features_] = True
        return mask

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def warn_nothing_selected(alpha: float, alpha_max: float, consequence: str) -> None:
    warnings.warn(
        f"No feature was selected at alpha={alpha} (alpha_max_={alpha_max:.3g}): {consequence}. Lower alpha, or set "
        "keep_fraction.",
        UserWarning,
        stacklevel=3,
    )
