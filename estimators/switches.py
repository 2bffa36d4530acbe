"""Settings of torch that the whole process shares, changed for as long as a fit needs them and put back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import partial
from typing import Any

import torch

__all__ = ["full_precision"]

# How many use a setting, and its value before them. Kept with torch: feature store and estimators share it.
_LOCK, _HELD = torch.__dict__.setdefault("_head2toe_settings", (threading.Lock(), {}))
_PARTS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]


def _products() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None], str]]:
    """How to read and write what allows products of float32 to be less precise, and the value that does not.

    Torch has a second interface since 2.9, where "none" follows what is more general. It is set through torch._C, as
    the setter of torch.backends.mkldnn.fp32_precision sets another one. The old interface comes last: it cannot be
    read while the new one contradicts it.
    """
    settings: dict[str, tuple[Callable[[], Any], Callable[[Any], None], str]] = {}
    c: Any = torch._C
    if hasattr(c, "_get_fp32_precision_getter"):
        for part in _PARTS:
            read, write = (
                partial(each, *part) for each in (c._get_fp32_precision_getter, c._set_fp32_precision_setter)
            )
            settings[" ".join(part)] = read, write, "none"
    settings["products"] = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
    return settings


class _FullPrecision(ContextDecorator):
    """Products of float32 in float32, whatever shortcut is allowed outside: certificates rest on them.

    Settings change when the first thread enters and are put back when the last one leaves, in whatever order they do.
    """

    def __enter__(self) -> None:
        with _LOCK:
            for name, (read, write, value) in _products().items():
                users, before = _HELD.get(name, (0, None))
                if not users:
                    before = read()
                    write(value)
                _HELD[name] = users + 1, before

    def __exit__(self, *_: object) -> None:
        with _LOCK:
            for name, (_read, write, _value) in reversed(_products().items()):
                users, before = _HELD.pop(name)
                if users > 1:
                    _HELD[name] = users - 1, before
                else:
                    write(before)


full_precision = _FullPrecision
