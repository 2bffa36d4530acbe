"""Head2ToeClassifier as a user and as scikit-learn meet it."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from _estimator_data import DEVICES, FakeFeatures, make_problem, standardize
from scipy.special import expit, softmax
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, group_lasso_path

WIDTHS = (12, 1, 17)


def layered_problem(seed=0, n=60, k=3):
    X, y, weight = make_problem(seed, n=n, d=30, k=k)
    return X.astype(np.float32), y, weight


def scale_layers(X, widths):
    parts = np.split(X.astype(np.float64), np.cumsum(widths)[:-1], axis=1)
    return np.hstack([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts])


def test_scikit_learns_common_checks_pass():
    results = check_estimator(Head2ToeClassifier(alpha=0.3), on_fail=None, on_skip=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")] == []
    assert sum(r["status"] == "passed" for r in results) > 50


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [2, 3])
def test_fit_is_path_selection_and_ridge_head(k, device):
    X, y, weight = layered_problem(k=k)
    model = Head2ToeClassifier(alpha=0.1, C=0.3, tol=1e-6, device=device).fit(X, y, sample_weight=weight)
    path = group_lasso_path(X, y, alphas=[0.1 * model.alpha_max_], sample_weight=weight, tol=1e-6)
    np.testing.assert_allclose(model.feature_scores_, path.row_norms(0), atol=1e-2)
    assert model.alpha_max_ == pytest.approx(path.alpha_max, rel=1e-6)
    selected = np.flatnonzero(model.feature_scores_)
    np.testing.assert_array_equal(model.selected_features_, selected)
    assert 0 < len(selected) < 30
    assert model.selected_features_.dtype == np.int64
    Z = standardize(X[:, selected].astype(np.float64), weight)
    reference = LogisticRegression(C=0.3, tol=1e-8, max_iter=10_000).fit(Z, y, sample_weight=weight)
    np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(Z), atol=1e-4)
    np.testing.assert_allclose(model.decision_function(X), reference.decision_function(Z), atol=1e-3)
    assert model.coef_.shape == (1 if k == 2 else k, 30)
    assert model.duality_gap_ <= 1e-6
    assert model.n_iter_ >= 1


@pytest.mark.parametrize("k", [2, 3])
def test_path_head_is_the_path_itself(k):
    X, y, weight = layered_problem(1, k=k)
    model = Head2ToeClassifier(alpha=0.1, head="path", tol=1e-8).fit(X, y, sample_weight=weight)
    path = group_lasso_path(X, y, alphas=[0.1 * model.alpha_max_], sample_weight=weight, tol=1e-8)
    expected = softmax(X @ path.coef(0) + path.intercepts[0], axis=1)
    np.testing.assert_allclose(model.predict_proba(X), expected, atol=1e-3)
    # Calibrated in the large: the unpenalised intercept matches the weighted class frequencies.
    frequencies = np.bincount(y, weight) / weight.sum()
    np.testing.assert_allclose(np.average(model.predict_proba(X), axis=0, weights=weight), frequencies, atol=1e-6)


def test_probabilities_scores_and_labels_agree():
    for k in (2, 4):
        X, y, _ = layered_problem(2, k=k)
        names = np.array(["whale", "ant", "bee", "cow"])[y]
        model = Head2ToeClassifier().fit(X, names)
        assert model.classes_.tolist() == sorted(set(names))
        P, scores = model.predict_proba(X), model.decision_function(X)
        np.testing.assert_allclose(P, softmax(scores, axis=1) if k > 2 else np.c_[expit(-scores), expit(scores)])
        np.testing.assert_allclose(model.predict_log_proba(X), np.log(P))
        np.testing.assert_array_equal(model.predict(X), model.classes_[P.argmax(axis=1)])
        assert model.score(X, names) == np.mean(model.predict(X) == names) > 0.7


@pytest.mark.parametrize("head", ["ridge", "path"])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_feature_matrix_gives_what_its_array_gives(head, scattered):
    X, y, weight = layered_problem(3)
    features = FakeFeatures(X, WIDTHS, scattered=scattered)
    array_model = Head2ToeClassifier(head=head).fit(X, y, sample_weight=weight)
    model = Head2ToeClassifier(head=head).fit(features, y, sample_weight=weight)
    np.testing.assert_array_equal(model.selected_features_, array_model.selected_features_)
    np.testing.assert_allclose(model.coef_, array_model.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(model.predict_proba(features), array_model.predict_proba(X), rtol=1e-6)
    assert model.feature_names_in_.tolist() == features.feature_names
    assert model.n_features_in_ == 30


@pytest.mark.parametrize("normalization", ["standard", "layer", "layer+standard", None])
@pytest.mark.parametrize("head", ["ridge", "path"])
def test_prediction_reads_only_the_selected_columns(normalization, head):
    X, y, _ = layered_problem(4)
    model = Head2ToeClassifier(alpha=0.3, normalization=normalization, head=head).fit(FakeFeatures(X, WIDTHS), y)
    test = FakeFeatures(X[:7], WIDTHS)
    assert model.predict(test).shape == (7,)
    assert test.columns_read == set(model.selected_features_.tolist())
    assert 0 < len(test.columns_read) < 30


@pytest.mark.parametrize("normalization", ["layer", "layer+standard"])
def test_layers_are_scaled_before_scoring_and_their_kept_parts_before_the_head(normalization):
    X, y, weight = layered_problem(5)
    model = Head2ToeClassifier(alpha=0.1, normalization=normalization, tol=1e-6)
    model.fit(FakeFeatures(X, WIDTHS), y, sample_weight=weight)
    scaled = scale_layers(X, WIDTHS)
    standardized = normalization == "layer+standard"
    path = group_lasso_path(
        scaled, y, n_alphas=2, alpha_min_ratio=0.1, sample_weight=weight, standardize=standardized, tol=1e-6
    )
    assert model.alpha_max_ == pytest.approx(path.alpha_max, rel=1e-4)
    np.testing.assert_allclose(model.feature_scores_, path.row_norms(-1), atol=0.02 * path.row_norms(-1).max())
    selected = model.selected_features_
    widths = [np.sum((selected >= start) & (selected < stop)) for start, stop in [(0, 12), (12, 13), (13, 30)]]
    kept = scale_layers(X[:, selected], [width for width in widths if width])
    Z = standardize(kept, weight) if standardized else kept
    reference = LogisticRegression(tol=1e-8, max_iter=10_000).fit(Z, y, sample_weight=weight)
    np.testing.assert_allclose(model.predict_proba(FakeFeatures(X, WIDTHS)), reference.predict_proba(Z), atol=1e-4)


@pytest.mark.parametrize("head", ["ridge", "path"])
def test_an_array_is_cut_into_the_layers_seen_in_fit(head):
    X, y, _ = layered_problem(6)
    model = Head2ToeClassifier(normalization="layer", head=head).fit(FakeFeatures(X, WIDTHS), y)
    with pytest.warns(UserWarning, match="valid feature names"):
        from_array = model.predict_proba(X)
    np.testing.assert_allclose(from_array, model.predict_proba(FakeFeatures(X, WIDTHS)), rtol=1e-5)


def test_path_head_with_layers_uses_whole_layer_norms():
    X, y, _ = layered_problem(7)
    model = Head2ToeClassifier(alpha=0.2, normalization="layer", head="path").fit(FakeFeatures(X, WIDTHS), y)
    scores = scale_layers(X, WIDTHS) @ model.coef_.T + model.intercept_
    np.testing.assert_allclose(model.decision_function(FakeFeatures(X, WIDTHS)), scores, atol=1e-5)


def test_keep_fraction_keeps_that_many_and_one_keeps_all():
    X, y, _ = layered_problem(8)
    X[:, 4] = 3.0
    everything = Head2ToeClassifier(keep_fraction=1.0).fit(X, y)
    np.testing.assert_array_equal(everything.selected_features_, np.arange(30))
    np.testing.assert_array_equal(everything.coef_[:, 4], 0)
    few = Head2ToeClassifier(keep_fraction=0.1).fit(X, y)
    assert len(few.selected_features_) == 3
    scores = few.feature_scores_
    assert scores[few.selected_features_].min() >= np.delete(scores, few.selected_features_).max()


def test_features_of_another_network_are_refused():
    X, y, _ = layered_problem(9)
    model = Head2ToeClassifier().fit(FakeFeatures(X, WIDTHS, name="resnet"), y)
    with pytest.raises(ValueError, match=r"feature 0 is 'vit\.0:0', expected 'resnet\.0:0'"):
        model.predict(FakeFeatures(X, WIDTHS, name="vit"))
    with pytest.raises(ValueError, match="X has 12 features, but Head2ToeClassifier is expecting 30"):
        model.predict(FakeFeatures(X[:, :12], (12,), name="resnet"))


def test_missing_values_in_a_feature_matrix_are_refused_in_fit_and_predict():
    X, y, _ = layered_problem(10)
    model = Head2ToeClassifier().fit(FakeFeatures(X, WIDTHS), y)
    X[5, model.selected_features_[0]] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity in the selected features"):
        model.predict(FakeFeatures(X, WIDTHS))
    with pytest.raises(ValueError, match="NaN or infinity in column"):
        Head2ToeClassifier().fit(FakeFeatures(X, WIDTHS), y)


def test_data_frames_give_names_that_prediction_checks():
    X, y, _ = layered_problem(11)
    frame = pd.DataFrame(X, columns=[f"f{i}" for i in range(30)])
    model = Head2ToeClassifier().fit(frame, pd.Series(y))
    assert model.feature_names_in_.tolist() == list(frame.columns)
    np.testing.assert_array_equal(model.predict(frame), Head2ToeClassifier().fit(X, y).predict(X))
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame[frame.columns[::-1]])


@pytest.mark.parametrize("k", [2, 3])
def test_an_empty_selection_warns_and_predicts_the_class_frequencies(k):
    X, y, weight = layered_problem(12, k=k)
    with pytest.warns(UserWarning, match=r"No feature was selected at alpha=1\.0"):
        model = Head2ToeClassifier(alpha=1.0).fit(X, y, sample_weight=weight)
    assert len(model.selected_features_) == 0
    frequencies = np.bincount(y, weight) / weight.sum()
    np.testing.assert_allclose(model.predict_proba(X), np.tile(frequencies, (60, 1)), rtol=1e-9)


@pytest.mark.parametrize("head", ["ridge", "path"])
def test_a_class_of_zero_weight_is_never_predicted(head):
    X, y, weight = layered_problem(13)
    weight[y == 1] = 0
    model = Head2ToeClassifier(head=head).fit(X, y, sample_weight=weight)
    P = model.predict_proba(X)
    assert model.classes_.tolist() == [0, 1, 2]
    assert (P[:, 1] == 0).all()
    np.testing.assert_allclose(P.sum(axis=1), 1)
    assert set(model.predict(X)) == {0, 2}
    alone = Head2ToeClassifier(head=head).fit(X[y != 1], y[y != 1], sample_weight=weight[y != 1])
    np.testing.assert_allclose(P[:, [0, 2]], alone.predict_proba(X), atol=1e-6)


def test_pickles_clones_and_holds_only_numpy_and_plain_values():
    X, y, _ = layered_problem(14)
    model = Head2ToeClassifier(alpha=0.2, head="path").fit(FakeFeatures(X, WIDTHS), y)
    stored = pickle.dumps(model)
    assert len(stored) < 20_000
    features = FakeFeatures(X, WIDTHS)
    np.testing.assert_array_equal(pickle.loads(stored).predict_proba(features), model.predict_proba(features))
    for name, value in vars(model).items():
        assert value is None or isinstance(value, (np.ndarray, float, int, str)), name
    assert clone(model).get_params() == model.get_params()
    assert not hasattr(clone(model), "coef_")


def test_fits_are_reproducible():
    X, y, _ = layered_problem(15)
    one, again = (Head2ToeClassifier().fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(one.coef_, again.coef_)


def test_grid_search_over_alpha_and_heads():
    X, y, _ = layered_problem(16)
    grid = {"alpha": [0.3, 0.5], "head": ["ridge", "path"], "keep_fraction": [None, 0.3]}
    search = GridSearchCV(Head2ToeClassifier(), grid, cv=2, error_score="raise").fit(X, y)
    assert search.best_score_ > 0.5
    assert search.best_estimator_.n_features_in_ == 30


def test_an_unconverged_path_warns_with_its_gap():
    X, y, _ = layered_problem(17)
    with pytest.warns(ConvergenceWarning, match="did not reach tol=1e-12 within max_iter=1 .*gap is"):
        model = Head2ToeClassifier(tol=1e-12, max_iter=1).fit(X, y)
    assert model.duality_gap_ > 1e-12


def test_a_converged_fit_is_silent():
    X, y, _ = layered_problem(18)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Head2ToeClassifier().fit(X, y)
    assert model.duality_gap_ <= model.tol


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("alpha", 0.0),
        ("alpha", 1.1),
        ("l1_ratio", 0.0),
        ("keep_fraction", 0.0),
        ("keep_fraction", 20),
        ("normalization", "unit"),
        ("head", "svm"),
        ("C", 0.0),
        ("tol", -1.0),
        ("max_iter", 0),
        ("device", 3),
        ("layers", 3),
    ],
)
def test_a_bad_parameter_is_named_with_what_was_given(parameter, value):
    X, y, _ = layered_problem(19)
    with pytest.raises(ValueError, match=f"'{parameter}' parameter of Head2ToeClassifier must be .* Got {value!r}"):
        Head2ToeClassifier(**{parameter: value}).fit(X, y)


def test_other_errors_say_what_is_wrong():
    X, y, _ = layered_problem(20)
    with pytest.raises(NotFittedError):
        Head2ToeClassifier().predict(X)
    with pytest.raises(ValueError, match="at least two classes"):
        Head2ToeClassifier().fit(X, np.zeros(60))
    with pytest.raises(ValueError, match="got 59 labels for 60 rows"):
        Head2ToeClassifier().fit(FakeFeatures(X, WIDTHS), y[:-1])
    with pytest.raises(ValueError, match="device='cuda:77' cannot be used"):
        Head2ToeClassifier(device="cuda:77").fit(X, y)


@pytest.mark.parametrize("head", ["ridge", "path"])
@pytest.mark.parametrize("layers", [["net.1", "net.2"], "net.[12]"])
def test_the_last_layers_alone_are_a_linear_probe(head, layers):
    X, y, weight = layered_problem()
    stored = FakeFeatures(X, WIDTHS)
    model = Head2ToeClassifier(keep_fraction=1.0, layers=layers, head=head, C=0.3)
    model.fit(stored, y, sample_weight=weight)
    np.testing.assert_array_equal(model.selected_features_, np.arange(12, 30))
    if head == "ridge":
        Z = standardize(X[:, 12:].astype(np.float64), weight)
        reference = LogisticRegression(C=0.3, tol=1e-8, max_iter=10_000).fit(Z, y, sample_weight=weight)
        np.testing.assert_allclose(model.predict_proba(stored), reference.predict_proba(Z), atol=1e-3)


@pytest.mark.parametrize(
    "params",
    [
        {"keep_fraction": 1.0, "C": 0.3},
        {"alpha": 0.1, "tol": 1e-6},
        {"alpha": 0.1, "head": "path", "normalization": "layer"},
        {"keep_fraction": 0.4, "normalization": "layer+standard"},
    ],
)
def test_other_layers_are_not_read_and_count_as_if_they_were_not_there(params):
    X, y, weight = layered_problem()
    columns = np.r_[0:12, 13:30]
    stored, test = FakeFeatures(X, WIDTHS), FakeFeatures(X, WIDTHS)
    model = Head2ToeClassifier(layers=["net.2", "net.0"], **params).fit(stored, y, sample_weight=weight)
    alone = Head2ToeClassifier(**params).fit(FakeFeatures(X[:, columns], (12, 17)), y, sample_weight=weight)
    assert stored.columns_read == set(columns.tolist())
    np.testing.assert_array_equal(model.selected_features_, columns[alone.selected_features_])
    np.testing.assert_allclose(model.feature_scores_[columns], alone.feature_scores_, rtol=1e-5)
    np.testing.assert_allclose(model.coef_[:, columns], alone.coef_, rtol=1e-5, atol=1e-9)
    assert model.coef_[:, 12].tolist() == [0, 0, 0]
    assert model.feature_scores_[12] == 0
    np.testing.assert_allclose(
        model.predict_proba(test), alone.predict_proba(FakeFeatures(X[:, columns], (12, 17))), rtol=1e-5
    )
    assert test.columns_read == set(model.selected_features_.tolist())
    assert model.layer_names_.tolist() == ["net.0", "net.1", "net.2"]
    assert model.layer_summary()["n_selected"]["net.1"] == 0
    assert (model.n_features_in_, model.coef_.shape) == (30, (3, 30))


def test_layers_that_are_not_there_are_named():
    X, y, _ = layered_problem()
    with pytest.raises(ValueError, match=r"layers='net.9' matches no layer .* 3 layer\(s\): 'net.0', 'net.1', 'net.2'"):
        Head2ToeClassifier(layers=["net.0", "net.9"]).fit(FakeFeatures(X, WIDTHS), y)
    with pytest.raises(ValueError, match="layers=3 matches no layer"):
        Head2ToeClassifier(layers=[3]).fit(FakeFeatures(X, WIDTHS), y)
    with pytest.raises(ValueError, match="layers must hold at least one name or glob"):
        Head2ToeClassifier(layers=[]).fit(FakeFeatures(X, WIDTHS), y)
    with pytest.raises(ValueError, match=r"layers='conv' matches no layer .* 1 layer\(s\): 'X'"):
        Head2ToeClassifier(layers="conv").fit(X, y)
    expected = Head2ToeClassifier(alpha=0.3).fit(X, y).coef_
    np.testing.assert_array_equal(Head2ToeClassifier(alpha=0.3, layers="X").fit(X, y).coef_, expected)


def test_all_features_are_kept_without_a_path(solved_ratios):
    X, y, weight = layered_problem()
    X[:, 4] = 3.0
    model = Head2ToeClassifier(keep_fraction=1.0, memory="nowhere").fit(X, y, sample_weight=weight)
    assert solved_ratios == []
    assert np.isnan([model.alpha_max_, model.duality_gap_]).all()
    assert 1 <= model.n_iter_ < 100
    other = Head2ToeClassifier(alpha=0.9, keep_fraction=1.0).fit(X, y, sample_weight=weight)
    np.testing.assert_array_equal(model.coef_, other.coef_)
    sd = np.sqrt(np.cov(X.T, aweights=weight, ddof=0).diagonal())
    norms = np.linalg.norm(model.coef_, axis=0) * sd
    np.testing.assert_allclose(model.feature_scores_, norms, rtol=1e-4)


@pytest.mark.parametrize("model", [Head2ToeClassifier(), Head2ToeClassifierCV(cv=2)])
def test_memory_is_checked_where_no_path_is_solved(model):
    X, y, _ = layered_problem()
    kept = {"keep_fraction": 1.0} if isinstance(model, Head2ToeClassifier) else {"keep_fractions": (1.0,)}
    with pytest.raises(ValueError, match=r"memory must be None, a folder, .* got 3\."):
        model.set_params(memory=3, **kept).fit(X, y)


def test_features_that_the_path_head_drops_count_as_their_means():
    X, y, weight = layered_problem()
    X = X + 5
    model = Head2ToeClassifier(alpha=0.05, keep_fraction=0.1, head="path", tol=1e-6).fit(X, y, sample_weight=weight)
    everything = Head2ToeClassifier(alpha=0.05, head="path", tol=1e-6).fit(X, y, sample_weight=weight)
    assert len(model.selected_features_) < len(everything.selected_features_)
    mean = np.average(X, axis=0, weights=weight)
    replaced = np.tile(mean, (len(X), 1))
    replaced[:, model.selected_features_] = X[:, model.selected_features_]
    np.testing.assert_allclose(model.decision_function(X), everything.decision_function(replaced), atol=1e-5)


def test_rows_may_come_in_reverse():
    X, y, _ = layered_problem()
    expected = Head2ToeClassifier(keep_fraction=1.0).fit(X[::-1].copy(), y[::-1].copy())
    model = Head2ToeClassifier(keep_fraction=1.0).fit(X[::-1], y[::-1])
    np.testing.assert_allclose(model.decision_function(X[::-1]), expected.decision_function(X[::-1]), atol=1e-5)
