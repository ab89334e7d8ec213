"""The Hugging Face Hub on 127.0.0.1: models and data sets, as far as its client asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "5" * 40


class HubStub:
    """What it has, how it fails, and what it was asked for."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = {name: dict(files) for name, files in repositories.items()}
        """Those of data sets are called datasets/OWNER/NAME."""
        self.url = ""
        self.asked: list[tuple[str, str]] = []
        """(method, path) of each request."""
        self.gated: set[str] = set()
        self.cut_next = False
        """The next file ends in its middle."""
        self.commits: list[list[str]] = []
        """The files of each upload."""
        self.refused_commits: set[int] = set()
        """Numbers of commits that are answered by an error, counted from 0."""
        self.writers: set[str] = set()
        """Tokens that may write; none: any."""
        self.damage = False
        """Files come with another last byte."""

    def gets(self, file: str) -> int:
        """Return how often a file was downloaded."""
        return sum(method == "GET" and path.endswith(f"/{file}") for method, path in self.asked)

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


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
            path = unquote(self.path.partition("?")[0])
            stub.asked.append((self.command, path))
            api = re.fullmatch(
                r"/api/(?:models/|(datasets/))([^/]+/[^/]+?)"
                r"(?:/(revision|tree)/([^/]+)(?:/(.+))?)?",
                path,
            )
            file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or file
            if found is None:
                self.refuse(404, "")
                return
            repository = f"{api[1] or ''}{api[2]}" if api else found[1]
            revision = api[4] if api else found[2]
            if repository in stub.gated:
                self.refuse(401, "GatedRepo")
            elif repository not in stub.repositories:
                self.refuse(401, "RepoNotFound")
            elif revision not in (None, "main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            elif api:
                files = stub.repositories[repository]
                if api[3] == "tree":
                    self.list_tree(files, api[5] or "", "recursive=true" in self.path.lower())
                else:
                    siblings = [{"rfilename": name} for name in files]
                    listed = {"id": api[2], "sha": COMMIT, "siblings": siblings}
                    self.answer(200, json.dumps(listed).encode(), {})
            elif file and file[3] in stub.repositories[repository]:
                self.give(stub.repositories[repository][file[3]])
            else:
                self.refuse(404, "EntryNotFound")

        def do_POST(self) -> None:
            path = unquote(self.path.partition("?")[0])
            stub.asked.append((self.command, path))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if not token or (stub.writers and token not in stub.writers):
                self.refuse(403 if token else 401, "")
                return
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['type']}s/{asked['organization']}/{asked['name']}"
                status = 409 if name in stub.repositories else 200
                stub.repositories.setdefault(name, {})
                self.answer(status, json.dumps({"url": f"{stub.url}/{name}"}).encode(), {})
                return
            if path == "/api/validate-yaml":
                self.answer(200, b'{"errors": [], "warnings": []}', {})
                return
            found = re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)/(preupload|commit)/main", path)
            if found is None or found[1] not in stub.repositories:
                self.refuse(404, "RepoNotFound")
                return
            files = stub.repositories[found[1]]
            answer = self.preupload if found[2] == "preupload" else self.commit
            answer(found[1], files, body)

        def preupload(self, repository: str, files: dict[str, bytes], body: bytes) -> None:
            """Take every file as one that a commit itself holds."""
            told = [
                {
                    "path": file["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": git_oid(files[file["path"]]) if file["path"] in files else None,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, json.dumps({"files": told}).encode(), {})

        def commit(self, repository: str, files: dict[str, bytes], body: bytes) -> None:
            changes = [json.loads(line) for line in body.splitlines()]
            stub.commits.append([c["value"]["path"] for c in changes if c["key"] != "header"])
            if len(stub.commits) - 1 in stub.refused_commits:
                self.refuse(400, "")
                return
            for change in changes:
                value = change["value"]
                if change["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif change["key"] == "deletedFile":
                    del files[value["path"]]
            url = f"{stub.url}/{repository}/commit/{COMMIT}"
            told = {"commitUrl": url, "commitOid": COMMIT}
            self.answer(200, json.dumps(told).encode(), {})

        def list_tree(self, files: Mapping[str, bytes], folder: str, recursive: bool) -> None:
            prefix, listed = f"{folder}/" if folder else "", dict[str, dict[str, object]]()
            for name, data in files.items():
                inside = name.removeprefix(prefix).split("/")
                if not name.startswith(prefix):
                    continue
                for depth in range(1, len(inside)):
                    path = prefix + "/".join(inside[:depth])
                    if recursive or depth == 1:
                        listed[path] = {"type": "directory", "path": path, "oid": path}
                if recursive or len(inside) == 1:
                    entry = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
                    listed[name] = entry
            if folder and not listed:
                self.refuse(404, "EntryNotFound")
            else:
                self.answer(200, json.dumps([*listed.values()]).encode(), {})

        def give(self, data: bytes) -> None:
            digest = hashlib.sha256(data).hexdigest()
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            at = int(part[1]) if part else 0
            end = min(int(part[2]) + 1, len(data)) if part and part[2] else len(data)
            headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
            if part:
                headers["Content-Range"] = f"bytes {at}-{end - 1}/{len(data)}"
            if stub.damage:
                data = data[:-1] + bytes([data[-1] ^ 1])
            self.answer(206 if part else 200, data[at:end], headers)

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
