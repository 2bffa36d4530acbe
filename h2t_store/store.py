"""A store on disk: which extractions it holds, and the one way in which they are begun, filled, finished and removed.

A row block counts from the moment its flag in ``committed`` is written, after every layer of it. An extraction counts
from the moment its attributes are written, after every array was created. So a crash between any two writes leaves
either nothing that counts or something that can be continued.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ContainsGroupError

from h2t_store import layout
from h2t_store.errors import DamagedError, StoreError, did_you_mean
from h2t_store.layout import ExtractionHeader

__all__ = ["Extraction", "FeatureStore"]

_TRASH = ".trash-"


class Extraction:
    """One extraction in a store: its header and its arrays.

    Attributes
    ----------
    where : str
        ``STORE: NAME``, for messages.
    header : ExtractionHeader
        What its attributes say.
    """

    def __init__(self, group: zarr.Group, where: str) -> None:
        self._group = group
        self.where = where
        self.header = layout.read_header(group, where)
        self._specs = layout.array_specs(self.header)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def array(self, path: str) -> zarr.Array[Any]:
        """The array at ``path``, opened once; raises `StoreError` where it is gone or changed."""
        if path not in self._arrays:
            array = _node(self._group, path, self.where)
            if not isinstance(array, zarr.Array):
                raise StoreError(f"{self.where}: array {path!r} is missing")
            layout.check_array(array, self._specs[path], f"{self.where}: {path}")
            self._arrays[path] = array
        return self._arrays[path]

    def read(self, path: str, rows: slice, columns: slice | None = None) -> NDArray[Any]:
        """Part of an array; damage that its checksum shows becomes a `StoreError` with the place."""
        array = self.array(path)
        try:
            return np.asarray(array[rows] if columns is None else array[rows, columns])
        except (ValueError, OSError, RuntimeError) as error:
            raise StoreError(f"{self.where}: {path}, rows {rows.start}:{rows.stop} cannot be read: {error}") from error

    def committed(self) -> NDArray[np.bool_]:
        """Which row blocks are on disk, one flag per block."""
        return self.read("committed", slice(None)).astype(bool)

    def write_block(self, block: int, features: NDArray[Any], norms: NDArray[np.float32]) -> None:
        """Write one row block of every layer, then commit it.

        Parameters
        ----------
        block : int
            Index of the row block.
        features : ndarray of shape (rows, n_features)
            All layers side by side, in the order of the header.
        norms : ndarray of shape (rows, n_layers), float32
            Euclidean norm of each layer's part of each row.
        """
        start = block * self.header.rows_per_block
        rows = slice(start, start + len(features))
        for layer in self.header.layers:
            self.array(layout.feature_path(layer))[rows] = features[:, layer.start : layer.stop]
        self.array("layer_norms")[rows] = norms
        self.array("committed")[block] = 1

    def finish(self) -> None:
        """Mark the extraction complete; every block must be committed."""
        missing = int((~self.committed()).sum())
        if missing:
            raise StoreError(f"{self.where}: {missing} row blocks are not committed")
        self._group.update_attributes({"complete": True})

    @property
    def complete(self) -> bool:
        """Whether every row block was committed."""
        return self._group.attrs.get("complete") is True

    def stored_bytes(self) -> int:
        """Bytes that the chunks on disk take."""
        return sum(self.array(path).nbytes_stored() for path in self._specs)

    def labels(self) -> NDArray[np.int64]:
        """Labels (n_samples,), -1 where unlabelled."""
        y = self.read("y", slice(None))
        if len(y) and y.min() == layout.LOST_LABEL:
            raise StoreError(f"{self.where}: a chunk of y is missing")
        return y

    def sample_ids(self) -> NDArray[Any]:
        """Identifiers (n_samples,) of strings."""
        ids = self.read("sample_ids", slice(None))
        if (ids == "").any():
            raise StoreError(f"{self.where}: a chunk of sample_ids is missing")
        return ids


class FeatureStore:
    """A Zarr group on a local disk that holds extractions by name.

    Parameters
    ----------
    path : path-like
        Folder of the store.
    create : bool
        Make the store where there is none; otherwise that is an error.

    Raises
    ------
    StoreError
        Where ``path`` is not a store, or holds another format.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        if not os.fspath(path) or "://" in os.fspath(path):
            raise StoreError(f"store {str(path)!r}: accepted is the path of a local folder")
        self.path = Path(path)
        if not (self.path / "zarr.json").exists():
            held = [file for file in self.path.iterdir() if file.suffix != ".partial"] if self.path.is_dir() else []
            if self.path.is_file() or held:
                raise StoreError(f"store {str(path)!r} exists and is not a feature store: choose another path")
            if not create:
                raise StoreError(f"store {str(path)!r} does not exist")
            try:
                zarr.create_group(str(self.path), zarr_format=3, attributes={"h2t_format": layout.FORMAT})
            except ContainsGroupError:
                pass  # another process was faster
            except OSError as error:
                raise StoreError(f"store {str(path)!r} cannot be made: {error.strerror or error}") from error
        try:
            self._root = zarr.open_group(str(self.path), mode="r+", zarr_format=3)
            found = self._root.attrs.get("h2t_format")
        except Exception as error:  # zarr raises almost anything on damaged metadata
            raise StoreError(f"store {str(path)!r}: its zarr.json was changed or damaged: {error}") from error
        if found != layout.FORMAT:
            raise StoreError(f"store {str(path)!r}: h2t_format is {found!r}; this version reads {layout.FORMAT}")

    def names(self) -> list[str]:
        """Names of the extractions, finished or not, damaged or not, sorted."""
        return sorted(name for name, _ in _names_below(self.path))

    def _group(self, name: str) -> zarr.Group | None:
        node = _node(self._root, layout.check_name(name), str(self.path))
        return node if isinstance(node, zarr.Group) else None

    def open(self, name: str) -> Extraction:
        """Open the extraction ``name``; raises `StoreError` where there is none."""
        return Extraction(self._require(name), f"{self.path}: {name}")

    def _require(self, name: str) -> zarr.Group:
        group = self._group(name)
        if group is None or "digest" not in group.attrs:
            known = self.names()
            listed = f"it holds {', '.join(known[:8])}{', …' if len(known) > 8 else ''}" if known else "it is empty"
            raise StoreError(
                f"store {str(self.path)!r} has no extraction {name!r}{did_you_mean(name, known)}: {listed}"
            )
        return group

    def begin(self, name: str, header: ExtractionHeader, y: NDArray[np.int64], sample_ids: Sequence[str]) -> Extraction:
        """Create the extraction ``name``, or open the one begun before from the same things.

        Raises
        ------
        StoreError
            Where an extraction of that name, or of a part of it, was made from something else; the message names what
            differs.
        """
        parts = layout.check_name(name).split("/")
        for depth in range(1, len(parts)):
            above = self._group("/".join(parts[:depth]))
            if above is not None and "digest" in above.attrs:
                raise StoreError(
                    f"name {name!r}: {'/'.join(parts[:depth])!r} is an extraction already; choose another name"
                )
        group, folder = self._group(name), self.path / name
        if group is not None and "digest" in group.attrs:
            begun = Extraction(group, f"{self.path}: {name}")
            different = _differences(begun.header.provenance["inputs"], header.provenance["inputs"])
            if different and begun.committed().any():
                raise StoreError(
                    f"{begun.where} was made from something else ({'; '.join(different)}): choose another name, or "
                    f"remove it with: h2t rm {self.path} {name}"
                )
            if not different:
                return begun
        elif any(True for _ in _names_below(folder)):
            raise StoreError(f"name {name!r}: extractions lie below it already; choose another name")
        if folder.exists():
            self._discard(folder)  # what a crash left, or a beginning of something else without any row
        group = self._root.create_group(name)
        layout.create_arrays(group, header, y, sample_ids)
        layout.write_header(group, header)
        return Extraction(group, f"{self.path}: {name}")

    def remove(self, name: str) -> None:
        """Remove the extraction ``name`` and what it wrote, damaged or not."""
        folder = self.path / name
        try:
            self._require(name)
        except DamagedError:
            if any(readable for _, readable in _names_below(folder)):
                raise
        self._discard(folder)

    def _discard(self, folder: Path) -> None:
        """Take a folder away at once, then delete it, with what an interrupted removal left."""
        folder.rename(self.path / f"{_TRASH}{uuid.uuid4().hex}")
        for trash in self.path.glob(f"{_TRASH}*"):
            shutil.rmtree(trash, ignore_errors=True)


def _names_below(folder: Path, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(name, whether its metadata can be read) of every extraction, and of what may be one, below a folder."""
    for child in folder.iterdir() if folder.is_dir() else ():
        metadata = child / "zarr.json"
        if child.name.startswith(".") or not metadata.is_file():
            continue
        try:
            content = json.loads(metadata.read_text())
            is_array, attributes = content["node_type"] == "array", content.get("attributes", {})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            yield prefix + child.name, False
            if child.is_dir():
                yield from (found for found in _names_below(child, f"{prefix}{child.name}/") if found[1])
            continue
        if "digest" in attributes:
            yield prefix + child.name, True
        elif not is_array:
            yield from _names_below(child, f"{prefix}{child.name}/")


def _node(group: zarr.Group, path: str, where: str) -> "zarr.Array[Any] | zarr.Group | None":
    """The array or group at ``path``, None where there is none."""
    try:
        return group[path]
    except KeyError:
        return None
    except Exception as error:  # zarr raises almost anything on damaged metadata
        raise DamagedError(f"{where}: the zarr.json of {path!r} was changed or damaged: {error}") from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key was old, now new`` for each key whose values differ, long values cut short."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key} was {_short(before.get(key))}, now {_short(after.get(key))}"
        for key in sorted({*before, *after})
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
