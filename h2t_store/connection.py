"""Check in seconds whether a server can be reached, because libraries retry for most of a minute."""

import socket
import urllib.request
from urllib.parse import urlsplit

__all__ = ["why_unreachable"]

_CONNECT_SECONDS = 3


def why_unreachable(address: str) -> OSError | None:
    """Connect to a server; returns the error if that fails, None if a proxy would have to be asked."""
    if not urllib.request.getproxies():
        try:
            socket.create_connection((urlsplit(address).hostname, 443), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            return error
    return None
