"""What a network computes: every tensor that enters or leaves a module, seen the moment it exists.

Tensors are compared by content, not by module: the output of one block and the input of the next are one tensor.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from h2t_store.switches import module_by_module

Content = tuple[int, int, int, int]  # address, number of values, memory they span, version: views share all four


class Place(NamedTuple):
    """One tensor that enters or leaves a call of a module; the module without a name is the network."""

    module: str
    side: Literal["in", "out"]
    call: int
    item: int = 0

    @property
    def name(self) -> str:
        """As a user writes it: ``act``, ``act#2``, ``conv:in``, ``lstm:2``."""
        call = f"#{self.call + 1}" if self.call else ""
        side = ":in" if self.side == "in" else ""
        item = f":{self.item + 1}" if self.item else ""
        return f"{self.module or 'output'}{call}{side}{item}"


class Seen(NamedTuple):
    """A tensor at a place; tensors of equal content are one tensor, or views of it."""

    place: Place
    tensor: Tensor
    content: Content

    def shows(self, tensor: Tensor) -> bool:
        """Whether it is that tensor or a view of all of it, even if overwritten."""
        return self.content[:2] == (tensor.data_ptr(), tensor.numel())


class Trace:
    """One forward pass of a network on one image, with all tensors in the order they were seen.

    The tensors are kept, so no address is used twice.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.model, self.image = model, image
        self.modules = dict(model.named_modules())
        self.linear_layers = {name for name, module in self.modules.items() if is_linear_map(module)}
        self.seen: list[Seen] = []
        with torch.no_grad(), hooks(model, self.modules) as listening, listening(self._note):
            model(image)
        self.ran = {seen.place.module for seen in self.seen}

    def _note(self, place: Place, tensor: Tensor) -> None:
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.seen.append(Seen(place, tensor, (tensor.data_ptr(), tensor.numel(), span, tensor._version)))

    @cached_property
    def entrances(self) -> set[str]:
        """Linear layers that ran, and modules that ran and use the weights of one that did not."""
        return {name if name in self.ran else name.rpartition(".")[0] for name in self.linear_layers} & self.ran

    def entering(self, modules: Collection[str]) -> list[Seen]:
        """What enters the modules."""
        return [seen for seen in self.seen if seen.place.side == "in" and seen.place.module in modules]

    def leaving(self, modules: Collection[str]) -> list[Seen]:
        """What leaves the modules."""
        return [seen for seen in self.seen if seen.place.side == "out" and seen.place.module in modules]

    @property
    def outputs(self) -> list[Seen]:
        """What the network returns."""
        return self.leaving({""})


def activations_in(value: Any) -> Iterator[Tensor]:
    """The tensors that can hold activations, in a tensor, tuple, list, mapping or dataclass, nested or not."""
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


Receive = Callable[[Place, Tensor], None]
Hooks = Mapping[str, Callable[..., Any]]


class _Listener(threading.local):
    """Who receives what this thread computes, and how often each module was called."""

    receive: Receive | None = None
    calls: dict[str, int]


@contextmanager
def hooks(model: nn.Module, modules: Collection[str]) -> Iterator[Callable[[Receive], AbstractContextManager[None]]]:
    """Report the tensors that enter and leave the modules.

    ``with hooks(model, modules) as listening, listening(receive): model(x)`` calls ``receive`` for what this thread
    computes in one forward pass. Other threads may run the same network, with listeners of their own or with none.
    """
    listener = _Listener()

    def report(name: str, side: Literal["in", "out"], value: Any) -> None:
        if listener.receive is None:
            return
        call = listener.calls.setdefault(name, 0)
        for item, tensor in enumerate(activations_in(value)):
            listener.receive(Place(name, side, call, item), tensor)
        if side == "out":
            listener.calls[name] += 1

    # While another thread removes a hook, torch may call it without the keywords.
    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        report(name, "in", (args, kwargs))

    def after(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        report(name, "out", output)

    @contextmanager
    def listening(receive: Receive) -> Iterator[None]:
        listener.receive, listener.calls = receive, {}
        try:
            yield
        finally:
            listener.receive = None

    with ExitStack() as stack, module_by_module:
        for name in modules:
            module = model.get_submodule(name)
            stack.enter_context(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(partial(after, name)))
        yield listening


@contextmanager
def own_hooks(model: nn.Module, *, before: Hooks | None = None, after: Hooks | None = None) -> Iterator[None]:
    """Hook modules by name, as torch's forward (pre-)hooks do, but for calls from this thread only."""
    thread = threading.get_ident()

    def here(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *call: hook(*call) if threading.get_ident() == thread else None

    with ExitStack() as stack:
        for name, hook in (before or {}).items():
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(here(hook)))
        for name, hook in (after or {}).items():
            stack.enter_context(model.get_submodule(name).register_forward_hook(here(hook)))
        yield
