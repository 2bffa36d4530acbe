"""Taps of one network of every family in timm: found, run and pooled, with random weights on the CPU.

    python benchmarks/timm_sweep.py --json benchmarks/timm_sweep.json [--only 'vision_*']

The smallest model of each family is taken, by the number of parameters of networks built without storage. Each family
runs in a process of its own with a time and a memory limit, and the file is written after each: families that passed
are not run again unless ``--only`` names them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import machine

TIMEOUT_S = 400
MEMORY_BYTES = 12 * 2**30
THREADS = 2
TARGET_SIZE = 512


def families() -> list[str]:
    """timm's own modules of models."""
    import timm

    return [
        family
        for family in timm.list_modules()
        if any(
            timm.model_entrypoint(name).__module__ == f"timm.models.{family}"
            for name in timm.list_models(module=family)
        )
    ]


def smallest(family: str) -> tuple[str, int]:
    """The model of a family with the fewest parameters, and how many they are."""
    import timm
    import torch

    sizes: dict[str, int] = {}
    failed = ""
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
        except Exception as error:  # a model that cannot be built without storage is passed over
            failed = f"{name}: {type(error).__name__}: {error}"
    if not sizes:
        raise RuntimeError(f"no model can be built: {failed}")
    name = min(sizes, key=lambda name: (sizes[name], name))
    return name, sizes[name]


def try_model(name: str) -> dict[str, Any]:
    """Find the taps of a model, pool two images at its own size, and check what comes out."""
    import torch

    from h2t_store.network import find_taps, load_backbone, pooled_layers, tapped

    torch.set_num_threads(THREADS)
    backbone = load_backbone(name, pretrained=False)
    size = tuple(backbone.data_config["input_size"])
    images = torch.randn((2, *size), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    taps, left_out = find_taps(backbone.model, images, "activations")
    found = time.perf_counter()
    layers = pooled_layers(taps, (TARGET_SIZE,))
    with torch.inference_mode(), tapped(backbone.model, layers) as forward:
        features = forward(images)
    done = time.perf_counter()
    wrong = [
        layer.name
        for layer, values in zip(layers, features, strict=True)
        if values.shape != (2, layer.width) or values.dtype != torch.float32 or not torch.isfinite(values).all()
    ]
    if wrong or not layers:
        raise RuntimeError(f"features that are not finite or of another shape at {wrong}")
    return {
        "input_size": size,
        "taps": len(taps),
        "left_out": left_out,
        "width": sum(layer.width for layer in layers),
        "find_s": round(found - start, 2),
        "run_s": round(done - found, 2),
    }


def work(family: str, model: str | None, parameters: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if model is None:
        model, parameters = smallest(family)
        print(json.dumps({"model": model, "parameters": parameters}), flush=True)
    print(json.dumps({"model": model, "parameters": parameters, **try_model(model)}))


def run(family: str, known: dict[str, Any]) -> dict[str, Any]:
    """The family's result from a fresh process, or the reason why there is none."""
    spec = json.dumps([family, known.get("model"), known.get("parameters")])
    command = [sys.executable, __file__, "--worker", spec]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
        output, errors = done.stdout, done.stderr
        failed = f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output, errors = ((text or b"").decode() for text in (error.stdout, error.stderr))
        failed = f"not done in {TIMEOUT_S} s"
    lines = output.splitlines()
    result: dict[str, Any] = json.loads(lines[-1]) if lines else dict(known)
    if failed:
        last = (errors.strip().splitlines() or [""])[-1]
        result = {key: result[key] for key in ("model", "parameters") if key in result}
        result["reason"] = f"{failed}: {last}"[:300]
    return result


def table(results: dict[str, Any]) -> str:
    rows = [f"{'family':28} {'model':44} {'params/M':>8} {'taps':>5} {'width':>8} {'find/s':>7} {'run/s':>6}"]
    for family, result in sorted(results.items()):
        head = f"{family:28} {result.get('model', '-'):44} {result.get('parameters', 0) / 1e6:8.2f}"
        if "reason" in result:
            rows.append(f"{head} {result['reason']}")
        else:
            rows.append(f"{head} {result['taps']:5} {result['width']:8} {result['find_s']:7.2f} {result['run_s']:6.2f}")
    passed = sum("reason" not in result for result in results.values())
    return "\n".join([*rows, f"{passed} of {len(results)} families ({passed / max(1, len(results)):.1%})"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="results are read from here, continued and written here")
    parser.add_argument("--only", default="", metavar="GLOB", help="families to run, passed before or not")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*json.loads(args.worker))
        return
    report: dict[str, Any] = {"families": {}}
    if args.json and args.json.exists():
        report = json.loads(args.json.read_text())
    report = {"machine": f"{machine(THREADS)} timm {version('timm')}", "target_size": TARGET_SIZE} | report
    for family in families():
        known = report["families"].get(family, {})
        if fnmatch(family, args.only) if args.only else not known or "reason" in known:
            report["families"][family] = run(family, known)
            print(family, json.dumps(report["families"][family] | {"left_out": None}), flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    print(report["machine"])
    print(table(report["families"]))


if __name__ == "__main__":
    main()
