"""A feature store: images → the pooled activations of every layer of a frozen network → a matrix on disk.

`extract` fills a store, `open_features` opens an extraction as a lazy `FeatureMatrix`, `repair` restores one. They are
imported on first use, because opening a store needs little of what fills it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2t_store.extracting import extract
    from h2t_store.matrix import FeatureMatrix, open_features
    from h2t_store.repairing import repair

__all__ = ["FeatureMatrix", "extract", "open_features", "repair"]

_MODULES = {"FeatureMatrix": "matrix", "extract": "extracting", "open_features": "matrix", "repair": "repairing"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
