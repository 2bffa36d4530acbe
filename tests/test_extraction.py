import contextlib
import os
from functools import partial

import numpy as np
import pytest
import tiny_models
import torch
from conftest import MODELS
from PIL import Image
from torch import nn

import h2t_store
from h2t_store import open_features
from h2t_store.engines import plan, preparation
from h2t_store.errors import DataError, H2TError, IncompleteError, ModelError, StoppedError, StoreError, TapError
from h2t_store.images import Source
from h2t_store.storage import chunks
from h2t_store.storage.store import Extraction

MODEL = f"{MODELS}:small_input"
extract = partial(h2t_store.extract, rows_per_block=16)  # several row blocks out of few images


def change(path, content: bytes) -> None:
    """Overwrite a file in place, later as far as the file system can tell."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@torch.no_grad()
def test_rows_are_the_pooled_activations_of_their_images(tmp_path, images, labels):
    matrix = extract((images, labels), model=MODEL, store=tmp_path / "s", name="x", target_size=4, batch_size=7)
    torch.manual_seed(0)
    model = tiny_models.Functional().eval()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    stem = torch.relu(model.stem(x))
    read = np.asarray(matrix)
    np.testing.assert_allclose(read[:, :4], stem.mean((2, 3)), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(read[:, -5:], model(x), rtol=2e-3, atol=1e-4)
    assert matrix.layers[0].name == "layers.0.conv1:in"
    assert matrix.layers[0].shape == (4, 8, 8)
    np.testing.assert_array_equal(matrix.y, labels)
    assert matrix.sample_ids[3] == "array/3"
    norms = [np.linalg.norm(read[:, layer.start : layer.stop], axis=1) for layer in matrix.layers]
    np.testing.assert_allclose(matrix.layer_norms(), np.stack(norms, axis=1), rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_and_arrays_of_the_same_images_give_the_same_features(tmp_path, folder, images, labels, workers):
    common = dict(model=MODEL, store=tmp_path / "s", dtype="float32")
    arrays = extract((images, labels), name="arrays", **common)
    files = extract(folder, name="files", workers=workers, **common)
    assert files.sample_ids[0] == "a/00.png"
    order = [int(str(name)[2:4]) for name in files.sample_ids]
    np.testing.assert_allclose(np.asarray(files), np.asarray(arrays)[order], rtol=1e-4, atol=1e-5)
    assert files.y.tolist() == ["abcd"[label] for label in arrays.y[order]]


def test_a_second_call_computes_nothing(tmp_path, folder, monkeypatch, caplog):
    first = np.asarray(extract(folder, model=MODEL, store=tmp_path / "s", name="x"))
    monkeypatch.setattr(Extraction, "write_block", lambda *args, **kwargs: pytest.fail("computed again"))
    with caplog.at_level("INFO", logger="h2t_store"):
        again = extract(folder, model=MODEL, store=tmp_path / "s", name="x")
    np.testing.assert_array_equal(np.asarray(again), first)
    assert "x is complete: nothing to compute" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_a_picture_that_changes_before_it_is_decoded_leaves_no_row(tmp_path, folder, monkeypatch, workers, limit):
    monkeypatch.setattr(Source, "max_digested_bytes", limit)

    def overwrite(done, total, size):
        path = folder / "d" / "39.png"
        change(path, path.read_bytes()[:-1] + b"x")

    common = dict(model=MODEL, store=tmp_path / "s", name="x", workers=workers)
    with pytest.raises(DataError, match=r"d/39\.png: it has changed since the extraction began: extract again"):
        extract(folder, progress=overwrite, **common)
    with pytest.raises(StoreError, match=r"data\.\w+ was"):
        extract(folder, **common)


@pytest.mark.parametrize("finished", [True, False])
def test_beyond_what_is_digested_a_picture_that_changed_in_place_is_noticed(tmp_path, folder, monkeypatch, finished):
    monkeypatch.setattr(Source, "max_digested_bytes", 0)
    common = dict(model=MODEL, store=tmp_path / "s", name="x", workers=0)
    with contextlib.nullcontext() if finished else pytest.raises(StoppedError):
        extract(folder, stopped=lambda: not finished, **common)
    path = folder / "a" / "00.png"
    change(path, path.read_bytes()[:-1] + b"x")
    for append in (False, True):
        with pytest.raises(StoreError, match=r"data\.paths_sizes_and_times_sha256 was"):
            extract(folder, append=append, **common)


def test_features_are_of_the_pictures_the_right_way_up(tmp_path, folder, images):
    upright = extract(folder, model=MODEL, store=tmp_path / "s", name="upright", workers=0)
    for path in folder.rglob("*.png"):
        orientation = 1 + int(path.stem) % 8
        turned = Image.open(path)
        back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions that undo each orientation
        if orientation > 1:
            turned = turned.transpose(Image.Transpose(back[orientation]))
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned.save(path, exif=exif)
    sideways = extract(folder, model=MODEL, store=tmp_path / "s", name="sideways", workers=0)
    np.testing.assert_array_equal(np.asarray(sideways), np.asarray(upright))
    assert sideways.provenance["inputs"]["preprocessing"]["orientation"] == "exif"


def test_what_was_made_by_other_rules_of_decoding_opens_and_is_not_continued(tmp_path, folder, monkeypatch):
    common = dict(model=MODEL, store=tmp_path / "s", name="x", workers=0)
    with monkeypatch.context() as before:
        before.setattr(preparation, "DECODING", {})
        extract(folder, **common)
    assert open_features(tmp_path / "s", "x").shape[0] == 40
    with pytest.raises(StoreError, match=r"preprocessing\.orientation was None, now exif"):
        extract(folder, **common)


@pytest.mark.parametrize("crash_at", [1, 2, 3])
@pytest.mark.parametrize("when", ["before the block", "before the commit"])
def test_an_interrupted_extraction_continues_to_the_same_bits(tmp_path, images, labels, monkeypatch, crash_at, when):
    common = dict(model=MODEL, store=tmp_path / "s", batch_size=5)
    whole = np.asarray(extract((images, labels), name="whole", **common))
    write, calls = Extraction.write_block, []

    def crashing(self, block, *rest, **others):
        calls.append(block)
        if len(calls) < crash_at:
            return write(self, block, *rest, **others)
        if when == "before the commit":
            path = f"features/{self.header.layers[0].name}"
            sevens = np.full((16, self.header.layers[0].width), 7, np.float16)
            chunks.write_chunk(self.chunk_file(path, block), sevens, self.specs[path])
        raise KeyboardInterrupt

    monkeypatch.setattr(Extraction, "write_block", crashing)
    with pytest.raises(KeyboardInterrupt):
        extract((images, labels), name="x", **common)
    with pytest.raises(IncompleteError, match=f"{crash_at - 1} of 3 row blocks"):
        open_features(tmp_path / "s", "x")
    written, seen = [], []
    monkeypatch.setattr(
        Extraction,
        "write_block",
        lambda self, block, *rest, **others: (written.append(block), write(self, block, *rest, **others)),
    )
    resumed = extract((images, labels), name="x", progress=lambda done, total, _: seen.append((done, total)), **common)
    assert written == list(range(crash_at - 1, 3))
    assert seen[0] == ((crash_at - 1) * 16, 40)
    assert seen[-1] == (40, 40)
    np.testing.assert_array_equal(np.asarray(resumed), whole)


def test_a_crash_after_the_last_block_leaves_only_the_finish(tmp_path, images, monkeypatch):
    finish = Extraction.finish
    monkeypatch.setattr(Extraction, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract((images, None), model=MODEL, store=tmp_path / "s", name="x")
    with pytest.raises(IncompleteError, match="3 of 3"):
        open_features(tmp_path / "s", "x")
    monkeypatch.setattr(Extraction, "finish", finish)
    monkeypatch.setattr(Extraction, "write_block", lambda *args, **kwargs: pytest.fail("computed again"))
    assert extract((images, None), model=MODEL, store=tmp_path / "s", name="x").shape[0] == 40


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (dict(target_size=9), "target_size was \\[512\\], now \\[9\\]"),
        (dict(dtype="float32"), "dtype was float16, now float32"),
        (dict(taps="blocks"), "taps was"),
        (dict(seed=1), "weights_sha256 was"),
        (dict(img_size=16), "preprocessing.input_size was"),
        (dict(amp=True), "amp was None, now bfloat16"),
    ],
)
def test_the_same_name_for_something_else_is_refused(tmp_path, images, labels, change, key):
    extract((images, labels), model=MODEL, store=tmp_path / "s", name="x")
    with pytest.raises(StoreError, match=key):
        extract((images, labels), model=MODEL, store=tmp_path / "s", name="x", **change)
    with pytest.raises(StoreError, match=r"data\.\w+ was"):
        extract((images[::-1], labels), model=MODEL, store=tmp_path / "s", name="x")


def test_a_beginning_without_rows_gives_way(tmp_path, folder):
    (folder / "a" / "00.png").write_text("not an image")
    with pytest.raises(DataError, match="not an image"):
        extract(folder, model=MODEL, store=tmp_path / "s", name="x")
    (folder / "a" / "00.png").unlink()
    assert extract(folder, model=MODEL, store=tmp_path / "s", name="x").shape[0] == 39


def test_extractions_side_by_side_that_do_not_go_together_are_pointed_out(tmp_path, images, caplog):
    common = dict(model=MODEL, store=tmp_path / "s")
    extract((images, ["cat", "ant"] * 20), name="pets/train", **common)
    extract((images, ["cat", "ant"] * 20), name="pets/test", **common)
    extract((images, ["dog", "ant"] * 20), name="other", **common)
    assert caplog.text == ""
    extract((images[:20], ["cat"] * 20), name="pets/few", **common)
    assert caplog.text == ""
    extract((images, [1, 0] * 20), name="pets/numbers", **common)
    assert "the labels of pets/numbers and pets/train are integers in one and names in the other" in caplog.text
    caplog.clear()
    extract((images, ["cat", "ant"] * 20), name="pets/again", seed=1, **common)
    assert "pets/again and pets/test were made by tiny_models.py:small_input with different weights" in caplog.text


def test_another_image_in_its_place_or_other_classes_are_noticed(tmp_path, folder, images):
    common = dict(model=MODEL, store=tmp_path / "s")
    extract(folder, name="x", **common)
    path = folder / "a" / "00.png"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(StoreError, match=r"data\.\w+ was"):
        extract(folder, name="x", **common)
    extract((images, ["cat", "ant"] * 20), name="y", **common)
    with pytest.raises(StoreError, match=r"data\.\w+ was"):
        extract((images, ["dog", "bee"] * 20), name="y", **common)


def test_another_forward_pass_with_the_same_weights_is_noticed(tmp_path, images):
    source = MODELS.read_text()
    model = tmp_path / "net.py"
    model.write_text(source)
    common = dict(model=f"{model}:small_input", store=tmp_path / "s", name="x")
    extract((images, None), **common)
    model.write_text(source.replace("F.relu(self.stem(x))", "F.gelu(self.stem(x))"))
    with pytest.raises(StoreError, match="code_sha256 was"):
        extract((images, None), **common)


def test_what_was_begun_with_another_version_is_not_finished_here(tmp_path, images, monkeypatch):
    common = dict(model=MODEL, store=tmp_path / "s", name="x")
    finish = Extraction.finish
    monkeypatch.setattr(Extraction, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract((images, None), **common)
    monkeypatch.setattr(Extraction, "finish", finish)
    real = preparation.version
    monkeypatch.setattr(preparation, "version", lambda package: "0.0" if package == "torch" else real(package))
    with pytest.raises(StoreError, match=r"was begun in another environment \(torch was .*, now 0\.0\)"):
        extract((images, None), **common)
    monkeypatch.setattr(preparation, "version", real)
    extract((images, None), **common)
    monkeypatch.setattr(preparation, "version", lambda package: "0.0")
    assert extract((images, None), **common).shape[0] == 40


def test_a_network_that_fails_on_a_batch_is_one_clear_error(tmp_path, images):
    class Fragile(tiny_models.Functional):
        def forward(self, x):
            if len(x) > 2:
                raise RuntimeError("only pairs,\nplease")
            return super().forward(x)

    with pytest.raises(
        ModelError, match=r"failed on a batch of \(16, 3, 8, 8\) from image 'array/0': only pairs, please"
    ):
        extract((images, None), model=Fragile(), store=tmp_path / "s", name="x")


def test_an_unreadable_image_stops_the_job_and_what_was_done_stays(tmp_path, folder):
    (folder / "d" / "39.png").write_text("not an image")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"d/39\.png: not an image"):
            extract(folder, model=MODEL, store=tmp_path / "s", name="x", workers=workers)
    with pytest.raises(IncompleteError, match="2 of 3"):
        open_features(tmp_path / "s", "x")
    Image.new("RGB", (8, 8)).save(folder / "d" / "39.png")
    with pytest.raises(StoreError, match=r"data\.\w+ was"):
        extract(folder, model=MODEL, store=tmp_path / "s", name="x")


def test_values_beyond_float16_stop_the_job_and_fit_float32(tmp_path, images):
    model = f"{MODELS}:exploding"
    with pytest.raises(TapError, match=r"tap 'conv': \S+ for image 'array/0' is beyond float16 .*--dtype float32"):
        extract((images, None), model=model, store=tmp_path / "s", name="x")
    matrix = extract((images, None), model=model, store=tmp_path / "s", name="y", dtype="float32")
    assert np.isfinite(np.asarray(matrix)).all()
    assert np.asarray(matrix).max() > 65504


def test_a_network_that_gives_nan_is_named(tmp_path, images):
    model = tiny_models.Functional()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(
        ModelError, match="tap 'head': the network gives values that are not finite for image 'array/0'"
    ):
        extract((images, None), model=model, store=tmp_path / "s", name="x")


def test_modules_are_taken_as_they_are_and_sized_by_the_arrays(tmp_path, images):
    torch.manual_seed(3)
    matrix = extract((images[:, :, :6], None), model=tiny_models.Functional(), store=tmp_path / "s", name="x")
    assert matrix.layers[0].shape == (4, 8, 6)
    assert not matrix.labelled.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(target_size=0), "target_size 0: accepted are whole numbers from 1"),
        (dict(batch_size=-1), "batch_size -1"),
        (dict(workers=-1), "workers -1"),
        (dict(dtype="int8"), "dtype 'int8': accepted are float16 and float32"),
        (dict(device="abacus"), "device 'abacus' cannot be used here"),
        (dict(taps="nope"), "taps: 'nope' matches no module"),
        (dict(taps=" , "), "taps: nothing given"),
        (dict(img_size=-4), "img_size -4: accepted are whole numbers from 1 to 8192"),
        (dict(img_size=10**6), "img_size 1000000"),
        (dict(img_size=16.5), "img_size 16.5"),
        (dict(target_size=True), "target_size True"),
        (dict(seed="a"), "seed 'a'"),
        (dict(name=None), "name None"),
        (dict(name="../x"), "name '../x'"),
        (dict(model="vit_tiny_patch16_224", img_size=9, pretrained=False), "cannot run on images of|cannot be built"),
    ],
)
def test_wrong_arguments_are_named_and_leave_no_extraction(tmp_path, images, wrong, message):
    with pytest.raises(H2TError, match=message):
        extract((images, None), **(dict(model=MODEL, store=tmp_path / "s", name="x") | wrong))
    assert not (tmp_path / "s").exists()


def test_the_size_of_a_block_does_not_grow_with_the_number_of_images():
    assert plan.rows_per_block(10**9, 2 * 20_000) == plan.rows_per_block(10**5, 2 * 20_000)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40, 513, 1062, 10_000])
@pytest.mark.parametrize("row_bytes", [20, 40_000, 10**7, 10**9])
def test_blocks_cover_every_row_once_with_little_padding(n, row_bytes):
    rows = plan.rows_per_block(n, row_bytes)
    assert rows % 16 == 0
    assert rows <= 512
    assert rows == 16 or rows * row_bytes <= 128 << 20
    planned = list(plan.Plan(n, rows))
    assert [row for block in planned for row in range(block.start, block.stop)] == list(range(n))
    assert len(planned) * rows - n < 16 * len(planned)
    for batch_size in (1, 7, 1000):
        batches = list(plan.batches(planned, batch_size))
        assert [row for batch in batches for row in batch] == list(range(n))
        assert all(batch[0] // rows == batch[-1] // rows and len(batch) <= batch_size for batch in batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_features_of_the_cpu(tmp_path, images):
    common = dict(model=MODEL, store=tmp_path / "s", dtype="float32")
    cpu = extract((images, None), name="cpu", device="cpu", **common)
    cuda = extract((images, None), name="cuda", device="cuda", **common)
    np.testing.assert_allclose(np.asarray(cuda), np.asarray(cpu), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", ["attribute", "buffer"])
def test_a_network_that_differs_in_what_is_not_saved_is_refused(tmp_path, images, kind):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            nn.init.ones_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)
            if kind == "buffer":
                self.register_buffer("factor", torch.tensor(factor), persistent=False)
            else:
                self.factor = factor

        def forward(self, x):
            return self.conv(x * self.factor).relu()

    common = dict(store=tmp_path / "s", name="x")
    extract((images, None), model=Scaled(1.0), **common)
    with pytest.raises(StoreError, match="a network that computes something else"):
        extract((images, None), model=Scaled(3.0), **common)
    assert len(extract((images, None), model=Scaled(1.0), **common)) == 40
