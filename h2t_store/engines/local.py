"""Run row blocks on this machine: decode in workers, forward and pool on one device, write in the background."""

import contextlib
import logging
import math
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import tee
from multiprocessing import current_process, get_all_start_methods, get_start_method
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from h2t_store.engines.interface import Forward
from h2t_store.engines.plan import RowBlock, batches
from h2t_store.engines.remarks import Remarks
from h2t_store.errors import DataError, H2TError, ModelError, StoppedError, TapError, one_line
from h2t_store.images import Source
from h2t_store.images.names import shown
from h2t_store.network import tapped
from h2t_store.storage.store import Extraction
from h2t_store.switches import exact_arithmetic

__all__ = ["check_workers", "choose_batch_size", "default_workers", "run", "seconds_per_image"]

_log = logging.getLogger("h2t_store")
_BLOCKS_BEING_WRITTEN = 2
_CPU_BATCH = 16
_MAX_DEFAULT_WORKERS = 4
_MAX_CUDA_BATCH = 256
_CUDA_MEMORY_SHARE = 0.7
_GUARD = "put what it is to do once below: if __name__ == '__main__':"


class _Batch(NamedTuple):
    """Images (n - failed, 3, height, width) uint8 of ``n`` rows, why there is none for the others, and remarks."""

    images: Tensor
    n: int
    failed: dict[int, str]
    remarks: Remarks


class _Item(NamedTuple):
    """An image or the reason why there is none, its name, and remarks on it."""

    image: Tensor | str
    name: str
    remarks: Sequence[str] = ()


class _Images(Dataset[_Item]):
    """Transformed images by row, or the reason why there is none: a worker's exception would lose its one line."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source = source
        self.transform = transform

    def __getitem__(self, row: int) -> _Item:
        name = shown(self.source.where(row))
        try:
            image, remarks = self.source.picture(row)
        except DataError as error:
            return _Item(str(error), name)
        try:
            return _Item(self.transform(image), name, remarks)
        except Exception as error:  # memory that does not suffice, for one
            return _Item(f"{name}: {image.width} x {image.height} pixels cannot be prepared: {one_line(error)}", name)


def _collate(items: Sequence[_Item]) -> _Batch:
    failed = {i: item.image for i, item in enumerate(items) if isinstance(item.image, str)}
    images = [item.image for item in items if not isinstance(item.image, str)]
    remarks = Remarks.of((item.name, item.remarks) for item in items)
    return _Batch(torch.stack(images) if images else torch.empty(0), len(items), failed, remarks)


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and a first SIGTERM may be sent to workers, too, but the block in hand needs their images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class _Rows:
    """Rows of each batch, as a loader wants them, planned while it goes."""

    def __init__(self, blocks: Iterable[RowBlock], batch_size: int, segments: Sequence[int]) -> None:
        self.plan = (blocks, batch_size, segments)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, batches(*self.plan))


def run(
    forward: Forward,
    source: Source,
    extraction: Extraction,
    blocks: Iterable[RowBlock],
    *,
    batch_size: int,
    workers: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda images: None,
    remark: Callable[[Remarks], None] = lambda remarks: None,
) -> None:
    """Compute and commit row blocks in order, as `h2t_store.engines.interface.Engine` says.

    Blocks are taken from the iterable as they are needed, a few batches ahead where processes decode; 0 ``workers``
    decode in this one.
    """
    check_workers(workers)
    workers = default_workers(source) if workers is None else workers
    for_loading, for_computing, remaining = tee(blocks, 3)
    segments = extraction.header.segments
    loader: DataLoader[Any] = DataLoader(
        _Images(source, forward.transform),
        batch_sampler=_Rows(for_loading, batch_size, segments),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=forward.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
    )
    rows_of_batches = batches(for_computing, batch_size, segments)
    network = _running(forward, extraction.find_images_at_once(), extraction.note_images_at_once)
    checked = _checked(loader, on_error, remark)
    computed = _compute(forward, network, checked, rows_of_batches, source.sample_ids)
    try:
        with contextlib.closing(computed), _Writer(extraction) as writer:
            for block in remaining:
                part = _Part(forward, block)
                while part.done < len(part.norms):
                    features = next(computed)
                    part.add(features)
                    progress(features.n)
                writer.write(part)
                if stopped():
                    break
        if next(remaining, None) is not None:
            raise StoppedError("stopped after a row block")
    except Exception as error:
        if _is_of_a_worker(error):
            raise _worker_failed(error) from error
        raise


def _worker_failed(error: Exception) -> DataError:
    return DataError(f"a process that decodes images failed: {one_line(error)} ({_advice(error)})")


def _is_of_a_worker(error: Exception) -> bool:
    """Whether torch says that a worker died, which a signal handler does in the midst of whatever runs."""
    return "DataLoader worker" in str(error)


def _advice(error: Exception) -> str:
    if "killed by signal" in str(error) or get_start_method() == "fork":
        return "fewer workers need less memory; with 0 this process decodes"
    return (
        f"the start method {get_start_method()!r} runs the script, a file, once more in each process: {_GUARD} "
        "(with 0 workers this process decodes)"
    )


def _checked(
    loader: Iterable[_Batch], on_error: Literal["raise", "skip"], remark: Callable[[Remarks], None]
) -> Iterator[_Batch]:
    loading = iter(loader)
    while True:
        try:
            batch = next(loading)
        except StopIteration:
            return
        except ConnectionError as error:  # it ended while it handed over a batch
            raise _worker_failed(error) from error
        except OSError as error:
            raise DataError(f"images cannot be read: {one_line(error)}") from error
        if batch.failed and on_error == "raise":
            raise DataError(next(iter(batch.failed.values())))
        remark(batch.remarks)
        yield batch


@dataclass(frozen=True)
class _Features:
    """Features of a batch of ``n`` rows without the failed ones, and norms; on CUDA on their way to the host."""

    layers: list[Tensor]
    stored: list[Tensor]
    norms: Tensor
    n: int
    failed: dict[int, str]
    copied: torch.cuda.Event | None


@torch.inference_mode()
def _compute(
    forward: Forward,
    running: contextlib.AbstractContextManager[Callable[[Tensor], list[Tensor]]],
    loaded: Iterable[_Batch],
    rows_of_batches: Iterable[range],
    sample_ids: NDArray[Any],
) -> Generator[_Features]:
    """Features of each batch as stored; on CUDA a batch is copied to the host while the next one is computed."""
    on_their_way: deque[tuple[_Features, list[int]]] = deque()
    ahead = 1 if forward.device.type == "cuda" else 0
    with running as network:
        for rows, batch in zip(rows_of_batches, loaded, strict=True):
            good = [row for i, row in enumerate(rows) if i not in batch.failed]
            try:
                layers = network(batch.images) if good else []
            except ModelError:
                raise
            except Exception as error:
                if _is_of_a_worker(error):
                    raise
                where = f"a batch of {tuple(batch.images.shape)} from image {str(sample_ids[good[0]])!r}"
                raise ModelError(f"the network failed on {where}: {one_line(error)}") from error
            on_their_way.append((_start_copying(forward, layers, batch), good))
            if len(on_their_way) > ahead:
                yield _arrived(forward, *on_their_way.popleft(), sample_ids)
        while on_their_way:
            yield _arrived(forward, *on_their_way.popleft(), sample_ids)


@contextlib.contextmanager
def _running(
    forward: Forward, at_once: int | None = None, note: Callable[[int], None] = lambda images: None
) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """The network as a function from uint8 images to pooled activations, in halves where CUDA runs out of memory.

    ``note`` is called with how many images at once it goes on with; ``at_once`` are the most to begin with.
    """
    shape = (1, len(forward.mean), 1, 1)
    mean, std = (torch.tensor(values, device=forward.device).view(shape) for values in (forward.mean, forward.std))
    most = at_once or 1 << 30

    def network(images: Tensor) -> list[Tensor]:
        nonlocal most
        parts: list[list[Tensor]] = []
        start = 0
        while start < len(images):
            part = images[start : start + most]
            try:
                part = part.to(forward.device, non_blocking=True).to(memory_format=forward.memory_format)
                parts.append(pooled((part.float().div_(255) - mean).div_(std)))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                most = len(part) // 2
                _log.warning("out of memory with %d images at once: going on with %d", len(part), most)
                note(most)
                torch.cuda.empty_cache()
            else:
                start += len(part)
        return parts[0] if len(parts) == 1 else [torch.cat(layer) for layer in zip(*parts, strict=True)]

    card = torch.cuda.device(forward.device) if forward.device.type == "cuda" else contextlib.nullcontext()
    autocast = torch.autocast(forward.device.type, torch.bfloat16, enabled=forward.amp)
    with card, exact_arithmetic, autocast, tapped(forward.model, forward.layers, compiled=forward.compiled) as pooled:
        yield network


def _start_copying(forward: Forward, layers: list[Tensor], batch: _Batch) -> _Features:
    if not layers:
        return _Features([], [], torch.empty(0), batch.n, batch.failed, None)
    stored = [layer.to(forward.dtype) for layer in layers]
    wide = torch.float32 if forward.dtype == torch.float16 else torch.float64  # so that squares fit
    norms = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=wide).float() for part in stored], dim=1)
    if forward.device.type != "cuda":
        return _Features(layers, [part.cpu() for part in stored], norms.cpu(), batch.n, batch.failed, None)
    whole = torch.cat(stored, dim=1).to("cpu", non_blocking=True)
    norms = norms.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(forward.device).record_event()
    parts = torch.split(whole, [part.shape[1] for part in stored], dim=1)
    return _Features(layers, list(parts), norms, batch.n, batch.failed, copied)


def _arrived(forward: Forward, features: _Features, rows: list[int], sample_ids: NDArray[Any]) -> _Features:
    """Wait for the copy; a value that is not finite makes a norm that is not."""
    if features.copied is not None:
        features.copied.synchronize()
    if not torch.isfinite(features.norms).all():
        _explain_overflow(forward, features, [str(sample_ids[row]) for row in rows])
    return features


def _explain_overflow(forward: Forward, features: _Features, sample_ids: Sequence[str]) -> None:
    """Raise the error that says which tap and which image are at fault."""
    for layer, values, norm in zip(forward.layers, features.layers, features.norms.T, strict=True):
        bad = ~torch.isfinite(values).all(dim=1)
        if bad.any():
            sample = sample_ids[int(bad.nonzero()[0])]
            raise ModelError(f"tap {layer.name!r}: the network gives values that are not finite for image {sample!r}")
        too_large = ~torch.isfinite(norm).to(values.device)
        if too_large.any():
            sample = sample_ids[int(too_large.nonzero()[0])]
            advice = ": extract with --dtype float32" if forward.dtype == torch.float16 else ""
            raise TapError(
                f"tap {layer.name!r}: {float(values[too_large].abs().amax(1)[0]):.4g} for image {sample!r} is beyond "
                f"{str(forward.dtype).removeprefix('torch.')} ({torch.finfo(forward.dtype).max:g}){advice}"
            )


class _Part:
    """A row block that fills up; rows without an image stay zero."""

    def __init__(self, forward: Forward, block: RowBlock) -> None:
        n = block.stop - block.start
        self.block = block
        self.layers = [torch.zeros((n, layer.width), dtype=forward.dtype) for layer in forward.layers]
        self.norms = torch.zeros((n, len(forward.layers)))
        self.failed: dict[int, str] = {}
        self.done = 0

    def add(self, features: _Features) -> None:
        """Put the next rows in."""
        stop = self.done + features.n
        rows: Any = slice(self.done, stop)
        if features.failed:
            self.failed |= {self.done + i: reason for i, reason in features.failed.items()}
            rows = torch.tensor([row for row in range(self.done, stop) if row not in self.failed], dtype=torch.long)
        for layer, values in zip(self.layers, features.stored, strict=False):
            layer[rows] = values
        if features.stored:
            self.norms[rows] = features.norms
        self.done = stop


class _Writer:
    """Writes blocks in the background, two at a time at most; what was handed to it is on disk once it is left."""

    def __init__(self, extraction: Extraction) -> None:
        self.extraction = extraction
        self._thread = ThreadPoolExecutor(1)
        self._under_way: deque[Future[None]] = deque()

    def write(self, part: _Part) -> None:
        """Hand over a block; waits while two others are being written."""
        while len(self._under_way) >= _BLOCKS_BEING_WRITTEN:
            self._under_way.popleft().result()
        number, height = part.block.number, self.extraction.header.rows_per_block
        self._under_way.append(
            self._thread.submit(
                self.extraction.write_block,
                number,
                [layer.numpy() for layer in part.layers],
                part.norms.numpy(),
                np.zeros((len(part.norms), 16), np.uint8),
                part.failed,
                known=part.block.start - number * height,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        for written in self._under_way:
            written.result()


def choose_batch_size(forward: Forward, image_size: tuple[int, int]) -> int:
    """How many images to run at once: the same whenever it is asked on a machine of the same kind.

    On the CPU 16. On CUDA the largest power of two up to 256 that seven tenths of the card's memory hold.
    """
    if forward.device.type != "cuda":
        return _CPU_BATCH
    peaks = []
    with torch.inference_mode(), _running(forward) as network:
        for n in (2, 4):
            torch.cuda.reset_peak_memory_stats(forward.device)
            try:
                network(torch.zeros((n, 3, *image_size), dtype=torch.uint8))
            except torch.OutOfMemoryError:
                return 1
            peaks.append(torch.cuda.max_memory_allocated(forward.device))
    each = max(1, (peaks[1] - peaks[0]) // 2)
    room = int(_CUDA_MEMORY_SHARE * torch.cuda.mem_get_info(forward.device)[1]) - peaks[0]
    return int(2 ** math.floor(math.log2(min(max(room // each, 1), _MAX_CUDA_BATCH))))


def default_workers(source: Source) -> int:
    """How many processes decode the images of a source where nobody says."""
    return 0 if source.in_memory or not _may_start_processes() else min(_MAX_DEFAULT_WORKERS, os.cpu_count() or 1)


def check_workers(workers: int | None) -> None:
    """Raise `H2TError` where this process cannot start so many, or is only being started itself."""
    if getattr(current_process(), "_inheriting", False):  # as multiprocessing asks itself
        raise H2TError(f"a process that is being started runs the whole script, this call with it: {_GUARD}")
    if workers and not _may_start_processes():
        raise H2TError(f"workers {workers}: this is a process of a pool, which cannot start others; accepted is 0")


def _may_start_processes() -> bool:
    """Whether this is none of the processes that must not: those of a pool, of joblib, or of a data loader."""
    method = get_start_method(allow_none=True)  # without, the user could no longer choose one
    return not current_process().daemon and method in (None, *get_all_start_methods())


def seconds_per_image(forward: Forward, source: Source, batch_size: int, workers: int | None = None) -> float:
    """How long an image takes, measured on the first batch, run twice."""
    workers = default_workers(source) if workers is None else workers
    start = perf_counter()
    images = _collate([_Images(source, forward.transform)[row] for row in range(min(batch_size, len(source)))])
    decoding = (perf_counter() - start) / images.n
    if not len(images.images):
        return decoding
    with torch.inference_mode(), _running(forward) as network:
        for _ in range(2):
            start = perf_counter()
            _arrived(forward, _start_copying(forward, network(images.images), images), [], source.sample_ids)
    network_seconds = (perf_counter() - start) / len(images.images)
    if forward.device.type == "cpu":
        return network_seconds + decoding / max(1, min(workers, os.cpu_count() or 1))
    return max(network_seconds, decoding / max(1, workers))
