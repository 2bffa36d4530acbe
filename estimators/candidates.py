"""What a search tries, on one training set: every candidate fitted, and scored on the samples held out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from estimators.classifier import ScoresClassifier
from estimators.device import resolve_device
from estimators.group_lasso.progress import SearchProgress
from estimators.group_lasso.result import GroupLassoPath
from estimators.head import KeptFeatures, LinearModel, RidgeHead, RidgeSolution, held_bytes, in_memory
from estimators.held import hold
from estimators.mixture import drawn
from estimators.paths import PathOptions, solve_path
from estimators.scaling import layer_scaling
from estimators.selection import select_features
from estimators.sklearn_private import check_method_params
from estimators.training import Training, class_weighted

_Item = TypeVar("_Item")
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Candidate:
    """Parameters of a `Head2ToeClassifier`; without ``alpha`` it keeps all features of its layers."""

    layers: tuple[str, ...] | None
    normalization: str | None
    keep_fraction: float | None
    alpha: float | None
    C: float

    @property
    def params(self) -> dict[str, Any]:
        """Those that matter."""
        params: dict[str, Any] = {"C": self.C}
        if self.alpha is not None:
            params["alpha"] = self.alpha
        params |= {"keep_fraction": self.keep_fraction, "normalization": self.normalization}
        return params if self.layers is None else {**params, "layers": list(self.layers)}


@dataclass(frozen=True)
class Fit:
    """One candidate on one training set: ``columns[selected]`` of X, and a linear model of them."""

    candidate: Candidate
    columns: NDArray[np.int64]
    path: GroupLassoPath | None
    selected: NDArray[np.int64]
    linear: LinearModel


def fit_candidates(
    training: Training, candidates: Sequence[Candidate], options: PathOptions, *, rough: bool
) -> Iterator[Fit]:
    """Fit candidates: one path for those that share layers and normalization; ``rough`` as in `RidgeHead.fit`."""
    training, options = _hold(training, options)
    for layers, of_layers in _grouped(candidates, lambda candidate: candidate.layers).items():
        columns = training.columns_of(layers)
        part, of_part = _hold(training.take(columns), options)
        for normalization, group in _grouped(of_layers, lambda candidate: candidate.normalization).items():
            for fit in _fit_group(part, group, replace(of_part, normalization=normalization), rough):
                yield replace(fit, columns=columns)


def _hold(training: Training, options: PathOptions) -> tuple[Training, PathOptions]:
    training, left = hold(training, options.max_memory, options.device, load=True)
    return training, replace(options, max_memory=left)


def _fit_group(training: Training, group: Sequence[Candidate], options: PathOptions, rough: bool) -> Iterator[Fit]:
    """Fit candidates of the same layers and normalization."""
    alphas = list(dict.fromkeys(candidate.alpha for candidate in group if candidate.alpha is not None))
    paths: dict[float | None, GroupLassoPath] = {}
    if alphas:
        progress = SearchProgress(options.label, options.verbose)
        of_path = replace(options, verbose=max(0, options.verbose - 1))
        paths.update(zip(alphas, solve_path(training, alphas, of_path), strict=True))
        progress(f"path to alpha={min(alphas):.3g} solved: {len(paths[min(alphas)].active[-1])} features")
    every = np.arange(len(training.layers))
    same_features: dict[bytes, list[Candidate]] = {}
    # A head starts from that with the same share of features at the alpha above.
    ordered = sorted(group, key=lambda candidate: (str(candidate.keep_fraction), -(candidate.alpha or 0)))
    for (fraction, alpha), alike in _grouped(ordered, lambda one: (one.keep_fraction, one.alpha)).items():
        selected = every if alpha is None else select_features(paths[alpha], -1, fraction)
        same_features.setdefault(selected.tobytes(), []).extend(alike)
    solutions: dict[Any, RidgeSolution | None] = {}
    for key, same in same_features.items():
        selected = np.frombuffer(key, dtype=np.int64)
        head = None
        if len(selected):
            limit = held_bytes(options.max_memory)
            head = RidgeHead(training, selected, options.normalization, resolve_device(options.device), limit)
        for C, alike in sorted(_grouped(same, lambda candidate: candidate.C).items()):
            similar = same[0].keep_fraction, C
            linear = null_model(training) if head is None else head.fit(C, solutions.get(similar), rough)
            if head is not None:
                solutions[similar] = head.solution
            for candidate in alike:
                yield Fit(candidate, every, paths.get(candidate.alpha), selected, linear)


def _grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Items by key, both in the order of their first appearance."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def null_model(training: Training) -> LinearModel:
    """A model of no features: its intercepts are the logarithms of the class frequencies."""
    counts = np.bincount(training.codes, training.sample_weight, len(training.classes)).astype(np.float64)
    if not counts.any():
        counts = np.ones(len(training.classes))
    with np.errstate(divide="ignore"):
        return LinearModel(np.zeros((0, len(counts))), np.log(counts / counts.sum()), np.zeros(0), 0)


class _Answers(ScoresClassifier, BaseEstimator):  # type: ignore[misc]
    """What one model says about the samples ``X``, for scorers to ask."""

    def __init__(self, classes: NDArray[Any], scores: NDArray[np.float64], X: Any) -> None:
        self.classes = self.classes_ = classes
        self.scores = scores
        self.X = X

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        if X is not self.X:
            raise ValueError("scoring may ask for predictions of the samples it is given only, as they are.")
        return self.scores[:, 1] - self.scores[:, 0] if len(self.classes) == 2 else self.scores

    def __sklearn_is_fitted__(self) -> bool:
        return True


class FoldResult(NamedTuple):
    """What all candidates did in one fold: scores, features kept, and what `mixture_weights` wants to know."""

    scores: NDArray[np.float64]
    n_features: NDArray[np.int64]
    log_probabilities: NDArray[np.float64]
    log_frequencies: NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """Candidates to be tried on parts of a training set; predictions of ``share`` of what is held out are kept."""

    training: Training
    candidates: Sequence[Candidate]
    class_weight: dict[Any, float] | str | None
    scorer: Any
    score_params: dict[str, Any]
    share: float

    def judge(
        self, X: Any, rows: NDArray[np.int64], scores: NDArray[np.float64], label: str
    ) -> tuple[float, NDArray[np.float64]]:
        """The score of a model that gives the rows X these ``scores``, and its log-probabilities, both by class."""
        answers = _Answers(self.training.classes, scores, X)
        labels = self.training.classes[self.training.codes[rows]]
        params = check_method_params(self.training.features, params=self.score_params, indices=rows)
        try:
            score = float(self.scorer(answers, X, labels, **params))
        except Exception as error:
            said = f"{label}scoring failed and counts as nan: {type(error).__name__}: {error}"
            warnings.warn(said, UserWarning, stacklevel=2)
            score = np.nan
        return score, answers.predict_log_proba(X)

    def on_fold(self, train: NDArray[np.int64], test: NDArray[np.int64], options: PathOptions) -> FoldResult:
        """Fit all candidates on the rows ``train`` and judge them by the rows ``test``."""
        progress = SearchProgress(options.label, options.verbose)
        part, X, every = self._learned_from(train), self.training.features[test], self.training.layers
        limit, nothing = held_bytes(options.max_memory), null_model(part)
        values, shown = in_memory(X, limit), drawn(np.arange(len(test)), self.share)
        places = {candidate: place for place, candidate in enumerate(self.candidates)}
        scores, n_features = np.empty(len(places)), np.empty(len(places), dtype=np.int64)
        log_probabilities = np.empty((len(places), len(shown), len(part.classes)))
        last: LinearModel | None = None
        for fit in self._fits(part, nothing, options):
            if fit.linear is not last:  # candidates that keep the same features share a model
                last, selected = fit.linear, fit.columns[fit.selected]
                kept = KeptFeatures(values, selected, every, layer_scaling(fit.candidate.normalization, "kept"), limit)
                score, predicted = self.judge(X, test, kept.scores(last.coef, last.intercept), options.label)
            place = places[fit.candidate]
            scores[place], n_features[place], log_probabilities[place] = score, len(fit.selected), predicted[shown]
        progress(f"{len(places)} candidates judged, path included")
        return FoldResult(scores, n_features, log_probabilities, np.tile(nothing.intercept, (len(shown), 1)))

    def _learned_from(self, rows: NDArray[np.int64]) -> Training:
        whole = self.training
        features, codes, weight = whole.features[rows], whole.codes[rows], whole.sample_weight[rows]
        return class_weighted(replace(whole, features=features, codes=codes, sample_weight=weight), self.class_weight)

    def _fits(self, part: Training, nothing: LinearModel, options: PathOptions) -> Iterator[Fit]:
        if len(np.unique(part.codes[part.sample_weight > 0])) > 1:
            yield from fit_candidates(part, self.candidates, options, rough=True)
            return
        said = "only one class to train on, which is predicted everywhere. Choose cv so that every fold trains on two."
        warnings.warn(f"{options.label}{said}", UserWarning, stacklevel=2)
        none = np.zeros(0, dtype=np.int64)
        for candidate in self.candidates:
            yield Fit(candidate, none, None, none, nothing)
