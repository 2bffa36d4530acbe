"""Row blocks on a Ray cluster: workers that each hold the network compute blocks and write them into the store.

Each worker has a few blocks in hand, so that one is decoded and one is written while a third is computed. When a worker
dies, others get the blocks that it did not commit. A block that is written twice is the same twice, and each of its
files appears whole.
"""

import logging
import math
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from logging.handlers import QueueHandler
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self

import torch
from torch import nn

from h2t_store.engines.interface import Engine, Report
from h2t_store.engines.loading import BATCHES_AHEAD, Remarks, check_workers
from h2t_store.engines.local import LocalEngine
from h2t_store.engines.plan import RowBlock
from h2t_store.engines.preparation import Job, prepare
from h2t_store.errors import H2TError, StoppedError, one_line
from h2t_store.network import code_digest
from h2t_store.settings import Running, Settings
from h2t_store.storage.extraction import Extraction
from h2t_store.storage.places import Place
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
_POLLS_TO_WARN = 60
_ANSWER_SECONDS = 600


class _Worker:
    """Computes blocks in one thread, while the calls that brought them wait in others."""

    def __init__(self) -> None:
        self._blocks: SimpleQueue[RowBlock] = SimpleQueue()
        self._answers: dict[int, Future[Remarks]] = {}
        self._remarks: SimpleQueue[Remarks] = SimpleQueue()

    def start(self, *task: Any) -> None:
        """Get ready for blocks, as `_serve` takes them."""
        threading.Thread(target=self._serve, args=task, daemon=True).start()

    def compute(self, block: RowBlock) -> Remarks:
        """Compute and commit a block; return new remarks, which may be on images of the next one."""
        answer = self._answers[block.number] = Future()
        self._blocks.put(block)
        return answer.result()

    def _serve(self, job: Job, folder: Place, where: str, on_error: Any, num_cpus: int, decoding: int) -> None:
        try:
            torch.set_num_threads(num_cpus)
            job.forward.model.to(job.forward.device)
            engine, extraction = LocalEngine(decoding), Extraction(folder, where)
            running = Running(on_error=on_error)
            while True:
                engine.run(job, extraction, self._coming(self._blocks.get()), running, self._report, self._answer)
        except BaseException as error:
            for answer in list(self._answers.values()):
                answer.set_exception(error)

    def _coming(self, block: RowBlock) -> Iterator[RowBlock]:
        """Blocks as they come in, until none does for a moment: those in hand must not wait for more."""
        with suppress(Empty):
            while True:
                yield block
                block = self._blocks.get(timeout=_PAUSE_SECONDS)

    def _report(self, _: int, remarks: Remarks) -> None:
        self._remarks.put(remarks)

    def _answer(self, block: RowBlock) -> None:
        remarks = Remarks()
        while not self._remarks.empty():
            remarks.add(self._remarks.get())
        self._answers.pop(block.number).set_result(remarks)


class _Team:
    """The workers of one extraction and the blocks that they have in hand; those that die are replaced."""

    def __init__(
        self, kind: Any, task: tuple[Any, ...], in_hand: int, max_deaths: int, plan: Iterable[RowBlock]
    ) -> None:
        self._kind, self._task, self._in_hand, self._max_deaths = kind, task, in_hand, max_deaths
        self._plan, self._next = iter(plan), deque[RowBlock]()
        self._calls: dict[Any, tuple[Any, RowBlock | None]] = {}  # worker and block of each call without an answer
        self._deaths = self._idle = 0

    def more(self) -> bool:
        """Whether there are blocks that no worker has."""
        if not self._next:
            self._next.extend(islice(self._plan, 1))
        return bool(self._next)

    def busy(self) -> bool:
        """Whether workers have blocks."""
        return any(block is not None for _, block in self._calls.values())

    def hire(self, n: int) -> None:
        """Start workers, at most one for each block; they get blocks when they are ready."""
        self._next.extend(islice(self._plan, max(0, n - len(self._next))))
        for _ in range(min(n, len(self._next))):
            worker = self._kind.remote()
            self._calls[worker.start.remote(*self._task)] = worker, None

    def wait(self, *, give: bool) -> Iterator[tuple[RowBlock, Remarks]]:
        """Blocks that are committed by now, with remarks; their workers get others if ``give``."""
        ready, _ = ray.wait(list(self._calls), timeout=_POLL_SECONDS)
        self._idle = 0 if ready or self.busy() else self._idle + 1
        if self._idle == _POLLS_TO_WARN:
            _log.warning("no Ray worker has a place in the cluster yet; waiting (see: ray status)")
        for call in ready:
            worker, block = self._calls.pop(call)
            n = sum(other is worker for other, _ in self._calls.values())
            try:
                remarks = ray.get(call)
            except RayActorError as error:
                self._next.extend([block] if block is not None else [])
                if not n:
                    self._replace(error, give)
                continue
            if block is not None:
                self._deaths = 0
                yield block, remarks
            while give and n < self._in_hand and self.more():
                block, n = self._next.popleft(), n + 1
                self._calls[worker.compute.remote(block)] = worker, block

    def _replace(self, error: RayActorError, give: bool) -> None:
        self._deaths += 1
        if self._deaths > self._max_deaths:
            raise H2TError(f"{self._deaths} Ray workers died in a row: {one_line(error)}") from error
        if give:
            self.hire(1)

    def close(self) -> None:
        """End all workers."""
        for worker, _ in self._calls.values():
            with suppress(RayError):  # it may never have been started
                ray.kill(worker)


class RayEngine(Engine):
    """Workers on a Ray cluster: connects to one or starts one on this machine, and disconnects afterwards.

    By default one worker per share of GPUs, or one per node without GPUs. ``num_gpus`` is for each worker, by default
    1 if the cluster has GPUs and the device is not the CPU. ``deaths_of_each`` is how often a worker may die, on
    average, before any block is committed.
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

    def __exit__(self, *_: object) -> None:
        self._connection.__exit__()

    def prepare(self, settings: Settings) -> Job:
        """Prepare on a worker, because this machine may lack a GPU; log here what is logged there."""
        model, num_gpus = settings.model, self._gpus_of_each(_resources(), settings.device)
        with _in_one_line():
            if isinstance(model, nn.Module):
                _send_code_of(model)
            task = ray.remote(num_gpus=num_gpus, num_cpus=1, max_retries=3)(_prepare_to_send)
            job, records = ray.get(task.remote(settings.absolute()))
        for record in records:
            _log.log(record.levelno, "%s", record.getMessage())
        if isinstance(model, nn.Module):  # whose source may not be there
            job = replace(job, backbone=replace(job.backbone, code_sha256=code_digest(model)))
        return job  # type: ignore[no-any-return]

    def run(self, job: Job, extraction: Extraction, plan: Iterable[RowBlock], running: Running, report: Report) -> None:
        nodes = _resources()
        num_gpus = self._gpus_of_each(nodes, job.forward.device.type)
        n_workers, num_cpus = _shape(nodes, self.workers, num_gpus)
        decoding = 0 if job.source.in_memory or num_cpus < 2 else num_cpus
        loaded_ahead = BATCHES_AHEAD * decoding * job.batch_size
        in_hand = 2 + math.ceil(loaded_ahead / extraction.header.rows_per_block)
        worker = ray.remote(num_gpus=num_gpus, num_cpus=num_cpus, max_concurrency=in_hand)(_Worker)
        with _in_one_line():
            _send_code_of(job.forward.model.cpu())
            task = ray.put(job), extraction.folder, extraction.where, running.on_error, num_cpus, decoding
            max_deaths = self.deaths_of_each * n_workers
            with closing(_Team(worker, task, in_hand, max_deaths, plan)) as team:
                team.hire(n_workers)
                stopping = False
                while team.busy() or (team.more() and not stopping):
                    for block, remarks in team.wait(give=not stopping):
                        report(block.stop - block.start, remarks)
                    stopping = stopping or running.stopped()
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
    """How many workers, and how many cores each, so that all fit on the nodes."""
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    if workers is None:
        workers = int(sum(node.get("GPU", 0) for node in nodes) // num_gpus) if num_gpus else len(cpus)
    workers = max(1, workers)
    return workers, max(1, min(sum(cpus) // workers, *cpus))


def _prepare_to_send(settings: Settings) -> tuple[Job, list[logging.LogRecord]]:
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = QueueHandler(records)
    _log.addHandler(handler)
    try:
        job = prepare(settings)
    finally:
        _log.removeHandler(handler)
    _send_code_of(job.forward.model.cpu())
    return job, [records.get() for _ in range(records.qsize())]


def _send_code_of(network: nn.Module) -> None:
    """Send the code of a network's classes with it, except that of installed packages and of this one."""
    for name in {type(module).__module__ for module in network.modules()} & sys.modules.keys():
        installed = "site-packages" in Path(getattr(sys.modules[name], "__file__", None) or "").parts
        if not installed and name.partition(".")[0] not in ("__main__", "h2t_store"):
            cloudpickle.register_pickle_by_value(sys.modules[name])


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Raise a worker's own error; raise other errors of workers and of Ray as `H2TError`."""
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
    """Resources of each living node, asked by a worker: a driver that has forked loses Ray's connection for this."""
    ask = ray.remote(num_cpus=0, max_retries=3)(lambda: [node["Resources"] for node in ray.nodes() if node["Alive"]])
    try:
        found: list[dict[str, float]] = ray.get(ask.remote(), timeout=_ANSWER_SECONDS)
    except GetTimeoutError:
        raise H2TError(f"the Ray cluster does not answer within {_ANSWER_SECONDS} s (see: ray status)") from None
    return found


_connections: dict[str | None, Switch] = {}


def _connect(address: str | None) -> Callable[[], None]:
    """Connect, unless something in this process did; return what ends that."""
    if ray.is_initialized():
        return lambda: None
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray tries for ten minutes where nothing listens
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None)
    except (OSError, RuntimeError, ValueError) as error:
        raise H2TError(f"ray_address {address!r}: {one_line(error)}") from error
    shutdown: Callable[[], None] = ray.shutdown
    return shutdown
