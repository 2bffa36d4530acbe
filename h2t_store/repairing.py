"""Repair: restore metadata from its copies, and compute damaged row blocks again."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from h2t_store.engines import open_engine
from h2t_store.errors import DamagedError, H2TError, StoreError
from h2t_store.extracting import arranged, fill, require_same
from h2t_store.images import Data
from h2t_store.settings import Running, Settings
from h2t_store.storage.store import Extraction, FeatureStore
from h2t_store.storage.verify import Damage, restore_documents, verify

__all__ = ["repair"]


def repair(
    store: str | os.PathLike[str],
    name: str,
    *,
    data: Data | None = None,
    model: str | nn.Module | None = None,
    workers: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int, int], None] = lambda done, total, n_bytes: None,
) -> list[Damage]:
    """Find what is damaged in an extraction and restore it; only damaged row blocks are computed again.

    Parameters
    ----------
    store, name
        As in `h2t_store.extract`.
    data, model : optional
        Where images and network are now; by default where they were. They must be the same.
    workers, stopped, progress
        As in `h2t_store.settings.Running`.

    Returns
    -------
    list of Damage
        What was damaged.

    Raises
    ------
    StoreError
        If it cannot be repaired, or if data or network have changed.
    """
    running, opened = Running(workers=workers, progress=progress), FeatureStore.unchecked(store)
    with opened.lock(name) as lost, open_engine(running) as engine:
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
        job = engine.prepare(_settings(extraction, data, model))
        with suppress(DamagedError):  # if the identifiers are damaged, the data must be in the same order as then
            job = arranged(job, extraction)
        require_same(extraction, job, "it is repaired from the same")
        # Where images were skipped before, skipping hides nothing: the data were found to be the same.
        on_error: Literal["raise", "skip"] = "skip" if extraction.may_have_failures() else "raise"
        opened.require_lock(name)
        if lost_labels:
            extraction.require_labels(job.source.y, job.source.sample_ids)
            extraction.write_labels(job.source.y, job.source.sample_ids)
        if blocks:
            extraction.reopen(blocks)
        running = replace(running, on_error=on_error, stopped=lambda: stopped() or lost())
        fill(job, opened, name, engine, running)
    return damages


def _settings(extraction: Extraction, data: Any, model: Any) -> Settings:
    """Settings of the extraction, with what is given in place of what was recorded."""
    record = dict(extraction.header.provenance["environment"].get("arguments", {}))
    for key, given, kind in (("data", data, "images"), ("model", model, "a module")):
        if given is not None:
            record[key] = given
        elif record.get(key, "") is None:
            raise StoreError(
                f"{extraction.where} was made from {kind} in memory: call h2t_store.repair(store, name, {key}=...)"
            )
    try:
        return Settings.from_json(record)
    except (TypeError, H2TError) as error:
        raise StoreError(f"{extraction.where} cannot be repaired: its settings are not on record") from error
