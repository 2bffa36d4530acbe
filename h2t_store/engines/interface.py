"""What the engines have in common: the network as they are given it, and how they are called."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from h2t_store.engines.plan import RowBlock
from h2t_store.engines.remarks import Remarks
from h2t_store.images import Source
from h2t_store.network import Pooled
from h2t_store.storage.store import Extraction

__all__ = ["Engine", "Forward"]


@dataclass(frozen=True)
class Forward:
    """What turns images into features.

    Attributes
    ----------
    model : nn.Module
        In evaluation mode, on ``device``.
    layers : sequence of Pooled
        What is pooled, in the order of the columns.
    transform : callable
        From a PIL image to uint8 ``(3, height, width)``.
    mean, std : sequence of float
        Per channel, of values in [0, 1].
    dtype : torch.dtype
        As stored.
    device : torch.device
        Where the network runs.
    amp : bool
        Run the network under bfloat16 autocast.
    compiled : bool
        Compile the network with its pooling (``torch.compile``).
    memory_format : torch.memory_format
        Of the network's weights and of the images.
    """

    model: nn.Module
    layers: Sequence[Pooled]
    transform: Callable[[Image.Image], Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    dtype: torch.dtype
    device: torch.device
    amp: bool
    compiled: bool
    memory_format: torch.memory_format


class Engine(Protocol):
    """Computes and commits row blocks: `h2t_store.engines.local.run`, or `run` of a `h2t_store.engines.ray.Cluster`."""

    def __call__(
        self,
        forward: Forward,
        source: Source,
        extraction: Extraction,
        blocks: Iterable[RowBlock],
        *,
        batch_size: int,
        workers: int | None,
        on_error: Literal["raise", "skip"],
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
        remark: Callable[[Remarks], None],
    ) -> None:
        """Compute and commit row blocks.

        Parameters
        ----------
        forward : Forward
            From images to features.
        source : Source
            The images.
        extraction : Extraction
            Where blocks are written.
        blocks : iterable of RowBlock
            Which ones. A block that starts late has its first rows stored already.
        batch_size : int
            Images per forward pass; halved for as long as CUDA runs out of memory.
        workers : int, optional
            Processes that decode, or that each hold the network; by default as many as suit.
        on_error : {"raise", "skip"}
            What to do about images that cannot be read.
        stopped : callable
            Asked after every block whether to stop.
        progress : callable
            Called with the number of images done since the last call; less than nothing where some are done again.
        remark : callable
            Called with what there is to say of images decoded since the last call.

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
