"""The job: find out what is asked, plan its row blocks, compute those that are missing, and hand back the matrix."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from numbers import Integral
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from h2t_store.backbones import Backbone, Tap, find_taps, load_backbone
from h2t_store.datasets import ArraySource, Source, open_source
from h2t_store.engines import local
from h2t_store.engines.blocks import plan, rows_per_block
from h2t_store.errors import H2TError, ModelError, StoreError, TapError, one_line
from h2t_store.layout import STORAGE_DTYPES, ExtractionHeader, Layer, check_name
from h2t_store.matrix import FeatureMatrix, open_features
from h2t_store.store import Extraction, FeatureStore

__all__ = ["extract"]

_log = logging.getLogger("h2t_store")
_MAX_DEFAULT_WORKERS = 4
_MAX_IMG_SIZE = 8192


def extract(
    data: str | os.PathLike[str] | tuple[Any, Any],
    *,
    model: str | nn.Module,
    store: str | os.PathLike[str],
    name: str,
    split: str | None = None,
    pretrained: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    taps: str | Sequence[str] = "activations",
    target_size: int = 512,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "auto",
    amp: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureMatrix:
    """Run a frozen network once over a dataset and store the pooled activations of its layers.

    What is stored already is not computed again: a finished extraction is opened, an interrupted one is continued at
    the first missing row block.

    Parameters
    ----------
    data : path-like, ``"digits"`` or (images, labels)
        A folder with one folder of images per class; scikit-learn's digits; or uint8 images ``(n, h, w, 3)`` with
        labels.
    model : str or nn.Module
        A timm architecture, ``path/to/file.py:factory``, or a module (it is put in evaluation mode and moved to
        ``device``).
    store : path-like
        Folder of the store; made where there is none.
    name : str
        What to call the extraction, such as ``pets/train``.
    split : {"train", "test"}, optional
        Part of ``digits``; ``train`` by default.
    pretrained : bool
        Load timm's published weights.
    checkpoint : path-like, optional
        Weights to load instead, ``.safetensors`` or a torch file of plain tensors.
    img_size : int, optional
        Side of the square input; by default the network's own.
    taps : str or sequence of str
        ``activations``, ``blocks``, or globs over module names (see `h2t_store.backbones.find_taps`).
    target_size : int
        Length that each activation is pooled to, about (paper, section 3).
    dtype : {"float16", "float32"}
        As stored. Values that do not fit stop the job.
    batch_size : int
        Images per forward pass.
    workers : int, optional
        Processes that decode images; 0 decodes in this one. By default up to 4, and 0 for images in memory.
    device : str or torch.device
        ``auto`` takes CUDA where it is present, else the CPU.
    amp : bool
        Run the network under bfloat16 autocast.
    seed : int
        For weights that are not loaded.
    progress : callable, optional
        Called with (images done, images in all).

    Returns
    -------
    FeatureMatrix
        The finished extraction.

    Raises
    ------
    DataError, ModelError, TapError, StoreError
        Each with one line that names the argument, what was given and what is accepted. What was committed before
        stays.
    """
    check_name(name)
    if dtype not in STORAGE_DTYPES:
        raise H2TError(f"dtype {dtype!r}: accepted are {' and '.join(STORAGE_DTYPES)}")
    _check_integer("target_size", target_size, 1)
    _check_integer("batch_size", batch_size, 1)
    _check_integer("seed", seed, 0)
    if workers is not None:
        _check_integer("workers", workers, 0)
    if img_size is not None:
        _check_integer("img_size", img_size, 1, _MAX_IMG_SIZE)
    torch_device = _device(device)
    source = open_source(data, split)
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
    backbone.model.to(torch_device)
    found, left_out = _find(backbone, taps, torch_device)
    environment = {
        "data": "arrays" if isinstance(data, tuple) else os.fspath(data),
        "pretrained": pretrained and checkpoint is None,
        "checkpoint": None if checkpoint is None else os.fspath(checkpoint),
        "taps_asked": taps if isinstance(taps, str) else list(taps),
        "taps_left_out": left_out,
        "seed": seed,
        "batch_size": batch_size,
        "device": torch_device.type,
        "versions": {package: version(package) for package in ("head2toe", "torch", "timm", "zarr")},
    }
    forward = local.Forward(
        model=backbone.model,
        taps=found,
        transform=_transform(backbone),
        target_size=target_size,
        dtype=getattr(torch, dtype),
        device=torch_device,
        amp=amp,
    )
    header = _header(source, backbone, forward, environment)
    opened = FeatureStore(store, create=True)
    extraction = opened.begin(name, header, source.y, source.sample_ids)
    _warn_about_siblings(opened, name, header)
    if extraction.complete:
        _log.info("%s is complete: nothing to compute", extraction.where)
    else:
        _require_same_environment(extraction, environment)
        workers = _workers(source) if workers is None else workers
        _compute_missing(extraction, forward, source, batch_size, workers, progress)
    return open_features(store, name)


def _warn_about_siblings(store: FeatureStore, name: str, header: ExtractionHeader) -> None:
    """Say where ``pets/train`` and ``pets/test`` do not go together: label numbers or weights that differ."""
    parent = name.rpartition("/")[0]
    for sibling in store.names() if parent else []:
        if sibling == name or sibling.rpartition("/")[0] != parent:
            continue
        with contextlib.suppress(StoreError):
            other = store.open(sibling).header
            if header.classes and other.classes and header.classes != other.classes:
                _log.warning(
                    "%s and %s have different classes: their labels y count in lists of their own, compare names "
                    "(np.array(X.classes)[X.y])",
                    name,
                    sibling,
                )
            mine, theirs = header.provenance["inputs"], other.provenance["inputs"]
            if mine["model"] == theirs["model"] and mine["weights_sha256"] != theirs["weights_sha256"]:
                _log.warning("%s and %s were made by %s with different weights", name, sibling, mine["model"])


def _require_same_environment(extraction: Extraction, environment: dict[str, Any]) -> None:
    """An extraction is finished as it was begun: other versions, devices and batches round differently."""
    begun = extraction.header.provenance["environment"]
    keys = ("device", "batch_size")
    old, new = ({key: env[key] for key in keys} | env["versions"] for env in (begun, environment))
    different = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in new if old.get(key) != new.get(key)]
    if different:
        raise StoreError(
            f"{extraction.where} is unfinished and was begun elsewhere ({'; '.join(different)}): finish it there, or "
            f"remove it with: h2t rm {extraction.where.replace(': ', ' ')}"
        )


def _compute_missing(
    extraction: Extraction,
    forward: local.Forward,
    source: Source,
    batch_size: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    header, committed = extraction.header, extraction.committed()
    todo = [block for block in plan(header.n_samples, header.rows_per_block) if not committed[block.number]]
    if committed.any():
        _log.info(
            "%s: %d of %d row blocks are there, computing the rest", extraction.where, committed.sum(), len(committed)
        )
    done = header.n_samples - sum(block.stop - block.start for block in todo)

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, header.n_samples)

    advance(0)
    local.run(forward, source, extraction, todo, batch_size=batch_size, workers=workers, progress=advance)
    extraction.finish()


def _header(
    source: Source, backbone: Backbone, forward: local.Forward, environment: dict[str, Any]
) -> ExtractionHeader:
    """What is to be stored; extractions with equal ``inputs`` hold equal features."""
    layers = _layers(forward.taps, forward.target_size)
    inputs = {
        "data": source.description,
        "model": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "code_sha256": backbone.code_sha256,
        "preprocessing": {key: _plain(value) for key, value in backbone.data_config.items()},
        "taps": [tap.name for tap in forward.taps],
        "target_size": forward.target_size,
        "dtype": _name(forward.dtype),
        "amp": "bfloat16" if forward.amp else None,
    }
    return ExtractionHeader(
        n_samples=len(source.y),
        rows_per_block=rows_per_block(len(source.y), layers[-1].stop * forward.dtype.itemsize),
        dtype=_name(forward.dtype),
        classes=source.classes,
        layers=layers,
        provenance={"inputs": inputs, "environment": environment},
    )


def _check_integer(argument: str, value: object, least: int, most: int = 2**63 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise H2TError(f"{argument} {value!r}: accepted are whole numbers from {least} to {most}")


def _transform(backbone: Backbone) -> Callable[[Image.Image], Tensor]:
    """timm's preprocessing for evaluation, tried out once."""
    try:
        transform: Callable[[Image.Image], Tensor] = create_transform(**backbone.data_config, is_training=False)
        transform(Image.new("RGB", (8, 8)))
    except Exception as error:
        raise ModelError(
            f"model {backbone.name!r}: its preprocessing {backbone.data_config} cannot be used: {error}"
        ) from error
    return transform


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except Exception as error:
        raise ModelError(f"device {str(device)!r} cannot be used here: {one_line(error)}") from error
    return chosen


def _find(backbone: Backbone, taps: str | Sequence[str], device: torch.device) -> tuple[list[Tap], dict[str, str]]:
    """Resolve the taps on two random images of the network's input size."""
    size = tuple(backbone.data_config["input_size"])
    try:
        example = torch.randn((2, *size), generator=torch.Generator().manual_seed(0))
        found, left_out = find_taps(backbone.model, example.to(device), taps)
    except TapError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"model {backbone.name!r} cannot run on images of {size}: {reason}") from error
    for tap, reason in left_out.items():
        _log.info("tap %s is left out: %s", tap, reason)
    if not found:
        raise TapError(f"taps {taps!r}: the network has no activation of single images there")
    return found, left_out


def _layers(taps: Sequence[Tap], target_size: int) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    for tap in taps:
        start = layers[-1].stop if layers else 0
        layers.append(Layer(tap.name, start, start + tap.width(target_size), tap.shape))
    return tuple(layers)


def _workers(source: Source) -> int:
    return 0 if isinstance(source, ArraySource) else min(_MAX_DEFAULT_WORKERS, os.cpu_count() or 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
