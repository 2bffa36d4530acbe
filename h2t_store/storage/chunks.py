"""Write and read the chunks of a store: encoded values, then their crc32c, as zarr's codec pipeline writes them.

This has its own code because zarr 3.1 writes such chunks a fifth as fast (see ``benchmarks/codecs.json``; reading is
equally fast), and because a chunk that is absent, cut short, changed or another chunk's must be an error: zarr reads an
absent chunk as fill values.
"""

import hashlib
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import google_crc32c
import numcodecs  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from h2t_store.errors import DamagedError, StoreError
from h2t_store.storage.places import Place
from h2t_store.storage.places.disk import Disk

__all__ = [
    "CODECS",
    "CRC_BYTES",
    "checksum",
    "codecs_of",
    "decode_strings",
    "encode_strings",
    "read_bytes",
    "read_chunk",
    "read_shard_index",
    "stored_bytes",
    "write_chunk",
    "write_shard",
]

CODECS = ("none", "zstd", "blosc", "pcodec")
CRC_BYTES = 4
_ZSTD_LEVEL, _BLOSC_LEVEL, _PCODEC_LEVEL = 3, 5, 8
_INDEX_ENTRY = np.dtype("<u8").itemsize * 2  # offset and length of an inner chunk

_memory = threading.local()


def codecs_of(codec: str) -> dict[str, Any]:
    """Arguments of `zarr.create_array` for arrays whose chunks are written with ``codec``.

    Raises
    ------
    StoreError
        If the package of the codec is not installed.
    """
    if codec == "pcodec":
        _compressor(codec, 2)
        from zarr.codecs.numcodecs import PCodec

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the codec is none of the specification's
            return {"serializer": PCodec(level=_PCODEC_LEVEL), "compressors": [Crc32cCodec()]}
    compressors: dict[str, list[Any]] = {
        "none": [],
        "zstd": [ZstdCodec(level=_ZSTD_LEVEL)],
        "blosc": [BloscCodec(cname="zstd", clevel=_BLOSC_LEVEL)],
    }
    return {"compressors": [*compressors[codec], Crc32cCodec()]}


@lru_cache
def _compressor(codec: str, itemsize: int) -> Any:
    """The codec of numcodecs behind that of zarr, because zarr's own is only asynchronous."""
    if codec == "zstd":
        return numcodecs.Zstd(level=_ZSTD_LEVEL)
    if codec == "blosc":
        return numcodecs.Blosc("zstd", _BLOSC_LEVEL, numcodecs.Blosc.SHUFFLE, typesize=itemsize)
    try:
        return numcodecs.PCodec(level=_PCODEC_LEVEL)
    except AttributeError:
        raise StoreError("codec 'pcodec' needs pcodec: pip install 'head2toe[pcodec]'") from None


def checksum(data: NDArray[np.uint8]) -> int:
    """crc32c of bytes."""
    crc: int = google_crc32c.value(data)
    return crc


def stored_bytes(dtype: DTypeLike, shape: Sequence[int]) -> int:
    """Size of a chunk without a codec."""
    return math.prod(shape) * np.dtype(dtype).itemsize + CRC_BYTES


def write_chunk(place: Place, values: NDArray[Any], codec: str = "none") -> int:
    """Write an array as one chunk.

    Parameters
    ----------
    place : Place
        File of the chunk; folders are made.
    values : ndarray
        Little-endian; copied only where it is not contiguous.
    codec : str
        One of `CODECS`.

    Returns
    -------
    int
        The crc32c of the encoded values.
    """
    data = _encoded(values, codec)
    crc = checksum(data)
    place.write([data.data, memoryview(crc.to_bytes(CRC_BYTES, "little"))])
    return crc


def write_shard(place: Place, chunks: Sequence[NDArray[Any]], codec: str = "none") -> list[int]:
    """Write chunks that lie side by side as one shard, as zarr's ``sharding_indexed`` reads it; their crc32c."""
    parts, crcs, lengths = [], [], []
    for values in chunks:
        data = _encoded(values, codec)
        crcs.append(checksum(data))
        lengths.append(len(data) + CRC_BYTES)
        parts += [data.data, memoryview(crcs[-1].to_bytes(CRC_BYTES, "little"))]
    starts = np.cumsum([0, *lengths[:-1]])
    index = np.stack([starts, lengths], axis=1).astype("<u8").reshape(-1).view(np.uint8)
    place.write([*parts, index.data, memoryview(checksum(index).to_bytes(CRC_BYTES, "little"))])
    return crcs


def _encoded(values: NDArray[Any], codec: str) -> NDArray[np.uint8]:
    flat = np.ascontiguousarray(values).reshape(-1)
    if codec == "none":
        return flat.view(np.uint8)
    return np.frombuffer(_compressor(codec, flat.itemsize).encode(flat), np.uint8)


def read_shard_index(place: Place, where: str, n_chunks: int) -> list[tuple[int, int]]:
    """Start and stop of each chunk in a shard; raises `DamagedError` unless they lie one after another."""
    with _told_as_damage(where):
        data = np.frombuffer(place.read(last=n_chunks * _INDEX_ENTRY + CRC_BYTES), np.uint8)
    starts, lengths = _checked(data, where, None).view("<u8").reshape(-1, 2).T.astype(np.int64)
    stops = np.cumsum(lengths)
    if len(starts) != n_chunks or (starts != stops - lengths).any():
        raise DamagedError(f"{where} is damaged: its index does not fit its chunks")
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def read_bytes(place: Place, where: str, crc: int | None = None) -> NDArray[np.uint8]:
    """Bytes of a chunk without its checksum; for ``where``, ``crc`` and errors see `read_chunk`."""
    with _told_as_damage(where):
        data = np.frombuffer(place.read(), dtype=np.uint8)
    return _checked(data, where, crc)


def read_chunk(
    place: Place,
    where: str,
    dtype: DTypeLike,
    shape: Sequence[int],
    crc: int | None = None,
    *,
    codec: str = "none",
    within: tuple[int, int] | None = None,
) -> NDArray[Any]:
    """Values of a chunk, valid until this thread reads the next one.

    Parameters
    ----------
    place : Place
        File of the chunk, or of the shard that contains it.
    where : str
        Name of the chunk, for messages.
    dtype, shape
        Of the chunk.
    crc : int, optional
        The crc32c that the encoded values must have. Without it no copy is read from the cache of the place.
    codec : str
        One of `CODECS`.
    within : (int, int), optional
        Start and stop of the chunk in its shard.

    Raises
    ------
    DamagedError
        If the file is missing, cut short, changed or that of another chunk.
    """
    expected = stored_bytes(dtype, shape) if codec == "none" else None
    copy = None
    if crc is not None and place.cache is not None:
        name = hashlib.sha256(f"{place} {within}".encode()).hexdigest()
        copy = Disk(place.cache / name[:2] / name[2:32])
        with suppress(DamagedError):
            return _decoded(_checked(_stored(copy, where, expected), where, crc), where, dtype, shape, codec)
    data = _stored(place, where, expected, within)
    encoded = _checked(data, where, crc)
    if copy is not None:
        try:
            copy.write_whole(data.tobytes(), durable=False)
        except OSError as error:
            raise StoreError(f"cache: {copy} cannot be written: {error.strerror or error}") from error
    return _decoded(encoded, where, dtype, shape, codec)


def _stored(place: Place, where: str, expected: int | None, within: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Bytes of a file, in memory that this thread reuses; if it must have ``expected`` ones, only then."""
    buffer: NDArray[np.uint8] | None = None

    def allocate(size: int) -> NDArray[np.uint8] | None:
        nonlocal buffer
        if expected in (None, size):
            buffer = _reused("stored", size)
        return buffer

    with _told_as_damage(where):
        size = place.fill(allocate, within)
    if buffer is None or size != len(buffer):
        raise DamagedError(f"{where} is damaged: {size} bytes instead of {expected}")
    return buffer


def _reused(use: str, size: int) -> NDArray[np.uint8]:
    """Memory that this thread is given again the next time."""
    memory: NDArray[np.uint8] | None = getattr(_memory, use, None)
    if memory is None or len(memory) < size:
        memory = np.empty(size, dtype=np.uint8)
        setattr(_memory, use, memory)
    return memory[:size]


def _decoded(
    encoded: NDArray[np.uint8], where: str, dtype: DTypeLike, shape: Sequence[int], codec: str
) -> NDArray[Any]:
    if codec == "none":
        return encoded.view(dtype).reshape(shape)
    dtype = np.dtype(dtype)
    values = _reused("decoded", math.prod(shape) * dtype.itemsize).view(dtype)
    try:
        _compressor(codec, dtype.itemsize).decode(encoded, out=values)
    except (RuntimeError, ValueError, TypeError) as error:
        raise DamagedError(f"{where} is damaged: {codec} cannot decode it") from error
    return values.reshape(shape)


def _checked(data: NDArray[np.uint8], where: str, crc: int | None) -> NDArray[np.uint8]:
    """Stored bytes without their checksum, which must fit them and be ``crc``."""
    values, stored = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
    if len(data) < CRC_BYTES or checksum(values) != stored:
        raise DamagedError(f"{where} is damaged: its checksum does not fit its values")
    if crc is not None and crc != stored:
        raise DamagedError(f"{where} is damaged: it holds the values of another chunk")
    return values


@contextmanager
def _told_as_damage(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(f"{where} is missing") from None
    except (OSError, MemoryError) as error:
        raise DamagedError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def encode_strings(strings: Sequence[str]) -> NDArray[np.uint8]:
    """Strings as zarr's codec ``vlen-utf8`` stores them."""
    return np.frombuffer(numcodecs.VLenUTF8().encode(np.array(strings, dtype=object)), dtype=np.uint8)


def decode_strings(data: NDArray[np.uint8]) -> list[str]:
    """Undo `encode_strings`; `ValueError` if the bytes are no strings."""
    return list(numcodecs.VLenUTF8().decode(data))
