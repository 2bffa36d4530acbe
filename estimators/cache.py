"""Solutions kept on disk or in an object store and shared between processes: a file per problem, replaced whole.

On a disk those who want the same wait for the one who solves it. An object store has no locks: there, those who begin
at the same time each solve it, and what is stored last stays.
"""

from __future__ import annotations

import io
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import joblib
import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray

from estimators.features import FeatureMatrix, iterate_blocks

_FORMAT = "head2toe 1"
_POLL_SECONDS = 0.02
_URL = re.compile(r"(s3|gs|az)://[^/@?#]+/[^@?#]*[^@?#/]")

Solution = TypeVar("Solution")
Arrays: TypeAlias = dict[str, NDArray[Any]]


def cache_place(memory: Any) -> Files | Objects | None:
    """Where solutions are kept: the folder itself, or that of a joblib.Memory, or a URL; None for no caching.

    Raises
    ------
    ValueError
        If ``memory`` is none of these, or is a joblib.Memory that does not keep its files in a local folder.
    """
    if memory is None:
        return None
    if isinstance(memory, str) and _URL.fullmatch(memory):
        return Objects(memory)
    if isinstance(memory, (str, os.PathLike)) and os.fspath(memory) and "://" not in os.fspath(memory):
        return Files(Path(os.path.abspath(os.path.expanduser(os.fspath(memory)))))
    if isinstance(memory, joblib.Memory):
        if memory.store_backend is None:
            return None
        if memory.backend == "local":
            return Files(Path(memory.store_backend.location) / "head2toe")
    shown = "a URL with credentials" if isinstance(memory, str) and "@" in memory else repr(memory)
    raise ValueError(
        "memory must be None, a folder, a URL (s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH; credentials "
        f"from the environment), or a joblib.Memory that keeps its files in a local folder, got {shown}."
    )


@dataclass(frozen=True)
class Files:
    """A folder of solutions."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes:
        """A solution; `FileNotFoundError` where there is none."""
        try:
            return (self.folder / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(name) from error

    def write(self, name: str, content: bytes) -> None:
        """Put a solution in the place of what is there."""
        temporary = self.folder / f"{name}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_bytes(content)
            temporary.replace(self.folder / name)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Wait until nobody else is at it; `OSError` where that cannot be had."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{key}.lock", poll_interval=_POLL_SECONDS)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class Objects:
    """Solutions below a URL, asked for with the credentials of the process that asks."""

    url: str

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        """A solution; `FileNotFoundError` where there is none."""
        return bytes(self._ask(lambda obstore, client: obstore.get(client, name).bytes()))

    def write(self, name: str, content: bytes) -> None:
        """Put a solution in the place of what is there."""
        try:
            self._ask(lambda obstore, client: obstore.put(client, name, content))
        except FileNotFoundError:
            raise OSError("there is no such bucket") from None

    def alone(self, key: str) -> AbstractContextManager[None]:
        """Nobody waits."""
        return nullcontext()

    def _ask(self, question: Callable[[Any, Any], Any]) -> Any:
        """What obstore answers; what goes wrong is an `OSError` of one line, without passwords."""
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise ValueError(f"memory={self.url!r} needs obstore: pip install 'head2toe[s3]'.") from None
        # Its threads are gone in a process that was forked after they began. The first process is noted at obstore
        # itself, where everything else in this process that uses it finds it, too.
        if obstore.__dict__.setdefault("_first_used_by", os.getpid()) != os.getpid():
            raise OSError("its client does not survive that the process was forked: use joblib's backend loky")
        try:
            return question(obstore, from_url(self.url))
        except FileNotFoundError:
            raise FileNotFoundError(self.url) from None
        except (obstore.exceptions.BaseError, NotImplementedError) as error:
            raise OSError(re.sub(r"//[^/\s]*@", "//", str(error).splitlines()[0])) from None


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


class _UnusableError(Exception):
    """What is stored is damaged."""


def cached(
    place: Files | Objects,
    key: str,
    codec: Codec[Solution],
    enough: Callable[[Solution], bool],
    solve: Callable[[Solution | None], Solution],
) -> Solution:
    """What is stored under ``key``, completed by ``solve`` where it is not enough.

    What cannot be written is returned all the same, and a warning says so. A damaged file is computed anew.
    """
    name = f"{key}.npz"
    stored = None
    try:
        stored = _load(place, name, codec)
    except _UnusableError as error:
        warnings.warn(f"{place}/{name} cannot be used ({error}) and is computed again.", UserWarning, stacklevel=3)
    if stored is not None and enough(stored):
        return stored
    with ExitStack() as stack:
        try:
            stack.enter_context(place.alone(key))
        except (OSError, NotImplementedError) as error:
            _warn_unwritable(place, error)
            return solve(stored)
        stored = None
        with suppress(_UnusableError):  # said before
            stored = _load(place, name, codec)
        if stored is not None and enough(stored):
            return stored
        complete = solve(stored)
        try:
            place.write(name, _encoded(codec.pack(complete)))
        except OSError as error:
            _warn_unwritable(place, error)
        return complete


def _warn_unwritable(place: Files | Objects, error: OSError | NotImplementedError) -> None:
    reason = getattr(error, "strerror", None) or error
    warnings.warn(
        f"What was solved is not kept: memory={str(place)!r} cannot be written to ({reason}). "
        "Later fits will solve it again.",
        UserWarning,
        stacklevel=4,
    )


def _encoded(arrays: Arrays) -> bytes:
    stream, named = io.BytesIO(), dict[str, Any](arrays)
    np.savez(stream, **named)
    return stream.getvalue()


def _load(place: Files | Objects, name: str, codec: Codec[Solution]) -> Solution | None:
    try:
        with np.load(io.BytesIO(place.read(name)), allow_pickle=False) as archive:
            return codec.unpack({each: archive[each] for each in archive.files})
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files, obstore its own
        said = str(error).splitlines()[0] if str(error) else ""
        raise _UnusableError(f"{type(error).__name__}: {said}") from error
