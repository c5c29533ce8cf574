"""Writing files so that a name always stands for a whole file: the new one or the one before, whatever happens between.

A file is written under a temporary name beside its place, brought to the disk and then renamed, which the system does
at once or not at all. Errors are the system's own, `OSError`: each room says in its own words what they mean.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to. When the block ends well, that file takes the place of ``path``; else it is removed.

    >>> with replacing(Path("notes.txt")) as draft:
    ...     draft.write_text("all of it")
    """
    path = path.resolve()  # a link stays a link
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk now."""
    if os.name != "posix" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
