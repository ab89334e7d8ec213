"""An S3 server on this machine, and a proxy before it that misbehaves on demand."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

BUCKET = "latents"
SECRET = "sEcReT-kEy-fOr-TeStS"

Fault = str | float | None
"""`500`, `403`, ...: this answer; `done 500`: the same, but the request was carried out; `reset`:
the connection ends; `cut`: it ends within the body of the answer; a number: this many seconds late;
None: as it should be."""


@dataclass
class FaultyProxy:
    """Hands requests on to the S3 server, and spoils those that `fault` picks."""

    address: str
    fault: Callable[[str, str], Fault] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, faults: list[Fault], method: str = "", path: str = "") -> None:
        """Spoil the next requests of a method whose path contains `path`, one fault each."""
        waiting = list(faults)

        def fault(asked: str, where: str) -> Fault:
            if asked.startswith(method) and path in where and waiting:
                return waiting.pop(0)
            return None

        self.fault = fault

    def trouble(self, faults: Sequence[Fault]) -> None:
        """Spoil requests from now on: the n-th of one method and path by the n-th of `faults`, from
        a place that the path sets, over and over. Each request sees its own faults, whatever others
        ask meanwhile, so no order of ranks and threads can make one fail more often in a row."""
        places: dict[tuple[str, str], int] = {}
        lock = threading.Lock()

        def fault(asked: str, where: str) -> Fault:
            with lock:
                place = places.setdefault((asked, where), zlib.crc32(where.encode()))
                places[asked, where] += 1
            return faults[place % len(faults)]

        self.fault = fault

    def count(self, method: str, path: str = "") -> int:
        return sum(m == method and path in p for m, p in self.requests)


def start_s3() -> tuple[Any, str]:
    """Return moto's threaded server and its host:port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return server, f"{host}:{port}"


def request(address: str, method: str, path: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=100)
    connection.request(method, path, headers={"Content-Length": "0"})
    status = connection.getresponse().status
    connection.close()
    return status


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port until the block ends; yield host:port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.requests.append((self.command, self.path))
            fault = proxy.fault(self.command, self.path)
            if fault == "reset":
                self._end()
            elif isinstance(fault, str) and fault.isdecimal():
                self._answer(int(fault), b"<Error><Code>Injected</Code></Error>", {})
            elif isinstance(fault, str) and fault.startswith("done "):
                self._ask(body)
                self._answer(int(fault[5:]), b"<Error><Code>Injected</Code></Error>", {})
            else:
                time.sleep(fault if isinstance(fault, float) else 0)
                self._hand_on(body, cut=fault == "cut")

        def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
            upward = http.client.HTTPConnection(upstream, timeout=100)
            upward.request(self.command, self.path, body, dict(self.headers))
            answer = upward.getresponse()
            data = answer.read()
            upward.close()
            return answer, data

        def _hand_on(self, body: bytes, cut: bool) -> None:
            answer, data = self._ask(body)
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in SKIPPED}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.getheader("Content-Length", "0")
            self._answer(answer.status, data, headers, cut)

        def _answer(
            self, status: int, data: bytes, headers: dict[str, str], cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            except (BrokenPipeError, ConnectionResetError):
                cut = True
            if cut:
                self._end()

        def _end(self) -> None:
            self.close_connection = True
            with suppress(OSError):  # the client may have gone before us
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    with serving(Handler) as address:
        proxy.address = address
        yield proxy


SKIPPED = {"content-length", "transfer-encoding", "connection", "date", "server"}


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serve a folder as static files, byte ranges too, and no listing."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            return

        def list_directory(self, path: Any) -> None:
            self.send_error(403)

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            path = Path(self.translate_path(self.path))
            if wanted is None or not path.is_file():
                super().do_GET()
                return
            data = path.read_bytes()
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            piece = data[start : int(last) + 1 if first and last else None]
            self.send_response(206 if piece else 416)
            self.send_header("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(piece)))
            self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
            self.end_headers()
            self.wfile.write(piece)

    with serving(cast(type[BaseHTTPRequestHandler], Handler)) as address:
        yield f"http://{address}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server with the bucket `latents`."""
    server, address = start_s3()
    assert request(address, "PUT", f"/{BUCKET}") == 200
    yield address
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """An S3 server behind a faulty proxy, named and opened by the environment."""
    with faulty_proxy(s3_server) as proxy:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{proxy.address}",
        }.items():
            monkeypatch.setenv(name, value)
        yield proxy
