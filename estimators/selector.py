"""Feature selection for any model behind it, and what every estimator can say about the features it selected."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
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
from estimators.selection import select_features
from estimators.sklearn_private import Interval, StrOptions, check_feature_names_in
from estimators.training import Training, check_features, check_training

if TYPE_CHECKING:
    import pandas as pd

PATH_CONSTRAINTS: dict[str, list[Any]] = {
    "alpha": [Interval(Real, 0, 1, closed="right")],
    "l1_ratio": [Interval(Real, 0, 1, closed="right")],
    "keep_fraction": [Interval(Real, 0, 1, closed="right"), None],
    "layers": [str, "array-like", None],
    "normalization": [StrOptions(set(NORMALIZATIONS)), None],
    "class_weight": [dict, StrOptions({"balanced"}), None],
    "tol": [Interval(Real, 0, None, closed="neither")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "device": [str, torch.device],
    "max_memory": [Interval(Real, 0, None, closed="neither"), str, None],
    "memory": "no_validation",  # type: ignore[dict-item]
    "verbose": ["verbose"],
}


class SelectedFeatures:
    """What a fitted estimator can say about the features it selected, by layer and name."""

    selected_features_: NDArray[np.int64]
    feature_scores_: NDArray[np.float64]
    feature_layers_: NDArray[np.int64]
    layer_names_: NDArray[Any]

    def __getstate__(self) -> dict[str, Any]:
        """With ``memory`` as text where it is a path, so that what is saved holds arrays and plain values only."""
        state: Any = super().__getstate__()
        path = isinstance(state.get("memory"), os.PathLike)
        return {**state, "memory": os.fspath(state["memory"])} if path else state

    def _set_selection(
        self,
        training: Training,
        columns: NDArray[np.int64],
        selected: NDArray[np.int64],
        scores: NDArray[np.float64],
    ) -> None:
        """Take what was selected and scored among some columns of a training set."""
        self.feature_layers_, self.layer_names_ = training.layers, training.layer_names
        self.selected_features_ = columns[selected]
        self.feature_scores_ = np.zeros(len(training.layers))
        self.feature_scores_[columns] = scores

    def _set_path(self, path: GroupLassoPath) -> None:
        """Take what the end of a path says."""
        self.alpha_max_ = path.alpha_max
        self.duality_gap_ = float(path.relative_gap[-1])
        self.n_iter_ = int(path.n_iter.max())

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[Any]:
        """Names of the selected features, (n_selected,) object.

        ``input_features`` names all features where X had no names in `fit`; by default ``x0``, ``x1``, ...
        """
        check_is_fitted(self)
        names: NDArray[Any] = check_feature_names_in(self, input_features)[self.selected_features_]
        return names

    def layer_summary(self) -> pd.DataFrame:
        """How much each layer contributes, a DataFrame with one row per layer in network order.

        Its columns are ``n_features``, ``n_selected``, ``selected_share`` (of all selected features), ``score`` (sum of
        ``feature_scores_`` over the layer's selected features) and ``score_share``.
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


def layer_totals(estimator: SelectedFeatures) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Per layer of a fitted estimator: features, selected ones, and the sum of the scores of the selected ones."""
    n_layers, selected = len(estimator.layer_names_), estimator.selected_features_
    owners = estimator.feature_layers_[selected]
    scores = np.bincount(owners, estimator.feature_scores_[selected], n_layers).astype(np.float64)
    return np.bincount(estimator.feature_layers_, minlength=n_layers), np.bincount(owners, minlength=n_layers), scores


def warn_nothing_selected(alpha: float, alpha_max: float, consequence: str) -> None:
    warnings.warn(
        f"No feature was selected at alpha={alpha} (alpha_max_={alpha_max:.3g}): {consequence}. Lower alpha, or set "
        "keep_fraction.",
        UserWarning,
        stacklevel=3,
    )


class Head2ToeSelector(SelectedFeatures, SelectorMixin, BaseEstimator):  # type: ignore[misc]
    """Transformer that keeps the features a group lasso selects, as they are given.

    Parameters and fitted attributes are those of :class:`Head2ToeClassifier`, but for the head's. A path is always
    solved.

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

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = PATH_CONSTRAINTS

    def __init__(
        self,
        alpha: float = 0.05,
        l1_ratio: float = 1.0,
        keep_fraction: float | None = None,
        layers: str | Sequence[str] | None = None,
        normalization: str | None = "standard",
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
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.max_memory = max_memory
        self.memory = memory
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike | None = None, sample_weight: ArrayLike | None = None) -> Self:
        """Select features; parameters as in :meth:`Head2ToeClassifier.fit`."""
        self._validate_params()
        training = check_training(self, X, y, sample_weight, self.class_weight)
        columns = training.columns_of(self.layers)
        path = solve_path(training.take(columns), [float(self.alpha)], PathOptions.of(self))[0]
        self._set_path(path)
        self._set_selection(training, columns, select_features(path, -1, self.keep_fraction), path.row_norms(-1))
        if not len(self.selected_features_):
            warn_nothing_selected(self.alpha, self.alpha_max_, "transform gives no columns")
        return self

    def transform(self, X: Any) -> Any:
        """The selected features, (n_samples, n_selected); of a FeatureMatrix, no others are read."""
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
