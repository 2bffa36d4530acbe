"""How fast `extract` is, against the network alone and against thingsvision, and how much memory it takes.

    python benchmarks/extraction.py --memory --thingsvision PYTHON --json benchmarks/extraction.json
    python benchmarks/extraction.py [--models resnet50,...] [--images N] [-b auto] [--device auto] [--amp]
        [--torchcompile] [--workers N] [--repeat 5] [--thingsvision PYTHON] [--memory] [--json FILE]

Speed: images/s of an extraction with all ``activations`` taps over those of the network alone, with random weights, on
the same images in memory (as large as preprocessing would make them, so that decoding and resizing are no part of it),
preprocessing, loader, batches, memory format and dtype. Rounds run each in turning order, and ratios are taken within a
round. An extraction is timed from the making of its arrays to its finished matrix; "after the first batch" leaves out
the making of arrays and, with ``--torchcompile``, compiling. Loading the network and finding its taps come before
either and are listed as ``setup``. Each network has a process of its own.

thingsvision: the same images, batches and threads, and the modules that the taps are outputs of (or, where a function
made the tensor, inputs of), with what a person would write: ``module_names``, activations kept in memory, or written to
a folder every few batches. PYTHON is one that has it, such as

    python3.11 -m venv tv && tv/bin/pip install thingsvision==2.7.3
    tv/bin/pip install torch==2.14.1 torchvision==0.29.1 "numpy<2" (this project's torch, to compare like with like)

It keeps what it computed, however much that is, unless it writes files; only the latter is bounded, as `extract` is.

Memory: most memory that the process ever had (VmHWM), against the number of small images in a tar.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import timm
import torch
from common import alternate, launch, machine, peak_mb, ratio, shown
from numpy.typing import NDArray
from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from h2t_store import extract
from h2t_store.engines import open_engine
from h2t_store.engines.preparation import Job, prepare
from h2t_store.extracting import fill
from h2t_store.images import Source
from h2t_store.network.taps import tapped
from h2t_store.settings import Running, Settings
from h2t_store.storage.store import FeatureStore
from h2t_store.switches import exact_arithmetic

MODELS = "resnet50,vit_small_patch16_224,convnext_tiny"
COUNTS = "1000,10000,100000"
SCRIPT = Path(__file__).resolve()
THINGSVISION = SCRIPT.with_name("thingsvision_worker.py")
STEP_BATCHES = 2  # after how many batches thingsvision writes its files
MEMORY_SHARE = 0.35  # of what is free, for the activations that thingsvision keeps
Run = dict[str, float]


def write_images(model: str, n: int, file: Path) -> None:
    """Random images, as large as the network's preprocessing would make them before it cuts the middle out."""
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    side = math.floor(config["input_size"][-1] / config["crop_pct"])
    np.save(file, np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


class Images(Dataset[Tensor]):
    """Preprocessed images of a source."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, row: int) -> Tensor:
        return self.transform(self.source.image(row))

    def __len__(self) -> int:
        return len(self.source)


class Passes:
    """One pass over all images, in several ways; each says how many seconds it took, and after its first batch."""

    def __init__(self, job: Job, workers: int, folder: Path) -> None:
        self.job, self.forward, self.workers = job, job.forward, workers
        self.stores = (FeatureStore(folder / f"{i}.zarr", create=True) for i in itertools.count())

    def batches(self, memory_format: torch.memory_format) -> Iterator[Tensor]:
        """Normalized batches on the device."""
        forward = self.forward
        loader = DataLoader(
            Images(self.job.source, forward.transform),
            batch_size=self.job.batch_size,
            num_workers=self.workers,
            pin_memory=forward.device.type == "cuda",
        )
        mean, std = (
            torch.tensor(values, device=forward.device).view(1, -1, 1, 1) for values in (forward.mean, forward.std)
        )
        for images in loader:
            part = images.to(forward.device, non_blocking=True).to(memory_format=memory_format)
            yield (part.float().div_(255) - mean).div_(std)

    @torch.inference_mode()
    def over(self, network: Callable[[Tensor], Any], memory_format: torch.memory_format | None = None) -> Run:
        """Run a network and drop what it gives."""
        start, first = perf_counter(), 0.0
        autocast = torch.autocast(self.forward.device.type, torch.bfloat16, enabled=self.forward.amp)
        with exact_arithmetic, autocast:
            for batch in self.batches(memory_format or self.forward.memory_format):
                network(batch)
                if not first:
                    self.synchronize()
                    first = perf_counter()
            self.synchronize()
        return self.run(start, first, self.job.batch_size)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.forward.device.type == "cuda":
            torch.cuda.synchronize(self.forward.device)

    def run(self, start: float, first: float, n_first: int) -> Run:
        """Images per second until now, of all and of those after the first ones."""
        end, n = perf_counter(), len(self.job.source)
        return {"all": n / (end - start), "after the first batch": max(0, n - n_first) / max(end - first, 1e-9)}

    def load(self) -> Run:
        """The loader alone."""
        return self.over(lambda batch: None)

    def bare(self) -> Callable[[], Run]:
        """The network alone, compiled where extraction compiles it."""
        model = self.forward.model
        network = torch.compile(model) if self.forward.compiled else model
        return lambda: self.over(network)

    def bare_contiguous(self) -> Callable[[], Run]:
        """The network alone, in the memory format that torch takes by default."""
        network = copy.deepcopy(self.forward.model).to(memory_format=torch.contiguous_format)
        return lambda: self.over(network, torch.contiguous_format)

    def pooled(self) -> Run:
        """Hooks and pooling, nothing stored."""
        with tapped(self.forward.model, self.forward.layers, compiled=self.forward.compiled) as network:
            return self.over(network)

    def extract(self) -> Run:
        """Everything, into a new store."""
        store, start, seen = next(self.stores), perf_counter(), []

        def progress(done: int, total: int, made: int) -> None:
            if done and not seen:
                seen.extend([perf_counter(), done])

        running = Running(workers=self.workers, progress=progress)
        with open_engine(running) as engine:
            fill(self.job, store, "bench", engine, running)
        return self.run(start, *seen)


def prepared(spec: dict[str, Any]) -> tuple[Job, float]:
    """The job of a worker, and how long it took to find out what it is."""
    torch.set_num_threads(spec["threads"])
    images = np.load(spec["images"])[: spec.get("n")]
    start = perf_counter()
    settings = Settings(
        data=(images, None),
        model=spec["model"],
        pretrained=False,
        batch_size=spec["batch_size"],
        device=spec["device"],
        amp=spec["amp"],
        torchcompile=spec["torchcompile"],
    )
    job = prepare(settings)
    return job, perf_counter() - start


def described(job: Job) -> dict[str, Any]:
    """What an extraction computes, with its bytes: what pooling reads of the network's, and what is stored."""
    element = 2 if job.forward.amp else 4
    places = {layer.tap.place: layer.tap for layer in job.forward.layers}
    return {
        "images": len(job.source),
        "batch_size": job.batch_size,
        "memory_format": str(job.forward.memory_format),
        "layers": len(job.layers),
        "features": job.layers[-1].stop,
        "activation_bytes_per_image": element * sum(math.prod(tap.raw_shape) for tap in places.values()),
        "stored_bytes_per_image": job.forward.dtype.itemsize * job.layers[-1].stop,
    }


def reading_speed(device: torch.device) -> float:
    """Bytes per second at which the device sums up a tensor too large for its caches."""
    data = torch.ones(1 << 28 if device.type == "cuda" else 1 << 26, device=device)
    times = []
    for _ in range(5):
        start = perf_counter()
        data.sum().item()
        times.append(perf_counter() - start)
    return data.nbytes / min(times)


def speed(spec: dict[str, Any]) -> dict[str, Any]:
    """Worker: rounds of passes over the images."""
    job, setup = prepared(spec)
    with tempfile.TemporaryDirectory() as folder:
        passes = Passes(job, spec["workers"], Path(folder))
        works = {
            "bare forward": passes.bare(),
            "extract": passes.extract,
            "hooks and pooling": passes.pooled,
            "bare forward, contiguous": passes.bare_contiguous(),
        }
        works["bare forward"]()
        runs = alternate(works, spec["repeat"])
        loading = passes.load()["all"]
    found = described(job) | {"setup_seconds": setup, "loader_images_per_second": loading, "images_per_second": runs}
    reads = found["activation_bytes_per_image"] / reading_speed(job.forward.device)
    bare = np.median([run["after the first batch"] for run in runs["bare forward"]])
    return found | {
        "seconds_to_read_activations_over_bare_forward": float(reads * bare),
        "ratios": {
            f"{name} over bare forward, {part}": ratio(
                [run[part] for run in runs[name]], [run[part] for run in runs["bare forward"]]
            )
            for name in works
            if name != "bare forward"
            for part in ("all", "after the first batch")
        },
    }


def module_names(job: Job) -> list[str]:
    """Modules whose outputs are the taps, or nearest to them, for who can only see outputs."""
    modules = [layer.tap.place.module for layer in job.forward.layers]
    return [name for name in dict.fromkeys(modules) if name]


def once(spec: dict[str, Any]) -> dict[str, Any]:
    """Worker: one extraction in a fresh process."""
    job, _ = prepared(spec)
    with tempfile.TemporaryDirectory() as folder:
        passes = Passes(job, spec["workers"], Path(folder))
        before, cpu = peak_mb(), process_time()
        run = passes.extract()
        cpu = process_time() - cpu
    return described(job) | {
        "modules": module_names(job),
        "images_per_second": run["all"],
        "cpu_ms_per_image": 1e3 * cpu / len(job.source),
        "peak_mb": peak_mb(),
        "peak_mb_before": before,
        "versions": {package: version(package) for package in ("torch", "timm", "numpy")},
    }


def compare(spec: dict[str, Any], python: str, repeat: int) -> dict[str, Any]:
    """Extractions here and by thingsvision, each in a fresh process, at two numbers of images."""
    probe = launch(spec | {"run": "once", "n": 2 * spec["batch"]}, SCRIPT)
    kept = probe["activation_bytes_per_image"] * spec["batch"]
    batches = max(2, min(spec["images_written"] // spec["batch"], int(MEMORY_SHARE * available() / kept)))
    n = batches * spec["batch"]
    theirs = spec | {"modules": probe["modules"], "batch_size": spec["batch"], "step_size": STEP_BATCHES}
    results: dict[str, Any] = {"images": n, "modules": len(probe["modules"])}
    for count in (n // 2, n):
        works = {
            "h2t_store": lambda count=count: launch(spec | {"run": "once", "n": count}, SCRIPT),
            "thingsvision in memory": lambda count=count: launch(
                theirs | {"run": "thingsvision", "n": count, "files": False}, THINGSVISION, python
            ),
            "thingsvision to files": lambda count=count: launch(
                theirs | {"run": "thingsvision", "n": count, "files": True}, THINGSVISION, python
            ),
        }
        results[str(count)] = alternate(works, repeat if count == n else 1)
    speeds = {name: [run["images_per_second"] for run in runs] for name, runs in results[str(n)].items()}
    mine = speeds.pop("h2t_store")
    results["ratios"] = {f"h2t_store over {name}": ratio(mine, other) for name, other in speeds.items()}
    return results


def available() -> int:
    """Bytes of main memory that are free, or would be for the asking."""
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024


def has_thingsvision(python: str | None) -> bool:
    """Whether that Python has it; says so where not."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('thingsvision') is None)"
    found = False
    if python:
        with contextlib.suppress(OSError):
            found = subprocess.run([python, "-c", probe]).returncode == 0
    if not found:
        print("thingsvision: left out, " + (f"{python} does not have it" if python else "no --thingsvision PYTHON"))
    return found


def write_tar(file: Path, n: int, distinct: int = 1000) -> None:
    """A tar of ``n`` PNG images of 32 x 32 in ten folders."""
    rng = np.random.default_rng(0)
    contents = [png(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(min(n, distinct))]
    with tarfile.open(file, "w") as tar:
        for i in range(n):
            content = contents[i % len(contents)]
            member = tarfile.TarInfo(f"class{i % 10}/{i:07}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An image as the content of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    """Worker: one extraction with the arguments left as they are, from a tar."""
    torch.set_num_threads(spec["threads"])
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        X = extract(spec["tar"], model="h2t_resnet20", store=Path(folder) / "s.zarr", name="x", device=spec["device"])
        seconds = perf_counter() - start
    return {
        "images": X.shape[0],
        "features": X.shape[1],
        "rows_per_block": X._header.rows_per_block,
        "seconds": seconds,
        "peak_mb": peak_mb(),
        "largest_child_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
    }


def bench_memory(threads: int, device: str, counts: list[int], repeat: int) -> dict[str, Any]:
    """Peaks at several numbers of images."""
    runs: dict[str, list[Any]] = {}
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "images.tar"
            write_tar(file, n)
            spec = {"run": "memory", "tar": str(file), "threads": threads, "device": device}
            runs[str(n)] = [launch(spec, SCRIPT) for _ in range(repeat)]
    peaks = [np.median([run["peak_mb"] for run in found]) for found in runs.values()]
    return {"runs": runs, "largest_over_smallest": float(max(peaks) / min(peaks))}


def show_speed(model: str, found: dict[str, Any], compiled: bool, device: str) -> None:
    """Print what was found of a network."""
    wanted = ">= 0.85" if device == "cuda" and not compiled else ">= 0.95"
    print(
        f"\n{model}: {found['images']} images, batches of {found['batch_size']}, {found['memory_format']}, "
        f"{found['layers']} layers, {found['features']} features, setup {found['setup_seconds']:.1f} s"
    )
    print(
        f"  bytes an image: {found['activation_bytes_per_image'] / 1e6:.1f} MB of activations to be pooled "
        f"({found['seconds_to_read_activations_over_bare_forward']:.1%} of the bare forward pass to read them once), "
        f"{found['stored_bytes_per_image'] / 1e3:.1f} kB stored"
    )
    for name, runs in found["images_per_second"].items():
        whole, later = (np.median([run[part] for run in runs]) for part in ("all", "after the first batch"))
        print(f"  {name:28}{whole:9.1f} images/s  {later:9.1f} after the first batch")
    print(f"  {'loader alone':28}{found['loader_images_per_second']:9.1f} images/s")
    for name, quotient in found["ratios"].items():
        print(f"  {name:68}{shown(quotient, wanted if name.startswith('extract') else '')}")


def show_comparison(model: str, found: dict[str, Any]) -> None:
    """Print how thingsvision did."""
    print(f"\n{model}, {found['modules']} modules, against thingsvision, a fresh process each")
    for n in (found["images"] // 2, found["images"]):
        for name, runs in found[str(n)].items():
            rate, peak, cpu = (
                np.median([run[key] for run in runs]) for key in ("images_per_second", "peak_mb", "cpu_ms_per_image")
            )
            print(f"  {n:6} images  {name:24}{rate:8.1f} images/s {cpu:6.0f} ms of CPU each  peak {peak:7.0f} MB")
    for name, runs in found[str(found["images"])].items():
        print(f"  {name}: " + " ".join(f"{package} {number}" for package, number in runs[0]["versions"].items()))
    for name, quotient in found["ratios"].items():
        print(f"  {name:42}{shown(quotient, '>= 1.5')}")


def show_memory(found: dict[str, Any]) -> None:
    """Print peaks."""
    print("\nh2t_resnet20, PNG images of 32 x 32 in a tar, a fresh process each")
    for n, runs in found["runs"].items():
        peak, rate, child = (
            np.median([run[key] for run in runs]) for key in ("peak_mb", "seconds", "largest_child_mb")
        )
        print(
            f"  {int(n):8,} images  peak {peak:7.0f} MB  (a worker: {child:.0f} MB)  {int(n) / rate:8.0f} images/s  "
            f"blocks of {runs[0]['rows_per_block']}"
        )
    print(f"  largest over smallest {found['largest_over_smallest']:.3f}, wanted <= 1.10")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="names joined by commas, or none")
    parser.add_argument("--images", type=int, help="by default 512, and 16384 on a GPU")
    parser.add_argument("-b", "--batch-size", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--torchcompile", action="store_true")
    parser.add_argument("--workers", type=int, help="that preprocess; by default none, and up to 12 for a GPU")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--thingsvision", metavar="PYTHON")
    parser.add_argument("--memory", action="store_true", help="measure memory against the number of images, too")
    parser.add_argument("--counts", default=COUNTS, help="numbers of images for --memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    if args.worker:
        work = {"speed": speed, "once": once, "memory": memory}[args.worker["run"]]
        print(json.dumps(work(args.worker)))
        return
    threads = torch.get_num_threads()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    on_gpu = device.startswith("cuda")
    named = machine(threads, ("torch", "timm", "numpy", "zarr"))
    print(named, flush=True)
    images = args.images or (16384 if on_gpu else 512)
    workers = (min(12, os.cpu_count() or 1) if on_gpu else 0) if args.workers is None else args.workers
    spec = {
        "threads": threads,
        "batch_size": args.batch_size if args.batch_size == "auto" else int(args.batch_size),
        "device": device,
        "amp": args.amp,
        "torchcompile": args.torchcompile,
        "workers": workers,
        "repeat": args.repeat,
    }
    about = {"machine": named, "command": " ".join(["python", "benchmarks/extraction.py", *sys.argv[1:]])}
    results: dict[str, Any] = about | {"speed": {}, "thingsvision": {}} | spec

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    models = [] if args.models in ("", "none") else args.models.split(",")
    against = bool(models) and has_thingsvision(args.thingsvision)
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "images.npy"
            write_images(model, images, file)
            given = spec | {"model": model, "images": str(file)}
            found = launch(given | {"run": "speed"}, SCRIPT)
            results["speed"][model] = found
            show_speed(model, found, args.torchcompile, device[:4])
            if against:
                given |= {"batch": found["batch_size"], "images_written": images}
                results["thingsvision"][model] = compare(given, args.thingsvision, args.repeat)
                show_comparison(model, results["thingsvision"][model])
        save()
    if args.memory:
        results["memory"] = bench_memory(threads, device, [int(n) for n in args.counts.split(",")], 1)
        show_memory(results["memory"])
        save()


if __name__ == "__main__":
    main()
