"""WebDataset: samples in shards of tars, each the files that share a name up to its first dot.

Rows are computed again by their number, which timm's reader, an iterator, does not give: the shards are indexed like
any other tar. Names of shards are names of files, and never the commands that the webdataset package would run.
"""

import itertools
import json
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h2t_store.errors import DataError, did_you_mean
from h2t_store.images.foreign import left_out
from h2t_store.images.labels import encode, encode_words
from h2t_store.images.names import Classes, as_names, count, shown
from h2t_store.images.pictures import IMAGE_EXTENSIONS
from h2t_store.images.tar import Archives, Members, TarSource, read_members, tar_source

__all__ = ["open_shards"]

_INFO_FILES = ("_info.json", "info.json")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_IMAGE_ORDER = ("jpg", "png", "webp")
_MAX_SHARDS = 1_000_000


@dataclass(frozen=True)
class _Split:
    """Which shards, how many samples they should hold (0 where unknown), and where in the JSON the label is."""

    shards: list[str]
    n_samples: int
    label_field: str


def open_shards(folder: Path, split: str | None) -> TarSource:
    """Samples of all shards, by shard and name.

    The image is the file with an image's extension (of several, jpg before png before webp). The label is the number or
    word in ``.cls``, or the field of ``.json`` that the split's ``alt_label`` in ``_info.json`` names, as timm, which
    leaves out samples where that is negative.
    """
    if not folder.is_dir():
        raise DataError(f"data 'wds/{folder}': there is no such folder")
    asked = _find_split(folder, split)
    paths = [folder / name for name in asked.shards]
    missing = [name for name, path in zip(asked.shards, paths, strict=True) if not path.is_file()]
    if missing:
        raise DataError(f"split {split!r}: {count(missing, f'of {len(paths)} shards are not in {shown(folder)}')[0]}")
    members = [read_members(path) for path in paths]
    archives = Archives(tuple(str(path.absolute()) for path in paths), tuple(shard.stamp for shard in members))
    samples = _Samples(archives, asked.label_field)
    for number, (name, files) in enumerate(zip(asked.shards, members, strict=True)):
        samples.read(number, name, files)
    n_found = len(samples.names) + len(samples.negative)
    if not n_found:
        raise DataError(f"data 'wds/{folder}': {len(paths)} shards hold no images")
    if asked.n_samples not in (0, n_found):
        raise DataError(f"split {split!r}: {asked.n_samples} samples are expected, but the shards hold {n_found}")
    y, classes = samples.encoded_labels()
    notes = [
        *left_out(samples.left_out, "files are neither image nor label and were left out"),
        *count(samples.negative, "samples with negative labels were left out"),
        *([] if classes else [f"{len(y)} images without labels"]),
    ]
    return tar_source(
        archives,
        np.array(samples.shards, dtype=np.int32),
        np.array(samples.offsets, dtype=np.int64),
        np.array(samples.sizes, dtype=np.int64),
        origin={"kind": "wds"},
        sample_ids=as_names(samples.names),
        y=y,
        classes=classes,
        notes=notes,
    )


@dataclass
class _Samples:
    """Columns that grow with each shard, and what is left out of it."""

    archives: Archives
    label_field: str
    names: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    shards: "array[int]" = field(default_factory=lambda: array("i"))
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    left_out: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)

    def read(self, number: int, shard: str, files: Members) -> None:
        """Add the samples of a shard, by name."""
        self.left_out += [f"{shard}/{name}" for name in files.special]
        by_key, unused = _by_key(files)
        for key, sample in sorted(by_key.items()):
            image = _image_of(sample)
            used = (image, "json" if self.label_field else "cls") if image else ()
            unused += [f"{key}.{extension}" for extension in sample if extension not in used]
            if image is None:
                continue
            name = f"{shard}/{key}.{image}"
            label = self._label(number, files, sample, name)
            if self.label_field and label is not None and label.startswith("-"):
                self.negative.append(name)
                continue
            self.names.append(name)
            self.labels.append(label)
            self.shards.append(number)
            self.offsets.append(files.offsets[sample[image]])
            self.sizes.append(files.sizes[sample[image]])
        self.left_out += [f"{shard}/{name}" for name in unused]

    def encoded_labels(self) -> tuple[NDArray[np.int64], Classes]:
        """Codes and classes; either all samples have a label or none has."""
        labels = [label for label in self.labels if label is not None]
        if not labels:
            return encode(None, len(self.labels))
        if len(labels) < len(self.labels):
            without = [name for name, label in zip(self.names, self.labels, strict=True) if label is None]
            raise DataError(f"data: {count(without, f'of {len(self.labels)} samples have no label')[0]}")
        return encode_words(labels)

    def _label(self, number: int, files: Members, sample: dict[str, int], name: str) -> str | None:
        member = sample.get("json" if self.label_field else "cls")
        if member is None and not self.label_field:
            return None
        try:
            if member is None:
                raise KeyError("json")
            content = self.archives.read(number, files.offsets[member], files.sizes[member])
            label = str(int(json.loads(content)[self.label_field])) if self.label_field else content.decode().strip()
        except (KeyError, TypeError, ValueError) as error:
            accepted = f".json with a whole number in {self.label_field!r}" if self.label_field else ".cls in UTF-8"
            raise DataError(f"data: {shown(name)}: its label cannot be read; accepted is a {accepted}") from error
        if not label:
            raise DataError(f"data: {shown(name)}: its .cls is empty; accepted is one label")
        return label


def _find_split(folder: Path, split: str | None) -> _Split:
    info = _info(folder)
    name = split or "train"
    if ".tar" in name or ".." in name:
        shards, _, n_samples = name.partition("|")
        if n_samples and not n_samples.isdecimal():
            raise DataError(f"split {name!r}: {n_samples!r} is not a number of samples; accepted is 'SHARDS|NUMBER'")
        return _Split(_expanded(shards), int(n_samples or 0), "")
    if name not in info:
        there = f"; {_INFO_FILES[0]} has {', '.join(info)}" if info else f"; there is no {_INFO_FILES[0]}"
        raise DataError(
            f"split {name!r} of 'wds/{folder}'{did_you_mean(name, info)}{there}; accepted is also "
            "'name-{0000..0001}.tar|NUMBER_OF_SAMPLES'"
        )
    try:
        found = info[name]
        return _Split(list(found["filenames"]), int(found["num_samples"]), str(found.get("alt_label") or ""))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"data 'wds/{folder}': split {name!r} in its {_INFO_FILES[0]} is damaged: {error!r}") from error


def _info(folder: Path) -> dict[str, Any]:
    """The splits of the folder's info file, if there is one."""
    path = next((folder / name for name in _INFO_FILES if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        splits = json.loads(path.read_bytes())["splits"]
        return dict(splits)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown(path)}: not a description of splits: {error!r}") from error


def _expanded(pattern: str) -> list[str]:
    """Names with each ``{0000..0012}`` and ``{a,b}`` replaced by what it stands for, as in a shell."""
    pieces: list[list[str]] = []
    n_shards = 1
    for i, piece in enumerate(_BRACES.split(pattern)):
        if i % 2 == 0:
            pieces.append([piece])
        elif (found := _RANGE.fullmatch(piece)) is not None:
            first, last = int(found[1]), int(found[2])
            n_shards *= max(last - first + 1, 1)
            if last < first or n_shards > _MAX_SHARDS:
                raise DataError(f"split {pattern!r}: {{{piece}}} names no shards, or more than {_MAX_SHARDS}")
            pieces.append([f"{number:0{len(found[1])}d}" for number in range(first, last + 1)])
        else:
            pieces.append(piece.split(","))
    return ["".join(name) for name in itertools.product(*pieces)]


def _by_key(files: Members) -> tuple[dict[str, dict[str, int]], list[str]]:
    """For each key the numbers of its members by extension, and the names of members that are in no sample.

    A later member takes the place of an earlier one of the same name.
    """
    samples: dict[str, dict[str, int]] = {}
    unused = []
    for i, name in enumerate(files.names):
        found = _KEY_AND_EXTENSION.fullmatch(name)
        if found is None:
            unused.append(name)
            continue
        sample = samples.setdefault(found[1], {})
        if (extension := found[2].lower()) in sample:
            unused.append(name)
        sample[extension] = i
    return samples, unused


def _image_of(sample: dict[str, int]) -> str | None:
    images = [extension for extension in sample if "." + extension in IMAGE_EXTENSIONS]
    known = [extension for extension in _IMAGE_ORDER if extension in images]
    return next(iter([*known, *sorted(images)]), None)
