"""Errors that a user can fix, and how they sound.

Every such error is an `LfsError`: a message in one sentence and a hint that says what to do next. The command line
shows it as two lines and leaves with its exit code. Any other exception is a bug in lfs and keeps its traceback.
"""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

_MORE_SPACE = "free some space, or set `LFS_DATA` to a folder on a larger disk"
_PERMISSIONS = "check the permissions, or set `LFS_DATA` to a folder that you can read and write"
_MORE_FILES = "allow more open files: `ulimit -n 4096`"
_REMEDIES = {
    errno.ENOSPC: _MORE_SPACE,
    errno.EDQUOT: _MORE_SPACE,
    errno.EFBIG: "allow larger files (`ulimit -f unlimited`), or set `LFS_DATA` to a folder on a disk that takes them",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "set `LFS_DATA` to a folder that you can write",
    errno.EMFILE: _MORE_FILES,
    errno.ENFILE: _MORE_FILES,
    errno.EIO: "check the disk: the system cannot read or write there",
    errno.ESTALE: "check the network disk: the system cannot read or write there",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "move that file away, or set `LFS_DATA` to another folder",
}


class LfsError(Exception):
    """A problem the user can fix.

    Args:
        message: What is wrong. One sentence, no final period, values in `backticks`.
        hint: What to do next, as an instruction. ``None`` when there is nothing to add.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(LfsError):
    """A config file, ``--set`` override, option or registered name that cannot be used."""

    exit_code = 2


class DataError(LfsError):
    """Text, a tokenizer or token shards that are missing, damaged or do not belong together."""


class CheckpointError(LfsError):
    """A run or checkpoint that is missing, damaged or does not fit."""


class DamageError(CheckpointError):
    """A checkpoint whose files are not what was written."""


class DeviceError(LfsError):
    """Hardware that is absent, too small or cannot do what was asked."""


class DownloadError(LfsError):
    """A transfer that could not be completed."""


class TrainingError(LfsError):
    """A training run that cannot go on, such as one whose loss is not a number."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a hint that names the closest choice, or lists them all when none is close."""
    choices = sorted(choices)
    if not choices:
        return f"remove `{name}`: nothing can be set here"
    close = get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"choose one of: {', '.join(choices)}"


def remedy(error: OSError) -> str | None:
    """Return what the user can do about an error of the system; None for one that has no remedy but in lfs itself."""
    return _REMEDIES.get(error.errno or 0)
