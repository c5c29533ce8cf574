"""`lfs train --check-data`: compare all data that an experiment reads with their checksums, and change nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lfs_cli.config import TokenizeConfig, TrainConfig
from lfs_cli.corpus.check import check_text, check_tokens
from lfs_cli.corpus.shards import Tokens
from lfs_cli.errors import DataError
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.tokenize import SPLITS, name_of
from lfs_cli.tokenizer import Tokenizer
from lfs_cli.tokenizer.blocks import reading


@dataclass(frozen=True)
class Checked:
    """One part of the data.

    Args:
        what: `text`, `tokenizer` or `tokens`.
        path: Where it is.
        bytes: What was read of it.
        seconds: Time that took.
        outcome: `whole`; `no checksum` for a text that no manifest names; `damaged`.
        problem: What is wrong.
    """

    what: str
    path: Path
    bytes: int
    seconds: float
    outcome: str
    problem: DataError | None = None


def check_data(config: TrainConfig, data: DataFolder, observer: Observer | None = None) -> tuple[Checked, ...]:
    """Read all of the texts, the tokenizer and the tokens that ``config`` trains on, and compare what can be compared.

    Texts may be missing: training does not need them when there are tokens.

    Returns:
        Each part, whether it is whole or not.

    Raises:
        DataError: When there are no tokens, or no tokenizer to judge them by.
    """
    observer = observer or Observer()
    dataset = config.data.dataset
    asked = TokenizeConfig(dataset=dataset, vocab_size=config.model.vocab_size, tokenizer=config.data.tokenizer)
    name = name_of(asked, dataset, data)
    tokenizer_path, folder = data.tokenizer(name), data.tokens(name)
    make = f"lfs tokenize {dataset} --vocab {config.model.vocab_size}"
    if config.data.tokenizer is not None:
        make = f"lfs tokenize {dataset} --tokenizer {config.data.tokenizer}"
    if not folder.is_dir():
        raise DataError(f"no tokens `{name}` in `{folder.parent}`", hint=f"make them: `{make}`")
    parts: list[Checked] = []
    found: list[Tokenizer] = []
    try:
        for path in (data.raw(dataset) / f"{split}.txt" for split in SPLITS):
            if path.is_file():
                parts.append(_checked("text", path, partial(_check_text, path, observer)))
        parts.append(_checked("tokenizer", tokenizer_path, partial(_check_tokenizer, tokenizer_path, found), make))
        for split in SPLITS:
            check = partial(_check_split, folder, split, found, observer)
            parts.append(_checked("tokens", folder / f"{split}-*.bin", check, make))
    finally:
        observer.finish_progress()
    return tuple(parts)


def _checked(what: str, path: Path, check: Callable[[], tuple[int, str]], make: str = "") -> Checked:
    """Return how a check went. A part that is not whole is mended by the command ``make``, if there is one."""
    started = time.perf_counter()
    try:
        size, outcome = check()
    except DataError as error:
        problem = DataError(str(error), hint=f"run `{make}`") if make else error
        return Checked(what, path, 0, time.perf_counter() - started, "damaged", problem)
    return Checked(what, path, size, time.perf_counter() - started, outcome)


def _check_text(path: Path, observer: Observer) -> tuple[int, str]:
    with reading(path):
        is_recorded = check_text(path, observer)
        return path.stat().st_size, "whole" if is_recorded else "no checksum"


def _check_tokenizer(folder: Path, found: list[Tokenizer]) -> tuple[int, str]:
    found.append(Tokenizer.load(folder))
    return (folder / "tokenizer.json").stat().st_size, "whole"


def _check_split(folder: Path, split: str, found: list[Tokenizer], observer: Observer) -> tuple[int, str]:
    tokens = Tokens.open(folder, split, tokenizer_hash=found[0].hash if found else None)
    size, width = len(tokens) * tokens.dtype.itemsize, tokens.dtype.itemsize
    check_tokens(
        tokens,
        found[0].vocab_size if found else 1 << 32,
        lambda done: observer.progress(f"verifying {split} tokens", done * width, size),
    )
    return size, "whole"
