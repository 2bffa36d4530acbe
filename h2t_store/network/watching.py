"""Seeing what a network computes: every tensor that enters or leaves a module, the moment it does.

Tensors are told apart by what they hold, not by the module they came from: the output of a block that enters the next
convolution is one tensor, seen at two places.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from h2t_store.switches import module_by_module

__all__ = ["Content", "Place", "Seen", "Side", "activations_in", "hooks", "in_this_thread", "is_linear_map", "watch"]

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

    with torch.no_grad(), hooks(model, [name for name, _ in model.named_modules()]) as listening, listening(note):
        model(x)
    return seen


Receive = Callable[[Place, Tensor], None]


class _Listener(threading.local):
    """Who hears what the network computes in this thread, and how often each module was called in this pass."""

    def __init__(self) -> None:
        self.receive: Receive | None = None
        self.calls: dict[str, int] = {}


@contextmanager
def hooks(model: nn.Module, modules: Sequence[str]) -> Iterator[Callable[[Receive], AbstractContextManager[None]]]:
    """Have forward passes tell of every tensor that enters and that leaves each of the modules.

    Yields
    ------
    callable
        ``with listening(receive):`` calls ``receive`` with what this thread computes meanwhile. Other threads may run
        the same network, with listeners of their own or with none.
    """
    listener = _Listener()

    def before(name: str) -> Callable[..., None]:
        # Between the two steps of removing a hook, torch calls it without the keywords.
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if listener.receive is not None:
                for item, tensor in enumerate(activations_in((args, kwargs))):
                    listener.receive(Place(name, "in", listener.calls.get(name, 0), item), tensor)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if listener.receive is not None:
                call = listener.calls.get(name, 0)
                for item, tensor in enumerate(activations_in(output)):
                    listener.receive(Place(name, "out", call, item), tensor)
                listener.calls[name] = call + 1

        return hook

    def begin(*_: Any) -> None:
        listener.calls = {}

    @contextmanager
    def listening(receive: Receive) -> Iterator[None]:
        outer, listener.receive = listener.receive, receive
        try:
            yield
        finally:
            listener.receive = outer

    handles = [model.register_forward_pre_hook(begin, prepend=True)]
    for name in modules:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with module_by_module:
            yield listening
    finally:
        for handle in handles:
            handle.remove()


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing in other threads, which may run the same network."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None
