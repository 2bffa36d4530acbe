"""Solutions kept on disk and shared between processes: a file per problem, replaced whole, one writer at a time."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import joblib
import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray

from estimators.group_lasso.sources import FeatureMatrix, iterate_blocks

_FORMAT = "head2toe 1"
_POLL_SECONDS = 0.02

Solution = TypeVar("Solution")
Arrays: TypeAlias = dict[str, NDArray[Any]]


def cache_directory(memory: Any) -> Path | None:
    """Where solutions are kept: the folder itself, or that of a joblib.Memory; None for no caching.

    Raises
    ------
    ValueError
        If ``memory`` is neither, or is a joblib.Memory that does not keep its files in a local folder.
    """
    if memory is None:
        return None
    if isinstance(memory, (str, os.PathLike)) and os.fspath(memory):
        return Path(os.path.abspath(os.path.expanduser(os.fspath(memory))))
    if isinstance(memory, joblib.Memory):
        if memory.store_backend is None:
            return None
        if memory.backend == "local":
            return Path(memory.store_backend.location) / "head2toe"
    raise ValueError(
        f"memory must be None, a folder, or a joblib.Memory that keeps its files in a local one, got {memory!r}."
    )


def fingerprint(X: FeatureMatrix | NDArray[Any]) -> str:
    """What X is: the address of stored features with the rows and columns taken, or a hash of an array's values."""
    known = getattr(X, "fingerprint", None)
    if known is not None:
        return f"{known}"
    digest = xxhash.xxh3_128(f"{X.shape} {np.dtype(X.dtype).str}".encode())
    if isinstance(X, np.ndarray):
        for rows in np.array_split(X, max(1, X.nbytes >> 25)):
            digest.update(np.ascontiguousarray(rows).data)
    else:
        for columns, block in iterate_blocks(X):
            digest.update(np.arange(X.shape[1])[columns].tobytes())
            digest.update(np.asarray(block).tobytes())
    return digest.hexdigest()


def problem_key(*parts: str | NDArray[Any]) -> str:
    """A name for a problem: a hash of everything that decides its solution."""
    digest = xxhash.xxh3_128(_FORMAT.encode())
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"|{part.dtype.str}{part.shape}".encode() + part.tobytes())
        else:
            digest.update(f"|{part}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Codec(Generic[Solution]):
    """How a solution becomes arrays and comes back; what is missing there or wrong raises KeyError or the like."""

    pack: Callable[[Solution], Arrays]
    unpack: Callable[[Arrays], Solution]


def cached(
    directory: Path,
    key: str,
    codec: Codec[Solution],
    enough: Callable[[Solution], bool],
    solve: Callable[[Solution | None], Solution],
) -> Solution:
    """What is stored under ``key``, completed by ``solve`` where it is not enough; others who want it wait meanwhile.

    Where the folder cannot be written to, what was solved is returned and a warning says so. A damaged file is
    computed anew.
    """
    file = directory / f"{key}.npz"
    stored = _load(file, codec)
    if stored is not None and enough(stored):
        return stored
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / f"{key}.lock", poll_interval=_POLL_SECONDS)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        _warn_unwritable(directory, error)
        return solve(stored)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said before
            stored = _load(file, codec)
        if stored is not None and enough(stored):
            return stored
        complete = solve(stored)
        try:
            _save(file, codec.pack(complete))
        except OSError as error:
            _warn_unwritable(directory, error)
        return complete
    finally:
        lock.release()


def _warn_unwritable(directory: Path, error: OSError | NotImplementedError) -> None:
    reason = getattr(error, "strerror", None) or error
    warnings.warn(
        f"What was solved is not kept: memory={str(directory)!r} cannot be written to ({reason}). "
        "Later fits will solve it again.",
        UserWarning,
        stacklevel=4,
    )


def _save(file: Path, arrays: Arrays) -> None:
    temporary = file.with_name(f"{file.stem}.{uuid.uuid4().hex}.tmp")
    named: Any = arrays
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, **named)
        temporary.replace(file)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _load(file: Path, codec: Codec[Solution]) -> Solution | None:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return codec.unpack({name: archive[name] for name in archive.files})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
        warnings.warn(
            f"{file} cannot be used ({type(error).__name__}: {error}) and is computed again.", UserWarning, stacklevel=4
        )
        return None
