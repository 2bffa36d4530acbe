"""What the whole process shares, changed for as long as some thread needs it and put back afterwards."""

import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import torch

__all__ = ["Switch", "exact_arithmetic", "module_by_module"]


class Switch:
    """Changed when the first thread enters, put back when the last one leaves, in whatever order they do.

    ``change`` makes the change and returns what undoes it.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._undo = self._change()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo()


_CUDNN = {"enabled": True, "deterministic": True, "benchmark": False}
# From the general to the particular: what says "none" follows the one above it. Through torch._C, as the setter of
# torch.backends.mkldnn.fp32_precision sets another one.
_PRECISIONS = [
    ("generic", "all"),
    *product(("cuda", "mkldnn"), ("all",)),
    *product(("cuda", "mkldnn"), ("matmul", "conv", "rnn")),
]
_C: Any = torch._C
_HAS_NEWER = hasattr(_C, "_get_fp32_precision_getter")  # since torch 2.9


def _compute_exactly() -> Callable[[], None]:
    """Set both of torch's interfaces; the older one cannot be read while the newer one contradicts it."""
    cudnn: Any = torch.backends.cudnn
    precisions = {}
    for part in _PRECISIONS if _HAS_NEWER else ():
        precisions[part] = _C._get_fp32_precision_getter(*part)
        _C._set_fp32_precision_setter(*part, "none")
    products = torch.get_float32_matmul_precision()
    try:
        convolutions = cudnn.allow_tf32
    except RuntimeError:  # it contradicts "none"
        convolutions = True
    flags = {name: getattr(cudnn, name) for name in _CUDNN}
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    _set(cudnn, _CUDNN)

    def undo() -> None:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        _set(cudnn, flags)
        for part, precision in precisions.items():
            _C._set_fp32_precision_setter(*part, precision)

    return undo


def _set(module: Any, values: dict[str, bool]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _run_module_by_module() -> Callable[[], None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


exact_arithmetic = Switch(_compute_exactly)
"""Convolutions and products in full float32: TF32 is off by more than float16 storage is."""

module_by_module = Switch(_run_module_by_module)
"""Encoder layers call their modules, which torch's fused form of them does not."""
