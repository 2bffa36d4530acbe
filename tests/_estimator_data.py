"""Small problems, independent oracles in numpy and cvxpy, and a feature matrix held in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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


def standardize(X: NDArray[Any], weight: NDArray[Any], center: bool = True) -> NDArray[Any]:
    p = weight / weight.sum()
    mean = p @ X
    return (X - center * mean) / np.sqrt(p @ (X - mean) ** 2)


def log_softmax(scores: NDArray[Any]) -> NDArray[Any]:
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


def objective(X: Any, y: Any, weight: Any, W: Any, b: Any, alpha: float, rho: float) -> float:
    p = weight / weight.sum()
    loss = -(p @ log_softmax(X @ W + b)[np.arange(len(y)), y])
    return float(loss + alpha * (rho * np.linalg.norm(W, axis=1).sum() + (1 - rho) / 2 * (W**2).sum()))


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


def cvxpy_optimum(X: Any, y: Any, weight: Any, alpha: float, rho: float, fit_intercept: bool) -> float:
    k = int(y.max()) + 1
    W, b = cp.Variable((X.shape[1], k)), cp.Variable((1, k))
    scores = X @ W + (np.ones((len(y), 1)) @ b if fit_intercept else 0)
    loss = (weight / weight.sum()) @ (
        cp.log_sum_exp(scores, axis=1) - cp.sum(cp.multiply(scores, np.eye(k)[y]), axis=1)
    )
    penalty = rho * cp.sum(cp.norm(W, 2, axis=1)) + (1 - rho) / 2 * cp.sum_squares(W)
    problem = cp.Problem(cp.Minimize(loss + alpha * penalty), [cp.sum(b) == 0])
    problem.solve(solver=cp.CLARABEL)
    assert problem.status == "optimal"
    return float(problem.value)


@dataclass(frozen=True)
class FakeLayer:
    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


class FakeFeatures:
    """The FeatureMatrix protocol over an array, recording every column whose values are read.

    ``scattered`` gives the column blocks as index arrays in another order than the columns'.
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

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> "FakeView":
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        return FakeView(self, rows, columns)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    def column_blocks(self, max_bytes: int) -> Iterator[tuple[Any, NDArray[Any]]]:
        self.columns_read.update(range(self.shape[1]))
        if self.scattered:
            for start in (1, 0):
                columns = np.arange(start, self.shape[1], 2)
                yield columns, self.values[:, columns]
            return
        for layer in self.layers:
            yield slice(layer.start, layer.stop), self.values[:, layer.start : layer.stop]

    def layer_norms(self) -> NDArray[np.float32]:
        return np.stack([np.linalg.norm(self.values[:, v.start : v.stop], axis=1) for v in self.layers], axis=1)


@dataclass(frozen=True)
class FakeView:
    source: FakeFeatures
    rows: Any
    columns: Any

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        self.source.columns_read.update(np.arange(self.source.shape[1])[self.columns].tolist())
        return self.source.values[self.rows][:, self.columns].astype(dtype or np.float32)
