"""What the plots show, and where they draw it."""

import itertools
import sys

import matplotlib as mpl
import numpy as np
import pytest
from _estimator_data import FakeFeatures, make_problem
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector
from estimators.display import Head2ToeLayersDisplay, Head2ToePathDisplay

mpl.use("Agg")
import matplotlib.pyplot as plt

ALPHAS, KEPT = (0.3, 1.0, 0.6, 0.15), (None, 0.25, 1.0)


@pytest.fixture(autouse=True)
def _no_figures():
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def problem():
    X, y, _ = make_problem(0, n=60, d=12)
    return FakeFeatures(X, (3, 4, 4, 1)), y


@pytest.fixture(scope="module")
def search(problem):
    X, y = make_problem(0, n=60, d=12)[:2]
    X = X.astype(np.float32)
    return Head2ToeClassifierCV(
        alphas=ALPHAS, keep_fractions=KEPT, Cs=(0.001, 0.1), normalizations=("layer", "standard"), cv=3, device="cpu"
    ).fit(X, y)


class Fitted:
    """What the layers display reads of an estimator that selected the first features of each layer."""

    def __init__(self, names, n_features, n_selected):
        self.layer_names_ = np.array(names, dtype=object)
        self.feature_layers_ = np.repeat(np.arange(len(names)), n_features)
        starts = np.cumsum(n_features) - n_features
        chosen = [start + np.arange(count) for start, count in zip(starts, n_selected, strict=True)]
        self.selected_features_ = np.concatenate(chosen).astype(np.int64)
        self.feature_scores_ = np.arange(len(self.feature_layers_), dtype=float)


def bars(ax):
    """Lengths of the bars by label, top row first."""
    found = {}
    for container in ax.containers:
        order = np.argsort([bar.get_y() for bar in container])
        found[container.get_label()] = np.array([container[i].get_width() for i in order])
    return found


def overlap(a, b):
    return a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1


def extents(figure, artists):
    figure.canvas.draw()
    return [artist.get_window_extent() for artist in artists]


@pytest.mark.parametrize(
    "estimator",
    [
        Head2ToeClassifier(alpha=0.3, device="cpu"),
        Head2ToeSelector(alpha=0.3, device="cpu"),
        Head2ToeClassifierCV(alphas=[0.3], Cs=[0.1], cv=2, device="cpu"),
    ],
)
def test_bars_are_the_layers_shares_in_percent(problem, estimator):
    X, y = problem
    estimator.fit(X, y)
    display = Head2ToeLayersDisplay.from_estimator(estimator)
    owners = np.repeat(np.arange(4), (3, 4, 4, 1))[estimator.selected_features_]
    selected = np.bincount(owners, minlength=4)
    score = np.bincount(owners, estimator.feature_scores_[estimator.selected_features_], minlength=4)
    shown = bars(display.ax_)
    np.testing.assert_allclose(shown["selected features"], 100 * selected / selected.sum())
    np.testing.assert_allclose(shown["their scores"], 100 * score / score.sum())
    assert [shares.sum() for shares in shown.values()] == pytest.approx([100, 100])
    assert display.ax_.get_xlim()[1] > max(shares.max() for shares in shown.values())
    assert f"{selected.sum()} of 12 features" in display.ax_.get_title(loc="left")


def test_layers_are_in_network_order_from_the_top_and_empty_ones_keep_a_grey_row():
    ax = Head2ToeLayersDisplay.from_estimator(Fitted(["stem", "a", "head"], [2, 3, 4], [1, 0, 3])).ax_
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels] == ["stem", "a", "head"]
    heights = ax.transData.transform([(0, tick) for tick in ax.get_yticks()])[:, 1]
    assert (np.diff(heights) < 0).all()
    assert bars(ax)["selected features"].tolist() == [25, 0, 75]
    assert labels[0].get_color() == labels[2].get_color() != labels[1].get_color()


@pytest.mark.parametrize("n_layers", [1, 5, 60, 110])
def test_every_layer_has_a_name_of_its_own_figure_and_nothing_overlaps(n_layers):
    names = [f"layer{i}.{i % 7}.conv2:in" for i in range(n_layers)]
    display = Head2ToeLayersDisplay.from_estimator(Fitted(names, [3] * n_layers, [2] * n_layers))
    labels = display.ax_.get_yticklabels()
    assert [label.get_text() for label in labels] == names
    boxes = extents(display.figure_, [*labels, display.ax_.yaxis.label, display.ax_.get_legend()])
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.y1 <= display.figure_.bbox.height for box in boxes)
    drawn = [bar.get_window_extent() for container in display.ax_.containers for bar in container]
    assert not any(overlap(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_bars_keep_their_room_beside_long_names():
    display = Head2ToeLayersDisplay.from_estimator(Fitted(["backbone." * 12 + "conv:in", "head"], [3, 3], [2, 1]))
    axes, label = extents(display.figure_, [display.ax_, display.ax_.get_yticklabels()[0]])
    assert label.x0 >= 0
    assert axes.width > 3 * display.figure_.dpi


def test_low_axes_write_fewer_names_that_do_not_overlap():
    ax = plt.subplots(figsize=(5, 3))[1]
    Head2ToeLayersDisplay.from_estimator(Fitted([f"layer{i}" for i in range(80)], [2] * 80, [1] * 80), ax=ax)
    labels = ax.get_yticklabels()
    assert 10 < len(labels) < 80
    assert [label.get_text() for label in labels] == [f"layer{int(tick)}" for tick in ax.get_yticks()]
    boxes = extents(ax.figure, labels)
    assert not any(overlap(a, b) for a, b in itertools.pairwise(boxes))


def test_nothing_selected_is_an_empty_plot():
    ax = Head2ToeLayersDisplay.from_estimator(Fitted(["a", "b"], [2, 2], [0, 0])).ax_
    assert [shares.tolist() for shares in bars(ax).values()] == [[0, 0], [0, 0]]
    assert ax.get_xlim() == (0, 100)
    assert "0 of 4 features" in ax.get_title(loc="left")


def at(search, name, alpha, keep_fraction):
    """Values of cv_results_ over C, by a plain loop; what keeps all features has no alpha."""
    wanted = {"keep_fraction": keep_fraction, "normalization": search.best_params_["normalization"]}
    if keep_fraction != 1.0:
        wanted["alpha"] = alpha
    results = search.cv_results_
    return [results[name][i] for i, params in enumerate(results["params"]) if wanted.items() <= params.items()]


def test_lines_are_the_best_over_C_in_the_chosen_normalization(search):
    display = Head2ToePathDisplay.from_estimator(search)
    score, count = display.ax_
    assert [text.get_text() for text in score.get_legend().get_texts()] == [
        "nonzero weights",
        "top 25 %",
        "all features",
    ]
    assert [container.get_label() for container in score.containers] == ["nonzero weights", "top 25 %", "all features"]
    for keep_fraction, container, line in zip(KEPT, score.containers, lines(count), strict=True):
        alphas, means = container.lines[0].get_data()
        assert alphas.tolist() == line.get_xdata().tolist() == sorted(ALPHAS, reverse=True)
        for i, alpha in enumerate(alphas):
            scores = at(search, "mean_test_score", alpha, keep_fraction)
            assert len(scores) == 2
            assert means[i] == max(scores)
            spread = at(search, "std_test_score", alpha, keep_fraction)[int(np.argmax(scores))]
            low, high = container.lines[2][0].get_segments()[i][:, 1]
            assert (low, high) == pytest.approx((means[i] - spread, means[i] + spread))
            assert line.get_ydata()[i] == at(search, "mean_n_features", alpha, keep_fraction)[0]


def lines(ax):
    return [line for line in ax.lines if line.get_marker() != "*"]


def stars(ax):
    return [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "*"]


def test_the_best_C_is_not_always_the_first(search):
    assert any(np.argmax(at(search, "mean_test_score", alpha, 0.25)) == 1 for alpha in ALPHAS)


def check_chosen(search, score, count):
    best, alpha = search.best_params_, search.best_params_.get("alpha", search.alphas_[0])
    mean = search.cv_results_["mean_test_score"][search.best_index_]
    assert stars(score) == [[[alpha, mean]]]
    assert stars(count) == [[[alpha, search.cv_results_["mean_n_features"][search.best_index_]]]]
    (text,) = score.texts
    assert f"best single: {mean:.3g} with" in text.get_text()
    assert (f"alpha={alpha:g}, " in text.get_text()) == ("alpha" in best)
    assert f"C={best['C']:g}" in text.get_text()


def test_the_chosen_point_is_marked_and_named(search):
    check_chosen(search, *Head2ToePathDisplay.from_estimator(search).ax_)


def test_the_chosen_point_may_lie_below_its_line():
    X, y, _ = make_problem(2, n=60, d=12)
    search = Head2ToeClassifierCV(
        alphas=(0.3,), keep_fractions=(None,), Cs=(0.03, 1.0), cv=4, refit="one_standard_error", device="cpu"
    ).fit(X, y)
    assert search.best_score_ < search.cv_results_["mean_test_score"].max()
    score, count = Head2ToePathDisplay.from_estimator(search).ax_
    check_chosen(search, score, count)
    assert score.containers[0].lines[0].get_ydata().tolist() == [search.cv_results_["mean_test_score"].max()]


def test_both_panels_share_alpha_from_strong_to_weak_and_show_every_point(search):
    display = Head2ToePathDisplay.from_estimator(search)
    display.figure_.canvas.draw()
    for ax in display.ax_:
        assert ax.get_xscale() == "log"
        assert ax.get_xlim() == display.ax_[0].get_xlim()
        assert ax.get_xlim()[0] > ax.get_xlim()[1]
        for line in ax.lines:
            inside = ax.transAxes.inverted().transform(line.get_transform().transform(line.get_xydata()))
            assert ((inside > 0) & (inside < 1)).all()
            across = ax.transData.inverted().transform(line.get_transform().transform(line.get_xydata()))[:, 0]
            np.testing.assert_allclose(across, line.get_xdata(), rtol=0.1)
    assert display.ax_[1].get_ylabel() == "mean number\nof features"
    assert display.ax_[0].get_ylabel().startswith("accuracy")


def test_the_number_of_features_is_logarithmic_unless_it_comes_near_zero(search):
    assert search.cv_results_["mean_n_features"].min() == 0
    assert Head2ToePathDisplay.from_estimator(search).ax_[1].get_yscale() == "symlog"
    X, y, _ = make_problem(0, n=60, d=12)
    kept = Head2ToeClassifierCV(alphas=(0.5, 0.2), keep_fractions=(0.3,), Cs=(1.0,), cv=2, device="cpu").fit(X, y)
    assert Head2ToePathDisplay.from_estimator(kept).ax_[1].get_yscale() == "log"


def test_the_text_hides_no_line(search):
    display = Head2ToePathDisplay.from_estimator(search)
    score = display.ax_[0]
    display.figure_.canvas.draw()
    # An annotation's own extent has its line in it.
    box = mpl.text.Text.get_window_extent(score.texts[0])
    upper = [segment for container in score.containers for segment in container.lines[2][0].get_segments()]
    assert box.y0 > score.transData.transform([(1, max(segment[1, 1] for segment in upper))])[0, 1]
    assert score.get_window_extent().x0 <= box.x0
    assert box.x1 <= display.figure_.bbox.width


@pytest.mark.parametrize(
    ("scoring", "name"), [("neg_log_loss", "neg_log_loss"), (lambda model, X, y: model.score(X, y), "<lambda>")]
)
def test_one_alpha_and_another_score(scoring, name):
    X, y, _ = make_problem(0, n=60, d=12)
    search = Head2ToeClassifierCV(alphas=[0.4], Cs=[0.1, 1.0], cv=2, scoring=scoring, device="cpu")
    search.fit(X.astype(np.float32), y)
    display = Head2ToePathDisplay.from_estimator(search)
    display.figure_.canvas.draw()
    score, count = display.ax_
    check_chosen(search, score, count)
    assert score.get_ylabel().startswith(name)
    assert len(score.containers) == len(lines(count)) == 5
    drawn = [container.lines[0] for container in score.containers]
    places = [line.get_transform().transform(line.get_xydata())[0, 0] for line in drawn]
    assert (np.diff(places) > 1).all()


def test_many_alphas_have_labels_that_do_not_overlap():
    alphas, line = np.geomspace(0.9, 0.01, 40), np.linspace(0.5, 0.9, 40)[None]
    display = Head2ToePathDisplay(
        alphas=alphas,
        labels=["nonzero weights"],
        mean_scores=line,
        std_scores=0.1 * line,
        n_features=100 * line,
        best_line=0,
        best_params={"alpha": alphas[-1], "C": 1.0},
        best_score=0.9,
        best_n_features=90,
        score_name="accuracy",
        title="many alphas",
    ).plot()
    labels = display.ax_[1].get_xticklabels()
    assert len(labels) > 5
    boxes = extents(display.figure_, labels)
    assert not any(overlap(a, b) for a, b in itertools.pairwise(boxes))


def test_without_axes_pyplot_holds_one_figure_more(search):
    layers = Head2ToeLayersDisplay.from_estimator(Fitted(["a"], [2], [1]))
    assert plt.get_fignums() == [layers.figure_.number]
    path = Head2ToePathDisplay.from_estimator(search)
    assert plt.get_fignums() == [layers.figure_.number, path.figure_.number]
    assert layers.plot().figure_ is not path.figure_
    assert len(plt.get_fignums()) == 3


def test_given_axes_are_used_and_no_figure_is_opened(search):
    figure = mpl.figure.Figure()
    axes = figure.subplots(1, 4)
    layers = Head2ToeLayersDisplay.from_estimator(Fitted(["a", "b"], [2, 2], [1, 1]), ax=axes[0])
    assert layers.ax_ is axes[0]
    pair = Head2ToePathDisplay.from_estimator(search, ax=axes[1:3])
    assert list(pair.ax_) == list(axes[1:3])
    assert all(ax.get_xlabel() and ax.xaxis.label.get_visible() for ax in pair.ax_)
    split = Head2ToePathDisplay.from_estimator(search, ax=axes[3])
    figure.canvas.draw()
    bounds = axes[3].get_window_extent()
    upper, lower = (ax.get_window_extent() for ax in split.ax_)
    assert bounds.y0 - 1 <= lower.y0 < lower.y1 < upper.y0 < upper.y1 <= bounds.y1 + 1
    assert (upper.x0, upper.x1) == pytest.approx((bounds.x0, bounds.x1))
    assert not axes[3].axison
    assert {layers.figure_, pair.figure_, split.figure_} == {figure}
    assert plt.get_fignums() == []


@pytest.mark.parametrize("ax", [[None, None], "axes", [1, 2, 3]])
def test_other_axes_are_refused_before_anything_is_drawn(search, ax):
    with pytest.raises(ValueError, match="ax must be None, one matplotlib Axes or a pair of them"):
        Head2ToePathDisplay.from_estimator(search, ax=ax)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("estimator", [Head2ToeClassifier(), Head2ToeClassifierCV(), Head2ToeSelector()])
def test_layers_need_a_fitted_estimator(estimator):
    with pytest.raises(NotFittedError):
        Head2ToeLayersDisplay.from_estimator(estimator)


@pytest.mark.parametrize("other", [LogisticRegression(), "model", None])
def test_layers_refuse_other_things(other):
    with pytest.raises(TypeError, match=rf"^estimator must be a Head2ToeClassifier.* got {type(other).__name__}\.$"):
        Head2ToeLayersDisplay.from_estimator(other)


def test_path_needs_a_fitted_search():
    with pytest.raises(NotFittedError):
        Head2ToePathDisplay.from_estimator(Head2ToeClassifierCV())
    with pytest.raises(TypeError, match=r"^estimator_cv must be a Head2ToeClassifierCV, got Head2ToeClassifier\.$"):
        Head2ToePathDisplay.from_estimator(Head2ToeClassifier())


def test_a_missing_matplotlib_is_named_with_its_extra(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    for draw in (
        lambda: Head2ToeLayersDisplay.from_estimator(Fitted(["a"], [2], [1])),
        lambda: Head2ToePathDisplay.from_estimator(search),
    ):
        with pytest.raises(ImportError, match=r"Display.plot\(\) needs matplotlib: pip install 'head2toe\[plot\]'\."):
            draw()


def test_layers_are_level_lines_under_their_names():
    X, y, _ = make_problem(4, n=60, d=12)
    search = Head2ToeClassifierCV(alphas=(0.5, 0.2), keep_fractions=(None,), Cs=(1.0,), cv=2, device="cpu")
    display = Head2ToePathDisplay.from_estimator(search.fit(FakeFeatures(X, (5, 4, 3)), y))
    score, count = display.ax_
    labels = [text.get_text() for text in score.get_legend().get_texts()]
    assert labels[:3] == ["nonzero weights", "layer net.2", "layers net.1 and net.2"]
    means, params = search.cv_results_["mean_test_score"], search.cv_results_["params"]
    best = {}
    for layer in ("net.0", "net.1"):
        best[layer] = max(m for m, p in zip(means, params, strict=True) if p.get("layers") == [layer])
    assert labels[3:] == [f"layer {max(best, key=best.get)}"]
    assert [list(line.get_ydata()) for line in lines(count)[1:3]] == [[3, 3], [7, 7]]


def test_a_layer_that_is_best_has_its_star_where_its_line_begins():
    y = np.arange(60) % 5
    X = np.random.default_rng(0).normal(size=(60, 16))
    X[:, 9:13] += 4 * np.eye(5, 4)[y]
    names = "backbone." * 4 + "blocks"
    search = Head2ToeClassifierCV(alphas=(0.99, 0.98), keep_fractions=(None,), Cs=(0.1,), cv=2, device="cpu")
    search.fit(FakeFeatures(X, (4, 5, 4, 3), name=names), y)
    assert search.best_params_["layers"] == [f"{names}.2"]
    score, count = Head2ToePathDisplay.from_estimator(search).ax_
    mean = search.cv_results_["mean_test_score"][search.best_index_]
    assert stars(score) == [[[0.99, mean]]]
    assert stars(count) == [[[0.99, 4.0]]]
    # Long names are shortened.
    assert score.texts[0].get_text().splitlines()[1] == f"layer …{names[-21:]}.2, C=0.1"
