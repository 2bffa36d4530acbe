"""The ridge head on what a path selected; that on all features, which any alpha may ask for, is kept on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.cache import Arrays, Codec, cache_place, cached, fingerprint, problem_key
from estimators.group_lasso.result import GroupLassoPath
from estimators.kept import KeptFeatures, RidgeHead
from estimators.scaling import kept_scaling, scales_layers, standardizes
from estimators.training import Training

Linear = tuple[NDArray[np.float64], NDArray[np.float64]]


def ridge_head(
    training: Training,
    path: GroupLassoPath,
    selected: NDArray[np.int64],
    normalization: str | None,
    device: torch.device,
    max_bytes: float,
) -> RidgeHead:
    """The head on the features that a path selected from a training set.

    Parameters
    ----------
    training : Training
    path : GroupLassoPath
        Solved on it.
    selected : ndarray of shape (n_kept,), int64
        Sorted, not empty.
    normalization : {"standard", "layer", "layer+standard"} or None
    device : torch.device
    max_bytes : float
        As in `KeptFeatures`: a quarter of the memory that there is. The head takes up to twice that.
    """
    moments = (path.center[selected], path.inverse_scale[selected]) if normalization == "standard" else None
    return RidgeHead(
        KeptFeatures(training.features, selected, training.layers, kept_scaling(normalization), max_bytes),
        training.codes,
        len(training.classes),
        training.sample_weight,
        standardizes(normalization),
        device,
        moments,
        2 * max_bytes,
    )


def fit_ridge(
    training: Training,
    path: GroupLassoPath,
    selected: NDArray[np.int64],
    normalization: str | None,
    C: float,
    device: torch.device,
    max_bytes: float,
    memory: Any,
) -> Linear:
    """Coefficients (n_kept, n_classes) and intercepts (n_classes,) of `ridge_head` for one C."""

    def fit(_: Linear | None) -> Linear:
        return ridge_head(training, path, selected, normalization, device, max_bytes).fit(C)

    place = cache_place(memory)
    if place is None or len(selected) < path.n_features:
        return fit(None)
    layers = training.layers if scales_layers(normalization) else np.zeros(0, dtype=np.int64)
    key = problem_key(
        fingerprint(training.features), training.codes, training.sample_weight, layers, f"{normalization} {float(C)!r}"
    )
    return cached(place, key, Codec(_pack, _unpack), lambda _: True, fit)


def _pack(linear: Linear) -> Arrays:
    return {"coef": linear[0], "intercept": linear[1]}


def _unpack(arrays: Arrays) -> Linear:
    return arrays["coef"], arrays["intercept"]
