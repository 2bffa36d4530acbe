"""The planner of an extraction by itself, for scale.py: every row block that is missing, and what that takes."""

import json
import sys
import tracemalloc
from pathlib import Path
from time import perf_counter

import numpy as np

from h2t_store.engines.plan import Plan


def main() -> None:
    spec = json.loads(sys.argv[2])
    tracemalloc.start()
    start = perf_counter()
    committed = np.zeros(-(-spec["n_samples"] // spec["height"]), bool)
    committed[::7] = True
    missing = Plan(spec["n_samples"], spec["height"], np.flatnonzero(~committed))
    rows = objects = 0
    for block in missing:
        rows += block.stop - block.start
        objects += spec["objects_per_block"]
    assert rows == missing.n_rows
    figures = {
        "images": spec["n_samples"],
        "blocks": len(committed),
        "missing_rows": rows,
        "objects": objects,
        "seconds": perf_counter() - start,
        "planner_megabytes": tracemalloc.get_traced_memory()[1] / 1e6,
        "peak_mb": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
