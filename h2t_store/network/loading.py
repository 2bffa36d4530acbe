"""Load a network from a timm name, a function in a file, or a module, with the preprocessing it expects.

Weights are identified by a digest of their values, which decides whether two extractions can be compared.
"""

import hashlib
import inspect
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, load_state_dict
from torch import nn

import h2t_store.network.resnet_cifar  # noqa: F401  registers h2t_resnet20
from h2t_store.connection import why_unreachable
from h2t_store.errors import ModelError, did_you_mean, one_line
from h2t_store.network.model_file import build_from_file

_log = logging.getLogger("h2t_store")

_building = RLock()
_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Backbone:
    """A frozen network, in evaluation mode, with digests of its weights and its code."""

    name: str  # timm's name, file.py:factory, or the class of a module
    model: nn.Module
    data_config: dict[str, Any]  # timm's: input_size, mean, std, interpolation, crop_pct, crop_mode
    weights_sha256: str
    code_sha256: str


def load_backbone(
    model: str | nn.Module,
    *,
    pretrained: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    seed: int = 0,
    fallback_size: tuple[int, int] | None = None,
) -> Backbone:
    """Build a network and find out how its images are prepared; `ModelError` says why this is not possible.

    The arguments are those of `h2t_store.settings.Settings`. ``fallback_size`` is the height and width of the input if
    neither the network nor ``img_size`` says.
    """
    if not isinstance(model, str | nn.Module):
        raise ModelError(f"model: {type(model).__name__}; accepted are a name and a torch.nn.Module")
    source = b""
    if isinstance(model, nn.Module):
        name, network = type(model).__name__, model
    elif ".py:" in model:
        with _seeded(seed):
            name, network, source = build_from_file(model)
    else:
        name, network = model, _from_timm(model, pretrained and checkpoint is None, img_size, seed)
        if not pretrained and checkpoint is None:
            _log.warning("model %r has random weights (seed %d): its features know nothing of images", name, seed)
    if checkpoint is not None:
        _load_checkpoint(network, Path(checkpoint))
    try:
        network.eval()
        config = _data_config(name, network, img_size, fallback_size)
        return Backbone(name, network, config, _weights_digest(network), code_digest(network, source))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model {name!r} cannot be used: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, for one thread at a time: building uses process-wide random numbers, modules and search path."""
    with _building, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _from_timm(name: str, pretrained: bool, img_size: int | None, seed: int) -> nn.Module:
    if not name.startswith(_HUB_PREFIXES) and not timm.is_model(name):
        suggestion = did_you_mean(name.split(".")[0], timm.list_models())
        raise ModelError(f"model {name!r} is unknown to timm{suggestion}; a file is given as path/to/file.py:factory")
    try:
        if pretrained:
            _require_weights(name)
        try:
            return _create(name, pretrained, img_size, seed)
        except TypeError as error:
            if img_size is None or "img_size" not in str(error):
                raise
            return _create(name, pretrained, None, seed)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model {name!r} cannot be built: {one_line(error)}") from error


def _create(name: str, pretrained: bool, img_size: int | None, seed: int) -> nn.Module:
    with _seeded(seed):
        network: nn.Module = timm.create_model(name, pretrained=pretrained, img_size=img_size)  # None: the network's
        return network


def _require_weights(name: str) -> None:
    """Fail at once if published weights are neither here nor reachable; timm would retry for a minute."""
    if name.startswith("local-dir:"):
        return
    repository, url = name.partition(":")[2], ""
    files = ["model.safetensors", "pytorch_model.bin"]
    if not name.startswith(_HUB_PREFIXES):
        config = get_pretrained_cfg(name)
        if config is None or not (config.has_weights or config.state_dict):
            raise ModelError(f"model {name!r} has no published weights: pass --no-pretrained or --checkpoint FILE")
        if config.file or config.state_dict:
            return
        repository, url = config.hf_hub_id or "", config.url or ""
        files.append(config.hf_hub_filename or files[0])
    if url and (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name).exists():
        return
    repository, _, revision = repository.partition("@")
    cached = (try_to_load_from_cache(repository, file, revision=revision or None) for file in files if repository)
    if any(isinstance(path, str) for path in cached):
        return
    reason = why_unreachable(constants.ENDPOINT if repository else url)
    if reason is not None:
        raise ModelError(
            f"model {name!r}: its weights are not on this machine and cannot be fetched "
            f"({one_line(reason)}): pass --checkpoint FILE, --no-pretrained for random weights, or use h2t_resnet20"
        ) from reason


def _load_checkpoint(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        problem = "it is a folder" if path.is_dir() else "there is no such file"
        raise ModelError(f"checkpoint {str(path)!r}: {problem}; accepted are .safetensors and torch files")
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "other objects are not unpickled, because this could run code" if unsafe else one_line(error)
        raise ModelError(
            f"checkpoint {str(path)!r} is neither safetensors nor a torch file of plain tensors: {reason}"
        ) from error
    try:
        missing, unexpected = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        mismatch = str(error).splitlines()[-1].strip()
        raise ModelError(f"checkpoint {str(path)!r} does not fit the model: {mismatch}") from error
    for keys, problem in ((missing, "lacks"), (unexpected, "has besides")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(f"checkpoint {str(path)!r} {problem} {', '.join(keys[:3])}{more}: it is of another model")


def _data_config(
    name: str, network: nn.Module, img_size: int | None, fallback_size: tuple[int, int] | None
) -> dict[str, Any]:
    described = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    described = dict(described) if isinstance(described, dict) else described.to_dict()
    described = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in described.items()}
    if img_size is None and not described.get("input_size"):
        if fallback_size is None:
            raise ModelError(f"model {name!r} does not say its input size: pass --img-size PIXELS")
        described["input_size"] = (3, *fallback_size)
    described.setdefault("crop_pct", 1.0)
    config: dict[str, Any] = resolve_data_config({"img_size": img_size}, pretrained_cfg=described)
    if not described.get("mean"):
        _log.warning(
            "model %r does not say how its images are normalized: mean and std of ImageNet are used (a factory can set "
            "pretrained_cfg = {'mean': ..., 'std': ...} on what it returns)",
            name,
        )
    if config["input_size"][0] != 3:
        raise ModelError(f"model {name!r} takes {config['input_size'][0]} channels; accepted are models of RGB images")
    return config


def code_digest(network: nn.Module, source: bytes = b"") -> str:
    """Digest of how the network prints and of the source of its classes, except those of torch and timm."""
    sha = hashlib.sha256(repr(network).encode() + source)
    for kind in sorted({type(module) for module in network.modules()}, key=lambda kind: kind.__qualname__):
        if kind.__module__.partition(".")[0] not in ("torch", "timm", "torchvision"):
            with suppress(OSError, TypeError):  # classes typed into a prompt have no source
                sha.update(inspect.getsource(kind).encode())
    return sha.hexdigest()


def _weights_digest(network: nn.Module) -> str:
    sha = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
