"""Make a damaged extraction whole: metadata from what is left of it, row blocks by computing them again."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

from h2t_store.datasets import arrange
from h2t_store.errors import DamagedError, StoreError
from h2t_store.extraction import extract_job
from h2t_store.integrity import Damage, restore_documents, verify
from h2t_store.preparation import Job, prepare
from h2t_store.store import Extraction, FeatureStore

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
    store : path-like
        Folder of the store.
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
    with opened.lock(name):
        damages = list(verify(opened, name))
        restore_documents(opened, name, damages)
        extraction = opened.open(name)
        blocks = {damage.block for damage in damages if damage.kind == "block"}
        lost_labels = any(damage.kind == "labels" for damage in damages)
        failed = extraction.n_failed
        if blocks:
            extraction.reopen(blocks)
        if not blocks and not extraction.complete and extraction.committed().all():
            extraction.finish()
        if lost_labels or not extraction.complete:
            job = _job(extraction, data, model)
            if lost_labels:
                _restore_labels(extraction, job)
            extract_job(
                job,
                opened,
                name,
                workers=workers,
                on_error="skip" if failed else "raise",
                stopped=stopped,
                progress=progress,
            )
    return damages


def _job(extraction: Extraction, data: Any, model: Any) -> Job:
    arguments = dict(extraction.header.provenance["environment"]["arguments"])
    given = {"data": data, "model": model}
    for key, value in given.items():
        if value is not None:
            arguments[key] = value
        elif arguments[key] is None:
            kind = "arrays" if key == "data" else "a module"
            raise StoreError(
                f"{extraction.where} was made from {kind} in memory: call h2t_store.repair(store, name, {key}=...)"
            )
    return prepare(arguments.pop("data"), **arguments)


def _restore_labels(extraction: Extraction, job: Job) -> None:
    """Labels and identifiers come from the data; where identifiers are lost, too, its order must be as it was."""
    source = job.source
    with suppress(DamagedError):
        source = arrange(source, extraction.sample_ids().tolist(), extraction.header.classes)
    extraction.write_labels(source.y, source.sample_ids)
