"""Extraction on CUDA: the features of the CPU, copies that overlap, memory that does not suffice, what is too large."""

import numpy as np
import pytest
import tiny_models
import torch
from conftest import MODELS
from pretended_cuda import pretended_cuda

from h2t_store import extract
from h2t_store.errors import ModelError, TapError

MODEL = f"{MODELS}:small_input"
CARD = torch.device("cuda", 0)


def extracted(store, images, **options):
    return extract((images, None), **{"model": MODEL, "store": store, "name": "x", "target_size": 16} | options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dtype="float32"),
        dict(batch_size=7),
        dict(batch_size=40, target_size=[4, 16]),
        dict(device="cuda:1"),
        dict(model="h2t_resnet20", batch_size=20),
        dict(model="vit_tiny_patch16_224", img_size=32, pretrained=False, batch_size=20, taps="blocks"),
    ],
)
def test_features_are_those_of_the_cpu(tmp_path, images, options):
    options = {"batch_size": 16, "device": "cuda"} | options
    with pretended_cuda() as gpu:
        there = extracted(tmp_path / "cuda", images, **options)
    here = extracted(tmp_path / "cpu", images, **options | {"device": "cpu"})
    np.testing.assert_allclose(np.asarray(there), np.asarray(here), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(there.layer_norms(), here.layer_norms(), rtol=1e-3)
    assert {device.index for device in gpu.peak} == {1 if options["device"] == "cuda:1" else 0}
    assert gpu.pinned_bytes >= images.nbytes


def test_the_host_waits_once_for_each_batch(tmp_path, images):
    waits = []
    for n in (16, 40):
        with pretended_cuda() as gpu:
            extracted(tmp_path / f"{n}", images[:n], device="cuda", batch_size=4)
        waits.append(gpu.waits)
    assert waits[1] - waits[0] == 6


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_what_is_not_finite_is_named(tmp_path, stored):
    bright = np.zeros((5, 8, 8, 3), np.uint8)
    bright[3] = 255
    model = tiny_models.exploding()
    if stored == "float32":
        torch.nn.init.constant_(model.conv.weight, 1e38)
    kind, message = (TapError, "beyond float16") if stored == "float16" else (ModelError, "not finite for image")
    with pretended_cuda(), pytest.raises(kind, match=message):
        extracted(tmp_path, bright, model=model, dtype=stored, device="cuda", batch_size=2)


def test_a_batch_is_as_large_as_memory_allows_and_halved_where_it_is_too_large(tmp_path, images):
    rows = np.tile(images, (2, 1, 1, 1))
    results = []
    for memory in (2**33, 2**18):
        with pretended_cuda(memory) as gpu:
            X = extracted(tmp_path / f"{memory}", rows, device="cuda", rows_per_block=64)
            assert gpu.peak[CARD] <= memory
            results.append(X)
    sizes = [X.provenance["environment"]["arguments"]["batch_size"] for X in results]
    assert sizes[0] == 256
    assert 1 <= sizes[1] < 80
    with pretended_cuda(2**18):
        results.append(extracted(tmp_path / "halved", rows, device="cuda", batch_size=64, rows_per_block=64))
    for X in results[1:]:
        np.testing.assert_allclose(np.asarray(X), np.asarray(results[0]), rtol=2e-3, atol=1e-4)


def test_the_device_of_the_caller_stays_the_current_one(tmp_path, images):
    with pretended_cuda():
        extracted(tmp_path, images, device="cuda:1", batch_size=16)
        assert torch.cuda.current_device() == 0
