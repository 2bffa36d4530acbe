"""Which modules are attention: those that compute a softmax or a fused attention over tensors they project themselves.

The operations a network runs tell it, whatever its classes are called.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from h2t_store.network.watching import in_this_thread, is_linear_map

__all__ = ["attention_modules"]


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotation here
    """Calls ``note`` with the name of every operation that torch runs."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(str(func))
        return func(*args, **(kwargs or {}))


def attention_modules(model: nn.Module, image: Tensor) -> set[str]:
    """Names of the innermost modules that run an attention and hold linear maps; found by running the network."""
    running: list[str] = []
    holders = {name for name, module in model.named_modules() if any(is_linear_map(part) for part in module.modules())}
    found: set[str] = set()

    def note(operation: str) -> None:
        if "softmax" in operation or "attention" in operation:
            found.update([name for name in running if name in holders][-1:])

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(in_this_thread(lambda *_, name=name: running.append(name))))
        handles.append(module.register_forward_hook(in_this_thread(leave)))
    try:
        with torch.no_grad(), _Operations(note):
            model(image.clone())
    finally:
        for handle in handles:
            handle.remove()
    return found - {""}
