"""The network on its device: uint8 images in, pooled activations and their norms out, as they are stored."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from h2t_store.errors import ModelError, TapError
from h2t_store.network import Pooled, tapped
from h2t_store.switches import exact_arithmetic

__all__ = ["Features", "Forward", "Network", "choose_batch_size", "copy_to_host", "open_network"]

_log = logging.getLogger("h2t_store")
_CPU_BATCH = 16
_MAX_CUDA_BATCH = 256
_CUDA_MEMORY_SHARE = 0.7

Network = Callable[[Tensor], list[Tensor]]
"""From uint8 images (n, 3, height, width) to one tensor (n, width) for each layer."""


@dataclass(frozen=True)
class Forward:
    """What turns images into features."""

    model: nn.Module  # in evaluation mode, on the device
    layers: Sequence[Pooled]  # in the order of the columns
    transform: Callable[[Image.Image], Tensor]  # to uint8 (3, height, width)
    mean: Sequence[float]  # per channel, of values in [0, 1]
    std: Sequence[float]
    dtype: torch.dtype  # as stored
    device: torch.device
    amp: bool  # run the network under bfloat16 autocast
    compiled: bool  # compile the network with its pooling
    memory_format: torch.memory_format  # of weights and images


@contextmanager
def open_network(
    forward: Forward, at_once: int | None = None, note: Callable[[int], None] = lambda images: None
) -> Iterator[Network]:
    """Open the network, with ``at_once`` images at most; ``note`` is told when CUDA memory suffices for fewer only."""
    shape = (1, len(forward.mean), 1, 1)
    mean, std = (torch.tensor(values, device=forward.device).view(shape) for values in (forward.mean, forward.std))
    most = at_once or 1 << 30

    def network(images: Tensor) -> list[Tensor]:
        nonlocal most
        parts: list[list[Tensor]] = []
        start = 0
        while start < len(images):
            part = images[start : start + most]
            try:
                part = part.to(forward.device, non_blocking=True).to(memory_format=forward.memory_format)
                parts.append(pooled((part.float().div_(255) - mean).div_(std)))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                most = len(part) // 2
                _log.warning("out of memory with %d images at once: going on with %d", len(part), most)
                note(most)
                torch.cuda.empty_cache()
            else:
                start += len(part)
        return parts[0] if len(parts) == 1 else [torch.cat(layer) for layer in zip(*parts, strict=True)]

    card = torch.cuda.device(forward.device) if forward.device.type == "cuda" else nullcontext()
    autocast = torch.autocast(forward.device.type, torch.bfloat16, enabled=forward.amp)
    with card, exact_arithmetic, autocast, tapped(forward.model, forward.layers, compiled=forward.compiled) as pooled:
        yield network


@dataclass(frozen=True)
class Features:
    """Features of a batch in main memory; on CUDA not before `wait`."""

    stored: list[Tensor]  # (n, width) for each layer
    norms: Tensor  # (n, n_layers), Euclidean
    _layers: list[Tensor]  # as computed, to explain what is not finite
    _copied: torch.cuda.Event | None

    def wait(self, forward: Forward, sample_ids: Sequence[str]) -> None:
        """Wait for the copy; raise `ModelError` or `TapError` at a value that is not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        if torch.isfinite(self.norms).all():  # a value that is not finite makes a norm that is not
            return
        for layer, values, norms in zip(forward.layers, self._layers, self.norms.T, strict=True):
            bad = ~torch.isfinite(values).all(dim=1)
            if bad.any():
                sample = sample_ids[int(bad.nonzero()[0])]
                reason = f"the network gives values that are not finite for image {sample!r}"
                raise ModelError(f"tap {layer.name!r}: {reason}")
            large = ~torch.isfinite(norms).to(values.device)
            if large.any():
                value, sample = float(values[large].abs().amax(1)[0]), sample_ids[int(large.nonzero()[0])]
                limit = f"{str(forward.dtype).removeprefix('torch.')} ({torch.finfo(forward.dtype).max:g})"
                advice = ": extract with --dtype float32" if forward.dtype == torch.float16 else ""
                raise TapError(f"tap {layer.name!r}: {value:.4g} for image {sample!r} is beyond {limit}{advice}")


def copy_to_host(forward: Forward, layers: list[Tensor]) -> Features:
    """Begin to copy pooled activations, as stored, to main memory; the next batch is computed meanwhile."""
    stored = [layer.to(forward.dtype) for layer in layers]
    wide = torch.float32 if forward.dtype == torch.float16 else torch.float64  # so that squares fit
    norms = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=wide).float() for part in stored], dim=1)
    if forward.device.type != "cuda":
        return Features([part.cpu() for part in stored], norms.cpu(), layers, None)
    whole = torch.cat(stored, dim=1).to("cpu", non_blocking=True)
    norms = norms.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(forward.device).record_event()
    return Features(list(torch.split(whole, [part.shape[1] for part in stored], dim=1)), norms, layers, copied)


@torch.inference_mode()
def choose_batch_size(forward: Forward, image_size: tuple[int, int]) -> int:
    """How many images to run at once: the same on every machine of a kind.

    On the CPU 16. On CUDA the largest power of two up to 256 that seven tenths of the card's memory hold.
    """
    if forward.device.type != "cuda":
        return _CPU_BATCH
    peaks = []
    with open_network(forward) as network:
        for n in (2, 4):
            torch.cuda.reset_peak_memory_stats(forward.device)
            try:
                network(torch.zeros((n, 3, *image_size), dtype=torch.uint8))
            except torch.OutOfMemoryError:
                return 1
            peaks.append(torch.cuda.max_memory_allocated(forward.device))
    each = max(1, (peaks[1] - peaks[0]) // 2)
    room = int(_CUDA_MEMORY_SHARE * torch.cuda.mem_get_info(forward.device)[1]) - peaks[0]
    return int(2 ** math.floor(math.log2(min(max(room // each, 1), _MAX_CUDA_BATCH))))
