"""A local HTTP server that answers as the Hugging Face hub does, and remembers what it was asked.

It has the two parts that huggingface_hub needs to fetch a model: the description of a repository
(`/api/models/...`), and its files (`/{name}/resolve/{revision}/{file}`), of which the large ones
are redirected to another server, as the real hub redirects to its storage.
"""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".ckpt", ".h5", ".msgpack")
_API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def commit_of(files: Mapping[str, bytes]) -> str:
    """Forty digits that belong to these files."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@dataclass
class Repository:
    """Commits, and the names that stand for them.

    Attributes:
        commits: {commit: {file: content}}.
        names: {branch or tag: commit}.
        gate: (HTTP status, X-Error-Code) of the answer for a file, or None for an open repository.
        token: the one that sees the repository at all; None for everyone.
        listing: what the description says, instead of the truth.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gate: tuple[int, str] | None = None
    token: str | None = None
    listing: dict[str, Any] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], name: str = "main") -> str:
        """Add a commit, which `name` then stands for."""
        commit = commit_of(files)
        self.commits[commit] = dict(files)
        self.names[name] = commit
        return commit


@dataclass(frozen=True)
class Request:
    """What one request asked for; names of headers are in small letters."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class StandIn:
    """The hub, and the storage that large files are redirected to.

    Attributes:
        repositories: {owner/name: repository}.
        requests: all that the hub was asked, in order.
        storage_requests: all that the storage was asked.
        answers: {beginning of a path: status} to answer with instead.
        cut: {end of a path: how many answers break off in the middle}.
        before: called with each request before it is answered.
        page: what to answer everything with, instead.
    """

    repositories: dict[str, Repository] = field(default_factory=dict, repr=False)
    requests: list[Request] = field(default_factory=list, repr=False)
    storage_requests: list[Request] = field(default_factory=list, repr=False)
    answers: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    before: Callable[[Request], None] | None = None
    page: bytes | None = None
    connections: set[socket.socket] = field(default_factory=set, repr=False)

    def __enter__(self) -> "StandIn":
        self._servers = [_server(self, is_hub=True), _server(self, is_hub=False)]
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering, so that connections are refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()
        for connection in tuple(self.connections):  # those that are kept open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._servers, self._threads = [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage_url(self) -> str:
        # By another name, since a host that has the hub's may get what the hub gets.
        return f"http://localhost:{self._servers[1].server_port}"

    def add(self, name: str, files: Mapping[str, bytes], **about: Any) -> Repository:
        """A new repository with one commit, which "main" stands for."""
        repository = self.repositories[name] = Repository(**about)
        repository.commit(files)
        return repository

    def asked(self, method: str, kind: str = "resolve") -> list[str]:
        """Names of the files asked for by `method`, or with kind "api" the paths."""
        if kind == "api":
            return [r.path for r in self.requests if r.method == method and "/api/" in r.path]
        return [
            match["file"]
            for request in self.requests
            if request.method == method and (match := _FILE.fullmatch(request.path))
        ]

    @property
    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, from whichever server, sorted."""
        stored = [request.path.rpartition("/")[2] for request in self.storage_requests]
        return sorted(self.asked("GET") + stored)

    def forget(self) -> None:
        self.requests.clear()
        self.storage_requests.clear()


def _server(stand_in: StandIn, is_hub: bool) -> ThreadingHTTPServer:
    class Handler(_Handler):
        hub = stand_in
        is_storage = not is_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False  # a connection that is kept open would keep it waiting
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    is_storage: bool
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it makes every answer wait for 40 ms

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(urlsplit(self.path).path), headers)
        (self.hub.storage_requests if self.is_storage else self.hub.requests).append(request)
        if self.hub.before is not None:
            self.hub.before(request)
        try:
            self._answer(request.path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # who asked did not wait

    def _answer(self, path: str) -> None:
        for beginning, status in self.hub.answers.items():
            if path.startswith(beginning):
                return self._refuse(status)
        if self.hub.page is not None:
            return self._send(200, self.hub.page, {"Content-Type": "text/html"})
        # The slashes of a revision are quoted, as in refs%2Fpr%2F1.
        plain = urlsplit(self.path).path
        if match := _API.fullmatch(plain):
            return self._describe(match["name"], match["revision"])
        if match := _FILE.fullmatch(plain):
            return self._give(match["name"], match["revision"], unquote(match["file"]))
        return self._refuse(404)

    def _found(self, name: str, revision: str | None) -> tuple[Repository, str] | None:
        """A repository and a commit of it; None where that was answered with an error."""
        revision = unquote(revision or "main")
        repository = self.hub.repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "hf_wrong":
            self._refuse(401, None, "Invalid credentials in Authorization header")
            return None
        if repository is None or repository.token not in (None, token):
            # The real hub does not tell the two apart, and says 404 only to who is logged in.
            status = 404 if token else 401
            self._refuse(status, "RepoNotFound", "Repository not found")
            return None
        commit = repository.names.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _describe(self, name: str, revision: str | None) -> None:
        if (found := self._found(name, revision)) is None:
            return
        repository, commit = found
        files = [{"rfilename": file} for file in repository.commits[commit]]
        content = {"_id": "0", "id": name, "sha": commit, "siblings": files, "tags": []}
        body = json.dumps(content | repository.listing).encode()
        self._send(200, body, {"Content-Type": "application/json"})

    def _give(self, name: str, revision: str, file: str) -> None:
        if self.is_storage:
            content = self.hub.repositories[name].commits[revision][file]
            return self._send_part(content)
        if (found := self._found(name, revision)) is None:
            return None
        repository, commit = found
        if repository.gate:
            return self._refuse(*repository.gate, f"Access to model {name} is restricted")
        content = repository.commits[commit].get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not file.endswith(LARGE):
            etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            return self._send_part(content, headers | {"ETag": f'"{etag}"'})
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(content))
        headers["Location"] = f"{self.hub.storage_url}/{name}/resolve/{commit}/{file}"
        return self._send(302, b"", headers)

    def _send_part(self, content: bytes, headers: Mapping[str, str] = {}) -> None:
        """Answer with the content, or the part of it that the request's Range selects."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match is None:
            return self._send(200, content, headers)
        start = int(match[1])
        place = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206, content[start:], {**headers, "Content-Range": place})

    def _refuse(
        self, status: int, code: str | None = None, message: str = "", commit: str | None = None
    ) -> None:
        given = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        headers = {name: value for name, value in given.items() if value}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = next((end for end, times in self.hub.cut.items() if times and end in self.path), None)
        if end is None:
            self.wfile.write(body)
            return
        self.hub.cut[end] -= 1
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.close_connection = True
