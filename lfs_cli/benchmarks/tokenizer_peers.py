"""What `lfs bench tokenizer` times: lfs and its peers, each through its fastest public call, one process a measurement.

This file is both: a table of calls for the benchmark to choose from, and the script that a process of its own runs for
one of them. Such a process is told a `Job` on stdin, keeps to one core where the job has one thread, and answers with a
`Trial` on stdout. It imports no torch. What is timed begins with everything at hand that a user of that library would
keep, a loaded tokenizer and texts in memory, and ends with ids in the library's own flattest form.

Libraries encode one letter before, so that none of them still loads something when the clock runs.

    state      the process has                                        timed
    cold       loaded its library, and lfs its compiled loops         the first call: nothing is remembered yet
    warm       made that call                                         further calls on the same text
    process    just started                                           from its start to the end of the first call
"""

import gc
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lfs_cli.corpus.shards import Tokens, write_shards
from lfs_cli.memory import forget_peak, peak_bytes, release_free_memory, resident_bytes
from lfs_cli.tokenizer import PATTERNS, Tokenizer, learn_bpe
from lfs_cli.tokenizer.bpe import COMPILED_BYTES
from lfs_cli.tokenizer.formats import read_token
from lfs_cli.tokenizer.formats.ranks import recover_merges

END_OF_TEXT = "<|endoftext|>"
DOCUMENT_BYTES = 1 << 16
"""Characters of a document: longer ones are cut at a line end, since some peers get slow on books in one piece."""

Merges = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Args:
        task: `learn`, `encode` or `shard`.
        call: Name of the call, a key of `CALLS[task]`.
        state: `cold`, which measures warm calls as well, or `process`.
        text: File with the text.
        tokenizer: `tokenizer.json` that all encoders load.
        vocab_size: Tokens to learn.
        threads: Threads to use; one means one core, too.
        folder: An empty folder to write shards to.
        core: The core to keep to when there is one thread.
        warm_calls: Further calls.
        budget: Seconds after which no further call begins.
        spawned: When the process was started, by `time.time`.
        wants_merges: Whether the merges themselves are asked for.
    """

    task: str
    call: str
    state: str
    text: str
    tokenizer: str
    vocab_size: int
    threads: int
    folder: str
    core: int | None = None
    warm_calls: int = 3
    budget: float = 10.0
    spawned: float = 0.0
    wants_merges: bool = False


@dataclass(frozen=True)
class Trial:
    """What one process measured.

    Args:
        cold: Seconds of the first call.
        warm: Seconds of each further one.
        process: Seconds from the start of the process to the end of the first call.
        growth: Most memory in bytes that the first call held beyond what was held before; None when not known.
        peak: Most memory that the process held, None when not known.
        digest: Hash of the ids or merges.
        merges: The merges, in hexadecimal, where they are asked for.
    """

    cold: float
    warm: list[float]
    process: float
    growth: int | None
    peak: int | None
    digest: str
    merges: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """One way to do a task.

    Args:
        peer: Whose it is: the name of the package.
        prepare: Does what is not timed and returns the call that is.
        result: What the call returned, as an array of ids or a list of merges.
    """

    peer: str
    prepare: Callable[[Job], Callable[[], Any]]
    result: Callable[[Any], Any]


def documents_of(text: str) -> list[str]:
    """Return the documents of ``text``, each with the special token that ends it, long ones in parts."""
    found = text.split(END_OF_TEXT)
    whole = [*(document + END_OF_TEXT for document in found[:-1]), *found[-1:]]
    return [part for document in whole for part in _parts(document) if part]


def _parts(document: str) -> list[str]:
    parts, start = [], 0
    while len(document) - start > DOCUMENT_BYTES:
        cut = document.rfind("\n", start, start + DOCUMENT_BYTES) + 1
        cut = cut if cut > start else start + DOCUMENT_BYTES
        parts.append(document[start:cut])
        start = cut
    return [*parts, document[start:]]


def _text(job: Job) -> str:
    return Path(job.text).read_bytes().decode()  # read_text would change line ends


def _documents(job: Job) -> list[str]:
    return documents_of(_text(job))


def _bare_documents(job: Job) -> list[str]:
    """Return the documents without special tokens, for libraries that would learn from them as from text."""
    return _text(job).split(END_OF_TEXT)


# lfs


def _lfs_learn(job: Job) -> Callable[[], Any]:
    if job.state == "cold":  # another text loads the loops
        filler = Path(job.folder) / "filler.txt"
        filler.write_bytes(b"a b\n" * (COMPILED_BYTES // 4 + 1))
        learn_bpe(filler, 258, [], workers=job.threads)
        filler.unlink()
    return lambda: learn_bpe(job.text, job.vocab_size, [END_OF_TEXT], workers=job.threads)


def _lfs_encode(job: Job) -> Callable[[], Any]:
    documents = _documents(job)
    tokenizer = _tokenizer(job)
    return lambda: encode_documents(tokenizer, documents, job.threads)


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str], threads: int) -> np.ndarray:
    """Return the ids of all ``documents`` in one array."""
    return tokenizer.encode_arrays(documents, threads=threads)[0]


def _lfs_shard(job: Job) -> Callable[[], Any]:
    tokenizer = _tokenizer(job)
    sizes = {"vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash}

    def run() -> Path:
        write_shards(Path(job.folder), "bench", tokenizer.encode_file(job.text, workers=job.threads), **sizes)
        return Path(job.folder)

    return run


def _read_shards(folder: Path) -> np.ndarray:
    tokens = Tokens.open(folder, "bench")
    return np.asarray(tokens[0 : len(tokens)])


def _tokenizer(job: Job) -> Tokenizer:
    """Return our tokenizer, with its loops ready and nothing remembered where the start is not to be timed."""
    tokenizer = Tokenizer.load(job.tokenizer)
    if job.state == "cold":
        tokenizer.prepare(job.threads)
    return tokenizer


# gigatoken


def _gigatoken(job: Job) -> Any:
    tokenizer = import_module("gigatoken").Tokenizer(job.tokenizer)
    if job.state == "cold":
        _flat(tokenizer.encode_batch(["a"], parallel=job.threads > 1))  # loads awkward and starts the threads
    return tokenizer


def _gigatoken_learn(job: Job) -> Callable[[], Any]:
    library = import_module("gigatoken")

    def run() -> Any:
        with redirect_stderr(io.StringIO()):
            return library.train_bpe(job.text, job.vocab_size, [END_OF_TEXT], separator=END_OF_TEXT.encode())

    return run


def _gigatoken_batch(job: Job) -> Callable[[], Any]:
    tokenizer, documents = _gigatoken(job), _documents(job)
    return lambda: tokenizer.encode_batch(documents, parallel=job.threads > 1)


def _gigatoken_each(job: Job) -> Callable[[], Any]:
    tokenizer, documents = _gigatoken(job), _documents(job)
    return lambda: [tokenizer.encode(document) for document in documents]


def _gigatoken_shard(job: Job) -> Callable[[], Any]:
    tokenizer = _gigatoken(job)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    path = Path(job.folder) / "ids.bin"

    def run() -> tuple[Path, Any]:
        ids = tokenizer.encode_files([job.text], parallel=job.threads > 1)
        _flat(ids).astype(dtype).tofile(path)
        return path, dtype

    return run


def _flat(ids: Any) -> np.ndarray:
    return np.asarray(import_module("awkward").flatten(ids))


# the others


def _fastokens_encode(job: Job) -> Callable[[], Any]:
    tokenizer, documents = import_module("fastokens").Tokenizer.from_file(job.tokenizer), _documents(job)
    tokenizer.encode_batch_flat(["a"])
    return lambda: tokenizer.encode_batch_flat(documents)


def _tiktoken_encode(job: Job) -> Callable[[], Any]:
    """Make tiktoken with the same vocabulary: it merges by the id of the result, which is the order of learning."""
    tokenizer, documents = Tokenizer.load(job.tokenizer), _documents(job)
    specials = set(tokenizer.special_ids.values())
    encoding = import_module("tiktoken").Encoding(
        "lfs",
        pat_str=PATTERNS[tokenizer.pattern].expression,
        mergeable_ranks={token: id for id, token in tokenizer.vocab.items() if id not in specials},
        special_tokens=tokenizer.special_ids,
    )

    def encode(document: str) -> np.ndarray:
        return encoding.encode_to_numpy(document, allowed_special="all")

    encode("a")
    if job.threads == 1:
        return lambda: [encode(document) for document in documents]
    pool = ThreadPoolExecutor(job.threads)
    return lambda: list(pool.map(encode, documents))


def _tokenizers_encode(job: Job) -> Callable[[], Any]:
    tokenizer, documents = import_module("tokenizers").Tokenizer.from_file(job.tokenizer), _documents(job)
    tokenizer.encode_batch_fast(["a"])
    return lambda: [found.ids for found in tokenizer.encode_batch_fast(documents, add_special_tokens=False)]


def _tokenizers_learn(job: Job) -> Callable[[], Any]:
    tokenizers: Any = import_module("tokenizers")

    def run() -> Any:
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=job.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(_bare_documents(job), trainer)
        return model

    return run


def _tokenizers_merges(model: Any) -> Merges:
    merges = json.loads(model.to_str())["model"]["merges"]
    return [(read_token(left), read_token(right)) for left, right in merges]


def _rustbpe_learn(job: Job) -> Callable[[], Any]:
    library = import_module("rustbpe")

    def run() -> Any:
        model = library.Tokenizer()
        model.train_from_iterator(_bare_documents(job), job.vocab_size - 1, pattern=PATTERNS["gpt2"].expression)
        return model

    return run


CALLS: dict[str, dict[str, Call]] = {
    "learn": {
        "lfs.learn_bpe": Call("lfs", _lfs_learn, lambda out: out[1]),
        "gigatoken.train_bpe": Call("gigatoken", _gigatoken_learn, lambda out: out[1]),
        "rustbpe.train_from_iterator": Call(
            "rustbpe", _rustbpe_learn, lambda model: recover_merges(dict(model.get_mergeable_ranks()))[0]
        ),
        "tokenizers.train_from_iterator": Call("tokenizers", _tokenizers_learn, _tokenizers_merges),
    },
    "encode": {
        "lfs.encode_arrays": Call("lfs", _lfs_encode, lambda ids: ids),
        "gigatoken.encode_batch": Call("gigatoken", _gigatoken_batch, _flat),
        "gigatoken.encode": Call("gigatoken", _gigatoken_each, lambda arrays: np.concatenate(arrays)),
        "fastokens.encode_batch_flat": Call(
            "fastokens", _fastokens_encode, lambda out: np.frombuffer(out[0], np.uint32)
        ),
        "tiktoken.encode_to_numpy": Call("tiktoken", _tiktoken_encode, lambda arrays: np.concatenate(arrays)),
        "tokenizers.encode_batch_fast": Call(
            "tokenizers", _tokenizers_encode, lambda lists: np.fromiter(chain.from_iterable(lists), np.uint32)
        ),
    },
    "shard": {
        "lfs.write_shards": Call("lfs", _lfs_shard, _read_shards),
        "gigatoken.encode_files": Call("gigatoken", _gigatoken_shard, lambda out: np.fromfile(out[0], out[1])),
    },
}
"""Task -> name of a call -> the call. Those of lfs come first; a peer may have several, of which the fastest counts."""


def measure(job: Job) -> Trial:
    """Do ``job`` in this process."""
    if job.core is not None and job.threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job.core})
    call = CALLS[job.task][job.call]
    run = call.prepare(job)
    gc.collect()
    release_free_memory()
    before, highest = resident_bytes(), peak_bytes()
    is_exact = forget_peak()
    began = time.perf_counter()
    out = run()
    cold, ended = time.perf_counter() - began, time.time()
    reached = peak_bytes()
    growth = max(0, reached - before) if is_exact and reached is not None and before is not None else None
    result = call.result(out)
    digest = digest_of(result)
    merges = [(left.hex(), right.hex()) for left, right in result] if job.wants_merges else []
    del out, result
    warm: list[float] = []
    if job.state == "cold":
        while len(warm) < job.warm_calls and cold + sum(warm) < job.budget:
            began = time.perf_counter()
            out = run()
            warm.append(time.perf_counter() - began)
            del out  # freeing it is not part of the work
    peak = max(reached, highest) if reached is not None and highest is not None else None
    return Trial(cold, warm, ended - job.spawned, growth, peak, digest, merges)


def digest_of(result: Any) -> str:
    """Return a hash of ids or merges, whatever type they came in."""
    if isinstance(result, np.ndarray):
        return hashlib.sha256(result.astype("<u4").tobytes()).hexdigest()
    return hashlib.sha256(b"".join(part.hex().encode() + b" " for pair in result for part in pair)).hexdigest()


if __name__ == "__main__":
    answer = measure(Job(**json.load(sys.stdin)))
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")
