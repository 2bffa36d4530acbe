import re
from pathlib import Path

import pytest

from h2t_store import extract

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the store that the README's first use fills."""
    folder = tmp_path_factory.mktemp("readme")
    for split in ("train", "test"):
        extract("digits", split=split, model="h2t_resnet20", store=folder / "features.zarr", name=f"digits/{split}")
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
    assert min(accuracies) > 0.95
