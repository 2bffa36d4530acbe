"""Run row blocks on a Ray cluster: workers that each hold the network ask for blocks and write them into the store.

Ray places the workers, starts them and says when one died; what it held is then given to another. A block that two
workers write is the same twice, and each of its files appears whole, so that neither has to know of the other.
"""

import logging
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.machinery import PathFinder
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import nn

from h2t_store.engines import local
from h2t_store.engines.interface import Forward
from h2t_store.engines.plan import RowBlock
from h2t_store.engines.remarks import Remarks
from h2t_store.errors import H2TError, StoppedError, one_line
from h2t_store.images import Source
from h2t_store.storage.places import Place
from h2t_store.storage.store import Extraction
from h2t_store.switches import Switch

try:
    import ray
    from ray import cloudpickle
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
except ImportError as error:
    raise H2TError("engine 'ray' needs Ray: pip install 'head2toe[ray]'") from error

__all__ = ["Cluster", "cluster", "send_code_of"]

_log = logging.getLogger("h2t_store")
_NEWS_SECONDS = 0.5
_CONNECT_SECONDS = 5
_WAITING_SECONDS = 30.0
_ANSWER_SECONDS = 600.0
_DEATHS_OF_EACH = 5

P = ParamSpec("P")
T = TypeVar("T")


class _News(NamedTuple):
    """What a worker did since it was asked last, whether it waits for a block, and all its remarks so far."""

    images: int
    committed: list[int]
    hungry: bool
    remarks: Remarks


class _Desk:
    """Where blocks come in and news goes out, between the thread that computes and the driver's calls."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._blocks: deque[RowBlock] = deque()
        self._ended = self._hungry = False
        self._images = 0
        self._committed: list[int] = []
        self._remarks = Remarks()

    def __iter__(self) -> Iterator[RowBlock]:
        while True:
            with self._changed:
                while not self._blocks and not self._ended:
                    self._hungry = True
                    self._changed.notify_all()
                    self._changed.wait()
                if not self._blocks:
                    return
                block = self._blocks.popleft()
            yield block

    def add_images(self, images: int) -> None:
        """Images are done; told with the next news."""
        with self._changed:
            self._images += images

    def add_remarks(self, remarks: Remarks) -> None:
        """There is something to say of images; told with all news from now on."""
        with self._changed:
            self._remarks.add(remarks)

    def remarks(self) -> Remarks:
        """All of them so far."""
        with self._changed:
            return Remarks(self._remarks)

    def add_committed(self, block: int) -> None:
        """A block is in the store."""
        with self._changed:
            self._committed.append(block)
            self._changed.notify_all()

    def exchange(self, block: RowBlock | None, end: bool) -> _News:
        """Take a block, or that there are no more, and tell the news, soon or as soon as there is some."""
        with self._changed:
            if block is not None:
                self._blocks.append(block)
            self._ended |= end
            self._hungry &= block is None and not end
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._hungry or bool(self._committed), _NEWS_SECONDS)
            news = _News(self._images, self._committed, self._hungry, Remarks(self._remarks))
            self._images, self._committed = 0, []
            return news


class _Reported(Extraction):
    """An extraction that tells a desk of each block that is committed."""

    def __init__(self, folder: Place, where: str, desk: _Desk) -> None:
        super().__init__(folder, where)
        self._desk = desk

    def write_block(self, block: int, *args: Any, **kwargs: Any) -> None:
        super().write_block(block, *args, **kwargs)
        self._desk.add_committed(block)


@dataclass(frozen=True)
class _Work:
    """What a worker needs to know, sent once."""

    forward: Forward
    source: Source
    place: tuple[Place, str]
    batch_size: int
    on_error: Literal["raise", "skip"]
    num_cpus: int


class _Worker:
    """Computes blocks in one thread, while another answers the driver."""

    def __init__(self) -> None:
        self._desk = _Desk()

    def compute(self, work: _Work) -> Remarks:
        """Compute the blocks that come in, until the end of them; what there is to say of their images."""
        torch.set_num_threads(work.num_cpus)
        work.forward.model.to(work.forward.device)
        decoding = 0 if work.source.in_memory or work.num_cpus < 2 else work.num_cpus
        local.run(
            work.forward,
            work.source,
            _Reported(*work.place, self._desk),
            self._desk,
            batch_size=work.batch_size,
            workers=decoding,
            on_error=work.on_error,
            progress=self._desk.add_images,
            remark=self._desk.add_remarks,
        )
        return self._desk.remarks()

    def exchange(self, block: RowBlock | None, end: bool) -> _News:
        """See `_Desk.exchange`."""
        return self._desk.exchange(block, end)


@dataclass
class _Member:
    """A worker as the driver sees it: what it has been given and not committed, and how many images of that it did."""

    actor: Any
    given: dict[int, RowBlock] = field(default_factory=dict)
    images: int = 0
    ended: bool = False
    remarks: Remarks = field(default_factory=Remarks)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster.

    Attributes
    ----------
    num_gpus : float
        GPUs of each worker.
    """

    num_gpus: float

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function where workers run, and log here what it logs there."""
        task = ray.remote(num_gpus=self.num_gpus, num_cpus=1, max_retries=3)(_logged)
        with _told():
            result, records = ray.get(task.remote(function, args, kwargs))
        for level, message in records:
            _log.log(level, "%s", message)
        return result  # type: ignore[no-any-return]

    def run(
        self,
        forward: Forward,
        source: Source,
        extraction: Extraction,
        blocks: Iterable[RowBlock],
        *,
        batch_size: int,
        workers: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda images: None,
        remark: Callable[[Remarks], None] = lambda remarks: None,
    ) -> None:
        """Compute and commit row blocks, as `h2t_store.engines.interface.Engine` says, by ``workers`` Ray actors."""
        workers, num_cpus = self._shape(workers)
        options = {"num_gpus": self.num_gpus, "num_cpus": num_cpus, "max_concurrency": 2}
        forward = replace(forward, model=forward.model.cpu())
        place = (extraction.folder, extraction.where)
        send_code_of(forward.model)
        with _told():
            work = ray.put(_Work(forward, source, place, batch_size, on_error, num_cpus))
            team = _Team(lambda: ray.remote(_Worker).options(**options).remote(), work, extraction, progress)
            try:
                team.compute(blocks, workers, stopped)
            finally:
                team.dismiss()
                for member in team.members:
                    remark(member.remarks)

    def _shape(self, workers: int | None) -> tuple[int, int]:
        """How many workers, and how many cores each: so many that all find a place."""
        nodes = _resources()
        cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1] or [1]
        if self.num_gpus:
            gpus = sum(node.get("GPU", 0) for node in nodes)
            workers = int(gpus // self.num_gpus) if workers is None else workers
        workers = max(1, len(cpus) if workers is None else workers)
        return workers, max(1, min(sum(cpus) // workers, *cpus))


class _Pending:
    """Blocks that nobody has been given: those that were given back, then the rest of the plan as it comes."""

    def __init__(self, blocks: Iterable[RowBlock]) -> None:
        self._next: deque[RowBlock] = deque()
        self._plan = iter(blocks)

    def up_to(self, n: int) -> int:
        """How many there are, as far as ``n``."""
        self._next.extend(islice(self._plan, max(0, n - len(self._next))))
        return min(n, len(self._next))

    def __bool__(self) -> bool:
        return self.up_to(1) > 0

    def take(self) -> RowBlock:
        return self._next.popleft()

    def give_back(self, blocks: Sequence[RowBlock]) -> None:
        self._next.extendleft(reversed(blocks))


class _Team:
    """The workers of one extraction, those who died replaced."""

    def __init__(
        self, hire: Callable[[], Any], work: Any, extraction: Extraction, progress: Callable[[int], None]
    ) -> None:
        self._hire, self._work, self._extraction, self._progress = hire, work, extraction, progress
        self._calls: dict[Any, tuple[_Member, bool]] = {}  # by what Ray will answer; whether that is the end of it
        self._pending = _Pending(())
        self._deaths = 0
        self.members: list[_Member] = []

    def compute(self, blocks: Iterable[RowBlock], size: int, stopped: Callable[[], bool]) -> None:
        """Have all blocks committed, in any order."""
        self._pending, most_deaths = _Pending(blocks), _DEATHS_OF_EACH * size
        waited, ending = 0.0, False
        for _ in range(self._pending.up_to(size)):
            self._add()
        while self._calls and (self._pending or self._given()):
            ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=_NEWS_SECONDS)
            ending = ending or stopped()
            waited = 0.0 if ready else waited + _NEWS_SECONDS
            if waited == _WAITING_SECONDS:
                _log.warning("no Ray worker has a place in the cluster yet; waiting (see: ray status)")
            for call in ready:
                member, is_end = self._calls.pop(call)
                try:
                    news = ray.get(call)
                except RayTaskError as error:
                    raise _as_it_was(error) from error
                except RayActorError as error:
                    self._deaths += 1
                    if self._deaths > most_deaths:
                        raise H2TError(f"{self._deaths} Ray workers died in a row: {one_line(error)}") from error
                    self._bury(member)
                    if self._pending and not ending:
                        self._add()
                else:
                    member.remarks = news if is_end else news.remarks
                    if is_end:
                        self._dismiss(member)
                        self._settle(member, list(member.given))
                        self._progress(-member.images)  # what was not told before the end
                    else:
                        self._hear(member, news, ending)
            if ending and not self._given():
                break
        if self._pending:
            raise StoppedError("stopped after the row blocks in hand")

    def dismiss(self) -> None:
        """End all workers."""
        while self._calls:
            self._dismiss(next(iter(self._calls.values()))[0])

    def _dismiss(self, member: _Member) -> None:
        self._calls = {call: value for call, value in self._calls.items() if value[0] is not member}
        with suppress(RayError):  # as of an actor that never came to be
            ray.kill(member.actor)

    def _given(self) -> bool:
        return any(member.given for member, _ in self._calls.values())

    def _add(self) -> None:
        member = _Member(self._hire())
        self.members.append(member)
        self._calls[member.actor.compute.remote(self._work)] = (member, True)
        self._calls[member.actor.exchange.remote(None, False)] = (member, False)

    def _hear(self, member: _Member, news: _News, ending: bool) -> None:
        member.images += news.images
        self._progress(news.images)
        self._settle(member, news.committed)
        block = None
        if news.hungry and not member.ended:
            block = self._pending.take() if self._pending and not ending else None
            member.ended = block is None
        if block is not None:
            member.given[block.number] = block
        self._calls[member.actor.exchange.remote(block, member.ended)] = (member, False)

    def _settle(self, member: _Member, committed: Iterable[int]) -> None:
        """Blocks that a worker was given are in the store."""
        for number in committed:
            block = member.given.pop(number)
            member.images -= block.stop - block.start
            self._deaths = 0

    def _bury(self, member: _Member) -> None:
        """Give back what a dead worker had and did not commit."""
        self._dismiss(member)
        self._settle(member, [number for number in member.given if self._extraction.is_committed(number)])
        self._progress(-member.images)
        self._pending.give_back(list(member.given.values()))


def _logged(function: Callable[..., T], args: Any, kwargs: Any) -> tuple[T, list[tuple[int, str]]]:
    """What a function returns, and what it logs."""
    records: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    _log.addHandler(handler)
    try:
        return function(*args, **kwargs), records
    finally:
        _log.removeHandler(handler)


def send_code_of(network: nn.Module) -> None:
    """Have the code of a network's classes sent along with it, but for that of installed packages."""
    for name in {type(module).__module__ for module in network.modules()}:
        if name in sys.modules and not _is_installed(name):
            cloudpickle.register_pickle_by_value(sys.modules[name])


def _is_installed(name: str) -> bool:
    """Whether a module is one that workers have, too: a package's, or this one's."""
    package = name.partition(".")[0]
    spec = PathFinder.find_spec(package)
    origin = "" if spec is None or spec.origin is None else spec.origin
    return package in ("__main__", __name__.partition(".")[0]) or "site-packages" in Path(origin).parts


@contextmanager
def _told() -> Iterator[None]:
    """Errors of Ray in one line."""
    try:
        yield
    except RayTaskError as error:
        raise _as_it_was(error) from error
    except RayError as error:
        raise H2TError(f"Ray failed: {one_line(error)}") from error


def _as_it_was(error: RayTaskError) -> Exception:
    """What a worker raised."""
    cause = error.cause
    if isinstance(cause, H2TError | OSError):
        return cause
    return H2TError(f"a Ray worker failed: {type(cause).__name__}: {one_line(cause)}")


def _require_head(address: str | None) -> None:
    """Raise `OSError` at once where nothing listens: Ray would try for ten minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


def _resources() -> list[dict[str, float]]:
    """What each node that lives has.

    A worker is asked to ask: the driver's own connection for such questions may have been cut by processes that it
    forked, as those that decode images for the local engine, and then no answer ever comes.
    """
    task = ray.remote(num_cpus=0, max_retries=3)(_resources_seen_here).remote()
    ready, _ = ray.wait([task], timeout=_WAITING_SECONDS)
    if not ready:
        _log.warning("no Ray worker answers yet; waiting (see: ray status)")
    try:
        found: list[dict[str, float]] = ray.get(task, timeout=_ANSWER_SECONDS)
    except GetTimeoutError:
        raise H2TError(f"the Ray cluster does not answer within {_ANSWER_SECONDS:g} s (see: ray status)") from None
    return found


def _resources_seen_here() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def cluster(address: str | None = None, num_gpus: float | None = None, device: str = "auto") -> Iterator[Cluster]:
    """Connect to a Ray cluster, or start one on this machine, and leave it afterwards.

    Parameters
    ----------
    address : str, optional
        Of a running cluster, or ``auto``; ``local`` starts one. By default ``RAY_ADDRESS``, else as Ray decides.
    num_gpus : float, optional
        GPUs of each worker; by default 1 where the cluster has some and ``device`` is not the CPU.
    device : str
        Where the network runs.

    Raises
    ------
    H2TError
        Where there is no such cluster.
    """
    with _connections.setdefault(address, Switch(partial(_connect, address))):
        gpus = sum(node.get("GPU", 0) for node in _resources())
        if num_gpus is None:
            num_gpus = 1.0 if gpus and device != "cpu" else 0.0
        if num_gpus > gpus:
            raise H2TError(f"num_gpus_per_worker {num_gpus:g}: the Ray cluster has {gpus:g} GPUs")
        yield Cluster(num_gpus)


_connections: dict[str | None, Switch] = {}


def _connect(address: str | None) -> Callable[[], None]:
    """Connect, unless something in this process did; gives what ends that."""
    if ray.is_initialized():
        return lambda: None
    try:
        _require_head(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None)
    except (OSError, RuntimeError, ValueError) as error:
        raise H2TError(f"ray_address {address!r}: {one_line(error)}") from error
    shutdown: Callable[[], None] = ray.shutdown
    return shutdown
