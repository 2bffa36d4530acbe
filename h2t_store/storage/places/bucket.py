"""Files and folders in an object store, through obstore.

An object is written whole, by one request. There are no folders, and nothing can be renamed: an extraction exists from
the moment its zarr.json is written, which is last, until that is deleted, which is first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import StoreError, UnreachableError
from h2t_store.storage.places.client import ask
from h2t_store.storage.places.interface import Lost
from h2t_store.storage.places.leases import lease

_LISTED_AT_ONCE = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Bucket:
    """An object or a prefix of objects below the URL ``store``; see `h2t_store.storage.places.Place`."""

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
            self._size()
            return True
        return False

    def _size(self) -> int:
        return int(self._ask(lambda obstore, client: obstore.head(client, self.key))["size"])

    def read(self, last: int | None = None) -> bytes:
        part: Any = None if last is None else {"range": {"suffix": last}}
        if last is not None and self.store.startswith("az:"):  # which needs the size to read the end
            size = self._size()
            part = {"range": (max(0, size - last), size)}
        return self._ask(lambda obstore, client: bytes(obstore.get(client, self.key, options=part).bytes()))

    def fill(self, buffer: NDArray[np.uint8], start: int = 0) -> int:
        def fetch(obstore: Any, client: Any) -> int:
            found = obstore.get(client, self.key, options={"range": (start, start + len(buffer))})
            content = np.frombuffer(found.bytes(), np.uint8)
            buffer[: len(content)] = content
            return int(found.meta["size"]) - start

        try:
            return self._ask(fetch)
        except UnreachableError:
            if (size := self._size()) <= start:  # a server refuses to read beyond the end
                return size - start
            raise

    def write(self, parts: Sequence[memoryview]) -> None:
        self.write_whole(b"".join(parts))

    def write_whole(self, content: bytes, *, durable: bool = True) -> None:
        try:
            self._ask(lambda obstore, client: obstore.put(client, self.key, content, use_multipart=False))
        except FileNotFoundError:
            raise StoreError(f"{self.store}: there is no such bucket") from None

    def create(self, content: bytes) -> bool:
        """Write an object unless there is one; whether it was written."""

        def put(obstore: Any, client: Any) -> bool:
            try:
                obstore.put(client, self.key, content, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            return True

        if self._ask(put):
            return True
        with suppress(FileNotFoundError):
            return self.read() == content  # written by a request whose answer was lost
        return False

    def remove(self) -> None:
        self._delete([self.key])

    def _delete(self, keys: list[str]) -> None:
        with suppress(FileNotFoundError):
            self._ask(lambda obstore, client: obstore.delete(client, keys))

    def folders(self) -> list["Bucket"]:
        found = self._ask(lambda obstore, client: obstore.list_with_delimiter(client, self.key or None))
        return [Bucket(self.store, path, self.cache) for path in found["common_prefixes"]]

    def files(self) -> Iterator[tuple[str, int]]:
        for page in self._pages():
            for key, size in page:
                if key != self.key:  # a console makes such an object for a folder
                    yield key[len(self.key) + bool(self.key) :], size

    def _pages(self) -> Iterator[list[tuple[str, int]]]:
        """(key, size) of all objects below, as many at a time as one request lists."""
        stream: Iterator[Any] | None = None
        last: str | None = None

        def next_page(obstore: Any, client: Any) -> Any:
            nonlocal stream
            if stream is None:
                stream = iter(obstore.list(client, self.key or None, offset=last, chunk_size=_LISTED_AT_ONCE))
            try:
                return next(stream, None)
            except obstore.exceptions.BaseError:
                stream = None  # the next attempt starts after what was listed
                raise

        while page := self._ask(next_page):
            last = page[-1]["path"]
            yield [(found["path"], found["size"]) for found in page]

    def discard(self) -> None:
        (self / "zarr.json").remove()
        for page in self._pages():
            self._delete([key for key, _ in page])

    def lock(self, who: str) -> AbstractContextManager[Lost]:
        return lease(self, who)

    def _ask(self, question: Callable[[Any, Any], T]) -> T:
        return ask(self.store, self.key, question)
