"""The text that `lfs bench tokenizer` reads, found before anything is imported or measured. Imports no torch."""

import errno
from difflib import get_close_matches
from pathlib import Path

from lfs_cli.config import BenchConfig
from lfs_cli.errors import DataError
from lfs_cli.runs.folder import DataFolder


def find_text(config: BenchConfig, data: DataFolder | None = None) -> Path | None:
    """Return the training text to measure on, or None for the built-in one, which is made on the spot.

    Args:
        config: What to measure.
        data: Data folder; by default the one of this process.

    Raises:
        DataError: When it is not there or cannot be read.
    """
    if config.benchmark != "tokenizer":
        return None
    if config.tokenizer.file is not None:
        path = Path(config.tokenizer.file)
        _check_readable(path)
        return path
    name = config.tokenizer.dataset
    if name == "sample":  # of any size, whatever the copy in the data folder has
        return None
    folder = (data or DataFolder.here()).raw(name)
    if (folder / "train.txt").is_file():
        return folder / "train.txt"
    raise DataError(f"no text for `{name}` in {folder}", hint=f"run `lfs download {name}`")


def _check_readable(path: Path) -> None:
    try:
        if not path.is_fifo():  # which is to be opened once
            path.open("rb").close()
    except OSError as error:
        hint = "name a text with `--file` or `--dataset`"
        if error.errno == errno.ENOENT and path.parent.is_dir():
            names = [file.name for file in path.parent.iterdir() if file.is_file()]
            near = get_close_matches(path.name, names, n=1, cutoff=0.75)
            hint = f"did you mean `{path.with_name(near[0])}`?" if near else hint
        raise DataError(f"cannot read {path}: {error.strerror}", hint=hint) from None
