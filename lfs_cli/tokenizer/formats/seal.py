"""A checksum inside `tokenizer.json`: damage to a file that lfs wrote is found, wherever the file was copied to.

    "model": {"type": "BPE", "checksum": "sha256:<64 hex digits>", ...}

It is the SHA-256 of the file with zeros for these digits. It stands in `model`, where other libraries pass over names
that they do not know; beside `model` they refuse them. They leave it out of what they write, and a file without one is
read like any foreign file.
"""

import hashlib
import re
from pathlib import Path

from lfs_cli.errors import DataError

BLANK = f"sha256:{'0' * 64}"
"""What stands for the checksum until `seal` puts it in."""

_PLACE = re.compile(r'("checksum":\s*")([^"]*)"')  # not in a string: its quotes would have backslashes
_REMEDY = (
    "fetch the file again, or learn a tokenizer with `lfs tokenize`; if you have changed it yourself, remove its "
    "`checksum`"
)


def seal(text: str) -> str:
    """Return the JSON ``text``, in which `BLANK` is the checksum, with the right one."""
    return _PLACE.sub(rf'\g<1>{_checksum(text)}"', text, count=1)


def check_seal(text: str, path: Path) -> None:
    """Raise DataError when the ``text`` of the file ``path`` has a checksum that is not its own."""
    found = _PLACE.search(text)
    if found and found[2] != _checksum(_PLACE.sub(rf'\g<1>{BLANK}"', text, count=1)):
        raise DataError(f"`{path}` is damaged or was changed: it does not fit its checksum", hint=_REMEDY)


def _checksum(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()}"
