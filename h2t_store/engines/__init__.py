"""Compute row blocks: in this process, in those of ``torchrun``, or on a Ray cluster."""

from h2t_store.engines.interface import Engine
from h2t_store.settings import Running

__all__ = ["Engine", "open_engine"]


def open_engine(running: Running) -> Engine:
    """Make the engine of a run, to be used in a ``with`` statement; `H2TError` if this process cannot start others."""
    if running.engine == "ray":
        from h2t_store.engines.ray import RayEngine

        return RayEngine(running.workers, running.ray_address, running.num_gpus_per_worker)
    if running.engine == "torchrun":
        from h2t_store.engines.ranks import TorchrunEngine

        return TorchrunEngine(running.workers)
    from h2t_store.engines.local import LocalEngine

    return LocalEngine(running.workers)
