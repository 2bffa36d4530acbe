import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from tiny_stores import write_store

from h2t_store import FeatureMatrix, open_features
from h2t_store.errors import H2TError
from h2t_store.export import EXPORTS, export
from h2t_store.storage.layout import Layer

LAYERS = (Layer("stem", 0, 6, (6, 4, 4)), Layer("head", 6, 11, (5,)))
SMALL = {"block_bytes": 1000}  # three blocks of rows


def stored(path, y, classes) -> FeatureMatrix:
    values = np.random.default_rng(0).normal(size=(40, 11)).astype(np.float16)
    return open_features(write_store(path, LAYERS, values, y, classes=classes), "x")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("store") / "s.zarr", np.arange(40) % 2, ("ant", "bée"))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("store") / "s.zarr", np.full(40, -1), ())


def test_npy_with_labels_beside_it(tmp_path, matrix):
    export(matrix, tmp_path / "out.npy", **SMALL)
    values = np.load(tmp_path / "out.npy")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.asarray(matrix))
    with open(tmp_path / "out.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["sample_id", "y", "label"]
    assert rows[2] == ["i1", "1", "bée"]
    assert len(rows) == 41


def test_parquet_has_a_column_for_each_feature(tmp_path, matrix):
    export(matrix, tmp_path / "out.parquet", **SMALL)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["sample_id", "label", *matrix.feature_names]
    assert table["label"].to_pylist() == ["ant", "bée"] * 20
    read = np.stack([table[name].to_numpy() for name in matrix.feature_names], axis=1)
    np.testing.assert_array_equal(read, np.asarray(matrix))


def test_safetensors(tmp_path, matrix):
    export(matrix, tmp_path / "out.safetensors", **SMALL)
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("X"), np.asarray(matrix))
        np.testing.assert_array_equal(file.get_tensor("y"), matrix.codes)
        assert json.loads(file.metadata()["classes"]) == ["ant", "bée"]
        assert json.loads(file.metadata()["feature_names"]) == matrix.feature_names.tolist()
        assert json.loads(file.metadata()["sample_ids"])[3] == "i3"


@pytest.mark.parametrize("suffix", EXPORTS)
def test_selections_and_unlabelled_rows(tmp_path, unlabelled, suffix):
    view, path, steps = unlabelled[5:9].select_layers("head"), tmp_path / f"out{suffix}", []
    export(view, path, lambda *step: steps.append(step))
    assert steps[-1] == (4, 4)
    if suffix == ".npy":
        np.testing.assert_array_equal(np.load(path), np.asarray(view))
    elif suffix == ".parquet":
        assert pq.read_table(path)["label"].to_pylist() == [""] * 4
    else:
        with safe_open(path, "numpy") as file:
            assert file.get_tensor("X").shape == (4, 5)


def test_what_exists_is_not_overwritten_and_other_kinds_are_refused(tmp_path, matrix):
    (tmp_path / "out.npy").write_text("precious")
    with pytest.raises(H2TError, match="exists: choose another name"):
        export(matrix, tmp_path / "out.npy")
    assert (tmp_path / "out.npy").read_text() == "precious"
    with pytest.raises(H2TError, match=r"accepted are names that end in \.npy, \.parquet, \.safetensors"):
        export(matrix, tmp_path / "out.csv")
    with pytest.raises(H2TError, match="cannot be written"):
        export(matrix, tmp_path / "nowhere" / "out.npy")


def test_a_failed_export_leaves_nothing(tmp_path, matrix, monkeypatch):
    def failing(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(matrix, tmp_path / "out.npy", failing)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(FeatureMatrix, "sample_ids", property(failing))  # fails in the table of labels
    with pytest.raises(KeyboardInterrupt):
        export(matrix, tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == []
