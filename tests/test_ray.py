"""Row blocks on a Ray cluster of several nodes: the same bits as on this machine, whoever dies."""

import logging
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from conftest import MODELS, files_below
from object_server import serving
from PIL import Image

import h2t_store
from h2t_store.engines import open_engine
from h2t_store.engines.plan import Plan
from h2t_store.errors import DataError, H2TError, ModelError, StoppedError
from h2t_store.settings import Running, Settings
from h2t_store.storage.places import open_place
from h2t_store.storage.store import FeatureStore

ray = pytest.importorskip("ray")
from h2t_store.engines.ray import RayEngine  # noqa: E402

MODEL = f"{MODELS}:small_input"
extract = partial(h2t_store.extract, rows_per_block=16)  # several row blocks out of few images
MORTAL = """
import os
import signal
from pathlib import Path

from torch import nn


class Mortal(nn.Module):
    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def __init__(self, lives):
        super().__init__()
        self.lives = lives
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()

    def forward(self, x):
        left = sorted(Path(self.lives).iterdir())
        if len(x) == 4 and left:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.act(self.conv(x)).mean((2, 3))


def mortal():
    return Mortal(Path(__file__).with_name("lives"))
"""
os.environ.update(RAY_worker_niceness="0")  # or whatever else runs here keeps workers waiting, for minutes
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}


@pytest.fixture(scope="module")
def s3():
    """An S3 server that everything here can ask, as workers have the environment of the node that they are on."""
    pytest.importorskip("moto")
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def cluster(s3):
    """Two nodes with a core each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def tree(store: Path, name: str) -> dict[str, bytes]:
    """Every file of an extraction."""
    return files_below(store / name)


def here(data, store: Path, **settings):
    """The same without a cluster, and without forking: that would cut connections that Ray's test cluster has here."""
    return extract(data, store=store, **(settings | {"workers": 0}))


def mortal(folder: Path, lives: int) -> str:
    """A network that kills its process so many times."""
    (folder / "mortal.py").write_text(MORTAL)
    (folder / "lives").mkdir()
    for life in range(lives):
        (folder / "lives" / str(life)).touch()
    return f"{folder}/mortal.py:mortal"


def test_both_engines_write_the_same_bytes_and_say_the_same(cluster, tmp_path, folder, caplog):
    (folder / "a/04.png").write_text("no image")
    for name in ("a/08.png", "d/39.png"):
        Image.new("LA", (8, 8), (9, 0)).save(folder / name)
    common = dict(model=MODEL, batch_size=4, on_error="skip", name="x")
    done = []
    here(folder, tmp_path / "local", **common)
    matrix = extract(
        folder,
        store=tmp_path / "ray",
        engine="ray",
        workers=2,
        progress=lambda *now: done.append(now[:2]),
        **common,
    )
    assert len(matrix) == 39
    assert tree(tmp_path / "local", "x") == tree(tmp_path / "ray", "x")
    said = [record.getMessage() for record in caplog.records if "transparent" in record.getMessage()]
    assert [message.split(": such as")[0] for message in said] == [said[0].split(": such as")[0]] * 2
    assert said[0].startswith("2 images are transparent in part")
    assert done[0] == (0, 40)
    assert done[-1] == (40, 40)


def test_what_is_in_memory_is_sent_and_what_is_logged_comes_back(cluster, tmp_path, images, labels, caplog):
    common = dict(model=tiny_models.Greedy(5), batch_size=8, name="x")
    here((images, labels), tmp_path / "local", **common)
    caplog.clear()
    matrix = extract((images, labels), store=tmp_path / "ray", engine="ray", **common)
    assert tree(tmp_path / "local", "x") == tree(tmp_path / "ray", "x")
    assert matrix.provenance["environment"]["batch_size_used"] == 4
    assert "does not say how its images are normalized" in caplog.text


def test_a_relative_path_means_the_same_to_a_worker(cluster, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("mine.py").write_text(Path(MODELS).read_text())
    matrix = extract("pictures", model="mine.py:small_input", store="s", name="x", engine="ray")
    assert matrix.provenance["environment"]["arguments"]["data"] == str(folder)
    assert len(matrix) == 40


def test_an_extraction_is_extended(cluster, tmp_path, folder):
    new = [folder / "b/41.png", folder / "c/42.png"]
    contents = [path.read_bytes() for path in sorted(folder.glob("a/*"))[:2]]
    common = dict(model=MODEL, batch_size=4, name="x")
    for store, engine in (("local", "local"), ("ray", "ray")):
        for path in new:
            path.unlink(missing_ok=True)
        extract(folder, store=tmp_path / store, engine=engine, **common)
        for path, content in zip(new, contents, strict=True):
            path.write_bytes(content)
        assert len(extract(folder, store=tmp_path / store, engine=engine, append=True, **common)) == 42
    assert tree(tmp_path / "local", "x") == tree(tmp_path / "ray", "x")


def test_workers_that_die_are_replaced(cluster, tmp_path, folder):
    model = mortal(tmp_path, lives=3)
    common = dict(model=model, batch_size=4, name="x", workers=2)
    done = []
    extract(folder, store=tmp_path / "ray", engine="ray", progress=lambda *now: done.append(now[0]), **common)
    assert not any((tmp_path / "lives").iterdir())
    assert done[-1] == 40
    here(folder, tmp_path / "local", **common)
    assert tree(tmp_path / "local", "x") == tree(tmp_path / "ray", "x")


def test_a_network_that_always_dies_is_an_error(cluster, tmp_path, folder):
    with RayEngine(1, deaths_of_each=1) as engine:
        job = engine.prepare(Settings(data=folder, model=mortal(tmp_path, 9), batch_size=4))
        store = FeatureStore(tmp_path / "s", create=True)
        extraction = store.begin("x", job.header(), job.source.y, job.source.sample_ids)
        with pytest.raises(H2TError, match="2 Ray workers died in a row"):
            engine.run(job, extraction, Plan(40, extraction.header.rows_per_block), Running(), lambda *_: None)


def test_a_node_that_dies_is_done_without(cluster, tmp_path, folder):
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()

    def remove_node(done: int, *_: int) -> None:
        nonlocal node
        if done and node is not None:
            cluster.remove_node(node, allow_graceful=False)
            node = None

    common = dict(model=MODEL, batch_size=4, name="x")
    extract(folder, store=tmp_path / "ray", engine="ray", workers=3, progress=remove_node, **common)
    assert node is None
    here(folder, tmp_path / "local", **common)
    assert tree(tmp_path / "local", "x") == tree(tmp_path / "ray", "x")


@pytest.mark.parametrize(("first", "second"), [("ray", "local"), ("local", "ray")])
def test_what_one_engine_began_the_other_finishes(cluster, tmp_path, folder, first, second):
    common = dict(model=MODEL, batch_size=4, name="x", workers=1)
    with pytest.raises(StoppedError, match="stopped after"):
        extract(folder, store=tmp_path / "s", engine=first, stopped=lambda: True, **common)
    committed = FeatureStore(tmp_path / "s").open("x").committed()
    assert not committed.all()
    extract(folder, store=tmp_path / "s", engine=second, **common)
    here(folder, tmp_path / "whole", **common)
    assert tree(tmp_path / "s", "x") == tree(tmp_path / "whole", "x")


def test_a_driver_that_is_killed_leaves_what_can_be_finished(cluster, tmp_path, folder):
    common = dict(model=MODEL, batch_size=4, name="x")
    on_ray = dict(store=str(tmp_path / "s"), engine="ray", ray_address=cluster.address, workers=1)
    script = f"""
import os, signal
from h2t_store import extract
def kill(done, *_):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
extract({str(folder)!r}, progress=kill, rows_per_block=16, **{common | on_ray!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=False, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    here(folder, tmp_path / "s", **common)
    here(folder, tmp_path / "whole", **common)
    assert tree(tmp_path / "s", "x") == tree(tmp_path / "whole", "x")


def test_errors_of_workers_are_what_they_are_here(cluster, tmp_path, folder):
    (folder / "a/04.png").write_text("no image")
    common = dict(store=tmp_path / "s", name="x", engine="ray")
    with pytest.raises(DataError, match=r"a/04\.png: not an image"):
        extract(folder, model=MODEL, **common)
    with pytest.raises(ModelError, match="there is no file"):
        extract(folder, model="nowhere.py:network", **common)
    with pytest.raises(H2TError, match="num_gpus_per_worker 2: the Ray cluster has 0 GPUs"):
        extract(folder, model=MODEL, num_gpus_per_worker=2, **common)
    with pytest.raises(H2TError, match="num_gpus_per_worker -1: accepted are numbers from 0"):
        extract(folder, model=MODEL, num_gpus_per_worker=-1, **common)
    with pytest.raises(H2TError, match="engine 'dask': accepted are local, ray and torchrun"):
        extract(folder, model=MODEL, store=tmp_path / "s", name="x", engine="dask")


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(H2TError, match=r"ray_address '127\.0\.0\.1:1': \[Errno 111\] Connection refused"):
        extract(folder, model=MODEL, store=tmp_path / "s", name="x", engine="ray", ray_address="127.0.0.1:1")
    assert not capsys.readouterr().err


def test_a_connection_ends_when_the_last_who_uses_it_has_left(monkeypatch):
    calls = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: calls.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    for order in ((0, 1), (1, 0)):
        stacks = [ExitStack(), ExitStack()]
        for stack in stacks:
            stack.enter_context(open_engine(Running(engine="ray", ray_address="local")))
        stacks[order[0]].close()
        assert calls == ["init"]
        stacks[order[1]].close()
        assert calls == ["init", "shutdown"]
        calls.clear()


def test_workers_write_into_a_bucket_whose_requests_fail(cluster, s3, tmp_path, folder):
    common = dict(model=mortal(tmp_path, lives=1), batch_size=4, name="x")
    s3.rate = 0.05
    extract(folder, store="s3://bucket/s", engine="ray", workers=1, **common)
    s3.rate = 0.0
    here(folder, tmp_path / "whole", **common)
    place = open_place("s3://bucket/s/x")
    assert {path: (place / path).read() for path, _ in place.files()} == tree(tmp_path / "whole", "x")
    assert not any((tmp_path / "lives").iterdir())


def test_a_search_is_the_same_on_a_cluster(cluster, tmp_path, folder):
    import joblib
    from ray.util.joblib import register_ray
    from sklearn.model_selection import GridSearchCV

    from estimators import Head2ToeClassifier, Head2ToeClassifierCV

    X = here(folder, tmp_path / "s", model=MODEL, name="x")
    search = GridSearchCV(
        Head2ToeClassifier(memory=tmp_path / "paths"), {"alpha": [0.3, 0.6], "keep_fraction": [None, 0.5]}, cv=2
    )
    tuned = Head2ToeClassifierCV(alphas=(0.5,), keep_fractions=(0.5,), cv=2)
    alone = search.fit(X, X.y).cv_results_["mean_test_score"], tuned.fit(X, X.y).decision_function(X)
    register_ray()
    with joblib.parallel_config(backend="ray", n_jobs=2):
        there = search.fit(X, X.y).cv_results_["mean_test_score"], tuned.fit(X, X.y).decision_function(X)
    np.testing.assert_array_equal(alone[0], there[0])
    np.testing.assert_allclose(alone[1], there[1], rtol=1e-6)
