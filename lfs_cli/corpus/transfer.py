"""One file from a server, over https, in a way that survives interruptions.

huggingface_hub finds a dataset's file, knows its checksum and who may read it (`HF_ENDPOINT`, `HF_TOKEN`, offline
mode), and its HTTP session, with its proxies and certificates, makes every request. The bytes are moved here, because
`hf_hub_download` starts over when its process was stopped (huggingface/huggingface_hub#4196), and plain HTTP is what
every mirror speaks, so that nothing depends on the optional `hf_xet`.

While a file is on its way it is a *part*: `<name>.part` holds its first bytes, and `<name>.part.json` says which file
they belong to. A later call with the same file asks only for the rest (`Range`). Bytes of one file are never continued
with those of another: a file of the hub is known by its checksum, any other one by the `ETag` or `Last-Modified` of
its server (`If-Range`), and one that has neither is fetched from its start. The note also has a checksum of the bytes
that were safe on the disk when it was written: a part that was damaged meanwhile is not continued.
"""

import contextlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urljoin, urlsplit

from lfs_cli.errors import DownloadError
from lfs_cli.files import replace_text

CHUNK_BYTES = 1 << 20
"""Bytes read from a disk at a time."""

KEPT_BYTES = 1 << 26
"""Bytes that are brought to the disk at a time while a file arrives."""

RETRIES = 4
"""Attempts after one that brought nothing new."""

PAUSE_SECONDS = 1.0
"""Wait before the first of them; each further wait is twice as long."""

MIRROR = "https://hf-mirror.com"
"""A public mirror of the hub, named in hints."""

SPARE_BYTES = 1 << 28
"""What a text of unknown size leaves free on its disk, or a hundredth of the disk where that is less."""

_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = 10
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_LOOK_BYTES = 1 << 26


class OnProgress(Protocol):
    """Is told how far a file has come.

    Args:
        done: Bytes so far.
        total: Size of the file; 0 when its server does not tell.
        is_new: Whether the last of them came from the network, not from a part on the disk.
    """

    def __call__(self, done: int, total: int, *, is_new: bool) -> None: ...


@dataclass(frozen=True)
class Remote:
    """A file on a server, and what is known of it before it is fetched.

    Args:
        url: Where its bytes are.
        label: What messages and progress call it.
        other_ways: How else the user can get at this text: the end of every hint.
        headers: Sent to the host of ``url`` and to no other: they may hold a token.
        bytes: Its size.
        identity: What tells this content from any other under the same name; None when only its server can say.
        sha256: Checksum that the hub declares, 64 hex digits.
        revision: Commit of the hub's repository.
    """

    url: str
    label: str
    other_ways: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    bytes: int | None = None
    identity: str | None = None
    sha256: str | None = None
    revision: str | None = None


def hub_endpoint() -> str:
    """Return the address of the hub or of the mirror that `HF_ENDPOINT` names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def find_on_hub(repository: str, filename: str, other_ways: str) -> Remote:
    """Ask the hub for one file of a dataset.

    Args:
        repository: Such as ``"roneneldan/TinyStories"``.
        filename: Path inside it, at its newest commit.
        other_ways: See `Remote`.

    Raises:
        DownloadError: Without a network, in offline mode, or when there is no such file or no access to it.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers

    endpoint = hub_endpoint()
    try:
        host = check_url(endpoint)
    except DownloadError as error:
        raise DownloadError(f"`HF_ENDPOINT` cannot be used: {error}", hint=error.hint) from None
    if not re.fullmatch(r"[!-~]*", get_token() or ""):  # a request would fail with the token in its message
        raise DownloadError("`HF_TOKEN` holds a character that no token has", hint="set it again, or `unset HF_TOKEN`")
    url = hf_hub_url(repository, filename, repo_type="dataset", endpoint=endpoint)
    try:
        found = get_hf_file_metadata(url, endpoint=endpoint, library_name="lfs")
    except OfflineModeIsEnabled:
        raise _offline(other_ways) from None
    except HfHubHTTPError as error:
        code = error.response.headers.get("X-Error-Code", "")
        raise _refusal(error.response.status_code, f"{repository}/{filename}", host, other_ways, code) from None
    except (HTTPError, OSError) as error:
        raise _no_connection(host, error, other_ways) from None
    if not found.etag or not found.commit_hash:
        raise DownloadError(
            f"{host} does not answer like the hub: it names no commit or no checksum of `{repository}/{filename}`",
            hint=f"check `HF_ENDPOINT` and your proxy; {other_ways}",
        )
    return Remote(
        url=hf_hub_url(repository, filename, repo_type="dataset", revision=found.commit_hash, endpoint=endpoint),
        label=filename,
        other_ways=other_ways,
        headers=build_hf_headers(library_name="lfs"),
        bytes=found.size,
        identity=found.etag,
        sha256=found.etag if re.fullmatch(r"[0-9a-f]{64}", found.etag) else None,
        revision=found.commit_hash,
    )


def check_url(url: str) -> str:
    """Return the host of ``url``. Raises DownloadError unless it is https, or http to this machine itself."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if not host or parts.scheme not in ("http", "https"):
        raise DownloadError(f"`{url}` is not a web address", hint="give one that begins with `https://`")
    if parts.scheme == "http" and host not in _LOOPBACK:
        secure = parts._replace(scheme="https").geturl()
        raise DownloadError(f"`{url}` is not encrypted, so anyone on the way could change it", hint=f"use `{secure}`")
    return host


def kept_bytes(part: Path, remote: Remote) -> int:
    """Return how many bytes of ``remote`` the part file ``part`` holds."""
    return part.stat().st_size if _belongs(_read_note(part), remote) else 0


def discard(part: Path) -> None:
    """Remove a part and its note."""
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def receive(remote: Remote, part: Path, on_progress: OnProgress) -> Iterator[bytes]:
    """Yield all bytes of ``remote`` in order, and keep them in ``part``.

    Those that ``part`` already holds come from the disk. A connection that breaks is taken up again at the same byte,
    `RETRIES` times without a new byte in between.

    Args:
        remote: The file.
        part: Where its bytes are kept.
        on_progress: Told, before each chunk, how many bytes are handed on with it.

    Raises:
        DownloadError: When the transfer cannot be completed. ``part`` stays, for a later call.
    """
    transfer = _Transfer(remote, part, on_progress)
    failures = 0
    while not transfer.is_complete:
        before = transfer.received
        try:
            yield from transfer.attempt()
            problem = "the connection was closed too early"
        except _InterruptedError as error:
            problem = str(error)
        failures = 0 if transfer.received > before else failures + 1
        if not transfer.is_complete and (failures > RETRIES or not transfer.can_continue):
            of = f" of {transfer.total:,}" if transfer.total is not None else ""
            then = "continues where it stopped" if transfer.can_continue else "starts over"
            raise DownloadError(
                f"the transfer of `{remote.label}` broke off after {transfer.received:,}{of} bytes: {problem}",
                hint=f"run the same command again: it {then}; or {remote.other_ways}",
            )
        if not transfer.is_complete:
            time.sleep(PAUSE_SECONDS * 2 ** max(failures - 1, 0))
    yield from transfer.replay()


def while_disk_has_room(blocks: Iterable[bytes], folder: Path, name: str, announced: int = 0) -> Iterator[bytes]:
    """Pass on the ``blocks`` of a file, which are written to ``folder``, while its disk has room.

    Nobody knows how much text is in a packed file before it is unpacked, or how much a server sends that does not tell:
    it can be any amount. Some space stays free, without which other programs would fail, too.

    Args:
        blocks: What is written, in pieces.
        folder: Where to.
        name: What an error calls the file.
        announced: Bytes for which room was found before.

    Raises:
        DownloadError: When too little space is left.
    """
    passed, left = 0, announced
    for block in blocks:
        left -= len(block)
        if left < 0:
            usage = shutil.disk_usage(folder)
            room = usage.free - min(SPARE_BYTES, usage.total // 100)
            if len(block) > room:
                raise DownloadError(
                    f"`{name}` has more than {passed:,} bytes, for which {folder} has no room",
                    hint="free some space, or set `LFS_DATA` to a folder on a larger disk; if so much text is a "
                    "surprise, do not trust the file",
                )
            left = min(_LOOK_BYTES, room // 2)
        passed += len(block)
        yield block


class _InterruptedError(Exception):
    """An attempt ended early, and another one may succeed."""


class _Transfer:
    """The state of one file on its way: what is on the disk, and what was handed on."""

    def __init__(self, remote: Remote, part: Path, on_progress: OnProgress) -> None:
        self.remote = remote
        self.part = part
        self.on_progress = on_progress
        note = _read_note(part)
        if not _belongs(note, remote):
            discard(part)
            note = {}
        self.identity: str | None = remote.identity or note.get("identity")
        self.total: int | None = remote.bytes if remote.bytes is not None else note.get("bytes")
        self.received = part.stat().st_size if note else 0
        self.handed_on = self.checksum = 0
        self.kept = (note.get("kept", 0), note.get("crc32", 0))
        self.is_complete = self.total is not None and self.received == self.total
        if (self.total is not None and self.received > self.total) or self.received < self.kept[0]:
            self._start_over()

    @property
    def can_continue(self) -> bool:
        """Whether a further attempt is sure to bring the rest of the same content."""
        return self.received == 0 or self.identity is not None

    def replay(self) -> Iterator[bytes]:
        """Yield the bytes on the disk that were not handed on yet."""
        if self.handed_on < self.received:
            with self.part.open("rb") as file:
                file.seek(self.handed_on)
                while chunk := file.read(CHUNK_BYTES):
                    yield self._hand_on(chunk, is_new=False)

    def attempt(self) -> Iterator[bytes]:
        """Yield what the disk holds and what one connection brings."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        host = check_url(self.remote.url)
        try:
            with _open(self.remote, self.received, self.identity) as response:
                skip = self._judge(response, host)
                yield from self.replay()
                chunks = response.iter_raw()
                if self.total is None:
                    chunks = while_disk_has_room(chunks, self.part.parent, self.remote.label)
                with self.part.open("ab") as file, self._keeping(file):
                    for chunk in chunks:
                        fresh = chunk[skip:]
                        skip -= len(chunk) - len(fresh)
                        if self.total is not None and self.received + len(fresh) > self.total:
                            discard(self.part)
                            raise DownloadError(
                                f"{host} sends more than the {self.total:,} bytes that `{self.remote.label}` has",
                                hint=f"run the same command again: it starts over; or {self.remote.other_ways}",
                            )
                        file.write(fresh)
                        self.received += len(fresh)
                        if fresh:
                            yield self._hand_on(fresh, is_new=True)
                        if self.handed_on - self.kept[0] >= KEPT_BYTES:
                            self._keep(file)
            self.is_complete = self.total is None or self.received == self.total
        except OfflineModeIsEnabled:
            raise _offline(self.remote.other_ways) from None
        except HTTPError as error:
            if self.received == 0:
                raise _no_connection(host, error, self.remote.other_ways) from None
            raise _InterruptedError(_reason(error)) from None

    def _hand_on(self, chunk: bytes, *, is_new: bool) -> bytes:
        kept, checksum = self.kept
        is_behind = self.handed_on < kept <= self.handed_on + len(chunk)
        if is_behind and zlib.crc32(chunk[: kept - self.handed_on], self.checksum) != checksum:
            discard(self.part)
            raise DownloadError(
                f"what was kept of `{self.remote.label}` is damaged: {self.part} does not fit its checksum",
                hint=f"run the same command again: it starts over; or {self.remote.other_ways}",
            )
        self.checksum = zlib.crc32(chunk, self.checksum)
        self.handed_on += len(chunk)
        self.on_progress(self.handed_on, self.total or 0, is_new=is_new)
        return chunk

    def _judge(self, response: Any, host: str) -> int:
        """Decide how an answer continues what is here. Returns how many of its first bytes are here already."""
        status = response.status_code
        if status in _LATER:
            raise _InterruptedError(f"{host} answered {status}")
        if status == 416 and not self.handed_on:
            self._start_over()
            raise _InterruptedError("the server has fewer bytes than are here")
        if status not in (200, 206):
            is_hub = self.remote.revision is not None
            raise _refusal(status, self.remote.label, host, self.remote.other_ways, is_hub=is_hub)
        start, total = _extent(response)
        identity = self.remote.identity or _identity(response)
        is_same = identity is not None and identity == self.identity
        if self.received and status == 200 and not is_same:
            if self.handed_on:
                discard(self.part)
                raise DownloadError(
                    f"`{self.remote.label}` changed on the server while it was being fetched",
                    hint="run the same command again: it starts over",
                )
            self._start_over()
        if start not in (0, self.received):
            raise _InterruptedError(f"{host} sent other bytes than it was asked for")
        if self.total is not None and total not in (None, self.total):
            discard(self.part)
            raise DownloadError(
                f"`{self.remote.label}` has {total:,} bytes on the server instead of {self.total:,}",
                hint=f"run the same command again: it starts over; or {self.remote.other_ways}",
            )
        if not self.received:
            self.identity = identity
            self.total = self.total if self.total is not None else total
            self._write_note()
            self.part.touch()
        return self.received - start

    @contextlib.contextmanager
    def _keeping(self, file: BinaryIO) -> Generator[None]:
        """Keep what has arrived, in whatever way the connection ends."""
        try:
            yield
        finally:
            if self.handed_on > self.kept[0] and self.part.exists():  # else it was discarded
                self._keep(file)

    def _keep(self, file: BinaryIO) -> None:
        """Bring all bytes so far to the disk, and note their checksum."""
        file.flush()
        os.fsync(file.fileno())
        self.kept = (self.handed_on, self.checksum)
        self._write_note()

    def _write_note(self) -> None:
        note = {"url": self.remote.url, "identity": self.identity, "bytes": self.total}
        replace_text(_note(self.part), json.dumps(note | {"kept": self.kept[0], "crc32": self.kept[1]}))

    def _start_over(self) -> None:
        discard(self.part)
        self.received = self.handed_on = self.checksum = 0
        self.kept = (0, 0)
        self.total = self.remote.bytes
        self.is_complete = False


@contextlib.contextmanager
def _open(remote: Remote, start: int, identity: str | None) -> Generator[Any]:
    """Open ``remote`` at byte ``start``. Follows redirects, without handing a token to another host."""
    from huggingface_hub import constants, get_session

    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if remote.identity is None and identity is not None:
            headers["If-Range"] = identity
    url = remote.url
    for _ in range(_REDIRECTS):
        check_url(url)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False) as response:
            if not response.has_redirect_location:
                yield response
                return
            target = urljoin(url, response.headers["Location"])
        if check_url(target) in _LOOPBACK and check_url(url) not in _LOOPBACK:
            raise DownloadError(f"`{remote.url}` leads to this machine itself", hint=remote.other_ways)
        if urlsplit(target)[:2] != urlsplit(url)[:2]:
            headers.pop("authorization", None)
        url = target
    raise DownloadError(f"`{remote.url}` leads in a circle", hint=remote.other_ways)


def _extent(response: Any) -> tuple[int, int | None]:
    """Return the first byte that ``response`` holds and the size of the whole file."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None:
            return -1, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _identity(response: Any) -> str | None:
    """Return what `If-Range` accepts: a strong `ETag`, else `Last-Modified`."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path) -> dict[str, Any]:
    """Return what is known of a part, or nothing when it is not there, cannot be read or could not be continued."""
    try:
        note = json.loads(_note(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    match note:
        case {"url": str(), "identity": str(identity), "bytes": int() | None, **more} if identity and part.is_file():
            return note if all(type(more.get(name, 0)) is int for name in ("kept", "crc32")) else {}
    return {}


def _belongs(note: Mapping[str, Any], remote: Remote) -> bool:
    if remote.identity is not None:
        return note.get("identity") == remote.identity
    return note.get("url") == remote.url


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _no_connection(host: str, error: Exception, other_ways: str) -> DownloadError:
    return DownloadError(f"no connection to {host}: {_reason(error)}", hint=f"check the network, or {other_ways}")


def _offline(other_ways: str) -> DownloadError:
    return DownloadError(
        "offline mode is on (`HF_HUB_OFFLINE`), so nothing can be fetched",
        hint=f"unset `HF_HUB_OFFLINE`, or {other_ways}",
    )


def _refusal(
    status: int, label: str, host: str, other_ways: str, code: str = "", *, is_hub: bool = True
) -> DownloadError:
    """Return the error for an HTTP status that no further attempt would change."""
    if status in (404, 410):
        return DownloadError(f"`{label}` is not on {host}, which answered {status}", hint=other_ways)
    if status not in (401, 403):
        return DownloadError(f"{host} answered {status} for `{label}`", hint=f"try again later, or {other_ways}")
    message = f"`{label}` needs a permission, or is not there: {host} answered {status}"
    if not is_hub:
        return DownloadError(message, hint=other_ways)
    ask = "ask for access on its page, then set" if code == "GatedRepo" else "set"
    return DownloadError(
        message, hint=f"{ask} `HF_TOKEN` to a token from {hub_endpoint()}/settings/tokens, or {other_ways}"
    )
