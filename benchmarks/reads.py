"""How often what is stored is read: by a fit, a search, a prediction, an export.

    python benchmarks/reads.py [--samples N --features N] [--threads N] [--work DIR] [--json FILE]

Counts the chunks that each of them reads from a store of synthetic features, with the memory that is free, and for a
fit with memory for half of the features, which goes through the store at every pass. Prints a table; --json writes
the figures.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import fill_store, machine
from joblib import parallel_config

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector
from h2t_store import FeatureMatrix, open_features
from h2t_store.export import EXPORTS, export
from h2t_store.storage.store import Extraction

SEARCH: dict[str, Any] = {"alphas": (0.5, 0.2), "Cs": (0.01, 1.0), "keep_fractions": (None, 0.1, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--features", type=int, default=3_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where the store is kept between runs; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(args.threads), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        store = work / f"reads_{args.samples}_{args.features}.zarr"
        if not (store / "big").exists():
            work.mkdir(parents=True, exist_ok=True)
            fill_store(store, args.samples, args.features)
        X = open_features(store, "big")
        print(f"{args.samples} samples x {args.features} features, {X.nbytes / 1e6:.0f} MB as float32\n")
        print(f"{'times that a chunk is read':44}{'mean':>8}{'most':>8}", flush=True)
        rows = {name: measured(name, job) for name, job in jobs(X, Path(temporary)).items()}
    if args.json:
        figures = {"machine": machine(args.threads), "shape": X.shape, "reads": rows}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def jobs(X: FeatureMatrix, folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    little: dict[str, Any] = {"device": "cpu", "max_memory": X.nbytes // 2}
    model = Head2ToeClassifier()
    found: dict[str, Callable[[], object]] = {
        "Head2ToeSelector.fit": lambda: Head2ToeSelector().fit(X, X.y),
        "Head2ToeClassifier.fit": lambda: Head2ToeClassifier().fit(X, X.y),
        "  keep_fraction=1.0": lambda: Head2ToeClassifier(keep_fraction=1.0).fit(X, X.y),
        "  half of the features fit": lambda: Head2ToeClassifier(**little).fit(X, X.y),
        "Head2ToeClassifierCV.fit": lambda: Head2ToeClassifierCV(**SEARCH).fit(X, X.y),
        "  two folds at once": lambda: in_threads(Head2ToeClassifierCV(n_jobs=2, **SEARCH), X),
        "predict": lambda: model.predict(X),
        **{f"export {suffix}": lambda suffix=suffix: export(X, folder / f"x{suffix}") for suffix in EXPORTS},
    }
    model.fit(X, X.y)
    return found


def in_threads(search: Head2ToeClassifierCV, X: FeatureMatrix) -> None:
    """In this process, so that all reads are counted."""
    with parallel_config(backend="threading"):
        search.fit(X, X.y)


def measured(name: str, job: Callable[[], object]) -> dict[str, float]:
    with counted_reads() as counts:
        job()
    row = {"mean": sum(counts.values()) / len(counts), "most": max(counts.values())}
    print(f"{name:44}{row['mean']:8.2f}{row['most']:8d}", flush=True)
    return row


@contextmanager
def counted_reads() -> Iterator[dict[tuple[str, int, int], int]]:
    """How often each chunk is read meanwhile."""
    counts: dict[tuple[str, int, int], int] = {}
    reads = Extraction.features

    def counted(self: Extraction, layer: Any, block: int, column: int) -> Any:
        key = layer.name, block, column
        counts[key] = counts.get(key, 0) + 1
        return reads(self, layer, block, column)

    Extraction.features = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Extraction.features = reads  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
