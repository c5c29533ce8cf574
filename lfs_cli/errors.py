"""Errors that a user can fix, and how they sound.

Every such error is an `LfsError`: a message in one sentence and a hint that says what to do next. The command line
shows it as two lines and leaves with its exit code. Any other exception is a bug in lfs and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


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
