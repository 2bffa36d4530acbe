"""Head2Toe with its parameters chosen by cross-validation, at the price of one path per fold and choice of layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from itertools import product
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn import get_config
from sklearn.base import BaseEstimator
from sklearn.metrics import get_scorer, get_scorer_names
from sklearn.model_selection import check_cv
from sklearn.utils import Bunch
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted

from estimators.candidates import Candidate, Fit, FoldResult, Trial, fit_candidates, null_model
from estimators.classifier import Head2ToeClassifier, ScoresClassifier
from estimators.group_lasso.progress import SearchProgress
from estimators.head import held_bytes, in_memory
from estimators.held import hold_for_folds
from estimators.labels import as_labels
from estimators.layers import layers_by_size
from estimators.mixture import drawn, held_out_scores, mixture_weights, share_to_predict
from estimators.paths import PathOptions
from estimators.scaling import scales_layers
from estimators.selector import PATH_CONSTRAINTS, SelectedFeatures, warn_nothing_selected
from estimators.sklearn_private import Interval, StrOptions, validate_parameter_constraints
from estimators.training import Training, check_features, check_training, class_weighted

_COUNT = Interval(Integral, 1, None, closed="left")
_SHARED = ("l1_ratio", "class_weight", "tol", "max_iter", "device", "max_memory", "memory", "verbose")
Split = tuple[NDArray[np.int64], NDArray[np.int64]]


class Head2ToeClassifierCV(SelectedFeatures, ScoresClassifier, BaseEstimator):  # type: ignore[misc]
    """Head2Toe with layers, strength, number of features, penalty and normalization decided by cross-validation.

    Every fold solves one group-lasso path per normalization, which serves all strengths and fractions. The candidates
    that predict the held-out samples best together are fitted again on all samples, and their scores added up with
    weights. Where X was extracted for several target sizes, all of that is tried on the layers of each.

    Parameters
    ----------
    alphas : int or sequence of float in (0, 1], default=(0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
        Strengths of the group lasso as fractions of alpha_max. An int gives that many from 0.7 to 0.02 on a log
        scale.
    keep_fractions : sequence of float in (0, 1] or None, default=(None, 0.02, 0.1, 0.3, 1.0)
        Tried at every strength. None keeps the features with nonzero weight; 1.0 keeps all, whatever the strength.
    Cs : int or sequence of float, default=(0.01, 1.0, 100.0)
        Inverse penalties of the ridge head. An int gives that many from 1e-4 to 1e4 on a log scale.
    normalizations : sequence of {"standard", "layer", "layer+standard"} or None, default=("standard",)
    last_layers : sequence of int, default=(1, 2)
        Linear probes to try as well: each on all features of that many last layers.
    single_layers : int, default=16
        Number of single layers to try as well, each with all its features, spread evenly over the network. They mix
        well where the task is far from the one the network was trained for.
    cv : int, splitter or iterable of (train, test), default=5
        An integer is the number of stratified folds, or of the samples of the largest class where these are fewer.
    scoring : str, callable or None, default=None
        A scorer as scikit-learn takes it; None is accuracy. It can only predict the samples it is given. Where it
        fails, the score is nan, with a warning.
    refit : {"mixture", "best", "one_standard_error"}, default="mixture"
        What is fitted on all samples. "mixture" fits several candidates and adds up their scores, with the weights that
        make the held-out labels most likely (`mixture_weights`): where many candidates are about as good, choosing one
        is a matter of luck, and layers know different things. "best" is the candidate with the best mean score, of
        equal ones that with fewer features, then with smaller C. "one_standard_error" is the one with the fewest
        features among those within a standard error of the best.
    l1_ratio, class_weight, tol, max_iter, device, memory
        As in `Head2ToeClassifier`. An interrupted or extended search with ``memory`` goes on from there.
    max_memory : int or str, default=None
        What X may take in memory ("4GB"), for all folds that are worked on at the same time together; None for 80 % of
        what is free. Stored features are read once where that leaves as much again for each fold's solver.
    n_jobs : int or None, default=None
        Folds worked on at the same time, as in `GridSearchCV`.
    verbose : int, default=0
        1 prints two lines per fold, 2 also a line per alpha of every path.

    Attributes
    ----------
    best_score_ : float
        Cross-validated score of what predicts, the mean of ``fold_scores_``. For one candidate, its mean score.
    fold_scores_ : ndarray of shape (n_splits_,), float64
        Scores of what predicts on the held-out samples. In a mixture, the weights for a fold are fitted on the
        held-out predictions for the samples of the others.
    cv_results_ : dict of str to ndarray
        One entry per candidate, for ``pandas.DataFrame(cv_results_)``: ``params``, ``param_*`` (masked where they do
        not matter), ``split*_test_score``, ``mean_test_score``, ``std_test_score``, ``rank_test_score``,
        ``mean_n_features``. No times, as candidates share paths.
    best_index_ : int
        Place in ``cv_results_`` of the best candidate, or of the one that "one_standard_error" chose.
    best_params_ : dict
        Its parameters, for `Head2ToeClassifier`. Without ``layers`` it has all; without ``alpha`` it keeps them whole.
    best_estimator_ : Head2ToeClassifier
        That candidate alone, fitted on all samples.
    estimators_ : list of Head2ToeClassifier
        The candidates that predict, heaviest first: ``[best_estimator_]`` without a mixture.
    weights_ : ndarray of shape (n_estimators,), float64, non-negative
        Of their scores; they need not sum to one. 0 where no candidate predicts held-out samples better than the class
        frequencies.
    offset_ : ndarray of shape (n_classes,), or (1,) for two classes, float64
        Added to the sum of the scores: ``1 - weights_.sum()`` times the logarithms of the class frequencies.
    coef_, intercept_ : ndarray
        As in `Head2ToeClassifier`, of the weighted sum. Several estimators that scale layers, each by the length of
        what it kept, are no single linear model and have neither.
    selected_features_, feature_layers_, layer_names_
        As in `Head2ToeClassifier`, of all features that any of ``estimators_`` reads.
    feature_scores_ : ndarray of shape (n_features_in_,), float64
        Of an only estimator, its own. Of several, the weighted mean of their scores, each set divided by its sum.
    alphas_, Cs_ : ndarray of float64
        Those tried; strengths from strong to weak.
    n_splits_, n_iter_ : int
        Folds; most solver steps in the fits on all samples.
    classes_, n_features_in_, feature_names_in_, recipe_
        As in `Head2ToeClassifier`.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from estimators import Head2ToeClassifierCV
    >>> X, y = load_iris(return_X_y=True)
    >>> Head2ToeClassifierCV().fit(X, y).best_score_ > 0.9
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "alphas": ["array-like", _COUNT],
        "keep_fractions": ["array-like"],
        "Cs": ["array-like", _COUNT],
        "normalizations": ["array-like"],
        "last_layers": ["array-like"],
        "single_layers": [Interval(Integral, 0, None, closed="left")],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "refit": [StrOptions({"mixture", "best", "one_standard_error"})],
        "n_jobs": [_COUNT, Interval(Integral, None, -1, closed="right"), None],
        **{name: PATH_CONSTRAINTS[name] for name in _SHARED},
    }

    def __init__(
        self,
        alphas: int | Sequence[float] = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02),
        keep_fractions: Sequence[float | None] = (None, 0.02, 0.1, 0.3, 1.0),
        Cs: int | Sequence[float] = (0.01, 1.0, 100.0),
        normalizations: Sequence[str | None] = ("standard",),
        last_layers: Sequence[int] = (1, 2),
        single_layers: int = 16,
        l1_ratio: float = 1.0,
        cv: Any = 5,
        scoring: Any = None,
        refit: str = "mixture",
        class_weight: dict[Any, float] | str | None = None,
        tol: float = 1e-3,
        max_iter: int = 1000,
        device: str | torch.device = "auto",
        max_memory: int | str | None = None,
        memory: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.alphas = alphas
        self.keep_fractions = keep_fractions
        self.Cs = Cs
        self.normalizations = normalizations
        self.last_layers = last_layers
        self.single_layers = single_layers
        self.l1_ratio = l1_ratio
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.max_memory = max_memory
        self.memory = memory
        self.n_jobs = n_jobs
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None, **params: Any) -> Self:
        """Compare the candidates by cross-validation and fit on all samples what ``refit`` says.

        Parameters
        ----------
        X, y, sample_weight
            As in `Head2ToeClassifier`. Scores are weighted too where the scorer takes weights, unless metadata routing
            says otherwise.
        **params : dict
            What metadata routing takes to the splitter and the scorer, such as ``groups``.

        Returns
        -------
        self : Head2ToeClassifierCV
        """
        self._validate_params()
        training = check_training(self, X, y, sample_weight, None)
        candidates = self._candidates(training)
        routed = self._route(None if sample_weight is None else training.sample_weight, params)
        splits = self._splits(training, routed.get("splitter", Bunch(split={})).split)
        training, left, of_fold = hold_for_folds(training, self.max_memory, self.device, self.n_jobs, len(splits))
        options = PathOptions.of(self, normalization=None, max_memory=left)
        n_predicted = sum(len(test) for _, test in splits) * len(training.classes) * len(candidates)
        share = share_to_predict(n_predicted) if self.refit == "mixture" else 0.0
        scorer = get_scorer(self.scoring or "accuracy")
        trial = Trial(training, candidates, self.class_weight, scorer, routed.scorer.score, share)
        folds = Parallel(n_jobs=self.n_jobs)(
            delayed(trial.on_fold)(
                train, test, replace(options, max_memory=of_fold, label=f"fold {number}/{len(splits)}, ")
            )
            for number, (train, test) in enumerate(splits, 1)
        )
        self._rank(candidates, folds)
        weights = self._weigh(trial, [test for _, test in splits], folds)
        self._fit_all(class_weighted(training, self.class_weight), candidates, weights, options)
        return self

    def _candidates(self, training: Training) -> list[Candidate]:
        """What is tried, each once."""
        accepted = Head2ToeClassifier._parameter_constraints
        alphas = self._values("alphas", accepted["alpha"], lambda number: np.geomspace(0.02, 0.7, number)[::-1])
        Cs = self._values("Cs", accepted["C"], lambda number: np.logspace(-4, 4, number))
        fractions = self._values("keep_fractions", accepted["keep_fraction"])
        normalizations = self._values("normalizations", accepted["normalization"])
        last_layers = self._values("last_layers", [_COUNT])
        self.alphas_, self.Cs_ = np.sort(alphas)[::-1], np.array(Cs)
        every = tuple(training.layer_names)
        # Target sizes that pool to the same layers are one.
        choices = list(dict.fromkeys(tuple(names) for names in layers_by_size(training.features).values()))
        found: list[Candidate] = []
        for layers in choices if len(choices) > 1 else [None]:
            whole = [layers] * (1.0 in fractions) + self._whole_layers(layers or every, last_layers)
            kept = [(layers, fraction, alpha) for alpha in alphas for fraction in fractions if fraction != 1.0]
            kept += [(names, 1.0, None) for names in whole]
            for normalization, (names, fraction, alpha), C in product(normalizations, kept, Cs):
                found.append(Candidate(names, normalization, fraction, alpha, C))
        return list(dict.fromkeys(found))

    def _whole_layers(self, names: tuple[str, ...], last_layers: list[int]) -> list[tuple[str, ...]]:
        """Layers of which all features are tried: some last ones, and single ones."""
        probes = [names[-number:] for number in last_layers if number < len(names)]
        last = len(names) - 1 - (names[-1:] in probes)  # a probe is not tried again
        if len(names) == 1 or last < 0:
            return probes
        spread = np.linspace(0, last, min(self.single_layers, last + 1)).round().astype(int)
        return probes + [(names[number],) for number in spread]

    def _values(self, name: str, constraints: list[Any], spread: Callable[[int], Any] | None = None) -> list[Any]:
        """Values to try, each once; ``spread`` makes as many as an int says."""
        given = getattr(self, name)
        if spread is not None and isinstance(given, Integral):
            given = spread(int(given))
        if not len(given) and name != "last_layers":
            raise ValueError(f"{name} must hold at least one value, got none.")
        for value in given:
            validate_parameter_constraints({name: constraints}, {name: value}, type(self).__name__)
        return list(dict.fromkeys(value.item() if isinstance(value, np.generic) else value for value in given))

    def _route(self, sample_weight: ArrayLike | None, params: dict[str, Any]) -> Bunch:
        """Who gets what of the arguments of fit: ``splitter.split`` and ``scorer.score``."""
        if get_config()["enable_metadata_routing"]:
            weights = {} if sample_weight is None else {"sample_weight": sample_weight}
            return Bunch(**process_routing(self, "fit", **params, **weights))
        if unknown := ", ".join(sorted(params.keys() - {"groups"})):
            hint = "sklearn.set_config(enable_metadata_routing=True)"
            raise ValueError(f"fit takes {unknown} only with metadata routing: {hint}.")
        routed = Bunch(splitter=Bunch(split=params), scorer=Bunch(score={}))
        scorer = get_scorer(self.scoring or "accuracy")
        if sample_weight is None:
            return routed
        if "sample_weight" in signature(getattr(scorer, "_score_func", scorer)).parameters:
            routed.scorer.score["sample_weight"] = sample_weight
        else:
            said = f"scoring={self.scoring!r} takes no sample_weight: the fits are weighted, their scores are not."
            warnings.warn(said, UserWarning, stacklevel=3)
        return routed

    def get_metadata_routing(self) -> MetadataRouter:
        """What `fit` passes on: to the splitter's ``split`` and the scorer's ``score``."""
        router = MetadataRouter(owner=type(self).__name__).add_self_request(self)
        to = {name: MethodMapping().add(caller="fit", callee=name) for name in ("score", "split")}
        router.add(scorer=get_scorer(self.scoring or "accuracy"), method_mapping=to["score"])
        if not isinstance(self.cv, Iterator):  # which would be used up
            router.add(splitter=check_cv(self.cv, classifier=True), method_mapping=to["split"])
        return router

    def _splits(self, training: Training, params: dict[str, Any]) -> list[Split]:
        cv = self.cv
        if isinstance(cv, Integral) or cv is None:
            largest, wanted = int(np.bincount(training.codes).max()), 5 if cv is None else int(cv)
            if largest < 2:
                raise ValueError("y must hold a class with two samples or more; one sample cannot be split.")
            if largest < wanted:
                said = f"cv={wanted} is more than any class has samples; {largest} folds are used. Lower cv."
                warnings.warn(said, UserWarning, stacklevel=3)
            cv = min(largest, wanted)
        labels, rows = training.classes[training.codes], np.arange(len(training.codes))
        splits = check_cv(cv, labels, classifier=True).split(rows[:, None], labels, **params)
        indices = [(rows[train], rows[test]) for train, test in splits]
        if not indices:
            raise ValueError(f"cv must give at least one split, got none from {self.cv!r}.")
        return indices

    def _rank(self, candidates: Sequence[Candidate], folds: Sequence[FoldResult]) -> None:
        """Set ``cv_results_`` and the best candidate."""
        scores, self.n_splits_ = np.array([fold.scores for fold in folds]), len(folds)
        mean, size = scores.mean(axis=0), np.mean([fold.n_features for fold in folds], axis=0)
        if np.isnan(mean).all():
            raise ValueError(f"scoring={self.scoring!r} is nan for all candidates; choose scoring or cv so it is not.")
        params = [candidate.params for candidate in candidates]
        self.cv_results_: dict[str, Any] = {
            "params": params,
            **_columns(params),
            **{f"split{number}_test_score": score for number, score in enumerate(scores)},
            "mean_test_score": mean,
            "std_test_score": scores.std(axis=0),
            "rank_test_score": rankdata(np.where(np.isnan(mean), np.inf, -mean), method="min").astype(np.int32),
            "mean_n_features": size,
        }
        # Means that only rounding tells apart are equal.
        mean = np.round(mean, 12)
        preferred = -np.nan_to_num(mean, nan=-np.inf)
        if self.refit == "one_standard_error":
            best = np.nanargmax(mean)
            margin = scores[:, best].std(ddof=min(1, len(scores) - 1)) / np.sqrt(len(scores))
            preferred = np.where(mean >= mean[best] - margin, -np.inf, preferred)
        self.best_index_ = int(np.lexsort(([candidate.C for candidate in candidates], size, preferred))[0])
        self.best_params_ = params[self.best_index_]

    def _weigh(
        self, trial: Trial, tests: Sequence[NDArray[np.int64]], folds: Sequence[FoldResult]
    ) -> NDArray[np.float64]:
        """Weights of the candidates in what predicts; sets its scores."""
        if self.refit == "mixture":
            rows, training = [drawn(test, trial.share) for test in tests], trial.training
            samples, fold = np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(part) for part in rows])
            held_out = (
                np.concatenate([result.log_probabilities for result in folds], axis=1),
                np.concatenate([result.log_frequencies for result in folds]),
                training.codes[samples],
                class_weighted(training, self.class_weight).sample_weight[samples] / trial.share,
            )
            weights, scores = mixture_weights(*held_out), held_out_scores(*held_out, samples, fold)
            judged = [
                trial.judge(training.features[part], part, scores[fold == number], f"fold {number + 1}, mixture: ")[0]
                for number, part in enumerate(rows)
            ]
            self.fold_scores_ = np.array(judged)
        else:
            weights = (np.arange(len(trial.candidates)) == self.best_index_).astype(np.float64)
            self.fold_scores_ = np.array([result.scores[self.best_index_] for result in folds])
        self.best_score_ = float(self.fold_scores_.mean())
        return weights

    def _fit_all(
        self, training: Training, candidates: Sequence[Candidate], weights: NDArray[np.float64], options: PathOptions
    ) -> None:
        """Fit on all samples the candidates with weight, and the best one."""
        progress = SearchProgress("all samples, ", self.verbose)
        heaviest = np.argsort(-weights, kind="stable")[: np.count_nonzero(weights)].tolist() or [self.best_index_]
        chosen = [candidates[index] for index in dict.fromkeys([*heaviest, self.best_index_])]
        fits = fit_candidates(training, chosen, replace(options, label="all samples, "), rough=False)
        fitted = {fit.candidate: self._estimator(training, fit) for fit in fits}
        progress(f"{len(chosen)} candidates fitted; cross-validated score {self.best_score_:.4g}")
        self.best_estimator_ = fitted[candidates[self.best_index_]]
        self.estimators_ = [fitted[candidates[index]] for index in heaviest]
        self.weights_ = weights[heaviest]
        # What the weights leave over goes to the class frequencies, whatever its sign: a class without any stays out.
        self.offset_ = null_model(training).intercept
        self.offset_[np.isfinite(self.offset_)] *= 1.0 - self.weights_.sum()
        if len(training.classes) == 2:
            self.offset_ = np.diff(self.offset_)
        self.classes_, self.n_iter_ = training.classes, max(estimator.n_iter_ for estimator in self.estimators_)
        scores = self.estimators_[0].feature_scores_
        if len(self.estimators_) > 1:  # heads and paths score on different scales
            shares = [scores / (scores.sum() or 1.0) for scores in (one.feature_scores_ for one in self.estimators_)]
            scores = np.average(shares, axis=0, weights=self.weights_)
        selected = np.unique(np.concatenate([estimator.selected_features_ for estimator in self.estimators_]))
        self._set_selection(training, np.arange(len(training.layers)), selected, scores)
        if not len(self.selected_features_):
            first = self.estimators_[0]
            warn_nothing_selected(first.alpha, first.alpha_max_, "predictions are the class frequencies")
        elif not self.weights_.any():
            said = "No candidate predicts held-out samples better than the class frequencies, which are predicted."
            warnings.warn(said, UserWarning, stacklevel=3)

    def _estimator(self, training: Training, fit: Fit) -> Head2ToeClassifier:
        """A candidate as the classifier it stands for."""
        shared = {name: getattr(self, name) for name in _SHARED}
        estimator = Head2ToeClassifier(**shared, **fit.candidate.params)
        for name in ("n_features_in_", "feature_names_in_", "recipe_"):
            if hasattr(self, name):
                setattr(estimator, name, getattr(self, name))
        estimator._set_fit(training, fit.columns, fit.path, fit.selected, fit.linear)
        return estimator

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """What ``scoring`` gives for these samples; accuracy by default."""
        params = {} if sample_weight is None else {"sample_weight": sample_weight}
        return float(get_scorer(self.scoring or "accuracy")(self, X, as_labels(y), **params))

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Weighted sum of the scores of ``estimators_``, and ``offset_``; shapes as in `Head2ToeClassifier`."""
        check_is_fitted(self)
        features = check_features(self, X, reset=False)
        union = self.selected_features_
        kept = features if len(union) == features.shape[1] else features[:, union]
        columns, layers = in_memory(kept, held_bytes(self.max_memory)), self.feature_layers_[union]
        scores = self._mixed(
            estimator._scores(columns, np.searchsorted(union, estimator.selected_features_), layers)
            for estimator in self.estimators_
        )
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def _mixed(self, parts: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Scores, or intercepts, of the mixture from those of ``estimators_``."""
        weighted = zip(self.weights_, parts, strict=True)
        # A part may be infinite, which no weight of zero makes finite.
        mixed = sum(weight * part if weight else np.zeros_like(part) for weight, part in weighted)
        return np.asarray(mixed + self.offset_)

    @property
    def coef_(self) -> NDArray[np.float64]:
        """Coefficients of all features, (n_classes, n_features_in_), or (1, n_features_in_) for two classes."""
        self._check_linear("coef_")
        return np.asarray(np.tensordot(self.weights_, [estimator.coef_ for estimator in self.estimators_], 1))

    @property
    def intercept_(self) -> NDArray[np.float64]:
        """Intercepts, (n_classes,), or (1,) for two classes."""
        self._check_linear("intercept_")
        return self._mixed(estimator.intercept_ for estimator in self.estimators_)

    def _check_linear(self, name: str) -> None:
        check_is_fitted(self)
        if len(self.estimators_) > 1 and any(scales_layers(estimator.normalization) for estimator in self.estimators_):
            raise AttributeError(
                f"{type(self).__name__} has {name} where it is one linear model. Some of the {len(self.estimators_)} "
                "estimators in this mixture scale each layer by its length: see estimators_, or set refit='best'."
            )


def _columns(params: Sequence[dict[str, Any]]) -> dict[str, np.ma.MaskedArray[Any, Any]]:
    """The parameters of all candidates by name, masked where they do not matter."""
    columns: dict[str, np.ma.MaskedArray[Any, Any]] = {}
    for name in dict.fromkeys(name for one in params for name in one):
        values = np.empty(len(params), dtype=object)
        for index, one in enumerate(params):
            values[index] = one.get(name)
        missing = np.array([name not in one for one in params])
        if all(isinstance(value, Real) for value in values[~missing]):
            values = values.astype(float)
        columns[f"param_{name}"] = np.ma.MaskedArray(values, mask=missing)
    return columns
