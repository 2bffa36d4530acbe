"""Which activations of a network become features, found by running it and watching every module.

One image names the tensors; two show which axis they grow along, and whether the rows of one image are its alone.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import get_args

import torch
from torch import Tensor, nn

from h2t_store.errors import TapError, did_you_mean
from h2t_store.network.axes import channel_axes
from h2t_store.network.class_token import class_positions
from h2t_store.network.paper import published_taps
from h2t_store.network.presets import canonical_name, classifier, linear_entrances, preset
from h2t_store.network.taps import ClassTokenPolicy, Tap
from h2t_store.network.watching import Content, Place, Seen, hooks, is_linear_map, watch
from h2t_store.switches import exact_arithmetic

__all__ = ["PRESETS", "find_taps"]

PRESETS = ("paper", "activations", "blocks")

_log = logging.getLogger("h2t_store")

_FINE = 4096  # target size for comparing images: large enough to keep positions apart


def find_taps(
    model: nn.Module, example: Tensor, taps: str | Sequence[str], cls_token: ClassTokenPolicy = "pool"
) -> tuple[list[Tap], dict[str, str]]:
    """Resolve presets and globs to the taps of a network.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    example : Tensor
        ``(2, channels, height, width)``: two different inputs, to run the network on.
    taps : str or sequence of str
        Presets and globs, or one string of them joined by commas. ``paper``: the published taps of ResNets and ViTs
        (see `h2t_store.network.paper`). ``activations``: what enters every convolution and
        linear layer, except the images themselves, the output of every block, and the output of the network.
        ``blocks``: the output of every block, what enters the classifier, and the output of the network. A glob over
        module names means their outputs, one that ends in ``:in`` their inputs; ``:2``, ``:in:2`` the second tensors.
    cls_token : {"pool", "only", "keep"}
        Class token of a token tap: pooled with the other tokens, alone, or beside the pooled others (paper, appendix).
        A tap without one is pooled as usual.

    Returns
    -------
    taps : list of Tap
        In the order the network computes them; each tensor once.
    left_out : dict of str to str
        Tensors that a preset named but that are no activations of single images, with the reason.

    Raises
    ------
    TapError
        Where a glob matches nothing, or matches a tensor that is no activation of single images; where ``paper`` is
        asked of another network; where ``cls_token`` is none of the three.
    """
    if cls_token not in get_args(ClassTokenPolicy):
        raise TapError(f"cls_token {cls_token!r}: accepted are pool, only and keep")
    parts = taps.split(",") if isinstance(taps, str) else list(taps)
    parts = [part.strip() for part in parts if part.strip()]
    if not parts:
        raise TapError(f"taps: nothing given; accepted are {', '.join(PRESETS)} and globs over module names")
    with torch.inference_mode(False), exact_arithmetic:
        found, asked, everything = _resolve(model, example[:1].clone(), parts)
        kept, wrong = _by_image(model, example, found)
        if "activations" in parts:
            wrong |= _never_called(model, everything)
        if cls_token != "pool":
            kept = _with_class_tokens(kept, cls_token, class_positions(model, example[:1], everything))
    for name, reason in wrong.items():
        if name in asked:
            raise TapError(f"taps: {name!r} cannot become features: {reason}")
    return kept, wrong


def _resolve(model: nn.Module, image: Tensor, parts: Sequence[str]) -> tuple[list[Tap], set[str], list[Tap]]:
    """Taps that presets and globs name, in the order of the forward pass, which of them a glob named, and all taps."""
    seen = watch(model, image)
    names: dict[Content, str] = {}
    for part in parts:
        if part not in PRESETS:
            for event in _matches(part, seen):
                names.setdefault(event.content, event.place.name)
    asked = set(names.values())
    entrances = linear_entrances(model, seen)
    for part in parts:
        if part == "paper":
            for event in published_taps(model, image, seen):
                plain = event.tensor.ndim == 3 and event.place.side == "out"
                names.setdefault(
                    event.content, event.place.name if plain else canonical_name(event.content, entrances, seen)
                )
        elif part in PRESETS:
            entered = entrances if part == "activations" else classifier(model, seen)
            for content in preset(model, seen, entered, image):
                names.setdefault(content, canonical_name(content, entrances, seen))
    axes = channel_axes(model, seen)
    everything = [Tap(event.place.name, event.place, tuple(event.tensor.shape), axes(event)) for event in seen]
    taps: dict[str, Tap] = {}
    for event, tap in zip(seen, everything, strict=True):
        if names.get(event.content) == tap.name:
            taps.setdefault(tap.name, tap)
    return list(taps.values()), asked, everything


def _never_called(model: nn.Module, everything: Sequence[Tap]) -> dict[str, str]:
    """Convolutions and linear layers whose entrances nothing shows: the network does without, or uses their weights."""
    called = {tap.place.module for tap in everything}
    return {
        f"{name}:in": "the network does not call this module"
        for name, module in model.named_modules()
        if is_linear_map(module) and name not in called
    }


def _matches(glob: str, seen: Sequence[Seen]) -> list[Seen]:
    """What the glob names: the part before the colon is matched against modules, the part after it taken as it is."""
    pattern, _, suffix = glob.partition(":")
    found = []
    for event in seen:
        module, _, which = event.place.name.partition(":")
        if which == suffix and fnmatchcase(module, pattern):
            found.append(event)
    if not found:
        known = [event.place.name for event in seen]
        raise TapError(
            f"taps: {glob!r} matches no module of the network{did_you_mean(glob, known)}; accepted are "
            f"{', '.join(PRESETS)} and globs over module names such as {known[len(known) // 2]!r}"
        )
    return found


def _by_image(model: nn.Module, example: Tensor, taps: Sequence[Tap]) -> tuple[list[Tap], dict[str, str]]:
    """The taps with their batch axis, but for those whose rows are not those of single images, and the reasons."""
    by_place = {tap.place: tap for tap in taps}
    wrong = {tap.name: "the network does not always run it" for tap in taps}
    second: dict[Place, Tensor] = {}

    def receive_both(place: Place, tensor: Tensor) -> None:
        if place in by_place:
            tap = by_place[place]
            try:
                tap = by_place[place] = _with_batch_axis(tap, tuple(tensor.shape))
                second[place] = tap.pool(tensor, 2, _FINE)[1:]
            except TapError as error:
                wrong[tap.name] = str(error)

    def receive_alone(place: Place, tensor: Tensor) -> None:
        if place not in second:
            return
        tap = by_place[place]
        try:
            alone = tap.pool(tensor, 1, _FINE)
        except TapError:
            wrong[tap.name] = "its shape depends on the image"
            return
        tolerance = max(1e-3, 8 * torch.finfo(tensor.dtype).eps) * float(alone.nan_to_num().abs().max())
        if torch.allclose(second[place], alone, rtol=0, atol=tolerance, equal_nan=True):
            wrong.pop(tap.name, None)
        else:
            wrong[tap.name] = "its rows depend on more than one image"

    modules = sorted({tap.place.module for tap in taps})
    with torch.no_grad():
        with hooks(model, modules) as listening, listening(receive_both):
            model(example.clone())
        with hooks(model, modules) as listening, listening(receive_alone):
            model(example[1:].clone())
    return [tap for tap in by_place.values() if tap.name not in wrong], wrong


def _with_batch_axis(tap: Tap, shape_of_two: tuple[int, ...]) -> Tap:
    """The tap with the axis along which two images are twice as long as one."""
    if len(shape_of_two) != len(tap.raw_shape):
        raise TapError("its rank depends on the number of images")
    grown = [axis for axis, size in enumerate(tap.raw_shape) if shape_of_two[axis] != size]
    if not grown:
        raise TapError("it does not grow with the number of images")
    if len(grown) > 1 or shape_of_two[grown[0]] != 2 * tap.raw_shape[grown[0]]:
        raise TapError(f"two images make it {shape_of_two}, one {tap.raw_shape}: no axis holds the images")
    channel_axis = tap.channel_axis
    if channel_axis == grown[0]:
        channel_axis = len(shape_of_two) - 1 if grown[0] < len(shape_of_two) - 1 else 0
    return replace(tap, batch_axis=grown[0], channel_axis=channel_axis)


def _with_class_tokens(taps: Sequence[Tap], cls_token: ClassTokenPolicy, positions: dict[int, int]) -> list[Tap]:
    """The taps, told where their class token is; a warning where none has one."""
    told = [
        replace(tap, class_token=positions[tap.shape[1]], cls_token=cls_token)
        if tap.kind == "tokens" and tap.shape[1] in positions
        else tap
        for tap in taps
    ]
    if all(tap.class_token is None for tap in told):
        _log.warning("cls_token %r changes nothing: no tap holds a class token", cls_token)
    return told
