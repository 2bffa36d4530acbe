"""What the presets ``activations`` and ``blocks`` name in any network, decided by what its modules are."""

from collections.abc import Sequence

from torch import nn

from h2t_store.network.watching import Content, Seen, Trace, is_linear_map

__all__ = ["blocks", "canonical_name", "classifier", "linear_layers", "outputs", "preset", "within"]


def preset(name: str, trace: Trace) -> list[Seen]:
    """What enters linear layers (the classifier only, for ``blocks``), block outputs and the network's output."""
    entered = linear_layers(trace) if name == "activations" else classifier(trace)
    strung = blocks(trace.model) | {""}
    return [
        event
        for event in trace.seen
        if (event.place.side == "out" and event.place.module in strung)
        or (event.place.side == "in" and event.place.module in entered and not event.shows(trace.image))
    ]


def blocks(model: nn.Module) -> set[str]:
    """Modules in a Sequential or ModuleList that hold linear layers or convolutions of their own."""
    return {
        f"{parent}.{child}".lstrip(".")
        for parent, container in model.named_modules()
        if isinstance(container, nn.Sequential | nn.ModuleList)
        for child, module in container.named_children()
        if not is_linear_map(module) and any(is_linear_map(part) for part in module.modules())
    }


def linear_layers(trace: Trace) -> set[str]:
    """Convolutions and linear layers that ran, and modules that ran and use the weights of one that did not."""
    ran = {event.place.module for event in trace.seen}
    linear = [name for name, module in trace.modules.items() if is_linear_map(module)]
    return {name if name in ran else name.rpartition(".")[0] for name in linear} & ran


def classifier(trace: Trace) -> set[str]:
    """The layers that compute the network's outputs, if they are convolutions or linear layers."""
    logits = {event.content for event in outputs(trace)}
    return {
        event.place.module
        for event in trace.seen
        if event.place.side == "out" and event.content in logits and is_linear_map(trace.modules[event.place.module])
    }


def outputs(trace: Trace) -> list[Seen]:
    """What the network returns."""
    return [event for event in trace.seen if not event.place.module and event.place.side == "out"]


def canonical_name(content: Content, trace: Trace, entrances: set[str]) -> str:
    """First module that returns the tensor without having been given it; else the linear layer it enters."""
    places = [event.place for event in trace.seen if event.content == content]
    given = {(place.module, place.call) for place in places if place.side == "in"}
    makers = [place for place in places if place.side == "out" and (place.module, place.call) not in given]
    takers = [place for place in places if place.side == "in" and place.module in entrances]
    named = [place for place in makers if place.module] or takers or makers or places
    return named[0].name


def within(names: Sequence[str] | set[str], parent: str) -> list[str]:
    """The modules among the names that are the parent or lie within it."""
    return [name for name in names if f"{name}.".startswith(f"{parent}.")]
