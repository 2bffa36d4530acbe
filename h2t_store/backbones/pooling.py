"""The published pooling: an activation of any shape becomes a vector of about ``target_size`` numbers.

The shape after pooling follows from the shape before it, so widths are known before any image is read.
"""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Kind", "pool", "pooled_width"]

Kind = Literal["map", "tokens", "vector"]


def _window(kind: Kind, shape: tuple[int, ...], target_size: int) -> tuple[int, ...] | None:
    """Pooling window over the axes after the channels; None where all of them are averaged."""
    channels = shape[0]
    if channels >= target_size:
        return None
    if kind == "map":
        height, width = shape[1:]
        side = max(1, width // math.isqrt(target_size // channels))
        return min(side, height), side
    return (max(1, shape[1] * channels // target_size),)


def pooled_width(kind: Kind, shape: tuple[int, ...], target_size: int) -> int:
    """Number of features that `pool` makes of one activation of ``shape``, channels first."""
    if kind == "vector":
        return shape[0]
    window = _window(kind, shape, target_size)
    if window is None:
        return shape[0]
    return shape[0] * math.prod(size // side for size, side in zip(shape[1:], window, strict=True))


def pool(activation: Tensor, kind: Kind, target_size: int) -> Tensor:
    """Pool activations to vectors.

    Parameters
    ----------
    activation : Tensor
        ``(N, C, H, W)`` for a map, ``(N, C, T)`` for tokens, ``(N, C)`` for a vector; floating point.
    kind : {"map", "tokens", "vector"}
        What it is. Vectors are kept whole.
    target_size : int
        Length aimed at, t. With C >= t maps and tokens are averaged over all positions. Otherwise a map is
        average-pooled with window and stride ``W // isqrt(t // C)``, tokens with window and stride ``T * C // t``,
        without padding (paper, section 3 and its published code).

    Returns
    -------
    Tensor
        ``(N, width)`` float32, channel by channel, positions of one channel side by side.
    """
    values = activation.float()
    if kind == "vector":
        return values
    window = _window(kind, tuple(values.shape[1:]), target_size)
    if window is None:
        return values.flatten(2).mean(2)
    pooled = F.avg_pool2d(values, window) if kind == "map" else F.avg_pool1d(values, window)
    return pooled.flatten(1)
