"""How fast a store is written and read, against plain numpy files of the same bytes on the same disk.

    python benchmarks/store.py --json benchmarks/store.json
    python benchmarks/store.py [--rows 50000] [--layers 50] [--repeat 5] [--folder DIR] [--json FILE]

The layout is that of a network such as ResNet-50: layers of 256 to 2048 columns in float16, row blocks as an extraction
of so many rows plans them. Every round writes new files, the store and the numpy files in turning order, and speeds are
compared within a round. A file is timed until it is written, and until `os.sync` returns, too. Reading follows with the
files in the page cache and, where the system lets its cache be dropped (root), from the disk.

All that is written stays until the end, (repeat + 2) times the store, because ext4 does not give the inodes of files
deleted within the last minutes to new ones and takes up to half a millisecond a file to step over them. For the same
reason, wait five minutes after something else, such as this script, has deleted thousands of files there.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from itertools import count, cycle, islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import alternate, drop_caches, machine, peak_mb, ratio, shown
from numpy.typing import NDArray

from h2t_store import FeatureMatrix, open_features
from h2t_store.engines.plan import Plan, RowBlock, rows_per_block
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.store import FeatureStore
from h2t_store.storage.threads import in_threads

WIDTHS = (256,) * 12 + (512,) * 8 + (1024, 256, 512, 2048, 256)  # repeated for as many layers as are asked for
NAME = "bench"
Data = list[NDArray[np.float16]]


def layers_of(n_layers: int) -> tuple[Layer, ...]:
    """Layers side by side."""
    edges = np.cumsum([0, *islice(cycle(WIDTHS), n_layers)]).tolist()
    return tuple(Layer(f"layer{i}", start, stop, (stop - start,)) for i, (start, stop) in enumerate(pairwise(edges)))


def header_of(rows: int, layers: tuple[Layer, ...]) -> ExtractionHeader:
    """What the store says; blocks are planned as an extraction plans them."""
    height = rows_per_block(rows, 2 * layers[-1].stop)
    provenance: dict[str, Any] = {"inputs": {"model": "synthetic"}, "environment": {}}
    return ExtractionHeader(rows, height, "float16", ("a",), layers, provenance)


class Rows:
    """The bytes to be written: random rows of one block that serve for all blocks, layer by layer and side by side."""

    def __init__(self, header: ExtractionHeader) -> None:
        rng, height = np.random.default_rng(0), header.rows_per_block
        self.header, self.shape = header, (header.n_samples, header.n_features)
        self.parts: Data = [
            np.maximum(rng.standard_normal((height, layer.width), np.float32), 0).astype(np.float16)
            for layer in header.layers
        ]
        self.whole = np.concatenate(self.parts, axis=1)
        self.norms = np.stack([np.linalg.norm(part.astype(np.float32), axis=1) for part in self.parts], axis=1)
        self.labels, self.ids = np.zeros(header.n_samples, np.int64), [str(i) for i in range(header.n_samples)]

    def blocks(self) -> Iterable[RowBlock]:
        """All row blocks in order."""
        return Plan(self.header.n_samples, self.header.rows_per_block)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as stored, without what chunks are filled up with."""
        return self.shape[0] * self.shape[1] * 2


def write_store(rows: Rows, path: Path) -> dict[str, float]:
    """A new store; seconds of its row blocks alone, with its beginning and end, and until it is on disk."""
    begun = perf_counter()
    extraction = FeatureStore(path, create=True).begin(NAME, rows.header, rows.labels, rows.ids)
    first = perf_counter()
    for block in rows.blocks():
        n = block.stop - block.start
        extraction.write_block(
            block.number, [part[:n] for part in rows.parts], rows.norms[:n], np.zeros((n, 16), np.uint8)
        )
    last = perf_counter()
    extraction.finish()
    return {"blocks": last - first} | until_synced(begun)


def write_npy(rows: Rows, path: Path) -> dict[str, float]:
    """One new ``.npy`` file, block after block."""
    begun = perf_counter()
    with open(path, "xb", buffering=0) as file:
        description = {"descr": "<f2", "fortran_order": False, "shape": rows.shape}
        np.lib.format.write_array_header_1_0(file, description)
        for block in rows.blocks():
            rows.whole[: block.stop - block.start].tofile(file)
    return until_synced(begun)


def write_npys(rows: Rows, path: Path) -> dict[str, float]:
    """A new ``.npy`` file for each block, by `np.save`."""
    begun = perf_counter()
    path.mkdir()
    for block in rows.blocks():
        np.save(path / f"{block.number}.npy", rows.whole[: block.stop - block.start])
    return until_synced(begun)


def until_synced(begun: float) -> dict[str, float]:
    """Seconds since then, and once everything is on disk."""
    written = perf_counter() - begun
    os.sync()
    return {"written": written, "synced": perf_counter() - begun}


def timed(work: Callable[[], object], cold: bool = False) -> Callable[[], float]:
    """The work as one that returns its seconds, after the page cache was dropped if ``cold``."""

    def run() -> float:
        if cold:
            drop_caches()
        start = perf_counter()
        result = work()
        seconds = perf_counter() - start
        del result
        return seconds

    return run


def forget(path: Path) -> None:
    """Take files that are on disk out of the page cache, so that the next ones need not push them out."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def bench_writing(rows: Rows, folder: Path, repeat: int) -> dict[str, Any]:
    """Write each in every round, under names that are new."""
    numbers = count()

    def fresh(write: Callable[[Rows, Path], dict[str, float]]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            path = folder / f"written{next(numbers)}"
            times = write(rows, path)
            forget(path)
            if write is not write_store:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()
            return times

        return run

    works = {"store": fresh(write_store), "npy": fresh(write_npy), "npys": fresh(write_npys)}
    for work in works.values():
        work()
    found = alternate(works, repeat)
    seconds = {
        f"{name}, {stage}": [times[stage] for times in rounds] for name, rounds in found.items() for stage in rounds[0]
    }
    return {"seconds": seconds, "ratios": writing_ratios(seconds)}


def quotient_of(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Quotients of seconds within a round, and that of the fastest ones, which what else the machine did spares."""
    return ratio(numerators, denominators) | {"best": min(numerators) / min(denominators)}


def writing_ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Speed of the store over that of the numpy files."""
    return {
        f"store over {other}, {stage}": quotient_of(seconds[f"{other}, {stage}"], seconds[f"store, {stage}"])
        for other in ("npy", "npys")
        for stage in ("written", "synced")
    }


def read_chunks(X: FeatureMatrix) -> None:
    """Read and check every chunk as stored, on the threads that reading uses; nothing is put together."""
    extraction, header = X._extraction, X._header
    jobs = [
        (layer, block.number, column)
        for layer in header.layers
        for column in range(layer.n_chunks)
        for block in Plan(header.n_samples, header.rows_per_block)
    ]
    in_threads(lambda job: extraction.features(*job).shape, jobs, extraction.folder.concurrency)


def few_columns(layers: tuple[Layer, ...], seed: int) -> NDArray[np.int64]:
    """200 columns, 40 in each of five layers, drawn at random."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(layers), min(5, len(layers)), replace=False)
    parts = [layers[i].start + rng.choice(layers[i].width, 200 // len(chosen), replace=False) for i in chosen]
    return np.sort(np.concatenate(parts))


def bench_reading(rows: Rows, folder: Path, repeat: int, cold: bool) -> dict[str, Any]:
    """Read the store and the file in every round, each opened anew."""
    store, file = folder / "s.zarr", folder / "x.npy"
    draws = count()

    def few() -> NDArray[Any]:
        X = open_features(store, NAME)
        return np.asarray(X[:, few_columns(rows.header.layers, next(draws))])

    works = {
        "store as float32": timed(lambda: np.asarray(open_features(store, NAME)), cold),
        "npy as float32": timed(lambda: np.load(file).astype(np.float32), cold),
        "npy as float32, by torch": timed(lambda: torch.from_numpy(np.load(file)).float(), cold),
        "store, chunks as stored": timed(lambda: read_chunks(open_features(store, NAME)), cold),
        "npy as stored": timed(lambda: np.load(file), cold),
        "200 columns": timed(few, cold),
    }
    if not cold:
        for work in works.values():
            work()
    seconds = alternate(works, repeat)
    everything = seconds["store as float32"]
    return {
        "seconds": seconds,
        "ratios": {
            "float32, store over npy": quotient_of(seconds["npy as float32"], everything),
            "float32, store over npy and torch": quotient_of(seconds["npy as float32, by torch"], everything),
            "as stored, store over npy": quotient_of(seconds["npy as stored"], seconds["store, chunks as stored"]),
            "200 columns over everything": quotient_of(seconds["200 columns"], everything),
        },
    }


def check(rows: Rows, folder: Path) -> None:
    """What is read from the store must be what is read from the file."""
    X, file = open_features(folder / "s.zarr", NAME), np.load(folder / "x.npy", mmap_mode="r")
    for at in (slice(0, 64), slice(len(file) - 64, len(file))):
        if not np.array_equal(np.asarray(X[at]), file[at].astype(np.float32)):
            raise SystemExit("the store and the file hold different values")


def report(rows: Rows, results: dict[str, dict[str, Any]]) -> None:
    """Print medians and ratios."""
    wanted = {
        "store over npy, written": "(wanted >= 0.8)",
        "store over npys, written": "(wanted >= 0.8)",
        "float32, store over npy": "(wanted >= 1.0)",
        "as stored, store over npy": "(wanted >= 1.0)",
        "200 columns over everything": "(wanted <= 0.15)",
    }
    for stage, found in results.items():
        print(f"\n{stage}")
        for name, seconds in found["seconds"].items():
            median = float(np.median(seconds))
            speed = "" if name == "200 columns" else f"{rows.nbytes / median / 1e9:8.2f} GB/s of float16"
            print(f"  {name:36}{median:8.3f} s, best {min(seconds):8.3f} s{speed}")
        for name, quotient in found["ratios"].items():
            print(f"  {name:36}{shown(quotient)}, of the best {quotient['best']:.3f} {wanted.get(name, '')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write, on the disk to be measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    named = machine(threads, ("torch", "numpy", "zarr", "google-crc32c"))
    rows = Rows(header_of(args.rows, layers_of(args.layers)))
    print(named)
    print(
        f"{args.rows:,} rows x {rows.shape[1]:,} columns in {args.layers} layers, {rows.nbytes / 1e9:.2f} GB, "
        f"blocks of {rows.header.rows_per_block} rows; medians of {args.repeat} rounds"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        results = {"writing": bench_writing(rows, folder, args.repeat)}
        write_store(rows, folder / "s.zarr")
        write_npy(rows, folder / "x.npy")
        check(rows, folder)
        results["reading, in the page cache"] = bench_reading(rows, folder, args.repeat, cold=False)
        if drop_caches():
            results["reading, from the disk"] = bench_reading(rows, folder, min(3, args.repeat), cold=True)
    report(rows, results)
    print(f"\npeak memory {peak_mb():.0f} MB")
    if args.json:
        about = {"machine": named, "rows": args.rows, "columns": rows.shape[1], "bytes": rows.nbytes}
        args.json.write_text(json.dumps(about | {"repeat": args.repeat} | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
