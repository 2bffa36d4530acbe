"""Which modules run an attention or add up two tensors, found by the operations of a forward pass."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from h2t_store.network.watching import is_linear_map, own_hooks


@dataclass(frozen=True)
class Operations:
    """What modules do in a forward pass."""

    attentions: set[str] = field(default_factory=set)  # innermost modules with linear layers that run an attention
    sums: set[tuple[str, torch.Size]] = field(default_factory=set)  # modules that add two tensors of a shape


def find_operations(model: nn.Module, image: Tensor) -> Operations:
    """Run the network and watch every operation."""
    modules = dict(model.named_modules())
    recorder = _Recorder({name for name, module in modules.items() if any(map(is_linear_map, module.modules()))})
    enter = {name: partial(recorder.enter, name) for name in modules}
    leave = dict.fromkeys(modules, recorder.leave)
    with torch.no_grad(), own_hooks(model, before=enter, after=leave), recorder:
        model(image.clone())
    return recorder.found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotation here
    def __init__(self, with_linear_layers: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.with_linear_layers = with_linear_layers - {""}
        self.running: list[str] = []
        self.found = Operations()

    def enter(self, name: str, *_: Any) -> None:
        self.running.append(name)

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "softmax" in str(func) or "attention" in str(func):
            self.found.attentions.update([name for name in self.running if name in self.with_linear_layers][-1:])
        elif str(func).startswith("aten.add") and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self.found.sums.add((self.running[-1], args[0].shape))
        return func(*args, **(kwargs or {}))
