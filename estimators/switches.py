"""Settings of torch that the whole process shares, changed for as long as a fit needs them and put back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ContextDecorator, contextmanager
from functools import partial
from typing import Any

import joblib
import torch

__all__ = ["cpu_threads", "full_precision"]

# How many use a setting, and its value before them. Kept with torch: feature store and estimators share it.
_LOCK, _HELD = torch.__dict__.setdefault("_head2toe_settings", (threading.Lock(), {}))
_C: Any = torch._C


def _products() -> list[tuple[str, Callable[[], Any], Callable[[Any], None], Any]]:
    """(name, how to read, how to write, value) of what allows products of float32 to be less precise.

    Torch has a second interface since 2.9, where "none" follows what is more general. It is set through torch._C, as
    the setter of torch.backends.mkldnn.fp32_precision sets another one. The old interface comes last: it cannot be
    read while the new one contradicts it.
    """
    parts = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]
    newer = parts if hasattr(_C, "_get_fp32_precision_getter") else []
    return [
        *(
            (
                " ".join(part),
                partial(_C._get_fp32_precision_getter, *part),
                partial(_C._set_fp32_precision_setter, *part),
                "none",
            )
            for part in newer
        ),
        ("products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    ]


class _FullPrecision(ContextDecorator):
    """Changed when the first thread enters, put back when the last one leaves, in whatever order they do."""

    def __enter__(self) -> None:
        with _LOCK:
            for name, read, write, value in _products():
                users, before = _HELD.get(name, (0, None))
                if not users:
                    before = read()
                    write(value)
                _HELD[name] = users + 1, before

    def __exit__(self, *_: object) -> None:
        with _LOCK:
            for name, _read, write, _value in reversed(_products()):
                users, before = _HELD.pop(name)
                if users > 1:
                    _HELD[name] = users - 1, before
                else:
                    write(before)


def full_precision() -> _FullPrecision:
    """Products of float32 in float32, whatever shortcut is allowed outside: certificates rest on them."""
    return _FullPrecision()


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
