"""One chunk on disk: its values in C order, then their crc32c in four bytes, as Zarr's ``crc32c`` codec has it.

Chunks are read and written whole, straight from and into memory, because that is several times as fast as a general
pipeline. A chunk that is absent, cut short or changed is an error, whatever part of it is wanted.
"""

import math
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import DTypeLike, NDArray

from h2t_store.errors import DamagedError

__all__ = [
    "CRC_BYTES",
    "decode_strings",
    "encode_strings",
    "in_threads",
    "read_bytes",
    "read_chunk",
    "replace_file",
    "write_chunk",
]

CRC_BYTES = 4
Job = TypeVar("Job")
Result = TypeVar("Result")

_MAX_THREADS = 8
_scratch = threading.local()


def in_threads(work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """Do one thing to each chunk on all cores, results in order; reading, writing and checksums run side by side."""
    n_threads = min(_MAX_THREADS, os.cpu_count() or 1, len(jobs))
    if n_threads < 2:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, jobs))


def write_chunk(path: Path, values: NDArray[Any]) -> int:
    """Write an array as one chunk.

    What is at ``path`` already is replaced at once by the whole file, because another process may have written it, and
    committed the row block it belongs to, meanwhile. A new file counts once its row block is committed, so it may grow.

    Parameters
    ----------
    path : Path
        File of the chunk; folders are made.
    values : ndarray
        Little-endian as every machine that torch runs on; copied only where it is not contiguous.

    Returns
    -------
    int
        The crc32c of the values.
    """
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    crc: int = google_crc32c.value(data)
    parts = [data.data, memoryview(crc.to_bytes(CRC_BYTES, "little"))]
    try:
        _write_new(path, parts)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_new(path, parts)
    except FileExistsError:
        partial = partial_of(path, shared=True)
        _write_new(partial, parts)
        os.replace(partial, path)
    return crc


def _write_new(path: Path, parts: Sequence[memoryview]) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        left = list(parts)
        while left:
            written = os.writev(file, left)
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left:
                left[0] = left[0][written:]
    finally:
        os.close(file)


def read_bytes(path: Path, where: str, crc: int | None = None) -> NDArray[np.uint8]:
    """The values of a chunk as bytes, checked.

    Parameters
    ----------
    path : Path
        File of the chunk.
    where : str
        What the chunk is, for messages.
    crc : int, optional
        The crc32c that the values must have; by default only the one in the file counts.

    Raises
    ------
    DamagedError
        Where the file is missing, cut short, changed or another chunk's.
    """
    with _told_as_damage(where):
        data = np.empty(os.stat(path).st_size, dtype=np.uint8)
        _fill(path, data)
    return _checked(data, where, crc)


def read_chunk(path: Path, where: str, dtype: DTypeLike, shape: Sequence[int], crc: int | None = None) -> NDArray[Any]:
    """The values of a chunk, checked; valid until this thread reads the next one.

    Parameters
    ----------
    path : Path
        File of the chunk.
    where : str
        What the chunk is, for messages.
    dtype : dtype
        Of the values.
    shape : sequence of int
        Of the chunk.
    crc : int, optional
        The crc32c that the values must have; by default only the one in the file counts.

    Raises
    ------
    DamagedError
        Where the file is missing, of another size, changed or another chunk's.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize + CRC_BYTES
    buffer = getattr(_scratch, "buffer", None)
    with _told_as_damage(where):
        read = os.stat(path).st_size
        if read == size:  # memory is taken for what is there, whatever the metadata say
            if buffer is None or len(buffer) < size:
                buffer = _scratch.buffer = np.empty(size, dtype=np.uint8)
            read = _fill(path, buffer[:size])
    if read != size or buffer is None:
        raise DamagedError(f"{where} is damaged: {read} bytes instead of {size}")
    return _checked(buffer[:size], where, crc).view(dtype).reshape(shape)


@contextmanager
def _told_as_damage(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(f"{where} is missing") from None
    except (OSError, MemoryError) as error:
        raise DamagedError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _fill(path: Path, buffer: NDArray[np.uint8]) -> int:
    """Read as much of the file as fits; how much that was."""
    file = os.open(path, os.O_RDONLY)
    try:
        read = 0
        while read < len(buffer) and (more := os.readv(file, [buffer[read:].data])):
            read += more
        return read
    finally:
        os.close(file)


def _checked(data: NDArray[np.uint8], where: str, crc: int | None) -> NDArray[np.uint8]:
    values, stored = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
    if len(data) < CRC_BYTES or google_crc32c.value(values) != stored:
        raise DamagedError(f"{where} is damaged: its checksum does not fit its values")
    if crc is not None and crc != stored:
        raise DamagedError(f"{where} is damaged: it holds the values of another chunk")
    return values


def encode_strings(strings: Sequence[str]) -> NDArray[np.uint8]:
    """Strings as Zarr's ``vlen-utf8`` has them: their number, then each with its length before it."""
    encoded = [string.encode() for string in strings]
    parts = [len(encoded).to_bytes(4, "little")]
    for string in encoded:
        parts += [len(string).to_bytes(4, "little"), string]
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def decode_strings(data: NDArray[np.uint8]) -> list[str]:
    """The inverse of `encode_strings`; raises `ValueError` where the bytes are no strings."""
    raw, at, strings = data.tobytes(), 4, []
    for _ in range(int.from_bytes(raw[:4], "little")):
        stop = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if stop > len(raw) or at == len(raw):
            break
        strings.append(raw[at + 4 : stop].decode())
        at = stop
    if at != len(raw) or len(strings) != int.from_bytes(raw[:4], "little"):
        raise ValueError("not as many strings as there should be")
    return strings


def replace_file(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Write a small file so that it is there whole or not at all, on disk before anything that follows.

    What several processes may write at once (``shared``) takes shape under a name that is this call's alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path, shared=shared)
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def partial_of(path: Path, *, shared: bool = False) -> Path:
    """Under what name a file takes shape; where several processes may write it (``shared``), this call's alone."""
    return path.with_name(f".{path.name}{f'.{uuid.uuid4().hex}' if shared else ''}.partial")
