import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from h2t_store.errors import IncompleteError, StoreError
from h2t_store.matrix import open_features
from h2t_store.storage import chunks, layout
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.store import FeatureStore
from h2t_store.storage.verify import verify

LAYERS = (Layer("stem", 0, 5, (5, 2, 2)), Layer("layer1.0.conv2:in", 5, 2505, (2500,)))
N, ROWS = 40, 16


def header(**changes) -> ExtractionHeader:
    inputs = {"model": "m", "dtype": "float16"} | changes
    return ExtractionHeader(N, ROWS, "float16", ("a", "b"), LAYERS, {"inputs": inputs, "environment": {}})


def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, 2505)).astype(np.float16)


def norms(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float32)
    return np.stack([np.linalg.norm(wide[:, layer.start : layer.stop], axis=1) for layer in LAYERS], axis=1)


def digests(n: int = N) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, 16), dtype=np.uint8)


def by_layer(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, [layer.start for layer in LAYERS[1:]], axis=1)


def fill(path: Path, name: str = "pets/train", blocks=(0, 1, 2), **changes) -> np.ndarray:
    y, ids = np.arange(N) % 2, [f"image {i}.jpg" for i in range(N)]
    extraction = FeatureStore(path, create=True).begin(name, header(**changes), y, ids)
    values = features()
    for block in blocks:
        rows = slice(block * ROWS, (block + 1) * ROWS)
        extraction.write_block(block, by_layer(values[rows]), norms(values[rows]), digests()[rows])
    if len(blocks) == 3:
        extraction.finish()
    return values


def raises_with(message: str):
    return pytest.raises(StoreError, match=message)


def test_the_layout_is_format_2(tmp_path):
    values = fill(tmp_path / "s.zarr")
    root = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert root.attrs["h2t_format"] == 2
    group = root["pets/train"]
    assert set(group.array_keys()) == {
        *("layer_norms", "digests", "failures", "checksums", "y", "sample_ids", "committed")
    }
    wide = group["features/layer1.0.conv2:in"]
    assert (wide.shape, wide.chunks, wide.dtype) == ((N, 2500), (ROWS, 834), np.float16)
    assert np.isnan(wide.fill_value)
    assert group["committed"].chunks == (1,)
    assert group["committed"][:].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(wide[:], values[:, 5:])
    np.testing.assert_array_equal(group["layer_norms"][:], norms(values))
    np.testing.assert_array_equal(group["digests"][:], digests())
    np.testing.assert_array_equal(group["y"][:], np.arange(N) % 2)
    assert group["sample_ids"][:].tolist() == [f"image {i}.jpg" for i in range(N)]
    for array in [wide, *(group[name] for name in group.array_keys())]:
        assert "crc32c" in json.dumps(array.metadata.to_dict(), default=str), array
    assert group.attrs["complete"] is True
    assert {"provenance", "layers"} <= set(group.attrs)


def test_chunks_of_zeros_are_stored(tmp_path):
    extraction = FeatureStore(tmp_path / "s", create=True).begin("x", header(), np.zeros(N, np.int64), ["i"] * N)
    extraction.write_block(
        0, by_layer(np.zeros((ROWS, 2505), np.float16)), np.zeros((ROWS, 2), np.float32), digests(ROWS)
    )
    assert (tmp_path / "s/x/features/stem/c/0/0").exists()


def test_every_flipped_bit_is_found_on_whole_and_partial_reads(tmp_path):
    fill(tmp_path / "s")
    matrix = open_features(tmp_path / "s", "pets/train")
    chunks = sorted((tmp_path / "s/pets/train/features").rglob("c/*/*"))
    assert len(chunks) == 3 * (1 + 3)
    rng = np.random.default_rng(0)
    for chunk in chunks:
        sound = chunk.read_bytes()
        broken = bytearray(sound)
        broken[rng.integers(len(sound))] ^= 1 << rng.integers(8)
        chunk.write_bytes(broken)
        row = int(chunk.parts[-2]) * ROWS
        column = int(chunk.parts[-1]) * 834 + (5 if "layer1" in str(chunk) else 0)
        name = re.escape(str(chunk.relative_to(tmp_path / "s/pets/train")))
        with raises_with(f"pets/train: chunk {name} is damaged"):
            np.asarray(matrix[[row], [column]])
        with raises_with(f"{name} is damaged"):
            np.asarray(matrix)
        chunk.write_bytes(sound)
    np.testing.assert_array_equal(np.asarray(matrix), features())


@pytest.mark.parametrize("what", ["features/stem", "layer_norms", "y", "sample_ids"])
def test_a_lost_chunk_never_reads_as_data(tmp_path, what):
    fill(tmp_path / "s")
    matrix = open_features(tmp_path / "s", "pets/train")
    next(path for path in sorted((tmp_path / "s/pets/train" / what / "c").rglob("*")) if path.is_file()).unlink()
    with raises_with("missing"):
        _ = {"layer_norms": matrix.layer_norms, "y": lambda: matrix.y, "sample_ids": lambda: matrix.sample_ids}.get(
            what, lambda: np.asarray(matrix[:3, :2])
        )()


def test_a_lost_layer_is_named(tmp_path):
    fill(tmp_path / "s")
    (tmp_path / "s/pets/train/features/stem/zarr.json").unlink()
    with raises_with("zarr.json of 'features/stem' is missing, changed or damaged"):
        np.asarray(open_features(tmp_path / "s", "pets/train"))


def test_changed_attributes_are_noticed(tmp_path):
    fill(tmp_path / "s")
    path = tmp_path / "s/pets/train/zarr.json"
    path.write_text(path.read_text().replace('"model": "m"', '"model": "n"'))
    with raises_with("changed or damaged"):
        open_features(tmp_path / "s", "pets/train")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"float16"', '"bfloat16"'),
        ('"float16"', '"int16"'),
        ('"NaN"', "0.0"),
        ('"name": "crc32c"', '"name": "gzip", "configuration": {"level": 5}'),
        ("834", "835"),
        ('"little"', '"big"'),
        ("2500", "2501"),
        ("{", "["),
    ],
)
def test_changed_metadata_of_an_array_is_noticed(tmp_path, old, new):
    fill(tmp_path / "s")
    path = tmp_path / "s/pets/train/features/layer1.0.conv2:in/zarr.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with raises_with("layer1.0.conv2:in.* is missing, changed or damaged"):
        np.asarray(open_features(tmp_path / "s", "pets/train"))


@pytest.mark.parametrize("which", ["zarr.json", "pets/zarr.json", "pets/train/zarr.json"])
def test_damaged_group_metadata_is_one_clear_error(tmp_path, which):
    fill(tmp_path / "s")
    for content in ("{ no json", "", "[]", "null", "{}"):
        (tmp_path / "s" / which).write_text(content)
        if which != "pets/zarr.json":
            with pytest.raises(StoreError):
                open_features(tmp_path / "s", "pets/train")
    if which == "pets/train/zarr.json":
        fill(tmp_path / "s", "other")
        store = FeatureStore(tmp_path / "s")
        assert store.names() == ["other", "pets/train"]
        store.remove("pets/train")
        assert store.names() == ["other"]


def test_a_damaged_extraction_can_be_removed(tmp_path):
    fill(tmp_path / "s")
    path = tmp_path / "s/pets/train/zarr.json"
    path.write_text(path.read_text().replace('"model": "m"', '"model": "n"'))
    FeatureStore(tmp_path / "s").remove("pets/train")
    assert FeatureStore(tmp_path / "s").names() == []


def test_removing_a_damaged_group_never_takes_extractions_below_it(tmp_path):
    fill(tmp_path / "s", "pets/train")
    (tmp_path / "s/pets/zarr.json").write_text("{ no json")
    store = FeatureStore(tmp_path / "s")
    with raises_with("pets: its zarr.json was changed or damaged"):
        store.remove("pets")
    assert store.names() == ["pets", "pets/train"]
    np.testing.assert_array_equal(np.asarray(open_features(tmp_path / "s", "pets/train")), features())


def test_a_damaged_array_of_an_unfinished_extraction_is_put_right_when_it_is_begun_again(tmp_path):
    values = fill(tmp_path / "s", blocks=(1,))
    (tmp_path / "s/pets/train/features/stem/zarr.json").write_text("{ no json")
    with raises_with("zarr.json of 'features/stem' is missing, changed or damaged"):
        FeatureStore(tmp_path / "s").open("pets/train").features(LAYERS[0], 1, 0)
    again = FeatureStore(tmp_path / "s").begin("pets/train", header(), np.zeros(N, np.int64), ["x"] * N)
    np.testing.assert_array_equal(again.features(LAYERS[0], 1, 0), values[ROWS : 2 * ROWS, :5])


def test_a_store_of_another_format_is_one_error(tmp_path):
    zarr.open_group(tmp_path / "s", mode="w")
    for found in (1, 3):
        (tmp_path / "s/zarr.json").write_bytes(layout.group_document({"h2t_format": found}))
        with raises_with(f"store format {found}; this version reads format 2: extract again"):
            FeatureStore(tmp_path / "s")


def test_a_header_says_the_same_after_a_round_trip():
    written, state = header().begun("x", np.zeros(N, np.int64), ["x"] * N), layout.State(True, 3, 8)
    attributes = json.loads(json.dumps(written.to_attrs(state)))
    assert ExtractionHeader.from_attrs(attributes, "") == (written, state)
    assert replace(written, n_samples=41).digest != written.digest


def test_an_extraction_of_another_name_is_not_read_as_this_one(tmp_path):
    fill(tmp_path / "s", "pets/train")
    fill(tmp_path / "s", "pets/test")
    shutil.copytree(tmp_path / "s/pets/train", tmp_path / "s/pets/more")
    with raises_with("pets/more: its zarr.json is that of 'pets/train', from which it was copied"):
        open_features(tmp_path / "s", "pets/more")
    for part in ("features", "checksums", "layer_norms", "digests"):  # which are equal but for the name
        shutil.rmtree(tmp_path / "s/pets/test" / part)
        shutil.copytree(tmp_path / "s/pets/train" / part, tmp_path / "s/pets/test" / part)
    with raises_with("checksums/c/0/0 is damaged: it belongs elsewhere"):
        np.asarray(open_features(tmp_path / "s", "pets/test"))


def test_row_blocks_of_other_pictures_under_the_same_name_are_not_read(tmp_path):
    values = fill(tmp_path / "s", data="now")
    fill(tmp_path / "backup", data="before")
    for part in ("features", "checksums", "layer_norms", "digests", "committed"):
        shutil.rmtree(tmp_path / "s/pets/train" / part)
        shutil.copytree(tmp_path / "backup/pets/train" / part, tmp_path / "s/pets/train" / part)
    with raises_with("checksums/c/0/0 is damaged: it belongs elsewhere"):
        np.asarray(open_features(tmp_path / "s", "pets/train"))
    assert len(values) == N


@pytest.mark.parametrize(("codec", "shards"), [("zstd", False), ("blosc", True), ("none", True)])
def test_zarr_reads_the_metadata_of_compressed_and_sharded_arrays(tmp_path, codec, shards):
    spec = layout.array_specs(replace(header(), codec=codec, shards=shards))["features/layer1.0.conv2:in"]
    (tmp_path / "zarr.json").write_bytes(layout.array_document(spec))
    array = zarr.open_array(tmp_path, mode="r+")
    array[:, 3:900] = values = features()[:, 8:905]
    assert (array.shape, array.chunks, array.shards) == ((N, 2500), (ROWS, 834), (ROWS, 2502) if shards else None)
    np.testing.assert_array_equal(zarr.open_array(tmp_path, mode="r")[:, 3:900], values)


def test_an_unfinished_extraction_does_not_open_and_says_how_far_it_is(tmp_path):
    fill(tmp_path / "s", blocks=(0, 2))
    with pytest.raises(IncompleteError, match="2 of 3 row blocks"):
        open_features(tmp_path / "s", "pets/train")
    with raises_with("1 row blocks are not committed"):
        FeatureStore(tmp_path / "s").open("pets/train").finish()


def test_an_image_that_can_be_read_at_the_second_attempt_is_not_skipped(tmp_path):
    extraction = FeatureStore(tmp_path / "s", create=True).begin(
        "x", header(), np.arange(N) % 2, [f"image {i}.jpg" for i in range(N)]
    )
    first = features()[:ROWS]
    extraction.write_block(0, by_layer(first), norms(first), digests()[:ROWS], {3: "input/output error"})
    (tmp_path / "s/x/committed/c/0").unlink()  # as if it had been killed just before
    fill(tmp_path / "s", "x")
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []
    assert open_features(tmp_path / "s", "x").failures == []
    assert not (tmp_path / "s/x/failures/c/0").exists()


def test_the_same_extraction_is_resumed_and_another_one_refused(tmp_path):
    fill(tmp_path / "s", blocks=(1,))
    store = FeatureStore(tmp_path / "s")
    again = store.begin("pets/train", header(), np.zeros(N, np.int64), ["x"] * N)
    assert again.committed().tolist() == [False, True, False]
    with raises_with(r"made from something else \(model was m, now other\): .* h2t rm"):
        store.begin("pets/train", header(model="other"), np.zeros(N, np.int64), ["x"] * N)


@pytest.mark.parametrize("lost", ["x/zarr.json", "x/y/zarr.json", "x/features/zarr.json"])
def test_what_a_crash_during_removal_leaves_is_replaced(tmp_path, lost):
    fill(tmp_path / "s", "x")
    (tmp_path / "s" / lost).unlink()
    if lost != "x/zarr.json":
        (tmp_path / "s/x/zarr.json").unlink()
    assert FeatureStore(tmp_path / "s").names() == []
    values = fill(tmp_path / "s", "x")
    np.testing.assert_array_equal(np.asarray(open_features(tmp_path / "s", "x")), values)


def test_removal_takes_the_name_away_at_once_and_cleans_up_later(tmp_path, monkeypatch):
    fill(tmp_path / "s", "x")
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    FeatureStore(tmp_path / "s").remove("x")
    monkeypatch.undo()
    assert FeatureStore(tmp_path / "s").names() == []
    assert list((tmp_path / "s").glob(".trash-*"))
    fill(tmp_path / "s", "x")
    FeatureStore(tmp_path / "s").remove("x")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["zarr.json"]


def test_a_store_whose_making_was_interrupted_is_made(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "zarr.0123.partial").write_text("")
    fill(tmp_path / "s")
    assert FeatureStore(tmp_path / "s").names() == ["pets/train"]


@pytest.mark.parametrize(
    "address", ["file:///s", "http://host/s", "s3://", "s3://bucket", "memory://", Path("s3://b/s"), ""]
)
def test_addresses_that_are_neither_a_folder_nor_a_url_are_refused(address):
    with raises_with("accepted is a folder, or a URL"):
        FeatureStore(address, create=True)


@pytest.mark.parametrize("address", ["s3://key:secret@bucket/s", "s3://bucket/s?token=secret", "s3://bucket/s#secret"])
def test_a_url_that_holds_a_secret_is_refused_and_not_repeated(address):
    with pytest.raises(StoreError, match="credentials and options go into the environment") as told:
        FeatureStore(address, create=True)
    assert "secret" not in str(told.value)


def test_what_a_crash_during_creation_leaves_is_replaced(tmp_path):
    store = FeatureStore(tmp_path / "s", create=True)
    zarr.open_group(tmp_path / "s").create_group("pets/train").create_array("y", shape=(3,), dtype="int64")
    assert store.names() == []
    fill(tmp_path / "s")
    assert store.names() == ["pets/train"]
    assert open_features(tmp_path / "s", "pets/train").shape == (N, 2505)


def test_names_removal_and_nesting(tmp_path):
    fill(tmp_path / "s", "pets/train")
    fill(tmp_path / "s", "pets/test")
    fill(tmp_path / "s", "alone")
    store = FeatureStore(tmp_path / "s")
    assert store.names() == ["alone", "pets/test", "pets/train"]
    for nested in ("pets", "alone/more"):
        with raises_with(f"name '{nested}'"):
            store.begin(nested, header(), np.zeros(N, np.int64), ["x"] * N)
    store.remove("pets/test")
    assert store.names() == ["alone", "pets/train"]
    with raises_with(r"no extraction 'pets/tran' \(did you mean 'pets/train'\?\)"):
        store.open("pets/tran")


@pytest.mark.parametrize("name", ["", "a//b", "../x", "a/..", "/a", "a/", "__x", "a\nb", "a\\b", "zarr.json"])
def test_names_that_could_leave_the_store_are_refused(tmp_path, name):
    with raises_with("accepted are words joined by '/'"):
        FeatureStore(tmp_path / "s", create=True).begin(name, header(), np.zeros(N, np.int64), ["x"] * N)


def test_what_is_not_a_store_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    for path in ("file", "folder"):
        with raises_with("exists and is not a feature store"):
            FeatureStore(tmp_path / path, create=True)
    with raises_with("does not exist"):
        FeatureStore(tmp_path / "nowhere")
    zarr.create_group(tmp_path / "other")
    with raises_with("zarr.json was changed or damaged"):
        FeatureStore(tmp_path / "other")


@pytest.mark.parametrize("crash_after", [0, 1, 3, 4, None])
@pytest.mark.parametrize(("codec", "shards"), [("none", False), ("zstd", False), ("blosc", True), ("none", True)])
def test_a_row_block_grows_whatever_its_codec_and_wherever_it_is_interrupted(
    tmp_path, monkeypatch, codec, shards, crash_after
):
    rng, n = np.random.default_rng(0), N + 4
    values, ids = rng.normal(size=(n, 2505)).astype(np.float16), [f"{i}" for i in range(n)]
    store, before = FeatureStore(tmp_path / "s", create=True), replace(header(data=N), codec=codec, shards=shards)

    def write(extraction, block, known=0):
        rows = slice(block * ROWS + known, min((block + 1) * ROWS, extraction.header.n_samples))
        part = values[rows]
        extraction.write_block(block, by_layer(part), norms(part), digests(n)[rows], known=known)

    extraction = store.begin("x", before, np.zeros(N, np.int64), ids[:N])
    for block in range(3):
        write(extraction, block)
    extraction.finish()
    earlier = open_features(tmp_path / "s", "x")
    np.testing.assert_array_equal(np.asarray(earlier), values[:N])
    growing = store.extend("x", replace(header(data=n), n_samples=n, codec=codec, shards=shards), np.zeros(n, int), ids)
    assert growing.committed().tolist() == [True, True, False]
    if crash_after is not None:
        real, calls = chunks.write_chunk, []

        def crash(*args):
            calls.append(1)
            if len(calls) > crash_after:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(chunks, "write_chunk", crash)
            with pytest.raises(KeyboardInterrupt):
                write(growing, 2, known=8)
        growing = store.open("x")
        np.testing.assert_array_equal(np.asarray(earlier), values[:N])
    assert [growing.known_rows(block) for block in range(3)] == [0, 0, 8]
    write(growing, 2, known=8)
    growing.finish()
    matrix = open_features(tmp_path / "s", "x")
    np.testing.assert_array_equal(np.asarray(matrix), values)
    np.testing.assert_array_equal(matrix.layer_norms(), norms(values))
    np.testing.assert_array_equal(store.open("x").digests(), digests(n))
    assert list(verify(store, "x")) == []
    read = zarr.open_group(tmp_path / "s", mode="r")["x/features/layer1.0.conv2:in"][:]
    np.testing.assert_array_equal(read, values[:, 5:])
