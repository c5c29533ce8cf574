"""Checksums of a folder: a flipped bit or a cut file is found before it is used, and named.

`SHA256SUMS` lists the other files of a folder with their SHA-256, one a line, as the program of that name writes it:
where there is no lfs, `sha256sum --check SHA256SUMS` verifies a checkpoint too. It is against accidents. Whoever can
change a file can change its checksum; what protects from hostile files is that reading one runs no code.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from lfs_cli.errors import DamageError
from lfs_cli.files import check_regular, read_text, replace_text

CHECKSUMS = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """List the files of ``folder`` in its `SHA256SUMS`. Raises OSError when one cannot be read or the list written."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    replace_text(folder / CHECKSUMS, "".join(f"{_digest(path)}  {path.name}\n" for path in files))


def verify_checksums(folder: Path, names: Iterable[str] = ()) -> None:
    """Compare files of ``folder`` with its `SHA256SUMS`.

    Args:
        folder: Holds the list.
        names: Files to compare, which the list must have; by default all that it has.

    Raises:
        DamageError: When a file is missing, is not what was written, or is not in the list.
    """
    listed = _read(folder)
    for name in names or listed:
        try:
            is_whole = _digest(folder / name) == listed.get(name)
        except OSError as error:
            raise _damaged(folder, f"cannot read {folder / name}: {error.strerror}") from None
        if not is_whole:
            raise _damaged(folder, f"{folder / name} is damaged: its SHA-256 is not the one in {CHECKSUMS}")


def _read(folder: Path) -> dict[str, str]:
    """Return the checksums of a folder by file name. A name that would lead out of the folder is damage too."""
    try:
        lines = read_text(folder / CHECKSUMS).splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise _damaged(folder, f"cannot read {folder / CHECKSUMS}: {reason}") from None
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not listed or any(not name or Path(name).name != name for name in listed):
        raise _damaged(folder, f"{folder / CHECKSUMS} is damaged: it is no list of checksums")
    return listed


def _digest(path: Path) -> str:
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, problem: str) -> DamageError:
    others = sorted(path.parent.name for path in folder.parent.glob(f"step-*/{CHECKSUMS}") if path.parent != folder)
    if others:
        hint = f"use another checkpoint, such as with `--set checkpoint={others[-1]}`"
    else:
        hint = "put back a copy of the checkpoint, or train again"
    return DamageError(problem, hint=hint)
