"""Compute row blocks on this machine: load, run the network, write; each while the others go on."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import tee
from time import perf_counter

import torch

from h2t_store.engines.forward import Features, Network, copy_to_host, open_network
from h2t_store.engines.interface import Engine, Report
from h2t_store.engines.loading import (
    Batch,
    check_workers,
    is_of_a_worker,
    load,
    load_batch,
    naming_workers,
    workers_for,
)
from h2t_store.engines.plan import RowBlock
from h2t_store.engines.preparation import Job, prepare
from h2t_store.engines.writer import Filling, writing
from h2t_store.errors import ModelError, StoppedError, one_line
from h2t_store.settings import Running, Settings
from h2t_store.storage.extraction import Extraction

__all__ = ["LocalEngine", "seconds_per_image"]


class LocalEngine(Engine):
    """This process; ``workers`` others decode the images."""

    def __init__(self, workers: int | None = None) -> None:
        check_workers(workers)
        self.workers = workers

    def prepare(self, settings: Settings) -> Job:
        return prepare(settings)

    def run(
        self,
        job: Job,
        extraction: Extraction,
        plan: Iterable[RowBlock],
        running: Running,
        report: Report,
        written: Callable[[RowBlock], None] = lambda block: None,
    ) -> None:
        """Compute and commit row blocks in order, see `Engine.run`; ``written`` is told of each that is committed."""
        ahead, blocks = tee(plan)
        loaded = load(
            job,
            ahead,
            segments=extraction.header.segments,
            workers=workers_for(job.source, self.workers),
            skip=running.on_error == "skip",
        )
        at_once = extraction.find_images_at_once()
        with (
            naming_workers(),
            open_network(job.forward, at_once, extraction.note_images_at_once) as network,
            writing(extraction, written) as write,
            closing(loaded),
        ):
            computed = _compute(job, network, loaded)
            for block in blocks:
                filling = Filling(job.forward, block)
                while filling.n_filled < len(filling.norms):
                    batch, features = next(computed)
                    filling.add(batch, features)
                    report(len(batch.rows), batch.remarks)
                write(filling)
                if running.stopped():
                    break
        if next(blocks, None) is not None:
            raise StoppedError("stopped after a row block")


def _compute(job: Job, network: Network, loaded: Iterable[Batch]) -> Iterator[tuple[Batch, Features | None]]:
    """Features of each batch; on CUDA a batch is copied to the host while the next one is computed."""
    ahead = 1 if job.forward.device.type == "cuda" else 0
    under_way: deque[tuple[Batch, Features | None]] = deque()

    def first() -> tuple[Batch, Features | None]:
        batch, features = under_way.popleft()
        if features is not None:
            features.wait(job.forward, _sample_ids(job, batch))
        return batch, features

    for batch in loaded:
        under_way.append((batch, _features(job, network, batch) if len(batch.images) else None))
        if len(under_way) > ahead:
            yield first()
    while under_way:
        yield first()


def _sample_ids(job: Job, batch: Batch) -> list[str]:
    """Of the images of a batch."""
    return [str(job.source.sample_ids[row]) for i, row in enumerate(batch.rows) if i not in batch.failed]


@torch.inference_mode()
def _features(job: Job, network: Network, batch: Batch) -> Features:
    try:
        layers = network(batch.images)
    except ModelError:
        raise
    except Exception as error:
        if is_of_a_worker(error):
            raise
        where = f"a batch of {tuple(batch.images.shape)} from image {_sample_ids(job, batch)[0]!r}"
        raise ModelError(f"the network failed on {where}: {one_line(error)}") from error
    return copy_to_host(job.forward, layers)


@torch.inference_mode()
def seconds_per_image(job: Job, workers: int | None = None) -> float:
    """How long an image takes, measured on the first batch, run twice."""
    workers = workers_for(job.source, workers)
    start = perf_counter()
    batch = load_batch(job.source, job.forward.transform, range(min(job.batch_size, len(job.source))))
    decoding = (perf_counter() - start) / len(batch.rows)
    if not len(batch.images):
        return decoding
    with open_network(job.forward) as network:
        for _ in range(2):
            start = perf_counter()
            _features(job, network, batch).wait(job.forward, _sample_ids(job, batch))
    computing = (perf_counter() - start) / len(batch.images)
    if job.forward.device.type == "cpu":
        return computing + decoding / max(1, min(workers, os.cpu_count() or 1))
    return max(computing, decoding / max(1, workers))
