"""The path as the estimators ask for it: at given fractions of alpha_max, the same whatever else was asked before.

All share one chain of fractions, 0.85^k, each solved from the one before. A fraction between two of them branches off
the one above. So a path may be solved in parts, by several processes, and kept on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.cache import Arrays, Codec, cache_place, cached, fingerprint, problem_key
from estimators.group_lasso.path import group_lasso_path, warn_unconverged
from estimators.group_lasso.progress import PathProgress
from estimators.group_lasso.result import GroupLassoPath
from estimators.head.kept import KeptFeatures
from estimators.scaling import scales_layers, standardizes
from estimators.training import Training

# Products, unlike powers, are the same to the last bit on every machine.
_CHAIN = np.multiply.accumulate(np.append(1.0, np.full(499, 0.85)))
_SAME = 1e-9
_LISTS = ("active", "standardized_coefs")


@dataclass(frozen=True)
class PathOptions:
    """What decides a path besides the data, where it is solved, and where it is kept."""

    normalization: str | None
    l1_ratio: float
    tol: float
    max_iter: int
    device: str | torch.device
    max_memory: int | str | None
    memory: Any
    verbose: int
    label: str = ""

    def __post_init__(self) -> None:
        cache_place(self.memory)

    @classmethod
    def of(cls, estimator: Any, **others: Any) -> PathOptions:
        """The parameters of an estimator with these names, ``others`` in their place."""
        names = [field.name for field in fields(cls) if field.name not in {"label", *others}]
        return cls(**{name: getattr(estimator, name) for name in names}, **others)


@dataclass(frozen=True)
class SolvedRatios:
    """Solutions for some fractions of alpha_max, both in decreasing order."""

    ratios: NDArray[np.float64]
    path: GroupLassoPath

    def at(self, ratios: NDArray[np.float64]) -> GroupLassoPath:
        """The solutions for those of ``ratios`` that are there."""
        return self.path.take(np.flatnonzero(np.isin(self.ratios, ratios)).tolist())

    def join(self, other: SolvedRatios) -> SolvedRatios:
        ratios = np.concatenate([self.ratios, other.ratios])
        return SolvedRatios(np.sort(ratios)[::-1], self.path.join(other.path))


def chain_to(ratio: float) -> NDArray[np.float64]:
    """The fractions of the chain above ``ratio``, and ``ratio``, decreasing."""
    above = _CHAIN[ratio * (1.0 + _SAME) < _CHAIN]
    following = _CHAIN[min(len(above), len(_CHAIN) - 1)]
    return np.append(above, following if following >= ratio * (1.0 - _SAME) else ratio)


def solve_path(training: Training, ratios: Sequence[float], options: PathOptions) -> list[GroupLassoPath]:
    """For each fraction of alpha_max the path that ends there. Its classes are ``training.codes``."""
    wanted = [chain_to(ratio) for ratio in ratios]
    together = np.unique(np.concatenate(wanted))[::-1]
    fresh = False

    def enough(solved: SolvedRatios) -> bool:
        return bool(np.isin(together, solved.ratios).all())

    def solve(solved: SolvedRatios | None) -> SolvedRatios:
        nonlocal fresh
        fresh = True
        return _complete(training, together, options, solved)

    place = cache_place(options.memory)
    solved = solve(None) if place is None else cached(place, _key(training, options), _CODEC, enough, solve)
    if not fresh:
        warn_unconverged(solved.at(together), options.tol, options.max_iter)
    return [solved.at(chain) for chain in wanted]


def _complete(
    training: Training, ratios: NDArray[np.float64], options: PathOptions, solved: SolvedRatios | None
) -> SolvedRatios:
    """Solve what is missing: the chain onward in one sweep, then the fractions that branch off higher up."""
    missing = ratios if solved is None else ratios[~np.isin(ratios, solved.ratios)]
    lowest = np.inf if solved is None else solved.ratios[np.isin(solved.ratios, _CHAIN)][-1]
    onward, above = missing[missing < lowest], missing[missing > lowest]
    features: Any = training.features
    if scales_layers(options.normalization):
        features = KeptFeatures(features, np.arange(len(training.layers)), training.layers, "whole", max_bytes=0)
    for part in ([onward] if len(onward) else []) + [np.array([ratio]) for ratio in above]:
        path = group_lasso_path(
            features,
            training.codes,
            alpha_ratios=part,
            branch=~np.isin(part, _CHAIN),
            l1_ratio=options.l1_ratio,
            sample_weight=training.sample_weight,
            standardize=standardizes(options.normalization),
            tol=options.tol,
            max_iter=options.max_iter,
            device=options.device,
            max_memory=options.max_memory,
            warm_start=None if solved is None else solved.at(_CHAIN),
            callback=PathProgress(len(part), options.label) if options.verbose else None,
        )
        found = SolvedRatios(part, path)
        solved = found if solved is None else solved.join(found)
    assert solved is not None
    return solved


def _key(training: Training, options: PathOptions) -> str:
    # Only ratios matter; twelve digits of them are the same whatever the weights were multiplied with.
    weight = np.round(training.sample_weight / training.sample_weight.max(), 12)
    layers = training.layers if scales_layers(options.normalization) else np.zeros(0, dtype=np.int64)
    settings = f"{options.normalization} {float(options.l1_ratio)!r} {float(options.tol)!r} {int(options.max_iter)}"
    return problem_key(fingerprint(training.features), training.codes, weight, layers, settings)


def _pack(solved: SolvedRatios) -> Arrays:
    path = solved.path
    arrays = {field.name: np.asarray(getattr(path, field.name)) for field in fields(path) if field.name not in _LISTS}
    arrays |= {name: np.concatenate(getattr(path, name)) for name in _LISTS}
    return arrays | {"ratios": solved.ratios, "n_active": np.array([len(active) for active in path.active])}


def _unpack(arrays: Arrays) -> SolvedRatios:
    borders = np.cumsum(arrays.pop("n_active"))[:-1]
    lists: Any = {name: np.split(arrays.pop(name), borders) for name in _LISTS}
    ratios, alpha_max = arrays.pop("ratios"), float(arrays.pop("alpha_max"))
    numbers: Any = arrays
    return SolvedRatios(ratios, GroupLassoPath(alpha_max=alpha_max, **numbers, **lists))


_CODEC = Codec(_pack, _unpack)
