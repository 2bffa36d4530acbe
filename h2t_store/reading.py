"""Read rows and columns of an extraction from its chunks, each of them once."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from h2t_store.indexing import Indices, as_slice, groups
from h2t_store.storage.extraction import Extraction
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.threads import in_threads

_GRAIN = 32767  # from more values on, torch copies in threads of its own

_Part = tuple[int, Indices, Indices]


def owners(header: ExtractionHeader, columns: Indices) -> Indices:
    """Index of the layer of each column."""
    return np.searchsorted([layer.start for layer in header.layers], columns, side="right") - 1


def column_chunks(header: ExtractionHeader, columns: Indices) -> Indices:
    """A number for the chunk that each column lies in; ascending along the columns of the store."""
    starts, widths, counts = np.array([(layer.start, layer.chunk_width, layer.n_chunks) for layer in header.layers]).T
    owner = owners(header, columns)
    chunks: Indices = (np.cumsum(counts) - counts)[owner] + (columns - starts[owner]) // widths[owner]
    return chunks


def gather(extraction: Extraction, rows: Indices, columns: Indices) -> NDArray[np.float32]:
    """Read every pair of the rows and columns, in any order, as float32."""
    header, height = extraction.header, extraction.header.rows_per_block
    out = np.empty((len(rows), len(columns)), dtype=np.float32)
    # Of each chunk: its number, the rows or columns to take from it, and where they go.
    down = [(int(rows[to[0]] // height), rows[to] % height, to) for to in groups(rows // height)]
    jobs = []
    for to in groups(column_chunks(header, columns)):
        layer = header.layers[owners(header, columns[to[:1]])[0]]
        number, inside = np.divmod(columns[to] - layer.start, layer.chunk_width)
        jobs += [(layer, part, (int(number[0]), inside, to)) for part in down]

    def fill(job: tuple[Layer, _Part, _Part]) -> None:
        layer, (row_block, rows, rows_to), (column_chunk, columns, columns_to) = job
        chunk = extraction.features(layer, row_block, column_chunk)
        _copy(chunk[_pairs(rows, columns)], out, _pairs(rows_to, columns_to))

    in_threads(fill, jobs, extraction.folder.concurrency)
    return out


def _copy(values: NDArray[Any], out: NDArray[np.float32], target: tuple[Any, Any]) -> None:
    """Convert to float32 by torch, many times as fast as numpy, in pieces too small for threads of its own."""
    if not all(isinstance(index, slice) for index in target):
        wide = np.empty(values.shape, dtype=np.float32)
        _copy(values, wide, (slice(None), slice(None)))
        out[target] = wide
        return
    step = max(1, _GRAIN // max(1, values.shape[1]))
    source, place = torch.from_numpy(values), torch.from_numpy(out[target])
    for start in range(0, len(values), step):
        place[start : start + step].copy_(source[start : start + step])


def _pairs(rows: Indices, columns: Indices) -> tuple[Any, Any]:
    """An index for all pairs of rows and columns, with slices where that is possible."""
    index = as_slice(rows), as_slice(columns)
    if any(isinstance(part, slice) for part in index):
        return index
    return rows[:, None], columns
