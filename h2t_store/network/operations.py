"""Which modules run an attention or add up two tensors, found by the operations of a forward pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from h2t_store.network.watching import is_linear_map, own_hooks


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotation here
    """What modules do in one forward pass of a network.

    Attributes
    ----------
    attentions : set of str
        Innermost modules with linear layers that run an attention.
    sums : set of (str, torch.Size)
        Modules that add up two tensors of a shape.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        modules = dict(model.named_modules())
        self.attentions: set[str] = set()
        self.sums: set[tuple[str, torch.Size]] = set()
        self._with_linear_layers = {
            name for name in modules if name and any(map(is_linear_map, modules[name].modules()))
        }
        self._running: list[str] = []
        enter = {name: partial(self._enter, name) for name in modules}
        with torch.no_grad(), own_hooks(model, before=enter, after=dict.fromkeys(modules, self._leave)), self:
            model(image.clone())

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "softmax" in str(func) or "attention" in str(func):
            self.attentions.update([name for name in self._running if name in self._with_linear_layers][-1:])
        elif str(func).startswith("aten.add") and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self.sums.add((self._running[-1], args[0].shape))
        return func(*args, **(kwargs or {}))
