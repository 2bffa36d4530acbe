"""The Ray engine beside the local one, killed again and again, and stores in a bucket whose requests fail.

    python benchmarks/cluster.py [--only PART ...] [--images 20000] [--kills 20] [--seed 0] [--json FILE]

throughput  images a second of both engines over the same images in memory, two workers against one process on two
            cores, from the first row block to the last, in alternating rounds
kills       a cluster of three nodes; during each run workers and nodes die at random moments; files are compared byte
            by byte with those of a run that nobody disturbed
requests    one extraction into an S3 server on this machine (moto), 5 % of whose requests fail in six ways, and one
            without failures, whose requests are counted
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import HERE, alternate, machine, ratio, shown
from durability import files_of, write_images

from h2t_store import FeatureMatrix, extract, open_features
from h2t_store.storage.places import open_place
from h2t_store.storage.store import FeatureStore
from h2t_store.storage.verify import verify

sys.path.append(str(HERE.parent / "tests"))
MODELS = HERE.parent / "tests/tiny_models.py"
NAME = "pets/train"
ROUNDS = 3


class Clock:
    """Images a second from the first news to the last, without what starting takes."""

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None
        self.last = (0.0, 0)
        self.begin = perf_counter()

    def __call__(self, done: int, total: int, n_bytes: int) -> None:
        now = (perf_counter(), done)
        if done and self.first is None:
            self.first = now
        self.last = now

    def figures(self) -> dict[str, float]:
        assert self.first is not None
        seconds, images = self.last[0] - self.first[0], self.last[1] - self.first[1]
        return {"images_per_s": images / seconds, "whole_s": self.last[0] - self.begin, "images": self.last[1]}


def throughput(n: int, work: Path) -> dict[str, Any]:
    """Both engines with a ResNet-56 at 32 x 32."""
    import ray

    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10
    ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    runs = iter(range(1 << 30))

    def run(**options: Any) -> dict[str, float]:
        clock, store = Clock(), work / f"{next(runs)}.zarr"
        common = dict(model=f"{MODELS}:resnet56", name=NAME, rows_per_block=256)  # progress of Ray comes by blocks
        extract(data, store=store, progress=clock, **common, **options)
        return clock.figures()

    try:
        results = alternate({"local": run, "ray": lambda: run(engine="ray", workers=2)}, ROUNDS)
    finally:
        ray.shutdown()
    rates = {name: [figures["images_per_s"] for figures in rounds] for name, rounds in results.items()}
    whole = {name: [n / figures["whole_s"] for figures in rounds] for name, rounds in results.items()}
    report = {
        "images": n, "images_per_s": rates, "images_per_s_with_the_start": whole,
        "ratio": ratio(rates["ray"], rates["local"]), "ratio_with_the_start": ratio(whole["ray"], whole["local"]),
    }  # fmt: skip
    print(f"ray over local, {n} images: {shown(report['ratio'], '0.9')}; {rates}")
    print(f"with what starting takes: {shown(report['ratio_with_the_start'])}")
    return report


def worker_pids() -> list[int]:
    """Processes of Ray workers that compute."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::_Worker"):
            found.append(int(process.name))
    return found


def kills(n_kills: int, seed: int, work: Path) -> dict[str, Any]:
    """Runs during which workers or nodes die, until so many did."""
    import ray
    from ray.cluster_utils import Cluster

    choose = random.Random(seed)
    folder = write_images(work / "images", 12000)
    common: dict[str, Any] = dict(model=f"{MODELS}:small_input", batch_size=4, name=NAME)
    extract(folder, store=work / "whole.zarr", **common)
    whole = files_of(work / "whole.zarr" / NAME)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    others = [nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1)]
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    done: Counter[str] = Counter()
    same = runs = 0
    try:
        while sum(done.values()) < n_kills:
            store = work / f"{runs}.zarr"

            def compute(store: Path = store) -> None:
                extract(folder, store=store, engine="ray", workers=3, **common)

            with ThreadPoolExecutor(1) as pool:  # Ray starts nodes in the main thread alone
                computed = pool.submit(compute)
                while not wait([computed], choose.uniform(0.5, 4)).done and sum(done.values()) < n_kills:
                    if choose.random() < 0.3:
                        nodes.remove_node(others.pop(choose.randrange(len(others))), allow_graceful=False)
                        others.append(nodes.add_node(num_cpus=1))
                        done["node"] += 1
                    elif pids := worker_pids():
                        os.kill(choose.choice(pids), signal.SIGKILL)
                        done["worker"] += 1
            computed.result()
            identical = files_of(store / NAME) == whole
            same, runs = same + identical, runs + 1
            print(
                f"run {runs}: {dict(done)} killed so far, {'the same bytes' if identical else 'OTHER BYTES'}",
                flush=True,
            )
    finally:
        ray.shutdown()
        nodes.shutdown()
    return {"killed": dict(done), "runs": runs, "runs_with_the_same_bytes": same}


def requests(work: Path, seed: int) -> dict[str, Any]:
    """An extraction into S3, with and without failures."""
    from object_server import serving

    folder = write_images(work / "pictures", 20000)
    common: dict[str, Any] = dict(model=f"{MODELS}:small_input", name=NAME)
    extract(folder, store=work / "disk.zarr", **common)
    expected = files_of(work / "disk.zarr" / NAME)

    def compare(address: str) -> dict[str, Any]:
        place = open_place(address) / NAME
        found = {path: (place / path).read() for path, _ in place.files()}
        return {
            "same_bytes": found == expected,
            "missing": sorted(expected.keys() - found.keys()),
            "beyond": sorted(found.keys() - expected.keys()),
            "damages": len(list(verify(FeatureStore(address), NAME))),
        }

    with serving(seed) as s3:
        os.environ.update(s3.environment)
        start = perf_counter()
        matrix: FeatureMatrix = extract(folder, store="s3://bucket/sound.zarr", **common)
        sound_s = perf_counter() - start
        chunks = sum(layer.n_chunks for layer in matrix.layers)
        counted = Counter(
            path.split("/c/")[1].split("/")[0]
            for _, path in s3.seen
            if "/c/" in path and not path.split("/c/")[0].endswith(("/y", "/sample_ids"))
        )
        n_requests = len(s3.seen)
        result = {"sound": compare("s3://bucket/sound.zarr") | {"requests": n_requests, "seconds": sound_s}}
        s3.seen.clear()
        s3.rate, s3.failed = 0.05, 0
        start = perf_counter()
        extract(folder, store="s3://bucket/failing.zarr", **common)
        np.asarray(open_features("s3://bucket/failing.zarr", NAME))
        seconds, failed, asked = perf_counter() - start, s3.failed, len(s3.seen)
        s3.rate = 0.0
        result["failing"] = compare("s3://bucket/failing.zarr") | {
            "requests": asked, "failed": failed, "seconds": seconds,
        }  # fmt: skip
    result["row_blocks"] = len(counted)
    result["requests_of_a_row_block"] = max(counted.values())
    result["column_chunks"] = chunks
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("throughput", "kills", "requests")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="parts that are not run are kept")
    args = parser.parse_args()
    logging.getLogger("h2t_store").setLevel(logging.ERROR)
    report: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    report["machine"] = machine(torch.get_num_threads(), ("torch", "ray", "obstore", "zarr"))
    print(report["machine"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for part in args.only:
            start = time.time()
            if part == "throughput":
                report[part] = throughput(args.images, work)
            elif part == "kills":
                report[part] = kills(args.kills, args.seed, work)
            else:
                report[part] = requests(work, args.seed)
            print(f"{part}: {time.time() - start:.0f} s", flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
