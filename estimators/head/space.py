"""The coordinates in which the ridge head is solved.

With fewer samples than features, the features Z are replaced by the Cholesky factor L of ZZ' = LL': the solution for L
is that for Z, turned into other axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf as pstrf
from torch import Tensor

# Sizes up to this are preconditioned with a full inverse, larger ones with that of the diagonal.
LARGEST_INVERSE = 4096
_PANEL = 256

Block = tuple[slice | Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class HeldSpace:
    """Features Z (n_samples, n_features), or the Cholesky factor L of ZZ', held for products.

    ``matrix`` (size, n_samples) is Z' or L'; where it is L', its rows belong to the samples ``pivots`` (size,).
    """

    matrix: Tensor
    pivots: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of coordinates per class."""
        return len(self.matrix)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def scores(self, coordinates: Tensor) -> Tensor:
        """(n_classes, n_samples) from (n_classes, size)."""
        return coordinates @ self.matrix

    def pull(self, residual: Tensor) -> Tensor:
        """The gradient in the coordinates from that in the scores."""
        return residual @ self.matrix.T

    def to(self, dtype: torch.dtype) -> HeldSpace:
        """In another precision."""
        return self if dtype == self.matrix.dtype else HeldSpace(self.matrix.to(dtype), self.pivots)

    def diagonal(self, curvature: Tensor) -> Tensor:
        """Of Z'HZ for the diagonal matrix H, (size,)."""
        return torch.cat([rows.square() @ curvature for rows in torch.split(self.matrix, _PANEL)])

    def products(self, curvature: Tensor) -> Tensor:
        """Z'HZ for the diagonal matrix H; the lower triangle only."""
        products = self.matrix.new_zeros((self.size, self.size))
        _add_products(products, self.matrix * curvature.sqrt())
        return products

    def coefficients(self, coordinates: Tensor, blocks: Iterable[Block], n_features: int) -> Tensor:
        """Coefficients of the features, (n_features, n_classes), for which L needs their values again."""
        if self.pivots is None:
            return coordinates.T
        combination = coordinates.new_zeros((len(coordinates), self.matrix.shape[1]))
        triangle = self.matrix[:, self.pivots]
        combination[:, self.pivots] = torch.linalg.solve_triangular(triangle, coordinates.T, upper=True).T
        solved = coordinates.new_empty((n_features, len(coordinates)))
        for index, block in blocks:
            solved[index] = (combination @ block).T
        return solved


@dataclass(frozen=True, slots=True)
class StreamedSpace:
    """Features Z that ``blocks()`` makes again for every product, as there is no room to hold them.

    It gives (columns, block of shape (n_samples, width), float64) until every column was given once.
    """

    blocks: Callable[[], Iterator[Block]]
    shape: tuple[int, int]
    dtype = torch.float64

    @property
    def size(self) -> int:
        return self.shape[1]

    def scores(self, coordinates: Tensor) -> Tensor:
        total = coordinates.new_zeros((len(coordinates), self.shape[0]))
        for index, block in self.blocks():
            total += coordinates[:, index] @ block.T
        return total

    def pull(self, residual: Tensor) -> Tensor:
        pulled = residual.new_empty((len(residual), self.size))
        for index, block in self.blocks():
            pulled[:, index] = residual @ block
        return pulled

    def to(self, dtype: torch.dtype) -> StreamedSpace:
        """Itself: its products are in float64."""
        return self

    def diagonal(self, curvature: Tensor) -> Tensor:
        diagonal = curvature.new_empty(self.size)
        for index, block in self.blocks():
            diagonal[index] = curvature @ block.square()
        return diagonal

    def coefficients(self, coordinates: Tensor, blocks: Iterable[Block], n_features: int) -> Tensor:
        return coordinates.T


HeadSpace = HeldSpace | StreamedSpace


def held_space_bytes(n_samples: int, n_features: int) -> int:
    """Bytes that making and using a `HeldSpace` takes, with its copy in float32 and what preconditions it."""
    size = min(n_samples, n_features)
    factoring = 16 * n_samples**2 if n_features > n_samples else 0
    inverse = 32 * size**2 if size <= LARGEST_INVERSE else 0
    return 8 * size * n_samples + max(factoring, 4 * size * n_samples + inverse)


def held_space(blocks: Iterable[Block], n_samples: int, n_features: int, device: torch.device) -> HeldSpace:
    """Gather features from blocks of columns, standardised as they are to be penalised, in float64.

    Raises
    ------
    ValueError
        If products of features overflow.
    """
    wide = n_features > n_samples
    gathered = torch.zeros((min(n_features, n_samples), n_samples), dtype=torch.float64, device=device)
    for index, block in blocks:
        if wide:
            _add_products(gathered, block)
        else:
            gathered[index] = block.T
    if not bool(gathered.norm().isfinite()):
        raise ValueError("The kept features are too large for the ridge head: their products overflow. Scale them.")
    return _factored(gathered) if wide else HeldSpace(gathered)


def _factored(products: Tensor) -> HeldSpace:
    """The space of L' for products ZZ', of which the lower triangle is given; as many rows as Z has rank."""
    factor, order, rank, _ = pstrf(products.cpu().numpy(), lower=1)
    pivots = torch.as_tensor(order - 1, dtype=torch.int64, device=products.device)
    matrix = products.new_empty((rank, len(products)))
    matrix[:, pivots] = torch.as_tensor(np.tril(factor)[:, :rank].T, device=products.device)
    return HeldSpace(matrix, pivots[:rank])


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the products of rows with each other to the lower triangle, leaving most of the upper one alone."""
    for start in range(0, len(rows), _PANEL):
        stop = start + _PANEL
        total[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T)
