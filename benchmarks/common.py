"""What the benchmarks share: the machine's name, features to work on, fresh processes, timing side by side."""

import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h2t_store import FeatureMatrix, extract, open_features

HERE = Path(__file__).resolve().parent
SUITE, WEIGHTS = HERE.parents[1] / "shared/data/suite", HERE.parents[1] / "shared/data/weights"

SUITE_TASKS = ("cifar10", "sign_digits", "digits", "sprites_orientation", "sprites_location")
VTAB_TASKS = (
    "cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397",
    "patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy",
    "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele",
)  # fmt: skip
RESNET56_TAPS = "layer?.*.conv?:in,layer3.8,linear"


def machine(threads: int, packages: Sequence[str] = ("torch", "numpy", "scikit-learn")) -> str:
    """Processor, GPU, threads and versions, in a line."""
    import torch

    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = " ".join(f"{package} {version(package)}" for package in packages)
    return f"{name}, {os.cpu_count()} cores, {threads} threads, {gpu}; python {platform.python_version()} {versions}"


def resnet56(weights: Path) -> dict[str, Any]:
    """What `extract` is told of the ResNet-56 of CIFAR-10, whose weights lie in that folder."""
    return {
        "model": f"{HERE.parent / 'tests/tiny_models.py'}:resnet56",
        "checkpoint": weights / "resnet56_cifar10.safetensors",
        "img_size": 32,
    }


def suite_features(task: str, split: str, suite: Path, weights: Path, work: Path) -> FeatureMatrix:
    """ResNet-56's features of a task's images, extracted once into ``work/features.zarr``."""
    store, name = work / "features.zarr", f"{task}/{split}"
    images = np.load(suite / f"{task}.npz")
    if (store / name / "committed").exists():
        return open_features(store, name)
    return extract(
        (images[f"X_{split}"], images[f"y_{split}"]),
        store=store,
        name=name,
        taps=RESNET56_TAPS,
        **resnet56(weights),
    )


def synthetic(
    n_samples: int, n_features: int, n_classes: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rectified mixtures of a few latent factors, as correlated as a network's features; classes shift the factors."""
    rng = np.random.default_rng(seed)
    y = np.arange(n_samples) % n_classes
    latent = rng.normal(size=(n_samples, 64)).astype(np.float32)
    latent += 0.8 * rng.normal(size=(n_classes, 64)).astype(np.float32)[y]
    X = np.empty((n_samples, n_features), np.float32)
    for start in range(0, n_features, 4096):
        block = X[:, start : start + 4096]
        mixing = rng.normal(size=(64, block.shape[1])).astype(np.float32)
        mixing *= rng.random(mixing.shape) < 0.15
        block[:] = np.maximum(latent @ mixing + rng.standard_normal(block.shape, dtype=np.float32), 0)
    return X, y


def big_store(gigabytes: float, work: Path) -> tuple[Path, tuple[int, int]]:
    """A store of 4000 samples with an extraction "big" of that size in float16, filled once, and its shape."""
    n_samples = 4000
    n_features = int(gigabytes * 1e9 / 2 / n_samples)
    store = work / f"big_{n_features}.zarr"
    if not (store / "big").exists():
        fill_store(store, n_samples, n_features)
    return store, (n_samples, n_features)


def fill_store(path: Path, n_samples: int, n_features: int) -> None:
    """A store of synthetic features, written by row blocks as an extraction is."""
    from h2t_store.storage.layout import ExtractionHeader, Layer
    from h2t_store.storage.store import FeatureStore

    width, rows, n_classes = 4096, 500, 10
    edges = [*range(0, n_features, width), n_features]
    layers = tuple(Layer(f"layer{i}", a, b, (b - a,)) for i, (a, b) in enumerate(pairwise(edges)))
    provenance = {"inputs": {"model": "synthetic"}, "environment": {}}
    header = ExtractionHeader(n_samples, rows, "float16", tuple(map(str, range(n_classes))), layers, provenance)
    rng = np.random.default_rng(0)
    y = rng.integers(0, n_classes, n_samples)
    extraction = FeatureStore(path, create=True).begin("big", header, y, [str(i) for i in range(n_samples)])
    mixing = rng.normal(size=(64, width)).astype(np.float32)
    centers = 0.5 * rng.normal(size=(n_classes, 64)).astype(np.float32)
    for block, values in enumerate(row_blocks(rng, y, rows, layers, mixing, centers)):
        norms = [np.linalg.norm(values[:, at.start : at.stop].astype(np.float32), axis=1) for at in layers]
        parts = np.split(values, [at.start for at in layers[1:]], axis=1)
        extraction.write_block(block, parts, np.stack(norms, axis=1), np.zeros((len(parts[0]), 16), np.uint8))
    extraction.finish()


def row_blocks(
    rng: np.random.Generator, y: NDArray[np.int64], rows: int, layers: Any, mixing: Any, centers: Any
) -> Iterator[NDArray[np.float16]]:
    for start in range(0, len(y), rows):
        labels = y[start : start + rows]
        latent = rng.normal(size=(len(labels), 64)).astype(np.float32) + centers[labels]
        values = np.empty((len(labels), layers[-1].stop), np.float16)
        for i, layer in enumerate(layers):
            chosen = (np.arange(64) + i) % 7 < 3
            mixed = 0.3 * latent[:, chosen] @ np.roll(mixing, 7 * i, axis=1)[chosen, : layer.stop - layer.start]
            values[:, layer.start : layer.stop] = np.maximum(
                mixed + rng.standard_normal(mixed.shape, dtype=np.float32), 0
            )
        yield values


def peak_mb() -> float:
    """Most memory this process ever had, in megabytes of 10^6 bytes (getrusage would count its parent's, too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def launch(spec: dict[str, Any], script: Path, python: str = sys.executable) -> dict[str, Any]:
    """Run ``script --worker SPEC`` in a fresh process with ``spec["threads"]`` threads; its last line is the result."""
    threads = str(spec["threads"])
    environment = os.environ | {
        "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": str(HERE.parent)
    }  # fmt: skip
    done = subprocess.run(
        [python, str(script), "--worker", json.dumps(spec)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{spec['run']} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def alternate(works: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, list[Any]]:
    """What each piece of work returns in each of ``repeat`` rounds; every round runs all of them, in turning order.

    What is compared is so measured within moments, and a machine that slows down hits each as often as the others.
    """
    results: dict[str, list[Any]] = {name: [] for name in works}
    for i in range(repeat):
        order = list(works.items())
        for name, work in order if i % 2 == 0 else reversed(order):
            gc.collect()
            results[name].append(work())
    return results


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest quotient of numbers measured in the same round."""
    quotients = np.divide(numerators, denominators)
    return {"median": float(np.median(quotients)), "min": float(quotients.min()), "max": float(quotients.max())}


def shown(quotient: Mapping[str, float], target: str = "") -> str:
    """A ratio as it is printed: ``0.97 (0.95 to 0.98)``, and what it should be."""
    wanted = f", wanted {target}" if target else ""
    return f"{quotient['median']:.3f} ({quotient['min']:.3f} to {quotient['max']:.3f}){wanted}"


def drop_caches() -> bool:
    """Make the system forget the files it has read, so that the next reading is from the disk; whether it could."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True
