"""A lock in an object store, which knows nothing but to create an object that is not there, and to delete one.

Who creates ``1`` holds the lock, until they delete it, and changes their ``beat`` while they live. Where the beat has
stopped, who creates ``2`` holds it, and so on: of several that take over, one can create the next number. Whoever
finds a number beside their own that they did not see before gives theirs back, so that at most one goes on.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from h2t_store.errors import StoreError
from h2t_store.places.interface import LockedError, Place

__all__ = ["lease"]

_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 60.0
_LOOK_SECONDS = 1.0


class Exclusive(Place, Protocol):
    """A place where an object can be made that must not be there."""

    def create(self, content: bytes) -> bool:
        """Write it; whether it was not there."""


@contextmanager
def lease(place: Exclusive, who: str) -> Iterator[Callable[[], bool]]:
    """Hold the lock that ``place`` names; see `h2t_store.places.Place.lock`."""
    mine = {"id": uuid.uuid4().hex, "who": who, "machine": _machine(), "process": _process(os.getpid())}
    beat = place / f"beat-{mine['id']}"
    number = _acquire(place, mine)
    done, lost = threading.Event(), threading.Event()

    def live() -> None:
        count = 0
        while not done.wait(_BEAT_SECONDS if count else 0):
            count += 1
            with suppress(StoreError):  # the next one may get through
                beat.write_whole(str(count).encode())
                if _holder(place, number).get("id") != mine["id"]:
                    lost.set()
                    return

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield lost.is_set
    finally:
        done.set()
        thread.join()
        if not lost.is_set():
            (place / str(number)).remove()
        beat.remove()


def _acquire(place: Exclusive, mine: dict[str, Any]) -> int:
    before = _holders(place)
    if before:
        _require_ended(place, before[max(before)])
    number = max(before, default=0) + 1
    if not (place / str(number)).create(json.dumps(mine).encode()):
        raise LockedError(_told(_holder(place, number)))
    for other, holder in _holders(place).items():
        if other != number and holder != before.get(other):
            (place / str(number)).remove()
            raise LockedError(_told(holder))
    for old, holder in before.items():
        (place / str(old)).remove()
        (place / f"beat-{holder.get('id')}").remove()
    return number


def _told(holder: dict[str, Any]) -> str:
    return str(holder.get("who", "another process"))


def _holders(place: Exclusive) -> dict[int, dict[str, Any]]:
    numbers = [int(path) for path, _ in place.files() if path.isdecimal()]
    return {number: _holder(place, number) for number in numbers}


def _require_ended(place: Exclusive, holder: dict[str, Any]) -> None:
    """Raise `LockedError` unless a holder lives no more, which can take a minute to see."""
    locked = LockedError(_told(holder))
    if holder.get("machine") == _machine() is not None:
        if _process(str(holder.get("process")).partition(" ")[0]) == holder.get("process"):
            raise locked
        return
    beat = place / f"beat-{holder.get('id')}"
    heard, until = _content(beat), time.monotonic() + _SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        if _content(beat) != heard:
            raise locked


def _holder(place: Exclusive, number: int) -> dict[str, Any]:
    with suppress(ValueError):
        holder = json.loads(_content(place / str(number)))
        if isinstance(holder, dict):
            return holder
    return {}


def _content(place: Exclusive) -> bytes:
    with suppress(FileNotFoundError):
        return place.read()
    return b""


def _machine() -> str | None:
    """Within what a process number means one process; None where that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{platform.node()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process(number: int | str) -> str | None:
    """A process, with the time of its start, as numbers come again; None where it does not run."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return f"{number} {file.read().rpartition(')')[2].split()[19]}"
    except OSError:
        return None
