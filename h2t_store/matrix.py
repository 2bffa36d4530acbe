"""One extraction as a lazy matrix: rows are images, columns are features, and nothing is read until it is needed."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from h2t_store.errors import DamagedError, IncompleteError, StoreError, did_you_mean
from h2t_store.indexing import Indices, as_slice, edges, is_integer, pack, select, spans, unpack
from h2t_store.reading import column_chunks, gather, owners
from h2t_store.recipe import recipe_differences, recipe_of
from h2t_store.storage.extraction import Extraction
from h2t_store.storage.layout import ExtractionHeader, Layer, n_blocks
from h2t_store.storage.store import FeatureStore

if TYPE_CHECKING:
    import pandas as pd

_ITERATED_BYTES = 32 << 20


def open_features(
    store: str | os.PathLike[str], name: str, *, cache: str | os.PathLike[str] | None = None
) -> "FeatureMatrix":
    """Open a finished extraction.

    Parameters
    ----------
    store : path-like or str
        The store: a folder, or a URL such as ``s3://bucket/features.zarr`` with credentials from the environment.
    name : str
        The extraction in it, such as ``pets/train``.
    cache : path-like, optional
        Local folder for copies of what is read from a URL. Copies are checked when read and never removed.

    Returns
    -------
    FeatureMatrix
        All columns, and all rows except skipped samples (see `FeatureMatrix.failures`).
    """
    opened = FeatureStore(store, cache=cache)
    extraction = _finished(opened.open(name))
    rows, columns = np.arange(extraction.header.n_samples), np.arange(extraction.header.n_features)
    if extraction.n_failed:
        rows = np.setdiff1d(rows, list(extraction.failures()))
    address = str(opened.place), name, extraction.header.digest
    return FeatureMatrix(address, rows, columns, None if cache is None else os.path.abspath(cache), extraction)


def _finished(extraction: Extraction) -> Extraction:
    if not extraction.complete:
        done, total = int(extraction.committed().sum()), n_blocks(extraction.header)
        raise IncompleteError(
            f"{extraction.where} is unfinished ({done} of {total} row blocks): run the same extraction again to finish"
        )
    return extraction


def _replaced(extraction: Extraction) -> StoreError:
    return StoreError(f"{extraction.where} was extended or replaced since this matrix was opened: open it again")


class FeatureMatrix:
    """Rows and columns of one extraction, read on demand as float32.

    It is made by `open_features` and `h2t_store.extract`, is immutable, and pickles as its address and selection.
    scikit-learn's splitters, searches and pipelines take it for an array.

    Slices, masks and sequences of integers select without reading: ``X[rows, columns]`` is a FeatureMatrix of every
    pair of the rows and columns, like ``np.ix_``. A single integer reads: ``X[0]`` is the first row as an array,
    ``X[:, 0]`` the first column. ``np.asarray(X)``, ``X.to_pandas()`` and ``torch.as_tensor(X)`` read everything.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(
        self,
        address: tuple[str, str, str],
        rows: Indices,
        columns: Indices,
        cache: str | None = None,
        extraction: Extraction | None = None,
    ) -> None:
        self._address = address  # store, name, digest of the header
        self._rows = rows
        self._columns = columns
        self._cache = cache
        self._opened = extraction

    @property
    def _extraction(self) -> Extraction:
        if self._opened is None:
            store, name, digest = self._address
            extraction = FeatureStore(store, cache=self._cache).open(name)
            if extraction.header.digest != digest:
                raise _replaced(extraction)
            self._opened = _finished(extraction)
        return self._opened

    @contextmanager
    def _reading(self) -> Iterator[Extraction]:
        """The extraction to read; what looks like damage may be that another one has taken its place."""
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
        """(n_rows, n_columns) of this selection."""
        return len(self._rows), len(self._columns)

    @property
    def nbytes(self) -> int:
        """Bytes of this selection once read."""
        return len(self._rows) * len(self._columns) * self.dtype.itemsize

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
        """Digest of the store's address, how the extraction was made, and the rows and columns selected."""
        digest = hashlib.sha256("\0".join(self._address).encode())
        for selection in (self._rows, self._columns):
            digest.update(len(selection).to_bytes(8, "little") + selection.tobytes())
        return digest.hexdigest()

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """dtype of the stored features: float16 or float32."""
        return np.dtype(self._header.dtype)

    @property
    def y(self) -> NDArray[Any]:
        """Labels (n_rows,): class names, or integers if the data has integers.

        With unlabelled rows it is an object array with None; ``X[X.labelled]`` leaves them out.
        """
        codes, classes = self.codes, self.classes
        if (codes < 0).any():
            return np.array([*classes, None], dtype=object)[codes]  # code -1 takes the last
        return np.array(classes, dtype=None if classes else str)[codes]

    @property
    def codes(self) -> NDArray[np.int64]:
        """Labels (n_rows,) as indices into ``classes``; -1 if unlabelled."""
        with self._reading() as extraction:
            return extraction.labels()[self._rows]

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which rows (n_rows,) have a label."""
        mask: NDArray[np.bool_] = self.codes >= 0
        return mask

    @property
    def classes(self) -> tuple[str | int, ...]:
        """All labels of the extraction, whether or not a row of this selection has them."""
        return self._header.classes

    @property
    def sample_ids(self) -> NDArray[np.str_]:
        """Identifiers (n_rows,) of strings: paths relative to the data, or ``SPLIT/index``."""
        with self._reading() as extraction:
            return np.array(extraction.sample_ids()[self._rows].tolist(), dtype=str)

    @property
    def recipe(self) -> dict[str, Any]:
        """How these columns are made (see `h2t_store.recipe`): the same for all images."""
        used = np.unique(owners(self._header, self._columns))
        return recipe_of(self._header, [self._header.layers[index] for index in used])

    def recipe_differences(self, recipe: dict[str, Any]) -> list[str]:
        """Differences between the recipe of other features ("there") and these; none if a model may use both."""
        return recipe_differences(recipe, self.recipe)

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(identifier, reason) of every sample of the extraction that was skipped (``on_error="skip"``)."""
        with self._reading() as extraction:
            return extraction.skipped()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers with their columns in this selection.

        If columns were selected out of order, each run of columns from one layer is listed by itself.
        """
        return tuple(layer for _, layer in self._runs())

    def _runs(self) -> list[tuple[int, Layer]]:
        """(index of the layer, layer with columns of this selection) for each run of columns from one layer."""
        owner = owners(self._header, self._columns)
        return [
            (int(owner[start]), self._header.layers[owner[start]]._replace(start=start, stop=stop))
            for start, stop in pairwise(edges(owner).tolist())
        ]

    @property
    def feature_names(self) -> NDArray[Any]:
        """Names (n_columns,) such as ``layer3.2.act2[17]``."""
        names = [f"{layer.name}[{i}]" for layer in self._header.layers for i in range(layer.width)]
        return np.array(names, dtype=object)[self._columns]

    def select_layers(self, patterns: str | Sequence[str]) -> "FeatureMatrix":
        """Select the columns of the layers with any of these names, or matching any of these globs, in their order."""
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise StoreError("select_layers: no pattern given; accepted are globs over the names of the layers")
        names, matching = [layer.name for layer in self.layers], set()
        for pattern in patterns:
            # A name may hold the characters of a glob.
            found = {pattern} if pattern in names else {name for name in names if fnmatchcase(name, pattern)}
            if not found:
                raise StoreError(
                    f"select_layers: no layer matches {pattern!r}{did_you_mean(pattern, names)}; "
                    f"there are {len(names)}{f', from {names[0]!r} to {names[-1]!r}' if names else ''}"
                )
            matching |= found
        return self._of_layers([layer for layer in self.layers if layer.name in matching])

    def select_target_size(self, target_size: int) -> "FeatureMatrix":
        """Select the columns that pooling to ``target_size`` gives, if several sizes were extracted at once."""
        sizes = sorted({size for layer in self.layers for size in layer.target_sizes})
        if target_size not in sizes:
            raise StoreError(
                f"select_target_size: {target_size!r}; accepted are {', '.join(map(str, sizes)) or 'none'}"
            )
        return self._of_layers([layer for layer in self.layers if target_size in layer.target_sizes])

    def _of_layers(self, layers: list[Layer]) -> "FeatureMatrix":
        return self._select(..., np.concatenate([np.arange(layer.start, layer.stop) for layer in layers]))

    def layer_norms(self) -> NDArray[np.float32]:
        """Euclidean norms (n_rows, len(layers)) of each layer's stored vector, over all its columns."""
        with self._reading() as extraction:
            norms = extraction.layer_norms()
        columns = np.array([index for index, _ in self._runs()], dtype=np.int64)
        return norms[np.ix_(self._rows, columns)]

    def column_blocks(self, max_bytes: int) -> Iterator[tuple[slice | Indices, NDArray[np.float32]]]:
        """Read all columns in store order, as blocks of at most ``max_bytes`` or one column.

        Each comes with the columns of this matrix that it holds. Blocks end at chunk borders if possible, so that a
        chunk is read once.
        """
        n_rows = len(self)
        widest = max(1, max_bytes // max(1, n_rows * self.dtype.itemsize))
        order = np.argsort(self._columns, kind="stable")
        stored = self._columns[order]
        borders = edges(column_chunks(self._header, stored)).tolist()
        cuts = [cut for start, stop in pairwise(borders) for cut in range(start, stop, widest)]
        for start, stop in spans([*cuts, len(stored)], widest):
            yield as_slice(order[start:stop]), self._read(self._rows, stored[start:stop])

    def row_blocks(self, max_bytes: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Read all rows in order, as blocks of at most ``max_bytes`` or the rows of one chunk.

        Each comes with the rows of this matrix that it holds. Blocks end at chunk borders, so that a chunk is read once
        if the rows are in store order.
        """
        n_columns = self.shape[1]
        highest = max(1, max_bytes // max(1, n_columns * self.dtype.itemsize))
        for start, stop in spans(edges(self._rows // self._header.rows_per_block), highest):
            yield slice(start, stop), self._read(self._rows[start:stop], self._columns)

    def _read(self, rows: Indices, columns: Indices) -> NDArray[np.float32]:
        with self._reading() as extraction:
            return gather(extraction, rows, columns)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple) and len(key) != 2:
            raise IndexError(f"a FeatureMatrix is indexed by rows, or by rows and columns, not by {len(key)} indices")
        rows, columns = key if isinstance(key, tuple) else (key, ...)
        one_row, one_column = is_integer(rows), is_integer(columns)
        view = self._select([rows] if one_row else rows, [columns] if one_column else columns)
        if not one_row and not one_column:
            return view
        return np.asarray(view)[0 if one_row else slice(None), 0 if one_column else slice(None)]

    def _select(self, rows: Any, columns: Any) -> "FeatureMatrix":
        extraction = self._extraction
        rows, columns = select(self._rows, rows, "rows"), select(self._columns, columns, "columns")
        return FeatureMatrix(self._address, rows, columns, self._cache, extraction)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a FeatureMatrix is read from disk: np.asarray(X, copy=False) is not possible")
        read = self._read(self._rows, self._columns)
        return read if dtype is None else read.astype(dtype, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        return np.asarray(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return np.empty(0).__dlpack_device__()

    def to_pandas(self) -> "pd.DataFrame":
        """Read everything into a data frame with ``sample_ids`` as index and ``feature_names`` as columns."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install 'head2toe[table]'.") from error
        index = pd.Index(self.sample_ids, name="sample_id")
        return pd.DataFrame(np.asarray(self), index=index, columns=self.feature_names)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for _, block in self.row_blocks(_ITERATED_BYTES):
            yield from block

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            hint = f": read the features first, np.asarray(X).{name}" if hasattr(np.ndarray, name) else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

    def __repr__(self) -> str:
        n_rows, n_columns = self.shape
        return f"FeatureMatrix({self.name!r}, {n_rows} x {n_columns}, {len(self._runs())} layers)"

    def _repr_html_(self) -> str:
        n_rows, n_columns = self.shape
        rows = "".join(
            f"<tr><td>{escape(layer.name)}</td><td>{' x '.join(map(str, layer.shape))}</td>"
            f"<td>{layer.width:,}</td></tr>"
            for layer in self.layers
        )
        return (
            f"<b>FeatureMatrix</b> {escape(self.name)}: {n_rows:,} samples x {n_columns:,} features, "
            f"{len(self.classes)} classes, {self.nbytes / 1e6:,.1f} MB as float32<br>"
            f"<code>{escape(self._address[0])}</code><details><summary>{len(self.layers)} layers</summary>"
            f"<table><tr><th>layer</th><th>activation</th><th>features</th></tr>{rows}</table></details>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self._address, pack(self._rows), pack(self._columns), self._cache)


def _unpickle(address: tuple[str, str, str], rows: bytes, columns: bytes, cache: str | None) -> FeatureMatrix:
    return FeatureMatrix(address, unpack(rows), unpack(columns), cache)
