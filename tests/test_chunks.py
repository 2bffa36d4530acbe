"""Chunks and shards hold the bytes that zarr writes and reads, whatever the codec; damage is an error."""

from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr

from h2t_store.errors import DamagedError, StoreError
from h2t_store.storage import chunks
from h2t_store.storage.places import open_place

ROWS, WIDTH, N_CHUNKS = 48, 40, 3
DTYPES = ("float16", "float32")

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")


@pytest.fixture(params=chunks.CODECS)
def codec(request):
    if request.param == "pcodec":
        pytest.importorskip("pcodec")
    return request.param


def activations(dtype: str, n_chunks: int = N_CHUNKS) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(ROWS, n_chunks * WIDTH))
    return np.maximum(values, 0).astype(dtype)


def created(path: Path, values: np.ndarray, codec: str, shards: bool = False) -> zarr.Array:
    """An array without any chunk yet, one row block high."""
    return zarr.create_array(
        path,
        shape=values.shape,
        chunks=(ROWS, WIDTH),
        shards=values.shape if shards else None,
        dtype=values.dtype,
        fill_value=np.nan,
        **chunks.codecs_of(codec),
    )


def parts_of(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, values.shape[1] // WIDTH, axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_holds_the_bytes_that_zarr_writes(tmp_path, codec, dtype):
    values = activations(dtype)
    created(tmp_path / "zarr", values, codec)[:] = values
    created(tmp_path / "own", values, codec)
    place = open_place(tmp_path / "own/c/0")
    crcs = [chunks.write_chunk(place / str(i), part, codec) for i, part in enumerate(parts_of(values))]
    for i, part in enumerate(parts_of(values)):
        own = (tmp_path / f"own/c/0/{i}").read_bytes()
        assert own == (tmp_path / f"zarr/c/0/{i}").read_bytes()
        assert own[-4:] == crcs[i].to_bytes(4, "little")
        read = chunks.read_chunk(place / str(i), "", dtype, part.shape, crcs[i], codec=codec)
        np.testing.assert_array_equal(read, part, strict=True)
    np.testing.assert_array_equal(zarr.open(tmp_path / "own", mode="r")[:], values, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("address", ["disk", "memory"])
def test_a_shard_holds_the_bytes_that_zarr_writes_and_is_read_in_part(tmp_path, codec, dtype, address):
    values = activations(dtype)
    created(tmp_path / "zarr", values, codec, shards=True)[:] = values
    created(tmp_path / "own", values, codec, shards=True)
    if address == "memory":
        pytest.importorskip("obstore")
    place = open_place(tmp_path / "own/c/0" if address == "disk" else f"memory://{tmp_path.name}") / "0"
    crcs = chunks.write_shard(place, parts_of(values), codec)
    assert place.read() == (tmp_path / "zarr/c/0/0").read_bytes()
    index = chunks.read_shard_index(place, "", N_CHUNKS)
    for part, crc, within in zip(parts_of(values), crcs, index, strict=True):
        read = chunks.read_chunk(place, "", dtype, part.shape, crc, codec=codec, within=within)
        np.testing.assert_array_equal(read, part, strict=True)
    if address == "disk":
        np.testing.assert_array_equal(zarr.open(tmp_path / "own", mode="r")[:], values, strict=True)


@pytest.mark.parametrize("shard", [False, True])
def test_every_flipped_or_missing_byte_is_found(tmp_path, codec, shard):
    values = activations("float16", 2)[:4]
    place = open_place(tmp_path / "chunk")
    crcs = chunks.write_shard(place, parts_of(values), codec) if shard else [chunks.write_chunk(place, values, codec)]
    sound = place.read()

    def read() -> None:
        index = chunks.read_shard_index(place, "it", len(crcs)) if shard else [None]
        shape = (4, WIDTH) if shard else values.shape
        for crc, within in zip(crcs, index, strict=True):
            chunks.read_chunk(place, "it", "float16", shape, crc, codec=codec, within=within)

    read()
    for at in range(0, len(sound), 7):
        for content in (
            sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :],
            sound[:at],
            sound[:at] + sound[at + 1 :],
        ):
            place.write_whole(content, durable=False)
            with pytest.raises(DamagedError, match="it is damaged"):
                read()
    place.remove()
    with pytest.raises(DamagedError, match="it is missing"):
        read()


def test_the_chunk_of_another_is_not_read(tmp_path, codec):
    place, values = open_place(tmp_path), activations("float32")
    crc = chunks.write_chunk(place / "mine", values, codec)
    chunks.write_chunk(place / "other", values + 1, codec)
    (tmp_path / "other").replace(tmp_path / "mine")
    with pytest.raises(DamagedError, match="it holds the values of another chunk"):
        chunks.read_chunk(place / "mine", "it", "float32", values.shape, crc, codec=codec)


def test_a_written_chunk_is_replaced_at_once(tmp_path):
    place = open_place(tmp_path / "a/b/chunk")
    for value in (1, 2):
        chunks.write_chunk(place, np.full(1000, value))
        assert chunks.read_chunk(place, "", "int64", (1000,))[0] == value
    assert [path for path, _ in open_place(tmp_path).files()] == ["a/b/chunk"]


def test_a_codec_without_its_package_is_one_line(monkeypatch):
    monkeypatch.delattr(numcodecs, "PCodec", raising=False)
    chunks._compressor.cache_clear()
    with pytest.raises(StoreError, match=r"codec 'pcodec' needs pcodec: pip install 'head2toe\[pcodec\]'"):
        chunks.codecs_of("pcodec")


def test_strings_are_those_of_zarr(tmp_path):
    strings = ["", "a", "日本", "x" * 1000]
    array = zarr.create_array(tmp_path, shape=(4,), chunks=(4,), dtype="string", **chunks.codecs_of("none"))
    chunks.write_chunk(open_place(tmp_path / "c/0"), chunks.encode_strings(strings))
    assert array[:].tolist() == strings
    data = chunks.read_bytes(open_place(tmp_path / "c/0"), "")
    assert chunks.decode_strings(data) == strings
    for wrong in (data[:-1], data[:2], np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match=r".+"):
            chunks.decode_strings(wrong)


def test_nothing_needs_calls_that_only_unix_has(monkeypatch, tmp_path):
    for name in ("readv", "writev", "preadv", "pwritev", "pread", "pwrite"):
        monkeypatch.delattr(f"os.{name}", raising=False)
    values = activations("float16")
    crcs = chunks.write_shard(open_place(tmp_path / "x"), parts_of(values))
    (start, stop), *_ = chunks.read_shard_index(open_place(tmp_path / "x"), "", N_CHUNKS)
    read = chunks.read_chunk(open_place(tmp_path / "x"), "", "float16", (ROWS, WIDTH), crcs[0], within=(start, stop))
    np.testing.assert_array_equal(read, parts_of(values)[0])
