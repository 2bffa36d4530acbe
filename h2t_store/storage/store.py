"""A store: which extractions it holds, and how they are begun, extended and removed.

An extraction counts from the moment its attributes are written, after its labels. So a crash between any two writes
leaves either nothing that counts or something that can be continued.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DamagedError, StoppedError, StoreError, did_you_mean
from h2t_store.storage import chunks, layout
from h2t_store.storage.extraction import Extraction, Names, read_group, write_group
from h2t_store.storage.layout import ExtractionHeader
from h2t_store.storage.places import LockedError, Lost, Place, in_one_process, open_place

__all__ = ["Extraction", "FeatureStore", "differences"]

_LOCKS = ".locks"


class FeatureStore:
    """A Zarr group on a disk or in an object store that holds extractions by name.

    ``address`` is a folder or a URL, ``create`` makes the store if there is none, and ``cache`` is a folder for copies
    of features that are read from a URL. Raises `StoreError` if there is no store, or one of another format.
    """

    def __init__(
        self, address: str | os.PathLike[str], *, create: bool = False, cache: str | os.PathLike[str] | None = None
    ) -> None:
        self.place, self.address = open_place(address, cache), os.fspath(address)
        self._locked: dict[str, Lost] = {}
        document, where = self.place / "zarr.json", f"store {self.address!r}"
        other = f"{where} exists and is not a feature store: choose another path"
        if not document.exists():
            if _occupied(self.place) and not document.exists():  # unless another process is making it
                raise StoreError(other)
            if not create and not document.exists():
                raise StoreError(f"{where} does not exist{' in this process' if in_one_process(address) else ''}")
            try:
                write_group(self.place, {"h2t_format": layout.FORMAT})
            except (FileExistsError, NotADirectoryError):
                raise StoreError(other) from None
            except OSError as error:
                raise StoreError(f"{where} cannot be made: {error.strerror or error}") from error
        layout.require_format(read_group(self.place, where).get("h2t_format"), where)

    @classmethod
    def unchecked(cls, address: str | os.PathLike[str]) -> Self:
        """A store whose own metadata may be damaged, to look at and to repair."""
        store = cls.__new__(cls)
        store.place, store.address, store._locked = open_place(address), os.fspath(address), {}
        if not _occupied(store.place):
            raise StoreError(f"store {store.address!r} does not exist")
        if not (store.place / "zarr.json").exists() and not store.names():
            raise StoreError(f"{store.address!r} is not a feature store")
        return store

    def names(self) -> list[str]:
        """Names of the extractions, finished or not, damaged or not, sorted."""
        return sorted(name for name, _ in _names_below(self.place))

    def folder(self, name: str) -> Place:
        """Where an extraction of that name lies."""
        return self.place / layout.check_name(name)

    def where(self, name: str) -> str:
        """An extraction, for messages."""
        return f"{self.address}: {name}"

    def open(self, name: str) -> Extraction:
        """Open the extraction ``name``; raises `StoreError` if there is none."""
        found = self.find(name)
        if found is None:
            raise self._without(name)
        return found

    def find(self, name: str) -> Extraction | None:
        """Open the extraction ``name``; None if there is none."""
        folder, where = self.folder(name), self.where(name)
        if _kind(folder) not in ("extraction", "unreadable"):
            return None
        found = Extraction(folder, where)
        if found.header.name != name:
            raise DamagedError(f"{where}: its zarr.json is that of {found.header.name!r}, from which it was copied")
        return found

    def _without(self, name: str) -> StoreError:
        known = self.names()
        listed = f"it holds {', '.join(known[:8])}{', …' if len(known) > 8 else ''}" if known else "it is empty"
        return StoreError(f"store {self.address!r} has no extraction {name!r}{did_you_mean(name, known)}: {listed}")

    def require(self, name: str) -> None:
        """Raise `StoreError` unless something that is or was an extraction lies under that name."""
        inside = any(_occupied(self.place / above / "committed/c") for above in layout.names_above(name))
        folder = self.folder(name)
        found = _kind(folder) in ("extraction", "unreadable") or _occupied(folder / "committed/c")
        if inside or not found:
            raise self._without(name)

    @contextmanager
    def lock(self, name: str) -> Iterator[Lost]:
        """Keep other writers of one name out; gives a function that says whether the lock was lost since.

        Raises `StoreError` if another process holds the lock, or if what it protects cannot be written.
        """
        who = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        lock = self.place / f"{_LOCKS}/{layout.escaped(layout.check_name(name))}"
        try:
            with lock.lock(who) as lost:
                self._locked[name] = lost
                try:
                    yield lost
                except StoppedError:
                    self.require_lock(name)
                    raise
        except OSError as error:
            raise StoreError(f"{self.where(name)} cannot be written: {error.strerror or error}") from error
        except LockedError as error:
            raise StoreError(f"{self.where(name)} is being written by {error}") from None
        finally:
            self._locked.pop(name, None)

    def require_lock(self, name: str) -> None:
        """Raise `StoreError` if the lock was taken here and lost since."""
        if name in self._locked and self._locked[name](ask=True):
            raise StoreError(f"{self.where(name)}: stood still for so long that another process took the lock over")

    def begin(self, name: str, header: ExtractionHeader, y: NDArray[np.int64], sample_ids: Names) -> Extraction:
        """Create the extraction ``name``, or open the one that was begun from the same inputs.

        Raises `StoreError` if one of that name, or of a part of it, has other inputs; the message says what differs.
        """
        folder, above, begun = self.folder(name), layout.names_above(name), self.find(name)
        for group in above:
            if _kind(self.place / group) in ("extraction", "unreadable"):
                raise StoreError(f"name {name!r}: {group!r} is an extraction already; choose another name")
        if begun is not None:
            different = differences(begun.header.provenance["inputs"], header.provenance["inputs"])
            if different and begun.holds_rows():
                raise StoreError(
                    f"{begun.where} was made from something else ({'; '.join(different)}): choose another name, or "
                    f"remove it with: h2t rm {self.address} {name}"
                )
            if not different:
                if not begun.complete:
                    begun.write_documents()
                return begun
        elif any(True for _ in _names_below(folder)):
            raise StoreError(f"name {name!r}: extractions lie below it already; choose another name")
        chunks.require_codec(header.codec)
        self.require_lock(name)
        folder.discard()  # what a crash left, or a beginning of something else without any row
        for group in above:
            if not (self.place / group / "zarr.json").exists():
                write_group(self.place / group, {})
        begun = Extraction(folder, self.where(name), header.begun(name, y, sample_ids))
        begun.write_documents()
        begun.write_labels(y, sample_ids)
        begun.write_attributes(complete=False)
        return begun

    def extend(self, name: str, header: ExtractionHeader, y: NDArray[np.int64], sample_ids: Names) -> Extraction:
        """Add rows to the complete extraction ``name``, which is unfinished until they are computed.

        ``header``, ``y`` and ``sample_ids`` are of all rows, of which the first ones are stored already.
        """
        begun = self.open(name)
        if not begun.complete:
            raise StoreError(f"{begun.where} is unfinished: finish it before it is extended")
        self.require_lock(name)
        return begun.extend(header, y, sample_ids)

    def remove(self, name: str) -> None:
        """Remove the extraction ``name`` and what it wrote, damaged or not."""
        folder = self.folder(name)
        try:
            self.open(name)
        except DamagedError:
            if any(readable for _, readable in _names_below(folder)):
                raise
        self.require_lock(name)
        folder.discard()


def _occupied(folder: Place) -> bool:
    return any(True for _ in folder.files())


def _kind(folder: Place) -> Literal["extraction", "unreadable", "group", "array", "nothing"]:
    """What lies in a folder, as far as its zarr.json tells; it need not be sound."""
    try:
        content = (folder / "zarr.json").read()
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except OSError:
        return "unreadable"
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        document = json.loads(content)
        if document["node_type"] == "array":
            return "array"
        return "extraction" if document["attributes"] else "group"
    return "unreadable"


def _names_below(folder: Place, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(name, whether its metadata can be read) of every extraction, and of what may be one, below a folder."""
    for child in folder.folders():
        if child.name.startswith(".") or (kind := _kind(child)) in ("nothing", "array"):
            continue
        if kind != "group":
            yield prefix + child.name, kind == "extraction"
        if kind != "extraction":
            below = _names_below(child, f"{prefix}{child.name}/")
            yield from ((name, readable) for name, readable in below if kind == "group" or readable)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key was old, now new`` for each key whose values differ, in the order of ``new``, long values cut short."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key} was {_short(before.get(key))}, now {_short(after.get(key))}"
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]


def _flat(inputs: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in inputs.items():
        flat |= {f"{key}.{part}": item for part, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"{text[:8]}…"
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
