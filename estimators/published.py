"""Head2Toe as published: features scored by a penalised linear head that Adam trains, then a fresh head on the best."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state

from estimators.adam import train
from estimators.classifier import SparseLinearClassifier
from estimators.head import KeptFeatures, LinearModel, held_bytes
from estimators.held import hold
from estimators.scaling import layer_scaling, standardizes
from estimators.selection import count_kept
from estimators.selector import PATH_CONSTRAINTS
from estimators.sklearn_private import Interval
from estimators.training import check_training

_SEEDS = 2**31 - 1


class PublishedHead2Toe(SparseLinearClassifier):
    """Head2Toe as published: a linear head trained by Adam scores all features, another one is trained on the best.

    :class:`Head2ToeClassifier` solves the same penalised problem with a certificate; this class is for comparison with
    the paper. Its published settings are the defaults, or ``keep_fraction=0.01, max_iter=5000``.

    Parameters
    ----------
    coef : float, default=1e-5
        Strength of the penalty sum_d ||W_d||_2 in the scoring, beside the mean cross-entropy.
    keep_fraction : float in (0, 1], default=0.2
        Share of the features kept: those with the largest ||W_d||_2.
    layers, normalization, class_weight, device, max_memory
        As in :class:`Head2ToeClassifier`, but for the default "layer". The device holds X whole.
    learning_rate : float, default=0.01
        Adam's at the first step; it decays to 0 along a cosine.
    max_iter : int, default=500
        Steps of each training, on batches of 128 samples.
    random_state : int, RandomState instance or None, default=None
        Start and order of the samples of both trainings.

    Attributes
    ----------
    feature_scores_ : ndarray of shape (n_features_in_,), float64
        ||W_d||_2 of the scoring head; 0 outside ``layers``.
    n_iter_ : int
        ``max_iter``.
    classes_, coef_, intercept_, selected_features_, feature_layers_, layer_names_, recipe_
        As in :class:`Head2ToeClassifier`, like those that scikit-learn sets.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from estimators import PublishedHead2Toe
    >>> X, y = load_iris(return_X_y=True)
    >>> model = PublishedHead2Toe(keep_fraction=0.5, normalization="standard", random_state=0)
    >>> model.fit(X, y).score(X, y) > 0.9
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **PATH_CONSTRAINTS,
        "coef": [Interval(Real, 0, None, closed="left")],
        "keep_fraction": [Interval(Real, 0, 1, closed="right")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        coef: float = 1e-5,
        keep_fraction: float = 0.2,
        layers: str | Sequence[str] | None = None,
        normalization: str | None = "layer",
        learning_rate: float = 0.01,
        max_iter: int = 500,
        class_weight: dict[Any, float] | str | None = None,
        random_state: int | np.random.RandomState | None = None,
        device: str | torch.device = "auto",
        max_memory: int | str | None = None,
    ) -> None:
        self.coef = coef
        self.keep_fraction = keep_fraction
        self.layers = layers
        self.normalization = normalization
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.random_state = random_state
        self.device = device
        self.max_memory = max_memory

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Score the features, and train the head on the best; parameters as in :meth:`Head2ToeClassifier.fit`."""
        self._validate_params()
        training = check_training(self, X, y, sample_weight, self.class_weight)
        columns = training.columns_of(self.layers)
        part, left = hold(training.take(columns), self.max_memory, self.device)
        random = check_random_state(self.random_state)

        def trained(selected: NDArray[np.int64], scaling: str, coef: float) -> LinearModel:
            return train(
                KeptFeatures(part.features, selected, part.layers, scaling, held_bytes(left)),
                part.codes,
                len(part.classes),
                part.sample_weight,
                standardize=standardizes(self.normalization),
                coef=coef,
                learning_rate=self.learning_rate,
                n_steps=self.max_iter,
                seed=int(random.randint(_SEEDS)),
                device=self.device,
            )

        scores = trained(np.arange(len(columns)), layer_scaling(self.normalization, "whole"), self.coef).row_norms
        selected = np.sort(np.argsort(-scores, kind="stable")[: count_kept(self.keep_fraction, len(scores))])
        scaling = layer_scaling(self.normalization, "kept")
        head = trained(selected, scaling, 0.0)
        self.n_iter_ = head.n_iter
        self._set_selection(training, columns, selected, scores)
        self._set_linear(training, head, scaling)
        return self
