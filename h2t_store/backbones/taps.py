"""Which activations of a network become features, found by running it once and watching every module.

Tensors are told apart by what they hold, not by the module they came from: the output of a block that enters the next
convolution is one tensor and gives one tap. A tap is named after the first module that makes the tensor, or, where a
function made it (``F.relu``), after the convolution or linear layer it enters, as ``layer3.2.conv2:in``. A module
called several times in one forward pass has a tap for each call: ``act``, ``act#2``, …
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from h2t_store.backbones.pooling import Kind, pool, pooled_width
from h2t_store.errors import TapError, did_you_mean

__all__ = ["PRESETS", "Tap", "exact_convolutions", "find_taps", "tapped"]

PRESETS = ("activations", "blocks")

Side = Literal["in", "out"]
Content = tuple[int, int, int, int]  # address, number of values, memory they span, version: views share all four
_FINE = 4096  # target size for comparing images: large enough to keep positions apart


class Place(NamedTuple):
    """One call of one module, before or after it."""

    module: str
    side: Side
    call: int

    @property
    def name(self) -> str:
        """As a person writes it."""
        call = f"#{self.call + 1}" if self.call else ""
        return f"{self.module or 'output'}{call}{':in' if self.side == 'in' else ''}"


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
    """

    name: str
    place: Place
    raw_shape: tuple[int, ...]
    channel_axis: int

    @property
    def kind(self) -> Kind:
        """``map``, ``tokens`` or ``vector``."""
        if len(self.raw_shape) == 2 and self.raw_shape[0] == 1:
            return "vector"
        return "map" if len(self.raw_shape) == 4 and self.raw_shape[0] == 1 else "tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation of one image, channels first."""
        channels = self.raw_shape[self.channel_axis]
        if self.kind == "vector":
            return (channels,)
        if self.kind == "map":
            return channels, *(size for axis, size in enumerate(self.raw_shape) if axis not in (0, self.channel_axis))
        return channels, torch.Size(self.raw_shape).numel() // channels

    def width(self, target_size: int) -> int:
        """Number of features after pooling."""
        return pooled_width(self.kind, self.shape, target_size)

    def pool(self, activation: Tensor, n: int, target_size: int) -> Tensor:
        """Features (n, width) float32 of the activation of ``n`` images.

        Raises
        ------
        TapError
            Where the tensor does not consist of ``n`` equal parts of the expected shape.
        """
        if tuple(activation.shape) != (n * self.raw_shape[0], *self.raw_shape[1:]):
            raise TapError(
                f"tap {self.name!r}: shape {tuple(activation.shape)} for {n} images, "
                f"expected {(n * self.raw_shape[0], *self.raw_shape[1:])}"
            )
        by_image = activation.reshape(n, *self.raw_shape) if self.raw_shape[0] > 1 else activation.unsqueeze(1)
        return pool(by_image.movedim(self.channel_axis + 1, 1).reshape(n, *self.shape), self.kind, target_size)


class _Seen(NamedTuple):
    place: Place
    tensor: Tensor
    content: Content
    layout: tuple[Any, ...]


def find_taps(model: nn.Module, example: Tensor, taps: str | Sequence[str]) -> tuple[list[Tap], dict[str, str]]:
    """Resolve presets and globs to the taps of a network.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    example : Tensor
        ``(2, channels, height, width)``: two different inputs, to run the network on.
    taps : str or sequence of str
        Presets and globs, or one string of them joined by commas. ``activations``: what enters every convolution and
        linear layer, except the images themselves, the output of every block, and the output of the network.
        ``blocks``: the output of every block, what enters the classifier, and the output of the network. A glob over
        module names means their outputs, one that ends in ``:in`` their inputs.

    Returns
    -------
    taps : list of Tap
        In the order the network computes them; each tensor once.
    left_out : dict of str to str
        Tensors that a preset named but that are no activations of single images, with the reason.

    Raises
    ------
    TapError
        Where a glob matches nothing, or matches a tensor that is no activation of single images.
    """
    parts = taps.split(",") if isinstance(taps, str) else list(taps)
    parts = [part.strip() for part in parts if part.strip()]
    if not parts:
        raise TapError(f"taps: nothing given; accepted are {', '.join(PRESETS)} and globs over module names")
    with exact_convolutions():
        found, asked = _resolve(model, example[:1].clone(), parts)
        wrong = _not_by_image(model, example, found)
    for tap in found:
        if tap.name in wrong and tap.name in asked:
            raise TapError(f"taps: {tap.name!r} cannot become features: {wrong[tap.name]}")
    return [tap for tap in found if tap.name not in wrong], wrong


def exact_convolutions() -> AbstractContextManager[None]:
    """Convolutions in full float32: TF32, the default on CUDA, is off by more than float16 storage is."""
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False
    )
    return context


@contextmanager
def tapped(model: nn.Module, taps: Sequence[Tap], target_size: int) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """Turn a network into a function from images to the pooled activations at ``taps``.

    Every activation is pooled the moment it exists, so only pooled values outlive a layer, and what the network
    overwrites later does not matter.

    Yields
    ------
    callable
        ``(n, channels, height, width)`` images to a list of ``(n, width)`` float32 features, one per tap. Raises
        `TapError` where a tap is not reached or has another shape than expected.
    """
    index = {tap.place: i for i, tap in enumerate(taps)}
    pooled: dict[int, Tensor] = {}
    n = 0

    def receive(place: Place, tensor: Tensor) -> None:
        if place in index:
            pooled[index[place]] = taps[index[place]].pool(tensor, n, target_size)

    def forward(images: Tensor) -> list[Tensor]:
        nonlocal n
        n = len(images)
        pooled.clear()
        model(images)
        for i, tap in enumerate(taps):
            if i not in pooled:
                raise TapError(f"tap {tap.name!r}: the network did not run this module this time")
        return [pooled[i] for i in range(len(taps))]

    with _hooks(model, sorted({tap.place.module for tap in taps}), receive):
        yield forward


def _resolve(model: nn.Module, image: Tensor, parts: Sequence[str]) -> tuple[list[Tap], set[str]]:
    """Taps that presets and globs name, in the order of the forward pass, and which of them a glob named."""
    seen = _watch(model, image)
    names: dict[Content, str] = {}
    for part in parts:
        side = "in" if part.endswith(":in") else "out"
        matches = [
            event
            for event in seen
            if part not in PRESETS and event.place.side == side and fnmatchcase(event.place.name, part)
        ]
        for event in matches:
            names.setdefault(event.content, event.place.name)
        if part not in PRESETS and not matches:
            known = [event.place.name for event in seen]
            raise TapError(
                f"taps: {part!r} matches no module of the network{did_you_mean(part, known)}; accepted are "
                f"{', '.join(PRESETS)} and globs over module names such as {known[len(known) // 2]!r}"
            )
    asked = set(names.values())
    entrances = _linear_entrances(model, seen)
    for part in parts:
        if part in PRESETS:
            entered = entrances if part == "activations" else _classifier(model, seen)
            for content in _preset(model, seen, entered, image):
                names.setdefault(content, _canonical_name(content, entrances, seen))
    axes = _channel_axes(model, seen)
    taps: dict[str, Tap] = {}
    for event in seen:
        name = event.place.name
        if names.get(event.content) == name and name not in taps:
            taps[name] = Tap(name, event.place, tuple(event.tensor.shape), axes(event))
    return list(taps.values()), asked


def _not_by_image(model: nn.Module, example: Tensor, taps: Sequence[Tap]) -> dict[str, str]:
    """Names of the taps whose rows are not those of single images, with the reason: one image alone tells."""
    by_place = {tap.place: tap for tap in taps}
    wrong: dict[str, str] = {}
    alone: dict[Place, Tensor] = {}

    def receive_alone(place: Place, tensor: Tensor) -> None:
        if place in by_place:
            alone[place] = by_place[place].pool(tensor, 1, _FINE)

    def receive_both(place: Place, tensor: Tensor) -> None:
        if place not in by_place:
            return
        tap = by_place[place]
        try:
            second = tap.pool(tensor, 2, _FINE)[1:]
        except TapError:
            wrong[tap.name] = "its first axis does not grow with the number of images"
            return
        scale = float(alone[place].nan_to_num().abs().max())
        if not torch.allclose(second, alone[place], rtol=0, atol=1e-3 * scale, equal_nan=True):
            wrong[tap.name] = "its rows depend on more than one image"

    modules = sorted({tap.place.module for tap in taps})
    with torch.no_grad():
        with _hooks(model, modules, receive_alone):
            model(example[1:].clone())
        with _hooks(model, modules, receive_both):
            model(example.clone())
    return wrong


def _watch(model: nn.Module, x: Tensor) -> list[_Seen]:
    """Run the network and note every tensor that enters or leaves a module, in order.

    The tensors are kept, so that no address is used twice meanwhile.
    """
    seen: list[_Seen] = []

    def note(place: Place, tensor: Tensor) -> None:
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        content = (tensor.data_ptr(), tensor.numel(), span, tensor._version)
        seen.append(_Seen(place, tensor, content, (*content, tuple(tensor.shape), tensor.stride())))

    with torch.no_grad(), _hooks(model, [name for name, _ in model.named_modules()], note):
        model(x)
    return seen


@contextmanager
def _hooks(model: nn.Module, modules: Sequence[str], receive: Callable[[Place, Tensor], None]) -> Iterator[None]:
    """Call ``receive`` with the first tensor that enters and that leaves each of the modules, in every forward pass."""
    calls: Counter[str] = Counter()

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = _first_tensor((*args, *kwargs.values()))
            if tensor is not None:
                receive(Place(name, "in", calls[name]), tensor)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:
                receive(Place(name, "out", calls[name]), tensor)
            calls[name] += 1

        return hook

    handles = [model.register_forward_pre_hook(lambda *_: calls.clear(), prepend=True)]
    for name in modules:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: Any) -> Tensor | None:
    """The tensor, or the first one of a tuple, list or mapping, if it can hold activations."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2 and value.numel():
        return value
    return None


def _is_linear_map(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd | nn.Linear)


def _blocks(model: nn.Module) -> set[str]:
    """Modules that a Sequential or ModuleList strings together and that hold layers of their own."""
    return {
        f"{parent}.{child}".lstrip(".")
        for parent, container in model.named_modules()
        if isinstance(container, nn.Sequential | nn.ModuleList)
        for child, module in container.named_children()
        if not _is_linear_map(module) and any(_is_linear_map(part) for part in module.modules())
    }


def _preset(model: nn.Module, seen: Sequence[_Seen], entered: set[str], image: Tensor) -> list[Content]:
    """Contents of what enters the given modules, but for the images, of block outputs, and of the network's output."""
    blocks = _blocks(model)
    chosen = []
    for event in seen:
        name, side, _ = event.place
        if side == "in":
            wanted = name in entered and event.content[:2] != (image.data_ptr(), image.numel())
        else:
            wanted = name in blocks or not name
        if wanted:
            chosen.append(event.content)
    return chosen


def _linear_entrances(model: nn.Module, seen: Sequence[_Seen]) -> set[str]:
    """Convolutions and linear layers that ran, and modules that ran and use the weights of one that did not."""
    ran = {event.place.module for event in seen}
    linear = [name for name, module in model.named_modules() if _is_linear_map(module)]
    return {name if name in ran else name.rpartition(".")[0] for name in linear} & ran


def _classifier(model: nn.Module, seen: Sequence[_Seen]) -> set[str]:
    """The layer whose output is the output of the network, if it is a convolution or linear layer."""
    modules = dict(model.named_modules())
    logits = {event.content for event in seen if event.place[:2] == ("", "out")}
    return {
        event.place.module for event in seen if event.content in logits and _is_linear_map(modules[event.place.module])
    }


def _canonical_name(content: Content, entrances: set[str], seen: Sequence[_Seen]) -> str:
    """First module that returns the tensor without having been given it; else the layer it enters."""
    places = [event.place for event in seen if event.content == content]
    given = {(place.module, place.call) for place in places if place.side == "in"}
    makers = [place for place in places if place.side == "out" and (place.module, place.call) not in given]
    takers = [place for place in places if place.side == "in" and place.module in entrances]
    named = [place for place in makers if place.module] or takers or makers or places
    return named[0].name


def _channel_axes(model: nn.Module, seen: Sequence[_Seen]) -> Callable[[_Seen], int]:
    """Which axis holds the channels, learnt from the layers that each tensor, or one of its shape, goes through."""
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

    def axis_of(event: _Seen) -> int:
        shape = tuple(event.tensor.shape)
        votes = by_tensor.get(event.layout) or by_shape.get(shape)
        if not votes and len(shape) == 4 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
            return 3 if shape[1] == shape[2] else 1
        votes = votes or by_rank.get(len(shape))
        return votes.most_common(1)[0][0] if votes else (1 if len(shape) == 4 else len(shape) - 1)

    return axis_of


def _declared_axis(module: nn.Module, tensor: Tensor) -> int | None:
    """The channel axis of a tensor that enters or leaves a layer whose kind fixes it."""
    if isinstance(module, _ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return 1
    if isinstance(module, nn.Linear):
        return tensor.ndim - 1
    normalized = getattr(module, "normalized_shape", ())
    axes = [axis for axis, size in enumerate(tensor.shape) if axis and (size,) == tuple(normalized)]
    return axes[0] if len(axes) == 1 else None
