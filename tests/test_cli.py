import logging
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
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
    for name in ("x[b]y", "z"):
        run("extract", folder, "--model", MODEL, "--store", store, "--name", name)
    path = store / "z" / "zarr.json"
    path.write_text(path.read_text().replace("small_input", "other"))
    code, out, _ = run("h2t", "ls", store)
    assert code == 0
    assert re.search(r"^x\[b\]y .*complete", out, re.MULTILINE)
    assert re.search(r"^z .*damaged: .*changed or damaged", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["extract"], "Missing"),
        (["extract", "FOLDER", "--model", MODEL, "--store", "S"], "--name"),
        (["extract", "FOLDER", "--model", MODEL, "--store", "S", "--name", "x", "--fast"], "--fast"),
        (["extract", "FOLDER", "--model", MODEL, "--store", "S", "--name", "x", "-b", "many"], "--batch-size"),
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


def test_a_signal_says_how_to_continue_and_the_same_command_does(tmp_path, images):
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
        "def build(): return Slow()\n"
    )
    (tmp_path / "p" / "a").mkdir(parents=True)
    for i in range(600):
        Image.fromarray(images[i % 40]).save(tmp_path / "p" / "a" / f"{i:03d}.bmp")
    program = "from h2t_store.cli import extract_main; extract_main()"
    command = [sys.executable, "-c", program, str(tmp_path / "p"), "--model", f"{slow}:build", "--img-size", "8"]
    command += ["--store", str(tmp_path / "s"), "--name", "x", "-b", "128", "-j", "0"]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert stopped.stderr.splitlines() == [
        "stopping after the row block in hand; once more stops at once",
        "error: stopped: finished row blocks are stored, the same command continues",
    ]
    assert (
        "1 of 2 row blocks"
        in subprocess.run(
            [*command[:2], "from h2t_store.cli import h2t_main; h2t_main()", "ls", str(tmp_path / "s")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert (
        "600 images of 1 classes"
        in subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"GO_ON": "1"}).stdout
    )
    assert open_features(tmp_path / "s", "x").shape[0] == 600


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
