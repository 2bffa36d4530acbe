"""The helpers of scikit-learn that are private there; nothing else in the project imports one.

They check parameters, feature names and routed metadata exactly as scikit-learn's own estimators do. A release of
scikit-learn that moves one is answered here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints, validate_params
from sklearn.utils.validation import _check_feature_names_in as check_feature_names_in
from sklearn.utils.validation import _check_method_params as check_method_params

__all__ = [
    "Interval",
    "StrOptions",
    "check_feature_names_in",
    "check_method_params",
    "checked",
    "validate_parameter_constraints",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def checked(constraints: dict[str, list[Any]]) -> Callable[[Function], Function]:
    """A decorator for functions: arguments are checked as estimators check their parameters."""
    decorator: Callable[[Function], Function] = validate_params(constraints, prefer_skip_nested_validation=False)
    return decorator
