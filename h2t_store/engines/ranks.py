"""The processes that ``torchrun`` started: each computes its share of the row blocks on a card of its own."""

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

from h2t_store.engines.local import LocalEngine
from h2t_store.engines.plan import Plan
from h2t_store.engines.preparation import Job
from h2t_store.errors import H2TError, one_line
from h2t_store.settings import Settings

__all__ = ["TorchrunEngine"]

_TO_JOIN = timedelta(minutes=10)
_TO_WAIT = timedelta(days=7)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class TorchrunEngine(LocalEngine):
    """One of the processes that ``torchrun`` started.

    A process group that exists already is used and left as it is.
    """

    def __enter__(self) -> Self:
        self._existing = dist.is_initialized()
        if not self._existing:
            _join()
        self._group: Any = dist.new_group(timeout=_TO_WAIT, backend="gloo")
        self.leads = dist.get_rank() == 0
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group(self._group if self._existing else None)

    def share(self, plan: Plan) -> Plan:
        return replace(plan, numbers=plan.numbers_of_blocks[dist.get_rank() :: dist.get_world_size()])

    def meet(self) -> None:
        if dist.get_world_size() > 1:
            try:
                dist.barrier(group=self._group)
            except RuntimeError as error:
                raise H2TError("another of the processes ended: its own error says why") from error

    def prepare(self, settings: Settings) -> Job:
        if torch.cuda.is_available() and settings.device in ("auto", "cuda"):
            settings = replace(settings, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        return super().prepare(settings)


def _join() -> None:
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise H2TError(
            f"engine 'torchrun': torchrun did not start this process ({', '.join(missing)} not in its environment): "
            "run torchrun --nproc-per-node 4 -m h2t_store … --engine torchrun"
        )
    try:
        dist.init_process_group("gloo", timeout=_TO_JOIN)
    except (RuntimeError, ValueError) as error:
        raise H2TError(f"engine 'torchrun': the other processes cannot be joined: {one_line(error)}") from error
