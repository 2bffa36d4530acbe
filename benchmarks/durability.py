"""What a store survives: kills at random moments, flipped bytes, lost, exchanged and cut files.

    python benchmarks/durability.py [--kills 100] [--flips 1000] [--deletes 100] [--seed 0] [--json FILE]

Kills: the command ``extract`` runs in a process of its own, forked from this one so that a run does not pay for
importing torch. It is killed (SIGKILL) at a moment drawn uniformly from the duration of a whole run, every other time
together with the processes that decode images for it, otherwise alone, so that those outlive it. Then the same command
runs again, every fourth time to be killed once more before the last run. What is there in the end is compared with an
extraction that nobody disturbed: values, labels, identifiers, norms, and every file byte for byte.

Damage: one thing at a time is done to a finished extraction with several row blocks and some skipped images, then
undone. ``h2t verify`` must name the file, and reading everything must end in an error or give the original values.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, machine
from PIL import Image

from h2t_store import cli, extracting, open_features
from h2t_store.errors import H2TError, IncompleteError
from h2t_store.storage.store import FeatureStore
from h2t_store.storage.verify import verify

MODEL = f"{HERE.parent / 'tests/tiny_models.py'}:small_input"
NAME = "pets/train"
_ARRAYS = ("layer_norms", "digests", "failures", "checksums", "committed", "y", "sample_ids")


def write_images(folder: Path, n: int, broken: int = 0) -> Path:
    """Random images of 8 x 8 pixels in ten class folders; the last few are none."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"class{i % 10}" / f"{i:05d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < n - broken:
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        else:
            path.write_text("not an image")
    return folder


def start(data: Path, store: Path, *options: str, name: str = NAME) -> int:
    """Begin the command in a new process group; its identifier."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        log = os.open(f"{store}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        assert extracting  # imported before the fork
        torch.set_num_threads(1)
        sys.argv = ["extract", str(data), "--model", MODEL, "--store", str(store), "--name", name, *options]
        cli.extract_main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(pid: int, store: Path) -> None:
    """Wait for a command that must succeed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise SystemExit(f"extract ended with {code}:\n{Path(f'{store}.log').read_text()}")


def killed(pid: int, moment: float, group: bool) -> bool:
    """Kill the command after so many seconds; False where it had ended before."""
    time.sleep(moment)
    ended = os.waitpid(pid, os.WNOHANG)[0] == pid
    if not ended:
        (os.killpg if group else os.kill)(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL
    return not ended


def phase(store: Path) -> str:
    """How far a killed run had come."""
    if not (store / "zarr.json").exists():
        return "before there was a store"
    try:
        extraction = FeatureStore(store).find(NAME)
    except H2TError as error:
        return f"ERROR {error}"
    if extraction is None:
        created = any((store / NAME).glob("**/zarr.json"))
        return "while arrays were created" if created else "before arrays were created"
    if extraction.complete:
        return "after the end"
    done = extraction.committed()
    return "before the end was marked" if done.all() else f"with {int(done.sum())} of {len(done)} row blocks"


def content(store: Path, name: str = NAME) -> dict[str, Any]:
    """Everything that can be read of an extraction, and the bytes of its files."""
    return readable(store, name) | {"files": files_of(store / name)}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of an extraction, but for what a kill left of one."""
    found = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".partial"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def readable(store: Path, name: str = NAME) -> dict[str, Any]:
    """Everything that can be read of an extraction."""
    matrix = open_features(store, name)
    return {
        "X": np.asarray(matrix),
        "codes": matrix.codes,
        "sample_ids": matrix.sample_ids,
        "layer_norms": matrix.layer_norms(),
        "failures": matrix.failures,
        "classes": matrix.classes,
        "layers": matrix.layers,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two of these are equal to the bit."""
    return a.keys() == b.keys() and all(
        (a[key].shape == b[key].shape and a[key].tolist() == b[key].tolist())
        if key == "sample_ids"
        else (a[key].dtype == b[key].dtype and a[key].tobytes() == b[key].tobytes())
        if isinstance(a[key], np.ndarray)
        else a[key] == b[key]
        for key in a
    )


def kills(n: int, work: Path, rng: np.random.Generator, n_images: int = 5120) -> dict[str, Any]:
    """Kill and resume ``n`` times; how many ended in the same bits, and where the kills came."""
    data, whole = write_images(work / "images", n_images), work / "whole.zarr"
    durations = []
    for _ in range(3):
        shutil.rmtree(whole, ignore_errors=True)
        began = time.perf_counter()
        finish(start(data, whole), whole)
        durations.append(time.perf_counter() - began)
    duration, expected = sorted(durations)[1], content(whole)
    identical, phases, too_late, kills_in_all, unequal = 0, Counter[str](), 0, 0, []
    done = 0
    while done < n:
        store = work / f"killed{done}.zarr"
        moment, group = float(rng.uniform(0, duration)), done % 2 == 0
        pid = start(data, store)
        if not killed(pid, moment, group):
            too_late += 1
            shutil.rmtree(store)
            continue
        phases[phase(store)] += 1
        kills_in_all += 1
        pids = [pid]
        if done % 4 == 3:
            pids.append(start(data, store))
            kills_in_all += killed(pids[-1], float(rng.uniform(0, duration)), group)
        finish(start(data, store), store)
        damages = list(verify(FeatureStore(store), NAME))
        equal = not damages and same(content(store), expected)
        identical += equal
        if not equal:
            unequal.append({"moment": moment, "damages": [str(damage) for damage in damages]})
        for pid in pids:
            _end_group(pid)
        shutil.rmtree(store)
        Path(f"{store}.log").unlink()
        done += 1
    return {
        "images": n_images,
        "row_blocks": sum(path.startswith("committed/c/") for path in expected["files"]),
        "seconds_of_a_run": duration,
        "kills": n,
        "kills_with_second_ones": kills_in_all,
        "identical": identical,
        "unequal": unequal,
        "ended_before_the_kill_and_drawn_again": too_late,
        "phases": dict(sorted(phases.items())),
    }


def _end_group(pid: int) -> None:
    """Processes that decoded images for a killed one end by themselves, but there is no need to wait."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class Damaged:
    """A finished extraction to which things are done, one at a time, and a count of what came of them."""

    def __init__(self, work: Path) -> None:
        self.store = work / "sound.zarr"
        data = write_images(work / "some images", 5120, broken=3)
        for name in (NAME, "other"):
            seed = ("--no-pretrained", "--seed", "1") if name == "other" else ()
            finish(start(data, self.store, "--on-error", "skip", *seed, name=name), self.store)
        self.expected = readable(self.store)
        folder = self.store / NAME
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.chunks = [path for path in self.files if path.name != "zarr.json"]
        self.files += [self.store / "zarr.json", self.store / "pets/zarr.json"]
        self.count: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []

    def judge(self, kind: str, what: str, damaged: list[Path], *, all_named: bool = True) -> None:
        """Does verify name the files, and does reading give nothing but the truth?"""
        count = self.count.setdefault(kind, Counter())
        count["done"] += 1
        found = {damage.path for damage in verify(FeatureStore.unchecked(self.store), NAME)}
        named = [str(path.relative_to(self.store)) in found for path in damaged]
        if all(named) if all_named else any(named):
            count["named by verify"] += 1
        else:
            self.wrong.append(f"{kind}: {what}: verify found {sorted(found)}")
        try:
            read = readable(self.store)
        except IncompleteError:
            count["refused"] += 1
        except H2TError:
            count["refused"] += 1
        else:
            if same(read, self.expected):
                count["read as it was"] += 1
            else:
                self.wrong.append(f"{kind}: {what}: other values were read")

    def change(self, kind: str, path: Path, new: Callable[[bytes], bytes | None]) -> None:
        """Change one file, look, and change it back."""
        sound = path.read_bytes()
        changed = new(sound)
        if changed is None:
            path.unlink()
        else:
            path.write_bytes(changed)
        self.judge(kind, str(path.relative_to(self.store)), [path])
        path.write_bytes(sound)

    def exchange(self, kind: str, pairs: list[tuple[Path, Path]]) -> None:
        """Exchange files pair by pair, look, and exchange them back."""
        sound = {path: path.read_bytes() for pair in pairs for path in pair}
        for a, b in pairs:
            a.write_bytes(sound[b])
            b.write_bytes(sound[a])
        changed = [path for pair in pairs for path in pair if sound[pair[0]] != sound[pair[1]]]
        self.judge(kind, str(pairs[0][0].relative_to(self.store)), changed, all_named=len(pairs) == 1)
        for path, data in sound.items():
            path.write_bytes(data)


def flipped(rng: np.random.Generator) -> Callable[[bytes], bytes]:
    """One byte gets another value."""

    def change(data: bytes) -> bytes:
        at = int(rng.integers(len(data)))
        return data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]

    return change


def damages(n_flips: int, n_deletes: int, work: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Do everything that can be done to a file; what verify and readers made of it."""
    subject = Damaged(work)
    sizes = np.array([path.stat().st_size for path in subject.files], dtype=float)
    some = max(1, n_deletes // 2)
    for i in range(n_flips):  # half of them by file, so that small ones have their share; half by byte
        share = None if i % 2 else sizes / sizes.sum()
        subject.change("flipped byte", subject.files[int(rng.choice(len(sizes), p=share))], flipped(rng))
    for i in rng.choice(len(subject.chunks), min(n_deletes, len(subject.chunks)), replace=False):
        subject.change("deleted chunk", subject.chunks[int(i)], lambda data: None)
    documents = [path for path in subject.files if path.name == "zarr.json"]
    for path in documents:
        subject.change("deleted metadata", path, lambda data: None)
    for i in rng.choice(len(subject.files), some):
        path = subject.files[int(i)]
        subject.change("truncated file", path, lambda data: data[: int(rng.integers(1, len(data)))])
        subject.change("extended file", path, lambda data: data + rng.bytes(int(rng.integers(1, 99))))
        subject.change("emptied file", path, lambda data: b"")
    for a, b in _pairs(subject, rng, some):
        subject.exchange("exchanged chunks of one size", [(a, b)])
    folder = subject.store / NAME
    for first, second in ((0, 1), (1, 2), (0, 2)):
        pairs = []
        for path in sorted(path for path in subject.chunks if f"/c/{first}" in str(path.parent) + "/" + path.name):
            parts = list(path.relative_to(folder).parts)
            if parts[0] in ("y", "sample_ids", "committed"):
                continue
            parts[parts.index("c") + 1] = str(second)
            pairs.append((path, folder.joinpath(*parts)))
        subject.exchange("exchanged row blocks with their checksums", pairs)
    _copy_from_another(subject)
    return {
        "files": len(subject.files),
        "counts": {kind: dict(count) for kind, count in subject.count.items()},
        "wrong": subject.wrong,
    }


def _pairs(subject: Damaged, rng: np.random.Generator, n: int) -> Iterator[tuple[Path, Path]]:
    by_size: dict[int, list[Path]] = {}
    for path in subject.chunks:
        by_size.setdefault(path.stat().st_size, []).append(path)
    pairs = [
        (a, b)
        for paths in by_size.values()
        for i, a in enumerate(paths)
        for b in paths[i + 1 :]
        if a.read_bytes() != b.read_bytes()
    ]
    for i in rng.choice(len(pairs), min(n, len(pairs)), replace=False):
        yield pairs[int(i)]


def _copy_from_another(subject: Damaged) -> None:
    """The features (then checksums, norms, attributes, too) of another extraction over this one's."""
    folder, other, kept = subject.store / NAME, subject.store / "other", subject.store.with_name("kept")
    shutil.copytree(folder, kept)
    for parts in (["features"], ["features", *_ARRAYS], ["features", "checksums", "zarr.json"]):
        for part in parts:
            if (other / part).is_dir():
                shutil.rmtree(folder / part)
                shutil.copytree(other / part, folder / part)
            else:
                shutil.copyfile(other / part, folder / part)
        subject.judge("copied from another extraction", " ".join(parts), subject.files, all_named=False)
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--deletes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    where = machine(1)
    print(where, flush=True)
    rng = np.random.default_rng(args.seed)
    report: dict[str, Any] = {"machine": where, "seed": args.seed}
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            report["kills"] = result = kills(args.kills, Path(folder), rng)
            print("{images} images, {row_blocks} row blocks, {seconds_of_a_run:.2f} s a run".format(**result))
            print(f"{'killed and resumed':44}{result['kills']:6}{result['identical']:8} bit-identical")
            for kind, count in result["phases"].items():
                print(f"  {kind:42}{count:6}")
            bad += result["kills"] - result["identical"]
        if args.flips or args.deletes:
            report["damage"] = result = damages(args.flips, args.deletes, Path(folder), rng)
            print(f"\n{'':44}{'done':>6}{'named':>8}{'refused':>9}{'read as it was':>16}")
            for kind, count in result["counts"].items():
                row = [count.get(key, 0) for key in ("done", "named by verify", "refused", "read as it was")]
                print(f"{kind:44}{row[0]:6}{row[1]:8}{row[2]:9}{row[3]:16}")
            for wrong in result["wrong"]:
                print(wrong)
            bad += len(result["wrong"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
