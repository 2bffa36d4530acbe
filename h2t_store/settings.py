"""Settings: the one description of an extraction. The command, the provenance and the workers all take it from here."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from h2t_store.errors import H2TError, did_you_mean

__all__ = ["Flag", "Settings", "flags", "integer"]

_MAX_IMG_SIZE = 8192


class Flag(NamedTuple):
    """Help text of an argument, and how it is given on the command line."""

    help: str
    panel: str = ""
    metavar: str = ""
    names: tuple[str, ...] = ()
    shown: str = ""  # in place of the default
    kind: Any = None  # type on the command line, if other than in Python


def _setting(default: Any, help: str, panel: str = "", metavar: str = "", **others: Any) -> Any:
    return field(default=default, metadata={"flag": Flag(help, panel, metavar, **others)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an extraction computes and how it is stored."""

    data: Any = _setting(  # noqa: RUF009
        MISSING,
        "A folder with one folder of images per class, a .tar of such folders, a list file ('path label' per line), "
        "torch/NAME, hfds/NAME, wds/FOLDER, or 'digits' (scikit-learn's). In Python also a tuple (images, labels): "
        "uint8 images (n, height, width, 3), and labels or None.",
        metavar="DATA",
        kind=str,
    )
    split: str | None = _setting(
        None,
        "Part of the data. Of a folder or .tar, the folder of that name in it; of wds/, a split in its _info.json, or "
        "shards and their number of samples: 'x-{0000..0001}.tar|2000'.",
        "Data",
        "SPLIT",
        shown="train; a folder or .tar with several splits needs one named",
    )
    data_dir: str | None = _setting(
        None,
        "Folder of torch/NAME, or the folder that paths in a list file are relative to.",
        "Data",
        "FOLDER",
        shown="the current folder; the folder of the list",
    )
    download: bool = _setting(False, "Allow downloading torch/NAME.", "Data", names=("--dataset-download",))
    model: Any = _setting(  # noqa: RUF009
        MISSING,
        "Any timm architecture, h2t_resnet20 (bundled), or path/to/file.py:factory. In Python also a torch.nn.Module, "
        "which is put in evaluation mode and moved to the device.",
        "Network",
        "NAME",
        kind=str,
    )
    pretrained: bool = _setting(
        True, "Load published weights, downloading them if needed; otherwise random weights.", "Network"
    )
    checkpoint: str | None = _setting(
        None, "Load these weights instead: .safetensors, or a torch file of tensors.", "Network", "FILE"
    )
    img_size: int | None = _setting(
        None, "Side of the square input.", "Network", "PIXELS", shown="chosen by the network"
    )
    seed: int = _setting(0, "Seed of random weights (--no-pretrained).", "Network", "N")
    taps: str | tuple[str, ...] = _setting(
        "activations",
        "Activations to store: 'activations' (inputs of every convolution and linear layer, block outputs, logits), "
        "'blocks' (block outputs, penultimate, logits), 'paper' (as published, ResNets and ViTs), or globs over module "
        "names, joined by commas: 'layer3.*' for outputs, 'layer3.*:in' for inputs.",
        "Features",
        "TAPS",
        kind=str,
    )
    cls_token: Literal["pool", "only", "keep"] = _setting(
        "pool", "Pool the class token with the others, take it alone, or keep it beside the pooled others.", "Features"
    )
    target_size: tuple[int, ...] = _setting(
        (512,),
        "Approximate length that each activation is pooled to. Several are stored side by side in one pass (repeat the "
        "flag; X.select_target_size takes one).",
        "Features",
        "N",
        kind=list[int],
    )
    dtype: Literal["float16", "float32"] = _setting(
        "float16", "Type as stored; values that do not fit are an error.", "Features"
    )
    batch_size: int | Literal["auto"] = _setting(
        "auto",
        "Images per forward pass; halved as long as CUDA runs out of memory.",
        "Speed",
        "N|auto",
        names=("--batch-size", "-b"),
        kind=str,
    )
    device: str = _setting("auto", "cpu, cuda, cuda:1, mps; auto is CUDA if present, else the CPU.", "Speed", "DEVICE")
    amp: bool = _setting(False, "Run the network under bfloat16 autocast.", "Speed")
    torchcompile: bool = _setting(
        False, "Compile the network together with its pooling.", "Speed", names=("--torchcompile",)
    )
    codec: Literal["none", "zstd", "blosc", "pcodec"] = _setting("none", "Compress features.", "Storage")
    shards: bool = _setting(
        False, "Store a row block of a layer as one object, for object stores.", "Storage", names=("--shards",)
    )
    rows_per_block: int | None = _setting(
        None,
        "Rows computed and committed together, and the height of chunks.",
        "Storage",
        "N",
        shown="512 for few images, 2048 for many",
    )

    def __post_init__(self) -> None:
        for name, kind in _types().items():
            value = getattr(self, name)
            if kind is bool and not isinstance(value, bool):
                raise H2TError(f"{name} {value!r}: accepted are True and False")
            if get_origin(kind) is Literal and value not in get_args(kind):
                *first, last = get_args(kind)
                raise H2TError(f"{name} {value!r}: accepted are {', '.join(first)} and {last}")
        self._set("seed", integer("seed", self.seed, 0))
        if self.img_size is not None:
            self._set("img_size", integer("img_size", self.img_size, 1, _MAX_IMG_SIZE))
        if self.rows_per_block is not None:
            self._set("rows_per_block", integer("rows_per_block", self.rows_per_block, 1))
        if self.batch_size != "auto":
            self._set("batch_size", integer("batch_size", self.batch_size, 1, also=" and 'auto'"))
        self._set("target_size", _sizes(self.target_size))
        self._set("taps", _words("taps", self.taps))
        self._set("device", str(self.device))
        self._set("data_dir", _path("data_dir", self.data_dir))
        self._set("checkpoint", _path("checkpoint", self.checkpoint))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, **given: Any) -> "Settings":
        """Build settings; raises `TypeError` with a suggestion for a keyword that is not one."""
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"{name!r} is not an argument of extract{did_you_mean(name, known)}")
        return cls(**given)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Settings":
        """Read what `to_json` wrote; settings that an older version did not record have their defaults."""
        return cls.of(**record)

    def to_json(self) -> dict[str, Any]:
        """As JSON, with data or model None if it is an object in memory, and without ``download``."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "download"}
        values["data"] = os.fspath(self.data) if isinstance(self.data, str | os.PathLike) else None
        values["model"] = self.model if isinstance(self.model, str) else None
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def absolute(self) -> "Settings":
        """The same with absolute paths, for a process in another folder; names stay as they are."""
        data, data_dir = self.data, self.data_dir and _absolute(self.data_dir)
        if isinstance(data, str):
            if data.startswith("torch/"):
                data_dir = data_dir or os.getcwd()
            data = _absolute_data(data, data_dir)
        elif isinstance(data, os.PathLike):
            data = Path(_absolute(data))
        model, checkpoint = self.model, self.checkpoint and _absolute(self.checkpoint)
        if isinstance(model, str) and ".py:" in model:
            file, _, factory = model.rpartition(":")
            model = f"{_absolute(file)}:{factory}"
        return replace(self, data=data, data_dir=data_dir, model=model, checkpoint=checkpoint)


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Settings)


def flags() -> dict[str, tuple[Any, Flag]]:
    """Type on the command line and flag of each setting."""
    found = {each.name: each.metadata["flag"] for each in fields(Settings)}
    return {name: (flag.kind or _types()[name], flag) for name, flag in found.items()}


def integer(argument: str, value: Any, least: int, most: int = 2**63 - 1, also: str = "") -> int:
    """Return ``value`` if it is a whole number in the range, else raise `H2TError`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise H2TError(f"{argument} {value!r}: accepted are whole numbers from {least} to {most}{also}")
    return int(value)


def _sizes(given: Any) -> tuple[int, ...]:
    sizes = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    return tuple(dict.fromkeys(integer("target_size", size, 1) for size in sizes or [given]))


def _words(name: str, given: Any) -> str | tuple[str, ...]:
    words = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not all(isinstance(word, str) for word in words):
        raise H2TError(f"{name} {given!r}: accepted are a string and a sequence of strings")
    return given if isinstance(given, str) else tuple(words)


def _path(name: str, given: Any) -> str | None:
    if given is not None and not isinstance(given, str | os.PathLike):
        raise H2TError(f"{name} {given!r}: accepted is a path")
    return None if given is None else os.fspath(given)


def _absolute(path: str | os.PathLike[str]) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else os.fspath(path)


def _absolute_data(name: str, data_dir: str | None) -> str:
    if name == "digits" or name.startswith("torch/") or (name.startswith("wds/") and data_dir is not None):
        return name
    prefix = next((prefix for prefix in ("hfds/", "wds/") if name.startswith(prefix)), "")
    return prefix + _absolute(name.removeprefix(prefix))


_ATTRIBUTES = "\n".join(f"    {name}\n        {flag.help}" for name, (_, flag) in flags().items())
Settings.__doc__ = f"{Settings.__doc__}\n\n    Attributes\n    ----------\n{_ATTRIBUTES}\n"
