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

C_GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]


def features(split: str, store: Path) -> FeatureMatrix:
    start = time.perf_counter()

    def progress(done: int, total: int, _: int) -> None:
        seconds = time.perf_counter() - start
        if done == total or sys.stdout.isatty():
            end = "\n" if done == total else "\r"
            print(f"  digits/{split}: {done}/{total} images, {done / seconds:.0f}/s", end=end, flush=True)

    return extract("digits", split=split, model="h2t_resnet20", store=store, name=f"digits/{split}", progress=progress)


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
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer, from the first to the logits")
    axes.set_title(f"Where Head2Toe's {len(selected)} of {matrix.shape[1]} features come from (digits)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return rows


def linear_probe(X: FeatureMatrix, X_test: FeatureMatrix) -> tuple[float, int]:
    """Accuracy and number of features of logistic regression on what enters the last layer."""
    return all_features(X.select_layers("global_pool*"), X_test.select_layers("global_pool*"))


def all_features(X: FeatureMatrix, X_test: FeatureMatrix) -> tuple[float, int]:
    """Accuracy and number of features of L2 logistic regression on every feature, C chosen by cross-validation.

    The features are rotated into the span of the samples first, which changes nothing but the time.
    """
    rotation, values = make_pipeline(StandardScaler(), PCA(svd_solver="full")), np.asarray(X)
    search = GridSearchCV(LogisticRegression(max_iter=1000, tol=1e-3), {"C": C_GRID}, cv=5)
    search.fit(rotation.fit(values).transform(values), X.y)
    return search.score(rotation.transform(np.asarray(X_test)), X_test.y), X.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    print("Features of every layer of h2t_resnet20")
    X, X_test = (features(split, folder / "features.zarr") for split in ("train", "test"))
    print(f"  {len(X)} training and {len(X_test)} test images, {X.shape[1]} features from {len(X.layers)} layers")

    head2toe = Head2ToeClassifier()

    def selected_features(X: FeatureMatrix, X_test: FeatureMatrix) -> tuple[float, int]:
        head2toe.fit(X, X.y)
        return head2toe.score(X_test, X_test.y), len(head2toe.selected_features_)

    print(f"\n{'':27}{'test accuracy':>14}{'features used':>15}{'seconds':>9}")
    for name, method in (
        ("linear probe, last layer", linear_probe),
        ("L2 logistic, all features", all_features),
        ("Head2Toe", selected_features),
    ):
        start = time.perf_counter()
        accuracy, used = method(X, X_test)
        print(f"{name:27}{accuracy:14.3f}{used:15d}{time.perf_counter() - start:9.1f}", flush=True)

    path = folder / "layers.png"
    rows = picture(X, head2toe.selected_features_, path)
    print("\nLayers that Head2Toe selected from (selected of all)")
    for layer, width, count in rows:
        if count:
            print(f"  {layer:18}{count:5d} of {width:5d}  {'#' * count if count <= 60 else '#' * 60 + '…'}")
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "timm", "scikit-learn", "zarr"))
    print(
        f"\n{path} shows the same.\nPython {platform.python_version()}, {packages}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
