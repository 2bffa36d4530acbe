"""Head2ToeSelector as a transformer: what it keeps, what comes out, and under which names."""

import inspect
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
from _estimator_data import FakeFeatures, make_problem
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from estimators import Head2ToeClassifier, Head2ToeSelector
from h2t_store.matrix import FeatureMatrix, open_features
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.store import FeatureStore

WIDTHS = (12, 1, 17)
LAYERS = (Layer("stem", 0, 12, (12, 1, 1)), Layer("layer3.2.act2", 12, 30, (18, 1, 1)))


def problem(seed=0, k=3):
    X, y, weight = make_problem(seed, n=60, d=30, k=k)
    return X.astype(np.float32), y, weight


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A stored matrix, its values, its labels."""
    X, y, _ = problem(20)
    # Let a feature in the middle of the second layer matter most.
    X[:, 12 + 7] += 5 * (y == 1)
    path = tmp_path_factory.mktemp("selector") / "s.zarr"
    header = ExtractionHeader(60, 20, "float32", ("a", "b", "c"), LAYERS, {"inputs": {}, "environment": {}})
    extraction = FeatureStore(path, create=True).begin("x", header, y, [f"i{i}" for i in range(60)])
    norms = np.stack([np.linalg.norm(X[:, layer.start : layer.stop], axis=1) for layer in LAYERS], axis=1)
    for block in range(3):
        rows = slice(20 * block, 20 * block + 20)
        extraction.write_block(
            block,
            np.split(X[rows], [layer.start for layer in LAYERS[1:]], axis=1),
            norms[rows],
            np.zeros((len(X[rows]), 16), np.uint8),
        )
    extraction.finish()
    return open_features(path, "x"), X, y


def test_scikit_learns_common_checks_pass():
    results = check_estimator(Head2ToeSelector(alpha=0.3), on_fail=None, on_skip=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")] == []
    assert sum(r["status"] == "passed" for r in results) > 45


@pytest.mark.parametrize(
    "params",
    [
        dict(),
        dict(alpha=0.3),
        dict(alpha=0.3, keep_fraction=0.4),
        dict(keep_fraction=1e-6),
        dict(l1_ratio=0.5),
        dict(normalization="layer"),
        dict(normalization="layer+standard", alpha=0.2),
        dict(normalization=None, alpha=0.4),
        dict(class_weight="balanced", tol=1e-5),
        dict(class_weight={0: 1.0, 1: 5.0, 2: 0.0}),
        dict(layers="net.2", keep_fraction=0.3),
    ],
)
def test_it_selects_what_the_classifier_selects(params):
    X, y, weight = problem(0)
    features = FakeFeatures(X, WIDTHS)
    selector = Head2ToeSelector(**params).fit(features, y, sample_weight=weight)
    classifier = Head2ToeClassifier(**params).fit(features, y, sample_weight=weight)
    assert len(selector.selected_features_) > 0
    for name in ("selected_features_", "feature_scores_", "feature_layers_", "layer_names_", "feature_names_in_"):
        np.testing.assert_array_equal(getattr(selector, name), getattr(classifier, name), err_msg=name)
    for name in ("alpha_max_", "duality_gap_", "n_iter_", "n_features_in_"):
        assert getattr(selector, name) == getattr(classifier, name), name
    pd.testing.assert_frame_equal(selector.layer_summary(), classifier.layer_summary())
    assert selector.layer_summary()["n_selected"].sum() == len(selector.selected_features_)


def test_its_parameters_are_the_classifiers_with_the_same_defaults():
    ours, theirs = (inspect.signature(cls).parameters for cls in (Head2ToeSelector, Head2ToeClassifier))
    assert set(theirs) - set(ours) == {"head", "C"}
    assert {name: parameter.default for name, parameter in ours.items()} == {
        name: theirs[name].default for name in ours
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_comes_out_as_its_selected_columns(dtype):
    X, y, _ = problem(1)
    X = X.astype(dtype)
    selector = Head2ToeSelector(alpha=0.3)
    Z = selector.fit_transform(X, y)
    assert 0 < Z.shape[1] < 30
    assert Z.dtype == dtype
    np.testing.assert_array_equal(Z, X[:, selector.selected_features_])
    np.testing.assert_array_equal(selector.transform(X[:5].tolist()), X[:5, selector.selected_features_])
    Z[:] = -1
    np.testing.assert_array_equal(selector.transform(X), X[:, selector.selected_features_])


def test_support_inverse_and_names_belong_to_the_selection():
    X, y, _ = problem(2)
    selector = Head2ToeSelector(alpha=0.3).fit(X, y)
    selected = selector.selected_features_
    assert selected.dtype == np.int64
    mask = selector.get_support()
    assert (mask.shape, mask.dtype) == ((30,), bool)
    np.testing.assert_array_equal(np.flatnonzero(mask), selected)
    np.testing.assert_array_equal(selector.get_support(indices=True), selected)
    assert selector.get_feature_names_out().tolist() == [f"x{i}" for i in selected]
    given = [f"name{i}" for i in range(30)]
    assert selector.get_feature_names_out(given).tolist() == [given[i] for i in selected]
    with pytest.raises(ValueError, match="input_features"):
        selector.get_feature_names_out(given[:-1])
    np.testing.assert_array_equal(selector.inverse_transform(selector.transform(X)), np.where(mask, X, 0))


@pytest.mark.parametrize(("fraction", "kept"), [(1e-9, 1), (0.1, 3), (0.11, 4), (0.5, 15), (1.0, 30)])
def test_a_fraction_keeps_that_many_of_the_best(fraction, kept):
    X, y, _ = problem(3)
    selector = Head2ToeSelector(alpha=0.1, keep_fraction=fraction).fit(X, y)
    selected, scores = selector.selected_features_, selector.feature_scores_
    assert selector.transform(X).shape == (60, kept) == (60, len(selected))
    assert scores[selected].min() >= np.delete(scores, selected).max(initial=0)
    assert (np.diff(selected) > 0).all()


def test_pandas_come_out_with_names_and_index():
    X, y, _ = problem(4)
    frame = pd.DataFrame(X, columns=[f"f{i}" for i in range(30)], index=pd.Index(range(100, 160), name="row"))
    selector = Head2ToeSelector(alpha=0.3).fit(frame, pd.Series(y, index=frame.index))
    assert isinstance(selector.transform(frame), np.ndarray)
    Z = selector.set_output(transform="pandas").transform(frame)
    pd.testing.assert_frame_equal(Z, frame.iloc[:, selector.selected_features_])
    with pytest.raises(ValueError, match="feature names should match"):
        selector.transform(frame[frame.columns[::-1]])


def test_polars_come_out_with_names():
    X, y, _ = problem(5)
    frame = pl.DataFrame(X, schema=[f"f{i}" for i in range(30)])
    selector = Head2ToeSelector(alpha=0.3).set_output(transform="polars").fit(frame, pl.Series(y))
    Z = selector.transform(frame)
    assert isinstance(Z, pl.DataFrame)
    assert Z.equals(frame[:, selector.selected_features_.tolist()])
    assert selector.feature_names_in_.tolist() == frame.columns


@pytest.mark.parametrize("normalization", ["standard", "layer"])
def test_transform_reads_only_the_selected_columns_of_a_matrix(normalization):
    X, y, _ = problem(6)
    selector = Head2ToeSelector(alpha=0.3, normalization=normalization).fit(FakeFeatures(X, WIDTHS), y)
    test = FakeFeatures(X[:7], WIDTHS)
    np.testing.assert_array_equal(selector.transform(test), X[:7, selector.selected_features_])
    assert test.columns_read == set(selector.selected_features_.tolist())
    assert 0 < len(test.columns_read) < 30
    assert test.n_passes == 0


def test_stored_features_keep_the_names_of_their_layers(stored):
    matrix, X, y = stored
    selector = Head2ToeSelector(alpha=0.3).fit(matrix, y)
    dense = Head2ToeSelector(alpha=0.3).fit(X, y)
    np.testing.assert_array_equal(selector.selected_features_, dense.selected_features_)
    names = selector.get_feature_names_out()
    assert "layer3.2.act2[7]" in names
    assert names.tolist() == matrix.feature_names[selector.selected_features_].tolist()
    np.testing.assert_array_equal(selector.transform(matrix), X[:, selector.selected_features_])
    frame = selector.set_output(transform="pandas").transform(matrix[:9])
    assert frame.columns.tolist() == names.tolist()
    np.testing.assert_array_equal(frame.to_numpy(), X[:9, selector.selected_features_])
    assert selector.layer_summary().index.tolist() == ["stem", "layer3.2.act2"]


def test_stored_features_are_read_once_per_selected_column(stored, monkeypatch):
    matrix, _, y = stored
    selector = Head2ToeSelector(alpha=0.3).fit(matrix, y)
    asked, read = [], FeatureMatrix._read
    monkeypatch.setattr(FeatureMatrix, "_read", lambda self, *key: asked.extend(key[-1]) or read(self, *key))
    selector.transform(matrix)
    assert sorted(asked) == selector.selected_features_.tolist()


def test_a_pipeline_with_a_head_of_ones_own_works_on_arrays_and_stored_features(stored):
    matrix, X, y = stored
    pipeline = make_pipeline(Head2ToeSelector(alpha=0.2), LogisticRegression(max_iter=1000))
    lazy = clone(pipeline).fit(matrix, y)
    dense = clone(pipeline).fit(X, y)
    np.testing.assert_array_equal(lazy.predict_proba(matrix), dense.predict_proba(X))
    by_hand = LogisticRegression(max_iter=1000).fit(X[:, dense[0].selected_features_], y)
    np.testing.assert_array_equal(dense.predict(X), by_hand.predict(X[:, dense[0].selected_features_]))
    assert dense.score(X, y) > 0.8
    assert lazy[:-1].get_feature_names_out().tolist() == lazy[0].get_feature_names_out().tolist()


def test_a_search_over_the_selector_and_the_head_behind_it(tmp_path):
    X, y, _ = problem(7)
    pipeline = make_pipeline(Head2ToeSelector(memory=tmp_path), LogisticRegression(max_iter=1000))
    grid = {"head2toeselector__alpha": [0.2, 0.6], "logisticregression__C": [0.1, 1.0]}
    kept = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(X, y)
    plain = GridSearchCV(pipeline.set_params(head2toeselector__memory=None), grid, cv=2).fit(X, y)
    np.testing.assert_array_equal(kept.cv_results_["mean_test_score"], plain.cv_results_["mean_test_score"])
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_weights_decide_the_selection_and_only_their_ratios():
    X, y, weight = problem(8)
    weight = weight**4
    selected = Head2ToeSelector(alpha=0.3).fit(X, y).selected_features_
    weighted = Head2ToeSelector(alpha=0.3, tol=1e-6).fit(X, y, sample_weight=weight)
    scaled = Head2ToeSelector(alpha=0.3, tol=1e-6).fit(X, y, sample_weight=1000 * weight)
    np.testing.assert_array_equal(weighted.selected_features_, scaled.selected_features_)
    np.testing.assert_allclose(weighted.feature_scores_, scaled.feature_scores_, rtol=1e-6, atol=1e-9)
    assert set(weighted.selected_features_) != set(selected)
    weight[20:] = 0
    without = Head2ToeSelector(alpha=0.3, tol=1e-6).fit(X[:20], y[:20], sample_weight=weight[:20])
    ignored = Head2ToeSelector(alpha=0.3, tol=1e-6).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(ignored.feature_scores_, without.feature_scores_, rtol=1e-6, atol=1e-9)


def test_class_weights_are_sample_weights():
    X, y, weight = problem(9)
    by_class = Head2ToeSelector(alpha=0.3, class_weight={0: 1.0, 1: 7.0, 2: 0.5}).fit(X, y, sample_weight=weight)
    by_sample = Head2ToeSelector(alpha=0.3).fit(X, y, sample_weight=weight * np.array([1.0, 7.0, 0.5])[y])
    np.testing.assert_array_equal(by_class.feature_scores_, by_sample.feature_scores_)


def test_nothing_selected_warns_and_gives_no_columns():
    X, y, _ = problem(10)
    with pytest.warns(UserWarning, match=r"No feature was selected at alpha=1\.0 .* transform gives no columns"):
        selector = Head2ToeSelector(alpha=1.0).fit(X, y)
    assert selector.transform(X).shape == (60, 0)
    assert selector.get_feature_names_out().tolist() == []
    assert not selector.get_support().any()
    assert selector.transform(FakeFeatures(X, WIDTHS)).shape == (60, 0)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("alpha", 0.0),
        ("alpha", 1.1),
        ("l1_ratio", 0.0),
        ("keep_fraction", 0.0),
        ("keep_fraction", 2),
        ("normalization", "foo"),
        ("class_weight", "even"),
        ("tol", 0.0),
        ("max_iter", 0),
        ("device", 3),
        ("layers", 3),
        ("max_memory", 0),
    ],
)
def test_a_bad_parameter_is_named_with_what_was_given(parameter, value):
    X, y, _ = problem(11)
    with pytest.raises(ValueError, match=f"'{parameter}' parameter of Head2ToeSelector must be .* Got {value!r}"):
        Head2ToeSelector(**{parameter: value}).fit(X, y)


def test_a_bad_memory_and_a_bad_amount_of_memory_are_named():
    X, y, _ = problem(12)
    with pytest.raises(ValueError, match="memory must be None, a folder"):
        Head2ToeSelector(memory=3).fit(X, y)
    with pytest.raises(ValueError, match="max_memory='much' is no amount of memory"):
        Head2ToeSelector(max_memory="much").fit(X, y)


def test_other_errors_say_what_is_wrong():
    X, y, _ = problem(13)
    for method in ("transform", "inverse_transform"):
        with pytest.raises(NotFittedError):
            getattr(Head2ToeSelector(), method)(X)
    with pytest.raises(NotFittedError):
        Head2ToeSelector().get_support()
    with pytest.raises(ValueError, match="requires y to be passed"):
        Head2ToeSelector().fit(X)
    with pytest.raises(ValueError, match="at least two classes"):
        Head2ToeSelector().fit(X, np.zeros(60))
    with pytest.raises(ValueError, match="got 59 labels for 60 rows"):
        Head2ToeSelector().fit(FakeFeatures(X, WIDTHS), y[:-1])
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(60,\)"):
        Head2ToeSelector().fit(X, y, sample_weight=np.ones(59))
    selector = Head2ToeSelector().fit(FakeFeatures(X, WIDTHS), y)
    with pytest.raises(ValueError, match=r"feature 0 is 'vit\.0:0', expected 'net\.0:0'"):
        selector.transform(FakeFeatures(X, WIDTHS, name="vit"))
    with pytest.raises(ValueError, match="X has 12 features, but Head2ToeSelector is expecting 30"):
        selector.transform(FakeFeatures(X[:, :12], (12,)))
    with pytest.warns(ConvergenceWarning, match="did not reach tol=1e-12"):
        Head2ToeSelector(tol=1e-12, max_iter=1).fit(X, y)


def test_missing_values_are_refused_where_they_are_read():
    X, y, _ = problem(14)
    selector = Head2ToeSelector(alpha=0.3).fit(X, y)
    matrix_selector = Head2ToeSelector(alpha=0.3).fit(FakeFeatures(X, WIDTHS), y)
    broken, harmless = X.copy(), X.copy()
    broken[5, selector.selected_features_[0]] = np.nan
    harmless[5, np.flatnonzero(~selector.get_support())[0]] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        selector.transform(broken)
    with pytest.raises(ValueError, match="NaN"):
        matrix_selector.transform(FakeFeatures(broken, WIDTHS))
    expected = X[:, matrix_selector.selected_features_]
    np.testing.assert_array_equal(matrix_selector.transform(FakeFeatures(harmless, WIDTHS)), expected)
    for features in (broken, FakeFeatures(broken, WIDTHS)):
        with pytest.raises(ValueError, match="NaN or infinity in column"):
            Head2ToeSelector().fit(features, y)


def test_a_refit_forgets_what_was_seen_before():
    X, y, _ = problem(15)
    selector = Head2ToeSelector(alpha=0.3).fit(FakeFeatures(X, WIDTHS), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selector.fit(X[:, :20], y).transform(X[:, :20])
    assert not hasattr(selector, "feature_names_in_")
    assert selector.n_features_in_ == 20 == len(selector.get_support())
    assert selector.layer_names_.tolist() == ["X"]
