"""Is every byte of an extraction what was written? Each chunk, each document, each thing that should be there.

Damage is found by reading all of it, and told by name. What can be derived from the rest (documents, attributes) is put
back by `restore_documents`; row blocks have to be computed again.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple

from h2t_store.errors import DamagedError, StoreError
from h2t_store.storage import chunks, layout
from h2t_store.storage.layout import ExtractionHeader
from h2t_store.storage.places import Place
from h2t_store.storage.store import Extraction, FeatureStore, chunk_path, read_group, write_group
from h2t_store.storage.threads import in_threads

__all__ = ["Damage", "damaged_chunks", "restore_documents", "verify"]

Kind = Literal["block", "labels", "array", "group", "header"]


class Damage(NamedTuple):
    """One thing that is not as it was written.

    Attributes
    ----------
    path : str
        File, relative to the store.
    problem : str
        What is wrong with it.
    kind : {"block", "labels", "array", "group", "header"}
        Part of a row block; labels or identifiers; the metadata of an array or of a group; the attributes that say what
        the extraction is, which have a copy.
    block : int
        The row block; -1 elsewhere.
    """

    path: str
    problem: str
    kind: Kind
    block: int = -1


def verify(
    store: FeatureStore, name: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Damage]:
    """Read everything that an extraction consists of and tell what is damaged, missing or changed.

    Parameters
    ----------
    store : FeatureStore
        The store, sound or not.
    name : str
        The extraction in it.
    progress : callable
        Called with (row blocks read, row blocks in all).

    Yields
    ------
    Damage
        Row blocks that are not committed yet are no damage.

    Raises
    ------
    StoreError
        Where there is no such extraction.
    """
    store.require(name)
    folder = store.found_at(name)
    yield from _damaged_groups(store, name)
    try:
        extraction = Extraction(folder, store.where(name))
    except StoreError as error:
        copy = _copied_header(folder)
        if copy is None and not isinstance(error, DamagedError):
            raise  # of another version
        yield Damage(f"{name}/zarr.json", _problem(error), "header")
        if copy is None:
            yield Damage(f"{name}/features/zarr.json", "the copy of the attributes is damaged, too", "header")
            return
        extraction = Extraction(folder, store.where(name), copy)
    else:
        expected = layout.group_document({"header": extraction.header.to_attrs()})
        if _content(folder / "features/zarr.json") != expected:
            yield Damage(f"{name}/features/zarr.json", "missing, changed or damaged", "group")
    for path in extraction.specs:
        try:
            extraction.check_metadata(path)
        except DamagedError as error:
            yield Damage(f"{name}/{path}/zarr.json", _problem(error), "array")
    yield from _damaged_labels(extraction, name)
    total = layout.n_blocks(extraction.header)
    for block in range(total):
        yield from damaged_chunks(extraction, name, block)
        progress(block + 1, total)


def _damaged_groups(store: FeatureStore, name: str) -> Iterator[Damage]:
    if _content(store.place / "zarr.json") != layout.group_document({"h2t_format": layout.FORMAT}):
        yield Damage("zarr.json", "missing, changed or damaged", "group")
    for above in layout.names_above(name):
        if _content(store.place / above / "zarr.json") != layout.group_document({}):
            yield Damage(f"{above}/zarr.json", "missing, changed or damaged", "group")


def _copied_header(folder: Place) -> ExtractionHeader | None:
    with suppress(StoreError, KeyError, TypeError, AttributeError):
        return ExtractionHeader.from_attrs(read_group(folder / "features", "")["header"], "")
    return None


def _damaged_labels(extraction: Extraction, name: str) -> Iterator[Damage]:
    for path, read in (("y", extraction.labels), ("sample_ids", extraction.sample_ids)):
        spec, damaged = extraction.specs[path], False
        for i in range(-(-spec.shape[0] // spec.chunks[0])):
            try:
                chunks.read_bytes(extraction.chunk_file(path, i), "")
            except DamagedError as error:
                damaged = True
                yield Damage(f"{name}/{path}/c/{i}", _problem(error), "labels")
        try:
            if not damaged:
                read()
        except DamagedError:
            yield Damage(f"{name}/{path}/c", "it holds other values than were written", "labels")


def damaged_chunks(extraction: Extraction, name: str, block: int) -> Iterator[Damage]:
    """Read a row block, if it is committed, and tell what of it is damaged or missing."""
    flag = extraction.chunk_file("committed", block)
    if not flag.exists():
        if extraction.complete:
            yield Damage(f"{name}/committed/c/{block}", "missing", "block", block)
        return
    try:
        if chunks.read_chunk(flag, "", "uint8", (1,))[0] != 1:
            yield Damage(f"{name}/committed/c/{block}", "damaged: it holds another value", "block", block)
    except DamagedError as error:
        yield Damage(f"{name}/committed/c/{block}", _problem(error), "block", block)
    failures, crcs = extraction.chunk_file("failures", block).exists(), None
    try:
        record = extraction.read_record(block)
        failures, crcs = failures or extraction.tells_failures(record), record[1:].tolist()
    except DamagedError as error:
        yield Damage(f"{name}/checksums/c/{block}/0", _problem(error), "block", block)
    files = extraction.block_chunks(block, failures=failures)

    def check(i: int) -> Damage | None:
        (path, index), crc = files[i], None if crcs is None else crcs[i]
        spec, file = extraction.specs[path], extraction.chunk_file(path, *index)
        try:
            if spec.dtype == "string":
                chunks.read_bytes(file, "", crc)
            else:
                chunks.read_chunk(file, "", spec.dtype, spec.chunks, crc)
        except DamagedError as error:
            return Damage(f"{name}/{chunk_path(path, index)}", _problem(error), "block", block)
        return None

    found = in_threads(check, range(len(files)), extraction.folder.concurrency)
    yield from (damage for damage in found if damage)


def _problem(error: StoreError) -> str:
    """What is wrong, without the name that stands beside it."""
    return str(error).rpartition(": ")[2].removeprefix(" is ").strip() or str(error)


def _content(place: Place) -> bytes | None:
    try:
        return place.read()
    except OSError:
        return None


def restore_documents(store: FeatureStore, name: str, damages: list[Damage]) -> None:
    """Write the metadata again that `verify` found damaged.

    Raises
    ------
    StoreError
        Where it cannot be had back: both copies of the attributes are damaged, or another version of zarr wrote the
        metadata of the arrays.
    """
    folder, where = store.folder(name), store.where(name)
    groups = {damage.path for damage in damages if damage.kind in ("group", "header")}
    for path in groups - {f"{name}/zarr.json", f"{name}/features/zarr.json"}:
        attributes = {} if "/" in path else {"h2t_format": layout.FORMAT}
        above = path.rpartition("/")[0]
        write_group(store.place / above if above else store.place, attributes, shared=True)
    header = _copied_header(folder) if f"{name}/zarr.json" in groups else Extraction(folder, where).header
    if header is None:
        raise StoreError(f"{where} cannot be repaired: both copies of its attributes are damaged; extract it again")
    if f"{name}/zarr.json" in groups:
        write_group(folder, header.to_attrs() | header.state())
    if f"{name}/features/zarr.json" in groups:
        write_group(folder / "features", {"header": header.to_attrs()})
    specs = layout.array_specs(header)
    for damage in damages:
        if damage.kind == "array":
            path = damage.path.removeprefix(f"{name}/").removesuffix("/zarr.json")
            document = layout.array_document(specs[path])
            if layout.document_digest(document) != header.documents[path]:
                written = header.provenance["environment"].get("versions", {}).get("zarr")
                raise StoreError(f"{where}: zarr {written} wrote the metadata of {path!r}: repair it with that version")
            (folder / f"{path}/zarr.json").write_whole(document)
