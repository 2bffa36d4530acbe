"""The job: find out what is asked, plan its row blocks, compute those that are missing, and hand back the matrix."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from h2t_store.engines import local
from h2t_store.engines.interface import Engine
from h2t_store.engines.plan import Plan
from h2t_store.engines.preparation import Job, check_integer, prepare, with_whole_paths
from h2t_store.engines.ranks import ALONE, Ranks, ranks
from h2t_store.engines.remarks import Remarks
from h2t_store.errors import DataError, H2TError, StoreError, one_line
from h2t_store.images import Source, arrange
from h2t_store.matrix import FeatureMatrix, open_features
from h2t_store.network import ClassTokenPolicy, code_digest
from h2t_store.storage.layout import ExtractionHeader, check_name
from h2t_store.storage.places import in_one_process
from h2t_store.storage.store import Extraction, FeatureStore, differences
from h2t_store.storage.verify import damaged_chunks

__all__ = ["check_running", "expected_seconds", "extract", "extract_job", "require_same_environment"]

_log = logging.getLogger("h2t_store")
_ON_ERROR = ("raise", "skip")
_ENGINES = ("local", "ray", "torchrun")
_SAME_MAGNITUDE = 0.05


def extract(
    data: str | os.PathLike[str] | tuple[Any, Any],
    *,
    model: str | nn.Module,
    store: str | os.PathLike[str],
    name: str,
    split: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    pretrained: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    taps: str | Sequence[str] = "activations",
    cls_token: ClassTokenPolicy = "pool",
    target_size: int | Sequence[int] = 512,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int | Literal["auto"] = "auto",
    workers: int | None = None,
    device: str | torch.device = "auto",
    amp: bool = False,
    torchcompile: bool = False,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    append: bool = False,
    engine: Literal["local", "ray", "torchrun"] = "local",
    ray_address: str | None = None,
    num_gpus_per_worker: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int, int], None] | None = None,
) -> FeatureMatrix:
    """Run a frozen network once over a dataset and store the pooled activations of its layers.

    What is stored already is not computed again: a finished extraction is opened, an interrupted one is continued at
    the first missing row block.

    Parameters
    ----------
    data : path-like, str or (images, labels)
        A folder with one folder of images per class, a ``.tar`` of such folders, a list file (``path label`` per line),
        ``torch/NAME``, ``hfds/NAME``, ``wds/FOLDER``, ``digits``, or uint8 images ``(n, h, w, 3)`` with labels or None
        (see `h2t_store.images.open_source`).
    model : str or nn.Module
        A timm architecture, ``path/to/file.py:factory``, or a module (it is put in evaluation mode and moved to
        ``device``).
    store : path-like or str
        The store, made where there is none: a folder, or a URL such as ``s3://bucket/features.zarr`` (see
        `h2t_store.storage.places.address.open_place`).
    name : str
        What to call the extraction, such as ``pets/train``.
    split : str, optional
        Part of the data, where it has parts.
    data_dir : path-like, optional
        Where lists and named datasets find their images.
    download : bool
        Let a named dataset be downloaded.
    pretrained : bool
        Load timm's published weights.
    checkpoint : path-like, optional
        Weights to load instead, ``.safetensors`` or a torch file of plain tensors.
    img_size : int, optional
        Side of the square input; by default the network's own.
    taps : str or sequence of str
        ``activations``, ``blocks``, ``paper``, or globs over module names (see `h2t_store.network.find_taps`).
    cls_token : {"pool", "only", "keep"}
        Class tokens are pooled with the others, stand for all of them, or are kept beside the pooled others (paper,
        section 4).
    target_size : int or sequence of int
        Length that each activation is pooled to, about (paper, section 3); several are stored side by side, see
        `FeatureMatrix.select_target_size`.
    dtype : {"float16", "float32"}
        As stored. Values that do not fit stop the job.
    batch_size : int or "auto"
        Images per forward pass; halved for as long as CUDA runs out of memory.
    workers : int, optional
        Processes that decode images; 0 decodes in this one. By default up to 4, and 0 for images in memory and in the
        processes of pools, which cannot start others. With the engine ``ray`` the workers that each hold the network;
        by default one for each share of GPUs, or one per node.
    device : str or torch.device
        ``auto`` takes CUDA where it is present, else the CPU.
    amp : bool
        Run the network under bfloat16 autocast.
    torchcompile : bool
        Compile the network with the pooling.
    seed : int
        For weights that are not loaded.
    on_error : {"raise", "skip"}
        Stop at an image that cannot be read; or keep its row without features, record why, and leave it out of the
        matrix (see `FeatureMatrix.failures`).
    append : bool
        Extend the extraction by images that the data has got since; what is stored stays as it is.
    engine : {"local", "ray", "torchrun"}
        Compute in this process; on a Ray cluster, whose nodes all find ``store`` and ``data`` at the same addresses; or
        in the processes that ``torchrun`` started, each with a card of its own, which share the row blocks. What one
        engine began another can finish, bit for bit the same on the same kind of device.
    ray_address : str, optional
        Of a running cluster, or ``auto``; ``local`` starts one. By default ``RAY_ADDRESS``, else as Ray decides.
    num_gpus_per_worker : float, optional
        By default 1 where the Ray cluster has GPUs and ``device`` is not the CPU.
    stopped : callable
        Asked after every row block whether to stop.
    progress : callable, optional
        Called with (images done, images in all, bytes of the row blocks that this call filled).

    Returns
    -------
    FeatureMatrix
        The finished extraction.

    Raises
    ------
    DataError, ModelError, TapError, StoreError, UnreachableError
        Each with one line that names the argument, what was given and what is accepted. What was committed before
        stays.
    StoppedError
        Where ``stopped`` returned true; the same call continues.
    """
    check_running(name, workers, on_error, engine, num_gpus_per_worker)
    if batch_size == "auto":
        batch_size = _batch_size_begun(store, name) or "auto"
    with (
        ranks() if engine == "torchrun" else contextlib.nullcontext(ALONE) as processes,
        _engine(engine, processes, store, ray_address, num_gpus_per_worker, device) as (prepared, run),
    ):
        job = prepared(
            data,
            model=model,
            split=split,
            data_dir=data_dir,
            download=download,
            pretrained=pretrained,
            checkpoint=checkpoint,
            img_size=img_size,
            taps=taps,
            cls_token=cls_token,
            target_size=target_size,
            dtype=dtype,
            batch_size=batch_size,
            device=device,
            amp=amp,
            torchcompile=torchcompile,
            seed=seed,
        )
        opened = FeatureStore(store, create=True)
        if not append and _is_done(job, opened, name):
            return open_features(store, name)
        with opened.lock(name) if processes.leads else contextlib.nullcontext() as lost:
            return extract_job(
                job,
                opened,
                name,
                workers=workers,
                on_error=on_error,
                append=append,
                stopped=lambda: stopped() or (lost is not None and lost()),
                progress=progress,
                processes=processes,
                run=run,
            )


@contextlib.contextmanager
def _engine(
    engine: Literal["local", "ray", "torchrun"],
    processes: Ranks,
    store: str | os.PathLike[str],
    address: str | None,
    num_gpus: float | None,
    device: str | torch.device,
) -> Iterator[tuple[Callable[..., Job], Engine]]:
    """What finds out what to compute, and what computes it: both in this process, or both on Ray workers."""
    if in_one_process(store) and engine != "local":
        raise StoreError(f"store {store!r} is in the memory of one process: others cannot write into it")
    if engine == "local":
        yield prepare, local.run
        return
    if engine == "torchrun":

        def on_its_card(data: Any, **settings: Any) -> Job:
            device = settings["device"]
            if torch.cuda.is_available() and str(device) in ("auto", "cuda"):
                device = f"cuda:{processes.local_rank}"
            return prepare(data, **(settings | {"device": device}))

        yield on_its_card, local.run
        return
    from h2t_store.engines import ray

    with ray.cluster(address, num_gpus, str(device)) as cluster:

        def prepared(data: Any, **settings: Any) -> Job:
            model = settings["model"]
            if isinstance(model, nn.Module):
                ray.send_code_of(model)
            job = cluster.call(_prepare_to_send, **with_whole_paths(data, **settings))
            if isinstance(model, nn.Module):  # whose source may not be there
                job = replace(job, backbone=replace(job.backbone, code_sha256=code_digest(model)))
            return job

        yield prepared, cluster.run


def _prepare_to_send(**settings: Any) -> Job:
    """Find out in another process what to compute: the caller may lack the GPU that it takes to try."""
    from h2t_store.engines.ray import send_code_of

    job = prepare(**settings)
    job.backbone.model.cpu()
    send_code_of(job.backbone.model)
    return job


def check_running(
    name: str,
    workers: int | None,
    on_error: str,
    engine: str = "local",
    num_gpus_per_worker: float | None = None,
) -> None:
    """Raise `H2TError` unless these arguments of `extract` are as it accepts them."""
    check_name(name)
    if workers is not None:
        check_integer("workers", workers, 0)
    local.check_workers(None if engine == "ray" else workers)
    if on_error not in _ON_ERROR:
        raise H2TError(f"on_error {on_error!r}: accepted are {' and '.join(_ON_ERROR)}")
    if engine not in _ENGINES:
        raise H2TError(f"engine {engine!r}: accepted are local, ray and torchrun")
    if num_gpus_per_worker is not None and not 0 <= num_gpus_per_worker < math.inf:
        raise H2TError(f"num_gpus_per_worker {num_gpus_per_worker!r}: accepted are numbers from 0")


def extract_job(
    job: Job,
    store: FeatureStore,
    name: str,
    *,
    workers: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    append: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int, int], None] | None = None,
    processes: Ranks = ALONE,
    run: Engine = local.run,
) -> FeatureMatrix:
    """Do a job, or what is left of it, under the lock of its name; `extract` describes the parameters."""
    if append and processes.leads:
        _give_up_extension(job, store, name)
    processes.meet()
    earlier = _unfinished_part(job, store, name) if append else None
    if earlier is not None:
        extract_job(
            earlier,
            store,
            name,
            workers=workers,
            on_error=on_error,
            stopped=stopped,
            progress=progress,
            processes=processes,
            run=run,
        )
    if processes.leads:
        store.require_lock(name)
        extraction, source = _begin(job, store, name, append)
        if not extraction.complete:
            _give_up_damaged(extraction, name)
        processes.meet()
    else:
        processes.meet()
        extraction, source = _begin(job, store, name, append)
    if not extraction.complete:
        require_same_environment(extraction, job)
        missing = _missing(extraction, processes)
        processes.meet()  # all have the same list before anything is committed
        _compute(job, extraction, source, missing, workers, on_error, stopped, progress, processes, run)
    processes.meet()
    if processes.leads:
        if not extraction.complete:
            store.require_lock(name)
            extraction.finish()
        _warn_about_siblings(store, name, extraction.header)
    processes.meet()
    return open_features(store.address, name)


def _batch_size_begun(store: str | os.PathLike[str], name: str) -> int | None:
    """Batch size of an extraction that was begun: it can be finished or extended with no other."""
    with contextlib.suppress(StoreError, KeyError, TypeError):
        begun = FeatureStore(store).find(name)
        if begun is not None and begun.holds_rows():
            return int(begun.header.provenance["environment"]["arguments"]["batch_size"])
    return None


def _is_done(job: Job, store: FeatureStore, name: str) -> bool:
    """Whether the extraction is there and complete; then nothing is written, not even a lock."""
    begun = store.find(name)
    if begun is None or not begun.complete:
        return False
    with contextlib.suppress(DataError):
        source = arrange(job.source, begun.sample_ids().tolist(), begun.header.classes)
        if not differences(begun.header.provenance["inputs"], job.header(source).provenance["inputs"]):
            _require_same_behaviour(begun, job)
            _log.info("%s is complete: nothing to compute", begun.where)
            return True
    return False


def _give_up_damaged(extraction: Extraction, name: str) -> None:
    """Have row blocks computed again that are not as they were written: a power failure can lose what was committed.

    From where nothing is lost that was written, nothing is read: a listing says whether all of it is there.
    """
    if extraction.folder.keeps_what_it_has:
        gone = extraction.lacking()
        if gone:
            _log.warning(
                "%s: row blocks %s are computed again: some of their chunks are missing", extraction.where, gone
            )
            extraction.reopen(gone)
        return
    for block in np.flatnonzero(extraction.committed()).tolist():
        damages = list(damaged_chunks(extraction, name, block))
        if damages:
            _log.warning(
                "%s: row block %d is computed again: %s: %s",
                extraction.where,
                block,
                damages[0].path,
                damages[0].problem,
            )
            extraction.reopen([block])


def _begin(job: Job, store: FeatureStore, name: str, append: bool) -> tuple[Extraction, Source]:
    """The extraction to fill, and the images in the order of its rows."""
    begun = store.find(name)
    if begun is None:
        if append:
            raise StoreError(
                f"{store.address}: there is no extraction {name!r} to append to: run without --append first"
            )
        header = job.header(job.source)
        return store.begin(name, header, job.source.y, job.source.sample_ids), job.source
    source = job.source
    try:
        source = arrange(source, begun.sample_ids().tolist(), begun.header.classes)
    except DataError:
        if append:
            raise
    if append and len(source) > begun.header.n_samples:
        return _extend(job, store, name, begun, source)
    header = job.header(source)
    try:
        return store.begin(name, header, source.y, source.sample_ids), source
    except StoreError as error:
        more = len(source) - begun.header.n_samples
        if not append and more > 0 and _inputs_of_earlier_rows(job, begun, source) == begun.header.provenance["inputs"]:
            raise StoreError(f"{begun.where}: the data has {more} more images now: add them with --append") from error
        raise


def _give_up_extension(job: Job, store: FeatureStore, name: str) -> None:
    """Roll an interrupted extension back if the images that it was to add are others now."""
    begun = store.find(name)
    if begun is None or begun.complete or not begun.header.segments:
        return
    with contextlib.suppress(DataError):
        source = arrange(job.source, begun.sample_ids().tolist(), begun.header.classes)
        if _inputs_of_earlier_rows(job, begun, source) == begun.header.provenance["inputs"]:
            return
    store.require_lock(name)
    begun.roll_back()


def _unfinished_part(job: Job, store: FeatureStore, name: str) -> Job | None:
    """The job that was interrupted before the data got more images, if there is one."""
    begun = store.find(name)
    if begun is None or begun.complete:
        return None
    source = arrange(job.source, begun.sample_ids().tolist(), begun.header.classes)
    return replace(job, source=source.take(np.arange(begun.header.n_samples)))


def _extend(job: Job, store: FeatureStore, name: str, begun: Extraction, source: Source) -> tuple[Extraction, Source]:
    old = begun.header
    different = differences(old.provenance["inputs"], _inputs_of_earlier_rows(job, begun, source))
    if different:
        raise StoreError(f"{begun.where} was made from something else ({'; '.join(different)}): it cannot be extended")
    require_same_environment(begun, job)
    header = job.header(source, (*old.segments, old.n_samples), old.rows_per_block)
    return store.extend(name, header, source.y, source.sample_ids), source


def _inputs_of_earlier_rows(job: Job, begun: Extraction, source: Source) -> dict[str, Any]:
    earlier = source.take(np.arange(begun.header.n_samples))
    inputs: dict[str, Any] = job.header(earlier).provenance["inputs"]
    return inputs


def _missing(extraction: Extraction, processes: Ranks) -> Plan:
    """Row blocks for this process to compute, without rows that are stored already."""
    header, committed = extraction.header, extraction.committed()
    if committed.any():
        _log.info(
            "%s: %d of %d row blocks are there, computing the rest", extraction.where, committed.sum(), len(committed)
        )
    numbers = processes.share(np.flatnonzero(~committed))
    known = {number: extraction.known_rows(number) for number in numbers.tolist()}
    return Plan(header.n_samples, header.rows_per_block, numbers, known)


def _compute(
    job: Job,
    extraction: Extraction,
    source: Source,
    missing: Plan,
    workers: int | None,
    on_error: Literal["raise", "skip"],
    stopped: Callable[[], bool],
    progress: Callable[[int, int, int], None] | None,
    processes: Ranks,
    run: Engine,
) -> None:
    total = extraction.header.n_samples
    first = done = total - missing.n_rows
    row_bytes, height = extraction.header.n_features * job.forward.dtype.itemsize, extraction.header.rows_per_block

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None and processes.leads:
            whole = done - first if done == total else (done - first) // height * height
            progress(done, total, whole * row_bytes)

    advance(0)
    remarks = Remarks()
    try:
        run(
            job.forward,
            source,
            extraction,
            missing,
            batch_size=job.batch_size,
            workers=workers,
            on_error=on_error,
            stopped=stopped,
            progress=advance,
            remark=remarks.add,
        )
    except OSError as error:
        raise StoreError(
            f"{extraction.where} cannot be written: {error.strerror or one_line(error)}; finished row blocks are stored"
        ) from error
    finally:
        remarks.log()


def expected_seconds(job: Job, workers: int | None = None) -> float:
    """How long a job takes from its beginning, judged by one batch."""
    return len(job.source) * local.seconds_per_image(job.forward, job.source, job.batch_size, workers)


def _warn_about_siblings(store: FeatureStore, name: str, header: ExtractionHeader) -> None:
    """Say where ``pets/train`` and ``pets/test`` do not go together: kinds of labels or weights that differ."""
    parent = name.rpartition("/")[0]
    for sibling in store.names() if parent else []:
        if sibling == name or sibling.rpartition("/")[0] != parent:
            continue
        with contextlib.suppress(StoreError):
            other = store.open(sibling).header
            kinds = {type(label) for label in (*header.classes, *other.classes)}
            if len(kinds) > 1:
                _log.warning("the labels of %s and %s are integers in one and names in the other", name, sibling)
            mine, theirs = header.provenance["inputs"], other.provenance["inputs"]
            if mine["model"] == theirs["model"] and mine["weights_sha256"] != theirs["weights_sha256"]:
                _log.warning("%s and %s were made by %s with different weights", name, sibling, mine["model"])


def require_same_environment(extraction: Extraction, job: Job) -> None:
    """An extraction is finished as it was begun: other versions, devices and batches round differently."""
    begun = extraction.header.provenance["environment"]
    keys = ("device", "batch_size", "torchcompile")
    old, new = ({key: env["arguments"][key] for key in keys} | env["versions"] for env in (begun, job.environment))
    different = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in new if old.get(key) != new.get(key)]
    _require_same_behaviour(extraction, job)
    if different:
        raise StoreError(
            f"{extraction.where} was begun elsewhere ({'; '.join(different)}): go on with it there, or "
            f"remove it with: h2t rm {extraction.where.replace(': ', ' ')}"
        )


def _require_same_behaviour(extraction: Extraction, job: Job) -> None:
    """Weights and code that are the same can still be another network: see `Job.environment`."""
    old, new = (env.get("behaviour", []) for env in (extraction.header.provenance["environment"], job.environment))
    if len(old) == len(new) and not np.allclose(old, new, rtol=_SAME_MAGNITUDE, equal_nan=True):
        raise StoreError(
            f"{extraction.where} was made by a network that computes something else, though weights and code are the "
            f"same: the activations of two test images are {new} in the mean, not {old}; choose another name"
        )
