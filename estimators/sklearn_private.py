"""The helpers of scikit-learn that are private there; nothing else in the project imports one.

They check parameters, feature names and routed metadata exactly as scikit-learn's own estimators do. A release of
scikit-learn that moves one is answered here.
"""

from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints
from sklearn.utils.validation import _check_feature_names_in as check_feature_names_in
from sklearn.utils.validation import _check_method_params as check_method_params

__all__ = ["Interval", "StrOptions", "check_feature_names_in", "check_method_params", "validate_parameter_constraints"]
