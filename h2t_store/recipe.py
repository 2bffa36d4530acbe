"""How features are made, as plain JSON, and what differs between two ways.

Features can stand in for one another where weights, preprocessing, pooling and layers agree. Number formats (``dtype``,
``amp``) and the version of the code are recorded, not compared: they round differently, but a feature means the same.
"""

from collections.abc import Iterable
from typing import Any

from h2t_store.storage.layout import ExtractionHeader, Layer

__all__ = ["recipe_differences", "recipe_of"]

_NAMED = 3


def recipe_of(header: ExtractionHeader, layers: Iterable[Layer]) -> dict[str, Any]:
    """How the features of some layers are made; independent of the images, their labels and where anything lies.

    Parameters
    ----------
    header : ExtractionHeader
        Of the extraction.
    layers : iterable of Layer
        Those of its layers that are used.

    Returns
    -------
    dict
        ``model``, ``weights`` (where they come from), ``weights_sha256``, ``preprocessing``, ``cls_token``, ``layers``
        (number of features, shape of the activation and target sizes of each), ``dtype``, ``amp`` and ``code_sha256``.
        What the extraction does not say is None.
    """
    inputs = header.provenance["inputs"]
    preprocessing = inputs.get("preprocessing")
    return {
        "model": inputs.get("model"),
        "weights": _origin(header.provenance["environment"].get("arguments") or {}),
        "weights_sha256": inputs.get("weights_sha256"),
        # Extractions that do not name a rule were made by code that ignored orientation tags.
        "preprocessing": preprocessing and {"orientation": "ignored", **preprocessing},
        "cls_token": inputs.get("cls_token"),
        "layers": {
            layer.name: {
                "n_features": layer.width,
                "shape": list(layer.shape),
                "target_sizes": list(layer.target_sizes),
            }
            for layer in layers
        },
        "dtype": header.dtype,
        "amp": inputs.get("amp"),
        "code_sha256": inputs.get("code_sha256"),
    }


def _origin(arguments: dict[str, Any]) -> str | None:
    """Where the weights come from, as far as an extraction's arguments say."""
    if "model" not in arguments:
        return None
    if arguments.get("checkpoint"):
        return "a checkpoint"
    if arguments["model"] is None:
        return "a module in memory"
    if ".py:" in arguments["model"]:
        return "its factory"
    return "pretrained" if arguments.get("pretrained") else f"random, seed {arguments.get('seed')}"


def recipe_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What keeps two recipes apart, ``WHAT A there, B here`` each; nothing where their features mean the same.

    What one of them does not say is not compared.
    """
    found = []
    if _differ(there.get("weights_sha256"), here.get("weights_sha256")):
        found.append(f"network {_network(there)} there, {_network(here)} here")
    before, now = there.get("preprocessing") or {}, here.get("preprocessing") or {}
    found += [
        f"{key.replace('_', ' ')} {_value(key, before[key])} there, {_value(key, now[key])} here"
        for key in before
        if key in now and before[key] != now[key]
    ]
    return found + _pooling_differences(there, here, explained=bool(found))


def _pooling_differences(there: dict[str, Any], here: dict[str, Any], *, explained: bool) -> list[str]:
    """What differs in the layers and how they are pooled, unless other differences explain it."""
    before, now = there.get("layers") or {}, here.get("layers") or {}
    common = [name for name in before if name in now]
    found = []
    tokens = any(len(layers[name]["shape"]) == 2 for layers in (before, now) for name in common)
    if tokens and _differ(there.get("cls_token"), here.get("cls_token")):
        found.append(f"class token {there['cls_token']!r} there, {here['cls_token']!r} here")
    elsewhere = [[name for name in one if name not in other] for one, other in ((before, now), (now, before))]
    sizes = _sizes(before), _sizes(now)
    wider = any(before[name]["n_features"] != now[name]["n_features"] for name in common)
    if (wider or any(elsewhere)) and sizes[0] != sizes[1]:
        found.append(f"target size {_listed(sizes[0])} there, {_listed(sizes[1])} here")
    if found or explained:
        return found
    if any(elsewhere):
        return [f"layers {_besides(elsewhere[0])} there, {_besides(elsewhere[1])} here"]
    return [
        f"{what} of {name} {before[name][key]} there, {now[name][key]} here"
        for name in common
        for what, key in (("number of features", "n_features"), ("shape", "shape"))
        if before[name][key] != now[name][key]
    ][:_NAMED]


def _differ(before: Any, now: Any) -> bool:
    return before is not None and now is not None and before != now


def _network(recipe: dict[str, Any]) -> str:
    weights = recipe.get("weights")
    said = f"weights {recipe['weights_sha256'][:8]}"
    return f"{recipe.get('model')} ({said}{f': {weights}' if weights else ''})"


def _value(key: str, value: Any) -> str:
    if key == "input_size":
        height, width = value[-2:]
        return str(height) if height == width else f"{height} x {width}"
    return str(value)


def _sizes(layers: dict[str, Any]) -> list[int]:
    return sorted({size for layer in layers.values() for size in layer["target_sizes"]})


def _listed(values: list[Any]) -> str:
    return " and ".join(map(str, values)) or "none"


def _besides(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"with {', '.join(map(repr, names[:_NAMED]))}{more}" if names else "without"
