"""One extraction: its attributes, labels and row blocks, read, written and committed.

A row block counts once its record in ``checksums`` covers all its rows and its flag in ``committed`` is set; both are
written after its chunks. An extension that adds rows to a block replaces its chunks one by one, then its record. Until
then the old record tells whether the first rows of a chunk are right, in either version of the chunk.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DamagedError, DataError, StoreError, UnreachableError
from h2t_store.storage import chunks, layout
from h2t_store.storage.layout import ArraySpec, ExtractionHeader, Layer, State
from h2t_store.storage.places import Place
from h2t_store.storage.threads import in_threads

Names = Sequence[str] | NDArray[Any]

COMMITTED = chunks.framed(np.ones(1, np.uint8))
_AT_ONCE = "committed/images_at_once"
_CACHED_BLOCKS = 4096


class Record(NamedTuple):
    """How many rows of a row block are stored, and the crc of each of its chunks."""

    rows: int
    crcs: NDArray[np.uint32]


class Extraction:
    """One extraction in a store; ``where`` names it in messages, ``header`` is given if it is not written yet.

    It is ``complete`` once every row block is committed; then ``n_failed`` says how many samples were skipped.
    """

    def __init__(self, folder: Place, where: str, header: ExtractionHeader | None = None) -> None:
        self.folder, self.where, state = folder, where, State()
        if header is None:
            header, state = ExtractionHeader.from_attrs(read_group(folder, where), where)
        self.header = header
        self.complete, self.n_failed, self.images_at_once = state
        self._sound: set[str] = set()
        self.record = lru_cache(_CACHED_BLOCKS)(self.read_record)

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """Every array by its path."""
        return layout.array_specs(self.header)

    @cached_property
    def block_chunks(self) -> list[tuple[str, int]]:
        """(array, column) of every chunk of a row block, in the order of its record."""
        layers = [(layout.feature_path(layer), i) for layer in self.header.layers for i in range(layer.n_chunks)]
        return [*layers, ("layer_norms", 0), ("digests", 0), ("failures", 0)]

    @cached_property
    def _positions(self) -> dict[tuple[str, int], int]:
        return {chunk: position for position, chunk in enumerate(self.block_chunks)}

    @property
    def provenance(self) -> dict[str, Any]:
        """As in the header, with ``batch_size_used``: the smallest batch, if memory did not suffice for more."""
        environment = self.header.provenance["environment"]
        asked = environment.get("arguments", {}).get("batch_size")
        used = {} if asked is None else {"batch_size_used": self.images_at_once or asked}
        return self.header.provenance | {"environment": environment | used}

    def find_images_at_once(self) -> int | None:
        """The smallest batch that any process had to go on with."""
        noted = [int(path) for path, _ in (self.folder / _AT_ONCE).files() if path.isdecimal()]
        return min(filter(None, [self.images_at_once, *noted]), default=None)

    def note_images_at_once(self, images: int) -> None:
        """Note that batches are this small from here on; several processes may do so."""
        (self.folder / f"{_AT_ONCE}/{images}").write_whole(b"")

    def write_attributes(self, *, complete: bool) -> None:
        """Write the header and the state."""
        self.complete = complete
        state = State(complete, self.n_failed if complete else 0, self.images_at_once)
        write_group(self.folder, self.header.to_attrs(state))

    def check_metadata(self, path: str) -> None:
        """Raise `DamagedError` unless the zarr.json of an array is as it was created."""
        if path in self._sound:
            return
        if content_of(self.folder / f"{path}/zarr.json") != layout.array_document(self.specs[path]):
            raise DamagedError(f"{self.where}: the zarr.json of {path!r} is missing, changed or damaged")
        self._sound.add(path)

    def write_documents(self) -> None:
        """Write the zarr.json of every array, and of their group, that is not as it should be."""
        documents = {path: layout.array_document(spec) for path, spec in self.specs.items()}
        documents["features"] = layout.group_document({})

        def write(path: str) -> None:
            file = self.folder / f"{path}/zarr.json"
            if content_of(file) != documents[path]:
                file.write_whole(documents[path], durable=False)

        in_threads(write, list(documents), self.folder.concurrency)

    def chunk_file(self, path: str, block: int, column: int = 0) -> Place:
        """File of a chunk."""
        return self.folder / chunk_path(self.specs[path], path, block, column)

    def read(self, path: str, block: int, column: int = 0, crc: int | None = None) -> Any:
        """One whole chunk: an array that is valid until this thread reads the next one, or a list of strings."""
        spec, file = self.specs[path], self.chunk_file(path, block, column)
        where = f"{self.where}: chunk {chunk_path(spec, path, block, column)}"
        if spec.dtype == "string":
            return chunks.read_strings(file, where, spec, crc)
        return chunks.read_chunk(file, where, spec, column, crc)

    def read_record(self, block: int) -> Record:
        """The record of a row block, found to be this block's."""
        found = self.read("checksums", block)[0].copy()
        record = Record(int(found[1]), found[2:])
        where = f"{self.where}: chunk checksums/c/{block}/0"
        if (found != layout.seal(self.header, block, *record)).any():
            raise DamagedError(f"{where} is damaged: it belongs elsewhere")
        if record.rows != self.rows_of(block) and block != self._growing:
            raise DamagedError(f"{where} is damaged: it is of {record.rows} rows, not {self.rows_of(block)}")
        return record

    def read_recorded(self, block: int, path: str, column: int = 0) -> Any:
        """A chunk of a row block, as its record says; if an extension replaced the chunk, only the first rows are."""
        spec, record = self.specs[path], self.record(block)
        crc = int(record.crcs[self._positions[path, column]])
        try:
            return self.read(path, block, column, crc)
        except DamagedError:
            if record.rows == self.header.rows_per_block:
                raise
            found = self.read(path, block, column)
            if chunks.checksum(chunks.encoded(found[: record.rows], spec)) != crc:
                raise
            return found

    def features(self, layer: Layer, block: int, column: int) -> NDArray[Any]:
        """One chunk (rows_per_block, chunk_width) of a layer, rows and columns beyond the last filled with NaN.

        Valid until this thread reads the next chunk.
        """
        path = layout.feature_path(layer)
        self.check_metadata(path)
        values: NDArray[Any] = self.read_recorded(block, path, column)
        return values

    def _all_rows(self, path: str) -> NDArray[Any]:
        blocks = range(layout.n_blocks(self.header))
        parts = in_threads(lambda block: self.read_recorded(block, path).copy(), blocks, self.folder.concurrency)
        return np.concatenate(parts)[: self.header.n_samples]

    def layer_norms(self) -> NDArray[np.float32]:
        """Euclidean norms (n_samples, n_layers) of each layer's part of each row."""
        return self._all_rows("layer_norms")

    def digests(self) -> NDArray[np.uint8]:
        """Digests (n_samples, 16) of the picture of each row; zeros for samples that were skipped."""
        return self._all_rows("digests")

    @cached_property
    def _crc_without_failures(self) -> int:
        return chunks.checksum(chunks.encoded([], self.specs["failures"]))

    def has_failures(self, block: int) -> bool:
        """Whether a sample of a row block was skipped: then a chunk says why."""
        return int(self.record(block).crcs[-1]) != self._crc_without_failures

    def recorded_chunks(self, block: int) -> list[tuple[str, int]]:
        """(array, column) of every chunk that a row block has."""
        return self.block_chunks if self.has_failures(block) else self.block_chunks[:-1]

    def reasons(self, block: int) -> list[str]:
        """Why the samples of a row block were skipped, empty for others."""
        empty = [""] * self.header.rows_per_block
        reasons: list[str] = self.read_recorded(block, "failures") if self.has_failures(block) else empty
        return reasons

    def failures(self) -> dict[int, str]:
        """Why samples were skipped, by their row, once all row blocks are committed."""
        blocks = sorted(self._listed("failures"))
        reasons: dict[int, str] = {}
        for block, strings in zip(blocks, in_threads(self.reasons, blocks, self.folder.concurrency), strict=True):
            first = block * self.header.rows_per_block
            reasons |= {first + i: reason for i, reason in enumerate(strings) if reason}
        if self.complete and len(reasons) != self.n_failed:
            raise DamagedError(f"{self.where}: {len(reasons)} samples were skipped, not {self.n_failed}")
        return reasons

    def may_have_failures(self) -> bool:
        """Whether a sample was skipped in any row block, committed or not."""
        return self.n_failed > 0 or bool(self._listed("failures"))

    def skipped(self) -> list[tuple[str, str]]:
        """(identifier, why) of every sample that was skipped; empty until the extraction is complete."""
        if not self.n_failed:
            return []
        ids = self.sample_ids()
        return [(str(ids[row]), reason) for row, reason in self.failures().items()]

    @property
    def label_chunks(self) -> range:
        """Numbers of the chunks of ``y`` and ``sample_ids``."""
        return range(-(-self.header.n_samples // self.header.label_rows))

    def labels(self) -> NDArray[np.int64]:
        """Labels (n_samples,), -1 where unlabelled."""
        parts = in_threads(lambda i: self.read("y", i).copy(), self.label_chunks, self.folder.concurrency)
        y: NDArray[np.int64] = np.concatenate(parts)[: self.header.n_samples]
        if self.header.with_labels(y, []).labels_sha256 != self.header.labels_sha256:
            raise DamagedError(f"{self.where}: y is damaged: it holds other labels")
        return y

    def sample_ids(self) -> NDArray[Any]:
        """Identifiers (n_samples,) of strings."""
        parts = in_threads(lambda i: self.read("sample_ids", i), self.label_chunks, self.folder.concurrency)
        ids = [sample_id for part in parts for sample_id in part][: self.header.n_samples]
        if self.header.with_labels(np.empty(0, np.int64), ids).ids_sha256 != self.header.ids_sha256:
            raise DamagedError(f"{self.where}: sample_ids is damaged: it holds other identifiers")
        return np.array(ids, dtype=np.dtypes.StringDType())

    def require_labels(self, y: NDArray[np.int64], sample_ids: Names) -> None:
        """Raise `StoreError` unless these are the labels and identifiers of the header."""
        if self.header.with_labels(y, sample_ids) != self.header:
            raise StoreError(f"{self.where}: its labels or sample_ids were others than the data has now")

    def write_labels(self, y: NDArray[np.int64], sample_ids: Names) -> None:
        """Write labels and identifiers, which must be those of the header."""

        def write(i: int) -> None:
            rows = slice(i * self.header.label_rows, (i + 1) * self.header.label_rows)
            for path, values in (("y", y[rows].astype(np.int64)), ("sample_ids", sample_ids[rows])):
                content = chunks.framed(chunks.encoded(values, self.specs[path]))
                self.chunk_file(path, i).write_whole(content)  # durably, since the header that follows is durable

        in_threads(write, self.label_chunks, self.folder.concurrency)

    def rows_of(self, block: int) -> int:
        """How many rows a row block has."""
        return min(self.header.rows_per_block, self.header.n_samples - block * self.header.rows_per_block)

    def _listed(self, path: str) -> set[int]:
        """Row blocks that have a chunk of an array with one chunk each."""
        found = (file for file, _ in (self.folder / f"{path}/c").files() if file.isdecimal())
        return {int(file) for file in found if int(file) < layout.n_blocks(self.header)}

    @property
    def _growing(self) -> int:
        """The row block that an unfinished extension adds rows to; -1 if there is none."""
        rows = self.header.segments[-1] if self.header.segments else 0
        return -1 if self.complete or rows % self.header.rows_per_block == 0 else rows // self.header.rows_per_block

    def holds_rows(self) -> bool:
        """Whether any row is stored."""
        return bool(self._listed("committed"))

    def committed(self) -> NDArray[np.bool_]:
        """Which row blocks are stored with all their rows, one flag per block."""
        listed = self._listed("committed")
        if self._growing in listed and self._recorded_rows(self._growing) < self.rows_of(self._growing):
            listed.remove(self._growing)
        flags = np.zeros(layout.n_blocks(self.header), dtype=bool)
        flags[list(listed)] = True
        return flags

    def _recorded_rows(self, block: int) -> int:
        with suppress(DamagedError):
            return self.read_record(block).rows
        return 0

    def known_rows(self, block: int) -> int:
        """How many first rows of a row block are stored and sound, while an extension adds rows to it."""
        rows = self._recorded_rows(block) if block == self._growing else 0
        if not 0 < rows < self.rows_of(block):
            return 0
        with suppress(DamagedError):
            for chunk in self.recorded_chunks(block):
                self.read_recorded(block, *chunk)
            return rows
        return 0

    def write_block(
        self,
        block: int,
        features: Sequence[NDArray[Any]],
        norms: NDArray[np.float32],
        digests: NDArray[np.uint8],
        failures: Mapping[int, str] | None = None,
        *,
        known: int = 0,
    ) -> None:
        """Write the rows of one row block, after the first ``known`` that are stored already, then commit it.

        Parameters
        ----------
        block : int
        features : sequence of ndarray of shape (rows, width)
            One for each layer, in the order of the header and the dtype of the store.
        norms : ndarray of shape (rows, n_layers), float32
        digests : ndarray of shape (rows, 16), uint8
            Zeros for samples that were skipped.
        failures : dict of int to str, optional
            Why rows, counted from the first of these, were skipped.
        known : int
            See `known_rows`.
        """
        jobs: list[tuple[str, int, NDArray[Any]]] = []
        paths = [*map(layout.feature_path, self.header.layers), "layer_norms", "digests"]
        for path, values in zip(paths, [*features, norms, digests], strict=True):
            width, chunk_width = (self.specs[path].shard or self.specs[path].chunks)[1], self.specs[path].chunks[1]
            starts = range(0, values.shape[1], width)
            jobs += [(path, start // chunk_width, values[:, start : start + width]) for start in starts]

        def write(job: tuple[str, int, NDArray[Any]]) -> list[int]:
            path, column, values = job
            spec = self.specs[path]
            if known:
                columns = range(column, column + (spec.shard or spec.chunks)[1] // spec.chunks[1])
                before = np.hstack([self.read_recorded(block, path, i)[:known].copy() for i in columns])
                values = np.concatenate([before[:, : values.shape[1]], values])
            return chunks.write_chunk(self.chunk_file(path, block, column), values, spec)

        reasons = self.reasons(block)[:known] if known else []
        reasons += [(failures or {}).get(i, "") for i in range(len(norms))]
        crcs = [crc for written in in_threads(write, jobs, self.folder.concurrency) for crc in written]
        strings = chunks.encoded(reasons, self.specs["failures"])
        if any(reasons):  # whole at once: verify reads it, committed or not
            self.chunk_file("failures", block).write_whole(chunks.framed(strings), durable=False)
        else:  # an interrupted attempt may have skipped an image that could be read now
            self.chunk_file("failures", block).remove()
        crcs.append(chunks.checksum(strings))
        record = layout.seal(self.header, block, known + len(norms), np.array(crcs, dtype=np.uint32))
        chunks.write_chunk(self.chunk_file("checksums", block), record[None], self.specs["checksums"])
        self.record.cache_clear()
        self.chunk_file("committed", block).write_whole(COMMITTED, durable=False)

    def finish(self) -> None:
        """Mark the extraction complete; every block must be committed, and some sample not skipped."""
        missing = int((~self.committed()).sum())
        if missing:
            raise StoreError(f"{self.where}: {missing} row blocks are not committed")
        failures = self.failures()
        if len(failures) == self.header.n_samples:
            first = next(iter(failures.values()))
            remedy = f"(to start anew: h2t rm {self.where.replace(': ', ' ')})"
            raise DataError(f"{self.where}: no image could be read; the first: {first} {remedy}")
        self.n_failed, self.images_at_once = len(failures), self.find_images_at_once()
        self.write_attributes(complete=True)

    def reopen(self, blocks: Iterable[int]) -> None:
        """Take the commitment of row blocks back, so that they are computed again."""
        self.write_attributes(complete=False)
        for block in blocks:
            self.chunk_file("committed", block).remove()

    def extend(self, header: ExtractionHeader, y: NDArray[np.int64], sample_ids: Names) -> "Extraction":
        """This extraction, unfinished again, with more rows; what is stored stays (see `FeatureStore.extend`)."""
        n, header = self.header.n_samples, header.extending(self.header, y, sample_ids)
        if header.recipe_digest != self.header.recipe_digest or n >= header.n_samples:
            raise StoreError(f"{self.where}: it can only be extended by rows that are made in the same way")
        self.require_labels(y[:n], sample_ids[:n])
        longer = Extraction(self.folder, self.where, header)
        longer.images_at_once = self.images_at_once
        longer.write_labels(y, sample_ids)  # whose first rows are those of the old header
        for block in longer._listed("committed") - self._listed("committed"):  # of an extension that was given up
            self.chunk_file("committed", block).remove()
        longer.write_attributes(complete=False)
        longer.write_documents()
        return longer

    def roll_back(self) -> None:
        """Give up an unfinished extension: the extraction is unfinished with the rows that it had before."""
        header = self.header.before_extension(self.labels(), self.sample_ids())
        if self._growing >= 0 and self.committed()[self._growing]:  # with rows of the extension
            self.chunk_file("committed", self._growing).remove()
        Extraction(self.folder, self.where, header).write_attributes(complete=False)

    def stored_bytes(self) -> int:
        """Bytes of its files."""
        return sum(size for _, size in self.folder.files())


def chunk_path(spec: ArraySpec, path: str, block: int, column: int = 0) -> str:
    """Where a chunk of an array lies below its extraction."""
    at = [block, 0 if spec.shard else column][: len(spec.shape)]
    return f"{path}/c/{'/'.join(map(str, at))}"


def content_of(file: Place) -> bytes | None:
    """The content of a small file; None if it cannot be read."""
    try:
        return file.read()
    except OSError:
        return None


def write_group(folder: Place, attributes: Mapping[str, Any]) -> None:
    """Write the zarr.json of a group."""
    (folder / "zarr.json").write_whole(layout.group_document(attributes))


def read_group(folder: Place, where: str) -> dict[str, Any]:
    """The attributes of a group; raises `DamagedError` unless its zarr.json is, byte for byte, as it was written."""
    try:
        content = (folder / "zarr.json").read()
        attributes = json.loads(content)["attributes"]
        if layout.group_document(attributes) == content:
            return dict(attributes)
    except OSError as error:
        raise DamagedError(f"{where}: its zarr.json cannot be read: {error.strerror or error}") from error
    except UnreachableError:  # a ValueError, too
        raise
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DamagedError(f"{where}: its zarr.json was changed or damaged")
