"""A tap is one activation of a network; a pooled tap is what is stored of it.

A tap is named after the first module that makes the tensor or, if a function made it (``F.relu``), after the linear
layer it enters: ``layer3.2.conv2:in``. The second call of a module in a forward pass is ``act#2``, the second tensor
that a module returns is ``lstm:2``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from h2t_store.errors import TapError
from h2t_store.network.pooling import Kind, pool, pooled_width, window
from h2t_store.network.watching import Place, hooks

ClassTokenPolicy = Literal["pool", "only", "keep"]


@dataclass(frozen=True)
class Tap:
    """One activation that becomes features."""

    name: str
    place: Place
    raw_shape: tuple[int, ...]  # of the tensor for one image
    channel_axis: int
    batch_axis: int = 0
    class_token: int | None = None  # position of a class token that is not pooled with the other tokens
    cls_token: ClassTokenPolicy = "pool"

    @property
    def kind(self) -> Kind:
        """``map``, ``tokens`` or ``vector``."""
        if self.class_token is not None and self.cls_token == "only":
            return "vector"
        if self.raw_shape[self.batch_axis] > 1:  # windows or slices of one image
            return "tokens"
        if len(self.raw_shape) == 2:
            return "vector"
        return "map" if len(self.raw_shape) == 4 else "tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation of one image, channels first, with a class token that is kept."""
        channels = self.raw_shape[self.channel_axis]
        if self.kind == "vector":
            return (channels,)
        if self.kind == "map":
            outside = (self.batch_axis, self.channel_axis)
            return channels, *(size for axis, size in enumerate(self.raw_shape) if axis not in outside)
        return channels, torch.Size(self.raw_shape).numel() // channels

    @property
    def _kept_tokens(self) -> int:
        return int(self.class_token is not None and self.cls_token == "keep")

    @property
    def _shape_to_pool(self) -> tuple[int, ...]:
        return (self.shape[0], self.shape[1] - 1) if self._kept_tokens else self.shape

    def window(self, target_size: int) -> tuple[int, ...]:
        """Pooling window; equal windows give equal features."""
        return window(self.kind, self._shape_to_pool, target_size)

    def width(self, target_size: int) -> int:
        """Number of features after pooling."""
        return pooled_width(self.kind, self._shape_to_pool, target_size) + self._kept_tokens * self.shape[0]

    def channels_first(self, activation: Tensor, n: int) -> Tensor:
        """View the activation of ``n`` images as ``(n, channels, *positions)``; `TapError` for another shape."""
        raw, axis = self.raw_shape, self.batch_axis
        expected = (*raw[:axis], n * raw[axis], *raw[axis + 1 :])
        if tuple(activation.shape) != expected:
            raise TapError(f"tap {self.name!r}: shape {tuple(activation.shape)} for {n} images, expected {expected}")
        by_image = activation.view(*raw[:axis], n, *raw[axis:]).movedim(axis, 0).movedim(self.channel_axis + 1, 1)
        if len(raw) == 4 and raw[axis] == 1:
            return by_image.squeeze(axis + 1 if axis > self.channel_axis else axis + 2)
        return by_image.flatten(2)

    def pool(self, activation: Tensor, n: int, target_size: int) -> Tensor:
        """Features (n, width) float32 of the activation of ``n`` images; `TapError` for another shape."""
        values = self.channels_first(activation, n)
        if self.class_token is None:
            return pool(values.flatten(1) if self.kind == "vector" else values, self.kind, target_size)
        before, token, after = values.tensor_split((self.class_token, self.class_token + 1), dim=2)
        token = token[:, :, 0].float()
        if self.cls_token == "only":
            return token
        rest = torch.cat([before, after], dim=2) if self.class_token else after
        return torch.cat([token, pool(rest, "tokens", target_size)], dim=1)


class Pooled(NamedTuple):
    """One layer as stored: a tap pooled to a target size."""

    tap: Tap
    target_size: int
    name: str  # the tap's, with @SIZE if it is stored at several sizes
    target_sizes: tuple[int, ...]  # all requested sizes that give these features

    @property
    def width(self) -> int:
        """Number of features."""
        return self.tap.width(self.target_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation of one image before pooling, channels first."""
        return self.tap.shape


def pooled_layers(taps: Sequence[Tap], target_sizes: Sequence[int]) -> list[Pooled]:
    """Layers to store of the taps at several target sizes, tap by tap.

    Sizes that pool a tap to the same features share one layer. A tap with a single layer gives it its own name, else
    each layer is ``TAP@SIZE``, with the first of its sizes.
    """
    layers = []
    for tap in taps:
        by_window: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for size in dict.fromkeys(target_sizes):
            by_window[tap.window(size)].append(size)
        for same in by_window.values():
            name = tap.name if len(by_window) == 1 else f"{tap.name}@{same[0]}"
            layers.append(Pooled(tap, same[0], name, tuple(same)))
    return layers


@contextmanager
def tapped(
    model: nn.Module, layers: Sequence[Pooled], *, compiled: bool = False
) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """Turn a network into a function from images to pooled activations, ``(n, width)`` float32 for each layer.

    Each activation is pooled as soon as it exists, so only pooled values outlive a layer and later in-place changes do
    not matter. Several threads may call the function, and tap the same network. The function raises `TapError` if a tap
    is not reached or has another shape than expected.
    """
    index: dict[Place, list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        index[layer.tap.place].append(i)
    run = torch.compile(model) if compiled else model

    def forward(images: Tensor) -> list[Tensor]:
        pooled: dict[int, Tensor] = {}

        def receive(place: Place, tensor: Tensor) -> None:
            for i in index.get(place, ()):
                pooled[i] = layers[i].tap.pool(tensor, len(images), layers[i].target_size)

        with listening(receive):
            run(images)
        for i, layer in enumerate(layers):
            if i not in pooled:
                raise TapError(f"tap {layer.tap.name!r}: the network did not run this module this time")
        return [pooled[i] for i in range(len(layers))]

    with hooks(model, sorted({layer.tap.place.module for layer in layers})) as listening:
        yield forward
