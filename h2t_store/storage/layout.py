"""Store format 1: which groups, arrays and attributes one extraction consists of.

::

    STORE.zarr/                 group; attrs {"h2t_format": 1}
      NAME/                     group; attrs: the header (below), its digest, complete; n_failed and seal once complete
        features/               group; attrs {"header": the header and its digest once more}
        features/TAP            (n, width) float, chunks (rows_per_block, <= 1024), fill_value NaN
        layer_norms             (n, n_layers) float32, chunks (rows_per_block, n_layers), fill_value NaN
        failures                (n,) string, chunks (rows_per_block,): why a sample was skipped; empty where it was not,
                                and no chunk for a row block without any
        checksums               (n_blocks, 3 + chunks per block) uint32, chunks (1, all), see `seal`
        committed               (n_blocks,) uint8, chunks (1,), written last
        y                       (n,) int64; -1 where unlabelled
        sample_ids              (n,) string

Every chunk ends in its crc32c. A crc32c alone cannot tell that a chunk is another one's, so ``checksums`` repeats those
of each row block under a seal over the header's digest and the block's number, and the header holds digests of ``y``,
``sample_ids`` and the zarr.json of every array.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from h2t_store.errors import DamagedError, StoreError

__all__ = [
    "FORMAT",
    "STORAGE_DTYPES",
    "ArraySpec",
    "ExtractionHeader",
    "Layer",
    "array_document",
    "array_specs",
    "check_name",
    "document_digest",
    "escaped",
    "feature_path",
    "group_document",
    "ids_digest",
    "labels_digest",
    "n_blocks",
    "names_above",
    "seal",
]

FORMAT = 1
MAX_CHUNK_COLUMNS = 1024
MAX_LABEL_ROWS = 65536
UNLABELLED = -1
STORAGE_DTYPES = ("float16", "float32")
_NAN = float("nan")  # one object, so that equal specs compare equal
_STATE = ("digest", "complete", "n_failed", "images_at_once", "seal")


class Layer(NamedTuple):
    """The columns of one tap.

    Attributes
    ----------
    name : str
        The tap: a module name, with ``:in`` where it is the module's input.
    start, stop : int
        Its columns are ``start:stop``.
    shape : tuple of int
        Shape of the activation of one image before pooling, channels first.
    target_sizes : tuple of int
        The target sizes that pool this activation to these columns.
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    target_sizes: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start

    @property
    def chunk_width(self) -> int:
        """Columns per chunk: equal parts of at most 1024, because the last chunk is stored whole too."""
        return -(-self.width // self.n_chunks)

    @property
    def n_chunks(self) -> int:
        """Chunks side by side."""
        return -(-self.width // MAX_CHUNK_COLUMNS)


@dataclass(frozen=True)
class ExtractionHeader:
    """What the attributes of one extraction say; a digest over it is stored beside it.

    Attributes
    ----------
    n_samples : int
        Number of rows.
    rows_per_block : int
        Rows that are computed and committed together; the chunk height of every array.
    dtype : str
        ``float16`` or ``float32``, as stored.
    classes : tuple of str or of int
        ``classes[y]`` is the label: a name, or an integer where the data has integers.
    layers : tuple of Layer
        In the order the network computes them.
    provenance : dict
        How the rows were made (see `h2t_store.extracting`).
    segments : tuple of int
        Rows at which the extraction was extended; no batch crosses them, so that rows keep their values.
    labels_sha256, ids_sha256 : str
        Digests of the values of ``y`` and ``sample_ids``.
    documents : dict of str to str
        Digest of the zarr.json of every array, by the array's path.
    """

    n_samples: int
    rows_per_block: int
    dtype: str
    classes: tuple[str | int, ...]
    layers: tuple[Layer, ...]
    provenance: dict[str, Any]
    segments: tuple[int, ...] = ()
    labels_sha256: str = ""
    ids_sha256: str = ""
    documents: dict[str, str] = field(default_factory=dict)

    @property
    def n_features(self) -> int:
        """Number of columns of all layers together."""
        return self.layers[-1].stop

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything the header says."""
        return _digest(self._content())

    def to_attrs(self) -> dict[str, Any]:
        """As JSON-ready attributes, with their digest."""
        return self._content() | {"digest": self.digest}

    def state(self, n_failed: int | None = None, images_at_once: int | None = None) -> dict[str, Any]:
        """Attributes that say whether it is complete, and then how many samples failed, under a seal.

        ``images_at_once`` is there if memory did not suffice for the batch size that was asked for.
        """
        known = {"n_failed": n_failed, "images_at_once": images_at_once}
        found = {key: value for key, value in known.items() if value is not None}
        if not found:
            return {"complete": False}
        return {"complete": n_failed is not None, **found, "seal": _digest({"of": self.digest, **found})}

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "n_samples": self.n_samples,
            "rows_per_block": self.rows_per_block,
            "dtype": self.dtype,
            "classes": list(self.classes),
            "layers": [[*layer[:3], list(layer.shape), list(layer.target_sizes)] for layer in self.layers],
            "provenance": self.provenance,
            "segments": list(self.segments),
            "labels_sha256": self.labels_sha256,
            "ids_sha256": self.ids_sha256,
            "documents": self.documents,
        }

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any], where: str) -> "ExtractionHeader":
        """Parse and check attributes; ``where`` names the extraction in errors."""
        if attrs.get("format") != FORMAT:
            raise StoreError(f"{where}: store format {attrs.get('format')!r}; this version reads format {FORMAT}")
        content = {key: value for key, value in attrs.items() if key not in _STATE}
        if _digest(content) != attrs.get("digest"):
            raise DamagedError(
                f"{where}: the attributes in its zarr.json were changed or damaged: their digest differs"
            )
        try:
            header = cls(
                n_samples=int(attrs["n_samples"]),
                rows_per_block=int(attrs["rows_per_block"]),
                dtype=str(attrs["dtype"]),
                classes=tuple(attrs["classes"]),
                layers=tuple(
                    Layer(name, start, stop, tuple(shape), tuple(sizes))
                    for name, start, stop, shape, sizes in attrs["layers"]
                ),
                provenance={part: dict(attrs["provenance"][part]) for part in ("inputs", "environment")},
                segments=tuple(attrs["segments"]),
                labels_sha256=str(attrs["labels_sha256"]),
                ids_sha256=str(attrs["ids_sha256"]),
                documents=dict(attrs["documents"]),
            )
            _require_sense(header)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise DamagedError(f"{where}: the attributes in its zarr.json are not those of an extraction") from error
        return header


def _require_sense(header: ExtractionHeader) -> None:
    """Raise `ValueError` where a header, though its digest is right, would lead to odd paths, sizes or types."""
    counts = [header.n_samples, header.rows_per_block, *header.segments]
    counts += [n for layer in header.layers for n in (layer.start, layer.stop, *layer.shape, *layer.target_sizes)]
    edges = [0, *(layer.stop for layer in header.layers)]
    names = [layer.name for layer in header.layers]
    sensible = (
        all(type(n) is int for n in counts)
        and header.n_samples > 0
        and header.rows_per_block > 0
        and header.dtype in STORAGE_DTYPES
        and all(type(label) in (str, int) for label in header.classes)
        and all(isinstance(name, str) for name in names)
        and [layer.start for layer in header.layers] == edges[:-1]
        and all(layer.width > 0 for layer in header.layers)
        and not any(name in ("", ".", "..") or "\0" in name for name in names)
        and len({*names}) == len(names) > 0
        and list(header.segments) == sorted(row for row in {*header.segments} if 0 < row < header.n_samples)
        and {*header.documents} == {*array_specs(header)}
    )
    if not sensible:
        raise ValueError("out of range")
    "".join(names).encode()  # what is no Unicode cannot be a path


def _digest(attrs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(attrs, sort_keys=True).encode()).hexdigest()


def document_digest(content: bytes) -> str:
    """Digest of a zarr.json, whose every byte counts."""
    return hashlib.sha256(content).hexdigest()


def labels_digest(y: NDArray[np.int64]) -> str:
    """SHA-256 over labels."""
    return hashlib.sha256(np.ascontiguousarray(y, "<i8").data).hexdigest()


def ids_digest(sample_ids: Iterable[str]) -> str:
    """SHA-256 over identifiers, the length of each before it."""
    sha = hashlib.sha256()
    for sample_id in sample_ids:
        encoded = sample_id.encode()
        sha.update(len(encoded).to_bytes(4, "little") + encoded)
    return sha.hexdigest()


def seal(header: ExtractionHeader, block: int, crcs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The row of ``checksums`` for a row block: a crc32c that binds the rest to this block of this extraction, then the
    crc32c of every feature chunk in column order, of the chunk of ``layer_norms``, and of that of ``failures``."""
    bound = google_crc32c.value(f"{header.digest}/{block}".encode() + crcs.astype("<u4").tobytes())
    return np.concatenate([np.array([bound], dtype=np.uint32), crcs])


def n_blocks(header: ExtractionHeader) -> int:
    """Number of row blocks, the last one possibly short."""
    return -(-header.n_samples // header.rows_per_block)


def escaped(name: str) -> str:
    """A name with slashes as the name of one file; `urllib.parse.unquote` undoes it."""
    return name.replace("%", "%25").replace("/", "%2F")


def feature_path(layer: Layer) -> str:
    """Path of a layer's array below its extraction, the tap's name with ``%`` and ``/`` escaped."""
    name = escaped(layer.name)
    return "features/zarr%2Ejson" if name == "zarr.json" else f"features/{name}"


def check_name(name: str) -> str:
    """Return ``name`` if it can name an extraction (``a`` or ``a/b/…``), else raise `StoreError`."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(not p or p == "zarr.json" or p.startswith((".", "__")) or "\\" in p or not p.isprintable() for p in parts):
        raise StoreError(f"name {name!r}: accepted are words joined by '/', such as 'pets/train'")
    return name


def names_above(name: str) -> list[str]:
    """The groups that the extraction ``name`` lies in: ``a`` and ``a/b`` for ``a/b/c``."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


class ArraySpec(NamedTuple):
    """What the metadata of one array says."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill_value: Any


def array_specs(header: ExtractionHeader) -> dict[str, ArraySpec]:
    """Every array of an extraction by its path."""
    n, rows, n_layers, blocks = header.n_samples, header.rows_per_block, len(header.layers), n_blocks(header)
    n_crcs = 3 + sum(layer.n_chunks for layer in header.layers)
    label_rows = min(n, MAX_LABEL_ROWS)
    specs = {
        feature_path(layer): ArraySpec((n, layer.width), (rows, layer.chunk_width), header.dtype, _NAN)
        for layer in header.layers
    }
    specs["layer_norms"] = ArraySpec((n, n_layers), (rows, n_layers), "float32", _NAN)
    specs["failures"] = ArraySpec((n,), (rows,), "string", "")
    specs["checksums"] = ArraySpec((blocks, n_crcs), (1, n_crcs), "uint32", 0)
    specs["committed"] = ArraySpec((blocks,), (1,), "uint8", 0)
    specs["y"] = ArraySpec((n,), (label_rows,), "int64", UNLABELLED)
    specs["sample_ids"] = ArraySpec((n,), (label_rows,), "string", "")
    return specs


@lru_cache
def array_document(spec: ArraySpec) -> bytes:
    """The zarr.json of an array, as zarr makes it; the layers of a network share few specs, and making one is slow."""
    memory: dict[str, zarr.core.buffer.Buffer] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(memory),
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=spec.dtype,
        fill_value=spec.fill_value,
        compressors=[Crc32cCodec()],
        zarr_format=3,
    )
    return memory["zarr.json"].to_bytes()


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group, the same bytes for the same attributes."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}, indent=1).encode()
