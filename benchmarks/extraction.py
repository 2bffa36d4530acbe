"""How fast extraction and reading are, against the network alone and the disk.

    python benchmarks/extraction.py [--model h2t_resnet20] [--images 2000] [-b 64] [--device auto] [--json FILE]

Rows: the bare forward pass on the same batches, extraction with the network's own taps, reading the whole matrix, and
reading 200 scattered columns of it. Images are random and in memory, so decoding is not part of it.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from h2t_store import FeatureMatrix, extract
from h2t_store.backbones import load_backbone


def seconds(work: Callable[[], object], repeat: int = 3) -> float:
    """Fastest of a few runs."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="h2t_resnet20")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(
        "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    )

    backbone = load_backbone(args.model, pretrained=args.model == "h2t_resnet20")
    network = backbone.model.to(device)
    _, height, width = backbone.data_config["input_size"]
    images = np.random.default_rng(0).integers(0, 256, (args.images, height, width, 3), dtype=np.uint8)
    batch = torch.randn(args.batch_size, 3, height, width, device=device)
    passes = -(-args.images // args.batch_size)

    @torch.inference_mode()
    def forward() -> None:
        for _ in range(passes):
            network(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        runs: list[FeatureMatrix] = []

        def run() -> None:
            runs.append(
                extract(
                    (images, None),
                    model=network,
                    store=Path(folder) / "s.zarr",
                    name=f"run{len(runs)}",
                    batch_size=args.batch_size,
                    device=device,
                )
            )

        times = {"forward": seconds(forward), "extract": seconds(run)}
        matrix = runs[-1]
        columns = np.sort(np.random.default_rng(0).choice(matrix.shape[1], 200, replace=False))
        times["read"] = seconds(lambda: np.asarray(matrix))
        times["read 200 columns"] = seconds(lambda: np.asarray(matrix[:, columns]))
        stored = matrix.shape[0] * matrix.shape[1] * 2
    report = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
        "versions": {package: version(package) for package in ("torch", "timm", "zarr", "numpy")},
        "model": args.model,
        "images": args.images,
        "features": matrix.shape[1],
        "seconds": times,
        "images_per_second": {key: args.images / times[key] for key in ("forward", "extract")},
        "extract_over_forward": times["forward"] / times["extract"],
        "read_bytes_per_second": stored / times["read"],
    }
    print(json.dumps(report["machine"] | report["versions"]))
    print(f"{args.model}: {args.images} images, {matrix.shape[1]} features, {stored / 1e6:.0f} MB stored")
    print(f"{'bare forward pass':28}{args.images / times['forward']:10.0f} images/s")
    print(
        f"{'extract':28}{args.images / times['extract']:10.0f} images/s  ({report['extract_over_forward']:.2f} of it)"
    )
    print(f"{'read all':28}{stored / times['read'] / 1e6:10.0f} MB/s of float16")
    print(f"{'read 200 scattered columns':28}{times['read 200 columns'] * 1e3:10.0f} ms")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
