"""Head2ToeClassifierCV: the same as a grid search, at a lower price, and what it does with odd folds and scores."""

import re
import warnings
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import sklearn
from _estimator_data import FakeFeatures, make_problem
from joblib import parallel_config
from scipy.special import log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning, NotFittedError, UnsetMetadataPassedError
from sklearn.metrics import accuracy_score, get_scorer, log_loss, make_scorer
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, ShuffleSplit, StratifiedKFold, cross_validate
from sklearn.utils.estimator_checks import check_estimator

from estimators import Head2ToeClassifier, Head2ToeClassifierCV
from estimators import search as module
from estimators.candidates import Candidate, fit_candidates
from estimators.mixture import drawn, mixture_weights
from estimators.paths import PathOptions
from estimators.training import check_training

SMALL = dict(alphas=(0.6, 0.4), keep_fractions=(None, 0.2), Cs=(0.1, 1.0), cv=3)
N = 60


def problem(seed=0, k=3, n=N):
    X, y, weight = make_problem(seed, n=n, d=25, k=k)
    return X.astype(np.float32), y, weight


def searched(model, **others):
    """The grid search over the same candidates."""
    grid = {
        "alpha": list(model.alphas),
        "keep_fraction": list(model.keep_fractions),
        "C": list(model.Cs),
        "normalization": list(model.normalizations),
    }
    estimator = Head2ToeClassifier(class_weight=model.class_weight, tol=model.tol, l1_ratio=model.l1_ratio)
    return GridSearchCV(estimator, grid, cv=model.cv, scoring=model.scoring, error_score="raise", **others)


def by_params(results, name):
    """One entry of ``cv_results_`` by candidate."""
    names = ("normalization", "alpha", "keep_fraction", "C")
    return {
        tuple(params[name] for name in names): value
        for params, value in zip(results["params"], results[name], strict=True)
    }


def assert_same_scores(ours, theirs, atol, n_splits=3):
    names = [f"split{number}_test_score" for number in range(n_splits)]
    for name in [*names, "mean_test_score", "std_test_score"]:
        a, b = by_params(ours, name), by_params(theirs, name)
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[key] for key in b], list(b.values()), atol=atol, err_msg=name)


def best_by_the_rule(model):
    """The best candidate as documented: score, then fewer features, then smaller C."""
    results = model.cv_results_
    order = np.lexsort((results["param_C"], results["mean_n_features"], -results["mean_test_score"]))
    return int(order[0])


class Scripted:
    """A scorer that gives the next number of a script, whatever was predicted; 0.5 for what comes after it."""

    def __init__(self, *folds):
        self.numbers = [number for fold in folds for number in fold]

    def __call__(self, estimator, X, y):
        return self.numbers.pop(0) if self.numbers else 0.5


def scripted(alphas, *folds, **params):
    """A search over alphas, strongest first, whose candidates have the given scores."""
    X, y, _ = problem(30)
    scorer = Scripted(*folds)
    model = Head2ToeClassifierCV(
        alphas=alphas, keep_fractions=(None,), Cs=(1.0,), cv=len(folds), scoring=scorer, **params
    ).fit(X, y)
    assert scorer.numbers == []
    assert (np.diff(model.cv_results_["mean_n_features"]) > 0).all()
    return model


def test_scikit_learns_common_checks_pass():
    results = check_estimator(
        Head2ToeClassifierCV(alphas=(0.4,), keep_fractions=(None,), Cs=(1.0,), cv=2), on_fail=None, on_skip=None
    )
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")] == []
    assert sum(r["status"] == "passed" for r in results) > 50


@pytest.mark.parametrize(("k", "scoring"), [(2, None), (3, "neg_log_loss")])
def test_it_finds_what_a_grid_search_finds(k, scoring):
    X, y, _ = problem(0, k=k)
    model = Head2ToeClassifierCV(
        alphas=[0.6, 0.2],
        keep_fractions=[None, 0.2],
        Cs=[0.01, 1.0],
        normalizations=["standard", None],
        cv=StratifiedKFold(3, shuffle=True, random_state=1),
        scoring=scoring,
        refit="best",
    ).fit(X, y)
    search = searched(model).fit(X, y)
    assert len(model.cv_results_["params"]) == 16
    # Heads are solved from other starts to 1e-8 of their objective: at most one sample may change sides.
    assert_same_scores(model.cv_results_, search.cv_results_, atol=1e-3 if scoring else 1.01 / 20)
    assert model.best_index_ == best_by_the_rule(model)
    assert model.best_params_ == model.cv_results_["params"][model.best_index_]
    assert model.best_score_ == model.cv_results_["mean_test_score"][model.best_index_]
    assert model.best_score_ == pytest.approx(search.best_score_, abs=1e-3 if scoring else 1.01 / 60)
    if scoring:
        assert {name: model.best_params_[name] for name in search.best_params_} == search.best_params_


def test_results_are_a_table():
    X, y, _ = problem(1)
    model = Head2ToeClassifierCV(**SMALL, normalizations=("standard", None)).fit(X, y)
    table = pd.DataFrame(model.cv_results_)
    expected = {"params", "param_C", "param_alpha", "param_keep_fraction", "param_normalization", "mean_test_score"}
    expected |= {f"param_{name}" for name in model.best_params_}
    expected |= {"std_test_score", "rank_test_score", "mean_n_features", *(f"split{i}_test_score" for i in range(3))}
    assert set(table.columns) == expected
    assert len(table) == 16
    for number, params in enumerate(model.cv_results_["params"]):
        assert {name: model.cv_results_[f"param_{name}"][number] for name in params} == params
    folds = table[[f"split{i}_test_score" for i in range(3)]]
    np.testing.assert_allclose(table["mean_test_score"], folds.mean(axis=1))
    np.testing.assert_allclose(table["std_test_score"], folds.std(axis=1, ddof=0))
    ranks = table["mean_test_score"].rank(method="min", ascending=False).astype(int)
    np.testing.assert_array_equal(table["rank_test_score"], ranks)
    kept = table["param_keep_fraction"] == 0.2
    assert (table["mean_n_features"][kept] == 5).all()
    assert table["param_C"].dtype == table["param_alpha"].dtype == float


def test_the_best_estimator_is_the_classifier_with_the_best_parameters():
    for seed, k in ((2, 3), (3, 2)):
        X, y, weight = problem(seed, k=k)
        model = Head2ToeClassifierCV(**SMALL, normalizations=("standard", "layer+standard"), refit="best")
        model.fit(X, y, sample_weight=weight)
        best = model.best_estimator_
        alone = Head2ToeClassifier(**model.best_params_).fit(X, y, sample_weight=weight)
        assert isinstance(best, Head2ToeClassifier)
        assert model.estimators_ == [best]
        assert {name: best.get_params()[name] for name in model.best_params_} == model.best_params_
        np.testing.assert_array_equal(best.selected_features_, alone.selected_features_)
        np.testing.assert_array_equal(best.feature_scores_, alone.feature_scores_)
        np.testing.assert_allclose(best.decision_function(X), alone.decision_function(X), atol=2e-3)
        np.testing.assert_array_equal(best.predict(X), alone.predict(X))
        assert (best.alpha_max_, best.duality_gap_, best.n_iter_) == (
            alone.alpha_max_,
            alone.duality_gap_,
            alone.n_iter_,
        )
        assert set(vars(best)) == set(vars(alone))
        again = Head2ToeClassifier(**best.get_params()).fit(X, y, sample_weight=weight)
        np.testing.assert_array_equal(again.predict(X), best.predict(X))


@pytest.mark.parametrize("normalization", ["standard", "layer"])
@pytest.mark.parametrize("k", [2, 4])
def test_scores_are_added_up_with_the_weights(k, normalization):
    X, y, _ = problem(6, k=k)
    model = Head2ToeClassifierCV(**{**SMALL, "Cs": (0.03, 3.0)}, normalizations=(normalization,)).fit(X, y)
    assert 1 < len(model.estimators_) == len(model.weights_) <= 8
    assert (model.weights_ > 0).all()
    assert (np.diff(model.weights_) <= 0).all()
    parts = [estimator.decision_function(X) for estimator in model.estimators_]
    scores, P = model.decision_function(X), model.predict_proba(X)
    assert scores.shape == ((N,) if k == 2 else (N, k))
    log_frequencies = np.log(np.bincount(y) / N)
    rest = (1 - model.weights_.sum()) * (np.diff(log_frequencies) if k == 2 else log_frequencies)
    np.testing.assert_allclose(scores, np.tensordot(model.weights_, parts, 1) + rest, atol=1e-9)
    assert np.abs(P - model.estimators_[0].predict_proba(X)).max() > 1e-6
    logits = scores if k > 2 else np.stack([np.zeros(N), scores], axis=1)
    np.testing.assert_allclose(P, softmax(logits, axis=1), atol=1e-12)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(P), atol=1e-7)
    np.testing.assert_array_equal(model.predict(X), model.classes_[P.argmax(axis=1)])
    assert model.score(X, y) == accuracy_score(y, model.predict(X)) > 0.6
    union = sorted(set().union(*(estimator.selected_features_.tolist() for estimator in model.estimators_)))
    assert model.selected_features_.tolist() == union
    shares = [estimator.feature_scores_ / estimator.feature_scores_.sum() for estimator in model.estimators_]
    np.testing.assert_allclose(model.feature_scores_, model.weights_ @ shares / model.weights_.sum(), atol=1e-12)
    assert model.feature_scores_.sum() == pytest.approx(1)
    assert model.n_iter_ == max(estimator.n_iter_ for estimator in model.estimators_)
    for estimator in model.estimators_:
        alone = Head2ToeClassifier(**estimator.get_params()).fit(X, y)
        np.testing.assert_allclose(estimator.predict_proba(X), alone.predict_proba(X), atol=1e-3)


def test_the_mixture_makes_the_held_out_labels_most_likely():
    X, y, weight = problem(5)
    folds = StratifiedKFold(3)
    model = Head2ToeClassifierCV(**{**SMALL, "cv": folds}).fit(X, y, sample_weight=weight)
    held_out, base = by_hand(model, X, y, weight, folds)

    def objective(mixture):
        mixed = log_softmax(base + np.tensordot(mixture, held_out - base, 1), axis=1)
        return np.average(mixed[np.arange(N), y], weights=weight) - 5 / weight.sum() * mixture.sum()

    mixture, shared = np.zeros(8), list(model.best_params_)
    for estimator, share in zip(model.estimators_, model.weights_, strict=True):
        mixture[model.cv_results_["params"].index({name: estimator.get_params()[name] for name in shared})] = share
    rng = np.random.default_rng(0)
    others = [*np.eye(8), np.full(8, 1 / 8), *(rng.dirichlet(np.full(8, 0.3), 300) * rng.uniform(0, 2, (300, 1)))]
    others += [0.9 * mixture + 0.1 * other for other in others]
    # Weights below one per cent are dropped, which may cost a little.
    assert objective(mixture) > max(map(objective, others)) - 2e-3


def test_weights_need_not_see_every_held_out_sample(monkeypatch):
    """Where there are too many: here a third of each fold."""
    X, y, _ = problem(5, n=120)
    asked = []

    def third(*sizes):
        asked.append(sizes)
        return 1 / 3

    def weights_of(log_probabilities, log_frequencies, codes, sample_weight):
        rows = np.concatenate([drawn(test, 1 / 3) for _, test in StratifiedKFold(3).split(X, y)])
        np.testing.assert_array_equal(codes, y[rows])
        assert log_probabilities.shape == (8, 42, 3)
        return mixture_weights(log_probabilities, log_frequencies, codes, sample_weight)

    monkeypatch.setattr(module, "share_to_predict", third)
    monkeypatch.setattr(module, "mixture_weights", weights_of)
    model = Head2ToeClassifierCV(**SMALL).fit(X, y)
    assert asked == [(8 * 120 * 3,)]
    assert model.score(X, y) > 0.6


def by_hand(model, X, y, weight, folds):
    """Log-probabilities of held-out samples, (n_candidates, n_samples, n_classes), and of the class frequencies."""
    held_out, base = np.empty((len(model.cv_results_["params"]), N, 3)), np.empty((N, 3))
    for train, test in folds.split(X, y):
        base[test] = np.log(np.bincount(y[train], weight[train]) / weight[train].sum())
        for number, params in enumerate(model.cv_results_["params"]):
            alone = Head2ToeClassifier(**params).fit(X[train], y[train], sample_weight=weight[train])
            held_out[number, test] = alone.predict_log_proba(X[test])
    return held_out, base


def test_the_score_of_a_mixture_has_weights_from_other_folds():
    X, y, weight = problem(5)
    folds = StratifiedKFold(3)
    model = Head2ToeClassifierCV(**{**SMALL, "cv": folds}, scoring="neg_log_loss").fit(X, y, sample_weight=weight)
    held_out, base = by_hand(model, X, y, weight, folds)
    expected = []
    for others, test in folds.split(X, y):
        weights = mixture_weights(held_out[:, others], base[others], y[others], weight[others])
        mixed = softmax(base[test] + np.tensordot(weights, held_out[:, test] - base[test], 1), axis=1)
        expected.append(-log_loss(y[test], mixed, sample_weight=weight[test], labels=[0, 1, 2]))
    np.testing.assert_allclose(model.fold_scores_, expected, atol=5e-3)
    assert model.best_score_ == model.fold_scores_.mean()
    assert model.best_score_ != model.cv_results_["mean_test_score"][model.best_index_]


@pytest.mark.parametrize("refit", ["best", "one_standard_error"])
def test_the_score_of_one_candidate_is_its_mean_over_the_folds(refit):
    X, y, _ = problem(5)
    model = Head2ToeClassifierCV(**SMALL, refit=refit).fit(X, y)
    folds = [model.cv_results_[f"split{number}_test_score"][model.best_index_] for number in range(3)]
    assert model.fold_scores_.tolist() == folds
    assert model.best_score_ == model.cv_results_["mean_test_score"][model.best_index_]


@pytest.mark.filterwarnings("ignore:No candidate predicts held-out samples better")
def test_the_score_of_a_mixture_is_that_of_chance_where_nothing_can_be_learned():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 40)).astype(np.float32), np.arange(200) % 2
    grid = dict(alphas=(0.9, 0.7, 0.5), keep_fractions=(None, 0.1, 0.5), Cs=(0.01, 1.0))
    model = Head2ToeClassifierCV(**grid, cv=4).fit(X, y)
    assert model.cv_results_["mean_test_score"].max() > 0.52
    assert model.best_score_ == pytest.approx(0.5, abs=0.08)


def test_an_only_fold_is_scored_by_halves():
    X, y, _ = problem(5)
    (split,) = ShuffleSplit(1, test_size=30, random_state=0).split(X)
    model = Head2ToeClassifierCV(**{**SMALL, "cv": [split]}).fit(X, y)
    assert model.fold_scores_.shape == (1,)
    assert 0.4 < model.best_score_ <= 1


@pytest.mark.parametrize("case", ["constant", "noise"])
@pytest.mark.parametrize("counts", [[5, 15], [4, 10, 30]])
def test_where_nothing_can_be_learned_predictions_are_the_class_frequencies(counts, case):
    counts = np.array(counts) * (1 if case == "constant" else 20)
    y = np.repeat(np.arange(len(counts)), counts)
    X = np.ones((len(y), 6)) if case == "constant" else np.random.default_rng(1).normal(size=(len(y), 6))
    with pytest.warns(UserWarning, match="class frequencies") if case == "constant" else nullcontext():
        model = Head2ToeClassifierCV(**SMALL).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X).mean(axis=0), counts / len(y), atol=0.02)
    np.testing.assert_allclose(model.predict_proba(X), np.tile(counts / len(y), (len(y), 1)), atol=0.15)


def test_candidates_that_keep_whole_layers_are_tried_once_for_all_alphas():
    X, y, _ = problem(5)
    model = Head2ToeClassifierCV(alphas=(0.5, 0.3), keep_fractions=(None, 1.0), Cs=(0.1, 1.0), cv=3).fit(X, y)
    tried = [(params.get("alpha"), params["keep_fraction"], params["C"]) for params in model.cv_results_["params"]]
    assert tried == [
        *((alpha, None, C) for alpha in (0.5, 0.3) for C in (0.1, 1.0)),
        *((None, 1.0, C) for C in (0.1, 1.0)),
    ]
    assert model.cv_results_["param_alpha"].mask.tolist() == [False] * 4 + [True] * 2
    kept = [(estimator.keep_fraction, estimator.C) for estimator in model.estimators_ if estimator.keep_fraction]
    assert len(set(kept)) == len(kept)


def test_the_default_tries_no_candidate_twice():
    X, y, _ = make_problem(3, n=40, d=22, k=2)
    model = Head2ToeClassifierCV(cv=2, refit="best").fit(FakeFeatures(X, (1,) * 22), y)
    params = model.cv_results_["params"]
    assert len(params) == len({repr(sorted(one.items())) for one in params}) == 141
    # Seven strengths with four fractions, all features, two linear probes, sixteen layers; three penalties each.
    assert sum("alpha" in one for one in params) == 7 * 4 * 3
    assert sum(one["keep_fraction"] == 1.0 for one in params) == (1 + 2 + 16) * 3
    assert [one["layers"] for one in params if len(one.get("layers", [])) == 2] == [["net.20", "net.21"]] * 3


def test_numbers_of_alphas_and_Cs_are_spread_on_a_log_scale():
    X, y, _ = problem(5)
    model = Head2ToeClassifierCV(alphas=3, keep_fractions=(None,), Cs=2, cv=2, refit="best").fit(X, y)
    np.testing.assert_allclose(model.alphas_, [0.7, np.sqrt(0.7 * 0.02), 0.02])
    np.testing.assert_allclose(model.Cs_, [1e-4, 1e4])
    assert [(params["alpha"], params["C"]) for params in model.cv_results_["params"]] == [
        (alpha, C) for alpha in model.alphas_ for C in model.Cs_
    ]


def test_the_best_may_predict_alone():
    X, y, _ = problem(5)
    alone = Head2ToeClassifierCV(**SMALL, refit="best").fit(X, y)
    mixed = Head2ToeClassifierCV(**SMALL).fit(X, y)
    assert alone.estimators_ == [alone.best_estimator_]
    assert alone.weights_.tolist() == [1.0]
    np.testing.assert_allclose(alone.decision_function(X), alone.best_estimator_.decision_function(X), rtol=1e-12)
    np.testing.assert_array_equal(alone.selected_features_, alone.best_estimator_.selected_features_)
    np.testing.assert_array_equal(alone.feature_scores_, alone.best_estimator_.feature_scores_)
    assert mixed.best_params_ == alone.best_params_
    assert mixed.cv_results_["mean_test_score"][mixed.best_index_] == alone.best_score_
    # Fitted after others, its head has another start.
    np.testing.assert_allclose(
        mixed.best_estimator_.predict_proba(X), alone.best_estimator_.predict_proba(X), atol=1e-3
    )


def test_equal_scores_are_ranked_by_fewer_features_then_by_smaller_penalty():
    model = scripted((0.7, 0.3, 0.1), [0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    assert model.best_params_["alpha"] == 0.7
    assert model.cv_results_["rank_test_score"].tolist() == [1, 1, 1]
    X, y, _ = problem(30)
    same = Head2ToeClassifierCV(
        alphas=(0.3,), keep_fractions=(None,), Cs=(1.0, 0.01, 0.1), cv=2, scoring=lambda *_: 1.0
    ).fit(X, y)
    assert same.best_params_["C"] == 0.01


def test_means_that_differ_by_rounding_only_are_equal():
    model = scripted((0.7, 0.1), [0.3, 0.1], [0.2, 0.2], [0.1, 0.3])
    assert model.best_params_["alpha"] == 0.7


def test_one_standard_error_prefers_the_fewest_features_within_it():
    # The best, 0.1, has mean 0.9 and standard error 0.1 / sqrt(3) = 0.058.
    script = (0.7, 0.3, 0.1), [0.84, 0.85, 0.9], [0.84, 0.85, 0.8], [0.84, 0.85, 1.0]
    plain = scripted(*script, refit="best")
    assert plain.best_params_["alpha"] == 0.1
    careful = scripted(*script, refit="one_standard_error")
    assert careful.best_params_["alpha"] == 0.3
    assert careful.best_score_ == pytest.approx(0.85)
    assert [estimator.alpha for estimator in careful.estimators_] == [0.3]
    assert careful.cv_results_["rank_test_score"].tolist() == [3, 2, 1]
    fewest = scripted(
        (0.7, 0.3, 0.1), [0.843, 0.85, 0.9], [0.843, 0.85, 0.8], [0.843, 0.85, 1.0], refit="one_standard_error"
    )
    assert fewest.best_params_["alpha"] == 0.7


def test_scorers_by_name_and_by_function_are_those_of_scikit_learn():
    X, y, _ = problem(6, k=2)
    small = {**SMALL, "keep_fractions": (None,), "cv": 2}
    for scoring in ("roc_auc", "f1", "neg_log_loss", get_scorer("balanced_accuracy"), lambda e, X, y: e.score(X, y)):
        model = Head2ToeClassifierCV(**small, scoring=scoring).fit(X, y)
        assert_same_scores(model.cv_results_, searched(model, refit=False).fit(X, y).cv_results_, atol=0.04, n_splits=2)
        assert not hasattr(model, "scorer_")
    names = np.where(y == 1, "yes", "no")
    f1 = make_scorer(sklearn.metrics.f1_score, pos_label="yes")
    by_name = Head2ToeClassifierCV(**small, scoring=f1).fit(X, names).cv_results_
    np.testing.assert_allclose(
        by_name["mean_test_score"], Head2ToeClassifierCV(**small, scoring="f1").fit(X, y).cv_results_["mean_test_score"]
    )


def test_scorers_see_the_rows_and_labels_of_the_fold():
    X, y, _ = problem(7)
    seen, splits = [], list(StratifiedKFold(3).split(X, y))

    def scorer(estimator, X, y):
        seen.append((np.asarray(X), y))
        assert estimator.predict_proba(X).shape == (20, 3)
        np.testing.assert_allclose(estimator.predict_log_proba(X), np.log(estimator.predict_proba(X)))
        return 0.0

    names = np.array(["c", "a", "b"])[y]
    Head2ToeClassifierCV(**SMALL, scoring=scorer, refit="best").fit(X, names)
    order = []
    for given, labels in seen:
        fold = next(fold for fold, (_, test) in enumerate(splits) if np.array_equal(given, X[test]))
        np.testing.assert_array_equal(labels, names[splits[fold][1]])
        order.append(fold)
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}


@pytest.mark.parametrize("refit", ["mixture", "best", "one_standard_error"])
def test_candidates_without_a_score_come_last(refit):
    nan = np.nan
    model = scripted(
        (0.7, 0.3, 0.1),
        [nan, 0.5, 0.9],
        [nan, 0.5, nan],
        refit=refit,
    )
    assert model.best_params_["alpha"] == 0.3
    assert model.best_score_ == 0.5
    assert model.cv_results_["rank_test_score"].tolist() == [2, 1, 2]


def test_no_score_at_all_is_an_error():
    with pytest.raises(ValueError, match="is nan for all candidates; choose scoring or cv"):
        scripted((0.7, 0.1), [np.nan, np.nan], [np.nan, np.nan])


def test_folds_may_be_a_number_a_splitter_or_indices():
    X, y, _ = problem(8)
    small = {**SMALL, "Cs": (1.0,), "keep_fractions": (None,)}
    expected = Head2ToeClassifierCV(**small).fit(X, y)
    assert expected.n_splits_ == 3
    splits = list(StratifiedKFold(3).split(X, y))
    lists = [tuple(part.tolist() for part in split) for split in splits]
    for cv in (StratifiedKFold(3), splits, lists, iter(splits), np.int64(3)):
        model = Head2ToeClassifierCV(**{**small, "cv": cv}).fit(X, y)
        for name in ("mean_test_score", "split2_test_score", "mean_n_features"):
            np.testing.assert_array_equal(model.cv_results_[name], expected.cv_results_[name])
    assert Head2ToeClassifierCV(**{**small, "cv": None}).fit(X, y).n_splits_ == 5
    shuffled = Head2ToeClassifierCV(**{**small, "cv": ShuffleSplit(2, random_state=0)}).fit(X, y)
    assert shuffled.n_splits_ == 2
    assert "split2_test_score" not in shuffled.cv_results_


def test_folds_may_be_masks_as_for_a_grid_search():
    X, y, _ = problem(8)
    masks = [tuple(np.isin(np.arange(N), part) for part in split) for split in StratifiedKFold(3).split(X, y)]
    found = Head2ToeClassifierCV(**{**SMALL, "cv": masks}).fit(X, y).cv_results_
    expected = Head2ToeClassifierCV(**SMALL).fit(X, y).cv_results_
    np.testing.assert_array_equal(found["mean_test_score"], expected["mean_test_score"])


def test_no_folds_at_all_is_an_error_that_names_cv():
    # So is an iterator that an earlier fit used up.
    X, y, _ = problem(8)
    with pytest.raises(ValueError, match="cv"):
        Head2ToeClassifierCV(**{**SMALL, "cv": []}).fit(X, y)


def test_groups_go_to_the_splitter():
    X, y, _ = problem(9)
    groups = np.arange(N) % 6
    model = Head2ToeClassifierCV(**{**SMALL, "cv": GroupKFold(3)})
    found = model.fit(X, y, groups=groups).cv_results_
    given = Head2ToeClassifierCV(**{**SMALL, "cv": list(GroupKFold(3).split(X, y, groups))}).fit(X, y).cv_results_
    np.testing.assert_array_equal(found["mean_test_score"], given["mean_test_score"])
    with pytest.raises(ValueError, match="groups"):
        model.fit(X, y)


def test_unknown_arguments_of_fit_are_refused():
    X, y, _ = problem(9)
    with pytest.raises(ValueError, match=r"fit takes colour, size only with metadata routing: sklearn\.set_config"):
        Head2ToeClassifierCV(**SMALL).fit(X, y, size=3, colour="red", groups=None)


@pytest.mark.parametrize("weighted", [False, True])
def test_metadata_are_routed_to_scorer_and_splitter(weighted):
    X, y, weight = problem(10)
    weight, groups = weight**2, np.arange(N) % 6
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(accuracy_score).set_score_request(sample_weight=weighted)
        model = Head2ToeClassifierCV(**{**SMALL, "cv": GroupKFold(3)}, scoring=scorer)
        model.fit(X, y, sample_weight=weight, groups=groups)
        search = searched(model, refit=False)
        search.estimator.set_fit_request(sample_weight=True)
        search.fit(X, y, sample_weight=weight, groups=groups)
        assert_same_scores(model.cv_results_, search.cv_results_, atol=0.1)
    splits = list(GroupKFold(3).split(X, y, groups))
    for number, (train, test) in enumerate(splits):
        for params, score in zip(
            model.cv_results_["params"], model.cv_results_[f"split{number}_test_score"], strict=True
        ):
            fitted = Head2ToeClassifier(**params).fit(X[train], y[train], sample_weight=weight[train])
            expected = fitted.score(X[test], y[test], sample_weight=weight[test] if weighted else None)
            assert score == pytest.approx(expected, abs=1e-9)
    plain = Head2ToeClassifierCV(**{**SMALL, "cv": splits}).fit(X, y, sample_weight=weight)
    same = np.allclose(plain.cv_results_["mean_test_score"], model.cv_results_["mean_test_score"])
    assert same == weighted


def test_metadata_that_nobody_asked_for_are_an_error():
    X, y, weight = problem(10)
    with sklearn.config_context(enable_metadata_routing=True):
        with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
            Head2ToeClassifierCV(**SMALL, scoring="accuracy").fit(X, y, sample_weight=weight)
        with pytest.raises(TypeError, match="colour"):
            Head2ToeClassifierCV(**SMALL).fit(X, y, colour=y)


def test_metadata_reach_a_search_inside_a_cross_validation():
    X, y, weight = problem(11)
    groups = np.arange(N) % 6
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(accuracy_score).set_score_request(sample_weight=True)
        model = Head2ToeClassifierCV(**{**SMALL, "cv": GroupKFold(2)}, scoring=scorer)
        model.set_fit_request(sample_weight=True)
        outer = KFold(2)
        params = {"sample_weight": weight, "groups": groups}
        found = cross_validate(
            model, X, y, cv=outer, params=params, scoring=scorer, return_estimator=True, error_score="raise"
        )
        for (train, test), score, fitted in zip(outer.split(X), found["test_score"], found["estimator"], strict=True):
            alone = Head2ToeClassifierCV(**model.get_params())
            alone.fit(X[train], y[train], sample_weight=weight[train], groups=groups[train])
            np.testing.assert_allclose(alone.decision_function(X), fitted.decision_function(X), atol=1e-4)
            assert score == pytest.approx(accuracy_score(y[test], alone.predict(X[test]), sample_weight=weight[test]))


@pytest.mark.parametrize("scoring", [lambda e, X, y: e.score(X, y), "adjusted_rand_score"], ids=["function", "name"])
def test_a_scorer_that_takes_no_weights_is_given_none(scoring):
    X, y, weight = problem(12)
    model = Head2ToeClassifierCV(**SMALL, scoring=scoring)
    search = searched(model, refit=False).fit(X, y, sample_weight=weight)
    assert_same_scores(model.fit(X, y, sample_weight=weight).cv_results_, search.cv_results_, atol=0.1)


def test_weights_go_to_the_fits_and_to_the_scores():
    X, y, weight = problem(12)
    weight = weight**3
    model = Head2ToeClassifierCV(**SMALL).fit(X, y, sample_weight=weight)
    search = searched(model, refit=False).fit(X, y, sample_weight=weight)
    assert_same_scores(model.cv_results_, search.cv_results_, atol=1e-9)
    unweighted = Head2ToeClassifierCV(**SMALL).fit(X, y)
    assert not np.allclose(unweighted.cv_results_["mean_test_score"], model.cv_results_["mean_test_score"])
    again = Head2ToeClassifierCV(**SMALL).fit(np.r_[X, X[:5] + 100], np.r_[y, [0] * 5], np.r_[weight, np.zeros(5)])
    alone = Head2ToeClassifier(**again.best_params_).fit(X, y, sample_weight=weight)
    np.testing.assert_array_equal(again.best_estimator_.predict(X), alone.predict(X))


def test_a_class_rarer_than_the_folds_is_learned_all_the_same():
    X, y, _ = problem(13)
    y = np.where(y == 2, 1, y)
    y[:1] = 2
    X[:1] += 50
    with pytest.warns(UserWarning, match="The least populated class in y has only 1 member"):
        model = Head2ToeClassifierCV(**SMALL).fit(X, y)
    assert model.n_splits_ == 3
    assert model.classes_.tolist() == [0, 1, 2]
    assert model.predict_proba(X).shape == (N, 3)
    assert np.isfinite(model.cv_results_["mean_test_score"]).all()
    assert np.isfinite(model.decision_function(X)).all()
    assert model.predict(X[:1]).tolist() == [2]


def test_where_every_class_is_rarer_than_the_folds_there_are_fewer():
    X, _, _ = problem(14, n=12)
    y = np.arange(12) // 3
    X[np.arange(12), y] += 20
    with pytest.warns(UserWarning, match="cv=5 is more than any class has samples; 3 folds are used. Lower cv"):
        model = Head2ToeClassifierCV(**{**SMALL, "cv": 5}).fit(X, y)
    assert model.n_splits_ == 3
    assert model.score(X, y) == 1
    with pytest.raises(ValueError, match="n_splits=5 cannot be greater than the number of members in each class"):
        Head2ToeClassifierCV(**{**SMALL, "cv": StratifiedKFold(5)}).fit(X, y)
    with pytest.raises(ValueError, match="y must hold a class with two samples or more"):
        Head2ToeClassifierCV(**SMALL).fit(X, np.arange(12))


def test_a_fold_that_trains_on_one_class_predicts_it_and_warns():
    X, y, _ = problem(15, k=2)
    only = np.flatnonzero(y == 1)[:10]
    rest = np.setdiff1d(np.arange(N), only)
    folds = [(only, rest), (rest, only), *StratifiedKFold(2).split(X, y)]
    with pytest.warns(UserWarning, match=r"fold 1/4, only one class to train on, which is predicted everywhere"):
        model = Head2ToeClassifierCV(**{**SMALL, "cv": folds}).fit(X, y)
    assert (model.cv_results_["split0_test_score"] == np.mean(y[rest] == 1)).all()
    without = Head2ToeClassifierCV(**{**SMALL, "cv": folds[1:]}).fit(X, y)
    for number in range(3):
        ours, theirs = f"split{number + 1}_test_score", f"split{number}_test_score"
        np.testing.assert_array_equal(model.cv_results_[ours], without.cv_results_[theirs])


def test_a_class_missing_from_a_training_fold_is_not_predicted_there():
    X, y, _ = problem(16)
    train, test = np.flatnonzero(y != 1), np.flatnonzero(y == 1)
    model = Head2ToeClassifierCV(**{**SMALL, "cv": [(train, test), (test[:5].tolist() + train.tolist(), test)]})
    model.fit(X, y)
    assert (model.cv_results_["split0_test_score"] == 0).all()
    assert model.cv_results_["split1_test_score"].max() > 0


def test_nothing_selected_predicts_the_frequencies():
    X, y, _ = problem(17)
    model = Head2ToeClassifierCV(alphas=(1.0,), keep_fractions=(None,), Cs=(0.1, 1.0), cv=3)
    with pytest.warns(UserWarning, match=r"No feature was selected at alpha=1\.0"):
        model.fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), np.tile(np.bincount(y) / N, (N, 1)))
    assert (model.cv_results_["mean_n_features"] == 0).all()
    assert model.best_score_ == pytest.approx(np.bincount(y).max() / N, abs=0.02)
    assert model.selected_features_.tolist() == []


def test_names_and_numbers_of_classes_do_not_matter():
    X, y, _ = problem(18)
    expected = Head2ToeClassifierCV(**SMALL).fit(X, y)
    names = np.array(["ant", "bee", "cow"])[y]
    model = Head2ToeClassifierCV(**SMALL).fit(X, names)
    assert model.classes_.tolist() == ["ant", "bee", "cow"]
    np.testing.assert_array_equal(model.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])
    np.testing.assert_allclose(model.decision_function(X), expected.decision_function(X), atol=1e-4)
    np.testing.assert_array_equal(
        model.predict(X), names[np.argmax(y[:, None] == np.arange(3), axis=0)][expected.predict(X)]
    )


def test_the_order_of_rows_and_of_classes_does_not_change_the_best_score():
    X, y, _ = problem(19)
    folds = list(StratifiedKFold(3).split(X, y))
    expected = Head2ToeClassifierCV(**{**SMALL, "cv": folds}, tol=1e-5).fit(X, y)
    order = np.random.default_rng(0).permutation(N)
    place = np.argsort(order)
    moved = [(place[train], place[test]) for train, test in folds]
    relabelled = np.array([7, 2, 5])[y[order]]
    model = Head2ToeClassifierCV(**{**SMALL, "cv": moved}, tol=1e-5).fit(X[order], relabelled)
    assert model.best_score_ == pytest.approx(expected.best_score_, abs=1e-12)
    np.testing.assert_allclose(model.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])


def test_balanced_classes_are_those_of_a_grid_search():
    X, y, _ = problem(20)
    y = np.where(np.arange(N) % 10 < 7, 0, 1 + (np.arange(N) % 10 == 9))
    X[:, :3] += np.eye(3, dtype=np.float32)[y]
    model = Head2ToeClassifierCV(**SMALL, class_weight="balanced", scoring="balanced_accuracy").fit(X, y)
    assert_same_scores(model.cv_results_, searched(model, refit=False).fit(X, y).cv_results_, atol=1e-9)
    plain = Head2ToeClassifierCV(**SMALL, scoring="balanced_accuracy").fit(X, y)
    assert not np.allclose(plain.cv_results_["mean_test_score"], model.cv_results_["mean_test_score"])
    assert model.best_estimator_.class_weight == "balanced"


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_folds_worked_on_at_the_same_time_give_the_same(backend):
    X, y, weight = problem(21)
    X = X.astype(np.float64)
    expected = Head2ToeClassifierCV(**SMALL).fit(X, y, sample_weight=weight)
    with parallel_config(backend=backend):
        model = Head2ToeClassifierCV(**SMALL, n_jobs=2).fit(X, y, sample_weight=weight)
    for name, values in expected.cv_results_.items():
        np.testing.assert_array_equal(model.cv_results_[name], values, err_msg=name)
    np.testing.assert_allclose(model.decision_function(X), expected.decision_function(X), rtol=0, atol=1e-9)


def test_every_fold_and_normalization_costs_one_path(solved_ratios):
    X, y, _ = problem(22)
    Head2ToeClassifierCV(
        alphas=(0.85**2, 0.85**6), Cs=(0.1, 1.0, 10.0), normalizations=("standard", None), cv=3, refit="best"
    ).fit(X, y)
    # Three folds with two normalizations, and the best on all samples.
    assert len(solved_ratios) == 7
    assert sorted(map(len, solved_ratios[:6])) == [7] * 6


@pytest.mark.parametrize(("seed", "C"), [(11, 100.0), (18, 10.0)])
def test_heads_started_from_similar_ones_converge_as_others_do(seed, C):
    X, y, _ = problem(seed)
    grid = dict(alphas=(0.85**2, 0.3), keep_fractions=(None, 0.9), Cs=(C,), normalizations=(None,), cv=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model = Head2ToeClassifierCV(**grid).fit(X, y)
        search = searched(model, refit=False).fit(X, y)
    assert_same_scores(model.cv_results_, search.cv_results_, atol=1.01 / 30, n_splits=2)


def test_a_search_with_memory_solves_nothing_twice(tmp_path, solved_ratios):
    X, y, _ = problem(23)
    expected = Head2ToeClassifierCV(**SMALL).fit(X, y)
    model = Head2ToeClassifierCV(**SMALL, memory=tmp_path).fit(X, y)
    solved_ratios.clear()
    again = Head2ToeClassifierCV(**SMALL, memory=tmp_path).fit(X, y)
    assert solved_ratios == []
    Head2ToeClassifier(**again.best_params_, memory=tmp_path).fit(X, y)
    assert solved_ratios == []
    for fitted in (model, again):
        np.testing.assert_array_equal(fitted.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])
        np.testing.assert_allclose(fitted.decision_function(X), expected.decision_function(X), atol=1e-4)
    more = Head2ToeClassifierCV(**{**SMALL, "alphas": (0.6, 0.4, 0.3)}, memory=tmp_path).fit(X, y)
    assert max(ratio for fold in solved_ratios[:3] for ratio in fold) < 0.4
    fresh = Head2ToeClassifierCV(**{**SMALL, "alphas": (0.6, 0.4, 0.3)}).fit(X, y)
    np.testing.assert_array_equal(more.cv_results_["mean_test_score"], fresh.cv_results_["mean_test_score"])


def test_verbose_prints_two_lines_per_fold_and_at_2_every_alpha(capsys):
    X, y, _ = problem(24)
    model = Head2ToeClassifierCV(**SMALL, verbose=1).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    labels = [line.split(", ")[0] for line in lines]
    assert labels == [*(f"fold {fold}/3" for fold in (1, 2, 3) for _ in range(2)), "all samples", "all samples"]
    path, judged = (
        re.compile(r".*, path to alpha=0\.4 solved: \d+ features, .* s"),
        re.compile(r".*, 8 candidates judged, .* s"),
    )
    assert all(path.fullmatch(line) for line in lines[:6:2])
    assert all(judged.fullmatch(line) for line in lines[1:6:2])
    assert f"cross-validated score {model.best_score_:.4g}, " in lines[-1]
    model.set_params(verbose=2).fit(X, y)
    more = capsys.readouterr().out.splitlines()
    alphas = [
        line for line in more if re.fullmatch(r"(fold \d/3|all samples), alpha \d+/\d+ = .* alphas/s, .* left", line)
    ]
    assert len(alphas) == len(more) - len(lines) > 20


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("alphas", (), "alphas must hold at least one value, got none"),
        ("keep_fractions", [], "keep_fractions must hold at least one value, got none"),
        ("Cs", np.array([]), "Cs must hold at least one value, got none"),
        ("normalizations", (), "normalizations must hold at least one value, got none"),
        ("alphas", (0.5, 0.0), r"'alphas' parameter of Head2ToeClassifierCV must be .* Got 0\.0"),
        ("alphas", (np.nan,), r"'alphas' parameter of Head2ToeClassifierCV must be .* Got nan"),
        ("alphas", (None,), r"'alphas' parameter of Head2ToeClassifierCV must be .* Got None"),
        ("alphas", 0.5, r"'alphas' parameter of Head2ToeClassifierCV must be an array-like or an int .* Got 0\.5"),
        ("alphas", 0, r"'alphas' parameter of Head2ToeClassifierCV must be an array-like or an int .* Got 0"),
        ("Cs", -3, r"'Cs' parameter of Head2ToeClassifierCV must be an array-like or an int .* Got -3"),
        ("last_layers", (1, 0), r"'last_layers' parameter of Head2ToeClassifierCV must be an int .* Got 0"),
        ("n_jobs", 0, r"'n_jobs' parameter of Head2ToeClassifierCV must be .* Got 0"),
        ("keep_fractions", (None, 2), r"'keep_fractions' parameter of Head2ToeClassifierCV must be .* Got 2"),
        ("Cs", (1.0, -1.0), r"'Cs' parameter of Head2ToeClassifierCV must be .* Got -1\.0"),
        ("normalizations", ("foo",), "'normalizations' parameter of Head2ToeClassifierCV must be .* Got 'foo'"),
        ("normalizations", "standard", "'normalizations' parameter of Head2ToeClassifierCV must be an array-like"),
        ("scoring", "acuracy", "'scoring' parameter of Head2ToeClassifierCV must be .* Got 'acuracy'"),
        ("refit", "yes", "'refit' parameter of Head2ToeClassifierCV must be .* Got 'yes'"),
        ("cv", "three", "'cv' parameter of Head2ToeClassifierCV must be .* Got 'three'"),
        ("l1_ratio", 0.0, r"'l1_ratio' parameter of Head2ToeClassifierCV must be .* Got 0\.0"),
        ("memory", 5, "memory must be None, a folder"),
    ],
)
def test_a_bad_parameter_is_named_with_what_was_given(name, values, said):
    X, y, _ = problem(25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=said):
            Head2ToeClassifierCV(**{**SMALL, name: values}).fit(X, y)


def test_values_given_twice_are_tried_once():
    X, y, _ = problem(26)
    model = Head2ToeClassifierCV(alphas=[0.5, 0.5], keep_fractions=[None, None], Cs=np.array([1, 1.0]), cv=2).fit(X, y)
    assert len(model.cv_results_["params"]) == 1


def test_an_unconverged_path_warns():
    X, y, _ = problem(27)
    with pytest.warns(ConvergenceWarning, match="did not reach tol=1e-12"):
        Head2ToeClassifierCV(**SMALL, tol=1e-12, max_iter=1).fit(X, y)


def test_other_errors_say_what_is_wrong():
    X, y, _ = problem(28)
    with pytest.raises(NotFittedError):
        Head2ToeClassifierCV().predict(X)
    with pytest.raises(ValueError, match="at least two classes"):
        Head2ToeClassifierCV(**SMALL).fit(X, np.zeros(N))
    with pytest.raises(ValueError, match="requires y to be passed"):
        Head2ToeClassifierCV(**SMALL).fit(X, None)
    with pytest.raises(ValueError, match="X has 24 features, but Head2ToeClassifierCV is expecting 25"):
        Head2ToeClassifierCV(**SMALL).fit(X, y).predict(X[:, 1:])
    X[7, 3] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity in column 3"):
        Head2ToeClassifierCV(**SMALL).fit(X, y)


def test_scores_are_those_of_scoring():
    X, y, weight = problem(3, k=2)
    model = Head2ToeClassifierCV(**SMALL, scoring="neg_log_loss").fit(X, y)
    assert model.score(X, y, weight) == pytest.approx(-log_loss(y, model.predict_proba(X), sample_weight=weight))
    assert Head2ToeClassifierCV(**SMALL).fit(X, y).score(X, y) <= 1


def test_a_scorer_that_fails_or_asks_about_other_samples_gives_nan_and_a_warning():
    X, y, _ = problem(3, k=2)
    calls = iter(range(1000))

    def scoring(estimator, X, y):
        return estimator.score(X[::-1], y[::-1]) if next(calls) == 0 else estimator.score(X, y)

    with pytest.warns(UserWarning, match="fold 1/3, scoring failed and counts as nan: ValueError: scoring may ask"):
        model = Head2ToeClassifierCV(**SMALL, scoring=scoring, refit="best").fit(X, y)
    assert np.isnan(model.cv_results_["mean_test_score"]).sum() == 1
    assert np.isfinite(model.best_score_)


def test_a_fold_without_weight_is_predicted_by_chance():
    X, y, _ = problem(3, k=2)
    half = np.arange(len(y)) % 2 == 0
    model = Head2ToeClassifierCV(**SMALL | {"cv": [(half, ~half), (~half, ~half)]}, class_weight="balanced")
    with pytest.warns(UserWarning, match="fold 1/2, only one class to train on"):
        model.fit(X, y, sample_weight=np.where(half, 0.0, 1.0))
    assert np.isfinite(model.best_score_)


@pytest.fixture(scope="module")
def layered():
    """A matrix of four layers whose third one says most, and its labels."""
    y = np.arange(60) % 5
    X = np.random.default_rng(0).normal(size=(60, 16))
    X[:, 9:13] += 4 * np.eye(5, 4)[y]
    return FakeFeatures(X, (4, 5, 4, 3)), y


@pytest.mark.parametrize(
    ("number", "last_layers", "tried"), [(0, (1,), []), (2, (1,), [0, 2]), (2, (), [0, 3]), (9, (1, 2), [0, 1, 2])]
)
def test_single_layers_are_spread_over_the_network(layered, number, last_layers, tried):
    X, y = layered
    model = Head2ToeClassifierCV(
        alphas=(0.5,), keep_fractions=(1.0,), Cs=(0.1,), last_layers=last_layers, single_layers=number, cv=2
    ).fit(X, y)
    kept = [params.get("layers") for params in model.cv_results_["params"]]
    probes = [["net.3"], ["net.2", "net.3"]][: len(last_layers)]
    assert kept == [None, *probes, *([f"net.{layer}"] for layer in tried)]
    widths = [sum((4, 5, 4, 3)[int(name[-1])] for name in names) for names in kept[1:]]
    assert model.cv_results_["mean_n_features"].tolist() == [16, *widths]


@pytest.mark.parametrize("normalization", ["standard", "layer"])
def test_the_best_layers_are_named_as_the_classifier_takes_them(layered, normalization):
    X, y = layered
    model = Head2ToeClassifierCV(
        alphas=(0.99,), keep_fractions=(None,), Cs=(0.1, 1.0), normalizations=(normalization,), cv=3, refit="best"
    ).fit(X, y)
    assert model.best_params_ == {
        "C": model.best_params_["C"],
        "keep_fraction": 1.0,
        "layers": ["net.2"],
        "normalization": normalization,
    }
    alone = Head2ToeClassifier(**model.best_params_).fit(X, y)
    np.testing.assert_array_equal(model.best_estimator_.selected_features_, np.arange(9, 13))
    np.testing.assert_allclose(model.predict_proba(X), alone.predict_proba(X), atol=1e-6)
    np.testing.assert_allclose(model.best_estimator_.feature_scores_, alone.feature_scores_, rtol=1e-6)
    assert set(vars(model.best_estimator_)) == set(vars(alone))
    layers = model.cv_results_["param_layers"]
    assert layers[model.best_index_] == ["net.2"]
    assert layers.mask.tolist() == ["layers" not in params for params in model.cv_results_["params"]]


@pytest.mark.parametrize("normalization", ["standard", "layer"])
def test_the_classifier_with_the_parameters_of_any_candidate_is_that_candidate(layered, normalization):
    X, y = FakeFeatures(layered[0].values, (4, 5, 4, 3), name="[net]"), layered[1]
    scopes = [None, ("[net].0", "[net].2"), ("[net].2", "[net].3"), ("[net].1",)]
    kept = [(None, 0.5), (0.3, 0.5), (1.0, None)]
    candidates = [Candidate(names, normalization, fraction, alpha, 1.0) for names in scopes for fraction, alpha in kept]
    training = check_training(Head2ToeClassifier(), X, y, None, None)
    fits = list(fit_candidates(training, candidates, PathOptions.of(Head2ToeClassifier()), rough=False))
    assert {fit.candidate for fit in fits} == set(candidates)
    for fit in fits:
        alone = Head2ToeClassifier(**fit.candidate.params).fit(X, y)
        selected = fit.columns[fit.selected]
        np.testing.assert_array_equal(selected, alone.selected_features_)
        np.testing.assert_allclose(fit.linear.coef.T, alone.coef_[:, selected], atol=1e-5)
        np.testing.assert_allclose(fit.linear.intercept, alone.intercept_, atol=1e-5)


def test_an_only_layer_is_not_tried_alone():
    X, y, _ = make_problem(3, n=60, d=6)
    model = Head2ToeClassifierCV(alphas=(0.5,), keep_fractions=(1.0,), Cs=(0.1,), cv=2).fit(X, y)
    assert len(model.cv_results_["params"]) == 1
