"""WebDataset: samples in shards of tars, each the files that share a name up to its first dot.

The shards are indexed like any other tar, since rows are read by number. Names of shards are names of files, and never
the commands that the webdataset package would run.
"""

import itertools
import json
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from h2t_store.errors import DataError, did_you_mean
from h2t_store.images.formats import IMAGE_EXTENSIONS, notes_on_left_out
from h2t_store.images.names import as_names, counted, encode, encode_words, notes_on, shown
from h2t_store.images.tars import Index, TarSource, index_tar, read_part

_INFO_FILES = ("_info.json", "info.json")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_PREFERRED = ("jpg", "png", "webp")
_MAX_SHARDS = 1_000_000


def open_shards(folder: Path, split: str | None) -> TarSource:
    """Samples of all shards, by shard and name.

    The image is the file with an image's extension (of several, jpg before png before webp). The label is the number or
    word in ``.cls``, or the field of ``.json`` that the split's ``alt_label`` in ``_info.json`` names, as in timm,
    which leaves out samples where that is negative.
    """
    if not folder.is_dir():
        raise DataError(f"data 'wds/{folder}': there is no such folder")
    names, n_expected, label_field = _shards_of(folder, split or "train")
    paths = [folder / name for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        raise DataError(f"split {split!r}: {counted(missing, f'of {len(paths)} shards are not in {shown(folder)}')}")
    samples = _Samples(label_field)
    tars = []
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        index = index_tar(path)
        tars.append((str(path.absolute()), index.stamp))
        samples.read(number, name, tars[-1], index)
    n_found = len(samples.names) + len(samples.negative)
    if not n_found:
        raise DataError(f"data 'wds/{folder}': {len(paths)} shards hold no images")
    if n_expected not in (0, n_found):
        raise DataError(f"split {split!r}: {n_expected} samples are expected, but the shards hold {n_found}")
    without = [name for name, label in zip(samples.names, samples.labels, strict=True) if label is None]
    if 0 < len(without) < len(samples.names):
        raise DataError(f"data: {counted(without, f'of {len(samples.names)} samples have no label')}")
    labels = [label for label in samples.labels if label is not None]
    y, classes = encode_words(labels) if labels else encode(None, len(samples.names))
    return TarSource(
        origin={"kind": "wds"},
        sample_ids=as_names(samples.names),
        y=y,
        classes=classes,
        notes=[
            *notes_on_left_out(samples.left_out, "files are neither image nor label and were left out"),
            *notes_on((samples.negative, "samples with negative labels were left out")),
            *([] if classes else [f"{len(y)} images without labels"]),
        ],
        tars=tuple(tars),
        places=np.array(samples.places, dtype=np.int64).reshape(-1, 3),
    )


@dataclass
class _Samples:
    """Samples of the shards read so far, and what was left out of them; labels are in ``.cls`` without a field."""

    label_field: str
    names: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    places: "array[int]" = field(default_factory=lambda: array("q"))
    left_out: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)

    def read(self, number: int, shard: str, tar: tuple[str, tuple[int, int]], index: Index) -> None:
        """Add the samples of a shard."""
        by_key, unused = _by_key(index.names)
        for key, sample in sorted(by_key.items()):
            image, label = _image_of(sample), "json" if self.label_field else "cls"
            used = (image, label) if image else ()
            unused += [f"{key}.{extension}" for extension in sample if extension not in used]
            if image is None:
                continue
            name = f"{shard}/{key}.{image}"
            content = read_part(*tar, *index.places[sample[label]].tolist()) if label in sample else None
            word = self._label(content, name)
            if self.label_field and word is not None and word.startswith("-"):
                self.negative.append(name)
                continue
            self.names.append(name)
            self.labels.append(word)
            self.places.extend((number, *index.places[sample[image]].tolist()))
        self.left_out += [f"{shard}/{name}" for name in (*index.special, *unused)]

    def _label(self, content: bytes | None, name: str) -> str | None:
        """The label in a ``.cls`` or ``.json``."""
        if content is None and not self.label_field:
            return None
        try:
            text = (content or b"{}").decode().strip()
            word = str(int(json.loads(text)[self.label_field])) if self.label_field else text
        except (KeyError, TypeError, ValueError) as error:
            accepted = f".json with a whole number in {self.label_field!r}" if self.label_field else ".cls in UTF-8"
            raise DataError(f"data: {shown(name)}: its label cannot be read; accepted is a {accepted}") from error
        if not word:
            raise DataError(f"data: {shown(name)}: its .cls is empty; accepted is one label")
        return word


def _by_key(names: list[str]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """For each key the numbers of its files by extension, and files in no sample; a later one of a name counts."""
    samples: dict[str, dict[str, int]] = {}
    unused = []
    for i, name in enumerate(names):
        found = _KEY_AND_EXTENSION.fullmatch(name)
        if found is None:
            unused.append(name)
            continue
        sample, extension = samples.setdefault(found[1], {}), found[2].lower()
        if extension in sample:
            unused.append(names[sample[extension]])
        sample[extension] = i
    return samples, unused


def _image_of(sample: dict[str, int]) -> str | None:
    images = sorted(extension for extension in sample if "." + extension in IMAGE_EXTENSIONS)
    return next((extension for extension in (*_PREFERRED, *images) if extension in images), None)


def _shards_of(folder: Path, split: str) -> tuple[list[str], int, str]:
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
            return list(found["filenames"]), int(found["num_samples"]), str(found.get("alt_label") or "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown(path)}: not a description of splits: {error!r}") from error
    there = f"; {_INFO_FILES[0]} has {', '.join(info)}" if info else f"; there is no {_INFO_FILES[0]}"
    raise DataError(
        f"split {split!r} of 'wds/{folder}'{did_you_mean(split, info)}{there}; accepted is also "
        "'name-{0000..0001}.tar|NUMBER_OF_SAMPLES'"
    )


def _expanded(pattern: str) -> list[str]:
    """Names with each ``{0000..0012}`` and ``{a,b}`` replaced by what it stands for, as in a shell."""
    pieces: list[list[str]] = []
    n_shards = 1
    for i, piece in enumerate(_BRACES.split(pattern)):
        found = _RANGE.fullmatch(piece) if i % 2 else None
        if found is None:
            pieces.append(piece.split(",") if i % 2 else [piece])
            continue
        first, last = int(found[1]), int(found[2])
        n_shards *= max(last - first + 1, 1)
        if last < first or n_shards > _MAX_SHARDS:
            raise DataError(f"split {pattern!r}: {{{piece}}} names no shards, or more than {_MAX_SHARDS}")
        pieces.append([f"{number:0{len(found[1])}d}" for number in range(first, last + 1)])
    return ["".join(name) for name in itertools.product(*pieces)]
