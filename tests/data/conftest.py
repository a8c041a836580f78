"""Small sources of images, made when a test asks for them."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddkit.data.sources import open_source

KINDS = {"gz": ("gz", "tgz"), "bz2": "bz2", "xz": "xz"}  # endings of tars by how they are compressed


def encoded(color=(200, 100, 50), side=8, kind="PNG") -> bytes:
    """A plain picture of that color, as the bytes of a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def picture():
    return encoded


@pytest.fixture
def write_tree(tmp_path):
    """write_tree({"train/cat/1.png": bytes, ...}, "name") -> a folder; "name.zip", "name.tar.gz" -> an archive of it."""

    def write(files: dict[str, bytes], name: str = "photos") -> Path:
        path = tmp_path / name
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for member, data in files.items():
                    archive.writestr(member, data)
            return path
        if ".t" in path.name:
            kind = next((kind for kind, endings in KINDS.items() if path.name.endswith(endings)), "")
            with tarfile.open(path, f"w:{kind}") as archive:
                for member, data in files.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            return path
        for member, data in files.items():
            (path / member).parent.mkdir(parents=True, exist_ok=True)
            (path / member).write_bytes(data)
        return path

    return write


@pytest.fixture
def find(tmp_path_factory):
    """find(path, ...) -> Source"""
    return lambda path, **options: open_source(path, tmp_path_factory.mktemp("scratch"), **options)


@pytest.fixture
def photos():
    """Two classes, three training and two test images each; image k of class c has the color (c * 100, k, 7)."""
    return {
        f"{split}/{name}/{k}.png": encoded((c * 100, k, 7))
        for split, count in (("train", 3), ("test", 2))
        for c, name in enumerate(("cat", "dog"))
        for k in range(count)
    }


@pytest.fixture
def colors():
    """(N, 3) of images that are one color each."""

    def of(images) -> list[tuple[int, ...]]:
        pixels = np.asarray(images)
        assert (pixels == pixels[:, :, :1, :1]).all()
        return [tuple(row) for row in pixels[:, :, 0, 0].tolist()]

    return of


class Server:
    """A real HTTP server on 127.0.0.1 that gives `data`, as badly as it is told to.

    ranges: whether it understands Range. break_after: bytes of an answer after which the connection is cut, one
    number for each of the first answers. statuses: HTTP statuses to give instead, for the first answers.
    requests: the Range header of each request so far, "" where there was none.
    """

    def __init__(self, data: bytes, *, ranges=True, break_after=(), statuses=(), length=True) -> None:
        self.data, self.ranges, self.length = data, ranges, length
        self.break_after, self.statuses = list(break_after), list(statuses)
        self.requests: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *arguments: object) -> None:
                """The test's output is not the place for a log."""

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/archive.bin"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range", "")
        self.requests.append(wanted)
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            return handler.send_error(status)
        begin = int(wanted[len("bytes=") : -1]) if wanted and self.ranges else 0
        if begin and begin >= len(self.data):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.data)}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        handler.send_response(206 if begin else 200)
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{len(self.data) - 1}/{len(self.data)}")
        if self.length:
            handler.send_header("Content-Length", str(len(self.data) - begin))
        handler.end_headers()
        end = begin + self.break_after.pop(0) if self.break_after else len(self.data)
        handler.wfile.write(self.data[begin:end])

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve():
    """serve(data, ...) -> Server"""
    servers = []

    def start(data: bytes, **manners) -> Server:
        servers.append(Server(data, **manners))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
