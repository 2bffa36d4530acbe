"""What the paper claims of selection from all layers, measured: a file per ablation, task and seed, and pictures.

    python benchmarks/ablations.py [--only NAME ...] [--tasks NAME ...] [--seeds 0 1 2]

fraction      accuracy against the share of features kept, ranked by group lasso, L1, L2, at random, by variance
offset        accuracy of the features ranked k..2k, 2k..3k, ... instead of the first k: it must fall
layers        which layers the first 1 % come from
target_size   accuracy against the length that activations are pooled to: all features, and Head2ToeClassifier
data          accuracy against the number of training images: linear probe, all features, Head2ToeClassifierCV

The heads of the first two are L2 logistic regressions on standardised features, C by cross-validation. Gain over a
linear probe against how far the task is from the source needs no run of its own: it is drawn from the cells of
transfer.py. Options for tasks and the network are those of transfer.py.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from methods import all_l2, by_variance, head2toe, l1_scores, l2_search, linear_probe
from numpy.typing import NDArray
from report import write
from sklearn.model_selection import train_test_split
from transfer import add_backbone_options, find_tasks, load, the_backbone

from estimators.group_lasso import group_lasso_path
from estimators.selection import count_kept, rank_features
from h2t_store import FeatureMatrix

ALPHAS = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
CS = tuple(10.0**k for k in range(-5, 3))
KEPT = (0.002, 0.005, 0.02, 0.1, 0.3, 1.0)
OFFSETS = (0, 1, 2, 4, 8, 16, 32, 64)
OFFSET_SHARE = 0.01
TARGET_SIZES = (16, 64, 128, 256, 512, 1024)
SAMPLES = (100, 200, 400, 700, 1000)


class Ridge:
    """L2 logistic regression on some columns, standardised, C by cross-validation."""

    def __init__(self, X: FeatureMatrix, y: NDArray[Any], seed: int) -> None:
        self.X, self.y, self.seed = np.asarray(X), y, seed

    def __call__(self, columns: NDArray[np.int64], X_test: NDArray[Any], y_test: NDArray[Any]) -> float:
        columns = np.sort(columns)
        model = l2_search(self.seed, Cs=CS).fit(self.X[:, columns], self.y)
        return float((model.predict(X_test[:, columns]) == y_test).mean())


def lasso_ranking(X: NDArray[np.float32], y: NDArray[Any]) -> NDArray[np.int64]:
    """As `Head2ToeClassifier` ranks features."""
    return rank_features(group_lasso_path(X, y, alpha_ratios=ALPHAS, tol=1e-3), -1)


def rankings(X: NDArray[np.float32], y: NDArray[Any], seed: int) -> dict[str, NDArray[np.int64]]:
    """Columns from the first to the last, by criterion."""
    _, weights = l1_scores(X, y)
    # By the largest weight of any class at the weakest penalty, those that entered later after those before.
    entered = (weights > 0).any(axis=2).sum(axis=0)
    dense = l2_search(seed, Cs=CS).fit(X, y).best_estimator_
    scale = X.std(axis=0, dtype=np.float64)
    return {
        "group lasso": lasso_ranking(X, y),
        "L1": np.lexsort((-entered, -weights[-1].max(axis=1))),
        "L2": np.argsort(-np.linalg.norm(dense.coef_, axis=0) * scale, kind="stable"),
        "random": np.random.default_rng(seed).permutation(X.shape[1]),
        "variance": by_variance(X),
    }


def fraction(data: Any, seed: int) -> dict[str, Any]:
    X, X_test = (np.asarray(matrix) for matrix in data.pair)
    ridge, ranked = Ridge(data.pair[0], data.y, seed), rankings(X, data.y, seed)
    counts = [count_kept(share, X.shape[1]) for share in KEPT]
    whole = ridge(np.arange(X.shape[1]), X_test, data.y_test)
    accuracy = {
        name: [*(ridge(order[:count], X_test, data.y_test) for count in counts[:-1]), whole]
        for name, order in ranked.items()
    }
    return {"kept": KEPT, "accuracy": accuracy}


def offset(data: Any, seed: int) -> dict[str, Any]:
    X, X_test = (np.asarray(matrix) for matrix in data.pair)
    ridge, order = Ridge(data.pair[0], data.y, seed), lasso_ranking(X, data.y)
    count = count_kept(OFFSET_SHARE, X.shape[1])
    offsets = [at for at in OFFSETS if (at + 1) * count <= len(order)]
    accuracy = [ridge(order[at * count : (at + 1) * count], X_test, data.y_test) for at in offsets]
    return {"count": count, "offsets": offsets, "accuracy": accuracy}


def layers(data: Any, seed: int) -> dict[str, Any]:
    matrix = data.pair[0]
    order = lasso_ranking(np.asarray(matrix), data.y)[: count_kept(OFFSET_SHARE, matrix.shape[1])]
    edges = [layer.stop for layer in matrix.layers]
    counts = np.bincount(np.searchsorted(edges, order, side="right"), minlength=len(edges))
    return {"layers": [layer.name for layer in matrix.layers], "selected": counts.tolist()}


def target_size(data: Any, seed: int) -> dict[str, Any]:
    rows: dict[str, list[float]] = {"all features, L2": [], "Head2ToeClassifierCV": []}
    widths = []
    for size, (X, _) in data.features.items():
        widths.append(X.shape[1])
        for name, method in (("all features, L2", all_l2), ("Head2ToeClassifierCV", head2toe)):
            rows[name].append(method(data.at(size), seed).accuracy)
    return {"target_sizes": list(data.features), "n_features": widths, "accuracy": rows}


def samples(data: Any, seed: int) -> dict[str, Any]:
    methods = {"linear probe": linear_probe, "all features, L2": all_l2, "Head2ToeClassifierCV": head2toe}
    counts = [count for count in SAMPLES if count < len(data.y)] + [len(data.y)]
    rows: dict[str, list[float]] = {name: [] for name in methods}
    for count in counts:
        chosen = np.arange(len(data.y))
        if count < len(data.y):
            chosen = np.sort(train_test_split(chosen, train_size=count, stratify=data.y, random_state=seed)[0])
        part = data.rows(chosen)
        for name, method in methods.items():
            rows[name].append(method(part, seed).accuracy)
    return {"samples": counts, "accuracy": rows}


ABLATIONS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "fraction": fraction,
    "offset": offset,
    "layers": layers,
    "target_size": target_size,
    "data": samples,
}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_options(made)
    made.add_argument("--only", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS), metavar="NAME")
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = made.parse_args()
    tasks = find_tasks(args)
    print(machine(torch.get_num_threads()), flush=True)
    for ablation in args.only:
        if ablation == "target_size":
            args.target_size, work = list(TARGET_SIZES), args.work
            args.work = work / "target_sizes"
        backbone = the_backbone(args)
        for name in args.tasks or tasks:
            run(ablation, tasks[name].name, load(tasks[name], backbone, 0.0)[0], args)
        if ablation == "target_size":
            args.target_size, args.work = None, work
    write(args.out)


def run(ablation: str, task: str, data: Any, args: argparse.Namespace) -> None:
    for seed in args.seeds:
        path: Path = args.out / "cells" / task / f"ablation_{ablation}-{seed}.json"
        if path.exists():
            continue
        found = {"ablation": ablation, "task": task, "seed": seed, "machine": machine(torch.get_num_threads())}
        found |= ABLATIONS[ablation](data, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, default=float) + "\n")
        print(f"{ablation:14}{task:22}seed {seed}", flush=True)


if __name__ == "__main__":
    main()
