"""What several test files need: images, labels, and a store with something in it."""

import io
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from estimators import paths
from h2t_store.errors import DataError

MODELS = Path(__file__).with_name("tiny_models.py")


def raises_with(message: str):
    """Expect a `DataError` that says this."""
    return pytest.raises(DataError, match=re.escape(message))


def as_png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """40 random images of 8 x 8 pixels."""
    return np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def labels() -> NDArray[np.int64]:
    return np.arange(40) % 4


@pytest.fixture
def folder(tmp_path: Path, images: NDArray[np.uint8]) -> Path:
    """The images as PNG files in the class folders ``a`` to ``d``."""
    root = tmp_path / "pictures"
    for i, image in enumerate(images):
        path = root / "abcd"[i % 4] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


@pytest.fixture
def offline(monkeypatch) -> None:
    """No server can be reached, and no proxy is named."""

    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def solved_ratios(monkeypatch):
    """The fractions of alpha_max that are solved for, one list per call of the solver."""
    calls, solver = [], paths.group_lasso_path

    def counted(X, y, *, alpha_ratios, **others):
        calls.append(np.asarray(alpha_ratios).tolist())
        return solver(X, y, alpha_ratios=alpha_ratios, **others)

    monkeypatch.setattr(paths, "group_lasso_path", counted)
    return calls


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state_of(folder: Path) -> dict[str, tuple[object, ...]]:
    """What a writer would change: everything below a folder with its inode, times, mode and content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else sorted(child.name for child in path.iterdir())
        found[str(path)] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_mode, content)
    return found
