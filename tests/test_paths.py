"""Paths asked for in parts: the same bits whatever was asked before, kept under the right name, solved once."""

import io
import re
import warnings
from contextlib import redirect_stdout
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from _estimator_data import FakeFeatures, make_problem
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV

from estimators import GroupLassoPath, Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector, paths
from estimators.paths import PathOptions, chain_to, solve_path
from estimators.training import check_training

RATIOS = [0.45, 0.85**3, 0.3, 0.7, 0.46, 1.0]
WIDTHS = (12, 1, 17)
# What a path takes of time and of passes over X depends on where it was cut.
COSTS = ("seconds", "n_passes")


def problem(seed=0, k=3):
    X, y, weight = make_problem(seed, n=40, d=30, k=k)
    return X.astype(np.float32), y, weight


def training_of(X, y, weight=None, class_weight=None):
    return check_training(Head2ToeClassifier(), X, y, weight, class_weight)


def options(**changes):
    return replace(PathOptions.of(Head2ToeClassifier()), **changes)


def bits(path):
    """Everything but what solving cost, as bytes."""
    parts = []
    for field in fields(path):
        value = getattr(path, field.name)
        if field.name not in COSTS:
            parts += [np.asarray(part).tobytes() for part in (value if isinstance(value, list) else [value])]
    return parts


def solve_in_order(training, ratios, chosen):
    """Bits of the path to every ratio, asked for one by one."""
    return {ratio: bits(solve_path(training, [ratio], chosen)[0]) for ratio in ratios}


@pytest.fixture
def keys(monkeypatch):
    """The names under which paths are looked up."""
    asked, cached = [], paths.cached

    def noted(directory, key, *others):
        asked.append(key)
        return cached(directory, key, *others)

    monkeypatch.setattr(paths, "cached", noted)
    return asked


def test_a_chain_begins_at_alpha_max_and_ends_where_it_should():
    for ratio in (1.0, 0.85, 0.85**7, 0.5, 0.01, 1e-6):
        chain = chain_to(ratio)
        assert chain[0] == 1.0 or ratio == 1.0
        assert chain[-1] == pytest.approx(ratio, rel=1e-8)
        np.testing.assert_allclose(chain[1:-1] / chain[:-2], 0.85)
        assert (np.diff(chain) < 0).all()
    assert len(chain_to(0.85**7)) == len(chain_to(0.85**7 * (1 + 1e-12))) == len(chain_to(0.85**7 * (1 - 1e-12))) == 8
    np.testing.assert_array_equal(chain_to(0.3)[:-1], chain_to(0.31)[:-1])


@pytest.mark.parametrize("normalization", ["standard", "layer+standard", None])
@pytest.mark.parametrize("max_memory", [None, "20MB"])
def test_a_path_is_the_same_to_the_bit_whatever_was_asked_before(tmp_path, normalization, max_memory):
    X, y, weight = problem()
    training = training_of(FakeFeatures(X, WIDTHS), y, weight)
    chosen = options(normalization=normalization, max_memory=max_memory)
    together = dict(zip(RATIOS, map(bits, solve_path(training, RATIOS, chosen)), strict=True))
    assert solve_in_order(training, RATIOS, chosen) == together
    for number in range(2):
        kept = replace(chosen, memory=tmp_path / str(number))
        order = np.random.default_rng(number).permutation(RATIOS).tolist()
        assert solve_in_order(training, order, kept) == together
        assert solve_in_order(training, order[::-1], kept) == together
    kept = replace(chosen, memory=tmp_path / "pairs")
    for pair in (RATIOS[:2], RATIOS[2:], RATIOS):
        for ratio, path in zip(pair, solve_path(training, pair, kept), strict=True):
            assert bits(path) == together[ratio]


@pytest.mark.parametrize(("k", "tol", "l1_ratio"), [(2, 1e-3, 1.0), (6, 1e-3, 0.5), (3, 1e-6, 1.0)])
def test_that_holds_for_other_problems_and_settings(tmp_path, k, tol, l1_ratio):
    X, y, weight = problem(1, k=k)
    weight[::7] = 0
    training = training_of(X, y, weight)
    chosen = options(tol=tol, l1_ratio=l1_ratio)
    together = dict(zip(RATIOS, map(bits, solve_path(training, RATIOS, chosen)), strict=True))
    assert solve_in_order(training, RATIOS, replace(chosen, memory=tmp_path)) == together
    assert solve_in_order(training, RATIOS[::-1], replace(chosen, memory=tmp_path / "b")) == together


def test_a_path_ends_at_the_ratio_asked_for_and_lists_what_lies_above():
    X, y, _ = problem()
    for ratio, path in zip(RATIOS, solve_path(training_of(X, y), RATIOS, options()), strict=True):
        np.testing.assert_allclose(path.alphas / path.alpha_max, chain_to(ratio), rtol=1e-12)
        assert len(path.active) == len(path.standardized_coefs) == len(path.n_iter) == len(path.alphas)
        assert (path.relative_gap <= 1e-3).all()


def solve_elsewhere(X, y, weight, ratio, memory):
    torch.set_num_threads(1)
    return bits(solve_path(training_of(X, y, weight), [ratio], options(memory=memory))[0])


def test_processes_that_share_a_folder_get_the_same_bits(tmp_path, monkeypatch):
    X, y, weight = problem(2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = [bits(path) for path in solve_path(training_of(X, y, weight), RATIOS, options())]
    finally:
        torch.set_num_threads(before)
    for memory in (None, tmp_path):
        jobs = [delayed(solve_elsewhere)(X, y, weight, ratio, memory) for ratio in RATIOS]
        assert Parallel(n_jobs=2, backend="loky")(jobs) == together
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_what_comes_from_the_disk_is_what_was_put_there(tmp_path, solved_ratios):
    X, y, weight = problem(3)
    training = training_of(X, y, weight)
    first = solve_path(training, RATIOS, options(memory=tmp_path))
    n_calls = len(solved_ratios)
    again = solve_path(training, RATIOS, options(memory=tmp_path))
    assert len(solved_ratios) == n_calls
    for a, b in zip(first, again, strict=True):
        assert isinstance(b, GroupLassoPath)
        for field in fields(a):
            np.testing.assert_equal(getattr(b, field.name), getattr(a, field.name), err_msg=field.name)
        assert isinstance(b.alpha_max, float)


def test_a_search_solves_every_alpha_of_every_fold_once(tmp_path, solved_ratios):
    X, y, _ = problem(4)
    grid = {
        "alpha": [0.6, 0.3, 0.5],
        "keep_fraction": [None, 0.2],
        "C": [1.0],
        "head": ["ridge", "path"],
    }
    kept = GridSearchCV(Head2ToeClassifier(memory=tmp_path), grid, cv=2, refit=False, error_score="raise").fit(X, y)
    solved = [ratio for call in solved_ratios for ratio in call]
    wanted = np.unique(np.concatenate([chain_to(alpha) for alpha in grid["alpha"]]))
    # Two folds: each of its alphas once.
    assert sorted(solved) == sorted([*wanted, *wanted])
    solved_ratios.clear()
    fresh = GridSearchCV(Head2ToeClassifier(), grid, cv=2, refit=False, error_score="raise").fit(X, y)
    assert sum(map(len, solved_ratios)) > 6 * len(solved)
    for name, value in kept.cv_results_.items():
        if not name.endswith("_time"):
            np.testing.assert_array_equal(value, fresh.cv_results_[name], err_msg=name)


def test_fits_with_memory_equal_those_without(tmp_path):
    X, y, weight = problem(5)
    for keep_fraction in (None, 0.2, 1.0):
        for head in ("ridge", "path"):
            plain = Head2ToeClassifier(alpha=0.2, keep_fraction=keep_fraction, head=head)
            expected = plain.fit(X, y, sample_weight=weight)
            for _ in range(2):
                kept = Head2ToeClassifier(alpha=0.2, keep_fraction=keep_fraction, head=head, memory=tmp_path)
                kept.fit(X, y, sample_weight=weight)
                np.testing.assert_array_equal(kept.coef_, expected.coef_)
                np.testing.assert_array_equal(kept.intercept_, expected.intercept_)
                np.testing.assert_array_equal(kept.feature_scores_, expected.feature_scores_)
                assert (kept.n_iter_, kept.duality_gap_) == (expected.n_iter_, expected.duality_gap_)


def key_of(keys, X, y, weight=None, memory=None, estimator=None, **params):
    keys.clear()
    estimator = (estimator or Head2ToeClassifier)(**{"alpha": 0.85, "memory": memory, **params})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(X, y, sample_weight=weight)
    assert len(set(keys)) == 1
    return keys[0]


def test_whatever_decides_a_path_changes_its_key(tmp_path, keys):
    X, y, weight = problem(7)
    other_labels, other_weight, other_values = y.copy(), weight.copy(), X.copy()
    other_labels[5] = (y[5] + 1) % 3
    other_weight[5] *= 1.5
    other_values[5, 5] += 1
    found = {
        "itself": key_of(keys, X, y, weight, tmp_path),
        "labels": key_of(keys, X, other_labels, weight, tmp_path),
        "weight": key_of(keys, X, y, other_weight, tmp_path),
        "no weight": key_of(keys, X, y, None, tmp_path),
        "class weight": key_of(keys, X, y, weight, tmp_path, class_weight="balanced"),
        "values": key_of(keys, other_values, y, weight, tmp_path),
        "precision": key_of(keys, X.astype(np.float64), y, weight, tmp_path),
        "rows": key_of(keys, X[:-1], y[:-1], weight[:-1], tmp_path),
        "order of rows": key_of(keys, X[::-1], y[::-1], weight[::-1], tmp_path),
        "columns": key_of(keys, X[:, :-1], y, weight, tmp_path),
        "l1_ratio": key_of(keys, X, y, weight, tmp_path, l1_ratio=0.9),
        "tol": key_of(keys, X, y, weight, tmp_path, tol=1e-4),
        "max_iter": key_of(keys, X, y, weight, tmp_path, max_iter=999),
        "none": key_of(keys, X, y, weight, tmp_path, normalization=None),
        "layer": key_of(keys, X, y, weight, tmp_path, normalization="layer"),
        "layer+standard": key_of(keys, X, y, weight, tmp_path, normalization="layer+standard"),
    }
    assert len(set(found.values())) == len(found), found
    assert len(list(tmp_path.glob("*.npz"))) == len(found)


def test_what_does_not_decide_a_path_leaves_its_key(tmp_path, keys):
    X, y, weight = problem(8)
    itself = key_of(keys, X, y, weight, tmp_path)
    for params in (
        dict(alpha=0.5),
        dict(alpha=1.0, keep_fraction=0.5),
        dict(keep_fraction=0.3),
        dict(C=7.0),
        dict(head="path"),
        dict(device="cpu"),
        dict(device=torch.device("cpu")),
        dict(max_memory="20MB"),
        dict(verbose=1),
        dict(memory=str(tmp_path)),
        dict(tol=np.float64(1e-3), l1_ratio=1, max_iter=np.int64(1000)),
    ):
        assert key_of(keys, X, y, weight, **{"memory": tmp_path, **params}) == itself, params
    names = np.array(["whale", "zebra", "zoo"])[y]
    assert key_of(keys, X, names, weight, tmp_path) == itself
    assert key_of(keys, X, y.astype(np.float64) * 2 + 5, weight, tmp_path) == itself
    assert key_of(keys, np.asfortranarray(X), y.tolist(), weight.tolist(), tmp_path) == itself
    assert key_of(keys, X, y, weight, tmp_path, estimator=Head2ToeSelector) == itself
    for scale in (4.0, 2.0**-20):
        assert key_of(keys, X, y, scale * weight, tmp_path) == itself
    assert len(list(tmp_path.glob("*.npz"))) == 1


@pytest.mark.parametrize("scale", [3.0, 0.1, 1 / 7])
def test_weights_scaled_by_any_number_leave_the_key(tmp_path, keys, scale):
    X, y, weight = problem(8)
    itself = key_of(keys, X, y, weight, tmp_path)
    assert key_of(keys, X, y, scale * weight, tmp_path) == itself


def test_layers_change_the_key_only_where_they_are_scaled(tmp_path, keys):
    X, y, _ = problem(9)
    one, two = FakeFeatures(X, WIDTHS), FakeFeatures(X, (10, 20))
    for normalization, same in {"standard": True, None: True, "layer": False, "layer+standard": False}.items():
        first = key_of(keys, one, y, None, tmp_path, normalization=normalization)
        second = key_of(keys, Relayered(one, two), y, None, tmp_path, normalization=normalization)
        assert (first == second) == same


class Relayered(FakeFeatures):
    """The blocks of one matrix with the layers of another."""

    def __init__(self, source, layered):
        super().__init__(source.values, tuple(layer.stop - layer.start for layer in layered.layers))
        self._blocks = source

    def column_blocks(self, max_bytes):
        return self._blocks.column_blocks(max_bytes)


class Interrupt(KeyboardInterrupt):
    pass


def test_an_interrupted_search_goes_on_where_it_was(tmp_path, monkeypatch, solved_ratios):
    X, y, _ = problem(10)
    search = Head2ToeClassifierCV(
        alphas=(0.5, 0.2), keep_fractions=(None,), Cs=(1.0,), cv=3, refit="best", memory=tmp_path, verbose=2
    )
    points, report = [], paths.PathProgress.__call__

    def interrupt(self, point):
        points.append(point)
        if len(points) == 30:
            raise Interrupt
        report(self, point)

    n_points = len(np.unique(np.concatenate([chain_to(0.5), chain_to(0.2)])))
    assert n_points < 30 < 3 * n_points
    monkeypatch.setattr(paths.PathProgress, "__call__", interrupt)
    with pytest.raises(Interrupt), redirect_stdout(io.StringIO()):
        search.fit(X, y)
    kept = 30 // n_points
    assert len(list(tmp_path.glob("*.npz"))) == kept
    solved_ratios.clear()
    with redirect_stdout(io.StringIO()):
        search.fit(X, y)
    # The folds that are left, and the fit on all samples.
    assert sum(map(len, solved_ratios)) <= (3 - kept) * n_points + n_points
    assert sum(call[0] == 1.0 for call in solved_ratios) == 3 - kept + 1
    fresh = Head2ToeClassifierCV(**{**search.get_params(), "memory": None, "verbose": 0}).fit(X, y)
    np.testing.assert_array_equal(fresh.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"])
    np.testing.assert_allclose(fresh.decision_function(X), search.decision_function(X), atol=1e-4)


def test_a_longer_path_goes_on_from_the_shorter_one(tmp_path, solved_ratios):
    X, y, _ = problem(11)
    training = training_of(X, y)
    solve_path(training, [0.5], options(memory=tmp_path))
    solved_ratios.clear()
    solve_path(training, [0.2], options(memory=tmp_path))
    assert sorted(ratio for call in solved_ratios for ratio in call) == sorted(set(chain_to(0.2)) - set(chain_to(0.5)))
    solved_ratios.clear()
    solve_path(training, [0.5, 0.2, 0.85**3], options(memory=tmp_path))
    assert solved_ratios == []


def test_an_unconverged_path_warns_again_when_it_comes_from_the_disk(tmp_path, solved_ratios):
    X, y, _ = problem(12)
    model = Head2ToeClassifier(tol=1e-12, max_iter=1, memory=tmp_path)
    for _ in range(2):
        with pytest.warns(ConvergenceWarning, match=r"did not reach tol=1e-12 within max_iter=1"):
            model.fit(X, y)
    assert len(solved_ratios) == 1


LINE = re.compile(
    r"alpha (\d+)/(\d+) = ([\d.e-]+): \d+ active, objective [\d.e-]+, gap [\d.e+-]+, \d+ steps, \d+ passes; "
    r"[\d.e+]+ alphas/s, (\d+\.\d s|\d+ s|\d+ min \d+ s) left"
)


@pytest.mark.parametrize("estimator", [Head2ToeClassifier, Head2ToeSelector])
def test_verbose_prints_a_line_per_alpha(capsys, estimator):
    X, y, _ = problem(14)
    model = estimator(alpha=0.3, verbose=1).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    chain = chain_to(0.3)
    assert [match[1] for match in found] == [str(number) for number in range(1, len(chain) + 1)]
    assert {match[2] for match in found} == {str(len(chain))}
    alphas = [float(match[3]) for match in found]
    np.testing.assert_allclose(alphas, model.alpha_max_ * chain, rtol=1e-3)
    assert found[-1][4] == "0.0 s"


def test_without_verbose_nothing_is_printed(capsys, tmp_path):
    X, y, _ = problem(15)
    Head2ToeClassifier(memory=tmp_path).fit(X, y)
    Head2ToeSelector(memory=tmp_path).fit(X, y)
    Head2ToeClassifierCV(alphas=(0.5,), keep_fractions=(None,), cv=2).fit(X, y)
    assert capsys.readouterr() == ("", "")


def test_what_is_kept_prints_nothing(capsys, tmp_path):
    X, y, _ = problem(16)
    model = Head2ToeClassifier(alpha=0.5, memory=tmp_path, verbose=1).fit(X, y)
    assert len(capsys.readouterr().out.splitlines()) == len(chain_to(0.5))
    model.fit(X, y)
    assert capsys.readouterr().out == ""
