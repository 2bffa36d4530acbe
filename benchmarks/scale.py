"""What an extraction costs at scale: bytes, objects, requests, arithmetic, memory, for up to 10^10 images.

    python benchmarks/scale.py [--json benchmarks/scale.json] [--page benchmarks/SCALE.md]

Nothing is read or written: networks (random weights) tell their layers, and the planner of `h2t_store` goes through
every row block of a billion images, as the engines do, while its memory is watched. Prices are options, so that the
page can be made for any provider; what a GPU does in an hour is not measured here and left to be filled in.
"""

import argparse
import json
import tempfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, launch, machine
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from h2t_store.engines.plan import rows_per_block
from h2t_store.engines.preparation import Job, prepare
from h2t_store.images import open_source
from h2t_store.settings import Settings
from h2t_store.storage.chunks import CRC_BYTES
from h2t_store.storage.layout import ExtractionHeader, array_specs

NETWORKS = {"resnet50": "pool", "vit_base_patch16_224": "keep"}
TARGET_SIZES = (512, 8192)
MILLION = 10**6
SIZES = (10**6, 10**7, 10**8, 10**9)
REQUESTS_BESIDE_CHUNKS = 4  # norms, digests, checksums, the flag; tests/test_objects.py counts them
LISTED_AT_ONCE = 1000
LIMITS = {"seconds": 60.0, "megabytes": 500.0}


def job_of(model: str, target_size: int) -> Job:
    """What is to be computed for images of this network's size."""
    images = np.zeros((2, 224, 224, 3), np.uint8)
    settings = Settings(
        data=(images, None), model=model, pretrained=False, taps="paper", cls_token=NETWORKS[model],
        target_size=target_size, batch_size=1, device="cpu",
    )  # fmt: skip
    return prepare(settings)


def header_of(job: Job, n_samples: int) -> ExtractionHeader:
    """Of an extraction of so many images."""
    return replace(job.header(), n_samples=n_samples, rows_per_block=rows_per_block(n_samples, job.row_bytes))


def flop(job: Job) -> int:
    """Products and sums of one image's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        job.forward.model(torch.zeros(1, 3, 224, 224))
    return int(counter.get_total_flops())


def bytes_per_block(header: ExtractionHeader) -> int:
    """Of all its chunks."""
    n_bytes = 0
    for path, spec in array_specs(header).items():
        if path.startswith("features/") or path in ("layer_norms", "digests", "checksums", "committed"):
            across = -(-spec.shape[1] // spec.chunks[1]) if len(spec.shape) > 1 else 1
            n_bytes += across * (int(np.prod(spec.chunks)) * np.dtype(spec.dtype).itemsize + CRC_BYTES)
    return n_bytes


def cost(job: Job, n_samples: int, prices: argparse.Namespace) -> dict[str, Any]:
    """Units, and what they cost, of so many images."""
    header = header_of(job, n_samples)
    chunks = sum(layer.n_chunks for layer in header.layers)
    n_blocks = -(-n_samples // header.rows_per_block)
    puts = n_blocks * (chunks + REQUESTS_BESIDE_CHUNKS)
    n_bytes = n_blocks * bytes_per_block(header)
    return {
        "features": header.n_features,
        "layers": len(header.layers),
        "rows_per_block": header.rows_per_block,
        "blocks": n_blocks,
        "chunks_per_block": chunks,
        "bytes": n_bytes,
        "puts": puts,
        "gets_of_one_reading": n_blocks * (chunks + 1),
        "lists_of_a_resume": -(-puts // LISTED_AT_ONCE),
        "dollars_of_puts": puts / 1000 * prices.put_price,
        "dollars_of_one_reading": n_blocks * (chunks + 1) / 1000 * prices.get_price,
        "dollars_a_month": n_bytes / 1e9 * prices.month_price,
    }


def plan(header: ExtractionHeader) -> dict[str, Any]:
    """What plan_worker.py finds of an extraction, in a process without torch."""
    spec = {
        "run": f"plan of {header.n_samples}", "threads": 1, "n_samples": header.n_samples,
        "height": header.rows_per_block,
        "objects_per_block": sum(layer.n_chunks for layer in header.layers) + REQUESTS_BESIDE_CHUNKS,
    }  # fmt: skip
    return launch(spec, HERE / "plan_worker.py")


def bytes_per_image(folder: Path, n: int = 20000) -> float:
    """Memory that a list of so many image files takes per image, measured on a folder of them."""
    picture = folder / "class/000000.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (1, 1)).save(picture)
    for i in range(1, n):
        picture.with_name(f"{i:06d}.png").hardlink_to(picture)
    tracemalloc.start()
    source = open_source(folder)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / len(source)


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The page."""
    prices = report["prices"]
    yield "# What an extraction costs at scale\n"
    yield "Written by `python benchmarks/scale.py` on " + report["machine"] + ".\n"
    yield (
        "The paper's taps, float16, per million images of 224 x 224. A request writes one chunk; a row block takes "
        f"one for each chunk and {REQUESTS_BESIDE_CHUNKS} more. Dollars are units times prices given on the command "
        f"line (here ${prices['put_price']} per 1000 writes, ${prices['get_price']} per 1000 reads, "
        f"${prices['month_price']} per GB and month, as S3's standard class was listed in us-east-1; transfer within a "
        "region is free).\n"
    )
    yield "| network | target size | features | stored | objects | writes | one reading | a month |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in report["costs"]:
        yield (
            f"| {row['model']} | {row['target_size']} | {row['features']:,} | {row['bytes'] / 1e9:,.0f} GB | "
            f"{row['puts']:,} | ${row['dollars_of_puts']:.2f} | ${row['dollars_of_one_reading']:.2f} | "
            f"${row['dollars_a_month']:.2f} |"
        )
    yield "\nThe arithmetic, counted by torch's `FlopCounterMode` (a product and a sum are two):\n"
    yield "| network | GFLOP an image | PFLOP a million | GPU-hours a million |"
    yield "|---|---|---|---|"
    for model, flops in report["flop"].items():
        yield (
            f"| {model} | {flops / 1e9:.2f} | {flops * MILLION / 1e15:,.1f} | *not measured*: {MILLION / 3600:.0f} "
            "over the images a second, so 0.28 at 1000 |"
        )
    yield (
        "\nA row block is at most 128 MiB, so that wide features make few rows a block, small objects and many "
        "requests: at a target size of 8192 writing costs about what a month of storage does. What has to be sent: "
        + "; ".join(
            f"{row['model']} at {row['target_size']} writes {row['bytes'] / MILLION / 1e3:.0f} kB an image, "
            f"{row['bytes'] / MILLION * 1000 * 8 / 1e9:.1f} Gbit/s at 1000 images/s"
            for row in report["costs"]
        )
        + ".\n"
    )
    yield "## The plan of a billion images\n"
    yield (
        "Row blocks are made while they are gone through; kept are a flag of each and the numbers of the missing ones. "
        f"Limits: {LIMITS['seconds']:.0f} s and {LIMITS['megabytes']:.0f} MB. Every seventh block is there already.\n"
    )
    yield "| images | row blocks | objects to write | seconds | planner's memory | whole process |"
    yield "|---|---|---|---|---|---|"
    for row in report["plans"]:
        yield (
            f"| {row['images']:,} | {row['blocks']:,} | {row['objects']:,} | {row['seconds']:.2f} | "
            f"{row['planner_megabytes']:.2f} MB | {row['peak_mb']:.0f} MB |"
        )
    yield "\n## What breaks first\n"
    each = report["bytes_per_listed_image"]
    yield (
        f"The list of images: identifiers, paths and labels take {each:.0f} bytes an image in memory (measured), in "
        "the process that starts the job and in each that computes.\n"
    )
    yield "| images | the list in memory | objects (ResNet-50, 512) | requests to list them | what breaks |"
    yield "|---|---|---|---|---|"
    for row in report["breaks"]:
        yield (
            f"| 10^{int(np.log10(row['images']))} | {row['list_gb']:,.2f} GB | {row['puts']:,} | "
            f"{row['lists_of_a_resume']:,} | {row['breaks']} |"
        )


BREAKS = {
    10**6: "nothing",
    10**8: "the list of images, sent to every worker of a node: name the images in parts (`imagenet/00`, "
    "`imagenet/01`, ...), each an extraction of its own; a fit over all rows reads more than a machine holds, so that "
    "estimators are given rows, `X[rows]`",
    10**10: "the list does not fit any machine, nor do the labels (80 GB): parts are the only way; one prefix of a "
    "bucket takes some 3500 writes a second, so that writing the objects takes a day unless parts lie under prefixes "
    "of their own",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--put-price", type=float, default=0.005, help="dollars per 1000 writes (default %(default)s)")
    parser.add_argument("--get-price", type=float, default=0.0004, help="dollars per 1000 reads (default %(default)s)")
    parser.add_argument("--month-price", type=float, default=0.023, help="dollars per GB and month")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "machine": machine(torch.get_num_threads()),
        "prices": {key: getattr(args, key) for key in ("put_price", "get_price", "month_price")},
        "costs": [],
        "flop": {},
    }
    for model in NETWORKS:
        for target_size in TARGET_SIZES:
            job = job_of(model, target_size)
            report["flop"][model] = flop(job)
            report["costs"].append({"model": model, "target_size": target_size} | cost(job, MILLION, args))
    smallest = job_of("resnet50", 512)
    report["plans"] = [plan(header_of(smallest, n)) for n in SIZES]
    with tempfile.TemporaryDirectory() as folder:
        report["bytes_per_listed_image"] = bytes_per_image(Path(folder))
    report["breaks"] = [
        {"images": n, "list_gb": n * report["bytes_per_listed_image"] / 1e9, "breaks": text} | cost(smallest, n, args)
        for n, text in BREAKS.items()
    ]
    page = "\n".join(lines(report)) + "\n"
    print(page)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.page:
        args.page.write_text(page)


if __name__ == "__main__":
    main()
