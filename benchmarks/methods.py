"""Ways of learning a task from 1000 labelled images and a trained network, each tuned on the training images alone.

A method is a function of `Data` and a seed that returns an `Outcome`. The seed decides the folds of every
cross-validation, and whatever else a method draws.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from estimators import Head2ToeClassifierCV
from estimators.adam import train as train_by_adam
from estimators.group_lasso import group_lasso_path
from estimators.layers import layer_index
from estimators.selection import count_kept
from h2t_store import FeatureMatrix
from h2t_store.engines.preparation import Job

FOLDS = 5
FRACTIONS = (0.01, 0.05, 0.2)
L2_GRID: dict[str, Any] = {"Cs": tuple(10.0**k for k in range(-5, 3)), "normalizations": ("standard", None)}
L1_RATIOS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
PUBLISHED: dict[str, Any] = {"coef": (1e-5, 1e-3), "keep_fraction": FRACTIONS, "learning_rate": 0.01, "n_steps": 500}
FINETUNING: dict[str, Any] = {
    "epochs": 30, "batch_size": 64, "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4
}  # fmt: skip

Pair = tuple[FeatureMatrix, FeatureMatrix]


@dataclass
class Data:
    """One task.

    Attributes
    ----------
    whole : (FeatureMatrix, FeatureMatrix)
        Features of the training and test images, pooled to all target sizes.
    features : dict of int to (FeatureMatrix, FeatureMatrix)
        By target size; the first is what methods use that do not choose.
    probe : (FeatureMatrix, FeatureMatrix)
        What enters the network's last layer.
    y, y_test : ndarray of str
        Names of the classes.
    job : callable
        Makes the network and the images of a split, for methods that train it.
    minutes : float
        What training the network may take.
    """

    whole: Pair
    features: dict[int, Pair]
    probe: Pair
    y: NDArray[Any]
    y_test: NDArray[Any]
    job: Callable[[str], Job]
    minutes: float = math.inf

    @property
    def pair(self) -> Pair:
        """Features of the first target size."""
        return next(iter(self.features.values()))

    def at(self, size: int) -> "Data":
        """With the features of one target size alone."""
        return replace(self, whole=self.features[size], features={size: self.features[size]})

    def rows(self, chosen: NDArray[np.int64]) -> "Data":
        """With some of the training images alone."""
        features = {size: (X[chosen], X_test) for size, (X, X_test) in self.features.items()}
        whole, probe = ((X[chosen], X_test) for X, X_test in (self.whole, self.probe))
        return replace(self, whole=whole, features=features, probe=probe, y=self.y[chosen])


@dataclass
class Outcome:
    """How a method did.

    Attributes
    ----------
    accuracy : float
        Of the test images.
    n_features, n_selected : int
        To choose from, and read to predict.
    n_weights : int
        Numbers that have to be stored for the task, besides which features they belong to.
    params : dict
        What cross-validation chose.
    notes : dict
        Further figures.
    flops : float, optional
        Floating-point operations of the training where they are not counted from outside.
    """

    accuracy: float
    n_features: int
    n_selected: int
    n_weights: int
    params: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    flops: float | None = None


def folds(seed: int) -> StratifiedKFold:
    """The folds that every method tunes on."""
    return StratifiedKFold(FOLDS, shuffle=True, random_state=seed)


# ---------------------------------------------------------------------------------------------------------------------
# L2 logistic regression, on some features or on all of them


def l2_search(seed: int, **grid: Any) -> Head2ToeClassifierCV:
    """L2 logistic regression on all columns it is given; what ``grid`` leaves open by cross-validation."""
    return Head2ToeClassifierCV(
        alphas=(1.0,), keep_fractions=(1.0,), last_layers=(), single_layers=0, refit="best", cv=folds(seed), **grid
    )


def ridge(pair: Pair, data: Data, seed: int, columns: NDArray[np.int64] | None = None) -> Outcome:
    """L2 logistic regression; C, and whether features are standardised, by cross-validation."""
    X, X_test = (matrix if columns is None else matrix[:, columns] for matrix in pair)
    model = l2_search(seed, **L2_GRID).fit(X, data.y)
    params = {name: model.best_params_[name] for name in ("C", "normalization")}
    n_weights = (X.shape[1] + 1) * len(model.classes_)
    accuracy = float((model.predict(X_test) == data.y_test).mean())
    return Outcome(accuracy, pair[0].shape[1], X.shape[1], n_weights, params, {"cv_score": model.best_score_})


def linear_probe(data: Data, seed: int) -> Outcome:
    """What enters the last layer, with L2."""
    return ridge(data.probe, data, seed)


def all_l2(data: Data, seed: int) -> Outcome:
    """All features of one target size, with L2; which size by cross-validation."""
    outcomes = []
    for size, pair in data.features.items():
        outcomes.append(ridge(pair, data, seed))
        outcomes[-1].params["target_size"] = size
    return max(outcomes, key=lambda outcome: outcome.notes["cv_score"])


def _best_fraction(data: Data, seed: int, order: Callable[[FeatureMatrix], NDArray[np.int64]]) -> Outcome:
    """The first features of an order that looks at no label, as many as cross-validation says."""
    ranked = order(data.pair[0])
    outcomes = []
    for fraction in FRACTIONS:
        kept = np.sort(ranked[: count_kept(fraction, len(ranked))])
        outcomes.append(ridge(data.pair, data, seed, kept))
        outcomes[-1].params["keep_fraction"] = fraction
    return max(outcomes, key=lambda outcome: outcome.notes["cv_score"])


def random_features(data: Data, seed: int) -> Outcome:
    """Features drawn at random, with L2; how many by cross-validation."""
    return _best_fraction(data, seed, lambda X: np.random.default_rng(seed).permutation(X.shape[1]))


def by_variance(X: FeatureMatrix | NDArray[np.float32]) -> NDArray[np.int64]:
    """Columns by falling variance."""
    return np.argsort(-np.asarray(X).var(axis=0, dtype=np.float64), kind="stable")


def largest_variance(data: Data, seed: int) -> Outcome:
    """Features of the largest variance, with L2; how many by cross-validation."""
    return _best_fraction(data, seed, by_variance)


# ---------------------------------------------------------------------------------------------------------------------
# L1


def l1_scores(X: NDArray[np.float32], y: NDArray[Any], *others: NDArray[np.float32]) -> tuple[list[Any], NDArray[Any]]:
    """One class against the rest with an L1 penalty, exactly solved, for every ratio of alpha_max.

    Returns
    -------
    scores : list of ndarray of shape (n_ratios, n_rows, n_classes)
        Of the other matrices.
    active : ndarray of shape (n_ratios, n_features, n_classes), float64
        Absolute weights of the standardised features.
    """
    classes = np.unique(y)
    scores = [np.empty((len(L1_RATIOS), len(other), len(classes))) for other in others]
    weights = np.zeros((len(L1_RATIOS), X.shape[1], len(classes)))
    for k, label in enumerate(classes):
        # With two classes ||W_d||_2 is |w_d| / sqrt 2: the group lasso is the L1 penalty.
        path = group_lasso_path(X, y == label, alpha_ratios=L1_RATIOS, tol=1e-3)
        for at in range(len(L1_RATIOS)):
            weights[at, :, k] = path.row_norms(at)
            for score, other in zip(scores, others, strict=True):
                score[at, :, k] = np.diff(path.predict_logits(other, at))[:, 0]
    return scores, weights


def all_l1(data: Data, seed: int) -> Outcome:
    """All features, with L1, one class against the rest; its strength by cross-validation."""
    X, X_test = (np.asarray(matrix) for matrix in data.pair)
    hits = np.zeros(len(L1_RATIOS))
    for train, test in folds(seed).split(X, data.y):
        (scores,), _ = l1_scores(X[train], data.y[train], X[test])
        hits += (np.unique(data.y[train])[scores.argmax(axis=2)] == data.y[test]).sum(axis=1)
    (scores,), weights = l1_scores(X, data.y, X_test)
    at, classes = int(hits.argmax()), np.unique(data.y)
    accuracy = float((classes[scores[at].argmax(axis=1)] == data.y_test).mean())
    kept = weights[at] > 0
    n_weights = int(kept.sum()) + len(classes)
    params, notes = {"alpha": L1_RATIOS[at]}, {"cv_score": hits[at] / len(data.y)}
    return Outcome(accuracy, X.shape[1], int(kept.any(axis=1).sum()), n_weights, params, notes)


# ---------------------------------------------------------------------------------------------------------------------
# Head2Toe


def unit_layers(X: NDArray[np.float32], owner: NDArray[np.int64]) -> NDArray[np.float32]:
    """Each layer's part of a row at unit length; zero stays zero."""
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    norms = np.sqrt(np.add.reduceat(np.square(X, dtype=np.float32), starts, axis=1))
    return X * np.repeat(1 / np.where(norms > 0, norms, 1), np.diff([*starts, X.shape[1]]), axis=1)


def _published_fits(
    X: NDArray[np.float32], y: NDArray[Any], X_test: NDArray[np.float32], owner: NDArray[np.int64], seed: int
) -> Iterator[tuple[float, float, NDArray[Any], NDArray[np.int64]]]:
    """(coef, fraction, labels predicted, features kept) of all candidates; fractions share one scoring."""
    classes, codes = np.unique(y, return_inverse=True)
    scored = unit_layers(X, owner)
    options = {name: PUBLISHED[name] for name in ("learning_rate", "n_steps")}
    equal = np.ones(len(y))
    for coef in PUBLISHED["coef"]:
        weights = train_by_adam(scored, codes, len(classes), equal, coef=coef, seed=seed, **options).coef
        scores = np.square(weights).sum(axis=1)
        for fraction in PUBLISHED["keep_fraction"]:
            kept = np.sort(np.argsort(-scores, kind="stable")[: count_kept(fraction, len(scores))])
            again, test = (unit_layers(values[:, kept], owner[kept]) for values in (X, X_test))
            weights, intercept, *_ = train_by_adam(again, codes, len(classes), equal, seed=seed + 1, **options)
            yield coef, fraction, classes[(test @ weights + intercept).argmax(axis=1)], kept


def published(data: Data, seed: int) -> Outcome:
    """Head2Toe as published: scores and head by Adam; strength, fraction and target size by cross-validation."""
    candidates: dict[tuple[int, float, float], float] = {}
    for size, (matrix, _) in data.features.items():
        X, owner = np.asarray(matrix), layer_index(matrix)
        for train, test in folds(seed).split(X, data.y):
            for coef, fraction, labels, _ in _published_fits(X[train], data.y[train], X[test], owner, seed):
                key = size, coef, fraction
                candidates[key] = candidates.get(key, 0.0) + float((labels == data.y[test]).sum()) / len(data.y)
    size, coef, fraction = max(candidates, key=lambda key: candidates[key])
    matrix, matrix_test = data.features[size]
    fits = _published_fits(np.asarray(matrix), data.y, np.asarray(matrix_test), layer_index(matrix), seed)
    labels, kept = next((labels, kept) for c, f, labels, kept in fits if (c, f) == (coef, fraction))
    params = {"target_size": size, "coef": coef, "keep_fraction": fraction}
    n_weights = (len(kept) + 1) * len(np.unique(data.y))
    accuracy, notes = float((labels == data.y_test).mean()), {"cv_score": candidates[size, coef, fraction]}
    return Outcome(accuracy, matrix.shape[1], len(kept), n_weights, params, notes)


def head2toe(data: Data, seed: int) -> Outcome:
    """`Head2ToeClassifierCV` as it comes."""
    X, X_test = data.whole
    model = Head2ToeClassifierCV(cv=folds(seed)).fit(X, data.y)
    # Linear models added up are one.
    n_weights = (len(model.selected_features_) + 1) * len(model.classes_)
    alone = float((model.best_estimator_.predict(X_test) == data.y_test).mean())
    notes = {"cv_score": model.best_score_, "best_alone": alone, "mixed": len(model.estimators_)}
    accuracy = float((model.predict(X_test) == data.y_test).mean())
    return Outcome(accuracy, X.shape[1], len(model.selected_features_), n_weights, model.best_params_, notes)


# ---------------------------------------------------------------------------------------------------------------------
# The network itself


def finetuning(data: Data, seed: int) -> Outcome:
    """All weights trained on, with one setting; ends after `Data.minutes`."""
    return _train_network(data, seed, data.job("train"))


def from_scratch(data: Data, seed: int) -> Outcome:
    """The same network and training from random weights."""
    job = data.job("train")
    torch.manual_seed(seed)
    for module in job.backbone.model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return _train_network(data, seed, job)


def _train_network(data: Data, seed: int, job: Job) -> Outcome:
    torch.manual_seed(seed)
    classes, codes = np.unique(data.y, return_inverse=True)
    network = with_new_head(job.backbone.model, len(classes)).requires_grad_(True)
    images, test = pixels(job), pixels(data.job("test"))
    n, size, epochs = len(images), FINETUNING["batch_size"], FINETUNING["epochs"]
    optimizer = torch.optim.SGD(
        network.parameters(), FINETUNING["learning_rate"], FINETUNING["momentum"], 0.0, FINETUNING["weight_decay"], True
    )
    steps = epochs * -(-n // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FINETUNING["learning_rate"], total_steps=steps)
    labels, done, start = torch.from_numpy(codes).to(job.forward.device), 0, time.perf_counter()
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(n).split(size):
            optimizer.zero_grad(set_to_none=True)
            scores = logits(network, scaled(job, images[rows]))
            nn.functional.cross_entropy(scores, labels[rows.to(labels.device)]).backward()
            optimizer.step()
            schedule.step()
        done += 1
        if time.perf_counter() - start > 60 * data.minutes:
            break
    network.eval()
    with torch.inference_mode():
        parts = [logits(network, scaled(job, part)).argmax(1).cpu() for part in test.split(256)]
    accuracy = float((classes[torch.cat(parts).numpy()] == data.y_test).mean())
    n_weights = sum(parameter.numel() for parameter in network.parameters())
    n_weights += sum(buffer.numel() for buffer in network.buffers())
    flops = 3.0 * forward_flops(job) * n * done
    return Outcome(accuracy, 0, 0, n_weights, {"epochs": done}, flops=flops)


def pixels(job: Job) -> Tensor:
    """All images of a job as uint8, as its network's preprocessing makes them."""
    return torch.stack([job.forward.transform(job.source.image(row)) for row in range(len(job.source))])


def scaled(job: Job, images: Tensor) -> Tensor:
    """Images as the network takes them."""
    forward, shape = job.forward, (1, -1, 1, 1)
    mean, std = (torch.tensor(values, device=forward.device).view(shape) for values in (forward.mean, forward.std))
    return ((images.to(forward.device).float() / 255 - mean) / std).contiguous(memory_format=forward.memory_format)


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """The output of a network that may give more than that."""
    output = network(images)
    return output[0] if isinstance(output, tuple) else output


def with_new_head(network: nn.Module, n_classes: int) -> nn.Module:
    """The network with a last layer for so many classes."""
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(n_classes)
        return network
    name, last = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent = network.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.Linear(last.in_features, n_classes))
    return network


def forward_flops(job: Job) -> float:
    """Floating-point operations of one image's forward pass, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros((1, *job.backbone.data_config["input_size"]), device=job.forward.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        job.backbone.model.eval()(image)
    return float(counter.get_total_flops())


Method = Callable[[Data, int], Outcome]


def at_one_size(method: Method, data: Data, seed: int) -> Outcome:
    """A method that chooses its target size, given the first one only."""
    return method(data.at(next(iter(data.features))), seed)


class MatrixFlops(TorchFunctionMode):
    """Counts the floating-point operations of products of matrices and vectors, in ``total``.

    It sees calls of torch's functions, not what these call: torch's own counter does, which takes several times as long
    as what it counts, where that is many small products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = PRODUCTS.get(func.__name__)
        if first is not None:
            self.total += 2 * out.numel() * args[first].shape[-1]
        return out


# Which argument of a product is its left factor.
PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}

METHODS: dict[str, Method] = {
    "linear probe": linear_probe,
    "all features, L2": all_l2,
    "all features, L1": all_l1,
    "random features": random_features,
    "largest variance": largest_variance,
    "published Head2Toe": published,
    "Head2ToeClassifierCV": head2toe,
    "fine-tuning": finetuning,
    "from scratch": from_scratch,
}
SETTINGS: dict[str, Sequence[Any]] = {
    "linear probe": [L2_GRID],
    "all features, L2": [L2_GRID],
    "all features, L1": [L1_RATIOS],
    "random features": [L2_GRID, FRACTIONS],
    "largest variance": [L2_GRID, FRACTIONS],
    "published Head2Toe": [PUBLISHED],
    "Head2ToeClassifierCV": [Head2ToeClassifierCV().get_params()],
    "fine-tuning": [FINETUNING],
    "from scratch": [FINETUNING],
}
CHOOSE_SIZE = ("all features, L2", "published Head2Toe", "Head2ToeClassifierCV")
METHODS |= {f"{name}, one size": partial(at_one_size, METHODS[name]) for name in CHOOSE_SIZE}
SETTINGS |= {f"{name}, one size": SETTINGS[name] for name in CHOOSE_SIZE}
