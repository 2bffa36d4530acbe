"""How well a frozen network serves new tasks: tasks x methods x seeds, a file per cell, tables and a page of results.

    python benchmarks/transfer.py [--tasks NAME ...] [--methods NAME ...] [--seeds 0 1 2]

    python benchmarks/transfer.py --vtab-root vtab-1k --model resnet50 --taps paper --probe fc:in \\
        --target-size 512 --target-size 8192 --out vtab_resnet50

    python benchmarks/transfer.py --vtab-root vtab-1k --model vit_base_patch16_224 --taps paper --cls-token keep \\
        --probe head:in --target-size 512 --target-size 8192 --out vtab_vit

Tasks are those of --suite (.npz files with X_train, X_test, y_train, y_test), every folder in --vtab-root that holds
train800val200.txt and test.txt, as VTAB-1k comes, and "digits", scikit-learn's. Without --model the network is the
ResNet-56 of CIFAR-10 where --suite has its weights beside it, else h2t_resnet20, which comes along.

A cell that is there already, made with the same features and settings, is not computed again; --rerun does. Features
are extracted once per task into --work. FLOP of training are those of products of matrices and, where the network is
trained, of convolutions. RESULTS.md in --out is written anew from all cells, which lie in its folder ``cells``.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, RESNET56_TAPS, SUITE, SUITE_TASKS, VTAB_TASKS, WEIGHTS, machine, resnet56
from methods import CHOOSE_SIZE, METHODS, SETTINGS, Data, MatrixFlops, forward_flops
from report import write

from h2t_store import FeatureMatrix, extract
from h2t_store.engines.preparation import Job, prepare
from h2t_store.settings import Settings

VTAB_FILES = {"train": "train800val200.txt", "test": "test.txt"}
TARGET_SIZES = (512, 16)
TRAINED = ("fine-tuning", "from scratch")
USUAL = tuple(name for name in METHODS if name not in TRAINED and "one size" not in name)


@dataclass(frozen=True)
class Task:
    """Images with a name: a .npz file, a folder as VTAB-1k has them, or scikit-learn's digits."""

    name: str
    place: Path | None = None

    def source(self, split: str) -> dict[str, Any]:
        """What `h2t_store.extract` and `prepare` take."""
        if self.place is None:
            return {"data": "digits", "split": split}
        if self.place.suffix == ".npz":
            images = np.load(self.place)
            return {"data": (images[f"X_{split}"], images[f"y_{split}"])}
        return {"data": self.place / VTAB_FILES[split]}


@dataclass(frozen=True)
class Backbone:
    """A network, what is taken of it, and where that is kept."""

    settings: dict[str, Any]
    taps: dict[str, Any]
    probe: str | None
    work: Path

    def job(self, task: Task, split: str) -> Job:
        """The network with a split's images."""
        return prepare(Settings(**task.source(split), **self.settings))

    def features(self, task: Task, split: str, taps: dict[str, Any], name: str) -> tuple[FeatureMatrix, float]:
        """Features of a split, extracted unless they are there, and the seconds that took (those of the first time)."""
        start, seconds = time.perf_counter(), self.work / f"{name.replace('/', '-')}.seconds"
        matrix = extract(**task.source(split), **self.settings, **taps, store=self.work / "features.zarr", name=name)
        if not seconds.exists():
            seconds.write_text(str(time.perf_counter() - start))
        return matrix, float(seconds.read_text())


def main() -> None:
    args = parser().parse_args()
    tasks = find_tasks(args)
    if unknown := {*args.tasks} - {*tasks}:
        raise SystemExit(f"--tasks: {', '.join(sorted(unknown))} not found; there are {', '.join(tasks) or 'none'}")
    backbone = the_backbone(args)
    print(machine(torch.get_num_threads()), flush=True)
    for name in args.tasks or tasks:
        run_task(tasks[name], backbone, args)
    write(args.out)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_options(made)
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(USUAL), metavar="NAME",
                      help=f"of {'; '.join(METHODS)}; by default those that do not train the network and may "
                      "use all target sizes")  # fmt: skip
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--minutes", type=float, default=30.0, help="that training the network may take; default 30")
    made.add_argument("--rerun", action="store_true", help="compute cells that are there again")
    return made


def add_backbone_options(to: argparse.ArgumentParser) -> None:
    """Options that say which tasks and which network; `find_tasks` and `the_backbone` read them."""
    to.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="by default all that are found")
    to.add_argument("--suite", type=Path, default=SUITE, help="folder of .npz files")
    to.add_argument("--vtab-root", type=Path, help="folder of tasks as VTAB-1k comes")
    to.add_argument("--model", help="as of extract")
    to.add_argument("--checkpoint", type=Path)
    to.add_argument("--no-pretrained", action="store_true")
    to.add_argument("--img-size", type=int)
    to.add_argument("--device", default="auto")
    to.add_argument("--taps", default="activations")
    to.add_argument("--cls-token", default="pool", choices=["pool", "only", "keep"])
    to.add_argument("--probe", help="tap that a linear probe is given; by default the one before the last")
    to.add_argument("--target-size", type=int, action="append", metavar="N", help=f"several: {', '.join(CHOOSE_SIZE)} "
                    f"choose, the others take the first; default {' and '.join(map(str, TARGET_SIZES))}")  # fmt: skip
    to.add_argument("--work", type=Path, default=Path("transfer-features"), help="where features are kept")
    to.add_argument("--out", type=Path, default=HERE, help="folder of RESULTS.md and its cells")


def find_tasks(args: argparse.Namespace) -> dict[str, Task]:
    """Tasks by name; those of --vtab-root alone where it is given."""
    if args.vtab_root is not None:
        found = {path.parent.name: path.parent for path in args.vtab_root.glob(f"*/{VTAB_FILES['train']}")}
        found = {name: path for name, path in found.items() if (path / VTAB_FILES["test"]).exists()}
        if not found:
            raise SystemExit(f"--vtab-root {args.vtab_root}: no folder with {' and '.join(VTAB_FILES.values())} in it")
        order = [name for name in VTAB_TASKS if name in found]
        return {name: Task(name, found[name]) for name in order + sorted({*found} - {*order})}
    files = {path.stem: path for path in sorted(args.suite.glob("*.npz"))} if args.suite.is_dir() else {}
    order = [name for name in SUITE_TASKS if name in files]
    known = {name: Task(name, files[name]) for name in order + sorted({*files} - {*order})}
    return known or {"digits": Task("digits")}


def the_backbone(args: argparse.Namespace) -> Backbone:
    """The network that the options name."""
    settings = {
        "model": args.model, "checkpoint": args.checkpoint, "img_size": args.img_size,
        "pretrained": not args.no_pretrained, "device": args.device,
    }  # fmt: skip
    taps, probe = {"taps": args.taps, "cls_token": args.cls_token}, args.probe
    if args.model is None and resnet56(WEIGHTS)["checkpoint"].exists():
        settings |= resnet56(WEIGHTS)
        taps["taps"], probe = RESNET56_TAPS, "linear:in"
    elif args.model is None:
        settings["model"] = "h2t_resnet20"
    taps["target_size"] = args.target_size or list(TARGET_SIZES)
    args.work.mkdir(parents=True, exist_ok=True)
    return Backbone(settings, taps, probe, args.work)


def load(task: Task, backbone: Backbone, minutes: float) -> tuple[Data, dict[str, Any]]:
    """A task's features, and what they cost."""
    (X, seconds), (X_test, _) = (
        backbone.features(task, split, backbone.taps, f"{task.name}/{split}") for split in ("train", "test")
    )
    sizes = backbone.taps["target_size"]
    features = {size: (X.select_target_size(size), X_test.select_target_size(size)) for size in sizes}
    if backbone.probe is None:
        first = features[sizes[0]]
        probe = tuple(matrix.select_layers(escaped(matrix.layers[-2].name)) for matrix in first)
    else:
        probe_taps = {"taps": backbone.probe, "target_size": 1}
        probe = tuple(
            backbone.features(task, split, probe_taps, f"{task.name}/{split} probe")[0] for split in ("train", "test")
        )
    y, y_test = X.y, X_test.y
    job = partial(backbone.job, task)
    data = Data((X, X_test), features, probe, y, y_test, job, minutes)
    inputs = X.provenance["inputs"]
    per_image = forward_flops(job("train"))
    return data, {
        "images": [len(X), len(X_test)],
        "classes": len(np.unique(y)),
        "features": {str(size): pair[0].shape[1] for size, pair in data.features.items()},
        "store_bytes": X.shape[0] * X.shape[1] * 2,
        "extraction_seconds": seconds,
        "extraction_flops": per_image * len(X),
        "backbone": {key: inputs[key] for key in ("model", "weights_sha256", "cls_token")},
        "inputs": [matrix.provenance["inputs"] for matrix in (X, X_test, *probe)],
    }


def digest(inputs: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """Of the features that a method is given: how they were made, but for target sizes that it does not use."""
    used = []
    for one in inputs:
        if {*sizes} < {*one["target_size"]}:
            taps = list(dict.fromkeys(re.sub(r"@\d+$", "", tap) for tap in one["taps"]))
            one = {**one, "target_size": list(sizes), "taps": taps}
        used.append(one)
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()


def escaped(name: str) -> str:
    """A name as a glob that means it."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def run_task(task: Task, backbone: Backbone, args: argparse.Namespace) -> None:
    data, facts = load(task, backbone, args.minutes)
    inputs, sizes = facts.pop("inputs"), backbone.taps["target_size"]
    for name in args.methods:
        used = sizes if name in CHOOSE_SIZE else sizes[:1]
        given = digest(inputs, used)
        for seed in args.seeds:
            path = args.out / "cells" / task.name / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json"
            settings = json.loads(json.dumps([*SETTINGS[name], given], default=str))
            if not args.rerun and path.exists() and json.loads(path.read_text())["settings"] == settings:
                continue
            start = time.perf_counter()
            with MatrixFlops() as counter:
                outcome = METHODS[name](data, seed)
            cell = {"task": task.name, "method": name, "seed": seed, **asdict(outcome)}
            cell |= {
                "seconds": time.perf_counter() - start,
                "flops": counter.total if outcome.flops is None else outcome.flops,
            }
            cell |= {"target_sizes": used, "task_facts": facts, "settings": settings}
            cell["machine"] = machine(torch.get_num_threads())
            cell["command"] = " ".join(["python benchmarks/transfer.py", *sys.argv[1:]])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(cell, indent=1, default=float) + "\n")
            print(f"{task.name:22}{name:24}seed {seed}  {outcome.accuracy:.4f}  {cell['seconds']:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
