import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import typer
from conftest import MODELS
from PIL import Image

from h2t_store import cli, open_features

MODEL = f"{MODELS}:small_input"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: (exit status, stdout, stderr)."""
    root = logging.getLogger()
    handlers = root.handlers[:]

    def run(command: str, *args: object) -> tuple[int, str, str]:
        root.handlers = []
        monkeypatch.setattr(sys, "argv", [command, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            {"extract": cli.extract_main, "h2t": cli.h2t_main}[command]()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    terminate = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, terminate)
    root.handlers = handlers


def test_extract_fills_the_store_and_a_second_call_says_that_nothing_is_left(run, folder, tmp_path):
    args = ("extract", folder, "--model", MODEL, "--store", tmp_path / "s", "--name", "a/b", "-b", 16, "-j", 0)
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    width = open_features(tmp_path / "s", "a/b").shape[1]
    assert f"a/b: 40 images of 4 classes x {width} features from 7 layers (40 computed in " in out
    code, out, err = run(*args)
    assert code == 0
    assert err.endswith("a/b is complete: nothing to compute\n")
    assert "(nothing to compute)" in out


def test_flags_reach_the_job(run, folder, tmp_path):
    code, *_ = run(
        *("extract", folder, "--model", MODEL, "--store", tmp_path / "s", "--name", "x", "--taps", "layers.?,head"),
        *("--target-size", 4, "--dtype", "float32", "--img-size", 10, "--device", "cpu", "--amp"),
    )
    assert code == 0
    matrix = open_features(tmp_path / "s", "x")
    assert [layer.name for layer in matrix.layers] == ["layers.0", "layers.1", "head"]
    assert [layer.shape for layer in matrix.layers] == [(4, 10, 10), (4, 10, 10), (5,)]
    inputs = matrix.provenance["inputs"]
    assert (inputs["target_size"], inputs["dtype"], inputs["amp"]) == ([4], "float32", "bfloat16")
    assert matrix.shape == (40, 13)


def test_ls_info_and_rm(run, folder, tmp_path):
    store = tmp_path / "s"
    run("extract", folder, "--model", MODEL, "--store", store, "--name", "x/y")
    code, out, err = run("h2t", "ls", store)
    assert (code, err) == (0, "")
    assert "x/y" in out
    assert "complete" in out
    code, out, _ = run("h2t", "info", store, "x/y")
    assert code == 0
    for part in ("a, b, c, d", "small_input", "target_size", "layers.0.conv1:in", "4 x 8 x 8", "weights_sha256"):
        assert part in out
    assert run("h2t", "rm", store, "x/y", "--yes")[0] == 0
    assert "x/y" not in run("h2t", "ls", store)[1]


def test_ls_shows_odd_names_and_damage_and_goes_on(run, folder, tmp_path):
    store = tmp_path / "s"
    for name in ("x[b]y", "[red]", ":cat:", "z"):
        run("extract", folder, "--model", MODEL, "--store", store, "--name", name)
    path = store / "z" / "zarr.json"
    path.write_text(path.read_text().replace("small_input", "other"))
    code, out, _ = run("h2t", "ls", store)
    assert code == 0
    for name in ("x[b]y", "[red]", ":cat:"):
        assert re.search(rf"^{re.escape(name)} .*complete", out, re.MULTILINE)
    assert re.search(r"^z .*damaged: .*changed or damaged", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["extract"], "Missing"),
        (["extract", "FOLDER", "--model", MODEL, "--store", "S"], "--name"),
        (["extract", "FOLDER", "--model", MODEL, "--store", "S", "--name", "x", "--fast"], "--fast"),
        (
            ["extract", "FOLDER", "--model", MODEL, "--store", "S", "--name", "x", "-b", "many"],
            "batch_size 'many': accepted are whole numbers from 1 to",
        ),
        (["extract", "no where", "--model", MODEL, "--store", "S", "--name", "x"], "data 'no where' does not exist"),
        (["extract", "EMPTY", "--model", MODEL, "--store", "S", "--name", "x"], "holds no images"),
        (["extract", "BAD", "--model", MODEL, "--store", "S", "--name", "x"], "fake.jpg: not an image"),
        (["extract", "FOLDER", "--model", "nonet", "--store", "S", "--name", "x"], "model 'nonet' is unknown"),
        (
            ["extract", "FOLDER", "--model", MODEL, "--store", "S", "--name", "x", "--taps", "zz*"],
            "taps: 'zz*' matches",
        ),
        (["extract", "FOLDER", "--model", MODEL, "--store", "FOLDER", "--name", "x"], "not a feature store"),
        (["extract", "FOLDER", "--model", MODEL, "--store", "FOLDER/a/00.png/s", "--name", "x"], "00.png"),
        (["h2t", "ls", "S"], "does not exist"),
        (["h2t", "info", "S"], "NAME"),
        (["h2t", "frobnicate"], "frobnicate"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_on_stderr(run, folder, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "fake.jpg").write_text("plain text")
    places = {"FOLDER": folder, "EMPTY": tmp_path / "empty", "BAD": tmp_path / "bad", "S": tmp_path / "s"}
    args = [str(places[a]) if a in places else a.replace("FOLDER", str(folder)) for a in args]
    code, out, err = run(*args)
    assert code != 0
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_left_out_files_are_reported(run, folder, tmp_path):
    (folder / "a" / "labels.csv").write_text("x")
    code, _, err = run("extract", folder, "--model", MODEL, "--store", tmp_path / "s", "--name", "x")
    assert code == 0
    assert err == "1 files are not images and were left out: a/labels.csv\n"


def test_names_with_spaces_and_unicode(run, tmp_path, images):
    root = tmp_path / "ein Ordner"
    for label in ("größe 1", "名前"):
        (root / label).mkdir(parents=True)
        Image.fromarray(images[0]).save(root / label / "ein bild.png")
    code, *_ = run("extract", root, "--model", MODEL, "--store", tmp_path / "mein s", "--name", "träning/ä b")
    assert code == 0
    matrix = open_features(tmp_path / "mein s", "träning/ä b")
    assert matrix.classes == ("größe 1", "名前")
    assert matrix.sample_ids.tolist() == ["größe 1/ein bild.png", "名前/ein bild.png"]
    assert np.isfinite(np.asarray(matrix)).all()


def test_a_signal_says_how_to_continue_and_the_same_command_does(run, tmp_path, images, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(MODELS.parent)!r})\n"
        "import tiny_models\n"
        "class Slow(tiny_models.Functional):\n"
        "    passes = 0\n"
        "    def forward(self, x):\n"
        "        if len(x) > 2:\n"
        "            Slow.passes += 1\n"
        "            if Slow.passes == 3 and not os.environ.get('GO_ON'): os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().forward(x)\n"
        "def build():\n"
        "    model = Slow()\n"
        "    model.pretrained_cfg = {'input_size': (3, 8, 8), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}\n"
        "    return model\n"
    )
    (tmp_path / "p" / "a").mkdir(parents=True)
    for i in range(60):
        Image.fromarray(images[i % 40]).save(tmp_path / "p" / "a" / f"{i:03d}.bmp")
    command = [tmp_path / "p", "--model", f"{slow}:build", "--img-size", 8, "--rows-per-block", 32]
    command += ["--store", tmp_path / "s", "--name", "x", "-b", 8, "-j", 0]
    stopped = subprocess.run(
        [sys.executable, "-m", "h2t_store", *map(str, command)], capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 128 + signal.SIGTERM
    assert stopped.stderr.splitlines() == [
        "stopping after the current row block; a second signal stops at once",
        "error: stopped: finished row blocks are stored, the same command continues",
    ]
    assert "1 of 2 row blocks" in run("h2t", "ls", tmp_path / "s")[1]
    monkeypatch.setenv("GO_ON", "1")
    assert "60 images of 1 classes" in run("extract", *command)[1]
    assert open_features(tmp_path / "s", "x").shape[0] == 60


def test_help_names_every_flag_with_timms_words(run):
    out = run("extract", "--help")[1]
    for flag in (
        "--model",
        "--pretrained",
        "--no-pretrained",
        "--checkpoint",
        "--img-size",
        "--batch-size",
        "--workers",
    ):
        assert flag in out
    for flag in ("--device", "--amp", "--taps", "--target-size", "--dtype", "--store", "--name", "--split"):
        assert flag in out


def test_json_is_for_machines(run, folder, tmp_path):
    store = tmp_path / "s"
    (folder / "a" / "99.png").write_text("no image")
    args = ("extract", folder, "--model", MODEL, "--store", store, "--name", "x/y", "--on-error", "skip", "--json")
    code, out, _ = run(*args)
    assert code == 0
    done = json.loads(out)
    assert (done["images"], done["computed"], done["classes"]) == (40, 41, 4)
    assert [sample for sample, _ in done["failures"]] == ["a/99.png"]
    (listed,) = json.loads(run("h2t", "ls", store, "--json")[1])
    assert (listed["name"], listed["images"], listed["state"]) == ("x/y", 41, "complete, 1 skipped")
    known = json.loads(run("h2t", "info", store, "x/y", "--json")[1])
    assert known["inputs"]["model"] == "tiny_models.py:small_input"
    assert known["layer_list"][0]["activation"] == [4, 8, 8]
    assert known["class_names"] == ["a", "b", "c", "d"]
    assert known["stored"] == listed["stored"]
    assert known["failures"] == done["failures"]


def test_a_dry_run_stores_nothing_and_says_what_would_come(run, folder, tmp_path):
    args = ("extract", folder, "--model", MODEL, "--store", tmp_path / "s", "--name", "x", "--dry-run")
    args += ("--target-size", 4, "--target-size", 64, "-b", 8)
    code, out, _ = run(*args)
    assert code == 0
    for part in ("layers.0.conv1:in@4", "4 x 8 x 8", "images", "batch size", "images/s"):
        assert part in out
    plan = json.loads(run(*args, "--json")[1])
    assert not (tmp_path / "s").exists()
    assert plan["features"] == sum(layer["width"] for layer in plan["layers"])
    assert plan["bytes"] == sum(layer["bytes"] for layer in plan["layers"])
    assert (plan["images"], plan["batch_size"]) == (40, 8)
    assert plan["seconds"] > 0


def test_removal_asks_first(run, folder, tmp_path, monkeypatch):
    store = tmp_path / "s"
    run("extract", folder, "--model", MODEL, "--store", store, "--name", "x")
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        code, _, err = run("h2t", "rm", store, "x")
        assert code == 1
        assert "Remove x (images 40" in err
        assert "x" in run("h2t", "ls", store)[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, out, _ = run("h2t", "rm", store, "x")
    assert (code, out.strip()) == (0, f"{store}: x removed")
    assert json.loads(run("h2t", "ls", store, "--json")[1]) == []


def test_export_writes_the_layers_asked_for(run, folder, tmp_path):
    run("extract", folder, "--model", MODEL, "--store", tmp_path / "s", "--name", "x")
    code, out, _ = run("h2t", "export", tmp_path / "s", "x", tmp_path / "o.npy", "--layers", "head,layers.0")
    assert code == 0
    assert "40 rows x " in out
    expected = open_features(tmp_path / "s", "x").select_layers(["head", "layers.0"])
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), np.asarray(expected))
    assert run("h2t", "export", tmp_path / "s", "x", tmp_path / "o.npy")[0] == 1


def test_a_list_in_the_layout_of_vtab(run, tmp_path, images):
    root = tmp_path / "caltech101"
    for split, numbers in (("train800val200", range(30)), ("test", range(30, 40))):
        lines = []
        for i in numbers:
            path = root / "images" / split / f"{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)
            lines.append(f"images/{split}/{i:04}.jpg {i % 10}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    for split, n in (("train800val200", 30), ("test", 10)):
        args = ("extract", root / f"{split}.txt", "--model", MODEL, "--store", tmp_path / "s", "--name", f"c/{split}")
        code, _, err = run(*args)
        assert (code, err) == (0, "")
        matrix = open_features(tmp_path / "s", f"c/{split}")
        assert matrix.shape[0] == n
        assert matrix.y.tolist() == [int(name[-8:-4]) % 10 for name in matrix.sample_ids]


@pytest.mark.parametrize("command", ["extract", "h2t"])
def test_the_shell_completes(command, tmp_path):
    program = f"from h2t_store.cli import {command}_main; import sys; sys.argv[0] = {command!r}; {command}_main()"
    words = f"{command} --" if command == "extract" else "h2t ver"
    variables = {f"_{command.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | variables
    )
    assert ("--model" if command == "extract" else "verify") in done.stdout


def test_every_command_explains_itself_with_an_example(run):
    commands = ("ls", "info", "verify", "repair", "rm", "export")
    top = run("h2t", "--help")[1]
    for command in commands:
        assert command in top
        assert f"Example: h2t {command}" in " ".join(run("h2t", command, "--help")[1].split())
    assert "Exit status: 0 done; 1 error" in " ".join(top.replace("│", " ").split())
    panels = run("extract", "--help")[1]
    for topic in ("Data", "Network", "Features", "Speed", "Result"):
        assert f"─ {topic} ─" in panels


def test_an_extraction_is_repaired_from_where_its_images_are_now(run, folder, tmp_path):
    store = tmp_path / "s"
    run("extract", folder, "--model", MODEL, "--store", store, "--name", "x", "-j", 0)
    next((store / "x/features").rglob("c/0/0")).unlink()
    folder.rename(tmp_path / "moved")
    assert run("h2t", "repair", store, "x", "-j", 0)[0] == 1
    code, out, _ = run("h2t", "repair", store, "x", "-j", 0, "--data", tmp_path / "moved")
    assert code == 0
    assert "1 things repaired, 1 row blocks computed again" in out
    assert run("h2t", "verify", store)[0] == 0


def test_a_plan_says_what_the_images_go_through_and_checks_what_a_run_would(run, folder, tmp_path):
    args = ("extract", folder, "--model", MODEL, "--store", tmp_path / "s", "--dry-run", "-j", 0)
    code, out, _ = run(*args, "--name", "x")
    assert code == 0
    assert "mean 0.0, 0.0, 0.0, std 1.0, 1.0, 1.0" in out
    code, _, err = run(*args, "--name", "../x")
    assert code == 1
    assert "name '../x': accepted are" in err


@pytest.mark.parametrize("command", ["extract", "h2t"])
def test_versions(run, command):
    assert run(command, "--version") == (0, f"head2toe {version('head2toe')}\n", "")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    assert (
        subprocess.run(
            ["bash", "-c", f"set -o pipefail; {sys.executable} -m h2t_store --help | true"],
            capture_output=True,
            check=False,
        ).stderr
        == b""
    )


def helps(command):
    """What is written to be read in the help of a command and its parts, by the arguments that print it."""
    own = [getattr(part, name, None) for part in (command, *command.params) for name in ("help", "epilog")]
    yield [], [text for text in own if isinstance(text, str)]
    for name, below in getattr(command, "commands", {}).items():
        yield from (([name, *args], texts) for args, texts in helps(below))


@pytest.mark.parametrize("command", ["extract", "h2t"])
def test_help_is_printed_as_it_is_written_brackets_too(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "600")
    written = list(helps(typer.main.get_command({"extract": cli.extract.app, "h2t": cli.store.app}[command])))
    assert command == "h2t" or any("'head2toe[s3]'" in text for text in written[0][1])
    for args, texts in written:
        code, out, _ = run(command, *args, "--help")
        assert code == 0
        out = "".join(out.split())
        for text in texts:
            assert "".join(text.split()) in out
