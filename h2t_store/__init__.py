"""A feature store: images → the pooled activations of every layer of a frozen network → a matrix on disk.

`extract` fills a store, `open_features` opens one extraction in it as a lazy `FeatureMatrix`, `repair` makes one
whole. They are imported on first use, so that opening a store does not load the machinery that fills it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2t_store.extracting import extract
    from h2t_store.matrix import FeatureMatrix, open_features
    from h2t_store.repairing import repair

__all__ = ["FeatureMatrix", "extract", "open_features", "repair"]


def __getattr__(name: str) -> Any:
    if name == "extract":
        from h2t_store.extracting import extract

        return extract
    if name == "repair":
        from h2t_store.repairing import repair

        return repair
    if name in ("FeatureMatrix", "open_features"):
        from h2t_store import matrix

        return getattr(matrix, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
