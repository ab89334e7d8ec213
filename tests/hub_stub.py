"""The Hugging Face Hub on 127.0.0.1: repositories of models, as far as their client asks."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "5" * 40


class HubStub:
    """What it has, how it fails, and what it was asked for."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = repositories
        self.url = ""
        self.asked: list[tuple[str, str]] = []
        """(method, path) of each request."""
        self.gated: set[str] = set()
        self.cut_next = False
        """The next file ends in its middle."""
        self.damage = False
        """Files come with another last byte."""

    def gets(self, file: str) -> int:
        """Return how often a file was downloaded."""
        return sum(method == "GET" and path.endswith(f"/{file}") for method, path in self.asked)

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[HubStub]:
    """Serve files by name of each repository, all of them of revision `main`."""
    stub = HubStub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            stub.asked.append((self.command, path))
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or file
            if found is None:
                self.refuse(404, "")
                return
            repository, revision = found[1], (found[3] if api else found[2])
            if repository in stub.gated:
                self.refuse(401, "GatedRepo")
            elif repository not in stub.repositories:
                self.refuse(401, "RepoNotFound")
            elif revision not in (None, "main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            elif api:
                self.list_files(stub.repositories[repository], tree=api[2] == "tree")
            elif file and file[3] in stub.repositories[repository]:
                self.give(stub.repositories[repository][file[3]])
            else:
                self.refuse(404, "EntryNotFound")

        def list_files(self, files: Mapping[str, bytes], *, tree: bool) -> None:
            listed: Any = [
                {"type": "file", "path": name, "size": len(data), "oid": name}
                for name, data in files.items()
            ]
            if not tree:
                siblings = [{"rfilename": name} for name in files]
                listed = {"id": "x/y", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(listed).encode(), {})

        def give(self, data: bytes) -> None:
            digest = hashlib.sha256(data).hexdigest()
            begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            at = int(begin[1]) if begin else 0
            headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
            if begin:
                headers["Content-Range"] = f"bytes {at}-{len(data) - 1}/{len(data)}"
            if stub.damage:
                data = data[:-1] + bytes([data[-1] ^ 1])
            self.answer(206 if begin else 200, data[at:], headers)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})

        def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "X-Repo-Commit": COMMIT}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if stub.cut_next and "ETag" in headers:
                stub.cut_next, self.close_connection = False, True
                body = body[: len(body) // 2]
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
