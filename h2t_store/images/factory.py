"""The one call of timm's factory of datasets: what it raises becomes one line, and code in a dataset never runs."""

import os
from typing import Any

from h2t_store.errors import DataError, one_line

__all__ = ["create"]


def create(name: str, root: str | os.PathLike[str] | None, split: str, **options: Any) -> Any:
    """``timm.data.create_dataset``.

    Its ``trust_remote_code`` stays off. torchvision reads CIFAR's files with pickle, but not before each has the MD5
    digest that is written in its source (``CIFAR10.__init__`` and ``_load_meta``); what ``torch.load`` reads of
    ImageNet and of old copies of MNIST, it reads with ``weights_only``.
    """
    from timm.data import create_dataset

    try:
        return create_dataset(name, root=None if root is None else os.fspath(root), split=split, **options)
    except Exception as error:  # anything from assert to a network's failure
        reason = one_line(error)
        if "download=True" in reason:
            reason = (
                f"it is not in {os.fspath(root or os.curdir)!r}, or damaged: name its folder (--data-dir), or have it "
                "fetched (--dataset-download)"
            )
        raise DataError(f"data {name!r}, split {split!r}: {reason}") from error
