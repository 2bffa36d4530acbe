"""What tuning costs: grid searches, features on disk, memory.

    python benchmarks/tuning.py [grid] [overhead] [memory] [--suite DIR --weights FILE] [--json FILE]

grid      8 alphas x 6 fractions x 3 C x 5 folds on sign_digits: GridSearchCV without a cache, with memory=, and
          Head2ToeClassifierCV, one after the other, each in a fresh process with --threads threads.
overhead  one fit on a FeatureMatrix against one on the array that it holds.
memory    peak memory of a fit on a store of --gigabytes with max_memory="1GB".

Without --suite, grid and overhead use synthetic features. Prints tables; --json writes the figures. What tuning brings
is measured by transfer.py.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SUITE, WEIGHTS, big_store, launch, machine, peak_mb, suite_features, synthetic
from sklearn.model_selection import GridSearchCV

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeLayersDisplay, Head2ToePathDisplay
from h2t_store import FeatureMatrix, open_features

SCRIPT = Path(__file__).resolve()
SECTIONS = ("grid", "overhead", "memory")
GRID: dict[str, list[Any]] = {
    "alpha": [0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5],
    "keep_fraction": [None, 0.01, 0.05, 0.1, 0.3, 1.0],
    "C": [0.01, 0.1, 1.0],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=[], help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--suite", type=Path, default=SUITE)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--work", type=Path, help="where features are kept between runs; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="sections that were not run keep the figures they have there")
    parser.add_argument("--plots", type=Path, help="folder for pictures of the default search on sign_digits")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        spec = json.loads(args.worker)
        torch.set_num_threads(spec["threads"])
        print(json.dumps(WORKERS[spec["run"]](spec)))
        return
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"sections must be among {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    print(machine(args.threads), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for section in args.sections or SECTIONS:
            figures = {"machine": machine(args.threads), **SECTION[section](args, work)}
            if args.json:
                known = json.loads(args.json.read_text()) if args.json.exists() else {}
                args.json.write_text(json.dumps(known | {section: figures}, indent=1) + "\n")
        if args.plots and there(args):
            draw(suite_features("sign_digits", "train", args.suite, args.weights, work), args.plots)


def there(args: argparse.Namespace) -> bool:
    return bool(args.suite.exists() and args.weights.exists())


def sign_digits(args: argparse.Namespace, work: Path) -> tuple[Path, FeatureMatrix | None]:
    """Features as an .npz with X and y, and as they are stored, unless they are synthetic."""
    path = work / "sign_digits.npz"
    if not there(args):
        X, y = synthetic(1000, 21_434, 10)
        np.savez(path, X=X, y=y)
        return path, None
    matrix = suite_features("sign_digits", "train", args.suite, args.weights, work)
    np.savez(path, X=np.asarray(matrix), y=matrix.codes)
    return path, matrix


# ---------------------------------------------------------------------------------------------------------------------
# Grid searches


def grid(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    data, _ = sign_digits(args, work)
    results = {}
    print(
        f"\n{'grid on sign_digits':40}{'seconds':>9}{'of first':>10}{'best score':>12}{'paths on disk':>15}", flush=True
    )
    for name in ("GridSearchCV", "GridSearchCV with memory=", "Head2ToeClassifierCV"):
        with tempfile.TemporaryDirectory() as memory:
            spec = {"run": "grid", "name": name, "data": str(data), "memory": memory, "threads": args.threads}
            results[name] = launch(spec, SCRIPT)
        row, first = results[name], results["GridSearchCV"]["seconds"]
        row["ratio"] = row["seconds"] / first
        print(
            f"{name:40}{row['seconds']:9.1f}{row['ratio']:10.3f}{row['best_score']:12.4f}{row['paths']:15d}", flush=True
        )
    return results


def run_grid(spec: dict[str, Any]) -> dict[str, Any]:
    with np.load(spec["data"]) as data:
        X, y = data["X"], data["y"]
    if spec["name"] == "Head2ToeClassifierCV":
        search: Any = Head2ToeClassifierCV(
            alphas=GRID["alpha"], keep_fractions=GRID["keep_fraction"], Cs=GRID["C"], refit="best"
        )
    else:
        memory = spec["memory"] if "memory" in spec["name"] else None
        search = GridSearchCV(Head2ToeClassifier(memory=memory), GRID, cv=5)
    start = time.perf_counter()
    search.fit(X, y)
    return {
        "seconds": time.perf_counter() - start,
        "best_score": float(search.best_score_),
        "best_params": search.best_params_,
        "paths": len(list(Path(spec["memory"]).rglob("*.npz"))),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Features on disk


def overhead(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    data, matrix = sign_digits(args, work)
    if matrix is None:
        print("\noverhead of stored features: left out, as --suite is not there")
        return {}
    torch.set_num_threads(args.threads)
    with np.load(data) as arrays:
        X, y = arrays["X"], arrays["y"]
    rows = {}
    print(f"\n{'one fit':40}{'array, s':>10}{'stored, s':>11}{'ratio':>7}", flush=True)
    for name, keep_fraction in (("selected features", None), ("a tenth", 0.1), ("all features", 1.0)):
        model = Head2ToeClassifier(keep_fraction=keep_fraction)
        pairs = [(seconds(partial(model.fit, X, y)), seconds(partial(model.fit, matrix, y))) for _ in range(5)]
        array, stored = (float(np.median(column)) for column in zip(*pairs, strict=True))
        rows[name] = {"array": array, "stored": stored, "ratio": float(np.median([b / a for a, b in pairs]))}
        print(f"keeping {name:32}{array:10.2f}{stored:11.2f}{rows[name]['ratio']:7.2f}", flush=True)
    return rows


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    store, (n_samples, n_features) = big_store(args.gigabytes, work)
    print(f"\nfit on {n_samples} x {n_features} float16 on disk ({args.gigabytes:g} GB), max_memory 1GB", flush=True)
    row = launch({"run": "memory", "store": str(store), "threads": args.threads}, SCRIPT)
    print(
        f"{row['seconds']:.1f} s, peak {row['peak_mb']:.0f} MB (imports alone {row['peak_mb_of_imports']:.0f}), "
        f"{row['n_selected']} features selected",
        flush=True,
    )
    return row


def run_memory(spec: dict[str, Any]) -> dict[str, Any]:
    X = open_features(spec["store"], "big")
    imported, start = peak_mb(), time.perf_counter()
    model = Head2ToeClassifier(alpha=0.3, max_memory="1GB", device="cpu").fit(X, X.y)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": peak_mb(),
        "peak_mb_of_imports": imported,
        "n_selected": len(model.selected_features_),
    }


def draw(X: FeatureMatrix, folder: Path) -> None:
    """The layers that the default search selects from, and the search along alpha."""
    import matplotlib as mpl

    mpl.use("Agg")
    model = Head2ToeClassifierCV().fit(X, X.y)
    for name, display in (("layers", Head2ToeLayersDisplay), ("search", Head2ToePathDisplay)):
        figure = display.from_estimator(model).figure_
        figure.savefig(folder / f"tuning_{name}.png", dpi=100, bbox_inches="tight")


WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"grid": run_grid, "memory": run_memory}
SECTION: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "grid": grid,
    "overhead": overhead,
    "memory": memory,
}

if __name__ == "__main__":
    main()
