"""From images to three fitted classifiers: scikit-learn's digits through the bundled network.

    python benchmarks/demo.py [--folder demo]

Extracts the activations of every layer of ``h2t_resnet20`` for 1000 training and 797 test images (a second run reuses
them), fits a linear probe on the last layer, an L2 logistic regression on all features, and Head2Toe with its defaults,
and prints how they do on the test images. The first two have their C chosen by five-fold cross-validation. Writes which
layers Head2Toe selected from to ``demo/layers.png``.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from estimators import Head2ToeClassifier
from h2t_store import FeatureMatrix, extract

C_GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def features(split: str, store: Path) -> FeatureMatrix:
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        seconds = time.perf_counter() - start
        end = "\n" if done == total else "\r"
        print(f"  digits/{split}: {done}/{total} images, {done / seconds:.0f}/s", end=end, flush=True)

    return extract("digits", split=split, model="h2t_resnet20", store=store, name=f"digits/{split}", progress=progress)


def logistic(n_samples: int) -> GridSearchCV:
    """L2 logistic regression with C by cross-validation.

    Features beyond the number of samples are rotated into their span first, which changes nothing but the time.
    """
    model = make_pipeline(
        StandardScaler(), PCA(n_components=None, svd_solver="full"), LogisticRegression(max_iter=1000, tol=1e-3)
    )
    return GridSearchCV(model, {"logisticregression__C": C_GRID}, cv=5)


def picture(matrix: FeatureMatrix, selected: np.ndarray, path: Path) -> list[tuple[str, int, int]]:
    """Draw how many features each layer gives; returns (layer, width, selected) rows."""
    rows = [
        (layer.name, layer.width, int(((selected >= layer.start) & (selected < layer.stop)).sum()))
        for layer in matrix.layers
    ]
    names, _, counts = zip(*rows, strict=True)
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    bars = axes.bar(range(len(names)), counts, color="#3b6ea5")
    axes.bar_label(bars, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("features selected")
    axes.set_xlabel("layer, from the first to the logits")
    axes.set_title(f"Where Head2Toe's {len(selected)} of {matrix.shape[1]} features come from (digits)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    print("Features of every layer of h2t_resnet20")
    X, X_test = (features(split, folder / "features.zarr") for split in ("train", "test"))
    y, y_test = X.y, X_test.y
    last = "global_pool*"

    methods: dict[str, Callable[[], tuple[float, int]]] = {}

    def probe() -> tuple[float, int]:
        train, test = X.select_layers(last), X_test.select_layers(last)
        return logistic(len(y)).fit(np.asarray(train), y).score(np.asarray(test), y_test), train.shape[1]

    def everything() -> tuple[float, int]:
        return logistic(len(y)).fit(np.asarray(X), y).score(np.asarray(X_test), y_test), X.shape[1]

    def head2toe() -> tuple[float, int]:
        nonlocal selected
        model = Head2ToeClassifier().fit(X, y)
        selected = model.selected_features_
        return model.score(X_test, y_test), len(selected)

    selected = np.empty(0, dtype=np.int64)
    methods = {
        "linear probe, last layer": probe,
        "L2 logistic, all features": everything,
        "Head2Toe": head2toe,
    }
    print(f"\n{'':27}{'test accuracy':>14}{'features used':>15}{'seconds':>9}")
    for name, method in methods.items():
        start = time.perf_counter()
        accuracy, used = method()
        print(f"{name:27}{accuracy:14.3f}{used:15d}{time.perf_counter() - start:9.1f}", flush=True)

    path = folder / "layers.png"
    rows = picture(X, selected, path)
    print("\nLayers that Head2Toe selected from (selected of all)")
    for layer, width, count in rows:
        if count:
            print(f"  {layer:18}{count:5d} of {width:5d}  {'#' * count if count <= 60 else '#' * 60 + '…'}")
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "timm", "scikit-learn", "zarr"))
    print(
        f"\n{path} shows the same.\nPython {platform.python_version()}, {packages}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    sys.exit(main())
