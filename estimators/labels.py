"""Labels and sample weights of any container, checked, as plain arrays."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import column_or_1d
from torch import Tensor

_LARGEST_WEIGHT = 1e100


def as_labels(y: ArrayLike | Tensor) -> NDArray[Any]:
    """Labels as a 1-d array of str or of numbers: from a list, array, Series or tensor with none missing."""
    if isinstance(y, Tensor):
        y = y.detach().cpu().numpy()
    # A list as objects: numpy would write its numbers, and NaN, as strings where there are strings as well.
    labels = np.asarray(y, dtype=object) if isinstance(y, (list, tuple)) else np.asarray(y)
    if labels.dtype.kind == "T":
        labels = labels.astype(object)
    if labels.ndim != 1:
        labels = column_or_1d(labels, warn=True)
    _require_all(labels)
    return _plain(labels) if labels.dtype == object else labels


def _require_all(labels: NDArray[Any]) -> None:
    if labels.dtype == object:
        missing = np.array([_is_missing(label) for label in labels], dtype=bool)
    else:
        missing = np.isnan(labels) if labels.dtype.kind == "f" else np.zeros(0, dtype=bool)
    if missing.any():
        raise ValueError(
            f"y has no label (None or NaN) in {missing.sum()} of {len(labels)} rows, the first of them row "
            f"{missing.argmax()}: leave those rows out, as X = X[X.labelled] and y = X.y do for a FeatureMatrix."
        )


def _is_missing(label: Any) -> bool:
    if label is None:
        return True
    differs = label != label  # NaN and NaT do; for pandas.NA the answer is NA
    return type(differs).__name__ == "NAType" or (isinstance(differs, (bool, np.bool_)) and bool(differs))


def _plain(labels: NDArray[Any]) -> NDArray[Any]:
    """An array of objects as one of strings or numbers; others as they are, for scikit-learn to refuse."""
    strings, numbers = (np.array([isinstance(label, kind) for label in labels], dtype=bool) for kind in (str, Real))
    if strings.all():
        return labels.astype(str)
    if numbers.all():
        return np.array(labels.tolist())
    if (strings | numbers).all():
        text, number = labels[strings.argmax()], labels[numbers.argmax()]
        raise ValueError(f"y must hold strings or numbers, not both, got {text!r} and {number!r}.")
    return labels


def check_sample_weight(sample_weight: ArrayLike | None, n_samples: int) -> NDArray[np.float64]:
    """Sample weights as float64 of shape (n_samples,), ones for None.

    If the largest is beyond 1e100 or below 1e-100, all are scaled so that it is that: sums and products stay in range,
    and a penalty that is weighed against them vanishes or rules as before.
    """
    if sample_weight is None:
        return np.ones(n_samples)
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.ndim == 0:
        weight = np.full(n_samples, weight)
    if weight.shape != (n_samples,):
        raise ValueError(f"sample_weight must have shape ({n_samples},), got {weight.shape}.")
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise ValueError("sample_weight must be finite, non-negative and not all zero.")
    largest = weight.max()
    bounded = np.clip(largest, 1.0 / _LARGEST_WEIGHT, _LARGEST_WEIGHT)
    return weight if bounded == largest else weight * (bounded / largest)
