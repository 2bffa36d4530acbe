"""Processes that die, meet each other, or find the disk full: what is left is right, or can be continued."""

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import MODELS

from h2t_store import cli, extract, open_features
from h2t_store.errors import H2TError, IncompleteError, StoppedError, StoreError
from h2t_store.repairing import repair
from h2t_store.storage.layout import ExtractionHeader, Layer
from h2t_store.storage.places import open_place
from h2t_store.storage.store import Extraction, FeatureStore
from h2t_store.storage.verify import verify

MODEL = f"{MODELS}:small_input"
FORK = multiprocessing.get_context("fork")
CALLS = ("open", "write", "rename", "replace", "link", "unlink", "mkdir", "fsync")
ROWS = 16
MOMENTS = int(os.environ.get("H2T_TEST_MOMENTS", "8"))  # of each kind of work; 1000000 for every one
LAYERS = (Layer("stem", 0, 5, (5, 2, 2)), Layer("layer1.0.conv2:in", 5, 1105, (1100,)))


@pytest.fixture(autouse=True)
def no_process_is_left_behind():
    yield
    while Child.started:
        Child.started.pop().kill()


class Child:
    """A forked process that does some work; what it raised is told by `result`."""

    started: ClassVar[list["Child"]] = []

    def __init__(self, work, *args) -> None:
        self.receiver, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._run, args=(sender, work, args))
        self.process.start()
        sender.close()
        self.started.append(self)

    @staticmethod
    def _run(sender, work, args) -> None:
        torch.set_num_threads(1)  # threads of the parent are not there after a fork
        try:
            sender.send(("done", work(*args)))
        except H2TError as error:
            sender.send((type(error).__name__, str(error)))
        except BaseException:
            sender.send(("crash", traceback.format_exc()))

    def result(self):
        """(what came of it, what was returned or the message)."""
        try:
            return self.receiver.recv()
        except EOFError:
            return "killed", None
        finally:
            self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run(work, *args, **settings):
    """Do something in a process of its own that must succeed."""
    kind, value = Child(partial(work, **settings), *args).result()
    assert kind == "done", value
    return value


def job(store: Path, name: str = "x", n: int = 160, **settings):
    """Extract so many random images."""
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    extract(
        (images, np.arange(n) % 4), model=MODEL, store=store, name=name, batch_size=8, rows_per_block=ROWS, **settings
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but what a crash may leave of one that was never finished."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    passing = re.compile(r"(^|/)\.(locks|trash)|\.partial$")
    files = {name: path for name, path in files.items() if not passing.search(name)}
    return {name: path.read_bytes() for name, path in files.items()}


def read(store: Path, name: str = "x") -> list[np.ndarray]:
    matrix = open_features(store, name)
    return [np.asarray(matrix), matrix.y, matrix.sample_ids, matrix.layer_norms()]


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def telling_job(store: Path, sender) -> None:
    """The job, which tells of every batch."""
    job(store, progress=lambda *_: sender.send_bytes(b"."))


def test_killed_at_any_moment_it_continues_to_the_same_bits(tmp_path):
    """A dozen of the hundred kills of benchmarks/durability.py, spread over the batches of a run."""
    run(job, tmp_path / "whole")
    whole, kills = tree(tmp_path / "whole/x"), 0
    for i in range(36):
        if kills == 12:
            break
        store = tmp_path / str(i)
        receiver, sender = FORK.Pipe(duplex=False)
        child = Child(telling_job, store, sender)
        sender.close()
        with contextlib.suppress(EOFError):
            for _ in range(i % 12 * 2):
                receiver.recv_bytes()
        child.kill()
        kills += child.process.exitcode == -signal.SIGKILL
        run(job, store)
        assert tree(store / "x") == whole
        assert list(verify(FeatureStore(store), "x")) == []
    assert kills == 12


def waiting_job(store: Path, begun, go_on, workers: int = 0) -> None:
    """The job, which waits after its second row block."""
    seen = []

    def stopped() -> bool:
        seen.append(1)
        if len(seen) == 2:
            begun.set()
            go_on.wait()
        return False

    job(store, stopped=stopped, workers=workers)


def test_a_second_writer_of_one_name_is_told_who_the_first_is(tmp_path):
    begun, go_on = FORK.Event(), FORK.Event()
    first = Child(waiting_job, tmp_path / "s", begun, go_on)
    assert begun.wait(60)
    kind, message = Child(job, tmp_path / "s").result()
    assert kind == "StoreError"
    assert message.startswith(f"{tmp_path / 's'}: x is being written by process {first.process.pid} on ")
    assert "\n" not in message
    with pytest.raises(StoreError, match="x is being written by"):
        repair(tmp_path / "s", "x")
    with pytest.raises(IncompleteError):
        open_features(tmp_path / "s", "x")
    run(job, tmp_path / "s", "another")
    go_on.set()
    assert first.result()[0] == "done"
    assert equal(read(tmp_path / "s"), read(tmp_path / "s", "another"))


def test_two_that_start_at_once_fill_one_extraction_once(tmp_path):
    for i in range(3):
        children = [Child(job, tmp_path / str(i), "a/x") for _ in range(2)]
        results = [child.result() for child in children]
        assert ("done", None) in results
        for kind, message in results:
            assert kind == "done" or "a/x is being written by " in message, message
        assert list(verify(FeatureStore(tmp_path / str(i)), "a/x")) == []


def test_writers_of_several_names_make_one_store_together(tmp_path):
    def make(barrier, name: str) -> None:
        barrier.wait()
        begin(tmp_path / "s", name)

    names = [f"a/b/{i}" for i in range(6)]
    barrier = FORK.Barrier(len(names))
    children = [Child(make, barrier, name) for name in names]
    for child in children:
        kind, message = child.result()
        assert kind == "done", message
    assert FeatureStore(tmp_path / "s").names() == names


@pytest.mark.parametrize("workers", [0, 2])
def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, workers):
    """Even while the processes that decoded images for it are still there."""
    begun, go_on = FORK.Event(), FORK.Event()
    child = Child(waiting_job, tmp_path / "s", begun, go_on, workers)
    assert begun.wait(60)
    child.kill()
    assert (tmp_path / "s/.locks/x").exists()
    run(job, tmp_path / "s")
    run(job, tmp_path / "whole")
    assert tree(tmp_path / "s/x") == tree(tmp_path / "whole/x")
    assert not (tmp_path / "s/.locks/x").exists()


@pytest.mark.parametrize("written", [0, 10, 32, 76])
def test_a_full_disk_is_one_line_and_the_same_call_goes_on_later(tmp_path, monkeypatch, written):
    job(tmp_path / "whole")
    real, calls = os.write, []

    def full(file: int, part) -> int:
        calls.append(file)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, part)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises((StoreError, OSError), match="No space left on device") as caught:
        job(tmp_path / "s")
    assert "\n" not in str(caught.value)
    begun = written > 20  # after metadata, labels and header
    if begun:
        committed = FeatureStore(tmp_path / "s").open("x").committed()
        assert not committed.all()
        assert committed.any() == (written == 76)
    monkeypatch.setattr(os, "write", real)
    again = []
    write = Extraction.write_block
    monkeypatch.setattr(
        Extraction, "write_block", lambda self, block, *rest, **o: (again.append(block), write(self, block, *rest, **o))
    )
    job(tmp_path / "s")
    assert tree(tmp_path / "s/x") == tree(tmp_path / "whole/x")
    if begun:
        assert again == np.flatnonzero(~committed).tolist()


def test_a_file_that_a_full_disk_cut_short_replaces_nothing(tmp_path):
    """The system writes what there is room for, and reports it as a success."""
    place = open_place(tmp_path / "zarr.json")
    place.write_whole(b"before")

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OSError, match="File too large"):
            place.write_whole(b"after" * 40)

    run(write)
    assert place.read() == b"before"


def test_the_command_says_in_one_line_that_a_file_cannot_grow(tmp_path):
    """A limit of the system instead of a full disk, met while a row block is written."""

    def limited(limit: int, log: Path) -> None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.argv = ["extract", "digits", "--model", f"{MODELS}:small_input", "--img-size", "8", "--taps", "layers.?"]
        sys.argv += ["--store", str(tmp_path / "s"), "--name", "x", "-b", "512", "-j", "0", "--target-size", "4096"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            cli.extract_main()
        except SystemExit as stop:
            sys.stderr.flush()
            if stop.code:
                raise StoreError(f"exit {stop.code}") from None

    kind, message = Child(limited, 100_000, tmp_path / "log").result()
    assert (kind, message) == ("StoreError", "exit 1")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "error" in line] == lines[-1:]
    assert "x cannot be written: File too large; finished row blocks are stored" in lines[-1]
    assert run(limited, 10**9, tmp_path / "log") is None
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []


def test_what_a_power_failure_took_is_computed_again(tmp_path, caplog):
    """Chunks are not forced to disk: after a power failure they can be empty though their block was committed."""
    run(job, tmp_path / "whole")
    asked = []

    def stop_late() -> bool:
        asked.append(1)
        return len(asked) == 5

    with pytest.raises(StoppedError):
        job(tmp_path / "s", stopped=stop_late)
    chunks = sorted((tmp_path / "s/x/features").rglob("c/*/*"))
    chunks[0].write_bytes(b"")
    next(path for path in chunks if path.parent.name == "3").unlink()
    job(tmp_path / "s")
    assert [record.args[1] for record in caplog.records if "computed again" in record.msg] == [0, 3]
    assert tree(tmp_path / "s/x") == tree(tmp_path / "whole/x")


@pytest.mark.parametrize("extending", [False, True])
def test_what_was_not_forced_to_disk_may_be_lost(tmp_path, monkeypatch, extending):
    """A power failure at its worst: after it, every file is empty that was not forced to disk."""
    n = 56 if extending else 40
    run(job, tmp_path / "whole", n=40)
    if extending:
        shutil.copytree(tmp_path / "whole", tmp_path / "s")
        run(job, tmp_path / "whole", n=n, append=True)
    settings, real, forced, asked = dict(n=n, append=extending), os.fsync, set(), []

    def force(file: int) -> None:
        real(file)
        forced.add(os.fstat(file).st_ino)

    def stop_late() -> bool:
        asked.append(1)
        return len(asked) == (1 if extending else 2)

    monkeypatch.setattr(os, "fsync", force)
    with pytest.raises(StoppedError):
        job(tmp_path / "s", stopped=stop_late, **settings)
    for file in (tmp_path / "s/x").rglob("*"):
        if file.is_file() and file.stat().st_ino not in forced:
            file.write_bytes(b"")
    job(tmp_path / "s", **settings)
    assert tree(tmp_path / "s/x") == tree(tmp_path / "whole/x")


def test_a_disk_that_fails_during_an_extension_loses_nothing(tmp_path, monkeypatch):
    job(tmp_path / "s", n=40)
    before, real = read(tmp_path / "s"), os.write
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    more = np.concatenate([images, images[::-1]])
    common = dict(model=MODEL, store=tmp_path / "s", name="x", batch_size=8, rows_per_block=ROWS, append=True)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StoreError, match="x cannot be written: Input/output error"):
        extract((more, np.arange(80) % 4), **common)
    assert equal(read(tmp_path / "s"), before)
    monkeypatch.setattr(os, "write", real)
    after = np.asarray(extract((more, np.arange(80) % 4), **common))
    assert np.array_equal(after[:40], before[0])
    assert len(after) == 80


def test_a_store_that_cannot_be_written_is_read_and_says_so(tmp_path, monkeypatch):
    job(tmp_path / "s")
    before = read(tmp_path / "s")
    for call in ("mkdir", "rename", "replace", "unlink", "link", "open"):
        real = getattr(os, call)

        def refuse(*args, _real=real, _call=call, **kwargs):
            if _call == "open" and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                return _real(*args, **kwargs)
            if _call == "mkdir" and Path(args[0]).exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(args[0]))
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

        monkeypatch.setattr(os, call, refuse)
    assert equal(read(tmp_path / "s"), before)
    assert list(verify(FeatureStore(tmp_path / "s"), "x")) == []
    job(tmp_path / "s")
    with pytest.raises(StoreError, match="y cannot be written: Read-only file system"):
        job(tmp_path / "s", "y")
    with pytest.raises(StoreError, match="cannot be made: Read-only file system"):
        job(tmp_path / "new")
    with pytest.raises(StoreError, match="x cannot be written: Read-only file system"):
        repair(tmp_path / "s", "x")


# What follows stops a process at each of its calls that change files, one run per call, and tears writes in half.


def header(n: int) -> ExtractionHeader:
    provenance = {"inputs": {"model": "m", "data": {"n": n}}, "environment": {}}
    return ExtractionHeader(n, ROWS, "float16", ("a", "b"), LAYERS, provenance)


def begin(store: Path, name: str = "x", n: int = 40) -> Extraction:
    return FeatureStore(store, create=True).begin(name, header(n), np.arange(n) % 2, list(map(str, range(n))))


def values(n: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 1105)).astype(np.float16)[:n]
    digests = rng.integers(0, 256, (60, 16), dtype=np.uint8)[:n]
    parts = np.split(features, [5], axis=1)
    return parts, np.stack([np.linalg.norm(part.astype(np.float32), axis=1) for part in parts], axis=1), digests


def write_missing(extraction: Extraction, seen: list[tuple[int, int]] | None = None) -> None:
    """Row blocks that are missing, without rows that are known; samples 3 and 41 are skipped."""
    n = extraction.header.n_samples
    parts, norms, digests = values(n)
    for block in np.flatnonzero(~extraction.committed()).tolist():
        known = extraction.known_rows(block)
        first, stop = block * ROWS + known, min(block * ROWS + ROWS, n)
        failures = {row - first: "not an image" for row in (3, 41) if first <= row < stop}
        rows = slice(first, stop)
        extraction.write_block(block, [part[rows] for part in parts], norms[rows], digests[rows], failures, known=known)
        if seen is not None:
            seen.append((block, known))


def filling(store: Path) -> None:
    opened = FeatureStore(store, create=True)
    with opened.lock("a/x"):
        extraction = begin(store, "a/x")
        if not extraction.complete:
            write_missing(extraction)
            extraction.finish()


def appending(store: Path) -> list[tuple[int, int]]:
    opened, seen = FeatureStore(store), []
    with opened.lock("a/x"):
        extraction = opened.open("a/x")
        if extraction.header.n_samples == 40:
            extraction = opened.extend("a/x", header(60), np.arange(60) % 2, list(map(str, range(60))))
        else:
            extraction = begin(store, "a/x", 60)
        if not extraction.complete:
            write_missing(extraction, seen)
            extraction.finish()
    return seen


def reopening(store: Path) -> None:
    extraction = FeatureStore(store).open("a/x")
    if extraction.complete:
        extraction.reopen([0, 2])
    write_missing(extraction)
    extraction.finish()


def removing(store: Path) -> None:
    opened = FeatureStore(store)
    if "a/x" in opened.names():
        opened.remove("a/x")


def dying(work, store: Path, at: int) -> int:
    """Work until call number ``at`` that changes files, then be gone, half-way where it writes; how many calls came."""
    count = 0

    def watch(name: str, real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os._exit(0)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, watch(name, getattr(os, name)))
    work(store)
    return count


@pytest.mark.parametrize("work", [filling, appending, reopening, removing], ids=lambda work: work.__name__)
def test_stopped_before_any_call_it_is_the_old_or_can_be_continued(tmp_path, work):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    if work is not filling:
        filling(old)
    shutil.copytree(old, new)
    before = None if work is filling else read(old, "a/x")
    total = run(dying, work, new, 0)
    after = None if work is removing else read(new, "a/x")
    expected = tree(new)
    for at in moments(total):
        store = tmp_path / f"{at}"
        shutil.copytree(old, store)
        kind, message = Child(dying, work, store, at).result()
        assert kind in ("killed", "done"), (at, message)  # threads that meet make a call more or less
        with contextlib.suppress(StoreError):
            found = read(store, "a/x")
            assert any(known is not None and equal(found, known) for known in (before, after)), at
        run(work, store)
        assert tree(store) == expected, at
        shutil.rmtree(store)


def moments(total: int) -> list[int]:
    """Numbers of calls, spread evenly, and the last ones."""
    step = max(1, total // MOMENTS)
    return sorted({*range(1, total + 1, step), *range(max(1, total - 3), total + 1)})


def test_a_kill_amid_an_extension_costs_no_stored_row_and_earlier_readers_see_right_rows_or_an_error(tmp_path):
    """The third row block grows from 8 rows to 16; readers have read some of it, all of it or nothing before."""
    old = tmp_path / "old"
    filling(old)
    known = read(old, "a/x")
    shutil.copytree(old, tmp_path / "count")
    total, expected = run(dying, appending, tmp_path / "count", 0), tree(tmp_path / "count")
    for at in moments(total):
        store = tmp_path / f"{at}"
        shutil.copytree(old, store)
        readers = [open_features(store, "a/x") for _ in range(3)]
        np.asarray(readers[0]), readers[0].layer_norms(), np.asarray(readers[1][:, :5])
        Child(dying, appending, store, at).result()
        for _ in range(2):
            for reader in readers:
                for i, ask in enumerate((np.asarray, lambda X: X.y, lambda X: X.sample_ids, lambda X: X.layer_norms())):
                    with contextlib.suppress(StoreError):
                        assert np.array_equal(ask(reader), known[i]), at
            seen = run(appending, store)
            assert {number for number, _ in seen} <= {2, 3}
            assert all(rows == 8 for number, rows in seen if number == 2), (at, seen)
        assert tree(store) == expected, at
        assert list(verify(FeatureStore(store), "a/x")) == []
        shutil.rmtree(store)


def test_an_extension_that_is_given_up_at_any_moment_is_followed_by_another(tmp_path):
    """The images that were to be added are others when it is tried again."""
    old = tmp_path / "old"
    filling(old)
    direct = tmp_path / "direct"
    shutil.copytree(old, direct)
    run(appending, direct)

    def another(store: Path) -> None:
        """To 50 other rows, then not at all."""
        opened = FeatureStore(store)
        extraction = opened.open("a/x")
        if extraction.header.n_samples == 40:
            extraction = opened.extend("a/x", header(50), np.arange(50) % 2, list(map(str, range(50))))
        write_missing(extraction)
        opened.open("a/x").roll_back()

    total = run(dying, another, shutil.copytree(old, tmp_path / "count"), 0)
    for at in moments(total):
        store = tmp_path / f"{at}"
        shutil.copytree(old, store)
        Child(dying, another, store, at).result()

        def finish(store: Path) -> None:
            opened = FeatureStore(store)
            if opened.open("a/x").header.n_samples == 50:
                opened.open("a/x").roll_back()
            extraction = opened.begin("a/x", header(40), np.arange(40) % 2, list(map(str, range(40))))
            if not extraction.complete:
                write_missing(extraction)
                extraction.finish()
            assert list(verify(opened, "a/x")) == []
            appending(store)

        run(finish, store)
        assert tree(store) == tree(direct), at
        shutil.rmtree(store)


def test_an_interrupted_repair_continues(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    settings = dict(data=(images, None))
    job_of = lambda store: extract((images, None), model=MODEL, store=store, name="x", rows_per_block=ROWS)  # noqa: E731
    run(lambda: job_of(tmp_path / "s") and None)
    sound = tree(tmp_path / "s")
    for path in ("zarr.json", "x/features/zarr.json", "x/features/head/zarr.json", "x/features/head/c/1/0", "x/y/c/0"):
        content = (tmp_path / "s" / path).read_bytes()
        (tmp_path / "s" / path).write_bytes(content[:-3])
    fix = lambda store: repair(store, "x", **settings) and None  # noqa: E731
    shutil.copytree(tmp_path / "s", tmp_path / "count")
    total = run(dying, fix, tmp_path / "count", 0)
    for at in moments(total):
        store = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "s", store)
        assert Child(dying, fix, store, at).result()[0] in ("killed", "done")
        run(fix, store)
        assert tree(store) == sound, at
        shutil.rmtree(store)
