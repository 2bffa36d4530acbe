"""One extraction by thingsvision, for ``extraction.py``; run by a Python that has it, which need not be this project's.

Nothing of this project is imported. What a person would write: an extractor of timm's network, its own preprocessing, a
loader, and ``module_names``.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import thingsvision
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """Preprocessed images of an array."""

    def __init__(self, pixels, transform):
        self.pixels, self.transform = pixels, transform

    def __getitem__(self, row):
        return self.transform(Image.fromarray(self.pixels[row]))

    def __len__(self):
        return len(self.pixels)


def peak_mb():
    """Most memory this process ever had."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def work(spec):
    torch.set_num_threads(spec["threads"])
    pixels = np.load(spec["images"])[: spec["n"]]
    extractor = thingsvision.get_extractor(
        model_name=spec["model"], source="timm", device=spec["device"], pretrained=False
    )
    transform = extractor.get_transformations()

    def run(images, folder):
        loader = DataLoader(
            Images(images, transform),
            batch_size=spec["batch_size"],
            num_workers=spec["workers"],
            pin_memory=spec["device"].startswith("cuda"),
        )
        return extractor.extract_features(
            batches=loader,
            module_names=spec["modules"],
            flatten_acts=True,
            output_type="ndarray",
            output_dir=folder,
            step_size=spec["step_size"] if folder else None,
        )

    run(pixels[: spec["batch_size"]], None)
    before = peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        features = run(pixels, folder if spec["files"] else None)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        if spec["files"]:
            files = list(Path(folder).rglob("*.npy"))
            made = sum(file.stat().st_size for file in files)
        else:
            made = sum(part.nbytes for part in features.values())
    return {
        "images_per_second": len(pixels) / seconds,
        "cpu_ms_per_image": 1e3 * cpu / len(pixels),
        "peak_mb": peak_mb(),
        "peak_mb_before": before,
        "bytes": made,
        "versions": {
            "thingsvision": thingsvision.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=json.loads, required=True)
    spec = parser.parse_args().worker
    with contextlib.redirect_stdout(sys.stderr):
        result = work(spec)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
