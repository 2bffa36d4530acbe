import logging

import pytest
import timm
import tiny_models
import torch
from torchvision.models import VisionTransformer

from h2t_store.network import Tap, find_taps, pooled_layers, tapped
from h2t_store.network.watching import Place


def example(size: int) -> torch.Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1))


def tiny_vit(**options) -> torch.nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5} | options
    return timm.models.vision_transformer.VisionTransformer(**options).eval()


def find(model: torch.nn.Module, taps: str, cls_token: str, size: int = 32) -> dict[str, Tap]:
    return {tap.name: tap for tap in find_taps(model.eval(), example(size), taps, cls_token)[0]}


@torch.no_grad()
def pooled(model: torch.nn.Module, taps: str, cls_token: str, target: int = 16) -> dict[str, torch.Tensor]:
    layers = pooled_layers(list(find(model, taps, cls_token).values()), (target,))
    with tapped(model, layers) as forward:
        values = dict(zip([layer.name for layer in layers], forward(example(32)), strict=True))
    assert all(values[layer.name].shape == (2, layer.width) for layer in layers)
    return values


@torch.no_grad()
def tokens_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: kept.append(output.clone()))
    model(example(32))
    handle.remove()
    return kept[0]


@torch.no_grad()
def test_pooled_alone_or_beside_the_pooled_rest():
    model = tiny_vit()
    tokens = tokens_of(model, "blocks.0.norm1")
    taps = "blocks.0.norm1,patch_embed"
    assert torch.allclose(pooled(model, taps, "pool")["blocks.0.norm1"], tokens.mean(1), atol=1e-6)
    assert pooled(model, taps, "only")["blocks.0.norm1"].equal(tokens[:, 0])
    beside = pooled(model, taps, "keep")["blocks.0.norm1"]
    torch.testing.assert_close(beside, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
    finer = pooled(model, taps, "keep", target=64)["blocks.0.norm1"]
    windows = tokens[:, 1:].reshape(2, 4, 4, 16).mean(2).transpose(1, 2).flatten(1)
    torch.testing.assert_close(finer, torch.cat([tokens[:, 0], windows], 1))


@torch.no_grad()
def test_a_class_token_may_stand_anywhere():
    tokens = torch.randn((2, 9, 4), generator=torch.Generator().manual_seed(0))
    for position in (0, 3, 8):
        tap = Tap("t", Place("t", "out", 0), (1, 9, 4), 2, class_token=position, cls_token="keep")
        rest = tokens[:, [i for i in range(9) if i != position]]
        expected = torch.cat([tokens[:, position], rest.mean(1)], 1)
        torch.testing.assert_close(tap.pool(tokens, 2, 4), expected)


@torch.no_grad()
def test_taps_without_the_token_are_pooled_as_usual():
    model = tiny_vit()
    patches = tokens_of(model, "patch_embed").mean(1)
    for cls_token in ("only", "keep"):
        torch.testing.assert_close(pooled(model, "patch_embed,norm", cls_token)["patch_embed"], patches)


def test_kinds_and_shapes_follow():
    model = tiny_vit()
    only, keep = (find(model, "blocks", cls_token)["blocks.1"] for cls_token in ("only", "keep"))
    assert (only.kind, only.shape, only.width(512)) == ("vector", (16,), 16)
    assert (keep.kind, keep.shape, keep.width(16)) == ("tokens", (16, 17), 32)


@pytest.mark.parametrize(
    ("model", "taps", "position"),
    [
        (lambda: tiny_vit(), "blocks.1.attn.proj:in,blocks.1", 0),
        (lambda: tiny_vit(reg_tokens=4), "blocks.0.mlp.act,norm", 0),
        (lambda: tiny_vit(class_token=False, global_pool="avg"), "blocks", None),
        (lambda: VisionTransformer(32, 8, 2, 2, 16, 32), "encoder.layers.*.mlp.*,encoder.ln", 0),
        (tiny_models.SequenceFirst, "norm,mlp", 0),
    ],
)
def test_it_is_found_where_a_change_of_its_parameter_stays(model, taps, position):
    found = find(model(), taps, "only")
    tokens = [tap for tap in found.values() if len(tap.raw_shape) == 3]
    assert tokens
    assert {tap.class_token for tap in tokens} == {position}


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 2}, {18: 0}),
        ("eva02_tiny_patch14_224", {"depth": 2}, {17: 0}),
        ("cait_xxs24_224", {"depth": 2}, {17: 0}),
        ("mvitv2_small_cls", {}, {257: 0, 65: 0, 17: 0, 5: 0}),
        ("convit_tiny", {"depth": 3, "local_up_to_layer": 2}, {17: 0}),
    ],
)
def test_timms_networks_with_a_class_token(name, options, counts):
    size = 56 if "patch14" in name else 64
    model = timm.create_model(name, img_size=size, **options)
    found = find(model, "activations", "keep", size)
    assert {tap.shape[1]: tap.class_token for tap in found.values() if tap.class_token is not None} == counts


@torch.no_grad()
def test_tokens_before_images_keep_their_class_token():
    model = tiny_models.SequenceFirst(16).eval()
    tokens = tokens_of(model, "mlp")
    assert tokens.shape == (65, 2, 16)
    assert pooled(model, "mlp", "only")["mlp"].equal(tokens[0])
    torch.testing.assert_close(pooled(model, "mlp", "pool")["mlp"], tokens.mean(0))


@pytest.mark.parametrize("cls_token", ["only", "keep"])
def test_a_network_without_one_is_unchanged_and_it_is_said(cls_token, caplog):
    model = timm.create_model("h2t_resnet20")
    with caplog.at_level(logging.WARNING, logger="h2t_store"):
        assert find(model, "blocks", cls_token) == find(model, "blocks", "pool")
    assert [record.getMessage() for record in caplog.records] == [
        f"cls_token {cls_token!r} changes nothing: no tap holds a class token"
    ]


def test_the_network_is_left_as_it_was():
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find(model, "activations", "keep")
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
