"""The published taps (paper, section 4 and appendix; DESIGN 2) for networks built as ResNets or as ViTs are.

A ResNet is strung of blocks of convolutions, without linear layers and layer norms, that add up two paths; a ViT of
blocks of one width with an attention and an MLP over a sequence of tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from h2t_store.errors import TapError
from h2t_store.network.attention import attention_modules
from h2t_store.network.presets import blocks, classifier
from h2t_store.network.watching import Seen, activations_in, in_this_thread, is_linear_map

__all__ = ["published_taps"]


class _Block(NamedTuple):
    """One block and where in the order of events its first call begins and its last one ends."""

    name: str
    first: int
    last: int


def published_taps(model: nn.Module, image: Tensor, seen: Sequence[Seen]) -> list[Seen]:
    """Tensors that the paper taps, each as seen where its layout is the one that the paper pools.

    Raises
    ------
    TapError
        Where the network is neither a ResNet nor a ViT.
    """
    attentions = attention_modules(model, image)
    strung = _vit_blocks(model, attentions, seen)
    if strung:
        return _vit_taps(model, attentions, seen, strung)
    strung = _resnet_blocks(model, image, seen)
    if strung:
        return _resnet_taps(model, seen, strung)
    raise TapError(
        "taps: 'paper' is published for ResNet and ViT families and this network is built as neither: use 'activations'"
    )


def _resnet_blocks(model: nn.Module, image: Tensor, seen: Sequence[Seen]) -> list[_Block]:
    """Innermost blocks of at least two convolutions, if all that keep the shape are residual."""
    modules = dict(model.named_modules())
    siblings = blocks(model) | _of_one_class(model)
    if any(isinstance(part, nn.Linear | nn.LayerNorm) for name in blocks(model) for part in modules[name].modules()):
        return []
    names = {name for name in siblings if sum(isinstance(part, _ConvNd) for part in modules[name].modules()) >= 2}
    taken = (image.data_ptr(), image.numel())
    ends = [
        block
        for block in _in_order(_innermost(names), seen)
        if seen[block.first].tensor.ndim == 4 and seen[block.first].content[:2] != taken
    ]
    residual = _residual(model, image, seen, ends)
    keeping = {block.name for block in ends if seen[block.first].tensor.shape == seen[block.last].tensor.shape}
    return ends if residual and keeping <= residual else []


def _resnet_taps(model: nn.Module, seen: Sequence[Seen], strung: Sequence[_Block]) -> list[Seen]:
    modules = dict(model.named_modules())
    within = {f"{block.name}.{part}" for block in strung for part, _ in modules[block.name].named_modules()}
    final = seen[strung[-1].last]
    maps = [
        event
        for event in seen[strung[-1].last :]
        if event.tensor.ndim == 4 and event.tensor.shape[2:] == final.tensor.shape[2:]
    ]
    convolved = [
        event
        for event in seen
        if event.place.side == "in"
        and event.place.module in within
        and isinstance(modules[event.place.module], nn.Conv2d)
    ]
    return [seen[strung[0].first], *convolved, maps[-1], *_outputs(seen)]


def _vit_blocks(model: nn.Module, attentions: set[str], seen: Sequence[Seen]) -> list[_Block]:
    """Innermost blocks with an attention and an MLP, if they all take and give tokens of one width."""
    names = {
        name for name in blocks(model) if _inside(name, attentions) and len(_linears(model, name, attentions)) >= 2
    }
    strung = _in_order(_innermost(names), seen)
    tensors = [seen[at].tensor for block in strung for at in (block.first, block.last)]
    same = {(tensor.ndim, tensor.shape[-1]) for tensor in tensors}
    return strung if len(same) == 1 and tensors[0].ndim == 3 else []


def _vit_taps(model: nn.Module, attentions: set[str], seen: Sequence[Seen], strung: Sequence[_Block]) -> list[Seen]:
    taken: set[str] = set()
    given: set[str] = set()
    for block in strung:
        linears = _linears(model, block.name, attentions)
        attention = _inside(block.name, attentions)
        separate = attention - {block.name}
        taken |= separate or set(linears[:1])
        given |= separate | set(linears)
    inner = [
        event
        for event in seen
        if event.place.item == 0 and event.place.module in (taken if event.place.side == "in" else given)
    ]
    final = seen[strung[-1].last]
    encoded = [
        event
        for event in seen[strung[-1].last :]
        if (event.tensor.ndim, event.tensor.shape[-1]) == (3, final.tensor.shape[-1])
        and event.tensor.numel() >= final.tensor.numel()
    ]
    positioned = seen[strung[0].first]
    return [
        *_patches(model, seen[: strung[0].first], strung),
        positioned,
        *inner,
        encoded[-1],
        *_embedding(model, seen, strung),
    ]


def _patches(model: nn.Module, seen: Sequence[Seen], strung: Sequence[_Block]) -> list[Seen]:
    """What leaves the patch embedding, the largest module around the first layer that owns no other parameters."""
    modules = dict(model.named_modules())
    first = next((e.place.module for e in seen if is_linear_map(modules[e.place.module])), None)
    if first is None:
        return []
    around = [first]
    while "." in around[-1]:
        parent = around[-1].rpartition(".")[0]
        owns = any(True for _ in modules[parent].parameters(recurse=False))
        if owns or any(block.name.startswith(f"{parent}.") for block in strung):
            break
        around.append(parent)
    outputs = [event for event in seen if event.place.side == "out" and event.place.module in around]
    return outputs[-1:]


def _embedding(model: nn.Module, seen: Sequence[Seen], strung: Sequence[_Block]) -> list[Seen]:
    """What the classifier takes; without a single one, what every linear layer on single vectors takes at the end."""
    modules = dict(model.named_modules())
    after = [event for event in seen[strung[-1].last :] if event.place.side == "in"]
    heads = classifier(model, seen)
    vectors = [event for event in after if event.place.module in heads] or [
        event for event in after if isinstance(modules[event.place.module], nn.Linear) and event.tensor.ndim == 2
    ]
    return vectors or _outputs(seen)


def _outputs(seen: Sequence[Seen]) -> list[Seen]:
    return [event for event in seen if not event.place.module and event.place.side == "out"]


def _of_one_class(model: nn.Module) -> set[str]:
    """Children of a module that share their class with another child."""
    found = set()
    for parent, container in model.named_modules():
        kinds = [type(child) for child in container.children()]
        for child, module in container.named_children():
            if kinds.count(type(module)) > 1 and not isinstance(module, nn.Sequential | nn.ModuleList):
                found.add(f"{parent}.{child}".lstrip("."))
    return found


def _innermost(names: set[str]) -> set[str]:
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def _inside(name: str, others: set[str]) -> set[str]:
    """Those of the modules that are the named one or within it."""
    return {other for other in others if f"{other}.".startswith(f"{name}.")}


def _linears(model: nn.Module, name: str, attentions: set[str]) -> list[str]:
    """Linear layers of a block outside its attention; all of them where the block itself is one."""
    linears = [
        f"{name}.{part}" for part, module in model.get_submodule(name).named_modules() if isinstance(module, nn.Linear)
    ]
    within = _inside(name, attentions) - {name}
    return [linear for linear in linears if not any(linear.startswith(f"{attention}.") for attention in within)]


def _in_order(names: set[str], seen: Sequence[Seen]) -> list[_Block]:
    """Blocks that take and give tensors, in the order they run."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, event in enumerate(seen):
        if event.place.module in names and event.place.item == 0:
            if event.place.side == "in":
                first.setdefault(event.place.module, at)
            else:
                last[event.place.module] = at
    return [_Block(name, at, last[name]) for name, at in first.items() if name in last]


def _residual(model: nn.Module, image: Tensor, seen: Sequence[Seen], ends: Sequence[_Block]) -> set[str]:
    """Blocks that add up two paths: their output follows their input though a convolution as large as it is silent.

    The branches of an Inception block are no such convolutions, because they are put side by side, not added.
    """
    modules = dict(model.named_modules())
    whole = {
        block.name: [
            event.place.module
            for event in seen[block.first : block.last]
            if event.place.side == "out"
            and event.place.module.startswith(f"{block.name}.")
            and isinstance(modules[event.place.module], _ConvNd)
            and event.tensor.shape == seen[block.last].tensor.shape
        ]
        for block in ends
    }
    found: set[str] = set()
    for at in range(max(map(len, whole.values()), default=0)):
        silent = {name: layers[min(at, len(layers) - 1)] for name, layers in whole.items() if layers}
        found |= _following(model, image, silent)
    return found


def _following(model: nn.Module, image: Tensor, silent: dict[str, str]) -> set[str]:
    """Blocks whose output follows their input while the layer named beside each gives zeros."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in silent}
    generator = torch.Generator()

    def scatter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        noise = (torch.randn(part.shape, generator=generator).to(part) for part in activations_in(args[0]))
        return (next(noise), *args[1:]) if isinstance(args[0], Tensor) else args

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, output: outputs[name].append(next(activations_in(output)).clone())

    handles = []
    for name, layer in silent.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(in_this_thread(scatter)))
        handles.append(module.register_forward_hook(in_this_thread(note(name))))
        quiet = model.get_submodule(layer)
        handles.append(quiet.register_forward_hook(in_this_thread(lambda _, args, output: torch.zeros_like(output))))
    try:
        with torch.no_grad():
            for seed in (0, 1):
                generator.manual_seed(seed)
                model(image.clone())
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, values in outputs.items() if not values[0].equal(values[len(values) // 2])}
