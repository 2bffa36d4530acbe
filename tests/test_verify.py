"""Damage of every kind is named by verify, never read as data, and undone by repair down to the last byte."""

import contextlib
import json
import logging
import re
import shutil
import signal
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from conftest import MODELS
from PIL import Image

from h2t_store import cli, extract, open_features
from h2t_store.errors import H2TError, IncompleteError, StoreError
from h2t_store.repairing import repair
from h2t_store.storage import layout
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.store import Extraction, FeatureStore
from h2t_store.storage.verify import verify

MODEL = f"{MODELS}:small_input"
NAME = "pets/train"
BROKEN = "d/39.png"
N_FLIPS = 150


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder with images, one of which cannot be read, and a store of them; neither is to be changed."""
    root = tmp_path_factory.mktemp("sound")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        path = root / "pictures" / "abcd"[i % 4] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (root / "pictures" / BROKEN).write_text("not an image")
    common = dict(model=MODEL, store=root / "s", batch_size=8, workers=0, rows_per_block=16)
    extract(root / "pictures", name=NAME, on_error="skip", **common)
    extract(root / "pictures", name="other", on_error="skip", seed=1, **common)
    extract((images, np.arange(40) % 4), name="arrays", **common)
    return root


@pytest.fixture
def store(sound, tmp_path) -> Path:
    """A copy of the store; that of the extractions knows where the images are."""
    shutil.copytree(sound / "s", tmp_path / "s")
    return tmp_path / "s"


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """Row blocks in the order in which they are written."""
    numbers: list[int] = []
    write = Extraction.write_block

    def counted(self, block, *rest, **others):
        numbers.append(block)
        return write(self, block, *rest, **others)

    monkeypatch.setattr(Extraction, "write_block", counted)
    return numbers


def tree(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".locks")}


def everything(store: Path) -> list:
    matrix = open_features(store, NAME)
    arrays = (np.asarray(matrix), matrix.codes, matrix.layer_norms())
    return [
        *((a.shape, a.tobytes()) for a in arrays),
        *map(str, matrix.sample_ids),
        dict(matrix.failures),
        matrix.layers,
    ]


def named(store: Path, name: str = NAME) -> set[str]:
    return {damage.path for damage in verify(FeatureStore.unchecked(store), name)}


def files_of(store: Path) -> list[str]:
    """Every file that the extraction depends on."""
    return ["zarr.json", "pets/zarr.json", *(f"{NAME}/{file}" for file in tree(store / NAME))]


def never_other_values(store: Path, values: list) -> None:
    with contextlib.suppress(H2TError):
        assert everything(store) == values


def test_a_sound_store_is_sound(store):
    for name in (NAME, "other", "arrays"):
        assert named(store, name) == set()


def test_a_flipped_byte_is_named_and_never_read_as_data(store):
    values, rng = everything(store), np.random.default_rng(1)
    files = files_of(store)
    assert len(files) == 2 + 2 + 7 + 7 + 3 * (7 + 4) + 1 + 2
    for file in [*files, *rng.choice(files, N_FLIPS - len(files))]:
        path = store / file
        content = path.read_bytes()
        at = int(rng.integers(len(content)))
        path.write_bytes(content[:at] + bytes([content[at] ^ int(rng.integers(1, 256))]) + content[at + 1 :])
        assert file in named(store), (file, at)
        never_other_values(store, values)
        path.write_bytes(content)
    assert named(store) == set()


@pytest.mark.parametrize(
    "change",
    [lambda content: None, lambda content: b"", lambda content: content[:-1], lambda content: content + b"\0"],
    ids=["deleted", "emptied", "truncated", "extended"],
)
def test_a_file_that_is_lost_cut_or_longer_is_named_and_never_read_as_data(store, change):
    values = everything(store)
    for file in files_of(store):
        path = store / file
        content = path.read_bytes()
        changed = change(content)
        path.unlink() if changed is None else path.write_bytes(changed)
        assert file in named(store), file
        never_other_values(store, values)
        path.write_bytes(content)


def test_reasons_where_no_image_was_skipped_are_named(store):
    (store / NAME / "failures/c/0").write_bytes(b"garbage")
    assert named(store) == {f"{NAME}/failures/c/0"}


def test_chunks_in_each_others_place_are_named_and_never_read_as_data(store):
    values, count = everything(store), 0
    chunks = [store / file for file in files_of(store) if not file.endswith(".json")]
    for i, one in enumerate(chunks):
        for other in chunks[i + 1 :: 3]:
            a, b = one.read_bytes(), other.read_bytes()
            if len(a) == len(b) and a != b:
                one.write_bytes(b)
                other.write_bytes(a)
                assert {str(path.relative_to(store)) for path in (one, other)} <= named(store)
                never_other_values(store, values)
                one.write_bytes(a)
                other.write_bytes(b)
                count += 1
    assert count > 20


def test_a_row_block_in_the_place_of_another_with_its_checksums_is_noticed(store):
    folder, values = store / NAME, everything(store)
    for path in sorted(folder.glob("**/c/0*")):
        if path.relative_to(folder).parts[0] not in ("y", "sample_ids", "committed"):
            path.rename(path.with_name("kept"))
            path.with_name("1").rename(path)
            path.with_name("kept").rename(path.with_name("1"))
    assert {f"{NAME}/checksums/c/{block}/0" for block in (0, 1)} <= named(store)
    never_other_values(store, values)


@pytest.mark.parametrize(
    "parts",
    [["features"], ["features", "checksums"], ["features", "checksums", "layer_norms", "failures"], ["zarr.json"]],
    ids="+".join,
)
def test_parts_of_another_extraction_are_noticed(store, parts):
    values = everything(store)
    for part in parts:
        if (store / NAME / part).is_dir():
            shutil.rmtree(store / NAME / part)
            shutil.copytree(store / "other" / part, store / NAME / part)
        else:
            shutil.copyfile(store / "other" / part, store / NAME / part)
    assert named(store)
    never_other_values(store, values)


def test_a_lost_flag_does_not_turn_a_skipped_image_into_data(store):
    values = everything(store)
    (store / NAME / "committed/c/2").unlink()
    assert open_features(store, NAME).failures == [(BROKEN, values[-2][BROKEN])]
    assert everything(store) == values


DAMAGE = {
    "a chunk of features": (["features/head/c/1/0"], [1]),
    "chunks of two row blocks": (["features/head/c/0/0", "features/layers.0/c/2/0", "features/head/c/2/0"], [0, 2]),
    "norms": (["layer_norms/c/1/0"], [1]),
    "digests": (["digests/c/1/0"], [1]),
    "reasons": (["failures/c/2"], [2]),
    "checksums": (["checksums/c/0/0"], [0]),
    "a flag": (["committed/c/2"], [2]),
    "labels": (["y/c/0"], []),
    "identifiers": (["sample_ids/c/0"], []),
    "labels and identifiers": (["y/c/0", "sample_ids/c/0"], []),
    "metadata of an array": (["features/head/zarr.json", "y/zarr.json", "checksums/zarr.json"], []),
    "metadata of the group of features": (["features/zarr.json"], []),
    "the store's metadata": (["../../zarr.json"], []),
    "the metadata above": (["../zarr.json"], []),
    "something of everything": (
        ["../../zarr.json", "../zarr.json", "features/zarr.json", "y/c/0", "y/zarr.json", "features/head/c/1/0"],
        [1],
    ),
}


@pytest.mark.parametrize("how", ["changed", "deleted"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_restores_every_byte_and_computes_only_damaged_row_blocks(store, written, damage, how):
    before, values = tree(store), everything(store)
    files, expected = DAMAGE[damage]
    for file in files:
        path = store / NAME / file
        content = path.read_bytes()
        path.unlink() if how == "deleted" else path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    damages = repair(store, NAME, workers=0)
    assert damages
    assert written == expected
    assert tree(store) == before
    assert everything(store) == values
    assert named(store) == set()
    assert repair(store, NAME, workers=0) == []


def test_every_row_block_can_be_repaired(store, written):
    before = tree(store)
    shutil.rmtree(store / NAME / "features/head/c")
    repair(store, NAME, workers=0)
    assert written == [0, 1, 2]
    assert tree(store) == before


@pytest.mark.parametrize("content", [None, b"{}", b""])
def test_repair_without_attributes_says_so_and_changes_nothing(store, content):
    file = store / NAME / "zarr.json"
    file.unlink() if content is None else file.write_bytes(content)
    before = tree(store)
    assert named(store) == {f"{NAME}/zarr.json"}
    with pytest.raises(StoreError, match=r"its zarr\.json is damaged: remove it \(h2t rm .*\) and extract it again"):
        repair(store, NAME)
    assert tree(store) == before


@pytest.fixture
def moved(sound, tmp_path) -> Path:
    """An extraction of one row block, whose images may be changed."""
    shutil.copytree(sound / "pictures", tmp_path / "pictures")
    extract(tmp_path / "pictures", model=MODEL, store=tmp_path / "t", name="x", on_error="skip", workers=0)
    return tmp_path


@pytest.mark.parametrize("change", ["image", "model"])
@pytest.mark.parametrize("lost", ["features/head/c/0/0", "y/c/0", "sample_ids/c/0"])
def test_repair_from_something_else_is_refused_and_gives_nothing_up(moved, change, lost):
    (moved / "t/x" / lost).unlink()
    before = tree(moved / "t")
    settings = {}
    if change == "image":
        Image.new("RGB", (8, 8)).save(moved / "pictures/a/00.png")
    else:
        (moved / "other").mkdir()
        (moved / "other/tiny_models.py").write_text(MODELS.read_text() + "\n")
        settings["model"] = f"{moved}/other/tiny_models.py:small_input"
    with pytest.raises(StoreError, match=r"x was made from something else \((data|code_sha256)"):
        repair(moved / "t", "x", workers=0, **settings)
    assert tree(moved / "t") == before
    assert open_features(moved / "t", "x").shape[0] == 39


def test_repair_from_where_the_images_are_now(moved):
    before = np.asarray(open_features(moved / "t", "x"))
    (moved / "t/x/features/head/c/0/0").unlink()
    (moved / "pictures").rename(moved / "elsewhere")
    with pytest.raises(H2TError, match="pictures"):
        repair(moved / "t", "x")
    repair(moved / "t", "x", data=moved / "elsewhere", workers=0)
    np.testing.assert_array_equal(np.asarray(open_features(moved / "t", "x")), before)
    assert named(moved / "t", "x") == set()


def test_repair_of_arrays_in_memory_asks_for_them(store):
    before = tree(store)
    (store / "arrays/features/head/c/1/0").unlink()
    with pytest.raises(StoreError, match=r"was made from images in memory: call .*repair\(store, name, data=\.\.\.\)"):
        repair(store, "arrays")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    repair(store, "arrays", data=(images, np.arange(40) % 4))
    assert tree(store) == before


@pytest.mark.parametrize("lost", ["features/head/c/{}/0", "failures/c/{}"])
def test_an_interrupted_repair_is_continued_with_the_skipped_image(store, monkeypatch, lost):
    before, write = tree(store), Extraction.write_block
    for block in range(3):
        (store / NAME / lost.format(block)).unlink(missing_ok=True)

    def crash(self, block, *rest, **others):
        if block == (2 if "head" in lost else 3):
            raise KeyboardInterrupt
        return write(self, block, *rest, **others)

    monkeypatch.setattr(Extraction, "write_block", crash)
    if "head" in lost:
        with pytest.raises(KeyboardInterrupt):
            repair(store, NAME, workers=0)
        with pytest.raises(IncompleteError, match="2 of 3 row blocks"):
            open_features(store, NAME)
    monkeypatch.setattr(Extraction, "write_block", write)
    repair(store, NAME, workers=0)
    assert {name: content for name, content in tree(store).items() if not name.endswith(".partial")} == before


@pytest.fixture
def h2t(monkeypatch, capsys):
    """Run ``h2t``: (exit status, stdout, stderr)."""
    root, terminate = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, interrupt = root.handlers[:], signal.getsignal(signal.SIGINT)

    def run(*args: object) -> tuple[int, str, str]:
        root.handlers = []
        monkeypatch.setattr(sys, "argv", ["h2t", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.h2t_main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    yield run
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, interrupt)
    root.handlers = handlers


def test_the_commands_verify_and_repair(h2t, store):
    assert h2t("verify", store)[:2] == (0, "arrays: sound\nother: sound\npets/train: sound\n")
    before = tree(store)
    (store / NAME / "features/head/c/1/0").unlink()
    path = store / NAME / "y/zarr.json"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = h2t("verify", store)
    assert (code, err) == (3, "")
    assert f"{NAME}/features/head/c/1/0: missing\n" in out
    assert re.search(rf"^{NAME}/y/zarr\.json: .*changed", out, re.MULTILINE)
    assert f"{NAME}: 2 things are damaged\n" in out
    assert "other: sound" in out
    code, out, _ = h2t("verify", store, NAME, "--json")
    assert code == 3
    assert {damage["path"] for damage in json.loads(out)[NAME]} == named(store)
    code, out, _ = h2t("repair", store, NAME, "-j", 0, "--json")
    assert code == 0
    assert len(json.loads(out)["damages"]) == 2
    assert tree(store) == before
    assert h2t("verify", store, NAME)[:2] == (0, f"{NAME}: sound\n")
    assert "nothing is damaged" in h2t("repair", store, NAME)[1]
    assert h2t("verify", store, "nope")[0] != 0


def test_verify_of_all_goes_on_behind_a_damaged_store_and_group(h2t, store):
    (store / "zarr.json").unlink()
    (store / "pets/zarr.json").write_text("[")
    code, out, _ = h2t("verify", store)
    assert code == 3
    assert re.search(r"^zarr\.json: missing", out, re.MULTILINE)
    assert re.search(r"^pets/zarr\.json: missing, changed or damaged", out, re.MULTILINE)
    for name in ("other", "arrays", NAME):
        assert re.search(rf"^{name}: \d things", out, re.MULTILINE)


@pytest.fixture
def small(tmp_path) -> Path:
    """A store with an extraction ``x`` of 40 rows and 5 columns."""
    store = tmp_path / "small"
    provenance = {"inputs": {"model": "m", "weights_sha256": "0"}, "environment": {"arguments": {}, "versions": {}}}
    header = ExtractionHeader(40, 16, "float16", ("a",), (Layer("stem", 0, 5, (5,)),), provenance)
    extraction = FeatureStore(store, create=True).begin("x", header, np.zeros(40, np.int64), ["i"] * 40)
    for block, rows in enumerate((16, 16, 8)):
        digests = np.full((rows, 16), block, np.uint8)
        extraction.write_block(block, [np.ones((rows, 5), np.float16)], np.ones((rows, 1), np.float32), digests)
    extraction.finish()
    return store


def one_error_each(store: Path) -> None:
    """Whatever is asked: an `H2TError` or nothing."""
    asked = [
        lambda: FeatureStore(store).names(),
        lambda: repr(open_features(store, "x")),
        lambda: open_features(store, "x").y,
        lambda: open_features(store, "x").sample_ids,
        lambda: open_features(store, "x").failures,
        lambda: open_features(store, "x").layer_norms(),
        lambda: np.asarray(open_features(store, "x")[:3, :2]),
        lambda: list(verify(FeatureStore.unchecked(store), "x")),
        lambda: repair(store, "x"),
    ]
    for ask in asked:
        with contextlib.suppress(H2TError):
            ask()


@pytest.mark.parametrize("file", ["zarr.json", "x/zarr.json", "x/features/zarr.json", "x/y/zarr.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"attributes":' * 100_000,
        b'{"attributes": {"n": ' + b"9" * 5000 + b"}}",
        b'{"zarr_format": 3, "node_type": "group", "attributes": 3}',
        b'{"zarr_format": 3, "node_type": "group", "attributes": [["format", 2]]}',
        b'{"zarr_format": 3, "node_type": "group", "attributes": {"format": 2}}',
        b"\xff\xfe\x00",
        b"\x00" * 4096,
        layout.group_document({"header": None}),
        layout.group_document({"header": {"format": 2}}),
        layout.group_document({"h2t_format": 99}),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_documents_of_anything_are_one_error(small, file, content):
    (small / file).write_bytes(content)
    assert file in named(small, "x")
    one_error_each(small)


@pytest.mark.parametrize(
    "content",
    [
        (2**32 - 1).to_bytes(4, "little"),
        (40).to_bytes(4, "little") + (2**32 - 1).to_bytes(4, "little") * 40,
        (40).to_bytes(4, "little") + ((1).to_bytes(4, "little") + b"\xff") * 40,
        (40).to_bytes(4, "little") + ((1).to_bytes(4, "little") + b"i") * 41,
        b"",
        b"abc",
    ],
)
@pytest.mark.parametrize("path", ["sample_ids/c/0", "failures/c/1"])
def test_a_chunk_of_something_else_in_place_of_strings_is_damage(small, path, content):
    crc = google_crc32c.value(content)
    (small / "x" / path).parent.mkdir(parents=True, exist_ok=True)
    (small / "x" / path).write_bytes(content + crc.to_bytes(4, "little"))
    assert named(small, "x") == {f"x/{path}"}
    one_error_each(small)


@pytest.mark.parametrize("name", ["nowhere", "x/train", "x/features", "group/nowhere", "group"])
def test_what_is_no_extraction_is_neither_verified_nor_repaired(tmp_path, images, labels, name):
    for there in ("x", "group/features"):
        extract((images, labels), model=MODEL, store=tmp_path / "s", name=there)
    before = tree(tmp_path / "s")
    with pytest.raises(StoreError, match=f"has no extraction '{name}'"):
        list(verify(FeatureStore(tmp_path / "s"), name))
    with pytest.raises(StoreError, match=f"has no extraction '{name}'"):
        repair(tmp_path / "s", name)
    assert tree(tmp_path / "s") == before
    assert not list(verify(FeatureStore(tmp_path / "s"), "group/features"))
