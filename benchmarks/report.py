"""The page of results, from the files that transfer.py and ablations.py leave.

    python benchmarks/report.py [FOLDER]

FOLDER holds ``cells``; RESULTS.md and the pictures it shows are written beside them.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from common import HERE, SUITE_TASKS, VTAB_TASKS

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, PUBLISHED, PROBE, FINETUNING = "Head2ToeClassifierCV", "published Head2Toe", "linear probe", "fine-tuning"
ALL_L2, SCRATCH = "all features, L2", "from scratch"
ORDER = (
    PROBE, ALL_L2, "all features, L1", "random features", "largest variance", PUBLISHED, OURS, FINETUNING, SCRATCH,
)  # fmt: skip
# Cells of "before" are not computed again; they say which revision made them.
STEPS = (
    f"{ALL_L2}, one size", ALL_L2, f"{PUBLISHED}, one size", PUBLISHED, f"{OURS} before, no single layers",
    f"{OURS} before", f"{OURS}, one size", OURS,
)  # fmt: skip
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart with any kind of sight
# Of a linear probe and of published Head2Toe, on the same images and weights, before this project.
REFERENCE_PROBE = 0.662
SMALL = 0.01  # a difference that one set of test images does not tell from none
REFERENCE_PUBLISHED = {
    "sign_digits": {"TensorFlow": 0.960, "PyTorch": 0.952},
    "cifar10": {"PyTorch": 0.807},
    "digits": {"PyTorch": 0.986},
    "sprites_orientation": {"PyTorch": 0.429},
}
REFERENCE_WEIGHTS = "tiny_models.py:resnet56"

Cell = dict[str, Any]


def write(folder: Path) -> None:
    """Write RESULTS.md from what is in ``folder / "cells"``."""
    found = [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*/*.json"))]
    cells = [cell for cell in found if "method" in cell]
    ablations = [cell for cell in found if "ablation" in cell]
    if not cells:
        return
    tasks = list(dict.fromkeys(cell["task"] for cell in sorted(cells, key=_place)))
    parts = [
        _head(cells, ablations),
        _accuracies(cells, tasks),
        _differences(cells, tasks),
        _steps(cells, tasks),
        _costs(cells, tasks),
        _finetuning(cells, tasks),
        _reference(cells),
        *_pictures(folder, cells, ablations, tasks),
    ]
    (folder / "RESULTS.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def _place(cell: Cell) -> tuple[int, str]:
    known = [*SUITE_TASKS, *VTAB_TASKS]
    return (known.index(cell["task"]) if cell["task"] in known else len(known)), cell["task"]


def _of(cells: Sequence[Cell], method: str, task: str, figure: str = "accuracy") -> list[Any]:
    return [cell[figure] for cell in cells if (cell["method"], cell["task"]) == (method, task)]


def _methods(cells: Sequence[Cell], order: Sequence[str] = ORDER) -> list[str]:
    return [method for method in order if any(cell["method"] == method for cell in cells)]


def _mean(cells: Sequence[Cell], method: str, task: str, figure: str = "accuracy") -> float:
    values = _of(cells, method, task, figure)
    return float(np.mean(values)) if values else np.nan


def _seconds(cells: Sequence[Cell], method: str, task: str) -> float:
    return float(min(_of(cells, method, task, "seconds"), default=np.nan))


def _revisions(cells: Sequence[Cell]) -> str:
    """Of cells that are kept from before."""
    return ", ".join(sorted({cell["revision"] for cell in cells if "revision" in cell}))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _number(value: float, form: str = ".3f") -> str:
    return "not measured" if np.isnan(value) else f"{value:{form}}"


def _head(cells: Sequence[Cell], ablations: Sequence[Cell]) -> str:
    backbones = sorted({json.dumps(cell["task_facts"]["backbone"], sort_keys=True) for cell in cells})
    what = []
    for text in backbones:
        backbone = json.loads(text)
        what.append(f"{backbone['model'].rpartition(':')[2]} (weights {backbone['weights_sha256'][:8]})")
    sizes: dict[str, list[str]] = {}
    for method in _methods(cells):
        for cell in cells:
            if cell["method"] == method and method not in (FINETUNING, SCRATCH):
                used = sizes.setdefault(" and ".join(map(str, cell["target_sizes"])), [])
                used.extend([] if method in used else [method])
    machines = sorted({cell["machine"] for cell in [*cells, *ablations]})
    commands = sorted({_without_choice(cell["command"]) for cell in cells})
    seeds = sorted({cell["seed"] for cell in cells})
    return "\n".join(
        [
            "# Results",
            "",
            "Written by `benchmarks/report.py` from the files in `cells`, one for each task, method and seed.",
            "",
            f"- Backbone: {'; '.join(what)}",
            *(f"- Target size {size}: {'; '.join(methods)}" for size, methods in sizes.items()),
            f"- Seeds: {', '.join(map(str, seeds))}; a seed decides the folds of every cross-validation and what a "
            "method draws. All methods are tuned on the training images alone, by five-fold cross-validation.",
            *(f"- Machine: {name}" for name in machines),
            *(f"- Command: `{command}`; --tasks, --methods and --seeds take some of it" for command in commands),
            *(["- Command of the pictures below: `python benchmarks/ablations.py`"] if ablations else []),
        ]
    )


def _without_choice(command: str) -> str:
    """A command without what says which of its cells to compute."""
    kept, chosen = [], False
    for word in command.split():
        if word.startswith("--"):
            chosen = word in ("--tasks", "--methods", "--seeds", "--rerun")
        if not chosen:
            kept.append(word)
    return " ".join(kept)


def _accuracies(cells: Sequence[Cell], tasks: Sequence[str]) -> str:
    rows = []
    for method in _methods(cells):
        means = [_mean(cells, method, task) for task in tasks]
        row = [method, *(_spread(_of(cells, method, task)) for task in tasks)]
        rows.append([*row, _number(float(np.mean(means)))])
        if method == OURS:
            alone = {task: [note["best_alone"] for note in _of(cells, OURS, task, "notes")] for task in tasks}
            means = [float(np.mean(values)) if values else np.nan for values in alone.values()]
            rows.append(["its best candidate alone", *map(_spread, alone.values()), _number(float(np.mean(means)))])
    note = (
        "Mean over seeds ± its standard error, and the median in brackets; the mean over tasks last. Where there are "
        f"several target sizes, methods choose by cross-validation; {OURS} mixes."
    )
    return f"## Test accuracy\n\n{note}\n\n{_table(['', *tasks, 'mean'], rows)}"


def _steps(cells: Sequence[Cell], tasks: Sequence[str]) -> str:
    """What the target size brings, and what the defaults were before."""
    methods = _methods(cells, STEPS)
    if not {*methods} - {*ORDER}:
        return ""
    rows = []
    for method in methods:
        means = [_mean(cells, method, task) for task in tasks]
        rows.append([method, *map(_number, means), _number(float(np.mean(means)))])
    note = "One size is the first."
    if revisions := _revisions(cells):
        note += (
            f" Before (revision {revisions}), {OURS} had one size, C of 0.001, 0.01, 0.1 and 1, and mixed "
            "probabilities instead of scores."
        )
    return f"## What target sizes and defaults bring\n\n{note}\n\n{_table(['', *tasks, 'mean'], rows)}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    shown = "" if np.isnan(error) else f" ± {error:.3f}"
    return f"{np.mean(values):.3f}{shown} ({np.median(values):.3f})"


def _differences(cells: Sequence[Cell], tasks: Sequence[str]) -> str:
    """What is asked of the defaults, and what they do."""
    rivals = (PROBE, ALL_L2, PUBLISHED)
    if any(not _of(cells, method, task) for method in (OURS, *rivals) for task in tasks):
        return ""
    gaps = {task: _mean(cells, OURS, task) - max(_mean(cells, rival, task) for rival in rivals) for task in tasks}
    over = {
        rival: float(np.mean([_mean(cells, OURS, task) - _mean(cells, rival, task) for task in tasks]))
        for rival in rivals
    }
    worst = min(gaps, key=lambda task: gaps[task])
    rows = [
        [f"each task over the best of {', '.join(rivals)}", "≥ -0.010", f"{gaps[worst]:+.3f} at worst ({worst})"],
        [f"mean over tasks over {PUBLISHED}", "≥ +0.020, moonshot +0.040", f"{over[PUBLISHED]:+.3f}"],
        [f"mean over tasks over the {PROBE} here", "≥ +0.080, moonshot +0.100", f"{over[PROBE]:+.3f}"],
    ]
    if _is_reference(cells):
        ours = float(np.mean([_mean(cells, OURS, task) for task in tasks]))
        rows.append(
            [f"mean over tasks over the reference {PROBE} ({REFERENCE_PROBE})", "≥ +0.080, moonshot +0.100",
             f"{ours - REFERENCE_PROBE:+.3f}"]
        )  # fmt: skip
    each = _table(["task", f"{OURS} over the best of them"], [[task, f"{gap:+.3f}"] for task, gap in gaps.items()])
    return f"## {OURS} against the others\n\n{_table(['', 'wanted', 'measured'], rows)}\n\n{each}"


def _costs(cells: Sequence[Cell], tasks: Sequence[str]) -> str:
    rows = []
    for method in _methods(cells):
        of = [cell for cell in cells if cell["method"] == method]
        trains = method in (FINETUNING, SCRATCH)
        extraction = np.mean([0.0 if trains else cell["task_facts"]["extraction_seconds"] for cell in of])
        more = np.mean([0.0 if trains else cell["task_facts"]["extraction_flops"] for cell in of])
        seconds = np.nanmean([_seconds(cells, method, task) for task in tasks])
        flops = np.mean([cell["flops"] for cell in of])
        size = np.mean([4 * cell["n_weights"] + 4 * cell["n_selected"] for cell in of])
        selected = np.mean([cell["n_selected"] for cell in of])
        rows.append(
            [method, f"{extraction:.1f}", f"{'≤ ' if _revisions(of) else ''}{seconds:.1f}",
             f"{more / 1e12:.2f}", f"{flops / 1e12:.2f}", "-" if trains else f"{selected:.0f}", f"{size / 1e6:.2f}"]
        )  # fmt: skip
    head = ["", "s of extraction", "s of training", "TFLOP of extraction", "TFLOP of training"]
    head += ["features read", "MB per task"]
    note = (
        "Means over tasks and seeds, but for the seconds of training: of those the least of a task's seeds, which the "
        "machine disturbed least. Training includes tuning (fine-tuning has one setting) and predicting test images. "
        "FLOP are those of products of matrices and convolutions; ≤ is with what counting them took, which used to be "
        "much. Storage is what a task adds to the "
        "network: float32 weights, and which features they belong to."
    )
    stores = [next(cell for cell in cells if cell["task"] == task)["task_facts"] for task in tasks]
    kept = ", ".join(f"{task} {facts['store_bytes'] / 1e6:.0f} MB" for task, facts in zip(tasks, stores, strict=True))
    return f"## Cost\n\n{note}\n\n{_table(head, rows)}\n\nFeatures of the training images on disk: {kept}."


def _finetuning(cells: Sequence[Cell], tasks: Sequence[str]) -> str:
    rows = []
    for task in tasks:
        probe, ours, fine = (_mean(cells, method, task) for method in (PROBE, OURS, FINETUNING))
        took = [_mean(cells, method, task, "flops") for method in (OURS, FINETUNING)]
        seconds = [_seconds(cells, method, task) for method in (OURS, FINETUNING)]
        if np.isnan([probe, ours, fine]).any():
            continue
        closed = (
            f"{(ours - probe) / (fine - probe):.0%}" if fine > probe else f"beyond: fine-tuning {fine - probe:+.3f}"
        )
        rows.append(
            [task, f"{probe:.3f}", f"{ours:.3f}", f"{fine:.3f}", closed, f"{seconds[0] / seconds[1]:.2f}",
             f"{took[0] / took[1]:.3f}"]
        )  # fmt: skip
    if not rows:
        return ""
    head = ["", PROBE, OURS, FINETUNING, "gap closed", "seconds over fine-tuning's", "FLOP over fine-tuning's"]
    return f"## Towards fine-tuning\n\n{_table(head, rows)}"


def _is_reference(cells: Sequence[Cell]) -> bool:
    return all(cell["task_facts"]["backbone"]["model"] == REFERENCE_WEIGHTS for cell in cells)


def _reference(cells: Sequence[Cell]) -> str:
    if not _is_reference(cells):
        return ""
    rows = []
    for task, figures in REFERENCE_PUBLISHED.items():
        here = _of(cells, f"{PUBLISHED}, one size", task)
        if here:
            earlier = ", ".join(f"{figure:.3f} ({of})" for of, figure in figures.items())
            rows.append([task, earlier, _spread(here)])
    note = (
        "The same features (target size 512), learning rate and steps; strength and fraction were chosen by hold-out "
        "there, by five-fold cross-validation here, where the seed also decides the start of Adam."
    )
    return (
        f"## Published Head2Toe, earlier and here\n\n{note}\n\n{_table(['', 'earlier', 'here'], rows)}" if rows else ""
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _pictures(folder: Path, cells: Sequence[Cell], ablations: Sequence[Cell], tasks: Sequence[str]) -> list[str]:
    parts = []
    draws: tuple[tuple[str, str, str, Callable[[Any, Sequence[Cell]], None]], ...] = (
        ("fraction", "How many features, ranked by what",
         "Test accuracy against the share of features kept, by five ways of ranking them.", _draw_fraction),
        ("offset", "Lower ranks instead of the first",
         "Test accuracy of as many features from further down the ranking: it must fall.", _draw_offset),
        ("layers", "Where the features come from",
         "Share of the first 1 % that comes from each layer, in network order.", _draw_layers),
        ("target_size", "How far activations are pooled", "Test accuracy against the target size.", _draw_sizes),
        ("data", "How many labelled images", "Test accuracy against the number of training images.", _draw_data),
    )  # fmt: skip
    for name, title, caption, draw in draws:
        rows = [cell for cell in ablations if cell["ablation"] == name]
        shown = [task for task in tasks if any(row["task"] == task for row in rows)]
        if not shown:
            continue
        figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.0), squeeze=False, layout="constrained")
        for ax, task in zip(axes[0], shown, strict=True):
            draw(ax, [row for row in rows if row["task"] == task])
            ax.set_title(task, fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8)
        handles, labels = axes[0][0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
        axes[0][0].set_ylabel("share of the features" if name == "layers" else "test accuracy", fontsize=8)
        if name == "offset":
            caption += f" {_falls(rows, shown)}"
        if revisions := _revisions(rows):
            caption += f" With the defaults of revision {revisions}."
        parts.append(_save(folder, figure, f"results_{name}", title, caption))
    gains = _draw_gains(cells, tasks)
    if gains is not None:
        caption = (
            "Gain over a linear probe against domain affinity, which is the accuracy of the linear probe less that of "
            "the network trained from scratch: far tasks are on the left."
        )
        parts.append(_save(folder, gains, "results_gain", "Gain and distance from the source", caption))
    return parts


def _save(folder: Path, figure: Any, name: str, title: str, caption: str) -> str:
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)
    return f"## {title}\n\n{caption}\n\n![{title}]({name}.png)"


def _lines(ax: Any, x: Sequence[float], rows: Sequence[dict[str, Sequence[float]]]) -> None:
    """The mean of each line over the rows, and the range of them."""
    for color, name in zip(COLORS, rows[0], strict=False):
        values = np.array([row[name] for row in rows])
        ax.plot(x, values.mean(axis=0), marker="o", markersize=3, color=color, label=name)
        ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)


def _draw_fraction(ax: Any, rows: Sequence[Cell]) -> None:
    _lines(ax, rows[0]["kept"], [row["accuracy"] for row in rows])
    ax.set_xscale("log")
    ax.set_xlabel("share of features kept", fontsize=8)


def _draw_offset(ax: Any, rows: Sequence[Cell]) -> None:
    _lines(ax, range(len(rows[0]["offsets"])), [{"": row["accuracy"]} for row in rows])
    ax.get_lines()[0].set_label("_")
    ax.set_xticks(range(len(rows[0]["offsets"])), rows[0]["offsets"])
    ax.set_xlabel(f"offset, in {rows[0]['count']} features", fontsize=8)


def _falls(rows: Sequence[Cell], tasks: Sequence[str]) -> str:
    """How much is lost from the first offset to the last, and where nothing is."""
    lost = {
        task: np.mean([row["accuracy"][-1] - row["accuracy"][0] for row in rows if row["task"] == task])
        for task in tasks
    }
    listed = ", ".join(f"{task} {change:+.3f}" for task, change in lost.items())
    even = [task for task, change in lost.items() if change > -SMALL]
    return f"From the first to the last: {listed}." + (f" It does not on {', '.join(even)}." if even else "")


def _draw_layers(ax: Any, rows: Sequence[Cell]) -> None:
    share = np.mean([np.array(row["selected"]) / sum(row["selected"]) for row in rows], axis=0)
    ax.bar(range(len(share)), share, color=COLORS[0], width=1.0)
    ax.set_xlabel("layer, from the first to the logits", fontsize=8)


def _draw_sizes(ax: Any, rows: Sequence[Cell]) -> None:
    _lines(ax, rows[0]["target_sizes"], [row["accuracy"] for row in rows])
    ax.set_xscale("log", base=2)
    ax.set_xlabel("target size", fontsize=8)


def _draw_data(ax: Any, rows: Sequence[Cell]) -> None:
    _lines(ax, rows[0]["samples"], [row["accuracy"] for row in rows])
    ax.set_xlabel("training images", fontsize=8)


def _draw_gains(cells: Sequence[Cell], tasks: Sequence[str]) -> Any:
    known = [task for task in tasks if _of(cells, SCRATCH, task) and _of(cells, PROBE, task) and _of(cells, OURS, task)]
    if len(known) < 2:
        return None
    figure, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for task in known:
        probe = _mean(cells, PROBE, task)
        at = probe - _mean(cells, SCRATCH, task), _mean(cells, OURS, task) - probe
        ax.plot(*at, "o", color=COLORS[0])
        ax.annotate(task, at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.margins(x=0.25, y=0.15)
    ax.set_xlabel("domain affinity", fontsize=9)
    ax.set_ylabel("gain over the linear probe", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
