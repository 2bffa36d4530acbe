"""Names of images: kept compactly, refused where they are no text, printed so that they stay on one line."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError

__all__ = ["Classes", "Names", "as_names", "count", "shown"]

Names = NDArray[Any]
"""Text, of dtype `numpy.dtypes.StringDType`: 16 bytes a name and its letters, against some 100 as Python strings."""

Classes: TypeAlias = tuple[str | int, ...]
"""The labels that occur, at their codes: all of them names, or all of them integers."""

_NAMED = 3


def as_names(names: Sequence[str]) -> Names:
    """An array of names; `DataError` at one that is no Unicode."""
    try:
        return np.array(names, dtype=np.dtypes.StringDType())
    except (UnicodeEncodeError, TypeError, ValueError):
        wrong = next((name for name in names if not is_text(name)), None)
        if wrong is None:
            raise
        raise DataError(f"data: the name {wrong!r} is not UTF-8: rename it") from None


def is_text(name: str) -> bool:
    """Whether it is Unicode, which names that the file system holds in another encoding are not."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: object) -> str:
    """The name, quoted and escaped where it would break a line or cannot be printed."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def count(names: Sequence[str], what: str) -> list[str]:
    """``["4 WHAT: a, b, c, …"]``, in order, or nothing where there are no names."""
    if not names:
        return []
    some = ", ".join(map(shown, sorted(names)[:_NAMED])) + (", …" if len(names) > _NAMED else "")
    return [f"{len(names)} {what}: {some}"]
