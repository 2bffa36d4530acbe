"""Requests to an object store through obstore: credentials, retries and one-line errors."""

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from h2t_store.errors import H2TError, StoreError, UnreachableError

_SETTINGS = re.compile("(AWS|GOOGLE|AZURE)_")
_ATTEMPTS = 5
_TIMEOUT = timedelta(minutes=2)  # for 32 chunks of 8 MiB at once on a slow line
_PATIENT: Any = {
    "max_retries": 100,
    "backoff": {"max_backoff": timedelta(seconds=5)},
    "retry_timeout": timedelta(minutes=1),
}
_IMPATIENT: Any = {"max_retries": 6, "retry_timeout": timedelta(seconds=10)}

T = TypeVar("T")

_in_memory: dict[str, Any] = {}


def ask(url: str, key: str, question: Callable[[Any, Any], T], *, patient: bool = True) -> T:
    """Call ``question(obstore, client)``, again if the answer breaks off, which obstore itself does not retry.

    Errors name the ``key`` of the store ``url``: `FileNotFoundError` if there is no such object, `UnreachableError` if
    there is no answer or a refusal. An overloaded server is waited for: a minute if ``patient``, else seconds.
    """
    import obstore
    from obstore.exceptions import BaseError

    _require_no_fork(obstore, url)
    where, attempts = f"{url}/{key}" if key else url, _ATTEMPTS
    while True:
        try:
            return question(obstore, _client(url, patient))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, _one_line(error), where) from None
        except (BaseError, NotImplementedError) as error:
            attempts -= 1
            message = _one_line(error)
            broke_off = "body error" in message.replace(url, "").replace(key, "")
            if not attempts or not broke_off:
                raise UnreachableError(f"{where}: {message}") from None


def require_client(url: str) -> None:
    """Check that a store can be asked, within seconds if nothing answers."""

    def probe(obstore: Any, client: Any) -> None:
        with suppress(FileNotFoundError):
            obstore.head(client, "zarr.json")

    try:
        try:
            ask(url, "zarr.json", probe, patient=False)
        except UnreachableError as error:
            if "Server returned" not in str(error):
                raise
            ask(url, "zarr.json", probe)
    except ImportError:
        raise StoreError(f"store {url!r} needs obstore: pip install 'head2toe[s3]'") from None
    except H2TError:
        raise
    except ValueError as error:  # an environment variable that obstore does not accept
        raise StoreError(f"store {url!r}: {_one_line(error)}") from None


def _require_no_fork(obstore: Any, url: str) -> None:
    """Raise `StoreError` in a forked process, where obstore would wait for ever: its threads are not there.

    The first process is noted in obstore itself, because everything in this process shares its threads.
    """
    if obstore.__dict__.setdefault("_first_used_by", os.getpid()) != os.getpid():
        raise StoreError(
            f"store {url!r}: this process was forked from one that uses an object store; start processes by 'spawn' "
            "or 'forkserver' instead (for a DataLoader: multiprocessing_context='spawn')"
        )


def _one_line(error: Exception) -> str:
    """obstore's message without passwords, the body of the answer and debugging output."""
    message = re.sub(r"//[^/\s]*@", "//", str(error).strip().split("\n")[0].split(": <")[0])
    if code := re.search(r"<Code>(\w+)</Code>", str(error)):
        message = f"{message}: {code[1]}"
    if "builder error" in message:
        message = f"{message} (an endpoint with http:// needs AWS_ALLOW_HTTP=true)"
    if "169.254.169.254" in message:  # where a machine in a cloud asks for credentials
        message = f"no credentials in the environment, and none from this machine ({message})"
    return message


def _client(url: str, patient: bool) -> Any:
    if url.startswith("memory:"):
        from obstore.store import MemoryStore

        return _in_memory.setdefault(url, MemoryStore())
    settings = sorted(item for item in os.environ.items() if _SETTINGS.match(item[0]))
    return _remote_client(url, hash(tuple(settings)), patient)


@lru_cache
def _remote_client(url: str, settings: int, patient: bool) -> Any:
    """A client for the environment variables whose hash is ``settings``."""
    from obstore.store import from_url

    # Options given here replace those of the environment.
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true") and url.startswith("s3:")
    options: Any = {"timeout": _TIMEOUT, "allow_http": allowed}
    return from_url(url, retry_config=_PATIENT if patient else _IMPATIENT, client_options=options)
