"""Settings of torch that the whole process shares, changed for as long as a fit needs them and put back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ContextDecorator, contextmanager
from functools import partial
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


_LOCK, _HELD = torch.__dict__.setdefault("_head2toe_settings", (threading.Lock(), {}))
"""Who uses a setting, and what it was before: kept with torch, as features and estimators do not know each other."""

_C: Any = torch._C
_Setting = tuple[str, Callable[[], Any], Callable[[Any], None], Any]


def _hold(settings: list[_Setting]) -> Callable[[], None]:
    """Give settings (name, how to read, how to write, value) their value until the last who holds them lets go."""
    with _LOCK:
        for name, read, write, value in settings:
            users, before = _HELD.get(name, (0, None))
            if not users:
                before = read()
                write(value)
            _HELD[name] = users + 1, before

    def let_go() -> None:
        with _LOCK:
            for name, _, write, _ in reversed(settings):
                users, before = _HELD.pop(name)
                if users > 1:
                    _HELD[name] = users - 1, before
                else:
                    write(before)

    return let_go


def _precisions(parts: Iterable[tuple[str, str]]) -> list[_Setting]:
    """Torch's newer interface to the precision of float32, since 2.9: what says "none" follows what is more general.

    Through torch._C, as the setter of torch.backends.mkldnn.fp32_precision sets another one.
    """
    if not hasattr(_C, "_get_fp32_precision_getter"):
        return []
    return [
        (
            " ".join(part),
            partial(_C._get_fp32_precision_getter, *part),
            partial(_C._set_fp32_precision_setter, *part),
            "none",
        )
        for part in parts
    ]


# The older interface cannot be read while the newer one contradicts it.
_PRODUCTS: list[_Setting] = [
    *_precisions([("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]),
    ("products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
]

_products = _Switch(lambda: _hold(_PRODUCTS))


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
