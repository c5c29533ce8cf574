"""Round trips: text through tokenizers, and valid objects through every file format."""

import bz2
import gzip
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lfs_cli.config import TrainConfig, dump_config, load_config
from lfs_cli.corpus.shards import Tokens, write_shards
from lfs_cli.corpus.sources import FileRecord, Manifest, read_manifest, write_manifest
from lfs_cli.corpus.text import unpack
from lfs_cli.errors import DataError
from lfs_cli.files import DEEPEST_JSON, parse_json, read_json
from lfs_cli.model import load_weights, save_weights
from lfs_cli.optimizers import OPTIMIZERS
from lfs_cli.reports.records import read_run
from lfs_cli.reports.table import append_row, rewrite_table
from lfs_cli.runs.journal import Journal, write_json
from lfs_cli.runs.progress import Progress
from lfs_cli.tokenizer import Tokenizer
from lfs_cli.tokenizer.formats import EXPORTS, read_token
from lfs_cli.tokenizer.split import PATTERNS
from lfs_cli.training.checkpoint import load_checkpoint, save_checkpoint
from tests.reliability.round_trips import complaints_about_bytes, complaints_about_text, every_character, learned

few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


base: str


@pytest.fixture(autouse=True)
def _base(tmp_path: Path) -> None:
    global base  # noqa: PLW0603  a fixture is not made anew for each example
    base = str(tmp_path)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_characters_come_back(pattern: str) -> None:
    tokenizer = learned(pattern)
    lost = {(text[0], what) for text in every_character(61) for what in complaints_about_text(tokenizer, text)}
    assert lost == set()


@pytest.mark.parametrize("pattern", PATTERNS)
@few
@given(data=st.binary(max_size=200))
def test_bytes_come_back(pattern: str, data: bytes) -> None:
    assert complaints_about_bytes(learned_once(pattern), data, Path(base)) == []


_learned: dict[str, Tokenizer] = {}


def learned_once(pattern: str) -> Tokenizer:
    return _learned.setdefault(pattern, learned(pattern))


@few
@given(ids=st.lists(st.integers(0, 350), max_size=40))
def test_a_stream_of_any_ids_gives_no_half_character(ids: list[int]) -> None:
    tokenizer = learned_once("gpt2")
    stream = tokenizer.stream()
    pieces = [*map(stream.feed, ids), stream.flush()]
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


@few
@given(ids=st.lists(st.integers(0, 70_000), max_size=300), size=st.integers(1, 100))
def test_shards_come_back(ids: list[int], size: int) -> None:
    folder = Path(tempfile.mkdtemp(dir=base))
    wide = np.array(ids, np.uint32)
    write_shards(folder, "train", [wide], vocab_size=70_001, tokenizer_hash="ab" * 32, shard_tokens=size)
    assert Tokens.open(folder, "train")[:].tolist() == ids


@st.composite
def tokenizers(draw: st.DrawFn) -> Tokenizer:
    """Bytes, and merges of tokens made before: ids in the order of the merges, as learning gives them."""
    vocab = {id: bytes([id]) for id in range(256)}
    merges: list[tuple[bytes, bytes]] = []
    for _ in range(draw(st.integers(0, 12))):
        left, right = (vocab[draw(st.integers(0, len(vocab) - 1))] for _ in range(2))
        if left + right not in vocab.values():
            vocab[len(vocab)] = left + right
            merges.append((left, right))
    specials = draw(st.lists(texts.filter(lambda text: len(text.encode()) > 3), max_size=2, unique=True))
    taken = {token.decode("utf-8", "ignore") for token in vocab.values()}
    names = [text for text in specials if text not in taken]
    return Tokenizer(vocab, merges, names, pattern=draw(st.sampled_from(sorted(PATTERNS))))


@few
@given(tokenizer=tokenizers())
def test_tokenizers_come_back(tokenizer: Tokenizer) -> None:
    folder = Path(tempfile.mkdtemp(dir=base))
    tokenizer.save(folder)
    assert Tokenizer.load(folder).hash == tokenizer.hash


@few
@given(tokenizer=tokenizers())
def test_gpt2_files_come_back(tokenizer: Tokenizer) -> None:
    if any(read_token(text) != text.encode() for text in tokenizer.special_tokens):
        with pytest.raises(DataError, match="GPT-2's files"):
            tokenizer.save_gpt2(Path(base))
        return
    paths = tokenizer.save_gpt2(Path(tempfile.mkdtemp(dir=base)))
    back = Tokenizer.from_files(*paths, tokenizer.special_tokens)
    assert (back.vocab, back.merges) == (tokenizer.vocab, tokenizer.merges)
    assert back.special_ids == tokenizer.special_ids


@few
@given(tokenizer=tokenizers())
def test_rank_files_come_back(tokenizer: Tokenizer) -> None:
    folder = Path(tempfile.mkdtemp(dir=base))
    parts = (tokenizer.vocab, tokenizer.merges, tokenizer.special_ids, PATTERNS[tokenizer.pattern])
    try:
        EXPORTS["tiktoken"](folder, *parts, ())
    except DataError:  # its ids are not in the order that ranks stand for
        assume(False)
    assert Tokenizer.load(folder).hash == tokenizer.hash


@few
@given(
    steps=st.integers(1, 10**12),
    lr=st.floats(1e-12, 1e6),
    name=texts,
    options=st.dictionaries(st.sampled_from(["betas", "eps", "weight_decay"]), numbers, max_size=3),
    prompt=texts,
)
def test_configs_come_back(steps: int, lr: float, name: str, options: dict[str, Any], prompt: str) -> None:
    overrides = [
        f"steps={steps}",
        f"optimizer.0.lr={lr!r}",
        f"name={json.dumps(name)}",
        f"sample_prompt={json.dumps(prompt)}",
        f"optimizer.0.options={json.dumps(options)}",
    ]
    config = load_config(TrainConfig, None, overrides)
    assert (config.steps, config.name, config.sample_prompt) == (steps, name, prompt)
    assert (config.optimizer[0].lr, config.optimizer[0].options) == (lr, options)
    path = Path(base) / "config.json"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(TrainConfig, path) == config


@few
@given(value=json_values)
def test_json_comes_back(value: Any) -> None:
    path = Path(base) / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize(
    "text", ["[" * (DEEPEST_JSON + 1) + "]" * (DEEPEST_JSON + 1), "[" * 10**6, r'["\ud800"]', r'{"\udfff": 1}', "", "{"]
)
def test_json_that_cannot_be_walked_or_written_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  which it is says the message of whoever reads a file
        parse_json(text)


def test_json_as_deep_as_is_allowed_is_read() -> None:
    assert parse_json("[" * DEEPEST_JSON + "]" * DEEPEST_JSON)


@few
@given(files=st.dictionaries(texts, st.tuples(texts, texts, st.integers(0, 10**15)), max_size=3), source=texts)
def test_manifests_come_back(files: dict[str, tuple[str, str, int]], source: str) -> None:
    records = {name: FileRecord(a, None, b, size, a, b, a) for name, (a, b, size) in files.items()}
    manifest = Manifest("mine", records, {"source": source, "seed": 3})
    write_manifest(Path(base), manifest)
    assert read_manifest(Path(base)) == manifest


@few
@given(losses=st.lists(st.floats(), min_size=1, max_size=20), sample=texts, row=st.dictionaries(texts, json_values))
def test_journals_and_results_come_back(losses: list[float], sample: str, row: dict[str, Any]) -> None:
    folder = Path(tempfile.mkdtemp(dir=base))
    journal = Journal(folder / "metrics.jsonl")
    for step, loss in enumerate(losses, start=1):
        journal.append({"kind": "step", "step": step, "loss": loss})
    for name in ("config", "environment", "result"):
        write_json(folder / f"{name}.json", row)
    (folder / "samples.md").write_text(sample, encoding="utf-8", newline="")
    paths = {name: folder / f"{name}.json" for name in ("config", "environment", "result")}
    run = read_run("mine", **paths, metrics=folder / "metrics.jsonl", samples=folder / "samples.md")
    assert run.problems == ()
    assert (run.config, run.environment, run.result or {}) == (row, row, row)
    assert [repr(record["loss"]) for record in run.steps] == [repr(loss) for loss in losses]
    assert len(journal.trim(len(losses) - 1)) == len(losses) - 1


@few
@given(name=texts, other=texts)
def test_rows_of_the_table_come_back(name: str, other: str) -> None:
    path = Path(tempfile.mkdtemp(dir=base)) / "output.md"
    append_row(path, {"run": "a", "experiment_name": name, "device": other})
    once = path.read_bytes()
    append_row(path, {"run": "b", "experiment_name": "plain"})
    rewrite_table(path, [])
    rows = [line for line in path.read_bytes().split(b"\n") if line.startswith(b"|")]
    assert len(rows) == 4
    assert [line for line in once.split(b"\n") if line.startswith(b"|")][2] in rows


@few
@given(
    shapes=st.dictionaries(texts.filter(bool), st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]),
)
def test_weights_come_back(shapes: dict[str, list[int]], dtype: torch.dtype) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    path = Path(base) / "weights.safetensors"
    save_weights(tensors, path)
    back = load_weights(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)


@pytest.mark.parametrize("name", [*OPTIMIZERS.names(), "torch.optim.AdamW", "torch.optim.SGD", "torch.optim.Adagrad"])
def test_checkpoints_of_any_optimizer_come_back(name: str, tmp_path: Path) -> None:
    """Checking a state before it is used refuses none that was saved, also of optimizers that are not ours."""
    kind = getattr(torch.optim, name.rpartition(".")[2]) if "." in name else OPTIMIZERS.get(name)
    optimizers = []
    for _ in range(2):
        torch.manual_seed(len(optimizers))
        model = torch.nn.Linear(4, 4)
        optimizers.append((model, kind(model.parameters(), lr=0.1)))
    model, optimizer = optimizers[0]
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save_checkpoint(model, optimizer, 3, tmp_path / "checkpoint")
    assert load_checkpoint(tmp_path / "checkpoint", *optimizers[1]) == 3
    for mine, other in zip(model.parameters(), optimizers[1][0].parameters(), strict=True):
        assert torch.equal(mine, other)


@few
@given(loss=numbers | st.none(), losses=st.lists(numbers), skipped=st.lists(st.integers(0, 99)), sample=texts)
def test_progress_comes_back(loss: float | None, losses: list[float], skipped: list[int], sample: str) -> None:
    progress = Progress(step=3, loss=loss, losses=losses, skipped=skipped, sample=sample)
    back = Progress()
    back.go_back(json.loads(json.dumps(progress.record())))
    assert back == progress


@few
@given(data=st.binary(min_size=1, max_size=500), size=st.integers(1, 50))
@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_packed_texts_come_back(pack: Callable[[bytes], bytes], data: bytes, size: int) -> None:
    packed = pack(data)
    chunks = [packed[start : start + size] for start in range(0, len(packed), size)]
    assert b"".join(unpack(chunks, "text")) == data
