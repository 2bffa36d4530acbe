"""Images in memory: arrays from Python, and scikit-learn's digits."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from h2t_store.errors import DataError, one_line
from h2t_store.images.fingerprint import Digests
from h2t_store.images.labels import encode
from h2t_store.images.names import Classes, Names, as_names, count
from h2t_store.images.pictures import Picture, rendered
from h2t_store.images.source import Source

__all__ = ["ArraySource", "in_memory", "open_arrays", "open_digits"]

_DIGITS_IN_TRAIN = 1000


@dataclass(frozen=True, eq=False, kw_only=True)
class ArraySource(Source):
    """Images in memory, uint8 of shape (n, h, w, 3), or (n, h, w) where they are grey."""

    images: NDArray[np.uint8] = field(repr=False)

    in_memory: ClassVar[bool] = True

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    def decoded(self, content: bytes, row: int) -> Picture:
        pixels = np.frombuffer(content, dtype=np.uint8).reshape(self.images.shape[1:])
        return Picture(Image.fromarray(pixels).convert("RGB"), [])

    def where(self, row: int) -> str:
        return str(self.sample_ids[row])

    def content(self, row: int) -> bytes:
        return bytes(self.images[self.numbers[row]].tobytes())

    def stamps(self) -> NDArray[np.int64]:
        return np.full((len(self), 2), (self.images[:1].nbytes, 0), dtype=np.int64)


def in_memory(
    images: NDArray[np.uint8],
    *,
    origin: dict[str, Any],
    sample_ids: Names,
    y: NDArray[np.int64],
    classes: Classes,
) -> ArraySource:
    """All of ``images`` in order. The shape is a part of the origin: equal bytes may be other images."""
    return ArraySource(
        origin={**origin, "shape": list(images.shape[1:])},
        sample_ids=sample_ids,
        y=y,
        classes=classes,
        numbers=np.arange(len(y)),
        digests=Digests(len(y)),
        images=images,
    )


def open_arrays(images: Any, labels: Any) -> ArraySource:
    """uint8 images (n, h, w, 3) with n labels or None, or images of PIL that have one size as RGB."""
    notes: list[str] = []
    if isinstance(images, Sequence) and any(isinstance(image, Image.Image) for image in images):
        images, notes = _from_pil(images)
    try:
        images = np.asarray(images)
    except ValueError:
        raise DataError("data: images of several shapes; accepted is uint8 (n, h, w, 3)") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise DataError(
            f"data: images of shape {images.shape} and dtype {images.dtype}; accepted is uint8 (n, h, w, 3), not empty"
        )
    y, classes = encode(labels, len(images))
    ids = as_names([f"array/{i}" for i in range(len(images))])
    return replace(in_memory(images, origin={"kind": "arrays"}, sample_ids=ids, y=y, classes=classes), notes=notes)


def _from_pil(images: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Their pixels as they would be read from files, and notes on what that loses."""
    pixels, by_remark = [], defaultdict(list)
    for i, image in enumerate(images):
        if isinstance(image, Image.Image):
            try:
                picture = rendered(image, None if image.mode.startswith("I") else 8)
            except Exception as error:  # files that are opened, but not read yet, may be damaged
                raise DataError(f"data: image {i}: {one_line(error)}") from error
            for remark in picture.remarks:
                by_remark[remark].append(f"array/{i}")
            image = np.asarray(picture.image)
        pixels.append(image)
    return pixels, [line for remark, ids in by_remark.items() for line in count(ids, f"images {remark}")]


def open_digits(split: str) -> ArraySource:
    """The first 1000 of a fixed shuffle of scikit-learn's digits, or the other 797."""
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: digits has 'train' and 'test'")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    chosen = order[:_DIGITS_IN_TRAIN] if split == "train" else order[_DIGITS_IN_TRAIN:]
    grey = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return in_memory(
        grey,
        origin={"kind": "digits", "split": split},
        sample_ids=as_names([f"{split}/{i}" for i in chosen]),
        y=labels[chosen].astype(np.int64),
        classes=tuple(range(10)),
    )
