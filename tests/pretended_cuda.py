"""Two pretended CUDA cards, for machines without one: values lie in main memory, but say and obey device "cuda:0".

::

    with pretended_cuda() as gpu:
        group_lasso_path(X, y, device="cuda")
    gpu.launches, gpu.waits, gpu.sites, gpu.pinned_bytes

What is wrong on a real card is an error here, on any machine and every time:

- one operation on tensors of two devices, memory of a card that is pinned or read by numpy, a CPU generator used there;
- a stream that reads what another one may not have written yet, or writes what another one may still read;
- pinned memory that is written while it is being copied to a card;
- memory that its stream may use for something else while another stream still reads it;
- more memory than a card has.

What is copied to the host without waiting is NaN (or 0) until the host waits for it. Launches are estimates; waits of
the host are counted by the line of code that they are in. There are no gradients.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

N_CARDS = 2
_CPU = torch.device("cpu")
_ROOT = Path(__file__).resolve().parents[1]
_NOT_THE_CALLER = (str(Path(torch.__file__).parent), __file__, "contextlib.py", "unittest/mock.py")

_NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"}
_LAUNCHES = {"logsumexp": 9, "nonzero": 4, "sort": 4, "topk": 3, "_linalg_solve_ex": 10, "linalg_cholesky_ex": 8}
_LAUNCHES_PER_MASK = 4
_WAITING = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("bincount", "repeat_interleave", "_linalg_check_errors"),
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_ON_THE_CPU = {"cudnn_batch_norm": lambda *args: (*torch.ops.aten.native_batch_norm(*args), torch.empty(0))}

Clock = dict["Stream", int]


class CardTensor(Tensor):
    """A tensor that says it is on a card; its ``values`` are in main memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    values: Tensor

    def __new__(cls, values: Tensor, device: torch.device) -> CardTensor:
        form = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = Tensor._make_wrapper_subclass(cls, values.size(), **form, device=device)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func} on a tensor of a pretended card outside pretended_cuda()")

    def __repr__(self) -> str:
        return f"{self.values!r} on pretended {self.device}"


# Order: who has seen what. A clock tells how many operations of each stream are known to have run.


class Stream:
    """`torch.cuda.Stream`. Its clock has what is sure to have run before its next operation."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = _GPU.resolve("cuda" if device is None else device)
        self.clock: Clock = {self: 0}

    def begin(self) -> int:
        """The number of the next operation; the host launches it, and has waited for what it knows."""
        _join(self.clock, _GPU.known)
        self.clock[self] += 1
        return self.clock[self]

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        _join(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        _join(self.clock, other.clock)

    def synchronize(self) -> None:
        _GPU.wait(self.clock)


class Event:
    """`torch.cuda.Event`; happens as late as it may: when the host waits for it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or _GPU.stream()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _GPU.stream()).wait_event(self)

    def query(self) -> bool:
        return _covers(_GPU.known, self.clock)

    def synchronize(self) -> None:
        _GPU.wait(self.clock)


def _join(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        if count > clock.get(stream, 0):
            clock[stream] = count


def _covers(clock: Clock, other: Clock) -> bool:
    return all(clock.get(stream, 0) >= count for stream, count in other.items())


class Memory:
    """Memory of a card, which its stream may use for something else as soon as no tensor is left in it."""

    def __init__(self, gpu: Gpu, device: torch.device, size: int) -> None:
        self.gpu, self.device, self.size, self.home = gpu, device, size, gpu.stream(device)
        self.written: Clock = {}
        self.read: Clock = {}
        self.recorded: set[Stream] = set()
        gpu.allocate(device, size)

    def use(self, stream: Stream, count: int, *, writes: bool) -> None:
        """Note an operation, and whether it might overtake another one."""
        earlier = self.written | self.read if writes else self.written
        if not _covers(stream.clock, {other: at for other, at in earlier.items() if other is not stream}):
            verb = "writes what another may still use" if writes else "reads what another may not have written yet"
            raise RuntimeError(f"a stream {verb}: it must wait for an event of that stream")
        (self.written if writes else self.read)[stream] = count

    def __del__(self) -> None:
        self.gpu.allocated[self.device] -= self.size
        used = {stream: count for stream, count in (self.written | self.read).items() if stream is not self.home}
        kept_for = self.recorded | {stream for stream in used if self.gpu.known.get(stream, 0) >= used[stream]}
        if not _covers(self.home.clock, {stream: used[stream] for stream in used.keys() - kept_for}):
            self.gpu.errors.append("memory was freed for its stream while another one used it, without record_stream")


@dataclass
class _Copy:
    """A copy between pinned memory and a card that the host has not waited for."""

    stream: Stream
    count: int
    host: Tensor
    values: Tensor
    arrives: bool

    def end(self) -> None:
        if self.arrives:
            with torch.inference_mode():
                self.host.copy_(self.values)
        elif not torch.equal(_as_bytes(self.host), _as_bytes(self.values)):
            raise RuntimeError("pinned memory was written while it was being copied to the card")


def _as_bytes(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


# The cards, and what happens on them.


class Gpu:
    """What happened on the pretended cards.

    Attributes
    ----------
    launches : int
        Kernels, roughly.
    waits : int
        How often the host waited.
    sites : Counter of str
        Waits by the line of code they are in, ``"estimators/x.py:12"``.
    pinned_bytes : int
        Pinned memory that was asked for, whether or not it was given back since.
    allocated, peak, reserved : Counter of torch.device
        Bytes that tensors are in, the most of them at once, and those that torch has taken from a card.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.launches = self.waits = self.pinned_bytes = 0
        self.sites: Counter[str] = Counter()
        self.allocated: Counter[torch.device] = Counter()
        self.peak: Counter[torch.device] = Counter()
        self.reserved: Counter[torch.device] = Counter()
        self.errors: list[str] = []
        self.known: Clock = {}
        self.in_flight: list[_Copy] = []
        self.lock = threading.RLock()
        self._default: dict[torch.device, Stream] = {}
        self._thread = threading.local()

    # Which card and stream a thread is using.

    @property
    def card(self) -> int:
        return getattr(self._thread, "card", 0)

    @card.setter
    def card(self, index: int) -> None:
        self._thread.card = self.resolve(index).index

    def resolve(self, device: Any) -> torch.device:
        """With its index, which is that of the thread's card where it is not given."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        resolved = device if device.index is not None else torch.device("cuda", self.card)
        if resolved.index >= N_CARDS:
            raise RuntimeError(f"CUDA error: invalid device ordinal {resolved.index}")
        return resolved

    def stream(self, device: Any = None) -> Stream:
        device = self.resolve("cuda" if device is None else device)
        chosen = getattr(self._thread, "streams", {}).get(device)
        return chosen or self.default_stream(device)

    def default_stream(self, device: Any = None) -> Stream:
        device = self.resolve("cuda" if device is None else device)
        return self._default.setdefault(device, Stream(device))

    @contextmanager
    def using_stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        before = getattr(self._thread, "streams", {})
        self._thread.streams = before | {stream.device: stream}
        try:
            with self.using_card(stream.device):
                yield
        finally:
            self._thread.streams = before

    @contextmanager
    def using_card(self, device: Any) -> Iterator[None]:
        before, self.card = self.card, self.resolve(device).index
        try:
            yield
        finally:
            self.card = before

    # Memory.

    def allocate(self, device: torch.device, size: int) -> None:
        if self.allocated[device] + size > self.memory:
            self.allocated[device] += size  # given back with the memory that was not to be had
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size} bytes on pretended {device}")
        self.allocated[device] += size
        self.peak[device] = max(self.peak[device], self.allocated[device])
        self.reserved[device] = max(self.reserved[device], self.allocated[device])

    def empty_cache(self) -> None:
        self.reserved = Counter(self.allocated)

    def memory_of(self, values: Tensor, device: torch.device) -> Memory:
        storage: Any = values.untyped_storage()
        if not hasattr(storage, "memory"):
            storage.memory = Memory(self, device, storage.nbytes())
        return storage.memory

    def pin(self, values: Tensor) -> Tensor:
        """A pinned copy. As torch's, it spans the memory that the strides span."""
        if _is_pinned(values):
            return values
        span = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, values.stride(), strict=True))
        size = span if values.numel() else 0
        self.pinned_bytes += size * values.element_size()
        pinned = torch.empty(size, dtype=values.dtype).as_strided(values.shape, values.stride()).copy_(values)
        return _as_pinned(pinned)

    def to_card(self, values: Tensor, device: Any, *, non_blocking: bool = False) -> CardTensor:
        """Copy from the host; without waiting only if the memory is pinned and in one piece."""
        with self.lock:
            device = self.resolve(device)
            if values.layout != torch.strided:
                raise NotImplementedError("only strided tensors on pretended cards")
            moved = CardTensor(values.clone(), device)
            stream = self.stream(device)
            count = self.launch(stream, 1)
            self.memory_of(moved.values, device).use(stream, count, writes=True)
            self._transfer(stream, count, values, moved.values, arrives=False, non_blocking=non_blocking)
            return moved

    def _transfer(
        self, stream: Stream, count: int, host: Tensor, values: Tensor, *, arrives: bool, non_blocking: bool
    ) -> None:
        same = host.dtype == values.dtype and host.stride() == values.stride() and _is_dense(host)
        if non_blocking and same and _is_pinned(host):
            self.in_flight.append(_Copy(stream, count, host, values.clone(), arrives))
            if arrives:
                host.fill_(float("nan") if host.is_floating_point() else 0)
        else:
            self.wait(stream.clock)
            if arrives:
                host.copy_(values)

    # Operations.

    def launch(self, stream: Stream, n: int) -> int:
        self.launches += n
        return stream.begin()

    def wait(self, clock: Clock) -> None:
        """The host waits until what is in the clock has run."""
        with self.lock:
            self.waits += 1
            self.sites[_site()] += 1
            _join(self.known, clock)
            done = [copy for copy in self.in_flight if self.known.get(copy.stream, 0) >= copy.count]
            self.in_flight = [copy for copy in self.in_flight if copy not in done]
            for copy in done:
                copy.end()

    def synchronize(self, device: Any = None) -> None:
        self.wait(self.stream(device).clock)

    def finish(self) -> None:
        """Everything runs to its end; what went wrong in silence is raised."""
        for copy in self.in_flight:
            copy.end()
        self.in_flight = []
        if self.errors:
            raise RuntimeError(self.errors[0])

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self.memory_of(_values(tensor), tensor.device).recorded.add(stream)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation of torch in which a card takes part."""
        name = func._schema.name.split("::")[1]
        if name in ("copy_", "_to_copy"):
            return self._copy(func, args, kwargs)
        used = list(_uses(func, args, kwargs))
        device = _device_of_all(func, name, used)
        if device is None or kwargs.get("device") is not None:
            device = self.resolve(kwargs["device"])
        if _on_the_cpu(kwargs.get("generator")):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        by_values = {id(a.values): a for a, _ in used if isinstance(a, CardTensor)}
        plain_args = [_nested(_values, part) for part in args]
        plain = {key: _nested(_values, part) for key, part in kwargs.items()}
        if plain.get("device") is not None:
            plain["device"] = _CPU
        result = _ON_THE_CPU.get(name, func)(*plain_args, **plain)
        if func.is_view:
            return _on_card(result, device, by_values)
        stream = self.stream(device)
        masks, waits = _cost_of_indices(name, used)
        count = self.launch(stream, 0 if name in _NO_LAUNCH else _LAUNCHES.get(name, 1) + _LAUNCHES_PER_MASK * masks)
        makes_its_own = name.startswith("new_") or name.endswith("_like")
        for tensor, writes in () if makes_its_own else used:
            if isinstance(tensor, CardTensor):
                self.memory_of(tensor.values, device).use(stream, count, writes=writes)
        for made in _tensors(result):
            if id(made) not in by_values:
                self.memory_of(made, device).use(stream, count, writes=True)
        for _ in range(waits + (name in _WAITING)):
            self.wait(stream.clock)
        return _on_card(result, device, by_values)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Between devices, or within one."""
        if func._schema.name == "aten::copy_":
            target, source = args[:2]
            non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            source, non_blocking = args[0], bool(kwargs.get("non_blocking"))
            device = source.device if kwargs.get("device") is None else kwargs["device"]
            options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
            made = func(_values(source), **options | {"device": _CPU, "pin_memory": None})
            if device.type != "cuda":
                target = _as_pinned(made) if non_blocking else made
            elif not isinstance(source, CardTensor):
                return self.to_card(func(source, **options), device, non_blocking=non_blocking)
            else:
                target = CardTensor(made, self.resolve(device))
        # Between two cards the current stream of each waits for that of the other, before and after.
        stream, *others = (self.stream(a.device) for a in (target, source) if isinstance(a, CardTensor))
        for other in others:
            stream.wait_stream(other)
        count = self.launch(stream, 1)
        for tensor, writes in ((source, False), (target, True)):
            if isinstance(tensor, CardTensor):
                self.memory_of(tensor.values, tensor.device).use(stream, count, writes=writes)
        for other in others:
            other.wait_stream(stream)
        if isinstance(target, CardTensor):
            target.values.copy_(_values(source))
            if not isinstance(source, CardTensor):
                self._transfer(stream, count, source, target.values, arrives=False, non_blocking=non_blocking)
        else:
            values = torch.empty_like(target).copy_(_values(source))
            same = source.dtype == target.dtype
            self._transfer(stream, count, target, values, arrives=True, non_blocking=non_blocking and same)
        return target


def _uses(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """Tensors among the arguments, and whether each is written."""
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            yield tensor, writes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _nested(change: Any, value: Any) -> Any:
    """What becomes of the tensors in a value."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_nested(change, part) for part in value) if type(value) in (list, tuple) else value


def _device_of_all(func: Any, name: str, used: list[tuple[Tensor, bool]]) -> torch.device | None:
    """The one card of an operation. Read from the CPU are single numbers, and indices into what is on a card."""
    for position, (tensor, writes) in enumerate(used):
        number = tensor.ndim == 0 and not writes
        index = name in _INDEXED and not tensor.is_floating_point() and used[0][0].is_cuda and position > 0
        if not isinstance(tensor, CardTensor) and not number and not index:
            devices = ", ".join(str(a.device) for a, _ in used)
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {devices}")
    devices = {a.device for a, _ in used if isinstance(a, CardTensor)}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {devices}")
    return devices.pop() if devices else None


def _cost_of_indices(name: str, used: list[tuple[Tensor, bool]]) -> tuple[int, int]:
    """How many masks become indices, and how often that, and what is still on the host, makes the host wait.

    Where a mask says where to put a number, nothing does.
    """
    if name not in _INDEXED:
        return 0, 0
    masks = sum(a.dtype == torch.bool for a, _ in used[1:])
    from_host = [a for a, _ in used if not isinstance(a, CardTensor)]
    if masks and "put" in name and from_host and from_host[-1].ndim == 0:
        return 0, 0
    return masks, masks + len(from_host)


def _on_card(result: Any, device: torch.device, known: dict[int, CardTensor]) -> Any:
    return _nested(lambda a: known[id(a)] if id(a) in known else CardTensor(a, device), result)


def _values(tensor: Tensor) -> Tensor:
    return tensor.values if isinstance(tensor, CardTensor) else tensor


def _on_the_cpu(generator: Any) -> bool:
    return generator is not None and generator.device.type == "cpu"


def _is_dense(values: Tensor) -> bool:
    span = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, values.stride(), strict=True))
    return span == values.numel() or not values.numel()


def _is_pinned(values: Tensor) -> bool:
    return hasattr(values.untyped_storage(), "pinned")


def _as_pinned(values: Tensor) -> Tensor:
    storage: Any = values.untyped_storage()
    storage.pinned = True
    return values


def _site() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back and any(part in frame.f_code.co_filename for part in _NOT_THE_CALLER):
        frame = frame.f_back
    assert frame is not None
    path = Path(frame.f_code.co_filename)
    return f"{path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path}:{frame.f_lineno}"


# How torch is made to come here.


class _Operations(TorchDispatchMode):
    """Every operation that is not made of others."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is nothing to skip, and it takes seconds to load

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if not any(issubclass(kind, CardTensor) for kind in types) and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        with _GPU.lock:
            return _GPU.run(func, args, kwargs)


class _Calls(TorchFunctionMode):
    """Calls of torch that would look for a driver before they come to an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        this = args[0] if args and isinstance(args[0], Tensor) else None
        special = getattr(self, f"_{name.strip('_')}", None)
        if this is not None and special is not None:
            with _GPU.lock:
                return special(func, this, args[1:], kwargs)
        if kwargs.get("pin_memory"):
            made = func(*args, **kwargs | {"pin_memory": False})
            _GPU.pinned_bytes += made.numel() * made.element_size()
            return _as_pinned(made)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return self._made(func, name, args, kwargs, this)
        return func(*args, **kwargs)

    def _made(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], this: Tensor | None) -> Any:
        device = _GPU.resolve(kwargs["device"])
        if isinstance(this, CardTensor):
            return func(*args, **kwargs | {"device": None}).to(device)
        made = func(*args, **kwargs | {"device": "cpu"})
        if name in ("tensor", "as_tensor", "asarray"):
            return _GPU.to_card(made, device)
        with _GPU.lock:
            stream = _GPU.stream(device)
            count = _GPU.launch(stream, 0 if name in _NO_LAUNCH else 1)
            _GPU.memory_of(made, device).use(stream, count, writes=True)
            return CardTensor(made, device)

    def _to(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        like = next((a for a in (*args, kwargs.get("other")) if isinstance(a, Tensor)), None)
        named = [a for a in (*args, kwargs.get("device")) if isinstance(a, str | torch.device)]
        device = like.device if like is not None else torch.device(named[0]) if named else this.device
        dtype = next((a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)), None)
        flags = [a for a in args if isinstance(a, bool)]
        non_blocking = bool(flags[0] if flags else kwargs.get("non_blocking"))
        if device.type != "cuda" or (isinstance(this, CardTensor) and _GPU.resolve(device) == this.device):
            return func(this, *args, **kwargs)
        options = {key: kwargs[key] for key in ("memory_format",) if key in kwargs}
        converted = func(this, dtype or getattr(like, "dtype", this.dtype), **options)
        if isinstance(converted, CardTensor):
            target = torch.empty_like(converted, device=_GPU.resolve(device))
            return target.copy_(converted)
        return _GPU.to_card(converted, device, non_blocking=non_blocking and converted is this)

    def _cuda(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        device = next((a for a in (*args, kwargs.get("device")) if a is not None and not isinstance(a, bool)), "cuda")
        return this.to(_GPU.resolve(device), non_blocking=kwargs.get("non_blocking", False))

    def _pin_memory(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        if isinstance(this, CardTensor):
            raise RuntimeError(f"cannot pin {this.type()!r} only dense CPU tensors can be pinned")
        return _GPU.pin(this)

    def _is_pinned(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> bool:
        return not isinstance(this, CardTensor) and _is_pinned(this)

    def _numpy(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        if isinstance(this, CardTensor):
            raise TypeError(f"can't convert {this.device} device type tensor to numpy. Use Tensor.cpu() first.")
        return func(this, *args, **kwargs)

    _array = _numpy

    def _tolist(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(this.cpu())

    def _data_ptr(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> int:
        return func(_values(this))

    def _getitem(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(this, _with_tensor_keys(this, args[0]))

    def _setitem(self, func: Any, this: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(this, _with_tensor_keys(this, args[0]), *args[1:])


def _with_tensor_keys(this: Tensor, key: Any) -> Any:
    """Lists and arrays as tensors of the host, which torch would make on the card itself."""
    if not isinstance(this, CardTensor):
        return key
    keys = key if isinstance(key, tuple) else (key,)
    return tuple(torch.as_tensor(part) if type(part).__name__ in ("list", "ndarray") else part for part in keys)


_GPU: Gpu


@contextmanager
def pretended_cuda(memory: int = 80 * 2**30) -> Iterator[Gpu]:
    """Have two cards of so many bytes each, in this thread and those that it starts meanwhile.

    Raises
    ------
    RuntimeError
        At the end, if pinned memory was written, or memory of a card freed, while it was in use.
    """
    global _GPU
    gpu = _GPU = Gpu(memory)
    run = threading.Thread.run

    def run_inside(thread: threading.Thread) -> None:
        with _Calls(), _Operations():
            run(thread)

    stand_ins = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: N_CARDS,
        "current_device": lambda: gpu.card,
        "set_device": lambda device: setattr(gpu, "card", gpu.resolve(device).index),
        "device": gpu.using_card,
        "Stream": Stream,
        "Event": Event,
        "stream": gpu.using_stream,
        "current_stream": gpu.stream,
        "default_stream": gpu.default_stream,
        "synchronize": gpu.synchronize,
        "mem_get_info": lambda device=None: (memory - gpu.reserved[gpu.resolve(device or "cuda")], memory),
        "memory_reserved": lambda device=None: gpu.reserved[gpu.resolve(device or "cuda")],
        "memory_allocated": lambda device=None: gpu.allocated[gpu.resolve(device or "cuda")],
        "max_memory_allocated": lambda device=None: gpu.peak[gpu.resolve(device or "cuda")],
        "reset_peak_memory_stats": lambda device=None: gpu.peak.update(
            {(at := gpu.resolve(device or "cuda")): gpu.allocated[at] - gpu.peak[at]}
        ),
        "empty_cache": gpu.empty_cache,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda device=None: f"pretended card {gpu.resolve(device or 'cuda').index}",
    }
    replaced = [(torch.cuda, name, stand_in) for name, stand_in in stand_ins.items()] + [
        (threading.Thread, "run", run_inside),
        (Tensor, "record_stream", lambda tensor, stream: gpu.record_stream(tensor, stream)),
        # Parameters are replaced when a network moves; their memory could not be swapped for that of a card.
        (torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        # Tensors of inference mode have no version, which those that wrap others need.
        (torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode)),
    ]
    if hasattr(torch, "accelerator"):
        replaced.append((torch.accelerator, "is_available", lambda *_, **__: True))
    if hasattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check"):
        replaced.append((torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None))
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip(f"torch {torch.__version__} asks for a driver wherever a tensor says that it is on a card")
    torch._C._ensureCUDADeviceGuardSet()
    with ExitStack() as stack:
        for where, name, stand_in in replaced:
            stack.enter_context(patch.object(where, name, stand_in))
        with _Calls(), _Operations():
            yield gpu
    gpu.finish()
