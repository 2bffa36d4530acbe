"""An S3 server on this machine (moto's), and before it a proxy that counts requests and fails some of them."""

import http.client
import logging
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
FAULTS = ("an error", "an error afterwards", "no answer", "no answer afterwards", "half an answer", "a late answer")


class S3:
    """Where to send requests, and what becomes of them.

    Attributes
    ----------
    address : str
        Endpoint.
    rate : float
        Share of requests that one of ``faults`` befalls, until it befell ``most``.
    seen : list of (str, str)
        Method and key of each request that came.
    """

    def __init__(self, upstream: tuple[str, int], seed: int = 0) -> None:
        self.upstream, self.rate, self.faults, self.most = upstream, 0.0, FAULTS, 1 << 30
        self.seen: list[tuple[str, str]] = []
        self.failed = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                fault = server.note(self.command, self.path)
                if fault == "an error":
                    self.fail()
                elif fault == "no answer":
                    self.close_connection = True
                else:
                    self.forward(body, fault)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def forward(self, body: bytes, fault: str) -> None:
                upstream = http.client.HTTPConnection(*server.upstream, timeout=60)
                upstream.request(self.command, self.path, body, dict(self.headers))
                reply = upstream.getresponse()
                content = reply.read()
                upstream.close()
                if fault == "a late answer":
                    threading.Event().wait(0.3)
                if fault == "an error afterwards":
                    self.fail()
                elif fault == "no answer afterwards":
                    self.close_connection = True
                else:
                    self.reply(reply, content, half=fault == "half an answer")

            def reply(self, reply: http.client.HTTPResponse, content: bytes, half: bool) -> None:
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                        self.send_header(name, value)
                length = reply.getheader("content-length") if self.command == "HEAD" else str(len(content))
                self.send_header("content-length", length or "0")
                self.end_headers()
                if half:
                    content, self.close_connection = content[: len(content) // 2], True
                self.wfile.write(content)

            def fail(self) -> None:
                self.send_response(500)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def note(self, method: str, path: str) -> str:
        """Count a request; what is to befall it."""
        with self._lock:
            self.seen.append((method, unquote(path.partition("?")[0])))
            if self.failed >= self.most or self._random.random() >= self.rate:
                return ""
            self.failed += 1
            return self._random.choice(self.faults)

    @property
    def environment(self) -> dict[str, str]:
        """What clients are told by."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT": self.address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def put(self, path: str) -> None:
        """Make a bucket, or an empty object."""
        asked = http.client.HTTPConnection(*self.upstream)
        credential = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/s3/aws4_request"
        asked.request("PUT", path, headers={"Authorization": credential})
        assert asked.getresponse().status == 200

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(seed: int = 0) -> Iterator[S3]:
    """A server with an empty ``bucket``."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    s3 = S3(moto.get_host_and_port(), seed)
    try:
        s3.put("/bucket")
        yield s3
    finally:
        s3.close()
        moto.stop()
