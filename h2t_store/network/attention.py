"""Which modules are attention: those that compute a softmax or a fused attention, found by the operations they run."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from h2t_store.network.watching import is_linear_map, own_hooks

__all__ = ["attention_modules"]


def attention_modules(model: nn.Module, image: Tensor) -> set[str]:
    """Names of the innermost modules that hold linear layers and run an attention."""
    names = [name for name, _ in model.named_modules()]
    operations = _Operations(
        {name for name, module in model.named_modules() if any(is_linear_map(part) for part in module.modules())}
    )
    enter = {name: partial(operations.enter, name) for name in names}
    with torch.no_grad(), own_hooks(model, before=enter, after=dict.fromkeys(names, operations.leave)), operations:
        model(image.clone())
    return operations.attentions - {""}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotation here
    """Sees every operation, and which modules are running."""

    def __init__(self, holders: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.holders = holders
        self.running: list[str] = []
        self.attentions: set[str] = set()

    def enter(self, name: str, *_: Any) -> None:
        self.running.append(name)

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "softmax" in str(func) or "attention" in str(func):
            self.attentions.update([name for name in self.running if name in self.holders][-1:])
        return func(*args, **(kwargs or {}))
