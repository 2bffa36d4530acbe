"""The processes that share an extraction: one, or as many as ``torchrun`` started, each with a device of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from h2t_store.errors import H2TError

__all__ = ["ALONE", "Ranks", "ranks"]

_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Attributes
    ----------
    rank, size : int
        Its number, and how many there are.
    """

    rank: int = 0
    size: int = 1

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
                dist.barrier()
            except RuntimeError as error:
                raise H2TError("another of the processes ended: its own error says why") from error


ALONE = Ranks()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, if it did; they only ever wait for each other."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
