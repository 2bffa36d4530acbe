"""Which network: a timm name, a factory in a file, or a module, ready to run, with the preprocessing it expects.

Whatever the way in, the weights are known by a digest over their values, because that, not a name, decides whether two
extractions can be compared.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, load_state_dict
from torch import nn

import h2t_store.network.resnet_cifar  # noqa: F401  registers h2t_resnet20
from h2t_store.connection import why_unreachable
from h2t_store.errors import ModelError, did_you_mean, one_line

__all__ = ["Backbone", "code_digest", "load_backbone"]

_log = logging.getLogger("h2t_store")

_building = RLock()
_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Backbone:
    """A frozen network.

    Attributes
    ----------
    name : str
        timm's name, ``file.py:factory``, or the class of a module.
    model : nn.Module
        In evaluation mode, on the CPU or wherever the caller had put it.
    data_config : dict
        timm's words for the preprocessing: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
        ``crop_mode``.
    weights_sha256 : str
        Digest over names and values of all parameters and buffers.
    code_sha256 : str
        Digest over the modules the network consists of, as they print, and the file it was built by.
    """

    name: str
    model: nn.Module
    data_config: dict[str, Any]
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
    """Build a network and find out how its images are prepared.

    Parameters
    ----------
    model : str or nn.Module
        A timm architecture, with a tag or an ``hf-hub:`` prefix if wished; ``path/to/file.py:factory``, whose factory
        is called without arguments (naming the file is consent to run it); or a module.
    pretrained : bool
        Load timm's published weights; only for timm names, and not where ``checkpoint`` is given.
    checkpoint : path-like, optional
        Weights to load, ``.safetensors`` or a torch file of plain tensors; every key must fit.
    img_size : int, optional
        Side of the square input; by default the one in the network's data config.
    seed : int
        For the initialisation of weights that are not loaded, so that two extractions share one network.
    fallback_size : (int, int), optional
        Height and width to assume where neither the network nor ``img_size`` says.

    Raises
    ------
    ModelError
        Where the network cannot be built; the message says why.
    """
    if not isinstance(model, str | nn.Module):
        raise ModelError(f"model: {type(model).__name__}; accepted are a name and a torch.nn.Module")
    code = b""
    if isinstance(model, nn.Module):
        name, network = type(model).__name__, model
    elif ".py:" in model:
        name, network, code = _from_file(model, seed)
    else:
        name, network = model, _from_timm(model, pretrained and checkpoint is None, img_size, seed)
    if checkpoint is not None:
        _load_checkpoint(network, Path(checkpoint))
    elif not pretrained and not code and isinstance(model, str):
        _log.warning("model %r has random weights (seed %d): its features know nothing of images", name, seed)
    try:
        network.eval()
        config = _data_config(name, network, img_size, fallback_size)
        return Backbone(name, network, config, _weights_digest(network), code_digest(network, code))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model {name!r} cannot be used: {type(error).__name__}: {one_line(error)}") from error


def _from_timm(name: str, pretrained: bool, img_size: int | None, seed: int) -> nn.Module:
    if not name.startswith(_HUB_PREFIXES):
        if not timm.is_model(name):
            suggestion = did_you_mean(name.split(".")[0], timm.list_models())
            raise ModelError(
                f"model {name!r} is unknown to timm{suggestion}; a file is given as path/to/file.py:factory"
            )
    elif pretrained and not name.startswith("local-dir:"):
        _require_connection(name, huggingface_hub.constants.ENDPOINT)
    build: Callable[..., nn.Module] = timm.create_model
    with _random_numbers_from(seed):
        try:
            if pretrained and not name.startswith(_HUB_PREFIXES):
                _require_weights(name)
            if img_size is not None:
                try:
                    return build(name, pretrained=pretrained, img_size=img_size)
                except TypeError as error:
                    if "img_size" not in str(error):
                        raise
                    torch.default_generator.manual_seed(seed)
            return build(name, pretrained=pretrained)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"model {name!r} cannot be built: {one_line(error)}") from error


def _require_weights(name: str) -> None:
    """Fail at once where published weights neither lie here nor can be fetched; timm would retry for a minute."""
    found = get_pretrained_cfg(name)
    config = found.to_dict() if found is not None else {}
    if config.get("file") or config.get("state_dict"):
        return
    hub_id, url = config.get("hf_hub_id"), config.get("url")
    if not hub_id and not url:
        raise ModelError(f"model {name!r} has no published weights: pass --no-pretrained or --checkpoint FILE")
    if hub_id:
        files = (config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin")
        if any(isinstance(huggingface_hub.try_to_load_from_cache(hub_id, file), str) for file in files if file):
            return
    if url and (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name).exists():
        return
    _require_connection(name, huggingface_hub.constants.ENDPOINT if hub_id else str(url))


def _require_connection(name: str, address: str) -> None:
    reason = why_unreachable(address)
    if reason is not None:
        raise ModelError(
            f"model {name!r}: its weights are not on this machine and cannot be fetched "
            f"({one_line(reason)}): pass --checkpoint FILE; h2t_resnet20 comes along, --no-pretrained is random weights"
        ) from reason


def _from_file(spec: str, seed: int) -> tuple[str, nn.Module, bytes]:
    """Name, network and source; the file may import its neighbours, as a script may, and they count as its source."""
    path_text, _, factory_name = spec.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise ModelError(f"model {spec!r}: there is no file {path_text!r}")
    module_spec = importlib.util.spec_from_file_location(f"_h2t_model_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ModelError(f"model {spec!r}: {path_text!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    with _random_numbers_from(seed):
        before = set(sys.modules)
        sys.modules[module_spec.name] = module
        sys.path.insert(0, str(path.resolve().parent))
        try:
            module_spec.loader.exec_module(module)
            factory = getattr(module, factory_name, None)
            if not callable(factory):
                callables = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
                suggestion = did_you_mean(factory_name, callables)
                raise ModelError(f"model {spec!r}: {path.name} has no function {factory_name!r}{suggestion}")
            network = factory()
        except ModelError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"model {spec!r}: the file or its factory failed: {type(error).__name__}: {one_line(error)}"
            ) from error
        finally:
            sys.path.remove(str(path.resolve().parent))
        neighbours = _take_neighbours(path, before)
    if not isinstance(network, nn.Module):
        raise ModelError(f"model {spec!r}: the factory returned {type(network).__name__}, not a torch.nn.Module")
    return f"{path.name}:{factory_name}", network, path.read_bytes() + neighbours


@contextlib.contextmanager
def _random_numbers_from(seed: int) -> Iterator[None]:
    """A network is built by one thread at a time, as random numbers, modules and their search path are everyone's."""
    with _building, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _take_neighbours(path: Path, before: set[str]) -> bytes:
    """Source of the modules that were imported from the file's folder; another file's neighbours may share names."""
    source, folder = b"", path.resolve().parent
    for name in sorted(set(sys.modules) - before):
        file = Path(getattr(sys.modules[name], "__file__", None) or os.devnull).resolve()
        installed = "site-packages" in file.parts or name.partition(".")[0] == __name__.partition(".")[0]
        if file.is_relative_to(folder) and file != path.resolve() and not installed:
            source += file.read_bytes()
            del sys.modules[name]
    return source


def _load_checkpoint(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"checkpoint {str(path)!r}: {'a folder' if path.is_dir() else 'there is no such file'}")
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        unread = isinstance(error, pickle.UnpicklingError)
        reason = "what else it holds is not unpickled, as that could run code" if unread else one_line(error)
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
            "model %r does not say how its images are normalized: mean and std of ImageNet are taken (a factory can "
            "set pretrained_cfg = {'mean': ..., 'std': ...} on what it returns)",
            name,
        )
    if config["input_size"][0] != 3:
        raise ModelError(f"model {name!r} takes {config['input_size'][0]} channels; accepted are models of RGB images")
    return config


def code_digest(network: nn.Module, source: bytes = b"") -> str:
    """Digest over how the network prints and over the source of its classes, but for those of torch and timm."""
    sha = hashlib.sha256(repr(network).encode() + source)
    for kind in sorted({type(module) for module in network.modules()}, key=lambda kind: kind.__qualname__):
        if kind.__module__.partition(".")[0] not in ("torch", "timm", "torchvision"):
            with contextlib.suppress(OSError, TypeError):  # classes typed into a prompt have no source
                sha.update(inspect.getsource(kind).encode())
    return sha.hexdigest()


def _weights_digest(network: nn.Module) -> str:
    sha = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
