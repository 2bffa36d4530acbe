"""How often a fit, a search and an export read what is stored."""

from collections import Counter

import numpy as np
import pytest
from joblib import parallel_config
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from tiny_stores import write_store

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector, PublishedHead2Toe
from estimators.held import HeldFeatures, hold, hold_for_folds
from estimators.training import check_training
from h2t_store import open_features
from h2t_store.export import EXPORTS, export
from h2t_store.storage.extraction import Extraction
from h2t_store.storage.layout import Layer

N = 60
LAYERS = (Layer("a", 0, 30, (30,)), Layer("b", 30, 1330, (1300,)), Layer("c", 1330, 1340, (10,)))
SEARCH = Head2ToeClassifierCV(alphas=(0.5, 0.3), keep_fractions=(None, 1.0), Cs=(0.1, 1.0), single_layers=2, cv=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rng = np.random.default_rng(0)
    y = np.arange(N) % 3
    values = rng.normal(size=(N, LAYERS[-1].stop)).astype(np.float16)
    values[:, 28:33] += (2 * rng.normal(size=(3, 5))[y]).astype(np.float16)
    return write_store(tmp_path_factory.mktemp("reading") / "s.zarr", LAYERS, values, y)


@pytest.fixture
def features(path):
    return open_features(path, "x")


@pytest.fixture
def read(monkeypatch):
    """How often each chunk was read."""
    counts, reads = Counter(), Extraction.features

    def counted(self, layer, block, column):
        counts[layer.name, block, column] += 1
        return reads(self, layer, block, column)

    monkeypatch.setattr(Extraction, "features", counted)
    return counts


def each_once(read):
    return len(read) == 4 * (1 + 2 + 1) and set(read.values()) == {1}


Y = np.arange(N) % 3


@pytest.mark.parametrize(
    "estimator",
    [
        Head2ToeClassifier(alpha=0.3),
        Head2ToeClassifier(alpha=0.3, head="path"),
        Head2ToeClassifier(alpha=0.3, keep_fraction=1.0, normalization="layer+standard"),
        PublishedHead2Toe(max_iter=5, random_state=0),
        Head2ToeClassifier(layers="[abc]", keep_fraction=1.0, normalization="layer"),
        Head2ToeSelector(alpha=0.3),
        SEARCH,
        Head2ToeClassifierCV(**{**SEARCH.get_params(), "normalizations": ("layer", None)}),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_fit_reads_each_chunk_once(features, read, estimator):
    estimator.fit(features, Y)
    assert each_once(read)


def test_folds_and_scorers_read_nothing(features, read):
    def scoring(estimator, X, y):
        assert np.asarray(X).shape == X.shape == (20, 1340)
        assert len(X.sample_ids) == 20
        return estimator.score(X, y)

    with parallel_config(backend="threading"):
        Head2ToeClassifierCV(**{**SEARCH.get_params(), "n_jobs": 2, "scoring": scoring}).fit(features, Y)
    assert each_once(read)


def test_processes_share_what_was_read(path, features, read, monkeypatch):
    load, there, away = HeldFeatures.load, path / "x/features", path / "x/away"
    expected = SEARCH.fit(features, Y).cv_results_["mean_test_score"]
    read.clear()

    def vanishing(self):
        values = load(self)
        if there.exists():
            there.rename(away)
        return values

    monkeypatch.setattr(HeldFeatures, "load", vanishing)
    try:
        with parallel_config(backend="loky"):
            model = Head2ToeClassifierCV(**{**SEARCH.get_params(), "n_jobs": 2}).fit(features, Y)
    finally:
        away.rename(there)
    assert each_once(read)
    np.testing.assert_allclose(model.cv_results_["mean_test_score"], expected)


def test_what_is_read_once_gives_what_arrays_give(features):
    search = Head2ToeClassifierCV(**{**SEARCH.get_params(), "single_layers": 0, "last_layers": ()})
    lazy, dense = (clone(search).fit(X, Y) for X in (features, np.asarray(features)))
    for name in ("mean_test_score", "mean_n_features"):
        np.testing.assert_allclose(lazy.cv_results_[name], dense.cv_results_[name])
    np.testing.assert_allclose(lazy.predict_proba(features), dense.predict_proba(np.asarray(features)), atol=1e-6)


def test_a_kept_path_needs_the_selected_columns_only(features, read, tmp_path):
    grid = {"C": [0.1, 1.0, 10.0]}
    Head2ToeClassifier(alpha=0.8, memory=tmp_path).fit(features, Y)
    assert each_once(read)
    read.clear()
    model = Head2ToeClassifier(alpha=0.8, C=3.0, memory=tmp_path).fit(features, Y)
    names = {features.layers[layer].name for layer in model.feature_layers_[model.selected_features_]}
    assert {name for name, _, _ in read} == names != {"a", "b", "c"}
    read.clear()
    GridSearchCV(model, grid, cv=2, refit=False).fit(features, Y)
    # Its rows are in both folds, each of which solves one path.
    assert read["c", 1, 0] == 2


@pytest.mark.parametrize("max_memory", ["100kB", "1MB", "67.7MB"])
def test_what_does_not_fit_is_not_held(features, max_memory):
    model = Head2ToeClassifier(alpha=0.3, tol=1e-6).fit(features, Y)
    training = check_training(Head2ToeClassifier(), features, Y, None, None)
    held, left = hold(training, max_memory, "auto")
    size = features.nbytes
    assert isinstance(held.features, HeldFeatures) == (max_memory == "1MB")
    assert left == (10**6 - size if max_memory == "1MB" else max_memory)
    other = Head2ToeClassifier(alpha=0.3, tol=1e-6, max_memory=max_memory).fit(features, Y)
    np.testing.assert_array_equal(other.selected_features_, model.selected_features_)
    np.testing.assert_allclose(other.predict_proba(features), model.predict_proba(features), atol=1e-3)


@pytest.mark.parametrize(("backend", "copies"), [("loky", 2), ("threading", 1)])
@pytest.mark.parametrize(("n_jobs", "n_folds", "at_once"), [(2, 5, 2), (4, 3, 3), (1, 5, 1)])
def test_folds_at_the_same_time_share_the_memory(features, backend, copies, n_jobs, n_folds, at_once):
    training = check_training(Head2ToeClassifier(), features, Y, None, None)
    with parallel_config(backend=backend):
        _, left, of_fold = hold_for_folds(training, "900MB", "cpu", n_jobs, n_folds)
        dense = check_training(Head2ToeClassifier(), np.asarray(features), Y, None, None)
        _, _, of_dense = hold_for_folds(dense, "900MB", "cpu", n_jobs, n_folds)
    assert left == 900_000_000 - features.nbytes * (copies if at_once > 1 else 1)
    assert of_fold == left // at_once
    assert of_dense == (900_000_000 // at_once if at_once > 1 else "900MB")


def test_held_features_are_indexed_like_stored_ones(features):
    held = HeldFeatures(features)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(N)[:20], np.sort(rng.permutation(1340)[:300])
    for load in (False, True):
        if load:
            held.load()
        for key in (
            rows,
            rows.tolist(),
            slice(3, 40, 2),
            np.arange(N) % 3 == 0,
            (rows, columns),
            (slice(None), columns),
            (..., slice(20, 40)),
        ):
            ours, theirs = held[key], features[key]
            again = (slice(1, 9), np.arange(ours.shape[1])[::-2])
            for view, stored in ((ours, theirs), (ours[again], theirs[again])):
                assert view.shape == stored.shape
                assert view.layers == stored.layers
                assert view.fingerprint == stored.fingerprint
                np.testing.assert_array_equal(view, np.asarray(stored))
                np.testing.assert_array_equal(view.layer_norms(), stored.layer_norms())
                gathered = np.full(view.shape, np.nan, dtype=np.float32)
                for at, block in view.column_blocks(1000):
                    gathered[:, at] = block
                np.testing.assert_array_equal(gathered, np.asarray(stored))


@pytest.mark.parametrize("suffix", EXPORTS)
def test_an_export_reads_each_chunk_once(features, read, suffix, tmp_path):
    export(features[::2], tmp_path / f"x{suffix}", block_bytes=40_000)  # half a block of rows
    assert each_once(read)
