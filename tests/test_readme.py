import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from h2t_store import extract

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the store that the README's first use fills, of half as many images."""
    folder, digits = tmp_path_factory.mktemp("readme"), load_digits()
    images = np.repeat((digits.images * 15.9).astype(np.uint8)[..., None], 3, axis=3)
    for split, rows in (("train", slice(0, 500)), ("test", slice(500, 800))):
        data = images[rows], digits.target[rows]
        extract(data, model="h2t_resnet20", store=folder / "features.zarr", name=f"digits/{split}")
    return folder


def test_the_commands_are_those_that_fill_this_store():
    text = README.read_text()
    for split in ("", "--split test "):
        name = "digits/test" if split else "digits/train"
        assert f"extract digits {split}--model h2t_resnet20 --store features.zarr --name {name}\n" in text


def test_the_code_runs_as_pasted_and_classifies(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    exec("\n".join(blocks), {})
    accuracies = [float(found) for found in re.findall(r"accuracy (\d\.\d+)", capsys.readouterr().out)]
    assert len(accuracies) == 6
    assert min(accuracies) > 0.93
