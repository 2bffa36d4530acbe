"""Folders and files in an object store, through obstore.

An object appears whole and stays, so that writing one is a single request. There are no folders, and nothing is
renamed: an extraction is there from the moment its zarr.json is written, which is last, and gone from the moment it is
deleted, which is first.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import StoreError
from h2t_store.storage.places.client import ask
from h2t_store.storage.places.disk import Disk
from h2t_store.storage.places.interface import Lost
from h2t_store.storage.places.leases import lease
from h2t_store.storage.threads import in_threads

__all__ = ["Bucket"]

_LISTED_AT_ONCE = 1000
_DOCUMENT = "zarr.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Bucket:
    """An object or a prefix of objects, as `h2t_store.storage.places.Place` has it.

    Attributes
    ----------
    store : str
        URL of the store. Credentials are those of the process that asks.
    key : str
        Below it.
    cache : Path, optional
        Folder for copies of what is read.
    """

    store: str
    key: str = ""
    cache: Path | None = None

    concurrency: ClassVar[int] = 32
    keeps_what_it_has: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.store}/{self.key}" if self.key else self.store

    def __truediv__(self, path: str) -> "Bucket":
        return Bucket(self.store, f"{self.key}/{path}" if self.key else path, self.cache)

    def exists(self) -> bool:
        with suppress(FileNotFoundError):
            self._ask(lambda obstore, client: obstore.head(client, self.key))
            return True
        return False

    def read(self) -> bytes:
        return self._ask(lambda obstore, client: bytes(obstore.get(client, self.key).bytes()))

    def fill(self, allocate: Callable[[int], NDArray[np.uint8] | None]) -> int:
        def fetch(obstore: Any, client: Any) -> int:
            found = obstore.get(client, self.key)
            size: int = found.meta["size"]
            buffer = allocate(size)
            if buffer is not None:
                buffer[:size] = np.frombuffer(found.bytes(), np.uint8)
            return size

        return self._ask(fetch)

    def write(self, parts: Sequence[memoryview]) -> None:
        self.write_whole(b"".join(parts))

    def write_whole(self, content: bytes, *, durable: bool = True, shared: bool = False) -> None:
        try:
            self._ask(lambda obstore, client: obstore.put(client, self.key, content, use_multipart=False))
        except FileNotFoundError:
            raise StoreError(f"{self.store}: there is no such bucket") from None

    def create(self, content: bytes) -> bool:
        """Write an object that must not be there; whether it was not."""

        def put(obstore: Any, client: Any) -> bool:
            try:
                obstore.put(client, self.key, content, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            return True

        if self._ask(put):
            return True
        with suppress(FileNotFoundError):
            return self.read() == content  # an answer can be lost, and the request made again
        return False

    def remove(self) -> None:
        self._delete([self.key])

    def _delete(self, keys: list[str]) -> None:
        with suppress(FileNotFoundError):
            self._ask(lambda obstore, client: obstore.delete(client, keys))

    def take(self, other: "Bucket") -> None:
        self._ask(lambda obstore, client: obstore.copy(client, other.key, self.key))

    def occupied(self) -> bool:
        return any(True for _ in self.files())

    def folders(self) -> list["Bucket"]:
        found = self._ask(lambda obstore, client: obstore.list_with_delimiter(client, self.key or None))
        return [Bucket(self.store, path, self.cache) for path in found["common_prefixes"]]

    def files(self) -> Iterator[tuple[str, int]]:
        for batch in self._listed():
            for key, size in batch:
                if key != self.key:  # as consoles make for a folder
                    yield key[len(self.key) + bool(self.key) :], size

    def _listed(self) -> Iterator[list[tuple[str, int]]]:
        """(key, size) of objects, as many at a time as one request lists."""
        pages: Iterator[Any] | None = None
        last: str | None = None

        def page(obstore: Any, client: Any) -> Any:
            nonlocal pages
            if pages is None:
                pages = iter(obstore.list(client, self.key or None, offset=last, chunk_size=_LISTED_AT_ONCE))
            try:
                return next(pages, None)
            except obstore.exceptions.BaseError:
                pages = None  # the next try begins after what was listed
                raise

        while batch := self._ask(page):
            last = batch[-1]["path"]
            yield [(found["path"], found["size"]) for found in batch]

    def discard(self, store: "Bucket") -> None:
        (self / _DOCUMENT).remove()
        for batch in self._listed():
            self._delete([key for key, _ in batch])

    def put_in_place_of(self, folder: "Bucket", store: "Bucket") -> None:
        mine = {path for path, _ in self.files()}
        if _DOCUMENT not in mine:
            raise StoreError(f"{self}: nothing is there to take the place of {folder}")
        mine.remove(_DOCUMENT)
        (folder / _DOCUMENT).remove()
        in_threads(lambda path: (folder / path).take(self / path), list(mine), self.concurrency)
        for batch in folder._listed():
            self._delete([key for key, _ in batch if key[len(folder.key) + 1 :] not in mine])
        (folder / _DOCUMENT).take(self / _DOCUMENT)
        self.discard(store)

    def lock(self, who: str) -> AbstractContextManager[Lost]:
        return lease(self, who)

    def kept(self) -> Disk | None:
        if self.cache is None:
            return None
        return Disk(self.cache / hashlib.sha256(self.store.encode()).hexdigest()[:32] / self.key)

    def _ask(self, question: Callable[[Any, Any], T]) -> T:
        return ask(self.store, self.key, question)
