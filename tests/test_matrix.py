import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.utils import _safe_indexing
from tiny_stores import write_store

from h2t_store import extract
from h2t_store.errors import StoreError
from h2t_store.matrix import FeatureMatrix, open_features
from h2t_store.storage.layout import Layer
from h2t_store.storage.store import FeatureStore

LAYERS = (
    Layer("stem", 0, 7, (7, 1, 1)),
    Layer("layer1.0.conv1:in", 7, 2307, (23, 10, 10)),
    Layer("layer1.0", 2307, 2310, (3, 2, 2)),
    Layer("head", 2310, 2320, (10,)),
)
N, D, ROWS = 50, 2320, 16


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[FeatureMatrix, np.ndarray]:
    values = np.random.default_rng(0).normal(size=(N, D)).astype(np.float16)
    path = write_store(tmp_path_factory.mktemp("store") / "s.zarr", LAYERS, values, np.arange(N) % 3)
    return open_features(path, "x"), values.astype(np.float32)


def test_shape_type_and_content(stored):
    matrix, values = stored
    assert (matrix.shape, matrix.ndim, len(matrix), matrix.dtype) == ((N, D), 2, N, np.float32)
    assert matrix.nbytes == values.nbytes
    assert np.asarray(matrix).dtype == np.float32
    np.testing.assert_array_equal(np.asarray(matrix), values)
    assert np.asarray(matrix, dtype=np.float64).dtype == np.float64
    assert matrix.layers == LAYERS
    assert matrix.stored_dtype == np.float16
    assert matrix.classes == ("a", "b", "c")
    assert repr(matrix) == "FeatureMatrix('x', 50 x 2320, 4 layers)"


def indices(n: int):
    integers = st.lists(st.integers(-n, n - 1), min_size=1, max_size=30)
    return st.one_of(
        st.slices(n),
        integers,
        integers.map(np.array),
        st.lists(st.booleans(), min_size=n, max_size=n).map(np.array),
    )


@settings(deadline=None, max_examples=60)
@given(rows=indices(N), columns=indices(D), again=indices(3))
def test_indexing_is_numpys(stored, rows, columns, again):
    matrix, values = stored
    view, expected, y = (
        matrix[rows, columns],
        values[rows][:, columns],
        np.array(["a", "b", "c"])[np.arange(N) % 3][rows],
    )
    if len(expected) >= 3:
        view, expected, y = view[:3][again], expected[:3][again], y[:3][again]
    assert view.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(view), expected)
    np.testing.assert_array_equal(view.y, y)


@settings(deadline=None, max_examples=60)
@given(rows=indices(N), columns=indices(D), max_bytes=st.integers(1, 400_000))
def test_row_blocks_hold_every_row_once_and_end_where_chunks_do(stored, rows, columns, max_bytes):
    matrix, values = stored
    view, expected, chunk = matrix[rows, columns], values[rows][:, columns], np.arange(N)[rows] // ROWS
    at = 0
    for taken, block in view.row_blocks(max_bytes):
        assert taken.start == at < taken.stop
        at = taken.stop
        np.testing.assert_array_equal(block, expected[taken])
        assert at == len(expected) or chunk[at - 1] != chunk[at]
        assert block.nbytes <= max_bytes or len(set(chunk[taken])) == 1
    assert at == len(expected)


@settings(deadline=None, max_examples=60)
@given(rows=indices(N), columns=indices(D), max_bytes=st.integers(20_000, 400_000))
def test_column_blocks_hold_every_column_once_within_the_limit(stored, rows, columns, max_bytes):
    matrix, values = stored
    view, expected = matrix[rows, columns], values[rows][:, columns]
    got = np.full(expected.shape, np.nan, dtype=np.float32)
    for at, block in view.column_blocks(max_bytes):
        assert np.isnan(got[:, at]).all()
        assert block.dtype == np.float32
        assert block.nbytes <= max_bytes
        got[:, at] = block
    np.testing.assert_array_equal(got, expected)


def test_a_column_block_holds_at_least_one_column(stored):
    matrix, values = stored
    blocks = [block for _, block in matrix[:, 5:9].column_blocks(1)]
    assert [block.shape for block in blocks] == [(N, 1)] * 4
    np.testing.assert_array_equal(np.hstack(blocks), values[:, 5:9])


def test_column_blocks_end_at_chunk_borders_where_they_can(stored):
    matrix, _ = stored
    width = LAYERS[1].chunk_width
    starts = [at.start for at, _ in matrix.column_blocks(N * 4 * (width + 10))]
    assert starts == [0, 7 + width, 7 + 2 * width, 2310]


def test_labels_identifiers_and_names_follow_the_selection(stored):
    matrix, _ = stored
    view = matrix[[5, -1, 5], [2308, 0, 8]]
    assert view.y.tolist() == ["c", "b", "c"]
    assert view.codes.tolist() == [2, 1, 2]
    assert view.sample_ids.tolist() == ["i5", "i49", "i5"]
    assert view.feature_names.tolist() == ["layer1.0[1]", "stem[0]", "layer1.0.conv1:in[1]"]
    assert [(layer.name, layer.start, layer.stop) for layer in view.layers] == [
        ("layer1.0", 0, 1),
        ("stem", 1, 2),
        ("layer1.0.conv1:in", 2, 3),
    ]


def test_layer_norms_are_those_of_the_whole_layer_and_follow_the_layers(stored):
    matrix, values = stored
    norms = np.stack([np.linalg.norm(values[:, a:b], axis=1) for _, a, b, *_ in LAYERS], axis=1)
    np.testing.assert_allclose(matrix.layer_norms(), norms, rtol=1e-6)
    view = matrix[[3, 1], [2315, 0, 2308, 2309]]
    assert [layer.name for layer in view.layers] == ["head", "stem", "layer1.0"]
    np.testing.assert_allclose(view.layer_norms(), norms[[3, 1]][:, [3, 0, 2]], rtol=1e-6)


def test_layers_are_selected_by_globs(stored):
    matrix, values = stored
    view = matrix.select_layers(["layer1.*", "head"])
    np.testing.assert_array_equal(np.asarray(view), values[:, 7:])
    assert [layer.name for layer in view.layers] == ["layer1.0.conv1:in", "layer1.0", "head"]
    assert view.select_layers("head").shape == (N, 10)
    with pytest.raises(StoreError, match="no layer matches 'heat' \\(did you mean 'head'\\?\\)"):
        matrix.select_layers("heat")


def test_a_layer_is_selected_by_its_name_even_if_that_holds_a_glob(tmp_path):
    layers = (Layer("a[1]", 0, 3, (3,)), Layer("a1", 3, 5, (2,)))
    values = np.arange(20, dtype=np.float32).reshape(4, 5)
    matrix = open_features(write_store(tmp_path / "s.zarr", layers, values, np.zeros(4, np.int64)), "x")
    np.testing.assert_array_equal(np.asarray(matrix.select_layers("a[1]")), values[:, :3])
    np.testing.assert_array_equal(np.asarray(matrix.select_layers("a[0-9]")), values[:, 3:])


def test_empty_selections(stored):
    for view in (stored[0][:, []], stored[0][[]]):
        assert np.asarray(view).shape == view.shape
        assert 0 in view.shape
        assert view.layer_norms().shape == (view.shape[0], len(view.layers))
    assert repr(stored[0][:, []]) == "FeatureMatrix('x', 50 x 0, 0 layers)"
    with pytest.raises(StoreError, match="no pattern given"):
        stored[0].select_layers([])
    with pytest.raises(IndexError, match="not by 3 indices"):
        stored[0][(0, 1, 2)]


def test_one_index_reads_what_it_reads_in_numpy(stored):
    matrix, values = stored
    keys = [0, -1, np.int64(3), (2, 5), (-1, -1), (slice(None), 7), (slice(2, 9), -1), ([4, 1], 3), (0, [80, 1])]
    for key in [*keys, (..., 0), (1, ...), (3, np.arange(D) % 2 == 0)]:
        one, expected = matrix[key], values[key]
        assert type(one) is type(expected)
        np.testing.assert_array_equal(one, expected)


def test_rows_are_iterated(stored):
    matrix, values = stored
    for view, expected in ((matrix, values), (matrix[[40, 3, 3], 5:9], values[[40, 3, 3], 5:9]), (matrix[[]], ())):
        rows = list(view)
        assert len(rows) == len(expected)
        np.testing.assert_array_equal(np.reshape(rows, np.shape(expected)), expected)


def test_other_libraries_take_it_for_an_array(stored):
    matrix, values = stored
    view, expected = matrix[::7, [3, 2309, 11]], values[::7][:, [3, 2309, 11]]
    np.testing.assert_array_equal(torch.as_tensor(view).numpy(), expected)
    np.testing.assert_array_equal(np.vstack([view, view]), np.vstack([expected, expected]))
    np.testing.assert_array_equal(np.asarray(pd.DataFrame(view)), expected)
    frame = view.to_pandas()
    pd.testing.assert_frame_equal(
        frame,
        pd.DataFrame(
            expected,
            index=pd.Index([f"i{i}" for i in range(0, N, 7)], name="sample_id"),
            columns=view.feature_names,
        ),
    )
    assert frame.columns.tolist() == ["stem[3]", "layer1.0[2]", "layer1.0.conv1:in[4]"]
    for indices, axis in (([3, 1], 0), (np.arange(len(view)) > 2, 0), (2, 0), ([1], 1), (0, 1)):
        np.testing.assert_array_equal(
            np.asarray(_safe_indexing(view, indices, axis=axis)), _safe_indexing(expected, indices, axis=axis)
        )


def test_what_only_arrays_can_do_says_how_to_get_one(stored):
    for name in ("T", "mean", "astype"):
        with pytest.raises(AttributeError, match=rf"no attribute '{name}': read the features first, np.asarray\(X\)"):
            getattr(stored[0], name)
    with pytest.raises(AttributeError, match=r"no attribute 'iloc'$"):
        stored[0].iloc  # noqa: B018


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (None, TypeError),
        (1.5, TypeError),
        (True, TypeError),
        ("head", TypeError),
        (N, IndexError),
        (-N - 1, IndexError),
        ([[1, 2]], TypeError),
        ([0.5], TypeError),
        ([N], IndexError),
        ([-N - 1], IndexError),
        ([True], IndexError),
        (("a",), TypeError),
    ],
)
def test_other_indices_are_refused(stored, index, error):
    with pytest.raises(error, match=r"rows (index|mask)"):
        stored[0][index, :]


def test_pickles_are_small_and_open_the_store_again(stored):
    matrix, values = stored
    rng = np.random.default_rng(0)
    for view, expected in (
        (matrix, values),
        (matrix[10:40, ::3], values[10:40, ::3]),
        (matrix[rng.permutation(N)], None),
        (matrix[:, rng.permutation(D)[:500]], None),
    ):
        data = pickle.dumps(view)
        assert len(data) < 4000
        copy = pickle.loads(data)
        np.testing.assert_array_equal(np.asarray(copy), np.asarray(view) if expected is None else expected)
        np.testing.assert_array_equal(copy.y, view.y)


def test_a_pickle_notices_that_its_extraction_was_replaced(tmp_path: Path):
    def write(model: str) -> None:
        values, y = np.ones((2, 7), np.float32), np.zeros(2, np.int64)
        write_store(tmp_path / "s", LAYERS[:1], values, y, inputs={"model": model})

    write("one")
    data = pickle.dumps(open_features(tmp_path / "s", "x"))
    FeatureStore(tmp_path / "s").remove("x")
    with pytest.raises(StoreError, match="no extraction 'x'"):
        np.asarray(pickle.loads(data))
    write("two")
    with pytest.raises(StoreError, match="was extended or replaced"):
        np.asarray(pickle.loads(data))


def test_scikit_learn_takes_it_for_an_array(stored):
    matrix, values = stored
    y = matrix.y
    search = GridSearchCV(
        make_pipeline(SelectKBest(k=20), LogisticRegression()), {"logisticregression__C": [0.01, 1]}, cv=3, n_jobs=1
    )
    lazy, dense = search.fit(matrix, y).cv_results_, search.fit(values, y).cv_results_
    np.testing.assert_allclose(lazy["mean_test_score"], dense["mean_test_score"])
    train, test, y_train, _ = train_test_split(matrix, y, random_state=0)
    assert isinstance(train, FeatureMatrix)
    np.testing.assert_array_equal(train.y, y_train)
    np.testing.assert_array_equal(np.asarray(test), train_test_split(values, random_state=0)[1])


def small(data, tmp_path, name):
    return extract(data, model=f"{MODELS}:small_input", store=tmp_path / "s", name=name, target_size=8)


@pytest.mark.parametrize("values", [["3", "ant", "bée", "0"], [7, 0, 3, 1]])
def test_labels_are_those_of_the_data_whatever_classes_it_has(tmp_path, images, values):
    labels = np.array(values)[np.arange(40) % 4]
    for name, rows in (("all", slice(None)), ("some", labels != values[1])):
        matrix = small((images[rows], labels[rows]), tmp_path, name)
        assert matrix.y.dtype == labels.dtype
        assert matrix.y.tolist() == labels[rows].tolist()
        assert [matrix.classes[code] for code in matrix.codes] == labels[rows].tolist()
        assert matrix.labelled.all()
        assert matrix[[]].y.dtype == labels.dtype


@pytest.mark.parametrize("classes", [("cat", "dog"), (0, 1)])
def test_rows_without_a_label_have_none_and_can_be_left_out(tmp_path, classes):
    values, y = np.ones((4, 7), np.float32), np.array([1, -1, 0, 1])
    write_store(tmp_path / "s", LAYERS[:1], values, y, classes=classes)
    matrix = open_features(tmp_path / "s", "x")
    assert matrix.y.dtype == object
    assert matrix.y.tolist() == [classes[1], None, classes[0], classes[1]]
    assert matrix.codes.tolist() == [1, -1, 0, 1]
    assert matrix.labelled.tolist() == [True, False, True, True]
    left = matrix[matrix.labelled]
    assert left.sample_ids.tolist() == ["i0", "i2", "i3"]
    assert left.y.dtype == np.array(classes).dtype
    assert left.y.tolist() == [classes[1], classes[0], classes[1]]
    assert matrix[~matrix.labelled].y.tolist() == [None]


def test_images_without_labels_are_all_unlabelled(tmp_path, images):
    for labels in (None, np.full(40, -1)):
        matrix = small((images, labels), tmp_path, str(labels is None))
        assert matrix.classes == ()
        assert matrix.y.tolist() == [None] * 40


def test_identifiers_are_groups_for_scikit_learn(tmp_path, images):
    matrix = small((images, np.arange(40) % 4), tmp_path, "x")
    assert matrix.sample_ids.dtype.kind == "U"
    folds = list(GroupKFold(4).split(matrix, matrix.y, groups=matrix.sample_ids))
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(40))
