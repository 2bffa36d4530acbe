"""Seeing what a network computes: every tensor that enters or leaves a module, the moment it does.

Tensors are told apart by what they hold, not by the module they came from: the output of a block that enters the next
convolution is one tensor, seen at two places.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Content", "Place", "Seen", "Side", "activations_in", "hooks", "is_linear_map", "watch"]

Side = Literal["in", "out"]
Content = tuple[int, int, int, int]  # address, number of values, memory they span, version: views share all four


class Place(NamedTuple):
    """One tensor that enters or leaves one call of one module.

    Attributes
    ----------
    module : str
        Name of the module; the empty one is the network.
    side : {"in", "out"}
        Before or after the call.
    call : int
        Which call of the module in this forward pass.
    item : int
        Which of the tensors, where there are several.
    """

    module: str
    side: Side
    call: int
    item: int = 0

    @property
    def name(self) -> str:
        """As a person writes it: ``act``, ``act#2``, ``conv:in``, ``lstm:2``."""
        call = f"#{self.call + 1}" if self.call else ""
        item = f":{self.item + 1}" if self.item else ""
        return f"{self.module or 'output'}{call}{':in' if self.side == 'in' else ''}{item}"


class Seen(NamedTuple):
    """A tensor at a place; equal ``content`` is one tensor or a view of it, equal ``layout`` the same view."""

    place: Place
    tensor: Tensor
    content: Content
    layout: tuple[Any, ...]


def activations_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, tuple, list, mapping or dataclass, nested or not, that can hold activations."""
    if isinstance(value, Tensor):
        strided = value.layout == torch.strided and not value.is_nested
        if strided and value.is_floating_point() and value.ndim >= 2 and value.numel():
            yield value
    elif is_dataclass(value) and not isinstance(value, type | Mapping):
        yield from activations_in([getattr(value, part.name) for part in fields(value)])
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from activations_in(part)


def is_linear_map(module: nn.Module) -> bool:
    """Whether it is a convolution or a linear layer."""
    return isinstance(module, _ConvNd | nn.Linear)


def watch(model: nn.Module, x: Tensor) -> list[Seen]:
    """Run the network and note every tensor that enters or leaves a module, in order.

    The tensors are kept, so that no address is used twice meanwhile.
    """
    seen: list[Seen] = []

    def note(place: Place, tensor: Tensor) -> None:
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        content = (tensor.data_ptr(), tensor.numel(), span, tensor._version)
        seen.append(Seen(place, tensor, content, (*content, tuple(tensor.shape), tensor.stride())))

    with torch.no_grad(), hooks(model, [name for name, _ in model.named_modules()], note):
        model(x)
    return seen


@contextmanager
def hooks(model: nn.Module, modules: Sequence[str], receive: Callable[[Place, Tensor], None]) -> Iterator[None]:
    """Call ``receive`` with every tensor that enters and that leaves each of the modules, in every forward pass."""
    calls: Counter[str] = Counter()

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for item, tensor in enumerate(activations_in((args, kwargs))):
                receive(Place(name, "in", calls[name], item), tensor)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for item, tensor in enumerate(activations_in(output)):
                receive(Place(name, "out", calls[name], item), tensor)
            calls[name] += 1

        return hook

    handles = [model.register_forward_pre_hook(lambda *_: calls.clear(), prepend=True)]
    for name in modules:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it fuses a whole encoder layer and calls none of its modules
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
