"""Labels in whatever container, and those that are missing."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import scipy.sparse
import torch
from _estimator_data import FakeFeatures

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector, group_lasso_path

K = np.arange(30) % 3
NAMES = np.array(["ant", "bee", "cow"])[K]
X = np.random.default_rng(0).normal(size=(30, 4)) + np.c_[2 * (K == 1), 2 * (K == 2), K, K]
SEARCH = Head2ToeClassifierCV(alphas=(0.3,), keep_fractions=(None,), Cs=(1.0,), cv=2)
STRINGS = {
    "str": NAMES,
    "objects": NAMES.astype(object),
    "StringDType": NAMES.astype(np.dtypes.StringDType()),
    "list": NAMES.tolist(),
    "Series": pd.Series(NAMES),
    "category": pd.Series(NAMES, dtype="category"),
    "pyarrow strings": pd.Series(NAMES, dtype="string[pyarrow]"),
    "polars": pl.Series(NAMES),
    "Arrow": pa.array(NAMES.tolist()),
}
NUMBERS = {
    "int": K,
    "objects": K.astype(object),
    "list": K.tolist(),
    "Int64": pd.Series(K, dtype="Int64"),
    "polars": pl.Series(K),
    "tensor": torch.tensor(K),
}


def with_missing(value, at=(4, 11)):
    return [value if row in at else name for row, name in enumerate(NAMES.tolist())]


MISSING = {
    "None": np.array(with_missing(None), dtype=object),
    "None in a list": with_missing(None),
    "NaN": np.array(with_missing(np.nan), dtype=object),
    "NaN in a list": with_missing(np.nan),
    "NaN among numbers": np.where(np.isin(np.arange(30), (4, 11)), np.nan, K),
    "StringDType": np.array(with_missing(None), dtype=np.dtypes.StringDType(na_object=None)),
    "NA": pd.Series(with_missing(None), dtype="string"),
    "category": pd.Series(with_missing(None), dtype="category"),
    "Int64": pd.Series(np.where(np.isin(np.arange(30), (4, 11)), None, K), dtype="Int64"),
    "polars": pl.Series(with_missing(None)),
}


@pytest.mark.parametrize(
    ("y", "classes"),
    [*((y, ["ant", "bee", "cow"]) for y in STRINGS.values()), *((y, [0, 1, 2]) for y in NUMBERS.values())],
    ids=[*STRINGS, *(f"numbers: {name}" for name in NUMBERS)],
)
def test_labels_come_in_any_container(y, classes):
    model = Head2ToeClassifier(alpha=0.3).fit(X, y)
    assert model.classes_.dtype == np.array(classes).dtype
    assert model.classes_.tolist() == classes
    accuracy = np.mean(model.predict(X) == np.array(classes)[K])
    assert model.score(X, y) == accuracy > 0.6
    assert group_lasso_path(X, y, n_alphas=1).classes.tolist() == classes


@pytest.mark.parametrize("y", MISSING.values(), ids=MISSING)
def test_rows_without_a_label_are_refused(y):
    def refused():
        return pytest.raises(
            ValueError, match=r"y has no label .* in 2 of 30 rows, the first of them row 4: .*X.labelled"
        )

    for estimator in (Head2ToeClassifier(), Head2ToeSelector(), SEARCH):
        for features in (X, FakeFeatures(X, (2, 2))):
            with refused():
                estimator.fit(features, y)
    with refused():
        group_lasso_path(X, y)


def test_scores_are_of_labelled_rows_only():
    for model in (Head2ToeClassifier(alpha=0.3).fit(X, NAMES), SEARCH.fit(X, NAMES.astype(np.dtypes.StringDType()))):
        assert model.score(X, NAMES.astype(np.dtypes.StringDType())) == model.score(X, NAMES) > 0.6
        for y in (MISSING["None"], MISSING["NaN in a list"]):
            with pytest.raises(ValueError, match="y has no label"):
                model.score(X, y)


def test_strings_and_numbers_are_not_mixed():
    with pytest.raises(ValueError, match="y must hold strings or numbers, not both, got 'ant' and 3"):
        Head2ToeClassifier().fit(X, ["ant", 3, "ant"] * 10)


def test_sparse_features_are_refused():
    for sparse in (scipy.sparse.csr_matrix(X), scipy.sparse.coo_array(X)):
        with pytest.raises(TypeError, match=r"X is sparse \(\w+\), but dense data is required: pass X.toarray"):
            group_lasso_path(sparse, NAMES)
        with pytest.raises(TypeError, match="dense data is required"):
            Head2ToeClassifier().fit(sparse, NAMES)
    with pytest.raises(TypeError, match=r"X is sparse \(Tensor\), but dense data is required: pass X.to_dense"):
        group_lasso_path(torch.tensor(X).to_sparse(), NAMES)


def test_tensors_are_read_whatever_else_they_carry():
    expected, path = Head2ToeClassifier(alpha=0.3).fit(X, K), group_lasso_path(X, K, n_alphas=2)
    tensor = torch.tensor(X, requires_grad=True)
    model = Head2ToeClassifier(alpha=0.3).fit(tensor, torch.tensor(K))
    np.testing.assert_array_equal(model.predict_proba(tensor), expected.predict_proba(X))
    np.testing.assert_array_equal(group_lasso_path(tensor, K, n_alphas=2).coef(1), path.coef(1))
    assert model.predict(tensor.bfloat16()).shape == (30,)
    with pytest.raises(ValueError, match=r"X must hold real numbers, got dtype torch.complex128"):
        group_lasso_path(tensor * 1j, K)


def test_columns_named_by_strings_and_numbers_are_refused():
    frame = pd.DataFrame(X, columns=["a", 1, 2, 3])
    with pytest.raises(TypeError, match=r"Feature names are only supported if all input features have string names"):
        Head2ToeClassifier().fit(frame, NAMES)
    with pytest.raises(TypeError, match=r"Feature names are only supported if all input features have string names"):
        Head2ToeClassifier(alpha=0.3).fit(X, NAMES).predict(frame)


@pytest.mark.parametrize(("shape", "what"), [((0, 4), "0 sample"), ((30, 0), "0 feature")])
def test_empty_features_are_refused(shape, what):
    stored = FakeFeatures(X, (2, 2))
    stored.__class__ = type("Empty", (FakeFeatures,), {"shape": shape})
    for features in (stored, X[: shape[0], : shape[1]]):
        with pytest.raises(ValueError, match=rf"{what}\(s\) \(shape=.* while a minimum of 1 is required by Head2Toe"):
            Head2ToeClassifier().fit(features, NAMES[: shape[0]])
