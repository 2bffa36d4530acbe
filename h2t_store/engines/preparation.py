"""Job: what an extraction computes, found out and tried on two images before anything is written."""

import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from h2t_store.engines.forward import Forward, choose_batch_size
from h2t_store.engines.plan import rows_per_block
from h2t_store.errors import ModelError, TapError, one_line
from h2t_store.images import Source, open_source
from h2t_store.images.pictures import DECODING
from h2t_store.network import Backbone, Tap, find_taps, load_backbone, pooled_layers, tapped
from h2t_store.settings import Settings
from h2t_store.storage.chunks import CRC_BYTES
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.switches import exact_arithmetic

__all__ = ["Job", "prepare"]

_log = logging.getLogger("h2t_store")


@dataclass(frozen=True)
class Job:
    """What is to be computed: the settings, the images in the order of the rows, and the network on its device.

    ``environment`` holds settings, versions and device, as JSON: what it takes to compute the same again.
    """

    settings: Settings
    source: Source
    backbone: Backbone
    forward: Forward
    batch_size: int
    environment: dict[str, Any]

    def header(self) -> ExtractionHeader:
        """Header of a new extraction; equal ``inputs`` in its provenance mean equal features."""
        return ExtractionHeader(
            n_samples=len(self.source),
            rows_per_block=self._rows_per_block,
            dtype=self.settings.dtype,
            classes=self.source.classes,
            layers=self.layers,
            provenance={"inputs": self.inputs, "environment": self.environment},
            codec=self.settings.codec,
            shards=self.settings.shards,
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """Everything that decides the values of the features, as JSON."""
        preprocessing = self.backbone.data_config.items()
        return {
            "data": self.source.description,
            "model": self.backbone.name,
            "weights_sha256": self.backbone.weights_sha256,
            "preprocessing": {key: list(v) if isinstance(v, tuple) else v for key, v in preprocessing} | DECODING,
            "taps": [layer.name for layer in self.layers],
            "target_size": list(self.settings.target_size),
            "cls_token": self.settings.cls_token,
            "dtype": self.settings.dtype,
            "amp": "bfloat16" if self.settings.amp else None,
            "code_sha256": self.backbone.code_sha256,
        }

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Layers as stored, side by side."""
        layers: list[Layer] = []
        for pooled in self.forward.layers:
            start = layers[-1].stop if layers else 0
            layers.append(Layer(pooled.name, start, start + pooled.width, pooled.shape, pooled.target_sizes))
        return tuple(layers)

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of one image."""
        return self.layers[-1].stop * self.forward.dtype.itemsize

    @property
    def _rows_per_block(self) -> int:
        return self.settings.rows_per_block or rows_per_block(len(self.source), self.row_bytes)

    def layer_bytes(self, layer: Layer) -> int:
        """Bytes of a layer on disk without compression; every chunk is stored whole."""
        n_blocks = -(-len(self.source) // self._rows_per_block)
        chunk = self._rows_per_block * layer.chunk_width * self.forward.dtype.itemsize + CRC_BYTES
        return n_blocks * layer.n_chunks * chunk


def prepare(settings: Settings) -> Job:
    """Open the images, load the network, find its taps and choose the batch size."""
    device = _device(settings.device)
    source = open_source(settings.data, settings.split, data_dir=settings.data_dir, download=settings.download)
    for note in source.notes:
        _log.warning("%s", note)
    backbone = load_backbone(
        settings.model,
        pretrained=settings.pretrained,
        checkpoint=settings.checkpoint,
        img_size=settings.img_size,
        seed=settings.seed,
        fallback_size=source.image_size,
    )
    memory_format = _memory_format(backbone.model, device)
    backbone.model.to(device).to(memory_format=memory_format)
    taps, left_out, behaviour = _find(backbone, settings, device)
    forward = Forward(
        model=backbone.model,
        layers=pooled_layers(taps, settings.target_size),
        transform=_transform(backbone),
        mean=tuple(backbone.data_config["mean"]),
        std=tuple(backbone.data_config["std"]),
        dtype=getattr(torch, settings.dtype),
        device=device,
        amp=settings.amp,
        compiled=settings.torchcompile,
        memory_format=memory_format,
    )
    height, width = backbone.data_config["input_size"][1:]
    batch_size = choose_batch_size(forward, (height, width)) if settings.batch_size == "auto" else settings.batch_size
    cuda = device.type == "cuda"
    device_name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    environment = {
        "arguments": replace(settings, batch_size=batch_size, device=device.type).absolute().to_json(),
        "taps_left_out": left_out,
        "behaviour": behaviour,
        "platform": {"python": platform.python_version(), "device": device_name},
        "versions": {package: version(package) for package in ("head2toe", "torch", "timm", "zarr", "pillow")},
    }
    return Job(settings, source, backbone, forward, batch_size, environment)


def _memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last for convolutional networks, which makes them faster.

    On CPUs only if most layers are convolutions: ConvNeXt, which permutes its maps for linear layers, loses a tenth.
    """
    kinds = [type(module) for module in model.modules()]
    convolutions, linear = (sum(issubclass(kind, layer) for kind in kinds) for layer in (nn.Conv2d, nn.Linear))
    few = linear if device.type == "cpu" else 0
    return torch.channels_last if convolutions > few else torch.contiguous_format


def _transform(backbone: Backbone) -> Callable[[Image.Image], Tensor]:
    """timm's preprocessing for evaluation, up to uint8 pixels."""
    config = backbone.data_config
    try:
        transform: Callable[[Image.Image], Tensor] = create_transform(**config, is_training=False, use_prefetcher=True)
        transform(Image.new("RGB", (8, 8)))
    except Exception as error:
        reason = f"its preprocessing {config} cannot be used: {one_line(error)}"
        raise ModelError(f"model {backbone.name!r}: {reason}") from error
    return transform


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
        torch.empty(0, device=chosen)
    except Exception as error:
        raise ModelError(f"device {device!r} cannot be used here: {one_line(error)}") from error
    return chosen


def _find(
    backbone: Backbone, settings: Settings, device: torch.device
) -> tuple[list[Tap], dict[str, str], list[float]]:
    """Resolve the taps on two random images: taps, reasons why others are left out, and `_behaviour`."""
    size = tuple(backbone.data_config["input_size"])
    try:
        example = torch.randn((2, *size), generator=torch.Generator().manual_seed(0)).to(device)
        found, left_out = find_taps(backbone.model, example, settings.taps, settings.cls_token)
        behaviour = _behaviour(backbone.model, found, example)
    except TapError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"model {backbone.name!r} cannot run on images of {size}: {reason}") from error
    for tap, reason in left_out.items():
        _log.info("tap %s is left out: %s", tap, reason)
    if not found:
        raise TapError(f"taps {settings.taps!r}: the network has no activation of single images there")
    return found, left_out, behaviour


def _behaviour(model: nn.Module, found: Sequence[Tap], images: Tensor) -> list[float]:
    """Mean magnitude of the activations in each quarter of the taps, to two digits.

    It tells apart networks whose weights and code are equal but whose attributes or unsaved buffers differ.
    """
    if not found:
        return []
    with torch.no_grad(), exact_arithmetic, tapped(model, pooled_layers(found, [1])) as pooled:
        magnitudes = [float(values.abs().mean()) for values in pooled(images)]
    quarters = np.array_split(np.array(magnitudes), min(4, len(magnitudes)))
    return [float(f"{quarter.mean():.1e}") for quarter in quarters]
