"""Head2Toe with its parameters chosen by cross-validation, at the price of a path per fold, target size and scaling."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
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

from estimators.candidates import Candidate, Fit, fit_candidates, null_model, score_fold
from estimators.classifier import Head2ToeClassifier, ScoresClassifier
from estimators.labels import as_labels
from estimators.head import held_bytes, in_memory
from estimators.held import hold_for_folds
from estimators.layers import layers_by_size
from estimators.mixture import drawn, mixture_weights, share_to_predict
from estimators.paths import PathOptions
from estimators.scaling import scales_layers
from estimators.selector import PATH_CONSTRAINTS, SelectedFeatures, warn_nothing_selected
from estimators.sklearn_private import Interval, StrOptions, validate_parameter_constraints
from estimators.training import Training, check_features, check_training, class_weighted


class Head2ToeClassifierCV(SelectedFeatures, ScoresClassifier, BaseEstimator):  # type: ignore[misc]
    """Head2Toe with target size, strength, number of features, penalty and normalization decided by cross-validation.

    Every fold solves one group-lasso path per target size and normalization, which serves all other candidates. Those
    that predict the held-out samples best together are fitted again on all samples, and their scores added up with
    weights. Where X was extracted for several target sizes, all of that is tried on the features of each.

    Parameters
    ----------
    alphas : sequence of float in (0, 1], default=(0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
        Strengths of the group lasso as fractions of alpha_max. The strongest keep a handful of features.
    keep_fractions : sequence of float in (0, 1] or None, default=(None, 0.02, 0.1, 0.3, 1.0)
        Tried at every strength. None keeps the features with nonzero weight, 1.0 keeps all.
    Cs : sequence of float, default=(0.01, 1.0, 100.0)
        Inverse penalties of the ridge head.
    normalizations : sequence of {"standard", "layer", "layer+standard"} or None, default=("standard",)
        As in `Head2ToeClassifier`.
    l1_ratio : float in (0, 1], default=1.0
        Share of the penalty on sum_d ||W_d||_2; the rest is on ||W||_F^2 / 2.
    cv : int, splitter or iterable of (train, test), default=5
        An integer is the number of stratified folds. Where no class has that many samples, there are as many folds as
        the largest class has.
    scoring : str, callable or None, default=None
        What a scorer of scikit-learn may be; None is accuracy. It may ask for predictions of the samples it is given
        only, and is given arrays, or a FeatureMatrix. Where it fails, the score is nan, with a warning.
    refit : {"mixture", "best", "one_standard_error"}, default="mixture"
        What is fitted on all samples. "mixture" is those candidates, with those weights, whose summed scores make the
        held-out labels most likely (`mixture_weights`): one candidate chosen by its score is a matter of luck where
        many are about as good, and layers know different things. "best" is the candidate with the best mean score.
        "one_standard_error" is the one with the fewest features among those within a standard error of the best.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes; they multiply ``sample_weight``.
    tol : float, default=1e-3
        Duality gap to certify, relative to the objective of zero coefficients.
    max_iter : int, default=1000
        Newton steps per alpha of the path.
    device : str or torch.device, default="auto"
        "auto" is CUDA where there is one, else the CPU. Fitted attributes are on the host.
    max_memory : int or str, default=None
        What X may take in memory ("4GB"), for all folds that are worked on at the same time together; None for 80 % of
        what is free. Stored features are read once, for all folds, and held where that leaves as much again for each
        fold's solver; processes share a second copy. What a solver cannot hold in its part is read in blocks.
    memory : str, path, joblib.Memory or None, default=None
        Folder or URL (``s3://bucket/paths``) where solved paths are kept, so that an interrupted or extended search
        goes on from there.
    n_jobs : int or None, default=None
        Folds worked on at the same time, as in `GridSearchCV`.
    verbose : int, default=0
        Print a line per alpha of every fold's path, and per tenth of its candidates.
    last_layers : sequence of int, default=(1, 2)
        Tried as well: all features of so many last layers, which are linear probes, the same at every alpha. Those
        that would be all layers are left out; a plain array is one layer.
    single_layers : int, default=16
        Tried as well: all features of one layer, for so many layers spread evenly over the network, or for all where
        there are fewer. What single layers see of an image mixes well where the task is far from the network's own.

    Attributes
    ----------
    cv_results_ : dict of str to ndarray
        One entry per candidate, for ``pandas.DataFrame(cv_results_)``: ``params``, ``param_*``, ``split*_test_score``,
        ``mean_test_score``, ``std_test_score``, ``rank_test_score``, ``mean_n_features``. No times, as candidates share
        paths.
    best_index_ : int
        Place in ``cv_results_`` of the best candidate, or of the one that "one_standard_error" chose.
    best_params_ : dict
        Its ``alpha``, ``keep_fraction``, ``last_layers``, ``layer``, ``C``, ``normalization`` and ``target_size``, as
        `Head2ToeClassifier` takes them.
    best_score_ : float
        Its mean score over the folds.
    best_estimator_ : Head2ToeClassifier
        That candidate alone, fitted on all samples.
    estimators_ : list of Head2ToeClassifier
        The candidates that predict, heaviest first: ``[best_estimator_]`` without a mixture.
    weights_ : ndarray of shape (n_estimators,), float64, non-negative
        Of their scores; they need not sum to one. 0 where no candidate predicts held-out samples better than the class
        frequencies.
    offset_ : ndarray of shape (n_classes,), or (1,) for two classes, float64
        What is added to the sum of the scores: ``1 - weights_.sum()`` times the logarithms of the class frequencies.
    coef_ : ndarray of shape (n_classes, n_features_in_), or (1, n_features_in_) for two classes, float64
        Weighted sum of the ``coef_`` of ``estimators_``, made on access. Several that scale layers, each by the length
        of what it kept, are no single linear model: there is then neither ``coef_`` nor ``intercept_``.
    intercept_ : ndarray of shape (n_classes,), or (1,) for two classes, float64
    n_splits_ : int
    n_iter_ : int
        Most solver steps that any alpha took in the fits on all samples.
    classes_ : ndarray of shape (n_classes,)
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,), object
        Where X has names.
    recipe_ : dict or None
        How the features of fit were made, where X is a FeatureMatrix that says so; features of another recipe are
        refused.
    selected_features_ : ndarray of shape (n_selected,), int64
        Sorted columns that prediction reads: those of all ``estimators_``.
    feature_scores_ : ndarray of shape (n_features_in_,), float64
        Weighted mean of the ``feature_scores_`` of ``estimators_``.
    feature_layers_ : ndarray of shape (n_features_in_,), int64
        Position in ``layer_names_`` of each feature's layer.
    layer_names_ : ndarray of shape (n_layers,), object
        In network order; a plain array is one layer, "X".

    Notes
    -----
    Candidates with equal mean scores are ranked by fewer features, then by smaller C.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from estimators import Head2ToeClassifierCV
    >>> X, y = load_iris(return_X_y=True)
    >>> Head2ToeClassifierCV().fit(X, y).best_score_ > 0.9
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "alphas": ["array-like"],
        "keep_fractions": ["array-like"],
        "Cs": ["array-like"],
        "last_layers": ["array-like"],
        "single_layers": [Interval(Integral, 0, None, closed="left")],
        "normalizations": ["array-like"],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "refit": [StrOptions({"mixture", "best", "one_standard_error"})],
        "n_jobs": [Interval(Integral, 1, None, closed="left"), Interval(Integral, None, -1, closed="right"), None],
        **PATH_CONSTRAINTS,
    }

    def __init__(
        self,
        alphas: Sequence[float] = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02),
        keep_fractions: Sequence[float | None] = (None, 0.02, 0.1, 0.3, 1.0),
        Cs: Sequence[float] = (0.01, 1.0, 100.0),
        normalizations: Sequence[str | None] = ("standard",),
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
        last_layers: Sequence[int] = (1, 2),
        single_layers: int = 16,
    ) -> None:
        self.alphas = alphas
        self.keep_fractions = keep_fractions
        self.Cs = Cs
        self.last_layers = last_layers
        self.single_layers = single_layers
        self.normalizations = normalizations
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
        X : array-like or FeatureMatrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
            Class labels.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative. Scores are weighted by it too where the scorer takes weights, unless metadata routing says
            otherwise.
        **params : dict
            What metadata routing takes to the splitter and the scorer, such as ``groups``.

        Returns
        -------
        self : Head2ToeClassifierCV

        Raises
        ------
        ValueError
            If a parameter or input is not as described, there are fewer than two classes, or no candidate's score is
            a number.

        Warns
        -----
        ConvergenceWarning
            If a path does not reach ``tol``, or a head does not converge.
        """
        self._validate_params()
        training = check_training(self, X, y, sample_weight, None)
        candidates = self._candidates(training)
        routed = self._route(None if sample_weight is None else training.sample_weight, params)
        splits = self._splits(training, routed.get("splitter", Bunch(split={})).split)
        scorer, self.n_splits_ = get_scorer(self.scoring or "accuracy"), len(splits)
        training, left, for_fold = hold_for_folds(training, self.max_memory, self.device, self.n_jobs, len(splits))
        options, of_fold = (PathOptions.of(self, normalization=None, max_memory=each) for each in (left, for_fold))
        mixed = []
        if self.refit == "mixture":
            mixed = list({candidate.decides: candidate.index for candidate in reversed(candidates)}.values())[::-1]
        share = share_to_predict(len(mixed), sum(len(test) for _, test in splits), len(training.classes))
        folds = Parallel(n_jobs=self.n_jobs)(
            delayed(score_fold)(
                training,
                train,
                test,
                candidates,
                scorer,
                routed.scorer.score,
                self.class_weight,
                replace(of_fold, label=f"fold {number}/{len(splits)}, "),
                mixed,
                share,
            )
            for number, (train, test) in enumerate(splits, 1)
        )
        scores, n_features = (np.array([fold[part] for fold in folds]) for part in (0, 1))
        self.best_index_ = self._choose(candidates, scores, n_features)
        self.best_params_ = candidates[self.best_index_].params
        self.best_score_ = float(scores[:, self.best_index_].mean())
        training = class_weighted(training, self.class_weight)
        weights = np.zeros(len(candidates))
        if self.refit == "mixture":
            held_out = np.concatenate([drawn(test, share) for _, test in splits])
            predicted, frequencies = np.concatenate([fold[2] for fold in folds], axis=1), [fold[3] for fold in folds]
            each = training.sample_weight[held_out] / share
            weights[mixed] = mixture_weights(predicted, np.concatenate(frequencies), training.codes[held_out], each)
        else:
            weights[self.best_index_] = 1.0
        heaviest = np.argsort(-weights, kind="stable")[: np.count_nonzero(weights)].tolist() or [self.best_index_]
        chosen = [candidates[index] for index in dict.fromkeys([*heaviest, self.best_index_])]
        fits = fit_candidates(training, chosen, replace(options, label="all samples, "), rough=False)
        fitted = {fit.candidate.index: self._estimator(training, fit) for fit in fits}
        self.best_estimator_ = fitted[self.best_index_]
        self.estimators_, self.weights_ = [fitted[index] for index in heaviest], weights[heaviest]
        # What the weights leave over goes to the class frequencies, whatever its sign: a class without any stays out.
        _, log_frequencies = null_model(training)
        log_frequencies[np.isfinite(log_frequencies)] *= 1.0 - self.weights_.sum()
        self.offset_ = log_frequencies
        if len(training.classes) == 2:
            self.offset_ = np.diff(self.offset_)
        self.classes_ = training.classes
        self.feature_layers_, self.layer_names_ = training.layers, training.layer_names
        self.n_iter_ = max(estimator.n_iter_ for estimator in self.estimators_)
        self.feature_scores_ = np.average(
            [estimator.feature_scores_ for estimator in self.estimators_],
            axis=0,
            weights=self.weights_ if self.weights_.any() else None,
        )
        self.selected_features_ = np.unique(
            np.concatenate([estimator.selected_features_ for estimator in self.estimators_])
        )
        if not len(self.selected_features_):
            warn_nothing_selected(
                self.best_params_["alpha"], self.best_estimator_.alpha_max_, "predictions are the class frequencies"
            )
        elif not self.weights_.any():
            warnings.warn(
                "No candidate predicts held-out samples better than the class frequencies do: predictions are the "
                "class frequencies.",
                UserWarning,
                stacklevel=2,
            )
        return self

    def _candidates(self, training: Training) -> list[Candidate]:
        normalizations = self._grid("normalization", "normalizations")
        alphas, Cs = self._grid("alpha", "alphas"), self._grid("C", "Cs")
        fractions = self._grid("keep_fraction", "keep_fractions")
        # Sizes that pool to the same layers are one.
        sizes = list({tuple(names): None for names in layers_by_size(training.features).values()})
        kept: list[tuple[tuple[str, ...] | None, float | None]] = []
        for layers in sizes if len(sizes) > 1 else [None]:
            names = list(training.layer_names) if layers is None else list(layers)
            probes = [number for number in self._grid("last_layers", "last_layers", least=0) if number < len(names)]
            kept += [(layers, fraction) for fraction in fractions]
            kept += [(tuple(names[-number:]), 1.0) for number in probes]
            kept += [((names[layer],), 1.0) for layer in self._spread(len(names), probed=1 in probes)]
        grid = itertools.product(normalizations, alphas, kept, Cs)
        return [
            Candidate(index, layers, normalization, alpha, fraction, C)
            for index, (normalization, alpha, (layers, fraction), C) in enumerate(grid)
        ]

    def _spread(self, n_layers: int, *, probed: bool) -> list[int]:
        """Layers to try alone: the last one is a probe already, and an only layer is all features."""
        last = n_layers - 1 - probed
        if n_layers == 1 or last < 0:
            return []
        spread = np.linspace(0, last, min(self.single_layers, last + 1)).round()
        return sorted({int(layer) for layer in spread})

    def _grid(self, name: str, plural: str, least: int = 1) -> list[Any]:
        """Values to try for one parameter of `Head2ToeClassifier`, each once."""
        given = getattr(self, plural)
        if len(given) < least:
            raise ValueError(f"{plural} must hold at least one value, got none.")
        if name == "last_layers":
            return list(dict.fromkeys(given))
        for value in given:
            validate_parameter_constraints(
                {plural: Head2ToeClassifier._parameter_constraints[name]}, {plural: value}, type(self).__name__
            )
        return list(dict.fromkeys(given))

    def _route(self, sample_weight: ArrayLike | None, params: dict[str, Any]) -> Bunch:
        if get_config()["enable_metadata_routing"]:
            if sample_weight is not None:
                params = {**params, "sample_weight": sample_weight}
            return process_routing(self, "fit", **params)
        if unknown := sorted(params.keys() - {"groups"}):
            raise ValueError(
                f"fit takes {', '.join(unknown)} only with metadata routing: "
                "sklearn.set_config(enable_metadata_routing=True)."
            )
        scorer = get_scorer(self.scoring or "accuracy")
        takes_weights = "sample_weight" in signature(getattr(scorer, "_score_func", scorer)).parameters
        score = {"sample_weight": sample_weight} if sample_weight is not None and takes_weights else {}
        if sample_weight is not None and not takes_weights:
            warnings.warn(
                f"scoring={self.scoring!r} takes no sample_weight: the fits are weighted, their scores are not.",
                UserWarning,
                stacklevel=3,
            )
        return Bunch(splitter=Bunch(split=params), scorer=Bunch(score=score))

    def get_metadata_routing(self) -> MetadataRouter:
        """What `fit` passes on: to the splitter's ``split`` and the scorer's ``score``."""
        router = MetadataRouter(owner=type(self).__name__).add_self_request(self)
        router.add(
            scorer=get_scorer(self.scoring or "accuracy"),
            method_mapping=MethodMapping().add(caller="fit", callee="score"),
        )
        if not isinstance(self.cv, Iterator):  # which would be used up
            router.add(
                splitter=check_cv(self.cv, classifier=True),
                method_mapping=MethodMapping().add(caller="fit", callee="split"),
            )
        return router

    def _splits(self, training: Training, params: dict[str, Any]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        cv = self.cv
        if isinstance(cv, Integral) or cv is None:
            largest, wanted = int(np.bincount(training.codes).max()), 5 if cv is None else int(cv)
            if largest < 2:
                raise ValueError(
                    "y must hold a class with two samples or more: every class has one, which cannot be split."
                )
            if largest < wanted:
                warnings.warn(
                    f"cv={wanted} is more than any class has samples; {largest} folds are used. Lower cv.",
                    UserWarning,
                    stacklevel=3,
                )
            cv = min(largest, wanted)
        labels = training.classes[training.codes]
        rows = np.arange(len(labels))
        splits = check_cv(cv, labels, classifier=True).split(rows[:, None], labels, **params)
        indices = [(rows[train], rows[test]) for train, test in splits]
        if not indices:
            raise ValueError(f"cv must give at least one split, got none from {self.cv!r}.")
        return indices

    def _choose(
        self, candidates: Sequence[Candidate], scores: NDArray[np.float64], n_features: NDArray[np.int64]
    ) -> int:
        """Index of the best candidate; sets ``cv_results_``."""
        mean, spread, size = scores.mean(axis=0), scores.std(axis=0), n_features.mean(axis=0)
        if np.isnan(mean).all():
            raise ValueError(
                f"scoring={self.scoring!r} is nan for all candidates; choose scoring or cv so that it is not."
            )
        results: dict[str, Any] = {"params": [candidate.params for candidate in candidates]}
        for name in candidates[0].params:
            values = [candidate.params[name] for candidate in candidates]
            numeric = all(isinstance(value, Real) for value in values)
            column = np.empty(len(values), dtype=float if numeric else object)
            for number, value in enumerate(values):
                column[number] = value
            results[f"param_{name}"] = np.ma.MaskedArray(column, mask=False)
        results |= {f"split{number}_test_score": score for number, score in enumerate(scores)}
        results |= {"mean_test_score": mean, "std_test_score": spread}
        results["rank_test_score"] = rankdata(np.where(np.isnan(mean), np.inf, -mean), method="min").astype(np.int32)
        results["mean_n_features"] = size
        self.cv_results_ = results
        # Means that only rounding tells apart are equal.
        mean = np.round(mean, 12)
        preferred = -np.nan_to_num(mean, nan=-np.inf)
        if self.refit == "one_standard_error":
            best = np.nanargmax(mean)
            margin = scores[:, best].std(ddof=min(1, len(scores) - 1)) / np.sqrt(len(scores))
            preferred = np.where(mean >= mean[best] - margin, -np.inf, preferred)
        return int(np.lexsort(([candidate.C for candidate in candidates], size, preferred))[0])

    def _estimator(self, training: Training, fit: Fit) -> Head2ToeClassifier:
        """A candidate as the classifier it stands for."""
        names = Head2ToeClassifier._get_param_names()
        shared = {name: getattr(self, name) for name in names if name in self._get_param_names()}
        estimator = Head2ToeClassifier(**{**shared, **fit.candidate.params})
        estimator.n_features_in_, estimator.recipe_ = self.n_features_in_, self.recipe_
        if hasattr(self, "feature_names_in_"):
            estimator.feature_names_in_ = self.feature_names_in_
        estimator._set_fit(training, fit.columns, fit.path, fit.selected, fit.linear)
        return estimator

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """What ``scoring`` gives for these samples; accuracy by default."""
        params = {} if sample_weight is None else {"sample_weight": sample_weight}
        return float(get_scorer(self.scoring or "accuracy")(self, X, as_labels(y), **params))

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Scores of the classes: the weighted sum of those of ``estimators_``, and ``offset_``.

        Of the second class only where there are two.

        Parameters
        ----------
        X : array-like or FeatureMatrix of shape (n_samples, n_features)
            Only ``X[:, selected_features_]`` of a FeatureMatrix is read.

        Returns
        -------
        ndarray of shape (n_samples, n_classes) or (n_samples,), float64

        Raises
        ------
        ValueError
            If X has another number of features, or other feature names, than in `fit`.
        """
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
        return (
            np.asarray(sum(weight * part if weight else np.zeros_like(part) for weight, part in weighted))
            + self.offset_
        )

    @property
    def coef_(self) -> NDArray[np.float64]:
        """Coefficients of all features, (n_classes, n_features_in_), or (1, n_features_in_) for two classes."""
        self._require_linear("coef_")
        coef = np.zeros((len(self.best_estimator_._kept_coef), self.n_features_in_))
        for weight, estimator in zip(self.weights_, self.estimators_, strict=True):
            coef[:, estimator.selected_features_] += weight * estimator._kept_coef
        return coef

    @property
    def intercept_(self) -> NDArray[np.float64]:
        """Intercepts, (n_classes,), or (1,) for two classes."""
        self._require_linear("intercept_")
        return self._mixed(estimator.intercept_ for estimator in self.estimators_)

    def _require_linear(self, name: str) -> None:
        check_is_fitted(self)
        if len(self.estimators_) > 1 and any(scales_layers(estimator.normalization) for estimator in self.estimators_):
            raise AttributeError(
                f"{type(self).__name__} has {name} where it is one linear model. This mixture is of "
                f"{len(self.estimators_)} estimators, some of which scale each layer by the length of what they kept: "
                f"see estimators_ and weights_, or set refit='best'."
            )
