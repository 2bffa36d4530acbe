"""Rows and classes in the order of what is stored, so that an extraction is continued or extended."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError
from h2t_store.images.names import Classes, as_names, counted
from h2t_store.images.source import Source

S = TypeVar("S", bound=Source)


def arrange(source: S, sample_ids: Sequence[str], classes: Classes) -> S:
    """Bring a source into the order of what was read from it before.

    Earlier rows come first, in their order (those that share an identifier, in the order of the source), then the
    others in the order of the source; ``classes`` begin with the earlier ones.

    Raises
    ------
    DataError
        Where rows are no longer in the source.
    """
    earlier = _rows_of(as_names(sample_ids).tolist(), source.sample_ids.tolist())
    is_new = np.ones(len(source), dtype=bool)
    is_new[earlier] = False
    known = set(map(str, classes))
    new_classes = tuple(label for label in source.classes if str(label) not in known)
    rows = np.concatenate([earlier, np.flatnonzero(is_new)])
    return source.take(rows).relabelled((*classes, *new_classes))


def _rows_of(wanted: list[str], present: list[str]) -> NDArray[np.int64]:
    if present[: len(wanted)] == wanted:
        return np.arange(len(wanted))
    first: dict[str, int] = {}
    following = np.full(len(present), -1)
    for row in range(len(present) - 1, -1, -1):
        following[row] = first.get(present[row], -1)
        first[present[row]] = row
    rows = np.empty(len(wanted), dtype=np.int64)
    missing = []
    for i, name in enumerate(wanted):
        rows[i] = first.get(name, -1)
        if rows[i] < 0:
            missing.append(name)
        else:
            first[name] = int(following[rows[i]])
    if missing:
        raise DataError(f"data: {counted(missing, f'of {len(wanted)} images are no longer there')}")
    return rows
