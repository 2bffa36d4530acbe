"""One chunk in a store: its values in C order, then their crc32c in four bytes, as Zarr's ``crc32c`` codec has it.

Chunks are read and written whole, straight from and into memory, because that is several times as fast as a general
pipeline. A chunk that is absent, cut short or changed is an error, whatever part of it is wanted.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DamagedError, StoreError
from h2t_store.storage.layout import ArraySpec
from h2t_store.storage.places import Place

__all__ = [
    "CRC_BYTES",
    "checksum",
    "checksum_of",
    "decode_strings",
    "encode_strings",
    "read_bytes",
    "read_chunk",
    "write_chunk",
]

CRC_BYTES = 4

_scratch = threading.local()


def checksum(data: NDArray[np.uint8]) -> int:
    """crc32c of bytes."""
    crc: int = google_crc32c.value(data)
    return crc


def framed(data: NDArray[np.uint8]) -> bytes:
    """Bytes with their crc32c after them, as a chunk is stored."""
    return data.tobytes() + checksum(data).to_bytes(CRC_BYTES, "little")


def write_chunk(place: Place, values: NDArray[Any], spec: ArraySpec) -> list[int]:
    """Write a file of an array: one chunk, or all chunks of a shard. It counts once its row block is committed.

    Parameters
    ----------
    place : Place
        File of the chunk; folders are made.
    values : ndarray
        Whole: of the shape of the chunk or shard, or encoded strings. Copied only if it is not contiguous.
    spec : ArraySpec
        Of the array.

    Returns
    -------
    list of int
        The crc32c of each chunk as stored.
    """
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    crc = checksum(data)
    place.write([data.data, memoryview(crc.to_bytes(CRC_BYTES, "little"))])
    return [crc]


def checksum_of(values: NDArray[Any], spec: ArraySpec) -> int:
    """The crc32c that a whole chunk with these values, or encoded strings, has as stored."""
    return checksum(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def read_bytes(place: Place, where: str, crc: int | None = None) -> NDArray[np.uint8]:
    """The values of a chunk as bytes, checked.

    Parameters
    ----------
    place : Place
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
        data = np.frombuffer(place.read(), dtype=np.uint8)
    return _checked(data, where, crc)


def read_chunk(place: Place, where: str, spec: ArraySpec, inner: int = 0, crc: int | None = None) -> NDArray[Any]:
    """The values of a chunk, checked; valid until this thread reads the next one.

    Parameters
    ----------
    place : Place
        File of the chunk.
    where : str
        What the chunk is, for messages.
    spec : ArraySpec
        Of the array.
    inner : int
        Which chunk of the file, if the array has shards.
    crc : int, optional
        The crc32c that the values must have; by default only the one in the file counts, and no copy of the file.

    Raises
    ------
    DamagedError
        Where the file is missing, of another size, changed or another chunk's.
    """
    dtype, shape = np.dtype(spec.dtype), spec.chunks
    size = math.prod(shape) * dtype.itemsize + CRC_BYTES
    kept = None if crc is None else place.kept()
    if kept is not None:
        with suppress(DamagedError):
            return _checked(_whole(kept, where, size), where, crc).view(dtype).reshape(shape)
    read = _whole(place, where, size)
    values = _checked(read, where, crc).view(dtype).reshape(shape)
    if kept is not None:
        try:
            kept.write_whole(read.tobytes(), durable=False, shared=True)
        except OSError as error:
            raise StoreError(f"cache: {kept} cannot be written: {error.strerror or error}") from error
    return values


def _whole(place: Place, where: str, size: int) -> NDArray[np.uint8]:
    """All bytes of a file of this size, in memory that is used again; none is taken for a file of another size."""

    buffer: NDArray[np.uint8] | None = None

    def allocate(found: int) -> NDArray[np.uint8] | None:
        nonlocal buffer
        if found == size:
            buffer = _reused(size)
        return buffer

    with _told_as_damage(where):
        read = place.fill(allocate)
    if read != size or buffer is None:
        raise DamagedError(f"{where} is damaged: {read} bytes instead of {size}")
    return buffer


def _reused(size: int) -> NDArray[np.uint8]:
    """Memory that this thread is given again the next time."""
    if len(getattr(_scratch, "buffer", ())) < size:
        _scratch.buffer = np.empty(size, dtype=np.uint8)
    buffer: NDArray[np.uint8] = _scratch.buffer[:size]
    return buffer


@contextmanager
def _told_as_damage(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(f"{where} is missing") from None
    except (OSError, MemoryError) as error:
        raise DamagedError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _checked(data: NDArray[np.uint8], where: str, crc: int | None) -> NDArray[np.uint8]:
    values, stored = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
    if len(data) < CRC_BYTES or checksum(values) != stored:
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
