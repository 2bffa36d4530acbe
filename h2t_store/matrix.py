"""One extraction as a lazy matrix: rows are images, columns are features, and nothing is read until it is needed.

A `FeatureMatrix` is an address and a selection of rows and columns, so indexing and pickling cost next to nothing.
Reads go by whole chunks, each checked against its checksum, and a chunk that is absent is an error.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray

from h2t_store.errors import DamagedError, IncompleteError, StoreError, did_you_mean
from h2t_store.recipe import recipe_differences, recipe_of
from h2t_store.storage.layout import ExtractionHeader, Layer, n_blocks
from h2t_store.storage.store import Extraction, FeatureStore
from h2t_store.storage.threads import in_threads

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FeatureMatrix", "open_features"]

_TORCH_GRAIN = 32767
_ITERATED_BYTES = 32 << 20


def open_features(
    store: str | os.PathLike[str], name: str, *, cache: str | os.PathLike[str] | None = None
) -> "FeatureMatrix":
    """Open a finished extraction.

    Parameters
    ----------
    store : path-like or str
        The store: a folder, or a URL such as ``s3://bucket/features.zarr``, for which the environment says who asks.
    name : str
        The extraction in it, such as ``pets/train``.
    cache : path-like, optional
        Folder on this machine for copies of the features that are read from a URL, so that they are fetched once. Each
        is checked when it is read; what grows there is the caller's to remove.

    Returns
    -------
    FeatureMatrix
        All its columns, and all its rows but those of samples that were skipped (see `FeatureMatrix.failures`).

    Raises
    ------
    StoreError
        Where there is no such store or extraction.
    IncompleteError
        Where the extraction was begun and not finished.
    """
    opened = FeatureStore(store, cache=cache)
    extraction = opened.open(name)
    _require_complete(extraction)
    rows, kept = None, None if cache is None else os.path.abspath(cache)
    if extraction.n_failed:
        rows = np.setdiff1d(np.arange(extraction.header.n_samples), list(extraction.failures()))
    return FeatureMatrix((str(opened.place), name, extraction.header.digest), rows, None, kept, extraction)


def _require_complete(extraction: Extraction) -> None:
    if not extraction.complete:
        done, total = int(extraction.committed().sum()), n_blocks(extraction.header)
        raise IncompleteError(
            f"{extraction.where} is unfinished ({done} of {total} row blocks): run the same extraction again to finish"
        )


def _replaced(extraction: Extraction) -> StoreError:
    return StoreError(f"{extraction.where} was extended or replaced since this matrix was opened: open it again")


class FeatureMatrix:
    """Rows and columns of one extraction, read on demand as float32.

    Made by `open_features` and `h2t_store.extract`. It is immutable, pickles as its address and selection, and obeys
    enough of the array protocol for scikit-learn's splitters, searches and pipelines.

    Slices, masks and sequences of integers select and read nothing: ``X[rows, columns]`` is another FeatureMatrix of
    every pair of the rows and the columns, like ``np.ix_``. A single integer reads: ``X[0]`` is the first row as an
    array, ``X[:, 0]`` the first column, and iteration gives the rows. ``np.asarray(X)``, ``X.to_pandas()``,
    ``pandas.DataFrame(X)`` and ``torch.as_tensor(X)`` read everything.

    Attributes
    ----------
    shape : tuple of int
        (n_rows, n_columns) of this selection.
    dtype : numpy.dtype
        float32, whatever is stored.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(
        self,
        address: tuple[str, str, str],
        rows: NDArray[np.int64] | None,
        columns: NDArray[np.int64] | None,
        cache: str | None = None,
        extraction: Extraction | None = None,
    ) -> None:
        self._address = address
        self._cache = cache
        self._rows = rows
        self._columns = columns
        self._opened = extraction

    @property
    def _extraction(self) -> Extraction:
        if self._opened is None:
            store, name, digest = self._address
            extraction = FeatureStore(store, cache=self._cache).open(name)
            if extraction.header.digest != digest:
                raise _replaced(extraction)
            _require_complete(extraction)
            self._opened = extraction
        return self._opened

    @contextmanager
    def _reading(self) -> Iterator[Extraction]:
        """What to read from; where that finds damage, it may be that another extraction has taken its place."""
        extraction = self._extraction
        try:
            yield extraction
        except DamagedError:
            store, name, digest = self._address
            with suppress(DamagedError):
                now = FeatureStore(store).find(name)
                if now is not None and (now.header.digest, now.folder) != (digest, extraction.folder):
                    raise _replaced(now) from None
            raise

    @property
    def _header(self) -> ExtractionHeader:
        return self._extraction.header

    @property
    def shape(self) -> tuple[int, int]:
        n_rows = self._header.n_samples if self._rows is None else len(self._rows)
        n_columns = self._header.n_features if self._columns is None else len(self._columns)
        return n_rows, n_columns

    @property
    def nbytes(self) -> int:
        """Bytes of this selection once read."""
        n_rows, n_columns = self.shape
        return n_rows * n_columns * self.dtype.itemsize

    @property
    def name(self) -> str:
        """Name of the extraction."""
        return self._address[1]

    @property
    def provenance(self) -> dict[str, Any]:
        """How the extraction was made: ``inputs`` that determine it, and its ``environment``."""
        return self._extraction.provenance

    @property
    def fingerprint(self) -> str:
        """A digest of the store's address, how the extraction was made, and the rows and columns taken."""
        digest = hashlib.sha256("\0".join(self._address).encode())
        for selection in (self._rows, self._columns):
            digest.update(b"all" if selection is None else len(selection).to_bytes(8, "little") + selection.tobytes())
        return digest.hexdigest()

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """What the features were rounded to when they were stored: float16 or float32."""
        return np.dtype(self._header.dtype)

    @property
    def y(self) -> NDArray[Any]:
        """Labels (n_rows,): names of classes, or integers where the data has integers.

        They mean the same in every extraction, whatever its list of classes. Where rows are unlabelled, it is an object
        array with None there; ``X[X.labelled]`` leaves them out.
        """
        codes, classes = self.codes, self.classes
        if codes.max(initial=-1) >= len(classes):
            raise DamagedError(f"{self._extraction.where}: y holds label {codes.max()} of {len(classes)} classes")
        labels = np.array(classes, dtype=None if classes else str)
        labelled = codes >= 0
        if labelled.all():
            return labels[codes]
        y = np.full(len(codes), None, dtype=object)
        y[labelled] = labels[codes[labelled]]
        return y

    @property
    def codes(self) -> NDArray[np.int64]:
        """Labels (n_rows,) as indices into ``classes`` of this extraction; -1 where unlabelled."""
        with self._reading() as extraction:
            codes = extraction.labels()
        return codes if self._rows is None else codes[self._rows]

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which rows (n_rows,) have a label."""
        mask: NDArray[np.bool_] = self.codes >= 0
        return mask

    @property
    def classes(self) -> tuple[str | int, ...]:
        """The labels that this extraction knows, whether or not a row of this selection has them."""
        return self._header.classes

    @property
    def sample_ids(self) -> NDArray[np.str_]:
        """Identifiers (n_rows,) of strings: paths relative to the data, or ``SPLIT/index``."""
        with self._reading() as extraction:
            ids = extraction.sample_ids()
        return np.array((ids if self._rows is None else ids[self._rows]).tolist(), dtype=str)

    @property
    def recipe(self) -> dict[str, Any]:
        """How these columns are made (see `h2t_store.recipe`); equal for the same network, whatever the images."""
        chosen = range(len(self._header.layers)) if self._columns is None else np.unique(self._owners(self._columns))
        return recipe_of(self._header, (self._header.layers[index] for index in chosen))

    def recipe_differences(self, recipe: dict[str, Any]) -> list[str]:
        """What differs between the recipe of other features ("there") and that of these ("here").

        Returns
        -------
        list of str
            Empty where a model fitted on those can be used on these.
        """
        return recipe_differences(recipe, self.recipe)

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(identifier, why) of every sample of the extraction that was skipped (``on_error="skip"``)."""
        with self._reading() as extraction:
            return extraction.skipped()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of this selection with their columns in it.

        Where columns were taken out of order, every run of columns from one layer is listed by itself.
        """
        return tuple(layer for _, layer in self._runs())

    def _runs(self) -> list[tuple[int, Layer]]:
        """(index in the header, layer with columns of this selection) for each run of columns from one layer."""
        layers = self._header.layers
        if self._columns is None:
            return list(enumerate(layers))
        if not len(self._columns):
            return []
        owner = self._owners(self._columns)
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        stops = np.append(starts[1:], len(owner))
        return [
            (int(owner[start]), layers[owner[start]]._replace(start=int(start), stop=int(stop)))
            for start, stop in zip(starts, stops, strict=True)
        ]

    def _owners(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the layer that each stored column belongs to."""
        starts = [layer.start for layer in self._header.layers]
        return np.searchsorted(starts, columns, side="right") - 1

    @property
    def feature_names(self) -> NDArray[Any]:
        """Names (n_columns,) of the columns, such as ``layer3.2.act2[17]``."""
        layers = self._header.layers
        names = np.array([f"{layer.name}[{i}]" for layer in layers for i in range(layer.width)], dtype=object)
        return names if self._columns is None else names[self._columns]

    def select_layers(self, patterns: str | Sequence[str]) -> "FeatureMatrix":
        """The columns of the layers whose name matches any of the globs, in store order.

        Raises
        ------
        StoreError
            Where a pattern matches no layer of this selection.
        """
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise StoreError("select_layers: no pattern given; accepted are globs over the names of the layers")
        names = [layer.name for layer in self.layers]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise StoreError(
                    f"select_layers: no layer matches {pattern!r}{did_you_mean(pattern, names)}; "
                    f"there are {len(names)}{f', from {names[0]!r} to {names[-1]!r}' if names else ''}"
                )
        keep = [
            np.arange(layer.start, layer.stop)
            for layer in self.layers
            if any(fnmatchcase(layer.name, pattern) for pattern in patterns)
        ]
        return self._select(slice(None), np.concatenate(keep))

    def select_target_size(self, target_size: int) -> "FeatureMatrix":
        """The columns that pooling to ``target_size`` gives, where several sizes were extracted at once.

        Raises
        ------
        StoreError
            Where the extraction was not made for this size.
        """
        sizes = sorted({size for layer in self.layers for size in layer.target_sizes})
        if target_size not in sizes:
            raise StoreError(
                f"select_target_size: {target_size!r}; accepted are {', '.join(map(str, sizes)) or 'none'}"
            )
        layers = [layer for layer in self.layers if target_size in layer.target_sizes]
        return self._select(slice(None), np.concatenate([np.arange(layer.start, layer.stop) for layer in layers]))

    def layer_norms(self) -> NDArray[np.float32]:
        """Euclidean norms (n_rows, len(layers)) of each layer's stored vector, over all its columns."""
        with self._reading() as extraction:
            norms = extraction.layer_norms()
        columns = np.array([index for index, _ in self._runs()], dtype=np.int64)
        return norms[:, columns] if self._rows is None else norms[np.ix_(self._rows, columns)]

    def column_blocks(self, max_bytes: int) -> Iterator[tuple[slice | NDArray[np.int64], NDArray[np.float32]]]:
        """Read all columns in store order, a block at a time.

        Parameters
        ----------
        max_bytes : int
            A block holds at most this many bytes, and at least one column. Blocks end at chunk borders where they can,
            so that a chunk is read once.

        Yields
        ------
        columns : slice or ndarray of int
            Which columns of this matrix the block holds.
        block : ndarray of shape (n_rows, width), float32
        """
        n_rows, n_columns = self.shape
        width = max(1, max_bytes // max(1, n_rows * self.dtype.itemsize))
        stored = np.arange(n_columns) if self._columns is None else self._columns
        order = np.argsort(stored, kind="stable")
        stored = stored[order]
        owner = self._owners(stored)
        starts, widths = np.array([(layer.start, layer.chunk_width) for layer in self._header.layers]).T
        chunk = (stored - starts[owner]) // widths[owner]
        borders = np.flatnonzero((np.diff(owner) != 0) | (np.diff(chunk) != 0)) + 1
        begin = 0
        while begin < n_columns:
            end = min(begin + width, n_columns)
            if end < n_columns:
                last = np.searchsorted(borders, end, side="right") - 1
                if last >= 0 and borders[last] > begin:
                    end = int(borders[last])
            at = order[begin:end]
            yield _tight(at), self._read(stored[begin:end])
            begin = end

    def row_blocks(self, max_bytes: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Read all rows in order, a block at a time.

        Parameters
        ----------
        max_bytes : int
            A block holds at most this many bytes, or the rows of one chunk. Blocks end at chunk borders, so that a
            chunk is read once where the rows are in store order.

        Yields
        ------
        rows : slice
            Which rows of this matrix the block holds.
        block : ndarray of shape (height, n_columns), float32
        """
        n_rows, n_columns = self.shape
        height = max(1, max_bytes // max(1, n_columns * self.dtype.itemsize))
        stored = np.arange(n_rows) if self._rows is None else self._rows
        borders = np.append(np.flatnonzero(np.diff(stored // self._header.rows_per_block)) + 1, n_rows)
        begin = 0
        while begin < n_rows:
            last = int(np.searchsorted(borders, begin + height, side="right")) - 1
            end = int(borders[last]) if last >= 0 else 0
            if end <= begin:
                end = int(borders[last + 1])
            yield slice(begin, end), np.asarray(self[begin:end])
            begin = end

    def _read(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read stored columns (any order) for the selected rows: every chunk that holds some of them, once."""
        header = self._header
        rows = np.arange(header.n_samples) if self._rows is None else self._rows
        out = np.empty((len(rows), len(columns)), dtype=np.float32)
        row_parts = list(_by_chunk(rows, header.rows_per_block))
        owner = self._owners(columns)
        jobs = [
            (header.layers[index], down, across._replace(target=at[across.target]))
            for index in np.unique(owner)
            for at in [np.flatnonzero(owner == index)]
            for across in _by_chunk(columns[at] - header.layers[index].start, header.layers[index].chunk_width)
            for down in row_parts
        ]

        def fill(job: tuple[Layer, _Part, _Part]) -> None:
            layer, down, across = job
            chunk = extraction.features(layer, down.chunk, across.chunk)
            _widen(chunk[_cross(down.source, across.source)], out, _cross(down.target, across.target))

        with self._reading() as extraction:
            in_threads(fill, jobs, extraction.folder.concurrency)
        return out

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple) and len(key) != 2:
            raise IndexError(f"a FeatureMatrix is indexed by rows, or by rows and columns, not by {len(key)} indices")
        rows, columns = key if isinstance(key, tuple) else (key, ...)
        single = _is_integer(rows), _is_integer(columns)
        view = self._select(
            *([index] if alone else index for index, alone in zip((rows, columns), single, strict=True))
        )
        return np.asarray(view)[tuple(0 if alone else slice(None) for alone in single)] if any(single) else view

    def _select(self, rows: Any, columns: Any) -> "FeatureMatrix":
        n_rows, n_columns = self.shape
        return FeatureMatrix(
            self._address,
            _compose(self._rows, rows, n_rows, "rows"),
            _compose(self._columns, columns, n_columns, "columns"),
            self._cache,
            self._extraction,
        )

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a FeatureMatrix is read from disk: np.asarray(X, copy=False) cannot be done")
        columns = np.arange(self._header.n_features) if self._columns is None else self._columns
        read = self._read(columns)
        return read if dtype is None else read.astype(dtype, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        return np.asarray(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return np.empty(0).__dlpack_device__()

    def to_pandas(self) -> "pd.DataFrame":
        """Read everything into a data frame: ``sample_ids`` as its index, ``feature_names`` as its columns.

        Raises
        ------
        ImportError
            If pandas is not installed: ``pip install 'head2toe[table]'``.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install 'head2toe[table]'.") from error
        index = pd.Index(self.sample_ids, name="sample_id")
        return pd.DataFrame(np.asarray(self), index=index, columns=self.feature_names)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """The rows; whole row blocks are read at a time."""
        n_rows, n_columns = self.shape
        height = self._header.rows_per_block
        step = height * max(1, _ITERATED_BYTES // (height * max(1, n_columns) * self.dtype.itemsize))
        for start in range(0, n_rows, step):
            yield from np.asarray(self._select(slice(start, start + step), ...))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            hint = f": read the features first, np.asarray(X).{name}" if name in _OF_ARRAYS else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

    def __repr__(self) -> str:
        n_rows, n_columns = self.shape
        return f"FeatureMatrix({self.name!r}, {n_rows} x {n_columns}, {len(self._runs())} layers)"

    def _repr_html_(self) -> str:
        n_rows, n_columns = self.shape
        header = self._header
        rows = "".join(
            f"<tr><td>{escape(layer.name)}</td><td>{' x '.join(map(str, layer.shape))}</td>"
            f"<td>{layer.stop - layer.start:,}</td></tr>"
            for layer in self.layers
        )
        return (
            f"<div><b>FeatureMatrix</b> {escape(self.name)}: {n_rows:,} samples x {n_columns:,} features, "
            f"{len(header.classes)} classes, {self.nbytes / 1e6:,.1f} MB as float32<br>"
            f"<code>{escape(self._address[0])}</code>"
            f"<details><summary>{len(self.layers)} layers</summary><table><thead><tr><th>layer</th><th>activation</th>"
            f"<th>features</th></tr></thead><tbody>{rows}</tbody></table></details></div>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        header = self._header
        selection = _pack(self._rows, header.n_samples), _pack(self._columns, header.n_features)
        return _unpickle, (self._address, *selection, self._cache)


_OF_ARRAYS = frozenset(name for name in dir(np.ndarray) if not name.startswith("_"))


class _Part(NamedTuple):
    """What one chunk holds of some indices: where in the chunk, and where among the indices."""

    chunk: int
    source: NDArray[np.int64]
    target: NDArray[np.int64]


def _by_chunk(indices: NDArray[np.int64], size: int) -> Iterator[_Part]:
    """Sort indices by the chunk they fall into."""
    if not len(indices):
        return
    order = np.argsort(indices, kind="stable")
    chunk = indices[order] // size
    for target in np.split(order, np.flatnonzero(np.diff(chunk)) + 1):
        yield _Part(int(indices[target[0]] // size), indices[target] % size, target)


def _widen(values: NDArray[Any], out: NDArray[np.float32], target: tuple[Any, Any]) -> None:
    """Store float16 as float32 with torch, many times as fast as numpy, in pieces too small for it to start threads."""
    if not all(isinstance(index, slice) for index in target):
        wide = np.empty(values.shape, dtype=np.float32)
        _widen(values, wide, (slice(None), slice(None)))
        out[target] = wide
        return
    step = max(1, _TORCH_GRAIN // max(1, values.shape[1]))
    source, place = torch.from_numpy(values), torch.from_numpy(out[target])
    for start in range(0, len(values), step):
        place[start : start + step].copy_(source[start : start + step])


def _tight(indices: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Consecutive integers as a slice, others as they are."""
    if len(indices) and (np.diff(indices) == 1).all():
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices


def _cross(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> tuple[Any, Any]:
    """An index for all pairs of rows and columns: slices, which copy nothing, where the integers are consecutive."""
    tight = _tight(rows), _tight(columns)
    if any(isinstance(index, slice) for index in tight):
        return tight
    across, down = np.ix_(rows, columns)
    return across, down


def _compose(current: NDArray[np.int64] | None, index: Any, n: int, axis: str) -> NDArray[np.int64] | None:
    """Apply ``index`` along an axis of length ``n`` to the selection made before."""
    if index is Ellipsis or (isinstance(index, slice) and index == slice(None)):
        return current
    chosen = np.arange(n)[index] if isinstance(index, slice) else _as_integers(index, n, axis)
    return chosen if current is None else current[chosen]


def _is_integer(index: Any) -> bool:
    if isinstance(index, slice) or index is Ellipsis:
        return False
    return np.ndim(index) == 0 and np.asarray(index).dtype.kind in "iu"


def _as_integers(index: ArrayLike, n: int, axis: str) -> NDArray[np.int64]:
    array = np.asarray(index)
    if array.ndim != 1:
        dimensions = f" with {array.ndim} dimensions" if array.ndim else ""
        raise TypeError(
            f"{axis} index must be an integer, a slice, a 1-d array of integers or a 1-d mask; got "
            f"{type(index).__name__}{dimensions}"
        )
    if array.dtype == bool:
        if len(array) != n:
            raise IndexError(f"{axis} mask has {len(array)} entries for {n} {axis}")
        return np.flatnonzero(array)
    if len(array) == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        hint = "; X.select_layers takes names of layers" if array.dtype.kind == "U" else ""
        raise TypeError(f"{axis} index must hold integers or booleans, not {array.dtype}{hint}")
    if array.min() < -n or array.max() >= n:
        raise IndexError(
            f"{axis} index {int(array.max() if array.max() >= n else array.min())} is out of range for {n} {axis}"
        )
    array = array.astype(np.int64)
    return np.where(array < 0, array + n, array)


def _pack(selection: NDArray[np.int64] | None, size: int) -> tuple[str, Any]:
    """A selection in few bytes: a bit per element where it is in order, else the smallest integers."""
    if selection is None:
        return "all", None
    if (np.diff(selection) > 0).all():
        mask = np.zeros(size, dtype=bool)
        mask[selection] = True
        return "mask", np.packbits(mask)
    return "indices", selection.astype(np.min_scalar_type(size))


def _unpack(packed: tuple[str, Any]) -> NDArray[np.int64] | None:
    kind, data = packed
    if kind == "all":
        return None
    return np.flatnonzero(np.unpackbits(data)) if kind == "mask" else data.astype(np.int64)


def _unpickle(
    address: tuple[str, str, str], rows: tuple[str, Any], columns: tuple[str, Any], cache: str | None
) -> FeatureMatrix:
    return FeatureMatrix(address, _unpack(rows), _unpack(columns), cache)
