"""Write an extraction as one file of another kind, a block of rows at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import H2TError, StoreError
from h2t_store.matrix import FeatureMatrix

__all__ = ["EXPORTS", "export"]

_PIECE_BYTES = 64 << 20


def export(matrix: FeatureMatrix, path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write features, labels and identifiers to a file.

    Parameters
    ----------
    matrix : FeatureMatrix
        What to write, as float32. Labels are written as names (``label``, empty where unlabelled) and as indices into
        the classes (``y``, -1 where unlabelled).
    path : Path
        ``.npy``: the features alone, labels and identifiers beside them in ``.csv``. ``.parquet``: a column for each
        feature, by its name, after ``sample_id`` and ``label``. ``.safetensors``: tensors ``X`` and ``y``; metadata
        ``sample_ids``, ``classes`` and ``feature_names`` as JSON.
    progress : callable
        Called with (rows written, rows in all).

    Raises
    ------
    H2TError
        Where the file exists, or its kind is another one.
    """
    path = Path(path)
    if path.suffix not in EXPORTS:
        raise H2TError(f"file {str(path)!r}: accepted are names that end in {', '.join(EXPORTS)}")
    labels = path.with_suffix(".csv")
    for file in (path, labels) if path.suffix == ".npy" else (path,):
        if file.exists():
            raise H2TError(f"file {str(file)!r} exists: choose another name")
    partial = path.with_name(f".{path.name}.partial")
    try:
        EXPORTS[path.suffix](matrix, partial, progress)
        if path.suffix == ".npy":
            _write_labels(matrix, labels)
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"file {str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _pieces(matrix: FeatureMatrix, progress: Callable[[int, int], None]) -> Iterator[NDArray[np.float32]]:
    for rows, piece in matrix.row_blocks(_PIECE_BYTES):
        yield piece
        progress(rows.stop, len(matrix))


def _names(matrix: FeatureMatrix) -> list[str]:
    """Name of each row's label; empty where unlabelled."""
    return ["" if label is None else str(label) for label in matrix.y]


def _to_npy(matrix: FeatureMatrix, path: Path, progress: Callable[[int, int], None]) -> None:
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": matrix.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in _pieces(matrix, progress):
            file.write(piece.astype("<f4", copy=False).data)


def _write_labels(matrix: FeatureMatrix, path: Path) -> None:
    import csv

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_id", "y", "label"])
        writer.writerows(zip(map(str, matrix.sample_ids), matrix.codes.tolist(), _names(matrix), strict=True))


def _to_parquet(matrix: FeatureMatrix, path: Path, progress: Callable[[int, int], None]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise H2TError("Parquet needs pyarrow: pip install 'head2toe[table]'") from None
    names = [str(name) for name in matrix.feature_names]
    schema = pa.schema([("sample_id", pa.string()), ("label", pa.string()), *((name, pa.float32()) for name in names)])
    ids, labels, start = [str(sample_id) for sample_id in matrix.sample_ids], _names(matrix), 0
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False) as writer:
        for piece in _pieces(matrix, progress):
            stop = start + len(piece)
            columns = [pa.array(ids[start:stop]), pa.array(labels[start:stop])]
            columns += [pa.array(column) for column in np.ascontiguousarray(piece.T)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            start = stop


def _to_safetensors(matrix: FeatureMatrix, path: Path, progress: Callable[[int, int], None]) -> None:
    y = matrix.codes.astype("<i8")
    metadata = {
        "sample_ids": [str(sample_id) for sample_id in matrix.sample_ids],
        "classes": list(matrix.classes),
        "feature_names": [str(name) for name in matrix.feature_names],
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
        for piece in _pieces(matrix, progress):
            file.write(piece.astype("<f4", copy=False).data)


EXPORTS: dict[str, Callable[[FeatureMatrix, Path, Callable[[int, int], None]], None]] = {
    ".npy": _to_npy,
    ".parquet": _to_parquet,
    ".safetensors": _to_safetensors,
}
