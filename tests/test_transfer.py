"""The benchmark of transfer: a folder as VTAB-1k comes, a file per cell, a page of results that agrees with them."""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def vtab(tmp_path):
    """Two tasks of four classes, told apart by brightness or by colour, laid out as VTAB-1k is."""
    random = np.random.default_rng(0)
    for task in ("eurosat", "my own"):
        for split, n in (("train800val200", 60), ("test", 40)):
            lines = []
            for i in range(n):
                label = i % 4
                image = random.integers(0, 120, (8, 8, 3))
                image[..., slice(None) if task == "eurosat" else slice(0, 1)] += 40 * label
                path = tmp_path / "vtab" / task / f"images/{split}/{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
                lines.append(f"images/{split}/{i}.png {label}")
            (tmp_path / "vtab" / task / f"{split}.txt").write_text("\n".join(lines))
    return tmp_path / "vtab"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark in this process, with short trainings: what it prints, or the line that it ends with."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import methods

    monkeypatch.setitem(methods.PUBLISHED, "n_steps", 5)
    monkeypatch.setitem(methods.FINETUNING, "epochs", 2)

    def run(script: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        try:
            import_module(script).main()
        except SystemExit as stop:
            return str(stop)
        return capsys.readouterr().out

    return run


def read(folder: Path) -> dict[str, dict]:
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}


def test_cells_are_computed_once_and_the_tables_say_what_they_do(run, vtab, tmp_path):
    out = tmp_path / "out"
    args = ("--vtab-root", vtab, "--model", f"{MODELS}:small_input", "--work", tmp_path / "work", "--out", out)
    args += ("--target-size", 16, "--target-size", 64)
    methods = ("--methods", "linear probe", "published Head2Toe", "fine-tuning")
    printed = run("transfer", *args, *methods, "--seeds", 0, 1)
    assert printed.count("seed") == 12
    cells = read(out / "cells")
    assert len(cells) == 12
    for cell in cells.values():
        assert 0 <= cell["accuracy"] <= 1
        assert min(cell["seconds"], cell["flops"], cell["n_weights"]) > 0
        assert cell["task_facts"]["images"] == [60, 40]
    chosen = [cell["params"]["target_size"] for cell in cells.values() if cell["method"] == "published Head2Toe"]
    assert set(chosen) <= {16, 64}
    page = (out / "RESULTS.md").read_text()
    assert page.index("eurosat") < page.index("my own")
    for task in ("eurosat", "my own"):
        values = [cells[f"{task}/linear_probe-{seed}.json"]["accuracy"] for seed in (0, 1)]
        error = np.std(values, ddof=1) / np.sqrt(2)
        assert f"{np.mean(values):.3f} ± {error:.3f} ({np.median(values):.3f})" in page

    assert "seed" not in run("transfer", *args, *methods, "--seeds", 0, 1)
    (out / "cells/eurosat/linear_probe-1.json").unlink()
    again = run("transfer", *args, *methods, "--seeds", 0, 1)
    assert [line.split()[0] for line in again.splitlines() if "seed" in line] == ["eurosat"]
    same = ("accuracy", "params", "n_weights", "flops", "settings")
    one, other = (read(out / "cells")["eurosat/linear_probe-1.json"], cells["eurosat/linear_probe-1.json"])
    assert [one[key] for key in same] == [other[key] for key in same]


def test_methods_that_choose_are_given_all_target_sizes(run, vtab, tmp_path):
    out = tmp_path / "out"
    args = ("--vtab-root", vtab, "--tasks", "eurosat", "--model", f"{MODELS}:small_input", "--out", out, "--seeds", 0)
    choose = ("all features, L2", "published Head2Toe", "Head2ToeClassifierCV")
    methods = ("--methods", "linear probe", *choose, *(f"{name}, one size" for name in choose))
    two, other = ((*args, "--target-size", 64, "--target-size", size) for size in (4, 9))
    run("transfer", *two, "--work", tmp_path / "two", *methods)
    cells = {cell["method"]: cell for cell in read(out / "cells").values()}
    widths = cells["linear probe"]["task_facts"]["features"]
    assert 0 < widths["4"] < widths["64"]
    for name in choose:
        assert cells[name]["target_sizes"] == [64, 4]
        assert cells[f"{name}, one size"]["target_sizes"] == [64]
        assert cells[f"{name}, one size"]["n_features"] == widths["64"]
        params = cells[name]["params"]
        assert params.get("target_size", 4) in (4, 64)
    assert widths["64"] < cells["Head2ToeClassifierCV"]["n_features"] < widths["64"] + widths["4"]
    page = (out / "RESULTS.md").read_text()
    assert "- Target size 64: linear probe" in page
    assert f"- Target size 64 and 4: {'; '.join(choose)}" in page

    # Another second size changes nothing for those that are given the first.
    again = run("transfer", *other, "--work", tmp_path / "other", *methods)
    computed = [line[22:46].strip() for line in again.splitlines() if "seed 0" in line]
    assert computed == list(choose)


def test_ablations_draw_their_pictures(run, vtab, tmp_path):
    out = tmp_path / "out"
    args = ("--vtab-root", vtab, "--tasks", "eurosat", "--model", f"{MODELS}:small_input", "--out", out)
    args += ("--work", tmp_path / "work")
    run("transfer", *args, "--methods", "linear probe", "--seeds", 0)
    run("ablations", *args, "--only", "fraction", "offset", "layers", "--seeds", 0)
    cells = read(out / "cells")
    offset = cells["eurosat/ablation_offset-0.json"]
    assert len(offset["accuracy"]) == len(offset["offsets"])
    assert sum(cells["eurosat/ablation_layers-0.json"]["selected"]) > 0
    assert {*cells["eurosat/ablation_fraction-0.json"]["accuracy"]} == {"group lasso", "L1", "L2", "random", "variance"}
    page = (out / "RESULTS.md").read_text()
    for name in ("fraction", "offset", "layers"):
        assert f"(results_{name}.png)" in page
        assert Image.open(out / f"results_{name}.png").size[0] > 100


def test_the_demo_tells_how_far_its_features_are(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert import_module("demo").features("test", tmp_path / "s").shape[0] == 797
    assert "digits/test: 797/797 images, " in capsys.readouterr().out


def test_what_is_not_there_is_one_line(run, tmp_path):
    assert "no folder with train800val200.txt and test.txt" in run("transfer", "--vtab-root", tmp_path)
    text = run("transfer", "--suite", tmp_path, "--tasks", "pets", "--work", tmp_path / "w")
    assert "--tasks: pets not found; there are digits" in text
