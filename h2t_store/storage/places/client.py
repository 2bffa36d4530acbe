"""Requests to an object store through obstore: who asks, how often, and what is said when it goes wrong."""

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from threading import Lock
from typing import Any, TypeVar

from h2t_store.errors import H2TError, StoreError, UnreachableError

__all__ = ["ask", "require_client"]

_SETTINGS = re.compile("(AWS|GOOGLE|AZURE)_")
_OF_THE_MACHINE = "169.254.169.254"  # where a cloud tells a machine what it may
_TRIES = 5
_SLOWEST = timedelta(minutes=2)  # the longest that a chunk of 8 MiB may take, 32 of them at once
# An overloaded server is given a minute; whether there is one at all is found out in seconds.
_PATIENT: Any = {
    "max_retries": 100,
    "backoff": {"max_backoff": timedelta(seconds=5)},
    "retry_timeout": timedelta(minutes=1),
}
_IMPATIENT: Any = {"max_retries": 6, "retry_timeout": timedelta(seconds=10)}

T = TypeVar("T")

_in_memory: dict[str, Any] = {}
_making = Lock()


def ask(url: str, key: str, question: Callable[[Any, Any], T], *, retrying: Any = _PATIENT) -> T:
    """What a store answers; asking twice must do no harm.

    obstore asks again by itself, but not where an answer breaks off.

    Parameters
    ----------
    url : str
        The store.
    key : str
        What it is asked about, for messages.
    question : callable
        Called with obstore and its client of the store.

    Raises
    ------
    FileNotFoundError
        Where there is no such object.
    UnreachableError
        Where there is no answer, or a refusal: one line, which says nothing of what is stored.
    """
    import obstore
    from obstore.exceptions import BaseError

    _require_no_fork(obstore, url)
    where, tries = f"{url}/{key}" if key else url, _TRIES
    while True:
        try:
            return question(obstore, _client(url, retrying))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, _one_line(error), where) from None
        except (BaseError, NotImplementedError) as error:
            tries -= 1
            said = _one_line(error)
            if not tries or "body error" not in said.replace(url, "").replace(key, ""):
                raise UnreachableError(f"{where}: {said}") from None


def require_client(url: str) -> None:
    """Raise `StoreError` where no client can be made of address and environment, `UnreachableError` without answer."""

    def probe(obstore: Any, client: Any) -> None:
        with suppress(FileNotFoundError):
            obstore.head(client, "zarr.json")

    try:
        ask(url, "zarr.json", probe, retrying=_IMPATIENT)
    except ImportError:
        raise StoreError(f"store {url!r} needs obstore: pip install 'head2toe[s3]'") from None
    except UnreachableError as error:
        if "Server returned" not in str(error):
            raise
        ask(url, "zarr.json", probe)
    except H2TError:
        raise
    except ValueError as error:  # a setting in the environment that is none
        raise StoreError(f"store {url!r}: {_one_line(error)}") from None


def _require_no_fork(obstore: Any, url: str) -> None:
    """obstore's threads are gone in a process that was forked after they began: it would wait for ever.

    The first process is noted at obstore itself, where everything else in this process that uses it finds it, too.
    """
    if obstore.__dict__.setdefault("_first_used_by", os.getpid()) != os.getpid():
        raise StoreError(
            f"store {url!r}: this process was forked from one that uses an object store, which its client does not "
            "survive: start processes by 'spawn' or 'forkserver' (of a DataLoader: multiprocessing_context='spawn')"
        )


def _one_line(error: Exception) -> str:
    """What obstore says, without passwords, the answer's body and what is meant for its own makers."""
    said = re.sub(r"//[^/\s]*@", "//", str(error).strip().split("\n")[0].split(": <")[0])
    if code := re.search(r"<Code>(\w+)</Code>", str(error)):
        said = f"{said}: {code[1]}"
    if "builder error" in said:
        said = f"{said} (an endpoint with http:// needs AWS_ALLOW_HTTP=true)"
    if _OF_THE_MACHINE in said:
        said = f"no credentials in the environment, and the machine gives none ({said})"
    return said


def _client(url: str, retrying: Any) -> Any:
    if url.startswith("memory:"):
        from obstore.store import MemoryStore

        with _making:
            return _in_memory.setdefault(url, MemoryStore())
    settings = hash(tuple(sorted(item for item in os.environ.items() if _SETTINGS.match(item[0]))))
    return _remote_client(url, settings, retrying is _PATIENT)


@lru_cache
def _remote_client(url: str, settings: int, patient: bool) -> Any:
    from obstore.store import from_url

    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")  # options given here hide the environment's
    options: Any = {"timeout": _SLOWEST, "allow_http": allowed and url.startswith("s3:")}
    return from_url(url, retry_config=_PATIENT if patient else _IMPATIENT, client_options=options)
