"""Write an extraction as one file of another format, block by block."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import H2TError, StoreError
from h2t_store.matrix import FeatureMatrix

Blocks = Iterator[NDArray[np.float32]]


def export(
    matrix: FeatureMatrix,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    block_bytes: int = 64 << 20,
) -> None:
    """Write features, labels and identifiers to a new file.

    Parameters
    ----------
    matrix : FeatureMatrix
        What to write, as float32. ``label`` is the name of a label, empty if unlabelled; ``y`` is its index into the
        classes, -1 if unlabelled.
    path : Path
        ``.npy``: the features, with ``sample_id``, ``y`` and ``label`` in a ``.csv`` file beside them. ``.parquet``:
        columns ``sample_id``, ``label`` and one for each feature. ``.safetensors``: tensors ``X`` and ``y``, and
        metadata ``sample_ids``, ``classes`` and ``feature_names`` as JSON.
    progress : callable
        Called with (rows written, total rows).
    block_bytes : int
        Size of the blocks that are read and written at a time.
    """
    path = Path(path)
    if path.suffix not in EXPORTS:
        raise H2TError(f"file {str(path)!r}: accepted are names that end in {', '.join(EXPORTS)}")
    files = [path, path.with_suffix(".csv")] if path.suffix == ".npy" else [path]
    for file in files:
        if file.exists():
            raise H2TError(f"file {str(file)!r} exists: choose another name")

    def blocks() -> Blocks:
        for rows, block in matrix.row_blocks(block_bytes):
            yield block.astype("<f4", copy=False)
            progress(rows.stop, len(matrix))

    partial = [file.with_name(f".{file.name}.partial") for file in files]
    try:
        EXPORTS[path.suffix](matrix, blocks(), *partial)
        for written, file in zip(partial, files, strict=True):
            written.replace(file)
    except OSError as error:
        raise StoreError(f"file {str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        for file in partial:
            file.unlink(missing_ok=True)


def _label_names(matrix: FeatureMatrix) -> list[str]:
    return ["" if label is None else str(label) for label in matrix.y]


def _write_npy(matrix: FeatureMatrix, blocks: Blocks, path: Path, labels: Path) -> None:
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": matrix.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(block.data)
    with open(labels, "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["sample_id", "y", "label"])
        writer.writerows(zip(matrix.sample_ids.tolist(), matrix.codes.tolist(), _label_names(matrix), strict=True))


def _write_parquet(matrix: FeatureMatrix, blocks: Blocks, path: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise H2TError("Parquet needs pyarrow: pip install 'head2toe[table]'") from None
    names = matrix.feature_names.tolist()
    schema = pa.schema([("sample_id", pa.string()), ("label", pa.string()), *((name, pa.float32()) for name in names)])
    ids, labels, start = matrix.sample_ids.tolist(), _label_names(matrix), 0
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False) as writer:
        for block in blocks:
            stop = start + len(block)
            columns = [pa.array(ids[start:stop]), pa.array(labels[start:stop])]
            columns += [pa.array(column) for column in np.ascontiguousarray(block.T)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            start = stop


def _write_safetensors(matrix: FeatureMatrix, blocks: Blocks, path: Path) -> None:
    y = matrix.codes.astype("<i8")
    metadata = {
        "sample_ids": matrix.sample_ids.tolist(),
        "classes": list(matrix.classes),
        "feature_names": matrix.feature_names.tolist(),
    }
    header = {
        "__metadata__": {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()},
        "y": {"dtype": "I64", "shape": list(y.shape), "data_offsets": [0, y.nbytes]},
        "X": {"dtype": "F32", "shape": list(matrix.shape), "data_offsets": [y.nbytes, y.nbytes + matrix.nbytes]},
    }
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded + y.tobytes())
        for block in blocks:
            file.write(block.data)


EXPORTS: dict[str, Callable[..., None]] = {
    ".npy": _write_npy,
    ".parquet": _write_parquet,
    ".safetensors": _write_safetensors,
}
