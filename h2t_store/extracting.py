"""Extract: prepare the job, compute the row blocks that are missing, and return the matrix."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from h2t_store.engines import Engine, open_engine
from h2t_store.engines.plan import Plan
from h2t_store.engines.preparation import Job
from h2t_store.engines.remarks import Remarks
from h2t_store.errors import DataError, H2TError, StoreError, one_line
from h2t_store.images import arrange
from h2t_store.matrix import FeatureMatrix, open_features
from h2t_store.settings import Settings
from h2t_store.storage.layout import ExtractionHeader, check_name
from h2t_store.storage.places import in_one_process
from h2t_store.storage.store import Extraction, FeatureStore, differences
from h2t_store.storage.verify import damaged_chunks

__all__ = ["Running", "arranged", "extract", "fill", "require_same_environment"]

_log = logging.getLogger("h2t_store")
_SAME_MAGNITUDE = 0.05


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Running:
    """How a job is run, apart from its engine; `extract` describes the attributes."""

    on_error: Literal["raise", "skip"] = "raise"
    append: bool = False
    stopped: Callable[[], bool] = _never
    progress: Callable[[int, int, int], None] = lambda done, total, n_bytes: None

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise H2TError(f"on_error {self.on_error!r}: accepted are raise and skip")


def extract(
    data: str | os.PathLike[str] | tuple[Any, Any],
    *,
    model: str | nn.Module,
    store: str | os.PathLike[str],
    name: str,
    workers: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    append: bool = False,
    engine: Literal["local", "ray", "torchrun"] = "local",
    ray_address: str | None = None,
    num_gpus_per_worker: float | None = None,
    stopped: Callable[[], bool] = _never,
    progress: Callable[[int, int, int], None] = lambda done, total, n_bytes: None,
    **settings: Any,
) -> FeatureMatrix:
    """Run a frozen network once over a dataset and store the pooled activations of its layers.

    A finished extraction is opened; an interrupted one continues at the first missing row block.

    Parameters
    ----------
    data, model, **settings
        The fields of `h2t_store.settings.Settings`: images, network, ``taps``, ``target_size`` and so on.
    store : path-like or str
        Folder or URL, created if missing (see `h2t_store.storage.places.open_place`).
    name : str
        Name of the extraction, such as ``pets/train``.
    workers : int, optional
        Processes that decode images; 0 decodes in this process. Default: up to 4, and 0 for images in memory and in
        processes of pools, which cannot start others. With engine ``ray``: workers that each hold the network;
        default: one per share of GPUs, or one per node.
    on_error : {"raise", "skip"}
        At an image that cannot be read, stop; or record why and mask its row (see `FeatureMatrix.failures`).
    append : bool
        Extend the extraction by images that are new in the data; stored rows stay as they are.
    engine : {"local", "ray", "torchrun"}
        Compute in this process; on a Ray cluster whose nodes find ``store`` and ``data`` at the same addresses; or in
        the processes started by ``torchrun``, one per device. One engine can finish what another began, with the same
        bits on the same kind of device.
    ray_address : str, optional
        Address of a running cluster, ``auto``, or ``local`` to start one. Default: ``RAY_ADDRESS``, else Ray's choice.
    num_gpus_per_worker : float, optional
        Default: 1 if the Ray cluster has GPUs and ``device`` is not the CPU.
    stopped : callable
        Called after every row block; true stops.
    progress : callable
        Called with (images done, images in total, bytes of features computed by this call).

    Raises
    ------
    DataError, ModelError, TapError, StoreError, UnreachableError
        One line that names the argument, what was given and what is accepted. Committed row blocks stay.
    StoppedError
        If ``stopped`` returned true; the same call continues.
    """
    asked = Settings.of(data=data, model=model, **settings)
    check_name(name)
    if in_one_process(store) and engine != "local":
        raise StoreError(f"store {store!r} is in the memory of one process: engine {engine!r} needs a shared store")
    running = Running(on_error, append, stopped, progress)
    with open_engine(
        engine, workers=workers, ray_address=ray_address, num_gpus_per_worker=num_gpus_per_worker
    ) as opened:
        job = opened.prepare(_with_batch_size(asked, store, name))
        place = FeatureStore(store, create=True)
        if append or not _is_complete(job, place, name):
            with place.lock(name) if opened.leads else nullcontext(_never) as lost:
                fill(job, place, name, opened, replace(running, stopped=lambda: stopped() or lost()))
    return open_features(store, name)


def _with_batch_size(settings: Settings, store: str | os.PathLike[str], name: str) -> Settings:
    """Replace "auto" by the batch size of an extraction that was begun: only the same one can continue it."""
    if settings.batch_size == "auto":
        with suppress(StoreError, KeyError, TypeError):
            begun = FeatureStore(store).find(name)
            if begun is not None and begun.holds_rows():
                arguments = begun.header.provenance["environment"]["arguments"]
                return replace(settings, batch_size=int(arguments["batch_size"]))
    return settings


def _is_complete(job: Job, store: FeatureStore, name: str) -> bool:
    """Whether nothing is left to do; then nothing is written, not even a lock."""
    begun = store.find(name)
    if begun is None or not begun.complete:
        return False
    with suppress(DataError):
        if not differences(begun.header.provenance["inputs"], arranged(job, begun).inputs):
            _require_same_behaviour(begun, job)
            _log.info("%s is complete: nothing to compute", begun.where)
            return True
    return False


def arranged(job: Job, begun: Extraction) -> Job:
    """The job with stored rows first, in their order; raises `DataError` if some are gone from the data."""
    return replace(job, source=arrange(job.source, begun.sample_ids().tolist(), begun.header.classes))


def _earlier_rows(job: Job, begun: Extraction) -> Job:
    """The part of an arranged job that is stored already."""
    return replace(job, source=job.source.take(np.arange(begun.header.n_samples)))


def fill(job: Job, store: FeatureStore, name: str, engine: Engine, running: Running) -> None:
    """Do what is missing of a job, under the lock of its name."""
    if running.append and engine.leads:
        _give_up_extension(job, store, name)
    engine.meet()
    if running.append:
        if engine.leads:
            _roll_back(job, store, name)
        engine.meet()
        begun = store.find(name)
        if begun is not None and not begun.complete:
            fill(_earlier_rows(arranged(job, begun), begun), store, name, engine, replace(running, append=False))
    if not engine.leads:
        engine.meet()
    job, extraction = _begin(job, store, name, running.append)
    if engine.leads:
        if not extraction.complete:
            _reopen_damaged(extraction, name)
        engine.meet()
    if not extraction.complete:
        require_same_environment(extraction, job)
        missing = _missing(extraction, engine)
        engine.meet()  # everyone has the same list before the first block is committed
        _run(job, extraction, missing, engine, running)
    engine.meet()
    if engine.leads:
        if not extraction.complete:
            store.require_lock(name)
            extraction.finish()
        _warn_about_siblings(store, name, extraction.header)
    engine.meet()


def _begin(job: Job, store: FeatureStore, name: str, append: bool) -> tuple[Job, Extraction]:
    """The job in the order of the rows, and the extraction to fill: new, begun before, or extended."""
    begun = store.find(name)
    if begun is None:
        if append:
            raise StoreError(f"{store.address}: no extraction {name!r} to append to: run without --append first")
        return job, store.begin(name, job.header(), job.source.y, job.source.sample_ids)
    try:
        job = arranged(job, begun)
    except DataError:
        if append:
            raise
    new = len(job.source) - begun.header.n_samples
    if append and new > 0:
        return job, _extend(job, store, name, begun)
    try:
        return job, store.begin(name, job.header(), job.source.y, job.source.sample_ids)
    except StoreError as error:
        if new > 0 and _earlier_rows(job, begun).inputs == begun.header.provenance["inputs"]:
            raise StoreError(f"{begun.where}: the data has {new} more images now: add them with --append") from error
        raise


def _give_up_extension(job: Job, store: FeatureStore, name: str) -> None:
    """Roll an interrupted extension back if the images that it was to add are others now."""
    begun = store.find(name)
    if begun is None or begun.complete or not begun.header.segments:
        return
    with suppress(DataError):
        if _earlier_rows(arranged(job, begun), begun).inputs == begun.header.provenance["inputs"]:
            return
    store.require_lock(name)
    begun.roll_back()


def _extend(job: Job, store: FeatureStore, name: str, begun: Extraction) -> Extraction:
    different = differences(begun.header.provenance["inputs"], _earlier_rows(job, begun).inputs)
    if different:
        raise StoreError(f"{begun.where} was made from something else ({'; '.join(different)}): it cannot be extended")
    require_same_environment(begun, job)
    old = begun.header
    header = replace(job.header(), rows_per_block=old.rows_per_block, codec=old.codec, shards=old.shards)
    return store.extend(name, header, job.source.y, job.source.sample_ids)


def _roll_back(job: Job, store: FeatureStore, name: str) -> None:
    """Give up an unfinished extension if the images that it was to add have changed."""
    begun = store.find(name)
    if begun is None or begun.complete or not begun.header.segments:
        return
    with suppress(DataError):
        if _earlier_rows(arranged(job, begun), begun).inputs == begun.header.provenance["inputs"]:
            return
    store.require_lock(name)
    begun.roll_back()


def _reopen_damaged(extraction: Extraction, name: str) -> None:
    """Have damaged row blocks computed again: a power failure can lose what was committed.

    An object store loses nothing, so a listing is enough there.
    """
    if extraction.folder.keeps_what_it_has:
        gone = extraction.lacking()
        if gone:
            _log.warning("%s: row blocks %s lack chunks and are computed again", extraction.where, gone)
            extraction.reopen(gone)
        return
    for block in np.flatnonzero(extraction.committed()).tolist():
        damages = damaged_chunks(extraction, name, block)
        if damages:
            path, problem = damages[0].path, damages[0].problem
            _log.warning("%s: row block %d is computed again: %s: %s", extraction.where, block, path, problem)
            extraction.reopen([block])


def _missing(extraction: Extraction, engine: Engine) -> Plan:
    """Row blocks for this process to compute, without rows that are stored already."""
    header, committed = extraction.header, extraction.committed()
    if committed.any():
        _log.info(
            "%s: %d of %d row blocks are stored, computing the rest", extraction.where, committed.sum(), len(committed)
        )
    missing = engine.share(np.flatnonzero(~committed))
    known = {block: extraction.known_rows(block) for block in missing.tolist()}
    return Plan(header.n_samples, header.rows_per_block, missing, known)


def _run(job: Job, extraction: Extraction, missing: Plan, engine: Engine, running: Running) -> None:
    total, n_missing = extraction.header.n_samples, missing.n_rows
    computed = 0

    def advance(images: int) -> None:
        nonlocal computed
        computed += images
        if engine.leads:
            running.progress(total - n_missing + computed, total, computed * job.row_bytes)

    advance(0)
    remarks = Remarks()
    try:
        engine.run(
            job,
            extraction,
            missing,
            on_error=running.on_error,
            stopped=running.stopped,
            progress=advance,
            remark=remarks.add,
        )
    except OSError as error:
        raise StoreError(
            f"{extraction.where} cannot be written: {error.strerror or one_line(error)}; finished row blocks are stored"
        ) from error
    finally:
        remarks.log()


def _warn_about_siblings(store: FeatureStore, name: str, header: ExtractionHeader) -> None:
    """Warn if ``pets/train`` and ``pets/test`` do not go together: other kinds of labels, or other weights."""
    parent = name.rpartition("/")[0]
    siblings = [other for other in store.names() if other != name and other.rpartition("/")[0] == parent]
    for sibling in siblings if parent else []:
        with suppress(StoreError):
            other = store.open(sibling).header
            if len({type(label) for label in (*header.classes, *other.classes)}) > 1:
                _log.warning("labels of %s and %s differ: integers in one, names in the other", name, sibling)
            mine, theirs = header.provenance["inputs"], other.provenance["inputs"]
            if mine["model"] == theirs["model"] and mine["weights_sha256"] != theirs["weights_sha256"]:
                _log.warning("%s and %s were made by %s with different weights", name, sibling, mine["model"])


def require_same_environment(extraction: Extraction, job: Job) -> None:
    """Raise `StoreError` unless versions, device and batch size are as before: others round differently."""
    begun = extraction.header.provenance["environment"]
    keys = ("device", "batch_size", "torchcompile")
    old, new = ({key: env["arguments"][key] for key in keys} | env["versions"] for env in (begun, job.environment))
    different = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in new if old.get(key) != new.get(key)]
    _require_same_behaviour(extraction, job)
    if different:
        raise StoreError(
            f"{extraction.where} was begun in another environment ({'; '.join(different)}): continue it there, or "
            f"remove it with: h2t rm {extraction.where.replace(': ', ' ')}"
        )


def _require_same_behaviour(extraction: Extraction, job: Job) -> None:
    """Raise `StoreError` if the network computes something else in spite of equal weights and code."""
    old, new = (env.get("behaviour", []) for env in (extraction.header.provenance["environment"], job.environment))
    if len(old) == len(new) and not np.allclose(old, new, rtol=_SAME_MAGNITUDE, equal_nan=True):
        raise StoreError(
            f"{extraction.where} was made by a network that computes something else, though weights and code are the "
            f"same: mean activations of two test images are {new}, were {old}; choose another name"
        )
