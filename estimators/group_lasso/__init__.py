"""The multinomial group lasso: its mathematics, X as an operator, an inner solver, and the path over alpha."""

from estimators.group_lasso.path import group_lasso_path
from estimators.group_lasso.result import GroupLassoPath, PathPoint

__all__ = ["GroupLassoPath", "PathPoint", "group_lasso_path"]
