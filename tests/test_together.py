"""Stored features through the classifier: what neither half can show alone."""

import pickle

import numpy as np
import pytest
from conftest import MODELS
from sklearn.model_selection import GridSearchCV, cross_val_predict

from estimators import Head2ToeClassifier
from h2t_store import extract


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Features of 120 images whose classes differ in brightness and in one colour."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    images = rng.integers(0, 120, (120, 8, 8, 3)) + 40 * y[:, None, None, None]
    images[..., 0] += 30 * (y[:, None, None] == 1)
    path = tmp_path_factory.mktemp("together") / "s.zarr"
    return extract((images.astype(np.uint8), y), model=f"{MODELS}:small_input", store=path, name="x", target_size=64)


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
