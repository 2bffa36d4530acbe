"""Where a store lies: on a disk, or in a bucket of an object store."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from h2t_store.errors import StoreError
from h2t_store.storage.places.bucket import Bucket
from h2t_store.storage.places.client import require_client
from h2t_store.storage.places.disk import Disk
from h2t_store.storage.places.interface import LockedError, Lost, Place

__all__ = ["LockedError", "Lost", "Place", "in_one_process", "open_place"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib reduces '//' to one slash
_BUCKETS = re.compile(r"(s3|gs|az)://[^/]+/.*[^/]|memory://[^/].*")


def in_one_process(address: str | os.PathLike[str]) -> bool:
    """Whether an address is in the memory of this process."""
    return isinstance(address, str) and address.startswith("memory:")


def open_place(address: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Place:
    """The place of a store.

    Parameters
    ----------
    address : path-like or str
        A folder, or ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH``, ``az://CONTAINER/PATH`` or ``memory://NAME``.
        Credentials and endpoint come from the environment variables that the clients of S3 etc. use.
    cache : path-like, optional
        Folder for copies of what is read from an object store.
    """
    text = _path_of(address, "store")
    copies = None if cache is None else Path(os.path.abspath(_path_of(cache, "cache")))
    if not _URL.match(text):
        return Disk(Path(os.path.abspath(text)))
    if any(mark in text for mark in "@?#"):
        raise StoreError("store: a URL with '@', '?' or '#' in it; credentials and options go into the environment")
    url = text.rstrip("/")
    names = url.split("/")[3:]
    sensible = url.isprintable() and not any(name in ("", ".", "..") for name in names)
    if not isinstance(address, str) or not _BUCKETS.fullmatch(url) or not sensible:
        raise StoreError(
            f"store {text!r}: accepted is a folder, or a URL (a str): s3://BUCKET/PATH, gs://BUCKET/PATH, "
            "az://CONTAINER/PATH, memory://NAME"
        )
    require_client(url)
    return Bucket(url, cache=copies)


def _path_of(given: Any, argument: str) -> str:
    with suppress(TypeError):
        path = os.fspath(given)
        if isinstance(path, str) and path:
            return path
    more = ", or a URL such as 's3://bucket/features.zarr'" if argument == "store" else ""
    raise StoreError(f"{argument} {given!r}: accepted is a folder{more}")
