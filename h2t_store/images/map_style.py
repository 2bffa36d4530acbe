"""Any map-style dataset: an object with ``len()`` and ``[i]`` that gives (picture, label), and arrays.

Where it is known which files a dataset reads, they are read here: torchvision's loader drops the EXIF orientation, and
`datasets` decodes what its tables hold. So a picture is the same whichever way it is read.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets.folder import default_loader

from h2t_store.errors import DataError, one_line
from h2t_store.images.names import UNLABELLED, Classes, as_names, counted, encode, shown
from h2t_store.images.pictures import DIGEST_BYTES, Picture, from_pixels
from h2t_store.images.source import Source, Stamp, read_file

_MOST_DIGESTED = 1000


class Items:
    """A dataset of any class: its pictures and labels are what ``[i]`` gives.

    Attributes
    ----------
    name : str
        What errors call it.
    notes : list of str
        What is left out, for a person to read.
    in_memory : bool
        Whether reading an item costs nothing.
    image_size : (int, int) or None
        Height and width, where all pictures share them.
    """

    notes: Sequence[str] = ()
    in_memory = False
    image_size: tuple[int, int] | None = None

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.name = type(dataset).__name__
        pixels = getattr(dataset, "data", None)
        if _is_plain_torchvision(dataset) and str(getattr(pixels, "dtype", "")).endswith("uint8"):
            self.in_memory = True
            self.image_size = tuple(pixels.shape[1:3]) if pixels.shape[3:] in ((), (3,)) else None

    def where(self, i: int, sample_id: str) -> str:
        """What errors call an item."""
        return f"{self.name}[{i}]"

    def content(self, i: int, where: str) -> bytes | Picture:
        """The bytes of a file, or the picture where there is no file."""
        return from_pixels(self._pair(i)[0], where)

    def sample_ids(self) -> list[str] | None:
        """Paths of all items where the dataset has them, as torchvision does, in ``samples`` or ``imgs``."""
        files = getattr(self.dataset, "samples", None) or getattr(self.dataset, "imgs", None) or ()
        paths = [entry[0] for entry in files if isinstance(entry, tuple | list) and isinstance(entry[0], str)]
        root = getattr(self.dataset, "root", None)
        return (
            relative(paths, root if isinstance(root, str | os.PathLike) else None) if len(paths) == len(self) else None
        )

    def labels(self, items: Sequence[int]) -> list[Any]:
        """Labels of some items: those in ``targets`` if three agree with ``[i]``, else all such items are read."""
        targets = getattr(self.dataset, "targets", None)
        if hasattr(targets, "tolist"):
            targets = targets.tolist()
        if isinstance(targets, Sequence) and len(targets) == len(self):
            some = (items[0], items[len(items) // 2], items[-1])
            if all(_plain(self._pair(i)[1]) == _plain(targets[i]) for i in some):
                return [_plain(targets[i]) for i in items]
        return [_plain(self._pair(i)[1]) for i in items]

    def classes(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, …, where the dataset has them; of ImageNet, the WordNet numbers, which differ."""
        names = getattr(self.dataset, "wnids", None) or getattr(self.dataset, "classes", None)
        names = tuple(names) if isinstance(names, Sequence) else ()
        return names if len({name for name in names if isinstance(name, str)}) == len(names) else ()

    def __len__(self) -> int:
        return len(self.dataset)

    def _pair(self, i: int) -> tuple[Any, Any]:
        where = f"data: {self.name}[{i}]"
        try:
            item = self.dataset[i]
        except Exception as error:  # of any kind, as the dataset may be anyone's
            raise DataError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
        if isinstance(item, Mapping) and "image" in item:
            return item["image"], item.get("label")
        if isinstance(item, tuple | list) and len(item) == 2:
            return item[0], item[1]
        raise DataError(
            f"{where} is of type {type(item).__name__}; accepted are (image, label), where the label may be None, and a "
            "dictionary with 'image' and 'label'"
        )


class Files(Items):
    """A dataset of torchvision's that has its files read by torchvision's loader."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self.files = dataset.samples if hasattr(dataset, "samples") else dataset.imgs

    def where(self, i: int, sample_id: str) -> str:
        return str(self.files[i][0])

    def content(self, i: int, where: str) -> bytes:
        return read_file(where)[0]

    def labels(self, items: Sequence[int]) -> list[Any]:
        return [self.files[i][1] for i in items]


class Table(Items):
    """A dataset of Hugging Face's: pictures are in a column of its table, or in files that this names.

    The image is the column ``image``, else the first of images; the label the column ``label``, else that of the most
    classes. ``root`` is what paths are relative to.
    """

    def __init__(self, dataset: Any, name: str = "Dataset", root: str | None = None) -> None:
        import datasets

        if dataset.format["type"] is not None:
            raise DataError(f"data: {name} has the format {dataset.format['type']!r}: pass it .with_format(None)")
        self.name, self.root = name, root
        images = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        labels = {key: len(f.names) for key, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)}
        if not images:
            raise DataError(f"data: {name} has no column of images; it has {', '.join(dataset.features)}")
        self.image = "image" if "image" in images else images[0]
        self.label = max(labels, key=labels.__getitem__) if labels and "label" not in dataset.features else "label"
        self.notes = [
            counted([other for other in others if other != key], f"columns like {key!r} were left out of {name!r}")
            for key, others in ((self.image, images), (self.label, labels))
            if key not in ("image", "label") and len(others) > 1
        ]
        self.dataset = dataset.cast_column(self.image, datasets.Image(decode=False))

    def where(self, i: int, sample_id: str) -> str:
        return f"{self.name}: {sample_id}"

    def content(self, i: int, where: str) -> bytes:
        image = self.dataset[i][self.image]
        if image is None or (not image["bytes"] and not image["path"]):
            raise DataError(f"{shown(where)}: there is no image")
        return bytes(image["bytes"]) if image["bytes"] else read_file(image["path"])[0]

    def sample_ids(self) -> list[str] | None:
        import pyarrow.compute as pc

        paths = pc.struct_field(self._column(self.image), "path").to_pylist()
        return relative(paths, self.root) if all(paths) and not any("://" in path for path in paths) else None

    def labels(self, items: Sequence[int]) -> list[Any]:
        if self.label not in self.dataset.features:
            return [None] * len(items)
        labels = self._column(self.label).to_pylist()
        return [labels[i] for i in items]

    def classes(self) -> tuple[str, ...]:
        return tuple(getattr(self.dataset.features.get(self.label), "names", ()))

    def _column(self, name: str) -> Any:
        """A column in the order of the rows, without decoding it."""
        values, order = self.dataset.data.column(name), self.dataset._indices
        return values if order is None else values.take(order.column(0))


class Arrays(Items):
    """Images in memory: uint8 of shape (n, h, w, 3) or (n, h, w), or a sequence of images of PIL."""

    in_memory = True

    def __init__(self, images: Any) -> None:
        self.dataset = images
        self.image_size = images.shape[1:3] if isinstance(images, np.ndarray) else None

    def where(self, i: int, sample_id: str) -> str:
        return sample_id

    def content(self, i: int, where: str) -> Picture:
        return from_pixels(self.dataset[i], where)


@dataclass(frozen=True, eq=False, kw_only=True)
class MapSource(Source):
    """Pictures of datasets; ``part`` and ``item`` (n_images,) say in which of ``parts`` a picture is, and where."""

    parts: tuple[Items, ...] = field(repr=False)
    part: NDArray[np.int64] = field(repr=False)
    item: NDArray[np.int64] = field(repr=False)

    changed = "it has changed since it was first read: pass a dataset without random transforms, or extract again"

    @property
    def in_memory(self) -> bool:
        return all(part.in_memory for part in self.parts)

    @property
    def image_size(self) -> tuple[int, int] | None:
        sizes = {part.image_size for part in self.parts}
        return sizes.pop() if len(sizes) == 1 else None

    def identity(self) -> tuple[str, NDArray[Any]]:
        """Digests of all pictures where they are in memory or small, else of 1000 at equal distances."""
        n = len(self)
        if self.in_memory or n <= _MOST_DIGESTED or n * self.stamp(0)[0] <= self.max_digested_bytes:
            return "contents_sha256", self.digests.of(self.numbers, self.digest)
        rows = np.linspace(0, n - 1, _MOST_DIGESTED).astype(np.int64)
        return "some_contents_sha256", self.digests.of(self.numbers[rows], lambda i: self.digest(int(rows[i])))

    def digest(self, row: int) -> NDArray[np.uint8]:
        """Zeros where a picture cannot be read, which is told when its features are computed."""
        try:
            return super().digest(row)
        except DataError:
            return np.zeros(DIGEST_BYTES, dtype=np.uint8)

    def where(self, row: int) -> str:
        part, item = self._place(row)
        return part.where(item, str(self.sample_ids[row]))

    def read(self, row: int) -> tuple[bytes | Picture, Stamp]:
        part, item = self._place(row)
        return part.content(item, self.where(row)), (0, 0)

    def stamp(self, row: int) -> Stamp:
        """The size alone, as nothing tells when a picture was changed."""
        content, _ = self.read(row)
        return (content.image.width * content.image.height * 3 if isinstance(content, Picture) else len(content)), 0

    def _place(self, row: int) -> tuple[Items, int]:
        number = self.numbers[row]
        return self.parts[self.part[number]], int(self.item[number])


def open_dataset(dataset: Any, origin: Mapping[str, Any] | None = None, prefix: str = "") -> MapSource:
    """Pictures of a map-style dataset, of `Items`, or of a `Subset` or `ConcatDataset` of such.

    Identifiers are paths where every picture has one of its own, else numbers after the ``prefix``.
    """
    if isinstance(dataset, Mapping):
        raise DataError(f"data: a dictionary of datasets, {', '.join(map(repr, dataset))}: pass one of them")
    parts, part, item = _flat(dataset)
    if not len(item):
        raise DataError(f"data: {type(dataset).__name__} holds no images")
    places = list(zip(part.tolist(), item.tolist(), strict=True))
    paths = [one.sample_ids() for one in parts]
    ids = [names[i] for p, i in places if (names := paths[p])]
    if len(set(ids)) < len(set(places)):
        ids = [f"{prefix}{i if len(parts) == 1 else row}" for row, (_, i) in enumerate(places)]
    y, classes = _encoded(parts, part, item)
    source = MapSource(
        origin=dict(origin or {"kind": "dataset"}),
        sample_ids=as_names(ids),
        y=y,
        classes=classes,
        notes=[note for one in parts for note in one.notes] + ([] if classes else [f"{len(y)} images without labels"]),
        parts=tuple(parts),
        part=part,
        item=item,
    )
    source.read(0)  # a dataset that gives tensors is refused before anything else is done
    return source


def open_arrays(images: Any, labels: Any) -> MapSource:
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
    y, classes = encode(labels, len(images))
    ids = [f"array/{i}" for i in range(len(images))]
    return from_memory(images, origin={"kind": "arrays"}, sample_ids=as_names(ids), y=y, classes=classes)


def from_memory(images: Any, **described: Any) -> MapSource:
    """All of ``images``, in order; ``described`` are attributes of `Source`."""
    n = len(images)
    return MapSource(parts=(Arrays(images),), part=np.zeros(n, np.int64), item=np.arange(n), **described)


def relative(paths: Sequence[str], root: str | os.PathLike[str] | None) -> list[str] | None:
    """Paths below a folder, by default the one that holds them all; None where two are equal or one is elsewhere."""
    if root is None and all(map(os.path.isabs, paths)):
        root = os.path.commonpath({os.path.dirname(path) for path in paths})
    below = os.path.join(os.path.abspath(root or ""), "")
    whole = map(os.path.abspath, paths)
    names = [found.removeprefix(below) if root else path for found, path in zip(whole, paths, strict=True)]
    names = [path if os.path.isabs(name) else name for name, path in zip(names, paths, strict=True)]
    return None if len(set(names)) < len(names) or any(map(os.path.isabs, names)) else names


def _flat(dataset: Any) -> tuple[list[Items], NDArray[np.int64], NDArray[np.int64]]:
    """The datasets that pictures are in, and for each picture which of these and its number there."""
    if type(dataset) is Subset:
        parts, part, item = _flat(dataset.dataset)
        rows = np.asarray(dataset.indices, dtype=np.int64)
        return parts, part[rows], item[rows]
    if type(dataset) is ConcatDataset:
        flat = [_flat(one) for one in dataset.datasets]
        starts = np.cumsum([0, *(len(parts) for parts, _, _ in flat)])
        shifted = [part + start for (_, part, _), start in zip(flat, starts, strict=False)]
        items = np.concatenate([item for _, _, item in flat])
        return [one for parts, _, _ in flat for one in parts], np.concatenate(shifted), items
    n = len(dataset)
    return [_items(dataset)], np.zeros(n, dtype=np.int64), np.arange(n)


def _items(dataset: Any) -> Items:
    if isinstance(dataset, Items):
        return dataset
    if type(dataset).__module__ == "datasets.arrow_dataset":
        return Table(dataset)
    if _is_plain_torchvision(dataset) and getattr(dataset, "loader", None) is default_loader:
        return Files(dataset)
    return Items(dataset)


def _is_plain_torchvision(dataset: Any) -> bool:
    """Whether it is of torchvision and gives its pictures and labels as they are."""
    transforms = [getattr(dataset, name, None) for name in ("transform", "target_transform", "transforms")]
    return type(dataset).__module__.startswith("torchvision.datasets.") and not any(transforms)


def _encoded(
    parts: Sequence[Items], part: NDArray[np.int64], item: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Classes]:
    """Codes and classes: those of the dataset where all parts have the same, else those that occur."""
    labels: list[Any] = [None] * len(part)
    for number, one in enumerate(parts):
        rows = np.flatnonzero(part == number).tolist()
        names = one.classes()
        for row, label in zip(rows, one.labels(item[rows].tolist()) if rows else (), strict=True):
            if isinstance(label, int) and names:
                if not UNLABELLED <= label < len(names):
                    raise DataError(f"data: {one.name}: label {label} of {len(names)} classes")
                label = None if label == UNLABELLED else names[label]
            labels[row] = label
    all_names = {one.classes() for one in parts}
    index = {name: i for i, name in enumerate(all_names.pop())} if len(all_names) == 1 else {}
    occurring = set(labels) - {None} if index else set()
    if not occurring or not occurring <= index.keys():
        return encode(labels, len(labels))
    return np.array([index.get(label, UNLABELLED) for label in labels], dtype=np.int64), tuple(index)


def _plain(label: Any) -> Any:
    """A label of numpy or torch as Python's own."""
    return label.item() if getattr(label, "ndim", None) == 0 else label
