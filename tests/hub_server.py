"""A small Hugging Face hub on the loopback address: real HTTP, the few endpoints that uploads and downloads need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"  # tokens
_LARGE = (".pt", ".safetensors")


@dataclass
class Hub:
    """What the server holds. files: (kind, id) -> path -> bytes. requests: (method, path) in their order."""

    url: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def revision(self, repository: tuple[str, str]) -> str:
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.files[repository].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((method, path))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for pattern, action in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/main", self._commit),
            (r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/(\w+)", self._store),
        ):
            if method in ("POST", "PUT") and (match := re.fullmatch(pattern, path)):
                needs_token = action != self._store  # whose addresses are signed
                if needs_token and token != WRITER:
                    status = 403 if token == READER else 401
                    return self._json({"error": "You don't have the rights to write here"}, status)
                return action(body, *match.groups())
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/\w+|(/tree)/\w+)?", path):
            return self._describe(token, *match.groups())
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            return self._resolve(method, token, *match.groups())
        return self._json({"error": "no such page"}, 404)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, **{"Content-Type": "application/json"} | headers)

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        kind, hub_id = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        url = f"{self.state.url}/{'datasets/' if kind == 'dataset' else ''}{hub_id}"
        if (kind, hub_id) in self.state.files:
            return self._json({"error": "You already created this repo", "url": url}, 409)
        self.state.files[kind, hub_id] = {".gitattributes": b""}
        if asked.get("private") or asked.get("visibility") == "private":
            self.state.private.add(hub_id)
        return self._json({"url": url, "name": hub_id})

    def _validate(self, body: bytes) -> None:
        import yaml

        metadata = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        if not re.fullmatch(r"[a-z0-9.-]+", metadata["license"]):
            return self._json({"errors": [{"message": '"license" must be one of our list'}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, kind: str, hub_id: str) -> None:
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(_LARGE) else "regular", "shouldIgnore": False}
            for one in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, body: bytes, prefix: str | None, hub_id: str) -> None:
        objects = [
            {"oid": one["oid"], "size": one["size"]}
            | (
                {}
                if one["oid"] in self.state.blobs
                else {"actions": {"upload": {"href": f"{self.state.url}/lfs/{one['oid']}"}}}
            )
            for one in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.blobs[oid] = body
        self._send(b"")

    def _commit(self, body: bytes, kind: str, hub_id: str) -> None:
        files = self.state.files[kind, hub_id]
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
        revision = self.state.revision((kind, hub_id))
        self._json({"success": True, "commitOid": revision, "commitUrl": f"{self.state.url}/{hub_id}/commit/{revision}"})

    def _missing(self, kind: str, hub_id: str, token: str) -> bool:
        """Answer for a repository that is not there, or not for this reader: the hub makes no difference."""
        if (kind, hub_id) in self.state.files and (hub_id not in self.state.private or token == WRITER):
            return False
        self._json({"error": "Repository not found"}, 404 if token else 401, X_Error_Code="RepoNotFound")
        return True

    def _describe(self, token: str, kind: str, hub_id: str, tree: str | None) -> None:
        if self._missing(kind, hub_id, token):
            return
        files = self.state.files[kind, hub_id]
        if tree is None:
            names = [{"rfilename": path} for path in files]
            self._json(
                {"id": hub_id, "sha": self.state.revision((kind, hub_id)), "siblings": names, "private": False, "tags": []}
            )
            return
        self._json([self._entry(path, data) for path, data in files.items()])

    def _entry(self, path: str, data: bytes) -> dict[str, object]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path.endswith(_LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry

    def _resolve(self, method: str, token: str, prefix: str | None, hub_id: str, path: str) -> None:
        kind = "dataset" if prefix else "model"
        if self._missing(kind, hub_id, token):
            return
        files, revision = self.state.files[kind, hub_id], self.state.revision((kind, hub_id))
        if path not in files:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision)
            return
        digest = hashlib.sha256 if path.endswith(_LARGE) else hashlib.sha1
        self._send(files[path], X_Repo_Commit=revision, ETag=f'"{digest(files[path]).hexdigest()}"')
