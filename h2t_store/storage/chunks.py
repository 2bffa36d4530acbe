"""Write and read the chunks of a store: encoded values, then their crc32c, byte for byte as zarr writes them.

zarr 3.1 takes 2.5 to 6 times as long to write the same chunks of wide layers, and about as long to read them
(``benchmarks/codecs.py``). It reads an absent chunk as fill values; here that is an error, as is a shortened, changed
or exchanged one.
"""

import hashlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import google_crc32c
import numcodecs  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DamagedError, StoreError
from h2t_store.storage.layout import ArraySpec, codec_documents
from h2t_store.storage.places import Place
from h2t_store.storage.places.disk import Disk

CRC_BYTES = 4
_INDEX_ENTRY = 16  # offset and length of a chunk in a shard

_memory = threading.local()
_looking = [threading.Lock() for _ in range(64)]


def checksum(data: NDArray[np.uint8]) -> int:
    """crc32c of bytes."""
    crc: int = google_crc32c.value(data)
    return crc


def require_codec(codec: str) -> None:
    """Raise `StoreError` if the package of a codec is not installed."""
    if codec != "none":
        _compressor(codec, "float32")


@lru_cache
def _compressor(codec: str, dtype: str) -> Any:
    """The codec of numcodecs behind that of zarr, which itself can only be called asynchronously."""
    configuration = codec_documents(dtype, codec)[-2]["configuration"]
    if codec == "blosc":
        configuration |= {"shuffle": numcodecs.Blosc.BITSHUFFLE}  # whose name only zarr knows
    try:
        return numcodecs.get_codec({"id": codec} | configuration)
    except ValueError:
        raise StoreError(f"codec {codec!r} needs {codec}: pip install 'head2toe[{codec}]'") from None


def framed(data: NDArray[np.uint8]) -> bytes:
    """Bytes with their crc32c after them, as a chunk is stored."""
    return data.tobytes() + checksum(data).to_bytes(CRC_BYTES, "little")


def write_chunk(place: Place, values: NDArray[Any], spec: ArraySpec) -> list[int]:
    """Write a file of an array, one chunk or all chunks of a shard, and return the crc32c of each as encoded.

    ``values`` that do not fill the file are its first rows and columns.
    """
    if spec.shard is None:
        chunks = [values]
    else:
        chunks = np.split(_filled(values, spec.shard, spec), _chunks_per_shard(spec), axis=1)
    parts: list[memoryview] = []
    crcs, stops = [], [0]
    for chunk in chunks:
        data = encoded(chunk, spec)
        crcs.append(checksum(data))
        parts += [data.data, _as_bytes(crcs[-1])]
        stops.append(stops[-1] + len(data) + CRC_BYTES)
    if spec.shard is not None:
        index = np.stack([stops[:-1], np.diff(stops)], axis=1).astype("<u8").reshape(-1).view(np.uint8)
        parts += [index.data, _as_bytes(checksum(index))]
    place.write(parts)
    return crcs


def encoded(values: Any, spec: ArraySpec) -> NDArray[np.uint8]:
    """A chunk that begins with these values, an array or strings, as it is stored but for its crc32c."""
    if spec.dtype == "string":
        strings = [*map(str, values), *[""] * (spec.chunks[0] - len(values))]
        return np.frombuffer(numcodecs.VLenUTF8().encode(np.array(strings, dtype=object)), np.uint8)
    flat = np.ascontiguousarray(_filled(values, spec.chunks, spec)).reshape(-1)
    if spec.codec == "none":
        return flat.view(np.uint8)
    return np.frombuffer(_compressor(spec.codec, spec.dtype).encode(flat), np.uint8)


def _filled(values: NDArray[Any], shape: tuple[int, ...], spec: ArraySpec) -> NDArray[Any]:
    if values.shape == shape:
        return values
    whole = np.full(shape, spec.fill_value, dtype=spec.dtype)
    whole[tuple(map(slice, values.shape))] = values
    return whole


def _as_bytes(crc: int) -> memoryview:
    return memoryview(crc.to_bytes(CRC_BYTES, "little"))


def read_strings(place: Place, where: str, spec: ArraySpec, crc: int | None = None) -> list[str]:
    """Strings of a chunk; for parameters and errors see `read_chunk`."""
    content = _checked(_whole(place, where), where, crc)
    with suppress(ValueError):
        if int.from_bytes(content[:4].tobytes(), "little") == spec.chunks[0]:  # how many strings follow
            return list(numcodecs.VLenUTF8().decode(content))
    raise DamagedError(f"{where} is damaged: it does not hold strings")


def read_chunk(place: Place, where: str, spec: ArraySpec, inner: int = 0, crc: int | None = None) -> NDArray[Any]:
    """Values of a chunk, valid until this thread reads the next one.

    Parameters
    ----------
    place : Place
        File of the chunk, or of its shard.
    where : str
        Name of the chunk, for messages.
    spec : ArraySpec
        Of the array.
    inner : int
        Number of the chunk in its shard.
    crc : int, optional
        The crc32c that the chunk must have as encoded. Without it the cache is not used.

    Raises
    ------
    DamagedError
        If the file is missing, cut short, changed or that of another chunk.
    """
    copy = None
    if place.cache is not None and crc is not None:
        name = hashlib.sha256(f"{place} {inner}".encode()).hexdigest()
        copy = Disk(place.cache / name[:2] / name[2:32])
        with suppress(DamagedError):
            return _decoded(_checked(_stored(copy, where, spec), where, crc), where, spec)
    try:
        data = _fetched(place, where, spec, inner, crc)
    except DamagedError:
        if spec.shard is None:
            raise
        _shard_index.cache_clear()  # another process may have replaced the shard
        data = _fetched(place, where, spec, inner, crc)
    if copy is not None:
        try:
            copy.write([data.data, _as_bytes(checksum(data))])
        except OSError as error:
            raise StoreError(f"cache: {copy} cannot be written: {error.strerror or error}") from error
    return _decoded(data, where, spec)


def _fetched(place: Place, where: str, spec: ArraySpec, inner: int, crc: int | None) -> NDArray[np.uint8]:
    """Encoded values of a chunk; of a shard, only these are read, and its index if the offset depends on it."""
    if spec.shard is None:
        within = None
    elif spec.codec == "none":
        size = _decoded_size(spec) + CRC_BYTES
        within = (inner * size, inner * size + size)
    else:
        with _looking[hash(place) % len(_looking)]:  # threads that want chunks of one shard wait for its index
            within = _shard_index(place, where, _chunks_per_shard(spec))[inner]
    return _checked(_stored(place, where, spec, within), where, crc)


def check_shard(place: Place, where: str, spec: ArraySpec) -> None:
    """Raise `DamagedError` unless the index of a shard is sound."""
    _shard_index.cache_clear()
    _shard_index(place, where, _chunks_per_shard(spec))


@lru_cache(4096)
def _shard_index(place: Place, where: str, n_chunks: int) -> list[tuple[int, int]]:
    """Start and stop of each chunk in a shard; they must lie one after another."""
    with _told_as_damage(where):
        data = np.frombuffer(place.read(last=n_chunks * _INDEX_ENTRY + CRC_BYTES), np.uint8)
    starts, lengths = _checked(data, where, None).view("<u8").reshape(-1, 2).T.astype(np.int64)
    stops = np.cumsum(lengths)
    if len(starts) != n_chunks or (starts != stops - lengths).any():
        raise DamagedError(f"{where} is damaged: its index does not fit its chunks")
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _chunks_per_shard(spec: ArraySpec) -> int:
    return 1 if spec.shard is None else spec.shard[1] // spec.chunks[1]


def _decoded_size(spec: ArraySpec) -> int:
    return math.prod(spec.chunks) * np.dtype(spec.dtype).itemsize


def _whole(place: Place, where: str) -> NDArray[np.uint8]:
    with _told_as_damage(where):
        return np.frombuffer(place.read(), np.uint8)


def _stored(place: Place, where: str, spec: ArraySpec, within: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Bytes of a chunk with its checksum, in memory that this thread reuses."""
    if spec.codec != "none" and within is None:
        return _whole(place, where)
    start, stop = within or (0, _decoded_size(spec) + CRC_BYTES)
    with _told_as_damage(where):
        buffer = _reused("stored", stop - start)
        found = place.fill(buffer, start)
    if found < len(buffer) or (within is None and found > len(buffer)):
        raise DamagedError(f"{where} is damaged: {max(0, found)} bytes instead of {len(buffer)}")
    return buffer


def _reused(use: str, size: int) -> NDArray[np.uint8]:
    """Memory that this thread is given again the next time."""
    memory: NDArray[np.uint8] | None = getattr(_memory, use, None)
    if memory is None or len(memory) < size:
        memory = np.empty(size, dtype=np.uint8)
        setattr(_memory, use, memory)
    return memory[:size]


def _decoded(data: NDArray[np.uint8], where: str, spec: ArraySpec) -> NDArray[Any]:
    if spec.codec == "none":
        return data.view(spec.dtype).reshape(spec.chunks)
    values = _reused("decoded", _decoded_size(spec)).view(spec.dtype)
    try:
        _compressor(spec.codec, spec.dtype).decode(data, out=values)
    except (RuntimeError, ValueError, TypeError) as error:
        raise DamagedError(f"{where} is damaged: {spec.codec} cannot decode it") from error
    return values.reshape(spec.chunks)


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
