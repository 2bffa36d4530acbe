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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from h2t_store.errors import UnreachableError
from h2t_store.storage.places.interface import LockedError, Lost, Place

__all__ = ["lease"]

_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 60.0
_LOOK_SECONDS = 1.0

_held: set[str] = set()  # by this process


class Exclusive(Place, Protocol):
    """A place where an object can be made that must not be there."""

    def create(self, content: bytes) -> bool:
        """Write it; whether it was not there."""


@contextmanager
def lease(place: Exclusive, who: str) -> Iterator[Lost]:
    """Hold the lock that ``place`` names; see `h2t_store.storage.places.Place.lock`."""
    me = uuid.uuid4().hex
    mine = {"id": me, "who": who, "machine": _machine(), "process": _process(os.getpid())}
    beat = place / f"beat-{me}"
    _held.add(me)
    try:
        number = _acquire(place, mine)
    except BaseException:
        _held.discard(me)
        raise
    done, gone = threading.Event(), threading.Event()

    def lost(*, ask: bool = False) -> bool:
        if ask and _holder(place, number).get("id") != me:
            gone.set()
        return gone.is_set()

    def live() -> None:
        count = 0
        while not done.wait(_BEAT_SECONDS if count else 0):
            count += 1
            with suppress(UnreachableError):  # the next one may get through
                beat.write_whole(str(count).encode())
                if lost(ask=True):
                    return

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        done.set()
        thread.join()
        _held.discard(me)
        with suppress(UnreachableError):  # then who comes next finds out that nobody holds it
            if not lost(ask=True):
                (place / str(number)).remove()
            beat.remove()


def _acquire(place: Exclusive, mine: dict[str, Any]) -> int:
    before = _holders(place)
    for holder in before.values():
        _require_ended(place, holder)
    number = max(before, default=0) + 1
    try:
        if not (place / str(number)).create(json.dumps(mine).encode()):
            raise LockedError(_told(_holder(place, number)))
        now = _holders(place)
        others = [holder for at, holder in now.items() if at != number and holder != before.get(at)]
        if others or now.get(number) != mine:
            raise LockedError(_told(others[0] if others else now.get(number, {})))
    except BaseException:
        with suppress(UnreachableError):
            if _holder(place, number).get("id") == mine["id"]:
                (place / str(number)).remove()
        raise
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
        process = str(holder.get("process"))
        if process == _process(os.getpid()) and holder.get("id") not in _held:
            return
        if _process(process.partition(" ")[0]) == process:
            raise locked
        return
    beat = place / f"beat-{holder.get('id')}"
    heard, until = _content(beat), time.monotonic() + _SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        if _content(beat) != heard:
            raise locked


def _holder(place: Exclusive, number: int) -> dict[str, Any]:
    with suppress(json.JSONDecodeError, UnicodeDecodeError):
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
    """A process, with the time of its start, as numbers come again; None where it does not run, or has ended unread."""
    try:
        with open(f"/proc/{number}/stat") as file:
            state, *rest = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{number} {rest[18]}"
