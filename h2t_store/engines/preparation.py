"""What an extraction computes: the images, the network and its taps, and how they are pooled and stored.

A `Job` is all of that, found out and tried on two images before anything is written.
"""

import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from h2t_store.engines.interface import Forward
from h2t_store.engines.local import choose_batch_size
from h2t_store.engines.plan import rows_per_block
from h2t_store.errors import H2TError, ModelError, TapError, one_line
from h2t_store.images import Source, open_source
from h2t_store.images.pictures import DECODING
from h2t_store.network import Backbone, ClassTokenPolicy, Tap, find_taps, load_backbone, pooled_layers, tapped
from h2t_store.storage.chunks import CRC_BYTES
from h2t_store.storage.layout import STORAGE_DTYPES, ExtractionHeader, Layer
from h2t_store.switches import exact_arithmetic

__all__ = ["Job", "check_integer", "prepare", "with_whole_paths"]

_log = logging.getLogger("h2t_store")
_MAX_IMG_SIZE = 8192


@dataclass(frozen=True)
class Job:
    """What is to be computed.

    Attributes
    ----------
    source : Source
        The images.
    backbone : Backbone
        The network, on its device.
    forward : Forward
        What turns images into features.
    batch_size : int
        Images per forward pass.
    environment : dict
        What else is needed to compute the same again, as JSON.
    """

    source: Source
    backbone: Backbone
    forward: Forward
    batch_size: int
    environment: dict[str, Any]

    def header(self, source: Source, segments: tuple[int, ...] = (), rows: int | None = None) -> ExtractionHeader:
        """What is to be stored of a source; extractions with equal ``inputs`` hold equal features.

        Parameters
        ----------
        source : Source
            The images, in the order of the rows.
        segments : tuple of int
            Rows at which an earlier extraction ended.
        rows : int, optional
            Rows per block; by default what suits the number of images.
        """
        forward, layers = self.forward, self.layers
        dtype = str(forward.dtype).removeprefix("torch.")
        inputs = {
            "data": source.description,
            "model": self.backbone.name,
            "weights_sha256": self.backbone.weights_sha256,
            "preprocessing": {key: _plain(value) for key, value in self.backbone.data_config.items()} | DECODING,
            "taps": [layer.name for layer in layers],
            "target_size": self.environment["arguments"]["target_size"],
            "cls_token": self.environment["arguments"]["cls_token"],
            "dtype": dtype,
            "amp": "bfloat16" if forward.amp else None,
            "code_sha256": self.backbone.code_sha256,
        }
        return ExtractionHeader(
            n_samples=len(source),
            rows_per_block=rows or self._block_rows(source),
            dtype=dtype,
            classes=source.classes,
            layers=layers,
            provenance={"inputs": inputs, "environment": self.environment},
            segments=segments,
        )

    def layer_bytes(self, layer: Layer) -> int:
        """Bytes that a layer takes on disk, chunk by whole chunk."""
        rows = self._block_rows(self.source)
        n_blocks = -(-len(self.source) // rows)
        chunk = rows * layer.chunk_width * self.forward.dtype.itemsize + CRC_BYTES
        return n_blocks * layer.n_chunks * chunk

    def expected_bytes(self) -> int:
        """Bytes that the features take on disk."""
        return sum(map(self.layer_bytes, self.layers))

    def _block_rows(self, source: Source) -> int:
        return rows_per_block(len(source), self.layers[-1].stop * self.forward.dtype.itemsize)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Layers as stored, side by side."""
        layers: list[Layer] = []
        for pooled in self.forward.layers:
            start = layers[-1].stop if layers else 0
            layers.append(Layer(pooled.name, start, start + pooled.width, pooled.shape, pooled.target_sizes))
        return tuple(layers)


def prepare(
    data: str | os.PathLike[str] | tuple[Any, Any],
    *,
    model: str | nn.Module,
    split: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    pretrained: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    taps: str | Sequence[str] = "activations",
    cls_token: ClassTokenPolicy = "pool",
    target_size: int | Sequence[int] = 512,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int | Literal["auto"] = "auto",
    device: str | torch.device = "auto",
    amp: bool = False,
    torchcompile: bool = False,
    seed: int = 0,
) -> Job:
    """Find out what an extraction would compute; `h2t_store.extract` describes the parameters.

    Raises
    ------
    DataError, ModelError, TapError, H2TError
        Each with one line that names the argument, what was given and what is accepted.
    """
    if dtype not in STORAGE_DTYPES:
        raise H2TError(f"dtype {dtype!r}: accepted are {' and '.join(STORAGE_DTYPES)}")
    target_sizes = list(target_size) if isinstance(target_size, Sequence | np.ndarray) else [target_size]
    for size in target_sizes:
        check_integer("target_size", size, 1)
    if batch_size != "auto":
        check_integer("batch_size", batch_size, 1)
    check_integer("seed", seed, 0)
    if img_size is not None:
        check_integer("img_size", img_size, 1, _MAX_IMG_SIZE)
    torch_device = _device(device)
    source = open_source(data, split, data_dir=data_dir, download=download)
    for note in source.notes:
        _log.warning("%s", note)
    backbone = load_backbone(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        img_size=img_size,
        seed=seed,
        fallback_size=source.image_size,
    )
    memory_format = _memory_format(backbone.model, torch_device)
    backbone.model.to(torch_device).to(memory_format=memory_format)
    found, left_out, behaviour = _find(backbone, taps, cls_token, torch_device)
    forward = Forward(
        model=backbone.model,
        layers=pooled_layers(found, target_sizes),
        transform=_transform(backbone),
        mean=tuple(backbone.data_config["mean"]),
        std=tuple(backbone.data_config["std"]),
        dtype=getattr(torch, dtype),
        device=torch_device,
        amp=amp,
        compiled=torchcompile,
        memory_format=memory_format,
    )
    height, width = backbone.data_config["input_size"][1:]
    images_at_once = choose_batch_size(forward, (height, width)) if batch_size == "auto" else int(batch_size)
    whole = with_whole_paths(data, model=model, data_dir=data_dir, checkpoint=checkpoint)
    arguments = {
        "data": os.fspath(whole["data"]) if isinstance(data, str | os.PathLike) else None,
        "model": whole["model"] if isinstance(model, str) else None,
        "split": split,
        "data_dir": whole["data_dir"],
        "pretrained": pretrained,
        "checkpoint": whole["checkpoint"],
        "img_size": img_size,
        "taps": taps if isinstance(taps, str) else list(taps),
        "cls_token": cls_token,
        "target_size": [int(size) for size in dict.fromkeys(target_sizes)],
        "dtype": dtype,
        "batch_size": images_at_once,
        "device": torch_device.type,
        "amp": amp,
        "torchcompile": torchcompile,
        "seed": int(seed),
    }
    environment = {
        "arguments": arguments,
        "taps_left_out": left_out,
        "behaviour": behaviour,
        "platform": {"python": platform.python_version(), "device": _device_name(torch_device)},
        "versions": {package: version(package) for package in ("head2toe", "torch", "timm", "zarr", "pillow")},
    }
    return Job(source, backbone, forward, images_at_once, environment)


def with_whole_paths(data: Any, *, model: Any, **settings: Any) -> dict[str, Any]:
    """The arguments of `prepare` with paths from the root, for a process that runs in another folder."""
    if isinstance(data, str):
        data = _address(data, settings.get("data_dir"))
    elif isinstance(data, os.PathLike):
        data = Path(_absolute(data))
    model = _model_address(model) if isinstance(model, str) else model
    paths = {key: _optional(settings[key]) for key in ("checkpoint", "data_dir") if key in settings}
    if isinstance(data, str) and data.startswith("torch/"):
        paths["data_dir"] = paths.get("data_dir") or os.getcwd()
    return {"data": data, "model": model} | settings | paths


def check_integer(argument: str, value: object, least: int, most: int = 2**63 - 1) -> None:
    """Raise `H2TError` unless ``value`` is a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise H2TError(f"{argument} {value!r}: accepted are whole numbers from {least} to {most}")


def _absolute(path: str | os.PathLike[str]) -> str:
    """A path that exists, from the root, so that the job can be done again from elsewhere; other names as they are."""
    return str(Path(path).absolute()) if Path(path).exists() else os.fspath(path)


def _optional(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else _absolute(path)


def _address(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """Where the data is, from wherever one looks; names, and what lies in ``data_dir``, stay as they are."""
    if name == "digits" or name.startswith("torch/") or (name.startswith("wds/") and data_dir is not None):
        return name
    for prefix in ("hfds/", "wds/"):
        if name.startswith(prefix):
            return prefix + _absolute(name.removeprefix(prefix))
    return _absolute(name)


def _model_address(model: str) -> str:
    """``file.py:factory`` with the file's whole path; other names as they are."""
    path, colon, factory = model.rpartition(":")
    return f"{_absolute(path)}{colon}{factory}" if path.endswith(".py") else model


def _memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last where there are convolutions of maps, which are faster that way on CPUs and on tensor cores.

    Not on CPUs where most layers are linear: ConvNeXt, which turns its maps around for them, loses a tenth.
    """
    kinds = [type(module) for module in model.modules()]
    convolutions, linear = (sum(issubclass(kind, layer) for kind in kinds) for layer in (nn.Conv2d, nn.Linear))
    few = linear if device.type == "cpu" else 0
    return torch.channels_last if convolutions > few else torch.contiguous_format


def _transform(backbone: Backbone) -> Callable[[Image.Image], Tensor]:
    """timm's preprocessing for evaluation up to eight-bit pixels, tried out once."""
    try:
        transform: Callable[[Image.Image], Tensor] = create_transform(
            **backbone.data_config, is_training=False, use_prefetcher=True
        )
        transform(Image.new("RGB", (8, 8)))
    except Exception as error:
        raise ModelError(
            f"model {backbone.name!r}: its preprocessing {backbone.data_config} cannot be used: {one_line(error)}"
        ) from error
    return transform


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
        torch.empty(0, device=chosen)
    except Exception as error:
        raise ModelError(f"device {str(device)!r} cannot be used here: {one_line(error)}") from error
    return chosen


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _find(
    backbone: Backbone, taps: str | Sequence[str], cls_token: ClassTokenPolicy, device: torch.device
) -> tuple[list[Tap], dict[str, str], list[float]]:
    """Resolve the taps on two random images of the network's input size, and note what it makes of them."""
    size = tuple(backbone.data_config["input_size"])
    try:
        example = torch.randn((2, *size), generator=torch.Generator().manual_seed(0)).to(device)
        found, left_out = find_taps(backbone.model, example, taps, cls_token)
        behaviour = _behaviour(backbone.model, found, example)
    except TapError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"model {backbone.name!r} cannot run on images of {size}: {reason}") from error
    for tap, reason in left_out.items():
        _log.info("tap %s is left out: %s", tap, reason)
    if not found:
        raise TapError(f"taps {taps!r}: the network has no activation of single images there")
    return found, left_out, behaviour


def _behaviour(model: nn.Module, found: Sequence[Tap], images: Tensor) -> list[float]:
    """Mean magnitude of the activations in each quarter of the taps, to two digits, which no rounding changes.

    It tells networks apart that have the same weights and code, but other attributes or buffers that are not saved.
    """
    if not found:
        return []
    with torch.no_grad(), exact_arithmetic, tapped(model, pooled_layers(found, [1])) as pooled:
        magnitudes = [float(values.abs().mean()) for values in pooled(images)]
    quarters = np.array_split(np.array(magnitudes), min(4, len(magnitudes)))
    return [float(f"{quarter.mean():.1e}") for quarter in quarters]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
