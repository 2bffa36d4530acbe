"""The coordinates in which the ridge head is solved: features Z, or the Cholesky factor L of ZZ' = LL'.

L takes the place of Z where there are fewer samples than features: its solution is that for Z, turned into other axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
class HeadSpace:
    """Z or L, of ``shape`` (n_samples, size), for products with it.

    ``blocks()`` gives (columns, block of shape (n_samples, width)) until every column was given once. ``held`` is Z' or
    L'; None where there is no room for it, and blocks are made again for every product, in float64. Where it is L',
    its rows belong to the samples ``pivots``.
    """

    blocks: Callable[[], Iterable[Block]]
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float64
    held: Tensor | None = None
    pivots: Tensor | None = None

    @classmethod
    def of(cls, held: Tensor, pivots: Tensor | None = None) -> HeadSpace:
        """Z' or L' in memory."""
        return cls(lambda: [(slice(None), held.T)], (held.shape[1], held.shape[0]), held.dtype, held, pivots)

    def to(self, dtype: torch.dtype) -> HeadSpace:
        """In another precision, if held."""
        return self if self.held is None or dtype == self.dtype else HeadSpace.of(self.held.to(dtype), self.pivots)

    def scores(self, coordinates: Tensor) -> Tensor:
        """(n_classes, n_samples) from (n_classes, size)."""
        total = coordinates.new_zeros((len(coordinates), self.shape[0]))
        for index, block in self.blocks():
            total += coordinates[:, index] @ block.T
        return total

    def pull(self, residual: Tensor) -> Tensor:
        """The gradient in the coordinates from that in the scores."""
        pulled = residual.new_empty((len(residual), self.shape[1]))
        for index, block in self.blocks():
            pulled[:, index] = residual @ block
        return pulled

    def diagonal(self, curvature: Tensor) -> Tensor:
        """Of Z'HZ for the diagonal matrix H, (size,)."""
        diagonal = curvature.new_empty(self.shape[1])
        for index, block in self.blocks():
            diagonal[index] = torch.cat([rows.square() @ curvature for rows in torch.split(block.T, _PANEL)])
        return diagonal

    def coefficients(self, coordinates: Tensor, blocks: Iterable[Block], n_features: int) -> Tensor:
        """Coefficients of the features, (n_features, n_classes), for which L needs ``blocks`` of Z."""
        if self.held is None or self.pivots is None:
            return coordinates.T
        combination = coordinates.new_zeros((len(coordinates), self.shape[0]))
        triangle = self.held[:, self.pivots]
        combination[:, self.pivots] = torch.linalg.solve_triangular(triangle, coordinates.T, upper=True).T
        solved = coordinates.new_empty((n_features, len(coordinates)))
        for index, block in blocks:
            solved[index] = (combination @ block).T
        return solved


def held_space_bytes(n_samples: int, n_features: int) -> int:
    """Bytes that making and using a `held_space` takes, with its copy in float32 and what preconditions it."""
    size = min(n_samples, n_features)
    factoring = 16 * n_samples**2 if n_features > n_samples else 0
    inverse = 32 * size**2 if size <= LARGEST_INVERSE else 0
    return 8 * size * n_samples + max(factoring, 4 * size * n_samples + inverse)


def held_space(blocks: Iterable[Block], n_samples: int, n_features: int, device: torch.device) -> HeadSpace:
    """Gather features from blocks of columns, standardised as they are to be penalised, in float64."""
    wide = n_features > n_samples
    gathered = torch.zeros((min(n_features, n_samples), n_samples), dtype=torch.float64, device=device)
    for index, block in blocks:
        if wide:
            add_products(gathered, block)
        else:
            gathered[index] = block.T
    if not bool(gathered.norm().isfinite()):
        raise ValueError("The kept features are too large for the ridge head: their products overflow. Scale them.")
    return _factored(gathered) if wide else HeadSpace.of(gathered)


def _factored(products: Tensor) -> HeadSpace:
    """The space of L' for products ZZ', of which the lower triangle is given; as many rows as Z has rank."""
    factor, order, rank, _ = pstrf(products.cpu().numpy(), lower=1)
    pivots = torch.as_tensor(order - 1, dtype=torch.int64, device=products.device)
    matrix = products.new_empty((rank, len(products)))
    matrix[:, pivots] = torch.as_tensor(np.tril(factor)[:, :rank].T, device=products.device)
    return HeadSpace.of(matrix, pivots[:rank])


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add the products of rows with each other to the lower triangle, leaving most of the upper one alone."""
    for start in range(0, len(rows), _PANEL):
        stop = start + _PANEL
        total[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T)
