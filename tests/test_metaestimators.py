"""scikit-learn's meta-estimators around ours: each gives what it gives around a scaler and a logistic regression."""

import inspect
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
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
    "RFE by one": lambda e: RFE(e, n_features_to_select=2, step=2),
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
            answers[name] = np.asarray(ask(X) if inspect.signature(ask).parameters.keys() & {"X"} else ask())
    return answers


def assert_same_answers(ours, theirs, atol=1e-4):
    assert ours.keys() == theirs.keys()
    for name, answer in theirs.items():
        np.testing.assert_allclose(ours[name], answer, atol=atol, err_msg=name)


@pytest.mark.parametrize("meta", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("k", [2, 3])
def test_around_the_classifier(meta, k):
    X, y = problem(k)
    ours, theirs = meta(OURS).fit(X, y), meta(Reference()).fit(X, y)
    assert_same_answers(said(ours, X), said(theirs, X))
