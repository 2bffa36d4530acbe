"""scikit-learn's meta-estimators around ours: each gives what it gives around a scaler and a logistic regression."""

import pickle
from inspect import signature

import matplotlib as mpl
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import skops.io
import torch
from _estimator_data import make_problem
from conftest import MODELS
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.calibration import CalibratedClassifierCV, CalibrationDisplay
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import AdaBoostClassifier, BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.feature_selection import RFE, RFECV, SelectFromModel, SequentialFeatureSelector
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import DecisionBoundaryDisplay, partial_dependence, permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_validate,
    learning_curve,
    permutation_test_score,
    validation_curve,
)
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier, OutputCodeClassifier
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import SelfTrainingClassifier

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector
from h2t_store import extract

mpl.use("Agg")
N, D = 90, 6
OURS = Head2ToeClassifier(alpha=1.0, keep_fraction=1.0, C=0.3)
SEARCH = Head2ToeClassifierCV(
    alphas=(1.0,), keep_fractions=(1.0,), Cs=(0.3,), single_layers=0, last_layers=(), cv=2, refit="best"
)


class Reference(ClassifierMixin, BaseEstimator):
    """What ours is where it keeps all features."""

    def __init__(self, C=0.3):
        self.C = C

    def fit(self, X, y, sample_weight=None):
        self.scaler_ = StandardScaler().fit(np.asarray(X, dtype=float), sample_weight=sample_weight)
        self.head_ = LogisticRegression(C=self.C, tol=1e-9, max_iter=10_000)
        self.head_.fit(self.scaler_.transform(X), y, sample_weight=sample_weight)
        self.classes_, self.coef_ = self.head_.classes_, self.head_.coef_ / self.scaler_.scale_
        return self

    def decision_function(self, X):
        return self.head_.decision_function(self.scaler_.transform(np.asarray(X, dtype=float)))

    def predict_proba(self, X):
        return self.head_.predict_proba(self.scaler_.transform(np.asarray(X, dtype=float)))

    def predict_log_proba(self, X):
        return np.log(self.predict_proba(X))

    def predict(self, X):
        return self.head_.predict(self.scaler_.transform(np.asarray(X, dtype=float)))


def problem(k=3, seed=0):
    """Features of different spread; the last two say nothing."""
    rng = np.random.default_rng(seed)
    y = np.arange(N) % k
    X = rng.normal(size=(N, D))
    X[:, : D - 2] += rng.normal(scale=1.5, size=(k, D - 2))[y]
    return X * np.array([1.0, 5.0, 0.2, 2.0, 1.0, 3.0]) + 1.0, y


ALL = {
    "RFE": lambda e: RFE(e, n_features_to_select=3),
    "RFE by two": lambda e: RFE(e, n_features_to_select=2, step=2),
    "RFECV": lambda e: RFECV(e, cv=2, min_features_to_select=2),
    "SelectFromModel": lambda e: SelectFromModel(e),
    "SelectFromModel median": lambda e: SelectFromModel(e, threshold="median"),
    "SelectFromModel most": lambda e: SelectFromModel(e, threshold=-np.inf, max_features=2),
    "SequentialFeatureSelector": lambda e: SequentialFeatureSelector(e, n_features_to_select=2, cv=2),
    "Calibrated sigmoid": lambda e: CalibratedClassifierCV(e, cv=2),
    "Calibrated isotonic": lambda e: CalibratedClassifierCV(e, cv=2, method="isotonic"),
    "Calibrated together": lambda e: CalibratedClassifierCV(e, cv=2, ensemble=False),
    "Voting hard": lambda e: VotingClassifier([("a", e), ("b", LogisticRegression())]),
    "Voting soft": lambda e: VotingClassifier([("a", e), ("b", LogisticRegression())], voting="soft"),
    "Stacking": lambda e: StackingClassifier([("a", e), ("b", clone(e).set_params(C=3.0))], cv=2),
    "Bagging": lambda e: BaggingClassifier(e, n_estimators=3, random_state=0),
    "Bagging features": lambda e: BaggingClassifier(
        e, n_estimators=3, max_features=0.5, bootstrap_features=True, random_state=0
    ),
    "AdaBoost": lambda e: AdaBoostClassifier(clone(e).set_params(C=50.0), n_estimators=3, random_state=0),
    "OneVsRest": lambda e: OneVsRestClassifier(e),
    "OneVsOne": lambda e: OneVsOneClassifier(e),
    "OutputCode": lambda e: OutputCodeClassifier(e, random_state=0),
    "Grid": lambda e: GridSearchCV(e, {"C": [1e-4, 0.3]}, cv=2, error_score="raise"),
    "Randomized": lambda e: RandomizedSearchCV(
        e, {"C": [1e-4, 0.3]}, n_iter=2, cv=2, random_state=0, error_score="raise"
    ),
    "Halving": lambda e: HalvingGridSearchCV(e, {"C": [1e-4, 0.3, 1.0]}, cv=2, random_state=0, error_score="raise"),
    "Pipeline": lambda e: make_pipeline(StandardScaler(), e),
}
CHECKED = ("decision_function", "predict_proba", "predict", "transform", "get_support")


def said(model, X):
    answers = {}
    for name in CHECKED:
        if hasattr(model, name):
            ask = getattr(model, name)
            answers[name] = np.asarray(ask(X) if signature(ask).parameters.keys() & {"X"} else ask())
    return answers


def assert_same_answers(ours, theirs, atol=1e-4):
    assert ours.keys() == theirs.keys()
    for name, answer in theirs.items():
        np.testing.assert_allclose(ours[name], answer, atol=atol, err_msg=name)


every = pytest.mark.parametrize("meta", ALL.values(), ids=ALL.keys())


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A few features of images whose classes differ in brightness and in one colour."""
    rng = np.random.default_rng(0)
    y = np.arange(N) % 3
    images = rng.integers(0, 150, (N, 8, 8, 3)) + 25 * y[:, None, None, None]
    images[..., 0] += 30 * (y[:, None, None] == 1)
    path = tmp_path_factory.mktemp("meta") / "s.zarr"
    images = images.astype(np.uint8)
    return extract((images, y), model=f"{MODELS}:small_input", store=path, name="x", target_size=64)[:, 2::40]


@every
@pytest.mark.parametrize("k", [2, 3])
def test_around_the_classifier(meta, k):
    X, y = problem(k)
    ours, theirs = meta(OURS).fit(X, y), meta(Reference()).fit(X, y)
    assert_same_answers(said(ours, X), said(theirs, X))


@every
@pytest.mark.filterwarnings("ignore:X does not have valid feature names, but SelectFromModel")
def test_stored_features_are_as_good_as_their_values(meta, stored):
    values, y = np.asarray(stored), np.arange(N) % 3
    assert_same_answers(said(meta(OURS).fit(stored, y), stored), said(meta(OURS).fit(values, y), values))


@pytest.mark.parametrize("name", ["RFE", "RFECV", "SelectFromModel", "Calibrated together", "Voting soft", "Bagging"])
def test_around_the_search(name):
    X, y = problem()
    ours, theirs = ALL[name](SEARCH).fit(X, y), ALL[name](Reference()).fit(X, y)
    assert_same_answers(said(ours, X), said(theirs, X))


SPARSE = {
    "classifier": Head2ToeClassifier(alpha=0.3),
    "path": Head2ToeClassifier(alpha=0.3, head="path"),
    "layer": Head2ToeClassifier(alpha=0.2, normalization="layer+standard"),
    "search": Head2ToeClassifierCV(alphas=(0.3,), keep_fractions=(None,), Cs=(1.0,), last_layers=(), cv=2),
}


@pytest.mark.parametrize("estimator", SPARSE.values(), ids=SPARSE.keys())
@pytest.mark.parametrize("k", [2, 3])
def test_selectors_take_the_features_that_a_sparse_model_took(estimator, k):
    X, y = problem(k, seed=1)
    # Noise first: what counts positions among the selected columns would keep it.
    X = X[:, ::-1]
    model = clone(estimator).fit(X, y)
    selected = model.selected_features_
    assert 2 <= len(selected) < D
    assert model.coef_.shape == (1 if k == 2 else k, D)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(model.coef_).sum(axis=0)), selected)
    for selector in (
        SelectFromModel(estimator, threshold=1e-9).fit(X, y),
        SelectFromModel(model, threshold=1e-9, prefit=True),
        SelectFromModel(FrozenEstimator(model), threshold=1e-9).fit(X, y),
    ):
        np.testing.assert_array_equal(selector.transform(X), X[:, selected])
    two = RFE(estimator, n_features_to_select=2, step=2).fit(X, y)
    assert set(np.flatnonzero(two.support_)) <= set(range(2, D))


def test_selectors_after_a_search():
    X, y = problem(seed=1)
    search = GridSearchCV(Head2ToeClassifier(), {"alpha": [0.5, 0.3]}, cv=2).fit(X, y)
    chosen = SelectFromModel(search, threshold=1e-9, prefit=True, importance_getter="best_estimator_.coef_")
    np.testing.assert_array_equal(chosen.transform(X), X[:, search.best_estimator_.selected_features_])


@pytest.mark.parametrize("meta", [MultiOutputClassifier, ClassifierChain])
def test_several_outputs(meta, stored):
    X, y = problem()
    outputs = np.stack([y == 0, y == 1], axis=1).astype(int)
    ours, theirs = meta(OURS).fit(X, outputs), meta(Reference()).fit(X, outputs)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    np.testing.assert_allclose(
        np.asarray(meta(OURS).fit(stored, outputs).predict_proba(stored)),
        np.asarray(meta(OURS).fit(np.asarray(stored), outputs).predict_proba(np.asarray(stored))),
        atol=1e-4,
    )


def test_self_training(stored):
    X, y = problem()
    y = np.where(np.arange(N) < 30, y, -1)
    ours, theirs = (SelfTrainingClassifier(e, threshold=0.6, max_iter=3).fit(X, y) for e in (OURS, Reference()))
    np.testing.assert_array_equal(ours.transduction_, theirs.transduction_)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)
    lazy, dense = (SelfTrainingClassifier(OURS, max_iter=3).fit(Z, y) for Z in (stored, np.asarray(stored)))
    np.testing.assert_array_equal(lazy.predict(stored), dense.predict(np.asarray(stored)))


@pytest.mark.parametrize("method", ["predict", "predict_proba", "predict_log_proba", "decision_function"])
@pytest.mark.parametrize("k", [2, 3])
def test_cross_validated_predictions(method, k, stored):
    X, y = problem(k)
    ours, theirs = (cross_val_predict(e, X, y, cv=3, method=method) for e in (OURS, Reference()))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    lazy, dense = (cross_val_predict(OURS, Z, y, cv=3, method=method) for Z in (stored, np.asarray(stored)))
    np.testing.assert_allclose(lazy, dense, atol=1e-4)


def test_scores_of_folds_sizes_and_parameters(stored):
    X, y = problem()
    common = {"cv": 3, "error_score": "raise"}
    for scoring in ("accuracy", "neg_log_loss", "roc_auc_ovr"):
        ours, theirs = (cross_validate(e, X, y, scoring=scoring, **common) for e in (OURS, Reference()))
        np.testing.assert_allclose(ours["test_score"], theirs["test_score"], atol=1e-4)
    found = cross_validate(OURS, stored, y, return_estimator=True, return_indices=True, **common)
    for model, test, score in zip(found["estimator"], found["indices"]["test"], found["test_score"], strict=True):
        assert model.score(stored[test], y[test]) == score
    sizes = {"train_sizes": [0.5, 1.0], "shuffle": True, "random_state": 0, **common}
    for ours, theirs in zip(
        learning_curve(OURS, X, y, **sizes), learning_curve(Reference(), X, y, **sizes), strict=True
    ):
        np.testing.assert_allclose(ours, theirs)
    values = {"param_name": "C", "param_range": [1e-4, 1.0], **common}
    for ours, theirs in zip(
        validation_curve(OURS, X, y, **values), validation_curve(Reference(), X, y, **values), strict=True
    ):
        np.testing.assert_allclose(ours, theirs)
    tested = {"cv": 3, "n_permutations": 4, "random_state": 0}
    ours, theirs = (permutation_test_score(e, X, y, **tested) for e in (OURS, Reference()))
    np.testing.assert_allclose(np.hstack(ours), np.hstack(theirs))
    assert permutation_test_score(OURS, stored, y, **tested)[0] > 0.5


def test_thresholds(stored):
    X, y = problem(2)
    options = {"cv": 2, "scoring": "f1", "thresholds": 5, "store_cv_results": True}
    ours, theirs = (TunedThresholdClassifierCV(e, **options).fit(X, y) for e in (OURS, Reference()))
    assert ours.best_threshold_ == pytest.approx(theirs.best_threshold_, abs=1e-4)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    for features in (stored, np.asarray(stored)):
        TunedThresholdClassifierCV(OURS, **options).fit(features, y)
        fixed = FixedThresholdClassifier(OURS, threshold=0.8, response_method="predict_proba").fit(features, y)
        expected = clone(OURS).fit(features, y).predict_proba(features)[:, 1] >= 0.8
        np.testing.assert_array_equal(fixed.predict(features), expected.astype(int))


def test_frozen_models_are_not_fitted_again(stored):
    y = np.arange(N) % 3
    model = clone(OURS).fit(stored, y)
    calibrated = CalibratedClassifierCV(FrozenEstimator(model)).fit(stored, y)
    assert calibrated.calibrated_classifiers_[0].estimator.estimator is model
    frozen = clone(FrozenEstimator(model)).fit(stored, y[::-1])
    np.testing.assert_array_equal(frozen.predict_proba(stored), model.predict_proba(stored))


def test_inspection():
    X, y = problem(2)
    ours, theirs = clone(OURS).fit(X, y), Reference().fit(X, y)
    for response in ("predict_proba", "decision_function"):
        asked = {"grid_resolution": 4, "response_method": response, "kind": "average"}
        found, expected = (partial_dependence(model, X, [0, 1], **asked) for model in (ours, theirs))
        np.testing.assert_allclose(found["average"], expected["average"], atol=1e-3)
    shuffled = {"n_repeats": 2, "random_state": 0, "scoring": "neg_log_loss"}
    found, expected = (permutation_importance(model, X, y, **shuffled) for model in (ours, theirs))
    np.testing.assert_allclose(found.importances, expected.importances, atol=1e-3)
    pair = X[:, :2]
    ours, theirs = clone(OURS).fit(pair, y), Reference().fit(pair, y)
    shown = [
        DecisionBoundaryDisplay.from_estimator(model, pair, grid_resolution=5, response_method="predict_proba").response
        for model in (ours, theirs)
    ]
    np.testing.assert_allclose(*shown, atol=1e-4)
    curves = [CalibrationDisplay.from_estimator(model, pair, y, n_bins=3).prob_true for model in (ours, theirs)]
    np.testing.assert_allclose(*curves)
    mpl.pyplot.close("all")


@pytest.mark.parametrize(("kind", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame), ("default", None)])
def test_selections_side_by_side_and_by_columns(kind, frame):
    X, y = problem()
    names = [f"f{i}" for i in range(D)]
    table = pd.DataFrame(X, columns=names) if frame is None else frame(X, **_columns(frame, names))
    strong, weak = Head2ToeSelector(alpha=0.85), Head2ToeSelector(alpha=0.3)
    union = FeatureUnion([("strong", strong), ("weak", weak)]).set_output(transform=kind)
    parts = [clone(each).fit(X, y).selected_features_ for each in (strong, weak)]
    assert 0 < len(parts[0]) < len(parts[1]) < D
    made = union.fit_transform(table, y)
    np.testing.assert_array_equal(np.asarray(made), np.hstack([X[:, part] for part in parts]))
    by_column = ColumnTransformer([("weak", weak, names[:4]), ("rest", "passthrough", names[4:])])
    made = by_column.set_output(transform=kind).fit_transform(table, y)
    chosen = clone(weak).fit(X[:, :4], y).selected_features_
    np.testing.assert_array_equal(np.asarray(made), np.hstack([X[:, chosen], X[:, 4:]]))
    expected = [f"weak__f{i}" for i in chosen] + [f"rest__f{i}" for i in range(4, D)]
    assert by_column.get_feature_names_out().tolist() == expected
    if frame is not None:
        assert isinstance(made, frame)
        assert list(made.columns) == expected


def _columns(frame, names):
    return {"columns": names} if frame is pd.DataFrame else {"schema": names}


def test_a_selection_is_put_back_where_it_was(stored):
    X, y = problem()
    for features, values in ((X, X), (stored, np.asarray(stored))):
        selector = Head2ToeSelector(alpha=0.4).fit(features, y)
        back = selector.inverse_transform(selector.transform(features))
        np.testing.assert_array_equal(back, np.where(selector.get_support(), values, 0))
        assert 0 < selector.get_support().sum() < values.shape[1]


def test_weights_are_routed_through_several_layers(stored):
    y, weight = np.arange(N) % 3, np.random.default_rng(0).uniform(0.1, 3, N)
    with sklearn.config_context(enable_metadata_routing=True):
        ours = clone(OURS).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        scorer = make_scorer(accuracy_score).set_score_request(sample_weight=True)
        pipeline = make_pipeline(Head2ToeSelector(alpha=0.3).set_fit_request(sample_weight=True), ours)
        pipeline.fit(stored, y, sample_weight=weight)
        first = Head2ToeSelector(alpha=0.3).fit(stored, y, sample_weight=weight)
        second = clone(OURS).fit(first.transform(stored), y, sample_weight=weight)
        np.testing.assert_allclose(
            pipeline.predict_proba(stored), second.predict_proba(first.transform(stored)), atol=1e-9
        )
        search = GridSearchCV(ours, {"C": [0.01, 1.0]}, cv=2, scoring=scorer, error_score="raise")
        search.fit(stored, y, sample_weight=weight)
        for meta in (CalibratedClassifierCV, BaggingClassifier, OneVsRestClassifier, FixedThresholdClassifier):
            labels = y % 2 if meta is FixedThresholdClassifier else y
            weighted = meta(ours).fit(np.asarray(stored), labels, sample_weight=weight)
            plain = meta(clone(OURS)).fit(np.asarray(stored), labels)
            assert weighted.predict(np.asarray(stored)).shape == plain.predict(np.asarray(stored)).shape
    best = search.best_params_["C"]
    for number, test in enumerate(np.array_split(np.arange(N), 2)):
        train = np.setdiff1d(np.arange(N), test)
        alone = clone(OURS).set_params(C=best).fit(stored[train], y[train], sample_weight=weight[train])
        score = alone.score(stored[test], y[test], sample_weight=weight[test])
        assert search.cv_results_[f"split{number}_test_score"][search.best_index_] == pytest.approx(score)


MIXED = {
    "mixture": {},
    "two classes": {"k": 2},
    "two scalings": {"normalizations": ("standard", None)},
    "best": {"refit": "best", "normalizations": ("layer+standard",)},
}


@pytest.mark.parametrize("settings", MIXED.values(), ids=MIXED.keys())
def test_a_search_is_one_linear_model(settings):
    settings = dict(settings)
    X, y, _ = make_problem(6, n=60, d=25, k=settings.pop("k", 3))
    model = Head2ToeClassifierCV(alphas=(0.5, 0.2), keep_fractions=(None, 0.2), Cs=(0.03, 3.0), cv=2, **settings)
    assert not hasattr(model, "coef_")
    assert not hasattr(model, "intercept_")
    model.fit(X, y)
    assert (len(model.estimators_) > 1) == (model.refit == "mixture")
    if model.refit == "best":
        kept = X[:, model.selected_features_]
        X_scaled = np.zeros_like(X)
        X_scaled[:, model.selected_features_] = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    else:
        X_scaled = X
    scores = X_scaled @ model.coef_.T + model.intercept_
    np.testing.assert_allclose(model.decision_function(X), scores[:, 0] if scores.shape[1] == 1 else scores, atol=1e-9)
    assert not set(np.flatnonzero(np.abs(model.coef_).sum(axis=0))) - set(model.selected_features_.tolist())


def test_a_mixture_of_nothing_has_the_intercepts_of_the_frequencies():
    X, y, weight = np.random.default_rng(0).normal(size=(N, 4)), np.arange(N) % 4, np.ones(N)
    weight[y == 1], weight[y == 2] = 0, 2
    model = Head2ToeClassifierCV(alphas=(0.9,), keep_fractions=(1.0,), Cs=(1.0,), last_layers=(), cv=2)
    with pytest.warns(UserWarning, match="class frequencies"):
        model.fit(X, y, sample_weight=weight)
    assert model.weights_.tolist() == [0.0]
    np.testing.assert_array_equal(model.coef_, np.zeros((4, 4)))
    np.testing.assert_allclose(np.exp(model.intercept_), [0.25, 0, 0.5, 0.25], atol=0.02)
    np.testing.assert_allclose(model.predict_proba(X), np.tile(np.exp(model.intercept_), (N, 1)))


def test_a_mixture_that_scales_layers_has_no_coefficients():
    X, y, _ = make_problem(6, n=60, d=25)
    model = Head2ToeClassifierCV(
        alphas=(0.5, 0.2), keep_fractions=(None, 0.2), Cs=(0.03, 3.0), cv=2, normalizations=("layer",)
    ).fit(X, y)
    assert len(model.estimators_) > 1
    assert not hasattr(model, "coef_")
    assert not hasattr(model, "intercept_")
    with pytest.raises(AttributeError, match=r"has coef_ where it is one linear model.* refit='best'"):
        _ = model.coef_


def test_coefficients_of_all_features_are_not_kept():
    rng = np.random.default_rng(0)
    y = np.arange(N) % 3
    X = rng.normal(size=(N, 4_000)).astype(np.float32)
    X[:, :3] += 3 * np.eye(3)[y]
    model = Head2ToeClassifier(alpha=0.8).fit(X, y)
    assert model.coef_.shape == (3, 4_000)
    assert np.count_nonzero(model.coef_) == 3 * len(model.selected_features_) < 30
    # Per feature a score and a layer in eight bytes each; not three coefficients.
    for saved in (pickle.dumps(model), skops.io.dumps(model)):
        assert len(saved) < 4_000 * 16 + 20_000
    with pytest.raises(AttributeError):
        model.coef_ = np.zeros((3, 4_000))
