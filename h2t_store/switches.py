"""What the whole process shares, changed for as long as some thread needs it and put back afterwards."""

import threading
from collections.abc import Callable, Iterable
from functools import partial
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


def _convolutions_in_tf32() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # it contradicts "none"
        return True


_CONVOLUTIONS: list[_Setting] = [
    *_precisions([("cuda", "conv"), ("mkldnn", "conv"), ("cuda", "rnn"), ("mkldnn", "rnn")]),
    ("convolutions", _convolutions_in_tf32, partial(setattr, torch.backends.cudnn, "allow_tf32"), False),
    *(
        (
            f"cudnn {name}",
            partial(getattr, torch.backends.cudnn, name),
            partial(setattr, torch.backends.cudnn, name),
            on,
        )
        for name, on in {"enabled": True, "deterministic": True, "benchmark": False}.items()
    ),
]


def _run_module_by_module() -> Callable[[], None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


exact_arithmetic = Switch(lambda: _hold([*_PRODUCTS, *_CONVOLUTIONS]))
"""Convolutions and products in full float32: TF32 is off by more than float16 storage is."""

module_by_module = Switch(_run_module_by_module)
"""Encoder layers call their modules, which torch's fused form of them does not."""
