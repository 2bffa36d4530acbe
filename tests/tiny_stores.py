"""Small extractions that no network made."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.store import FeatureStore


def write_store(
    path: Path,
    layers: tuple[Layer, ...],
    values: NDArray[np.floating],
    y: NDArray[np.int64],
    *,
    classes: tuple[str | int, ...] = ("a", "b", "c"),
    rows: int = 16,
    inputs: dict[str, str] | None = None,
    name: str = "x",
) -> Path:
    """A store with one extraction of these values, in blocks of so many rows; its samples are ``i0``, ``i1``, …"""
    n = len(values)
    header = ExtractionHeader(n, rows, values.dtype.name, classes, layers, {"inputs": inputs or {}, "environment": {}})
    extraction = FeatureStore(path, create=True).begin(name, header, y, [f"i{i}" for i in range(n)])
    for block, start in enumerate(range(0, n, rows)):
        parts = [values[start : start + rows, layer.start : layer.stop] for layer in layers]
        norms = [np.linalg.norm(part.astype(np.float32), axis=1) for part in parts]
        extraction.write_block(block, parts, np.stack(norms, axis=1), np.zeros((len(parts[0]), 16), np.uint8))
    extraction.finish()
    return path
