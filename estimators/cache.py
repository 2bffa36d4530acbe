"""Solutions kept in a folder or a bucket and shared between processes: one file per problem, replaced as a whole.

In a folder, those who want the same solution wait for the one who computes it. A bucket has no locks: those who start
at the same time each compute it, and the last one stored stays.
"""

from __future__ import annotations

import io
import os
import re
import uuid
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
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


@dataclass(frozen=True)
class Files:
    """Solutions in a folder."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes:
        """A solution; `FileNotFoundError` where there is none."""
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Replace a solution as a whole."""
        temporary = self.folder / f"{name}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_bytes(content)
            temporary.replace(self.folder / name)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def lock(self, key: str) -> AbstractContextManager[Any]:
        """Held by one at a time; entering it raises `OSError` where nothing can be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"{key}.lock", poll_interval=_POLL_SECONDS)


@dataclass(frozen=True)
class Objects:
    """The same below a URL, with the credentials of the process."""

    url: str

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        return bytes(self._ask(lambda obstore, client: obstore.get(client, name).bytes()))

    def write(self, name: str, content: bytes) -> None:
        try:
            self._ask(lambda obstore, client: obstore.put(client, name, content))
        except FileNotFoundError:
            raise OSError("there is no such bucket") from None

    def lock(self, key: str) -> AbstractContextManager[Any]:
        """Nobody waits."""
        return nullcontext()

    def _ask(self, question: Callable[[Any, Any], Any]) -> Any:
        """What obstore answers; errors become an `OSError` of one line, without passwords."""
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise ValueError(f"memory={self.url!r} needs obstore: pip install 'head2toe[s3]'.") from None
        # obstore's threads do not survive a fork. The first process is noted at obstore itself, where everything else
        # in this process that uses it finds it.
        if obstore.__dict__.setdefault("_first_used_by", os.getpid()) != os.getpid():
            raise OSError("its client does not survive that the process was forked: use joblib's backend loky")
        try:
            return question(obstore, from_url(self.url))
        except FileNotFoundError:
            raise FileNotFoundError(self.url) from None
        except (obstore.exceptions.BaseError, NotImplementedError) as error:
            raise OSError(re.sub(r"//[^/\s]*@", "//", str(error).splitlines()[0])) from None


def cache_place(memory: Any) -> Files | Objects | None:
    """Where ``memory`` says that solutions are kept: a folder, that of a joblib.Memory, a URL, or None for nowhere."""
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


def fingerprint(X: FeatureMatrix | NDArray[Any]) -> str:
    """Identify X: by the address, rows and columns of stored features, or by a hash of an array's values."""
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
    """Name a problem: a hash of everything that decides its solution."""
    digest = xxhash.xxh3_128(_FORMAT.encode())
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"|{part.dtype.str}{part.shape}".encode() + part.tobytes())
        else:
            digest.update(f"|{part}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Codec(Generic[Solution]):
    """How a solution becomes arrays and comes back; unpacking raises where arrays are missing or wrong."""

    pack: Callable[[Solution], Arrays]
    unpack: Callable[[Arrays], Solution]


def cached(
    place: Files | Objects,
    key: str,
    codec: Codec[Solution],
    enough: Callable[[Solution], bool],
    solve: Callable[[Solution | None], Solution],
) -> Solution:
    """The solution stored under ``key``, completed by ``solve`` and stored again where it is not enough.

    A damaged file is computed again. What cannot be written is returned all the same, with a warning.
    """
    name = f"{key}.npz"
    stored = _load(place, name, codec)
    if stored is not None and enough(stored):
        return stored
    with ExitStack() as held:
        try:
            held.enter_context(place.lock(key))
        except (OSError, NotImplementedError) as error:
            _warn_unwritable(place, error)
            return solve(stored)
        stored = _load(place, name, codec, warn=False)
        if stored is not None and enough(stored):
            return stored
        solution, content = solve(stored), io.BytesIO()
        try:
            np.savez(content, **dict[str, Any](codec.pack(solution)))
            place.write(name, content.getvalue())
        except OSError as error:
            _warn_unwritable(place, error)
        return solution


def _load(place: Files | Objects, name: str, codec: Codec[Solution], warn: bool = True) -> Solution | None:
    try:
        with np.load(io.BytesIO(place.read(name)), allow_pickle=False) as archive:
            return codec.unpack({each: archive[each] for each in archive.files})
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files, obstore its own
        if warn:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"{place}/{name} cannot be used ({said}) and is computed again.", UserWarning, stacklevel=4)
        return None


def _warn_unwritable(place: Files | Objects, error: OSError | NotImplementedError) -> None:
    reason = getattr(error, "strerror", None) or error
    said = f"What was solved is not kept: memory={str(place)!r} cannot be written to ({reason})."
    warnings.warn(said, UserWarning, stacklevel=4)
