"""The one description of an extraction: validation, JSON, absolute paths, and the flags made from it."""

import inspect
import json
import pickle
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import MODELS

import h2t_store
from h2t_store import cli, open_features
from h2t_store.arguments import parameters
from h2t_store.errors import H2TError
from h2t_store.settings import Running, Settings, read_arguments

OTHER_VALUES = dict(
    data="digits",
    split="test",
    data_dir="some/folder",
    download=True,
    model="resnet18",
    pretrained=False,
    checkpoint="weights.safetensors",
    img_size=64,
    seed=7,
    taps="layer1,layer2.*:in",
    cls_token="keep",
    target_size=(8, 512),
    dtype="float32",
    batch_size=12,
    device="cuda:1",
    amp=True,
    torchcompile=True,
    codec="zstd",
    shards=True,
    rows_per_block=32,
)


OTHER_WAYS = dict(
    workers=3,
    on_error="skip",
    append=True,
    engine="ray",
    ray_address="local",
    num_gpus_per_worker=0.5,
)


def given_to_the_command(monkeypatch, *words: str) -> tuple[Settings, Running]:
    """What the command ``extract`` passes on."""
    seen = {}

    def extract(**arguments):
        seen.update(arguments)
        raise H2TError("enough")

    monkeypatch.setattr("h2t_store.extracting.extract", extract)
    monkeypatch.setattr(sys, "argv", ["extract", *words])
    with pytest.raises(H2TError, match="enough"):
        typer.main.get_command(cli.extract.app)(standalone_mode=False)
    return read_arguments(
        {name: value for name, value in seen.items() if name not in ("store", "name", "stopped", "progress")}
    )


def test_every_argument_is_reachable_from_the_command(monkeypatch):
    assert set(OTHER_VALUES) == {field.name for field in fields(Settings)}
    assert set(OTHER_WAYS) == {field.name for field in fields(Running)} - {"stopped", "progress"}
    words = [OTHER_VALUES["data"], "--store", "s", "--name", "x", "--dataset-download", "--no-pretrained"]
    for name, value in (OTHER_VALUES | OTHER_WAYS).items():
        flag = f"--{name.replace('_', '-')}"
        if name == "target_size":
            words += [part for size in value for part in (flag, str(size))]
        elif name in ("amp", "torchcompile", "shards", "append"):
            words.append(flag)
        elif name not in ("data", "download", "pretrained"):
            words += [flag, str(value)]
    given, running = given_to_the_command(monkeypatch, *words)
    assert given == Settings(**OTHER_VALUES)
    assert running == Running(**OTHER_WAYS)
    defaults = Settings(data="digits", model="resnet18")
    same = [field.name for field in fields(Settings) if getattr(given, field.name) == getattr(defaults, field.name)]
    assert same == ["data", "model"]
    assert not any(getattr(running, name) == getattr(Running(), name) for name in OTHER_WAYS)


def test_the_command_has_the_defaults_of_the_settings(monkeypatch):
    given = given_to_the_command(monkeypatch, "digits", "--model", "resnet18", "--store", "s", "--name", "x")
    assert given == (Settings(data="digits", model="resnet18"), Running())


@pytest.mark.parametrize("described", [Settings, Running])
def test_every_argument_has_a_help_text_that_the_command_prints(described):
    command = typer.main.get_command(cli.extract.app)
    printed = {each.name: getattr(each, "help", None) for each in command.params}
    for each in parameters(described):
        flag = each.annotation
        assert len(flag.help) > 15, each.name
        if each.name not in ("stopped", "progress"):
            assert printed[each.name] == flag.help


def test_settings_survive_json_and_pickling():
    settings = Settings(**OTHER_VALUES)
    assert Settings(**{**OTHER_VALUES, "download": False}) == Settings.from_json(
        json.loads(json.dumps(settings.to_json()))
    )
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize("data", [(np.zeros((1, 2, 2, 3), np.uint8), None), [(np.zeros((2, 2, 3), np.uint8), 0)]])
def test_objects_in_memory_are_none_in_json(data):
    settings = Settings(data=data, model=torch.nn.Identity()).absolute()
    record = json.loads(json.dumps(settings.to_json()))
    assert record["data"] is record["model"] is None


def test_a_record_of_an_older_version_has_defaults_for_what_it_lacks():
    record = Settings(**OTHER_VALUES).to_json()
    for name in ("codec", "shards", "rows_per_block"):
        del record[name]
    settings = Settings.from_json(record)
    assert (settings.codec, settings.shards, settings.rows_per_block) == ("none", False, None)
    assert settings.target_size == (8, 512)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(taps=5), "taps 5: accepted are a string and a sequence of strings"),
        (dict(dtype="int8"), "dtype 'int8': accepted are float16 and float32"),
        (dict(cls_token="mean"), "cls_token 'mean': accepted are pool, only and keep"),
        (dict(codec="gzip"), "codec 'gzip': accepted are none, zstd, blosc and pcodec"),
        (dict(shards="yes"), "shards 'yes': accepted are True and False"),
        (dict(amp=1), "amp 1: accepted are True and False"),
        (dict(rows_per_block=0), "rows_per_block 0: accepted are whole numbers from 1 to"),
        (dict(batch_size=2.5), "batch_size 2.5: accepted are whole numbers from 1 to .* and 'auto'"),
        (dict(target_size=[]), r"target_size \[\]: accepted are whole numbers from 1 to"),
        (dict(target_size=[4, "x"]), "target_size 'x': accepted are whole numbers from 1 to"),
        (dict(target_size="4"), "target_size '4': accepted are whole numbers from 1 to"),
        (dict(seed=None), "seed None: accepted are whole numbers from 0 to"),
        (dict(img_size=9000), "img_size 9000: accepted are whole numbers from 1 to 8192"),
        (dict(checkpoint=3), "checkpoint 3: accepted is a path"),
        (dict(split=3), "split 3: accepted is a string"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(wrong, message):
    with pytest.raises(H2TError, match=message):
        Settings(data="digits", model="resnet18", **wrong)


def test_an_unknown_argument_of_extract_is_named_with_a_suggestion(tmp_path):
    with pytest.raises(TypeError, match=r"'tap' is not an argument of extract \(did you mean 'taps'"):
        h2t_store.extract("digits", model="resnet18", store=tmp_path / "s", name="x", tap="blocks")
    assert not (tmp_path / "s").exists()


def test_numbers_and_sequences_of_numpy_are_accepted():
    settings = Settings(
        data="digits", model="m", seed=np.int64(3), target_size=np.array([4, 4, 8]), batch_size=np.int32(2)
    )
    assert settings.target_size == (4, 8)
    assert json.loads(json.dumps(settings.to_json()))["seed"] == 3


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "net.py", "w.pt"):
        Path(name).touch()
    settings = Settings(data="pictures", model="net.py:make", checkpoint=Path("w.pt"), data_dir=".").absolute()
    assert settings.data == str(tmp_path / "pictures")
    assert settings.model == f"{tmp_path}/net.py:make"
    assert settings.checkpoint == str(tmp_path / "w.pt")
    assert settings.data_dir == str(tmp_path)
    named = Settings(data="torch/cifar10", model="resnet18").absolute()
    assert (named.data, named.model, named.data_dir) == ("torch/cifar10", "resnet18", str(tmp_path))
    assert Settings(data="hfds/pictures", model="m").absolute().data == f"hfds/{tmp_path}/pictures"
    assert Settings(data="wds/pictures", data_dir="x", model="m").absolute().data == "wds/pictures"
    assert Settings(data="digits", model="m").absolute().data == "digits"


def test_rows_per_block_is_the_height_of_chunks(tmp_path, images):
    h2t_store.extract((images, None), model=f"{MODELS}:small_input", store=tmp_path / "s", name="x", rows_per_block=12)
    matrix = open_features(tmp_path / "s", "x")
    chunks = sorted(path.name for path in (tmp_path / "s/x/committed/c").iterdir())
    assert (len(matrix), chunks) == (40, ["0", "1", "2", "3"])
    assert matrix.provenance["environment"]["arguments"]["rows_per_block"] == 12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(workers=-1), "workers -1: accepted are whole numbers from 0 to"),
        (dict(on_error="ignore"), "on_error 'ignore': accepted are raise and skip"),
        (dict(engine="spark"), "engine 'spark': accepted are local, ray and torchrun"),
        (dict(append=None), "append None: accepted are True and False"),
        (dict(num_gpus_per_worker=-1.0), "num_gpus_per_worker -1.0: accepted are numbers from 0"),
        (dict(num_gpus_per_worker="all"), "num_gpus_per_worker 'all': accepted are numbers from 0"),
        (dict(ray_address=6379), "ray_address 6379: accepted is a string"),
    ],
)
def test_a_wrong_way_to_run_is_named_and_leaves_no_store(tmp_path, images, wrong, message):
    with pytest.raises(H2TError, match=message):
        h2t_store.extract((images, None), model=f"{MODELS}:small_input", store=tmp_path / "s", name="x", **wrong)
    assert not (tmp_path / "s").exists()


def test_help_lists_every_argument_of_extract():
    names = {field.name for kind in (Settings, Running) for field in fields(kind)}
    shown = inspect.signature(h2t_store.extract).parameters
    assert set(shown) == names | {"store", "name"}
    assert shown["taps"].default == "activations"
    lines = inspect.getdoc(h2t_store.extract).splitlines()
    assert names <= {line.partition(" : ")[0] for line in lines}
    assert lines.index("Raises") > lines.index("taps : str | tuple[str, ...]")
