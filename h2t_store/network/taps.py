"""A tap is one activation of a network; a pooled tap is what is stored of it.

A tap is named after the first module that makes the tensor, or, where a function made it (``F.relu``), after the
convolution or linear layer it enters, as ``layer3.2.conv2:in``. A module called several times in one forward pass has a
tap for each call: ``act``, ``act#2``, …; one that returns several tensors has one for each: ``lstm``, ``lstm:2``, …
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

__all__ = ["ClassTokenPolicy", "Pooled", "Tap", "pooled_layers", "tapped"]

ClassTokenPolicy = Literal["pool", "only", "keep"]


@dataclass(frozen=True)
class Tap:
    """One activation that becomes features.

    Attributes
    ----------
    name : str
        Module name, with ``:in`` where it is the module's input and ``#2`` where it is the second call.
    place : Place
        Where it is seen.
    raw_shape : tuple of int
        Shape of the tensor for one image.
    channel_axis : int
        Which axis of the tensor holds the channels.
    batch_axis : int
        Which axis of the tensor grows with the number of images.
    class_token : int, optional
        Which position holds a class token that is not pooled with the others.
    cls_token : {"pool", "only", "keep"}
        What happens to that token: it stands alone, or beside the pooled others.
    """

    name: str
    place: Place
    raw_shape: tuple[int, ...]
    channel_axis: int
    batch_axis: int = 0
    class_token: int | None = None
    cls_token: ClassTokenPolicy = "pool"

    @property
    def kind(self) -> Kind:
        """``map``, ``tokens`` or ``vector``."""
        if self.class_token is not None and self.cls_token == "only":
            return "vector"
        rank = len(self.raw_shape) if self.raw_shape[self.batch_axis] == 1 else 0
        return "vector" if rank == 2 else "map" if rank == 4 else "tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation of one image, channels first; a class token is among the tokens it is kept beside."""
        channels = self.raw_shape[self.channel_axis]
        if self.kind == "vector":
            return (channels,)
        if self.kind == "map":
            outside = (self.batch_axis, self.channel_axis)
            return channels, *(size for axis, size in enumerate(self.raw_shape) if axis not in outside)
        return channels, torch.Size(self.raw_shape).numel() // channels

    @property
    def _pooled_shape(self) -> tuple[int, ...]:
        """What is left to pool once a kept class token is taken out."""
        if self.class_token is not None and self.cls_token == "keep":
            return self.shape[0], self.shape[1] - 1
        return self.shape

    def window(self, target_size: int) -> tuple[int, ...]:
        """Pooling window; equal ones give equal features."""
        return window(self.kind, self._pooled_shape, target_size)

    def width(self, target_size: int) -> int:
        """Number of features after pooling."""
        pooled = pooled_width(self.kind, self._pooled_shape, target_size)
        return pooled + self.shape[0] if self._pooled_shape != self.shape else pooled

    def channels_first(self, activation: Tensor, n: int) -> Tensor:
        """The activation of ``n`` images as ``(n, channels, *positions)``; a view wherever one will do.

        Raises
        ------
        TapError
            Where the tensor does not consist of ``n`` equal parts of the expected shape.
        """
        raw, axis = self.raw_shape, self.batch_axis
        expected = (*raw[:axis], n * raw[axis], *raw[axis + 1 :])
        if tuple(activation.shape) != expected:
            raise TapError(f"tap {self.name!r}: shape {tuple(activation.shape)} for {n} images, expected {expected}")
        by_image = activation.view(*raw[:axis], n, *raw[axis:]).movedim(axis, 0).movedim(self.channel_axis + 1, 1)
        if len(raw) == 4 and raw[axis] == 1:
            return by_image.squeeze(axis + 1 if axis > self.channel_axis else axis + 2)
        return by_image.flatten(2)

    def pool(self, activation: Tensor, n: int, target_size: int) -> Tensor:
        """Features (n, width) float32 of the activation of ``n`` images.

        Raises
        ------
        TapError
            Where the tensor does not consist of ``n`` equal parts of the expected shape.
        """
        values = self.channels_first(activation, n)
        if self.class_token is None:
            return pool(values.flatten(1) if self.kind == "vector" else values, self.kind, target_size)
        token = values[:, :, self.class_token].float()
        if self.cls_token == "only":
            return token
        rest = values[:, :, 1:]
        if self.class_token:
            rest = torch.cat([values[:, :, : self.class_token], values[:, :, self.class_token + 1 :]], dim=2)
        return torch.cat([token, pool(rest, "tokens", target_size)], dim=1)


class Pooled(NamedTuple):
    """One layer as stored: a tap pooled to a target size.

    Attributes
    ----------
    tap : Tap
        The activation.
    target_size : int
        Length that pooling aims at.
    name : str
        The tap's, with ``@SIZE`` where it is stored at several sizes.
    target_sizes : tuple of int
        All the sizes asked for that give these very features.
    """

    tap: Tap
    target_size: int
    name: str
    target_sizes: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of features."""
        return self.tap.width(self.target_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation of one image before pooling, channels first."""
        return self.tap.shape


def pooled_layers(taps: Sequence[Tap], target_sizes: Sequence[int]) -> list[Pooled]:
    """What to store of the taps at several target sizes, nothing twice.

    Parameters
    ----------
    taps : sequence of Tap
        In the order of the network.
    target_sizes : sequence of int
        Lengths that pooling aims at; repeated ones count once.

    Returns
    -------
    list of Pooled
        Tap by tap, sizes in the order given. A tap that pools to the same features at all sizes has one layer with its
        own name; another has a layer for each distinct result, ``TAP@SIZE`` with the first size that gives it.

    Raises
    ------
    TapError
        Where no size is given or one is below 1.
    """
    sizes = tuple(dict.fromkeys(target_sizes))
    if not sizes or min(sizes) < 1:
        raise TapError(f"target_size {list(target_sizes)}: accepted are whole numbers from 1, at least one")
    layers = []
    for tap in taps:
        by_window: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for size in sizes:
            by_window[tap.window(size)].append(size)
        for served in by_window.values():
            name = tap.name if len(by_window) == 1 else f"{tap.name}@{served[0]}"
            layers.append(Pooled(tap, served[0], name, tuple(served)))
    return layers


@contextmanager
def tapped(
    model: nn.Module, layers: Sequence[Pooled], *, compiled: bool = False
) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """Turn a network into a function from images to pooled activations.

    Every activation is pooled the moment it exists, once per target size, so only pooled values outlive a layer, and
    what the network overwrites later does not matter. Several threads may call it at once, and tap the same network.

    Yields
    ------
    callable
        ``(n, channels, height, width)`` images to a list of ``(n, width)`` float32 features, one per layer. Raises
        `TapError` where a tap is not reached or has another shape than expected.
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
