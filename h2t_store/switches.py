"""Global settings, changed for as long as any thread needs them and put back afterwards."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch


class Switch:
    """Change something when the first thread enters, undo it when the last one leaves, in whatever order they do.

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


class _Setting(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    value: Any


# How many use a setting, and its value before them. Kept with torch: the estimators hold some of the same settings.
_LOCK, _HELD = torch.__dict__.setdefault("_head2toe_settings", (threading.Lock(), {}))


class _Held:
    """Settings of torch that have a value while any thread is inside; each setting has its own count."""

    def __init__(self, *settings: _Setting) -> None:
        self._settings = settings

    def __enter__(self) -> None:
        with _LOCK:
            for name, read, write, value in self._settings:
                users, before = _HELD.get(name, (0, None))
                if not users:
                    before = read()
                    write(value)
                _HELD[name] = users + 1, before

    def __exit__(self, *_: object) -> None:
        with _LOCK:
            for name, _, write, _ in reversed(self._settings):
                users, before = _HELD.pop(name)
                if users > 1:
                    _HELD[name] = users - 1, before
                else:
                    write(before)


def _precisions(*parts: tuple[str, str]) -> list[_Setting]:
    """Torch's newer interface to the precision of float32, since 2.9: "none" follows the more general setting.

    Through torch._C, because the setter of torch.backends.mkldnn.fp32_precision sets another one.
    """
    c: Any = torch._C
    if not hasattr(c, "_get_fp32_precision_getter"):
        return []
    read, write = c._get_fp32_precision_getter, c._set_fp32_precision_setter
    return [_Setting(" ".join(part), partial(read, *part), partial(write, *part), "none") for part in parts]


def _cudnn(**values: bool) -> list[_Setting]:
    cudnn = torch.backends.cudnn
    return [
        _Setting(f"cudnn {name}", partial(getattr, cudnn, name), partial(setattr, cudnn, name), value)
        for name, value in values.items()
    ]


def _convolutions_in_tf32() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # it contradicts "none"
        return True


exact_arithmetic = _Held(
    # The older interface cannot be read while the newer one contradicts it.
    *_precisions(("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")),
    _Setting("products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    *_precisions(("cuda", "conv"), ("mkldnn", "conv"), ("cuda", "rnn"), ("mkldnn", "rnn")),
    _Setting("convolutions", _convolutions_in_tf32, partial(setattr, torch.backends.cudnn, "allow_tf32"), False),
    *_cudnn(enabled=True, deterministic=True, benchmark=False),
)
"""Convolutions and products in full float32: TF32 is off by more than float16 storage is."""

_mha: Any = torch.backends.mha
module_by_module = _Held(_Setting("fast path", _mha.get_fastpath_enabled, _mha.set_fastpath_enabled, False))
"""Encoder layers call their modules; torch's fused form does not."""
