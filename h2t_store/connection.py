"""Whether a server can be reached, in seconds: what fetches from it would go on trying for most of a minute."""

import socket
import urllib.request
from urllib.parse import urlsplit

__all__ = ["why_unreachable"]

_CONNECT_SECONDS = 3


def why_unreachable(address: str) -> OSError | None:
    """What keeps this machine from a server; None where nothing does, or a proxy would have to be asked."""
    if urllib.request.getproxies():
        return None
    try:
        socket.create_connection((urlsplit(address).hostname, 443), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error
    return None
