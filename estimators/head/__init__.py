"""The ridge head: L2 multinomial logistic regression on the kept features."""

from estimators.head.kept import KeptFeatures, held_bytes, in_memory
from estimators.head.ridge import LinearModel, RidgeHead
from estimators.head.solver import RidgeSolution

__all__ = ["KeptFeatures", "LinearModel", "RidgeHead", "RidgeSolution", "held_bytes", "in_memory"]
