"""Which axis of an activation holds the channels, which one the images, and whether each image has rows of its own."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from h2t_store.errors import TapError
from h2t_store.network.taps import Tap
from h2t_store.network.watching import Place, Seen, Trace, hooks

_FINE = 4096  # target size for comparing images: large enough to keep positions apart


def channel_axes(trace: Trace) -> Callable[[Seen], int]:
    """Learn where the network keeps its channels; return a function from a seen tensor to its channel axis.

    The layers that take or give the tensor decide, or else those of tensors of its shape. Otherwise it is the odd one
    of the three axes of a square map, or what is usual in this network for its rank.
    """
    votes: dict[Any, Counter[int]] = defaultdict(Counter)
    for event in trace.seen:
        axis = _declared_axis(trace.modules[event.place.module], event.tensor)
        if axis is not None:
            for key in (_view(event), event.tensor.shape, event.tensor.ndim):
                votes[key][axis] += 1

    def axis_of(event: Seen) -> int:
        shape, rank = event.tensor.shape, event.tensor.ndim
        for key in (_view(event), shape):
            if key in votes:
                return votes[key].most_common(1)[0][0]
        if rank == 4 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
            return 3 if shape[1] == shape[2] else 1
        if rank in votes:
            return votes[rank].most_common(1)[0][0]
        return 1 if rank == 4 else rank - 1

    return axis_of


def _view(event: Seen) -> tuple[Any, ...]:
    """Equal for equal views of one content."""
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


def of_single_images(model: nn.Module, example: Tensor, taps: Sequence[Tap]) -> tuple[list[Tap], dict[str, str]]:
    """Taps with their batch axis; those whose rows are not of single images are left out, with the reason."""
    by_place = {tap.place: tap for tap in taps}
    wrong = {tap.name: "the network does not always run it" for tap in taps}
    second: dict[Place, Tensor] = {}

    def receive_both(place: Place, tensor: Tensor) -> None:
        if place in by_place:
            try:
                by_place[place] = tap = _with_batch_axis(by_place[place], tuple(tensor.shape))
                second[place] = tap.pool(tensor, 2, _FINE)[1:]
            except TapError as error:
                wrong[by_place[place].name] = str(error)

    def receive_alone(place: Place, tensor: Tensor) -> None:
        if place not in second:
            return
        tap = by_place[place]
        try:
            alone = tap.pool(tensor, 1, _FINE)
        except TapError:
            wrong[tap.name] = "its shape depends on the image"
            return
        tolerance = max(1e-3, 8 * torch.finfo(tensor.dtype).eps) * float(alone.nan_to_num().abs().max())
        if torch.allclose(second[place], alone, rtol=0, atol=tolerance, equal_nan=True):
            wrong.pop(tap.name, None)
        else:
            wrong[tap.name] = "its rows depend on more than one image"

    with torch.no_grad(), hooks(model, sorted({tap.place.module for tap in taps})) as listening:
        with listening(receive_both):
            model(example.clone())
        with listening(receive_alone):
            model(example[1:].clone())
    return [tap for tap in by_place.values() if tap.name not in wrong], wrong


def _with_batch_axis(tap: Tap, shape_of_two: tuple[int, ...]) -> Tap:
    """The tap with the axis along which two images are twice as long as one."""
    if len(shape_of_two) != len(tap.raw_shape):
        raise TapError("its rank depends on the number of images")
    grown = [axis for axis, size in enumerate(tap.raw_shape) if shape_of_two[axis] != size]
    if not grown:
        raise TapError("it does not grow with the number of images")
    batch_axis, last = grown[0], len(shape_of_two) - 1
    if len(grown) > 1 or shape_of_two[batch_axis] != 2 * tap.raw_shape[batch_axis]:
        raise TapError(f"two images make it {shape_of_two}, one {tap.raw_shape}: no axis holds the images")
    if tap.channel_axis != batch_axis:
        return replace(tap, batch_axis=batch_axis)
    return replace(tap, batch_axis=batch_axis, channel_axis=last if batch_axis < last else 0)
