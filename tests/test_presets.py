"""The published taps, one by one (DESIGN, section 2)."""

import pytest
import timm
import tiny_models
import torch
import torch.nn.functional as F

from h2t_store.errors import TapError
from h2t_store.network import Tap, find_taps, pooled_layers, tapped


def example(size: int) -> torch.Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1))


def published(model: torch.nn.Module, size: int = 64) -> list[Tap]:
    found, left_out = find_taps(model.eval(), example(size), "paper")
    assert not left_out
    return found


def resnet_taps(depths: tuple[int, ...], convolutions: int, expansion: int) -> list[tuple[str, tuple[int, ...]]]:
    """Root output, which enters the first block; per block what enters its convolutions; the final map; the logits."""
    expected: list[tuple[str, tuple[int, ...]]] = [("maxpool", (64, 16, 16))]
    for stage, depth in enumerate(depths):
        width, side = 64 * 2**stage, 16 // 2**stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            strided = convolutions == 3 and stage > 0 and block == 0  # a bottleneck strides in its second convolution
            expected.append((f"{name}.act1", (width, 2 * side, 2 * side) if strided else (width, side, side)))
            if convolutions == 3:
                expected.append((f"{name}.act2", (width, side, side)))
            expected.append((f"{name}.act{convolutions}", (expansion * width, side, side)))
    return [*expected, ("fc", (1000,))]


def vit_taps(width: int) -> list[tuple[str, tuple[int, ...]]]:
    """Patches without and with positions; per block norm, attention and both MLP layers; encoded tokens; embedding."""
    expected: list[tuple[str, tuple[int, ...]]] = [("patch_embed", (width, 16)), ("pos_drop:in", (width, 17))]
    for block in range(12):
        expected += [
            (f"blocks.{block}.norm1", (width, 17)),
            (f"blocks.{block}.attn", (width, 17)),
            (f"blocks.{block}.mlp.fc1", (4 * width, 17)),
            (f"blocks.{block}.mlp.fc2", (width, 17)),
        ]
    return [*expected, ("norm", (width, 17)), ("head:in", (width,))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", resnet_taps((2, 2, 2, 2), convolutions=2, expansion=1)),
        ("resnet50", resnet_taps((3, 4, 6, 3), convolutions=3, expansion=4)),
        ("vit_tiny_patch16_224", vit_taps(192)),
        ("vit_small_patch16_224", vit_taps(384)),
    ],
)
def test_taps_are_those_of_the_paper_one_by_one(name, expected):
    found = published(timm.create_model(name, **({"img_size": 64} if "vit" in name else {})))
    assert [(tap.name, tap.shape) for tap in found] == expected


def captured(model: torch.nn.Module, inputs: list[str], outputs: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters and leaves modules, by plain hooks, in place changes excluded."""
    values: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: values.update({f"{name}:in": args[0].clone()})
        )
        for name in inputs
    ] + [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: values.update({name: output.clone()})
        )
        for name in outputs
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return values


@torch.no_grad()
def test_values_of_a_residual_network_are_what_enters_its_convolutions():
    model, x = timm.create_model("resnet50").eval(), example(64)
    layers = pooled_layers(published(model, 64), (512,))
    with tapped(model, layers) as forward:
        got = {layer.name: values for layer, values in zip(layers, forward(x), strict=True)}
    convolutions = [
        name
        for name, module in model.named_modules()
        if name.startswith("layer") and isinstance(module, torch.nn.Conv2d)
    ]
    values = captured(model, [*convolutions, "global_pool"], ["fc"], x)
    expected = {}
    for name, tensor in values.items():
        side = max(1, tensor.shape[-1] // max(1, int((512 // tensor.shape[1]) ** 0.5))) if tensor.ndim == 4 else 0
        wide = tensor.shape[1] >= 512
        pooled = tensor if not side else F.avg_pool2d(tensor, tensor.shape[-1] if wide else side)
        expected[name] = pooled.flatten(1)
    unmatched = dict(got)
    for name, wanted in expected.items():
        equal = [key for key, have in got.items() if have.shape == wanted.shape and torch.allclose(have, wanted)]
        assert equal, name
        for key in equal:
            unmatched.pop(key, None)
    assert not unmatched, "taps that are no input of a convolution, no final map and no logits"


@torch.no_grad()
def test_values_of_a_vit_are_those_of_its_modules():
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=64).eval(), example(64)
    layers = pooled_layers(published(model, 64), (192,))
    with tapped(model, layers) as forward:
        got = {layer.name: values for layer, values in zip(layers, forward(x), strict=True)}
    inner = [f"blocks.{i}.{part}" for i in range(12) for part in ("norm1", "attn", "mlp.fc1", "mlp.fc2")]
    values = captured(model, ["blocks.0", "head"], ["patch_embed", *inner, "norm"], x)
    values["pos_drop:in"] = values.pop("blocks.0:in")
    assert set(got) == set(values)
    for name, tensor in values.items():
        torch.testing.assert_close(got[name], tensor if tensor.ndim == 2 else tensor.mean(1), rtol=1e-5, atol=1e-6)


def test_preactivation_networks_give_what_norm_and_activation_made():
    names = [tap.name for tap in published(timm.create_model("resnetv2_18"), 64)]
    blocks = [f"stages.{i}.blocks.{j}.norm{k}.act" for i in range(4) for j in (0, 1) for k in (1, 2)]
    assert names == ["stem.pool", *blocks, "norm.act", "head.fc"]


def test_the_bundled_network_has_the_published_taps():
    names = [tap.name for tap in published(timm.create_model("h2t_resnet20"), 32)]
    blocks = [f"layer{stage}.{block}.act{i}" for stage in (1, 2, 3) for block in range(3) for i in (1, 2)]
    assert names == ["act1", *blocks, "fc"]


def test_functions_in_place_of_modules_change_names_only():
    names = [tap.name for tap in published(tiny_models.resnet56(), 32)]
    assert len(names) == 1 + 2 * 27 + 1
    assert names[:2] == ["layer1.0.conv1:in", "layer1.0.conv2:in"]
    assert names[-2:] == ["layer3.8", "linear"]


@pytest.mark.parametrize(
    ("name", "options", "must_have"),
    [
        ("resnet14t", {}, {"layer1.0.act1", "layer4.0.act3", "fc"}),  # no block keeps its shape
        ("seresnet18", {}, {"layer1.0.se.fc1:in", "layer1.0.act1", "layer4.1.act2"}),
        ("regnetx_002", {}, {"s1.b1.conv1.bn.act", "s4.b7.act3", "head.fc"}),  # blocks in no Sequential
        ("test_vit", {"img_size": 64}, {"patch_embed.proj", "blocks.0.norm1", "blocks.0.attn", "blocks.5.mlp.fc2"}),
        (
            "deit_tiny_distilled_patch16_224",
            {"img_size": 64, "depth": 2},
            {"patch_embed", "blocks.1.attn", "head:in", "head_dist:in"},
        ),
        ("beit_base_patch16_224", {"img_size": 64, "depth": 1}, {"patch_embed", "blocks.0.attn", "fc_norm"}),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, {"patch_embed", "blocks.0.mlp.fc1", "fc_norm"}),
        (
            "cait_xxs24_224",
            {"img_size": 64, "depth": 2},
            {"patch_embed", "blocks.1.attn", "blocks_token_only.1.mlp.fc2", "norm", "head:in"},
        ),
    ],
)
def test_other_members_of_both_families_are_known_by_their_build(name, options, must_have):
    model = timm.create_model(name, **options)
    assert must_have <= {tap.name for tap in published(model, options.get("img_size", 64))}


@pytest.mark.parametrize("name", ["test_convnext", "mixer_s32_224", "densenet121", "inception_v3"])
def test_other_networks_are_told_what_to_use(name):
    model = timm.create_model(name).eval()
    with pytest.raises(TapError, match=r"'paper' is published for ResNet and ViT families .* use 'activations'"):
        find_taps(model, example(224 if "mixer" in name else 96), "paper")


def test_a_chain_of_convolutions_is_no_residual_network():
    with pytest.raises(TapError, match="'paper' is published"):
        find_taps(tiny_models.Chain().eval(), example(8), "paper")


def test_presets_and_globs_go_together():
    model = timm.create_model("h2t_resnet20").eval()
    names = [tap.name for tap in find_taps(model, example(32), "paper,bn1,activations")[0]]
    assert names == ["bn1", *[tap.name for tap in find_taps(model, example(32), "activations")[0]]]
