"""Small problems, independent oracles in numpy and cvxpy, and a feature matrix held in memory."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import entr

from estimators import GroupLassoPath
from estimators.group_lasso.problem import Problem

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def make_problem(seed: int, n: int = 40, d: int = 10, k: int = 3) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Overlapping classes (so that the loss stays away from 0), uneven weights; every class present."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    X = rng.normal(size=(n, d)) * rng.uniform(0.3, 3.0, d) + rng.normal(size=d)
    X[:, : d // 2] += rng.normal(size=(k, d // 2))[y]
    return X, y, rng.uniform(0.2, 3.0, n)


def as_problem(y: Any, weight: Any, rho: float = 1.0, fit_intercept: bool = True, device: str = "cpu") -> Problem:
    targets, p = np.eye(y.max() + 1)[:, y], weight / weight.sum()
    return Problem(torch.as_tensor(targets, device=device), torch.as_tensor(p, device=device), rho, fit_intercept)


def standardize(X: NDArray[Any], weight: NDArray[Any], center: bool = True) -> NDArray[Any]:
    p = weight / weight.sum()
    mean = p @ X
    return (X - center * mean) / np.sqrt(p @ (X - mean) ** 2)


def log_softmax(scores: NDArray[Any]) -> NDArray[Any]:
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


def objective(X: Any, y: Any, weight: Any, W: Any, b: Any, alpha: float, rho: float) -> float:
    p = weight / weight.sum()
    loss = -(p @ log_softmax(X @ W + b)[np.arange(len(y)), y])
    return float(loss + penalty(W, alpha, rho))


def penalty(W: Any, alpha: float, rho: float) -> float:
    return float(alpha * (rho * np.linalg.norm(W, axis=1).sum() + (1 - rho) / 2 * (W**2).sum()))


def gradient(X: Any, y: Any, weight: Any, W: Any, b: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Gradient of the loss in W and in b."""
    p = weight / weight.sum()
    R = p[:, None] * (np.exp(log_softmax(X @ W + b)) - np.eye(W.shape[1])[y])
    return X.T @ R, R.sum(axis=0)


def kkt(X: Any, y: Any, weight: Any, W: Any, b: Any, alpha: float, rho: float) -> float:
    G, _ = gradient(X, y, weight, W, b)
    norms = np.linalg.norm(W, axis=1)
    on = norms > 0
    worst = max(0.0, (np.linalg.norm(G[~on], axis=1) / alpha - rho).max(initial=0.0))
    stationary = G[on] / alpha + rho * W[on] / norms[on, None] + (1 - rho) * W[on]
    return float(max(worst, np.linalg.norm(stationary, axis=1).max(initial=0.0)))


def certificate(
    X: Any, y: Any, weight: Any, path: GroupLassoPath, index: int, rho: float, fit_intercept: bool, standardized: bool
) -> tuple[float, float]:
    """Objective and relative duality gap of the coefficients a path returns, for X as given, in numpy and float64."""
    X, p, W, b = np.asarray(X, dtype=np.float64), weight / weight.sum(), path.coef(index), path.intercepts[index]
    alpha, Y = path.alphas[index], np.eye(W.shape[1])[y]
    sd = np.sqrt(p @ (X - p @ X) ** 2) if standardized else np.ones(X.shape[1])
    varies, shift = np.ptp(X, axis=0) > 0, standardized * fit_intercept * (p @ X)
    G, slope = gradient(X - shift, y, weight, W, b + shift @ W)
    norms = np.linalg.norm(G[varies], axis=1) / sd[varies]
    assert not fit_intercept or np.abs(slope).max() < 1e-6
    P = np.exp(log_softmax(X @ W + b))

    def dual(c: float) -> float:
        value = p @ entr((1 - c) * Y + c * P).sum(axis=1)
        excess = np.maximum(c * norms - alpha * rho, 0)
        return float(value - (excess**2).sum() / (2 * alpha * (1 - rho)) if rho < 1 else value)

    if rho == 1:
        best = dual(min(1.0, alpha / norms.max(initial=alpha)))
    else:
        found = minimize_scalar(lambda c: -dual(c), bounds=(0, 1), method="bounded", options=dict(xatol=1e-10))
        best = max(dual(1.0), -found.fun)
    value = objective(X, y, weight, W, b, 0, rho) + penalty(W * sd[:, None], alpha, rho)
    null = -(p @ Y) @ np.log(p @ Y) if fit_intercept else np.log(W.shape[1])
    return value, (value - best) / null


def cvxpy_optimum(
    X: Any, y: Any, weight: Any, alpha: float, rho: float, fit_intercept: bool, accuracy: float = 1e-8
) -> tuple[float, NDArray[Any], NDArray[Any]]:
    """Objective, W and b, by an interior-point method."""
    k = int(y.max()) + 1
    W, b = cp.Variable((X.shape[1], k)), cp.Variable((1, k))
    scores = X @ W + (np.ones((len(y), 1)) @ b if fit_intercept else 0)
    loss = (weight / weight.sum()) @ (
        cp.log_sum_exp(scores, axis=1) - cp.sum(cp.multiply(scores, np.eye(k)[y]), axis=1)
    )
    norms = rho * cp.sum(cp.norm(W, 2, axis=1)) + (1 - rho) / 2 * cp.sum_squares(W)
    problem = cp.Problem(cp.Minimize(loss + alpha * norms), [cp.sum(b) == 0])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=accuracy, tol_gap_rel=accuracy, tol_feas=accuracy)
    assert problem.status == "optimal"
    return float(problem.value), W.value, b.value[0]


@dataclass(frozen=True)
class FakeLayer:
    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


class FakeFeatures:
    """The FeatureMatrix protocol over an array, recording every column whose values are read, and how often all are.

    Rows and columns of it record what they read in the same place. ``scattered`` gives the column blocks as index
    arrays in another order than the columns'.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(
        self, values: NDArray[Any], widths: tuple[int, ...], name: str = "net", scattered: bool = False
    ) -> None:
        self.values = values.astype(np.float32)
        stops = np.cumsum(widths)
        assert stops[-1] == values.shape[1]
        self.layers = [
            FakeLayer(f"{name}.{i}", int(stop - width), int(stop), (int(width), 1, 1))
            for i, (stop, width) in enumerate(zip(stops, widths, strict=True))
        ]
        self.feature_names = [f"{layer.name}:{i}" for layer in self.layers for i in range(layer.stop - layer.start)]
        self.scattered = scattered
        self.columns_read: set[int] = set()
        self.passes: list[None] = []
        self._norms = np.stack([np.linalg.norm(self.values[:, v.start : v.stop], axis=1) for v in self.layers], axis=1)
        self._columns = np.arange(values.shape[1])

    @property
    def n_passes(self) -> int:
        return len(self.passes)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> "FakeFeatures":
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        n, d = self.shape
        rows, columns = np.arange(n)[rows], np.arange(d)[columns]
        owners = np.repeat(np.arange(len(self.layers)), [layer.stop - layer.start for layer in self.layers])[columns]
        taken = copy(self)
        taken.values, taken._columns = self.values[rows][:, columns], self._columns[columns]
        taken.feature_names = [self.feature_names[column] for column in columns]
        starts = np.flatnonzero(np.diff(owners, prepend=-1)) if len(owners) else owners
        taken.layers = [
            FakeLayer(self.layers[owners[start]].name, int(start), int(stop), (int(stop - start), 1, 1))
            for start, stop in zip(starts, [*starts[1:], len(columns)], strict=False)
        ]
        taken._norms = self._norms[rows][:, owners[starts]]
        return taken

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        self.columns_read.update(self._columns.tolist())
        return self.values.astype(dtype or np.float32)

    def column_blocks(self, max_bytes: int) -> Iterator[tuple[Any, NDArray[Any]]]:
        self.columns_read.update(self._columns.tolist())
        self.passes.append(None)
        if self.scattered:
            for start in (1, 0):
                columns = np.arange(start, self.shape[1], 2)
                yield columns, self.values[:, columns]
            return
        for layer in self.layers:
            yield slice(layer.start, layer.stop), self.values[:, layer.start : layer.stop]

    def layer_norms(self) -> NDArray[np.float32]:
        return self._norms
