"""Head2Toe as scikit-learn: a matrix of features in, a sparse and certified classifier out."""

from estimators.classifier import Head2ToeClassifier
from estimators.group_lasso import GroupLassoPath, group_lasso_path

__all__ = ["GroupLassoPath", "Head2ToeClassifier", "group_lasso_path"]
