"""A store: which extractions it holds, and the one way in which they are begun, filled, finished and removed.

A row block counts from the moment its flag in ``committed`` is written, after every layer of it. An extraction counts
from the moment its attributes are written, after every array was created. So a crash between any two writes leaves
either nothing that counts or something that can be continued.
"""

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Self
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DamagedError, DataError, StoppedError, StoreError, did_you_mean, one_line
from h2t_store.storage import chunks, layout
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.places import LockedError, Lost, Place, in_one_process, open_place
from h2t_store.storage.threads import in_threads

__all__ = ["Extraction", "FeatureStore", "chunk_path", "differences", "read_group", "write_group"]

Names = Sequence[str] | NDArray[Any]

_STAGED = ".append-"
_LOCKS = ".locks"
_AT_ONCE = "committed/images_at_once"
_CACHED_BLOCKS = 4096
_COMMITTED = b"\x01" + chunks.checksum(np.ones(1, np.uint8)).to_bytes(chunks.CRC_BYTES, "little")
_MAX_UNSEEN = 10_000_000


class Extraction:
    """One extraction in a store: its header and its arrays.

    Attributes
    ----------
    folder : Place
        Where it lies.
    where : str
        ``STORE: NAME``, for messages.
    header : ExtractionHeader
        What its attributes say.
    complete : bool
        Whether every row block was committed.
    n_failed : int
        How many samples were skipped; known once complete.
    images_at_once : int, optional
        The most images that went through the network at once wherever memory did not suffice for a batch.

    Parameters
    ----------
    folder, where
        As above.
    header : ExtractionHeader, optional
        To use where the attributes cannot be read; the extraction then counts as unfinished.
    """

    def __init__(self, folder: Place, where: str, header: ExtractionHeader | None = None) -> None:
        self.folder, self.where = folder, where
        attributes = read_group(folder, where) if header is None else header.to_attrs() | header.state()
        self.header = ExtractionHeader.from_attrs(attributes, where)
        self.complete = attributes.get("complete") is True
        self.n_failed: int = attributes.get("n_failed", 0) if self.complete else 0
        self.images_at_once: int | None = attributes.get("images_at_once")
        expected = self.header.to_attrs() | self._state()
        if attributes != expected:
            raise DamagedError(f"{where}: the attributes in its zarr.json were changed or damaged: their seal differs")
        if type(self.n_failed) is not int or not self._holds_its_rows() or not self._holds_its_columns():
            raise DamagedError(f"{where}: the attributes in its zarr.json are not those of an extraction")
        self._sound: set[str] = set()
        self.before: Extraction | None = None
        self.record = lru_cache(_CACHED_BLOCKS)(self.read_record)

    def _state(self) -> dict[str, Any]:
        return self.header.state(self.n_failed if self.complete else None, self.images_at_once)

    @property
    def provenance(self) -> dict[str, Any]:
        """As in the header, with ``batch_size_used``: the smallest batch, where memory did not suffice for more."""
        environment = self.header.provenance["environment"]
        asked = environment.get("arguments", {}).get("batch_size")
        used = {} if asked is None else {"batch_size_used": self.images_at_once or asked}
        return self.header.provenance | {"environment": environment | used}

    def find_images_at_once(self) -> int | None:
        """The fewest that anyone who computes row blocks had to go on with."""
        noted = [int(path) for path, _ in (self.folder / _AT_ONCE).files() if path.isdecimal()]
        return min(filter(None, [self.images_at_once, *noted]), default=None)

    def note_images_at_once(self, images: int) -> None:
        """Row blocks from here on are computed with so many images at once; several processes may say so."""
        (self.folder / f"{_AT_ONCE}/{images}").write_whole(b"", shared=True)

    def _holds_its_rows(self) -> bool:
        """Whether there are labels for most of the rows; only asked where so many rows would fill the memory."""
        if self.header.n_samples <= _MAX_UNSEEN:
            return True
        n_bytes = sum(size for _, size in (self.folder / "y/c").files())
        return n_bytes > self.header.n_samples * np.dtype(np.int64).itemsize // 2

    def _holds_its_columns(self) -> bool:
        """Whether a row block has checksums of that many columns; only asked where so many would fill the memory."""
        begun = self.complete or (self.folder / "committed/c").occupied()
        if self.header.n_features <= _MAX_UNSEEN or not begun:
            return True
        size = self.specs["checksums"].shape[1] * np.dtype(np.uint32).itemsize + chunks.CRC_BYTES
        return any(found == size for _, found in (self.folder / "checksums/c").files())

    @cached_property
    def specs(self) -> dict[str, layout.ArraySpec]:
        """Every array by its path."""
        return layout.array_specs(self.header)

    @cached_property
    def _first_crc(self) -> dict[str, int]:
        """Where the checksums of a layer's chunks begin in the record of a block."""
        starts = np.cumsum([1, *(layer.n_chunks for layer in self.header.layers)]).tolist()
        return dict(zip((layer.name for layer in self.header.layers), starts, strict=False))

    def chunk_file(self, path: str, *index: int) -> Place:
        """File of a chunk."""
        return self.folder / chunk_path(path, index)

    def block_chunks(self, block: int, *, failures: bool) -> list[tuple[str, tuple[int, ...]]]:
        """(array, index) of every chunk of a row block, in the order of its checksums, with or without ``failures``."""
        features = [
            (layout.feature_path(layer), (block, column))
            for layer in self.header.layers
            for column in range(layer.n_chunks)
        ]
        return [*features, ("layer_norms", (block, 0)), *([("failures", (block,))] if failures else [])]

    def check_metadata(self, path: str) -> None:
        """Raise `DamagedError` unless the zarr.json of an array is as it was created."""
        if path in self._sound:
            return
        try:
            content = (self.folder / f"{path}/zarr.json").read()
        except FileNotFoundError:
            raise DamagedError(f"{self.where}: the zarr.json of {path!r} is missing") from None
        except OSError as error:
            raise DamagedError(f"{self.where}: the zarr.json of {path!r} cannot be read: {one_line(error)}") from error
        if layout.document_digest(content) != self.header.documents.get(path):
            raise DamagedError(f"{self.where}: the zarr.json of {path!r} was changed or damaged")
        self._sound.add(path)

    def read(self, path: str, index: Sequence[int], crc: int | None = None) -> NDArray[Any]:
        """One chunk of numbers, whole; valid until this thread reads the next."""
        spec = self.specs[path]
        return chunks.read_chunk(
            self.chunk_file(path, *index), self._chunk_name(path, index), spec.dtype, spec.chunks, crc
        )

    def _chunk_name(self, path: str, index: Sequence[int]) -> str:
        return f"{self.where}: chunk {chunk_path(path, index)}"

    def _strings(self, path: str, index: int, crc: int | None = None) -> list[str]:
        name = self._chunk_name(path, [index])
        data = chunks.read_bytes(self.chunk_file(path, index), name, crc)
        try:
            return chunks.decode_strings(data)
        except ValueError:
            raise DamagedError(f"{name} is damaged: it does not hold strings") from None

    def read_record(self, block: int) -> NDArray[np.uint32]:
        """The checksums of a row block, found to be this block's."""
        record: NDArray[np.uint32] = self.read("checksums", (block, 0))[0].copy()
        if (record != layout.seal(self.header, block, record[1:])).any():
            raise DamagedError(f"{self._chunk_name('checksums', (block, 0))} is damaged: it belongs elsewhere")
        return record

    def features(self, layer: Layer, block: int, column: int) -> NDArray[Any]:
        """One chunk (rows_per_block, chunk_width) of a layer, rows and columns beyond the last filled with NaN.

        Valid until this thread reads the next chunk.
        """
        self.check_metadata(layout.feature_path(layer))
        crc = int(self.record(block)[self._first_crc[layer.name] + column])
        return self.read(layout.feature_path(layer), (block, column), crc)

    def layer_norms(self) -> NDArray[np.float32]:
        """Euclidean norms (n_samples, n_layers) of each layer's part of each row."""

        def read(block: int) -> NDArray[np.float32]:
            return self.read("layer_norms", (block, 0), int(self.record(block)[-2])).copy()

        parts = in_threads(read, range(layout.n_blocks(self.header)), self.folder.concurrency)
        return np.concatenate(parts)[: self.header.n_samples]

    @cached_property
    def _crc_without_failures(self) -> int:
        """The checksum of a block's ``failures`` where there are none, and no file."""
        return chunks.checksum(chunks.encode_strings([""] * self.header.rows_per_block))

    def tells_failures(self, record: NDArray[np.uint32]) -> bool:
        """Whether a sample of a row block was skipped, by the block's checksums: there is no file without any."""
        return int(record[-1]) != self._crc_without_failures

    def reasons(self, block: int) -> list[str]:
        """Why the samples of a row block were skipped, empty where they were not."""
        if not self.tells_failures(self.record(block)):
            return [""] * self.header.rows_per_block
        return self._strings("failures", block, int(self.record(block)[-1]))

    def failures(self) -> dict[int, str]:
        """Why samples were skipped, by their row."""
        found = {int(path) for path, _ in (self.folder / "failures/c").files() if path.isdecimal()}
        known = range(layout.n_blocks(self.header)) if self.complete else np.flatnonzero(self.committed()).tolist()
        blocks = sorted(found.intersection(known))
        reasons: dict[int, str] = {}
        for block, strings in zip(blocks, in_threads(self.reasons, blocks, self.folder.concurrency), strict=True):
            first = block * self.header.rows_per_block
            reasons |= {first + i: reason for i, reason in enumerate(strings) if reason}
        if self.complete and len(reasons) != self.n_failed:
            raise DamagedError(f"{self.where}: {len(reasons)} samples were skipped, not {self.n_failed}")
        return reasons

    def may_have_failures(self) -> bool:
        """Whether a sample was skipped, as far as it can be read, committed or not."""
        for path, _ in (self.folder / "failures/c").files():
            with suppress(DamagedError):
                if path.isdecimal() and any(self._strings("failures", int(path))):
                    return True
        return False

    def skipped(self) -> list[tuple[str, str]]:
        """(identifier, why) of every sample that was skipped; empty until the extraction is complete."""
        if not self.n_failed:
            return []
        ids = self.sample_ids()
        return [(str(ids[row]), reason) for row, reason in self.failures().items()]

    def labels(self) -> NDArray[np.int64]:
        """Labels (n_samples,), -1 where unlabelled."""
        rows = self.specs["y"].chunks[0]
        n_chunks = -(-self.header.n_samples // rows)
        parts = in_threads(lambda i: self.read("y", [i]).copy(), range(n_chunks), self.folder.concurrency)
        y = np.concatenate(parts)[: self.header.n_samples]
        if layout.labels_digest(y) != self.header.labels_sha256:
            raise DamagedError(f"{self.where}: y is damaged: it holds other labels")
        return y

    def sample_ids(self) -> NDArray[Any]:
        """Identifiers (n_samples,) of strings."""
        rows = self.specs["sample_ids"].chunks[0]
        n_chunks = -(-self.header.n_samples // rows)
        parts = in_threads(lambda i: self._strings("sample_ids", i), range(n_chunks), self.folder.concurrency)
        ids = [sample_id for part in parts for sample_id in part]
        del ids[self.header.n_samples :]
        if layout.ids_digest(ids) != self.header.ids_sha256:
            raise DamagedError(f"{self.where}: sample_ids is damaged: it holds other identifiers")
        return np.array(ids, dtype=np.dtypes.StringDType())

    def committed(self) -> NDArray[np.bool_]:
        """Which row blocks are stored, one flag per block."""
        flags = np.zeros(layout.n_blocks(self.header), dtype=bool)
        for path, _ in (self.folder / "committed/c").files():
            if path.isdecimal() and int(path) < len(flags):
                flags[int(path)] = self.folder.keeps_what_it_has or self.is_committed(int(path))
        return flags

    def lacking(self) -> list[int]:
        """Committed row blocks that lack a file, or have one of another size, as a listing tells."""
        committed = self.committed()
        whole = committed.copy()
        layers = [(layout.feature_path(layer), layer.n_chunks) for layer in self.header.layers]

        def count(job: tuple[str, int]) -> NDArray[np.bool_]:
            path, n_chunks = job
            spec, found = self.specs[path], np.zeros(len(whole), dtype=np.int64)
            expected = math.prod(spec.chunks) * np.dtype(spec.dtype).itemsize + chunks.CRC_BYTES
            for file, size in (self.folder / path / "c").files():
                block = file.partition("/")[0]
                if size == expected and block.isdecimal() and int(block) < len(found):
                    found[int(block)] += 1
            held: NDArray[np.bool_] = found == n_chunks
            return held

        arrays = [*layers, ("layer_norms", 1), ("checksums", 1)]
        for held in in_threads(count, arrays, self.folder.concurrency):
            whole &= held
        listed = {path for path, _ in (self.folder / "failures/c").files()}

        def tells_truth(block: int) -> bool:
            with suppress(DamagedError):
                return str(block) in listed or not self.tells_failures(self.record(block))
            return False

        blocks = np.flatnonzero(whole)
        whole[blocks] = in_threads(tells_truth, blocks.tolist(), self.folder.concurrency)
        return np.flatnonzero(committed & ~whole).tolist()

    def is_committed(self, block: int) -> bool:
        """Whether a row block is on disk."""
        return self.chunk_file("committed", block).exists() and bool(self.read("committed", [block])[0])

    def write_block(
        self,
        block: int,
        features: Sequence[NDArray[Any]],
        norms: NDArray[np.float32],
        failures: Mapping[int, str] | None = None,
        *,
        before: "Extraction | None" = None,
    ) -> None:
        """Write one row block of every layer, then commit it.

        Parameters
        ----------
        block : int
            Index of the row block.
        features : sequence of ndarray of shape (rows, width)
            One for each layer, in the order of the header and the dtype of the store.
        norms : ndarray of shape (rows, n_layers), float32
            Euclidean norm of each layer's part of each row.
        failures : dict of int to str, optional
            Why rows, counted from the first of these, were skipped.
        before : Extraction, optional
            An extraction that holds the rows of the block that come before these.
        """
        height, reasons = self.header.rows_per_block, [(failures or {}).get(i, "") for i in range(len(norms))]
        known = 0 if before is None else before.header.n_samples - block * height
        if before is not None:
            record = before.record(block)
            norms = np.concatenate([before.read("layer_norms", (block, 0), int(record[-2]))[:known], norms])
            reasons = before.reasons(block)[:known] + reasons

        def write(job: tuple[Layer, int, NDArray[Any]]) -> int:
            layer, column, values = job
            part = values[:, column * layer.chunk_width : (column + 1) * layer.chunk_width]
            if before is not None:
                part = np.concatenate([before.features(layer, block, column)[:known, : part.shape[1]], part])
            path = self.chunk_file(layout.feature_path(layer), block, column)
            return chunks.write_chunk(path, _padded(part, (height, layer.chunk_width)))

        jobs = [
            (layer, column, values)
            for layer, values in zip(self.header.layers, features, strict=True)
            for column in range(layer.n_chunks)
        ]
        crcs = in_threads(write, jobs, self.folder.concurrency)
        crcs.append(
            chunks.write_chunk(self.chunk_file("layer_norms", block, 0), _padded(norms, (height, norms.shape[1])))
        )
        crc, file = self._crc_without_failures, self.chunk_file("failures", block)
        if any(reasons):
            crc = chunks.write_chunk(file, chunks.encode_strings(reasons + [""] * (height - len(reasons))))
        self._commit(block, np.array([*crcs, crc], dtype=np.uint32))

    def _commit(self, block: int, crcs: NDArray[np.uint32]) -> None:
        chunks.write_chunk(self.chunk_file("checksums", block, 0), layout.seal(self.header, block, crcs))
        self.record.cache_clear()
        self.chunk_file("committed", block).write_whole(_COMMITTED, durable=False)

    def take_block(self, block: int, other: "Extraction") -> None:
        """Take over a whole row block of another extraction with the same layers, without copying where that can be."""

        def take(job: tuple[str, tuple[int, ...]]) -> None:
            path = chunk_path(*job)
            try:
                (self.folder / path).take(other.folder / path)
            except FileNotFoundError:
                raise DamagedError(f"{other.where}: chunk {path} is missing") from None

        record = other.record(block)
        jobs = other.block_chunks(block, failures=other.tells_failures(record))
        in_threads(take, jobs, self.folder.concurrency)
        self._commit(block, record[1:])

    def finish(self) -> None:
        """Mark the extraction complete; every block must be committed, and some sample not skipped."""
        missing = int((~self.committed()).sum())
        if missing:
            raise StoreError(f"{self.where}: {missing} row blocks are not committed")
        failures = self.failures()
        if len(failures) == self.header.n_samples:
            first = next(iter(failures.values()))
            remedy = f"(to start anew: h2t rm {self.where.replace(': ', ' ')}"
            raise DataError(f"{self.where}: no image could be read; the first: {first} {remedy})")
        self.n_failed, self.complete = len(failures), True
        self.images_at_once = self.find_images_at_once()
        self._write_attributes()

    def reopen(self, blocks: Iterable[int]) -> None:
        """Take the commitment of row blocks back, so that they are computed again."""
        self.complete = False
        self._write_attributes()
        for block in blocks:
            self.chunk_file("committed", block).remove()

    def _write_attributes(self) -> None:
        write_group(self.folder, self.header.to_attrs() | self._state())

    def write_labels(self, y: NDArray[np.int64], sample_ids: Names) -> None:
        """Write labels and identifiers again, which must be the same ones."""
        if (
            layout.labels_digest(y) != self.header.labels_sha256
            or layout.ids_digest(sample_ids) != self.header.ids_sha256
        ):
            raise StoreError(f"{self.where}: its labels or sample_ids were others than the data has now")
        _write_labels(self.folder, self.specs["y"].chunks[0], y, sample_ids)

    def stored_bytes(self) -> int:
        """Bytes of its files."""
        return sum(size for _, size in self.folder.files())


def chunk_path(array: str, index: Sequence[int]) -> str:
    """Where a chunk of an array lies below its extraction."""
    return f"{array}/c/{'/'.join(map(str, index))}"


def _write_labels(folder: Place, rows: int, y: NDArray[np.int64], sample_ids: Names) -> None:
    def write(i: int) -> None:
        part = np.asarray(y[i * rows : (i + 1) * rows], dtype=np.int64)
        filled = np.append(part, np.full(rows - len(part), layout.UNLABELLED, np.int64))
        chunks.write_chunk(folder / f"y/c/{i}", filled)
        ids = list(map(str, sample_ids[i * rows : (i + 1) * rows]))
        encoded = chunks.encode_strings(ids + [""] * (rows - len(ids)))
        chunks.write_chunk(folder / f"sample_ids/c/{i}", encoded)

    in_threads(write, range(-(-len(y) // rows)), folder.concurrency)


def _padded(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The values in the first corner of a chunk, NaN elsewhere."""
    if values.shape == shape:
        return values
    whole = np.full(shape, np.nan, dtype=values.dtype)
    whole[tuple(map(slice, values.shape))] = values
    return whole


class FeatureStore:
    """A Zarr group on a disk or in an object store that holds extractions by name.

    Parameters
    ----------
    address : path-like or str
        A folder or a URL (see `h2t_store.storage.places.address.open_place`).
    create : bool
        Make the store where there is none; otherwise that is an error.
    cache : path-like, optional
        Folder for copies of features that are read from a URL.

    Raises
    ------
    StoreError
        Where there is no store, or one of another format.
    """

    def __init__(
        self, address: str | os.PathLike[str], *, create: bool = False, cache: str | os.PathLike[str] | None = None
    ) -> None:
        self.place = open_place(address, cache)
        self.address = os.fspath(address)
        document, where = self.place / "zarr.json", f"store {self.address!r}"
        if not document.exists():
            if self.place.occupied() and not document.exists():  # unless another process is making it
                raise StoreError(f"{where} exists and is not a feature store: choose another path")
            if not create and not document.exists():
                raise StoreError(f"{where} does not exist{' in this process' if in_one_process(address) else ''}")
            try:
                write_group(self.place, {"h2t_format": layout.FORMAT}, shared=True)
            except OSError as error:
                raise StoreError(f"{where} cannot be made: {error.strerror or error}") from error
        found = read_group(self.place, where).get("h2t_format")
        if found != layout.FORMAT:
            raise StoreError(f"{where}: h2t_format is {found!r}; this version reads {layout.FORMAT}")
        self._locked: dict[str, Lost] = {}

    @classmethod
    def unchecked(cls, address: str | os.PathLike[str]) -> Self:
        """A store whose own metadata may be damaged, to look at and to repair."""
        store = cls.__new__(cls)
        store.place, store.address, store._locked = open_place(address), os.fspath(address), {}
        if not store.place.occupied():
            raise StoreError(f"store {store.address!r} does not exist")
        if not (store.place / "zarr.json").exists() and not store.names():
            raise StoreError(f"{store.address!r} is not a feature store")
        return store

    def names(self) -> list[str]:
        """Names of the extractions, finished or not, damaged or not, sorted."""
        staged = (
            folder.name.removeprefix(_STAGED) for folder in self.place.folders() if folder.name.startswith(_STAGED)
        )
        between = {name for name in map(unquote, staged) if self._is_between(name)}
        return sorted({*between, *(name for name, _ in _names_below(self.place))})

    def folder(self, name: str) -> Place:
        """Where an extraction of that name is written."""
        return self.place / layout.check_name(name)

    def found_at(self, name: str) -> Place:
        """Where an extraction of that name is read: a crash amid `replace` leaves what was staged, complete."""
        return self._staged(name) if self._is_between(name) else self.folder(name)

    def where(self, name: str) -> str:
        """An extraction, for messages."""
        return f"{self.address}: {name}"

    def open(self, name: str) -> Extraction:
        """Open the extraction ``name``; raises `StoreError` where there is none."""
        found = self.find(name)
        if found is None:
            raise self._without(name)
        return found

    def _without(self, name: str) -> StoreError:
        known = self.names()
        listed = f"it holds {', '.join(known[:8])}{', …' if len(known) > 8 else ''}" if known else "it is empty"
        return StoreError(f"store {self.address!r} has no extraction {name!r}{did_you_mean(name, known)}: {listed}")

    def require(self, name: str) -> None:
        """Raise `StoreError` unless something that is or was an extraction lies under that name."""
        folder = self.found_at(name)
        inside = any(_holds_arrays(self.folder(above)) for above in layout.names_above(name))
        if inside or not (_may_be_extraction(folder) or _holds_arrays(folder)):
            raise self._without(name)

    def find(self, name: str) -> Extraction | None:
        """Open the extraction ``name``; None where there is none."""
        folder = self.folder(name)
        if not _may_be_extraction(folder):
            folder = self.found_at(name)
            if not _may_be_extraction(folder):
                return None
        return Extraction(folder, self.where(name))

    @contextmanager
    def lock(self, name: str) -> Iterator[Lost]:
        """Keep other writers of one name out; the lock of a process that died is taken over.

        Yields
        ------
        Lost
            Whether another process has taken the lock over, as one does where a process stood still for long.

        Raises
        ------
        StoreError
            Where another process holds it; the message says which. Where it, or what is written under it, cannot be.
        """
        who = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        lock = self.place / f"{_LOCKS}/{layout.escaped(layout.check_name(name))}"
        try:
            with lock.lock(who) as lost:
                self._locked[name] = lost
                try:
                    self._finish_replacing(name)
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
        """Raise `StoreError` where the lock, if it was taken, was lost: what follows would not be this process's."""
        if name in self._locked and self._locked[name](ask=True):
            raise StoreError(f"{self.where(name)}: stood still for so long that another process took the lock over")

    def begin(self, name: str, header: ExtractionHeader, y: NDArray[np.int64], sample_ids: Names) -> Extraction:
        """Create the extraction ``name``, or open the one begun before from the same things.

        Raises
        ------
        StoreError
            Where an extraction of that name, or of a part of it, was made from something else; the message names what
            differs.
        """
        folder, above = self.folder(name), layout.names_above(name)
        for group in above:
            if _may_be_extraction(self.place / group):
                raise StoreError(f"name {name!r}: {group!r} is an extraction already; choose another name")
        self._finish_replacing(name)
        begun = self.find(name)
        if begun is not None:
            different = differences(begun.header.provenance["inputs"], header.provenance["inputs"])
            if different and begun.committed().any():
                raise StoreError(
                    f"{begun.where} was made from something else ({'; '.join(different)}): choose another name, or "
                    f"remove it with: h2t rm {self.address} {name}"
                )
            if not different:
                return begun
        elif any(True for _ in _names_below(folder)):
            raise StoreError(f"name {name!r}: extractions lie below it already; choose another name")
        self.require_lock(name)
        self._discard(self._staged(name))
        self._discard(folder)  # what a crash left, or a beginning of something else without any row
        for group in above:
            if not (self.place / group / "zarr.json").exists():
                write_group(self.place / group, {}, shared=True)
        return _create(folder, self.where(name), header, y, sample_ids)

    def stage(self, name: str, header: ExtractionHeader, y: NDArray[np.int64], sample_ids: Names) -> Extraction:
        """Begin what will replace the extraction ``name``: the same rows and more after them.

        Whole row blocks that are committed are taken over. Until `replace`, the extraction stays as it is.
        """
        self._finish_replacing(name)
        before, folder = self.open(name), self._staged(name)
        where = f"{self.where(name)} (extended)"
        if _may_be_extraction(folder):
            with suppress(StoreError):
                staged = Extraction(folder, where)
                if not differences(staged.header.provenance["inputs"], header.provenance["inputs"]):
                    return staged
        self._discard(folder)
        staged = _create(folder, where, header, y, sample_ids)
        if at_once := before.find_images_at_once():
            staged.note_images_at_once(at_once)
        whole = before.header.n_samples // header.rows_per_block
        for block in np.flatnonzero(before.committed()[:whole]).tolist():
            staged.take_block(block, before)
        return staged

    def replace(self, name: str) -> Extraction:
        """Put what was staged, which must be complete, in the place of the extraction ``name``."""
        self.require_lock(name)
        self._staged(name).put_in_place_of(self.folder(name), self.place)
        return self.open(name)

    def _staged(self, name: str) -> Place:
        return self.place / f"{_STAGED}{layout.escaped(layout.check_name(name))}"

    def _finish_replacing(self, name: str) -> None:
        """Put what was staged in its place where a crash came amid `replace`."""
        if self._is_between(name):
            self.require_lock(name)
            self._staged(name).put_in_place_of(self.folder(name), self.place)

    def _is_between(self, name: str) -> bool:
        with suppress(StoreError):
            staged = self._staged(name)
            return (
                _kind(self.folder(name)) == "nothing"
                and _kind(staged) == "extraction"
                and Extraction(staged, self.where(name)).complete
            )
        return False

    def remove(self, name: str) -> None:
        """Remove the extraction ``name`` and what it wrote, damaged or not."""
        folder = self.folder(name)
        try:
            self.open(name)
        except DamagedError:
            if any(readable for _, readable in _names_below(folder)):
                raise
        self.require_lock(name)
        self._discard(self._staged(name))
        self._discard(folder)

    def _discard(self, folder: Place) -> None:
        if folder.occupied():
            folder.discard(self.place)


def _create(folder: Place, where: str, header: ExtractionHeader, y: NDArray[np.int64], sample_ids: Names) -> Extraction:
    """Create every array; labels and identifiers are filled, features are left absent."""
    write_group(folder, {})
    write_group(folder / "features", {})
    documents, written = {}, {}
    for path, spec in layout.array_specs(header).items():
        document = layout.array_document(spec)
        documents[path] = layout.document_digest(document)
        written[f"{path}/zarr.json"] = document
    in_threads(
        lambda path: (folder / path).write_whole(written[path], durable=False), list(written), folder.concurrency
    )
    ids_sha256 = layout.ids_digest(sample_ids)
    header = replace(header, labels_sha256=layout.labels_digest(y), ids_sha256=ids_sha256, documents=documents)
    _write_labels(folder, layout.array_specs(header)["y"].chunks[0], y, sample_ids)
    write_group(folder / "features", {"header": header.to_attrs()})
    write_group(folder, header.to_attrs() | header.state())
    return Extraction(folder, where)


def write_group(folder: Place, attributes: Mapping[str, Any], *, shared: bool = False) -> None:
    """Write the zarr.json of a group, which writers of other extractions may do at once where it is ``shared``."""
    (folder / "zarr.json").write_whole(layout.group_document(attributes), shared=shared)


def read_group(folder: Place, where: str) -> dict[str, Any]:
    """The attributes of a group.

    Raises
    ------
    DamagedError
        Where the zarr.json is not, byte for byte, as `write_group` made it.
    """
    try:
        content = (folder / "zarr.json").read()
    except OSError as error:
        raise DamagedError(f"{where}: its zarr.json cannot be read: {error.strerror or error}") from error
    try:
        attributes = json.loads(content)["attributes"]
        if layout.group_document(attributes) == content:
            return dict(attributes)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DamagedError(f"{where}: its zarr.json was changed or damaged")


def _holds_arrays(folder: Place) -> bool:
    """Whether there are arrays of an extraction in a folder, whatever became of its zarr.json."""
    flags = folder / "committed"
    return flags.occupied() and _kind(flags) in ("array", "unreadable", "nothing")


def _may_be_extraction(folder: Place) -> bool:
    """Whether an extraction lies there, or something whose metadata cannot be read."""
    return _kind(folder) in ("extraction", "unreadable")


def _kind(folder: Place) -> Literal["extraction", "unreadable", "group", "array", "nothing"]:
    """What lies in a folder, as far as its zarr.json tells; it need not be sound."""
    try:
        content = (folder / "zarr.json").read()
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except OSError:
        return "unreadable"
    try:
        document = json.loads(content)
        if document["node_type"] == "array":
            return "array"
        return "extraction" if {*document["attributes"]} - {"header"} else "group"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "unreadable"


def _names_below(folder: Place, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(name, whether its metadata can be read) of every extraction, and of what may be one, below a folder."""
    for child in folder.folders():
        if child.name.startswith(".") or (kind := _kind(child)) in ("nothing", "array"):
            continue
        below = () if kind == "extraction" else _names_below(child, f"{prefix}{child.name}/")
        if kind != "group":
            yield prefix + child.name, kind == "extraction"
        yield from (found for found in below if kind == "group" or found[1])


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
