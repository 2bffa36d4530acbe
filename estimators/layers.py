"""Which layer of the network each column of X belongs to. A plain array is one layer, "X"."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from estimators.features import FeatureMatrix, Layer, is_feature_matrix


def layer_index(X: FeatureMatrix | NDArray[Any]) -> NDArray[np.int64]:
    """Number of each column's layer, (n_features,), in the order of `layer_names`.

    Runs of columns with the same layer name are one layer, whatever order the columns were taken in.
    """
    if not is_feature_matrix(X):
        return np.zeros(X.shape[1], dtype=np.int64)
    starts = [layer.start for layer in X.layers]
    stops = [layer.stop for layer in X.layers]
    if [*starts, X.shape[1]] != [0, *stops]:
        raise ValueError("X.layers must cover the columns of X one after the other, without gaps or overlaps.")
    numbers = {name: number for number, name in enumerate(layer_names(X))}
    return np.repeat(np.array([numbers[layer.name] for layer in X.layers], dtype=np.int64), np.subtract(stops, starts))


def layer_names(X: FeatureMatrix | NDArray[Any]) -> NDArray[Any]:
    """Names of the layers by first appearance, (n_layers,) object."""
    names = dict.fromkeys(layer.name for layer in X.layers) if is_feature_matrix(X) else ["X"]
    return np.array(list(names), dtype=object)


def matching_layers(names: NDArray[Any], patterns: str | Sequence[str]) -> NDArray[np.int64]:
    """Numbers of the layers with any of these names, or matching any of these globs, sorted; each must match one."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    known: list[str] = names.tolist()
    shown = ", ".join(map(repr, names)) if len(names) <= 6 else f"{names[0]!r} to {names[-1]!r}"
    if not patterns:
        raise ValueError(f"layers must hold at least one name or glob, got none; X has {len(names)} layer(s): {shown}.")
    matched: set[str] = set()
    for pattern in patterns:
        found = [name for name in known if isinstance(pattern, str) and fnmatchcase(name, pattern)]
        # A name may hold the characters of a glob.
        matched.update(found := [pattern] if pattern in known else found)
        if not found:
            raise ValueError(
                f"layers={pattern!r} matches no layer of X. Accepted are names and globs of its {len(names)} layer(s): "
                f"{shown}."
            )
    return np.array([number for number, name in enumerate(known) if name in matched], dtype=np.int64)


def layers_by_size(X: FeatureMatrix | NDArray[Any]) -> dict[int, list[str]]:
    """Names of the layers of each target size, sorted, for the sizes that every activation was pooled to."""
    pooled: dict[int, dict[str, Layer]] = {}
    for layer in X.layers if is_feature_matrix(X) else ():
        for size in getattr(layer, "target_sizes", ()):
            pooled.setdefault(size, {})[layer.name] = layer
    activations = {size: {_activation(layer) for layer in layers.values()} for size, layers in pooled.items()}
    every = set().union(*activations.values())
    return {size: list(pooled[size]) for size in sorted(pooled) if activations[size] == every}


def _activation(layer: Any) -> str:
    """The layer's name without the "@size" that tells apart what one activation was pooled to."""
    return str(layer.name.removesuffix(f"@{layer.target_sizes[0]}"))
