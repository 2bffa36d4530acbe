"""What computes on CUDA gives what the CPU gives, mixes no devices and wastes neither pinned memory nor waits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from _estimator_data import FakeFeatures
from pretended_cuda import Gpu, pretended_cuda

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector, features, group_lasso_path
from estimators.adam import train
from estimators.device import memory_limit
from estimators.group_lasso.operators import make_operator

N, D = 20, 24


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended_cuda() as gpu:
        yield gpu


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Several blocks, where arrays would make one."""
    monkeypatch.setattr(features, "_CACHE_BYTES", 5 * N * 8)


def problem(n: int = N, d: int = D, k: int = 3) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % k
    X = rng.normal(size=(n, d)) + rng.normal(size=d)
    X[:, : d // 4] += rng.normal(size=(k, d // 4))[y]
    return X.astype(np.float16).astype(np.float32), y


def mapped(X: Any, folder: Any) -> Any:
    np.save(folder / "X.npy", X)
    return np.load(folder / "X.npy", mmap_mode="r")


KINDS = {
    "array": lambda X, _: X,
    "array by columns": lambda X, _: np.asfortranarray(X),
    "part of an array": lambda X, _: np.hstack([X, X])[:, : X.shape[1]],
    "read-only map": mapped,
    "float16 array": lambda X, _: X.astype(np.float16),
    "float64 array": lambda X, _: X.astype(np.float64),
    "float16 tensor": lambda X, _: torch.as_tensor(X).half(),
    "bfloat16 tensor": lambda X, _: torch.as_tensor(X).bfloat16(),
    "tensor by columns": lambda X, _: torch.as_tensor(X.T.copy()).T,
    "features": lambda X, _: FakeFeatures(X, (5, 3, 16)),
    "scattered features": lambda X, _: FakeFeatures(X, (5, 3, 16), scattered=True),
    "on the card": lambda X, _: torch.as_tensor(X).to("cuda"),
    "float64 on the card": lambda X, _: torch.as_tensor(X).double().to("cuda"),
    "on the card by columns": lambda X, _: torch.as_tensor(X.T.copy()).to("cuda").T,
    "on another card": lambda X, _: torch.as_tensor(X).to("cuda:1"),
}
SETTINGS = [
    dict(standardize=True, center=True, double=False, dtype=None),
    dict(standardize=True, center=False, double=True, dtype="float32"),
    dict(standardize=False, center=True, double=False, dtype="float32"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("max_memory", ["1GB", "1kB"], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_x_gives_the_operator_of_the_cpu(gpu, tmp_path, small_blocks, kind, max_memory, settings):
    X = problem()[0]
    X[:, 2] += 3000
    given = KINDS[kind](X, tmp_path)
    rows = torch.arange(N) if settings["standardize"] else torch.arange(1, N, 2)
    weights = torch.linspace(1, 2, len(rows), dtype=torch.float64) / (1.5 * len(rows))
    residual = torch.randn((3, len(rows)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        operator = make_operator(given, rows=rows, weights=weights.to(device), max_memory=max_memory, **settings)
        first = operator.correlate(residual.to(device), torch.tensor([3, 20], device=device), float("inf"))
        found = [operator.columns(torch.tensor(index, device=device)) for index in ([3, 20], [0, 3, 20, 23])]
        watch = float(first.median())
        again = operator.correlate(residual.to(device), torch.tensor([2], device=device), watch)
        found.append(operator.columns((again >= watch).nonzero().flatten()))
        assert all(a.device.type == device for a in (first, again, *found, operator.center, operator.inverse_scale))
        results.append([a.cpu() for a in (first, again, *found, operator.center, operator.inverse_scale)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6 if a.shape == (D,) and not settings["double"] else 1e-12, atol=1e-12)


def test_x_on_a_card_is_solved_for_on_the_cpu(gpu, small_blocks):
    X, y = problem()
    on_card = torch.as_tensor(X).to("cuda")
    for max_memory in ("1GB", "1kB"):
        settings = dict(n_alphas=2, alpha_min_ratio=0.8, device="cpu", max_memory=max_memory)
        there, here = (group_lasso_path(a, y, **settings) for a in (on_card, X))
        np.testing.assert_array_equal(there.objective, here.objective)


def streamed_pass(gpu: Gpu, X: Any) -> dict[str, int]:
    """Waits of the second full pass, by file."""
    n = X.shape[0]
    weights = torch.full((n,), 1 / n, dtype=torch.float64, device="cuda")
    options = dict(standardize=True, center=True, double=False, dtype=None, max_memory="1MB")
    operator = make_operator(X, rows=torch.arange(n), weights=weights, **options)
    residual = torch.ones((2, n), dtype=torch.float64, device="cuda")
    keep = torch.tensor([3], device="cuda")
    operator.correlate(residual, keep, 0.5)
    gpu.sites.clear()
    operator.correlate(residual, keep, 0.5)
    waits: dict[str, int] = {}
    for site, count in gpu.sites.items():
        name = site.partition(":")[0]
        waits[name] = waits.get(name, 0) + count
    return waits


@pytest.mark.parametrize("kind", ["array", "array by columns", "part of an array", "scattered features", "on the card"])
def test_a_pass_waits_for_nothing_but_free_buffers_and_pins_two(gpu, tmp_path, monkeypatch, kind):
    X = problem()[0]
    monkeypatch.setattr(features, "_CACHE_BYTES", 2 * N * 4)
    given = KINDS[kind](X, tmp_path)
    waits = streamed_pass(gpu, given)
    assert waits.keys() <= {"estimators/group_lasso/reading.py"}
    assert sum(waits.values()) <= D // 2
    if kind == "on the card":
        assert not waits
        assert not gpu.pinned_bytes
    indices = 3 * 8 * D if kind == "scattered features" else 0
    block = N * D // 2 * 4 if kind == "scattered features" else 2 * N * 4
    assert gpu.pinned_bytes <= 2 * block + indices


def test_a_pass_over_part_of_a_wide_array_takes_the_memory_of_its_blocks(gpu):
    """A block of columns of a C-ordered array spans the array: pinned as it is, it would take as much."""
    X = np.random.default_rng(0).normal(size=(20, 40_000)).astype(np.float32)
    group_lasso_path(X, np.arange(20) % 2, n_alphas=1, device="cuda", max_memory="1MB")
    assert gpu.pinned_bytes <= 2 * 2**20
    assert gpu.peak[torch.device("cuda", 0)] < 2**24


PATHS: dict[str, Any] = {
    "held": dict(),
    "streamed": dict(max_memory="1kB"),
    "streamed, double, weighted": dict(max_memory="1kB", tol=1e-8, sample_weight=np.arange(N) % 4),
    "streamed, without intercept": dict(max_memory="1kB", fit_intercept=False, l1_ratio=0.5),
    "streamed, as given": dict(max_memory="1kB", standardize=False),
}


@pytest.mark.parametrize(
    ("options", "kind"),
    [(options, "array") for options in PATHS] + [("streamed", "scattered features"), ("streamed", "on the card")],
)
def test_a_path_is_that_of_the_cpu(gpu, tmp_path, small_blocks, options, kind):
    X, y = problem()
    settings = dict(n_alphas=2, alpha_min_ratio=0.7) | PATHS[options]
    there = group_lasso_path(KINDS[kind](X, tmp_path), y, device="cuda", **settings)
    here = group_lasso_path(X, y, device="cpu", **settings)
    tol = settings.get("tol", 1e-4)
    assert there.relative_gap.max() <= tol
    np.testing.assert_allclose(there.alphas, here.alphas, rtol=1e-5)
    np.testing.assert_allclose(there.objective, here.objective, rtol=2 * tol)
    np.testing.assert_allclose(there.inverse_scale, here.inverse_scale, rtol=1e-12)
    if tol < 1e-6:
        assert [list(active) for active in there.active] == [list(active) for active in here.active]


def test_a_path_goes_on_from_another_and_branches(gpu, small_blocks):
    X, y = problem()
    ratios = np.array([1.0, 0.9, 0.85, 0.8])
    settings = dict(device="cuda", max_memory="1kB")
    seen: list[int] = []
    whole = group_lasso_path(
        X, y, alpha_ratios=ratios, branch=ratios == 0.85, callback=lambda p: seen.append(p.index), **settings
    )
    assert seen == [0, 1, 2, 3]
    start = group_lasso_path(X, y, alpha_ratios=ratios[:2], **settings)
    rest = group_lasso_path(X, y, alpha_ratios=ratios[3:], warm_start=start, **settings)
    np.testing.assert_allclose(rest.coef(0), whole.coef(3), atol=1e-12)
    stopped = group_lasso_path(X, y, alpha_ratios=ratios, callback=lambda point: point.index == 1, **settings)
    assert len(stopped.alphas) == 2


def probabilities(estimator: Any, device: str, X: Any, y: Any) -> Any:
    return estimator.set_params(device=device).fit(X, y).predict_proba(X)


ESTIMATORS = {
    "plain": dict(normalization=None),
    "standard": dict(normalization="standard", C=100.0),
    "layer": dict(normalization="layer"),
    "layer+standard": dict(normalization="layer+standard"),
    "all features": dict(keep_fraction=1.0),
    "streamed": dict(max_memory="1kB"),
    "one layer": dict(layers="X", keep_fraction=1.0),
}


@pytest.mark.parametrize("options", ESTIMATORS)
def test_the_classifier_is_that_of_the_cpu(gpu, options):
    X, y = problem()
    estimator = Head2ToeClassifier(**dict(alpha=0.95) | ESTIMATORS[options])
    features = FakeFeatures(X, (8, 16)) if options == "layer" else X
    there, here = (probabilities(estimator, device, features, y) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(there, here, atol=2e-4)


def test_the_selector_and_the_search_are_those_of_the_cpu(gpu):
    X, y = problem()
    selected = [
        Head2ToeSelector(alpha=0.95, device=device).fit(X, y).get_support().tolist() for device in ("cuda", "cpu")
    ]
    assert selected[0] == selected[1]
    search = Head2ToeClassifierCV(alphas=[0.95], keep_fractions=[0.5], Cs=[1.0], cv=2)
    there, here = (probabilities(search, device, X, y) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(there, here, atol=1e-3)


@pytest.mark.parametrize("kind", ["array", "float64 array", "features", "scattered features"])
def test_the_published_training_is_that_of_the_cpu(gpu, tmp_path, small_blocks, kind):
    X, y = problem()
    given = KINDS[kind](X, tmp_path)
    settings = dict(coef=0.1, n_steps=3, batch_size=8, seed=0, standardize=kind != "features")
    weight = np.arange(N) % 4
    there, here = (train(a, y, 3, weight, device=device, **settings) for a, device in ((given, "cuda"), (X, "cpu")))
    np.testing.assert_allclose(there[0], here[0], atol=1e-5)
    np.testing.assert_allclose(there[1], here[1], atol=1e-5)


def test_a_second_card_is_used_without_being_the_current_one(gpu, small_blocks):
    X, y = problem()
    first, second = (torch.device("cuda", index) for index in range(2))
    group_lasso_path(X, y, n_alphas=2, alpha_min_ratio=0.8, device="cuda:1", max_memory="1kB")
    train(X, y, 3, np.ones(N), n_steps=2, seed=0, device="cuda:1")
    Head2ToeClassifier(alpha=0.9, device="cuda:1").fit(X, y)
    assert gpu.peak[second]
    assert not gpu.peak[first]
    assert torch.cuda.current_device() == 0


def test_a_path_on_a_stream_of_the_caller_stays_there(gpu, small_blocks):
    X, y = problem()
    with torch.cuda.stream(torch.cuda.Stream()):
        on_card = torch.as_tensor(X).to("cuda")
        for given in (X, on_card):
            path = group_lasso_path(given, y, n_alphas=2, alpha_min_ratio=0.8, device="cuda", max_memory="1kB")
            assert path.relative_gap.max() <= 1e-4


def test_memory_that_an_earlier_fit_left_to_torch_is_free():
    with pretended_cuda(memory=1000):
        held = torch.zeros(200, device="cuda")
        assert memory_limit(None, held.device) == 160
        del held
        assert memory_limit(None, torch.device("cuda")) == 800
