"""Which activations of a network become features, found by running it on two images."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from h2t_store.errors import TapError, did_you_mean
from h2t_store.network.axes import channel_axes, of_single_images
from h2t_store.network.class_token import class_positions
from h2t_store.network.paper import published_taps
from h2t_store.network.presets import canonical_name, preset
from h2t_store.network.taps import ClassTokenPolicy, Tap
from h2t_store.network.watching import Content, Seen, Trace
from h2t_store.switches import exact_arithmetic

PRESETS = ("paper", "activations", "blocks")

_log = logging.getLogger("h2t_store")


def find_taps(
    model: nn.Module, example: Tensor, taps: str | Sequence[str], cls_token: ClassTokenPolicy = "pool"
) -> tuple[list[Tap], dict[str, str]]:
    """Resolve presets and globs to the taps of a network in evaluation mode.

    A glob over module names takes their outputs, with ``:in`` their inputs; ``:2`` and ``:in:2`` take the second
    tensors. ``example`` holds two different images.

    Returns
    -------
    taps : list of Tap
        In the order the network computes them; each tensor once.
    left_out : dict of str to str
        Tensors of a preset that are no activations of single images, with the reason.
    """
    parts = taps.split(",") if isinstance(taps, str) else list(taps)
    parts = [part.strip() for part in parts if part.strip()]
    if not parts:
        raise TapError(f"taps: nothing given; accepted are {', '.join(PRESETS)} and globs over module names")
    with torch.inference_mode(False), exact_arithmetic:
        trace = Trace(model, example[:1].clone())
        names, asked = _names(trace, parts)
        axis_of = channel_axes(trace)
        all_taps = [Tap(seen.place.name, seen.place, tuple(seen.tensor.shape), axis_of(seen)) for seen in trace.seen]
        found: dict[str, Tap] = {}
        for seen, tap in zip(trace.seen, all_taps, strict=True):
            if names.get(seen.content) == tap.name:
                found.setdefault(tap.name, tap)
        usable, left_out = of_single_images(model, example, list(found.values()))
        if "activations" in parts:
            idle = [name for name in trace.modules if name in trace.linear_layers - trace.ran]
            left_out |= dict.fromkeys([f"{name}:in" for name in idle], "the network does not call this module")
        if cls_token != "pool":
            usable = _with_class_tokens(usable, cls_token, class_positions(model, example[:1], all_taps))
    for name, reason in left_out.items():
        if name in asked:
            raise TapError(f"taps: {name!r} cannot become features: {reason}")
    return usable, left_out


def _names(trace: Trace, parts: Sequence[str]) -> tuple[dict[Content, str], set[str]]:
    """Names of the tensors that globs and presets ask for, and those of them that a glob asks for."""
    names: dict[Content, str] = {}
    for part in parts:
        if part not in PRESETS:
            for seen in _matches(part, trace):
                names.setdefault(seen.content, seen.place.name)
    asked = set(names.values())
    for part in parts:
        if part in PRESETS:
            for seen in published_taps(trace) if part == "paper" else preset(part, trace):
                # The paper's tokens may be a view of a map that another module made, and are pooled in another way.
                tokens = part == "paper" and seen.tensor.ndim == 3 and seen.place.side == "out"
                name = seen.place.name if tokens else canonical_name(seen.content, trace)
                names.setdefault(seen.content, name)
    return names, asked


def _matches(glob: str, trace: Trace) -> list[Seen]:
    """Match the part of a glob before the colon against modules; the part after it must be equal."""
    pattern, _, suffix = glob.partition(":")
    found = []
    for seen in trace.seen:
        module, _, which = seen.place.name.partition(":")
        if which == suffix and fnmatchcase(module, pattern):
            found.append(seen)
    if not found:
        known = [seen.place.name for seen in trace.seen]
        raise TapError(
            f"taps: {glob!r} matches no module of the network{did_you_mean(glob, known)}; accepted are "
            f"{', '.join(PRESETS)} and globs over module names such as {known[len(known) // 2]!r}"
        )
    return found


def _with_class_tokens(taps: Sequence[Tap], cls_token: ClassTokenPolicy, positions: dict[int, int]) -> list[Tap]:
    """Taps that know their class token; warn if none has one."""
    found = [
        replace(tap, class_token=positions[tap.shape[1]], cls_token=cls_token)
        if tap.kind == "tokens" and tap.shape[1] in positions
        else tap
        for tap in taps
    ]
    if all(tap.class_token is None for tap in found):
        _log.warning("cls_token %r changes nothing: no tap holds a class token", cls_token)
    return found
