"""The preset ``paper``: the published taps (paper, section 4 and appendix) of ResNets and ViTs.

The family is recognised by structure. A ResNet is a sequence of blocks of convolutions that add up two paths, without
linear layers and layer norms. A ViT is a sequence of blocks with an attention and an MLP on tokens of one width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from h2t_store.errors import TapError
from h2t_store.network.attention import attention_modules
from h2t_store.network.presets import blocks, classifier, outputs, within
from h2t_store.network.watching import Seen, Trace, is_linear_map, own_hooks

__all__ = ["published_taps"]


class _Block(NamedTuple):
    """A block: where in the trace its first input and its last output are."""

    name: str
    first: int
    last: int


def published_taps(trace: Trace) -> list[Seen]:
    """Tensors that the paper taps, each seen in the layout that the paper pools.

    Raises
    ------
    TapError
        If the network is neither a ResNet nor a ViT.
    """
    attentions = attention_modules(trace.model, trace.image)
    if found := _vit_blocks(trace, attentions):
        return _vit_taps(trace, attentions, found)
    if found := _resnet_blocks(trace):
        return _resnet_taps(trace, found)
    raise TapError(
        "taps: 'paper' is published for ResNet and ViT families and this network is neither: use 'activations'"
    )


def _resnet_blocks(trace: Trace) -> list[_Block]:
    """Innermost blocks of at least two convolutions, if all that keep the shape add up two paths."""
    strung = blocks(trace.model)
    if any(isinstance(part, nn.Linear | nn.LayerNorm) for name in strung for part in trace.modules[name].modules()):
        return []
    names = [
        name
        for name in strung | _of_one_class(trace.model)
        if sum(isinstance(part, _ConvNd) for part in trace.modules[name].modules()) >= 2
    ]
    found = [
        block
        for block in _in_order(trace, names)
        if trace.seen[block.first].tensor.ndim == 4 and not trace.seen[block.first].shows(trace.image)
    ]
    residual = [block for block in found if _is_residual(trace, block)]
    keeping = [b for b in found if trace.seen[b.first].tensor.shape == trace.seen[b.last].tensor.shape]
    return found if residual and set(keeping) <= set(residual) else []


def _resnet_taps(trace: Trace, found: list[_Block]) -> list[Seen]:
    """The root output, what enters each convolution of a block, the final map and the logits."""
    convolutions = {
        name
        for block in found
        for name in within(set(trace.modules), block.name)
        if isinstance(trace.modules[name], nn.Conv2d)
    }
    entering = [event for event in trace.seen if event.place.side == "in" and event.place.module in convolutions]
    after = trace.seen[found[-1].last :]
    maps = [e for e in after if e.tensor.ndim == 4 and e.tensor.shape[2:] == after[0].tensor.shape[2:]]
    return [trace.seen[found[0].first], *entering, maps[-1], *outputs(trace)]


def _is_residual(trace: Trace, block: _Block) -> bool:
    """Whether the output follows the input although a convolution whose output is as large gives zeros.

    The branches of an Inception block are not as large, because they are concatenated.
    """
    module, taken, given = trace.modules[block.name], trace.seen[block.first].tensor, trace.seen[block.last].tensor
    whole = {
        event.place.module.removeprefix(f"{block.name}.")
        for event in trace.seen[block.first : block.last]
        if isinstance(trace.modules[event.place.module], _ConvNd)
        and event.place.side == "out"
        and event.tensor.shape == given.shape
    }
    return any(_follows(module, taken, silent) for silent in whole)


def _follows(block: nn.Module, like: Tensor, silent: str) -> bool:
    """Whether two random inputs give two outputs while one layer gives zeros."""
    generator = torch.Generator().manual_seed(0)

    def zeros(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    with torch.no_grad(), own_hooks(block, after={silent: zeros}):
        try:
            one, other = (block(torch.randn(like.shape, generator=generator).to(like)) for _ in range(2))
        except Exception:  # whatever a block raises that takes more than one tensor
            return False
    return isinstance(one, Tensor) and not one.equal(other)


def _vit_blocks(trace: Trace, attentions: set[str]) -> list[_Block]:
    """Innermost blocks with an attention and an MLP, if they all take and give tokens of one width."""
    names = [
        name
        for name in blocks(trace.model)
        if within(attentions, name) and len(_linear_layers(trace, name, attentions)) >= 2
    ]
    found = _in_order(trace, names)
    tensors = [trace.seen[at].tensor for block in found for at in (block.first, block.last)]
    same = {(tensor.ndim, tensor.shape[-1]) for tensor in tensors}
    return found if len(same) == 1 and tensors[0].ndim == 3 else []


def _vit_taps(trace: Trace, attentions: set[str], found: list[_Block]) -> list[Seen]:
    """Patches without and with positions, the parts of each block, the encoded tokens and the embedding."""
    taken: set[str] = set()
    given: set[str] = set()
    for block in found:
        linear = _linear_layers(trace, block.name, attentions)
        attention = set(within(attentions, block.name)) - {block.name}
        taken |= attention or set(linear[:1])
        given |= attention | set(linear)
    inner = [
        event
        for event in trace.seen
        if event.place.item == 0 and event.place.module in (taken if event.place.side == "in" else given)
    ]
    after = trace.seen[found[-1].last :]
    tokens = after[0].tensor
    encoded = [
        event
        for event in after
        if event.tensor.ndim == 3
        and event.tensor.shape[-1] == tokens.shape[-1]
        and event.tensor.numel() >= tokens.numel()
    ]
    positioned = trace.seen[found[0].first]
    return [*_patches(trace, found), positioned, *inner, encoded[-1], *_embedding(trace, after)]


def _patches(trace: Trace, found: list[_Block]) -> list[Seen]:
    """What leaves the patch embedding: the largest module around the first linear layer without other parameters."""
    before = trace.seen[: found[0].first]
    first = next((e.place.module for e in before if is_linear_map(trace.modules[e.place.module])), None)
    if first is None:
        return []
    around = [first]
    while parent := around[-1].rpartition(".")[0]:
        if list(trace.modules[parent].parameters(recurse=False)) or within([b.name for b in found], parent):
            break
        around.append(parent)
    return [event for event in before if event.place.side == "out" and event.place.module in around][-1:]


def _embedding(trace: Trace, after: list[Seen]) -> list[Seen]:
    """What the classifier takes; without one, what linear layers take as vectors at the end."""
    entering = [event for event in after if event.place.side == "in"]
    heads = classifier(trace)
    return (
        [event for event in entering if event.place.module in heads]
        or [e for e in entering if isinstance(trace.modules[e.place.module], nn.Linear) and e.tensor.ndim == 2]
        or outputs(trace)
    )


def _of_one_class(model: nn.Module) -> set[str]:
    """Children of a module that share their class with another child."""
    found = set()
    for parent, container in model.named_modules():
        kinds = [type(child) for child in container.children()]
        for child, module in container.named_children():
            if kinds.count(type(module)) > 1 and not isinstance(module, nn.Sequential | nn.ModuleList):
                found.add(f"{parent}.{child}".lstrip("."))
    return found


def _linear_layers(trace: Trace, name: str, attentions: set[str]) -> list[str]:
    """Linear layers of a block outside its attention; all of them if the block itself is one."""
    linear = [part for part in within(list(trace.modules), name) if isinstance(trace.modules[part], nn.Linear)]
    inner = [attention for attention in within(attentions, name) if attention != name]
    return [layer for layer in linear if not any(within([layer], attention) for attention in inner)]


def _in_order(trace: Trace, names: list[str]) -> list[_Block]:
    """The innermost of the modules that take and give tensors, in the order they run."""
    innermost = {name for name in names if within(names, name) == [name]}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, event in enumerate(trace.seen):
        if event.place.module in innermost and event.place.item == 0:
            if event.place.side == "in":
                first.setdefault(event.place.module, at)
            else:
                last[event.place.module] = at
    return [_Block(name, at, last[name]) for name, at in first.items() if name in last]
