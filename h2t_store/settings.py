"""Settings: the one description of an extraction; Running: how it is computed.

`h2t_store.extract`, the command, the provenance, the workers and `h2t_store.repair` all take it from here.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from h2t_store.arguments import argument, check_choices, integer
from h2t_store.errors import H2TError, did_you_mean

__all__ = ["Running", "Settings", "read_arguments"]

_MAX_IMG_SIZE = 8192


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an extraction computes and how it is stored.

    Attributes
    ----------
    data
        A folder with one folder of images per class, a .tar of such folders, a list file ('path label' per line),
        torch/NAME, hfds/NAME, wds/FOLDER, or 'digits' (scikit-learn's). In Python also a tuple (images, labels) or any
        map-style dataset, see `h2t_store.images`.
    split
        Part of the data: a folder inside a folder or .tar; for wds/, a split in its _info.json, or shards and their
        number of samples, 'x-{0000..0001}.tar|2000'.
    data_dir
        Folder of torch/NAME, or the folder that paths in a list file are relative to.
    download
        Allow downloading torch/NAME.
    model
        Any timm architecture, h2t_resnet20 (bundled), or path/to/file.py:factory. In Python also a torch.nn.Module,
        which is put in evaluation mode and moved to the device.
    pretrained
        Load published weights, downloading them if needed; otherwise random weights.
    checkpoint
        Load these weights instead: .safetensors, or a torch file of tensors.
    img_size
        Side of the square input.
    seed
        Seed of random weights (--no-pretrained).
    taps
        Activations to store: 'activations' (inputs of every convolution and linear layer, block outputs, logits),
        'blocks' (block outputs, penultimate, logits), 'paper' (as published, ResNets and ViTs), or globs over module
        names, joined by commas: 'layer3.*' for outputs, 'layer3.*:in' for inputs.
    cls_token
        Pool the class token with the others, take it alone, or keep it beside the pooled others.
    target_size
        Approximate length that each activation is pooled to. Several are stored side by side in one pass (on the
        command line, repeat the flag); X.select_target_size selects one.
    dtype
        Type of the stored features; a value that does not fit is an error.
    batch_size
        Images per forward pass; halved as long as CUDA runs out of memory.
    device
        cpu, cuda, cuda:1, mps; auto is CUDA if present, else the CPU.
    amp
        Run the network under bfloat16 autocast.
    torchcompile
        Compile the network together with its pooling.
    codec
        Compression of the features. An extended extraction keeps its codec, shards and rows per block.
    shards
        Store a row block of a layer as one object, which saves requests to object stores.
    rows_per_block
        Rows computed and committed together, and the height of chunks.
    """

    data: Any = argument(MISSING, metavar="DATA", kind=str)  # noqa: RUF009
    split: str | None = argument(None, "Data", "SPLIT", shown="train; a folder or .tar of several needs one named")
    data_dir: str | None = argument(None, "Data", "FOLDER", shown="the current folder; the folder of the list")
    download: bool = argument(False, "Data", names=("--dataset-download",))
    model: Any = argument(MISSING, "Network", "NAME", kind=str)  # noqa: RUF009
    pretrained: bool = argument(True, "Network")
    checkpoint: str | None = argument(None, "Network", "FILE")
    img_size: int | None = argument(None, "Network", "PIXELS", shown="chosen by the network")
    seed: int = argument(0, "Network", "N")
    taps: str | tuple[str, ...] = argument("activations", "Features", "TAPS", kind=str)
    cls_token: Literal["pool", "only", "keep"] = argument("pool", "Features")
    target_size: tuple[int, ...] = argument((512,), "Features", "N", kind=list[int])
    dtype: Literal["float16", "float32"] = argument("float16", "Features")
    batch_size: int | Literal["auto"] = argument("auto", "Speed", "N|auto", names=("--batch-size", "-b"), kind=str)
    device: str = argument("auto", "Speed", "DEVICE")
    amp: bool = argument(False, "Speed")
    torchcompile: bool = argument(False, "Speed", names=("--torchcompile",))
    codec: Literal["none", "zstd", "blosc", "pcodec"] = argument("none", "Storage")
    shards: bool = argument(False, "Storage", names=("--shards",))
    rows_per_block: int | None = argument(None, "Storage", "N", shown="512 for few images, 2048 for many")

    def __post_init__(self) -> None:
        check_choices(self)
        valid = {
            "seed": integer("seed", self.seed, 0),
            "img_size": integer("img_size", self.img_size, 1, _MAX_IMG_SIZE, besides=None),
            "rows_per_block": integer("rows_per_block", self.rows_per_block, 1, besides=None),
            "batch_size": integer("batch_size", self.batch_size, 1, besides="auto"),
            "target_size": tuple(dict.fromkeys(integer("target_size", size, 1) for size in _listed(self.target_size))),
            "taps": _words("taps", self.taps),
            "device": str(self.device),
            "split": _string("split", self.split),
            "data_dir": _string("data_dir", self.data_dir, "a path"),
            "checkpoint": _string("checkpoint", self.checkpoint, "a path"),
        }
        for name, value in valid.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Settings":
        """Read what `to_json` wrote; settings that an older version did not record have their defaults."""
        return cls(**record)

    def to_json(self) -> dict[str, Any]:
        """As JSON, with data or model None if it is an object in memory, and without ``download``."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "download"}
        values["data"] = os.fspath(self.data) if isinstance(self.data, str | os.PathLike) else None
        values["model"] = self.model if isinstance(self.model, str) else None
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def absolute(self) -> "Settings":
        """The same with absolute paths, for a process in another folder; names stay as they are."""
        data, model = self.data, self.model
        data_dir, checkpoint = (path and _absolute(path) for path in (self.data_dir, self.checkpoint))
        if isinstance(data, os.PathLike):
            data = Path(_absolute(data))
        elif isinstance(data, str) and data.startswith("torch/"):
            data_dir = data_dir or os.getcwd()
        elif isinstance(data, str) and data != "digits" and not (data_dir and data.startswith("wds/")):
            prefix = next((prefix for prefix in ("hfds/", "wds/") if data.startswith(prefix)), "")
            data = prefix + _absolute(data.removeprefix(prefix))
        if isinstance(model, str) and ".py:" in model:
            file, _, factory = model.rpartition(":")
            model = f"{_absolute(file)}:{factory}"
        return replace(self, data=data, data_dir=data_dir, model=model, checkpoint=checkpoint)


@dataclass(frozen=True, kw_only=True)
class Running:
    """How an extraction is computed; its features do not depend on it.

    Attributes
    ----------
    workers
        Processes that decode images; 0 decodes in this process. With engine ray, workers that each hold the network.
    on_error
        If an image cannot be read: stop, or record the reason, mask its row and continue.
    append
        Add the images that are new in the data to the extraction; stored rows stay as they are.
    engine
        Compute in this process; on a Ray cluster (pip install 'head2toe[ray]') whose nodes find store and data at the
        same addresses; or in processes started by torchrun, one per device. One engine can finish what another began.
    ray_address
        Address of a running cluster, 'auto', or 'local' to start one.
    num_gpus_per_worker
        GPUs of each Ray worker, such as 0.5.
    stopped
        Called after every row block; return true to stop.
    progress
        Called with images done, images in total, and bytes of features computed by this call.
    """

    workers: int | None = argument(
        None, "Speed", "N", names=("--workers", "-j"), shown="up to 4; with ray one per share of GPUs, or per node"
    )
    on_error: Literal["raise", "skip"] = argument("raise", "Data")
    append: bool = argument(False, "Data", names=("--append",))
    engine: Literal["local", "ray", "torchrun"] = argument("local", "Cluster")
    ray_address: str | None = argument(None, "Cluster", "ADDRESS", shown="RAY_ADDRESS, else Ray's choice")
    num_gpus_per_worker: float | None = argument(None, "Cluster", "N", shown="1 if the cluster has GPUs")
    stopped: Callable[[], bool] = argument(lambda: False)  # noqa: RUF009
    progress: Callable[[int, int, int], None] = argument(lambda done, total, n_bytes: None)  # noqa: RUF009

    def __post_init__(self) -> None:
        check_choices(self)
        integer("workers", self.workers, 0, besides=None)
        _string("ray_address", self.ray_address)
        gpus: Any = self.num_gpus_per_worker
        if gpus is not None and not (isinstance(gpus, int | float) and 0 <= gpus < math.inf):
            raise H2TError(f"num_gpus_per_worker {gpus!r}: accepted are numbers from 0")


def read_arguments(arguments: Mapping[str, Any]) -> tuple[Settings, Running]:
    """Build both from keyword arguments; raises `TypeError` with a suggestion for an unknown one."""
    settings, running = ([each.name for each in fields(kind)] for kind in (Settings, Running))
    for name in arguments:
        if name not in settings + running:
            raise TypeError(f"{name!r} is not an argument of extract{did_you_mean(name, settings + running)}")
    computed, how = ({name: arguments[name] for name in known if name in arguments} for known in (settings, running))
    return Settings(**computed), Running(**how)


def _listed(given: Any) -> list[Any]:
    """The items of a sequence; what is none, or is empty, as the one item."""
    return (list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []) or [given]


def _words(name: str, given: Any) -> str | tuple[str, ...]:
    if not all(isinstance(word, str) for word in _listed(given)):
        raise H2TError(f"{name} {given!r}: accepted are a string and a sequence of strings")
    return given if isinstance(given, str) else tuple(given)


def _string(name: str, given: Any, accepted: str = "a string") -> str | None:
    if given is not None and not isinstance(given, str | os.PathLike):
        raise H2TError(f"{name} {given!r}: accepted is {accepted}")
    return None if given is None else os.fspath(given)


def _absolute(path: str | os.PathLike[str]) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else os.fspath(path)
