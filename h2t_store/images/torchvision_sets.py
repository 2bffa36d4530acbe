"""``torch/NAME``: the datasets of torchvision that timm knows, as arrays where it holds them, else as files."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from h2t_store.errors import DataError, did_you_mean
from h2t_store.images.arrays import in_memory
from h2t_store.images.factory import create
from h2t_store.images.fingerprint import Digests
from h2t_store.images.folder import FolderSource, open_folder
from h2t_store.images.labels import encode
from h2t_store.images.names import as_names
from h2t_store.images.source import UNLABELLED, Source

__all__ = ["open_torchvision"]

_IN_MEMORY = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_IN_FOLDERS = ("imagenet", "inaturalist")
_KNOWN = (*_IN_MEMORY, *_IN_FOLDERS, "places365")
_TRAIN = ("train", "training")
_TEST = ("test", "val", "valid", "validation", "eval", "evaluation")


def open_torchvision(name: str, root: Path, split: str, download: bool) -> Source:
    """Open a split of ``torch/NAME`` in the folder ``root``, under timm's names of splits.

    Parameters
    ----------
    name : str
        cifar10, cifar100, mnist, kmnist, fashion_mnist and qmnist are read into memory and have ``SPLIT/index`` as
        identifiers; imagenet, inaturalist and places365 have paths. Classes of imagenet are its WordNet numbers, since
        some of its names occur twice.
    root : Path
        What torchvision calls the root.
    split : str
        ``train``, or ``validation`` or ``test``, which are the same where the dataset has only one.
    download : bool
        Download what is not there.
    """
    name = name.lower()
    if name not in _KNOWN:
        hint = "; name the folder itself" if name in ("folder", "image_folder") else ""
        raise DataError(f"data 'torch/{name}'{did_you_mean(name, _KNOWN)}{hint}; accepted are {', '.join(_KNOWN)}")
    if name in _IN_MEMORY and split not in (*_TRAIN, *_TEST):
        raise DataError(f"split {split!r}: torch/{name} has 'train' and 'test'{did_you_mean(split, (*_TRAIN, *_TEST))}")
    if "/" in split:
        raise DataError(f"split {split!r}: torch/{name} is read with its own classes; accepted is a split alone")
    dataset = create(f"torch/{name}", root, split, download=download)
    origin = {"kind": f"torch/{name}"}
    if name in _IN_MEMORY:
        return _from_memory(dataset, {**origin, "split": "train" if split in _TRAIN else "test"})
    if name in _IN_FOLDERS:
        folder = Path(dataset.split_folder if name == "imagenet" else dataset.root)
        return replace(open_folder(folder, None), origin={**origin, "split": folder.name})
    return _from_files(dataset, {**origin, "split": dataset.split})


def _from_memory(dataset: Any, origin: dict[str, Any]) -> Source:
    images = np.asarray(dataset.data)
    y, _ = encode(np.asarray(dataset.targets).reshape(len(images), -1)[:, 0], len(images))
    ids = as_names([f"{origin['split']}/{i}" for i in range(len(images))])
    return in_memory(images, origin=origin, sample_ids=ids, y=y, classes=tuple(map(str, dataset.classes)))


def _from_files(dataset: Any, origin: dict[str, Any]) -> FolderSource:
    paths = [os.path.relpath(path, dataset.root) for path, _ in dataset.imgs]
    labels = [UNLABELLED if label is None else label for _, label in dataset.imgs]
    return FolderSource(
        origin=origin,
        sample_ids=as_names(paths),
        y=np.array(labels, dtype=np.int64),
        classes=tuple(dataset.classes) if max(labels) >= 0 else (),
        numbers=np.arange(len(paths)),
        digests=Digests(len(paths)),
        root=Path(dataset.root),
    )
