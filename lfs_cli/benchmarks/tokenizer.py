"""Learning a vocabulary and encoding text, in megabytes a second, beside tokenizers and tiktoken where installed.

All encoders get the same vocabulary, the one that lfs learned, and the same documents. Their ids are compared before
anything is timed: an encoder whose ids differ is not measured. `tokenizers` breaks ties between equally frequent pairs
in another way, so that the vocabulary it learns is of the same size but not the same.

lfs uses compiled loops for large texts and plain Python for small ones; the latter is timed on a slice, since it is
slow. Speeds are therefore compared as megabytes a second.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from lfs_cli.benchmarks.machine import cores
from lfs_cli.benchmarks.measure import BENCHMARKS, Bench, Candidate, Row
from lfs_cli.config import BenchConfig
from lfs_cli.config.schema import END_OF_TEXT
from lfs_cli.corpus.sample import stories
from lfs_cli.errors import DataError
from lfs_cli.tokenizer import PATTERNS, Tokenizer, learn_bpe
from lfs_cli.tokenizer.bpe import COMPILED_BYTES

SLICE_BYTES = 1_000_000
"""Text on which plain Python is timed."""


@dataclass(frozen=True)
class _Text:
    """A text in a file, in one piece and in documents, each with the special token that ends it."""

    path: Path
    size: int
    documents: list[str]

    @property
    def name(self) -> str:
        """What lfs does with a text of this size."""
        return "lfs, compiled" if self.size >= COMPILED_BYTES else "lfs, plain Python"


@BENCHMARKS.register("tokenizer")
def bench_tokenizer(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time learning and encoding."""
    asked = settings.tokenizer
    data = _read(bench.text, asked.text_bytes) if bench.text else _stories(asked.text_bytes, settings.seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns when torch has forked something before
    with tempfile.TemporaryDirectory(prefix="lfs-bench-") as folder:
        texts = [_text(data, Path(folder) / "text.txt")]
        if texts[0].size >= COMPILED_BYTES:
            texts.append(_text(data[:SLICE_BYTES].decode("utf-8", "ignore").encode(), Path(folder) / "slice.txt"))
        rows = _bench_learning(texts, asked.vocab_size, bench)
        vocab, merges = learn_bpe(texts[0].path, asked.vocab_size, [END_OF_TEXT])
        tokenizer = Tokenizer(vocab, merges, [END_OF_TEXT])
        rows += _bench_encoding(texts, tokenizer, tokenizer.save(Path(folder)), bench)
    return [{"dataset": asked.dataset, "vocab_size": asked.vocab_size, **row} for row in rows]


def _bench_learning(texts: list[_Text], vocab_size: int, bench: Bench) -> list[Row]:
    candidates = [
        Candidate(text.name, lambda text=text: learn_bpe(text.path, vocab_size, [END_OF_TEXT])) for text in texts
    ]
    missing = _missing("tokenizers")
    theirs = Candidate("tokenizers", lambda: _learn_with_tokenizers(texts[0].path, vocab_size), unavailable=missing)
    return _rows("learn", texts, [*candidates, theirs], "tokenizers" if missing is None else texts[-1].name, bench)


def _bench_encoding(texts: list[_Text], tokenizer: Tokenizer, saved: Path, bench: Bench) -> list[Row]:
    # one tokenizer a text: where the compiled loops are ready, they would encode the slice as well
    own = [Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens) for _ in texts]
    ours = [
        Candidate(text.name, lambda text=text, mine=mine: list(mine.encode_file(text.path)))
        for text, mine in zip(texts, own, strict=True)
    ]
    ids = [int(id) for array in own[0].encode_file(texts[0].path) for id in array]
    documents = texts[0].documents
    encoders = {"tiktoken": _tiktoken_encoder, "tokenizers": _tokenizers_encoder}
    theirs = []
    for name, build in encoders.items():
        reason = _missing(name)
        run: Callable[[], Any] = list
        if reason is None:
            encode_all, run = _bound(build(tokenizer, saved), documents)
            reason = None if encode_all() == ids else "its ids differ from those of lfs"
        theirs.append(Candidate(name, run, unavailable=reason))
    here = [candidate.name for candidate in theirs if candidate.unavailable is None]
    return _rows("encode", texts, [*ours, *theirs], here[0] if here else texts[-1].name, bench)


def _bound(
    encode: Callable[[list[str]], list[list[int]]], documents: list[str]
) -> tuple[Callable[[], list[int]], Callable[[], Any]]:
    return lambda: list(chain.from_iterable(encode(documents))), lambda: encode(documents)


def _rows(task: str, texts: list[_Text], candidates: list[Candidate], baseline: str, bench: Bench) -> list[Row]:
    results = bench.measure(f"tokenizer {task}", candidates)
    sizes = {candidate.name: texts[0].size for candidate in candidates} | {text.name: text.size for text in texts}
    speeds = {
        name: sizes[name] / 1e6 / result.timing.median if result.timing else None for name, result in results.items()
    }
    reference = speeds[baseline]
    return [
        {
            "task": task,
            "implementation": name,
            "text_bytes": sizes[name],
            "threads": 1 if name == "lfs, plain Python" else cores(),
            "megabytes_per_second": speed,
            **results[name].row(results[baseline], baseline),
            "speed_ratio": speed / reference if speed and reference else None,
        }
        for name, speed in speeds.items()
    ]


def _learn_with_tokenizers(path: Path, vocab_size: int) -> None:
    tokenizers: Any = import_module("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train([str(path)], trainer)


def _tokenizers_encoder(tokenizer: Tokenizer, saved: Path) -> Callable[[list[str]], list[list[int]]]:
    model = import_module("tokenizers").Tokenizer.from_file(str(saved))
    return lambda documents: [encoded.ids for encoded in model.encode_batch(documents)]


def _tiktoken_encoder(tokenizer: Tokenizer, saved: Path) -> Callable[[list[str]], list[list[int]]]:
    """Return tiktoken with our vocabulary: it merges by the id of the result, which is the order of learning."""
    specials = set(tokenizer.special_ids.values())
    encoding = import_module("tiktoken").Encoding(
        "lfs",
        pat_str=PATTERNS["gpt2"].expression,
        mergeable_ranks={token: id for id, token in tokenizer.vocab.items() if id not in specials},
        special_tokens=tokenizer.special_ids,
    )
    return lambda documents: encoding.encode_batch(documents, num_threads=cores(), allowed_special="all")


def _missing(package: str) -> str | None:
    return None if find_spec(package) else f"it is not installed: `pip install {package}`"


def _stories(size: int, seed: int) -> bytes:
    parts, made = [], 0
    for story in stories(seed):
        parts.append(f"{story}{END_OF_TEXT}\n")
        made += len(parts[-1])
        if made >= size:
            break
    return "".join(parts).encode()


def _read(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="choose a dataset with `--dataset`") from None
    text = data.decode("utf-8", "ignore")
    if not text.strip():
        raise DataError(f"{path} holds no text", hint="choose another dataset with `--dataset`")
    return text.encode()


def _text(data: bytes, path: Path) -> _Text:
    path.write_bytes(data)
    documents = data.decode().split(END_OF_TEXT)
    return _Text(path, len(data), [*(document + END_OF_TEXT for document in documents[:-1]), documents[-1]])
