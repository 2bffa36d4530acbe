"""The group-lasso path: time to a certified gap against its peers, growth, the pass over X, and X on disk.

    python benchmarks/group_lasso.py [solvers] [growth] [pass] [disk] [--suite DIR --weights FILE] [--peer PYTHON]

solvers  40 alphas to 0.005 alpha_max on features of a ResNet-56, or on synthetic ones where --suite is absent: this
         solver at three tolerances on the CPU (and on CUDA where there is one), adelie in an environment of its own
         (--peer: the python of a venv with `pip install adelie`), scikit-learn's SAGA with an L1 penalty at one alpha
         for scale, and the published Adam training at one alpha. Every run is a fresh process with --threads threads;
         runs of different solvers alternate and never overlap. The clock starts at the float32 array and stops at the
         solutions; certificates are then recomputed here in float64, with one function for all solvers.
growth   time against features, samples and classes, one at a time, each path ended at the same number of active
         features; with the exponent fitted.
pass     the full pass over X against what reading and multiplying could allow at best.
disk     a path on a store of --gigabytes with max_memory="1GB", and the same path in memory.

Prints tables; --json and --plot write the figures and a picture.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, SUITE, WEIGHTS, big_store, launch, machine, peak_mb, suite_features, synthetic
from numpy.typing import NDArray

SCRIPT = Path(__file__).resolve()
TASKS = ("sign_digits", "digits", "sprites_orientation")
RATIO, N_ALPHAS = 0.005, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=[], help="solvers, growth, pass, disk; default: all")
    parser.add_argument("--suite", type=Path, default=SUITE)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--peer", type=Path, help="python of an environment that has adelie")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--work", type=Path, help="where features are kept between runs; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[json.loads(args.worker)["run"]](json.loads(args.worker))))
        return
    if unknown := set(args.sections) - {"solvers", "growth", "pass", "disk"}:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are solvers, growth, pass, disk")
    sections = args.sections or ["solvers", "growth", "pass", "disk"]

    figures: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    figures["machine"] = machine(args.threads)
    print(figures["machine"])
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for section in sections:
            figures[section] = {"solvers": solvers, "growth": growth, "pass": full_pass, "disk": disk}[section](
                args, work
            )
            if args.json:
                args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot and {"solvers", "growth"} <= set(figures):
        plot(figures, args.plot)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def features(task: str, args: argparse.Namespace, work: Path) -> Path:
    """Training features of a task as an .npz with X (float32) and y, extracted once."""
    there = args.suite.exists() and args.weights.exists()
    path = work / f"{task}{'' if there else '_synthetic'}.npz"
    if path.exists():
        return path
    if there:
        matrix = suite_features(task, "train", args.suite, args.weights, work)
        np.savez(path, X=np.asarray(matrix), y=matrix.codes)
    else:
        X, y = synthetic(1000, 21_434, 16 if "sprites" in task else 10, seed=TASKS.index(task))
        np.savez(path, X=X, y=y)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# One certificate for all solvers


def certify(
    X: NDArray[np.float64], y: NDArray[np.int64], W: NDArray[np.float64], b: NDArray[np.float64], alpha: float
) -> tuple[float, float, float]:
    """Objective, duality gap and KKT violation of W for standardised X, with the intercept solved for; float64."""
    active = np.linalg.norm(W, axis=1) > 0
    Y = np.eye(W.shape[1])[y]
    scores = X[:, active] @ W[active]

    def at(b: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        shifted = scores + b - (scores + b).max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return np.exp(log_p), float(-(log_p * Y).sum(1).mean())

    P, loss = at(b)
    for _ in range(200):
        slope = (P - Y).mean(0)
        if np.abs(slope).max() < 1e-12:
            break
        hessian = np.diag(P.mean(0)) - P.T @ P / len(y) + np.ones((W.shape[1],) * 2) / W.shape[1] ** 2
        step, size = np.linalg.solve(hessian, slope), 1.0
        while at(b - size * step)[1] > loss + 1e-15 and size > 1e-6:
            size /= 2
        b = b - size * step
        P, loss = at(b)
    G = X.T @ ((P - Y) / len(y))
    norms, sizes = np.linalg.norm(G, axis=1), np.linalg.norm(W, axis=1)
    c = min(1.0, alpha / norms.max())
    Q = (1 - c) * Y + c * P
    dual = -(Q * np.log(np.where(Q > 0, Q, 1))).sum(1).mean()
    objective = loss + alpha * sizes.sum()
    kkt = max(0.0, (norms[~active] / alpha - 1).max(initial=0))
    stationarity = G[active] + alpha * W[active] / sizes[active, None]
    return objective, objective - dual, max(kkt, (np.linalg.norm(stationarity, axis=1) / alpha).max(initial=0))


def judge(data: Path, solution: Path) -> dict[str, Any]:
    """Worst gap along the path, and the KKT violation and the size of its last point."""
    loaded, found = np.load(data), np.load(solution)
    X, y = loaded["X"].astype(np.float64), loaded["y"]
    X -= X.mean(0)
    X /= np.where(X.std(0) > 0, X.std(0), 1)
    q = np.bincount(y) / len(y)
    null, gaps, kkt = -(q * np.log(q)).sum(), [], 0.0
    for i, alpha in enumerate(found["alphas"]):
        rows = slice(*np.searchsorted(found["point"], [i, i + 1]))
        W = np.zeros((X.shape[1], len(q)))
        W[found["row"][rows]] = found["coef"][rows]
        _, gap, kkt = certify(X, y, W, found["intercept"][i], alpha)
        gaps.append(gap / null)
    return {"gap": max(gaps), "kkt": float(kkt), "active": int((np.linalg.norm(W, axis=1) > 0).sum())}


def save_solution(path: str, alphas: Any, points: list[tuple[Any, Any]], intercepts: Any) -> None:
    """Coefficients of standardised features: per alpha the nonzero rows and their values."""
    np.savez(
        path,
        alphas=alphas,
        point=np.concatenate([np.full(len(rows), i) for i, (rows, _) in enumerate(points)]),
        row=np.concatenate([rows for rows, _ in points]),
        coef=np.concatenate([values for _, values in points]),
        intercept=intercepts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Workers: each runs in a process of its own


def run_ours(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from estimators import group_lasso_path

    torch.set_num_threads(spec["threads"])
    loaded = np.load(spec["data"])
    X, y = loaded["X"], loaded["y"]
    options = dict(alphas=spec["alphas"], tol=spec["tol"], device=spec["device"])
    if spec["device"] == "cuda":
        start = time.perf_counter()
        X = torch.from_numpy(X).cuda()
        torch.cuda.synchronize()
        transfer = time.perf_counter() - start
        group_lasso_path(X, y, **options)
    start = time.perf_counter()
    path = group_lasso_path(X, y, **options)
    seconds = time.perf_counter() - start
    sd = loaded["X"].std(0, dtype=np.float64)
    mean = loaded["X"].mean(0, dtype=np.float64)
    points = [(rows, coef * sd[rows, None]) for rows, coef in zip(path.active, path.active_coefs, strict=True)]
    intercepts = [b + mean[rows] @ coef for b, rows, coef in zip(
        path.intercepts, path.active, path.active_coefs, strict=True
    )]  # fmt: skip
    save_solution(spec["out"], path.alphas, points, intercepts)
    result = {"seconds": seconds, "peak_mb": peak_mb(), "passes": int(path.n_passes.sum()) + 1}
    if spec["device"] == "cuda":
        result |= {"transfer_seconds": transfer, "peak_gpu_mb": torch.cuda.max_memory_allocated() / 1e6}
    return result


def run_saga(spec: dict[str, Any]) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression

    loaded = np.load(spec["data"])
    start = time.perf_counter()
    X = loaded["X"] - loaded["X"].mean(0)
    X /= np.where(X.std(0) > 0, X.std(0), 1)
    model = LogisticRegression(
        l1_ratio=1.0, C=1 / (len(X) * spec["alpha"]), solver="saga", tol=1e-3, max_iter=spec["max_iter"]
    )
    model.fit(X, loaded["y"])
    seconds = time.perf_counter() - start
    active = int((np.abs(model.coef_).max(0) > 0).sum())
    return {"seconds": seconds, "peak_mb": peak_mb(), "passes": int(model.n_iter_.max()), "active": active}


def run_adam(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from estimators.adam import train

    torch.set_num_threads(spec["threads"])
    loaded = np.load(spec["data"])
    X, y = loaded["X"], loaded["y"]
    start = time.perf_counter()
    settings = {"standardize": True, "coef": spec["alpha"], "n_steps": spec["steps"], "seed": 0, "device": "cpu"}
    coef, intercept, *_ = train(X, y, int(y.max()) + 1, np.ones(len(y)), **settings)
    seconds = time.perf_counter() - start
    sd, mean = X.std(0, dtype=np.float64), X.mean(0, dtype=np.float64)
    rows = np.flatnonzero(np.abs(coef).max(1) > 0)
    save_solution(spec["out"], [spec["alpha"]], [(rows, coef[rows] * sd[rows, None])], [intercept + mean @ coef])
    return {"seconds": seconds, "peak_mb": peak_mb(), "passes": None}


def run_growth(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from estimators import group_lasso_path

    torch.set_num_threads(spec["threads"])
    X, y = synthetic(spec["n_samples"], spec["n_features"], spec["n_classes"])
    reached: list[int] = []

    def enough(point: Any) -> bool:
        reached.append(point.n_active)
        return bool(point.n_active >= spec["active"])

    group_lasso_path(X[:200, :500], y[:200], n_alphas=3, alpha_min_ratio=0.5)
    start = time.perf_counter()
    path = group_lasso_path(X, y, n_alphas=160, alpha_min_ratio=0.001, tol=1e-3, callback=enough, device=spec["device"])
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds, "active": reached[-1], "alphas": len(path.alphas), "passes": int(path.n_passes.sum()) + 1
    }  # fmt: skip


def run_disk(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from estimators import group_lasso_path
    from h2t_store import open_features

    torch.set_num_threads(spec["threads"])
    X = open_features(spec["store"], "big")
    imported = peak_mb()
    start = time.perf_counter()
    path = group_lasso_path(
        X, X.y, n_alphas=8, alpha_min_ratio=0.3, tol=1e-5, max_memory=spec["max_memory"], device="cpu"
    )
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": peak_mb(),
        "peak_mb_of_imports": imported,
        "passes": int(path.n_passes.sum()) + 2,
        "objective": path.objective.tolist(),
        "gap": float(path.relative_gap.max()),
    }


WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ours": run_ours,
    "saga": run_saga,
    "adam": run_adam,
    "growth": run_growth,
    "disk": run_disk,
}


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def solvers(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    results: dict[str, Any] = {}
    for task in args.tasks:
        data = features(task, args, work)
        alphas = path_alphas(data)
        middle = float(alphas[len(alphas) // 2])
        common = {"data": str(data), "threads": args.threads, "alphas": alphas.tolist()}
        plans: list[tuple[str, dict[str, Any]]] = [
            (f"ours cpu, tol {tol:g}", {"run": "ours", "tol": tol, "device": "cpu"}) for tol in (1e-2, 1e-3, 1e-4)
        ]
        if args.peer:
            plans += [(f"adelie, tol {tol:g}", {"run": "adelie", "tol": tol}) for tol in (1e-7, 1e-9)]
        if torch.cuda.is_available():
            plans += [("ours cuda, tol 0.001, second call", {"run": "ours", "tol": 1e-3, "device": "cuda"})]
        rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name, _ in plans}
        for repeat in range(args.repeats):
            for name, plan in plans:
                if repeat and name == "adelie, tol 1e-09":
                    continue  # as evidence that it can get there, once
                out = work / f"{task}_{name.replace(' ', '_').replace(',', '')}.npz"
                spec = common | plan | {"out": str(out)}
                peer = plan["run"] == "adelie"
                result = launch(spec, HERE / "adelie_worker.py", str(args.peer)) if peer else launch(spec, SCRIPT)
                rows[name]["seconds"].append(result.pop("seconds"))
                rows[name] |= result
                if not repeat:
                    rows[name] |= judge(data, out)
        out = work / f"{task}_adam.npz"
        single = {"data": str(data), "threads": args.threads, "alpha": middle, "out": str(out)}
        rows["published Adam, 500 steps, one alpha"] = launch(single | {"run": "adam", "steps": 500}, SCRIPT) | judge(
            data, out
        )
        rows["SAGA L1 (another penalty), one alpha"] = launch(single | {"run": "saga", "max_iter": 30}, SCRIPT) | {
            "gap": None
        }
        for row in rows.values():
            row["seconds"] = row["seconds"] if isinstance(row["seconds"], list) else [row["seconds"]]
            row["median"] = statistics.median(row["seconds"])
        ratios = {}
        if args.peer:
            for tol in (1e-3, 1e-4):
                pairs = zip(
                    rows[f"ours cpu, tol {tol:g}"]["seconds"], rows["adelie, tol 1e-07"]["seconds"], strict=True
                )
                ratios[f"{tol:g}"] = [ours / theirs for ours, theirs in pairs]
        results[task] = {"rows": rows, "ratio_to_adelie_1e-07": ratios}
        report_solvers(task, rows, ratios)
    return results


def path_alphas(data: Path) -> NDArray[np.float64]:
    """The explicit alphas every solver gets: geometric, from alpha_max down."""
    loaded = np.load(data)
    X, y = loaded["X"].astype(np.float64), loaded["y"]
    X -= X.mean(0)
    X /= np.where(X.std(0) > 0, X.std(0), 1)
    Y = np.eye(int(y.max()) + 1)[y]
    largest = np.linalg.norm(X.T @ (Y - Y.mean(0)) / len(y), axis=1).max()
    return np.asarray(largest * np.geomspace(1, RATIO, N_ALPHAS))


def report_solvers(task: str, rows: dict[str, dict[str, Any]], ratios: dict[str, list[float]]) -> None:
    print(f"\n{task}: {N_ALPHAS} alphas to {RATIO} alpha_max")
    print(f"{'':42s} {'seconds':>8s} {'worst gap':>10s} {'last kkt':>9s} {'active':>7s} {'passes':>7s} {'peak MB':>8s}")
    for name, row in rows.items():
        gap = "" if row.get("gap") is None else f"{row['gap']:.1e}"
        kkt = "" if row.get("kkt") is None else f"{row['kkt']:.4f}"
        passes = row["passes"] if row.get("passes") else ""
        print(
            f"{name:42s} {row['median']:8.2f} {gap:>10s} {kkt:>9s} {row.get('active', ''):>7} {passes:>7} "
            f"{row['peak_mb']:8.0f}"
        )
    for tol, values in ratios.items():
        shown = " ".join(f"{value:.3f}" for value in values)
        print(f"time over adelie's at tol 1e-7, ours to gap {tol}: median {statistics.median(values):.3f} of {shown}")
    for goal in (1e-2, 1e-3, 1e-4):
        reached = {
            kind: min((r["median"] for n, r in rows.items() if n.startswith(kind) and r["gap"] <= goal), default=None)
            for kind in ("ours cpu", "ours cuda", "adelie")
            if any(n.startswith(kind) for n in rows)
        }
        shown = ", ".join(f"{k} {'not reached' if v is None else f'{v:.2f} s'}" for k, v in reached.items())
        print(f"time to gap {goal:g}: {shown}", flush=True)


def growth(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    base = {"n_features": 20_000, "n_samples": 1000, "n_classes": 10}
    factors = {
        "n_features": [5_000, 20_000, 80_000, 320_000],
        "n_samples": [1000, 4000, 16_000],
        "n_classes": [2, 10, 100],
    }
    results: dict[str, Any] = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for factor, values in factors.items():
            rows = []
            for value in values:
                spec = base | {factor: value, "run": "growth", "threads": args.threads, "active": 100, "device": device}
                rows.append({factor: value} | launch(spec, SCRIPT))
                print(f"{device} {rows[-1]}", flush=True)
            logs = np.log([[row[factor], row["seconds"]] for row in rows if row[factor] >= base[factor]]).T
            exponent = float(np.polyfit(*logs, 1)[0]) if logs.shape[1] > 1 else float("nan")
            results[f"{device} {factor}"] = {"rows": rows, "exponent": exponent}
            print(f"{device}: time grows with {factor} to the power {exponent:.2f} (from {base[factor]} on)\n")
    return results


def full_pass(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    from estimators.group_lasso.operators import make_operator

    torch.set_num_threads(args.threads)
    n_samples, n_features = 1000, 80_000
    X = torch.rand(n_samples, n_features)
    square = torch.rand(2000, 2000)
    gemm = 2 * 2000**3 / fastest(lambda: square @ square)
    read = 4 * X.numel() / fastest(lambda: X.sum())
    operator = make_operator(
        X, rows=torch.arange(n_samples), weights=torch.full((n_samples,), 1 / n_samples, dtype=torch.float64),
        standardize=True, center=True, double=False, dtype=None, max_memory=None,
    )  # fmt: skip
    print(
        f"\nfull pass, float32, {n_samples} x {n_features}: read {read / 1e9:.1f} GB/s, gemm {gemm / 1e9:.0f} GFLOP/s"
    )
    rows, none = {}, torch.zeros(0, dtype=torch.int64)
    for n_classes in (2, 10, 100):
        residual = torch.randn(n_classes, n_samples, dtype=torch.float64)
        rate = 4 * X.numel() / fastest(lambda r=residual: operator.correlate(r, none, float("inf")))
        best = min(read, gemm * 4 / (2 * n_classes))
        rows[n_classes] = {"gb_per_s": rate / 1e9, "best_gb_per_s": best / 1e9, "share": rate / best}
        print(f"K {n_classes:3d}: {rate / 1e9:5.1f} GB/s of at best {best / 1e9:5.1f}: {rate / best:.0%}", flush=True)
    return {"read_gb_per_s": read / 1e9, "gemm_gflops": gemm / 1e9, "rows": rows}


def fastest(work: Callable[[], object], repeat: int = 9) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def disk(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    store, (n_samples, n_features) = big_store(args.gigabytes, work)
    spec = {"run": "disk", "store": str(store), "threads": args.threads}
    streamed = launch(spec | {"max_memory": "1GB"}, SCRIPT)
    print(
        f"\nX of {n_samples} x {n_features} float16 on disk ({args.gigabytes:g} GB), 8 alphas to 0.3 alpha_max, "
        "tol 1e-5"
    )
    print(
        f"max_memory 1GB: {streamed['seconds']:.0f} s, peak {streamed['peak_mb']:.0f} MB (imports alone "
        f"{streamed['peak_mb_of_imports']:.0f}), {streamed['passes']} passes, gap {streamed['gap']:.1e}",
        flush=True,
    )
    resident = launch(spec | {"max_memory": "1TB"}, SCRIPT)
    difference = float(
        np.abs(np.subtract(streamed["objective"], resident["objective"])).max() / resident["objective"][0]
    )
    print(
        f"in memory: {resident['seconds']:.0f} s, peak {resident['peak_mb']:.0f} MB; "
        f"objectives differ by {difference:.1e} of P(0, b0)"
    )
    return {"streamed": streamed, "in_memory": resident, "objective_difference": difference}


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (task, result), color in zip(figures["solvers"].items(), ("C0", "C1", "C2"), strict=False):
        for kind, marker in (("ours cpu", "o-"), ("adelie", "s--")):
            runs = [row for name, row in result["rows"].items() if name.startswith(kind)]
            label = f"{task}, {'this solver' if kind.startswith('ours') else kind}"
            left.loglog([r["gap"] for r in runs], [r["median"] for r in runs], marker, color=color, label=label)
    left.invert_xaxis()
    left.set(xlabel="worst certified gap of 40 alphas, relative", ylabel="seconds, 2 threads", title="Time to a gap")
    left.legend(fontsize=7)
    for name, result in figures["growth"].items():
        factor = name.split()[1]
        sizes = [row[factor] for row in result["rows"]]
        label = f"{name} (power {result['exponent']:.2f})"
        right.loglog(sizes, [row["seconds"] for row in result["rows"]], "o-", label=label)
    right.set(xlabel="size", ylabel="seconds to 100 active features", title="Growth, one factor at a time")
    right.legend(fontsize=7)
    fig.savefig(path)


if __name__ == "__main__":
    main()
