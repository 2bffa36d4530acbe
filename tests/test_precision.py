"""What is computed is what was asked: any offset, rank, strength and dtype, against float64 references."""

import numpy as np
import pytest
from _estimator_data import FakeFeatures, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector, PublishedHead2Toe, group_lasso_path

NORMALIZATIONS = ("standard", "layer", "layer+standard")


def features(seed, offset, rank, dtype, n=60, d=150, k=3):
    """Random labels, and features of a given rank with a spread of about one around the offset."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    X = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d)) / np.sqrt(rank)
    return (offset + X).astype(dtype), y


def reference(X, y, C, test, constant=None):
    """Probabilities of scikit-learn's logistic regression on standardised features, in the axes of its own rank."""
    X, test = X.astype(np.float64), test.astype(np.float64)
    varying = X.std(axis=0) > 0 if constant is None else ~constant
    mean, sd = X.mean(axis=0), X.std(axis=0)
    Z, T = (((part - mean) / np.where(varying, sd, 1.0))[:, varying] for part in (X, test))
    _, singular, axes = np.linalg.svd(Z, full_matrices=False)
    axes = axes[singular > 1e-10 * singular[0]].T
    model = LogisticRegression(C=C, tol=1e-12, max_iter=1000, solver="newton-cholesky").fit(Z @ axes, y)
    return model.predict_proba(T @ axes)


@pytest.mark.parametrize("C", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 300.0, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_head_on_all_features_is_that_of_float64(dtype, offset, C):
    for rank, k in ((4, 2), (20, 3), (60, 3)):
        X, y = features(rank, offset, rank, dtype, k=k)
        model = Head2ToeClassifier(keep_fraction=1.0, C=C).fit(X[:50], y[:50])
        np.testing.assert_allclose(model.predict_proba(X), reference(X[:50], y[:50], C, X), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.floats(-4, 4),
    relative_offset=st.floats(0, 4),
    rank=st.integers(1, 60),
    C=st.floats(-4, 4),
    dtype=st.sampled_from([np.float32, np.float64]),
    shape=st.sampled_from([(60, 150), (60, 20)]),
)
def test_the_head_is_right_whatever_is_asked(seed, spread, relative_offset, rank, C, dtype, shape):
    X, y = features(seed, 10**relative_offset, rank, np.float64, *shape)
    X = (10**spread * X).astype(dtype)
    model = Head2ToeClassifier(keep_fraction=1.0, C=10**C).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), reference(X, y, 10**C, X), atol=3e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_many_classes_on_features_of_little_rank_need_long_steps(dtype):
    """Classes of unlike curvature, and directions that only rounding fills in float16."""
    X, y = features(6, 0.0, 20, dtype, n=120, d=30, k=10)
    model = Head2ToeClassifier(keep_fraction=1.0, C=1e4).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), reference(X, y, 1e4, X), atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
def test_features_in_float16_are_taken_as_they_are(offset):
    X, y = features(5, offset, 20, np.float16)
    model = Head2ToeClassifier(keep_fraction=1.0, C=100.0).fit(X, y)
    assert model.coef_.any(axis=0).all()
    np.testing.assert_allclose(model.predict_proba(X), reference(X, y, 100.0, X), atol=1e-4)


@pytest.mark.parametrize("normalization", ["standard", "layer+standard"])
def test_a_column_that_only_rounding_varies_is_constant(normalization):
    """Values of N(100.03, 0.004) are 100 or 100.0625 in float16."""
    X, y, _ = make_problem(0, n=120, d=30)
    X = X.astype(np.float16).astype(np.float32)
    X[:, 7] = np.random.default_rng(0).normal(100.03, 0.004, 120).astype(np.float16)
    assert len(np.unique(X[:, 7])) == 2
    stored = FakeFeatures(X, (10, 20))
    stored.stored_dtype = np.dtype(np.float16)
    for rounded in (X.astype(np.float16), stored):
        model = Head2ToeClassifier(keep_fraction=1.0, normalization=normalization).fit(rounded, y)
        assert model.coef_.any(axis=0).tolist() == [d != 7 for d in range(30)]
    assert Head2ToeClassifier(keep_fraction=1.0).fit(X, y).coef_[:, 7].any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1e160, 1e307])
def test_magnitudes_at_the_limits_of_float64_change_nothing(magnitude, normalization):
    X, y, _ = make_problem(1, d=30)
    model = Head2ToeClassifier(alpha=0.3, normalization=normalization)
    expected = model.fit(X, y).predict_proba(X)
    np.testing.assert_allclose(model.fit(X * magnitude, y).predict_proba(X * magnitude), expected, atol=1e-9)


@pytest.mark.parametrize("magnitude", [1e-160, 1e160])
def test_without_standardisation_magnitudes_beyond_reason_are_an_error(magnitude):
    X, y, _ = make_problem(1, d=30)
    with pytest.raises(ValueError, match=r"X holds values of about .* Scale X, or standardise it"):
        Head2ToeClassifier(normalization=None).fit(X * magnitude, y)
    with pytest.raises(ValueError, match="Scale X"):
        group_lasso_path(X * magnitude, y, standardize=False)


@pytest.mark.parametrize("weight", [1e-320, 1e-300, 1e307, 1.7e308])
def test_weights_at_the_limits_of_float64_end(weight):
    X, y, _ = make_problem(2, d=12)
    sample_weight = np.full(len(y), weight)
    expected = Head2ToeSelector(alpha=0.3).fit(X, y)
    selector = Head2ToeSelector(alpha=0.3, class_weight="balanced").fit(X, y, sample_weight=sample_weight)
    np.testing.assert_array_equal(selector.selected_features_, expected.selected_features_)
    path = Head2ToeClassifier(alpha=0.3, head="path")
    plain = path.fit(X, y).predict_proba(X)
    np.testing.assert_allclose(path.fit(X, y, sample_weight=sample_weight).predict_proba(X), plain, atol=1e-9)
    head = Head2ToeClassifier(alpha=0.3).fit(X, y, sample_weight=sample_weight)
    assert np.isfinite(head.predict_proba(X)).all()
    if weight < 1:  # a penalty that rules leaves the class frequencies
        np.testing.assert_allclose(head.predict_proba(X), np.tile(np.bincount(y) / len(y), (len(y), 1)), atol=1e-9)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_mixture_is_found_whatever_the_weights_sum_to():
    rng = np.random.default_rng(5)
    y = np.arange(90) % 3
    X = rng.normal(size=(90, 20)) + rng.normal(size=(3, 20))[y]
    search = Head2ToeClassifierCV(alphas=(0.5, 0.2), keep_fractions=(None, 1.0), Cs=(0.01, 1.0), cv=3, single_layers=0)
    assert np.isfinite(search.fit(X, y, sample_weight=np.full(90, 1e307)).predict_proba(X)).all()
    assert search.weights_.any()


def test_scores_of_a_search_are_weighted_whatever_the_weights_sum_to():
    X, y, _ = make_problem(3, n=60, d=12)
    search = Head2ToeClassifierCV(alphas=(0.3,), keep_fractions=(None,), Cs=(1e-300,), cv=2, refit="best")
    search.fit(X, y, sample_weight=np.full(60, 1e307))
    assert 0 < search.best_score_ <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [300.0, 1e4])
def test_the_path_is_certified_whatever_the_offset(offset, dtype):
    X, y = features(7, offset, 60, dtype)
    exact = X.astype(np.float64)
    Z = (exact - exact.mean(axis=0)) / exact.std(axis=0)
    ratios = [0.5, 0.2, 0.1]
    given, expected = (group_lasso_path(part, y, alpha_ratios=ratios, tol=1e-6) for part in (X, Z))
    assert given.relative_gap.max() <= 1e-6
    np.testing.assert_allclose(given.alphas, expected.alphas, rtol=1e-6)
    np.testing.assert_allclose(given.objective, expected.objective, rtol=2e-6)
    model = Head2ToeClassifier(alpha=0.1, head="path", tol=1e-6)
    np.testing.assert_allclose(model.fit(X, y).predict_proba(X), model.fit(Z, y).predict_proba(Z), atol=2e-3)


@pytest.mark.parametrize("offset", [300.0, 1e4])
def test_the_published_training_standardises_before_it_rounds(offset):
    X, y = features(8, offset, 60, np.float32)
    exact = X.astype(np.float64)
    Z = (exact - exact.mean(axis=0)) / exact.std(axis=0)
    model = PublishedHead2Toe(coef=0.01, keep_fraction=0.3, normalization="standard", max_iter=100, random_state=0)
    np.testing.assert_allclose(model.fit(X, y).predict_proba(X), model.fit(Z, y).predict_proba(Z), atol=2e-3)


@pytest.mark.parametrize("estimator", [Head2ToeClassifier(keep_fraction=1.0), Head2ToeClassifierCV(cv=3)])
@pytest.mark.parametrize("C", [1.0, 100.0])
def test_float64_results_do_not_depend_on_the_way_there(estimator, C):
    """The order of rows and columns, and rows that are given twice instead of weighted."""
    X, y, _ = make_problem(4, n=48, d=70)
    folds = np.arange(48) % 3
    times = np.random.default_rng(0).integers(1, 4, 48)
    repeated = np.repeat(np.arange(48), times)
    rows, columns = np.random.default_rng(1).permutation(len(repeated)), np.random.default_rng(2).permutation(70)

    def fitted(X, y, folds, **weights):
        if isinstance(estimator, Head2ToeClassifierCV):
            splits = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(3)]
            return Head2ToeClassifierCV(alphas=(0.3,), Cs=(C,), cv=splits).fit(X, y, **weights)
        return Head2ToeClassifier(keep_fraction=1.0, C=C).fit(X, y, **weights)

    weighted = fitted(X, y, folds, sample_weight=times.astype(float)).predict_proba(X)
    again = repeated[rows]
    moved = fitted(X[again][:, columns], y[again], folds[again]).predict_proba(X[:, columns])
    np.testing.assert_allclose(moved, weighted, rtol=0, atol=1e-11)
