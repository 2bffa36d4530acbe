"""Find out what the data is, and open it."""

import os
from pathlib import Path
from typing import Any, NoReturn

from h2t_store.errors import DataError, did_you_mean
from h2t_store.images.arrays import open_arrays, open_digits
from h2t_store.images.folder import open_folder
from h2t_store.images.hub import open_hub
from h2t_store.images.listing import open_list
from h2t_store.images.pictures import is_image_name
from h2t_store.images.shards import open_shards
from h2t_store.images.source import Source
from h2t_store.images.tar import open_tar
from h2t_store.images.torchvision_sets import open_torchvision

__all__ = ["open_source"]

_PREFIXES = ("torch", "hfds", "wds")
_ACCEPTED = "a folder, a .tar, a list file, torch/NAME, hfds/NAME, wds/FOLDER, 'digits' and a tuple (images, labels)"

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}
_TAR_MAGIC_AT = 257


def open_source(
    data: str | os.PathLike[str] | tuple[Any, Any],
    split: str | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Source:
    """Open images of any kind.

    Parameters
    ----------
    data : path-like, str or (images, labels)
        - A folder: the folder that an image lies in is its class, by its path. A folder of images alone is unlabelled.
        - A ``.tar`` of class folders, read without unpacking it.
        - A list file: ``path label`` on each line, or only paths.
        - ``torch/NAME``: cifar10, cifar100, mnist, kmnist, fashion_mnist, qmnist, imagenet, inaturalist or places365,
          through ``timm.data``.
        - ``hfds/NAME``: a Hugging Face dataset, by its folder or its name on the Hub, through ``timm.data``.
        - ``wds/FOLDER``: shards of WebDataset.
        - ``digits``: scikit-learn's.
        - uint8 images ``(n, h, w, 3)`` with ``n`` labels, integers from 0 (-1 where unlabelled) or strings, or None.
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

    Returns
    -------
    Source
        Rows in an order that depends on the data alone.

    Raises
    ------
    DataError
        Where nothing can be read from it.
    """
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(f"data: a tuple of {len(data)}; accepted is (images, labels)")
        _refuse("arrays", split=split, data_dir=data_dir, download=download)
        return open_arrays(*data)
    if not isinstance(data, str | os.PathLike):
        raise DataError(f"data: {type(data).__name__}; accepted are {_ACCEPTED}")
    name = os.fspath(data)
    if not name:
        raise DataError(f"data: an empty name; accepted are {_ACCEPTED}")
    if isinstance(data, str):
        prefix, slash, rest = name.partition("/")
        if name == "digits":
            _refuse("digits", data_dir=data_dir, download=download)
            return open_digits(split or "train")
        if slash and prefix == "torch":
            return open_torchvision(rest, Path(data_dir or "."), split or "train", download)
        if slash and prefix == "hfds":
            _refuse("hfds/", download=download)
            return open_hub(rest, None if data_dir is None else Path(data_dir), split or "train")
        if slash and prefix == "wds":
            _refuse("wds/", download=download)
            return open_shards(Path(data_dir or ".") / rest, split)
    if os.path.isdir(name):
        _refuse("a folder", data_dir=data_dir, download=download)
        return open_folder(Path(name), split)
    return _open_file(Path(name), split, data_dir, download)


def _open_file(path: Path, split: str | None, data_dir: str | os.PathLike[str] | None, download: bool) -> Source:
    if not os.path.lexists(path):
        _refuse_missing(str(path))
    if not os.path.isfile(path):
        raise DataError(f"data {str(path)!r} is neither a folder nor a file; accepted are {_ACCEPTED}")
    start = _start(path)
    packed = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if packed is not None:
        raise DataError(f"data {str(path)!r} is compressed ({packed}): unpack it; accepted are {_ACCEPTED}")
    if path.suffix.lower() == ".tar" or start[_TAR_MAGIC_AT:].startswith(b"ustar"):
        _refuse("a tar", data_dir=data_dir, download=download)
        return open_tar(path, split)
    if is_image_name(path.name):
        raise DataError(f"data {str(path)!r} is one image: name its folder; accepted are {_ACCEPTED}")
    _refuse("a list file", split=split, download=download)
    return open_list(path, path.parent if data_dir is None else Path(data_dir))


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_TAR_MAGIC_AT + 8)
    except OSError as error:
        raise DataError(f"data {str(path)!r}: {error.strerror}") from error


def _refuse_missing(name: str) -> NoReturn:
    prefix, _, rest = name.partition("/")
    folder = os.path.dirname(name)
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    known = ["digits", *(os.path.join(folder, found) for found in beside if not found.startswith("."))]
    known += [f"{known}/{rest}" for known in _PREFIXES if rest and did_you_mean(prefix, [known])]
    raise DataError(f"data {name!r} does not exist{did_you_mean(name, known)}; accepted are {_ACCEPTED}")


def _refuse(what: str, *, split: object = None, data_dir: object = None, download: bool = False) -> None:
    """Raise where an argument would change nothing."""
    if split is not None:
        raise DataError(f"split {split!r}: {what} has no splits")
    if data_dir is not None:
        raise DataError(f"data_dir {str(data_dir)!r}: {what} takes none")
    if download:
        raise DataError(f"download: {what} takes no such option; accepted is it with torch/NAME")
