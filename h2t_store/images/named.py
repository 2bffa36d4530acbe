"""Datasets by name: ``torch/NAME`` through timm and torchvision, ``hfds/NAME`` through `datasets`, and ``digits``.

Code that a dataset brings along never runs.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from h2t_store.connection import why_unreachable
from h2t_store.errors import DataError, did_you_mean, one_line
from h2t_store.images.files import open_folder
from h2t_store.images.map_style import ArrayReader, open_dataset, open_table
from h2t_store.images.source import Source
from h2t_store.images.splits import SYNONYMS
from h2t_store.switches import Switch

_IN_MEMORY = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_IN_FOLDERS = ("imagenet", "inaturalist")
_TORCH = (*_IN_MEMORY, *_IN_FOLDERS, "places365")
_HUB_FORMATS = ("imagefolder", "parquet", "arrow")
_DIGITS_IN_TRAIN = 1000


def open_torchvision(name: str, root: Path, split: str, download: bool) -> Source:
    """A split of ``torch/NAME`` in the folder ``root``, under timm's names of splits.

    cifar10, cifar100, mnist, kmnist, fashion_mnist and qmnist are in memory, and their identifiers are
    ``SPLIT/index``; imagenet, inaturalist and places365 have paths. ImageNet's classes are its WordNet numbers.
    """
    name = name.lower()
    if name not in _TORCH:
        hint = "; name the folder itself" if name in ("folder", "image_folder") else ""
        raise DataError(f"data 'torch/{name}'{did_you_mean(name, _TORCH)}{hint}; accepted are {', '.join(_TORCH)}")
    kind = f"torch/{name}"
    if name in _IN_MEMORY:
        if split not in SYNONYMS:
            raise DataError(f"split {split!r}: {kind} has 'train' and 'test'{did_you_mean(split, SYNONYMS)}")
        part = "train" if SYNONYMS[split] == "train" else "test"
        dataset = _create(name, root, part, download)
        return replace(open_dataset(dataset, f"{part}/"), origin={"kind": kind, "split": part})
    if "/" in split:
        raise DataError(f"split {split!r}: {kind} is read with its own classes; accepted is a split alone")
    dataset = _create(name, root, split, download)
    if name in _IN_FOLDERS:
        folder = Path(dataset.split_folder if name == "imagenet" else dataset.root)
        return replace(open_folder(folder, None), origin={"kind": kind, "split": folder.name})
    return replace(open_dataset(dataset), origin={"kind": kind, "split": dataset.split})


def _create(name: str, root: Path, split: str, download: bool) -> Any:
    """The dataset of torchvision, built by timm.

    torchvision reads CIFAR's files with pickle, but not before each has the MD5 digest that is written in its source;
    what ``torch.load`` reads of ImageNet and of old copies of MNIST, it reads with ``weights_only``.
    """
    from timm.data import create_dataset

    try:
        return create_dataset(f"torch/{name}", root=str(root), split=split, download=download)
    except Exception as error:  # anything from assert to a network's failure
        reason = one_line(error)
        if "download=True" in reason:
            reason = (
                f"it is not in {str(root)!r}, or damaged: name its folder (--data-dir), or have it fetched "
                "(--dataset-download)"
            )
        raise DataError(f"data 'torch/{name}', split {split!r}: {reason}") from error


def open_hub(name: str, cache: Path | None, split: str | None) -> Source:
    """A split of ``hfds/NAME``, by default ``train``: Parquet or Arrow files, from a folder or the Hub.

    A folder of image files is read as such, since `datasets` merges class folders with equal leaf names and leaves out
    other files without a word.
    """
    builder = _prepared(name, cache)
    where = f"data 'hfds/{name}'"
    if builder.name == "imagefolder" and os.path.isdir(name):
        if any(Path(name).rglob("metadata.*")):
            raise DataError(f"{where}: its metadata is not read: write a list file, or pass it as a Dataset in Python")
        return open_folder(Path(name), split)
    part = split or "train"
    try:
        table = builder.as_dataset(split=part)
    except Exception as error:  # that there is no such split, for one
        raise DataError(f"{where}: {one_line(error)}") from error
    source = open_table(table, f"{part}/", np.arange(len(table)), f"hfds/{name}", name)
    return replace(source, origin={"kind": "hfds", "split": part})


def _prepared(name: str, cache: Path | None) -> Any:
    """What reads the dataset, which is now in the cache; other formats and versions might run code of the dataset."""
    where = f"data 'hfds/{name}'"
    try:
        import datasets
    except ImportError:
        raise DataError("data 'hfds/…' needs the package datasets: pip install head2toe[hf]") from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise DataError(f"datasets {datasets.__version__} can run code of a dataset: pip install 'datasets>=4'")
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise DataError(f"{where}: there is no such folder")
    unreachable = None if os.path.isdir(name) else why_unreachable(huggingface_hub.constants.ENDPOINT)
    try:
        with _offline if unreachable else nullcontext():
            builder = datasets.load_dataset_builder(name, cache_dir=None if cache is None else str(cache))
            if builder.name in _HUB_FORMATS:
                builder.download_and_prepare()
    except Exception as error:  # anything, down to the network's failures
        reason = one_line(error)
        if unreachable:
            reason = f"it is not on this machine, and the Hub cannot be reached ({one_line(unreachable)})"
        raise DataError(f"{where}: {reason}") from error
    if builder.name not in _HUB_FORMATS:
        raise DataError(f"{where} is {builder.name}; accepted are {', '.join(_HUB_FORMATS)}")
    return builder


def _go_offline() -> Callable[[], None]:
    """Use the cache without asking the Hub first, again and again; return what undoes this."""
    import datasets

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)

    def switch(values: list[bool]) -> None:
        for place, value in zip(places, values, strict=True):
            place.HF_HUB_OFFLINE = value

    before = [place.HF_HUB_OFFLINE for place in places]
    switch([True, True])
    return partial(switch, before)


_offline = Switch(_go_offline)


def open_digits(split: str) -> Source:
    """The first 1000 of a fixed shuffle of scikit-learn's digits, or the other 797."""
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: digits has 'train' and 'test'")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    chosen = order[:_DIGITS_IN_TRAIN] if split == "train" else order[_DIGITS_IN_TRAIN:]
    images = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    ids = [f"{split}/{i}" for i in chosen]
    y = labels[chosen].astype(np.int64)
    return Source.of(ArrayReader(images), ids, y, tuple(range(10)), origin={"kind": "digits", "split": split})
