"""Make a damaged extraction whole: metadata from what is left of it, row blocks by computing them again."""

import os
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from typing import Any, Literal

from torch import nn

from h2t_store.engines.preparation import Job, prepare
from h2t_store.errors import DamagedError, StoreError
from h2t_store.extracting import extract_job, require_same_environment
from h2t_store.images import Source, arrange
from h2t_store.storage.store import Extraction, FeatureStore, differences
from h2t_store.storage.verify import Damage, restore_documents, verify

__all__ = ["repair"]


def repair(
    store: str | os.PathLike[str],
    name: str,
    *,
    data: str | os.PathLike[str] | tuple[Any, Any] | None = None,
    model: str | nn.Module | None = None,
    workers: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Damage]:
    """Find what is damaged in an extraction and restore it; only damaged row blocks are computed again.

    Parameters
    ----------
    store : path-like or str
        The store, a folder or a URL.
    name : str
        The extraction in it.
    data : path-like, str or (images, labels), optional
        Where its images are now; by default where they were. They must be the same.
    model : str or nn.Module, optional
        Its network; by default the one named then. It must be the same.
    workers, stopped, progress
        As in `h2t_store.extract`.

    Returns
    -------
    list of Damage
        What was damaged.

    Raises
    ------
    StoreError
        Where it cannot be repaired, or where data or network are no longer what they were.
    """
    opened = FeatureStore.unchecked(store)
    with opened.lock(name) as lost:
        damages = list(verify(opened, name))
        opened.require_lock(name)
        restore_documents(opened, name, damages)
        extraction = opened.open(name)
        blocks = {damage.block for damage in damages if damage.kind == "block"}
        lost_labels = any(damage.kind == "labels" for damage in damages)
        if not blocks and not extraction.complete and extraction.committed().all():
            extraction.finish()
        if not blocks and not lost_labels and extraction.complete:
            return damages
        job = _job(extraction, data, model)
        source = _as_it_was(extraction, job)
        on_error: Literal["raise", "skip"] = "skip" if _skips(extraction, damages) else "raise"
        opened.require_lock(name)
        if lost_labels:
            extraction.require_labels(source.y, source.sample_ids)
            extraction.write_labels(source.y, source.sample_ids)
        if blocks:
            extraction.reopen(blocks)
        extract_job(
            job,
            opened,
            name,
            workers=workers,
            on_error=on_error,
            stopped=lambda: stopped() or lost(),
            progress=progress,
        )
    return damages


def _skips(extraction: Extraction, damages: list[Damage]) -> bool:
    """Whether samples were skipped, or may have been: their reasons can be what is lost.

    Skipping then hides nothing, as the data were found to be the same.
    """
    if extraction.complete:
        return extraction.n_failed > 0
    return any(damage.kind == "header" for damage in damages) or extraction.may_have_failures()


def _job(extraction: Extraction, data: Any, model: Any) -> Job:
    arguments = extraction.header.provenance["environment"].get("arguments")
    known = {"data"} | set(signature(prepare).parameters) - {"download"}
    if not isinstance(arguments, dict) or {*arguments} - known or not {"data", "model"} <= {*arguments}:
        raise StoreError(f"{extraction.where} cannot be repaired: it does not say how it was made")
    given = {"data": data, "model": model}
    for key, value in given.items():
        if value is not None:
            arguments = arguments | {key: value}
        elif arguments[key] is None:
            kind = "arrays" if key == "data" else "a module"
            raise StoreError(
                f"{extraction.where} was made from {kind} in memory: call h2t_store.repair(store, name, {key}=...)"
            )
    return prepare(**arguments)


def _as_it_was(extraction: Extraction, job: Job) -> Source:
    """The data in the order of the rows, found to be what it was before anything is given up.

    Where the identifiers are lost, it must still be in the order that it had then.
    """
    source = job.source
    with suppress(DamagedError):
        source = arrange(source, extraction.sample_ids().tolist(), extraction.header.classes)
    different = differences(extraction.header.provenance["inputs"], job.header(source).provenance["inputs"])
    if different:
        raise StoreError(
            f"{extraction.where} was made from something else ({'; '.join(different)}): it is repaired from the same"
        )
    require_same_environment(extraction, job)
    return source
