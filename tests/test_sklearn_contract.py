"""The estimators among scikit-learn's tools: saved and loaded, searched, stacked, fed by arrays, frames and stores."""

import pickle
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import skops.io
import torch
from _estimator_data import DEVICES
from conftest import MODELS
from joblib import parallel_config
from sklearn.base import clone
from sklearn.ensemble import StackingClassifier
from sklearn.feature_selection import VarianceThreshold
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate, learning_curve, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_html_repr

import estimators
from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector, PublishedHead2Toe
from h2t_store import extract, open_features

ROOT = Path(estimators.__file__).parents[1]
N = 90
ESTIMATORS = {
    "classifier": Head2ToeClassifier(alpha=0.2),
    "layers": Head2ToeClassifier(alpha=0.2, normalization="layer+standard", class_weight="balanced"),
    "path": Head2ToeClassifier(alpha=0.2, normalization="layer", head="path"),
    "published": PublishedHead2Toe(normalization="standard", max_iter=20, random_state=0),
    "selector": Head2ToeSelector(alpha=0.2),
    "search": Head2ToeClassifierCV(
        alphas=(0.4, 0.2),
        keep_fractions=(None,),
        Cs=(0.1, 1.0),
        last_layers=(),
        single_layers=0,
        normalizations=("standard", "layer"),
        cv=2,
    ),
}
every = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
NAMES = {
    "classifier": Head2ToeClassifier,
    "selector": Head2ToeSelector,
    "search": Head2ToeClassifierCV,
    "published": PublishedHead2Toe,
}


def store_images(path, name, seed):
    """Features of images whose classes differ in brightness and in one colour."""
    rng = np.random.default_rng(seed)
    y = np.arange(N) % 3
    images = rng.integers(0, 150, (N, 8, 8, 3)) + 25 * y[:, None, None, None]
    images[..., 0] += 30 * (y[:, None, None] == 1)
    return extract((images.astype(np.uint8), y), model=f"{MODELS}:small_input", store=path, name=name, target_size=64)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("contract") / "s.zarr"
    store_images(path, "train", 0)
    store_images(path, "test", 1)
    return path


@pytest.fixture(scope="module")
def stored(store):
    return open_features(store, "train")


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums in the same order here and in workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answers(model, X):
    """What a fitted estimator says about X, as one array."""
    if isinstance(model, Head2ToeSelector):
        return np.asarray(model.transform(X))
    return np.column_stack([model.decision_function(X), model.predict_proba(X), model.predict(X)])


def through_pickle(model, path):
    return pickle.loads(pickle.dumps(model))


def through_joblib(model, path):
    joblib.dump(model, path)
    return joblib.load(path)


def through_skops(model, path):
    dumped = skops.io.dumps(model)
    untrusted = skops.io.get_untrusted_types(data=dumped)
    assert [name for name in untrusted if not name.startswith("estimators.")] == []
    return skops.io.loads(dumped, trusted=untrusted)


def assert_same_state(a, b):
    assert type(a) is type(b)
    assert vars(a).keys() == vars(b).keys()
    for name, value in vars(a).items():
        other = vars(b)[name]
        if name in ("best_estimator_", "estimators_"):
            for one, two in zip(np.atleast_1d(value), np.atleast_1d(other), strict=True):
                assert_same_state(one, two)
        elif isinstance(value, np.ndarray):
            assert value.dtype == other.dtype
            np.testing.assert_array_equal(value, other, err_msg=name)
        elif name not in ("cv_results_", "scorer_"):
            assert value == other or (value != value and other != other), name


@every
@pytest.mark.parametrize("way", [through_pickle, through_joblib, through_skops])
def test_a_saved_estimator_comes_back_as_it_was(stored, tmp_path, estimator, way):
    model = clone(estimator).fit(stored, stored.y)
    loaded = way(model, tmp_path / "model")
    assert_same_state(loaded, model)
    np.testing.assert_array_equal(answers(loaded, stored), answers(model, stored))
    assert loaded.get_feature_names_out().tolist() == model.get_feature_names_out().tolist()
    unfitted = way(clone(estimator), tmp_path / "unfitted")
    assert unfitted.get_params() == estimator.get_params()
    if not isinstance(model, Head2ToeSelector):
        assert unfitted.fit(stored, stored.y).score(stored, stored.y) == model.score(stored, stored.y)


@every
def test_a_fitted_estimator_holds_numbers_and_names_only(stored, estimator):
    def check(model):
        for name, value in vars(model).items():
            if name in ("estimators_", "best_estimator_"):
                for part in value if isinstance(value, list) else [value]:
                    check(part)
            else:
                plain = (np.ndarray, int, float, str, tuple, dict, list, type(None))
                assert isinstance(value, plain) or name == "scorer_", name

    wide = np.repeat(np.asarray(stored), 20, axis=0)
    y = np.repeat(stored.y, 20)
    for X, labels in ((stored, stored.y), (wide, y)):
        model = clone(estimator).fit(X, labels)
        check(model)
        data = pickle.dumps(model)
        for word in (b"torch", b"FeatureMatrix", b"h2t_store", b"s.zarr"):
            assert word not in data
    # Per feature a score, a layer and perhaps a name; nothing per row.
    assert len(data) < 64 * wide.shape[1] + 20_000 < wide.nbytes / 10
    grown = len(pickle.dumps(clone(estimator).fit(np.r_[wide, wide], np.r_[y, y])))
    assert grown < 1.2 * len(data)


LOADED = """
import pickle, sys
import numpy as np
folder = sys.argv[1]
models, others = pickle.load(open(folder + "/models.pkl", "rb"))
assert "h2t_store" not in sys.modules, "loading reached for the store"
import warnings
warnings.simplefilter("ignore")
from h2t_store import open_features
other = open_features(folder + "/other.zarr", "test")
for model, expected in zip(models, others):
    ask = model.transform if hasattr(model, "transform") else model.decision_function
    assert np.array_equal(ask(other), expected)
    assert np.allclose(ask(np.asarray(other)), expected, rtol=1e-5, atol=1e-6)
"""


def test_models_outlive_their_store_and_process(tmp_path):
    train, test = store_images(tmp_path / "s.zarr", "x", 0), store_images(tmp_path / "other.zarr", "test", 1)
    models = [clone(estimator).fit(train, train.y) for estimator in ESTIMATORS.values()]
    shutil.rmtree(tmp_path / "s.zarr")
    asked = [model.transform if hasattr(model, "transform") else model.decision_function for model in models]
    (tmp_path / "models.pkl").write_bytes(pickle.dumps((models, [np.asarray(ask(test)) for ask in asked])))
    run = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr


def in_search(X, y, n_jobs):
    grid = {"alpha": [0.5, 0.1], "normalization": ["standard", None]}
    search = GridSearchCV(Head2ToeClassifier(), grid, cv=3, n_jobs=n_jobs, error_score="raise").fit(X, y)
    return np.r_[search.cv_results_["mean_test_score"], search.predict(X)]


def in_cross_val_predict(X, y, n_jobs):
    return cross_val_predict(Head2ToeClassifier(alpha=0.2), X, y, cv=3, n_jobs=n_jobs, method="predict_proba")


def in_learning_curve(X, y, n_jobs):
    sizes, train, test = learning_curve(
        Head2ToeClassifier(alpha=0.2),
        X,
        y,
        cv=3,
        train_sizes=[0.5, 1.0],
        n_jobs=n_jobs,
        shuffle=True,
        random_state=0,
        error_score="raise",
    )
    return np.c_[sizes, train, test]


def in_pipeline(X, y, n_jobs):
    pipeline = make_pipeline(Head2ToeSelector(alpha=0.1), LogisticRegression(max_iter=2000))
    found = cross_validate(pipeline, X, y, cv=3, n_jobs=n_jobs, error_score="raise", return_train_score=True)
    filtered = make_pipeline(VarianceThreshold(1e-4), Head2ToeClassifier(alpha=0.2)).fit(X, y)
    return np.r_[found["test_score"], found["train_score"], filtered.predict(X)]


def in_stacking(X, y, n_jobs):
    parts = [("a", Head2ToeClassifier(alpha=0.3)), ("b", make_pipeline(Head2ToeSelector(), LogisticRegression()))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        return StackingClassifier(parts, cv=2, n_jobs=n_jobs).fit(X, y).predict_proba(X)


def in_split(X, y, n_jobs):
    train, test, y_train, y_test = train_test_split(X, y, random_state=0, stratify=y)
    model = Head2ToeClassifier(alpha=0.2).fit(train, y_train)
    return np.r_[model.score(test, y_test), model.predict_proba(test).ravel()]


def in_search_of_its_own(X, y, n_jobs):
    model = clone(ESTIMATORS["search"]).set_params(n_jobs=n_jobs, normalizations=("standard", None)).fit(X, y)
    return np.r_[model.cv_results_["mean_test_score"], model.cv_results_["mean_n_features"], model.predict(X)]


@pytest.mark.parametrize("n_jobs", [1, 2])
@pytest.mark.parametrize(
    "use",
    [in_search, in_cross_val_predict, in_learning_curve, in_pipeline, in_stacking, in_split, in_search_of_its_own],
)
def test_stored_features_give_what_their_values_give(stored, use, n_jobs):
    with parallel_config(backend="loky", inner_max_num_threads=1):
        lazy = use(stored, stored.y, n_jobs)
    dense = use(np.asarray(stored), stored.y, 1)
    np.testing.assert_allclose(lazy, dense, rtol=1e-5, atol=1e-6)
    assert np.ptp(lazy) > 0


def test_views_of_stored_features_pickle_as_kilobytes(stored):
    order = np.random.default_rng(0).permutation(N)
    for view in (stored, stored[::2], stored[:50, 5:], stored[order], stored[:, ::3], stored.select_layers("layers*")):
        data = pickle.dumps(view)
        assert len(data) < 2_000
        np.testing.assert_array_equal(np.asarray(pickle.loads(data)), np.asarray(view))


@every
def test_data_frames_are_as_good_as_arrays(stored, estimator):
    values, y = np.asarray(stored), stored.y
    columns = [f"f{i}" for i in range(values.shape[1])]
    expected = clone(estimator).fit(values, y)
    for frame, labels in (
        (pd.DataFrame(values, columns=columns), pd.Series(y)),
        (pl.DataFrame(values, schema=columns), pl.Series(y)),
    ):
        model = clone(estimator).fit(frame, labels)
        assert model.feature_names_in_.tolist() == columns
        # Columns of a frame lie side by side: sums are rounded differently.
        np.testing.assert_allclose(answers(model, frame), answers(expected, values), rtol=1e-3, atol=5e-3)
        assert model.get_feature_names_out().tolist() == [columns[i] for i in expected.selected_features_]


def test_set_output_reaches_the_selector_in_a_pipeline(stored):
    pipeline = make_pipeline(Head2ToeSelector(alpha=0.2), VarianceThreshold())
    for kind, frame in (("pandas", pd.DataFrame), ("polars", pl.DataFrame)):
        Z = pipeline.set_output(transform=kind).fit_transform(stored, stored.y)
        assert isinstance(Z, frame)
        assert list(Z.columns) == pipeline[0].get_feature_names_out().tolist()
        np.testing.assert_array_equal(Z.to_numpy(), np.asarray(stored[:, pipeline[0].selected_features_]))


@every
def test_other_names_than_those_of_the_fit_are_refused(stored, estimator):
    name = type(estimator).__name__
    values, y = np.asarray(stored), stored.y
    frame = pd.DataFrame(values, columns=[f"f{i}" for i in range(values.shape[1])])
    model = clone(estimator).fit(frame, y)
    with pytest.raises(ValueError, match="feature names should match"):
        answers(model, frame.rename(columns={"f3": "g3"}))
    with pytest.raises(ValueError, match=f"X has {values.shape[1] - 1} features, but {name} is expecting"):
        answers(model, values[:, 1:])
    with pytest.raises(ValueError, match=r"X holds other features .* expected 'f0'"):
        answers(model, stored)
    with pytest.warns(UserWarning, match=f"X does not have valid feature names, but {name} was fitted with"):
        answers(model, values)
    model.fit(stored, y)
    with pytest.raises(ValueError, match="feature names should match"):
        answers(model, frame)
    with pytest.raises(ValueError, match=r"feature 0 is 'layers.0.conv1:in\[1\]', expected"):
        answers(model, stored[:, np.r_[1, 0, 2 : values.shape[1]]])
    with pytest.raises(ValueError, match=f"X has {values.shape[1] - 1} features, but {name} is expecting"):
        answers(model, stored[:, 1:])
    named = pd.DataFrame(values, columns=stored.feature_names)
    np.testing.assert_allclose(answers(model, named), answers(model, stored), rtol=1e-5, atol=1e-6)


class Tags(HTMLParser):
    """Fails on tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text = [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("br", "input", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("cls", NAMES.values(), ids=NAMES.keys())
def test_notebooks_show_the_parameters(stored, cls):
    name = "coef" if cls is PublishedHead2Toe else "l1_ratio"
    estimator = cls(**{name: 0.625})
    for shown in (estimator, clone(ESTIMATORS["selector"] if cls is Head2ToeSelector else estimator)):
        html = estimator_html_repr(shown)
        assert cls.__name__ in html
        assert all(name in html for name in shown.get_params())
    assert "0.625" in estimator_html_repr(estimator)
    assert f"{name}=0.625" in repr(estimator)
    assert "Not fitted" in estimator_html_repr(estimator)
    small = {"alphas": (0.3,), "keep_fractions": (None,), "cv": 2} if cls is Head2ToeClassifierCV else {}
    fitted = estimator.set_params(**small).fit(stored, stored.y)
    assert "Not fitted" not in estimator_html_repr(fitted)
    assert name in estimator_html_repr(make_pipeline(VarianceThreshold(), clone(fitted)))


def test_notebooks_show_a_matrix_as_it_is_selected(stored):
    text = " ".join(Tags(stored[:7].select_layers("layers.1*")._repr_html_()).text)
    shown = stored[:7].select_layers("layers.1*")
    assert f"7 samples x {shown.shape[1]:,} features" in text
    assert shown.name in text
    assert "s.zarr" in text
    for layer in stored.layers:
        assert (layer.name in text) == layer.name.startswith("layers.1")


@every
def test_clones_have_the_parameters_and_nothing_fitted(stored, estimator):
    model = clone(estimator).fit(stored, stored.y)
    copy = clone(model)
    assert copy.get_params() == model.get_params() == estimator.get_params()
    assert [name for name in vars(copy) if name.endswith("_")] == []
    again = type(estimator)().set_params(**estimator.get_params())
    np.testing.assert_array_equal(answers(again.fit(stored, stored.y), stored), answers(model, stored))


@every
def test_a_fit_leaves_its_parameters_and_its_data_alone(stored, estimator):
    values, y = np.asarray(stored), stored.y.copy()
    before, params = values.copy(), {name: repr(value) for name, value in estimator.get_params().items()}
    values.flags.writeable = y.flags.writeable = False
    model = clone(estimator)
    answers(model.fit(values, y, sample_weight=np.ones(N)), values)
    np.testing.assert_array_equal(values, before)
    assert {name: repr(value) for name, value in model.get_params().items()} == params


@every
def test_features_that_do_not_fit_the_memory_give_the_same(stored, estimator):
    exact = clone(estimator)
    if not isinstance(exact, PublishedHead2Toe):
        exact.set_params(tol=1e-7)
    assert stored.nbytes > 60_000
    inside = clone(exact).fit(stored, stored.y)
    for features, max_memory in ((stored, 60_000), (np.asarray(stored), "60kB")):
        model = clone(exact).set_params(max_memory=max_memory).fit(features, stored.y)
        if isinstance(features, np.ndarray) and "layer" in repr(estimator):
            # An array is one layer.
            inside = clone(exact).fit(features, stored.y)
        np.testing.assert_array_equal(model.selected_features_, inside.selected_features_)
        np.testing.assert_allclose(model.feature_scores_, inside.feature_scores_, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(answers(model, features), answers(inside, features), rtol=1e-2, atol=1e-3)


@every
@pytest.mark.parametrize("device", DEVICES)
def test_devices_agree_and_what_is_fitted_on_one_works_on_another(stored, estimator, device):
    elsewhere = pickle.loads(pickle.dumps(clone(estimator).set_params(device=device).fit(stored, stored.y)))
    here = clone(estimator).set_params(device="cpu").fit(stored, stored.y)
    elsewhere.set_params(device="cpu")
    if hasattr(here, "predict"):
        assert np.mean(elsewhere.predict(stored) == here.predict(stored)) >= 0.995
    else:
        assert np.mean(elsewhere.get_support() == here.get_support()) >= 0.995


@pytest.mark.parametrize("estimator", [ESTIMATORS[name] for name in ("classifier", "selector", "search")])
def test_a_folder_for_memory_is_text_in_what_is_saved(stored, estimator, tmp_path):
    model = clone(estimator).set_params(memory=tmp_path).fit(stored, stored.y)
    saved = skops.io.dumps(model)
    assert all(name.startswith("estimators.") for name in skops.io.get_untrusted_types(data=saved))
    assert pickle.loads(pickle.dumps(model)).memory == str(tmp_path)
