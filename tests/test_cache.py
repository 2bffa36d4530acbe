"""Solutions kept on disk: what names them, where they go, and that damage, crashes and company do no harm."""

import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
from _estimator_data import FakeFeatures
from joblib import Parallel, delayed

from estimators import cache
from estimators.cache import Codec, Files, cache_place, cached, fingerprint, problem_key
from h2t_store.matrix import open_features
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.store import FeatureStore

LAYERS = (Layer("stem", 0, 3, (3, 1, 1)), Layer("head", 3, 8, (5,)))
CODEC = Codec(pack=lambda solution: {"a": solution, "b": 2 * solution}, unpack=lambda arrays: arrays["b"] - arrays["a"])
SOLUTION = np.arange(500.0)


def make_store(path, name="x", seed=0):
    """12 rows of two layers, as an open matrix."""
    values = np.random.default_rng(seed).normal(size=(12, 8)).astype(np.float32)
    header = ExtractionHeader(12, 12, "float32", ("a", "b"), LAYERS, {"inputs": {"seed": seed}, "environment": {}})
    extraction = FeatureStore(path, create=True).begin(name, header, np.arange(12) % 2, [f"i{i}" for i in range(12)])
    extraction.write_block(
        0, np.split(values, [3], axis=1), np.ones((12, 2), dtype=np.float32), np.zeros((12, 16), np.uint8)
    )
    extraction.finish()
    return open_features(path, name)


def refuse(_):
    pytest.fail("solved although the solution is there")


def files(directory):
    """Names of what lies there, without the locks, which stay."""
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")


def test_a_fingerprint_is_of_values_and_not_of_how_they_lie_in_memory():
    X = np.random.default_rng(0).normal(size=(20, 7))
    wide = np.zeros((40, 14))
    wide[::2, 1::2] = X
    reversed_twice = np.ascontiguousarray(X[::-1, ::-1])[::-1, ::-1]
    read_only = X.copy()
    read_only.flags.writeable = False
    for same in (
        X.copy(),
        np.asfortranarray(X),
        wide[::2, 1::2],
        reversed_twice,
        read_only,
        pickle.loads(pickle.dumps(X)),
    ):
        assert fingerprint(same) == fingerprint(X)


def test_a_fingerprint_changes_with_values_shape_dtype_and_order():
    X = np.random.default_rng(1).normal(size=(20, 6)).astype(np.float32)
    others = [X, X.astype(np.float64), X.reshape(10, 12), X.T, X[::-1], X[:, ::-1], X[1:], X[:, 1:], X.view(np.int32)]
    for at in [(0, 0), (19, 5), (7, 3)]:
        others.append(X.copy())
        others[-1][at] = np.nextafter(X[at], np.float32(np.inf))
    assert len({fingerprint(other) for other in others}) == len(others)


def test_a_fingerprint_of_many_parts_sees_them_all():
    X = np.zeros((3, 5 << 20), dtype=np.uint8).reshape(-1, 3).astype(np.float64)
    assert X.nbytes >> 25 > 1
    before = fingerprint(X)
    assert fingerprint(np.asfortranarray(X)) == before
    X[-1, -1] = 1
    assert fingerprint(X) != before


def test_a_matrix_is_known_by_address_rows_columns_and_content_without_being_read(tmp_path, monkeypatch):
    X = make_store(tmp_path / "s.zarr")
    named, elsewhere = make_store(tmp_path / "s.zarr", "y"), make_store(tmp_path / "t.zarr")
    monkeypatch.setattr(type(X), "_read", lambda *_: pytest.fail("read"))
    parts = [X, X[:6], X[6:], X[::-1], X[:, :4], X[:, 4:], X[:6, :4], X[:4, :6], X[[0, 0, 1]], named, elsewhere]
    prints = [fingerprint(part) for part in parts]
    assert len(set(prints)) == len(prints)
    assert [fingerprint(pickle.loads(pickle.dumps(part))) for part in parts] == prints
    assert fingerprint(X[2:][:4]) == fingerprint(X[[2, 3, 4, 5]]) == fingerprint(X[2:6, :])


def test_features_made_anew_under_the_same_name_are_others(tmp_path):
    before = fingerprint(make_store(tmp_path / "s.zarr", seed=0))
    FeatureStore(tmp_path / "s.zarr").remove("x")
    assert fingerprint(make_store(tmp_path / "s.zarr", seed=1)) != before
    FeatureStore(tmp_path / "s.zarr").remove("x")
    assert fingerprint(make_store(tmp_path / "s.zarr", seed=0)) == before


def test_a_matrix_without_a_fingerprint_is_known_by_what_it_holds():
    X = np.random.default_rng(2).normal(size=(9, 6)).astype(np.float32)
    features = FakeFeatures(X, (2, 4))
    assert fingerprint(features) == fingerprint(FakeFeatures(X, (2, 4)))
    for other in (X[::-1], X[:, ::-1], X + 1, X[1:]):
        assert fingerprint(FakeFeatures(other, (2, 4))) != fingerprint(features)


def test_a_key_depends_on_every_part_and_on_where_parts_end():
    a, b = np.arange(4), np.ones(3)
    parts = [
        ("x", a, b),
        ("y", a, b),
        ("x", a + 1, b),
        ("x", a.astype(np.int32), b),
        ("x", a.reshape(2, 2), b),
        ("x", b, a),
        ("x", a),
        ("x", a, b, ""),
        ("xy", "z"),
        ("x", "yz"),
        (),
    ]
    keys = [problem_key(*part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert problem_key("x", a[::-1][::-1], b.copy()) == keys[0]
    assert all(key.isalnum() for key in keys)


def test_the_folder_is_that_given_or_that_of_joblibs_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cache_place(None) is None
    assert cache_place(joblib.Memory(None)) is None
    assert cache_place(str(tmp_path / "a")) == cache_place(tmp_path / "a") == Files(tmp_path / "a")
    assert cache_place("a/../b") == Files(tmp_path / "b")
    kept = cache_place(joblib.Memory(tmp_path / "m", verbose=0)).folder
    assert kept.is_absolute()
    assert kept.is_relative_to(tmp_path / "m")
    assert not (tmp_path / "a").exists()


URLS = ["s3://bucket", "s3://key:secret@bucket/x", "http://host/x", "s3://bucket/x?token=secret"]


@pytest.mark.parametrize("memory", ["", 3, 0, False, True, b"folder", ["folder"], object(), np.zeros(2), *URLS])
def test_what_is_no_folder_is_refused_by_name(memory):
    with pytest.raises(ValueError, match=r"memory must be None, a folder, a URL .* or a joblib\.Memory") as told:
        cache_place(memory)
    assert "key:secret" not in str(told.value)


def test_a_memory_that_is_not_local_is_refused(tmp_path):
    memory = joblib.Memory(tmp_path, verbose=0)
    memory.backend = "s3"
    with pytest.raises(ValueError, match="memory must be None"):
        cache_place(memory)


def test_what_is_kept_is_returned_and_not_solved_again(tmp_path):
    folder = tmp_path / "not" / "yet"
    solved = cached(
        Files(folder), "k", CODEC, lambda _: True, lambda stored: SOLUTION if stored is None else refuse(stored)
    )
    np.testing.assert_array_equal(solved, SOLUTION)
    np.testing.assert_array_equal(cached(Files(folder), "k", CODEC, lambda _: True, refuse), SOLUTION)
    other = cached(Files(folder), "other", CODEC, lambda _: True, lambda _: -SOLUTION)
    np.testing.assert_array_equal(other, -SOLUTION)
    np.testing.assert_array_equal(cached(Files(folder), "k", CODEC, lambda _: True, refuse), SOLUTION)
    assert files(folder) == ["k.npz", "other.npz"]


def test_what_is_not_enough_is_completed_and_replaced(tmp_path):
    cached(Files(tmp_path), "k", CODEC, lambda _: True, lambda _: SOLUTION[:10])
    given = []
    solved = cached(
        Files(tmp_path), "k", CODEC, lambda s: len(s) == 500, lambda stored: given.append(stored) or SOLUTION
    )
    np.testing.assert_array_equal(given, [SOLUTION[:10]])
    np.testing.assert_array_equal(solved, SOLUTION)
    np.testing.assert_array_equal(cached(Files(tmp_path), "k", CODEC, lambda s: len(s) == 500, refuse), SOLUTION)


def whole_file(folder):
    cached(Files(folder), "k", CODEC, lambda _: True, lambda _: SOLUTION)
    return folder / "k.npz"


def save(file, **arrays):
    with file.open("wb") as stream:
        np.savez(stream, **arrays)


def put(file, content):
    file.write_bytes(content)


def changed(content, at, mask=0xFF):
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


DAMAGES = {
    "empty": lambda file: put(file, b""),
    "one byte": lambda file: put(file, file.read_bytes()[:1]),
    "the signature": lambda file: put(file, file.read_bytes()[:4]),
    "half": lambda file: put(file, file.read_bytes()[: file.stat().st_size // 2]),
    "all but one byte": lambda file: put(file, file.read_bytes()[:-1]),
    "a byte of a header": lambda file: put(file, changed(file.read_bytes(), 70)),
    "a byte of an array": lambda file: put(file, changed(file.read_bytes(), 1000)),
    "a byte of the table": lambda file: put(file, changed(file.read_bytes(), file.read_bytes().rindex(b"PK\1\2"))),
    "text": lambda file: put(file, b"not a solution\n" * 50),
    "zeros": lambda file: put(file, bytes(5000)),
    "a pickle": lambda file: put(file, pickle.dumps({"a": SOLUTION})),
    "an npy": lambda file: np.save(file.open("wb"), SOLUTION),
    "a zip of text": lambda file: zipfile.ZipFile(file, "w").writestr("a.npy", "text"),
    "objects": lambda file: save(file, a=np.array([{}, SOLUTION], dtype=object), b=SOLUTION),
    "an array missing": lambda file: save(file, a=SOLUTION),
    "no arrays": lambda file: save(file),
    "arrays that do not fit": lambda file: save(file, a=SOLUTION, b=SOLUTION[:7]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_computed_again_and_replaced(tmp_path, damage):
    file = whole_file(tmp_path)
    damage(file)
    with pytest.warns(UserWarning, match=r"k\.npz cannot be used .* and is computed again"):
        solved = cached(
            Files(tmp_path), "k", CODEC, lambda _: True, lambda stored: SOLUTION if stored is None else refuse(stored)
        )
    np.testing.assert_array_equal(solved, SOLUTION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(cached(Files(tmp_path), "k", CODEC, lambda _: True, refuse), SOLUTION)
    assert files(tmp_path) == ["k.npz"]


@pytest.mark.parametrize("mask", [0xFF, 0x01])
def test_no_changed_byte_of_a_file_gives_another_solution_or_an_error(tmp_path, mask):
    file = whole_file(tmp_path)
    content = file.read_bytes()
    positions = [*range(160), *range(160, len(content) - 160, 997), *range(len(content) - 160, len(content))]
    failed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in positions:
            put(file, changed(content, at, mask))
            try:
                solved = cached(Files(tmp_path), "k", CODEC, lambda _: True, lambda _: SOLUTION)
                if not np.array_equal(solved, SOLUTION):
                    failed.append((at, "another solution"))
            except Exception as error:
                failed.append((at, repr(error)))
    assert failed == []


def test_objects_in_a_file_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    save(tmp_path / "k.npz", a=np.array([Bomb()], dtype=object), b=SOLUTION)
    with pytest.warns(UserWarning, match="computed again"):
        cached(Files(tmp_path), "k", CODEC, lambda _: True, lambda _: SOLUTION)
    assert files(tmp_path) == ["k.npz"]


@pytest.mark.filterwarnings("ignore:.* is computed again")
def test_a_folder_that_cannot_be_made_warns_and_solves(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.warns(UserWarning, match="What was solved is not kept: memory='.*file.*' cannot be written to"):
            solved = cached(Files(folder), "k", CODEC, lambda _: True, lambda _: SOLUTION)
        np.testing.assert_array_equal(solved, SOLUTION)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_that_cannot_be_written_to_still_gives_what_it_holds(tmp_path, monkeypatch):
    whole_file(tmp_path)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.FileLock, "acquire", denied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(cached(Files(tmp_path), "k", CODEC, lambda _: True, refuse), SOLUTION)
    given = []
    with pytest.warns(UserWarning, match=r"cannot be written to \(Permission denied\)"):
        cached(Files(tmp_path), "k", CODEC, lambda _: False, lambda stored: given.append(stored) or SOLUTION)
    np.testing.assert_array_equal(given, [SOLUTION])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("bug"), KeyboardInterrupt()])
def test_saving_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    file = whole_file(tmp_path)
    before, savez = file.read_bytes(), np.savez

    def fail(stream, **arrays):
        savez(stream, **arrays)
        raise error

    monkeypatch.setattr(np, "savez", fail)
    if isinstance(error, OSError):
        with pytest.warns(UserWarning, match=r"cannot be written to \(No space left on device\)"):
            solved = cached(Files(tmp_path), "k", CODEC, lambda _: False, lambda _: -SOLUTION)
        np.testing.assert_array_equal(solved, -SOLUTION)
    else:
        with pytest.raises(type(error)):
            cached(Files(tmp_path), "k", CODEC, lambda _: False, lambda _: -SOLUTION)
    assert files(tmp_path) == ["k.npz"]
    assert file.read_bytes() == before
    monkeypatch.undo()
    np.testing.assert_array_equal(
        cached(Files(tmp_path), "k", CODEC, lambda s: s[1] < 0, lambda _: -SOLUTION), -SOLUTION
    )


def test_solving_that_fails_leaves_nothing_and_blocks_nobody(tmp_path):
    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached(Files(tmp_path), "k", CODEC, lambda _: True, fail)
    assert files(tmp_path) == []
    with ThreadPoolExecutor(1) as other:
        solved = other.submit(cached, Files(tmp_path), "k", CODEC, lambda _: True, lambda _: SOLUTION).result(
            timeout=60
        )
    np.testing.assert_array_equal(solved, SOLUTION)


def test_threads_that_ask_at_once_solve_once(tmp_path, monkeypatch):
    waiting, solved = threading.Semaphore(0), []

    class Lock(cache.FileLock):
        def acquire(self, *args, **kwargs):
            waiting.release()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(cache, "FileLock", Lock)

    def solve(_):
        for _ in range(3):
            assert waiting.acquire(timeout=60)
        solved.append(threading.get_ident())
        return SOLUTION

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(cached, Files(tmp_path), "k", CODEC, lambda _: True, solve) for _ in range(3)]
        results = [future.result(timeout=600) for future in asked]
    assert len(solved) == 1
    for result in results:
        np.testing.assert_array_equal(result, SOLUTION)


def test_other_problems_are_solved_meanwhile(tmp_path):
    def outer(_):
        with ThreadPoolExecutor(1) as pool:
            inner = pool.submit(cached, Files(tmp_path), "inner", CODEC, lambda _: True, lambda _: -SOLUTION)
            return -inner.result(timeout=60)

    np.testing.assert_array_equal(cached(Files(tmp_path), "outer", CODEC, lambda _: True, outer), SOLUTION)


def add_line(file, text):
    with file.open("a") as stream:
        stream.write(f"{text}\n")


def ask(folder, log):
    """In a process of its own: the one that solves waits until the other is there too."""

    def solve(stored):
        add_line(log / "solved", os.getpid())
        until = time.monotonic() + 60
        while len((log / "asked").read_text().split()) < 2 and time.monotonic() < until:
            time.sleep(0.005)
        return SOLUTION

    def enough(solution):
        return len(solution) == 500

    add_line(log / "asked", os.getpid())
    return cached(Files(folder), "k", Codec(_pack, _unpack), enough, solve)


def _pack(solution):
    return {"a": solution}


def _unpack(arrays):
    return arrays["a"]


def test_processes_that_ask_at_once_solve_once(tmp_path):
    results = Parallel(n_jobs=2, backend="loky")(delayed(ask)(tmp_path / "kept", tmp_path) for _ in range(2))
    for result in results:
        np.testing.assert_array_equal(result, SOLUTION)
    assert len(set((tmp_path / "asked").read_text().split())) == 2
    assert len((tmp_path / "solved").read_text().split()) == 1


KILLED = """
import os, sys
import numpy as np
from pathlib import Path
from estimators.cache import Codec, Files, cached

def die(stream, **arrays):
    stream.write(b"PK half a file")
    stream.flush()
    os._exit(7)

np.savez = die
codec = Codec(lambda solution: {"a": solution}, lambda arrays: arrays["a"])
cached(Files(Path(sys.argv[1])), "k", codec, lambda _: True, lambda _: np.ones(3))
"""


def test_a_writer_that_was_killed_blocks_nobody_and_leaves_no_half_file(tmp_path):
    root = Path(cache.__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, check=False, timeout=600)
    assert killed.returncode == 7
    assert not (tmp_path / "k.npz").exists()
    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        solved = pool.submit(cached, Files(tmp_path), "k", CODEC, lambda _: True, lambda _: SOLUTION).result(timeout=60)
    np.testing.assert_array_equal(solved, SOLUTION)
    np.testing.assert_array_equal(cached(Files(tmp_path), "k", CODEC, lambda _: True, refuse), SOLUTION)
