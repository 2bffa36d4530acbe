"""Store format 2: which groups, arrays and attributes an extraction consists of.

::

    STORE.zarr/          group; attributes {"h2t_format": 2}
      NAME/              group; attributes: the header with its digest, then the state with its seal
        features/        group
        features/TAP     (n, width) float16 or float32, chunks (rows_per_block, <= 1024), NaN where nothing is stored;
                         may be compressed, and the chunks of a row block may share a file (a shard)
        layer_norms      (n, n_layers) float32, chunks (rows_per_block, n_layers)
        digests          (n, 16) uint8, chunks (rows_per_block, 16): of each row's picture; zeros if it was skipped
        failures         (n,) string, chunks (rows_per_block,): why a sample was skipped; no chunk if none was
        checksums        (n_blocks, 5 + chunks of a block) uint32, a chunk per row block: its record, see `seal`
        committed        (n_blocks,) uint8, chunks (1,); written last
        y                (n,) int64, chunks (label_rows,); -1 if unlabelled
        sample_ids       (n,) string, chunks (label_rows,)

Every chunk ends in its crc32c. A record repeats the crcs of its row block and binds them to that block of that
extraction. The binding does not change when rows are appended, so full row blocks stay as they are. The header holds
digests of ``y`` and ``sample_ids``; every other zarr.json follows from the header byte by byte.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DamagedError, StoreError

FORMAT = 2
MAX_CHUNK_COLUMNS = 1024
MIN_LABEL_ROWS, MAX_LABEL_ROWS = 1024, 65536
DIGEST_BYTES = 16
UNLABELLED = -1
_NAN = float("nan")  # one object, so that equal specs compare equal


class Layer(NamedTuple):
    """The columns ``start:stop`` of one tap; ``name`` is a module, with ``:in`` if the tap is the module's input.

    ``shape`` is that of the activation of one image before pooling, channels first, and ``target_sizes`` are those that
    pool it to these columns.
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


class State(NamedTuple):
    """How far an extraction is; ``images_at_once`` is the batch that memory sufficed for, if smaller than asked for."""

    complete: bool = False
    n_failed: int = 0
    images_at_once: int | None = None


@dataclass(frozen=True)
class ExtractionHeader:
    """What an extraction is.

    Attributes
    ----------
    rows_per_block : int
        Rows that are computed and committed together; the chunk height of every array of rows.
    classes : tuple of str or of int
        ``classes[y]`` is the label.
    provenance : dict
        ``inputs``, which determine the rows, and the ``environment`` (see `h2t_store.extracting`).
    segments : tuple of int
        Rows at which the extraction was extended; no batch crosses them, so that rows keep their values.
    codec, shards : str, bool
        How chunks of features are compressed (see `codec_documents`), and whether those of a row block share a file.
    name, label_rows, origins, labels_sha256, ids_sha256
        Set by the store: its name; chunk height of labels; ``inputs["data"]`` of the beginning and of each extension;
        digests of ``y`` and ``sample_ids``.
    """

    n_samples: int
    rows_per_block: int
    dtype: str
    classes: tuple[str | int, ...]
    layers: tuple[Layer, ...]
    provenance: dict[str, Any]
    segments: tuple[int, ...] = ()
    codec: str = "none"
    shards: bool = False
    name: str = ""
    label_rows: int = MIN_LABEL_ROWS
    origins: tuple[Any, ...] = ()
    labels_sha256: str = ""
    ids_sha256: str = ""

    @property
    def n_features(self) -> int:
        """Number of columns of all layers together."""
        return self.layers[-1].stop

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything the header says."""
        return _digest(self._content())

    @cached_property
    def recipe_digest(self) -> str:
        """SHA-256 over the name and how rows are made and stored, which appending and relabelling do not change."""
        content = self._content()
        made = {key: value for key, value in self.provenance["inputs"].items() if key != "data"}
        kept = ("name", "rows_per_block", "dtype", "layers", "codec", "shards")
        return _digest({"inputs": made} | {key: content[key] for key in kept})

    def begun(self, name: str, y: NDArray[np.int64], sample_ids: Iterable[str]) -> Self:
        """The header of a new extraction."""
        rows = min(max(self.n_samples, MIN_LABEL_ROWS), MAX_LABEL_ROWS)
        data = self.provenance["inputs"].get("data")
        return replace(self, name=name, label_rows=rows, origins=(data,)).with_labels(y, sample_ids)

    def extending(self, old: Self, y: NDArray[np.int64], sample_ids: Iterable[str]) -> Self:
        """This header as that of an extraction that was ``old`` before."""
        origins, segments = (*old.origins, self.provenance["inputs"].get("data")), (*old.segments, old.n_samples)
        extended = replace(self, name=old.name, label_rows=old.label_rows, origins=origins, segments=segments)
        return extended.with_labels(y, sample_ids)

    def before_extension(self, y: NDArray[np.int64], sample_ids: NDArray[Any]) -> Self:
        """What the header was before the last extension."""
        n, inputs = self.segments[-1], self.provenance["inputs"] | {"data": self.origins[-2]}
        before = replace(self, n_samples=n, segments=self.segments[:-1], origins=self.origins[:-1])
        return replace(before, provenance=self.provenance | {"inputs": inputs}).with_labels(y[:n], sample_ids[:n])

    def with_labels(self, y: NDArray[np.int64], sample_ids: Iterable[str]) -> Self:
        """The header with the digests of these labels and identifiers."""
        labels = hashlib.sha256(np.ascontiguousarray(y, "<i8").data).hexdigest()
        ids = hashlib.sha256()
        for sample_id in sample_ids:
            encoded = sample_id.encode()
            ids.update(len(encoded).to_bytes(4, "little") + encoded)
        return replace(self, labels_sha256=labels, ids_sha256=ids.hexdigest())

    def _content(self) -> dict[str, Any]:
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        content["layers"] = [[*layer[:3], list(layer.shape), list(layer.target_sizes)] for layer in self.layers]
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}
        return {"format": FORMAT} | plain

    def to_attrs(self, state: State) -> dict[str, Any]:
        """JSON-ready attributes: the header with its digest, the state with a seal over both."""
        known = state._asdict()
        return self._content() | {"digest": self.digest} | known | {"seal": _digest({"of": self.digest} | known)}

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any], where: str) -> tuple[Self, State]:
        """Parse and check attributes; ``where`` names the extraction in errors."""
        require_format(attrs.get("format", FORMAT), where)
        try:
            known = {each.name: attrs[each.name] for each in fields(cls)}
            known |= {key: tuple(attrs[key]) for key in ("classes", "segments", "origins")}
            layers = [Layer(*layer[:3], *map(tuple, layer[3:])) for layer in attrs["layers"]]
            header, state = cls(**known | {"layers": tuple(layers)}), State(*(attrs[key] for key in State._fields))
            if header.to_attrs(state) == attrs:
                return header, state
        except (KeyError, TypeError, ValueError):
            pass
        raise DamagedError(f"{where}: the attributes in its zarr.json were changed or damaged")


def require_format(found: object, where: str) -> None:
    """Raise `StoreError` unless this version reads that store format."""
    if found != FORMAT:
        raise StoreError(f"{where}: store format {found!r}; this version reads format {FORMAT}: extract again")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(header: ExtractionHeader, block: int, rows: int, crcs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The record of a row block: a crc32c over its binding and what follows, how many rows are stored, and the crcs.

    ``crcs`` are those of the chunks of features in column order, of ``layer_norms``, ``digests`` and ``failures``. The
    binding says what the rows are and how they are made: the recipe, the block, and the data of the beginning and of
    the extensions up to these rows.
    """
    stop = block * header.rows_per_block + rows
    origins = header.origins[: 1 + sum(row < stop for row in header.segments)]
    binding = _digest({"recipe": header.recipe_digest, "origins": origins, "block": block})
    record = np.array([0, rows, *crcs], dtype=np.uint32)
    record[0] = google_crc32c.value(binding.encode() + record[1:].tobytes())
    return record


def n_blocks(header: ExtractionHeader) -> int:
    """Number of row blocks, the last one possibly short."""
    return -(-header.n_samples // header.rows_per_block)


def escaped(name: str) -> str:
    """A name with slashes as the name of one file."""
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
    """What the metadata of one array says; ``shard`` is the shape of a file if it holds several chunks."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill_value: Any
    codec: str = "none"
    shard: tuple[int, ...] | None = None


def array_specs(header: ExtractionHeader) -> dict[str, ArraySpec]:
    """Every array of an extraction by its path."""
    n, rows, n_layers, blocks = header.n_samples, header.rows_per_block, len(header.layers), n_blocks(header)
    n_crcs = 5 + sum(layer.n_chunks for layer in header.layers)
    specs = {}
    for layer in header.layers:
        shape, chunks, shard = (n, layer.width), (rows, layer.chunk_width), (rows, layer.chunk_width * layer.n_chunks)
        storage = (header.codec, shard if header.shards and layer.n_chunks > 1 else None)
        specs[feature_path(layer)] = ArraySpec(shape, chunks, header.dtype, _NAN, *storage)
    specs["layer_norms"] = ArraySpec((n, n_layers), (rows, n_layers), "float32", _NAN)
    specs["digests"] = ArraySpec((n, DIGEST_BYTES), (rows, DIGEST_BYTES), "uint8", 0)
    specs["failures"] = ArraySpec((n,), (rows,), "string", "")
    specs["checksums"] = ArraySpec((blocks, n_crcs), (1, n_crcs), "uint32", 0)
    specs["committed"] = ArraySpec((blocks,), (1,), "uint8", 0)
    specs["y"] = ArraySpec((n,), (header.label_rows,), "int64", UNLABELLED)
    specs["sample_ids"] = ArraySpec((n,), (header.label_rows,), "string", "")
    return specs


def codec_documents(dtype: str, codec: str) -> list[dict[str, Any]]:
    """The codecs of a chunk as zarr.json lists them; the last one is its crc32c."""
    crc = {"name": "crc32c"}
    if dtype == "string":
        return [{"name": "vlen-utf8", "configuration": {}}, crc]
    size = np.dtype(dtype).itemsize
    values = {"name": "bytes", "configuration": {"endian": "little"}} if size > 1 else {"name": "bytes"}
    if codec == "zstd":
        return [values, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}, crc]
    if codec == "blosc":
        how = {"typesize": size, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
        return [values, {"name": "blosc", "configuration": how}, crc]
    if codec == "pcodec":
        return [{"name": "numcodecs.pcodec", "configuration": {}}, crc]
    return [values, crc]


def array_document(spec: ArraySpec) -> bytes:
    """The zarr.json of an array, the same bytes whatever version of zarr is installed."""
    codecs = codec_documents(spec.dtype, spec.codec)
    if spec.shard is not None:
        inner = {"chunk_shape": spec.chunks, "codecs": codecs, "index_codecs": codec_documents("uint64", "none")}
        codecs = [{"name": "sharding_indexed", "configuration": inner | {"index_location": "end"}}]
    document = {
        "shape": spec.shape,
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": spec.shard or spec.chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if spec.fill_value is _NAN else spec.fill_value,
        "codecs": codecs,
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(document, indent=2).encode()


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group, the same bytes for the same attributes."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}, indent=1).encode()
