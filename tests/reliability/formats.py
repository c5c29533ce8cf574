"""Every file format that lfs reads: how a valid file comes to be, how lfs reads it, and what a read must give.

`data/benchmarks/<machine>.jsonl` is not here: lfs appends to it and never reads it.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lfs_cli.config import (
    DownloadConfig,
    GenerateConfig,
    ModelConfig,
    OptimizerGroup,
    ReportConfig,
    TokenizeConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from lfs_cli.corpus import shards
from lfs_cli.corpus.text import Inspector, unpack
from lfs_cli.generation.language_model import LanguageModel, find_checkpoint
from lfs_cli.model import Transformer, load_weights, save_weights
from lfs_cli.model.checksums import write_checksums
from lfs_cli.optimizers import AdamW, Optimizer, build_optimizers
from lfs_cli.reports.table import append_row, rewrite_table
from lfs_cli.runs import bench
from lfs_cli.runs.changes import resumed_config
from lfs_cli.runs.download import download, list_datasets
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.journal import Journal
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.progress import Progress
from lfs_cli.runs.report import report
from lfs_cli.runs.resume import load_checkpoint
from lfs_cli.runs.tokenize import tokenize
from lfs_cli.tokenizer import Tokenizer, learn_bpe
from lfs_cli.tokenizer.formats.seal import BLANK, seal
from lfs_cli.training.checkpoint import load_checkpoint as load_one_file
from lfs_cli.training.checkpoint import point_to, save_checkpoint, write_checkpoint

STORY = (
    "Once upon a time there was a little owl who could not sleep. 'Why?' asked the fox, 12 times.\n"
    "The owl said: \u201cBecause it is night!\u201d<|endoftext|>\nThen they laughed; the moon was full \U0001f315.\n"
) * 12
SHAPE = ModelConfig(vocab_size=300, context_length=16, width=16, layers=1, heads=2)


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Args:
        name: What the tables call it.
        kind: Which grammar its mutations may use (`mutations.GRAMMARS`); ``bytes`` for none.
        targets: Files that are mutated, one at a time, by their names below the folder.
        write: Puts valid files into an empty folder.
        read: Reads the folder as lfs does, and returns what it found. Raises LfsError for what cannot be used.
        check: Takes what was read from mutated files and from the valid ones, and fails when it is no valid object.
        is_checked: Whether the format has a checksum over all of its content: what loads is then equal.
        reseal: Makes the checksums in the folder fit what was damaged, as a stranger would who means harm: every other
            case looks behind the checksums.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    check: Callable[[Any, Any], None] = lambda found, valid: None
    is_checked: bool = False
    reseal: Callable[[Path], None] | None = None


def _tokenizer(**options: Any) -> Tokenizer:
    vocab, merges = _learned()
    return Tokenizer(vocab, merges, ["<|endoftext|>", "<|pad|>"], **options)


def _learned() -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"lfs-story-{os.getpid()}.txt"
    path.write_text(STORY, encoding="utf-8")
    try:
        return learn_bpe(path, 290, [])
    finally:
        path.unlink()


# Token shards

TOKENIZER_HASH = "ab" * 32


def write_token_shards(folder: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, 3_000, dtype=np.uint16)
    shards.write_shards(folder, "train", [ids], vocab_size=300, tokenizer_hash=TOKENIZER_HASH, shard_tokens=1_200)


def reseal_shards(folder: Path) -> None:
    """Give damaged headers and tables the checksums that they would have."""
    for path in folder.glob("train-*.bin"):
        raw = bytearray(path.read_bytes())
        if len(raw) >= shards.HEADER_BYTES:
            count, size = int.from_bytes(raw[16:24], "little"), int.from_bytes(raw[10:12], "little")
            table = bytes(raw[shards.HEADER_BYTES + count * size :])
            raw[64:68] = zlib.crc32(table).to_bytes(4, "little")
            raw[68:72] = zlib.crc32(raw[:68]).to_bytes(4, "little")
            path.write_bytes(raw)


def read_token_shards(folder: Path) -> list[int]:
    return shards.Tokens.open(folder, "train", tokenizer_hash=TOKENIZER_HASH)[:].tolist()


def check_ids(found: Any, valid: Any) -> None:
    assert all(type(id) is int and 0 <= id < 2**32 for id in found)


# Tokenizers: whatever is accepted has to give back any text

SPECIMENS = (STORY[:300], "", " \n\t a'll \u00e9\u4e2d\U0001f600\u0301 <|endoftext|>", "a" * 200, "\u2028x\r\n 1234")


def check_tokenizer(found: Any, valid: Any) -> None:
    for text in SPECIMENS:
        for special in ("allow", "ignore"):
            ids = found.encode(text, special=special)
            assert found.decode(ids) == text, (text, ids)
            assert all(0 <= id < found.vocab_size for id in ids)
    assert len(found.hash) == 64


def reseal_tokenizer(folder: Path) -> None:
    """Give a damaged `tokenizer.json` the checksum that it would have."""
    path = folder / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    path.write_text(seal(re.sub(r"sha256:[0-9a-f]{64}", BLANK, text, count=1)), encoding="utf-8")


def reseal_checkpoint(folder: Path) -> None:
    write_checksums(folder / _CHECKPOINT)


def reseal_model_tokenizer(folder: Path) -> None:
    reseal_tokenizer(folder / _CHECKPOINT)
    reseal_checkpoint(folder)


def write_llama(folder: Path) -> None:
    """A tokenizer.json as Llama 3 has it: a pattern of its own, words that no merge makes, tokens around the text."""
    path = _tokenizer(pattern="cl100k").save(folder)
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["model"]["ignore_merges"] = True
    tree["model"]["vocab"]["owlish"] = 292
    tree["added_tokens"].append({"id": 293, "content": "<|bos|>", "special": True})
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }
    tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\s+|[^\s\p{L}]+"
    del tree["model"]["checksum"]
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")


def write_ranks(folder: Path) -> None:
    from lfs_cli.tokenizer.formats import EXPORTS
    from lfs_cli.tokenizer.split import PATTERNS

    vocab, merges = _learned()
    EXPORTS["tiktoken"](folder, {**vocab, 290: b"<|endoftext|>"}, merges, {"<|endoftext|>": 290}, PATTERNS["gpt2"], ())


# Settings

SETTINGS = {
    "name": "mine",
    "data": {"dataset": "sample", "special_tokens": ["<|endoftext|>"]},
    "model": {"vocab_size": 300, "context_length": 16, "width": 16, "layers": 1, "heads": 2, "norm": "rms_norm"},
    "optimizer": [
        {"match": "blocks.*.weight", "name": "muon", "lr": 0.02, "options": {"momentum": 0.9}},
        {"match": "*", "name": "adamw", "lr": 1e-3, "options": {"betas": [0.9, 0.95]}},
    ],
    "schedule": {"name": "cosine", "warmup": 0.1},
    "steps": 20,
    "batch_size": 2,
    "sampling": {"temperature": 0.7, "others": {}},
    "plugins": [],
}
OVERRIDES = (
    "steps=3", "model.layers=6", "optimizer.0.lr=0.01", 'optimizer.0.options={"betas": [0.9, 0.99]}', "name=mine",
    'data.special_tokens=["<|endoftext|>"]', "sampling.others={}", "schedule.name=linear", "device=cpu",
)  # fmt: skip


def check_settings(found: Any, valid: Any) -> None:
    """What was accepted can be written down and read again, and is then the same."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"lfs-settings-{os.getpid()}.json"
    path.write_text(dump_config(found), encoding="utf-8")
    try:
        assert load_config(type(found), path) == found
    finally:
        path.unlink()


def read_overrides(folder: Path) -> TrainConfig:
    """Read each line as the value of a `--set`, the way a terminal hands over bytes that are not UTF-8."""
    lines = (folder / "set.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    return load_config(TrainConfig, None, [line for line in lines if line])


# Datasets and what the commands note beside them


def write_dataset(folder: Path) -> None:
    source = folder / "story.txt"
    source.write_text(STORY, encoding="utf-8")
    data = DataFolder(folder / "data")
    download(DownloadConfig(source=str(source), name="mine", valid_share=0.2, licence="mine"), data)
    download(DownloadConfig(dataset="sample", sample_bytes=3_000), data)
    tokenize(TokenizeConfig(dataset="mine", vocab_size=270, workers=1), data)


def read_datasets(folder: Path) -> Any:
    data = DataFolder(folder / "data")
    listings = list_datasets(data)
    download(DownloadConfig(dataset="mine"), data)
    download(DownloadConfig(dataset="sample"), data)
    return listings


def read_tokens(folder: Path) -> Any:
    result = tokenize(TokenizeConfig(dataset="mine", vocab_size=270, workers=1), DataFolder(folder / "data"))
    return result.tokenizer_hash, [stage.tokens for stage in result.stages], result.bytes_per_token("valid")


def check_same(found: Any, valid: Any) -> None:
    assert found == valid


# Runs

RUN = "2026-11-25-mine-a1b2"


def write_run(folder: Path) -> None:
    """Two runs as `lfs train` leaves them, with a table that people have written in too."""
    data = DataFolder(folder / "data")
    for name in (RUN, "2026-11-25-other-c3d4"):
        run = RunFolder(data.runs / name)
        model, optimizers = _trained()
        run.path.mkdir(parents=True)
        tokenizer_file = _tokenizer().save(run.path)
        state = {
            "progress": Progress(step=4, loss=4.6).record(),
            "tokenizer_hash": Tokenizer.load(tokenizer_file).hash,
            "text": "",
        }
        write_checkpoint(run.checkpoint(4), model, optimizers, state, tokenizer_file.read_bytes())
        tokenizer_file.unlink()
        for pointer in (run.latest_pointer, run.best_pointer):
            point_to(pointer, run.checkpoint(4))
        run.config.write_text(dump_config(TrainConfig.model_validate_json(json.dumps(SETTINGS))))
        run.environment.write_text(json.dumps({"command": ["lfs", "train"], "device": "CPU", "versions": {"lfs": "1"}}))
        run.samples.write_text("## Step 4\n\n> Once upon a time\n")
        row = {"timestamp": "2026-11-25 10:00", "experiment_name": "mine", "best_val_loss": 4.5, "run": name}
        run.result.write_text(json.dumps({**row, "params_M": 0.1, "status": "finished"}))
        journal = Journal(run.metrics)
        for step in range(1, 9):
            journal.append(
                {"kind": "step", "step": step, "loss": 5 - step / 10, "tokens": 32 * step, "seconds": step / 4}
            )
            if step % 4 == 0:
                journal.append({"kind": "evaluation", "step": step, "loss": 5 - step / 9, "bits_per_byte": 1.5})
        append_row(data.table, {**row, "run": name})
    text = data.table.read_text()
    data.table.write_text(f"My notes | with a bar\n\n{text}\nBelow the table.\n")
    (data.runs / RUN / "result.json").unlink()  # killed: its row comes from its metrics


def read_report(folder: Path) -> Any:
    data = DataFolder(folder / "data")
    report(ReportConfig(), data)
    result = report(ReportConfig(runs=(RUN, "2026-11-25-other-c3d4")), data)
    assert sorted(path.parent.name for path in result.pages) == [RUN, "2026-11-25-other-c3d4"]
    return result


def read_table(folder: Path) -> tuple[str, str]:
    """Use the table twice, and return what stands above and below it before and after."""
    path = folder / "data" / "output.md"
    before = path.read_bytes()
    append_row(path, {"run": "2026-11-25-new-e5f6", "experiment_name": "a|b\n| c |", "timestamp": "2026-11-26"})
    rewrite_table(path, [{"run": RUN, "timestamp": "2026-11-25 10:00"}])
    return before.decode("utf-8", "surrogateescape"), path.read_bytes().decode("utf-8", "surrogateescape")


def check_table(found: Any, valid: Any) -> None:
    """No line that people wrote is lost: every line that is no part of a table is there as it was."""
    before, after = found
    lines = after.splitlines()
    assert [line for line in before.splitlines() if not line.lstrip().startswith("|") and line not in lines] == []
    assert after.count("2026-11-25-new-e5f6") == 1
    assert len(after) < 2 * len(before) + 4_000


def read_journal(folder: Path) -> list[Any]:
    path = folder / "data" / "runs" / RUN / "metrics.jsonl"
    Journal(path).trim(4)
    Journal(path).append({"kind": "step", "step": 5, "loss": 4.5})
    return path.read_text(encoding="utf-8").splitlines()


def check_journal(found: Any, valid: Any) -> None:
    steps = [json.loads(line)["step"] for line in found]
    assert all(step <= 4 for step in steps[:-1])
    assert steps[-1] == 5


def read_resumed_config(folder: Path) -> TrainConfig:
    return resumed_config(RunFolder(folder / "data" / "runs" / RUN))[0]


def read_pointers(folder: Path) -> list[str]:
    run = RunFolder(folder / "data" / "runs" / RUN)
    return [run.best().name, find_checkpoint(run.path).name, find_checkpoint(run.path, "latest").name]


# Checkpoints


def _trained(steps: int = 2) -> tuple[Transformer, list[Optimizer]]:
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    groups = [OptimizerGroup(match="blocks.*.weight", name="muon", lr=1e-2), OptimizerGroup(name="adamw", lr=1e-2)]
    optimizers = build_optimizers(model, groups)
    for _ in range(steps):
        _step(model, optimizers)
    return model, optimizers


def _step(model: torch.nn.Module, optimizers: list[Any]) -> None:
    model(torch.arange(8)[None]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def read_model_folder(folder: Path) -> str:
    model = LanguageModel.load(folder / "data" / "runs" / RUN, device="cpu")
    return model.generate("Once", max_tokens=3, temperature=0)


def read_whole_checkpoint(folder: Path) -> tuple[Any, Any]:
    """Load a checkpoint as resuming does, and go on for one step."""
    model, optimizers = _trained(0)
    progress = Progress()
    config = TrainConfig.model_validate_json(json.dumps(SETTINGS))
    setup = SimpleNamespace(model=model, optimizers=optimizers, tokenizer=_tokenizer(), identity={"text": ""})
    load_checkpoint(config, folder / _CHECKPOINT, setup, progress, Observer())
    _step(model, optimizers)
    return progress, [tensor.shape for tensor in model.state_dict().values()]


def write_one_file(folder: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(300, 8), torch.nn.Linear(8, 4))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    _step(model, [optimizer])
    save_checkpoint(model, optimizer, 7, folder / "checkpoint")


def read_one_file(folder: Path) -> int:
    model = torch.nn.Sequential(torch.nn.Embedding(300, 8), torch.nn.Linear(8, 4))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    step = load_one_file(folder / "checkpoint", model, optimizer)
    _step(model, [optimizer])
    return step


def check_step(found: Any, valid: Any) -> None:
    assert type(found) is int
    assert found >= 0


def write_weights(folder: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 3)}
    save_weights(tensors, folder / "weights.safetensors")


def read_weights(folder: Path) -> Any:
    from_path = load_weights(folder / "weights.safetensors")
    with (folder / "weights.safetensors").open("rb") as file:
        assert load_weights(file).keys() == from_path.keys()
    return from_path


def check_weights(found: Any, valid: Any) -> None:
    for tensor in found.values():
        tensor.clone()  # touches every byte that it claims


# Benchmarks


def write_tuned(folder: Path) -> None:
    read_tuned(folder)


def read_tuned(folder: Path) -> Any:
    """Add the result of a search to the table of tuned tiles."""
    shape = {"seq": 64, "batch": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "causal": True, "dtype": "float32"}
    found = {"choice": {"M": 64}, "median_ms": 1.0, "tflops": 1.0, "speed_ratio": 1.1, "is_best": True}
    rows = [{"kernel": kernel, "bucket": {}, **shape, "pass": "forward", **found} for kernel in ("forward", "dq")]
    about = {"hardware": "a GPU", "versions": {"torch": "2"}, "date": "2026-11-25", "commit": "abc"}
    bench._keep_tuned(folder / "tuned_attention.json", rows, about, Observer())
    return (folder / "tuned_attention.json").read_bytes()


# Text


def write_texts(folder: Path) -> None:
    data = STORY.encode()
    (folder / "plain.txt").write_bytes(data)
    (folder / "text.gz").write_bytes(gzip.compress(data, mtime=0))
    (folder / "text.xz").write_bytes(lzma.compress(data))
    (folder / "text.bz2").write_bytes(bz2.compress(data))


def reads_text(name: str) -> Callable[[Path], bytes]:
    def read(folder: Path) -> bytes:
        """Bring a file as `lfs download --from` does: unpack it, look at it, keep it whole."""
        data = (folder / name).read_bytes()
        inspector, text = Inspector(name), b""
        for block in unpack((data[start : start + 512] for start in range(0, len(data), 512)), name):
            inspector.look(block)
            text += block
        inspector.finish()
        return text

    return read


def check_unpacked(found: Any, valid: Any) -> None:
    """Packed text is checked by its packer: it comes out whole, perhaps more than once, or it was text all along."""
    assert found in (valid, valid * 2) or b"\0" not in found


_CHECKPOINT = f"data/runs/{RUN}/checkpoints/step-000004"

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "token shards",
            "bytes",
            tuple(f"train-{number:05}.bin" for number in range(3)),
            write_token_shards,
            read_token_shards,
            check_ids,
            is_checked=True,
            reseal=reseal_shards,
        ),
        Format("tokenizer.json, ours", "json", ("tokenizer.json",), lambda folder: _tokenizer().save(folder) and None,
               Tokenizer.load, check_tokenizer, reseal=reseal_tokenizer),
        Format("tokenizer.json, foreign", "json", ("tokenizer.json",), write_llama, Tokenizer.load, check_tokenizer),
        Format("GPT-2 vocab.json", "json", ("vocab.json",), lambda folder: _tokenizer().save_gpt2(folder) and None,
               Tokenizer.load, check_tokenizer),
        Format("GPT-2 merges.txt", "text", ("merges.txt",), lambda folder: _tokenizer().save_gpt2(folder) and None,
               Tokenizer.load, check_tokenizer),
        Format("tiktoken ranks", "text", ("tokenizer.tiktoken",), write_ranks, Tokenizer.load, check_tokenizer),
        Format("tiktoken arguments", "json", ("tokenizer.tiktoken.json",), write_ranks, Tokenizer.load,
               check_tokenizer),
        Format("config", "json", ("config.json",),
               lambda folder: (folder / "config.json").write_text(json.dumps(SETTINGS)) and None,
               lambda folder: load_config(TrainConfig, folder / "config.json"), check_settings),
        Format("config of generate", "json", ("config.json",),
               lambda folder: (folder / "config.json").write_text(dump_config(GenerateConfig())) and None,
               lambda folder: load_config(GenerateConfig, folder / "config.json"), check_settings),
        Format("--set", "text", ("set.txt",),
               lambda folder: (folder / "set.txt").write_text("\n".join(OVERRIDES)) and None,
               read_overrides, check_settings),
        Format("manifest of a text", "json", ("data/raw/mine/manifest.json", "data/raw/sample/manifest.json"),
               write_dataset, read_datasets),
        Format("manifest of tokens", "json",
               ("data/tokens/mine-270/manifest.json", "data/tokenizers/mine-270/manifest.json"),
               write_dataset, read_tokens, check_same),
        Format("metrics.jsonl", "json lines", (f"data/runs/{RUN}/metrics.jsonl",), write_run, read_report),
        Format("metrics.jsonl, resumed", "json lines", (f"data/runs/{RUN}/metrics.jsonl",), write_run, read_journal,
               check_journal),
        Format("environment.json", "json", (f"data/runs/{RUN}/environment.json",), write_run, read_report),
        Format("result.json", "json", ("data/runs/2026-11-25-other-c3d4/result.json",), write_run, read_report),
        Format("config of a run", "json", (f"data/runs/{RUN}/config.json",), write_run, read_report),
        Format("config of a run, resumed", "json", (f"data/runs/{RUN}/config.json",), write_run, read_resumed_config,
               check_settings),
        Format("samples.md", "text", (f"data/runs/{RUN}/samples.md",), write_run, read_report),
        Format("output.md", "text", ("data/output.md",), write_run, read_table, check_table),
        Format("pointers", "text", (f"data/runs/{RUN}/checkpoints/latest", f"data/runs/{RUN}/checkpoints/best"),
               write_run, read_pointers, check_same),
        Format("model.safetensors", "safetensors", (f"{_CHECKPOINT}/model.safetensors",), write_run, read_model_folder,
               reseal=reseal_checkpoint),
        Format("model config", "json", (f"{_CHECKPOINT}/config.json",), write_run, read_model_folder,
               reseal=reseal_checkpoint),
        Format("model tokenizer", "json", (f"{_CHECKPOINT}/tokenizer.json",), write_run, read_model_folder,
               reseal=reseal_model_tokenizer),
        Format("state.json, generating", "json", (f"{_CHECKPOINT}/state.json",), write_run, read_model_folder,
               reseal=reseal_checkpoint),
        Format("state.json", "json", (f"{_CHECKPOINT}/state.json",), write_run, read_whole_checkpoint,
               reseal=reseal_checkpoint),
        Format("state.safetensors", "safetensors", (f"{_CHECKPOINT}/state.safetensors",), write_run,
               read_whole_checkpoint, reseal=reseal_checkpoint),
        Format("save_checkpoint", "safetensors", ("checkpoint",), write_one_file, read_one_file, check_step),
        Format("weights", "safetensors", ("weights.safetensors",), write_weights, read_weights, check_weights),
        Format("tuned_attention.json", "json", ("tuned_attention.json",), write_tuned, read_tuned),
        Format("text", "text", ("plain.txt",), write_texts, reads_text("plain.txt")),
        Format("text, gzip", "bytes", ("text.gz",), write_texts, reads_text("text.gz"), check_unpacked),
        Format("text, xz", "bytes", ("text.xz",), write_texts, reads_text("text.xz"), check_unpacked),
        Format("text, bzip2", "bytes", ("text.bz2",), write_texts, reads_text("text.bz2"), check_unpacked),
    )
}  # fmt: skip
"""All of them, by name, in the order of the tables."""
