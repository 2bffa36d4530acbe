import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2t_store.network.pooling import pool, pooled_width


def published_map(activation: np.ndarray, target: int) -> np.ndarray:
    """The paper's rule for one (C, H, W) map, written out."""
    channels, height, width = activation.shape
    if channels >= target:
        return activation.mean((1, 2))
    window = width // math.floor(math.sqrt(target // channels))
    return np.array(
        [
            activation[c, i : i + window, j : j + window].mean()
            for c in range(channels)
            for i in range(0, height - window + 1, window)
            for j in range(0, width - window + 1, window)
        ]
    )


@pytest.mark.parametrize(
    ("shape", "target", "width"),
    [
        ((16, 32, 32), 512, 400),  # the published ResNet-56: 25 windows of 6 x 6
        ((32, 16, 16), 512, 512),
        ((64, 8, 8), 512, 256),
        ((512, 7, 7), 512, 512),
        ((2048, 7, 7), 512, 2048),
        ((64, 56, 56), 8192, 64 * 11 * 11),
        ((64, 56, 56), 512, 64 * 2 * 2),
        ((20, 57, 61), 512, 20 * 4 * 5),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_are_pooled_by_the_published_rule(shape, target, width, memory_format):
    activation = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    activation = activation.contiguous(memory_format=memory_format)
    pooled = pool(activation, "map", target)
    assert pooled.shape == (2, width)
    for row, one in zip(pooled, activation, strict=True):
        np.testing.assert_allclose(row, published_map(one.double().numpy(), target), rtol=1e-4, atol=1e-6)


def test_windows_are_no_higher_than_the_map():
    activation = torch.randn((2, 64, 7, 61), generator=torch.Generator().manual_seed(0))
    expected = activation[..., :60].reshape(2, 64, 7, 2, 30).mean((2, 4)).flatten(1)
    torch.testing.assert_close(pool(activation, "map", 512), expected)


@pytest.mark.parametrize(
    ("tokens", "channels", "target", "window"), [(197, 192, 512, 73), (49, 100, 512, 9), (3, 2, 512, 1)]
)
def test_tokens_are_pooled_by_windows_along_the_tokens(tokens, channels, target, window):
    activation = torch.randn((1, channels, tokens), generator=torch.Generator().manual_seed(0))
    pooled = pool(activation, "tokens", target).reshape(channels, -1)
    expected = [activation[0, :, i : i + window].mean(1) for i in range(0, tokens - window + 1, window)]
    torch.testing.assert_close(pooled, torch.stack(expected, 1))


def test_vectors_and_wide_tokens():
    vector = torch.randn(3, 1000)
    assert pool(vector, "vector", 16).equal(vector)
    tokens = torch.randn(3, 20, 7)
    torch.testing.assert_close(pool(tokens, "tokens", 20), tokens.mean(2))


@given(
    kind=st.sampled_from(["map", "tokens", "vector"]),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40)),
    target=st.integers(1, 9000),
)
def test_the_width_is_known_before_pooling_and_no_value_is_lost_in_scale(kind, sizes, target):
    shape = sizes[: {"map": 3, "tokens": 2, "vector": 1}[kind]]
    pooled = pool(torch.ones((2, *shape)), kind, target)
    assert pooled.shape == (2, pooled_width(kind, shape, target))
    assert pooled.shape[1] >= shape[0]
    torch.testing.assert_close(pooled, torch.ones_like(pooled))


def test_half_precision_activations_are_averaged_in_float32():
    activation = torch.full((1, 1, 64, 64), 100.0, dtype=torch.float16)
    activation[0, 0, 0, 0] = 65504
    assert pool(activation, "map", 1).item() == pytest.approx(100 + (65504 - 100) / 4096, rel=1e-6)
