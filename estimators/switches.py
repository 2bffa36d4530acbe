"""Settings of torch that the whole process shares, changed for as long as a fit needs them and put back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ContextDecorator, contextmanager
from typing import Any

import joblib
import torch

__all__ = ["cpu_threads", "full_precision"]


class _Switch(ContextDecorator):
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


# From the general to the particular: what says "none" follows the one above it. Through torch._C, as the setter of
# torch.backends.mkldnn.fp32_precision sets another one.
_PRECISIONS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]
_C: Any = torch._C
_HAS_NEWER = hasattr(_C, "_get_fp32_precision_getter")  # since torch 2.9


def _multiply_in_float32() -> Callable[[], None]:
    """Set both of torch's interfaces; the older one cannot be read while the newer one contradicts it."""
    found = {}
    for part in _PRECISIONS if _HAS_NEWER else ():
        found[part] = _C._get_fp32_precision_getter(*part)
        _C._set_fp32_precision_setter(*part, "none")
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")

    def undo() -> None:
        torch.set_float32_matmul_precision(older)
        for part, precision in found.items():
            _C._set_fp32_precision_setter(*part, precision)

    return undo


_products = _Switch(_multiply_in_float32)


def full_precision() -> _Switch:
    """Products of float32 in float32, whatever shortcut is allowed outside: certificates rest on them."""
    return _products


_setting_threads = threading.Lock()


@contextmanager
def cpu_threads(n_jobs: int | None) -> Iterator[None]:
    """Compute on this many CPU threads; None leaves it to torch, -1 is one per core.

    Only the calling thread is affected, so that fits side by side each have the number they asked for.
    """
    if n_jobs is None:
        yield
        return
    before = torch.get_num_threads()
    _set_cpu_threads(n_jobs if n_jobs > 0 else max(1, joblib.cpu_count() + 1 + n_jobs))
    try:
        yield
    finally:
        _set_cpu_threads(before)


def _set_cpu_threads(number: int) -> None:
    """Set the number of this thread; torch sets that of threads to come with it, which is put back from a new one."""
    with _setting_threads, ThreadPoolExecutor(1) as new:
        default = new.submit(torch.get_num_threads).result()
        torch.set_num_threads(number)
        new.submit(torch.set_num_threads, default).result()
