"""Which axis of an activation holds its channels: learnt from the layers it goes through, whose kind fixes it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from h2t_store.network.watching import Seen

__all__ = ["channel_axes"]


def channel_axes(model: nn.Module, seen: Sequence[Seen]) -> Callable[[Seen], int]:
    """Learn where the network keeps its channels.

    Returns
    -------
    callable
        From a seen tensor to its channel axis: what the layers say that this tensor, else one of its shape, goes
        through; else the axis unlike the two others of a square map; else what is usual in this network for its rank.
    """
    modules = dict(model.named_modules())
    by_tensor: dict[tuple[Any, ...], Counter[int]] = defaultdict(Counter)
    by_shape: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    by_rank: dict[int, Counter[int]] = defaultdict(Counter)
    for event in seen:
        axis = _declared_axis(modules[event.place.module], event.tensor)
        if axis is not None:
            by_tensor[event.layout][axis] += 1
            by_shape[tuple(event.tensor.shape)][axis] += 1
            by_rank[event.tensor.ndim][axis] += 1

    def axis_of(event: Seen) -> int:
        shape = tuple(event.tensor.shape)
        votes = by_tensor.get(event.layout) or by_shape.get(shape)
        if not votes and len(shape) == 4 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
            return 3 if shape[1] == shape[2] else 1
        votes = votes or by_rank.get(len(shape))
        return votes.most_common(1)[0][0] if votes else (1 if len(shape) == 4 else len(shape) - 1)

    return axis_of


def _declared_axis(module: nn.Module, tensor: Tensor) -> int | None:
    """The channel axis of a tensor that enters or leaves a layer whose kind fixes it."""
    if isinstance(module, _ConvNd | _NormBase | nn.GroupNorm):
        return 1
    if isinstance(module, nn.Linear):
        return tensor.ndim - 1
    normalized = getattr(module, "normalized_shape", ())
    axes = [axis for axis, size in enumerate(tensor.shape) if axis and (size,) == tuple(normalized)]
    if len(axes) > 1:
        axes = [axis for axis in axes if _takes_channels_at(module, axis, tensor)]
    return axes[0] if len(axes) == 1 else None


def _takes_channels_at(module: nn.Module, axis: int, like: Tensor) -> bool:
    """Whether a normalization runs where the channels lie there and the other axes have other sizes."""
    channels = like.shape[axis]
    shape = [1, *(channels + 1 + place for place in range(1, like.ndim))]
    shape[axis] = channels
    try:
        with torch.no_grad():
            module(like.new_zeros(shape))
    except Exception:  # whatever a module raises at a shape that it was not made for
        return False
    return True
