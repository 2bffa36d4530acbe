"""The published training of Head2Toe: a linear softmax head, by Adam on minibatches, with a group penalty or without.

Rows are shuffled once, when X is copied to the device; each batch is then a slice, read twice per step and never
gathered. W, its gradient and Adam's moments are class-major, so that every pass over them runs along memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from estimators.device import resolve_device
from estimators.features import Features, as_features, iterate_blocks
from estimators.group_lasso.moments import column_moments
from estimators.group_lasso.operators import storage_dtype, stored_precision
from estimators.labels import check_sample_weight
from estimators.sklearn_private import Interval, validate_parameter_constraints

_BETAS = (0.9, 0.999)
_EPSILON = 1e-7

_CONSTRAINTS: dict[str, list[Any]] = {
    "n_classes": [Interval(Integral, 2, None, closed="left")],
    "sample_weight": ["array-like", None],
    "standardize": ["boolean"],
    "coef": [Interval(Real, 0, None, closed="left")],
    "learning_rate": [Interval(Real, 0, None, closed="neither")],
    "n_steps": [Interval(Integral, 1, None, closed="left")],
    "batch_size": [Interval(Integral, 1, None, closed="left")],
    "seed": [Interval(Integral, 0, None, closed="left")],
    "device": [str, torch.device],
}


def train(
    X: Features | ArrayLike,
    codes: ArrayLike,
    n_classes: int,
    *,
    sample_weight: ArrayLike | None = None,
    standardize: bool = False,
    coef: float = 0.0,
    learning_rate: float = 0.01,
    n_steps: int = 500,
    batch_size: int = 128,
    seed: int,
    device: str | torch.device = "auto",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Train a linear softmax head on CE + coef * sum_d ||W_d||_2.

    The kernel starts Glorot-uniform, the bias, which is not penalised, at zero. The rows are shuffled once and cut
    into batches of ``batch_size``, the last of an epoch holding what is left; the loss of a batch is divided by
    ``batch_size`` and its penalty scaled by its share of it, so that every row counts the same. Step t = 0, 1, ...
    of T = ``n_steps`` is Adam's with learning rate eta_t = ``learning_rate`` * (1 + cos(pi t / T)) / 2::

        m = 0.9 m + 0.1 g,  v = 0.999 v + 0.001 g^2
        w = w - eta_t sqrt(1 - 0.999^(t+1)) / (1 - 0.9^(t+1)) * m / (sqrt(v) + 1e-7)

    The gradient of ||W_d|| at zero counts as zero.

    Parameters
    ----------
    X : array-like, Tensor or FeatureMatrix of shape (n_samples, n_features)
        Finite. Held once on the device, as float32.
    codes : array-like of shape (n_samples,)
        Classes as integers 0 .. n_classes - 1.
    n_classes : int
    sample_weight : array-like of shape (n_samples,), default=None
        Non-negative; a row's cross-entropy is multiplied by s_i / mean(s). Rows and classes of zero weight are left
        out.
    standardize : bool, default=False
        Train on columns scaled to zero weighted mean and unit weighted variance; constant columns get zero.
    coef : float, default=0.0
        Strength of the group penalty.
    learning_rate : float, default=0.01
    n_steps : int, default=500
    batch_size : int, default=128
    seed : int
        Of the start and the shuffle, which are drawn on the CPU whatever the device.
    device : str or torch.device, default="auto"
        ``"auto"`` is CUDA where there is one, else the CPU.

    Returns
    -------
    coef : ndarray of shape (n_features, n_classes), float64
        W, for the standardised columns with ``standardize``; zero for a class left out.
    intercept : ndarray of shape (n_classes,), float64
        -inf for a class left out.

    Raises
    ------
    ValueError
        If an argument is not as described, fewer than two classes have positive weight, or the training diverges.
    """
    given = dict(locals())
    validate_parameter_constraints(_CONSTRAINTS, {name: given[name] for name in _CONSTRAINTS}, caller_name="train")
    features = as_features(X)
    labels = _check_codes(codes, n_classes, features.shape[0])
    weight = check_sample_weight(sample_weight, len(labels))
    rows = np.flatnonzero(weight > 0)
    present = np.unique(labels[rows])
    if len(present) < 2:
        raise ValueError(f"codes must hold at least two classes with positive weight, got {len(present)}: {present}.")

    generator = torch.Generator().manual_seed(int(seed))
    kernel = _glorot_uniform(len(present), features.shape[1], generator)
    order = rows[torch.randperm(len(rows), generator=generator).numpy()]
    target = resolve_device(device)
    kernel, share = kernel.to(target), torch.as_tensor(weight[order] / weight[rows].mean(), device=target)
    data, constant = _load(features, order, share / len(order), standardize, target)
    kernel[:, constant] = 0.0
    classes = torch.as_tensor(np.searchsorted(present, labels[order]), device=target)
    targets = torch.nn.functional.one_hot(classes, len(present)).T.float()
    bias = _descend(kernel, data, targets, share.float(), coef, learning_rate, n_steps, batch_size)

    solved, intercept = np.zeros((features.shape[1], n_classes)), np.full(n_classes, -np.inf)
    solved[:, present], intercept[present] = kernel.T.double().cpu().numpy(), bias.double().cpu().numpy()
    if not (np.isfinite(solved).all() and np.isfinite(intercept[present]).all()):
        raise ValueError(f"the training diverged at learning_rate={learning_rate!r}; lower it, or scale X.")
    return solved, intercept


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
    for step, batch in zip(range(n_steps), _batches(len(data), batch_size), strict=False):
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


def _batches(n_samples: int, batch_size: int) -> Iterator[slice]:
    while True:
        for start in range(0, n_samples, batch_size):
            yield slice(start, min(start + batch_size, n_samples))


def _glorot_uniform(n_classes: int, n_features: int, generator: torch.Generator) -> Tensor:
    limit = math.sqrt(6.0 / (n_features + n_classes))
    return torch.empty((n_classes, n_features)).uniform_(-limit, limit, generator=generator)


def _load(
    X: Features, order: NDArray[np.int64], weights: Tensor, standardize: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows of X in the given order, (len(order), n_features) float32, and which columns standardising found constant.

    Raises
    ------
    ValueError
        If a column is not finite in float32, or is missing from X's blocks.
    """
    data = torch.full((len(order), X.shape[1]), torch.nan, device=device)
    constant = torch.zeros(X.shape[1], dtype=torch.bool, device=device)
    wide = np.float32 if storage_dtype(X, None) == torch.float32 else np.float64
    rows = torch.as_tensor(order, device=X.device) if isinstance(X, Tensor) else None
    for columns, block in iterate_blocks(X):
        index = columns if isinstance(columns, slice) else torch.as_tensor(columns, device=device)
        if isinstance(block, Tensor):
            values = block[rows].to(device)
        else:
            values = torch.from_numpy(np.asarray(block[order], wide)).to(device)
        if standardize:
            values = values.double()
            mean, sd = column_moments(values.T, weights, stored_precision(X))
            constant[index] = sd == 0
            values = torch.where(sd == 0, 0.0, (values - mean) / torch.where(sd.isfinite(), sd, torch.nan))
        data[:, index] = values.float()
    least, largest = torch.aminmax(data, dim=0)
    bad = ~(least.isfinite() & largest.isfinite())
    if bool(bad.any()):
        raise ValueError(
            f"X holds NaN or infinity (in float32) in column {int(bad.nonzero()[0])}, or X.column_blocks left it out; "
            "it must be finite."
        )
    return data, constant


def _check_codes(codes: ArrayLike, n_classes: int, n_samples: int) -> NDArray[np.int64]:
    labels = np.asarray(codes)
    if labels.shape != (n_samples,):
        raise ValueError(f"codes must have shape ({n_samples},), one per row of X, got {labels.shape}.")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(
            f"codes must be integers from 0 to n_classes - 1 = {n_classes - 1}, got {labels.dtype} values from "
            f"{labels.min()} to {labels.max()}."
        )
    return labels.astype(np.int64)
