"""Extract: prepare the job, compute the row blocks that are missing, and return the matrix."""

import logging
import os
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from h2t_store.arguments import list_arguments
from h2t_store.engines import Engine, open_engine
from h2t_store.engines.loading import Remarks
from h2t_store.engines.plan import Plan
from h2t_store.engines.preparation import Job
from h2t_store.errors import DataError, StoreError, one_line
from h2t_store.images import Data, arrange
from h2t_store.matrix import FeatureMatrix, open_features
from h2t_store.settings import Running, Settings, read_arguments
from h2t_store.storage.layout import check_name
from h2t_store.storage.places import in_one_process
from h2t_store.storage.store import Extraction, FeatureStore, differences
from h2t_store.storage.verify import damaged_chunks

__all__ = ["arranged", "extract", "fill", "require_same"]

_log = logging.getLogger("h2t_store")
_SAME_MAGNITUDE = 0.05


def extract(
    data: Data,
    *,
    model: str | nn.Module,
    store: str | os.PathLike[str],
    name: str,
    **arguments: Any,
) -> FeatureMatrix:
    """Run a frozen network once over a dataset and store the pooled activations of its layers.

    A finished extraction is opened; an interrupted one continues at the first missing row block.

    Parameters
    ----------
    store
        Folder or URL, created if missing (see `h2t_store.storage.places.open_place`).
    name
        Name of the extraction, such as ``pets/train``.
    **arguments
        The fields of `h2t_store.settings.Settings` and `h2t_store.settings.Running`.

    Raises
    ------
    DataError, ModelError, TapError, StoreError, UnreachableError
        One line that names the argument, what was given and what is accepted. Committed row blocks stay.
    StoppedError
        If ``stopped`` returned true; the same call continues.
    """
    settings, running = read_arguments({"data": data, "model": model} | arguments)
    check_name(name)
    if in_one_process(store) and running.engine != "local":
        raise StoreError(f"store {store!r} is in the memory of one process: engine {running.engine!r} needs another")
    with open_engine(running) as engine:
        job = engine.prepare(_with_batch_size(settings, store, name))
        opened = FeatureStore(store, create=True)
        if running.append or not _is_complete(job, opened, name):
            with opened.lock(name) if engine.leads else nullcontext() as lost:
                asked = running.stopped
                stopped = asked if lost is None else lambda: asked() or lost()
                fill(job, opened, name, engine, replace(running, stopped=stopped))
    return open_features(store, name)


list_arguments(extract, Settings, Running)


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
    """Compute what is missing of a job, under the lock of its name."""
    if running.append:
        if engine.leads:
            _roll_back(job, store, name)
        engine.meet()
        begun = store.find(name)
        engine.meet()  # all have looked before one of them extends it
        if begun is not None and not begun.complete:
            fill(_earlier_rows(arranged(job, begun), begun), store, name, engine, replace(running, append=False))
    if not engine.leads:
        engine.meet()
    job, extraction = _begin(job, store, name, running.append)
    if engine.leads:
        _reopen_damaged(extraction, name)
        engine.meet()
    if not extraction.complete:
        _require_same_environment(extraction, job)
        missing = _missing(extraction)
        engine.meet()  # all have the same list before the first block is committed
        _run(job, extraction, missing, engine, running)
    engine.meet()
    if engine.leads and not extraction.complete:
        store.require_lock(name)
        extraction.finish()
        _warn_about_siblings(store, extraction, name)
    engine.meet()


def _begin(job: Job, store: FeatureStore, name: str, append: bool) -> tuple[Job, Extraction]:
    """The job in the order of the rows, and the extraction to fill: new, begun before, or extended."""
    begun, new = store.find(name), 0
    if begun is not None:
        with nullcontext() if append else suppress(DataError):
            job = arranged(job, begun)
        new = len(job.source) - begun.header.n_samples
        if append and new > 0:
            return job, _extend(job, store, name, begun)
    elif append:
        raise StoreError(f"{store.address}: no extraction {name!r} to append to: run without --append first")
    try:
        return job, store.begin(name, job.header(), job.source.y, job.source.sample_ids)
    except StoreError as error:
        if begun is not None and new > 0 and _earlier_rows(job, begun).inputs == begun.header.provenance["inputs"]:
            raise StoreError(f"{begun.where}: the data has {new} more images now: add them with --append") from error
        raise


def _extend(job: Job, store: FeatureStore, name: str, begun: Extraction) -> Extraction:
    require_same(begun, _earlier_rows(job, begun), "it cannot be extended")
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
    """Have row blocks computed again that a power failure damaged."""
    if extraction.complete or extraction.folder.keeps_what_it_has:
        return
    damaged = []
    for block in np.flatnonzero(extraction.committed()).tolist():
        if damages := damaged_chunks(extraction, name, block):
            damaged.append(block)
            problem = f"{damages[0].path}: {damages[0].problem}"
            _log.warning("%s: row block %d is computed again: %s", extraction.where, block, problem)
    if damaged:
        extraction.reopen(damaged)


def _missing(extraction: Extraction) -> Plan:
    """Row blocks to compute, without rows that are stored already."""
    header, committed = extraction.header, extraction.committed()
    if committed.any():
        of = committed.sum(), len(committed)
        _log.info("%s: %d of %d row blocks are stored, computing the rest", extraction.where, *of)
    missing = np.flatnonzero(~committed)
    known = {block: rows for block in missing.tolist() if (rows := extraction.known_rows(block))}
    return Plan(header.n_samples, header.rows_per_block, missing, known)


def _run(job: Job, extraction: Extraction, missing: Plan, engine: Engine, running: Running) -> None:
    """Compute the part of the missing row blocks that is this process's; its progress stands for that of all."""
    remarks, n_images, n_missing, computed = Remarks(), extraction.header.n_samples, missing.n_rows, 0
    own = engine.share(missing)
    n_own = own.n_rows

    def report(images: int, new: Remarks) -> None:
        nonlocal computed
        computed += images
        remarks.add(new)
        if engine.leads:
            done = round(computed / max(1, n_own) * n_missing)
            running.progress(n_images - n_missing + done, n_images, done * job.row_bytes)

    report(0, Remarks())
    try:
        engine.run(job, extraction, own, running, report)
    except OSError as error:
        reason = f"{error.strerror or one_line(error)}; finished row blocks are stored"
        raise StoreError(f"{extraction.where} cannot be written: {reason}") from error
    finally:
        remarks.log()


def require_same(extraction: Extraction, job: Job, otherwise: str) -> None:
    """Raise `StoreError` unless the extraction was made from the same data, in the same environment."""
    different = differences(extraction.header.provenance["inputs"], job.inputs)
    if different:
        raise StoreError(f"{extraction.where} was made from something else ({'; '.join(different)}): {otherwise}")
    _require_same_environment(extraction, job)


def _require_same_environment(extraction: Extraction, job: Job) -> None:
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


def _warn_about_siblings(store: FeatureStore, extraction: Extraction, name: str) -> None:
    """Warn if extractions such as ``pets/train`` and ``pets/test`` differ in the kind of labels or in weights."""
    parent, header = name.rpartition("/")[0], extraction.header
    for sibling in store.names() if parent else []:
        if sibling == name or sibling.rpartition("/")[0] != parent:
            continue
        with suppress(StoreError):
            other = store.open(sibling).header
            if len({type(label) for label in (*header.classes, *other.classes)}) > 1:
                _log.warning("the labels of %s and %s are integers in one and names in the other", name, sibling)
            mine, theirs = header.provenance["inputs"], other.provenance["inputs"]
            if mine["model"] == theirs["model"] and mine["weights_sha256"] != theirs["weights_sha256"]:
                _log.warning("%s and %s were made by %s with different weights", name, sibling, mine["model"])
