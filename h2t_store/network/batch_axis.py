"""Which axis of an activation holds the images, and whether each image has rows of its own there."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from h2t_store.errors import TapError
from h2t_store.network.taps import Tap
from h2t_store.network.watching import Place, hooks

_FINE = 4096  # target size for comparing images: large enough to keep positions apart


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
