"""The presets ``activations`` and ``blocks``, which hold for any network: what its modules are decides, not a name."""

from collections.abc import Sequence

from torch import Tensor, nn

from h2t_store.network.watching import Content, Seen, is_linear_map

__all__ = ["blocks", "canonical_name", "classifier", "linear_entrances", "preset"]


def preset(model: nn.Module, seen: Sequence[Seen], entered: set[str], image: Tensor) -> list[Content]:
    """Contents of what enters the given modules, but for the images, of block outputs, and of the network's output."""
    strung = blocks(model)
    chosen = []
    for event in seen:
        name = event.place.module
        if event.place.side == "in":
            wanted = name in entered and event.content[:2] != (image.data_ptr(), image.numel())
        else:
            wanted = name in strung or not name
        if wanted:
            chosen.append(event.content)
    return chosen


def blocks(model: nn.Module) -> set[str]:
    """Modules that a Sequential or ModuleList strings together and that hold layers of their own."""
    return {
        f"{parent}.{child}".lstrip(".")
        for parent, container in model.named_modules()
        if isinstance(container, nn.Sequential | nn.ModuleList)
        for child, module in container.named_children()
        if not is_linear_map(module) and any(is_linear_map(part) for part in module.modules())
    }


def linear_entrances(model: nn.Module, seen: Sequence[Seen]) -> set[str]:
    """Convolutions and linear layers that ran, and modules that ran and use the weights of one that did not."""
    ran = {event.place.module for event in seen}
    linear = [name for name, module in model.named_modules() if is_linear_map(module)]
    return {name if name in ran else name.rpartition(".")[0] for name in linear} & ran


def classifier(model: nn.Module, seen: Sequence[Seen]) -> set[str]:
    """The layers whose outputs are outputs of the network, if they are convolutions or linear layers."""
    modules = dict(model.named_modules())
    logits = {event.content for event in seen if not event.place.module and event.place.side == "out"}
    return {
        event.place.module
        for event in seen
        if event.place.side == "out" and event.content in logits and is_linear_map(modules[event.place.module])
    }


def canonical_name(content: Content, entrances: set[str], seen: Sequence[Seen]) -> str:
    """First module that returns the tensor without having been given it; else the layer it enters."""
    places = [event.place for event in seen if event.content == content]
    given = {(place.module, place.call) for place in places if place.side == "in"}
    makers = [place for place in places if place.side == "out" and (place.module, place.call) not in given]
    takers = [place for place in places if place.side == "in" and place.module in entrances]
    named = [place for place in makers if place.module] or takers or makers or places
    return named[0].name
