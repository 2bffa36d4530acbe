"""The published pooling: an activation of any shape becomes a vector of about ``target_size`` numbers.

The width after pooling follows from the shape, so it is known before any image is read.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["map", "tokens", "vector"]

_LARGE = 9  # side of a window from which two reductions beat F.avg_pool2d on contiguous maps


def window(kind: Kind, shape: tuple[int, ...], target_size: int) -> tuple[int, ...]:
    """Window and stride of `pool` over the axes after the channels, for an activation of ``shape``, channels first."""
    channels, *positions = shape
    if kind == "vector":
        return ()
    if channels >= target_size:
        return tuple(positions)
    if kind == "map":
        height, width = positions
        side = max(1, width // math.isqrt(target_size // channels))
        return min(side, height), side
    return (max(1, positions[0] * channels // target_size),)


def pooled_width(kind: Kind, shape: tuple[int, ...], target_size: int) -> int:
    """Number of features that `pool` makes of one activation of ``shape``, channels first."""
    sides = window(kind, shape, target_size)
    return shape[0] * math.prod(size // side for size, side in zip(shape[1:], sides, strict=False))


def pool(activation: Tensor, kind: Kind, target_size: int) -> Tensor:
    """Pool activations to vectors.

    Maps ``(N, C, H, W)`` and tokens ``(N, C, T)`` are averaged over all positions if C is at least the target size t.
    Otherwise window and stride of the average pooling are ``W // isqrt(t // C)`` for maps and ``T * C // t`` for
    tokens, without padding. Vectors ``(N, C)`` are kept whole. Returns ``(N, width)`` float32, channel by channel.
    """
    if kind == "vector":
        return activation.float()
    sides = window(kind, tuple(activation.shape[1:]), target_size)
    if kind == "map" and _is_channels_last(activation):
        return F.avg_pool2d(activation.float(), sides).flatten(1)
    if sides == tuple(activation.shape[2:]):
        return activation.mean(tuple(range(2, activation.ndim)), dtype=torch.float32)
    if kind == "tokens":
        return F.avg_pool1d(activation.float(), sides).flatten(1)
    if activation.is_cpu and max(sides) >= _LARGE:
        return _average_rows_first(activation, sides).flatten(1)
    return F.avg_pool2d(activation.float(), sides).flatten(1)


def _is_channels_last(maps: Tensor) -> bool:
    """Whether the channels lie side by side in main memory, where torch pools fastest by window, whatever its size."""
    return maps.is_cpu and not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last)


def _average_rows_first(maps: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Average pooling by two reductions: two to five times as fast as torch's loop over windows this large."""
    (high, wide), (height, width) = sides, (size // side for size, side in zip(maps.shape[2:], sides, strict=True))
    n, channels = maps.shape[:2]
    whole = maps[:, :, : height * high, : width * wide]
    rows = whole.reshape(n, channels, height, high, width * wide).mean(3, dtype=torch.float32)
    return rows.reshape(n, channels, height, width, wide).mean(4)
