"""Where class tokens are: the tokens that change with the class token's parameter while attention is silenced.

Without attention a change of the parameter stays at its token. The number of tokens then tells which tensors hold one,
also those that an attention returns.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from h2t_store.network.operations import Operations
from h2t_store.network.taps import Tap
from h2t_store.network.watching import Place, hooks, own_hooks

_PARAMETER = re.compile(r"(^|[._])(cls|class)_?(token|emb)[a-z]*(_?\d+|\.\d+)?$")  # cls_token, class_embedding, …


def class_positions(model: nn.Module, image: Tensor, taps: Sequence[Tap]) -> dict[int, int]:
    """Find the position of the class token for each number of tokens among the taps; empty if there is none."""
    parameters = [value for name, value in model.named_parameters() if _PARAMETER.search(name)]
    tokens = {tap.place: tap for tap in taps if tap.kind == "tokens" and tap.shape[1] > 1}
    if not parameters or not tokens:
        return {}
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

    attentions = Operations(model, image).attentions
    silent = dict.fromkeys(attentions, lambda *call: tree_map_only(Tensor, torch.zeros_like, call[-1]))
    modules = sorted({place.module for place in tokens})
    with torch.no_grad(), own_hooks(model, after=silent), hooks(model, modules) as listening:
        with listening(remember):
            model(image.clone())
        with listening(compare), _Replaced(_changed(parameters)):
            model(image.clone())
    return {count: positions.most_common(1)[0][0] for count, positions in votes.items()}


def _changed(parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        value: value + (1 + value.std(correction=0)) * torch.randn(value.shape, generator=generator).to(value)
        for value in parameters
    }


class _Replaced(TorchFunctionMode):
    """Compute with other tensors in place of some; unlike functional_call, in this thread only."""

    def __init__(self, tensors: dict[Tensor, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda value: self.tensors.get(value, value), (args, kwargs or {}))
        return func(*args, **kwargs)
