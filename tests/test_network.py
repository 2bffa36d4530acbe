import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import tiny_models
import torch
from conftest import MODELS
from safetensors.torch import save_file

from h2t_store.errors import ModelError
from h2t_store.network import Backbone, load_backbone
from h2t_store.network.resnet_cifar import ResNetCifar


def raises_with(message: str):
    return pytest.raises(ModelError, match=message)


def test_the_bundled_weights_are_small_and_load_in_float32_by_their_timm_name():
    backbone = load_backbone("h2t_resnet20")
    weights = Path(timm.models.get_pretrained_cfg("h2t_resnet20").file)
    assert weights.stat().st_size <= 1_000_000
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert backbone.data_config["input_size"] == (3, 32, 32)
    assert backbone.weights_sha256 == load_backbone(timm.create_model("h2t_resnet20", pretrained=True)).weights_sha256
    assert backbone.weights_sha256 != load_backbone("h2t_resnet20", pretrained=False).weights_sha256


def test_the_bundled_network_has_timms_model_interface():
    model = timm.create_model("h2t_resnet20", num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    assert model.forward_features(x).shape == (2, 64, 8, 8)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 64)
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    assert sum(p.numel() for p in ResNetCifar().parameters()) == 269_722


def test_random_weights_depend_on_the_seed_alone():
    def digest(seed: int) -> str:
        torch.rand(seed + 3)
        return load_backbone("h2t_resnet20", pretrained=False, seed=seed).weights_sha256

    assert digest(0) == digest(0) != digest(1)
    state = torch.get_rng_state()
    first, second = (load_backbone(f"{MODELS}:small_input") for _ in range(2))
    assert torch.get_rng_state().equal(state)
    assert first.weights_sha256 == second.weights_sha256


def test_a_checkpoint_replaces_the_weights(tmp_path):
    model = tiny_models.Functional()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    for file in ("w.safetensors", "w.pt"):
        loaded = load_backbone(f"{MODELS}:functional", checkpoint=tmp_path / file, img_size=8)
        assert all(loaded.model.state_dict()[key].equal(value) for key, value in model.state_dict().items())


def test_a_checkpoint_must_fit(tmp_path):
    weights = tiny_models.Functional().state_dict()
    short = {k: v for k, v in weights.items() if k != "head.bias"}
    for name, tensors in {
        "short": short,
        "long": weights | {"extra": torch.zeros(1)},
        "shape": weights | {"head.bias": torch.zeros(9)},
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, message in {
        "short": "lacks head.bias",
        "long": "has besides extra",
        "shape": "does not fit the model: .*head.bias",
        "text": "neither safetensors nor",
        "absent": "there is no such file",
    }.items():
        with raises_with(message):
            load_backbone(f"{MODELS}:functional", checkpoint=tmp_path / f"{name}.safetensors", img_size=8)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"head.bias": Evil()}, tmp_path / "evil.pt")
    with raises_with("plain tensors"):
        load_backbone(f"{MODELS}:functional", checkpoint=tmp_path / "evil.pt", img_size=8)
    assert not (tmp_path / "touched").exists()


def test_neighbours_of_a_model_file_are_its_own_and_part_of_its_identity(tmp_path):
    def build(folder: str, function: str) -> Backbone:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "near.py").write_text(f"import torch\nact = torch.{function}\n")
        (tmp_path / folder / "net.py").write_text(
            "import torch, near\n"
            "class Net(torch.nn.Conv2d):\n"
            "    def forward(self, x): return near.act(super().forward(x))\n"
            "def build(): return Net(3, 4, 1)\n"
        )
        return load_backbone(f"{tmp_path / folder / 'net.py'}:build", img_size=8)

    relu, tanh = build("one", "relu"), build("two", "tanh")
    x = torch.randn(1, 3, 2, 2)
    assert (relu.model(x) >= 0).all()
    assert (tanh.model(x) < 0).any()
    assert relu.weights_sha256 == tanh.weights_sha256
    assert relu.code_sha256 != tanh.code_sha256
    assert build("one", "tanh").code_sha256 != relu.code_sha256


def test_a_model_file_may_import_its_neighbours_and_use_dataclasses(tmp_path):
    (tmp_path / "helper.py").write_text("import torch\nclass Net(torch.nn.Conv2d): pass\n")
    (tmp_path / "net.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom helper import Net\n"
        "import numpy as np\n"
        "@dataclass\nclass Size:\n    out: int = 4\n"
        "def build():\n"
        "    net = Net(3, Size().out, 1)\n"
        "    net.pretrained_cfg = {'input_size': np.array([3, 8, 8]), 'mean': np.zeros(3), 'std': np.ones(3)}\n"
        "    return net\n"
    )
    before = list(sys.path)
    backbone = load_backbone(f"{tmp_path}/net.py:build")
    assert backbone.model.out_channels == 4
    assert backbone.data_config["mean"] == [0.0] * 3
    assert sys.path == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18.nope", "model 'resnet18.nope' cannot be built: Invalid pretrained tag"),
        ("resnet81", "model 'resnet81' is unknown to timm (did you mean 'resnet18'"),
        ("nowhere.py:factory", "there is no file 'nowhere.py'"),
        (f"{MODELS}:functionnal", "has no function 'functionnal' (did you mean 'functional'"),
        (f"{MODELS}:not_a_module", "returned int, not a torch.nn.Module"),
        (f"{MODELS}:failing", "failed: RuntimeError: no such luck"),
        (f"{MODELS}:leaving", "failed: SystemExit: 0"),
        (3, "model: int; accepted are a name and a torch.nn.Module"),
        (f"{MODELS}:functional", "does not say its input size: pass --img-size"),
    ],
)
def test_what_cannot_be_built_says_why(model, message):
    with raises_with(re.escape(message)):
        load_backbone(model)


def test_without_a_connection_published_weights_fail_at_once(monkeypatch, tmp_path, offline):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for model in ("resnet18", "hf-hub:timm/resnet18.a1_in1k"):
        with raises_with("cannot be fetched .*unreachable.*--no-pretrained"):
            load_backbone(model)


def test_cached_weights_of_the_hub_need_no_connection(monkeypatch, tmp_path, offline):
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text("abc")
    bundled = load_backbone("h2t_resnet20")
    (snapshot / "config.json").write_text('{"architecture": "h2t_resnet20", "num_classes": 10}')
    save_file(bundled.model.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_backbone("hf-hub:me/tiny").weights_sha256 == bundled.weights_sha256


def test_a_model_file_can_be_loaded_again_once_its_neighbour_is_corrected(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch, nearby\ndef build(): return torch.nn.Conv2d(3, nearby.width(), 1)\n"
    )
    (tmp_path / "nearby.py").write_text("def width(): raise ValueError('not yet')\n")
    with raises_with("not yet"):
        load_backbone(f"{tmp_path}/net.py:build", img_size=8)
    (tmp_path / "nearby.py").write_text("def width(): return 4\n")
    assert load_backbone(f"{tmp_path}/net.py:build", img_size=8).model.out_channels == 4


def test_random_weights_are_said_to_be(caplog):
    load_backbone("resnet18", pretrained=False, seed=3)
    assert "model 'resnet18' has random weights (seed 3)" in caplog.text
    caplog.clear()
    load_backbone("h2t_resnet20")
    load_backbone(f"{MODELS}:small_input")
    load_backbone(tiny_models.Functional(), fallback_size=(8, 10))
    assert "random weights" not in caplog.text


def test_preprocessing_comes_from_the_model_and_img_size_overrides_it():
    config = load_backbone(f"{MODELS}:small_input").data_config
    assert (config["input_size"], config["mean"], config["crop_pct"]) == ((3, 8, 8), (0.0,) * 3, 1.0)
    assert load_backbone(f"{MODELS}:small_input", img_size=12).data_config["input_size"] == (3, 12, 12)
    vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=64)
    assert vit.model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert load_backbone(tiny_models.Functional(), fallback_size=(8, 10)).data_config["input_size"] == (3, 8, 10)
