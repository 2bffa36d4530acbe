"""Compute row blocks on this machine: load, run the network, write; each while the others go on."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import tee
from time import perf_counter

import torch

from h2t_store.engines.forward import Features, Forward, Network, copy_to_host, running
from h2t_store.engines.interface import Engine
from h2t_store.engines.loading import (
    Batch,
    OnError,
    check_workers,
    default_workers,
    is_of_a_worker,
    load,
    load_batch,
    naming_workers,
)
from h2t_store.engines.plan import RowBlock
from h2t_store.engines.preparation import Job, prepare
from h2t_store.engines.remarks import Remarks
from h2t_store.engines.writer import Filling, Writer
from h2t_store.errors import ModelError, StoppedError, one_line
from h2t_store.images import Source
from h2t_store.settings import Settings
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
        *,
        on_error: OnError = "raise",
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda images: None,
        remark: Callable[[Remarks], None] = lambda remarks: None,
        written: Callable[[RowBlock], None] = lambda block: None,
    ) -> None:
        """Compute and commit row blocks in order, see `Engine.run`; ``written`` is told of each that is committed."""
        forward = job.forward
        ahead, blocks = tee(plan)
        loaded = load(
            job.source,
            forward.transform,
            ahead,
            batch_size=job.batch_size,
            segments=extraction.header.segments,
            workers=default_workers(job.source) if self.workers is None else self.workers,
            pinned=forward.device.type == "cuda",
            on_error=on_error,
            remark=remark,
        )
        at_once = extraction.find_images_at_once()
        with (
            naming_workers(),
            running(forward, at_once, extraction.note_images_at_once) as network,
            Writer(extraction, written) as writer,
            closing(loaded),
        ):
            computed = _compute(forward, network, loaded, job.source)
            for block in blocks:
                filling = Filling(forward, block)
                while filling.n_filled < len(filling.norms):
                    batch, features = next(computed)
                    filling.add(batch, features)
                    progress(len(batch.rows))
                writer.write(filling)
                if stopped():
                    break
        if next(blocks, None) is not None:
            raise StoppedError("stopped after a row block")


def _compute(
    forward: Forward, network: Network, loaded: Iterable[Batch], source: Source
) -> Iterator[tuple[Batch, Features | None]]:
    """Features of each batch; on CUDA a batch is copied to the host while the next one is computed."""
    ahead = 1 if forward.device.type == "cuda" else 0
    under_way: deque[tuple[Batch, Features | None]] = deque()

    def first() -> tuple[Batch, Features | None]:
        batch, features = under_way.popleft()
        if features is not None:
            features.wait(forward, _sample_ids(source, batch))
        return batch, features

    for batch in loaded:
        features = _features(forward, network, batch, source) if len(batch.images) else None
        under_way.append((batch, features))
        if len(under_way) > ahead:
            yield first()
    while under_way:
        yield first()


def _sample_ids(source: Source, batch: Batch) -> list[str]:
    """Of the images of a batch."""
    return [str(source.sample_ids[row]) for i, row in enumerate(batch.rows) if i not in batch.failed]


@torch.inference_mode()
def _features(forward: Forward, network: Network, batch: Batch, source: Source) -> Features:
    try:
        layers = network(batch.images)
    except ModelError:
        raise
    except Exception as error:
        if is_of_a_worker(error):
            raise
        where = f"a batch of {tuple(batch.images.shape)} from image {_sample_ids(source, batch)[0]!r}"
        raise ModelError(f"the network failed on {where}: {one_line(error)}") from error
    return copy_to_host(forward, layers)


@torch.inference_mode()
def seconds_per_image(forward: Forward, source: Source, batch_size: int, workers: int | None = None) -> float:
    """How long an image takes, measured on the first batch, run twice."""
    workers = default_workers(source) if workers is None else workers
    start = perf_counter()
    batch = load_batch(source, forward.transform, list(range(min(batch_size, len(source)))))
    decoding = (perf_counter() - start) / len(batch.rows)
    if not len(batch.images):
        return decoding
    with running(forward) as network:
        for _ in range(2):
            start = perf_counter()
            _features(forward, network, batch, source).wait(forward, _sample_ids(source, batch))
    computing = (perf_counter() - start) / len(batch.images)
    if forward.device.type == "cpu":
        return computing + decoding / max(1, min(workers, os.cpu_count() or 1))
    return max(computing, decoding / max(1, workers))
