"""Plots of fitted estimators: which layers the features come from, and what a search found along alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from estimators.search import Head2ToeClassifierCV
from estimators.selector import SelectedFeatures, layer_totals

# Okabe and Ito's colours without yellow, which white swallows; a marker each, so that greyscale tells them apart too.
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
_Kept: TypeAlias = tuple[float | None, frozenset[str]]  # fraction of which layers
_DASHES = ("-", "--", ":", "-.")
_LONGEST_NAME = 24


@dataclass(kw_only=True, eq=False)
class Head2ToeLayersDisplay:
    """Which layers the selected features, and their scores, come from.

    One row per layer in network order, the first at the top, with two bars: the layer's share of the selected features
    and its share of their scores. Layers without selected features keep their row and have a grey name.

    Parameters
    ----------
    layer_names : array-like of shape (n_layers,), str
    n_features, n_selected : array-like of shape (n_layers,), int
        How many features each layer has, and how many of them are selected.
    scores : array-like of shape (n_layers,), float
        Sum of the scores of the selected ones.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
    figure_ : matplotlib.figure.Figure
    """

    layer_names: Any
    n_features: Any
    n_selected: Any
    scores: Any

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> Self:
        """Plot the layers of a fitted Head2ToeClassifier, Head2ToeClassifierCV or Head2ToeSelector."""
        if isinstance(estimator, SelectedFeatures):
            check_is_fitted(estimator)
        elif not hasattr(estimator, "feature_layers_"):
            raise TypeError(
                "estimator must be a Head2ToeClassifier, Head2ToeClassifierCV or Head2ToeSelector, "
                f"got {type(estimator).__name__}."
            )
        n_features, n_selected, scores = layer_totals(estimator)
        names = estimator.layer_names_
        return cls(layer_names=names, n_features=n_features, n_selected=n_selected, scores=scores).plot(ax=ax)

    def plot(self, ax: Any = None) -> Self:
        """Draw the bars into matplotlib axes, or into a figure of a size that suits the layers and their names.

        In axes too low for all names, every second is written, or every third, and so on.
        """
        matplotlib = _matplotlib(type(self).__name__)
        names, n_selected = [str(name) for name in self.layer_names], np.asarray(self.n_selected)
        row = float(np.clip(8.6 / len(names), 0.155, 0.36))  # inches
        if ax is None:
            width = 4.4 + 0.55 * _row_fontsize(72 * row) / 72 * max(map(len, names))
            _, ax = matplotlib.pyplot.subplots(figsize=(width, 1.15 + row * len(names)), layout="constrained")
        else:
            row = _height(ax) / len(names) / 72
        self.ax_, self.figure_ = ax, ax.get_figure()
        longest = self._draw_bars(n_selected)
        self._name_rows(names, n_selected, 72 * row)
        ax.set(xlim=(0, min(100, 1.05 * longest) or 100), ylim=(len(names) - 0.5, -0.5))
        ax.set(xlabel="share of all layers (%)", ylabel="layer")
        ax.grid(axis="x", color="0.8", linewidth=0.5)
        _finish(ax)
        total, used = int(np.sum(self.n_features)), np.count_nonzero(n_selected)
        _head(ax, f"{n_selected.sum()} of {total} features selected, from {used} of {len(names)} layers", 2)
        return self

    def _draw_bars(self, n_selected: NDArray[np.int64]) -> float:
        """Draw them; length of the longest."""
        rows, scores = np.arange(len(n_selected)), np.asarray(self.scores, dtype=np.float64)
        selected, scored = (100 * parts / (parts.sum() or 1) for parts in (n_selected, scores))
        for index in rows[1::2]:
            self.ax_.axhspan(index - 0.5, index + 0.5, color="0.95", linewidth=0, zorder=0)
        hatched: dict[str, Any] = dict(color="#E69F00", hatch="////", edgecolor="#7A5100", linewidth=0)
        self.ax_.barh(rows - 0.2, selected, height=0.38, label="selected features", color="#0072B2")
        self.ax_.barh(rows + 0.2, scored, height=0.38, label="their scores", **hatched)
        return float(max(selected.max(), scored.max()))

    def _name_rows(self, names: list[str], n_selected: NDArray[np.int64], row: float) -> None:
        size = _row_fontsize(row)
        written = range(0, len(names), math.ceil(1.1 * size / row))
        self.ax_.set_yticks(written, labels=[names[index] for index in written], fontsize=size)
        self.ax_.tick_params(axis="y", length=0)
        for index, label in zip(written, self.ax_.get_yticklabels(), strict=True):
            label.set_color("black" if n_selected[index] else "#767676")


@dataclass(kw_only=True, eq=False)
class Head2ToePathDisplay:
    """Cross-validated score and number of features along alpha, from strong to weak.

    One line per way of keeping features; each point is the best candidate over C, with the standard deviation over the
    folds as error bar. What does not depend on alpha is a level line. Lines are set apart sideways by a hair where
    error bars would hide each other. A star is the best candidate; with ``refit="one_standard_error"`` it may have
    another C than the line through it.

    Parameters
    ----------
    alphas : ndarray of shape (n_alphas,), float
        Decreasing.
    labels : sequence of str, of length n_lines
        How each line's candidates keep features.
    mean_scores, std_scores, n_features : ndarray of shape (n_lines, n_alphas), float
        Over the folds.
    best_line : int
    best_params : dict
        As in `Head2ToeClassifierCV`.
    best_score, best_n_features : float
        Means of the best candidate over the folds.
    score_name, title : str

    Attributes
    ----------
    ax_ : ndarray of shape (2,), matplotlib.axes.Axes
        Of the score and of the number of features.
    figure_ : matplotlib.figure.Figure
    """

    alphas: NDArray[np.float64]
    labels: Sequence[str]
    mean_scores: NDArray[np.float64]
    std_scores: NDArray[np.float64]
    n_features: NDArray[np.float64]
    best_line: int
    best_params: dict[str, Any]
    best_score: float
    best_n_features: float
    score_name: str
    title: str

    @classmethod
    def from_estimator(cls, estimator_cv: Any, *, ax: Any = None) -> Self:
        """Plot the search of a fitted Head2ToeClassifierCV, within the normalization and target size it chose."""
        if not isinstance(estimator_cv, Head2ToeClassifierCV):
            raise TypeError(f"estimator_cv must be a Head2ToeClassifierCV, got {type(estimator_cv).__name__}.")
        check_is_fitted(estimator_cv)
        results, best = estimator_cv.cv_results_, estimator_cv.best_params_
        scoring, alphas = estimator_cv.scoring or "accuracy", estimator_cv.alphas_
        scope, lines = _lines(estimator_cv)
        names = [name for name in estimator_cv.layer_names_ if name in scope]
        over_C = np.array([[line.get(alpha, line.get(None)) for alpha in alphas] for line in lines.values()])
        title = f"Best C at each point, normalization={best['normalization']!r}"
        if len(names) < len(estimator_cv.layer_names_):
            title += f", layers {_shorten(names[0])} to {_shorten(names[-1])}"
        return cls(
            alphas=alphas,
            labels=[_label(fraction, [name for name in names if name in layers], scope) for fraction, layers in lines],
            mean_scores=results["mean_test_score"][over_C],
            std_scores=results["std_test_score"][over_C],
            n_features=results["mean_n_features"][over_C],
            best_line=list(lines).index((best["keep_fraction"], frozenset(best.get("layers", names)))),
            best_params=best,
            best_score=float(results["mean_test_score"][estimator_cv.best_index_]),
            best_n_features=float(results["mean_n_features"][estimator_cv.best_index_]),
            score_name=scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score"),
            title=title,
        ).plot(ax=ax)

    def plot(self, ax: Any = None) -> Self:
        """Draw both panels: into a new figure, into a pair of matplotlib axes, or into one that is divided."""
        matplotlib = _matplotlib(type(self).__name__)
        self.ax_ = _panels(matplotlib, ax)
        score, count = self.ax_
        self.figure_ = score.get_figure()
        logs = np.log10(self.alphas)
        decades = float(np.ptp(logs)) or 0.5  # one alpha gets some room too
        for panel in self.ax_:
            _alpha_axis(panel, self.alphas, 0.07 * decades)
        _count_axis(count, self.n_features)
        apart = min(0.008 * decades, 0.6 * -np.diff(logs).max(initial=-np.inf) / len(self.labels))
        for index in range(len(self.labels)):
            # Moved on the paper, not in the data.
            aside = matplotlib.transforms.Affine2D().translate(apart * ((len(self.labels) - 1) / 2 - index), 0)
            self._draw_line(index, aside)
        score.set_ylabel(f"{self.score_name}\n(mean ± std over folds)")
        _head(score, self.title, 3)
        return self

    def _draw_line(self, index: int, aside: Any) -> None:
        score, count = self.ax_
        over, under = (panel.transScale + aside + panel.transLimits + panel.transAxes for panel in self.ax_)
        colour, marker = _STYLES[index % len(_STYLES)]
        dashes = _DASHES[index // len(_STYLES) % len(_DASHES)]
        style: dict[str, Any] = dict(color=colour, marker=marker, linestyle=dashes, markersize=4.5, linewidth=1.2)
        means, spread = self.mean_scores[index], self.std_scores[index]
        score.errorbar(
            self.alphas, means, yerr=spread, label=self.labels[index], elinewidth=0.8, transform=over, **style
        )
        count.plot(self.alphas, self.n_features[index], transform=under, **style)
        if index == self.best_line:
            star: dict[str, Any] = dict(marker="*", markersize=13, color=colour, markeredgecolor="black", zorder=5)
            alpha = self.best_params.get("alpha", self.alphas[0])
            score.plot([alpha], [self.best_score], transform=over, **star)
            count.plot([alpha], [self.best_n_features], transform=under, **star)
            self._name_best((alpha, self.best_score), over)

    def _name_best(self, point: tuple[float, float], transform: Any) -> None:
        """Text with a line to the point, in a strip kept free above everything that is drawn."""
        ax, best = self.ax_[0], self.best_params
        alpha = f"alpha={best['alpha']:.3g}, " if "alpha" in best else ""
        text = (
            f"best single: {self.best_score:.3g} with {self.best_n_features:.4g} features\n"
            f"{alpha}{self.labels[self.best_line]}, C={best['C']:.3g}"
        )
        low = min(np.nanmin(self.mean_scores - self.std_scores), self.best_score)
        high = max(np.nanmax(self.mean_scores + self.std_scores), self.best_score)
        span = high - low or 0.1
        strip = min(0.5, 40 / _height(ax))
        ax.set_ylim(low - 0.06 * span, high + span * strip / (1 - strip))
        ticks = ax.get_yticks()
        # No ticks in the strip: an accuracy of 1.2 does not exist.
        ax.set_yticks(ticks[(ticks >= ax.get_ylim()[0]) & (ticks <= high + (ticks[1] - ticks[0]) / 2)])
        across = ax.transAxes.inverted().transform(transform.transform(point))[0]
        ax.annotate(
            text,
            xy=point,
            xycoords=transform,
            xytext=(float(np.clip(across, 0.02, 0.98)), 0.97),
            textcoords="axes fraction",
            ha="left" if across < 0.5 else "right",
            va="top",
            fontsize=9,
            arrowprops=dict(arrowstyle="-", color="0.3", linewidth=0.8, shrinkA=1, shrinkB=6),
        )


def _lines(search: Head2ToeClassifierCV) -> tuple[frozenset[str], dict[_Kept, dict[float | None, int]]]:
    """The layers that the best candidate chose from, and the candidates with the best C by what they keep and alpha.

    Of single layers the last and the best one are shown: a line for each would hide the others.
    """
    results, best, every = search.cv_results_, search.best_params_, search.layer_names_.tolist()
    means = np.nan_to_num(results["mean_test_score"], nan=-np.inf)
    layers = [frozenset(params.get("layers", every)) for params in results["params"]]
    widest = [some for some in dict.fromkeys(layers) if not any(some < other for other in set(layers))]
    scope = next(some for some in widest if layers[search.best_index_] <= some)
    lines: dict[_Kept, dict[float | None, int]] = {}
    for index, params in enumerate(results["params"]):
        if params["normalization"] == best["normalization"] and layers[index] <= scope:
            line, alpha = lines.setdefault((params["keep_fraction"], layers[index]), {}), params.get("alpha")
            if means[index] > means[line.setdefault(alpha, index)]:
                line[alpha] = index
    last = frozenset([[name for name in every if name in scope][-1]])
    single = [kept for kept in lines if len(kept[1]) == 1 and kept[1] not in (last, scope)]
    single.sort(key=lambda kept: (kept[1] != layers[search.best_index_], -means[lines[kept][None]]))
    return scope, {kept: line for kept, line in lines.items() if kept not in single[1:]}


def _label(keep_fraction: float | None, names: list[str], scope: frozenset[str]) -> str:
    """How a line's candidates keep features."""
    if len(names) < len(scope):
        return f"layer{'s' * (len(names) > 1)} {' and '.join(_shorten(name) for name in names)}"
    if keep_fraction is None:
        return "nonzero weights"
    return "all features" if keep_fraction == 1 else f"top {100 * keep_fraction:g} %"


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _matplotlib(display: str) -> Any:
    try:
        import matplotlib.axes
        import matplotlib.pyplot
        import matplotlib.transforms
    except ImportError as error:
        raise ImportError(f"{display}.plot() needs matplotlib: pip install 'head2toe[plot]'.") from error
    return matplotlib


def _height(ax: Any) -> float:
    """In points."""
    return float(72 * ax.get_window_extent().height / ax.get_figure().dpi)


def _row_fontsize(row: float) -> float:
    """Size that fits rows this many points high, but stays legible."""
    return float(np.clip(0.75 * row, 6, 9))


def _finish(ax: Any) -> None:
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _head(ax: Any, title: str, n_columns: int) -> None:
    """Legend above the axes, where it hides nothing, and the title above the legend."""
    room = dict(borderaxespad=0.1, borderpad=0.2, columnspacing=1.5)
    legend = ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=n_columns, frameon=False, fontsize=9, **room)
    n_rows = math.ceil(len(legend.get_texts()) / n_columns)
    ax.set_title(title, loc="left", fontsize=10, pad=8 + 14 * n_rows)


def _panels(matplotlib: Any, ax: Any) -> NDArray[Any]:
    """Axes of the score and of the number of features."""
    if ax is not None and not isinstance(ax, matplotlib.axes.Axes):
        pair = np.ravel(np.asarray(ax, dtype=object))
        if len(pair) != 2 or not all(isinstance(part, matplotlib.axes.Axes) for part in pair):
            raise ValueError(f"ax must be None, one matplotlib Axes or a pair of them, got {ax!r}.")
        return pair
    if ax is None:
        _, (score, count) = matplotlib.pyplot.subplots(
            2, sharex=True, figsize=(6.4, 6), height_ratios=(5, 3), layout="constrained"
        )
    else:
        ax.set_axis_off()
        score, count = ax.inset_axes([0, 0.41, 1, 0.59]), ax.inset_axes([0, 0, 1, 0.36])
    score.tick_params(labelbottom=False)
    score.xaxis.label.set_visible(False)
    return np.array([score, count], dtype=object)


def _alpha_axis(panel: Any, alphas: NDArray[np.float64], margin: float, fontsize: float = 9) -> None:
    """Logarithmic, from strong to weak, with as many alphas written below as fit."""
    logs = np.log10(alphas)
    panel.set_xscale("log")
    panel.set_xlim(10 ** (logs[0] + margin), 10 ** (logs[-1] - margin))
    panel.minorticks_off()
    names = [f"{alpha:.2g}" for alpha in alphas]
    places = panel.transData.transform(np.stack([alphas, np.ones_like(alphas)], axis=1))[:, 0]
    places *= 72 / panel.get_figure().dpi
    written = [0]
    for index in range(1, len(alphas)):
        letters = (len(names[index]) + len(names[written[-1]])) / 2
        if places[index] - places[written[-1]] >= 0.65 * fontsize * letters + 4:
            written.append(index)
    panel.set_xticks(alphas[written], labels=[names[index] for index in written], fontsize=fontsize)
    panel.set_xlabel("alpha, from strong to weak (fraction of alpha_max)")
    panel.grid(color="0.9", linewidth=0.5)
    _finish(panel)


def _count_axis(panel: Any, n_features: NDArray[np.float64]) -> None:
    panel.set_ylabel("mean number\nof features")
    low, high = n_features.min() / 1.5, max(1, n_features.max()) * 1.5
    if n_features.min() >= 1:
        panel.set_yscale("log")
    else:
        # Means below one, zero among them, have no place on a logarithmic axis.
        panel.set_yscale("symlog", linthresh=1, linscale=0.5)
        low = -0.5
    steps = (1, 2, 5) if high / max(low, 1) < 200 else (1,)
    ticks = [0, *(step * 10**power for power in range(math.ceil(math.log10(high))) for step in steps)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    panel.set_yticks(ticks, labels=[f"{tick}" for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(low, high)
