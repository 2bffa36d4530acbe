"""Labels of any kind become codes: indices into a tuple of classes, which are names or integers."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError
from h2t_store.images.names import Classes
from h2t_store.images.source import UNLABELLED

__all__ = ["encode", "encode_words"]

_MAX_CLASSES = 1_000_000
_WHOLE_NUMBER = re.compile(r"-1|0|[1-9][0-9]{0,17}")


def encode(labels: Any, n: int) -> tuple[NDArray[np.int64], Classes]:
    """Integers from 0 are their own codes and classes; words become indices into their sorted values."""
    if labels is None:
        return np.full(n, UNLABELLED, dtype=np.int64), ()
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise DataError(f"data: labels of shape {labels.shape} for {n} images; accepted is ({n},)")
    if labels.dtype.kind in "iub":
        least, most = int(labels.min()), int(labels.max())
        if least < UNLABELLED or most >= _MAX_CLASSES:
            raise DataError(f"data: labels from {least} to {most}; accepted are -1 to {_MAX_CLASSES - 1}, or strings")
        return labels.astype(np.int64), tuple(range(most + 1))
    if labels.dtype.kind not in "UTO" or not all(isinstance(label, str) for label in labels):
        raise DataError(f"data: labels of dtype {labels.dtype}; accepted are integers and strings")
    classes, y = np.unique(labels.astype(str), return_inverse=True)
    return y.astype(np.int64), tuple(map(str, classes))


def encode_words(labels: Sequence[str]) -> tuple[NDArray[np.int64], Classes]:
    """As `encode`; all are taken for integers where each is written like one, without leading zeros."""
    if all(map(_WHOLE_NUMBER.fullmatch, labels)):
        return encode(np.array(labels, dtype=np.int64), len(labels))
    return encode(np.array(labels, dtype=object), len(labels))
