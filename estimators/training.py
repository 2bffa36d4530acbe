"""What the estimators are given, checked: a matrix of features, labels, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, validate_data

from estimators.features import FeatureMatrix, as_host_array, is_feature_matrix
from estimators.labels import as_labels, check_sample_weight
from estimators.layers import layer_index, layer_names, matching_layers

_DTYPES = [np.float64, np.float32, np.float16]


@dataclass(frozen=True)
class Training:
    """Features and labels to learn from: ``classes[codes]`` are the labels, class weights are in ``sample_weight``."""

    features: FeatureMatrix | NDArray[Any]
    layers: NDArray[np.int64]  # of each feature: the position of its layer in layer_names
    layer_names: NDArray[Any]  # in network order
    classes: NDArray[Any]
    codes: NDArray[np.int64]
    sample_weight: NDArray[np.float64]

    def columns_of(self, layers: str | Sequence[str] | None) -> NDArray[np.int64]:
        """Columns of the layers whose name matches any of the globs, sorted; all for None."""
        if layers is None:
            return np.arange(len(self.layers))
        return np.flatnonzero(np.isin(self.layers, matching_layers(self.layer_names, layers)))

    def take(self, columns: NDArray[np.int64]) -> Training:
        """With these columns alone, which are sorted."""
        if len(columns) == len(self.layers):
            return self
        present, layers = np.unique(self.layers[columns], return_inverse=True)
        return replace(self, features=self.features[:, columns], layers=layers, layer_names=self.layer_names[present])


def check_training(
    estimator: BaseEstimator,
    X: Any,
    y: ArrayLike | None,
    sample_weight: ArrayLike | None,
    class_weight: dict[Any, float] | str | None,
) -> Training:
    """Check X, y and the weights, and remember on the estimator what X looks like.

    Whether an array is finite is left to whoever reads it first.
    """
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None.")
    labels = as_labels(y)
    if is_feature_matrix(X):
        features: FeatureMatrix | NDArray[Any] = check_features(estimator, X, reset=True)
        if labels.dtype.kind == "f":
            assert_all_finite(labels, input_name="y")
        if len(labels) != features.shape[0]:
            raise ValueError(
                f"y must have one label per row of X: got {len(labels)} labels for {features.shape[0]} rows."
            )
    else:
        features, labels = validate_data(estimator, as_host_array(X), labels, dtype=_DTYPES, ensure_all_finite=False)
        estimator.recipe_ = None
    check_classification_targets(labels)
    classes, codes = np.unique(labels, return_inverse=True)
    weight = check_sample_weight(sample_weight, len(labels))
    learned = np.unique(codes[weight > 0])
    if len(learned) < 2:
        raise ValueError(
            f"y must hold at least two classes with positive weight, got {len(learned)} class: {classes[learned]}."
        )
    training = Training(features, layer_index(features), layer_names(features), classes, codes, weight)
    return class_weighted(training, class_weight)


def class_weighted(training: Training, class_weight: dict[Any, float] | str | None) -> Training:
    """With sample weights multiplied by those of the classes; "balanced" counts the samples of this training set."""
    if class_weight is None:
        return training
    codes, weight, classes = training.codes, training.sample_weight, training.classes
    seen = weight > 0
    if not seen.any():
        return training
    present = np.unique(codes[seen]) if class_weight == "balanced" else np.arange(len(classes))
    counted = seen if class_weight == "balanced" else np.ones_like(seen)
    factors = np.zeros(len(classes))
    factors[present] = compute_class_weight(
        class_weight, classes=classes[present], y=classes[codes[counted]], sample_weight=weight[counted]
    )
    return replace(training, sample_weight=check_sample_weight(weight * factors[codes], len(codes)))


def check_features(estimator: BaseEstimator, X: Any, *, reset: bool) -> FeatureMatrix | NDArray[Any]:
    """Check X in fit (``reset``) or against what was seen there; an array also for values that are not finite."""
    name = type(estimator).__name__
    if not is_feature_matrix(X):
        array: NDArray[Any] = validate_data(estimator, as_host_array(X), dtype=_DTYPES, reset=reset)
        return array
    for count, what in zip(X.shape, ("sample(s)", "feature(s)"), strict=True):
        if count == 0:
            raise ValueError(f"X has 0 {what} (shape={X.shape}) while a minimum of 1 is required by {name}.")
    names = np.asarray(X.feature_names, dtype=object)
    if reset:
        estimator.n_features_in_, estimator.feature_names_in_ = X.shape[1], names
        estimator.recipe_ = getattr(X, "recipe", None)
        return X
    fitted_recipe, differences = getattr(estimator, "recipe_", None), getattr(X, "recipe_differences", None)
    if fitted_recipe is not None and differences is not None and (different := differences(fitted_recipe)):
        raise ValueError(
            f"X holds features made in another way than those {name} was fitted on: {'; '.join(different)}."
        )
    if X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {name} is expecting {estimator.n_features_in_} features as input."
        )
    if hasattr(estimator, "feature_names_in_") and not np.array_equal(names, estimator.feature_names_in_):
        first = int(np.flatnonzero(names != estimator.feature_names_in_)[0])
        raise ValueError(
            "X holds other features than those seen in fit (another network, taps or pooling?): feature "
            f"{first} is {names[first]!r}, expected {estimator.feature_names_in_[first]!r}."
        )
    return X
