"""Looking at a tokenizer, comparing two, writing one for others: what `lfs tokenize` does beside encoding datasets.

Two tokenizers cut the same text at different places. Between two places where both cut, each has one token, which is
then the same one, or they differ there: `Comparison.differences` are these stretches.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path

import numpy as np

from lfs_cli.config import TokenizeConfig
from lfs_cli.errors import DataError
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.tokenize import FallbackIds, find_texts, load_tokenizer
from lfs_cli.tokenizer import PATTERNS, Tokenizer, formats
from lfs_cli.tokenizer.blocks import reading, to_utf8
from lfs_cli.tokenizer.split import pattern_for

COMPARED_BYTES = 1_000_000
"""Bytes at the start of a text in which differences are looked for; tokens are counted in all of it."""

SHOWN_DIFFERENCES = 12
LONGEST_DIFFERENCE = 60
"""Bytes of a stretch that is worth showing as an example."""


@dataclass(frozen=True)
class Piece:
    """One token of a text.

    Args:
        id: Its id.
        token: Its bytes.
        start: Where it begins in the UTF-8 bytes of the text.
        is_special: Whether it is a special token.
    """

    id: int
    token: bytes
    start: int
    is_special: bool

    @property
    def stop(self) -> int:
        """Where it ends in the UTF-8 bytes of the text."""
        return self.start + len(self.token)


@dataclass(frozen=True)
class Side:
    """One tokenizer of a comparison and what it makes of the text.

    Args:
        name: Folder or file that it was read from.
        vocab_size: Its tokens.
        pattern: How it cuts text into words.
        tokens: Tokens of the text.
        bytes_per_token: Bytes of text that a token stands for, on average; None for an empty text.
        fallback_share: Share of the tokens that stand for one byte of a longer character; None for an empty text.
    """

    name: str
    vocab_size: int
    pattern: str
    tokens: int
    bytes_per_token: float | None
    fallback_share: float | None


@dataclass(frozen=True)
class Difference:
    """A stretch of text that two tokenizers cut differently.

    Args:
        text: Its bytes.
        first: Tokens of the first tokenizer.
        second: Tokens of the second.
        times: How often it occurs.
    """

    text: bytes
    first: tuple[bytes, ...]
    second: tuple[bytes, ...]
    times: int


@dataclass(frozen=True)
class Comparison:
    """Two tokenizers on the same text.

    Args:
        source: What the text is called.
        bytes: Its size.
        first: The tokenizer that was asked about.
        second: The other one.
        shared: Tokens, by their bytes, that both have.
        differences: Where they differ most in the beginning of the text, by the number of tokens that one saves.
    """

    source: str
    bytes: int
    first: Side
    second: Side
    shared: int
    differences: tuple[Difference, ...]


def find_tokenizer(config: TokenizeConfig, data: DataFolder) -> tuple[str, Tokenizer]:
    """Return the tokenizer that ``config`` names, or the newest of its dataset, or the newest of all, with its path.

    Raises:
        ConfigError: For an unknown pattern.
        DataError: When there is none, or it cannot be used.
    """
    if config.tokenizer is not None:
        return config.tokenizer, load_tokenizer(config.tokenizer, config)
    found = [path for path in data.root.glob("tokenizers/*/tokenizer.json") if _is_of(path.parent.name, config.dataset)]
    if not found:
        of = f" of `{config.dataset}`" if config.dataset else ""
        raise DataError(
            f"no tokenizer{of} in `{data.root / 'tokenizers'}`",
            hint=f"name one with `--tokenizer PATH`, or learn one: `lfs tokenize{' ' * bool(of)}{config.dataset}`",
        )
    newest = max(found, key=lambda path: path.stat().st_mtime_ns).parent
    return str(newest), Tokenizer.load(newest)


def _is_of(name: str, dataset: str) -> bool:
    return not dataset or name.startswith(f"{dataset}-")


def pieces_of(tokenizer: Tokenizer, config: TokenizeConfig) -> Iterator[Piece]:
    """Yield the tokens of the text or file that ``config`` names, in flat memory for a file. Raises DataError."""
    specials = set(tokenizer.special_ids.values())
    start = 0
    for ids in _ids(tokenizer, config):
        for id in ids:
            piece = Piece(id, tokenizer.vocab[id], start, id in specials)
            start = piece.stop
            yield piece


def _ids(tokenizer: Tokenizer, config: TokenizeConfig) -> Iterator[list[int]]:
    if config.text is not None:
        yield tokenizer.encode(config.text)
    elif config.file is not None:
        for array in tokenizer.encode_file(_path(config.file), workers=config.workers):
            yield array.tolist()


def _path(file: str) -> Path:
    return Path("/dev/stdin" if file == "-" else file)


def compare(config: TokenizeConfig, data: DataFolder, observer: Observer) -> Comparison:
    """Compare two tokenizers on a text: that of ``config``, or the validation text of its dataset.

    Raises:
        ConfigError: For an unknown pattern.
        DataError: When a tokenizer or the text is missing or cannot be used.
    """
    name, first = find_tokenizer(config, data)
    other = config.compare or ""
    second = Tokenizer.load(other)
    if config.text is not None:
        source, size, start = "the given text", len(to_utf8(config.text)), config.text
        counts = [_count(tokenizer, [np.array(tokenizer.encode(start), np.uint32)]) for tokenizer in (first, second)]
    else:
        path = _regular(Path(config.file)) if config.file is not None else find_texts(config.dataset, data)["valid"]
        source, size = str(path), path.stat().st_size
        with reading(path), path.open("rb") as file:
            start = file.read(COMPARED_BYTES).decode("utf-8", "replace")
        counts = []
        for label, tokenizer in ((name, first), (other, second)):
            progress = _progress(observer, f"encoding with {Path(label).name}")
            counts.append(_count(tokenizer, tokenizer.encode_file(path, workers=config.workers, on_progress=progress)))
            observer.finish_progress()
    sides = [
        Side(
            name=label,
            vocab_size=len(tokenizer.vocab),
            pattern=tokenizer.pattern,
            tokens=tokens,
            bytes_per_token=size / tokens if tokens else None,
            fallback_share=fallbacks / tokens if tokens else None,
        )
        for label, tokenizer, (tokens, fallbacks) in zip((name, other), (first, second), counts, strict=True)
    ]
    shared = set(first.vocab.values()) & set(second.vocab.values())
    return Comparison(source, size, sides[0], sides[1], len(shared), differences(first, second, start))


def _regular(path: Path) -> Path:
    """Return the path of a file that can be read more than once. Raises DataError."""
    with reading(path):
        path.stat()
    if path.is_dir() or not path.is_file():
        raise DataError(
            f"`{path}` is not a regular file, and comparing reads it several times", hint="copy it into a file first"
        )
    return path


def _progress(observer: Observer, label: str):  # noqa: ANN202  what `encode_file` calls
    return lambda done, total: observer.progress(label, done, total, "B")


def _count(tokenizer: Tokenizer, arrays: Iterable[np.ndarray]) -> tuple[int, int]:
    """Return the tokens in ``arrays``, and those that stand for one byte of a longer character."""
    fallback_ids = FallbackIds(tokenizer)
    tokens = fallbacks = 0
    for ids in arrays:
        tokens += len(ids)
        fallbacks += fallback_ids.count_in(ids)
    return tokens, fallbacks


def differences(first: Tokenizer, second: Tokenizer, text: str) -> tuple[Difference, ...]:
    """Return the stretches of ``text`` that the tokenizers cut differently, the most important first."""
    data = to_utf8(text)
    both = [[tokenizer.vocab[id] for id in tokenizer.encode(text)] for tokenizer in (first, second)]
    ends = [np.fromiter(accumulate(map(len, tokens)), np.int64) for tokens in both]
    cuts = np.intersect1d(*ends, assume_unique=False)
    places = [np.searchsorted(ends_of, cuts) + 1 for ends_of in ends]  # tokens before each cut
    found: Counter[tuple[bytes, tuple[bytes, ...], tuple[bytes, ...]]] = Counter()
    stretches = zip(*(pairwise([0, *array.tolist()]) for array in (cuts, *places)), strict=True)
    for (start, stop), (a, b), (c, d) in stretches:
        if (b - a > 1 or d - c > 1) and stop - start <= LONGEST_DIFFERENCE:
            found[data[start:stop], tuple(both[0][a:b]), tuple(both[1][c:d])] += 1

    def saved(item: tuple[tuple[bytes, tuple[bytes, ...], tuple[bytes, ...]], int]) -> tuple[int, int, bytes]:
        (text, ours, theirs), times = item
        return -times * abs(len(ours) - len(theirs)), -times, text

    ranked = sorted(found.items(), key=saved)
    return tuple(Difference(*stretch, times) for stretch, times in islice(ranked, SHOWN_DIFFERENCES))


def export(config: TokenizeConfig, data: DataFolder) -> tuple[str, list[Path]]:
    """Write a tokenizer in the format that ``config`` names; return where it came from and the files.

    Raises:
        ConfigError: For an unknown pattern.
        DataError: When there is no tokenizer, the format cannot hold it, or the files cannot be written.
    """
    name, tokenizer = find_tokenizer(config, data)
    format = config.export or ""
    folder = Path(config.out if config.out is not None else f"{Path(name).resolve().name.split('.')[0]}-{format}")
    if folder.resolve() == Path(name).resolve() or folder.resolve() == Path(name).resolve().parent:
        raise DataError(f"`{folder}` is where the tokenizer comes from", hint="name another folder with `--out`")
    pattern = PATTERNS.get(tokenizer.pattern) or pattern_for(tokenizer.pattern)
    write = formats.EXPORTS[format]
    return name, write(folder, tokenizer.vocab, tokenizer.merges, tokenizer.special_ids, pattern, tokenizer.whole_words)
