"""How features are made, as plain JSON, and how two recipes differ.

Features of equal weights, preprocessing, pooling and layers can replace each other. ``dtype``, ``amp`` and the code's
digest are recorded but not compared: they change the rounding, not the meaning.
"""

from collections.abc import Sequence
from typing import Any

from h2t_store.storage.layout import ExtractionHeader, Layer

_MOST_NAMES = 3


def recipe_of(header: ExtractionHeader, layers: Sequence[Layer]) -> dict[str, Any]:
    """Recipe of some layers of an extraction, independent of its images, labels and place.

    Returns
    -------
    dict
        ``model``, ``weights`` (their origin), ``weights_sha256``, ``preprocessing``, ``cls_token``, ``layers`` (number
        of features, shape and target sizes of each), ``dtype``, ``amp`` and ``code_sha256``; None if not recorded.
    """
    inputs = header.provenance["inputs"]
    preprocessing = inputs.get("preprocessing")
    return {
        "model": inputs.get("model"),
        "weights": _origin(header.provenance["environment"].get("arguments") or {}),
        "weights_sha256": inputs.get("weights_sha256"),
        # Without a recorded rule, orientation tags were ignored.
        "preprocessing": preprocessing and {"orientation": "ignored", **preprocessing},
        "cls_token": inputs.get("cls_token"),
        "layers": {
            name: {"n_features": stop - start, "shape": list(shape), "target_sizes": list(target_sizes)}
            for name, start, stop, shape, target_sizes in layers
        },
        "dtype": header.dtype,
        "amp": inputs.get("amp"),
        "code_sha256": inputs.get("code_sha256"),
    }


def _origin(arguments: dict[str, Any]) -> str | None:
    """Where the weights come from, by the arguments of an extraction."""
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
    """Differences between two recipes as ``WHAT A there, B here``; what one of them lacks is not compared."""
    found = []
    if _differ(there, here, "weights_sha256"):
        found.append(f"network {_network(there)} there, {_network(here)} here")
    before, now = there.get("preprocessing") or {}, here.get("preprocessing") or {}
    found += [
        f"{key.replace('_', ' ')} {_value(key, before[key])} there, {_value(key, now[key])} here"
        for key in before
        if key in now and before[key] != now[key]
    ]
    before, now = there.get("layers") or {}, here.get("layers") or {}
    shares_tokens = any(len(layer["shape"]) == 2 for name, layer in before.items() if name in now)
    if shares_tokens and _differ(there, here, "cls_token"):
        found.append(f"class token {there['cls_token']!r} there, {here['cls_token']!r} here")
    widths, widths_now = ({name: layer["n_features"] for name, layer in part.items()} for part in (before, now))
    if widths != widths_now and _sizes(before) != _sizes(now):
        found.append(f"target size {_sizes(before)} there, {_sizes(now)} here")
    return found or _layer_differences(before, now)


def _layer_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Layers that only one recipe has, or that have other shapes."""
    if before.keys() != now.keys():
        lost, new = [name for name in before if name not in now], [name for name in now if name not in before]
        return [f"layers {_listed(lost)} there, {_listed(new)} here"]
    return [
        f"{what} of {name} {before[name][key]} there, {now[name][key]} here"
        for name in before
        for what, key in (("number of features", "n_features"), ("shape", "shape"))
        if before[name][key] != now[name][key]
    ][:_MOST_NAMES]


def _differ(there: dict[str, Any], here: dict[str, Any], key: str) -> bool:
    before, now = there.get(key), here.get(key)
    return before is not None and now is not None and before != now


def _network(recipe: dict[str, Any]) -> str:
    origin = f": {recipe['weights']}" if recipe.get("weights") else ""
    return f"{recipe.get('model')} (weights {recipe['weights_sha256'][:8]}{origin})"


def _value(key: str, value: Any) -> str:
    if key == "input_size":
        height, width = value[-2:]
        return str(height) if height == width else f"{height} x {width}"
    return str(value)


def _sizes(layers: dict[str, Any]) -> str:
    sizes = {size for layer in layers.values() for size in layer["target_sizes"]}
    return " and ".join(map(str, sorted(sizes))) or "none"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"with {', '.join(map(repr, names[:_MOST_NAMES]))}{more}" if names else "without"
