"""X as an operator on a device: what the path needs of X is a few of its columns and the norms ||X_d'R|| of a pass.

X is held once, feature-major, or read from where it is stored at every pass; standardisation is applied to results,
never to X.
"""

from __future__ import annotations

from contextlib import closing
from typing import TypeAlias

import torch
from torch import Tensor

from estimators.device import memory_limit
from estimators.features import READ_BYTES, Features
from estimators.group_lasso.moments import Moments, column_name
from estimators.group_lasso.reading import BlockReader, Index, positions, sent

_TILE = 32
_FEW_CLASSES = 4
_CALL_FLOPS = 5e10
_SLAB_BYTES = 8 * 2**20
_PRODUCT_BYTES = 2 * 2**20
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float16, torch.bfloat16, torch.float32, torch.float64
)}  # fmt: skip


def make_operator(
    X: Features,
    *,
    rows: Tensor,
    weights: Tensor,
    standardize: bool,
    center: bool,
    double: bool,
    dtype: str | torch.dtype | None,
    max_memory: int | str | None,
) -> Operator:
    """X in the memory of the device where it fits ``max_memory``, else read at every pass.

    Parameters
    ----------
    X : ndarray, Tensor or FeatureMatrix of shape (n_rows, n_features)
    rows : Tensor of shape (n_samples,), int64, on the CPU
        The rows of X that take part.
    weights : Tensor of shape (n_samples,), float64, on the device to compute on
        Weights of these rows, summing to one.
    standardize : bool
        Divide each column by its weighted standard deviation.
    center : bool
        Subtract each column's weighted mean; has effect only with ``standardize``.
    double : bool
        Compute in float64 whatever X is held in.
    dtype : {"float16", "bfloat16", "float32", "float64"}, torch.dtype or None
        How X is held; None for float32, or float64 where X is neither float32 nor narrower.
    max_memory : int, str or None
        Bytes, or a number with a unit as "4GB" or "512 MiB"; None for what the device has free.

    Raises
    ------
    ValueError
        If an argument is not as described, X holds a value that is not finite or that ``dtype`` cannot hold, or its
        blocks do not give every column once.
    """
    held = storage_dtype(X, dtype)
    limit = memory_limit(max_memory, weights.device)
    needed = dense_bytes(len(rows), X.shape[1], held)
    statistics = Moments(X.shape[1], weights, standardize=standardize, center=center)
    if needed <= limit:
        return DenseOperator(X, rows, statistics, held, double)
    return StreamedOperator(X, rows, statistics, held, double, limit)


def dense_bytes(n_samples: int, n_features: int, dtype: torch.dtype) -> int:
    """What X in memory takes, with the statistics of its columns and the blocks it is read by."""
    return n_features * (n_samples * dtype.itemsize + 64) + 2 * READ_BYTES


def storage_dtype(X: Features, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype X is to be held in.

    Raises
    ------
    ValueError
        If ``dtype`` is none of the four floating types.
    """
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} cannot hold X; accepted: None, {', '.join(map(repr, _DTYPES))}.")
        return _DTYPES[name]
    return torch.float32 if _source_dtype(X) in ("float16", "bfloat16", "float32") else torch.float64


def _source_dtype(X: Features) -> str:
    return str(X.dtype).removeprefix("torch.")


def stored_precision(X: Features) -> float:
    """Relative rounding of the values of X: the machine epsilon of the dtype it is stored in."""
    stored = getattr(X, "stored_dtype", X.dtype)
    dtype = _DTYPES.get(str(stored).removeprefix("torch."), torch.float64)
    return float(torch.finfo(dtype).eps)


class DenseOperator:
    """X in the memory of one device, held once and feature-major; see `make_operator`.

    Attributes
    ----------
    shape : (int, int)
        (n_samples, n_features).
    center, inverse_scale : Tensor of shape (n_features,), float64
        Column d counts as (x_d - center_d) * inverse_scale_d, with 0 for a constant column.
    single : bool
        Whether passes are in float32.
    """

    def __init__(self, X: Features, rows: Tensor, moments: Moments, held: torch.dtype, double: bool) -> None:
        n_samples, n_features = len(rows), X.shape[1]
        self.shape = (n_samples, n_features)
        self.single = not double and held != torch.float64
        padded = -(-n_features // _TILE) * _TILE
        self._columns = torch.empty((padded, n_samples), dtype=held, device=moments.weights.device)
        self._columns[n_features:] = 0.0
        for index, block in BlockReader(X, rows, READ_BYTES, self._columns.device).plain():
            values = self._columns[index]
            _store(values, block.T, index)
            moments.add(index, values, max(torch.finfo(held).eps, stored_precision(X)))
            if not isinstance(index, slice):
                self._columns[index] = values
        self.center, self.inverse_scale, delicate = moments.finish()
        self._delicate = delicate.nonzero().flatten()

    def columns(self, index: Tensor) -> Tensor:
        """Standardised columns, (len(index), n_samples) float64."""
        return _standardized(self, self._columns[index], index)

    def correlate(self, residual: Tensor, keep: Tensor, watch: float) -> Tensor:
        """The full pass: the norms ||X_d'R|| for R of shape (n_classes, n_samples), as (n_features,) float64.

        The columns ``keep``, and those whose norm reaches ``watch``, are likely to be asked for next.
        """
        n_features, work = self.shape[1], torch.float32 if self.single else torch.float64
        norms = torch.empty(n_features, dtype=torch.float64, device=residual.device)
        factor = residual.to(work)
        width = _CALL_FLOPS / (2 * residual.numel())
        if residual.device.type == "cpu":
            width = min(width, _PRODUCT_BYTES / (work.itemsize * len(residual)))
        if self._columns.dtype != work:
            width = min(width, _SLAB_BYTES / (work.itemsize * self.shape[0]))
        width = max(_TILE, int(width) // _TILE * _TILE)
        for start in range(0, n_features, width):
            at = slice(start, min(start + width, n_features))
            held = self._columns[start : start + width].to(work)
            norms[at] = _pass_norms(factor, held, self.center[at], self.inverse_scale[at]).double()
        if self.single and len(self._delicate):
            for index in torch.split(self._delicate, max(1, _SLAB_BYTES // (8 * self.shape[0]))):
                exact = _standardized(self, self._columns[index], index)
                norms[index] = (residual @ exact.T).norm(dim=0)
        return norms


class StreamedOperator:
    """As `DenseOperator`, for X where it is stored: read once per pass, each block while the one before is used.

    Between passes only the columns likely to be asked for next are held.
    """

    def __init__(
        self, X: Features, rows: Tensor, moments: Moments, held: torch.dtype, double: bool, limit: int
    ) -> None:
        self.shape = (len(rows), X.shape[1])
        self.single = not double and held != torch.float64
        self._held, self._device = held, moments.weights.device
        self._reader = BlockReader(X, rows, max(2**20, min(READ_BYTES, limit // 16)), self._device)
        self._most_columns = max(1, limit // (24 * len(rows) * held.itemsize))
        with closing(self._reader.on_device()) as blocks:
            for index, block in blocks:
                values = torch.empty((block.shape[1], len(rows)), dtype=held, device=self._device)
                _store(values, block.T, index)
                moments.add(index, values, max(torch.finfo(held).eps, stored_precision(X)))
        self.center, self.inverse_scale, delicate = moments.finish()
        self._delicate = delicate.cpu()
        self._index = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._columns = torch.zeros((0, len(rows)), dtype=held, device=self._device)

    def columns(self, index: Tensor) -> Tensor:
        place = torch.searchsorted(self._index, index).clamp_max(max(0, len(self._index) - 1))
        missing = index if not len(self._index) else index[self._index[place] != index]
        if len(missing):
            self._hold([(self._index, self._columns), self._read_columns(missing)])
            place = torch.searchsorted(self._index, index)
        return _standardized(self, self._columns[place], index)

    def _read_columns(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Columns as held, and which they are, picked out before they go to the device."""
        wanted = torch.zeros(self.shape[1], dtype=torch.bool).index_fill_(0, index.cpu(), True)
        found, columns = [], []
        with closing(self._reader.where_stored()) as blocks:
            for at, block in blocks:
                chosen = wanted[at].nonzero().flatten()
                if len(chosen):
                    found.append(positions(at, chosen.device)[chosen])
                    columns.append(block.T.index_select(0, chosen.to(block.device)).to(self._held))
        return torch.cat(found).to(self._device), torch.cat(columns).to(self._device)

    def correlate(self, residual: Tensor, keep: Tensor, watch: float) -> Tensor:
        work = torch.float32 if self.single else torch.float64
        norms = torch.empty(self.shape[1], dtype=torch.float64, device=residual.device)
        factor = residual.to(work)
        total = factor.double().sum(1).to(work)
        wanted = torch.zeros(self.shape[1], dtype=torch.bool, device=residual.device).index_fill_(0, keep, True)
        most = max(self._most_columns, len(keep))
        found: list[tuple[Tensor, Tensor]] = []
        with closing(self._reader.on_device()) as blocks:
            for index, block in blocks:
                held, at = block.to(self._held), positions(index, self._device)
                product = (factor @ held.to(work)).sub_(torch.outer(total, self.center[at].to(work)))
                norms[at] = product.mul_(self.inverse_scale[at].to(work)).norm(dim=0).double()
                columns = held.T
                delicate = self._delicate[index].nonzero().flatten()
                if self.single and len(delicate):
                    chosen = sent(delicate, self._device)
                    exact = _standardized(self, columns[chosen], at[chosen])
                    norms[at[chosen]] = (residual @ exact.T).norm(dim=0)
                chosen = _to_hold(torch.where(wanted[at], torch.inf, norms[at]), watch, most)
                found.append((at[chosen], columns[chosen]))
                if sum(len(part) for part, _ in found) > 2 * most:
                    found = [_strongest(found, norms, wanted, most)]
        self._hold([_strongest(found, norms, wanted, most)])
        return norms

    def _hold(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        index, order = torch.cat([index for index, _ in parts]).sort()
        self._index, self._columns = index, torch.cat([columns for _, columns in parts])[order]


Operator: TypeAlias = DenseOperator | StreamedOperator


def _to_hold(rank: Tensor, watch: float, most: int) -> Tensor:
    """Places in a block of columns to hold: those that reach ``watch``.

    To count them is to wait for the device: on CUDA the strongest are taken, as many as may be held at all.
    """
    if rank.is_cuda:
        return rank.topk(min(most, len(rank))).indices
    return (rank >= watch).nonzero().flatten()


def _strongest(parts: list[tuple[Tensor, Tensor]], norms: Tensor, wanted: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of indexed columns, those wanted and the others of largest norm, ``most`` in all."""
    index, columns = torch.cat([index for index, _ in parts]), torch.cat([columns for _, columns in parts])
    if len(index) <= most:
        return index, columns
    chosen = torch.where(wanted[index], torch.inf, norms[index]).topk(most).indices
    return index[chosen], columns[chosen]


def _store(values: Tensor, block: Tensor, index: Index) -> None:
    """Copy a block into the dtype X is held in, which only float32 may round."""
    values.copy_(block)
    if values.dtype.itemsize == 2 and block.dtype != values.dtype:
        changed = (values.to(block.dtype) != block.to(values.device)) & ~block.isnan().to(values.device)
        if bool(changed.any()):
            name, column = str(values.dtype).removeprefix("torch."), column_name(index, changed.any(1))
            raise ValueError(
                f"dtype={name!r} would round X in {column}, and the certificate would be that of another X; use "
                "'float32', or round X yourself."
            )


def _standardized(operator: Operator, raw: Tensor, index: Tensor) -> Tensor:
    """Columns (width, n_samples) as held, centred and scaled, in float64."""
    return raw.double().sub_(operator.center[index, None]).mul_(operator.inverse_scale[index, None])


def _pass_norms(factor: Tensor, columns: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """||factor (scale (columns - center))'|| per column, for few rows of factor (K, n) and columns (d, n) in tiles.

    Scaled before squaring, so that no magnitude of a column is too large or small for float32.
    """
    work, width = factor.dtype, len(center)
    shift = torch.outer(factor.double().sum(1).to(work), center.to(work))
    if columns.device.type != "cpu" or len(factor) <= _FEW_CLASSES:
        direct: Tensor = (
            (columns[:width] @ factor.T).sub_(shift.T).mul_(scale.to(work)[:, None]).square_().sum(1).sqrt_()
        )
        return direct
    # With more than a few rows a product per tile, which stays in cache, runs at up to twice the speed of one product.
    tiles = columns.view(-1, _TILE, columns.shape[1]).transpose(1, 2)
    product = torch.bmm(factor.expand(len(tiles), *factor.shape), tiles)
    padded, missing = torch.nn.functional.pad, len(columns) - width
    product -= padded(shift, (0, missing)).view(len(factor), -1, _TILE).transpose(0, 1)
    product *= padded(scale.to(work), (0, missing)).view(-1, 1, _TILE)
    norms: Tensor = product.square_().sum(1).sqrt_()
    return norms.view(-1)[:width]
