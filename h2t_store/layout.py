"""Store format 1: which groups, arrays and attributes one extraction consists of.

::

    STORE.zarr/                 group; attrs {"h2t_format": 1}
      NAME/                     group; attrs: format, rows_per_block, classes, layers, provenance, digest, complete
        features/TAP            (n, width) float, chunks (rows_per_block, <= 1024), crc32c, fill_value NaN
        layer_norms             (n, n_layers) float32, crc32c, fill_value NaN
        y                       (n,) int64, crc32c; -1 where unlabelled
        sample_ids              (n,) string, crc32c
        committed               (n_blocks,) uint8, chunks (1,), written last
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from h2t_store.errors import StoreError

__all__ = [
    "FORMAT",
    "LOST_LABEL",
    "STORAGE_DTYPES",
    "ExtractionHeader",
    "Layer",
    "array_specs",
    "check_array",
    "check_name",
    "create_arrays",
    "feature_path",
    "n_blocks",
    "read_header",
    "write_header",
]

FORMAT = 1
MAX_CHUNK_COLUMNS = 1024
LOST_LABEL = int(np.iinfo(np.int64).min)
STORAGE_DTYPES = ("float16", "float32")


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
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start

    @property
    def chunk_width(self) -> int:
        """Columns per chunk: equal parts of at most 1024, because the last chunk is stored whole too."""
        parts = -(-self.width // MAX_CHUNK_COLUMNS)
        return -(-self.width // parts)


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
    classes : tuple of str
        ``classes[y]`` is the name of label ``y``.
    layers : tuple of Layer
        In the order the network computes them.
    provenance : dict
        How the rows were made (see `h2t_store.extraction`).
    """

    n_samples: int
    rows_per_block: int
    dtype: str
    classes: tuple[str, ...]
    layers: tuple[Layer, ...]
    provenance: dict[str, Any]

    @property
    def n_features(self) -> int:
        """Number of columns of all layers together."""
        return self.layers[-1].stop

    @property
    def digest(self) -> str:
        """SHA-256 over everything the header says."""
        return _digest(self._content())

    def to_attrs(self) -> dict[str, Any]:
        """As JSON-ready attributes, with their digest."""
        return self._content() | {"digest": self.digest}

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "n_samples": self.n_samples,
            "rows_per_block": self.rows_per_block,
            "dtype": self.dtype,
            "classes": list(self.classes),
            "layers": [[*layer[:3], list(layer.shape)] for layer in self.layers],
            "provenance": self.provenance,
        }

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any], where: str) -> "ExtractionHeader":
        """Parse and check attributes; ``where`` names the extraction in errors."""
        if attrs.get("format") != FORMAT:
            raise StoreError(f"{where}: store format {attrs.get('format')!r}; this version reads format {FORMAT}")
        content = {key: value for key, value in attrs.items() if key not in ("digest", "complete")}
        if _digest(content) != attrs.get("digest"):
            raise StoreError(f"{where}: the attributes in its zarr.json were changed or damaged: their digest differs")
        try:
            header = cls(
                n_samples=int(attrs["n_samples"]),
                rows_per_block=int(attrs["rows_per_block"]),
                dtype=str(np.dtype(attrs["dtype"])),
                classes=tuple(attrs["classes"]),
                layers=tuple(Layer(name, start, stop, tuple(shape)) for name, start, stop, shape in attrs["layers"]),
                provenance={part: dict(attrs["provenance"][part]) for part in ("inputs", "environment")},
            )
            array_specs(header)
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            raise StoreError(f"{where}: the attributes in its zarr.json are not those of an extraction") from error
        return header


def _digest(attrs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(attrs, sort_keys=True).encode()).hexdigest()


def n_blocks(header: ExtractionHeader) -> int:
    """Number of row blocks, the last one possibly short."""
    return -(-header.n_samples // header.rows_per_block)


def feature_path(layer: Layer) -> str:
    """Path of a layer's array below its extraction, the tap's name with ``%`` and ``/`` escaped."""
    name = layer.name.replace("%", "%25").replace("/", "%2F")
    return "features/zarr%2Ejson" if name == "zarr.json" else f"features/{name}"


def check_name(name: str) -> str:
    """Return ``name`` if it can name an extraction (``a`` or ``a/b/…``), else raise `StoreError`."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(not p or p == "zarr.json" or p.startswith((".", "__")) or "\\" in p or not p.isprintable() for p in parts):
        raise StoreError(f"name {name!r}: accepted are words joined by '/', such as 'pets/train'")
    return name


class ArraySpec(NamedTuple):
    """What the metadata of one array must say; ``chunks=None`` leaves the chunks to zarr."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...] | None
    dtype: str
    fill_value: Any


def array_specs(header: ExtractionHeader) -> dict[str, ArraySpec]:
    """Every array of an extraction by its path."""
    n, rows, n_layers = header.n_samples, header.rows_per_block, len(header.layers)
    specs = {
        feature_path(layer): ArraySpec((n, layer.width), (rows, layer.chunk_width), header.dtype, float("nan"))
        for layer in header.layers
    }
    specs["layer_norms"] = ArraySpec((n, n_layers), (rows, n_layers), "float32", float("nan"))
    specs["y"] = ArraySpec((n,), (n,), "int64", LOST_LABEL)
    specs["sample_ids"] = ArraySpec((n,), None, "string", "")
    specs["committed"] = ArraySpec((n_blocks(header),), (1,), "uint8", 0)
    return specs


def create_arrays(group: zarr.Group, header: ExtractionHeader, y: NDArray[np.int64], sample_ids: Sequence[str]) -> None:
    """Create every array of an extraction; labels and identifiers are filled, features are left absent."""
    arrays = {
        path: group.create_array(path, **_creation(spec), config={"write_empty_chunks": True})
        for path, spec in array_specs(header).items()
    }
    arrays["y"][:] = y
    arrays["sample_ids"][:] = np.array(sample_ids, dtype=np.dtypes.StringDType())


def _creation(spec: ArraySpec) -> dict[str, Any]:
    return {
        "shape": spec.shape,
        "chunks": spec.chunks or "auto",
        "dtype": spec.dtype,
        "fill_value": spec.fill_value,
        "compressors": [Crc32cCodec()],
    }


def check_array(array: zarr.Array[Any], spec: ArraySpec, where: str) -> None:
    """Raise `StoreError` unless the array's metadata, which carries no checksum, is as it was created."""
    expected = zarr.create_array({}, **_creation(spec))
    found, wanted = (json.dumps(a.metadata.to_dict(), default=str, sort_keys=True) for a in (array, expected))
    if found != wanted:
        raise StoreError(f"{where}: its zarr.json was changed or damaged")


def write_header(group: zarr.Group, header: ExtractionHeader) -> None:
    """Write the attributes; an extraction exists from this moment on."""
    group.update_attributes(header.to_attrs() | {"complete": False})


def read_header(group: zarr.Group, where: str) -> ExtractionHeader:
    """Read and check the attributes of an extraction."""
    return ExtractionHeader.from_attrs(group.attrs.asdict(), where)
