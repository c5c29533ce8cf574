"""`lfs tokenize`: learn a tokenizer on a dataset's training text and encode the dataset into token shards.

    data/raw/<dataset>/train.txt, valid.txt
        -> data/tokenizers/<name>/tokenizer.json, manifest.json      the tokenizer, and what it was learned from
        -> data/tokens/<name>/{train,valid}-00000.bin, manifest.json  ids, and what they were made from

The name is `<dataset>-<vocabulary>`, such as `tinystories-10000`, with `-<pattern>` behind it for any pattern but
GPT-2's. With a given tokenizer it is `<dataset>-<name of the tokenizer's folder>`, and the tokenizer is copied there.

What is there already and was made from the same text in the same way is used again. A text counts as the same when its
size and its time of change are. Of a text that is gone, what was made of it is enough to train on. A second process
that is to make the same waits for the first, and then finds it made.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lfs_cli.config import TokenizeConfig
from lfs_cli.corpus.shards import Tokens, settle, write_shards
from lfs_cli.corpus.sources import DATASETS
from lfs_cli.corpus.text import Inspector
from lfs_cli.errors import DataError, did_you_mean
from lfs_cli.files import locked, read_json, remove_drafts
from lfs_cli.memory import forget_peak, peak_bytes
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.tokenizer import Tokenizer, find_pattern, formats, learn_bpe, will_compile
from lfs_cli.tokenizer.blocks import reading, replace_file, writing
from lfs_cli.tokenizer.learn import LearnStats

SPLITS = ("train", "valid")
LONGEST_TOKENS = 10
PILE_BYTES = 825 * 10**9
"""Size of The Pile, a corpus that models of a few billion weights are trained on (arXiv:2101.00027)."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Stage:
    """One part of the work, and what it took.

    Args:
        name: `learn`, `train` or `valid`: learning, or encoding one of the texts.
        bytes: Size of the text.
        seconds: Time it took; None when an earlier result was used again.
        tokens: Tokens learned or written.
        peak_bytes: Most memory that this process held meanwhile; None where the system does not tell.
        parts: Seconds of each part of learning: `counting` words, `merging` pairs.
        fallbacks: Tokens written that stand for one byte of a longer character, since no token has the character.
    """

    name: str
    bytes: int
    seconds: float | None
    tokens: int
    peak_bytes: int | None = None
    parts: tuple[tuple[str, float], ...] = ()
    fallbacks: int | None = None

    @property
    def rate(self) -> float | None:
        """MB of text a second."""
        return self.bytes / self.seconds / 1e6 if self.seconds else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token stands for, on average."""
        return self.bytes / self.tokens if self.name in SPLITS and self.tokens else None

    @property
    def fallback_share(self) -> float | None:
        """Share of the tokens that stand for one byte of a longer character."""
        return self.fallbacks / self.tokens if self.fallbacks is not None and self.tokens else None


@dataclass(frozen=True)
class TokenizeResult:
    """Where tokenizer and tokens are, and what making them took.

    Args:
        dataset: Name of the dataset.
        name: Name of the folders of tokenizer and tokens.
        tokenizer: Folder with `tokenizer.json`.
        tokens: Folder with the shards.
        tokenizer_hash: What the tokenizer calls itself, 64 hex digits.
        vocab_size: Rows that an embedding needs.
        longest_tokens: The longest tokens but the special ones, as text, the longest first.
        stages: Parts of the work, in order.
        seconds: Time of everything.
        peak_bytes: Most memory that this process held in any stage; None where the system does not tell.
    """

    dataset: str
    name: str
    tokenizer: Path
    tokens: Path
    tokenizer_hash: str
    vocab_size: int
    longest_tokens: tuple[str, ...]
    stages: tuple[Stage, ...]
    seconds: float
    peak_bytes: int | None

    @property
    def pile_seconds(self) -> float | None:
        """Time that encoding The Pile would take at the rate of the training text; None when that was not encoded."""
        rate = next((stage.rate for stage in self.stages if stage.name == "train"), None)
        return PILE_BYTES / 1e6 / rate if rate else None

    def bytes_per_token(self, split: str) -> float:
        """Return the bytes of text that a token of ``split`` stands for, on average; 0 for a text without tokens."""
        return next((stage.bytes_per_token or 0.0 for stage in self.stages if stage.name == split), 0.0)


def tokenize(
    config: TokenizeConfig, data: DataFolder, observer: Observer | None = None, *, verify: bool = False
) -> TokenizeResult:
    """Learn a tokenizer and encode a dataset, using again what is up to date.

    Args:
        config: What to make.
        data: The data folder.
        observer: Is told of progress.
        verify: Compare all tokens that are there with their checksums before using them again. Without, that happens
            as they are read.

    Raises:
        ConfigError: For an unknown pattern.
        DataError: When the text or the tokenizer is missing or cannot be used, or the disk cannot be written.
    """
    observer, started = observer or Observer(), time.perf_counter()
    find_pattern(config.pattern)
    dataset = config.dataset or _newest_dataset(data)
    texts = find_texts(dataset, data)
    given = load_tokenizer(config.tokenizer, config) if config.tokenizer is not None else None
    workers = min(config.workers, 4 * (os.cpu_count() or 1))  # each holds its own part of the text
    config = config.model_copy(update={"workers": workers})
    name = name_of(config, dataset, data)
    stages: list[Stage] = []
    try:
        with _alone(data.tokens(name), observer):
            for split in SPLITS:
                settle(data.tokens(name), split)
            for folder in (data.tokens(name), data.tokenizer(name)):
                remove_drafts(folder)
            if given is None:
                tokenizer, stage = _learned(config, dataset, texts["train"], data.tokenizer(name), observer)
                stages.append(stage)
            else:
                tokenizer = given
                _keep_copy(tokenizer, data.tokenizer(name))
            encoding = _Encoding(dataset, tokenizer, data.tokens(name), config.workers, observer, verify)
            stages += [encoding.run(split, texts[split]) for split in SPLITS]
    finally:
        observer.finish_progress()
    return _result(dataset, name, data, tokenizer, stages, time.perf_counter() - started)


def made_before(config: TokenizeConfig, data: DataFolder) -> TokenizeResult | None:
    """Return what `tokenize` made of a text that need not be there any more: tokens are all that training reads.

    Args:
        config: What was asked for; it names its dataset.
        data: The data folder.

    Returns:
        None when it was not made, or not as ``config`` asks, or is not whole.
    """
    name = name_of(config, config.dataset, data)
    folder = data.tokens(name)
    try:
        tokenizer, manifest = Tokenizer.load(data.tokenizer(name)), _read_manifest(folder)
        if config.tokenizer is None:
            learned = _read_manifest(data.tokenizer(name))
            is_asked = all(learned.get(key) == value for key, value in _asked(config, config.dataset).items())
        else:
            is_asked = load_tokenizer(config.tokenizer, config).hash == tokenizer.hash
        if not is_asked or manifest.get("tokenizer_hash") != tokenizer.hash:
            return None
        stages = []
        for split in SPLITS:
            count, record = len(Tokens.open(folder, split, tokenizer_hash=tokenizer.hash)), manifest["splits"][split]
            if count != record["tokens"] or type(record["bytes"]) is not int:
                return None
            stages.append(Stage(split, record["bytes"], None, count))
    except (DataError, KeyError, TypeError):
        return None
    return _result(config.dataset, name, data, tokenizer, stages, 0.0)


def _result(
    dataset: str, name: str, data: DataFolder, tokenizer: Tokenizer, stages: list[Stage], seconds: float
) -> TokenizeResult:
    learned = (token for id, token in tokenizer.vocab.items() if id not in tokenizer.special_ids.values())
    longest = sorted(learned, key=lambda token: (-len(token), token))
    return TokenizeResult(
        dataset=dataset,
        name=name,
        tokenizer=data.tokenizer(name),
        tokens=data.tokens(name),
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        longest_tokens=tuple(token.decode("utf-8", "backslashreplace") for token in longest[:LONGEST_TOKENS]),
        stages=tuple(stages),
        seconds=seconds,
        peak_bytes=max((stage.peak_bytes or 0 for stage in stages), default=0) or peak_bytes(),
    )


@contextmanager
def _alone(folder: Path, observer: Observer) -> Iterator[None]:
    """Hold ``folder``, and the tokenizer of the same name, for this process. A second one waits here."""
    wait = partial(observer.stage, f"waiting for another process that is writing {folder}")
    with ExitStack() as stack:
        with writing(folder):
            stack.enter_context(locked(folder, on_wait=wait))
        yield


def load_tokenizer(path: str | Path, config: TokenizeConfig) -> Tokenizer:
    """Return the tokenizer at ``path``, with the pattern and special tokens that ``config`` names where it names any.

    Raises:
        ConfigError: For an unknown pattern.
        DataError: When there is no tokenizer, or it says itself something else.
    """
    asked = config.model_fields_set
    vocab, merges, special_tokens, pattern, whole_words = formats.read(
        Path(path),
        pattern=find_pattern(config.pattern) if "pattern" in asked else None,
        special_tokens=config.special_tokens if "special_tokens" in asked else None,
    )
    return Tokenizer(vocab, merges, special_tokens, pattern=pattern, whole_words=whole_words)


def _newest_dataset(data: DataFolder) -> str:
    """Return the dataset that was brought last: the one with the newest manifest."""
    folders = [path.parent for path in data.root.glob("raw/*/train.txt")]
    if not folders:
        raise DataError(
            f"no dataset in `{data.root / 'raw'}`", hint="bring one: `lfs download sample` needs no network"
        )

    def brought(folder: Path) -> float:
        manifest = folder / "manifest.json"
        return (manifest if manifest.exists() else folder / "train.txt").stat().st_mtime

    return max(folders, key=brought).name


def find_texts(dataset: str, data: DataFolder) -> dict[str, Path]:
    """Return the text of each split, by default of the newest dataset. Raises DataError when it is missing or empty."""
    dataset = dataset or _newest_dataset(data)
    folder = data.raw(dataset)
    paths = {split: folder / f"{split}.txt" for split in SPLITS}
    if not folder.is_dir():
        others = [path.name for path in data.root.glob("raw/*") if path.is_dir()]
        hint = f"run `lfs download {dataset}`"
        if dataset not in DATASETS:
            hint = f"bring it: `lfs download --from FILE --name {dataset}`"
        if others and did_you_mean(dataset, others).startswith("did you mean"):
            hint = did_you_mean(dataset, others)
        raise DataError(f"no dataset `{dataset}` in `{data.root / 'raw'}`", hint=hint)
    missing = [f"`{path}`" for path in paths.values() if not path.is_file()]
    if missing:
        raise DataError(f"the dataset `{dataset}` lacks {' and '.join(missing)}", hint=f"run `lfs download {dataset}`")
    for path in paths.values():
        if not path.stat().st_size:
            raise DataError(f"`{path}` is empty", hint="bring a text: `lfs download --from FILE --name NAME`")
    return paths


def _check_text(path: Path, observer: Observer) -> None:
    """Raise DataError when a file does not hold text; warn when some of it is not UTF-8."""
    inspector = Inspector(str(path))
    with reading(path), path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            if inspector.bytes == 0:
                _check_encoding(path, block)
            inspector.look(block)
    inspector.finish()
    if inspector.first_invalid is not None:
        observer.warning(
            f"`{path}` is not UTF-8 at byte {inspector.first_invalid:,}; such bytes are kept, each as a character"
        )


def _check_encoding(path: Path, start: bytes) -> None:
    """Raise DataError when more of the text's start is invalid UTF-8 than valid."""
    start = start[: 1 << 16]
    valid = start.decode("utf-8", "ignore").encode()
    if 2 * len(valid) < len(start):
        raise DataError(
            f"`{path}` is not text in UTF-8", hint=f"convert it first: `iconv -f ENCODING -t UTF-8 {path} > text.txt`"
        )


def _source(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _check_unchanged(path: Path, source: dict[str, Any]) -> None:
    """Raise DataError when a text is no longer what it was before it was read: parts of two texts make no corpus."""
    try:
        is_same = _source(path) == source
    except FileNotFoundError:
        is_same = False
    if not is_same:
        raise DataError(
            f"`{path}` was changed or removed while it was read",
            hint="run the same command again when it is as it should be; what was here before is as it was",
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of ``folder``; one that is missing or damaged is empty, and what it tells is made again."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    replace_file(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _learned(
    config: TokenizeConfig, dataset: str, path: Path, folder: Path, observer: Observer
) -> tuple[Tokenizer, Stage]:
    """Return the tokenizer in ``folder`` if it is what ``config`` asks for, else learn it and put it there."""
    asked = {**_asked(config, dataset), "source": _source(path)}
    size = path.stat().st_size
    kept = _kept_tokenizer(folder, asked)
    if kept is not None:
        observer.stage(f"using the tokenizer in {folder}: it was learned from this text")
        return kept, Stage("learn", size, None, kept.vocab_size)

    _check_text(path, observer)
    observer.stage(f"learning {config.vocab_size:,} tokens on {path}")
    if will_compile("learning", size, config.pattern):
        observer.stage("compiling the loops that learn, once on this machine")
    forget_peak()
    units, stats = {"counting": "B", "merging": "merges"}, list[LearnStats]()
    started = time.perf_counter()
    vocab, merges = learn_bpe(
        path,
        config.vocab_size,
        config.special_tokens,
        pattern=config.pattern,
        workers=config.workers,
        max_words=config.max_words,
        sample_bytes=config.sample_bytes,
        on_progress=lambda phase, done, total: observer.progress(phase, done, total, units[phase]),
        on_stats=stats.append,
    )
    seconds = time.perf_counter() - started
    observer.finish_progress()
    if len(vocab) < config.vocab_size:
        observer.warning(
            f"the text has only {len(vocab):,} different tokens, not {config.vocab_size:,}: every word is one token"
        )
    _check_unchanged(path, asked["source"])
    tokenizer = Tokenizer(vocab, merges, config.special_tokens, pattern=config.pattern)
    tokenizer.save(folder)
    _write_manifest(folder, {**asked, "tokens": len(vocab), "hash": tokenizer.hash, "seconds": round(seconds, 3)})
    took = stats[0]
    if took.dropped_words:
        observer.warning(
            f"{took.dropped_words:,} rare words, {took.dropped_share:.1%} of the text, did not fit into `max_words` "
            f"({config.max_words:,}); merges that only they have may be missing"
        )
    parts = (("counting", took.count_seconds), ("merging", took.merge_seconds))
    return tokenizer, Stage("learn", took.bytes, seconds, len(vocab), peak_bytes(), parts)


def _asked(config: TokenizeConfig, dataset: str) -> dict[str, Any]:
    """Return what the manifest of a tokenizer says of how it was learned, but for the text."""
    return {
        "dataset": dataset,
        "vocab_size": config.vocab_size,
        "special_tokens": list(config.special_tokens),
        "pattern": config.pattern,
        "max_words": config.max_words,
        "sample_bytes": config.sample_bytes,
    }


def _kept_tokenizer(folder: Path, asked: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer in ``folder`` when it is whole and was learned as ``asked``."""
    manifest = _read_manifest(folder)
    if any(manifest.get(key) != value for key, value in asked.items()):
        return None
    try:
        tokenizer = Tokenizer.load(folder)
    except DataError:
        return None
    return tokenizer if tokenizer.hash == manifest.get("hash") else None


def name_of(config: TokenizeConfig, dataset: str, data: DataFolder) -> str:
    """Return the name for the tokens of ``dataset`` that ``config`` asks for, and for their tokenizer.

    A given tokenizer at `tokens/mine/tokenizer.json` or `tokens/mine` is called `mine`, and one at
    `files/gpt2_vocab.json` is called `gpt2`. One learned on the dataset itself already has the dataset's name in its
    own.
    """
    if config.tokenizer is None:
        return f"{dataset}-{config.vocab_size}" + (f"-{config.pattern}" if config.pattern != "gpt2" else "")
    path = Path(config.tokenizer).resolve()
    if path.is_dir():
        folder, own = path, path.name
    else:
        folder, own = path.parent, re.sub(r"[_.-]?(tokenizer\.json|vocab\.json|merges\.txt)$", "", path.name)
    own = re.sub(r"[^A-Za-z0-9._-]+", "-", own or folder.name).strip("-.") or "tokenizer"
    if folder.parent == (data.root / "tokenizers").resolve() and own.startswith(f"{dataset}-"):
        return own
    return f"{dataset}-{own}"


def _keep_copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Put a given tokenizer beside the learned ones, unless it is there."""
    try:
        if Tokenizer.load(folder).hash == tokenizer.hash:
            return
    except DataError:
        pass
    tokenizer.save(folder)
    _write_manifest(folder, {"hash": tokenizer.hash, "tokens": len(tokenizer.vocab)})


class FallbackIds:
    """Counts the tokens that stand for one byte of a longer character: the character has no token of its own.

    Args:
        tokenizer: Says which ids they are. There are few ranges of them, which are counted faster than looked up.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = sorted(id for id, token in tokenizer.vocab.items() if len(token) == 1 and token[0] >= 0x80)
        self._ranges: list[tuple[int, int]] = []
        for id in ids:
            if self._ranges and self._ranges[-1][1] == id:
                self._ranges[-1] = (self._ranges[-1][0], id + 1)
            else:
                self._ranges.append((id, id + 1))

    def count_in(self, ids: np.ndarray) -> int:
        """Return how many of ``ids``, which are unsigned, are such tokens."""
        # Ids below the start of a range wrap round to large numbers, so that one comparison is enough.
        return sum(int(np.count_nonzero(ids - ids.dtype.type(start) < stop - start)) for start, stop in self._ranges)


@dataclass(frozen=True)
class _Encoding:
    """Encodes texts of one dataset with one tokenizer into the shards of one folder."""

    dataset: str
    tokenizer: Tokenizer
    folder: Path
    workers: int
    observer: Observer
    verify: bool

    def run(self, split: str, path: Path) -> Stage:
        """Write the shards of ``split``, unless those there are up to date."""
        with reading(path):
            source = _source(path)
        size, kept = source["bytes"], self._kept_tokens(split, source)
        if kept is not None:
            self.observer.stage(f"using the {split} tokens in {self.folder}: they were made from this text")
            return Stage(split, size, None, kept, fallbacks=self._recorded(split, "fallbacks"))
        _check_text(path, self.observer)
        self.observer.stage(f"encoding {path}")
        if will_compile("encoding", size, self.tokenizer.pattern):
            self.observer.stage("compiling the loops that encode, once on this machine")
        forget_peak()
        started, count, fallbacks = time.perf_counter(), 0, 0
        fallback_ids = FallbackIds(self.tokenizer)

        def arrays() -> Iterator[Any]:
            nonlocal count, fallbacks
            for ids in self.tokenizer.encode_file(path, workers=self.workers, on_progress=self._progress(split)):
                count += len(ids)
                fallbacks += fallback_ids.count_in(ids)
                yield ids
            _check_unchanged(path, source)

        write_shards(
            self.folder,
            split,
            arrays(),
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_hash=self.tokenizer.hash,
        )
        seconds = time.perf_counter() - started
        self.observer.finish_progress()
        manifest = _read_manifest(self.folder)
        splits = manifest.get("splits") if manifest.get("tokenizer_hash") == self.tokenizer.hash else None
        splits = splits if isinstance(splits, dict) else {}
        splits[split] = {
            "bytes": size,
            "tokens": count,
            "fallbacks": fallbacks,
            "source": source,
            "seconds": round(seconds, 3),
        }
        _write_manifest(self.folder, {"dataset": self.dataset, "tokenizer_hash": self.tokenizer.hash, "splits": splits})
        return Stage(split, size, seconds, count, peak_bytes(), fallbacks=fallbacks)

    def _progress(self, split: str) -> Any:
        return lambda done, total: self.observer.progress(f"encoding {split}", done, total, "B")

    def _recorded(self, split: str, name: str) -> int | None:
        """Return a number from the record of ``split``, None when an earlier version did not write it."""
        number = _read_manifest(self.folder)["splits"][split].get(name)
        return number if type(number) is int else None

    def _kept_tokens(self, split: str, source: dict[str, Any]) -> int | None:
        """Return how many tokens the shards of ``split`` hold, None when they are not up to date or not whole."""
        manifest = _read_manifest(self.folder)
        try:
            record = manifest["splits"][split]
            if manifest["tokenizer_hash"] != self.tokenizer.hash or record["source"] != source:
                return None
            tokens = Tokens.open(self.folder, split, tokenizer_hash=self.tokenizer.hash)
            if self.verify:
                tokens.verify(lambda done: self.observer.progress(f"verifying {split}", done, len(tokens), "tokens"))
            return len(tokens) if len(tokens) == record["tokens"] else None
        except DataError as error:
            self.observer.stage(f"{error}; making it again")
            return None
        except (KeyError, TypeError):
            return None
