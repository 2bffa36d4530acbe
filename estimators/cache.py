"""Solved paths kept on disk and shared between processes: a file per problem, replaced whole, one writer at a time."""

from __future__ import annotations

import os
import uuid
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray

from estimators.group_lasso.result import GroupLassoPath
from estimators.group_lasso.sources import FeatureMatrix, iterate_blocks

_FORMAT = "head2toe path 1"
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class SolvedRatios:
    """Solutions for some fractions of alpha_max, both in decreasing order."""

    ratios: NDArray[np.float64]
    path: GroupLassoPath

    def join(self, other: SolvedRatios) -> SolvedRatios:
        ratios = np.concatenate([self.ratios, other.ratios])
        return SolvedRatios(np.sort(ratios)[::-1], self.path.join(other.path))


def cache_directory(memory: Any) -> Path | None:
    """Where solved paths are kept: the folder itself, or that of a joblib.Memory; None for no caching.

    Raises
    ------
    ValueError
        If ``memory`` is neither, or is a joblib.Memory that does not keep its files in a local folder.
    """
    if memory is None:
        return None
    if isinstance(memory, (str, os.PathLike)) and os.fspath(memory):
        return Path(os.path.abspath(os.fspath(memory)))
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


def cached(
    directory: Path,
    key: str,
    enough: Callable[[SolvedRatios], bool],
    solve: Callable[[SolvedRatios | None], SolvedRatios],
) -> SolvedRatios:
    """What is stored under ``key``, completed by ``solve`` where it is not enough; others who want it wait meanwhile.

    Where the folder cannot be written to, what was solved is returned and a warning says so. A damaged file is
    computed anew.
    """
    file = directory / f"{key}.npz"
    stored = _load(file)
    if stored is not None and enough(stored):
        return stored
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / f"{key}.lock", poll_interval=_POLL_SECONDS)
        lock.acquire()
    except OSError as error:
        _warn_unwritable(directory, error)
        return solve(stored)
    try:
        stored = _load(file)
        if stored is not None and enough(stored):
            return stored
        complete = solve(stored)
        try:
            _save(file, complete)
        except OSError as error:
            _warn_unwritable(directory, error)
        return complete
    finally:
        lock.release()


def _warn_unwritable(directory: Path, error: OSError) -> None:
    warnings.warn(
        f"The solved path is not kept: memory={str(directory)!r} cannot be written to ({error.strerror or error}). "
        "Later fits will solve it again.",
        UserWarning,
        stacklevel=4,
    )


_LISTS = ("active", "standardized_coefs")


def _save(file: Path, solved: SolvedRatios) -> None:
    path = solved.path
    arrays = {field.name: np.asarray(getattr(path, field.name)) for field in fields(path) if field.name not in _LISTS}
    arrays |= {name: np.concatenate(getattr(path, name)) for name in _LISTS}
    arrays |= {"ratios": solved.ratios, "n_active": np.array([len(active) for active in path.active])}
    temporary = file.with_name(f"{file.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        temporary.replace(file)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _load(file: Path) -> SolvedRatios | None:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
        borders = np.cumsum(arrays.pop("n_active"))[:-1]
        lists: Any = {name: np.split(arrays.pop(name), borders) for name in _LISTS}
        ratios, alpha_max = arrays.pop("ratios"), float(arrays.pop("alpha_max"))
        return SolvedRatios(ratios, GroupLassoPath(alpha_max=alpha_max, **arrays, **lists))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        warnings.warn(
            f"{file} cannot be used ({type(error).__name__}: {error}) and is computed again.", UserWarning, stacklevel=4
        )
        return None
