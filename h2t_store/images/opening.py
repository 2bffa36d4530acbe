"""Find out what the data is, and open it."""

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from h2t_store.errors import DataError, did_you_mean
from h2t_store.images.files import open_folder, open_list
from h2t_store.images.formats import is_image_name
from h2t_store.images.map_style import open_arrays, open_dataset
from h2t_store.images.shards import open_shards
from h2t_store.images.source import Source
from h2t_store.images.tars import open_tar

Data: TypeAlias = str | os.PathLike[str] | tuple[Any, Any] | Any

_PREFIXES = ("torch", "hfds", "wds")
_ACCEPTED = (
    "a folder, a .tar, a list file, torch/NAME, hfds/NAME, wds/FOLDER, 'digits' and a tuple (images, labels), and in "
    "Python a dataset with len() and [i] that gives (image, label)"
)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}
_TAR_MAGIC_AT = 257


def open_source(
    data: Data,
    split: str | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Source:
    """Open images of any kind; rows come in an order that depends on the data alone.

    Parameters
    ----------
    data : path-like, str, dataset or (images, labels)
        What `h2t_store.images` lists.
    split : str, optional
        The part to read. Of a folder or tar, the folder of that name in it, under any name that timm takes for the same
        split; needed where there are several, as they are never mixed. Of named sets ``train`` by default. Of ``wds/``,
        shards and the number of samples, as in ``"x-{0000..0001}.tar|2000"``, or a name in ``_info.json``, by default
        ``train``.
    data_dir : path-like, optional
        What paths in a list are relative to (by default the folder of the list); where ``torch/`` is (by default here);
        where ``hfds/`` keeps its cache; what ``wds/FOLDER`` is relative to.
    download : bool
        Let ``torch/`` download what is not there.
    """
    unused = {"split": split, "data_dir": data_dir and str(data_dir), "download": download or None}
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(f"data: a tuple of {len(data)}; accepted is (images, labels)")
        _refuse("arrays", unused)
        return open_arrays(*data)
    if not isinstance(data, str | os.PathLike):
        if isinstance(data, np.ndarray | bytes) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise DataError(f"data: {type(data).__name__}; accepted are {_ACCEPTED}")
        _refuse("a dataset", unused)
        return open_dataset(data)
    name = os.fspath(data)
    if not name:
        raise DataError(f"data: an empty name; accepted are {_ACCEPTED}")
    if isinstance(data, str):
        from h2t_store.images.named import open_digits, open_hub, open_torchvision  # which imports torch

        prefix, slash, rest = name.partition("/")
        if name == "digits":
            _refuse("digits", unused, "split")
            return open_digits(split or "train")
        if slash and prefix == "torch":
            return open_torchvision(rest, Path(data_dir or "."), split or "train", download)
        if slash and prefix == "hfds":
            _refuse("hfds/", unused, "split", "data_dir")
            return open_hub(rest, None if data_dir is None else Path(data_dir), split)
        if slash and prefix == "wds":
            _refuse("wds/", unused, "split", "data_dir")
            return open_shards(Path(data_dir or ".") / rest, split)
    if os.path.isdir(name):
        _refuse("a folder", unused, "split")
        return open_folder(Path(name), split)
    path = Path(name)
    if _is_tar(path):
        _refuse("a tar", unused, "split")
        return open_tar(path, split)
    _refuse("a list file", unused, "data_dir")
    return open_list(path, path.parent if data_dir is None else Path(data_dir))


def _is_tar(path: Path) -> bool:
    """Whether a file is a tar, by name or content; `DataError` where it cannot be read, or is no list either."""
    where = f"data {str(path)!r}"
    if not os.path.lexists(path):
        raise _missing(str(path))
    if not os.path.isfile(path):
        raise DataError(f"{where} is neither a folder nor a file; accepted are {_ACCEPTED}")
    try:
        with open(path, "rb") as file:
            start = file.read(_TAR_MAGIC_AT + 8)
    except OSError as error:
        raise DataError(f"{where}: {error.strerror}") from error
    packed = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if packed is not None:
        raise DataError(f"{where} is compressed ({packed}): unpack it; accepted are {_ACCEPTED}")
    if path.suffix.lower() == ".tar" or start[_TAR_MAGIC_AT:].startswith(b"ustar"):
        return True
    if is_image_name(path.name):
        raise DataError(f"{where} is one image: name its folder; accepted are {_ACCEPTED}")
    return False


def _missing(name: str) -> DataError:
    prefix, _, rest = name.partition("/")
    folder = os.path.dirname(name)
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    known = ["digits", *(os.path.join(folder, found) for found in beside if not found.startswith("."))]
    known += [f"{known}/{rest}" for known in _PREFIXES if rest and did_you_mean(prefix, [known])]
    return DataError(f"data {name!r} does not exist{did_you_mean(name, known)}; accepted are {_ACCEPTED}")


def _refuse(what: str, given: dict[str, Any], *accepted: str) -> None:
    """Raise where an argument would change nothing."""
    reasons = {"split": "has no splits", "data_dir": "takes none", "download": "takes no such option; torch/NAME does"}
    for argument, value in given.items():
        if value is not None and argument not in accepted:
            shown = "" if argument == "download" else f" {value!r}"
            raise DataError(f"{argument}{shown}: {what} {reasons[argument]}")
