"""WebDataset: samples in shards of tars, each the files that share a name up to its first dot.

Shards are indexed like any other tar (`h2t_store.images.tars` says why). Their names are names of files, and never the
commands that the webdataset package would run.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from h2t_store.errors import DataError, did_you_mean, one_line
from h2t_store.images.formats import IMAGE_EXTENSIONS, notes_on_left_out
from h2t_store.images.names import counted, encode, encode_words, notes_on, shown
from h2t_store.images.source import Source
from h2t_store.images.tars import Tar, TarReader, index_tar, read_part

_INFO_FILES = ("_info.json", "info.json")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_PREFERRED = ("jpg", "png", "webp")
_MAX_SHARDS = 1_000_000


def open_shards(folder: Path, split: str | None) -> Source:
    """Samples of all shards, by shard and name.

    The image is the file with an image's extension (of several, jpg before png before webp). The label is the number or
    word in ``.cls``, or the field of ``.json`` that the split's ``alt_label`` in ``_info.json`` names, as in timm,
    which leaves out samples where that is negative.
    """
    if not folder.is_dir():
        raise DataError(f"data 'wds/{folder}': there is no such folder")
    split = split or "train"
    shards, n_expected, label_field = _find_shards(folder, split)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise DataError(f"split {split!r}: {counted(missing, f'of {len(shards)} shards are not in {shown(folder)}')}")
    tars, ids, labels, places = [], [], [], []
    left_out: list[str] = []
    negative = []
    for number, shard in enumerate(shards):
        tars.append(index_tar(folder / shard))
        for name, image, label in _samples(tars[-1], "json" if label_field else "cls", left_out, shard):
            word = _label(tars[-1], label, label_field, name)
            if label_field and word.startswith("-"):
                negative.append(name)
                continue
            ids.append(name)
            labels.append(word)
            places.append((number, *tars[-1].places[image].tolist()))
    if not ids:
        others = f"; {len(negative)} with negative labels are left out" if negative else ""
        raise DataError(f"data 'wds/{folder}': {len(shards)} shards hold no images{others}")
    if n_expected not in (0, len(ids) + len(negative)):
        raise DataError(
            f"split {split!r}: {n_expected} samples are expected, but the shards hold {len(ids) + len(negative)}"
        )
    without = [name for name, word in zip(ids, labels, strict=True) if not word]
    if 0 < len(without) < len(ids):
        raise DataError(f"data: {counted(without, f'of {len(ids)} samples have no label')}")
    y, classes = encode(None, len(ids)) if without else encode_words(labels)
    notes = [
        *notes_on_left_out(left_out, "files are neither image nor label and were left out"),
        *notes_on((negative, "samples with negative labels were left out")),
        *([] if classes else [f"{len(ids)} images without labels"]),
    ]
    reader = TarReader(tars, np.array(places, dtype=np.int64))
    return Source.of(reader, ids, y, classes, notes=notes, origin={"kind": "wds"})


def _samples(tar: Tar, label: str, left_out: list[str], shard: str) -> Iterator[tuple[str, int, int | None]]:
    """Name, image and label of each sample in a shard, by name; the files that are neither go to ``left_out``.

    A later file takes the place of an earlier one of the same name.
    """
    by_key: dict[str, dict[str, int]] = {}
    unused = list(tar.special)
    for i, name in enumerate(tar.names):
        found = _KEY_AND_EXTENSION.fullmatch(name)
        sample = by_key.setdefault(found[1], {}) if found else {}
        extension = found[2].lower() if found else ""
        if not found or extension in sample:
            unused.append(name)
        sample[extension] = i
    for key, sample in sorted(by_key.items()):
        images = sorted(extension for extension in sample if "." + extension in IMAGE_EXTENSIONS)
        image = next((extension for extension in (*_PREFERRED, *images) if extension in images), None)
        used = (image, label) if image else ()
        unused += [f"{key}.{extension}" for extension in sample if extension not in used]
        if image:
            yield f"{shard}/{key}.{image}", sample[image], sample.get(label)
    left_out += [f"{shard}/{name}" for name in unused]


def _label(tar: Tar, label: int | None, label_field: str, name: str) -> str:
    """What a ``.cls`` holds, or that field of a ``.json``; nothing where there is no ``.cls``."""
    if label is None and not label_field:
        return ""
    try:
        content = b"{}" if label is None else read_part(tar.path, tar.stamp, *tar.places[label].tolist())
        word = str(int(json.loads(content)[label_field])) if label_field else content.decode().strip()
    except (KeyError, TypeError, ValueError) as error:
        accepted = f".json with a whole number in {label_field!r}" if label_field else ".cls in UTF-8"
        raise DataError(f"data: {shown(name)}: its label cannot be read; accepted is a {accepted}") from error
    if not word:
        raise DataError(f"data: {shown(name)}: its .cls is empty; accepted is one label")
    return word


def _find_shards(folder: Path, split: str) -> tuple[list[str], int, str]:
    """Names of the shards, how many samples they should hold (0 if unknown), and where in the JSON the label is."""
    if ".tar" in split or ".." in split:
        shards, _, n_samples = split.partition("|")
        if n_samples and not n_samples.isdecimal():
            raise DataError(f"split {split!r}: {n_samples!r} is not a number of samples; accepted is 'SHARDS|NUMBER'")
        return _expanded(shards), int(n_samples or 0), ""
    info: dict[str, Any] = {}
    path = next((folder / name for name in _INFO_FILES if (folder / name).is_file()), None)
    try:
        if path is not None:
            info = dict(json.loads(path.read_bytes())["splits"])
        if split in info:
            found = info[split]
            names = found["filenames"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"filenames of {split!r}: accepted is a list of names")
            return names, int(found["num_samples"]), str(found.get("alt_label") or "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{shown(path)}: not a description of splits: {type(error).__name__}: {one_line(error)}"
        ) from error
    there = f"; {_INFO_FILES[0]} has {', '.join(info)}" if info else f"; there is no {_INFO_FILES[0]}"
    raise DataError(
        f"split {split!r} of 'wds/{folder}'{did_you_mean(split, info)}{there}; accepted is also "
        "'name-{0000..0001}.tar|NUMBER_OF_SAMPLES'"
    )


def _expanded(pattern: str) -> list[str]:
    """Names with each ``{0000..0012}`` and ``{a,b}`` replaced by what it stands for, as in a shell."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    pieces = braces[1].split(",")
    if (found := _RANGE.fullmatch(braces[1])) is not None:
        numbers = range(int(found[1]), int(found[2]) + 1)
        if not 0 < len(numbers) <= _MAX_SHARDS:
            raise DataError(f"split {pattern!r}: {braces[0]} names no shards, or more than {_MAX_SHARDS}")
        pieces = [f"{number:0{len(found[1])}d}" for number in numbers]
    return [name for piece in pieces for name in _expanded(pattern[: braces.start()] + piece + pattern[braces.end() :])]
