"""Names and labels: text kept compactly and printed on one line; labels as indices into a tuple of classes."""

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError

Names = NDArray[Any]
"""Text of dtype `numpy.dtypes.StringDType`, which takes a fifth of the memory of Python strings."""

Classes: TypeAlias = tuple[str | int, ...]
"""The label of each code: all of them names, or all of them integers."""

UNLABELLED = -1
_MAX_CLASSES = 1_000_000
_MOST_NAMED = 3
_WHOLE_NUMBER = re.compile(r"-1|0|[1-9][0-9]{0,17}")


def as_names(names: Sequence[str]) -> Names:
    """An array of names; `DataError` at one that is not Unicode."""
    try:
        return np.array(names, dtype=np.dtypes.StringDType())
    except UnicodeEncodeError as error:
        raise DataError(f"data: the name {error.object!r} is not UTF-8: rename it") from None


def shown(name: object) -> str:
    """The name, quoted and escaped where it would break a line or cannot be printed."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def counted(names: Sequence[str], what: str) -> str:
    """``4 WHAT: a, b, c, …``, in order."""
    some = ", ".join(map(shown, sorted(names)[:_MOST_NAMED])) + (", …" if len(names) > _MOST_NAMED else "")
    return f"{len(names)} {what}: {some}"


def notes_on(*kinds: tuple[Sequence[str], str]) -> list[str]:
    """One line for each kind (names, what) that has names."""
    return [counted(names, what) for names, what in kinds if len(names)]


def encode(labels: Any, n: int) -> tuple[NDArray[np.int64], Classes]:
    """Codes and classes of ``n`` labels; None, for all or for one, and -1 mean unlabelled.

    Integers are their own codes; strings become indices into their sorted values.
    """
    y = np.full(n, UNLABELLED, dtype=np.int64)
    if labels is None:
        return y, ()
    if isinstance(labels, Sequence) and None in labels:
        known = [i for i, label in enumerate(labels) if label is not None]
        y[known], classes = encode([labels[i] for i in known], len(known)) if known else (y[known], ())
        return y, classes
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
    values, y = np.unique(labels.astype(str), return_inverse=True)
    return y.astype(np.int64), tuple(map(str, values))


def encode_words(words: Sequence[str]) -> tuple[NDArray[np.int64], Classes]:
    """As `encode`; the labels are integers where each is written as one, without leading zeros."""
    if all(map(_WHOLE_NUMBER.fullmatch, words)):
        return encode(np.array(words, dtype=np.int64), len(words))
    return encode(np.array(words, dtype=object), len(words))
