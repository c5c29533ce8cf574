"""The tokenizer benchmark: that it compares like with like, and notices what does not do the same."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lfs_cli.benchmarks import BENCHMARKS, Bench
from lfs_cli.benchmarks import tokenizer as benchmark
from lfs_cli.benchmarks import tokenizer_peers as peers
from lfs_cli.benchmarks.tokenizer_peers import CALLS, DOCUMENT_BYTES, Job, documents_of, measure
from lfs_cli.config import BenchConfig, load_config
from lfs_cli.errors import DataError
from lfs_cli.tokenizer import Tokenizer, learn_bpe
from lfs_cli.tokenizer.learn import learn_reference

END = peers.END_OF_TEXT
STORY = "Once upon a time there was a cat. The cat sat on the mat; it wasn't sad.\r\n"
TEXT = f"{STORY}{END}\n" * 60 + "No end: \u4e2d\u6587, caf\u00e9"


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Job]:
    """Return a function that makes a job on a small text."""
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    saved = Tokenizer(*learn_bpe(tmp_path / "text.txt", 300, [END]), [END]).save(tmp_path / "tokenizer")

    def job(task: str, call: str, **changes: object) -> Job:
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        made = Job(task, call, "process", str(tmp_path / "text.txt"), str(saved), 300, 2, str(folder))
        return replace(made, **changes)

    return job


@pytest.mark.parametrize("call", CALLS["encode"])
def test_every_encoder_gives_the_same_ids(files: Callable[..., Job], call: str) -> None:
    pytest.importorskip("numba" if CALLS["encode"][call].peer == "lfs" else CALLS["encode"][call].peer)
    job = files("encode", call)
    run = CALLS["encode"][call].prepare(job)
    ids = CALLS["encode"][call].result(run())
    assert isinstance(ids, np.ndarray)
    tokenizer = Tokenizer.load(job.tokenizer)
    assert ids.tolist() == [id for document in documents_of(TEXT) for id in tokenizer.encode(document)]


@pytest.mark.parametrize("call", CALLS["shard"])
def test_every_file_of_ids_holds_the_same(files: Callable[..., Job], call: str) -> None:
    pytest.importorskip("numpy" if CALLS["shard"][call].peer == "lfs" else CALLS["shard"][call].peer)
    job = files("shard", call)
    ids = CALLS["shard"][call].result(CALLS["shard"][call].prepare(job)())
    assert ids.dtype == np.uint16
    assert ids.tolist() == Tokenizer.load(job.tokenizer).encode(TEXT)


@pytest.mark.parametrize("call", CALLS["learn"])
def test_every_learner_merges_a_most_frequent_pair(files: Callable[..., Job], call: str) -> None:
    pytest.importorskip("numpy" if CALLS["learn"][call].peer == "lfs" else CALLS["learn"][call].peer)
    job = files("learn", call)
    merges = CALLS["learn"][call].result(CALLS["learn"][call].prepare(job)())
    words = benchmark._words(Path(job.text))
    assert len(merges) == 300 - 257
    assert benchmark.first_rare_merge(words, merges) is None
    assert benchmark.first_rare_merge(words, [*merges[:9], (b"c", b"af"), *merges[9:]]) == 9
    assert benchmark.first_rare_merge(words, [*merges[:4], merges[3]]) == 4


def test_the_definition_of_learning_merges_most_frequent_pairs() -> None:
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3, b"aaaa": 4}
    merges = learn_reference(words, 12)
    assert benchmark.first_rare_merge(words, merges) is None
    assert benchmark.first_rare_merge(words, [merges[1], merges[0]]) == 0


def test_documents_are_all_of_the_text_in_parts_of_some_size() -> None:
    long = "word " * DOCUMENT_BYTES + "\n" + "x" * DOCUMENT_BYTES
    for text in ("", TEXT, long, f"{END}{END}a", long + END):
        assert "".join(documents_of(text)) == text
        assert all(0 < len(document) <= DOCUMENT_BYTES + len(END) for document in documents_of(text))


def test_one_process_measures_one_call(files: Callable[..., Job]) -> None:
    job = files("shard", "lfs.write_shards")
    trial = measure(job)
    assert trial.cold > 0
    assert trial.warm == []
    assert trial.growth is None or trial.growth >= 0
    assert trial.digest == peers.digest_of(np.array(Tokenizer.load(job.tokenizer).encode(TEXT), np.uint16))


def rows_of(*overrides: str, **options) -> list[dict]:
    settings = ["benchmark=tokenizer", "repeats=1", "tokenizer.vocab_size=300", *overrides]
    config = load_config(BenchConfig, None, settings)
    return BENCHMARKS.get("tokenizer")(config, Bench(torch.device("cpu"), warmup=0, repeats=1, **options))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT.encode() * 20)
    return path


def test_peers_are_measured_in_processes_of_their_own(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    rows = rows_of('tokenizer.tasks=["encode"]', 'tokenizer.peers=["tiktoken"]', "tokenizer.threads=[1]", text=text)
    assert [(row["state"], row["implementation"]) for row in rows] == [
        ("cold", "lfs"),
        ("cold", "tiktoken"),
        ("warm", "lfs"),
        ("warm", "tiktoken"),
    ]
    for row in rows:
        assert row["status"] == "ok", row["note"]
        assert row["baseline"] == "tiktoken.encode_to_numpy"
        assert row["megabytes_per_second"] == pytest.approx(row["text_bytes"] / row["median_ms"] / 1e3)
    assert [row["runs"] for row in rows] == [1, 1, 3, 3]
    assert rows[1]["speed_ratio"] == 1.0
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("wrong", ["always", "once"])
def test_ids_that_differ_are_not_timed(text: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    real, calls = benchmark._Runner._run, []

    def run(self, entry, job):
        trial = real(self, entry, job)
        if entry.call.peer == "tiktoken":
            calls.append(job)
            if wrong == "always" or len(calls) == 2:
                return replace(trial, digest="0")
        return trial

    monkeypatch.setattr(benchmark._Runner, "_run", run)
    rows = rows_of('tokenizer.tasks=["encode"]', 'tokenizer.peers=["tiktoken"]', "tokenizer.threads=[2]", text=text)
    row = next(row for row in rows if row["implementation"] == "tiktoken")
    assert (row["status"], row["speed_ratio"], row["median_ms"]) == ("unavailable", None, None)
    assert row["note"] in ("its ids differ from those of lfs", "its result differed in one of the runs")
    assert len(calls) == {"always": 1, "once": 2}[wrong]
    ours = next(row for row in rows if row["implementation"] == "lfs")
    assert (ours["status"], ours["baseline"], ours["speed_ratio"]) == ("ok", "lfs.encode_arrays", 1.0)


def test_without_peers_it_still_runs(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    rows = rows_of('tokenizer.tasks=["shard"]', "tokenizer.threads=[1]", text=text)
    assert {row["state"] for row in rows} == {"cold", "warm", "process"}
    assert {(row["implementation"], row["status"]) for row in rows} == {("lfs", "ok"), ("gigatoken", "unavailable")}
    assert {row["note"] for row in rows} == {"", "it is not installed: `pip install gigatoken`"}


def test_a_peer_that_fails_is_a_row_with_the_reason(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: True)
    monkeypatch.setitem(CALLS["encode"], "absent.encode", replace(CALLS["encode"]["tiktoken.encode_to_numpy"]))
    rows = rows_of('tokenizer.tasks=["encode"]', 'tokenizer.peers=["tiktoken"]', "tokenizer.threads=[1]", text=text)
    notes = {row["call"]: row["note"] for row in rows}
    assert notes["encode"] == "KeyError: 'absent.encode'"


def test_a_given_vocabulary_and_too_little_time(text: Path, files: Callable[..., Job]) -> None:
    pytest.importorskip("tiktoken")
    saved = files("encode", "lfs.encode_arrays").tokenizer
    arguments = (f"tokenizer.tokenizer={json.dumps(saved)}", 'tokenizer.tasks=["encode"]', "tokenizer.threads=[1]")
    rows = rows_of(*arguments, 'tokenizer.peers=["tiktoken"]', text=text, max_seconds=1e-6)
    assert {row["vocab_size"] for row in rows} == {300}
    assert {(row["state"], row["status"]) for row in rows} == {("cold", "ok"), ("warm", "too slow")}


def test_the_script_imports_no_torch() -> None:
    script = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='peers'); print('torch' in sys.modules)"
    line = [sys.executable, "-P", "-c", script, str(benchmark._SCRIPT)]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_text_that_is_missing_or_empty_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        rows_of(text=tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        rows_of(text=tmp_path / "empty.txt")
