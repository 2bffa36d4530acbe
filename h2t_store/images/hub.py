"""``hfds/NAME``: datasets in the formats of Hugging Face, from a folder or the Hub.

Rows are read from the table behind timm's reader, since timm's dataset puts the next image in the place of one that
cannot be read.
"""

import hashlib
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from numpy.typing import NDArray

from h2t_store.connection import why_unreachable
from h2t_store.errors import DataError, one_line
from h2t_store.images.factory import create
from h2t_store.images.fingerprint import Digests, as_stamps, read_file, stamp
from h2t_store.images.folder import walk
from h2t_store.images.foreign import left_out
from h2t_store.images.labels import encode
from h2t_store.images.names import Classes, Names, as_names, count, shown
from h2t_store.images.source import UNLABELLED, Source
from h2t_store.switches import Switch

__all__ = ["HubSource", "open_hub"]

_FORMATS = ("imagefolder", "parquet", "arrow")
_NOT_DATA = ("readme.md", "metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True, eq=False, kw_only=True)
class HubSource(Source):
    """Images in a table of Hugging Face's ``datasets``, or in files that it names."""

    name: str
    table: Any = field(repr=False)
    column: str

    def where(self, row: int) -> str:
        return f"{self.name}: {self.sample_ids[row]}"

    def content(self, row: int) -> bytes:
        image = self.table[int(self.numbers[row])][self.column]
        if image is None or (not image["bytes"] and not image["path"]):
            raise DataError(f"{shown(self.where(row))}: there is no image")
        if image["bytes"]:
            return bytes(image["bytes"])
        try:
            content, found = read_file(image["path"])
        except OSError as error:
            raise DataError(f"{shown(self.where(row))}: {error.strerror}") from error
        self.require_stamp(row, found)
        return content

    def stamps(self) -> NDArray[np.int64]:
        """What the table holds has the number of the table's version, a digest by `datasets`, for a time of change."""
        import pyarrow.compute as pc

        images = self.table.data.column(self.column)
        lengths = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
        paths = _paths(self.table, self.column)
        version = int.from_bytes(hashlib.blake2b(self.table._fingerprint.encode(), digest_size=7).digest(), "big")
        try:
            chosen = ((lengths[i], paths[i]) for i in self.numbers.tolist())
            return as_stamps((n or 0, version) if n or not path else stamp(os.stat(path)) for n, path in chosen)
        except OSError as error:
            raise DataError(f"{self.name}: {shown(error.filename)}: {error.strerror}") from error


def open_hub(name: str, cache: Path | None, split: str) -> HubSource:
    """Open a split of ``hfds/NAME``: an image folder, Parquet or Arrow files, local or from the Hub.

    Identifiers are file names where each image has one of its own, else ``SPLIT/index``. The image is the column
    ``image``, else the first of images; the label the column ``label``, else that of the most classes.
    """
    builder = _prepared(name, cache)
    features = builder.info.features
    image, notes = _column(features, "Image", "image", name)
    label, more_notes = _column(features, "ClassLabel", "label", name)
    if image not in features:
        raise DataError(f"data 'hfds/{name}' has no column of images; it has {', '.join(features)}")
    table = _table(name, cache, split, image, label)
    y, classes = _labels(table, label)
    notes = [*notes, *more_notes, *([] if classes else [f"{len(y)} images without labels"])]
    if not len(y):
        raise DataError(f"data 'hfds/{name}', split {split!r}, holds no images")
    paths = _paths(table, image)
    if builder.name == "imagefolder" and os.path.isdir(name):
        _require_distinct_folders(name, paths, y, classes)
        notes += _left_out(name, cache, table, image, label)
    return HubSource(
        origin={"kind": "hfds", "split": split},
        sample_ids=_sample_ids(name, split, paths),
        y=y,
        classes=classes,
        notes=notes,
        numbers=np.arange(len(y)),
        digests=Digests(len(y)),
        name=f"hfds/{name}",
        table=table,
        column=image,
    )


def _prepared(name: str, cache: Path | None) -> Any:
    """What reads the dataset, which is now in the cache; other formats and versions might run code of the dataset."""
    if importlib.util.find_spec("datasets") is None:
        raise DataError("data 'hfds/…' needs the package datasets: pip install head2toe[hf]")
    import datasets

    if int(datasets.__version__.partition(".")[0]) < 4:
        raise DataError(f"datasets {datasets.__version__} can run code of a dataset: pip install 'datasets>=4'")
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise DataError(f"data 'hfds/{name}': there is no such folder")
    unreachable = None if os.path.isdir(name) else why_unreachable(huggingface_hub.constants.ENDPOINT)
    try:
        with _without_progress, _offline if unreachable else nullcontext():
            builder = datasets.load_dataset_builder(name, cache_dir=None if cache is None else str(cache))
            if builder.name not in _FORMATS:
                raise DataError(f"data 'hfds/{name}' is {builder.name}; accepted are {', '.join(_FORMATS)}")
            builder.download_and_prepare()
        return builder
    except DataError:
        raise
    except Exception as error:  # anything, down to the network's failures
        reason = one_line(error)
        if unreachable:
            reason = f"it is not on this machine, and the Hub cannot be reached ({one_line(unreachable)})"
        raise DataError(f"data 'hfds/{name}': {reason}") from error


def _go_offline() -> Callable[[], None]:
    """Have what is in the cache used without asking the Hub again and again first; gives what undoes it."""
    import datasets

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]

    def set_to(values: Sequence[bool]) -> None:
        for place, value in zip(places, values, strict=True):
            place.HF_HUB_OFFLINE = value

    set_to([True, True])
    return lambda: set_to(before)


def _hide_progress() -> Callable[[], None]:
    import datasets

    if sys.stderr.isatty() or not datasets.is_progress_bar_enabled():
        return lambda: None
    datasets.disable_progress_bars()
    enable: Callable[[], None] = datasets.enable_progress_bars
    return enable


_offline, _without_progress = Switch(_go_offline), Switch(_hide_progress)


def _table(name: str, cache: Path | None, split: str, image: str, label: str) -> Any:
    return create(f"hfds/{name}", cache, split, input_key=image, target_key=label).reader.dataset


def _column(features: Any, kind: str, usual: str, name: str) -> tuple[str, list[str]]:
    """The column of that kind, and a note where others of its kind are not read."""
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if usual in features or not found:
        return usual, []
    found.sort(key=lambda column: -len(getattr(features[column], "names", ())))
    return found[0], count(found[1:], f"columns like {found[0]!r} were left out of 'hfds/{name}'")


def _labels(table: Any, column: str) -> tuple[NDArray[np.int64], Classes]:
    if column not in table.column_names:
        return encode(None, len(table))
    labels = table.data.column(column).to_pylist()
    names = getattr(table.features[column], "names", None)
    if names is None and all(isinstance(label, str) for label in labels):
        return encode(np.array(labels, dtype=object), len(labels))
    if not all(label is None or isinstance(label, int) for label in labels):
        raise DataError(f"data: labels in column {column!r} are neither numbers nor words")
    y, classes = encode(np.array([UNLABELLED if label is None else label for label in labels]), len(labels))
    return y, classes if names is None or not classes else tuple(names)


def _paths(table: Any, column: str) -> list[str | None]:
    import pyarrow.compute as pc

    paths: list[str | None] = pc.struct_field(table.data.column(column), "path").to_pylist()
    return paths


def _sample_ids(name: str, split: str, paths: list[str | None]) -> Names:
    """Paths below the folder, or as the table has them where they are relative; only where no two are equal."""
    below = os.path.join(os.path.abspath(name), "")
    relative = [path.removeprefix(below) for path in paths if path]
    if len(set(relative)) == len(paths) and not any("://" in path or os.path.isabs(path) for path in relative):
        return as_names(relative)
    return as_names([f"{split}/{i}" for i in range(len(paths))])


def _require_distinct_folders(name: str, paths: list[str | None], y: NDArray[np.int64], classes: Classes) -> None:
    """`datasets` names a class after the last folder alone, and so merges folders of equal names."""
    folders: dict[int, set[str]] = defaultdict(set)
    for path, label in zip(paths, y.tolist(), strict=True):
        if path and label >= 0 and os.path.basename(os.path.dirname(path)) == classes[label]:
            folders[label].add(os.path.relpath(os.path.dirname(path), name))
    merged = next((sorted(found) for found in folders.values() if len(found) > 1), None)
    if merged:
        raise DataError(
            f"data 'hfds/{name}': {merged[0]!r} and {merged[1]!r} would be one class; name the folder itself "
            f"({name!r}) to keep them apart"
        )


def _left_out(name: str, cache: Path | None, table: Any, image: str, label: str) -> list[str]:
    """Notes on files that are in no split."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    found = walk(Path(name))
    files = [*found.images, *found.other, *found.broken_links]
    extensions = tuple(ImageFolder.EXTENSIONS)
    images = [file for file in files if file.lower().endswith(extensions)]
    notes = replace(found, other=[]).notes()
    other = [f for f in files if not f.lower().endswith(extensions) and os.path.basename(f).lower() not in _NOT_DATA]
    splits = table.info.splits or {}
    if len(images) != sum(split.num_examples for split in splits.values()):
        below = os.path.join(os.path.abspath(name), "")
        tables = [_table(name, cache, split, image, label) for split in splits]
        read = {path.removeprefix(below) for one in tables for path in _paths(one, image) if path}
        other += [file for file in images if file not in read]
    return [*left_out(other, "files are read in no split"), *notes]
