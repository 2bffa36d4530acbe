"""Extending an extraction by images that its source has got since."""

import logging
import pickle
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from conftest import MODELS, state_of
from PIL import Image

from h2t_store import cli, extract, open_features
from h2t_store.errors import DamagedError, DataError, IncompleteError, StoppedError, StoreError
from h2t_store.images.source import Source
from h2t_store.repairing import repair
from h2t_store.storage.store import Extraction, FeatureStore
from h2t_store.storage.verify import verify

MODEL = f"{MODELS}:small_input"


@pytest.fixture
def grow(folder, images):
    """Add images to the folder: one before all others, one in a new class."""

    def grow(*names: str) -> None:
        for i, name in enumerate(names):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(images[i][::-1]).save(folder / name)

    return grow


@pytest.fixture
def decoded(monkeypatch):
    """Identifiers of the images that were read."""
    seen, read = [], Source.picture

    def picture(self, row):
        seen.append(str(self.sample_ids[row]))
        return read(self, row)

    monkeypatch.setattr(Source, "picture", picture)
    return seen


def common(tmp_path):
    return dict(model=MODEL, store=tmp_path / "s", name="x", workers=0, batch_size=5, rows_per_block=16)


def test_only_new_images_are_read_and_old_rows_keep_their_values(tmp_path, folder, grow, decoded):
    before = extract(folder, **common(tmp_path))
    old, old_ids, old_y = np.asarray(before), before.sample_ids.tolist(), before.y
    new = ["a/000.png", "a/zz.png", "zebra/1.png", "aaa/1.png"]
    grow(*new)
    decoded.clear()
    after = extract(folder, append=True, **common(tmp_path))
    assert sorted(decoded) == sorted(new)
    assert after.sample_ids.tolist() == old_ids + sorted(new)
    assert after.classes == ("a", "b", "c", "d", "aaa", "zebra")
    np.testing.assert_array_equal(after.y[:40], old_y)
    assert after.y[40:].tolist() == [name.split("/")[0] for name in sorted(new)]
    np.testing.assert_array_equal(np.asarray(after)[:40], old)
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []
    fresh = extract(folder, **(common(tmp_path) | dict(name="fresh")))
    order = [fresh.sample_ids.tolist().index(name) for name in after.sample_ids]
    np.testing.assert_allclose(np.asarray(after), np.asarray(fresh)[order], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(after.layer_norms(), fresh.layer_norms()[order], rtol=2e-3, atol=1e-4)


def test_a_matrix_from_before_reads_its_rows_or_says_that_there_are_more_now(tmp_path, folder, grow):
    extract(folder, **common(tmp_path))
    read, unread = (open_features(tmp_path / "s", "x") for _ in range(2))
    known = [np.asarray(read), read.y, read.layer_norms(), read.sample_ids]
    copy = pickle.dumps(read)
    grow("a/zz.png")
    extract(folder, append=True, **common(tmp_path))
    for now, before in zip([np.asarray(read), read.y, read.layer_norms(), read.sample_ids], known, strict=True):
        np.testing.assert_array_equal(now, before)
    for matrix in (unread, pickle.loads(copy)):
        with pytest.raises(StoreError, match="x was extended or replaced since this matrix was opened"):
            np.asarray(matrix)


def test_nothing_is_computed_where_nothing_is_new_or_all_is_appended(tmp_path, folder, grow, decoded):
    extract(folder, **common(tmp_path))
    for _ in range(2):
        decoded.clear()
        extract(folder, append=True, **common(tmp_path))
        extract(folder, **common(tmp_path))
        assert decoded == []
        grow("a/one more.png")
        extract(folder, append=True, **common(tmp_path))


def test_several_appendices_and_a_recomputed_block_give_the_same_bits(tmp_path, folder, grow):
    extract(folder, **common(tmp_path))
    grow("b/x.png", "b/y.png")
    extract(folder, append=True, **common(tmp_path))
    grow("a/x.png", "c/y.png", "d/z.png")
    matrix = extract(folder, append=True, **common(tmp_path))
    values = np.asarray(matrix)
    extraction = FeatureStore(tmp_path / "s").open("x")
    assert extraction.header.segments == (40, 42)
    extraction.reopen([2])
    np.testing.assert_array_equal(np.asarray(extract(folder, **common(tmp_path))), values)


def test_without_append_grown_data_is_refused_with_advice(tmp_path, folder, grow):
    extract(folder, **common(tmp_path))
    grow("a/x.png")
    with pytest.raises(StoreError, match="the data has 1 more images now: add them with --append"):
        extract(folder, **common(tmp_path))
    assert open_features(tmp_path / "s", "x").shape[0] == 40


@pytest.mark.parametrize("change", ["content", "removal", "model", "batch"])
def test_what_changed_besides_is_refused(tmp_path, folder, grow, change):
    extract(folder, **common(tmp_path))
    grow("a/x.png")
    settings = common(tmp_path)
    if change == "content":
        Image.new("RGB", (8, 8)).save(folder / "b/01.png")
    elif change == "removal":
        (folder / "b/01.png").unlink()
    elif change == "model":
        settings["seed"] = 1
    else:
        settings["batch_size"] = 7
    with pytest.raises(ValueError, match=r"made from something else|no longer there|was begun in another environment"):
        extract(folder, append=True, **settings)
    assert open_features(tmp_path / "s", "x").shape[0] == 40


def test_append_needs_something_to_extend(tmp_path, folder):
    with pytest.raises(StoreError, match="no extraction 'x' to append to"):
        extract(folder, append=True, **common(tmp_path))


@pytest.mark.parametrize("crash_at", [1, 2])
@pytest.mark.parametrize("again", ["extract", "append"])
def test_an_interrupted_extension_continues_without_computing_anything_twice(
    tmp_path, folder, grow, monkeypatch, decoded, crash_at, again
):
    old = np.asarray(extract(folder, **common(tmp_path)))
    grow(*(f"b/new{i:02}.png" for i in range(30)))
    write, calls = Extraction.write_block, []

    def crashing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) >= crash_at:
            raise KeyboardInterrupt
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Extraction, "write_block", crashing)
    with pytest.raises(KeyboardInterrupt):
        extract(folder, append=True, **common(tmp_path))
    monkeypatch.setattr(Extraction, "write_block", write)
    with pytest.raises(IncompleteError, match=f"{crash_at + 1} of 5 row blocks"):
        open_features(tmp_path / "s", "x")
    assert FeatureStore(tmp_path / "s").names() == ["x"]
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []
    decoded.clear()
    after = extract(folder, append=again == "append", **common(tmp_path))
    np.testing.assert_array_equal(np.asarray(after)[:40], old)
    assert len(after) == 70
    assert len(decoded) == (30 if crash_at == 1 else 22)
    assert not {name for name in decoded if not name.startswith("b/new")}
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []


@pytest.mark.parametrize("n_new", [3, 30])
def test_an_extension_with_a_broken_picture_can_be_made_without_it(tmp_path, folder, grow, decoded, n_new):
    old = np.asarray(extract(folder, **common(tmp_path)))
    grow(*(f"b/new{i:02}.png" for i in range(n_new)))
    broken = folder / f"b/new{n_new - 1:02}.png"
    broken.write_text("not an image")
    with pytest.raises(DataError, match="not an image"):
        extract(folder, append=True, **common(tmp_path))
    broken.unlink()
    decoded.clear()
    after = extract(folder, append=True, **common(tmp_path))
    assert len(after) == 39 + n_new
    assert not {name for name in decoded if not name.startswith("b/new") and name < "b/33.png"}
    np.testing.assert_array_equal(np.asarray(after)[:40], old)
    assert after.sample_ids[40:].tolist() == [f"b/new{i:02}.png" for i in range(n_new - 1)]
    store = FeatureStore(tmp_path / "s")
    assert store.open("x").header.segments == (40,)
    assert list(verify(store, "x")) == []
    fresh = np.asarray(extract(folder, **(common(tmp_path) | dict(name="fresh"))))
    order = [sorted(after.sample_ids.tolist()).index(name) for name in after.sample_ids]
    np.testing.assert_allclose(np.asarray(after), fresh[order], rtol=2e-3, atol=1e-4)


def test_an_extension_that_is_given_up_leaves_the_earlier_rows(tmp_path, folder, grow):
    old = np.asarray(extract(folder, **common(tmp_path)))
    grow("b/x.png")
    (folder / "b/x.png").write_text("not an image")
    with pytest.raises(DataError, match="not an image"):
        extract(folder, append=True, **common(tmp_path))
    (folder / "b/x.png").unlink()
    after = extract(folder, append=True, **common(tmp_path))
    np.testing.assert_array_equal(np.asarray(after), old)
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []


def test_damage_of_the_block_that_grows_is_not_sealed(tmp_path, folder, grow):
    extract(folder, **common(tmp_path))
    grow("b/x.png")
    norms = tmp_path / "s/x/layer_norms/c"
    shutil.copyfile(norms / "0/0", norms / "2/0")
    after = extract(folder, append=True, **common(tmp_path))
    wide = [np.asarray(after.select_layers(layer.name)) for layer in after.layers]
    expected = np.stack([np.linalg.norm(values, axis=1) for values in wide], axis=1)
    np.testing.assert_allclose(after.layer_norms(), expected, rtol=1e-3)
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []


@pytest.mark.parametrize("restored", ["checksums", "*"], ids=["record", "row block"])
def test_a_row_block_from_before_an_extension_is_noticed(tmp_path, folder, grow, restored):
    extract(folder, **common(tmp_path))
    shutil.copytree(tmp_path / "s/x", tmp_path / "backup")
    grow("b/x.png", "b/y.png")
    values = np.asarray(extract(folder, append=True, **common(tmp_path)))
    for file in (tmp_path / "backup").glob(f"{restored}/**/c/2/0"):
        shutil.copyfile(file, tmp_path / "s/x" / file.relative_to(tmp_path / "backup"))
    matrix = open_features(tmp_path / "s", "x")
    with pytest.raises(DamagedError, match="checksums/c/2/0 is damaged: it is of 8 rows, not 10"):
        np.asarray(matrix[40:])
    assert [damage.path for damage in verify(FeatureStore(tmp_path / "s"), "x")] == ["x/checksums/c/2/0"]
    repair(tmp_path / "s", "x", workers=0)
    np.testing.assert_array_equal(np.asarray(open_features(tmp_path / "s", "x")), values)


def run(main, *args) -> int:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["h2t", *map(str, args)])
        for module, name in ((signal, "signal"), (logging, "basicConfig"), (warnings, "simplefilter")):
            patch.setattr(module, name, lambda *_, **__: None)
        with pytest.raises(SystemExit) as stop:
            main()
    return stop.value.code


def reading(store: Path, folder: Path, out: Path) -> None:
    """Everything that only reads."""
    for command in ("ls", "verify"):
        assert run(cli.h2t_main, command, store) == 0
    for command in ("info", "verify"):
        assert run(cli.h2t_main, command, store, "x") == 0
    assert run(cli.h2t_main, "info", store, "y") == 1
    assert run(cli.h2t_main, "export", store, "x", out / "x.npy") == 0
    X = open_features(store, "x")
    assert np.isfinite(np.asarray(X)).all()
    assert len(X.sample_ids) == len(X.y) == len(X)
    assert X.layer_norms().shape[0] == len(X)
    assert X.failures == []
    assert FeatureStore(store).names() == ["x"]
    extract(folder, **(common(store.parent)))  # which is complete


def test_what_reads_writes_nothing(tmp_path, folder):
    extract(folder, **common(tmp_path))
    before = state_of(tmp_path / "s")
    reading(tmp_path / "s", folder, tmp_path)
    assert state_of(tmp_path / "s") == before


def test_what_reads_writes_nothing_amid_an_extension(tmp_path, folder, grow, monkeypatch):
    extract(folder, **common(tmp_path))
    grow(*(f"b/new{i:02}.png" for i in range(30)))
    with pytest.raises(StoppedError):
        extract(folder, append=True, stopped=lambda: True, **common(tmp_path))
    before = state_of(tmp_path / "s")
    with pytest.raises(IncompleteError, match="3 of 5 row blocks"):
        open_features(tmp_path / "s", "x")
    assert run(cli.h2t_main, "ls", tmp_path / "s") == run(cli.h2t_main, "verify", tmp_path / "s") == 0
    assert state_of(tmp_path / "s") == before


def test_an_unfinished_extraction_is_finished_before_it_is_extended(tmp_path, folder, grow, monkeypatch):
    monkeypatch.setattr(Extraction, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract(folder, **common(tmp_path))
    monkeypatch.undo()
    with pytest.raises(IncompleteError):
        open_features(tmp_path / "s", "x")
    grow("b/x.png")
    assert extract(folder, append=True, **common(tmp_path)).sample_ids[-1] == "b/x.png"
    assert FeatureStore(tmp_path / "s").open("x").header.segments == (40,)


def test_order_does_not_matter_to_a_second_run(tmp_path, images, folder, monkeypatch):
    """What is stored decides the order of rows, whatever order the source has today."""
    first = extract(folder, **common(tmp_path))
    (tmp_path / "list.txt").write_text("".join(f"{name} {name[0]}\n" for name in reversed(first.sample_ids.tolist())))
    listed = dict(common(tmp_path), name="listed", data_dir=folder)
    extract(tmp_path / "list.txt", **listed)
    (tmp_path / "list.txt").write_text("".join(f"{name} {name[0]}\n" for name in first.sample_ids.tolist()))
    monkeypatch.setattr(Extraction, "write_block", lambda *args, **kwargs: pytest.fail("computed again"))
    again = extract(tmp_path / "list.txt", **listed)
    assert again.sample_ids.tolist() == first.sample_ids.tolist()[::-1]


def test_arrays_are_extended_too(tmp_path, images):
    settings = dict(model=tiny_models.Functional().eval(), store=tmp_path / "s", name="x", rows_per_block=16)
    before = np.asarray(extract((images[:30], None), **settings))
    after = np.asarray(extract((images, None), append=True, **settings))
    np.testing.assert_array_equal(after[:30], before)
    assert after.shape[0] == 40
