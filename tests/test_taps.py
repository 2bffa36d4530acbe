import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import timm
import tiny_models
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from h2t_store.errors import TapError
from h2t_store.network import Tap, find_taps, pooled_layers, tapped
from h2t_store.network.watching import Place


def example(size: int = 8) -> torch.Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1))


def names(model: torch.nn.Module, taps: str, size: int = 8) -> list[str]:
    return [tap.name for tap in find_taps(model.eval(), example(size), taps)[0]]


@torch.no_grad()
def pooled(model: torch.nn.Module, taps: str, x: torch.Tensor, target: int = 4096) -> dict[str, torch.Tensor]:
    found, _ = find_taps(model.eval(), x[:2], taps)
    with tapped(model, pooled_layers(found, (target,))) as forward:
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
    assert left_out == {"table:in": "it does not grow with the number of images"}
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
    options = {"vit": {"img_size": 64}, "swin": {"depths": (2, 2, 2, 2)}}.get(name.split("_")[0], {})
    model = timm.create_model(name, **options).eval()
    x = example(224 if "swin" in name else 64)
    got = pooled(model, "activations", x, target=512)
    assert must_have <= set(got)
    with torch.no_grad():
        torch.testing.assert_close(list(got.values())[-1], model(x))
    for tap, values in got.items():
        assert values.shape[0] == 2, tap
        assert torch.isfinite(values).all(), tap


def test_channels_last_is_found_where_all_sides_are_equal():
    class Cube(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(3, 6, 2, 2), norm, nn.Linear(6, 2)
            self.last = not isinstance(norm, LayerNorm2d)

        def forward(self, x):
            x = self.stem(x).relu()
            x = self.norm(x.permute(0, 2, 3, 1) * 1.0 if self.last else x)
            return self.head(x.mean((1, 2) if self.last else (2, 3)))

    for norm, axis in ((nn.LayerNorm(6), 3), (LayerNorm2d(6), 1)):
        taps, _ = find_taps(Cube(norm).eval(), example(12), "norm")
        assert [(tap.raw_shape, tap.channel_axis) for tap in taps] == [((1, 6, 6, 6), axis)]


def test_outputs_in_a_dataclass_are_seen_and_layers_never_called_are_told():
    @dataclass
    class Answer:
        logits: torch.Tensor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.spare = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return Answer(self.head(self.conv(x).relu().mean((2, 3))) * 2.0)

    taps, left_out = find_taps(Net().eval(), example(), "activations")
    assert [tap.name for tap in taps] == ["head:in", "output"]
    assert left_out == {"spare:in": "the network does not call this module"}


def test_swin_blocks_are_maps_with_the_channels_last_axis_found():
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 2)).eval()
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


@pytest.mark.parametrize("cls_token", ["pool", "keep"])
@pytest.mark.parametrize("taps", ["activations", "paper"])
def test_hooks_are_gone_afterwards(taps, cls_token):
    model = timm.create_model("h2t_resnet20").eval()
    find_taps(model, example(32), taps, cls_token)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_tokens_before_images_have_the_images_on_their_second_axis():
    model, x = tiny_models.SequenceFirst().eval(), example()
    got = pooled(model, "norm,attn", x, target=8)
    patches = model.conv(x).flatten(2).permute(2, 0, 1)
    normed = model.norm(torch.cat([model.class_embedding.expand(1, 2, -1), patches]))
    attended, weights = model.attn(normed, normed, normed)
    torch.testing.assert_close(got["norm"], normed.mean(0))
    torch.testing.assert_close(got["attn"], attended.mean(0), rtol=1e-5, atol=1e-7)
    scores = pooled(model, "attn:2", x, target=25)["attn:2"]
    torch.testing.assert_close(scores, weights.transpose(1, 2).flatten(1), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_as_many_images_as_tokens_are_not_mistaken_for_them():
    model, x = tiny_models.SequenceFirst().eval(), example()
    found, _ = find_taps(model, x, "norm")
    five = torch.randn(5, 3, 8, 8)
    with tapped(model, pooled_layers(found, (8,))) as forward:
        alone = torch.cat([forward(five[i : i + 1])[0] for i in range(5)])
        torch.testing.assert_close(forward(five)[0], alone)


@torch.no_grad()
def test_each_tensor_of_several_has_its_tap():
    model, x = tiny_models.Recurrent().eval(), example()
    got = pooled(model, "lstm,lstm:2,lstm:3", x, target=32)
    output, (hidden, cell) = model.lstm(x.transpose(1, 2).flatten(2)[:, :, :12])
    torch.testing.assert_close(got["lstm"], output.transpose(1, 2).flatten(1))
    torch.testing.assert_close(got["lstm:2"], hidden[0])
    torch.testing.assert_close(got["lstm:3"], cell[0])
    assert names(model, "*") == ["lstm", "head"]


@torch.no_grad()
def test_of_nested_outputs_the_tensors_of_single_images_are_taken():
    model, x = tiny_models.Auxiliary().eval(), example()
    found, left_out = find_taps(model, x, "activations")
    assert [tap.name for tap in found] == ["aux:in", "aux", "head"]
    assert left_out == {"output:3": "it does not grow with the number of images"}
    got = pooled(model, "output,output:2", x)
    _, logits, (extra, _) = model(x)
    assert got["output"].equal(logits)
    assert got["output:2"].equal(extra["aux"])


@torch.no_grad()
def test_convolutions_of_any_dimension():
    model, x = tiny_models.Volume().eval(), example()
    found, _ = find_taps(model, x, "flat,deep,line")
    assert [(tap.kind, tap.shape) for tap in found] == [("map", (4, 8, 8)), ("tokens", (2, 256)), ("tokens", (3, 64))]
    got = pooled(model, "deep,line", x, target=2)
    deep = model.deep(model.flat(x).unsqueeze(1))
    torch.testing.assert_close(got["deep"], deep.mean((2, 3, 4)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["line"], model(x), rtol=1e-5, atol=1e-6)


def test_tied_weights_and_one_layer_under_two_names():
    assert names(tiny_models.Tied(), "activations") == ["first:in", "first#2:in", "first#2", "shares"]


@torch.no_grad()
def test_torchs_encoder_is_run_module_by_module():
    model, x = tiny_models.Encoder().eval(), example()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    got = pooled(model, "encoder.layers.1.linear1,encoder.layers.1,head", x, target=8)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    torch.testing.assert_close(got["head"], model(x), rtol=1e-5, atol=1e-6)
    assert got["encoder.layers.1.linear1"].shape == (2, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_networks_in_half_precision_give_float32_features(dtype):
    model, x = tiny_models.SequenceFirst(16).eval().to(dtype), example(32).to(dtype)
    found, left_out = find_taps(model, x, "activations")
    assert {*left_out} <= {"attn.out_proj:in"}  # nn.MultiheadAttention uses its weights
    with tapped(model, pooled_layers(found, (16,))) as forward:
        got = dict(zip([tap.name for tap in found], forward(x), strict=True))
    assert {values.dtype for values in got.values()} == {torch.float32}
    assert got["head"].equal(model(x).float())


def test_the_caller_may_be_in_inference_mode():
    model = tiny_models.SharedInplace().eval()
    with torch.inference_mode():
        assert names(model, "conv1,act,act#2") == ["conv1", "act", "act#2"]


@torch.no_grad()
def test_both_memory_formats_give_the_same_features():
    model, x = timm.create_model("resnet18").eval(), example(64)
    layers = pooled_layers(find_taps(model, x, "activations")[0], (64, 512))
    with tapped(model, layers) as forward:
        contiguous = forward(x)
        model.to(memory_format=torch.channels_last)
        for layer, a, b in zip(layers, contiguous, forward(x.to(memory_format=torch.channels_last)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=layer.name)


@torch.no_grad()
def test_channels_last_networks_without_channels_last_names():
    model, x = timm.create_model("test_convnext").eval(), example(64)
    found = {tap.name: tap for tap in find_taps(model, x, "stages.0.blocks.0.norm,stages.3")[0]}
    assert [tap.shape[1:] for tap in found.values()] == [(16, 16), (2, 2)]


def test_several_target_sizes_store_each_result_once():
    vector, wide, narrow = (
        Tap("vector", Place("v", "out", 0), (1, 10), 1),
        Tap("wide", Place("w", "out", 0), (1, 512, 7, 7), 1),
        Tap("narrow", Place("n", "out", 0), (1, 64, 8, 8), 1),
    )
    layers = pooled_layers([vector, wide, narrow], (512, 64, 512, 500, 60))
    assert [(layer.name, layer.target_size, layer.target_sizes, layer.width) for layer in layers] == [
        ("vector", 512, (512, 64, 500, 60), 10),
        ("wide", 512, (512, 64, 500, 60), 512),
        ("narrow@512", 512, (512, 500), 64 * 4),
        ("narrow@64", 64, (64, 60), 64),
    ]
    assert layers[2].shape == (64, 8, 8)
    assert [layer.name for layer in pooled_layers([narrow], (64,))] == ["narrow"]


def test_a_window_of_the_whole_map_is_the_global_average():
    tap = Tap("map", Place("m", "out", 0), (1, 6, 4, 4), 1)
    assert [layer.name for layer in pooled_layers([tap], (5, 6, 12, 23))] == ["map"]


@torch.no_grad()
def test_several_target_sizes_in_one_pass_are_those_of_separate_passes():
    model, x = timm.create_model("h2t_resnet20").eval(), example(32)
    found, _ = find_taps(model, x, "blocks")
    layers = pooled_layers(found, (16, 512))
    with tapped(model, layers) as forward:
        together = {layer.name: values for layer, values in zip(layers, forward(x), strict=True)}
    for size in (16, 512):
        alone = pooled(model, "blocks", x, target=size)
        for layer in layers:
            if size in layer.target_sizes:
                assert together[layer.name].equal(alone[layer.tap.name])


def test_another_shape_than_expected_is_one_clear_error():
    model = tiny_models.Functional().eval()
    layers = pooled_layers(find_taps(model, example(), "layers.0")[0], (8,))
    with (
        tapped(model, layers) as forward,
        pytest.raises(TapError, match=r"tap 'layers.0': shape \(2, 4, 9, 9\) for 2 images, expected \(2, 4, 8, 8\)"),
    ):
        forward(example(9))


class Meeting(nn.Module):
    """A shared module called twice; all threads wait for each other between any two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 5)
        self.meet = lambda: None

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            self.meet()
            x = self.act(conv(x))
        self.meet()
        return self.head(x.mean((2, 3)))


@torch.no_grad()
def together(model, works):
    """Do each of the works in a thread of its own, in step at every layer of the network."""
    barrier = threading.Barrier(len(works))
    model.meet = barrier.wait

    @torch.no_grad()
    def do(work):
        try:
            return work()
        except BaseException:
            barrier.abort()  # or the others wait for ever
            raise

    with ThreadPoolExecutor(len(works)) as pool:
        results = list(pool.map(do, works))
    model.meet = lambda: None
    return results


@torch.no_grad()
def test_threads_that_run_one_network_each_get_their_own_activations():
    model = Meeting().eval()
    batches = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3, 4)]
    layers = pooled_layers(find_taps(model, example(), "activations,act*")[0], (64,))
    with tapped(model, layers) as forward:
        expected = [forward(x) for x in batches]
        got = together(model, [lambda x=x: forward(x) for x in batches])
    for one, other in zip(got, expected, strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def test_one_network_may_be_tapped_several_times_at_once_and_run_without():
    model, x = Meeting().eval(), example()
    coarse, fine = (pooled_layers(find_taps(model, x, "activations")[0], (size,)) for size in (4, 64))
    with tapped(model, coarse) as forward:
        expected = forward(x)
        with tapped(model, fine) as other:
            finer, logits = other(x[:1]), model(x[:1])
            assert all(a.equal(b) for a, b in zip(forward(x), expected, strict=True))
        got = together(model, [lambda: forward(x), lambda: other_run(model, fine, x[:1]), lambda: model(x[:1])])
    assert all(a.equal(b) for a, b in zip(got[0], expected, strict=True))
    assert all(a.equal(b) for a, b in zip(got[1], finer, strict=True))
    assert got[2].equal(logits)


def other_run(model, layers, x):
    with tapped(model, layers) as forward:
        return forward(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_networks_are_run_by_threads_too(compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, compile=torch.compile: compile(model, backend="eager"))
    model = tiny_models.SharedInplace().eval()
    layers = pooled_layers(find_taps(model, example(), "activations")[0], (64,))
    with torch.no_grad(), tapped(model, layers, compiled=compiled) as forward, tapped(model, layers) as other:
        expected = other(example())
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(lambda _: torch.no_grad()(forward)(example()), range(6)))
    for activations in got:
        assert all(a.equal(b) for a, b in zip(activations, expected, strict=True))


def test_finding_class_tokens_does_not_reach_into_another_thread():
    """It silences attention, which a thread that runs the same network must not notice."""
    model, x = tiny_models.SequenceFirst().eval(), example()
    alone = torch.no_grad()(model.forward)
    with tapped(model, []):  # which has attention computed step by step
        expected, seen = alone(x), []

    def another_thread_runs_it(*_):
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(model, x).result())

    model.mlp.register_forward_pre_hook(another_thread_runs_it)
    found, _ = find_taps(model, x, "activations", "keep")
    assert any(tap.class_token is not None for tap in found)
    assert len(seen) > 3
    assert all(output.equal(expected) for output in seen)
