"""Every registered benchmark runs at a tiny size, and its rows say what a reader needs."""

import json
from pathlib import Path

import pytest
import torch

from lfs_cli.benchmarks import BENCHMARKS, Bench, Candidate, attention, measure, model
from lfs_cli.benchmarks.optimizer import weight_shapes
from lfs_cli.benchmarks.tokenizer import bench_tokenizer
from lfs_cli.config import BenchConfig, load_config
from lfs_cli.errors import ConfigError, DataError
from lfs_cli.registry import catalogue

CPU = torch.device("cpu")
TINY = {
    "attention": ["attention.seq=[24]", "attention.heads=4", "attention.kv_heads=2", "attention.head_dim=8"],
    "generation": ["generation.batch=[2]", "generation.prompt_tokens=4", "generation.max_tokens=3"],
    "model": ["model.seq=[4]", "model.batch=1", "model.vocab_size=300"],
    "optimizer": ["optimizer.parameters=[3000]"],
    "tokenizer": ["tokenizer.text_bytes=20000", "tokenizer.vocab_size=300"],
}
ALWAYS = {"median_ms", "q1_ms", "q3_ms", "min_ms", "max_ms", "mean_ms", "std_ms", "runs", "baseline", "speed_ratio"}


def rows_of(name: str, *overrides: str, **bench) -> list[dict]:
    config = load_config(BenchConfig, None, [f"benchmark={name}", *TINY[name], *overrides])
    return BENCHMARKS.get(name)(config, Bench(CPU, warmup=0, repeats=1, **bench))


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.SIZES, "tiny", {"width": 16, "feed_forward_width": 32, "layers": 1, "heads": 2})


def test_every_benchmark_is_found_in_the_sources_and_by_import() -> None:
    assert set(TINY) == set(BENCHMARKS.names()) == set(catalogue("lfs_cli.benchmarks", "BENCHMARKS"))


@pytest.mark.parametrize("name", TINY)
def test_rows_are_complete_and_can_be_written(name: str) -> None:
    rows = rows_of(name)
    assert rows
    assert len({frozenset(row) for row in rows}) == 1
    for row in rows:
        assert set(row) >= ALWAYS | {"peak_bytes", "status", "note"}
        assert (row["status"] == "ok") == (row["median_ms"] is not None)
        assert row["status"] == "ok" or row["note"]
    json.dumps(rows, allow_nan=False)


def test_attention_compares_backends_with_torch_and_checks_them() -> None:
    rows = rows_of("attention", 'attention.backends=["standard", "reference", "torch", "flash"]')
    assert [row["pass"] for row in rows[::4]] == ["forward", "backward", "both"]
    for row in rows:
        if row["backend"] == "flash" and not torch.cuda.is_available():
            assert (row["status"], row["tflops"]) == ("unavailable", None)
            continue
        assert row["max_error"] < 1e-5
        assert row["baseline"] == "torch"
        expected = {"forward": 1, "backward": 2.5, "both": 3.5}[row["pass"]] * 2 * 4 * 24 * 24 * 8
        assert row["tflops"] * 1e12 * row["median_ms"] / 1e3 == pytest.approx(expected)
        if row["backend"] == "torch":
            assert row["speed_ratio"] == 1.0


def test_attention_without_a_mask_counts_all_products() -> None:
    row = rows_of("attention", "attention.causal=false")[0]
    assert row["tflops"] * 1e12 * row["median_ms"] / 1e3 == pytest.approx(4 * 4 * 24 * 24 * 8)


def test_attention_too_large_for_this_machine_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 20_000)
    rows = {(row["pass"], row["backend"]): row for row in rows_of("attention")}
    assert rows["both", "standard"]["status"] == "out of memory"
    assert rows["both", "torch"]["status"] == "ok"


def test_attention_whose_inputs_do_not_fit_is_rows_too() -> None:
    rows = rows_of("attention", "attention.seq=[24, 1000000000000]")
    assert {row["status"] for row in rows if row["seq"] == 24 and row["backend"] == "torch"} == {"ok"}
    refused = [row for row in rows if row["seq"] > 24]
    assert {row["status"] for row in refused} == {"out of memory"}
    assert len(refused) == len(rows) / 2


def test_attention_that_runs_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(attention, "attend_torch", refuse)
    rows = {(row["pass"], row["backend"]): row for row in rows_of("attention")}
    assert rows["forward", "torch"]["note"] == "2.00 GiB were refused"
    assert rows["backward", "torch"]["status"] == "out of memory"
    assert rows["forward", "standard"]["status"] == "ok"
    assert rows["forward", "standard"]["speed_ratio"] is None


def test_model_parts_and_the_whole_step() -> None:
    rows = rows_of("model", 'model.sizes=["tiny"]', "model.seq=[4, 6]")
    assert [(row["seq"], row["part"]) for row in rows] == [(T, part) for T in (4, 6) for part in model.PARTS]
    assert rows[4]["tokens_per_second"] == pytest.approx(4 / rows[4]["median_ms"] * 1e3)
    assert rows[4]["tflops"] is not None


def test_a_model_too_large_for_this_machine_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1_000_000_000)
    rows = rows_of("model", 'model.sizes=["tiny", "2.7b"]')
    assert {(row["size"], row["status"]) for row in rows} == {("tiny", "ok"), ("2.7b", "out of memory")}
    assert "GB are free" in rows[-1]["note"]


def test_a_model_that_runs_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 bytes.")

    monkeypatch.setattr(model, "train_step", refuse)
    rows = rows_of("model")
    assert {row["status"] for row in rows} == {"out of memory"}


def test_sizes_of_the_table_have_the_shapes_of_cs336() -> None:
    shapes = {name: tuple(size.values()) for name, size in model.SIZES.items() if name != "tiny"}
    assert shapes == {
        "small": (768, 3072, 12, 12),
        "medium": (1024, 4096, 24, 16),
        "large": (1280, 5120, 36, 20),
        "xl": (1600, 6400, 48, 25),
        "2.7b": (2560, 10240, 32, 32),
    }


def test_every_optimizer_is_compared_with_torch() -> None:
    rows = rows_of("optimizer", 'optimizer.names=["adamw", "sgd"]')
    assert [(row["optimizer"], row["implementation"]) for row in rows] == [
        (name, which) for name in ("adamw", "sgd") for which in ("torch", "lfs", "torch fused")
    ]
    assert rows[1]["baseline"] == "torch adamw"


@pytest.mark.parametrize("count", [1, 512 * 512, 1_000_000, 100_000_000])
def test_shapes_hold_exactly_the_weights_asked_for(count: int) -> None:
    assert sum(torch.Size(shape).numel() for shape in weight_shapes(count)) == count


def test_generation_is_compared_with_decoding_without_a_cache() -> None:
    rows = rows_of("generation", "generation.batch=[1, 2]")
    assert [row["part"] for row in rows] == ["prefill", "decode", "decode, no cache"] * 2
    assert rows[1]["tokens_per_second"] == pytest.approx(2 / rows[1]["median_ms"] * 1e3)
    assert rows[2]["speed_ratio"] == 1.0


def test_encoders_agree_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {(row["task"], row["implementation"]): row for row in rows_of("tokenizer")}
    for name in ("tiktoken", "tokenizers"):
        pytest.importorskip(name)
        assert rows["encode", name]["status"] == "ok", rows["encode", name]["note"]
    monkeypatch.setattr("lfs_cli.benchmarks.tokenizer._tiktoken_encoder", lambda *_: lambda documents: [[0]])
    rows = {(row["task"], row["implementation"]): row for row in rows_of("tokenizer")}
    assert rows["encode", "tiktoken"]["note"] == "its ids differ from those of lfs"
    assert rows["encode", "tokenizers"]["baseline"] == "tokenizers"


def test_a_tokenizer_benchmark_without_peers_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfs_cli.benchmarks.tokenizer.find_spec", lambda name: None)
    rows = {(row["task"], row["implementation"]): row for row in rows_of("tokenizer")}
    assert rows["encode", "lfs, plain Python"]["baseline"] == "lfs, plain Python"
    assert "pip install tiktoken" in rows["encode", "tiktoken"]["note"]


def test_a_tokenizer_benchmark_reads_the_text_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("ééé und noch mehr Text\r\n".encode() * 100)
    rows = rows_of("tokenizer", "tokenizer.text_bytes=1001", text=path)
    assert {row["text_bytes"] for row in rows} == {1001, 1000} or {row["text_bytes"] for row in rows} <= {1000, 1001}
    path.write_text(" \n")
    config = load_config(BenchConfig, None, ["benchmark=tokenizer"])
    with pytest.raises(DataError, match="holds no text"):
        bench_tokenizer(config, Bench(CPU, text=path))


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("benchmark=atention", "unknown benchmark `atention`", "did you mean `attention`?"),
        ("benchmark=", "no benchmark is named", "attention, generation, model, optimizer, tokenizer"),
        ("attention.kv_heads=3", "`attention.heads` (16) is not a multiple of `attention.kv_heads` (3)", "to 2"),
        ('attention.backends=["flsh"]', "unknown attention backend `flsh`", "did you mean `flash`?"),
        ("model.attention=flsh", "unknown attention backend `flsh`", "did you mean `flash`?"),
        ('optimizer.names=["adam"]', "unknown optimizer `adam`", "did you mean `adamw`?"),
        ('model.sizes=["smal"]', "cannot be", "small"),
        ("tokenizer.vocab_size=256", "must be at least 257", "1000"),
    ],
)
def test_settings_that_cannot_work_are_answered_before_torch(override: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(BenchConfig, None, ["benchmark=attention", override])
    assert message in str(caught.value)
    assert hint in str(caught.value.hint)


def test_a_prompt_longer_than_the_models_context_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = model.model_config("tiny", 8, load_config(BenchConfig, None, ["benchmark=model"]).model)
    monkeypatch.setattr("lfs_cli.benchmarks.generation.load_model", lambda *_: model.Transformer(small))
    with pytest.raises(ConfigError, match="more than the model's context of 8") as caught:
        rows_of("generation", "generation.prompt_tokens=6", checkpoint=tmp_path / "run" / "checkpoints" / "step-000001")
    assert caught.value.hint == "set `generation.max_tokens` to at most 2"


@pytest.mark.gpu
def test_cuda_events_time_what_the_gpu_does() -> None:
    device = torch.device("cuda")
    left = torch.randn(4096, 4096, device=device)
    result = Bench(device, warmup=2, repeats=5).measure("x", [Candidate("a", lambda: left @ left)])["a"]
    assert 1e-5 < result.timing.median < 1.0
    assert result.peak_bytes == pytest.approx(4096 * 4096 * 4, rel=0.5)
