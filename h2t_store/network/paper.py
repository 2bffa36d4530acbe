"""The preset ``paper``: the published taps (paper, section 4 and appendix) of ResNets and ViTs.

The family is recognised by structure. A ResNet is a sequence of blocks of convolutions that add up two paths, without
linear layers and layer norms. A ViT is a sequence of blocks with an attention and an MLP on tokens of one width.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from h2t_store.errors import TapError
from h2t_store.network.operations import Operations
from h2t_store.network.presets import blocks, classifier, within
from h2t_store.network.watching import Seen, Trace, is_linear_map


class _Block(NamedTuple):
    """A block, its first input, its last output, and where these are in ``Trace.seen``."""

    name: str
    first_input: Tensor
    last_output: Tensor
    begin: int
    end: int


def published_taps(trace: Trace) -> list[Seen]:
    """Tensors that the paper taps, each seen in the layout that the paper pools; `TapError` for other networks."""
    operations = Operations(trace.model, trace.image)
    if found := _vit_blocks(trace, operations.attentions):
        return _vit_taps(trace, operations.attentions, found)
    if found := _resnet_blocks(trace, operations):
        return _resnet_taps(trace, found)
    raise TapError(
        "taps: 'paper' is published for ResNet and ViT families and this network is neither: use 'activations'"
    )


def _resnet_blocks(trace: Trace, operations: Operations) -> list[_Block]:
    """Innermost blocks of at least two convolutions, if all that keep the shape add up two paths."""
    listed = blocks(trace.model)
    if any(isinstance(part, nn.Linear | nn.LayerNorm) for name in listed for part in trace.modules[name].modules()):
        return []
    names = [name for name in listed | _repeated_children(trace.model) if len(_parts(trace, name, _ConvNd)) >= 2]
    found = [
        b for b in _in_order(trace, names) if b.first_input.ndim == 4 and not trace.seen[b.begin].shows(trace.image)
    ]

    def adds_paths(block: _Block) -> bool:
        size = block.last_output.shape[2:]
        return any(within([module], block.name) for module, shape in operations.sums if shape[2:] == size)

    keeping_shape = [block for block in found if block.first_input.shape == block.last_output.shape]
    return found if any(map(adds_paths, found)) and all(map(adds_paths, keeping_shape)) else []


def _resnet_taps(trace: Trace, found: list[_Block]) -> list[Seen]:
    """The root output, what enters each convolution of a block, the final map and the logits."""
    convolutions = {name for block in found for name in _parts(trace, block.name, nn.Conv2d)}
    size = found[-1].last_output.shape[2:]
    maps = [seen for seen in trace.seen[found[-1].end :] if seen.tensor.ndim == 4 and seen.tensor.shape[2:] == size]
    return [trace.seen[found[0].begin], *trace.entering(convolutions), maps[-1], *trace.outputs]


def _vit_blocks(trace: Trace, attentions: set[str]) -> list[_Block]:
    """Innermost blocks with an attention and an MLP, if they all take and give tokens of one width."""
    candidates = [name for name in blocks(trace.model) if within(attentions, name)]
    found = _in_order(trace, [name for name in candidates if len(_mlp(trace, name, attentions)) >= 2])
    same = {(tensor.ndim, tensor.shape[-1]) for block in found for tensor in (block.first_input, block.last_output)}
    return found if len(same) == 1 and found[0].first_input.ndim == 3 else []


def _vit_taps(trace: Trace, attentions: set[str], found: list[_Block]) -> list[Seen]:
    """Patches without and with positions, the parts of each block, the encoded tokens and the embedding."""
    inputs_of: set[str] = set()
    outputs_of: set[str] = set()
    for block in found:
        linear = _mlp(trace, block.name, attentions)
        attention = set(within(attentions, block.name)) - {block.name}
        inputs_of |= attention or set(linear[:1])
        outputs_of |= attention | set(linear)
    inner = [seen for seen in [*trace.entering(inputs_of), *trace.leaving(outputs_of)] if seen.place.item == 0]
    last = found[-1].last_output
    encoded = [
        seen
        for seen in trace.seen[found[-1].end :]
        if (seen.tensor.ndim, seen.tensor.shape[-1]) == (3, last.shape[-1]) and seen.tensor.numel() >= last.numel()
    ]
    positioned = trace.seen[found[0].begin]
    return [*_patches(trace, found), positioned, *inner, encoded[-1], *_embedding(trace, found[-1].end)]


def _patches(trace: Trace, found: list[_Block]) -> list[Seen]:
    """What leaves the patch embedding: the largest module around the first linear layer without other parameters."""
    before = trace.seen[: found[0].begin]
    first = next((s.place.module for s in before if is_linear_map(trace.modules[s.place.module])), None)
    if first is None:
        return []
    around = [first]
    while parent := around[-1].rpartition(".")[0]:
        if list(trace.modules[parent].parameters(recurse=False)) or within([b.name for b in found], parent):
            break
        around.append(parent)
    return [seen for seen in before if seen.place.side == "out" and seen.place.module in around][-1:]


def _embedding(trace: Trace, end: int) -> list[Seen]:
    """What the classifier takes; without one, what linear layers take as vectors at the end."""
    entering = [seen for seen in trace.seen[end:] if seen.place.side == "in"]
    heads = classifier(trace)
    return (
        [seen for seen in entering if seen.place.module in heads]
        or [s for s in entering if s.tensor.ndim == 2 and isinstance(trace.modules[s.place.module], nn.Linear)]
        or trace.outputs
    )


def _repeated_children(model: nn.Module) -> set[str]:
    """Children of a module that share their class with another child."""
    return {
        f"{parent}.{child}".lstrip(".")
        for parent, container in model.named_modules()
        for child, module in container.named_children()
        if not isinstance(module, nn.Sequential | nn.ModuleList)
        and sum(type(other) is type(module) for other in container.children()) > 1
    }


def _parts(trace: Trace, name: str, kind: type[nn.Module]) -> list[str]:
    """Modules of a kind within a module."""
    return [part for part in within(trace.modules, name) if isinstance(trace.modules[part], kind)]


def _mlp(trace: Trace, name: str, attentions: set[str]) -> list[str]:
    """Linear layers of a block outside its attention; all of them if the block itself is one."""
    inner = [attention for attention in within(attentions, name) if attention != name]
    linear = _parts(trace, name, nn.Linear)
    return [layer for layer in linear if not any(within([layer], attention) for attention in inner)]


def _in_order(trace: Trace, names: list[str]) -> list[_Block]:
    """The innermost of the modules that take and give tensors, in the order they run."""
    innermost = {name for name in names if within(names, name) == [name]}
    begin: dict[str, int] = {}
    end: dict[str, int] = {}
    for at, (place, _, _) in enumerate(trace.seen):
        if place.module in innermost and place.item == 0:
            if place.side == "in":
                begin.setdefault(place.module, at)
            else:
                end[place.module] = at
    return [
        _Block(name, trace.seen[at].tensor, trace.seen[end[name]].tensor, at, end[name])
        for name, at in begin.items()
        if name in end
    ]
