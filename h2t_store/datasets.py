"""What to read: a source gives images by index, their labels, and identifiers that stay the same on every run."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from h2t_store.errors import DataError

__all__ = ["IMAGE_EXTENSIONS", "ArraySource", "FolderSource", "Source", "open_source"]

_EXTENSIONS = "jpg jpeg jpe jfif png bmp dib gif webp tif tiff ppm pgm pbm pnm jp2 avif tga ico"
IMAGE_EXTENSIONS = frozenset("." + extension for extension in _EXTENSIONS.split(" "))
UNLABELLED = -1
_MAX_CLASSES = 1_000_000
_MAX_DIGESTED_BYTES = 1 << 30


class Source(Protocol):
    """Images, labels and identifiers.

    Attributes
    ----------
    description : dict
        Goes into the provenance; equal descriptions mean equal data.
    y : ndarray of shape (n,), int64
        Index into ``classes``; -1 where unlabelled.
    classes : tuple of str
        Names of the labels.
    sample_ids : sequence of str
        One per image.
    image_size : (int, int) or None
        Height and width where all images share them and it is known.
    notes : list of str
        What was left out, for a person to read.
    """

    description: dict[str, Any]
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    sample_ids: Sequence[str]
    notes: list[str]

    @property
    def image_size(self) -> tuple[int, int] | None: ...

    def image(self, index: int) -> Image.Image:
        """The image as RGB; raises `DataError` where it cannot be read."""


@dataclass
class FolderSource:
    """Image files below a folder; the folders they lie in are the classes."""

    root: Path
    sample_ids: Sequence[str]
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    description: dict[str, Any]
    notes: list[str]

    @property
    def image_size(self) -> None:
        return None

    def image(self, index: int) -> Image.Image:
        path = self.root / self.sample_ids[index]
        try:
            with Image.open(path) as image:
                return _as_rgb(image)
        except UnidentifiedImageError:
            raise DataError(f"{path}: not an image") from None
        except Exception as error:  # decoders raise almost anything on damaged files
            raise DataError(f"{path}: {str(error) or type(error).__name__}") from error


@dataclass
class ArraySource:
    """Images in memory."""

    images: NDArray[np.uint8]
    sample_ids: Sequence[str]
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    description: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])


def open_source(data: str | os.PathLike[str] | tuple[Any, Any], split: str | None = None) -> Source:
    """Find out what ``data`` is.

    Parameters
    ----------
    data : path-like, ``"digits"`` or (images, labels)
        A folder with one folder of images per class (a folder of images alone is unlabelled); scikit-learn's digits; or
        uint8 images ``(n, h, w, 3)`` with ``n`` labels, integers from 0 (-1 where unlabelled) or strings, or None.
    split : {"train", "test"}, optional
        Part of ``digits``: the first 1000 images of a fixed shuffle, or the other 797; ``train`` by default.

    Raises
    ------
    DataError
        Where nothing can be read from it.
    """
    if not isinstance(data, str | os.PathLike | tuple):
        raise DataError(f"data: {type(data).__name__}; accepted are a folder, 'digits' and a tuple (images, labels)")
    if data == "":
        raise DataError("data: an empty name; accepted are a folder, 'digits' and a tuple (images, labels)")
    if data == "digits":
        return _digits(split or "train")
    if split is not None:
        raise DataError(f"split {split!r}: only 'digits' has splits; name the folder of the split instead")
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(f"data: a tuple of {len(data)}; accepted is (images, labels)")
        return _from_arrays(*data)
    return _from_folder(Path(data))


def _from_folder(root: Path) -> FolderSource:
    if not root.exists():
        raise DataError(f"data {str(root)!r} does not exist; accepted are an image folder and 'digits'")
    if not root.is_dir():
        raise DataError(f"data {str(root)!r} is not a folder; accepted are an image folder and 'digits'")
    found: list[tuple[str, str]] = []
    other: list[str] = []
    empty: list[str] = []
    hidden: list[str] = []
    for label, files in _walk(root, hidden):
        images = [
            file
            for file in files
            if Path(file).suffix.lower() in IMAGE_EXTENSIONS and not _is_special(root / label / file)
        ]
        other += [(Path(label) / file).as_posix() for file in files if file not in set(images)]
        if not files:
            empty.append(label)
        found += [((Path(label) / file).as_posix(), label) for file in images]
    if not found:
        held = f"; it holds {len(other)} other files, such as {sorted(other)[0]!r}" if other else ""
        raise DataError(f"data {str(root)!r} holds no images{held}")
    found.sort()
    labels = {label for _, label in found}
    if "." in labels and len(labels) > 1:
        loose = [path for path, label in found if label == "."]
        raise DataError(
            f"data {str(root)!r} holds class folders and {len(loose)} images beside them, such as {loose[0]!r}: "
            "move them into a class folder"
        )
    classes = () if labels == {"."} else tuple(sorted(labels))
    index = {label: i for i, label in enumerate(classes)}
    notes = []
    if other:
        notes.append(f"{len(other)} files are not images and were left out: {_some(sorted(other))}")
    if empty:
        notes.append(f"{len(empty)} folders hold no images: {_some(sorted(empty))}")
    if hidden:
        notes.append(f"{len(hidden)} hidden files and folders were left out: {_some(sorted(hidden))}")
    if not classes:
        notes.append(f"{len(found)} images without class folders: unlabelled")
    paths = [path for path, _ in found]
    return FolderSource(
        root=root,
        sample_ids=paths,
        y=np.array([index.get(label, UNLABELLED) for _, label in found], dtype=np.int64),
        classes=classes,
        description={"kind": "folder", "n": len(found)} | _fingerprint(root, paths),
        notes=notes,
    )


def _walk(root: Path, hidden: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to ``root``, its files) for every folder with files or without anything; links are followed."""
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_cannot_list):
        label = Path(folder).relative_to(root).as_posix()
        if label != "." and Path(folder).resolve() in (above := Path(folder).parent.resolve(), *above.parents):
            folders.clear()  # a link to a folder above
            continue
        hidden += [(Path(label) / name).as_posix() for name in [*folders, *files] if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [name for name in files if not name.startswith(".")]
        for name in (label, *visible):
            if not _is_utf8(name):
                raise DataError(f"data: the name {name!r} in {str(root)!r} is not UTF-8: rename it")
        if visible or not folders:
            yield label, visible


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, socket or device, which reading would wait for."""
    return path.exists() and not path.is_file()


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cannot_list(error: OSError) -> None:
    raise DataError(f"data: {error.filename}: {error.strerror}") from error


def _fingerprint(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """Digest of all contents up to 1 GiB in total; beyond that, where reading twice costs, of paths and sizes."""
    try:
        sizes = [(root / path).stat().st_size for path in paths]
        sha = hashlib.sha256("".join(f"{path}\0{size}\n" for path, size in zip(paths, sizes, strict=True)).encode())
        if sum(sizes) > _MAX_DIGESTED_BYTES:
            return {"paths_and_sizes_sha256": sha.hexdigest()}
        for path in paths:
            sha.update((root / path).read_bytes())
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    return {"contents_sha256": sha.hexdigest()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _from_arrays(images: Any, labels: Any) -> ArraySource:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise DataError(
            f"data: images of shape {images.shape} and dtype {images.dtype}; accepted is uint8 (n, h, w, 3), not empty"
        )
    y, classes = _encode(labels, len(images))
    sha = hashlib.sha256(f"{images.shape} {classes}".encode())
    sha.update(np.ascontiguousarray(images).data)
    sha.update(y.tobytes())
    return ArraySource(
        images=images,
        sample_ids=[f"array/{i}" for i in range(len(images))],
        y=y,
        classes=classes,
        description={"kind": "arrays", "n": len(images), "values_sha256": sha.hexdigest()},
    )


def _encode(labels: Any, n: int) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Integer labels stay as they are; others become indices into their sorted values."""
    if labels is None:
        return np.full(n, UNLABELLED, dtype=np.int64), ()
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise DataError(f"data: labels of shape {labels.shape} for {n} images; accepted is ({n},)")
    if labels.dtype.kind in "iub":
        y = labels.astype(np.int64)
        if y.min() < UNLABELLED or y.max() >= _MAX_CLASSES:
            raise DataError(
                f"data: labels from {y.min()} to {y.max()}; accepted are -1 to {_MAX_CLASSES - 1}, or strings"
            )
        return y, tuple(str(i) for i in range(int(y.max()) + 1))
    if labels.dtype.kind not in "UTO" or not all(isinstance(label, str) for label in labels):
        raise DataError(f"data: labels of dtype {labels.dtype}; accepted are integers and strings")
    classes, y = np.unique(labels.astype(str), return_inverse=True)
    return y.astype(np.int64), tuple(map(str, classes))


def _digits(split: str) -> ArraySource:
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: digits has 'train' and 'test'")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    chosen = order[:1000] if split == "train" else order[1000:]
    grey = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return ArraySource(
        images=np.repeat(grey[..., None], 3, axis=3),
        sample_ids=[f"{split}/{i}" for i in chosen],
        y=labels[chosen].astype(np.int64),
        classes=tuple("0123456789"),
        description={"kind": "digits", "split": split, "n": len(chosen)},
    )


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits per channel; 16-bit greyscale is scaled, transparency dropped, orientation tags ignored as in timm."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers from {values.min()} to {values.max()}; accepted are 8 and 16 bits per channel")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels; accepted are 8 and 16 bits per channel")
    if image.mode in ("P", "LA", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB")
