"""Writing files so that a name always stands for a whole file, and reading small files that a stranger may have made.

A file is written under a temporary name beside its place, its *draft*, brought to the disk and then renamed, which the
system does at once or not at all. A process that was killed leaves its draft behind; whoever writes that file next
removes it. A draft in use is told from one left behind by a lock of the system, which ends with its process.

`read_text` and `read_json` read no more than is sensible and fail in no other ways than a disk and a text can: whoever
catches OSError and ValueError has seen to damage and to malice.

Errors are the system's own, `OSError`: each room says in its own words what they mean.
"""

import contextlib
import errno
import glob
import json
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

Lock = Literal["taken", "busy", "there are no locks"]
_WINDOWS_PAUSE_SECONDS = 0.1
_WINDOWS_LOCKED_BYTE = 1 << 30  # far behind what a file of a lock holds, which others shall be able to read

LARGEST_TEXT = 1 << 26
"""Bytes beyond which a config, manifest or state is not read: what it holds may take ten times that in memory."""

DEEPEST_JSON = 100
"""Lists and objects inside each other. Python follows them to a depth of 1,000 of its own calls."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to. When the block ends well, that file takes the place of ``path``; else it is removed.

    >>> with replacing(Path("notes.txt")) as draft:
    ...     draft.write_text("all of it")
    """
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_drafts(path.parent, path.name)
    with _draft(path) as draft:
        try:
            yield draft
            if path.exists():
                shutil.copymode(path, draft)
            sync(draft)
            draft.replace(path)
            sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def replace_bytes(path: Path, content: bytes) -> None:
    """Make ``content`` the content of the file ``path``."""
    with replacing(path) as draft:
        draft.write_bytes(content)


def replace_text(path: Path, text: str) -> None:
    """Make ``text`` the content of the file ``path``, in UTF-8, with line ends as they are."""
    replace_bytes(path, text.encode("utf-8", "surrogateescape"))


def read_bytes(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Return the content of the file ``path``.

    Raises:
        OSError: When it cannot be read, is not a regular file, which may never end, or has more than ``largest`` bytes.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content


def check_regular(path: Path) -> None:
    """Raise OSError unless ``path`` is a regular file: a pipe may wait for somebody to write, a device never end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "It is not a regular file", str(path))


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether ``path``, a name below ``folder``, is a link, or below a link, that leads out of it."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def read_text(path: Path, largest: int = LARGEST_TEXT, *, errors: str = "strict") -> str:
    """Return the UTF-8 text of the file ``path``.

    Args:
        path: The file.
        largest: Bytes that it may have.
        errors: What becomes of bytes that are not UTF-8, in the words of `bytes.decode`.

    Raises:
        OSError: As `read_bytes` does.
        ValueError: When it is not UTF-8 and ``errors`` is strict.
    """
    return read_bytes(path, largest).decode("utf-8", errors)


def read_json(path: Path) -> Any:
    """Return what the JSON file ``path`` holds. Raises OSError as `read_bytes` and ValueError as `parse_json` does."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Return what the JSON ``text`` holds.

    Raises:
        ValueError: When it is not JSON, is nested too deeply to be walked, or holds half a character, which could be
            neither written nor shown.
    """
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [tree]
    for _ in range(DEEPEST_JSON):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            break
    else:
        raise ValueError("it is nested too deeply")
    if "\\u" in text:  # only an escape can spell half a character
        json.dumps(tree, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
    return tree


def read_name(path: Path) -> str:
    """Return the name that the small file ``path`` holds; an empty one when there is none to be read."""
    try:
        return read_text(path, 4096).strip()
    except (OSError, ValueError):
        return ""


def append_lines(path: Path, text: str) -> None:
    """Add whole lines at the end of a file, alone among all processes, and bring them to the disk.

    A process that is killed meanwhile, or a full disk, can leave half a line. The next call ends it, so that a reader
    who passes over lines that it cannot read loses that one and no other.
    """
    with locked(path), path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = f"\n{text}"
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def remove_drafts(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left of writing ``name``, or anything, in ``folder``. Others' drafts stay."""
    for draft in folder.glob(f".{glob.escape(name) if name is not None else '*'}.*.draft"):
        with contextlib.suppress(OSError):  # it is in use, or somebody else was faster
            if sys.platform == "win32":  # where files in use cannot be removed
                draft.unlink()
                continue
            descriptor = os.open(draft, os.O_RDONLY)
            try:
                if _try_lock(descriptor) == "taken":
                    draft.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the name ``path`` alone among all processes and threads that ask for it here; others wait.

    The lock is on a file beside it, `lock_of(path)`, which holds the number of the process. The system ends it when its
    process ends in whatever way: a file that a killed one left is no lock. Where nothing can be written, or the disk
    has no locks, as some network disks, nothing is held.

    Args:
        path: A file or folder, which need not be there. Its parent is made when missing.
        on_wait: Called once when another process has it. What it raises ends the waiting.

    Raises:
        OSError: When the file beside it cannot be made though the folder can be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_of(path.resolve())
        descriptor = _lock(lock, on_wait)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield
        return
    try:
        yield
    finally:
        if sys.platform != "win32":  # before the lock ends, so that it is ours that goes
            with contextlib.suppress(OSError):
                lock.unlink()
        os.close(descriptor)


def lock_of(path: Path) -> Path:
    """Return the file whose lock stands for ``path`` (`locked`)."""
    return path.with_name(f".{path.name}.lock")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk now."""
    if os.name != "posix" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Make an empty draft of ``path``, and keep it from `remove_drafts` of others meanwhile."""
    while True:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
        try:
            descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            continue
        except BaseException:  # a signal may come right after the file did
            draft.unlink(missing_ok=True)
            raise
        if sys.platform == "win32":  # an open file could not be renamed; those who write to it hold it themselves
            os.close(descriptor)
            yield draft
            return
        try:
            # A draft that somebody else has locked, or that is gone, was met by `remove_drafts` in between.
            if _try_lock(descriptor) != "busy" and _is_still(draft, descriptor):
                yield draft
                return
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def _lock(lock: Path, on_wait: Callable[[], None] | None) -> int:
    """Return the descriptor of a file that this process has locked. Closing it ends the lock."""
    while True:
        # Not through a link: what it points to would be overwritten
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if _try_lock(descriptor) == "busy":
                if on_wait is not None:
                    on_wait()
                    on_wait = None
                _wait_for_lock(descriptor)
            if _is_still(lock, descriptor):
                with contextlib.suppress(OSError):  # a full disk; the number is only for messages
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, b"%d\n" % os.getpid())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has removed it, and another file may be there now


def _is_still(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> Lock:
        os.lseek(descriptor, _WINDOWS_LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return "busy"
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return "taken"

    def _wait_for_lock(descriptor: int) -> None:
        while _try_lock(descriptor) == "busy":
            time.sleep(_WINDOWS_PAUSE_SECONDS)

else:
    import fcntl

    def _try_lock(descriptor: int) -> Lock:
        """Take the lock of a file, unless another process or another part of this one has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "busy"
        except OSError:  # as on some network disks
            return "there are no locks"
        return "taken"

    def _wait_for_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
