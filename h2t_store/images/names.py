"""Names, compact in memory and printed on one line, and labels, encoded as indices into a tuple of classes."""

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
    given = np.asarray([None] * n if labels is None else labels, dtype=object)
    if given.shape != (n,):
        raise DataError(f"data: labels of shape {given.shape} for {n} images; accepted is ({n},)")
    known = [label for label in given.tolist() if label is not None]
    if all(isinstance(label, str) for label in known):
        classes = sorted(set(known))
        index = {None: UNLABELLED} | {label: i for i, label in enumerate(classes)}
        return np.array([index[label] for label in given.tolist()], dtype=np.int64), tuple(map(str, classes))
    odd = next((label for label in known if not isinstance(label, int | np.integer)), None)
    if odd is not None:
        raise DataError(f"data: labels of type {type(odd).__name__}; accepted are integers and strings")
    least, most = int(min(known)), int(max(known))
    if least < UNLABELLED or most >= _MAX_CLASSES:
        raise DataError(f"data: labels from {least} to {most}; accepted are -1 to {_MAX_CLASSES - 1}, or strings")
    y = np.array([UNLABELLED if label is None else label for label in given.tolist()], dtype=np.int64)
    return y, tuple(range(most + 1))


def encode_words(words: Sequence[str]) -> tuple[NDArray[np.int64], Classes]:
    """As `encode`; the labels are integers where each is written as one, without leading zeros."""
    is_numbers = all(map(_WHOLE_NUMBER.fullmatch, words))
    return encode(list(map(int, words)) if is_numbers else words, len(words))
