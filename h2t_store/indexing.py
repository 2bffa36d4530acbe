"""Selected rows or columns as arrays of integers: indexing, grouping by chunk, packing for pickles."""

import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def is_integer(index: Any) -> bool:
    """Whether it is a single integer."""
    if isinstance(index, slice) or index is Ellipsis:
        return False
    return np.ndim(index) == 0 and np.asarray(index).dtype.kind in "iu"


def select(current: Indices, index: Any, axis: str) -> Indices:
    """Apply an index as numpy does to what is selected already; ``axis`` names it in errors."""
    if isinstance(index, slice):
        return current[index]
    if index is Ellipsis:
        return current
    n, array = len(current), np.asarray(index)
    if array.ndim != 1:
        dimensions = f" with {array.ndim} dimensions" if array.ndim else ""
        raise TypeError(
            f"{axis} index must be an integer, a slice, a 1-d array of integers or a 1-d mask; got "
            f"{type(index).__name__}{dimensions}"
        )
    if array.dtype == bool and len(array) != n:
        raise IndexError(f"{axis} mask has {len(array)} entries for {n} {axis}")
    if len(array) == 0:
        return current[:0]
    if array.dtype.kind not in "iub":
        hint = "; X.select_layers takes names of layers" if array.dtype.kind == "U" else ""
        raise TypeError(f"{axis} index must hold integers or booleans, not {array.dtype}{hint}")
    if array.dtype != bool and (array.min() < -n or array.max() >= n):
        raise IndexError(f"{axis} index {array[(array < -n) | (array >= n)][0]} is out of range for {n} {axis}")
    chosen: Indices = current[array]
    return chosen


def as_slice(indices: Indices) -> slice | Indices:
    """Consecutive integers as a slice, which copies nothing; others as they are."""
    if len(indices) and (np.diff(indices) == 1).all():
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices


def edges(keys: Indices) -> Indices:
    """Where runs of equal keys begin, and the end of the last one; keys are not negative."""
    return np.flatnonzero(np.diff(keys, prepend=-1, append=-1))


def groups(keys: Indices) -> list[Indices]:
    """Where each of the keys occurs, by ascending key."""
    order = np.argsort(keys, kind="stable")
    return [order[start:stop] for start, stop in pairwise(edges(keys[order]).tolist())]


def spans(edges: Sequence[int] | Indices, longest: int) -> Iterator[tuple[int, int]]:
    """Go from edge to edge, in steps of at most ``longest`` if an edge lies as near, else to the next edge."""
    at = 0
    while at < len(edges) - 1:
        last = int(np.searchsorted(edges, edges[at] + longest, side="right")) - 1
        start, at = edges[at], max(last, at + 1)
        yield int(start), int(edges[at])


def pack(indices: Indices) -> bytes:
    """Indices in few bytes, because most of them are regular."""
    return zlib.compress(np.diff(indices, prepend=0).astype("<i8").tobytes(), level=1)


def unpack(packed: bytes) -> Indices:
    """Undo `pack`."""
    return np.cumsum(np.frombuffer(zlib.decompress(packed), dtype="<i8"))
