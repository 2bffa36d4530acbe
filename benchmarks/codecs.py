"""What codecs and shards cost and save: real activations of the bundled network, written and read with each.

    python benchmarks/codecs.py [--images FILE.npz] [--rows 1000] [--repeat 3] [--json FILE]

disk    bytes, and seconds to write and to read all features
zarr    the same without a codec for wide layers, beside zarr's own pipeline on the same arrays
bucket  an S3 server on this machine (moto): bytes, and requests to write all, to read all, and to read 200 columns
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import zarr
from common import HERE, alternate, machine, peak_mb
from numpy.typing import NDArray

from h2t_store import extract, open_features
from h2t_store.engines.plan import Plan
from h2t_store.storage.extraction import Extraction
from h2t_store.storage.layout import array_document, array_specs, feature_path
from h2t_store.storage.store import FeatureStore

sys.path.append(str(HERE.parent / "tests"))
CODECS, DTYPES = ("none", "zstd", "blosc", "pcodec"), ("float16", "float32")
COUNTED_TARGET_SIZE = 4096  # layers wider than a chunk


class Features:
    """Features of an extraction by row block, and what else a store needs to hold them."""

    def __init__(self, extraction: Extraction) -> None:
        self.header = extraction.header
        self.y, self.ids = extraction.labels(), extraction.sample_ids()
        n_blocks = -(-self.header.n_samples // self.header.rows_per_block)
        whole = {
            layer: np.concatenate(
                [
                    np.hstack([extraction.features(layer, block, i).copy() for i in range(layer.n_chunks)])
                    for block in range(n_blocks)
                ]
            )[: self.header.n_samples, : layer.width]
            for layer in self.header.layers
        }
        self.layers, self.norms = list(whole.values()), extraction.layer_norms()
        self.digests = extraction.digests()

    def write(self, store: str | Path, codec: str, shards: bool) -> float:
        """Write a store; seconds of its row blocks."""
        header = replace(self.header, codec=codec, shards=shards)
        extraction = FeatureStore(store, create=True).begin("x", header, self.y, self.ids)
        start = perf_counter()
        for block in Plan(header.n_samples, header.rows_per_block):
            rows = slice(block.start, block.stop)
            parts = [layer[rows] for layer in self.layers]
            extraction.write_block(block.number, parts, self.norms[rows], self.digests[rows])
        seconds = perf_counter() - start
        extraction.finish()
        return seconds

    def write_by_zarr(self, folder: Path) -> float:
        """Write the same arrays by zarr's own pipeline; seconds without their metadata."""
        arrays = []
        for i, layer in enumerate(self.header.layers):
            (folder / str(i)).mkdir(parents=True)
            document = array_document(array_specs(self.header)[feature_path(layer)])
            (folder / f"{i}/zarr.json").write_bytes(document)
            arrays.append(zarr.open_array(folder / str(i), mode="r+"))
        start = perf_counter()
        for block in Plan(self.header.n_samples, self.header.rows_per_block):
            for array, values in zip(arrays, self.layers, strict=True):
                array[block.start : block.stop] = values[block.start : block.stop]
        return perf_counter() - start


def extracted(images: Path | None, rows: int, dtype: str, target_size: int, work: Path) -> Features:
    """Features of the bundled network."""
    data: Any = "digits"
    if images is not None:
        loaded = np.load(images)
        data = (loaded["X_train"], loaded["y_train"])
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        scaled = np.repeat((digits.images * 15.9).astype(np.uint8)[..., None], 3, axis=-1)
        data = (scaled, digits.target)
    data = (data[0][:rows], data[1][:rows])
    store, name = work / "features.zarr", f"{dtype}-{target_size}"
    extract(data, model="h2t_resnet20", store=store, name=name, dtype=dtype, target_size=target_size, workers=0)
    return Features(FeatureStore(store).open(name))


def seconds_of(work: Any) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def feature_bytes(store: Path) -> int:
    """Bytes of the files below ``features``."""
    return sum(file.stat().st_size for file in (store / "x/features").rglob("*") if file.is_file())


def on_disk(features: Features, repeat: int, work: Path, names: Sequence[str]) -> dict[str, Any]:
    """Medians of each codec, or of zarr's own pipeline without one."""
    numbers = iter(range(10**6))

    def measured(codec: str) -> dict[str, float]:
        path = work / str(next(numbers))
        if codec == "zarr":
            write = features.write_by_zarr(path)
            read = seconds_of(lambda: [zarr.open_array(path / str(i))[:] for i in range(len(features.layers))])
            return {"write": write, "read": read}
        write = features.write(path, codec, shards=False)
        read = seconds_of(lambda: np.asarray(open_features(path, "x")))
        if codec == "none":
            extraction = FeatureStore(path).open("x")
            stored = seconds_of(lambda: read_as_stored(extraction))
            return {"write": write, "read": read, "read_as_stored": stored, "bytes": feature_bytes(path)}
        return {"write": write, "read": read, "bytes": feature_bytes(path)}

    works = {name: lambda name=name: measured(name) for name in names}
    for work_once in works.values():
        work_once()
    found = alternate(works, repeat)
    return {
        name: {key: float(np.median([times[key] for times in rounds])) for key in rounds[0]}
        for name, rounds in found.items()
    }


def read_as_stored(extraction: Extraction) -> None:
    """All chunks without a conversion, as zarr reads them."""
    for layer in extraction.header.layers:
        whole = np.empty((extraction.header.n_samples, layer.width), extraction.header.dtype)
        for block, column in product(range(len(extraction.committed())), range(layer.n_chunks)):
            chunk = extraction.features(layer, block, column)
            rows, columns = block * chunk.shape[0], column * chunk.shape[1]
            part = whole[rows : rows + chunk.shape[0], columns : columns + chunk.shape[1]]
            part[:] = chunk[: part.shape[0], : part.shape[1]]


def in_bucket(features: Features) -> dict[str, Any]:
    """Requests with and without shards."""
    from object_server import serving

    results: dict[str, Any] = {}
    with serving() as s3:
        os.environ.update(s3.environment)

        def counted(work: Any) -> tuple[int, float, Any]:
            s3.seen.clear()
            start = perf_counter()
            result = work()
            asked = [path for _, path in s3.seen if "/features/" in path and "/c/" in path]
            return len(asked), perf_counter() - start, result

        for codec, shards in product(CODECS, (False, True)):
            store = f"s3://bucket/{codec}-{shards}"
            puts, write, _ = counted(lambda store=store, codec=codec, s=shards: features.write(store, codec, s))
            gets, read, whole = counted(lambda store=store: np.asarray(open_features(store, "x")))
            few, read_few, part = counted(lambda store=store: np.asarray(open_features(store, "x")[:, some(features)]))
            if not np.array_equal(part, whole[:, some(features)]):
                raise SystemExit("other values")
            results[f"{codec}{', shards' if shards else ''}"] = {
                "write_requests": puts, "write_seconds": write, "read_requests": gets, "read_seconds": read,
                "200_columns_requests": few, "200_columns_seconds": read_few,
            }  # fmt: skip
    return results


def some(features: Features) -> NDArray[np.int64]:
    """200 columns, 40 in each of five layers."""
    rng = np.random.default_rng(0)
    layers = [features.header.layers[i] for i in rng.choice(len(features.header.layers), 5, replace=False)]
    return np.sort(np.concatenate([layer.start + rng.choice(layer.width, 40, replace=False) for layer in layers]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help=".npz with X_train and y_train; scikit-learn's digits without")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "machine": machine(1, ("torch", "zarr", "numcodecs", "pcodec", "obstore")),
        "images": args.images.name if args.images else "digits",
        "rows": args.rows,
    }
    print(report["machine"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for dtype in DTYPES:
            features = extracted(args.images, args.rows, dtype, 512, work)
            raw = args.rows * features.header.n_features * np.dtype(dtype).itemsize
            found = on_disk(features, args.repeat, work / f"written-{dtype}", CODECS)
            report[dtype] = {"columns": features.header.n_features, "bytes": raw} | found
            print(f"\ndisk, {dtype}, {raw / 1e6:.0f} MB: bytes of those, seconds to write and to read")
            for name, figures in found.items():
                print(f"  {name:8}{figures['bytes'] / raw:8.3f}{figures['write']:8.3f}{figures['read']:8.3f}")
        features = extracted(args.images, min(args.rows, 600), "float16", COUNTED_TARGET_SIZE, work)
        report["zarr"] = found = on_disk(features, args.repeat, work / "written-wide", ("none", "zarr"))
        print(
            f"\nwriting {found['zarr']['write'] / found['none']['write']:.1f} times as fast as zarr, reading as stored "
            f"{found['zarr']['read'] / found['none']['read_as_stored']:.1f} times"
        )
        report["bucket"] = in_bucket(features)
        print(f"\nbucket, {features.header.n_features} columns in {len(features.layers)} layers, two row blocks")
        for name, figures in report["bucket"].items():
            print(f"  {name:16}" + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    print(f"\npeak memory {peak_mb():.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
