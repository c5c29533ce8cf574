"""`lfs tokenize`: learn a tokenizer on a dataset's training text and encode the dataset into token shards.

    data/raw/<dataset>/train.txt, valid.txt
        -> data/tokenizers/<name>/tokenizer.json, manifest.json      the tokenizer, and what it was learned from
        -> data/tokens/<name>/{train,valid}-00000.bin, manifest.json  ids, and what they were made from

The name is `<dataset>-<vocabulary>`, such as `tinystories-10000`, with `-<pattern>` behind it for any pattern but
GPT-2's. With a given tokenizer it is `<dataset>-<name of the tokenizer's folder>`, and the tokenizer is copied there.

What is there already and was made from the same text in the same way is used again. A text counts as the same when its
size and its time of change are.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfs_cli.config import TokenizeConfig
from lfs_cli.corpus.shards import Tokens, refuse_foreign, write_shards
from lfs_cli.corpus.sources import DATASETS
from lfs_cli.corpus.text import Inspector
from lfs_cli.errors import DataError, did_you_mean
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.tokenizer import Tokenizer, find_pattern, learn_bpe, will_compile
from lfs_cli.tokenizer.blocks import reading, replace_file

SPLITS = ("train", "valid")
LONGEST_TOKENS = 10
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Stage:
    """One part of the work, and what it took.

    Args:
        name: `learn`, `train` or `valid`: learning, or encoding one of the texts.
        bytes: Size of the text.
        seconds: Time it took; None when an earlier result was used again.
        tokens: Tokens learned or written.
    """

    name: str
    bytes: int
    seconds: float | None
    tokens: int

    @property
    def rate(self) -> float | None:
        """MB of text a second."""
        return self.bytes / self.seconds / 1e6 if self.seconds else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token stands for, on average."""
        return self.bytes / self.tokens if self.name in SPLITS and self.tokens else None


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
        peak_bytes: Most memory that this process ever held; None where the system does not tell.
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

    def bytes_per_token(self, split: str) -> float:
        """Return the bytes of text that a token of ``split`` stands for, on average; 0 for a text without tokens."""
        return next((stage.bytes_per_token or 0.0 for stage in self.stages if stage.name == split), 0.0)


def tokenize(config: TokenizeConfig, data: DataFolder, observer: Observer | None = None) -> TokenizeResult:
    """Learn a tokenizer and encode a dataset, using again what is up to date.

    Raises:
        ConfigError: For an unknown pattern.
        DataError: When the text or the tokenizer is missing or cannot be used, or the disk cannot be written.
    """
    observer, started = observer or Observer(), time.perf_counter()
    find_pattern(config.pattern)
    dataset = config.dataset or _newest_dataset(data)
    texts = _texts(data, dataset)
    given = Tokenizer.load(config.tokenizer) if config.tokenizer is not None else None
    workers = min(config.workers, 4 * (os.cpu_count() or 1))  # each holds its own part of the text
    config = config.model_copy(update={"workers": workers})
    stages: list[Stage] = []
    try:
        if given is None:
            name = f"{dataset}-{config.vocab_size}" + (f"-{config.pattern}" if config.pattern != "gpt2" else "")
        else:
            name = _name_of(config.tokenizer or "", dataset, data)
        for split in SPLITS:
            refuse_foreign(data.tokens(name), split)
        if given is None:
            tokenizer, stage = _learned(config, dataset, texts["train"], data.tokenizer(name), observer)
            stages.append(stage)
        else:
            tokenizer = given
            _keep_copy(tokenizer, data.tokenizer(name))
        encoding = _Encoding(dataset, tokenizer, data.tokens(name), config.workers, observer)
        stages += [encoding.run(split, texts[split]) for split in SPLITS]
    finally:
        observer.finish_progress()
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
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory(),
    )


def peak_memory() -> int | None:
    """Return the most memory in bytes that this process ever held, None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


def _texts(data: DataFolder, dataset: str) -> dict[str, Path]:
    """Return the text of each split. Raises DataError when one is missing or empty."""
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


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of ``folder``; one that is missing or damaged is empty, and what it tells is made again."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    replace_file(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _learned(
    config: TokenizeConfig, dataset: str, path: Path, folder: Path, observer: Observer
) -> tuple[Tokenizer, Stage]:
    """Return the tokenizer in ``folder`` if it is what ``config`` asks for, else learn it and put it there."""
    asked = {
        "dataset": dataset,
        "source": _source(path),
        "vocab_size": config.vocab_size,
        "special_tokens": list(config.special_tokens),
        "pattern": config.pattern,
    }
    size = path.stat().st_size
    kept = _kept_tokenizer(folder, asked)
    if kept is not None:
        observer.stage(f"using the tokenizer in {folder}: it was learned from this text")
        return kept, Stage("learn", size, None, kept.vocab_size)

    _check_text(path, observer)
    observer.stage(f"learning {config.vocab_size:,} tokens on {path}")
    if will_compile("learning", size, config.pattern):
        observer.stage("compiling the loops that learn, once on this machine")
    units = {"counting": "B", "merging": "merges"}
    started = time.perf_counter()
    vocab, merges = learn_bpe(
        path,
        config.vocab_size,
        config.special_tokens,
        pattern=config.pattern,
        workers=config.workers,
        on_progress=lambda phase, done, total: observer.progress(phase, done, total, units[phase]),
    )
    seconds = time.perf_counter() - started
    observer.finish_progress()
    if len(vocab) < config.vocab_size:
        observer.warning(
            f"the text has only {len(vocab):,} different tokens, not {config.vocab_size:,}: every word is one token"
        )
    tokenizer = Tokenizer(vocab, merges, config.special_tokens, pattern=config.pattern)
    tokenizer.save(folder)
    _write_manifest(folder, {**asked, "tokens": len(vocab), "hash": tokenizer.hash, "seconds": round(seconds, 3)})
    return tokenizer, Stage("learn", size, seconds, len(vocab))


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


def _name_of(tokenizer: str, dataset: str, data: DataFolder) -> str:
    """Return the name for tokens of ``dataset`` made by the tokenizer at a path.

    `tokens/mine/tokenizer.json` and `tokens/mine` are called `mine`, and `files/gpt2_vocab.json` is called `gpt2`.
    A tokenizer learned on the dataset itself already has the dataset's name in its own.
    """
    path = Path(tokenizer).resolve()
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


@dataclass(frozen=True)
class _Encoding:
    """Encodes texts of one dataset with one tokenizer into the shards of one folder."""

    dataset: str
    tokenizer: Tokenizer
    folder: Path
    workers: int
    observer: Observer

    def run(self, split: str, path: Path) -> Stage:
        """Write the shards of ``split``, unless those there are up to date."""
        size, kept = path.stat().st_size, self._kept_tokens(split, path)
        if kept is not None:
            self.observer.stage(f"using the {split} tokens in {self.folder}: they were made from this text")
            return Stage(split, size, None, kept)
        _check_text(path, self.observer)
        self.observer.stage(f"encoding {path}")
        if will_compile("encoding", size, self.tokenizer.pattern):
            self.observer.stage("compiling the loops that encode, once on this machine")
        started, source, count = time.perf_counter(), _source(path), 0

        def arrays() -> Iterator[Any]:
            nonlocal count
            for ids in self.tokenizer.encode_file(path, workers=self.workers, on_progress=self._progress(split)):
                count += len(ids)
                yield ids

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
        splits[split] = {"bytes": size, "tokens": count, "source": source, "seconds": round(seconds, 3)}
        _write_manifest(self.folder, {"dataset": self.dataset, "tokenizer_hash": self.tokenizer.hash, "splits": splits})
        return Stage(split, size, seconds, count)

    def _progress(self, split: str) -> Any:
        return lambda done, total: self.observer.progress(f"encoding {split}", done, total, "B")

    def _kept_tokens(self, split: str, path: Path) -> int | None:
        """Return how many tokens the shards of ``split`` hold, None when they are not up to date or not whole."""
        manifest = _read_manifest(self.folder)
        try:
            record = manifest["splits"][split]
            if manifest["tokenizer_hash"] != self.tokenizer.hash or record["source"] != _source(path):
                return None
            count = len(Tokens.open(self.folder, split, tokenizer_hash=self.tokenizer.hash))
            return count if count == record["tokens"] else None
        except (KeyError, TypeError, DataError):
            return None
