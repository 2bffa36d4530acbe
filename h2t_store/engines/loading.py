"""Images to batches: decoded and transformed in worker processes, ahead of the network."""

import logging
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import current_process, get_all_start_methods, get_start_method
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from h2t_store.engines.plan import RowBlock, batches
from h2t_store.engines.preparation import Job
from h2t_store.errors import DataError, H2TError, one_line
from h2t_store.images import Source
from h2t_store.images.names import shown

_log = logging.getLogger("h2t_store")
BATCHES_AHEAD = 2
_MAX_DEFAULT_WORKERS = 4
_GUARD = "put what it is to do once below: if __name__ == '__main__':"


class Remarks(dict[str, tuple[int, str]]):
    """What was lost or guessed when pictures were decoded: of how many pictures, and the first of them."""

    def add(self, others: Mapping[str, tuple[int, str]]) -> None:
        """Count those of other pictures, too."""
        for remark, (n, example) in others.items():
            known, first = self.get(remark, (0, example))
            self[remark] = known + n, first

    def log(self) -> None:
        """Warn once of each kind."""
        for remark, (n, example) in self.items():
            _log.warning("%d images %s: such as %s", n, remark, example)


class Batch(NamedTuple):
    """Images of some rows."""

    rows: Sequence[int]
    images: Tensor  # (n - failed, 3, height, width) uint8
    digests: NDArray[np.uint8]  # (n, 16), zeros where there is no image
    failed: dict[int, str]  # why there is no image, by the place in rows
    remarks: Remarks


def load_batch(source: Source, transform: Callable[[Image.Image], Tensor], rows: Sequence[int]) -> Batch:
    """Decode and transform some rows; a row that fails is reported, not raised."""
    images, failed, remarks = [], {}, Remarks()
    digests = np.zeros((len(rows), 16), np.uint8)
    for i, row in enumerate(rows):
        name = shown(source.where(row))
        try:
            picture = source.picture(row)
        except DataError as error:
            failed[i] = str(error)
            continue
        try:
            images.append(transform(picture.image))
        except Exception as error:  # such as MemoryError
            width, height = picture.image.size
            failed[i] = f"{name}: {width} x {height} pixels cannot be prepared: {one_line(error)}"
            continue
        digests[i] = np.frombuffer(picture.digest, np.uint8)
        remarks.add(dict.fromkeys(picture.remarks, (1, name)))
    return Batch(rows, torch.stack(images) if images else torch.empty(0), digests, failed, remarks)


class _Batches(Dataset[Batch]):
    def __init__(self, job: Job) -> None:
        self.source, self.transform = job.source, job.forward.transform

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        return load_batch(self.source, self.transform, rows)


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(_: int) -> None:
    """Ignore Ctrl-C and a first SIGTERM: the current block needs the images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def load(
    job: Job, blocks: Iterable[RowBlock], *, segments: Sequence[int], workers: int, skip: bool
) -> Generator[Batch]:
    """Batches of row blocks in order, two ahead for each worker process; 0 workers load in this one."""
    loader: DataLoader[Any] = DataLoader(
        _Batches(job),
        batch_size=None,
        sampler=batches(blocks, job.batch_size, segments),
        num_workers=workers,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        collate_fn=_as_it_is,
        pin_memory=job.forward.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
    )
    loading = iter(loader)
    while True:
        try:
            batch = next(loading)
        except StopIteration:
            return
        except ConnectionError as error:  # a worker died while it handed over a batch
            raise _worker_failed(error) from error
        except OSError as error:
            raise DataError(f"images cannot be read: {one_line(error)}") from error
        if batch.failed and not skip:
            raise DataError(next(iter(batch.failed.values())))
        yield batch


@contextmanager
def naming_workers() -> Iterator[None]:
    """Raise `DataError` if a worker process died: torch raises that from a signal handler, in any other code."""
    try:
        yield
    except Exception as error:
        if is_of_a_worker(error):
            raise _worker_failed(error) from error
        raise


def is_of_a_worker(error: Exception) -> bool:
    """Whether torch raised this because a worker process died."""
    return "DataLoader worker" in str(error)


def _worker_failed(error: Exception) -> DataError:
    advice = "fewer workers need less memory; with 0 this process decodes"
    if "killed by signal" not in str(error) and get_start_method() != "fork":
        advice = (
            f"the start method {get_start_method()!r} runs the script, a file, once more in each process: {_GUARD} "
            "(with 0 workers this process decodes)"
        )
    return DataError(f"a process that decodes images failed: {one_line(error)} ({advice})")


def workers_for(source: Source, workers: int | None) -> int:
    """How many processes decode the images of a source, by default if None."""
    if workers is not None:
        return workers
    return 0 if source.in_memory or not _may_start_processes() else min(_MAX_DEFAULT_WORKERS, os.cpu_count() or 1)


def check_workers(workers: int | None) -> None:
    """Raise `H2TError` if this process cannot start others, or is being started itself by multiprocessing."""
    if getattr(current_process(), "_inheriting", False):  # as multiprocessing asks itself
        raise H2TError(f"a process that is being started runs the whole script, this call with it: {_GUARD}")
    if workers and not _may_start_processes():
        raise H2TError(f"workers {workers}: this is a process of a pool, which cannot start others; accepted is 0")


def _may_start_processes() -> bool:
    """Whether this is not a process of a pool, of joblib, or of a data loader."""
    method = get_start_method(allow_none=True)  # without, the user could no longer choose one
    return not current_process().daemon and method in (None, *get_all_start_methods())
