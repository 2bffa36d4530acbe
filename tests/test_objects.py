"""Stores in an object store: the same bytes as on a disk, whatever of the requests fails and whoever dies."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import zarr
from conftest import MODELS, files_below
from object_server import FAULTS, KEY, SECRET, serving

from h2t_store import extract, open_features, repair
from h2t_store.errors import DamagedError, H2TError, IncompleteError, StoppedError, StoreError, UnreachableError
from h2t_store.storage.places import LockedError, open_place
from h2t_store.storage.places.bucket import Bucket
from h2t_store.storage.places.leases import lease
from h2t_store.storage.store import Extraction, FeatureStore
from h2t_store.storage.verify import verify

pytest.importorskip("obstore")
pytest.importorskip("moto")

MODEL = f"{MODELS}:small_input"
COMMON = dict(model=MODEL, batch_size=4, workers=0, rows_per_block=16)
N_BLOCKS = 3
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}


@pytest.fixture(scope="module")
def server():
    with serving() as s3:
        yield s3


@pytest.fixture
def s3(server, monkeypatch):
    """The server, sound, and the environment that leads there."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.rate, server.failed, server.faults, server.most = 0.0, 0, FAULTS, 1 << 30
    server.seen.clear()
    yield server
    server.rate = 0.0


@pytest.fixture
def store(s3, tmp_path):
    """Address of a store that is not there yet."""
    return f"s3://bucket/{tmp_path.name}/features.zarr"


@pytest.fixture
def local(tmp_path, folder):
    """The same extraction on a disk."""
    extract(folder, store=tmp_path / "local", name="a/x", **COMMON)
    return tmp_path / "local"


def lock_file(holder: str) -> str:
    """What a holder of a lock keeps locked on its machine."""
    return os.path.join(tempfile.gettempdir(), f"h2t-{holder}.lock")


def tree(place: Bucket) -> dict[str, bytes]:
    return {path: (place / path).read() for path, _ in place.files()}


def paths(store: str) -> set[str]:
    """All objects but locks."""
    return {path for path, _ in open_place(store).files() if not path.startswith(".locks/")}


def same(store: str, local: Path, name: str = "a/x") -> bool:
    return tree(open_place(store) / name) == files_below(local / name)


def chunks_of(matrix) -> int:
    return sum(layer.n_chunks for layer in matrix.layers)


@pytest.mark.parametrize("address", ["memory", "s3"])
def test_the_same_objects_as_files_on_a_disk(store, folder, local, address):
    store = store.replace("s3:", "memory:") if address == "memory" else store
    matrix = extract(folder, store=store, name="a/x", **COMMON)
    assert same(store, local)
    np.testing.assert_array_equal(np.asarray(matrix), np.asarray(open_features(local, "a/x")))
    again = open_features(store, "a/x")[[3, 1]]
    np.testing.assert_array_equal(again, np.asarray(matrix)[[3, 1]])
    assert again.sample_ids.tolist() == matrix.sample_ids[[3, 1]].tolist()
    opened = FeatureStore(store)
    assert opened.names() == ["a/x"]
    assert opened.open("a/x").stored_bytes() == FeatureStore(local).open("a/x").stored_bytes()
    assert not list(verify(opened, "a/x"))


def test_zarr_reads_it(store, folder):
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    matrix = extract(folder, store=store, name="a/x", **COMMON)
    group = zarr.open_group(ObjectStore(from_url(store)), path="a/x", mode="r")
    layer = matrix.layers[-1]
    read = group[f"features/{layer.name}"][:]
    np.testing.assert_array_equal(read.astype(np.float32), np.asarray(matrix)[:, layer.start : layer.stop])
    assert group["committed"][:].tolist() == [1] * N_BLOCKS


def test_a_row_block_takes_a_request_for_each_chunk_and_four(s3, store, folder):
    matrix = extract(folder, store=store, name="x", **COMMON)
    counted = Counter()
    for method, path in s3.seen:
        parts = path.split("/c/")
        if len(parts) == 2 and not path.endswith((".zarr/x/y/c/0", ".zarr/x/sample_ids/c/0")):
            counted[method, parts[1].split("/")[0]] += 1
    assert counted == {("PUT", str(block)): chunks_of(matrix) + 4 for block in range(N_BLOCKS)}


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_shards_take_a_request_for_each_layer_and_are_read_in_part(s3, store, folder, tmp_path, codec):
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    wide = COMMON | {
        "model": "h2t_resnet20",
        "taps": "layer1.0.act2,layer3.2.act2",
        "target_size": 2048,
        "codec": codec,
    }
    expected = np.asarray(extract(folder, store=tmp_path / "local", name="x", **wide))
    matrix = extract(folder, store=store, name="x", shards=True, **wide)
    layers = [layer for layer in matrix.layers if layer.n_chunks > 1]
    assert layers
    puts = Counter(path for method, path in s3.seen if method == "PUT" and "/features/" in path and "/c/" in path)
    assert len(puts) == len(matrix.layers) * N_BLOCKS
    np.testing.assert_array_equal(matrix, expected)
    assert not list(verify(FeatureStore(store), "x"))

    layer = layers[0]
    group = zarr.open_group(ObjectStore(from_url(store)), path="x", mode="r")
    read = group[f"features/{layer.name}"][:]
    np.testing.assert_array_equal(read.astype(np.float32), expected[:, layer.start : layer.stop])
    s3.seen.clear()
    one = open_features(store, "x")[:5, layer.stop - 1]
    np.testing.assert_array_equal(one, expected[:5, layer.stop - 1])
    gets = [path for _, path in s3.seen if f"/{layer.name}/c/" in path]
    assert len(gets) == (1 if codec == "none" else 2)

    shard = open_place(store) / f"x/features/{layer.name}/c/1/0"
    content = shard.read()
    shard.write_whole(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert {damage.path for damage in verify(FeatureStore(store), "x")} == {f"x/features/{layer.name}/c/1/0"}
    repair(store, "x", workers=0)
    assert shard.read() == content


def test_requests_that_fail_change_nothing(s3, store, folder, local):
    s3.rate = 0.15
    matrix = extract(folder, store=store, name="a/x", **COMMON)
    np.testing.assert_array_equal(np.asarray(matrix), np.asarray(open_features(local, "a/x")))
    assert not list(verify(FeatureStore(store), "a/x"))
    assert s3.failed > 5
    s3.rate = 0.0
    assert same(store, local)


def test_images_that_are_skipped_are_told(store, folder, tmp_path):
    (folder / "a/04.png").write_text("no image")
    matrix = extract(folder, store=store, name="a/x", on_error="skip", **COMMON)
    extract(folder, store=tmp_path / "local", name="a/x", on_error="skip", **COMMON)
    assert same(store, tmp_path / "local")
    assert [sample for sample, _ in matrix.failures] == ["a/04.png"]
    assert len(matrix) == 39
    open_place(store).__truediv__("a/x/failures/c/0").remove()
    with pytest.raises(DamagedError, match="0 samples were skipped, not 1"):
        open_features(store, "a/x")
    assert [damage.path for damage in verify(FeatureStore(store), "a/x")] == ["a/x/failures/c/0"]


def test_what_was_stopped_is_continued_without_reading_it_again(s3, store, folder, local):
    with pytest.raises(StoppedError):
        extract(folder, store=store, name="a/x", stopped=lambda: True, **COMMON)
    with pytest.raises(IncompleteError, match=r"1 of 3 row blocks|2 of 3 row blocks"):
        open_features(store, "a/x")
    s3.seen.clear()
    extract(folder, store=store, name="a/x", **COMMON)
    assert not [path for method, path in s3.seen if method == "GET" and "/features/" in path and "/c/" in path]
    assert same(store, local)


def killed(command: str) -> int:
    environment = os.environ | ENVIRONMENT
    return subprocess.run([sys.executable, "-c", command], env=environment, check=False, timeout=300).returncode


def test_a_process_that_is_killed_leaves_what_is_finished_at_once(store, folder, local):
    command = f"""
import os, signal
from h2t_store import extract
from h2t_store.storage.store import Extraction
write = Extraction.write_block
def kill(self, block, *args, **kwargs):
    if block == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, block, *args, **kwargs)
Extraction.write_block = kill
extract({str(folder)!r}, store={store!r}, name="a/x", **{COMMON!r})
"""
    assert killed(command) == -signal.SIGKILL
    assert FeatureStore(store).open("a/x").committed().tolist() == [True, False, False]
    extract(folder, store=store, name="a/x", **COMMON)
    assert same(store, local)
    assert {size for _, size in (open_place(store) / ".locks").files()} == {0}


QUICK = dict(beat=0.02, silence=0.1)


def forget(record: Bucket) -> None:
    """Remove the file by which others on this machine see whether a holder lives, as if it were on another one."""
    os.remove(lock_file(json.loads(record.read())["id"]))


def test_two_writers_are_kept_apart(store):
    first, second = FeatureStore(store, create=True), FeatureStore(store)
    with first.lock("x"):
        with pytest.raises(StoreError, match=f"x is being written by process {os.getpid()} on "), second.lock("x"):
            pass
        with second.lock("y"):
            pass
    with second.lock("x"):
        pass


def test_a_holder_on_another_machine_is_heard(store):
    place = Bucket(store, ".locks/x")
    with lease(place, "the first", **QUICK) as lost:
        forget(place / "1")
        for _ in range(3):
            with pytest.raises(LockedError, match="the first"), lease(place, "the second", **QUICK):
                pass
        assert not lost(ask=True)
    with lease(place, "the second", **QUICK):
        pass


def test_a_silent_holder_is_replaced_and_learns_of_that(store):
    place = Bucket(store, ".locks/x")
    with lease(place, "the first", beat=60) as first:
        record = (place / "1").read()
        forget(place / "1")
        with lease(place, "the second", **QUICK) as second:
            (place / "1").write_whole(record)  # the first wakes up
            assert first(ask=True)
            assert first()
            assert not second(ask=True)
            with pytest.raises(LockedError, match="the second"), lease(place, "the third", **QUICK):
                pass
    with lease(place, "the third", **QUICK) as third:
        assert not third(ask=True)
    assert {size for _, size in place.files()} == {0}


def test_no_file_is_touched_that_a_lock_names(store, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("keep")
    place = Bucket(store, ".locks/x")
    for name in (str(mine), f"../{mine.name}", "../../etc"):
        (place / "1").write_whole(json.dumps({"who": "someone", "id": name, "file": str(mine), "beat": 0}).encode())
        with lease(place, "next", **QUICK):
            assert mine.read_text() == "keep"
        for path, _ in place.files():
            (place / path).remove()


def test_of_many_who_take_over_one_holds_the_lock(store):
    place = Bucket(store.replace("s3:", "memory:"), ".locks/x")
    for _ in range(15):
        number = max([int(path) for path, _ in place.files()], default=0) + 1
        (place / str(number)).write_whole(json.dumps({"who": "one that died"}).encode())
        winners: list[int] = []
        gate, end = threading.Barrier(6), threading.Barrier(6)

        def contend(contender, winners=winners, gate=gate, end=end):
            gate.wait()
            with suppress(LockedError), lease(place, str(contender), beat=0.005, silence=0.02):
                winners.append(contender)
                end.wait()
                return
            end.wait()

        threads = [threading.Thread(target=contend, args=(contender,)) for contender in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1


def test_who_saw_an_old_holder_dead_does_not_get_between_later_ones(store, monkeypatch):
    place = Bucket(store.replace("s3:", "memory:"), ".locks/x")
    with lease(place, "0"):
        pass
    create, third = Bucket.create, ExitStack()

    def create_late(self, content):
        monkeypatch.setattr(Bucket, "create", create)
        with lease(place, "second"):
            pass
        third.enter_context(lease(place, "third"))
        return self.create(content)

    monkeypatch.setattr(Bucket, "create", create_late)
    with pytest.raises(LockedError), lease(place, "first"):
        pass
    with third, pytest.raises(LockedError, match="third"), lease(place, "fourth"):
        pass


def test_a_job_that_lost_its_lock_stops(store, folder, monkeypatch):
    held, blocks, write = [], [], Extraction.write_block

    @contextmanager
    def quick_lock(self, who):
        with lease(self, who, **QUICK) as lost:
            held.append(lost)
            yield lost

    def until_taken_over(self, block, *args, **kwargs):
        write(self, block, *args, **kwargs)
        blocks.append(block)
        (open_place(store) / ".locks/x/2").write_whole(b"{}")
        while not held[0]():
            time.sleep(0.005)

    monkeypatch.setattr(Bucket, "lock", quick_lock)
    monkeypatch.setattr(Extraction, "write_block", until_taken_over)
    with pytest.raises(StoreError, match="another process took the lock over"):
        extract(folder, store=store, name="x", **COMMON | {"rows_per_block": 4})
    assert len(blocks) < 10


def taken_over(store: str) -> None:
    """As another process does that found this one silent."""
    place = open_place(store) / ".locks/a%2Fx"
    (place / str(max(int(path) for path, _ in place.files()) + 1)).write_whole(b"{}")


@pytest.mark.parametrize("append", [False, True])
def test_who_lost_the_lock_ends_nothing(store, folder, monkeypatch, append):
    if append:
        extract(folder, store=store, name="a/x", **COMMON)
        extended(folder)
    write = Extraction.write_block

    def and_lose(self, block, *args, **kwargs):
        write(self, block, *args, **kwargs)
        if block == N_BLOCKS - 1:
            taken_over(store)

    monkeypatch.setattr(Extraction, "write_block", and_lose)
    with pytest.raises(StoreError, match="another process took the lock over"):
        extract(folder, store=store, name="a/x", append=append, **COMMON)
    assert not FeatureStore(store).open("a/x").complete
    assert max((open_place(store) / ".locks/a%2Fx").files())[1] == len(b"{}")


def test_a_lock_that_could_not_be_given_back_is_had_again(store, monkeypatch):
    place, real = Bucket(store, ".locks/x"), Bucket.write_whole

    def refuse(self, content, **kwargs):
        raise UnreachableError("no answer")

    with lease(place, "the first"):
        monkeypatch.setattr(Bucket, "write_whole", refuse)
    monkeypatch.setattr(Bucket, "write_whole", real)
    assert b"the first" in (place / "1").read()
    with lease(place, "the second") as lost:
        assert not lost(ask=True)
    assert list(place.files()) == [("2", 0)]


def extended(folder: Path) -> None:
    for i, path in enumerate(sorted(folder.glob("a/*"))[:5]):
        (folder / f"b/new{i}.png").write_bytes(path.read_bytes())


def failing(monkeypatch, error: BaseException, after: int) -> None:
    """Fail to write objects of the extraction once so many are written."""
    write, calls = Bucket.write_whole, []

    def fail(self, content, **kwargs):
        if self.key.startswith("a/x/"):
            calls.append(self.key)
            if len(calls) > after:
                raise error
        write(self, content, **kwargs)

    monkeypatch.setattr(Bucket, "write_whole", fail)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UnreachableError("403 Forbidden")], ids=["crash", "refusal"])
def test_an_extension_that_fails_anywhere_is_continued(store, folder, local, monkeypatch, error):
    old = np.asarray(extract(folder, store=store, name="a/x", **COMMON))
    extended(folder)
    extract(folder, store=local, name="a/x", append=True, **COMMON)
    failures = 0
    for after in range(0, 100, 4):
        with monkeypatch.context() as patch, suppress(type(error)):
            failing(patch, error, after)
            extract(folder, store=store, name="a/x", append=True, **COMMON)
            break
        failures += 1
        with suppress(IncompleteError):
            np.testing.assert_array_equal(open_features(store, "a/x"), old)
    assert failures > 2
    assert same(store, local)
    assert {path.split("/")[0] for path in paths(store)} == {"zarr.json", "a"}


def test_earlier_readers_see_right_rows_or_an_error_during_an_extension(store, folder, monkeypatch):
    old = np.asarray(extract(folder, store=store, name="a/x", **COMMON))
    extended(folder)
    readers, write, blocks = [open_features(store, "a/x") for _ in range(2)], Extraction.write_block, []
    np.asarray(readers[0])

    def look(self, block, *args, **kwargs):
        write(self, block, *args, **kwargs)
        blocks.append(block)
        with pytest.raises(IncompleteError):
            open_features(store, "a/x")
        for reader in readers:
            with suppress(StoreError):
                np.testing.assert_array_equal(np.asarray(reader), old)

    monkeypatch.setattr(Extraction, "write_block", look)
    after = np.asarray(extract(folder, store=store, name="a/x", append=True, **COMMON))
    assert blocks == [N_BLOCKS - 1]
    np.testing.assert_array_equal(after[:40], old)


def test_removal_takes_it_away_at_once_and_a_crash_amid_leaves_nothing_in_the_way(store, folder, local, monkeypatch):
    extract(folder, store=store, name="a/x", **COMMON)
    delete, calls = Bucket._delete, []

    def crash(self, keys):
        calls.append(keys)
        if len(calls) > 1:
            raise KeyboardInterrupt
        delete(self, keys)

    monkeypatch.setattr(Bucket, "_delete", crash)
    with pytest.raises(KeyboardInterrupt):
        FeatureStore(store).remove("a/x")
    monkeypatch.setattr(Bucket, "_delete", delete)
    assert FeatureStore(store).find("a/x") is None
    extract(folder, store=store, name="a/x", **COMMON)
    assert same(store, local)
    FeatureStore(store).remove("a/x")
    assert FeatureStore(store).names() == []
    assert paths(store) == {"zarr.json", "a/zarr.json"}


def test_a_server_that_is_overloaded_for_a_while_is_waited_for(s3, store, folder, local):
    s3.rate, s3.faults, s3.most = 1.0, ("an error",), 9
    matrix = extract(folder, store=store, name="a/x", **COMMON)
    s3.failed, s3.most = 0, 60
    np.testing.assert_array_equal(matrix, np.asarray(open_features(local, "a/x")))
    assert s3.failed == 60
    assert same(store, local)


def test_the_environment_may_change(s3, store, folder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", "http://someone:a-password@127.0.0.1:1")
    with pytest.raises(UnreachableError) as told:
        FeatureStore(store, create=True)
    assert "a-password" not in str(told.value)
    monkeypatch.setenv("AWS_ENDPOINT", s3.address)
    FeatureStore(store, create=True)


def test_a_folder_that_a_console_made_is_empty(s3, tmp_path):
    s3.put(f"/bucket/{tmp_path.name}/")
    assert FeatureStore(f"s3://bucket/{tmp_path.name}", create=True).names() == []


def test_damage_is_found_and_repaired(store, folder, local):
    extract(folder, store=store, name="a/x", **COMMON)
    place = open_place(store) / "a/x"
    layer = FeatureStore(store).open("a/x").header.layers[0].name
    chunk, gone = f"features/{layer}/c/1/0", "layer_norms/c/2/0"
    content = bytearray((place / chunk).read())
    content[5] ^= 1
    (place / chunk).write_whole(bytes(content))
    (place / gone).remove()
    with pytest.raises(DamagedError, match="its checksum does not fit"):
        np.asarray(open_features(store, "a/x"))
    assert {damage.path for damage in verify(FeatureStore(store), "a/x")} == {f"a/x/{chunk}", f"a/x/{gone}"}
    repair(store, "a/x", workers=0)
    assert same(store, local)


def verified_and_repaired(store: str, opened: FeatureStore) -> None:
    FeatureStore(store)
    with opened.lock("a/x"):
        pass
    assert not list(verify(opened, "a/x"))
    assert not repair(store, "a/x", workers=0)


def test_a_server_that_does_not_answer_is_no_damage(store, folder, local, monkeypatch):
    extract(folder, store=store, name="a/x", **COMMON)
    opened, real = FeatureStore(store), Bucket._ask
    for key in [*paths(store), ".locks/a%2Fx"]:

        def refuse(self, question, key=key):
            if self.key == key:
                raise UnreachableError("no answer")
            return real(self, question)

        monkeypatch.setattr(Bucket, "_ask", refuse)
        with pytest.raises(UnreachableError, match="no answer"):
            verified_and_repaired(store, opened)
        monkeypatch.setattr(Bucket, "_ask", real)
    assert same(store, local)


def test_a_cache_fetches_features_once_and_checks_its_copies(s3, store, folder, tmp_path):
    whole = np.asarray(extract(folder, store=store, name="a/x", **COMMON))
    matrix = open_features(store, "a/x", cache=tmp_path / "cache")
    np.testing.assert_array_equal(matrix, whole)
    s3.seen.clear()
    for again in (open_features(store, "a/x", cache=tmp_path / "cache"), pickle.loads(pickle.dumps(matrix[2:]))[:]):
        np.testing.assert_array_equal(again, whole[-len(again) :])
    assert not [path for _, path in s3.seen if "/features/" in path and "/c/" in path]
    copies = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    copies[0].write_bytes(copies[1].read_bytes())
    copies[-1].write_bytes(b"short")
    np.testing.assert_array_equal(open_features(store, "a/x", cache=tmp_path / "cache"), whole)
    fetched = [path for _, path in s3.seen if "/features/" in path and "/c/" in path]
    assert len(fetched) == 2
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cache: .* cannot be written"):
        np.asarray(open_features(store, "a/x", cache=tmp_path / "file"))


def test_secrets_stay_in_the_environment(s3, store, folder, caplog, capfd, monkeypatch):
    matrix = extract(folder, store=store, name="a/x", **COMMON)
    written = b"".join(tree(open_place(store)).values())
    pickled = pickle.dumps((matrix, matrix[[1]], open_place(store), matrix._extraction.folder))
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UnreachableError) as told:
        open_features(f"{store}-2", "a/x")
    said = caplog.text + "".join(capfd.readouterr()) + str(told.value) + repr(matrix) + matrix._repr_html_()
    for secret in (KEY, SECRET):
        assert secret.encode() not in written
        assert secret.encode() not in pickled
        assert secret not in said
    assert str(matrix.provenance).find(s3.address) == -1


def test_workers_open_it_by_its_address(store, folder):
    from joblib.externals.loky import get_reusable_executor
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import cross_val_score

    matrix = extract(folder, store=store, name="a/x", **COMMON)
    get_reusable_executor().shutdown()  # those of an earlier test know nothing of this server
    here, there = (cross_val_score(RidgeClassifier(), matrix, matrix.y, cv=2, n_jobs=n) for n in (1, 2))
    np.testing.assert_array_equal(here, there)


def test_a_process_that_was_forked_says_so_instead_of_hanging(store, folder):
    import multiprocessing

    matrix = extract(folder, store=store, name="a/x", model=MODEL, batch_size=4, workers=2)
    context = multiprocessing.get_context("fork")
    said = context.Queue()

    def read():
        try:
            said.put(np.asarray(matrix).shape)
        except StoreError as error:
            said.put(str(error))

    child = context.Process(target=read)
    child.start()
    assert "this process was forked" in said.get(timeout=60)
    child.join()


def test_errors_are_one_line(s3, store, folder, monkeypatch, tmp_path):
    def told(address: str) -> str:
        with pytest.raises(H2TError) as caught:
            extract(folder, store=address, name="x", **COMMON)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "404 Not Found: NoSuchBucket" in told("s3://elsewhere/s")
    with pytest.raises(StoreError, match="does not exist"):
        open_features(store, "x")
    with pytest.raises(StoreError, match="does not exist"):
        FeatureStore.unchecked(store)
    (open_place(store) / "x").write_whole(b"something")
    assert "exists and is not a feature store" in told(store)
    assert "Account must be specified" in told("az://container/s")
    assert "store 5: accepted is a folder" in told(5)
    assert "accepted is a folder" in told("s3://bucket/a/../b")
    for cache in ("", 5, b"x"):
        with pytest.raises(StoreError, match=f"cache {cache!r}: accepted is a folder"):
            open_features(store, "x", cache=cache)
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    assert "\n" not in told("s3://bucket/unconditional")
    monkeypatch.delenv("AWS_CONDITIONAL_PUT")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert "AWS_ALLOW_HTTP" in told("s3://bucket/plain")
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert "needs obstore: pip install 'head2toe[s3]'" in told("s3://bucket/never")


def test_a_store_in_memory_is_of_one_process(folder):
    with pytest.raises(StoreError, match="is in the memory of one process"):
        extract(folder, store="memory://mine", name="x", engine="ray", ray_address="local", **COMMON)
    matrix = extract(folder, store="memory://mine", name="x", **COMMON)
    sent = pickle.dumps(matrix)
    command = f"import pickle, sys; pickle.loads({sent!r}).layers"
    done = subprocess.run(
        [sys.executable, "-c", command], env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert "store 'memory://mine' does not exist in this process" in done.stderr


def test_the_command_line_takes_a_url(store, folder, tmp_path):
    environment = os.environ | ENVIRONMENT

    def run(module: str, *args: object) -> str:
        command = [sys.executable, "-c", f"import sys; from h2t_store.cli import {module}; {module}()", *map(str, args)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("extract_main", folder, "--model", MODEL, "--store", store, "--name", "a/x", "-b", 4, "-j", 0)
    assert json.loads(run("h2t_main", "ls", store, "--json"))[0]["name"] == "a/x"
    assert "sound" in run("h2t_main", "verify", store)
    run("h2t_main", "export", store, "a/x", tmp_path / "x.npy", "--cache", tmp_path / "cache")
    exported = np.load(io.BytesIO((tmp_path / "x.npy").read_bytes()))
    np.testing.assert_array_equal(exported, np.asarray(open_features(store, "a/x")))
    assert any((tmp_path / "cache").iterdir())
    run("h2t_main", "rm", store, "a/x", "--yes")
    assert run("h2t_main", "ls", store, "--json").strip() == "[]"


def test_data_in_memory_goes_to_a_store_in_memory(images, labels):
    matrix = extract((images, labels), model=tiny_models.Functional(), store="memory://two", name="x")
    assert len(matrix) == len(images)
    assert np.isfinite(np.asarray(matrix)).all()


def test_searches_share_solutions_through_a_bucket(s3, store, folder):
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV

    from estimators import Head2ToeClassifier

    X = extract(folder, store=store, name="a/x", **COMMON).select_layers("head")
    kept = f"{store}-paths"
    alone = GridSearchCV(Head2ToeClassifier(), {"alpha": [0.3, 0.6]}, cv=2)
    shared = clone(alone).set_params(estimator__memory=kept)
    expected = alone.fit(X, X.y).cv_results_["mean_test_score"]
    np.testing.assert_array_equal(shared.fit(X, X.y).cv_results_["mean_test_score"], expected)
    paths = {path for method, path in s3.seen if method == "PUT" and "-paths" in path}
    assert len(paths) >= 3  # two folds and the whole
    s3.seen.clear()
    np.testing.assert_array_equal(clone(shared).fit(X, X.y).cv_results_["mean_test_score"], expected)
    assert not [path for method, path in s3.seen if method == "PUT"]


def test_solutions_that_cannot_be_kept_in_a_bucket_are_returned_with_a_warning(s3):
    from estimators import Head2ToeClassifier

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 8)), np.arange(30) % 2
    with pytest.warns(UserWarning, match="What was solved is not kept: memory='s3://elsewhere/paths'"):
        fitted = Head2ToeClassifier(memory="s3://elsewhere/paths", alpha=0.5).fit(X, y)
    np.testing.assert_array_equal(fitted.coef_, Head2ToeClassifier(alpha=0.5).fit(X, y).coef_)
