"""Errors that a user can cause or meet; each message is one line that says what was given and what is accepted."""

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 200


class H2TError(ValueError):
    """Base of everything this package raises on purpose."""


class DataError(H2TError):
    """The images cannot be read."""


class ModelError(H2TError):
    """The network cannot be built or run."""


class TapError(ModelError):
    """The taps asked for are not in the network, or their activations cannot be stored."""


class StoreError(H2TError):
    """The store lacks an extraction, or it is damaged or differs."""


class UnreachableError(H2TError):
    """An object store does not answer, or refuses to."""


class DamagedError(StoreError):
    """Metadata that cannot be read."""


class IncompleteError(StoreError):
    """An extraction was begun and not finished."""


class StoppedError(H2TError):
    """The job was asked to stop; the same call continues."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'a' or 'b'?)"``, or nothing if no known word is close."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def one_line(error: BaseException) -> str:
    """The message of another library's error in one line, cut short; its type if it has none."""
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__
