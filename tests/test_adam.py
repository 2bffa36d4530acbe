"""The published training: its steps against autograd, its limits against known solutions, and the estimator of it."""

import math

import numpy as np
import pytest
import torch
from _estimator_data import DEVICES, FakeFeatures, make_problem, standardize
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.utils.estimator_checks import check_estimator
from test_classifier import WIDTHS, layered_problem, scale_layers

from estimators import Head2ToeClassifier, PublishedHead2Toe, adam, group_lasso_path


def train(X, y, k, sample_weight=None, standardize=False, **settings):
    """Weights of the columns as they were trained on, and intercepts."""
    weight = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=float)
    coef, intercept, row_norms, _ = adam.train(X, y, k, weight, standardize=standardize, **settings)
    if standardize:
        p, values = weight / weight.sum(), np.asarray(X, dtype=float)
        mean, sd = p @ values, np.sqrt(p @ (values - p @ values) ** 2)
        coef, intercept = coef * sd[:, None], intercept + mean @ coef
    np.testing.assert_allclose(row_norms, np.linalg.norm(coef, axis=1), rtol=1e-3, atol=1e-9)
    return coef, intercept


def drawn(seed, n, d, k):
    """The start and the order of rows that `train` draws from a seed."""
    generator = torch.Generator().manual_seed(seed)
    limit = math.sqrt(6 / (d + k))
    return torch.empty((k, d)).uniform_(-limit, limit, generator=generator).T, torch.randperm(n, generator=generator)


def autograd_training(X, y, k, *, weight, coef, learning_rate, n_steps, batch_size, seed):
    """The formulas of the docstring in float64, with autograd and one pass over the rows in a fixed order."""
    n, d = X.shape
    start, order = drawn(seed, n, d, k)
    batch_size = min(n, batch_size)
    X, y, weight = torch.as_tensor(X)[order], torch.as_tensor(y)[order], torch.as_tensor(weight)[order]
    W, b = start.double().requires_grad_(), torch.zeros(k, dtype=torch.float64, requires_grad=True)
    m, v = [torch.zeros_like(W), torch.zeros_like(b)], [torch.zeros_like(W), torch.zeros_like(b)]
    batches = torch.arange(n).split(batch_size)
    for t in range(n_steps):
        rows = batches[t % len(batches)]
        entropy = torch.nn.functional.cross_entropy(X[rows] @ W + b, y[rows], reduction="none")
        loss = (entropy * weight[rows] / weight.mean() + coef * W.norm(dim=1).sum()).sum() / batch_size
        rate = learning_rate * 0.5 * (1 + math.cos(math.pi * t / n_steps))
        rate *= math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        gradients = torch.autograd.grad(loss, (W, b))
        with torch.no_grad():
            for i, (parameter, g) in enumerate(zip((W, b), gradients, strict=True)):
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g**2
                parameter -= rate * m[i] / (v[i].sqrt() + 1e-7)
    return W.detach().numpy(), b.detach().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("batch_size", [16, 20, 128])
def test_steps_are_those_of_autograd_and_the_formulas(device, coef, batch_size):
    """n = 40 samples: a shorter last batch, two full ones, and one that is never full."""
    X, y, weight = make_problem(0)
    settings = dict(coef=coef, learning_rate=0.05, n_steps=25, batch_size=batch_size, seed=3)
    W, b = train(X, y, 3, sample_weight=weight, device=device, **settings)
    expected_W, expected_b = autograd_training(X, y, 3, weight=weight, **settings)
    np.testing.assert_allclose(W, expected_W, atol=1e-9)
    np.testing.assert_allclose(b, expected_b, atol=1e-9)
    rounded, _ = train(X.astype(np.float32), y, 3, sample_weight=weight, device=device, **settings)
    np.testing.assert_allclose(rounded, expected_W, atol=1e-5)
    assert W.dtype == b.dtype == np.float64


def test_the_learning_rate_falls_along_a_cosine():
    """Small features keep the gradient all but constant, so that each of Adam's steps is as long as its rate."""
    X, y = np.array([[-1e-2], [1e-2]] * 4), np.array([0, 1] * 4)
    W, _ = train(X, y, 2, learning_rate=0.3, n_steps=8, batch_size=8, seed=0)
    start, _ = drawn(0, 8, 1, 2)
    rates = 0.15 * (1 + np.cos(np.pi * np.arange(8) / 8))
    np.testing.assert_allclose(np.abs(W - start.numpy()), rates.sum(), rtol=2e-3)


def test_zero_weights_leave_rows_and_classes_out():
    X, y, weight = make_problem(1)
    weight[y == 1] = 0
    weight[:5] = 0
    W, b = train(X, y, 4, sample_weight=weight, coef=0.01, n_steps=50, seed=0)
    assert (W[:, [1, 3]] == 0).all()
    assert (b[[1, 3]] == -np.inf).all()
    rows = weight > 0
    alone_W, alone_b = train(X[rows], y[rows] // 2, 2, sample_weight=weight[rows], coef=0.01, n_steps=50, seed=0)
    np.testing.assert_array_equal(W[:, [0, 2]], alone_W)
    np.testing.assert_array_equal(b[[0, 2]], alone_b)


def test_repeating_rows_is_weighting_them_when_one_batch_holds_all():
    X, y, _ = make_problem(2)
    weight = np.random.default_rng(0).integers(0, 4, len(y))
    repeated = np.repeat(np.arange(len(y)), weight)
    assert len(repeated) < 128
    W, b = train(X, y, 3, sample_weight=weight, coef=0.01, n_steps=200, seed=0)
    other_W, other_b = train(X[repeated], y[repeated], 3, coef=0.01, n_steps=200, seed=0)
    np.testing.assert_allclose(W, other_W, atol=1e-3)
    np.testing.assert_allclose(b, other_b, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1000, 50])
def test_long_training_without_penalty_reaches_the_optimum(batch_size):
    X, y, weight = make_problem(3, n=200, d=6)
    W, b = train(X, y, 3, sample_weight=weight, learning_rate=0.05, n_steps=3000, batch_size=batch_size, seed=0)
    best = LogisticRegression(C=np.inf, tol=1e-8, max_iter=10_000).fit(X, y, sample_weight=weight)
    scores = X @ W + b
    P = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    reached, optimum = (log_loss(y, p, sample_weight=weight) for p in (P, best.predict_proba(X)))
    assert optimum > 0.1
    assert reached == pytest.approx(optimum, rel=1e-4 if batch_size == 1000 else 5e-3)


def test_a_penalty_above_alpha_max_shrinks_every_row_and_a_larger_one_shrinks_more():
    X, y, weight = make_problem(4, n=120, d=20)
    largest = group_lasso_path(X, y, n_alphas=1, sample_weight=weight).alpha_max
    norms = [
        np.linalg.norm(
            train(X, y, 3, sample_weight=weight, standardize=True, coef=c * largest, n_steps=1000, seed=0)[0], axis=1
        )
        for c in (0.0, 0.1, 2.0)
    ]
    assert norms[0].sum() > 1.5 * norms[1].sum()
    assert (norms[2] < 1e-2).all()


def test_informative_features_have_the_top_scores():
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    X = rng.normal(size=(300, 200))
    informative = np.arange(8) * 20
    X[:, informative] += rng.choice([-1, 1], (3, 8))[y] * np.array([[1.0], [0.5], [-1.0]])[y]
    W, _ = train(X, y, 3, standardize=True, coef=0.02, n_steps=500, seed=0)
    assert set(np.argsort(-np.linalg.norm(W, axis=1))[:8]) == set(informative)


def test_the_seed_decides():
    X, y, weight = make_problem(5)
    one, again, other = (train(X, y, 3, sample_weight=weight, n_steps=20, batch_size=16, seed=s) for s in (7, 7, 8))
    np.testing.assert_array_equal(one[0], again[0])
    np.testing.assert_array_equal(one[1], again[1])
    assert np.abs(one[0] - other[0]).max() > 0.01


def test_standardize_trains_on_standardised_columns_and_gives_constant_ones_nothing():
    X, y, weight = make_problem(6)
    X[:, 4] = 0.1
    Z = X.copy()
    Z[:, 4] = 0
    varying = np.arange(10) != 4
    Z[:, varying] = standardize(X[:, varying], weight)
    W, b = train(X, y, 3, sample_weight=weight, standardize=True, coef=0.01, n_steps=100, seed=0)
    expected_W, expected_b = train(Z, y, 3, sample_weight=weight, coef=0.01, n_steps=100, seed=0)
    assert (W[4] == 0).all()
    np.testing.assert_allclose(W[varying], expected_W[varying], atol=1e-4)
    np.testing.assert_allclose(b, expected_b, atol=1e-4)


@pytest.mark.parametrize("standardized", [False, True])
def test_every_source_gives_the_same_training(standardized):
    X, y, weight = layered_problem(0)
    settings = dict(sample_weight=weight, standardize=standardized, coef=0.01, n_steps=30, seed=0)
    expected = train(X, y, 3, **settings)
    frozen = X.copy()
    frozen.flags.writeable = False
    sources = [frozen, np.asfortranarray(X), X.astype(np.float64)]
    for source in [*sources, FakeFeatures(X, WIDTHS), FakeFeatures(X, WIDTHS, scattered=True)]:
        W, b = train(source, y, 3, **settings)
        np.testing.assert_allclose(W, expected[0], atol=1e-5)
        np.testing.assert_allclose(b, expected[1], atol=1e-5)


def test_errors_say_what_is_wrong():
    X, y, _ = make_problem(8)
    with pytest.raises(ValueError, match="device='cuda:77' cannot be used"):
        train(X, y, 3, seed=0, device="cuda:77")
    with pytest.raises(ValueError, match="training diverged at learning_rate=1e"):
        train(X.astype(np.float32), y, 3, seed=0, learning_rate=1e38)
    for value in (np.nan, np.inf, 1e300):
        broken = X.copy()
        broken[3, 6] = value
        for standardized in (False, True) if value != 1e300 else ():
            with pytest.raises(ValueError, match="X holds NaN or infinity in column 6"):
                train(broken, y, 3, standardize=standardized, seed=0)
    with pytest.raises(ValueError, match="X holds NaN or infinity in column 6"), np.errstate(over="ignore"):
        train(broken.astype(np.float32), y, 3, seed=0)
    features = FakeFeatures(X, (4, 6))
    features.column_blocks = lambda max_bytes: iter([(slice(0, 4), X[:, :4])])
    with pytest.raises(ValueError, match="in column 4; it must be finite"):
        train(features, y, 3, seed=0)


def test_scikit_learns_common_checks_pass():
    """All features are kept, as some of the checks have but two; few steps are long ones."""
    model = PublishedHead2Toe(keep_fraction=1.0, normalization="standard", learning_rate=0.1, max_iter=60)
    results = check_estimator(model, on_fail=None, on_skip=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")] == []
    assert sum(r["status"] == "passed" for r in results) > 50


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalization", ["standard", "layer", "layer+standard", None])
@pytest.mark.parametrize("k", [2, 3])
def test_the_estimator_is_scores_selection_and_head_in_turn(device, normalization, k):
    X, y, weight = layered_problem(0, k=k)
    model = PublishedHead2Toe(
        coef=0.05, normalization=normalization, learning_rate=0.02, max_iter=150, random_state=5, device=device
    ).fit(FakeFeatures(X, WIDTHS), y, sample_weight=weight)
    by_layer, by_feature = "layer" in (normalization or ""), "standard" in (normalization or "")

    def prepared(values, widths):
        values = scale_layers(values, [w for w in widths if w]) if by_layer else values.astype(float)
        return standardize(values, weight) if by_feature else values

    random = np.random.RandomState(5)
    seeds = [int(random.randint(2**31 - 1)) for _ in range(2)]
    training = dict(sample_weight=weight, learning_rate=0.02, n_steps=150)
    scores, _ = train(prepared(X, WIDTHS), y, k, coef=0.05, seed=seeds[0], **training)
    np.testing.assert_allclose(model.feature_scores_, np.linalg.norm(scores, axis=1), atol=1e-3)
    selected = model.selected_features_
    np.testing.assert_array_equal(selected, np.sort(np.argsort(-model.feature_scores_)[:6]))
    widths = [np.sum((selected >= start) & (selected < stop)) for start, stop in [(0, 12), (12, 13), (13, 30)]]
    kept = prepared(X[:, selected], widths)
    W, b = train(kept, y, k, seed=seeds[1], **training)
    expected = kept @ W + b
    reached = model.decision_function(FakeFeatures(X, WIDTHS))
    np.testing.assert_allclose(reached, expected if k > 2 else expected[:, 1] - expected[:, 0], atol=2e-3)
    assert model.n_iter_ == 150


def test_the_random_state_decides():
    X, y, _ = layered_problem(1)
    one, again, other = (PublishedHead2Toe(random_state=s, max_iter=60).fit(X, y) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.feature_scores_, again.feature_scores_)
    np.testing.assert_array_equal(one.coef_, again.coef_)
    assert np.abs(one.feature_scores_ - other.feature_scores_).max() > 1e-3
    once = PublishedHead2Toe(random_state=np.random.RandomState(0), max_iter=60).fit(X, y)
    np.testing.assert_array_equal(one.coef_, once.coef_)


def test_the_published_settings_are_the_defaults_and_classify():
    X, y = make_classification(400, 300, n_informative=10, n_classes=3, class_sep=2.0, random_state=0)
    model = PublishedHead2Toe(random_state=0).fit(X[:300], y[:300])
    shown = {name: model.get_params()[name] for name in ("coef", "keep_fraction", "learning_rate", "max_iter")}
    assert shown == {"coef": 1e-5, "keep_fraction": 0.2, "learning_rate": 0.01, "max_iter": 500}
    assert len(model.selected_features_) == 60
    assert model.score(X[300:], y[300:]) > 0.8


def test_a_long_training_reaches_the_head_without_a_penalty():
    X, y, weight = layered_problem(2)
    X = X[:, :3]
    model = PublishedHead2Toe(
        keep_fraction=1.0, normalization="standard", max_iter=1000, learning_rate=0.05, random_state=0
    ).fit(X, y, sample_weight=weight)
    ridge = Head2ToeClassifier(keep_fraction=1.0, C=1e4).fit(X, y, sample_weight=weight)
    losses = [log_loss(y, m.predict_proba(X), sample_weight=weight) for m in (model, ridge)]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    assert losses[1] > 0.05


def test_a_class_of_zero_weight_is_never_predicted():
    X, y, weight = layered_problem(3)
    weight[y == 1] = 0
    model = PublishedHead2Toe(max_iter=100).fit(X, y, sample_weight=weight)
    P = model.predict_proba(X)
    assert (P[:, 1] == 0).all()
    assert set(model.predict(X)) == {0, 2}


def test_layers_by_name_are_all_that_is_read():
    X, y, _ = layered_problem(4)
    stored = FakeFeatures(X, WIDTHS)
    settings = dict(max_iter=50, random_state=0)
    model = PublishedHead2Toe(layers="net.2", **settings).fit(stored, y)
    alone = PublishedHead2Toe(**settings).fit(FakeFeatures(X[:, 13:], (17,)), y)
    assert stored.columns_read == set(range(13, 30))
    np.testing.assert_array_equal(model.selected_features_, 13 + alone.selected_features_)
    np.testing.assert_array_equal(model.coef_[:, 13:], alone.coef_)
    assert not model.coef_[:, :13].any()


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("coef", -1.0),
        ("keep_fraction", None),
        ("learning_rate", 0.0),
        ("max_iter", 0),
        ("normalization", "unit"),
        ("random_state", "x"),
        ("device", 3),
    ],
)
def test_a_bad_parameter_is_named_with_what_was_given(parameter, value):
    X, y, _ = make_problem(7)
    with pytest.raises(ValueError, match=f"'{parameter}' parameter of PublishedHead2Toe must be .* Got {value!r}"):
        PublishedHead2Toe(**{parameter: value}).fit(X, y)
