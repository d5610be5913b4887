"""A server of the Hub's protocol on the loopback: repositories, revisions and commits, in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    """Files by repository and commit, branches and tags by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.downloaded: list[str] = []
        """The paths of files whose bytes were asked for."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[repository].get(revision, revision)]

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches[repository].get(branch) or self.branches[repository].get("main", "")
        whole = {**self.commits.get(parent, {}), **files}
        digest = hashlib.sha1("".join(f"{p}{hashlib.sha1(b).hexdigest()}" for p, b in sorted(whole.items())).encode())
        self.commits[digest.hexdigest()] = whole
        self.branches[repository][branch] = digest.hexdigest()
        return digest.hexdigest()


class Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repository, what, revision = found[1], found[2], found[3] or "main"
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, what, revision = found[1], "file", found[2]
        else:
            return self.answer({}, 404)
        if repository not in self.server.branches:
            return self.answer({}, 404, X_Error_Code="RepoNotFound")
        commit = self.server.branches[repository].get(revision, revision)
        if commit not in self.server.commits:
            return self.answer({}, 404, X_Error_Code="RevisionNotFound")
        files = self.server.commits[commit]
        if what == "tree":
            return self.answer(
                [
                    {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for p, b in files.items()
                ]
            )
        if what != "file":
            return self.answer({"id": repository, "sha": commit, "siblings": [{"rfilename": p} for p in files]})
        if found[3] not in files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if self.command == "GET":
            self.server.downloaded.append(found[3])
        content = files[found[3]]
        return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.branches.setdefault(repository, {})
            if not self.server.branches[repository]:
                self.server.commit(repository, "main", {})
            return self.answer({"url": f"{self.server.url}/{repository}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path)
        if found is None:
            return self.answer({}, 404)
        repository, what, branch = found.groups()
        if what == "branch":
            self.server.commit(repository, branch, {})
            return self.answer({})
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        entries = [json.loads(line) for line in body.splitlines() if line]
        added = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
        commit = self.server.commit(repository, branch, added)
        return self.answer({"commitUrl": f"{self.server.url}/{repository}/commit/{commit}", "commitOid": commit})


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty Hub until the end of the context."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
