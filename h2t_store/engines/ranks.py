"""The processes that share an extraction: one, or as many as ``torchrun`` started, each with a device of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from h2t_store.errors import H2TError, one_line

__all__ = ["ALONE", "Ranks", "ranks"]

_TO_JOIN = timedelta(minutes=10)
_TO_WAIT = timedelta(days=7)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Attributes
    ----------
    rank, size : int
        Its number, and how many there are.
    local_rank : int
        Its number on this machine: which of the cards is its own.
    group : ProcessGroup, optional
        In which they meet.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process does what is to be done once."""
        return self.rank == 0

    def share(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of some work that is this process's."""
        return numbers[self.rank :: self.size]

    def meet(self) -> None:
        """Wait for the others; raises `H2TError` where one of them ended."""
        if self.size > 1:
            try:
                dist.barrier(group=self.group)
            except RuntimeError as error:
                raise H2TError("another of the processes ended: its own error says why") from error


ALONE = Ranks()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started; they only ever wait for each other.

    A process group that is there already is used and left as it is.

    Raises
    ------
    H2TError
        Where ``torchrun`` did not start this process, or the others do not come.
    """
    joined = dist.is_initialized()
    if not joined:
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise H2TError(
                f"engine 'torchrun': it did not start this process ({', '.join(missing)} not in its environment): "
                "run torchrun --nproc-per-node 4 -m h2t_store … --engine torchrun"
            )
        try:
            dist.init_process_group("gloo", timeout=_TO_JOIN)
        except (RuntimeError, ValueError) as error:
            raise H2TError(f"engine 'torchrun': the other processes cannot be joined: {one_line(error)}") from error
    group = None
    try:
        group = dist.new_group(timeout=_TO_WAIT, backend="gloo")
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), group)
    finally:
        if not joined:
            dist.destroy_process_group()
        elif group is not None:
            dist.destroy_process_group(group)
