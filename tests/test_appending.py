"""Extending an extraction by images that its source has got since."""

import logging
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from conftest import MODELS, state_of
from PIL import Image

from h2t_store import cli, extract, open_features, repair
from h2t_store.engines import plan
from h2t_store.errors import IncompleteError, StoppedError, StoreError
from h2t_store.images.source import Source
from h2t_store.storage.store import Extraction, FeatureStore
from h2t_store.storage.verify import verify

MODEL = f"{MODELS}:small_input"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(plan, "_ROWS_OF_FEW", 16)


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
    return dict(model=MODEL, store=tmp_path / "s", name="x", workers=0, batch_size=5)


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


def test_a_matrix_from_before_says_that_it_was_replaced(tmp_path, folder, grow):
    before = extract(folder, **common(tmp_path))
    np.asarray(before)
    grow("a/zz.png")
    extract(folder, append=True, **common(tmp_path))
    for read in (np.asarray, lambda X: X.y, lambda X: X.layer_norms()):
        with pytest.raises(StoreError, match="x was replaced by another extraction since this matrix was opened"):
            read(before)


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
def test_until_it_is_done_the_earlier_extraction_stays_and_an_interrupted_one_continues(
    tmp_path, folder, grow, monkeypatch, decoded, crash_at
):
    extract(folder, **common(tmp_path))
    grow(*(f"b/new{i:02}.png" for i in range(30)))
    write, calls = Extraction.write_block, []

    def crashing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Extraction, "write_block", crashing)
    with pytest.raises(KeyboardInterrupt):
        extract(folder, append=True, **common(tmp_path))
    monkeypatch.setattr(Extraction, "write_block", write)
    assert open_features(tmp_path / "s", "x").shape[0] == 40
    assert FeatureStore(tmp_path / "s").names() == ["x"]
    decoded.clear()
    after = extract(folder, append=True, **common(tmp_path))
    assert after.shape[0] == 70
    assert not {name for name in decoded if not name.startswith("b/new")}
    assert len(decoded) < 30 or crash_at == 1
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []


@pytest.fixture
def between(tmp_path, folder, grow, monkeypatch):
    """A store that a crash left between the halves of a replacement."""
    extract(folder, **common(tmp_path))
    grow("b/x.png")
    real = Path.rename

    def rename(self, target):
        if self.name.startswith(".append-"):
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            extract(folder, append=True, **common(tmp_path))
    assert not (tmp_path / "s/x").exists()
    return tmp_path / "s"


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


def test_what_reads_writes_nothing_after_a_crash_amid_a_replacement_either(between, folder, tmp_path, capsys):
    (between / ".append-.." / "features").mkdir(parents=True)
    before = state_of(between)
    reading(between, folder, tmp_path)
    assert "x" in capsys.readouterr().out
    assert open_features(between, "x").shape[0] == 41
    assert state_of(between) == before


def test_what_reads_writes_nothing_amid_an_extension(tmp_path, folder, grow, monkeypatch):
    extract(folder, **common(tmp_path))
    grow(*(f"b/new{i:02}.png" for i in range(30)))
    with pytest.raises(StoppedError):
        extract(folder, append=True, stopped=lambda: True, **common(tmp_path))
    before = state_of(tmp_path / "s")
    assert open_features(tmp_path / "s", "x").shape[0] == 40
    assert run(cli.h2t_main, "ls", tmp_path / "s") == run(cli.h2t_main, "verify", tmp_path / "s") == 0
    assert state_of(tmp_path / "s") == before


@pytest.mark.parametrize("writer", ["extract", "append", "repair", "rm"])
def test_who_writes_next_finishes_a_replacement_that_a_crash_cut_off(between, folder, grow, tmp_path, writer):
    X = open_features(between, "x")
    if writer == "rm":
        assert run(cli.h2t_main, "rm", between, "x", "--yes") == 0
        assert FeatureStore(between).names() == []
        assert not [path for path in between.iterdir() if path.name.startswith(".append-")]
        return
    if writer == "repair":
        assert repair(between, "x") == []
    else:
        grow("c/y.png")
        arguments = dict(append=writer == "append", **common(tmp_path))
        if writer == "extract":
            with pytest.raises(StoreError, match="the data has 1 more images now: add them with --append"):
                extract(folder, **arguments)
        else:
            extract(folder, **arguments)
    assert (between / "x").exists()
    assert not (between / ".append-x").exists()
    assert open_features(between, "x").shape[0] == 41 + (writer == "append")
    assert list(verify(FeatureStore(between), "x")) == []
    with pytest.raises(StoreError, match="was replaced by another extraction since this matrix was opened"):
        np.asarray(X)


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
    settings = dict(model=tiny_models.Functional().eval(), store=tmp_path / "s", name="x")
    before = np.asarray(extract((images[:30], None), **settings))
    after = np.asarray(extract((images, None), append=True, **settings))
    np.testing.assert_array_equal(after[:30], before)
    assert after.shape[0] == 40
