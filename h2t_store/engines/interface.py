"""What every engine does: prepare a job, and compute and commit row blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from h2t_store.engines.plan import RowBlock
from h2t_store.engines.preparation import Job
from h2t_store.engines.remarks import Remarks
from h2t_store.settings import Settings
from h2t_store.storage.store import Extraction

__all__ = ["Engine"]


class Engine(ABC):
    """Where row blocks are computed; a context manager. `h2t_store.engines.open_engine` makes one.

    Attributes
    ----------
    leads : bool
        Whether this process does what is done once, such as creating and finishing the extraction.
    """

    leads: bool = True

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
        on_error: Literal["raise", "skip"] = "raise",
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda images: None,
        remark: Callable[[Remarks], None] = lambda remarks: None,
    ) -> None:
        """Compute and commit row blocks.

        Parameters
        ----------
        job : Job
            What to compute; its images are in the order of the rows.
        extraction : Extraction
            Where blocks are written.
        plan : iterable of RowBlock
            Which blocks. The rows of a block before its start are stored already.
        on_error : {"raise", "skip"}
            What to do about images that cannot be read.
        stopped : callable
            Asked after every block whether to stop.
        progress : callable
            Called with the number of images done since the last call.
        remark : callable
            Called with the remarks on images decoded since the last call.

        Raises
        ------
        DataError
            At an image that cannot be read.
        ModelError
            Where the network gives values that are not finite.
        TapError
            Where an activation does not fit the storage dtype, or is not as expected.
        StoppedError
            After the blocks in hand when ``stopped`` became true; everything computed is committed.
        """
