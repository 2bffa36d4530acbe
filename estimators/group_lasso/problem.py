"""The multinomial group lasso as mathematics: loss, penalty, exact intercept, dual value, gap.

With weights p_i summing to one, P = softmax(XW + b), R = diag(p)(P - Y) and rho = ``l1_ratio``::

    P(W, b) = sum_i p_i CE(y_i, x_i W + b) + alpha * [rho * sum_d ||W_d||_2 + (1 - rho)/2 * ||W||_F^2]

Nothing here knows where X lives or how the problem is solved: every function takes X W, X'R or their norms. Tensors are
class-major, (n_classes, n_samples) and (n_classes, n_features): the softmax over few classes then runs along samples,
several times faster than across them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INTERCEPT_TOLERANCE = 1e-12
_EPS, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything about the problem but X and alpha.

    Attributes
    ----------
    targets : Tensor of shape (n_classes, n_samples), float64
        One-hot labels Y.
    weights : Tensor of shape (n_samples,), float64
        Positive, summing to one.
    l1_ratio : float
        rho, in [0, 1].
    fit_intercept : bool
        Whether b is free (and unpenalised) or zero.
    """

    targets: Tensor
    weights: Tensor
    l1_ratio: float
    fit_intercept: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What X W predicts once its intercept is optimal.

    Attributes
    ----------
    intercept : Tensor of shape (n_classes,), float64
        argmin_b of the loss, summing to zero; zeros without an intercept.
    probabilities : Tensor of shape (n_classes, n_samples), float64
        P = softmax(XW + b).
    residual : Tensor of shape (n_classes, n_samples), float64
        R = diag(p)(P - Y), the gradient of the loss in XW.
    loss : float
        sum_i p_i CE(y_i, x_i W + b).
    exact : bool
        Whether max|sum_i R_i| <= 1e-12 was reached; without it R is no dual point.
    """

    intercept: Tensor
    probabilities: Tensor
    residual: Tensor
    loss: float
    exact: bool


def null_probabilities(problem: Problem) -> Tensor:
    """Class probabilities of W = 0: the class frequencies p'Y, or 1/K without an intercept.

    Returns
    -------
    Tensor of shape (n_classes,), float64
    """
    frequencies = problem.targets @ problem.weights
    return frequencies if problem.fit_intercept else torch.full_like(frequencies, 1.0 / len(frequencies))


def null_objective(problem: Problem) -> float:
    """P(0, b0), the objective of W = 0 with its best intercept, to which gaps are relative."""
    frequencies = problem.targets @ problem.weights
    return -float((frequencies * null_probabilities(problem).log()).sum())


def loss(problem: Problem, scores: Tensor) -> float:
    """sum_i p_i CE(y_i, scores_i) for scores XW + b of shape (n_classes, n_samples), float64."""
    return float(problem.weights @ (torch.logsumexp(scores, 0) - (scores * problem.targets).sum(0)))


def penalty(problem: Problem, row_norms: Tensor, alpha: float) -> float:
    """alpha * [rho * sum_d ||W_d|| + (1 - rho)/2 * sum_d ||W_d||^2] from the norms ||W_d||."""
    rho = problem.l1_ratio
    return alpha * float(rho * row_norms.sum() + 0.5 * (1.0 - rho) * row_norms.square().sum())


def alpha_max(problem: Problem, gradient_norms: Tensor) -> float:
    """The smallest alpha whose solution is W = 0: max_d ||X_d'R|| / rho at W = 0.

    Parameters
    ----------
    problem : Problem
        With ``l1_ratio`` > 0.
    gradient_norms : Tensor of shape (n_features,), float64
        ||X_d'R|| at W = 0.
    """
    return float(gradient_norms.max()) / problem.l1_ratio


def intercept_hessian(problem: Problem, probabilities: Tensor) -> Tensor:
    """Hessian of the loss in b, sum_i p_i (diag(P_i) - P_i P_i'), plus 11'/K times its mean eigenvalue.

    The Hessian is singular along 1, where the loss is constant; the added term makes it positive definite and
    leaves solutions for right sides orthogonal to 1 unchanged.

    Returns
    -------
    Tensor of shape (n_classes, n_classes), float64
    """
    # A graph's Laplacian: its diagonal from what is next to it has no rounding errors where P is saturated.
    hessian = -probabilities @ (problem.weights * probabilities).T
    hessian.fill_diagonal_(0.0)
    hessian.diagonal().sub_(hessian.sum(1))
    mean = hessian.diagonal().mean().clamp_min(1e-20)
    hessian += mean / len(hessian)
    hessian.diagonal().add_(1e-13 * mean)
    return hessian


def evaluate(problem: Problem, products: Tensor, start: Tensor, finest: float = INTERCEPT_TOLERANCE) -> Evaluation:
    """Minimise the loss over the intercept by damped Newton steps and return everything that follows from it.

    Parameters
    ----------
    problem : Problem
    products : Tensor of shape (n_classes, n_samples), float64
        XW.
    start : Tensor of shape (n_classes,), float64
        Where to start; the intercept of a nearby W saves steps.
    finest : float, default=1e-12
        Where to stop, at most 1e-12; steps that gain no more end it before.

    Returns
    -------
    Evaluation
        With ``exact=False`` if 100 steps do not reach max|sum_i R_i| <= 1e-12.
    """
    intercept = start if problem.fit_intercept else torch.zeros_like(start)
    # An intercept that was returned from here comes back unchanged, to the last bit.
    if abs(float(intercept.sum())) > 1e-12 * (1.0 + float(intercept.abs().max())):
        intercept = intercept - intercept.mean()
    probabilities, value = _predict(problem, products + intercept[:, None])
    reach = 1.0 + 2.0 * float(products.abs().max())
    slack, imbalance = 4 * _EPS * reach, math.inf
    for step_index in range(101):
        residual = problem.weights * (probabilities - problem.targets)
        slope = residual.sum(1)
        before, imbalance = imbalance, float(slope.abs().max()) if problem.fit_intercept else 0.0
        exact = imbalance <= INTERCEPT_TOLERANCE
        if imbalance <= finest or (exact and imbalance > 0.5 * before) or step_index == 100:
            break
        direction = -torch.linalg.solve(intercept_hessian(problem, probabilities), slope)
        direction -= direction.mean()
        # Where P is saturated the Hessian all but vanishes; a step beyond the spread of XW cannot be meant.
        direction *= min(1.0, reach / max(float(direction.abs().max()), _TINY))
        expected, size = float(slope @ direction), 1.0
        while size > 1e-12:
            trial = intercept + size * direction
            trial_probabilities, trial_value = _predict(problem, products + trial[:, None])
            if trial_value <= value + 1e-4 * size * expected + slack:
                break
            size /= 2
        if size <= 1e-12:
            break
        intercept, probabilities, value = trial, trial_probabilities, trial_value
    return Evaluation(intercept, probabilities, residual, value, exact)


def _predict(problem: Problem, scores: Tensor) -> tuple[Tensor, float]:
    """softmax(scores) and their loss, from one exponential."""
    normalizer = torch.logsumexp(scores, 0)
    value = float(problem.weights @ (normalizer - (scores * problem.targets).sum(0)))
    return (scores - normalizer).exp_(), value


def _entropy(problem: Problem, mixture: Tensor) -> float:
    return float(problem.weights @ torch.special.entr(mixture).sum(0))


def dual_value(problem: Problem, probabilities: Tensor, gradient_norms: Tensor, alpha: float) -> float:
    """The best dual value on the segment from Y to P.

    With Q = (1 - c) Y + c P and H(q) = -sum q log q::

        rho = 1:  c = min(1, alpha / max_d ||X_d'R||),  D = sum_i p_i H(Q_i)
        rho < 1:  D = max_c sum_i p_i H(Q_i) - sum_d (c ||X_d'R|| - alpha rho)_+^2 / (2 alpha (1 - rho))

    Every c gives a lower bound of the objective, so that stopping the maximisation early is safe.

    Parameters
    ----------
    problem : Problem
    probabilities : Tensor of shape (n_classes, n_samples), float64
    gradient_norms : Tensor of shape (n_features,), float64
        ||X_d'R||. Those of a subset of the features give the dual value of the problem restricted to it.
    alpha : float
    """
    if problem.l1_ratio == 1.0 or alpha == 0.0:
        largest = float(gradient_norms.max()) if len(gradient_norms) else 0.0
        scale = min(1.0, alpha / largest) if largest > 0.0 else 1.0
        return _entropy(problem, (1.0 - scale) * problem.targets + scale * probabilities)
    bound, curvature = alpha * problem.l1_ratio, alpha * (1.0 - problem.l1_ratio)
    norms = gradient_norms[gradient_norms > bound]
    toward = probabilities - problem.targets
    low, high, scale = 0.0, 1.0, 1.0
    best = -math.inf
    for _ in range(60):
        mixture = problem.targets + scale * toward
        excess = (scale * norms - bound).clamp_min(0.0)
        best = max(best, _entropy(problem, mixture) - float(excess.square().sum()) / (2.0 * curvature))
        safe = mixture.clamp_min(1e-300)
        slope = float(-(problem.weights @ (toward * safe.log()).sum(0)) - (norms @ excess) / curvature)
        if slope >= 0.0 and scale == 1.0:
            break
        low, high = (scale, high) if slope > 0.0 else (low, scale)
        bend = float(problem.weights @ (toward.square() / safe).sum(0) + norms[excess > 0].square().sum() / curvature)
        step = scale + slope / bend if bend > 0.0 else math.nan
        previous, scale = scale, step if low < step < high else 0.5 * (low + high)
        if abs(scale - previous) <= 1e-10:
            break
    return best


def objective_and_gap(
    problem: Problem, evaluation: Evaluation, row_norms: Tensor, gradient_norms: Tensor, alpha: float
) -> tuple[float, float]:
    """Objective P(W, b) and duality gap P - D, not relative.

    Parameters
    ----------
    problem : Problem
    evaluation : Evaluation
        Of XW.
    row_norms : Tensor of shape (n_rows,), float64
        ||W_d||; rows that are zero may be left out.
    gradient_norms : Tensor of shape (n_features,), float64
        ||X_d'R||; those of a subset give the gap of the problem restricted to it.
    alpha : float

    Returns
    -------
    objective : float
    gap : float
        Non-negative; infinite if the intercept is not exact.
    """
    objective = evaluation.loss + penalty(problem, row_norms, alpha)
    if not evaluation.exact:
        return objective, math.inf
    dual = dual_value(problem, evaluation.probabilities, gradient_norms, alpha)
    return objective, max(0.0, objective - dual)


def row_violations(problem: Problem, coef: Tensor, gradient: Tensor, alpha: float) -> Tensor:
    """How far each row is from optimal: the distance of 0 from its subdifferential.

    Nonzero rows: ||X_d'R + alpha (rho W_d / ||W_d|| + (1 - rho) W_d)||; zero rows: (||X_d'R|| - alpha rho)_+.

    Parameters
    ----------
    problem : Problem
    coef, gradient : Tensor of shape (n_classes, n_rows)
        W_d and X_d'R.
    alpha : float

    Returns
    -------
    Tensor of shape (n_rows,), the dtype of the coefficients
    """
    rho, norms = problem.l1_ratio, coef.norm(dim=0)
    units = coef / torch.where(norms > 0.0, norms, 1.0)
    stationarity = (gradient + alpha * (rho * units + (1.0 - rho) * coef)).norm(dim=0)
    return torch.where(norms > 0.0, stationarity, (gradient.norm(dim=0) - alpha * rho).clamp_min(0.0))
