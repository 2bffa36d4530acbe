"""Make an engine by its name."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import nn

from h2t_store.engines import local
from h2t_store.engines.plan import Plan
from h2t_store.engines.preparation import Job, prepare
from h2t_store.engines.ranks import ALONE, Ranks, ranks
from h2t_store.engines.remarks import Remarks
from h2t_store.errors import H2TError
from h2t_store.network import code_digest
from h2t_store.settings import Settings, integer
from h2t_store.storage.store import Extraction

__all__ = ["ENGINES", "LocalEngine", "open_engine"]

ENGINES = ("local", "ray", "torchrun")


class LocalEngine:
    """Computes in this process."""

    def __init__(self, workers: int | None) -> None:
        local.check_workers(workers)
        self.workers = workers
        self.ranks: Ranks = ALONE
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    @property
    def leads(self) -> bool:
        return self.ranks.leads

    def share(self, numbers: Any) -> Any:
        return self.ranks.share(numbers)

    def meet(self) -> None:
        self.ranks.meet()

    def prepare(self, settings: Settings) -> Job:
        return prepare(settings)

    def run(
        self,
        job: Job,
        extraction: Extraction,
        plan: Plan,
        *,
        on_error: Literal["raise", "skip"],
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
        remark: Callable[[Remarks], None],
    ) -> None:
        self._run()(
            job.forward,
            job.source,
            extraction,
            plan,
            batch_size=job.batch_size,
            workers=self.workers,
            on_error=on_error,
            before=extraction.before,
            stopped=stopped,
            progress=progress,
            remark=remark,
        )

    def _run(self) -> Callable[..., None]:
        return local.run


class _Torchrun(LocalEngine):
    def __enter__(self) -> Self:
        self.ranks = self._open.enter_context(ranks())
        return self

    def prepare(self, settings: Settings) -> Job:
        if torch.cuda.is_available() and settings.device in ("auto", "cuda"):
            settings = replace(settings, device=f"cuda:{self.ranks.local_rank}")
        return prepare(settings)


class _Ray(LocalEngine):
    def __init__(self, workers: int | None, address: str | None, num_gpus: float | None) -> None:
        super().__init__(None)
        self.workers = workers
        self._where = address, num_gpus
        self._cluster: Any = None

    def prepare(self, settings: Settings) -> Job:
        from h2t_store.engines import ray

        self._cluster = self._open.enter_context(ray.cluster(*self._where, settings.device))
        model = settings.model
        if isinstance(model, nn.Module):
            ray.send_code_of(model)
        job: Job = self._cluster.call(_prepare_to_send, settings.absolute())
        if isinstance(model, nn.Module):  # whose source may not be there
            job = replace(job, backbone=replace(job.backbone, code_sha256=code_digest(model)))
        return job

    def _run(self) -> Callable[..., None]:
        return self._cluster.run  # type: ignore[no-any-return]


def _prepare_to_send(settings: Settings) -> Job:
    from h2t_store.engines.ray import send_code_of

    job = prepare(settings)
    job.backbone.model.cpu()
    send_code_of(job.backbone.model)
    return job


def open_engine(
    name: str,
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    num_gpus_per_worker: float | None = None,
) -> LocalEngine:
    """Make the engine ``name``; enter it before use."""
    if name not in ENGINES:
        raise H2TError(f"engine {name!r}: accepted are local, ray and torchrun")
    if workers is not None:
        integer("workers", workers, 0)
    if num_gpus_per_worker is not None and not 0 <= num_gpus_per_worker < math.inf:
        raise H2TError(f"num_gpus_per_worker {num_gpus_per_worker!r}: accepted are numbers from 0")
    if name == "ray":
        return _Ray(workers, ray_address, num_gpus_per_worker)
    return LocalEngine(workers) if name == "local" else _Torchrun(workers)
