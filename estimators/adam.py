"""The published training: a linear softmax head, by Adam on minibatches, with a group penalty or without.

Rows are shuffled once, when X is copied to the device; each batch is then a slice, read twice per step and never
gathered. W, its gradient and Adam's moments are class-major, so that every pass over them runs along memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from estimators.device import resolve_device
from estimators.features import ColumnSource, iterate_blocks
from estimators.group_lasso.moments import column_moments
from estimators.group_lasso.operators import storage_dtype, stored_precision
from estimators.head import LinearModel

_BETAS = (0.9, 0.999)
_EPSILON = 1e-7


def train(
    X: ColumnSource | NDArray[Any],
    codes: NDArray[np.int64],
    n_classes: int,
    sample_weight: NDArray[np.float64],
    *,
    standardize: bool = False,
    coef: float = 0.0,
    learning_rate: float = 0.01,
    n_steps: int = 500,
    batch_size: int = 128,
    seed: int,
    device: str | torch.device = "auto",
) -> LinearModel:
    """Train a linear softmax head on CE + coef * sum_d ||W_d||_2, for columns of unit variance with ``standardize``.

    The kernel starts Glorot-uniform, the bias, which is not penalised, at zero. The rows are shuffled once and cut
    into batches of ``batch_size``, the last of an epoch holding what is left; the loss of a batch is divided by
    ``batch_size``, or by the number of rows if that is smaller, and its penalty scaled by its share of it, so that
    every row counts the same. Step t = 0, 1, ... of T = ``n_steps`` is Adam's with learning rate
    eta_t = ``learning_rate`` * (1 + cos(pi t / T)) / 2::

        m = 0.9 m + 0.1 g,  v = 0.999 v + 0.001 g^2
        w = w - eta_t sqrt(1 - 0.999^(t+1)) / (1 - 0.9^(t+1)) * m / (sqrt(v) + 1e-7)

    The gradient of ||W_d|| at zero counts as zero. A row's cross-entropy is multiplied by s_i / mean(s); rows of zero
    weight, and classes that have no others, are left out. Computed in float32, or float64 if X is wider. Start and
    shuffle are drawn on the CPU, whatever the device.
    """
    rows, target = np.flatnonzero(sample_weight > 0), resolve_device(device)
    present = np.unique(codes[rows])
    generator = torch.Generator().manual_seed(seed)
    limit = math.sqrt(6.0 / (X.shape[1] + len(present)))
    kernel = torch.empty((len(present), X.shape[1])).uniform_(-limit, limit, generator=generator)
    order = rows[torch.randperm(len(rows), generator=generator).numpy()]
    share = torch.as_tensor(sample_weight[order] / sample_weight[rows].mean(), device=target)
    data, mean, inverse_sd = _load(X, order, share / len(order), standardize, target)
    kernel = kernel.to(data)
    kernel[:, inverse_sd == 0] = 0.0
    classes = torch.as_tensor(np.searchsorted(present, codes[order]), device=target)
    targets = torch.nn.functional.one_hot(classes, len(present)).T.to(data.dtype)
    bias = _descend(kernel, data, targets, share.to(data.dtype), coef, learning_rate, n_steps, batch_size)

    weights = kernel.T.double()
    raw, row_norms = weights * inverse_sd[:, None], weights.norm(dim=1).cpu().numpy()
    solved, intercept = np.zeros((X.shape[1], n_classes)), np.full(n_classes, -np.inf)
    solved[:, present], intercept[present] = raw.cpu().numpy(), (bias.double() - mean @ raw).cpu().numpy()
    if not (np.isfinite(row_norms).all() and np.isfinite(intercept[present]).all()):
        raise ValueError(f"The training diverged at learning_rate={learning_rate!r}; lower it, or scale X.")
    return LinearModel(solved, intercept, row_norms, n_steps)


def _descend(
    kernel: Tensor,
    data: Tensor,
    targets: Tensor,
    share: Tensor,
    coef: float,
    learning_rate: float,
    n_steps: int,
    batch_size: int,
) -> Tensor:
    """Train ``kernel`` (n_classes, n_features) in place, and return the bias (n_classes,)."""
    bias, size = kernel.new_zeros(len(kernel)), min(batch_size, len(data))
    kernel.grad, bias.grad = torch.empty_like(kernel), torch.empty_like(bias)
    # One kernel reads and writes W, m and v once: 28 bytes per weight, where separate operations move over twice that.
    optimizer = torch.optim.Adam([kernel, bias], betas=_BETAS, fused=True)
    settings = optimizer.param_groups[0]
    starts = range(0, len(data), size)
    for step in range(n_steps):
        start = starts[step % len(starts)]
        batch = slice(start, min(start + size, len(data)))
        rows = data[batch]
        residual = torch.softmax(torch.addmm(bias[:, None], kernel, rows.T), dim=0)
        residual.sub_(targets[:, batch]).mul_(share[batch] / size)
        torch.mm(residual, rows, out=kernel.grad)
        torch.sum(residual, dim=1, out=bias.grad)
        if coef:
            norms = kernel.square().sum(0).sqrt_()
            kernel.grad.addcmul_(kernel, torch.where(norms > 0, coef * len(rows) / size / norms, 0.0))
        settings["lr"] = 0.5 * learning_rate * (1.0 + math.cos(math.pi * step / n_steps))
        # torch adds epsilon after it corrects the bias of v, the published code before.
        settings["eps"] = _EPSILON / math.sqrt(1.0 - _BETAS[1] ** (step + 1))
        optimizer.step()
    return bias


def _load(
    X: ColumnSource | NDArray[Any], order: NDArray[np.int64], weights: Tensor, standardize: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of X in the given order, (len(order), n_features), and the mean and 1 / sd they were scaled by."""
    mean = torch.zeros(X.shape[1], dtype=torch.float64, device=device)
    inverse_sd = torch.ones_like(mean)
    data = torch.full((len(order), X.shape[1]), torch.nan, dtype=storage_dtype(X, None), device=device)
    for columns, block in iterate_blocks(X):
        index = columns if isinstance(columns, slice) else torch.as_tensor(columns, device=device)
        values = torch.from_numpy(np.asarray(block[order])).to(device)
        if standardize:
            values = values.double()
            mean[index], sd = column_moments(values.T, weights, stored_precision(X))
            inverse_sd[index] = torch.where(sd == 0, 0.0, 1.0 / sd)
            values = (values - mean[index]) * inverse_sd[index]
        data[:, index] = values.to(data.dtype)
    least, largest = torch.aminmax(data, dim=0)
    bad = ~(largest - least).isfinite()
    if bool(bad.any()):
        raise ValueError(f"X holds NaN or infinity in column {int(bad.nonzero()[0])}; it must be finite.")
    return data, mean, inverse_sd
