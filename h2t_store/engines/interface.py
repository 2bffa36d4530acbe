"""What every engine does: prepare a job, and compute and commit row blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Self

from h2t_store.engines.loading import Remarks
from h2t_store.engines.plan import Plan, RowBlock
from h2t_store.engines.preparation import Job
from h2t_store.settings import Running, Settings
from h2t_store.storage.extraction import Extraction

__all__ = ["Engine", "Report"]

Report = Callable[[int, Remarks], None]
"""Called with the number of images computed, and with what was remarked on images, since the last call."""


class Engine(ABC):
    """Where row blocks are computed; a context manager. `h2t_store.engines.open_engine` makes one."""

    leads: bool = True
    """Whether this process does what is done once, such as creating and finishing the extraction."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of what the engine holds."""
        return

    def share(self, plan: Plan) -> Plan:
        """Return the part of a plan that this process computes."""
        return plan

    def meet(self) -> None:
        """Wait for the other processes; raises `H2TError` if one of them ended."""
        return

    @abstractmethod
    def prepare(self, settings: Settings) -> Job:
        """Find out what an extraction would compute, see `h2t_store.engines.preparation.prepare`."""

    @abstractmethod
    def run(self, job: Job, extraction: Extraction, plan: Iterable[RowBlock], running: Running, report: Report) -> None:
        """Compute and commit the row blocks of a plan; the images of the job are in the order of the rows.

        Of ``running`` it uses ``on_error`` and ``stopped``. It raises `DataError` if an image cannot be read,
        `ModelError` or `TapError` if features cannot be computed or stored, and `StoppedError` if ``stopped`` returned
        true; everything computed by then is committed.
        """
