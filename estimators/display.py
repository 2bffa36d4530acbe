"""Plots of fitted estimators: which layers the features come from, and how the choice along alpha was made."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
Kept: TypeAlias = tuple[float | None, int | None, int | None]
_DASHES = ("-", "--", ":", "-.")
_MUTED = "#767676"
_READ = ("selected_features_", "feature_scores_", "feature_layers_", "layer_names_")


class Head2ToeLayersDisplay:
    """Which layers the selected features, and their scores, come from.

    One row per layer in network order, the first at the top, with two bars: the layer's share of the selected features
    and its share of their scores. Layers without selected features keep their row and have a grey name.

    Parameters
    ----------
    layer_names : array-like of shape (n_layers,), str
    n_features : array-like of shape (n_layers,), int
        How many features each layer has.
    n_selected : array-like of shape (n_layers,), int
        How many of them are selected.
    scores : array-like of shape (n_layers,), float
        Sum of the scores of the selected ones.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
    figure_ : matplotlib.figure.Figure

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from estimators import Head2ToeClassifier
    >>> from estimators.display import Head2ToeLayersDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> display = Head2ToeLayersDisplay.from_estimator(Head2ToeClassifier().fit(X, y))  # doctest: +SKIP
    """

    def __init__(self, *, layer_names: Any, n_features: Any, n_selected: Any, scores: Any) -> None:
        self.layer_names = layer_names
        self.n_features = n_features
        self.n_selected = n_selected
        self.scores = scores

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> Self:
        """Plot the layers of a fitted estimator.

        Parameters
        ----------
        estimator : Head2ToeClassifier, Head2ToeClassifierCV or Head2ToeSelector
            Fitted.
        ax : matplotlib.axes.Axes, default=None
            As in `plot`.

        Returns
        -------
        display : Head2ToeLayersDisplay

        Raises
        ------
        TypeError
            If ``estimator`` is something else.
        NotFittedError
            If ``estimator`` is not fitted.
        ImportError
            If matplotlib is not installed: ``pip install 'head2toe[plot]'``.
        """
        if isinstance(estimator, SelectedFeatures):
            check_is_fitted(estimator)
        if not all(hasattr(estimator, name) for name in _READ):
            raise TypeError(
                "estimator must be a Head2ToeClassifier, Head2ToeClassifierCV or Head2ToeSelector, "
                f"got {type(estimator).__name__}."
            )
        n_features, n_selected, scores = layer_totals(estimator)
        return cls(
            layer_names=estimator.layer_names_, n_features=n_features, n_selected=n_selected, scores=scores
        ).plot(ax=ax)

    def plot(self, ax: Any = None) -> Self:
        """Draw the bars.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to draw; None makes a figure that grows with the number of layers and the length of their names.
            In axes too low for all names, every second is written, or every third, and so on.

        Returns
        -------
        display : Head2ToeLayersDisplay

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install 'head2toe[plot]'``.
        """
        matplotlib = _matplotlib(type(self).__name__)
        names, n_selected = [str(name) for name in self.layer_names], np.asarray(self.n_selected)
        n_layers = len(names)
        if ax is None:
            ax, row = _rows_figure(matplotlib, names)
        else:
            row = _height(ax) / n_layers
        self.ax_, self.figure_ = ax, ax.get_figure()

        longest = self._draw_bars(n_selected)
        _name_rows(ax, names, n_selected, row)
        ax.set(xlim=(0, min(100, 1.05 * longest) or 100), ylim=(n_layers - 0.5, -0.5))
        ax.set(xlabel="share of all layers (%)", ylabel="layer")
        ax.grid(axis="x", color="0.8", linewidth=0.5)
        ax.set_axisbelow(True)
        _despine(ax)
        total, used = int(np.sum(self.n_features)), np.count_nonzero(n_selected)
        _head(ax, f"{n_selected.sum()} of {total} features selected, from {used} of {n_layers} layers", 2)
        return self

    def _draw_bars(self, n_selected: NDArray[np.int64]) -> float:
        """Draw them; length of the longest."""
        rows, selected, scores = np.arange(len(n_selected)), _percent(n_selected), _percent(np.asarray(self.scores))
        for index in rows[1::2]:
            self.ax_.axhspan(index - 0.5, index + 0.5, color="0.95", linewidth=0, zorder=0)
        hatched: dict[str, Any] = dict(color="#E69F00", hatch="////", edgecolor="#7A5100", linewidth=0)
        self.ax_.barh(rows - 0.2, selected, height=0.38, label="selected features", color="#0072B2")
        self.ax_.barh(rows + 0.2, scores, height=0.38, label="their scores", **hatched)
        return float(max(selected.max(), scores.max()))


class Head2ToePathDisplay:
    """Cross-validated score and number of features along alpha, from strong to weak.

    One line per keep_fraction; each point is the best candidate over C, with the standard deviation over the folds as
    error bar. Lines are set apart sideways by a hair where error bars would hide each other. A star is the chosen
    candidate; with ``one_standard_error`` it may have another C than the line through its alpha.

    Parameters
    ----------
    alphas : array-like of shape (n_alphas,), float
        Decreasing.
    kept : sequence of (keep_fraction, last_layers, layer), of length n_kept
        What decides which features are kept, besides alpha: one of the two, or neither.
    mean_scores, std_scores : array-like of shape (n_kept, n_alphas), float
        Over the folds.
    n_features : array-like of shape (n_kept, n_alphas), float
        Mean over the folds.
    best_params : dict
        ``alpha``, ``keep_fraction``, ``last_layers``, ``layer``, ``C``, ``normalization`` and ``target_size`` of the
        chosen candidate.
    best_score, best_n_features : float
        Its means over the folds.
    score_name : str

    Attributes
    ----------
    ax_ : ndarray of shape (2,), matplotlib.axes.Axes
        Of the score and of the number of features.
    figure_ : matplotlib.figure.Figure

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from estimators import Head2ToeClassifierCV
    >>> from estimators.display import Head2ToePathDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> display = Head2ToePathDisplay.from_estimator(Head2ToeClassifierCV().fit(X, y))  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        alphas: Any,
        kept: Sequence[Kept],
        mean_scores: Any,
        std_scores: Any,
        n_features: Any,
        best_params: dict[str, Any],
        best_score: float,
        best_n_features: float,
        score_name: str,
    ) -> None:
        self.alphas = alphas
        self.kept = kept
        self.mean_scores = mean_scores
        self.std_scores = std_scores
        self.n_features = n_features
        self.best_params = best_params
        self.best_score = best_score
        self.best_n_features = best_n_features
        self.score_name = score_name

    @classmethod
    def from_estimator(cls, estimator_cv: Any, *, ax: Any = None) -> Self:
        """Plot the search of a fitted `Head2ToeClassifierCV`, within the normalization and target size it chose.

        Parameters
        ----------
        estimator_cv : Head2ToeClassifierCV
            Fitted.
        ax : matplotlib.axes.Axes or pair of them, default=None
            As in `plot`.

        Returns
        -------
        display : Head2ToePathDisplay

        Raises
        ------
        TypeError
            If ``estimator_cv`` is something else.
        NotFittedError
            If ``estimator_cv`` is not fitted.
        ValueError, ImportError
            As `plot`.
        """
        if not isinstance(estimator_cv, Head2ToeClassifierCV):
            raise TypeError(f"estimator_cv must be a Head2ToeClassifierCV, got {type(estimator_cv).__name__}.")
        check_is_fitted(estimator_cv)
        results, best, scoring = estimator_cv.cv_results_, estimator_cv.best_params_, estimator_cv.scoring or "accuracy"
        shown = [index for index, params in enumerate(results["params"]) if _search(params) == _search(best)]
        candidates = [results["params"][index] for index in shown]
        alphas = sorted({params["alpha"] for params in candidates}, reverse=True)
        kept = _without_other_single_layers(results, shown, best, list(dict.fromkeys(map(_kept, candidates))))
        over_C = _best_over_C(results, shown, alphas, kept)
        return cls(
            alphas=np.array(alphas),
            kept=kept,
            mean_scores=results["mean_test_score"][over_C],
            std_scores=results["std_test_score"][over_C],
            n_features=results["mean_n_features"][over_C],
            best_params=best,
            best_score=estimator_cv.best_score_,
            best_n_features=float(results["mean_n_features"][estimator_cv.best_index_]),
            score_name=scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score"),
        ).plot(ax=ax)

    def plot(self, ax: Any = None) -> Self:
        """Draw both panels.

        Parameters
        ----------
        ax : matplotlib.axes.Axes or pair of them, default=None
            None makes a figure. One Axes is divided among the two panels, as in scikit-learn's
            PartialDependenceDisplay. A pair takes the score and the number of features.

        Returns
        -------
        display : Head2ToePathDisplay

        Raises
        ------
        ValueError
            If ``ax`` is neither None, nor one Axes, nor two.
        ImportError
            If matplotlib is not installed: ``pip install 'head2toe[plot]'``.
        """
        matplotlib = _matplotlib(type(self).__name__)
        self.ax_ = _panels(matplotlib, ax)
        score, count = self.ax_
        self.figure_ = score.get_figure()
        for panel in self.ax_:
            _alpha_axis(panel, np.asarray(self.alphas, dtype=float))
        _count_axis(count, np.asarray(self.n_features))
        for index, aside in enumerate(self._offsets(matplotlib)):
            self._draw_line(index, aside)
        score.set_ylabel(f"{self.score_name}\n(mean ± std over folds)")
        normalization, target_size = _search(self.best_params)
        chosen = "" if target_size is None else f", target_size={target_size}"
        _head(score, f"Best C at each point, normalization={normalization!r}{chosen}", 3)
        return self

    def _offsets(self, matplotlib: Any) -> list[Any]:
        """Transforms that set the lines apart sideways, the first to the left, without changing their data."""
        n_lines, alphas = len(self.kept), np.log10(self.alphas)
        gaps = -np.diff(alphas)
        step = min(0.008 * _decades(alphas), 0.6 * gaps.min(initial=np.inf) / n_lines)
        return [
            matplotlib.transforms.Affine2D().translate(step * ((n_lines - 1) / 2 - index), 0)
            for index in range(n_lines)
        ]

    def _draw_line(self, index: int, aside: Any) -> None:
        score, count = self.ax_
        over, under = (panel.transScale + aside + panel.transLimits + panel.transAxes for panel in self.ax_)
        colour, marker = _STYLES[index % len(_STYLES)]
        dashes = _DASHES[index // len(_STYLES) % len(_DASHES)]
        style: dict[str, Any] = dict(color=colour, marker=marker, linestyle=dashes, markersize=4.5, linewidth=1.2)
        label = _keep_label(*self.kept[index])
        means, spread = self.mean_scores[index], self.std_scores[index]
        score.errorbar(self.alphas, means, yerr=spread, label=label, elinewidth=0.8, transform=over, **style)
        count.plot(self.alphas, self.n_features[index], transform=under, **style)
        if self.kept[index] == _kept(self.best_params):
            star: dict[str, Any] = dict(marker="*", markersize=13, color=colour, markeredgecolor="black", zorder=5)
            alpha = self.best_params["alpha"]
            score.plot([alpha], [self.best_score], transform=over, **star)
            count.plot([alpha], [self.best_n_features], transform=under, **star)
            _annotate_above(score, self._chosen_text(), (alpha, self.best_score), over, self._score_range())

    def _chosen_text(self) -> str:
        best = self.best_params
        return (
            f"best single: {self.best_score:.3g} with {self.best_n_features:.4g} features\n"
            f"alpha={best['alpha']:.3g}, {_keep_label(*_kept(best))}, C={best['C']:.3g}"
        )

    def _score_range(self) -> tuple[float, float]:
        means, spread = np.asarray(self.mean_scores), np.asarray(self.std_scores)
        return (
            float(min(np.nanmin(means - spread), self.best_score)),
            float(max(np.nanmax(means + spread), self.best_score)),
        )


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


def _despine(ax: Any) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _percent(parts: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(100 * parts / (parts.sum() or 1), dtype=np.float64)


def _rows_figure(matplotlib: Any, names: list[str]) -> tuple[Any, float]:
    """Axes of a new figure that is high enough for a row per name and wide enough for the names; points per row."""
    row = float(np.clip(8.6 / len(names), 0.155, 0.36))
    width = 4.4 + 0.55 * _row_fontsize(72 * row) / 72 * max(len(name) for name in names)
    _, ax = matplotlib.pyplot.subplots(figsize=(width, 1.15 + row * len(names)), layout="constrained")
    return ax, 72 * row


def _row_fontsize(row: float) -> float:
    """Size that fits rows this many points high, but stays legible."""
    return float(np.clip(0.75 * row, 6, 9))


def _name_rows(ax: Any, names: list[str], n_selected: NDArray[np.int64], row: float) -> None:
    size = _row_fontsize(row)
    written = range(0, len(names), math.ceil(1.1 * size / row))
    ax.set_yticks(written, labels=[names[index] for index in written], fontsize=size)
    ax.tick_params(axis="y", length=0)
    for index, label in zip(written, ax.get_yticklabels(), strict=True):
        label.set_color("black" if n_selected[index] else _MUTED)


def _head(ax: Any, title: str, n_columns: int) -> None:
    """Legend above the axes, where it hides nothing, and the title above the legend."""
    legend = ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=n_columns,
        frameon=False,
        fontsize=9,
        borderaxespad=0.1,
        borderpad=0.2,
        columnspacing=1.5,
    )
    n_rows = math.ceil(len(legend.get_texts()) / n_columns)
    ax.set_title(title, loc="left", fontsize=10, pad=8 + 14 * n_rows)


def _best_over_C(
    results: dict[str, Any], shown: Sequence[int], alphas: Sequence[float], kept: Sequence[Kept]
) -> NDArray[np.int64]:
    """Positions in ``cv_results_`` of the candidates with the best C among those shown, (n_kept, n_alphas)."""
    best: dict[tuple[Any, Any], int] = {}
    means = np.nan_to_num(results["mean_test_score"], nan=-np.inf)
    for index in shown:
        point = _kept(results["params"][index]), results["params"][index]["alpha"]
        if means[index] > means[best.setdefault(point, index)]:
            best[point] = index
    return np.array([[best[keep, alpha] for alpha in alphas] for keep in kept])


def _without_other_single_layers(
    results: dict[str, Any], shown: Sequence[int], best_params: dict[str, Any], kept: Sequence[Kept]
) -> list[Kept]:
    """Of the layers that were tried alone the best one: a line for each would hide the others."""
    means, layer = np.nan_to_num(results["mean_test_score"], nan=-np.inf), best_params["layer"]
    single = [index for index in shown if results["params"][index]["layer"] is not None]
    if layer is None and single:
        layer = results["params"][max(single, key=lambda index: means[index])]["layer"]
    return [keep for keep in kept if keep[2] in (None, layer)]


def _search(params: dict[str, Any]) -> tuple[str | None, int | None]:
    """What shares a path."""
    return params["normalization"], params["target_size"]


def _kept(params: dict[str, Any]) -> Kept:
    return params["keep_fraction"], params["last_layers"], params["layer"]


def _keep_label(keep_fraction: float | None, last_layers: int | None, layer: int | None) -> str:
    if layer is not None:
        return f"layer {layer} alone"
    if last_layers is not None:
        return "last layer" if last_layers == 1 else f"last {last_layers} layers"
    if keep_fraction is None:
        return "nonzero weights"
    return "all features" if keep_fraction == 1 else f"top {100 * keep_fraction:g} %"


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


def _decades(log_alphas: NDArray[np.float64]) -> float:
    """Width of the alpha axis in powers of ten; one alpha gets some room too."""
    return float(np.ptp(log_alphas)) or 0.5


def _alpha_axis(panel: Any, alphas: NDArray[np.float64]) -> None:
    logs = np.log10(alphas)
    margin = 0.07 * _decades(logs)
    panel.set_xscale("log")
    panel.set_xlim(10 ** (logs[0] + margin), 10 ** (logs[-1] - margin))
    panel.minorticks_off()
    _name_alphas(panel, alphas)
    panel.set_xlabel("alpha, from strong to weak (fraction of alpha_max)")
    panel.grid(color="0.9", linewidth=0.5)
    panel.set_axisbelow(True)
    _despine(panel)


def _name_alphas(panel: Any, alphas: NDArray[np.float64], fontsize: float = 9) -> None:
    """Write as many alphas below the axis as fit."""
    names = [f"{alpha:.2g}" for alpha in alphas]
    at = panel.transData.transform(np.stack([alphas, np.ones_like(alphas)], axis=1))[:, 0]
    at = 72 * at / panel.get_figure().dpi
    written = [0]
    for index in range(1, len(alphas)):
        last = written[-1]
        if at[index] - at[last] >= 0.65 * fontsize * (len(names[index]) + len(names[last])) / 2 + 4:
            written.append(index)
    panel.set_xticks(alphas[written], labels=[names[index] for index in written], fontsize=fontsize)


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


def _annotate_above(
    ax: Any, text: str, point: tuple[float, float], transform: Any, spread: tuple[float, float]
) -> None:
    """Text with a line to the point, in a strip kept free above everything that is drawn."""
    low, high = spread
    span = high - low or 0.1
    strip = min(0.5, 40 / _height(ax))
    ax.set_ylim(low - 0.06 * span, high + span * strip / (1 - strip))
    ticks = ax.get_yticks()
    # No ticks in the strip: an accuracy of 1.2 does not exist.
    ax.set_yticks(ticks[(ticks >= ax.get_ylim()[0]) & (ticks <= high + (ticks[1] - ticks[0]) / 2)])
    across = ax.transAxes.inverted().transform(transform.transform(point))[0]
    side = "left" if across < 0.5 else "right"
    ax.annotate(
        text,
        xy=point,
        xycoords=transform,
        xytext=(float(np.clip(across, 0.02, 0.98)), 0.97),
        textcoords="axes fraction",
        ha=side,
        va="top",
        fontsize=9,
        arrowprops=dict(arrowstyle="-", color="0.3", linewidth=0.8, shrinkA=1, shrinkB=6),
    )
