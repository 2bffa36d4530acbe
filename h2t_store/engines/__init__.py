"""Compute row blocks: in this process, in those of ``torchrun``, or on a Ray cluster."""

import math
from typing import Literal

from h2t_store.arguments import integer
from h2t_store.engines.interface import Engine
from h2t_store.errors import H2TError

__all__ = ["Engine", "open_engine"]

_ENGINES = ("local", "ray", "torchrun")


def open_engine(
    name: Literal["local", "ray", "torchrun"],
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    num_gpus_per_worker: float | None = None,
) -> Engine:
    """Make an engine, to be used in a ``with`` statement; `h2t_store.extract` describes the parameters.

    Raises
    ------
    H2TError
        Where an argument is not accepted, or this process cannot start others.
    """
    if name not in _ENGINES:
        raise H2TError(f"engine {name!r}: accepted are local, ray and torchrun")
    if workers is not None:
        integer("workers", workers, 0)
    if num_gpus_per_worker is not None and not 0 <= num_gpus_per_worker < math.inf:
        raise H2TError(f"num_gpus_per_worker {num_gpus_per_worker!r}: accepted are numbers from 0")
    if name == "ray":
        from h2t_store.engines.ray import RayEngine

        return RayEngine(workers, ray_address, num_gpus_per_worker)
    if name == "torchrun":
        from h2t_store.engines.ranks import TorchrunEngine

        return TorchrunEngine(workers)
    from h2t_store.engines.local import LocalEngine

    return LocalEngine(workers)
