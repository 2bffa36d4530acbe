import pytest
import timm
import tiny_models
import torch
import torch.nn.functional as F

from h2t_store import backbones  # noqa: F401  registers h2t_resnet20
from h2t_store.backbones.taps import find_taps, tapped
from h2t_store.errors import TapError


def example(size: int = 8) -> torch.Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1))


def names(model: torch.nn.Module, taps: str, size: int = 8) -> list[str]:
    return [tap.name for tap in find_taps(model.eval(), example(size), taps)[0]]


@torch.no_grad()
def pooled(model: torch.nn.Module, taps: str, x: torch.Tensor, target: int = 4096) -> dict[str, torch.Tensor]:
    found, _ = find_taps(model.eval(), x[:2], taps)
    with tapped(model, found, target) as forward:
        return {tap.name: values for tap, values in zip(found, forward(x), strict=True)}


def test_activations_made_by_functions_are_found_at_the_layer_they_enter():
    assert names(tiny_models.Functional(), "activations") == [
        "layers.0.conv1:in",
        "layers.0.conv2:in",
        "layers.0",
        "layers.1.conv2:in",
        "layers.1",
        "head:in",
        "head",
    ]


def test_blocks_penultimate_and_logits():
    assert names(tiny_models.Functional(), "blocks") == ["layers.0", "layers.1", "head:in", "head"]


@torch.no_grad()
def test_values_are_those_of_the_forward_pass():
    model, x = tiny_models.Functional().eval(), example()
    got = pooled(model, "activations", x)
    stem = F.relu(model.stem(x))
    inner = F.relu(model.layers[0].conv1(stem))
    torch.testing.assert_close(got["layers.0.conv1:in"], stem.flatten(1))
    torch.testing.assert_close(got["layers.0.conv2:in"], inner.flatten(1))
    torch.testing.assert_close(got["layers.0"], F.relu(model.layers[0].conv2(inner) + stem).flatten(1))
    torch.testing.assert_close(got["head"], model(x))


@torch.no_grad()
def test_each_call_of_a_shared_module_is_a_tap_and_in_place_changes_do_not_reach_back():
    model, x = tiny_models.SharedInplace().eval(), example()
    got = pooled(model, "conv1,act,act#2", x)
    assert list(got) == ["conv1", "act", "act#2"]
    first = model.conv1(x)
    torch.testing.assert_close(got["conv1"], first.flatten(1))
    assert (got["conv1"] < 0).any()
    torch.testing.assert_close(got["act"], F.relu(first).flatten(1))
    torch.testing.assert_close(got["act#2"], F.relu(model.conv2(F.relu(first))).flatten(1))
    assert list(pooled(model, "activations", x)) == ["act", "head:in", "head"]


@torch.no_grad()
def test_windows_are_put_back_to_their_image_and_channels_last_is_seen():
    model, x = tiny_models.Windows().eval(), example()
    found, left_out = find_taps(model, x, "activations,norm")
    by_name = {tap.name: tap for tap in found}
    assert by_name["norm"].shape == (6, 4, 4)
    assert by_name["window:in"].shape == (6, 16)
    assert left_out == {"table:in": "its first axis does not grow with the number of images"}
    got = pooled(model, "norm,window:in", x, target=6)
    maps = model.norm(model.stem(x).permute(0, 2, 3, 1))
    torch.testing.assert_close(got["norm"], maps.mean((1, 2)))
    torch.testing.assert_close(got["window:in"], maps.mean((1, 2)))


def test_rows_that_mix_images_are_left_out_of_presets_and_refused_by_name():
    _, left_out = find_taps(tiny_models.BatchMixer().eval(), example(), "activations")
    assert left_out["fc:in"] == "its rows depend on more than one image"
    with pytest.raises(TapError, match="'fc:in' cannot become features: its rows depend on more than one image"):
        names(tiny_models.BatchMixer(), "fc:in")


def test_the_same_tensor_gives_one_tap():
    model = tiny_models.Functional()
    assert names(model, "layers.0,layers.1.conv1:in,layers.1:in") == ["layers.0"]


def test_globs_mean_outputs_unless_they_end_in_the_side():
    model = tiny_models.Functional()
    assert names(model, "layers.0.*") == ["layers.0.conv1", "layers.0.conv2"]
    assert names(model, "layers.0.*:in") == ["layers.0.conv1:in", "layers.0.conv2:in"]


@pytest.mark.parametrize("taps", ["layer.0.conv1", "conv9:in", "activations,nothing"])
def test_a_glob_that_matches_nothing_is_an_error_that_names_it(taps):
    with pytest.raises(TapError, match=rf"taps: '{taps.split(',')[-1]}' matches no module of the network"):
        names(tiny_models.Functional(), taps)


def test_a_near_miss_is_suggested():
    with pytest.raises(TapError, match=r"did you mean 'layers.0.conv1"):
        names(tiny_models.Functional(), "layer.0.conv1:in")


def test_the_bundled_network_has_the_published_taps():
    got = names(timm.create_model("h2t_resnet20"), "activations", size=32)
    blocks = [f"layer{stage}.{block}.act{i}" for stage in (1, 2, 3) for block in range(3) for i in (1, 2)]
    assert got == ["act1", *blocks, "global_pool.pool", "fc"]


@pytest.mark.parametrize(
    ("name", "must_have"),
    [
        ("resnet18", {"layer1.0.act1", "layer4.1.act2", "fc"}),
        ("vit_tiny_patch16_224", {"blocks.0.norm1", "blocks.0.attn.proj:in", "blocks.11.mlp.act", "blocks.11", "head"}),
        ("convnext_atto", {"stages.0.blocks.0.norm", "stages.3.blocks.1.mlp.act", "head.fc"}),
        ("mobilenetv3_small_050", {"blocks.0.0.se.conv_reduce:in", "blocks.3.0", "classifier"}),
        ("swin_tiny_patch4_window7_224", {"layers.0.blocks.0.attn.qkv:in", "layers.3.blocks.1", "head.fc"}),
    ],
)
def test_architectures_need_no_code_of_their_own(name, must_have):
    model = timm.create_model(name).eval()
    x = example(224)
    got = pooled(model, "activations", x, target=512)
    assert must_have <= set(got)
    with torch.no_grad():
        torch.testing.assert_close(list(got.values())[-1], model(x))
    for tap, values in got.items():
        assert values.shape[0] == 2, tap
        assert torch.isfinite(values).all(), tap


def test_swin_blocks_are_maps_with_the_channels_last_axis_found():
    model = timm.create_model("swin_tiny_patch4_window7_224").eval()
    found, _ = find_taps(model, example(224), "layers.0.blocks.0,layers.3.blocks.1")
    assert [tap.shape for tap in found] == [(96, 56, 56), (768, 7, 7)]


def test_weights_used_by_functions_dict_outputs_and_overwritten_inputs():
    model, x = tiny_models.FunctionalLinear().eval(), example()
    before = x.clone()
    assert names(model, "activations") == ["attn:in", "head:in", "head"]
    assert x.equal(before)


def test_slices_from_one_address_are_two_tensors():
    found, _ = find_taps(tiny_models.Slices().eval(), torch.randn(2, 3, 8, 6), "activations")
    assert [tap.name for tap in found] == ["a:in", "b:in", "output"]
    assert found[-1].shape == (2, 7, 5)


def test_the_penultimate_of_blocks_enters_the_layer_that_makes_the_output():
    assert "head:in" in names(tiny_models.Functional(), "blocks")
    headless = timm.create_model("resnet18", num_classes=0)
    assert not [name for name in names(headless, "blocks", 64) if name.endswith((":in", ".act1"))]


def test_hooks_are_gone_afterwards():
    model = tiny_models.Functional()
    names(model, "activations")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
