"""Run row blocks on this machine: decode in workers, forward and pool on one device, write block by block."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from h2t_store.backbones.taps import Tap, exact_convolutions, tapped
from h2t_store.datasets import Source
from h2t_store.engines.blocks import RowBlock, batches
from h2t_store.errors import DataError, ModelError, TapError, one_line
from h2t_store.store import Extraction

__all__ = ["Forward", "run"]


@dataclass(frozen=True)
class Forward:
    """What turns a batch of images into features.

    Attributes
    ----------
    model : nn.Module
        In evaluation mode, on ``device``.
    taps : sequence of Tap
        What is pooled, in the order of the columns.
    transform : callable
        From a PIL image to a tensor ``(3, height, width)``.
    target_size : int
        Length that pooling aims at.
    dtype : torch.dtype
        As stored.
    device : torch.device
        Where the network runs.
    amp : bool
        Run the network under bfloat16 autocast.
    """

    model: nn.Module
    taps: Sequence[Tap]
    transform: Callable[[Image.Image], Tensor]
    target_size: int
    dtype: torch.dtype
    device: torch.device
    amp: bool


class _Images(Dataset[tuple[Tensor | None, str]]):
    """Transformed images by index, or the reason why there is none: a worker's exception would lose its one line."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source.y)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return self.transform(self.source.image(index)), ""
        except DataError as error:
            return None, str(error)


def _collate(items: list[tuple[Tensor | None, str]]) -> Tensor | str:
    """One batch, or the first reason why there is none."""
    images = [image for image, _ in items if image is not None]
    if len(images) < len(items):
        return next(reason for image, reason in items if image is None)
    return torch.stack(images)


def run(
    forward: Forward,
    source: Source,
    extraction: Extraction,
    blocks: Sequence[RowBlock],
    *,
    batch_size: int,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Compute and commit row blocks in order.

    Parameters
    ----------
    forward : Forward
        From images to features.
    source : Source
        The images.
    extraction : Extraction
        Where blocks are written.
    blocks : sequence of RowBlock
        Which ones.
    batch_size : int
        Images per forward pass.
    workers : int
        Processes that decode; 0 decodes in this one.
    progress : callable
        Called with the number of images done since the last call.

    Raises
    ------
    DataError
        At an image that cannot be read.
    ModelError
        Where the network gives values that are not finite.
    TapError
        Where an activation does not fit the storage dtype, or is not as expected.
    """
    loader: DataLoader[Any] = DataLoader(
        _Images(source, forward.transform),
        batch_sampler=list(batches(blocks, batch_size)),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=forward.device.type == "cuda",
    )
    with contextlib.closing(_features(forward, loader, source, blocks, batch_size)) as features:
        for block in blocks:
            values: list[NDArray[Any]] = []
            norms: list[NDArray[np.float32]] = []
            done = 0
            while done < block.stop - block.start:
                stored, norm = next(features)
                values.append(stored)
                norms.append(norm)
                done += len(stored)
                progress(len(stored))
            extraction.write_block(block.number, np.concatenate(values), np.concatenate(norms))


@torch.inference_mode()
def _features(
    forward: Forward, loader: "DataLoader[Any]", source: Source, blocks: Sequence[RowBlock], batch_size: int
) -> Generator[tuple[NDArray[Any], NDArray[np.float32]]]:
    """For each batch the features as stored (n, n_features) and the norms of their layers (n, n_layers)."""
    autocast = torch.autocast(forward.device.type, torch.bfloat16, enabled=forward.amp)
    with exact_convolutions(), tapped(forward.model, forward.taps, forward.target_size) as pooled:
        for rows, images in zip(batches(blocks, batch_size), loader, strict=True):
            if isinstance(images, str):
                raise DataError(images)
            try:
                with autocast:
                    layers = pooled(images.to(forward.device, non_blocking=True))
            except ModelError:
                raise
            except Exception as error:
                where = f"a batch of {tuple(images.shape)} from image {source.sample_ids[rows[0]]!r}"
                raise ModelError(f"the network failed on {where}: {one_line(error)}") from error
            stored = torch.cat(layers, dim=1).to(forward.dtype)
            if not torch.isfinite(stored).all():
                _explain_overflow(forward, layers, [source.sample_ids[row] for row in rows])
            parts = torch.split(stored, [layer.shape[1] for layer in layers], dim=1)
            norms = torch.stack([part.float().norm(dim=1) for part in parts], dim=1)
            yield stored.cpu().numpy(), norms.cpu().numpy()


def _explain_overflow(forward: Forward, layers: Sequence[Tensor], sample_ids: Sequence[str]) -> None:
    """Raise the error that says which tap and which image are at fault."""
    for tap, values in zip(forward.taps, layers, strict=True):
        bad = ~torch.isfinite(values).all(dim=1)
        if bad.any():
            sample = sample_ids[int(bad.nonzero()[0])]
            raise ModelError(f"tap {tap.name!r}: the network gives values that are not finite for image {sample!r}")
        too_large = ~torch.isfinite(values.to(forward.dtype)).all(dim=1)
        if too_large.any():
            sample = sample_ids[int(too_large.nonzero()[0])]
            raise TapError(
                f"tap {tap.name!r}: {float(values[too_large].abs().amax(1)[0]):.4g} for image {sample!r} is beyond "
                f"{str(forward.dtype).removeprefix('torch.')} ({torch.finfo(forward.dtype).max:g}): "
                "extract with --dtype float32"
            )
