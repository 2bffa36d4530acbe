"""Any map-style dataset: an object with ``len()`` and ``[i]`` that gives (image, label); and arrays.

Files that a dataset of torchvision or `datasets` would load are read here instead, so that a picture is the same
whichever way it is read: torchvision's loader ignores the EXIF orientation.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from h2t_store.errors import DataError, one_line
from h2t_store.images.files import FileReader
from h2t_store.images.names import counted, encode, shown
from h2t_store.images.pictures import Picture, digest_of_pixels, from_pixels
from h2t_store.images.source import Reader, Source, read_file

Rows = NDArray[np.int64]
_ORIGIN = {"kind": "dataset"}


class ItemReader(Reader):
    """Pictures that a dataset of any class gives."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def where(self, number: int, sample_id: str) -> str:
        return f"{type(self.dataset).__name__}[{number}]"

    def read(self, number: int, where: str) -> Picture:
        return from_pixels(self.pair(number)[0], where)

    def pair(self, number: int) -> tuple[Any, Any]:
        """Picture and label of an item."""
        where = f"data: {self.where(number, '')}"
        try:
            item = self.dataset[number]
        except Exception as error:  # of any kind, as the dataset may be anyone's
            raise DataError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
        if isinstance(item, Mapping) and "image" in item:
            item = item["image"], item.get("label")
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(
                f"{where} is of type {type(item).__name__}; accepted are (image, label), with None for no label, and a "
                "dictionary with 'image' and 'label'"
            )
        image, label = item
        return image, label.item() if getattr(label, "ndim", None) == 0 else label


class ArrayReader(Reader):
    """Images in memory: uint8 of shape (n, h, w, 3) or (n, h, w), or a sequence of images of PIL."""

    in_memory = True

    def __init__(self, images: Any) -> None:
        self.images = images
        self.image_size = images.shape[1:3] if isinstance(images, np.ndarray) else None

    def read(self, number: int, where: str) -> Picture:
        return from_pixels(self.images[number], where)

    def digest(self, number: int, where: str) -> bytes:
        image = self.images[number]
        return digest_of_pixels(image) if isinstance(image, np.ndarray) else super().digest(number, where)


class TableReader(Reader):
    """Pictures in the one column of a `datasets.Dataset`, or in files that it names."""

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name

    def where(self, number: int, sample_id: str) -> str:
        return f"{self.name}: {sample_id}"

    def read(self, number: int, where: str) -> bytes:
        (image,) = self.table[number].values()
        if image is None or (not image["bytes"] and not image["path"]):
            raise DataError(f"{shown(where)}: there is no image")
        return bytes(image["bytes"]) if image["bytes"] else read_file(image["path"])


class JoinedReader(Reader):
    """Pictures of several readers: ``part`` and ``number`` (n,) say which of them has a picture, and where."""

    def __init__(self, readers: Sequence[Reader], part: Rows, number: Rows) -> None:
        self.readers, self.part, self.number = readers, part, number
        self.in_memory = all(reader.in_memory for reader in readers)
        self.has_stamps = all(reader.has_stamps for reader in readers)

    def where(self, number: int, sample_id: str) -> str:
        reader, number = self._place(number)
        return reader.where(number, sample_id)

    def read(self, number: int, where: str) -> bytes | Picture:
        reader, number = self._place(number)
        return reader.read(number, where)

    def stamp(self, number: int, where: str) -> tuple[int, int]:
        reader, number = self._place(number)
        return reader.stamp(number, where)

    def _place(self, number: int) -> tuple[Reader, int]:
        return self.readers[int(self.part[number])], int(self.number[number])


def open_dataset(dataset: Any, prefix: str = "", rows: Rows | None = None) -> Source:
    """Pictures of a map-style dataset, or of those ``rows`` of it.

    Identifiers are paths where every picture has one of its own, else numbers after the ``prefix``.
    """
    from torch.utils.data import ConcatDataset, Subset
    from torchvision.datasets.folder import default_loader

    kind = type(dataset)
    if isinstance(dataset, Mapping):
        raise DataError(f"data: a dictionary of datasets, {', '.join(map(repr, dataset))}: pass one of them")
    rows = np.arange(len(dataset)) if rows is None else rows
    if not len(rows):
        raise DataError(f"data: {kind.__name__} holds no images")
    if kind is Subset:
        return open_dataset(dataset.dataset, prefix, np.asarray(dataset.indices, dtype=np.int64)[rows])
    if kind is ConcatDataset:
        return _open_joined(dataset, prefix, rows)
    if kind.__module__ == "datasets.arrow_dataset":
        return open_table(dataset, prefix, rows)
    files, root = _files(dataset), getattr(dataset, "root", None)
    root = root if isinstance(root, str | os.PathLike) else None
    paths = _relative([path for path, _ in files], root)
    ids = [paths[i] for i in rows] if paths else [f"{prefix}{i}" for i in rows]
    plain = _is_plain_torchvision(dataset)
    reader: Reader
    if paths and root is not None and plain and getattr(dataset, "loader", None) is default_loader:
        reader, labels = FileReader(root), [files[i][1] for i in rows]
    else:
        reader = items = ItemReader(dataset)
        items.read(int(rows[0]), items.where(int(rows[0]), ids[0]))  # a tensor is refused before labels are read
        labels = _labels(items, rows.tolist())
        pixels = getattr(dataset, "data", None)
        if plain and "uint8" in str(getattr(pixels, "dtype", "")):  # such as MNIST and CIFAR
            array = np.asarray(pixels)
            if array.ndim >= 3 and array.shape[3:] in ((), (3,)):
                reader = ArrayReader(array)
    classes = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)  # names in ImageNet occur twice
    return _source(reader, ids, labels, classes, rows)


def open_table(table: Any, prefix: str, rows: Rows, name: str = "Dataset", root: str | None = None) -> Source:
    """Pictures of a `datasets.Dataset`; identifiers are paths below ``root`` if it has any.

    The image is the column ``image``, else the first column of images; the label is the column ``label``, else the
    `ClassLabel` with the most classes.
    """
    import datasets
    import pyarrow.compute as pc

    features = table.features
    if table.format["type"] is not None:
        raise DataError(f"data: {name} has the format {table.format['type']!r}: pass it .with_format(None)")
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = {key: len(f.names) for key, f in features.items() if isinstance(f, datasets.ClassLabel)}
    if not images:
        raise DataError(f"data: {name} has no column of images; it has {', '.join(features)}")
    image = "image" if "image" in images else images[0]
    label = max(labels, key=labels.__getitem__) if labels and "label" not in features else "label"
    notes = [
        counted([other for other in others if other != key], f"columns like {key!r} were left out of {name!r}")
        for key, others in ((image, images), (label, labels))
        if key not in ("image", "label") and len(others) > 1
    ]

    def column(key: str) -> Any:
        """A column in the order of the rows, without decoding it."""
        values, order = table.data.column(key), table._indices
        return values if order is None else values.take(order.column(0))

    paths = pc.struct_field(column(image), "path").to_pylist()
    below = None if not all(paths) or any("://" in path for path in paths) else _relative(paths, root)
    ids = [below[i] for i in rows] if below else [f"{prefix}{i}" for i in rows]
    values = column(label).to_pylist() if label in features else [None] * len(table)
    classes = getattr(features.get(label), "names", None)
    reader = TableReader(table.select_columns(image).cast_column(image, datasets.Image(decode=False)), name)
    return _source(reader, ids, [values[i] for i in rows], classes, rows, notes)


def open_arrays(images: Any, labels: Any) -> Source:
    """uint8 images (n, h, w, 3), or images of PIL, with n labels or None."""
    if not (isinstance(images, Sequence) and any(isinstance(image, Image.Image) for image in images)):
        try:
            images = np.asarray(images)
        except ValueError:
            raise DataError("data: images of several shapes; accepted is uint8 (n, h, w, 3)") from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise DataError(
                f"data: images of shape {images.shape} and dtype {images.dtype}; accepted is uint8 (n, h, w, 3), not "
                "empty"
            )
    ids = [f"array/{i}" for i in range(len(images))]
    return Source.of(ArrayReader(images), ids, *encode(labels, len(images)), origin={"kind": "arrays"})


def _open_joined(dataset: Any, prefix: str, rows: Rows) -> Source:
    part = np.searchsorted(dataset.cumulative_sizes, rows, side="right")
    starts = np.array([0, *dataset.cumulative_sizes])
    sources = [open_dataset(dataset.datasets[p], prefix, rows[part == p] - starts[p]) for p in np.unique(part).tolist()]
    labels = [label for source in sources for label in source.classes]
    are_names = any(isinstance(label, str) for label in labels)
    classes = tuple(dict.fromkeys(map(str, labels) if are_names else labels))
    in_order = np.argsort(part, kind="stable")
    ids = [name for source in sources for name in source.sample_ids.tolist()]
    if len(set(ids)) < len(ids):
        ids = [f"{prefix}{row}" for row in rows[in_order]]
    reader = JoinedReader(
        [source.reader for source in sources],
        np.repeat(np.arange(len(sources)), [len(source) for source in sources]),
        np.concatenate([source.numbers for source in sources]),
    )
    y = np.concatenate([source.relabelled(classes).y for source in sources])
    notes = [note for source in sources for note in source.notes]
    return Source.of(reader, ids, y, classes, notes=notes, origin=_ORIGIN).take(np.argsort(in_order))


def _source(
    reader: Reader, ids: list[str], labels: list[Any], names: Any, numbers: Rows, notes: Sequence[str] = ()
) -> Source:
    """A source whose integer labels have ``names``, if these are strings that differ."""
    y, classes = encode(labels, len(labels))
    names = names.tolist() if isinstance(names, np.ndarray) else names
    names = tuple(names) if isinstance(names, Sequence) else ()
    if classes and isinstance(classes[0], int) and len({name for name in names if isinstance(name, str)}) == len(names):
        if 0 < len(names) < len(classes):
            raise DataError(f"data: label {len(classes) - 1} of {len(names)} classes")
        classes = names or classes
    if not (y >= 0).any():
        classes, notes = (), [*notes, f"{len(y)} images without labels"]
    return Source.of(reader, ids, y, classes, numbers=numbers, notes=notes, origin=_ORIGIN)


def _labels(reader: ItemReader, rows: list[int]) -> list[Any]:
    """What ``targets`` says, if it agrees with three items, else what all items say."""
    targets: Any = getattr(reader.dataset, "targets", None)
    targets = targets.tolist() if hasattr(targets, "tolist") else targets
    targets = targets if isinstance(targets, Sequence) and len(targets) == len(reader.dataset) else None
    some = (rows[0], rows[len(rows) // 2], rows[-1])
    if targets and all(np.array_equal(reader.pair(i)[1], targets[i]) for i in some):
        return [targets[i] for i in rows]
    return [reader.pair(i)[1] for i in rows]


def _files(dataset: Any) -> list[tuple[str, Any]]:
    """Paths and labels in ``samples`` or ``imgs``, as datasets of torchvision have them; all or none."""
    for files in (getattr(dataset, "samples", None), getattr(dataset, "imgs", None)):
        if isinstance(files, list | tuple) and len(files) == len(dataset):
            found = [tuple(file) for file in files if isinstance(file, tuple | list)]
            if len(found) == len(files) and all(len(file) == 2 and isinstance(file[0], str) for file in found):
                return found
    return []


def _relative(paths: Sequence[str], root: str | os.PathLike[str] | None) -> list[str] | None:
    """Paths below a folder, by default the one that holds them all; None where two are equal or one is elsewhere."""
    if root is None and paths and all(map(os.path.isabs, paths)):
        root = os.path.commonpath({os.path.dirname(path) for path in paths})
    below = "" if root is None else os.path.join(os.path.abspath(root), "")
    whole = [os.path.abspath(path) if below else path for path in paths]
    names = [
        full.removeprefix(below) if full.startswith(below) else path for full, path in zip(whole, paths, strict=True)
    ]
    return None if len(set(names)) < len(names) or any(map(os.path.isabs, names)) else names


def _is_plain_torchvision(dataset: Any) -> bool:
    """Whether it is of torchvision and gives its pictures and labels as they are."""
    transforms = [getattr(dataset, name, None) for name in ("transform", "target_transform", "transforms")]
    return type(dataset).__module__.startswith("torchvision.datasets.") and not any(transforms)
