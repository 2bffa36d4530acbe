"""Stored features through the classifier: what neither half can show alone."""

import pickle

import numpy as np
import pytest
from conftest import MODELS
from sklearn.model_selection import GridSearchCV, cross_val_predict

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToePathDisplay
from estimators.layers import layer_index
from estimators.scaling import inverse_layer_norms
from h2t_store import extract


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Extracts 120 images whose classes differ in brightness and in one colour, pooled as asked."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    images = rng.integers(0, 120, (120, 8, 8, 3)) + 40 * y[:, None, None, None]
    images[..., 0] += 30 * (y[:, None, None] == 1)
    path = tmp_path_factory.mktemp("together") / "s.zarr"

    def extracted(*target_size):
        name = "-".join(map(str, target_size))
        data = images.astype(np.uint8), y
        return extract(data, model=f"{MODELS}:small_input", store=path, name=name, target_size=list(target_size))

    return extracted


@pytest.fixture(scope="module")
def stored(extracted):
    return extracted(64)


@pytest.fixture(scope="module")
def both(extracted):
    """Pooled to 4, which is the mean of each channel, and to 64."""
    return extracted(4, 64)


def columns_of(matrix, size):
    return np.concatenate([np.arange(v.start, v.stop) for v in matrix.layers if size in v.target_sizes])


@pytest.mark.parametrize("normalization", ["standard", None])
def test_fits_on_the_matrix_and_on_its_values_agree(stored, normalization):
    values = np.asarray(stored)
    lazy = Head2ToeClassifier(normalization=normalization).fit(stored, stored.y)
    dense = Head2ToeClassifier(normalization=normalization).fit(values, stored.y)
    np.testing.assert_array_equal(lazy.selected_features_, dense.selected_features_)
    np.testing.assert_allclose(lazy.predict_proba(stored), dense.predict_proba(values), rtol=1e-6, atol=1e-9)
    assert lazy.score(stored, stored.y) > 0.9
    assert lazy.feature_names_in_[0] == "layers.0.conv1:in[0]"


@pytest.mark.parametrize("normalization", ["standard", "layer", "layer+standard"])
@pytest.mark.parametrize("head", ["ridge", "path"])
def test_the_order_of_columns_does_not_matter(stored, normalization, head):
    order = np.random.default_rng(1).permutation(stored.shape[1])
    shuffled = stored[:, order]
    model = Head2ToeClassifier(normalization=normalization, head=head, tol=1e-7, alpha=0.2)
    straight = model.fit(stored, stored.y).predict_proba(stored)
    chosen = set(model.selected_features_)
    np.testing.assert_allclose(model.fit(shuffled, stored.y).predict_proba(shuffled), straight, rtol=1e-2, atol=1e-3)
    assert {int(order[i]) for i in model.selected_features_} == chosen


@pytest.mark.parametrize("names", [["whale", "ant", "cow"], [2, 0, 1]])
def test_labels_mean_the_same_where_an_extraction_lacks_a_class(tmp_path, names):
    rng = np.random.default_rng(0)
    codes = np.arange(60) % 3
    images = (rng.integers(0, 60, (60, 8, 8, 3)) + 90 * codes[:, None, None, None]).astype(np.uint8)
    labels = np.array(names)[codes]
    common = dict(model=f"{MODELS}:small_input", store=tmp_path / "s", target_size=8)
    train = extract((images, labels), name="train", **common)
    some = labels != names[1]
    test = extract((images[some], labels[some]), name="test", **common)
    model = Head2ToeClassifier(alpha=0.2).fit(train, train.y)
    assert model.classes_.tolist() == sorted(names)
    assert model.score(test, test.y) > 0.9
    np.testing.assert_array_equal(model.predict(test), model.predict(train)[some])


def test_unlabelled_rows_are_left_out_by_a_mask(tmp_path):
    codes = np.arange(40) % 2
    images = (np.random.default_rng(0).integers(0, 60, (40, 8, 8, 3)) + 90 * codes[:, None, None, None]).astype(
        np.uint8
    )
    labels = np.where(np.arange(40) % 5 == 0, -1, codes)
    X = extract((images, labels), name="x", model=f"{MODELS}:small_input", store=tmp_path / "s", target_size=8)
    with pytest.raises(ValueError, match=r"y has no label .* in 8 of 40 rows, .*X\[X.labelled\]"):
        Head2ToeClassifier().fit(X, X.y)
    labelled = X[X.labelled]
    model = Head2ToeClassifier(alpha=0.2).fit(labelled, labelled.y)
    assert model.classes_.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"y has no label .* in 8 of 40 rows, .*X\[X.labelled\]"):
        model.score(X, X.y)
    assert model.score(labelled, labelled.y) > 0.9
    np.testing.assert_array_equal(Head2ToeClassifier(alpha=0.2).fit(labelled, X.y[X.labelled]).coef_, model.coef_)


def test_other_features_than_those_of_the_fit_are_refused(stored):
    model = Head2ToeClassifier().fit(stored[:, :-1], stored.y)
    with pytest.raises(ValueError, match=r"feature 0 is 'layers.0.conv1:in\[1\]', expected 'layers.0.conv1:in\[0\]'"):
        model.predict(stored[:, 1:])


def test_searches_and_folds_in_other_processes_give_the_same(stored):
    y = stored.y
    search = GridSearchCV(Head2ToeClassifier(), {"alpha": [0.1, 0.5]}, cv=3, n_jobs=1, error_score="raise")
    parallel = GridSearchCV(Head2ToeClassifier(), {"alpha": [0.1, 0.5]}, cv=3, n_jobs=2, error_score="raise")
    scores = search.fit(stored, y).cv_results_["mean_test_score"]
    np.testing.assert_array_equal(parallel.fit(stored, y).cv_results_["mean_test_score"], scores)
    np.testing.assert_array_equal(
        cross_val_predict(search.best_estimator_, stored, y, cv=3),
        cross_val_predict(search.best_estimator_, np.asarray(stored), y, cv=3),
    )


def test_a_fitted_model_holds_no_store(stored):
    model = Head2ToeClassifier().fit(stored, stored.y)
    data = pickle.dumps(model)
    assert b"h2t_store" not in data
    assert b"s.zarr" not in data
    np.testing.assert_array_equal(pickle.loads(data).predict(stored), model.predict(stored))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"normalization": "layer", "keep_fraction": 0.2},
        {"keep_fraction": 1.0},
        {"head": "path", "alpha": 0.2},
    ],
)
def test_a_target_size_among_several_is_that_size_alone(both, params):
    names = [layer.name for layer in both.layers if 4 in layer.target_sizes]
    model = Head2ToeClassifier(layers=names, **params).fit(both, both.y)
    pooled, columns = both.select_target_size(4), columns_of(both, 4)
    alone = Head2ToeClassifier(**params).fit(pooled, both.y)
    assert 0 < len(columns) < both.shape[1]
    np.testing.assert_array_equal(model.selected_features_, columns[alone.selected_features_])
    np.testing.assert_array_equal(model.feature_scores_[columns], alone.feature_scores_)
    assert model.feature_scores_.sum() == pytest.approx(alone.feature_scores_.sum())
    np.testing.assert_allclose(model.predict_proba(both), alone.predict_proba(pooled), rtol=1e-6, atol=1e-9)
    summary, expected = model.layer_summary(), alone.layer_summary()
    assert summary["n_selected"][summary["n_selected"] > 0].to_dict() == {
        name: count for name, count in expected["n_selected"].items() if count
    }


@pytest.mark.parametrize("refit", ["mixture", "best"])
def test_a_search_tries_every_target_size_by_itself(both, solved_ratios, refit):
    grid = dict(
        alphas=(0.5, 0.1), keep_fractions=(None, 0.3), Cs=(0.01, 1.0), cv=3, refit=refit, scoring="neg_log_loss"
    )
    search = Head2ToeClassifierCV(**grid).fit(both, both.y)
    fitted = {repr(one.layers) for one in [*search.estimators_, search.best_estimator_] if one.keep_fraction != 1.0}
    assert len(solved_ratios) == 3 * 2 + len(fitted)
    parts = [both.select_target_size(size) for size in (4, 64)]
    apart = [Head2ToeClassifierCV(**grid).fit(part, both.y) for part in parts]
    expected = {}
    for part, one in zip(parts, apart, strict=True):
        every = [layer.name for layer in part.layers]
        for params, *values in zip(
            one.cv_results_["params"],
            one.cv_results_["mean_test_score"],
            one.cv_results_["mean_n_features"],
            strict=True,
        ):
            expected[repr(sorted({"layers": every, **params}.items()))] = values
    results = search.cv_results_
    names = [repr(sorted(params.items())) for params in results["params"]]
    # Layers that both sizes share are tried once.
    assert names == list(expected)
    together = np.array(list(expected.values()))
    np.testing.assert_allclose(results["mean_test_score"], together[:, 0], rtol=1e-6)
    np.testing.assert_allclose(results["mean_n_features"], together[:, 1])
    best = max(range(2), key=lambda i: apart[i].cv_results_["mean_test_score"][apart[i].best_index_])
    every = [layer.name for layer in parts[best].layers]
    assert search.best_params_ == {"layers": every, **apart[best].best_params_}
    alone = Head2ToeClassifier(**search.best_params_).fit(both, both.y)
    np.testing.assert_array_equal(search.best_estimator_.selected_features_, alone.selected_features_)
    np.testing.assert_array_equal(search.best_estimator_.feature_layers_, alone.feature_layers_)
    np.testing.assert_allclose(search.best_estimator_.predict_proba(both), alone.predict_proba(both), atol=1e-4)
    mixed = sum(w * one.decision_function(both) for w, one in zip(search.weights_, search.estimators_, strict=True))
    mixed = mixed + search.offset_
    np.testing.assert_allclose(search.decision_function(both), mixed, atol=1e-9)
    assert search.feature_scores_.shape == (both.shape[1],)


def sizes_of(X):
    return {layer.name: layer.target_sizes for layer in X.layers}


def test_what_a_search_shows_is_the_target_size_it_chose(both):
    pytest.importorskip("matplotlib").use("Agg")
    grid = dict(alphas=(0.5, 0.3), keep_fractions=(None, 0.3), Cs=(0.01, 1.0), cv=3, refit="best")
    search = Head2ToeClassifierCV(**grid).fit(both, both.y)
    display, best = Head2ToePathDisplay.from_estimator(search), search.best_params_
    column = [0.5, 0.3].index(best.get("alpha", 0.5))
    assert display.mean_scores[display.best_line][column] == search.best_score_
    sizes = [size for size in (4, 64) if all(size in sizes_of(both)[name] for name in best["layers"])]
    pooled = both.select_target_size(sizes[0])
    alone = Head2ToeClassifierCV(**grid).fit(pooled, both.y)
    np.testing.assert_allclose(display.n_features, Head2ToePathDisplay.from_estimator(alone).n_features)
    names = [layer.name for layer in pooled.layers]
    assert f"layers {names[0]} to {names[-1]}" in display.ax_[0].get_title(loc="left")


def test_sizes_that_pool_alike_are_one(extracted):
    alike = extracted(64, 65)
    assert alike.shape == extracted(64).shape
    search = Head2ToeClassifierCV(alphas=(0.5,), keep_fractions=(None,), Cs=(1.0,), last_layers=(), cv=2)
    search.set_params(single_layers=0).fit(alike, alike.y)
    assert len(search.cv_results_["params"]) == 1
    assert "layers" not in search.best_params_


def test_a_size_that_some_layers_lack_is_not_tried(both):
    """What two sizes share is left where one of them is taken."""
    one = both.select_target_size(64)
    assert any(4 in layer.target_sizes for layer in one.layers)
    search = Head2ToeClassifierCV(alphas=(0.5,), keep_fractions=(None,), Cs=(1.0,), last_layers=(), cv=2)
    search.set_params(single_layers=0).fit(one, both.y)
    assert len(search.cv_results_["params"]) == 1
    assert "layers" not in search.best_params_


def test_columns_of_several_sizes_have_names_and_norms_of_their_own(both):
    assert len(set(both.feature_names)) == both.shape[1]
    shuffled = both[:, np.random.default_rng(0).permutation(both.shape[1])]
    for matrix in (both, shuffled):
        layers = layer_index(matrix)
        of_values = inverse_layer_norms(np.asarray(matrix), layers)
        np.testing.assert_allclose(inverse_layer_norms(matrix, layers), of_values, rtol=1e-5)
