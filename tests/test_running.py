"""How batches are run: images that fail, memory that does not suffice, several processes, what is to be expected."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import tiny_models
import torch
import torch.distributed as dist
import zarr
from conftest import MODELS
from PIL import Image
from xxhash import xxh3_128_digest

import h2t_store
from h2t_store import open_features
from h2t_store.engines.loading import load_batch
from h2t_store.engines.local import seconds_per_image
from h2t_store.engines.preparation import prepare
from h2t_store.errors import DataError, H2TError, IncompleteError, ModelError, StoppedError, StoreError
from h2t_store.images import Source
from h2t_store.settings import Settings
from h2t_store.storage.store import FeatureStore
from h2t_store.storage.verify import verify

MODEL = f"{MODELS}:small_input"
extract = partial(h2t_store.extract, rows_per_block=16)  # several row blocks out of few images


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_keep_their_row_and_are_masked(tmp_path, folder, workers):
    (folder / "a/04.png").write_text("no image")
    for name in sorted(path.name for path in (folder / "b").iterdir()):
        (folder / "b" / name).write_bytes((folder / "b" / name).read_bytes()[:60])
    common = dict(model=MODEL, store=tmp_path / "s", workers=workers, batch_size=4)
    with pytest.raises(DataError, match=r"a/04\.png"):
        extract(folder, name="x", **common)
    matrix = extract(folder, name="x", on_error="skip", **common)
    assert matrix.shape[0] == 29
    assert {*dict(matrix.failures)} == {"a/04.png"} | {f"b/{i:02}.png" for i in range(1, 40, 4)}
    assert "not an image" in dict(matrix.failures)["a/04.png"]
    assert not set(matrix.sample_ids) & {*dict(matrix.failures)}
    assert len(matrix.y) == 29
    assert np.isfinite(np.asarray(matrix)).all()
    assert matrix.layer_norms().shape == (29, len(matrix.layers))
    extraction = matrix._extraction
    assert extraction.header.n_samples == 40
    assert sorted(extraction.failures()) == [1, *range(10, 20)]
    good = extract(folder / "c", name="c", **common)
    np.testing.assert_allclose(np.asarray(matrix[matrix.y == "c"]), np.asarray(good), rtol=2e-3, atol=1e-4)
    assert extract(folder, name="x", **common).shape[0] == 29


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_has_the_digest_of_its_file(tmp_path, folder, workers):
    (folder / "a/04.png").write_text("no image")
    matrix = extract(
        folder, model=MODEL, store=tmp_path / "s", name="x", workers=workers, batch_size=4, on_error="skip"
    )
    assert dict(matrix.failures).keys() == {"a/04.png"}
    digests = zarr.open_array(tmp_path / "s/x/digests")[:]
    files = sorted(folder.glob("*/*.png"))
    assert len(digests) == len(files) == 40
    for file, digest in zip(files, digests, strict=True):
        expected = bytes(16) if file.name == "04.png" else xxh3_128_digest(file.read_bytes())
        assert digest.tobytes() == expected


def test_an_image_that_cannot_be_prepared_is_one_that_cannot_be_read(tmp_path, folder):
    def fails(image):
        raise MemoryError("no room")

    batch = load_batch(prepare(Settings(data=folder, model=MODEL)).source, fails, [1])
    assert batch.failed == {0: f"{folder}/a/04.png: 8 x 8 pixels cannot be prepared: no room"}
    assert len(extract(folder, model=MODEL, store=tmp_path / "s", name="x", workers=0)) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_lost_or_guessed_in_pictures_is_said_once_with_a_count_and_an_example(
    tmp_path, folder, caplog, workers
):
    for i in (3, 7, 39):
        Image.new("RGBA", (8, 8), (i, 0, 0, 0)).save(folder / "d" / f"{i:02}.png")
    Image.new("LA", (8, 8), (9, 0)).save(folder / "b" / "01.png")
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(folder / "a" / "00.png")
    extract(folder, model=MODEL, store=tmp_path / "s", name="x", workers=workers, batch_size=4)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "1 images are 16-bit grey without a value above 4095: taken for 12-bit (if that is wrong, convert to 8 bits): "
        f"such as {folder}/a/00.png",
        "4 images are transparent in part: transparency is dropped and the colours under it are used, as in timm: "
        f"such as {folder}/b/01.png",
    ]


def test_it_is_said_also_of_an_extraction_that_fails(tmp_path, folder, caplog):
    Image.new("LA", (8, 8), (9, 0)).save(folder / "a" / "00.png")
    (folder / "d" / "39.png").write_text("no image")
    with pytest.raises(DataError, match="not an image"):
        extract(folder, model=MODEL, store=tmp_path / "s", name="x", workers=0)
    assert "1 images are transparent in part" in caplog.text


def test_a_picture_that_is_listed_twice_is_skipped_twice(tmp_path, folder):
    (folder / "a/00.png").write_text("no image")
    (folder / "list.txt").write_text("a/00.png 0\nb/01.png 1\na/00.png 0\n")
    matrix = extract(folder / "list.txt", model=MODEL, store=tmp_path / "s", name="x", workers=0, on_error="skip")
    assert matrix.shape[0] == 1
    assert [sample for sample, _ in matrix.failures] == ["a/00.png", "a/00.png"]


def test_an_extraction_without_any_image_is_an_error(tmp_path, folder):
    for file in folder.glob("*/*"):
        file.write_text("no image")
    with pytest.raises(DataError, match=r"no image could be read; the first: .*a/00\.png"):
        extract(folder, model=MODEL, store=tmp_path / "s", name="x", workers=0, on_error="skip")
    with pytest.raises(IncompleteError):
        open_features(tmp_path / "s", "x")


def test_a_worker_that_is_killed_is_not_blamed_on_the_network_or_a_picture(tmp_path, images, monkeypatch):
    real = Source.picture

    def picture(self, row):
        if row == 39:  # as the system does with one that is too large for the memory
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, row)

    monkeypatch.setattr(Source, "picture", picture)
    with pytest.raises(DataError, match=r"^a process that decodes images failed: .*fewer workers"):
        extract((images, None), model=MODEL, store=tmp_path / "s", name="x", batch_size=4, workers=1)
    committed = FeatureStore(tmp_path / "s").open("x").committed()
    assert committed[0]
    assert not committed[2]


def test_a_batch_size_left_open_is_the_one_it_was_begun_with(tmp_path, images):
    common = dict(model=MODEL, store=tmp_path / "s", name="x")
    with pytest.raises(StoppedError):
        extract((images, None), stopped=lambda: True, batch_size=5, **common)
    matrix = extract((images, None), **common)
    assert matrix.provenance["environment"]["arguments"]["batch_size"] == 5


def test_on_error_is_checked(tmp_path, folder):
    with pytest.raises(H2TError, match="on_error 'ignore': accepted are raise and skip"):
        extract(folder, model=MODEL, store=tmp_path / "s", name="x", on_error="ignore")


def test_batches_are_halved_until_memory_suffices(tmp_path, images, caplog):
    torch.manual_seed(0)
    model = tiny_models.Greedy(5)
    matrix = extract((images, None), model=model, store=tmp_path / "s", name="x", batch_size=16)
    assert "out of memory with 16 images at once: going on with 8" in caplog.text
    assert "out of memory with 8 images at once: going on with 4" in caplog.text
    assert [size for size in model.sizes if size > 5] == [16, 8]
    model.most = 16
    whole = extract((images, None), model=model, store=tmp_path / "s", name="y", batch_size=16)
    np.testing.assert_allclose(np.asarray(matrix), np.asarray(whole), rtol=2e-3, atol=1e-4)


def test_the_batch_that_memory_sufficed_for_is_on_record_and_is_gone_on_with(tmp_path, folder, images):
    model, store = tiny_models.Greedy(16), tmp_path / "s"
    common = dict(model=model, img_size=8, store=store, name="x", batch_size=16, workers=0)

    def used() -> tuple[int, int]:
        environment = open_features(store, "x").provenance["environment"]
        return environment["arguments"]["batch_size"], environment["batch_size_used"]

    with pytest.raises(StoppedError):
        extract(folder, stopped=lambda: model.memory(9), **common)  # after the first block
    with pytest.raises(StoppedError):
        extract(folder, stopped=lambda: model.memory(16), **common)  # after the second, with 8 images at once
    model.sizes.clear()
    extract(folder, **common)
    assert set(model.sizes) <= {1, 2, 8}
    assert used() == (16, 8)
    FeatureStore(store).open("x").reopen([0])
    model.memory(4)
    extract(folder, **common)
    assert used() == (16, 4)
    model.memory(16)
    for i in range(6):
        Image.fromarray(images[i][::-1]).save(folder / f"a/new{i}.png")
    model.sizes.clear()
    extract(folder, append=True, **common)
    assert max(model.sizes) == 4
    assert used() == (16, 4)
    assert list(verify(FeatureStore(store), "x")) == []
    extract(folder, **(common | dict(name="y")))
    assert open_features(store, "y").provenance["environment"]["batch_size_used"] == 16


def test_an_image_that_does_not_fit_alone_is_an_error(tmp_path, images):
    model = tiny_models.Greedy(2)
    common = dict(model=model, store=tmp_path / "s", name="x", batch_size=4)
    with pytest.raises(ModelError, match=r"the network failed on a batch of .*out of memory"):
        extract((images, None), progress=lambda *_: setattr(model, "most", 0), **common)


def test_stopping_finishes_the_block_in_hand(tmp_path, images):
    common = dict(model=MODEL, store=tmp_path / "s", name="x", batch_size=4)
    seen = []
    with pytest.raises(StoppedError):
        extract((images, None), stopped=lambda: True, progress=lambda *step: seen.append(step[0]), **common)
    assert seen[-1] == 16
    matrix = extract((images, None), **common)
    whole = extract((images, None), **(common | dict(name="whole")))
    np.testing.assert_array_equal(np.asarray(matrix), np.asarray(whole))


def test_torchrun_shares_the_blocks_and_gives_the_same_bits(tmp_path, folder):
    args = [str(folder), "--model", MODEL, "--store", str(tmp_path / "s"), "--device", "cpu", "-j", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "h2t_store", *args, "--rows-per-block", "16", "--name", "shared", "--engine", "torchrun"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 images") == 1
    assert "(40 computed in" in done.stdout
    alone = extract(folder, model=MODEL, store=tmp_path / "s", name="alone", workers=0, device="cpu")
    shared = open_features(tmp_path / "s", "shared")
    assert shared.sample_ids.tolist() == alone.sample_ids.tolist()
    np.testing.assert_allclose(np.asarray(shared), np.asarray(alone), rtol=2e-3, atol=1e-4)


INHERITED = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def test_what_a_training_script_left_in_the_environment_starts_nothing(tmp_path, images, monkeypatch):
    for name, value in INHERITED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", None)
    assert len(extract((images, None), model=MODEL, store=tmp_path / "s", name="x")) == 40


@pytest.fixture
def group():
    """A process group of the user's own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_process_group_of_the_users_own_is_joined_only_when_asked(tmp_path, images, monkeypatch, group):
    met = []
    monkeypatch.setattr(dist, "new_group", lambda new=dist.new_group, **options: met.append(new(**options)) or met[-1])
    extract((images, None), model=MODEL, store=tmp_path / "s", name="x")
    assert not met
    extract((images, None), model=MODEL, store=tmp_path / "s", name="y", engine="torchrun")
    assert len(met) == 1
    assert dist.is_initialized()
    with pytest.raises(StoreError, match="is in the memory of one process"):
        extract((images, None), model=MODEL, store="memory://ranks", name="y", engine="torchrun")


def test_torchrun_as_the_engine_without_torchrun_is_one_line(tmp_path, images, monkeypatch):
    for name in INHERITED:
        monkeypatch.delenv(name, raising=False)
    common = dict(model=MODEL, store=tmp_path / "s", name="x", engine="torchrun")
    with pytest.raises(H2TError, match=r"torchrun did not start this process \(RANK, WORLD_SIZE, .*: run torchrun"):
        extract((images, None), **common)
    for name, value in (INHERITED | {"RANK": "many"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(H2TError, match="engine 'torchrun': the other processes cannot be joined: "):
        extract((images, None), **common)
    assert not (tmp_path / "s").exists()


def test_several_target_sizes_are_one_pass_with_nothing_twice(tmp_path, images):
    common = dict(model=MODEL, store=tmp_path / "s", batch_size=8)
    both = extract((images, None), name="both", target_size=[4, 64], **common)
    for size in (4, 64):
        alone = extract((images, None), name=f"t{size}", target_size=size, **common)
        np.testing.assert_array_equal(np.asarray(both.select_target_size(size)), np.asarray(alone))
    names = [layer.name for layer in both.layers]
    assert len(set(names)) == len(names)
    assert "head" in names
    assert {"layers.0@4", "layers.0@64"} <= set(names)
    with pytest.raises(H2TError, match="select_target_size: 5; accepted are 4, 64"):
        both.select_target_size(5)


def test_what_is_to_be_expected_is_what_comes(tmp_path, images):
    job = prepare(Settings(data=(images, None), model=MODEL, target_size=[4, 100], rows_per_block=16))
    matrix = extract((images, None), model=MODEL, target_size=[4, 100], store=tmp_path / "s", name="x")
    stored = sum(path.stat().st_size for path in (tmp_path / "s/x/features").rglob("c/*/*"))
    assert sum(map(job.layer_bytes, job.layers)) == stored
    assert job.layers == matrix.layers
    assert seconds_per_image(job) > 0


def test_provenance_says_how_to_do_it_again(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    first = extract(folder.name, model=MODEL, store="s", name="x", target_size=9, taps="blocks", dtype="float32")
    arguments = first.provenance["environment"]["arguments"]
    monkeypatch.chdir("/")
    again = extract(arguments.pop("data"), store=tmp_path / "t", name="x", **arguments)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(first))
    assert json.loads(json.dumps(first.provenance)) == first.provenance
    assert again.provenance["inputs"] == first.provenance["inputs"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_finds_a_batch_size_and_survives_a_small_memory(tmp_path, images):
    torch.cuda.set_per_process_memory_fraction(0.2)
    matrix = extract((images, None), model=MODEL, store=tmp_path / "s", name="x", device="cuda")
    size = matrix.provenance["environment"]["arguments"]["batch_size"]
    assert size >= 1
    assert size & (size - 1) == 0


@pytest.fixture(params=["of a pool", "of joblib"])
def process_without_children(request, monkeypatch):
    """Have this process be one that must not start others, as multiprocessing and joblib make them."""
    if request.param == "of a pool":
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
        yield
        return
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("loky", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_a_process_of_a_pool_decodes_by_itself(process_without_children, tmp_path, folder):
    common = dict(model=MODEL, store=tmp_path / "s", name="x")
    with pytest.raises(H2TError, match="workers 2: this is a process of a pool, which cannot start others; accepted"):
        extract(folder, workers=2, **common)
    assert not (tmp_path / "s").exists()
    assert extract(folder, **common).shape[0] == 40


def test_a_process_that_is_being_started_does_not_start_the_job_again(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(H2TError, match=r"runs the whole script.*below: if __name__ == '__main__':"):
        extract(folder, model=MODEL, store=tmp_path / "s", name="x")


def test_a_script_without_a_main_guard_is_told_of_it(tmp_path, folder):
    script = tmp_path / "script.py"
    common = dict(model=MODEL, store=str(tmp_path / "s"), name="x", workers=1)
    script.write_text(f"""
import multiprocessing
from h2t_store import extract
multiprocessing.set_start_method("spawn", force=True)
extract({str(folder)!r}, **{common!r})
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("h2t_store.errors.")]
    assert len(said) == 2  # the process that was started, and the one that started it
    assert all("put what it is to do once below: if __name__ == '__main__':" in line for line in said)
    assert not any("memory" in line for line in said)


def test_the_start_method_can_still_be_chosen_afterwards(tmp_path, images):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(None, force=True)
    try:
        extract((images, None), model=MODEL, store=tmp_path / "s", name="x")
        assert multiprocessing.get_start_method(allow_none=True) is None
    finally:
        multiprocessing.set_start_method(before, force=True)
