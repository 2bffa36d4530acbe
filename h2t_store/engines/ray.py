"""Row blocks on a Ray cluster: workers that each hold the network compute blocks and write them into the store.

The driver keeps a few blocks in the hands of each worker, so that one is decoded and one is written while a third is
computed. When a worker dies, others get the blocks that it did not commit. A block that is written twice is the same
twice, and each of its files appears whole.
"""

import logging
import math
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.machinery import PathFinder
from itertools import islice
from logging.handlers import QueueHandler
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn

from h2t_store.engines.interface import Engine
from h2t_store.engines.loading import BATCHES_AHEAD, check_workers
from h2t_store.engines.local import LocalEngine
from h2t_store.engines.plan import RowBlock
from h2t_store.engines.preparation import Job, prepare
from h2t_store.engines.remarks import Remarks
from h2t_store.errors import H2TError, StoppedError, one_line
from h2t_store.network import code_digest
from h2t_store.settings import Settings
from h2t_store.storage.places import Place
from h2t_store.storage.store import Extraction
from h2t_store.switches import Switch

try:
    import ray
    from ray import cloudpickle
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
except ImportError as error:
    raise H2TError("engine 'ray' needs Ray: pip install 'head2toe[ray]'") from error

__all__ = ["RayEngine"]

_log = logging.getLogger("h2t_store")
_POLL_SECONDS = 0.5
_PAUSE_SECONDS = 0.2
_CONNECT_SECONDS = 5
_WAITING_SECONDS = 30.0
_ANSWER_SECONDS = 600.0

OnError = Literal["raise", "skip"]


class _Worker:
    """Computes blocks in one thread, while the calls that brought them wait in others."""

    def __init__(self) -> None:
        self._blocks: SimpleQueue[RowBlock] = SimpleQueue()
        self._answers: dict[int, Future[Remarks]] = {}
        self._remarks = Remarks()
        self._lock = threading.Lock()

    def start(self, job: Job, *others: Any) -> None:
        """Get ready for blocks, as `_serve` takes them."""
        threading.Thread(target=self._serve, args=[job, *others], daemon=True).start()

    def compute(self, block: RowBlock) -> Remarks:
        """Compute and commit a block; return new remarks, which may be on images of the next one."""
        answer = self._answers[block.number] = Future()
        self._blocks.put(block)
        return answer.result()

    def _serve(
        self, job: Job, folder: Place, where: str, on_error: OnError, num_cpus: int, decoding: int, before: Any
    ) -> None:
        try:
            torch.set_num_threads(num_cpus)
            job.forward.model.to(job.forward.device)
            engine, extraction = LocalEngine(decoding), Extraction(folder, where)
            extraction.before = before and Extraction(*before)
            while True:
                blocks = self._coming(self._blocks.get())
                engine.run(job, extraction, blocks, on_error=on_error, remark=self._add_remarks, written=self._answer)
        except BaseException as error:
            for answer in list(self._answers.values()):
                answer.set_exception(error)

    def _coming(self, block: RowBlock) -> Iterator[RowBlock]:
        """Blocks as they come in, until none does for a moment: those in hand must not wait for more."""
        with suppress(Empty):
            while True:
                yield block
                block = self._blocks.get(timeout=_PAUSE_SECONDS)

    def _add_remarks(self, remarks: Remarks) -> None:
        with self._lock:
            self._remarks.add(remarks)

    def _answer(self, block: RowBlock) -> None:
        with self._lock:
            remarks, self._remarks = self._remarks, Remarks()
        self._answers.pop(block.number).set_result(remarks)


class _Team:
    """The workers of one extraction and the blocks that they have not committed yet."""

    def __init__(self, hire: Callable[[], tuple[Any, Any]], in_hand: int, plan: Iterable[RowBlock]) -> None:
        self._hire, self._in_hand = hire, in_hand
        self._plan, self._next = iter(plan), deque[RowBlock]()
        self.calls: dict[Any, tuple[Any, RowBlock | None]] = {}  # worker and block of each call without an answer

    def more(self) -> bool:
        """Whether there are blocks that no worker has."""
        if not self._next:
            self._next.extend(islice(self._plan, 1))
        return bool(self._next)

    def busy(self) -> bool:
        """Whether a worker has blocks."""
        return any(block is not None for _, block in self.calls.values())

    def hire(self, n: int) -> None:
        """Start workers, at most one for each block that no worker has; they get blocks when they are ready."""
        self._next.extend(islice(self._plan, n - len(self._next)))
        for _ in range(min(n, len(self._next))):
            worker, ready = self._hire()
            self.calls[ready] = worker, None

    def give(self, worker: Any) -> None:
        """Give a worker as many blocks as it should have."""
        n = sum(other is worker for other, _ in self.calls.values())
        while n < self._in_hand and self.more():
            block = self._next.popleft()
            self.calls[worker.compute.remote(block)] = worker, block
            n += 1

    def lose(self, worker: Any, extraction: Extraction) -> list[RowBlock]:
        """Take back what a dead worker had; return what it had committed."""
        _kill(worker)
        blocks = [block for other, block in self.calls.values() if other is worker and block is not None]
        self.calls = {call: held for call, held in self.calls.items() if held[0] is not worker}
        committed = [block for block in blocks if extraction.is_committed(block.number)]
        self._next.extend(block for block in blocks if block not in committed)
        return committed

    def dismiss(self) -> None:
        """End all workers."""
        for worker in {worker for worker, _ in self.calls.values()}:
            _kill(worker)


def _kill(worker: Any) -> None:
    with suppress(RayError):  # it may never have been started
        ray.kill(worker)


class RayEngine(Engine):
    """Workers on a Ray cluster, which is connected to, or started on this machine, and left afterwards.

    Parameters
    ----------
    workers : int, optional
        How many; by default one for each share of GPUs, or one per node.
    address : str, optional
        Of a running cluster, or ``auto``; ``local`` starts one. By default ``RAY_ADDRESS``, else as Ray decides.
    num_gpus : float, optional
        GPUs of each worker; by default 1 where the cluster has some and the device is not the CPU.
    deaths_of_each : int
        How often a worker may die, in the mean, before a block is committed.
    """

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        num_gpus: float | None = None,
        *,
        deaths_of_each: int = 5,
    ) -> None:
        check_workers(None)
        self.workers, self.num_gpus, self.deaths_of_each = workers, num_gpus, deaths_of_each
        self._connection = _connections.setdefault(address, Switch(partial(_connect, address)))

    def __enter__(self) -> Self:
        self._connection.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._connection.__exit__()

    def prepare(self, settings: Settings) -> Job:
        """Prepare on a worker, as this machine may lack the GPU that it takes to try; log here what is logged there."""
        model = settings.model
        if isinstance(model, nn.Module):
            _send_code_of(model)
        num_gpus = self._gpus_of_each(_resources(), settings.device)
        with _in_one_line():
            task = ray.remote(num_gpus=num_gpus, num_cpus=1, max_retries=3)(_prepare_to_send)
            job, records = ray.get(task.remote(settings.absolute()))
        for record in records:
            _log.log(record.levelno, "%s", record.getMessage())
        if isinstance(model, nn.Module):  # whose source may not be there
            job = replace(job, backbone=replace(job.backbone, code_sha256=code_digest(model)))
        return job  # type: ignore[no-any-return]

    def run(
        self,
        job: Job,
        extraction: Extraction,
        plan: Iterable[RowBlock],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda images: None,
        remark: Callable[[Remarks], None] = lambda remarks: None,
    ) -> None:
        nodes = _resources()
        num_gpus = self._gpus_of_each(nodes, job.forward.device.type)
        n_workers, num_cpus = _shape(nodes, self.workers, num_gpus)
        decoding = 0 if job.source.in_memory or num_cpus < 2 else num_cpus
        loaded_ahead = BATCHES_AHEAD * decoding * job.batch_size
        in_hand = 2 - -loaded_ahead // -extraction.header.rows_per_block
        options = {"num_gpus": num_gpus, "num_cpus": num_cpus, "max_concurrency": in_hand}
        _send_code_of(job.forward.model.cpu())
        with _in_one_line():
            before = extraction.before and (extraction.before.folder, extraction.before.where)
            sent = ray.put(job), extraction.folder, extraction.where, on_error, num_cpus, decoding, before

            def hire() -> tuple[Any, Any]:
                worker = ray.remote(_Worker).options(**options).remote()
                return worker, worker.start.remote(*sent)

            team = _Team(hire, in_hand, plan)
            team.hire(n_workers)
            try:
                self._lead(team, self.deaths_of_each * n_workers, extraction, stopped, progress, remark)
            finally:
                team.dismiss()

    def _lead(
        self,
        team: _Team,
        max_deaths: int,
        extraction: Extraction,
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
        remark: Callable[[Remarks], None],
    ) -> None:
        """Have all blocks committed, in any order."""
        deaths, stopping, late = 0, False, monotonic() + _WAITING_SECONDS

        while team.busy() or (team.more() and not stopping):
            ready, _ = ray.wait(list(team.calls), num_returns=1, timeout=_POLL_SECONDS)
            stopping = stopping or stopped()
            committed = []
            for call in ready:
                worker, block = team.calls[call]
                try:
                    remarks = ray.get(call)
                except RayActorError as error:
                    deaths += 1
                    if deaths > max_deaths:
                        raise H2TError(f"{deaths} Ray workers died in a row: {one_line(error)}") from error
                    committed = team.lose(worker, extraction)
                    if not stopping:
                        team.hire(1)
                    continue
                del team.calls[call]
                if block is not None:
                    remark(remarks)
                    committed = [block]
                if not stopping:
                    team.give(worker)
            for block in committed:
                deaths = 0
                progress(block.stop - block.start)
            if team.busy() or committed:
                late = math.inf
            elif monotonic() > late:
                _log.warning("no Ray worker has a place in the cluster yet; waiting (see: ray status)")
                late = math.inf
        if team.more():
            raise StoppedError("stopped after the row blocks in hand")

    def _gpus_of_each(self, nodes: list[dict[str, float]], device: str) -> float:
        gpus = sum(node.get("GPU", 0) for node in nodes)
        if self.num_gpus is None:
            return 1.0 if gpus and device != "cpu" else 0.0
        if self.num_gpus > gpus:
            raise H2TError(f"num_gpus_per_worker {self.num_gpus:g}: the Ray cluster has {gpus:g} GPUs")
        return self.num_gpus


def _shape(nodes: list[dict[str, float]], workers: int | None, num_gpus: float) -> tuple[int, int]:
    """How many workers, and how many cores each: so many that all find a place."""
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    if workers is None and num_gpus:
        workers = int(sum(node.get("GPU", 0) for node in nodes) // num_gpus)
    workers = max(1, len(cpus) if workers is None else workers)
    return workers, max(1, min(sum(cpus) // workers, *cpus))


def _prepare_to_send(settings: Settings) -> tuple[Job, list[logging.LogRecord]]:
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = QueueHandler(records)
    _log.addHandler(handler)
    try:
        job = prepare(settings)
    finally:
        _log.removeHandler(handler)
    job.forward.model.cpu()
    _send_code_of(job.forward.model)
    return job, [records.get() for _ in range(records.qsize())]


def _send_code_of(network: nn.Module) -> None:
    """Have the code of a network's classes sent along with it, but for that of installed packages."""
    for name in {type(module).__module__ for module in network.modules()}:
        if name in sys.modules and not _is_installed(name):
            cloudpickle.register_pickle_by_value(sys.modules[name])


def _is_installed(name: str) -> bool:
    """Whether workers have a module, too."""
    package = name.partition(".")[0]
    spec = PathFinder.find_spec(package)
    origin = "" if spec is None or spec.origin is None else spec.origin
    return package in ("__main__", __name__.partition(".")[0]) or "site-packages" in Path(origin).parts


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Raise what a worker raised, and errors of Ray as `H2TError`."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, H2TError | OSError):
            raise cause from error
        raise H2TError(f"a Ray worker failed: {type(cause).__name__}: {one_line(cause)}") from error
    except RayError as error:
        raise H2TError(f"Ray failed: {one_line(error)}") from error


def _resources() -> list[dict[str, float]]:
    """What each living node has, asked by a worker.

    Ray's connection for such questions is cut in a driver that forked, such as to decode images for the local engine.
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


_connections: dict[str | None, Switch] = {}


def _connect(address: str | None) -> Callable[[], None]:
    """Connect, unless something in this process did; return what ends that."""
    if ray.is_initialized():
        return lambda: None
    try:
        _require_head(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None)
    except (OSError, RuntimeError, ValueError) as error:
        raise H2TError(f"ray_address {address!r}: {one_line(error)}") from error
    shutdown: Callable[[], None] = ray.shutdown
    return shutdown


def _require_head(address: str | None) -> None:
    """Raise `OSError` at once where nothing listens: Ray would try for ten minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
