"""A small Hugging Face hub on loopback: what huggingface_hub and lfs ask for, and ways in which it can go wrong.

It answers like the real one: `HEAD` and `GET` of `/datasets/<repository>/resolve/<revision>/<file>` redirect to a CDN
on another host name (`localhost` instead of `127.0.0.1`) and carry `X-Repo-Commit`, `X-Linked-Etag` (the sha256 of a
large file) and `X-Linked-Size`; the CDN knows ranges. Small files come without a redirect and with git's blob hash.
`/web/<file>` is an ordinary web server, with its own `ETag`. Every request is kept in `Hub.log`.

`python tests/hub_server.py FOLDER` serves the files of a folder as those of every dataset, to try things by hand.
"""

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "5f1c3f0e0a5b4b7c8d9e0f1a2b3c4d5e6f708192"


@dataclass
class Faults:
    """What goes wrong. Everything is off by default."""

    cut_after: list[int] = field(default_factory=list)
    """Bytes of the body after which each of the next transfers is cut."""

    statuses: list[int] = field(default_factory=list)
    """Statuses of the next transfers, instead of their content."""

    head_status: int = 0
    """Status of every HEAD of the hub, with `error_code`."""

    error_code: str = ""
    wrong_bytes: bool = False
    """Flip the first byte of every body."""

    ignore_ranges: bool = False
    ignore_if_range: bool = False
    wrong_range: bool = False
    """Answer a range with one that begins a byte later."""

    extra_size: int = 0
    """Add this to the size that the hub declares."""

    extra_body: int = 0
    """Go on with so many bytes behind the end of every body, whose length is not told."""

    no_length: bool = False
    no_etag: bool = False
    small: bool = False
    """Serve as a small file: no redirect, git's blob hash."""

    bytes_per_second: int = 0
    commit: str = COMMIT
    token: str = ""
    """Answer 401 without this token."""

    redirect_to: str = ""
    """Send every transfer there."""


@dataclass
class Hub:
    """A running server.

    Args:
        port: Its port on 127.0.0.1.
        files: Content by file name; the same for every repository.
        faults: What goes wrong.
        log: One record for each request: method, path, and headers in lower case.
    """

    port: int
    files: dict[str, bytes]
    faults: Faults = field(default_factory=Faults)
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def web(self, name: str) -> str:
        return f"{self.url}/web/{name}"

    def transfers(self) -> list[dict[str, Any]]:
        """Return the requests for content."""
        return [r for r in self.log if r["method"] == "GET" and r["path"].startswith(("/cdn/", "/web/"))]


@contextmanager
def serve(files: dict[str, bytes], port: int = 0) -> Iterator[Hub]:
    """Run a hub that holds ``files``."""

    class Handler(_Handler):
        hub: Hub

    server = _Server(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    Handler.hub = Hub(server.server_address[1], files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed is no fault of the server
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.log.append({"method": self.command, "path": self.path, **headers})
        try:
            if match := re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/([^/]+)/(.+)", self.path):
                self._resolve(match[2])
            elif match := re.fullmatch(r"/cdn/(.+?)(?:\?.*)?", self.path):
                self._content(match[1], etag='"cdn-does-not-know-the-sha256"')
            elif match := re.fullmatch(r"/web/(.+)", self.path):
                content = self.hub.files.get(match[1], b"")
                self._content(match[1], etag=f'"{hashlib.md5(content).hexdigest()}"')
            elif self.path.startswith("/api/datasets/"):
                self._send(200, json.dumps({"sha": self.hub.faults.commit}).encode())
            else:
                self._send(404, b"")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _resolve(self, name: str) -> None:
        faults = self.hub.faults
        commit = {"X-Repo-Commit": faults.commit} if faults.commit else {}
        authorized = not faults.token or self.headers.get("authorization") == f"Bearer {faults.token}"
        if faults.head_status or not authorized:
            code = {"X-Error-Code": faults.error_code} if faults.error_code else {}
            self._send(faults.head_status or 401, b"", code)
        elif name not in self.hub.files:
            self._send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", **commit})
        elif faults.small:
            content = self.hub.files[name]
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self._content(name, etag=f'"{blob}"', headers=commit)
        else:
            content = self.hub.files[name]
            target = faults.redirect_to or f"http://localhost:{self.hub.port}/cdn/{name}?signature=1"
            linked = {} if faults.no_etag else {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
            linked["X-Linked-Size"] = str(len(content) + faults.extra_size)
            linked["X-Xet-Hash"] = hashlib.sha256(name.encode()).hexdigest()  # tempts a client that has hf_xet
            linked["Link"] = f'<{self.hub.url}/api/datasets/xet-read-token/{commit}>; rel="xet-auth"'
            self._send(302, b"", {"Location": target, "Accept-Ranges": "bytes", **linked, **commit})

    def _content(self, name: str, etag: str, headers: dict[str, str] | None = None) -> None:
        faults = self.hub.faults
        if name not in self.hub.files:
            self._send(404, b"")
            return
        if faults.statuses and self.command == "GET":
            self._send(faults.statuses.pop(0), b"")
            return
        content = self.hub.files[name]
        if faults.wrong_bytes:
            content = bytes([content[0] ^ 1]) + content[1:]
        headers = dict(headers or {})
        if not faults.no_etag:
            headers["ETag"] = etag
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        is_same = faults.ignore_if_range or self.headers.get("if-range") in (None, etag)
        if wanted and is_same and not faults.ignore_ranges:
            start = int(wanted[1]) + faults.wrong_range
            if start >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, content[start:], {"Accept-Ranges": "bytes", **headers}, is_transfer=True)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, is_transfer: bool = False) -> None:
        faults = self.hub.faults
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        chunked = is_transfer and (faults.no_length or faults.extra_body > 0)
        if is_transfer and self.command == "GET":
            body += bytes(faults.extra_body)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = faults.cut_after.pop(0) if is_transfer and faults.cut_after else None
        for start in range(0, len(body), 8192):
            piece = body[start : start + 8192]
            if cut is not None and start + len(piece) > cut:
                self._write(piece[: cut - start], chunked)
                self.wfile.flush()
                self.close_connection = True
                return
            self._write(piece, chunked)
            if faults.bytes_per_second:
                time.sleep(len(piece) / faults.bytes_per_second)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, piece: bytes, chunked: bool) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with serve({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}) as hub:
        hub.faults.bytes_per_second = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        threading.Event().wait()
