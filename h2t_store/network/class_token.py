"""Which tokens are class tokens: those that change when the class token's parameter does and no token sees another.

With every attention silenced, a change of the parameter stays where the token is; the number of tokens then tells the
tensors that hold one, also those behind an attention, from those that hold patches alone.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from h2t_store.network.attention import attention_modules
from h2t_store.network.taps import Tap
from h2t_store.network.watching import Place, hooks, in_this_thread

__all__ = ["class_positions"]

_PARAMETER = re.compile(r"(^|[._])(cls|class)_?(token|emb)[a-z]*(_?\d+|\.\d+)?$")


def class_positions(model: nn.Module, image: Tensor, taps: Sequence[Tap]) -> dict[int, int]:
    """Find class tokens.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Its class token is a parameter with such a name: ``cls_token``, ``class_embedding``, …
    image : Tensor
        ``(1, channels, height, width)``.
    taps : sequence of Tap
        Where to look: all that the network computes.

    Returns
    -------
    dict of int to int
        From a number of tokens to the position of the class token among as many; empty where there is none.
    """
    parameters = {name: value for name, value in model.named_parameters() if _PARAMETER.search(name)}
    tokens = {tap.place: tap for tap in taps if tap.kind == "tokens" and tap.shape[1] > 1}
    if not parameters or not tokens:
        return {}
    generator = torch.Generator().manual_seed(0)
    changed: dict[Tensor, Tensor] = {
        value: value + (1 + value.std(correction=0)) * torch.randn(value.shape, generator=generator).to(value)
        for value in parameters.values()
    }
    before: dict[Place, Tensor] = {}
    votes: dict[int, Counter[int]] = defaultdict(Counter)

    def remember(place: Place, tensor: Tensor) -> None:
        if place in tokens:
            before[place] = tokens[place].channels_first(tensor, 1)[0].clone()

    def compare(place: Place, tensor: Tensor) -> None:
        if place in before:
            after = tokens[place].channels_first(tensor, 1)[0]
            difference = (after - before[place]).abs().amax(0)
            moved = (difference > 1e-4 * float(difference.max())).nonzero()
            if len(moved) == 1:
                votes[after.shape[1]][int(moved)] += 1

    modules = sorted({place.module for place in tokens})
    silent = attention_modules(model, image)
    handles = [
        model.get_submodule(name).register_forward_hook(in_this_thread(lambda *call: _zeros(call[-1])))
        for name in silent
    ]
    try:
        with torch.no_grad():
            with hooks(model, modules) as listening, listening(remember):
                model(image.clone())
            with hooks(model, modules) as listening, listening(compare), _Replaced(changed):
                model(image.clone())
    finally:
        for handle in handles:
            handle.remove()
    return {count: positions.most_common(1)[0][0] for count, positions in votes.items()}


class _Replaced(TorchFunctionMode):
    """Computes with other tensors in the place of some; unlike functional_call, in this thread alone."""

    def __init__(self, tensors: dict[Tensor, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._other, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _other(self, value: Any) -> Any:
        return self.tensors.get(value, value) if isinstance(value, Tensor) else value


def _zeros(output: Any) -> Any:
    """The output with zeros for its tensors."""
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    if type(output) in (tuple, list):
        return type(output)(_zeros(part) for part in output)
    return output
