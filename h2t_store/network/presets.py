"""What the presets ``activations`` and ``blocks`` name in any network, decided by what its modules are."""

from collections.abc import Collection

from torch import nn

from h2t_store.network.watching import Content, Seen, Trace, is_linear_map


def preset(name: str, trace: Trace) -> list[Seen]:
    """Inputs of linear layers (``activations``) or of the classifier (``blocks``), block outputs and the output."""
    entered = trace.entrances if name == "activations" else classifier(trace)
    entering = [seen for seen in trace.entering(entered) if not seen.shows(trace.image)]
    return [*entering, *trace.leaving(blocks(trace.model)), *trace.outputs]


def blocks(model: nn.Module) -> set[str]:
    """Modules in a Sequential or ModuleList that hold linear layers or convolutions of their own."""
    return {
        f"{parent}.{child}".lstrip(".")
        for parent, container in model.named_modules()
        if isinstance(container, nn.Sequential | nn.ModuleList)
        for child, module in container.named_children()
        if not is_linear_map(module) and any(is_linear_map(part) for part in module.modules())
    }


def classifier(trace: Trace) -> set[str]:
    """The layers that compute the network's outputs, if they are convolutions or linear layers."""
    logits = {seen.content for seen in trace.outputs}
    return {seen.place.module for seen in trace.leaving(trace.linear_layers) if seen.content in logits}


def canonical_name(content: Content, trace: Trace) -> str:
    """First module that returns the tensor without having been given it; else the linear layer it enters."""
    places = [seen.place for seen in trace.seen if seen.content == content]
    given = {(place.module, place.call) for place in places if place.side == "in"}
    makers = [place for place in places if place.side == "out" and (place.module, place.call) not in given]
    takers = [place for place in places if place.side == "in" and place.module in trace.entrances]
    named = [place for place in makers if place.module] or takers or makers or places
    return named[0].name


def within(names: Collection[str], parent: str) -> list[str]:
    """The modules among the names that are the parent or lie within it."""
    return [name for name in names if f"{name}.".startswith(f"{parent}.")]
