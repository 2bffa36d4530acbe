"""Which axis of an activation holds its channels, learnt from the layers it passes through."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from h2t_store.network.watching import Seen, Trace


def channel_axes(trace: Trace) -> Callable[[Seen], int]:
    """Learn where the network keeps its channels; return a function from a seen tensor to its channel axis.

    The layers decide that the tensor passes through, or else one of its shape. Else it is the odd one of the three axes
    of a square map, or what is usual in this network for its rank.
    """
    votes: dict[Any, Counter[int]] = defaultdict(Counter)
    for event in trace.seen:
        axis = _declared_axis(trace.modules[event.place.module], event.tensor)
        if axis is not None:
            for key in (_layout(event), event.tensor.shape, event.tensor.ndim):
                votes[key][axis] += 1

    def axis_of(event: Seen) -> int:
        shape, rank = event.tensor.shape, event.tensor.ndim
        for key in (_layout(event), shape):
            if key in votes:
                return votes[key].most_common(1)[0][0]
        if rank == 4 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
            return 3 if shape[1] == shape[2] else 1
        if rank in votes:
            return votes[rank].most_common(1)[0][0]
        return 1 if rank == 4 else rank - 1

    return axis_of


def _layout(event: Seen) -> tuple[Any, ...]:
    """Equal for tensors that are the same view of the same content."""
    return event.content, event.tensor.shape, event.tensor.stride()


def _declared_axis(module: nn.Module, tensor: Tensor) -> int | None:
    """The channel axis of a tensor that enters or leaves a layer whose kind fixes it."""
    if isinstance(module, _ConvNd | _NormBase | nn.GroupNorm):
        return 1
    if isinstance(module, nn.Linear):
        return tensor.ndim - 1
    normalized = tuple(getattr(module, "normalized_shape", ()))
    axes = [axis for axis, size in enumerate(tensor.shape) if axis and (size,) == normalized]
    if len(axes) > 1:
        axes = [axis for axis in axes if _accepts_channels_at(axis, module, tensor)]
    return axes[0] if len(axes) == 1 else None


def _accepts_channels_at(axis: int, module: nn.Module, like: Tensor) -> bool:
    """Whether a normalization runs where only this axis has the number of channels."""
    channels = like.shape[axis]
    shape = [1, *(channels + 1 + other for other in range(1, like.ndim))]
    shape[axis] = channels
    try:
        with torch.no_grad():
            module(like.new_zeros(shape))
    except Exception:  # whatever a module raises for a shape it was not made for
        return False
    return True
