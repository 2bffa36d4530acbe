"""Is every byte of an extraction what was written? Reads all of it and names each file that is not.

Metadata that follows from the header is written again by `restore_documents`; row blocks have to be computed again.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from h2t_store.errors import DamagedError, StoreError
from h2t_store.storage import chunks, layout
from h2t_store.storage.extraction import COMMITTED, Extraction, chunk_path, content_of, write_group
from h2t_store.storage.store import FeatureStore
from h2t_store.storage.threads import in_threads


class Damage(NamedTuple):
    """One file that is not as it was written; ``path`` is relative to the store.

    ``kind`` is part of a row block, labels or identifiers, metadata that follows from the header, or the header;
    ``block`` is the row block, -1 for other kinds.
    """

    path: str
    problem: str
    kind: Literal["block", "labels", "document", "header"]
    block: int = -1


def verify(
    store: FeatureStore, name: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Damage]:
    """Read everything that an extraction consists of and yield what is damaged, missing or changed.

    Row blocks that are not committed yet are no damage. ``progress`` is called with (row blocks read, in all). Raises
    `StoreError` if there is no such extraction.
    """
    store.require(name)
    for path, attributes in _groups(name).items():
        if content_of(store.place / path) != layout.group_document(attributes):
            yield Damage(path, "missing, changed or damaged", "document")
    try:
        extraction = store.find(name)
        problem = "missing"
    except DamagedError as error:
        extraction, problem = None, _problem(error)
    if extraction is None:
        yield Damage(f"{name}/zarr.json", problem, "header")
        return
    for path in extraction.specs:
        if problem := _problem_in(extraction.check_metadata, path):
            yield Damage(f"{name}/{path}/zarr.json", problem, "document")
    yield from _damaged_labels(extraction, name)
    total = layout.n_blocks(extraction.header)
    for block in range(total):
        yield from damaged_chunks(extraction, name, block)
        progress(block + 1, total)


def _groups(name: str) -> dict[str, dict[str, int]]:
    """Attributes of the groups that an extraction lies in and has, by the path of their zarr.json."""
    plain: dict[str, dict[str, int]] = {
        f"{group}/zarr.json": {} for group in (*layout.names_above(name), f"{name}/features")
    }
    return {"zarr.json": {"h2t_format": layout.FORMAT}} | plain


def _damaged_labels(extraction: Extraction, name: str) -> Iterator[Damage]:
    for path, read in (("y", extraction.labels), ("sample_ids", extraction.sample_ids)):
        problems = {i: problem for i in extraction.label_chunks if (problem := _problem_in(extraction.read, path, i))}
        if not problems and _problem_in(read):
            problems[0] = f"this or another chunk of {path} holds other values than were written"
        for i, problem in problems.items():
            yield Damage(f"{name}/{path}/c/{i}", problem, "labels")


def damaged_chunks(extraction: Extraction, name: str, block: int) -> list[Damage]:
    """Read a row block, if it is committed, and tell what of it is damaged or missing."""

    def damage(path: str, problem: str, column: int = 0) -> Damage:
        return Damage(f"{name}/{chunk_path(extraction.specs[path], path, block, column)}", problem, "block", block)

    flag = content_of(extraction.chunk_file("committed", block))
    if flag is None:
        return [damage("committed", "missing")] if extraction.complete else []
    found = [] if flag == COMMITTED else [damage("committed", "damaged")]
    try:
        extraction.read_record(block)
        files = extraction.recorded_chunks(block)
        if extraction.chunk_file("failures", block).exists():
            files = extraction.block_chunks
    except DamagedError as error:
        return [*found, damage("checksums", _problem(error))]

    def check(chunk: tuple[str, int]) -> Damage | None:
        path, column = chunk
        problem, spec = "", extraction.specs[path]
        if spec.shard and column == 0:
            problem = _problem_in(chunks.check_shard, extraction.chunk_file(path, block), "chunk", spec)
        problem = problem or _problem_in(extraction.read_recorded, block, path, column)
        return damage(path, problem, column) if problem else None

    checked = in_threads(check, files, extraction.folder.concurrency)
    return found + [problem for problem in checked if problem]


def _problem_in(read: Callable[..., object], *arguments: Any) -> str:
    """What is damaged in what is read; empty if nothing is."""
    try:
        read(*arguments)
    except DamagedError as error:
        return _problem(error)
    return ""


def _problem(error: StoreError) -> str:
    """What is wrong, without the path that stands beside it."""
    text = str(error).rpartition(": ")[2]
    return text.partition(" is ")[2] if text.startswith("chunk ") else text


def restore_documents(store: FeatureStore, name: str, damages: list[Damage]) -> None:
    """Write the metadata again that `verify` found damaged; raises `StoreError` if the header is, which decides it."""
    if any(damage.kind == "header" for damage in damages):
        again = f"remove it (h2t rm {store.address} {name}) and extract it again"
        raise StoreError(f"{store.where(name)} cannot be repaired: its zarr.json is damaged: {again}")
    groups = _groups(name)
    for path in {damage.path for damage in damages} & {*groups}:
        folder = path.rpartition("/")[0]
        write_group(store.place / folder if folder else store.place, groups[path])
    if any(damage.kind == "document" for damage in damages):
        store.open(name).write_documents()
