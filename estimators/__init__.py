"""Head2Toe as scikit-learn: a matrix of features in, a sparse and certified classifier out."""

from estimators.classifier import Head2ToeClassifier
from estimators.display import Head2ToeLayersDisplay, Head2ToePathDisplay
from estimators.group_lasso import GroupLassoPath, group_lasso_path
from estimators.published import PublishedHead2Toe
from estimators.search import Head2ToeClassifierCV
from estimators.selector import Head2ToeSelector

__all__ = [
    "GroupLassoPath",
    "Head2ToeClassifier",
    "Head2ToeClassifierCV",
    "Head2ToeLayersDisplay",
    "Head2ToePathDisplay",
    "Head2ToeSelector",
    "PublishedHead2Toe",
    "group_lasso_path",
]
