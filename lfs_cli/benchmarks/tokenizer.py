"""Tokenizers side by side: learning a vocabulary, encoding text, and turning a file into a file of ids.

    learn     a text file -> merges
    encode    documents in memory -> ids in memory, all with the same vocabulary
    shard     a text file -> a file of uint16 ids (uint32 above 65,536 tokens)

Each measurement is a fresh process (`tokenizer_peers.py` says what it times). In a round every call has its turn, and
each round begins with the next one, so that a machine that is busy for a while treats all alike. A slow call has fewer
rounds. Memory is what the first call of a process needs beyond what was held before, at its peak.

Nothing is timed that does not do the same. Encoders must give the ids of lfs, in every run. Learners break ties between
equally frequent pairs by different rules, so their merges are replayed on the start of the text: each one must be a
most frequent pair at its time, which holds for any rule.

The baseline is the fastest of the others: a speed ratio of lfs above 1 means that it is faster than all of them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from heapq import heapify, heappop, heappush
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import lfs_cli
from lfs_cli.benchmarks.machine import cores
from lfs_cli.benchmarks.measure import BENCHMARKS, Bench, Measurement, Row, Timing
from lfs_cli.benchmarks.tokenizer_peers import CALLS, END_OF_TEXT, Call, Job, Merges, Trial
from lfs_cli.config import BenchConfig, TokenizerBench
from lfs_cli.corpus.sample import stories
from lfs_cli.errors import DataError
from lfs_cli.tokenizer import PATTERNS, Tokenizer, learn_bpe

CHECKED_BYTES = 500_000
"""Text at the start on which everything is compared first, so that nothing wrong is timed."""

CHECKED_VOCAB = 1_000
"""Tokens that are learned there."""

ROUNDS = 5
"""Fresh processes for each call unless `repeats` says otherwise."""

SHOWN_ERROR = 200
_SCRIPT = Path(__file__).with_name("tokenizer_peers.py")


@BENCHMARKS.register("tokenizer")
def bench_tokenizer(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time every installed tokenizer at every task, with one thread and with all."""
    asked = settings.tokenizer
    rounds = bench.repeats if "repeats" in settings.model_fields_set else ROUNDS
    data = _read(bench.text, asked.text_bytes) if bench.text else _stories(asked.text_bytes, settings.seed)
    with tempfile.TemporaryDirectory(prefix="lfs-bench-") as folder:
        text, start = Path(folder) / "text.txt", Path(folder) / "start.txt"
        text.write_bytes(data)
        start.write_bytes(data[:CHECKED_BYTES].decode("utf-8", "ignore").encode())
        tokenizer = _tokenizer(asked, text)
        saved = tokenizer.save(Path(folder) / "tokenizer")
        runner = _Runner(bench, Path(folder), text, saved, asked.vocab_size, rounds)
        rows: list[Row] = []
        for task in asked.tasks:
            entries = [_Entry(name, call) for name, call in CALLS[task].items() if call.peer in ("lfs", *asked.peers)]
            runner.check(task, start, entries, tokenizer.pattern)
            for threads in asked.threads or sorted({1, cores()}):
                rows += _rows(task, threads, len(data), runner.measure(task, threads, entries))
    shared = {
        "dataset": str(bench.text) if asked.file else asked.dataset,
        "vocab_size": asked.vocab_size if asked.tokenizer is None else tokenizer.vocab_size,
    }
    return [{**shared, **row} for row in rows]


def _tokenizer(asked: TokenizerBench, text: Path) -> Tokenizer:
    if asked.tokenizer is not None:
        return Tokenizer.load(asked.tokenizer)
    vocab, merges = learn_bpe(text, asked.vocab_size, [END_OF_TEXT])
    return Tokenizer(vocab, merges, [END_OF_TEXT])


@dataclass
class _Entry:
    """One call and what became of it so far."""

    name: str
    call: Call
    problem: str | None = None
    status: str = "unavailable"
    trials: list[Trial] = field(default_factory=list)
    processes: list[Trial] = field(default_factory=list)

    def fail(self, status: str, problem: str) -> None:
        self.status, self.problem = status, problem
        self.trials, self.processes = [], []


@dataclass
class _Runner:
    """Starts the processes.

    Args:
        bench: Tells how long, and is told how far.
        folder: For everything that is written.
        text: The text.
        tokenizer: The vocabulary of all encoders.
        vocab_size: Tokens to learn.
        rounds: Processes for each call.
    """

    bench: Bench
    folder: Path
    text: Path
    tokenizer: Path
    vocab_size: int
    rounds: int

    def check(self, task: str, start: Path, entries: Sequence[_Entry], pattern: str) -> None:
        """Let every entry do the task on the start of the text, and mark those that are missing or do it wrong."""
        expected = None
        words = _words(start) if task == "learn" else Counter()
        for number, entry in enumerate(entries):
            self.bench.on_progress(f"comparing, {task}", number, len(entries))
            if entry.call.peer != "lfs" and find_spec(entry.call.peer) is None:
                entry.fail("unavailable", f"it is not installed: `pip install {entry.call.peer}`")
                continue
            if entry.call.peer == "tiktoken" and pattern not in PATTERNS:
                entry.fail("unavailable", "the tokenizer's pattern is not one that was compared with tiktoken")
                continue
            job = Job(
                task,
                entry.name,
                "process",
                str(start),
                str(self.tokenizer),
                min(self.vocab_size, CHECKED_VOCAB),
                max(2, cores()),
                folder="",
                wants_merges=task == "learn",
            )
            trial = self._run(entry, job)
            if trial is None:
                continue
            if task == "learn":
                merges = [(bytes.fromhex(left), bytes.fromhex(right)) for left, right in trial.merges]
                place = first_rare_merge(words, merges)
                if place is not None:
                    entry.fail("unavailable", f"merge {place + 1} is not a most frequent pair")
            else:
                expected = expected or trial.digest
                if trial.digest != expected:
                    entry.fail("unavailable", "its ids differ from those of lfs")

    def measure(self, task: str, threads: int, entries: Sequence[_Entry]) -> list[_Entry]:
        """Return copies of ``entries`` with what was measured."""
        measured = [replace(entry, trials=[], processes=[]) for entry in entries]
        expected: str | None = None
        for number in range(self.rounds):
            for turn in range(len(measured)):
                entry = measured[(number + turn) % len(measured)]
                done = number * len(measured) + turn
                label = f"{task}, {threads} thread{'s' if threads > 1 else ''}"
                self.bench.on_progress(label, done, self.rounds * len(measured))
                if entry.problem is not None or (number and self._spent(entry) > self.bench.max_seconds):
                    continue
                for state in ("cold",) if task == "encode" else ("cold", "process"):
                    job = Job(
                        task,
                        entry.name,
                        state,
                        str(self.text),
                        str(self.tokenizer),
                        self.vocab_size,
                        threads,
                        folder="",
                        budget=self.bench.max_seconds,
                    )
                    trial = self._run(entry, job)
                    if trial is None:
                        break
                    same = trial.digest if task != "learn" else (entry.trials or [trial])[0].digest
                    expected = same if expected is None and entry.call.peer == "lfs" else expected
                    if (task != "learn" and expected not in (None, trial.digest)) or same != trial.digest:
                        entry.fail("unavailable", "its result differed in one of the runs")
                        break
                    (entry.trials if state == "cold" else entry.processes).append(trial)
        return measured

    @staticmethod
    def _spent(entry: _Entry) -> float:
        return sum(trial.cold + sum(trial.warm) for trial in entry.trials + entry.processes)

    def _run(self, entry: _Entry, job: Job) -> Trial | None:
        """Return what a process measured; None when it failed, and then the entry says why."""
        count = str(job.threads)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(lfs_cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
            "RAYON_NUM_THREADS": count,
            "NUMBA_NUM_THREADS": count,
            "OMP_NUM_THREADS": count,
            "TOKENIZERS_PARALLELISM": "true" if job.threads > 1 else "false",
        }
        own = sorted(os.sched_getaffinity(0))[-1] if hasattr(os, "sched_getaffinity") else None
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            job = replace(job, folder=folder, core=own, spawned=time.time())
            try:
                process = subprocess.run(
                    [sys.executable, "-P", str(_SCRIPT)],  # -P: the files beside the script are no modules of their own
                    input=json.dumps(asdict(job)),
                    capture_output=True,
                    text=True,
                    env=environment,
                    timeout=60 + 30 * self.bench.max_seconds,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                entry.fail("too slow", f"stopped after {60 + 30 * self.bench.max_seconds:,.0f} seconds")
                return None
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"it ended with {process.returncode}"]
            memory = process.returncode == -9 or "MemoryError" in lines[-1]
            if entry.call.peer == "lfs" and not memory:
                raise RuntimeError(f"{job.call} failed:\n{process.stderr}")
            entry.fail("out of memory" if memory else "unavailable", lines[-1][:SHOWN_ERROR])
            return None
        return Trial(**json.loads(process.stdout.splitlines()[-1]))


def _rows(task: str, threads: int, size: int, entries: Sequence[_Entry]) -> list[Row]:
    """Return the rows of one task: one for each call and state."""
    rows = []
    for state in ("cold", "warm", "process") if task != "encode" else ("cold", "warm"):
        seconds = {entry.name: _seconds(entry, state) for entry in entries}
        results = {entry.name: _measurement(entry, state, seconds[entry.name]) for entry in entries}
        others = [entry.name for entry in entries if entry.call.peer != "lfs" and results[entry.name].timing]
        baseline = min(others, key=lambda name: _median(results[name]), default=entries[0].name)
        for entry in entries:
            result = results[entry.name]
            rows.append(
                {
                    "task": task,
                    "threads": threads,
                    "state": state,
                    "implementation": entry.call.peer,
                    "call": entry.name.partition(".")[2],
                    "text_bytes": size,
                    "megabytes_per_second": size / 1e6 / _median(result) if result.timing else None,
                    "process_peak_bytes": _largest([trial.peak for trial in entry.processes or entry.trials]),
                    **result.row(results[baseline], baseline),
                }
            )
    return rows


def _seconds(entry: _Entry, state: str) -> list[float]:
    if state == "cold":
        return [trial.cold for trial in entry.trials]
    if state == "warm":
        return [second for trial in entry.trials for second in trial.warm]
    return [trial.process for trial in entry.processes]


def _measurement(entry: _Entry, state: str, seconds: Sequence[float]) -> Measurement:
    if seconds:
        growth = _largest([trial.growth for trial in entry.trials]) if state == "cold" else None
        return Measurement(Timing(tuple(seconds)), growth)
    if entry.problem is None:
        return Measurement(status="too slow", note="one call took all the time: raise `max_seconds`")
    return Measurement(status=entry.status, note=entry.problem)


def _median(result: Measurement) -> float:
    return result.timing.median if result.timing else float("inf")


def _largest(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return max(known) if known and len(known) == len(numbers) else None


def _words(path: Path) -> Counter[bytes]:
    """Return how often each word occurs in a text, without its special tokens."""
    counts: Counter[str] = Counter()
    for document in path.read_bytes().decode().split(END_OF_TEXT):
        counts.update(PATTERNS["gpt2"].split(document))
    return Counter({word.encode(): count for word, count in counts.items()})


def first_rare_merge(words: Mapping[bytes, int], merges: Merges) -> int | None:
    """Return the place of the first merge that was not a most frequent pair at its time, None when all were.

    >>> first_rare_merge({b"low": 5, b"newest": 6}, [(b"e", b"w"), (b"n", b"ew")])
    >>> first_rare_merge({b"low": 5, b"newest": 6}, [(b"l", b"o")])
    0

    Args:
        words: How often each word occurs.
        merges: What was learned from them, by whatever rule among equally frequent pairs.
    """
    pairs = _Pairs(words)
    for place, pair in enumerate(merges):
        if not 0 < pairs.counts[pair] == pairs.highest():
            return place
        pairs.merge(pair)
    return None


class _Pairs:
    """Pairs of neighbouring tokens in all words, and how often each occurs."""

    def __init__(self, words: Mapping[bytes, int]) -> None:
        self.spelled = [[word[i : i + 1] for i in range(len(word))] for word in words]
        self.frequencies = list(words.values())
        self.counts: defaultdict[tuple[bytes, bytes], int] = defaultdict(int)
        self.places: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)
        for i in range(len(self.spelled)):
            self._count(i, 1)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapify(self.heap)

    def highest(self) -> int:
        """Return how often the most frequent pair occurs."""
        while self.heap and -self.heap[0][0] != self.counts[self.heap[0][1]]:
            heappop(self.heap)  # out of date: there is a newer entry
        return -self.heap[0][0] if self.heap else 0

    def merge(self, pair: tuple[bytes, bytes]) -> None:
        """Join the two tokens wherever they are neighbours."""
        changed = {pair}
        for i in self.places.pop(pair):
            changed |= self._count(i, -1)
            self.spelled[i] = _merged(self.spelled[i], pair)
            changed |= self._count(i, 1)
        for neighbours in changed:
            if self.counts[neighbours] > 0:
                heappush(self.heap, (-self.counts[neighbours], neighbours))

    def _count(self, i: int, sign: int) -> set[tuple[bytes, bytes]]:
        found = list(pairwise(self.spelled[i]))
        for pair in found:
            self.counts[pair] += sign * self.frequencies[i]
            if sign > 0:
                self.places[pair].add(i)
        return set(found)


def _merged(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


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
        raise DataError(
            f"cannot read {path}: {error.strerror}", hint="name a text with `--file` or `--dataset`"
        ) from None
    text = data.decode("utf-8", "ignore")
    if not text.strip():
        raise DataError(f"{path} holds no text", hint="name another with `--file` or `--dataset`")
    return text.encode()
