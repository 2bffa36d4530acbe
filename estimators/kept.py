"""The kept features, read, scaled by layer and standardised by blocks of columns, and the head fitted on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.device import memory_limit
from estimators.features import ColumnSource, FeatureMatrix, is_feature_matrix, iterate_blocks
from estimators.group_lasso.moments import column_moments
from estimators.group_lasso.operators import stored_precision
from estimators.heads import (
    TOLERANCE,
    Block,
    HeadSpace,
    HeldSpace,
    RidgeSolution,
    StreamedSpace,
    fit_ridge_head,
    held_space,
    held_space_bytes,
)
from estimators.scaling import LayerScaled, inverse_layer_norms, inverse_norms
from estimators.switches import full_precision

_HELD_SHARE = 4
_BLOCK_BYTES = 2 * 2**20
_FINE_TOLERANCE = 1e-14


def held_bytes(max_memory: int | str | None) -> int:
    """What columns read from a store may take on the host: a quarter of the limit that estimators are given."""
    return memory_limit(max_memory, torch.device("cpu")) // _HELD_SHARE


def in_memory(X: FeatureMatrix | NDArray[Any], max_bytes: float) -> FeatureMatrix | NDArray[Any]:
    """Stored features as an array if they take no more than ``max_bytes``, else as they are."""
    if not isinstance(X, np.ndarray) and X.shape[0] * X.shape[1] * np.dtype(X.dtype).itemsize <= max_bytes:
        return np.asarray(X)
    return X


class KeptFeatures:
    """Selected columns of X, scaled by layer as the head sees them.

    Parameters
    ----------
    X : ndarray or FeatureMatrix of shape (n_samples, n_features)
        Nothing but the selected columns is read.
    selected : ndarray of shape (n_kept,), int64
        Sorted.
    layers : ndarray of shape (n_features,), int64
        From `layer_index`.
    scaling : {"", "kept", "whole"}
        What each layer's part of a row is divided by: nothing, its length, or the length of the whole layer.
    max_bytes : float, default=infinity
        The columns are held if they take no more than this, else read again wherever they are needed.
    """

    def __init__(
        self,
        X: FeatureMatrix | NDArray[Any],
        selected: NDArray[np.int64],
        layers: NDArray[np.int64],
        scaling: str,
        max_bytes: float = np.inf,
    ) -> None:
        self.shape = (X.shape[0], len(selected))
        self.precision = stored_precision(X)
        columns: ColumnSource | NDArray[Any]
        if is_feature_matrix(X):
            columns = in_memory(X[:, selected], max_bytes)
        elif self.shape == X.shape:
            columns = X
        else:
            columns = np.take(X, selected, axis=1)
        if scaling == "kept":
            columns = LayerScaled(columns, layers[selected], inverse_norms(columns, layers[selected]))
        elif scaling == "whole":
            columns = LayerScaled(columns, layers[selected], inverse_layer_norms(X, layers))
        self._columns = columns

    def blocks(self) -> Iterator[tuple[slice | NDArray[np.int64], NDArray[Any]]]:
        """(which of the kept columns, block of shape (n_samples, width)) until all were given.

        Raises
        ------
        ValueError
            If a value is not finite.
        """
        if isinstance(self._columns, np.ndarray):
            width = max(1, _BLOCK_BYTES // max(1, self.shape[0] * self._columns.itemsize))
            parts: Iterator[tuple[Any, Any]] = (
                (slice(start, start + width), self._columns[:, start : start + width])
                for start in range(0, self.shape[1], width)
            )
        else:
            parts = iterate_blocks(self._columns)
        for index, block in parts:
            # The sum is finite only if all terms are; that finite terms overflow is looked into.
            with np.errstate(over="ignore", invalid="ignore"):
                suspicious = not np.isfinite(block.sum())
            if suspicious and not np.isfinite(block).all():
                raise ValueError("X holds NaN or infinity in the selected features; they must be finite.")
            yield index, block

    def scores(self, coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> NDArray[np.float64]:
        """Linear scores for coefficients (n_kept, n_outputs), (n_samples, n_outputs) float64."""
        total = torch.zeros((self.shape[0], len(intercept)), dtype=torch.float64)
        # By torch like all else: the threads of numpy's BLAS would go on waiting for work beside torch's.
        for index, block in self.blocks():
            total += torch.from_numpy(block.astype(np.float64)) @ torch.from_numpy(np.array(coef[index]))
        return total.numpy() + intercept

    def values(self) -> NDArray[np.float64]:
        """All of them, (n_samples, n_kept) float64."""
        gathered = np.empty(self.shape)
        for index, block in self.blocks():
            gathered[:, index] = block
        return gathered


class RidgeHead:
    """L2 logistic regression on kept features for as many values of C as wanted, gathered once.

    Parameters
    ----------
    kept : KeptFeatures of shape (n_samples, n_kept)
    codes : ndarray of shape (n_samples,), int64
        Classes 0 .. n_classes - 1.
    n_classes : int
    sample_weight : ndarray of shape (n_samples,), float64
        Non-negative. Rows of weight 0 and classes that have no others are left out.
    standardize : bool
        Penalise the coefficients of features with zero mean and unit variance.
    device : torch.device
    moments : (mean, inverse standard deviation), each of shape (n_kept,), float64, default=None
        Of the kept features, where they are known.
    max_bytes : float, default=infinity
        What the head may take to hold its features; where that is not enough they are made again for every product.

    Attributes
    ----------
    solution : RidgeSolution or None
        For the last C.
    """

    def __init__(
        self,
        kept: KeptFeatures,
        codes: NDArray[np.int64],
        n_classes: int,
        sample_weight: NDArray[np.float64],
        standardize: bool,
        device: torch.device,
        moments: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
        max_bytes: float = np.inf,
    ) -> None:
        self._kept, self._n_classes, self._device = kept, n_classes, device
        self._rows = np.flatnonzero(sample_weight > 0)
        self._whole = len(self._rows) == len(sample_weight)
        self._present, present_codes = np.unique(codes[self._rows], return_inverse=True)
        self._weight = torch.as_tensor(sample_weight[self._rows], device=device)
        self._targets = torch.nn.functional.one_hot(torch.as_tensor(present_codes, device=device)).T.double()
        self._standardize = standardize
        self._work = torch.float32 if kept.precision > np.finfo(np.float64).eps else torch.float64
        self._known_moments = not standardize or moments is not None
        if standardize and moments is not None:
            self._mean, self._scale = (torch.as_tensor(moment, device=device) for moment in moments)
        else:
            self._mean = torch.zeros(kept.shape[1], dtype=torch.float64, device=device)
            self._scale = torch.ones_like(self._mean)
        self._space = self._gather(max_bytes)
        self.solution: RidgeSolution | None = None

    @full_precision()
    def _gather(self, max_bytes: float) -> HeadSpace:
        shape = len(self._rows), self._kept.shape[1]
        if held_space_bytes(*shape) > max_bytes:
            return StreamedSpace(self._standardized, shape)
        return held_space(self._standardized(), *shape)

    def _standardized(self) -> Iterator[Block]:
        """The features as they are penalised, in float64: rounded ones have other solutions where C is large."""
        for index, block in self._blocks():
            if not self._known_moments:
                mean, sd = column_moments(block.T.double(), self._weight / self._weight.sum(), self._kept.precision)
                self._mean[index], self._scale[index] = mean, torch.where(sd > 0.0, 1.0 / sd, 0.0)
            if self._standardize:
                yield index, torch.sub(block, self._mean[index]).mul_(self._scale[index])
            else:
                yield index, block.double()
        self._known_moments = True

    def _blocks(self) -> Iterator[Block]:
        for index, block in self._kept.blocks():
            rows = block if self._whole else block[self._rows]
            # Torch takes no negative strides, and warns where it may not write, as joblib maps arrays for its workers.
            shared = rows.flags.writeable and min(rows.strides) >= 0
            tensor = torch.from_numpy(rows if shared else rows.copy()).to(self._device)
            yield (index if isinstance(index, slice) else torch.as_tensor(index, device=self._device)), tensor

    @full_precision()
    def fit(
        self, C: float, similar: RidgeSolution | None = None, rough: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Solve for one C, starting from the solution for the C before.

        Parameters
        ----------
        C : float
        similar : RidgeSolution, default=None
            A ``solution`` for this C of a head with other features, to start from instead.
        rough : bool, default=False
            Stop at 1e-8 of the objective, which is enough to compare heads, where the features are narrower than
            float64.

        Returns
        -------
        coef : ndarray of shape (n_kept, n_classes), float64
            For the kept features, standardisation undone; zero for classes left out.
        intercept : ndarray of shape (n_classes,), float64
            -inf for classes left out.
        """
        tolerance = 0.0 if self._work == torch.float64 else TOLERANCE if rough else _FINE_TOLERANCE
        self.solution = fit_ridge_head(
            self._space, self._targets, self._weight, C, self.solution, similar, self._work, tolerance
        )
        coordinates, intercept = self.solution.coordinates, self.solution.intercept
        if isinstance(self._space, HeldSpace) and self._space.pivots is not None:
            solved = torch.empty((self._kept.shape[1], len(self._targets)), dtype=torch.float64, device=self._device)
            combination = self._space.combination(coordinates)
            for index, block in self._standardized():
                solved[index] = (combination @ block).T * self._scale[index, None]
        else:
            solved = coordinates.T * self._scale[:, None]
        coef = np.zeros((self._kept.shape[1], self._n_classes))
        offset = np.full(self._n_classes, -np.inf)
        coef[:, self._present] = solved.cpu().numpy()
        offset[self._present] = (intercept - self._mean @ solved).cpu().numpy()
        return coef, offset
