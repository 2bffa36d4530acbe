"""Chunks and shards hold the bytes that zarr writes and reads, whatever the codec; damage is an error."""

from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr

from h2t_store.errors import DamagedError, StoreError
from h2t_store.storage import chunks
from h2t_store.storage.layout import ArraySpec, array_document
from h2t_store.storage.places import open_place

CODECS, DTYPES = ("none", "zstd", "blosc", "pcodec"), ("float16", "float32")
ROWS, WIDTH, N_CHUNKS = 48, 40, 3

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")


@pytest.fixture(params=CODECS)
def codec(request):
    if request.param == "pcodec":
        pytest.importorskip("pcodec")
    return request.param


def spec_of(codec: str = "none", dtype: str = "float16", shard: bool = False) -> ArraySpec:
    """Of an array of one row block."""
    shape = (ROWS, N_CHUNKS * WIDTH)
    return ArraySpec(shape, (ROWS, WIDTH), dtype, float("nan"), codec, shape if shard else None)


def activations(spec: ArraySpec, seed: int = 0) -> np.ndarray:
    return np.maximum(np.random.default_rng(seed).normal(size=spec.shape), 0).astype(spec.dtype)


def created(path: Path, spec: ArraySpec) -> zarr.Array:
    """An array without any chunk yet."""
    path.mkdir()
    (path / "zarr.json").write_bytes(array_document(spec))
    return zarr.open_array(path, mode="r+")


def parts_of(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, N_CHUNKS, axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_holds_the_bytes_that_zarr_writes(tmp_path, codec, dtype):
    spec = spec_of(codec, dtype)
    values = activations(spec)
    created(tmp_path / "zarr", spec)[:] = values
    array = created(tmp_path / "own", spec)
    for i, part in enumerate(parts_of(values)):
        place = open_place(tmp_path / f"own/c/0/{i}")
        (crc,) = chunks.write_chunk(place, part, spec)
        assert place.read() == (tmp_path / f"zarr/c/0/{i}").read_bytes()
        assert place.read(last=4) == crc.to_bytes(4, "little")
        assert chunks.checksum(chunks.encoded(part, spec)) == crc
        np.testing.assert_array_equal(chunks.read_chunk(place, "", spec, 0, crc), part, strict=True)
    np.testing.assert_array_equal(array[:], values, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("address", ["disk", "memory"])
def test_a_shard_holds_the_bytes_that_zarr_writes_and_is_read_in_part(tmp_path, codec, dtype, address):
    if address == "memory":
        pytest.importorskip("obstore")
    spec = spec_of(codec, dtype, shard=True)
    values = activations(spec)
    created(tmp_path / "zarr", spec)[:] = values
    array = created(tmp_path / "own", spec)
    place = open_place(tmp_path / "own/c/0" if address == "disk" else f"memory://{tmp_path.name}") / "0"
    crcs = chunks.write_chunk(place, values, spec)
    assert place.read() == (tmp_path / "zarr/c/0/0").read_bytes()
    for i in (2, 0, 1):
        read = chunks.read_chunk(place, "", spec, i, crcs[i])
        np.testing.assert_array_equal(read, parts_of(values)[i], strict=True)
    if address == "disk":
        np.testing.assert_array_equal(array[:], values, strict=True)


@pytest.mark.parametrize("shard", [False, True])
def test_every_flipped_or_missing_byte_is_found(tmp_path, codec, shard):
    spec = spec_of(codec, shard=shard)
    values, place = activations(spec), open_place(tmp_path / "chunk")
    crcs = chunks.write_chunk(place, values if shard else parts_of(values)[0], spec)
    sound = place.read()

    def read() -> None:
        if shard:
            chunks.check_shard(place, "it", spec)
        for inner, crc in enumerate(crcs):
            chunks.read_chunk(place, "it", spec, inner, crc)

    read()
    for at in {*range(0, len(sound), 401), *range(len(sound) - 60, len(sound))}:
        before, after = sound[:at], sound[at + 1 :]
        for content in (before + bytes([sound[at] ^ 4]) + after, before, before + after):
            place.write_whole(content, durable=False)
            with pytest.raises(DamagedError, match="it is damaged"):
                read()
    place.remove()
    with pytest.raises(DamagedError, match="it is missing"):
        read()


@pytest.mark.parametrize("address", ["disk", "memory"])
def test_a_shard_that_is_cut_short_after_it_was_read_is_damaged(tmp_path, address):
    if address == "memory":
        pytest.importorskip("obstore")
    spec = spec_of(shard=True)
    place = open_place(tmp_path if address == "disk" else f"memory://{tmp_path.name}") / "shard"
    crcs = chunks.write_chunk(place, activations(spec), spec)
    place.write_whole(place.read()[:100])
    with pytest.raises(DamagedError, match="it is damaged: 0 bytes instead of 3844"):
        chunks.read_chunk(place, "it", spec, 2, crcs[2])


def test_a_shard_that_was_replaced_is_read_anew(tmp_path):
    spec, place = spec_of("zstd", shard=True), open_place(tmp_path / "shard")
    for seed in (0, 1):
        values = activations(spec, seed) * (1 - seed / 2)
        chunks.write_chunk(place, values, spec)
        np.testing.assert_array_equal(chunks.read_chunk(place, "", spec, 2), parts_of(values)[2])


def test_the_chunk_of_another_is_not_read(tmp_path, codec):
    place, spec = open_place(tmp_path), spec_of(codec)
    values = activations(spec)[:, :WIDTH]
    (crc,) = chunks.write_chunk(place / "mine", values, spec)
    chunks.write_chunk(place / "other", values + 1, spec)
    (tmp_path / "other").replace(tmp_path / "mine")
    with pytest.raises(DamagedError, match="it holds the values of another chunk"):
        chunks.read_chunk(place / "mine", "it", spec, 0, crc)


def test_a_written_chunk_is_replaced_at_once(tmp_path):
    place, spec = open_place(tmp_path / "a/b/chunk"), spec_of()
    for value in (1, 2):
        chunks.write_chunk(place, np.full(spec.chunks, value, spec.dtype), spec)
        assert chunks.read_chunk(place, "", spec)[0, 0] == value
    assert [path for path, _ in open_place(tmp_path).files()] == ["a/b/chunk"]


def test_a_codec_without_its_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delitem(numcodecs.registry.codec_registry, "pcodec", raising=False)
    monkeypatch.delitem(numcodecs.registry.entries, "pcodec", raising=False)
    chunks._compressor.cache_clear()
    spec = spec_of("pcodec")
    for use in (lambda: chunks.require_codec("pcodec"), lambda: chunks.encoded(parts_of(activations(spec))[0], spec)):
        with pytest.raises(StoreError, match=r"^codec 'pcodec' needs pcodec: pip install 'head2toe\[pcodec\]'$"):
            use()


def test_nothing_needs_calls_that_only_unix_has(monkeypatch, tmp_path):
    for name in ("readv", "writev", "preadv", "pwritev", "pread", "pwrite"):
        monkeypatch.delattr(f"os.{name}", raising=False)
    spec, place = spec_of(shard=True), open_place(tmp_path / "x")
    values = activations(spec)
    crcs = chunks.write_chunk(place, values, spec)
    np.testing.assert_array_equal(chunks.read_chunk(place, "", spec, 1, crcs[1]), parts_of(values)[1])


def test_strings_are_those_of_zarr(tmp_path):
    strings, spec = ["", "a", "日本", "x" * 1000], ArraySpec((4,), (4,), "string", "")
    array = created(tmp_path / "x", spec)
    place = open_place(tmp_path / "x/c/0")
    chunks.write_chunk(place, strings, spec)
    assert array[:].tolist() == strings
    assert chunks.read_strings(place, "", spec) == strings
    data = chunks.encoded(strings, spec)
    for wrong in (data[:-1], data[:2], np.zeros(3, np.uint8), chunks.encoded(strings, spec._replace(chunks=(5,)))):
        place.write_whole(chunks.framed(wrong))
        with pytest.raises(DamagedError, match="it is damaged: it does not hold strings"):
            chunks.read_strings(place, "it", spec)
