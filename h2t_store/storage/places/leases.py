"""A lock in an object store, built on exclusive creation.

A lock is a folder of numbered objects. The highest number is the holder, who renews that object; an empty object is a
lock given back. To take a lock that is free or whose holder is dead, create the next number: only one process can.
"""

import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from filelock import FileLock, Timeout

from h2t_store.errors import UnreachableError
from h2t_store.storage.places.interface import LockedError, Lost, Place


class Exclusive(Place, Protocol):
    def create(self, content: bytes) -> bool:
        """Write an object unless there is one; whether it was written."""


@contextmanager
def lease(place: Exclusive, who: str, *, beat: float = 10.0, silence: float = 60.0) -> Iterator[Lost]:
    """Hold the lock ``place``, renewed every ``beat`` seconds; who is silent for ``silence`` seconds counts as dead."""
    before = _numbers(place)
    if before:
        _require_dead(place / str(before[-1]), beat, silence)
    # The system frees the lock of this file when the process dies, which others on this machine see at once.
    me = uuid.uuid4().hex
    alive = FileLock(_file_of(me), blocking=False, thread_local=False)
    holder: dict[str, Any] = {"who": who, "id": me, "beat": 0}
    number = max(before, default=0) + 1
    record, done, gone = place / str(number), threading.Event(), threading.Event()

    def lost(*, ask: bool = False) -> bool:
        if ask and _numbers(place)[-1:] != [number]:
            gone.set()
        return gone.is_set()

    def renew() -> None:
        while not done.wait(beat) and not lost():
            holder["beat"] += 1
            with suppress(UnreachableError):  # the next attempt may get through
                record.write_whole(json.dumps(holder).encode())
                lost(ask=True)

    thread = threading.Thread(target=renew, daemon=True)
    with suppress(OSError):  # without the file, others wait for the silence
        alive.acquire()
    try:
        if not record.create(json.dumps(holder).encode()):
            raise LockedError(_holder(record).get("who", "another process"))
        thread.start()
        if lost(ask=True):  # the number was free because a later holder had removed it
            raise LockedError("another process")
        for old in before:
            (place / str(old)).remove()
        yield lost
    finally:
        done.set()
        if thread.ident:
            thread.join()
        alive.release()
        with suppress(UnreachableError, OSError):  # others find the file unlocked
            if _holder(record).get("id") == me:
                record.write_whole(b"")
            os.remove(_file_of(me))


def _file_of(holder: str) -> str:
    """The file that a holder on this machine keeps locked; never another one, whatever the object says."""
    return os.path.join(tempfile.gettempdir(), f"h2t-{uuid.UUID(holder).hex}.lock")


def _numbers(place: Exclusive) -> list[int]:
    return sorted(int(path) for path, _ in place.files() if path.isdecimal())


def _holder(record: Exclusive) -> dict[str, Any]:
    """Who holds a lock; empty where it was given back."""
    with suppress(FileNotFoundError, ValueError):
        return dict(json.loads(record.read()))
    return {}


def _require_dead(record: Exclusive, beat: float, silence: float) -> None:
    """Raise `LockedError` unless a lock was given back or its holder is dead."""
    holder, until = _holder(record), time.monotonic() + silence
    with suppress(PermissionError, ValueError):  # of another user, or no such identifier
        file = _file_of(str(holder.get("id")))
        if os.path.exists(file):
            try:
                with FileLock(file, blocking=False):
                    os.remove(file)
                return
            except Timeout:
                raise LockedError(holder["who"]) from None
    while holder and time.monotonic() < until:
        time.sleep(beat / 10)
        if _holder(record) != holder:
            raise LockedError(holder["who"])
