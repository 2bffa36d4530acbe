"""The published training: a linear softmax head, by Adam on minibatches, with a group penalty or without.

Rows are shuffled once, when X is copied to the device; each batch is then a slice, read twice per step and never
gathered. W, its gradient and Adam's moments are class-major, so that every pass over them runs along memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from estimators.features import ColumnSource, iterate_blocks
from estimators.group_lasso.operators import column_moments, resolve_device, storage_dtype, stored_precision

_BETAS = (0.9, 0.999)
_EPSILON = 1e-7


class AdamSolution(NamedTuple):
    """What `train` found: weights (n_features, n_classes) of the columns ``(x - mean) * inverse_sd``, intercepts."""

    weights: NDArray[np.float64]
    intercept: NDArray[np.float64]
    mean: NDArray[np.float64]
    inverse_sd: NDArray[np.float64]


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
) -> AdamSolution:
    """Train a linear softmax head on CE + coef * sum_d ||W_d||_2.

    The kernel starts Glorot-uniform, the bias, which is not penalised, at zero. The rows are shuffled once and cut
    into batches of ``batch_size``, the last of an epoch holding what is left; the loss of a batch is divided by
    ``batch_size`` and its penalty scaled by its share of it, so that every row counts the same. Step t = 0, 1, ...
    of T = ``n_steps`` is Adam's with learning rate eta_t = ``learning_rate`` * (1 + cos(pi t / T)) / 2::

        m = 0.9 m + 0.1 g,  v = 0.999 v + 0.001 g^2
        w = w - eta_t sqrt(1 - 0.999^(t+1)) / (1 - 0.9^(t+1)) * m / (sqrt(v) + 1e-7)

    The gradient of ||W_d|| at zero counts as zero. A row's cross-entropy is multiplied by s_i / mean(s); rows of zero
    weight, and classes that have no others, are left out: their weights are 0 and their intercept is -inf. With
    ``standardize``, columns have zero weighted mean and unit weighted variance; constant ones get zero. Start and
    shuffle are drawn on the CPU, whatever the device.

    Raises
    ------
    ValueError
        If X is not finite in float32, or the training diverges.
    """
    rows, target = np.flatnonzero(sample_weight > 0), resolve_device(device)
    present = np.unique(codes[rows])
    generator = torch.Generator().manual_seed(seed)
    limit = math.sqrt(6.0 / (X.shape[1] + len(present)))
    kernel = torch.empty((len(present), X.shape[1])).uniform_(-limit, limit, generator=generator).to(target)
    order = rows[torch.randperm(len(rows), generator=generator).numpy()]
    share = torch.as_tensor(sample_weight[order] / sample_weight[rows].mean(), device=target)
    data, mean, inverse_sd = _load(X, order, share / len(order), standardize, target)
    kernel[:, inverse_sd == 0] = 0.0
    classes = torch.as_tensor(np.searchsorted(present, codes[order]), device=target)
    targets = torch.nn.functional.one_hot(classes, len(present)).T.float()
    bias = _descend(kernel, data, targets, share.float(), coef, learning_rate, n_steps, batch_size)

    weights, intercept = np.zeros((X.shape[1], n_classes)), np.full(n_classes, -np.inf)
    weights[:, present], intercept[present] = kernel.T.double().cpu().numpy(), bias.double().cpu().numpy()
    if not (np.isfinite(weights).all() and np.isfinite(intercept[present]).all()):
        raise ValueError(f"The training diverged at learning_rate={learning_rate!r}; lower it, or scale X.")
    return AdamSolution(weights, intercept, mean.cpu().numpy(), inverse_sd.cpu().numpy())


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
    bias = kernel.new_zeros(len(kernel))
    kernel.grad, bias.grad = torch.empty_like(kernel), torch.empty_like(bias)
    # One kernel reads and writes W, m and v once: 28 bytes per weight, where separate operations move over twice that.
    optimizer = torch.optim.Adam([kernel, bias], betas=_BETAS, fused=True)
    settings = optimizer.param_groups[0]
    n_batches = math.ceil(len(data) / batch_size)
    for step in range(n_steps):
        start = step % n_batches * batch_size
        batch = slice(start, min(start + batch_size, len(data)))
        rows = data[batch]
        residual = torch.softmax(torch.addmm(bias[:, None], kernel, rows.T), dim=0)
        residual.sub_(targets[:, batch]).mul_(share[batch] / batch_size)
        torch.mm(residual, rows, out=kernel.grad)
        torch.sum(residual, dim=1, out=bias.grad)
        if coef:
            norms = kernel.square().sum(0).sqrt_()
            kernel.grad.addcmul_(kernel, torch.where(norms > 0, coef * len(rows) / batch_size / norms, 0.0))
        settings["lr"] = 0.5 * learning_rate * (1.0 + math.cos(math.pi * step / n_steps))
        # torch adds epsilon after it corrects the bias of v, the published code before.
        settings["eps"] = _EPSILON / math.sqrt(1.0 - _BETAS[1] ** (step + 1))
        optimizer.step()
    return bias


def _load(
    X: ColumnSource | NDArray[Any], order: NDArray[np.int64], weights: Tensor, standardize: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of X in the given order, (len(order), n_features) float32, and the mean and 1 / sd they were scaled by."""
    data = torch.full((len(order), X.shape[1]), torch.nan, device=device)
    mean = torch.zeros(X.shape[1], dtype=torch.float64, device=device)
    inverse_sd = torch.ones_like(mean)
    wide = np.float32 if storage_dtype(X, None) == torch.float32 else np.float64
    for columns, block in iterate_blocks(X):
        index = columns if isinstance(columns, slice) else torch.as_tensor(columns, device=device)
        values = torch.from_numpy(np.asarray(block[order], wide)).to(device)
        if standardize:
            values = values.double()
            mean[index], sd = column_moments(values.T, weights, stored_precision(X))
            inverse_sd[index] = torch.where(sd == 0, 0.0, 1.0 / torch.where(sd.isfinite(), sd, torch.nan))
            values = (values - mean[index]) * inverse_sd[index]
        data[:, index] = values.float()
    least, largest = torch.aminmax(data, dim=0)
    bad = ~(least.isfinite() & largest.isfinite())
    if bool(bad.any()):
        raise ValueError(
            f"X holds NaN or infinity (in float32) in column {int(bad.nonzero()[0])}, or X.column_blocks left it out; "
            "it must be finite."
        )
    return data, mean, inverse_sd
