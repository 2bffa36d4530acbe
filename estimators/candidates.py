"""What a search tries, on one training set: every candidate fitted, and scored on the samples held out."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from estimators.scaling import kept_scaling
from estimators.selection import select_features
from estimators.sklearn_private import check_method_params
from estimators.training import Training, class_weighted


@dataclass(frozen=True)
class Candidate:
    """What is tried; ``index`` is its place in ``cv_results_``."""

    index: int
    layers: tuple[str, ...] | None
    normalization: str | None
    alpha: float
    keep_fraction: float | None
    C: float

    @property
    def params(self) -> dict[str, Any]:
        """For `Head2ToeClassifier`."""
        return {
            "C": self.C,
            "alpha": self.alpha,
            "keep_fraction": self.keep_fraction,
            "layers": self.layers,
            "normalization": self.normalization,
        }

    @property
    def whole(self) -> bool:
        """Whether all features of the layers are kept, whatever alpha is."""
        return self.keep_fraction == 1.0

    @property
    def decides(self) -> tuple[Any, ...]:
        """What the candidate's predictions depend on."""
        return self.layers, self.normalization, self.keep_fraction, self.C, None if self.whole else self.alpha


@dataclass(frozen=True)
class Fit:
    """One candidate on one training set."""

    candidate: Candidate
    path: GroupLassoPath | None
    columns: NDArray[np.int64]
    selected: NDArray[np.int64]
    scaling: str
    linear: LinearModel


def fit_candidates(
    training: Training, candidates: Sequence[Candidate], options: PathOptions, rough: bool
) -> Iterator[Fit]:
    """Fit candidates: one path per choice of layers and normalization, one gathering of features per selection.

    C goes from small to large; ``rough`` as in `RidgeHead.fit`.
    """
    progress = SearchProgress(len(candidates), options.label) if options.verbose else None
    for layers in dict.fromkeys(candidate.layers for candidate in candidates):
        columns = training.columns_of(layers)
        part, left = hold(training.take(columns), options.max_memory, options.device)
        of_layers = [candidate for candidate in candidates if candidate.layers == layers]
        for normalization in dict.fromkeys(candidate.normalization for candidate in of_layers):
            group = [candidate for candidate in of_layers if candidate.normalization == normalization]
            of_group = replace(options, normalization=normalization, max_memory=left)
            for fit in _fit_group(part, group, of_group, held_bytes(left), rough):
                yield replace(fit, columns=columns)
                if progress is not None:
                    progress()


def _fit_group(
    training: Training,
    group: Sequence[Candidate],
    options: PathOptions,
    limit: float,
    rough: bool,
) -> Iterator[Fit]:
    """Fit candidates of the same layers and normalization."""
    normalization, device = options.normalization, resolve_device(options.device)
    alphas = list(dict.fromkeys(candidate.alpha for candidate in group if not candidate.whole))
    paths = dict(zip(alphas, solve_path(training, alphas, options), strict=True)) if alphas else {}
    every, scaling = np.arange(len(training.layers)), kept_scaling(normalization)
    selections: dict[bytes, list[Candidate]] = {}
    # A head starts from that with the same share of features at the alpha above.
    ordered = sorted(group, key=lambda candidate: (str(candidate.keep_fraction), -candidate.alpha, candidate.C))
    for _, alike in itertools.groupby(ordered, key=lambda candidate: (candidate.keep_fraction, candidate.alpha)):
        candidates_alike = list(alike)
        first = candidates_alike[0]
        selected = every if first.whole else select_features(paths[first.alpha], -1, first.keep_fraction)
        selections.setdefault(selected.tobytes(), []).extend(candidates_alike)
    solutions: dict[tuple[Any, float], RidgeSolution] = {}
    for key, same in selections.items():
        selected = np.frombuffer(key, dtype=np.int64)
        head = RidgeHead(training, selected, normalization, device, limit) if len(selected) else None
        for C, alike in itertools.groupby(
            sorted(same, key=lambda candidate: candidate.C), key=lambda candidate: candidate.C
        ):
            like = (same[0].keep_fraction, C)
            if head is None:
                linear = LinearModel(*null_model(training), np.zeros(0), 0)
            else:
                linear = head.fit(C, solutions.get(like), rough)
            if head is not None and head.solution is not None:
                solutions[like] = head.solution
            for candidate in alike:
                path = None if candidate.whole else paths[candidate.alpha]
                yield Fit(candidate, path, every, selected, scaling, linear)


def null_model(training: Training) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """No features: coefficients (0, n_classes), and the logarithms of the class frequencies, (n_classes,)."""
    counts = np.bincount(training.codes, training.sample_weight, len(training.classes)).astype(np.float64)
    if not counts.any():
        counts = np.ones(len(training.classes))
    with np.errstate(divide="ignore"):
        return np.zeros((0, len(counts))), np.log(counts / counts.sum())


class _Answers(ScoresClassifier, BaseEstimator):  # type: ignore[misc]
    """What one candidate says about one validation set, for scorers to ask."""

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


def score_fold(
    training: Training,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    candidates: Sequence[Candidate],
    scorer: Any,
    score_params: dict[str, Any],
    class_weight: dict[Any, float] | str | None,
    options: PathOptions,
    mixed: Sequence[int],
    share: float,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Try all candidates on one fold.

    Returns
    -------
    scores : ndarray of shape (n_candidates,), float64
    n_features : ndarray of shape (n_candidates,), int64
        That each kept.
    log_probabilities : ndarray of shape (len(mixed), n_drawn, n_classes), float64
        Predicted by the candidates ``mixed`` for that ``share`` of the samples held out.
    log_frequencies : ndarray of shape (n_drawn, n_classes), float64
        Of the classes in what they were fitted on.
    """
    part = replace(
        training,
        features=training.features[train],
        codes=training.codes[train],
        sample_weight=training.sample_weight[train],
    )
    held_out, labels = training.features[test], training.classes[training.codes[test]]
    limit = held_bytes(options.max_memory)
    values = in_memory(held_out, limit)
    part = class_weighted(part, class_weight)
    params = check_method_params(training.features, params=score_params, indices=test)
    scores, n_features = np.empty(len(candidates)), np.empty(len(candidates), dtype=np.int64)
    places = {index: place for place, index in enumerate(mixed)}
    shown = drawn(np.arange(len(test)), share)
    log_probabilities = np.empty((len(mixed), len(shown), len(training.classes)))
    log_frequencies = np.tile(null_model(part)[1], (len(shown), 1))

    def judge(kept: KeptFeatures, coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> tuple[float, Any]:
        answers = _Answers(training.classes, kept.scores(coef, intercept), held_out)
        predicted = answers.predict_log_proba(held_out)[shown]
        try:
            score = float(scorer(answers, held_out, labels, **params))
        except Exception as error:
            score = np.nan
            warnings.warn(
                f"{options.label}scoring failed and counts as nan: {type(error).__name__}: {error}",
                UserWarning,
                stacklevel=2,
            )
        return score, predicted

    if len(np.unique(part.codes[part.sample_weight > 0])) < 2:
        warnings.warn(
            f"{options.label}only one class to train on, which is predicted everywhere. Choose cv so that every fold "
            "trains on two.",
            UserWarning,
            stacklevel=2,
        )
        nothing = KeptFeatures(values, np.zeros(0, dtype=np.int64), training.layers, "", limit)
        scores[:], log_probabilities[:] = judge(nothing, *null_model(part))
        n_features[:] = 0
        return scores, n_features, log_probabilities, log_frequencies
    previous: NDArray[np.float64] | None = None
    for fit in fit_candidates(part, candidates, options, rough=True):
        index = fit.candidate.index
        if previous is not fit.linear.coef:
            previous = fit.linear.coef
            kept = KeptFeatures(values, fit.columns[fit.selected], training.layers, fit.scaling, limit)
            judged = judge(kept, fit.linear.coef, fit.linear.intercept)
        scores[index], n_features[index] = judged[0], len(fit.selected)
        if index in places:
            log_probabilities[places[index]] = judged[1]
    return scores, n_features, log_probabilities, log_frequencies
