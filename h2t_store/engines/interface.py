"""What every engine does: prepare a job, and compute and commit row blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from h2t_store.engines.loading import OnError
from h2t_store.engines.plan import RowBlock
from h2t_store.engines.preparation import Job
from h2t_store.engines.remarks import Remarks
from h2t_store.settings import Settings
from h2t_store.storage.extraction import Extraction

__all__ = ["Engine"]


class Engine(ABC):
    """Where row blocks are computed; a context manager. `h2t_store.engines.open_engine` makes one."""

    leads: bool = True
    """Whether this process does what is done once, such as creating and finishing the extraction."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        """Let go of what the engine holds."""
        return

    def share(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row blocks that are this process's."""
        return numbers

    def meet(self) -> None:
        """Wait for the other processes; raises `H2TError` where one of them ended."""
        return

    @abstractmethod
    def prepare(self, settings: Settings) -> Job:
        """Find out what an extraction would compute, see `h2t_store.engines.preparation.prepare`."""

    @abstractmethod
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
    ) -> None:
        """Compute the row blocks of a plan and commit them.

        The images of the job are in the order of the rows. ``stopped`` is asked after every block. ``progress`` is
        called with the number of images done, and ``remark`` with the remarks on images, since the last call.

        Raises
        ------
        DataError, ModelError, TapError
            Where an image cannot be read, or the network gives what cannot be stored.
        StoppedError
            After the blocks in hand when ``stopped`` became true; everything computed is committed.
        """
