"""Every registered benchmark runs at a tiny size, and its rows say what a reader needs."""

import json
import re
from pathlib import Path

import pytest
import torch

from lfs_cli.benchmarks import BENCHMARKS, Bench, Candidate, attention_shapes, kernels, model
from lfs_cli.benchmarks.optimizer import COUNTERPARTS, builders, weight_shapes
from lfs_cli.config import BenchConfig, load_config
from lfs_cli.errors import ConfigError
from lfs_cli.kernels.linear_cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from lfs_cli.model import Transformer
from lfs_cli.registry import catalogue

CPU = torch.device("cpu")
TINY = {
    "attention": ["attention.seq=[24]", "attention.heads=4", "attention.kv_heads=2", "attention.head_dim=8"],
    "generation": ["generation.batch=[2]", "generation.prompt_tokens=4", "generation.max_tokens=3"],
    "kernels": ["kernels.rows=8", "kernels.width=64", "kernels.vocab_size=50", "kernels.weights=3000"],
    "model": ["model.seq=[4]", "model.batch=1", "model.vocab_size=300"],
    "optimizer": ["optimizer.parameters=[3000]"],
    "tokenizer": [
        "tokenizer.text_bytes=20000",
        "tokenizer.vocab_size=300",
        'tokenizer.tasks=["shard"]',
        "tokenizer.peers=[]",
    ],
}
ALWAYS = {"median_ms", "q1_ms", "q3_ms", "min_ms", "max_ms", "mean_ms", "std_ms", "runs", "baseline", "speed_ratio"}


def draw_on_cpu(seed: int):
    return kernels._source(seed, Bench(CPU))


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


def test_every_optimizer_is_compared_with_torch() -> None:
    rows = rows_of("optimizer", 'optimizer.names=["adamw", "sgd"]')
    assert [(row["optimizer"], row["implementation"]) for row in rows] == [
        (name, which) for name in ("adamw", "sgd") for which in ("torch", "lfs", "torch fused")
    ]
    assert rows[1]["baseline"] == "torch adamw"


@pytest.mark.parametrize(
    ("name", "baseline", "note"),
    [
        ("adafactor", "adafactor", "beside torch.optim.Adafactor: both step in proportion to the weight"),
        ("lion", "adamw", "beside torch.optim.AdamW: torch has no lion"),
        ("muon", "muon", "beside torch.optim.Muon: torch's iterates in bfloat16 on any device, ours on a GPU only"),
    ],
)
def test_the_baseline_is_torchs_of_the_same_name_where_it_has_one(name: str, baseline: str, note: str) -> None:
    rows = rows_of("optimizer", f'optimizer.names=["{name}"]')
    fused = ["torch fused"] if baseline == "adamw" else []
    assert [row["implementation"] for row in rows] == ["torch", "lfs", *fused]
    assert {(row["baseline"], row["status"]) for row in rows} == {(f"torch {baseline}", "ok")}
    assert rows[1]["note"] == f"{name} {note}"


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_optimizers_of_one_name_take_the_same_steps(name: str) -> None:
    counterpart = COUNTERPARTS[name]
    moved = []
    for build in builders(name, "cpu").values():
        generator = torch.Generator().manual_seed(0)
        shapes = weight_shapes(512 * 512 + 100, has_matrices_only=counterpart.has_matrices_only)
        start = [torch.randn(shape, generator=generator) for shape in shapes]
        weights = [weight.clone().requires_grad_() for weight in start]
        optimizer = build(weights)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        moved.append(torch.cat([(after - before).flatten() for after, before in zip(weights, start, strict=True)]))
    rounding = 0.03 if name == "muon" else 1e-3  # of the size of a step: bfloat16, or what is left of float32
    for other in moved[1:]:
        assert (other - moved[0]).norm() < rounding * moved[0].norm()


def test_every_kernel_is_judged_and_its_bytes_are_counted() -> None:
    notes: list[str] = []
    rows = rows_of("kernels", 'kernels.passes=["forward", "both"]', on_note=notes.append)

    ours = [row for row in rows if row["implementation"] == "lfs"]
    assert {row["kernel"] for row in ours} == {*kernels.KERNELS, "adamw", "clip"}
    assert all(0 <= row["error"] < 1e-5 for row in ours)
    norm = next(row for row in ours if row["kernel"] == "rms_norm" and row["pass"] == "both")
    assert norm["gigabytes_per_second"] == pytest.approx(5 * 8 * 64 * 4 / norm["median_ms"] / 1e6)
    assert norm["baseline"] == "eager"
    assert norm["bandwidth_share"] == pytest.approx(norm["gigabytes_per_second"] / norm["copy_gigabytes_per_second"])
    assert notes == ["no kernel runs here: it needs a CUDA GPU, and this is cpu; `lfs` is the same steps in PyTorch"]


def test_the_loss_has_no_backward_pass_of_its_own() -> None:
    rows = rows_of("kernels", 'kernels.names=["linear_cross_entropy"]')
    assert [row["pass"] for row in rows] == ["forward"] * 2 + ["both"] * 2


@pytest.mark.parametrize("option", ["softcap", "z_loss"])
def test_the_loss_is_measured_with_its_options_too(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, asked = f"linear_cross_entropy_{option}", load_config(BenchConfig, None, ["benchmark=kernels"]).kernels
    case = kernels.KERNELS[name](asked.model_copy(update={"width": 64, "vocab_size": 50}), 8, draw_on_cpu(0))
    value = {"softcap": kernels.SOFTCAP, "z_loss": kernels.Z_LOSS}[option]
    hidden, weight = (x.detach().double() for x in case.inputs)
    targets = torch.arange(8) * 7_919 % 50
    right = reference_linear_cross_entropy(hidden, weight, targets, **{option: value})
    without = reference_linear_cross_entropy(hidden, weight, targets)
    assert case.plain(hidden, weight) == pytest.approx(float(right), rel=1e-12)
    assert abs(float(without) / float(right) - 1) > 1e-4  # else rows could leave it out and nobody would see

    monkeypatch.setattr(kernels, "linear_cross_entropy", lambda *inputs, **_: linear_cross_entropy(*inputs))
    rows = rows_of("kernels", f'kernels.names=["{name}"]', 'kernels.passes=["forward"]')
    assert next(row["error"] for row in rows if row["implementation"] == "lfs") > 1e-5


@pytest.mark.parametrize("name", ["rotary_attention", "qk_norm_rotary_attention"])
def test_turned_attention_is_measured_beside_the_same_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = rows_of("kernels", f'kernels.names=["{name}"]', "kernels.rows=40", "kernels.compile=true")
    assert [(row["pass"], row["implementation"]) for row in rows] == [
        (kind, which) for kind in ("forward", "backward", "both") for which in ("eager", "lfs", "compiled")
    ]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["note"] for row in rows if row["implementation"] != "lfs"} == {kernels.SAME_ATTENTION}
    assert {row["note"] for row in rows if row["implementation"] == "lfs"} == {""}
    flops = attention_shapes.Shape(1, 1, 1, 40, 64, torch.float32).forward_flops
    for row in rows:
        assert row["tflops"] * row["median_ms"] / 1e3 * 1e12 == pytest.approx(
            attention_shapes.PASSES[row["pass"]] * flops
        )
        assert row["gigabytes_per_second"] is None


def test_turned_attention_is_judged_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the attention that it is timed beside, which may be wrong as ours is."""
    monkeypatch.setattr(kernels, "flash_attention", None)
    asked = load_config(BenchConfig, None, ["benchmark=kernels", "kernels.width=128"]).kernels
    case = kernels.KERNELS["qk_norm_rotary_attention"](asked, 24, draw_on_cpu(1))
    assert kernels._errors(case) < 1e-5
    right, ours = case.plain(*(x.detach().double() for x in case.inputs)), case.ours(*case.inputs)
    assert (1, 24, 2, 64) == tuple(ours.shape) == tuple(right.shape)
    assert (ours - right).norm() < 1e-6 * right.norm()


@pytest.mark.parametrize("count", [1, 512 * 512, 1_000_000, 100_000_000])
def test_shapes_hold_exactly_the_weights_asked_for(count: int) -> None:
    assert sum(torch.Size(shape).numel() for shape in weight_shapes(count)) == count
    matrices = weight_shapes(count, has_matrices_only=True)
    assert sum(rows * columns for rows, columns in matrices) == count


def test_generation_is_compared_with_decoding_without_a_cache() -> None:
    rows = rows_of("generation", "generation.batch=[1, 2]")
    assert [row["part"] for row in rows] == ["prefill", "decode", "decode, no cache"] * 2
    assert rows[1]["tokens_per_second"] == pytest.approx(2 / rows[1]["median_ms"] * 1e3)
    assert rows[2]["speed_ratio"] == 1.0


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("benchmark=atention", "unknown benchmark `atention`", "did you mean `attention`?"),
        ("benchmark=", "no benchmark is named", "attention, generation, kernels, model, optimizer, tokenizer"),
        ("attention.kv_heads=3", "`attention.heads` (16) is not a multiple of `attention.kv_heads` (3)", "to 2"),
        ('attention.implementations=["flsh"]', "unknown implementation of attention `flsh`", "did you mean `flash`?"),
        ("attention.preset=leaderbord", "cannot be", "choose one of: none, cs336, leaderboard, shapes, memory"),
        (
            "attention.preset=cs336,attention.seq=8",
            "`attention.preset` and `attention.seq` both set the shapes",
            "leave out one of them, such as `attention.seq`",
        ),
        ("attention.window=4,attention.causal=false", "is for causal attention only", "set `attention.causal` to true"),
        ("attention.heads=[]", "must have at least 1 entry", "16"),
        ("attention.batch=two", "must be a whole number", "[1]"),
        ('attention.passes=["sideways"]', "cannot be", "choose one of: forward, backward, both"),
        ("model.attention=flsh", "unknown attention backend `flsh`", "did you mean `flash`?"),
        ('optimizer.names=["adam"]', "unknown optimizer `adam`", "did you mean `adamw`?"),
        ('model.sizes=["smal"]', "cannot be", "small"),
        ('model.parts=["forwards"]', "cannot be", "forward+backward"),
        ('model.precisions=["fp8"]', "cannot be", "tf32"),
        ('model.precisions=["tf32", "tf32"]', "has `tf32` twice", "name each once"),
        ("model.plot=memory.gif", "`model.plot` (`memory.gif`) does not say what to draw", ".svg, .png, .pdf or .html"),
        ('kernels.names=["rmsnorm"]', "cannot be", "rms_norm"),
        ("kernels.width=100", "`kernels.width` (100) is not a multiple of 64", "to 128"),
        ("tokenizer.vocab_size=256", "must be at least 257", "10000"),
        ("tokenizer.plot=a.pdf", "does not say what to draw", ".svg, .png or .html"),
        ('tokenizer.peers=["gigatokn"]', "cannot be", "gigatoken"),
    ],
)
def test_settings_that_cannot_work_are_answered_before_torch(override: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(BenchConfig, None, ["benchmark=attention", *re.split(r",(?=attention)", override)])
    assert message in str(caught.value)
    assert hint in str(caught.value.hint)


def test_a_hint_lists_each_implementation_of_attention_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(BenchConfig, None, ["benchmark=attention", 'attention.implementations=["nonsense"]'])
    names = caught.value.hint.removeprefix("choose one of: ").split(", ")
    assert {"flash", "reference", "torch"} <= set(names)
    assert names == sorted(set(names))


def test_a_prompt_longer_than_the_models_context_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = model.model_config("tiny", 8, load_config(BenchConfig, None, ["benchmark=model"]).model)
    monkeypatch.setattr("lfs_cli.benchmarks.generation.load_model", lambda *_: Transformer(small))
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
