"""`lfs bench attention`: shapes, arithmetic, the judge, who takes part, and what becomes of those that fail."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lfs_cli.benchmarks import BENCHMARKS, Bench, Measurement, Timing, attention, attention_accuracy, measure
from lfs_cli.benchmarks import attention_implementations as implementations
from lfs_cli.benchmarks.attention import best_other, draw
from lfs_cli.benchmarks.attention_accuracy import TENSORS, Judge, Verdict, exact_attention
from lfs_cli.benchmarks.attention_implementations import (
    EVERYWHERE,
    FASTEST,
    IMPLEMENTATIONS,
    Ready,
    UnavailableError,
    prepare,
)
from lfs_cli.benchmarks.attention_shapes import RECORDS, Job, Shape, jobs_of
from lfs_cli.config import AttentionBench, BenchConfig, load_config
from lfs_cli.model import ATTENTION
from lfs_cli.registry import catalogue

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = Shape(2, 4, 2, 24, 8, torch.float32)
TINY = ["attention.seq=[24]", "attention.batch=2", "attention.heads=4", "attention.kv_heads=2", "attention.head_dim=8"]


def rows_of(*overrides: str, names: str = "standard,tiled,torch", **bench) -> list[dict]:
    chosen = f"attention.implementations={json.dumps(names.split(','))}"
    config = load_config(BenchConfig, None, ["benchmark=attention", *TINY, chosen, *overrides])
    return BENCHMARKS.get("attention")(config, Bench(CPU, **{"warmup": 0, "repeats": 1, **bench}))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, ready: Ready | Exception) -> None:
    """Let `name` be `ready` for any shape."""

    def prepare_stand_in(shape: Shape, device: torch.device) -> Ready:
        if isinstance(ready, Exception):
            raise ready
        return ready

    IMPLEMENTATIONS.names()
    monkeypatch.setitem(IMPLEMENTATIONS._entries, name, prepare_stand_in)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ATTENTION.get("reference")(q, k, v, causal=True)


def asked(**settings) -> AttentionBench:
    return AttentionBench(**settings)


# What is measured


def test_a_grid_is_every_combination_in_order() -> None:
    grid = asked(seq=[8, 16], heads=[2, 4], kv_heads=[1, 2], dtypes=["float32", "bfloat16"], causal=False)
    jobs = jobs_of(grid, torch.float32, CPU)
    assert len(set(jobs)) == len(jobs) == 2 * 2 * 2 * 2
    assert jobs[0] == Job(Shape(1, 2, 1, 8, 64, torch.float32, causal=False))
    assert jobs[-1] == Job(Shape(1, 4, 2, 16, 64, torch.bfloat16, causal=False))
    assert [job.shape.seq for job in jobs[:4]] == [8, 16, 8, 16]


def test_lengths_and_types_fit_the_device_when_none_are_named() -> None:
    assert [job.shape.seq for job in jobs_of(asked(), torch.bfloat16, GPU)] == [1_024, 2_048, 4_096, 8_192, 16_384]
    small = jobs_of(asked(heads=3), torch.float32, CPU)
    assert [(job.shape.seq, job.shape.kv_heads, job.shape.dtype) for job in small] == [
        (length, 3, torch.float32) for length in (256, 512, 1_024)
    ]


def test_cs336_has_both_grids_of_the_assignment() -> None:
    jobs = jobs_of(asked(preset="cs336"), torch.float16, GPU)
    plain = [job for job in jobs if job.implementations == ("standard",)]
    flash = [job for job in jobs if job.implementations == ("flash", "standard")]
    assert len(plain) + len(flash) == len(jobs)
    assert {(job.shape.batch, job.shape.heads, job.shape.dtype) for job in plain} == {(8, 1, torch.float32)}
    assert [(job.shape.head_dim, job.shape.seq) for job in plain] == [
        (D, T) for D in (16, 32, 64, 128) for T in (256, 1_024, 4_096, 8_192, 16_384)
    ]
    assert {(job.shape.batch, job.shape.heads, job.shape.causal) for job in flash} == {(1, 1, True)}
    assert len(flash) == 2 * 4 * 10
    assert {job.shape.dtype for job in flash} == {torch.bfloat16, torch.float32}
    assert (min(job.shape.seq for job in flash), max(job.shape.seq for job in flash)) == (128, 65_536)


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("leaderboard", [(1, 16, 16_384, 64)]),
        ("memory", [(1, 16, 4_096, 64), (1, 16, 16_384, 64), (1, 16, 65_536, 64)]),
        (
            "shapes",
            [
                (1, 16, 16_384, 64),
                (8, 16, 2_048, 64),
                (32, 12, 1_024, 64),
                (2, 16, 8_192, 128),
                (1, 16, 16_384, 128),
                (8, 16, 2_048, 128),
            ],
        ),
    ],
)
def test_presets_have_the_shapes_that_others_have_measured(preset: str, sizes: list[tuple[int, ...]]) -> None:
    shapes = [job.shape for job in jobs_of(asked(preset=preset), torch.float16, GPU)]
    assert [(shape.batch, shape.heads, shape.seq, shape.head_dim) for shape in shapes] == sizes
    assert {(shape.dtype, shape.causal, shape.window) for shape in shapes} == {(torch.bfloat16, True, 0)}
    assert all(shape.kv_heads == shape.heads for shape in shapes)


@pytest.mark.parametrize("preset", ["cs336", "leaderboard", "memory", "shapes"])
def test_without_a_gpu_presets_are_cut_to_what_fits_and_say_so(preset: str) -> None:
    jobs = jobs_of(asked(preset=preset), torch.float16, CPU, is_named=True)
    assert len(set(jobs)) == len(jobs)
    assert all(job.shape.seq <= 512 and job.shape.batch == 1 and job.shape.heads <= 4 for job in jobs)
    assert {job.shape.dtype for job in jobs} == {torch.float16}


def test_every_preset_of_the_settings_exists() -> None:
    for preset in AttentionBench.model_fields["preset"].annotation.__args__:
        assert jobs_of(asked(preset=preset), torch.float16, GPU)


def test_flops_are_those_of_the_papers() -> None:
    leaderboard = Shape(1, 16, 16, 16_384, 64, torch.bfloat16)
    assert leaderboard.forward_flops == pytest.approx(0.5498e12, rel=1e-3)
    assert replace(leaderboard, causal=False).forward_flops == 2 * leaderboard.forward_flops
    assert replace(leaderboard, window=16_384).forward_flops == leaderboard.forward_flops
    assert replace(leaderboard, window=1_024).forward_flops == 4 * 16 * 64 * (16_384 * 1_024 - 1_024**2 / 2)
    assert leaderboard.input_numbers == 4 * 16_384 * 16 * 64


def test_the_published_record_stands_beside_its_shape_and_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = RECORDS.values()
    monkeypatch.setitem(RECORDS, SMALL, record)
    rows = rows_of()
    (published,) = [row for row in rows if row["status"] == "published"]
    assert (published["median_ms"], published["pass"], published["runs"]) == (5.364, "both", 0)
    assert published["tflops"] == pytest.approx(3.5 * SMALL.forward_flops / 5.364e-3 / 1e12)
    assert "github.com/stanford-cs336" in published["note"]
    assert published["speed_ratio"] is None
    assert published["seq"] == 24
    assert "CS336 record" not in {row["baseline"] for row in rows}
    assert [row for row in rows_of('attention.passes=["forward"]') if row["status"] == "published"] == []
    assert set(published) == set(rows[0])


# The judge


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_the_exact_answer_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch, causal: bool, length: int) -> None:
    monkeypatch.setattr(attention_accuracy, "SCORE_BYTES", 8 * 3 * length * 5)  # five queries at a time
    generator = torch.Generator().manual_seed(0)
    q, do = (torch.randn(3, length, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    k, v = (torch.randn(length, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = ATTENTION.get("reference")(
        leaves[0].transpose(0, 1)[None], leaves[1][None, :, None], leaves[2][None, :, None], causal=causal
    )[0].transpose(0, 1)
    expected = [output, *torch.autograd.grad(output, leaves, do)]
    for ours, exact in zip(exact_attention(q, k, v, do, causal), expected, strict=True):
        torch.testing.assert_close(ours, exact.expand_as(ours).detach() if exact.ndim == ours.ndim else exact[None])


def test_a_window_hides_what_lies_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_accuracy, "SCORE_BYTES", 8 * 12 * 5)
    q, k, v, do = (torch.randn(12, 4, dtype=torch.float64) for _ in range(4))
    t = torch.arange(12)
    seen = (t[None, :] <= t[:, None]) & (t[None, :] > t[:, None] - 3)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = (leaves[0] @ leaves[1].T / 2).masked_fill(~seen, float("-inf")).softmax(-1) @ leaves[2]
    expected = [output, *torch.autograd.grad(output, leaves, do)]
    for ours, exact in zip(exact_attention(q[None], k, v, do[None], causal=True, window=3), expected, strict=True):
        torch.testing.assert_close(ours[0], exact.detach())


def run_plain(inputs: attention_accuracy.Inputs) -> dict[str, Tensor]:
    output = reference(*inputs[:3])
    return dict(zip(TENSORS, (output, *torch.autograd.grad(output, inputs[:3], inputs.do)), strict=True))


def test_a_right_answer_has_the_error_of_its_type() -> None:
    inputs = draw(SMALL, 0, CPU)
    verdict = Judge(SMALL, inputs).compare(lambda: run_plain(inputs))
    assert list(verdict.errors) == list(TENSORS)
    assert 1e-9 < verdict.worst(TENSORS) < 1e-6
    assert verdict.complaint(torch.float32) is None


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("fault", ["a head", "the last position", "nan", "unwritten"])
def test_a_wrong_answer_is_caught_wherever_it_is(name: str, fault: str) -> None:
    inputs = draw(SMALL, 0, CPU)

    def wrong() -> dict[str, Tensor]:
        found = {key: tensor.detach().clone() for key, tensor in run_plain(inputs).items()}
        if fault == "a head":
            found[name][1, :, -1] *= 1.5
        elif fault == "the last position":
            found[name][:, -1] += 1
        elif fault == "nan":
            found[name][0, 3, 0, 2] = float("nan")
        else:
            found[name][0, :, 0] = 0
        return found

    complaint = Judge(SMALL, inputs).compare(wrong).complaint(torch.float32)
    assert complaint is not None
    assert complaint.startswith(name)
    assert "rounding explains 0.01" in complaint


def test_what_is_not_a_number_is_the_worst_error() -> None:
    errors = {"dq": attention_accuracy.Error(float("nan"), 1.0), "dk": attention_accuracy.Error(9.0, 1.0)}
    worst = Verdict(errors).worst(("dq", "dk"))
    assert worst != worst
    assert Verdict(errors).worst(("dk", "dv")) == 9.0
    assert Verdict(errors).worst(("dv",)) is None


def test_a_single_position_has_gradients_of_zero_and_no_relative_error() -> None:
    shape = replace(SMALL, seq=1)
    inputs = draw(shape, 0, CPU)
    verdict = Judge(shape, inputs).compare(lambda: run_plain(inputs))
    assert verdict.errors["dq"].relative is None
    assert verdict.errors["dq"].largest < 1e-6
    assert verdict.complaint(torch.float32) is None


def test_memory_given_to_the_judged_holds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    real = torch.full
    monkeypatch.setattr(
        torch, "full", lambda size, value, **how: filled.append((size, how["dtype"])) or real(size, value, **how)
    )
    inputs = draw(replace(SMALL, dtype=torch.bfloat16), 0, CPU)
    Judge(replace(SMALL, dtype=torch.bfloat16), inputs).compare(dict)
    assert {(tuple(size), dtype) for size, dtype in filled} == {
        (tuple(x.shape), dtype) for x in inputs for dtype in (torch.bfloat16, torch.float32)
    }


# Rows


def test_rows_have_ratios_to_the_best_of_others_and_errors_of_their_pass() -> None:
    rows = rows_of(names="standard,reference,tiled,torch,torch-math")
    assert [row["pass"] for row in rows[::5]] == ["forward", "backward", "both"]
    for row in rows:
        assert row["status"] == "ok", row["note"]
        assert row["error"] < 1e-5
        assert row["baseline"] in ("torch", "torch-math")
        work = {"forward": 1, "backward": 2.5, "both": 3.5}[row["pass"]] * 2 * 4 * 4 * 24 * 24 * 8 / 2
        assert row["tflops"] * 1e12 * row["median_ms"] / 1e3 == pytest.approx(work)
        assert row["ceiling_share"] == pytest.approx(row["tflops"] / row["ceiling_tflops"])
        assert (row["output_error"] is None) == (row["pass"] == "backward")
        assert (row["dk_error"] is None) == (row["dv_max_error"] is None) == (row["pass"] == "forward")
    for kind in ("forward", "backward", "both"):
        some = {row["implementation"]: row for row in rows if row["pass"] == kind}
        best = min(("torch", "torch-math"), key=lambda name: some[name]["median_ms"])
        assert {row["baseline"] for row in some.values()} == {best}
        assert some[best]["speed_ratio"] == 1.0
        assert some["tiled"]["speed_ratio"] == pytest.approx(some[best]["median_ms"] / some["tiled"]["median_ms"])


def test_the_same_fields_in_all_rows_and_all_of_them_are_json() -> None:
    rows = rows_of(names="standard,torch,flex,torch-cudnn,flash-attn-4,hopper,triton")
    assert len({tuple(row) for row in rows}) == 1
    json.dumps(rows, allow_nan=False)
    for row in rows:
        assert (row["status"] == "ok") == (row["median_ms"] is not None) == (row["error"] is not None)
        assert row["status"] == "ok" or row["note"]


def test_the_best_other_is_the_fastest_right_one_that_is_not_ours() -> None:
    def result(seconds: float, status: str = "ok") -> Measurement:
        return Measurement(Timing((seconds,)), status=status)

    results = {"flash": result(1.0), "a": result(3.0), "b": result(2.0), "c": result(0.5, "wrong"), "d": Measurement()}
    assert best_other(results, {"flash"}) == "b"
    assert best_other({"flash": result(1.0)}, {"flash"}) == ""


def test_a_wrong_implementation_is_shown_but_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ATTENTION.get("reference")(q, k, v, causal=False)

    stand_in(monkeypatch, "flash-attn-4", Ready(forgets_the_mask, "a fake"))
    rows = {(row["pass"], row["implementation"]): row for row in rows_of(names="flash-attn-4,standard")}
    for kind in ("forward", "backward", "both"):
        row = rows[kind, "flash-attn-4"]
        assert row["status"] == "wrong"
        assert "differs from float64" in row["note"]
        assert row["median_ms"] is not None
        assert row["error"] > 0.1
        assert row["speed_ratio"] is None
        assert rows[kind, "standard"]["baseline"] == ""
        assert rows[kind, "standard"]["status"] == "ok"


def test_a_wrong_implementation_has_no_ratio_to_a_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash-attn-4", Ready(lambda q, k, v: 0 * (q + v.sum() + k.sum()), "a fake"))
    rows = {row["implementation"]: row for row in rows_of('attention.passes=["forward"]', names="flash-attn-4,torch")}
    assert rows["flash-attn-4"]["baseline"] == rows["torch"]["baseline"] == "torch"
    assert (rows["flash-attn-4"]["status"], rows["flash-attn-4"]["speed_ratio"]) == ("wrong", None)
    assert rows["torch"]["speed_ratio"] == 1.0


def test_only_the_pass_that_is_wrong_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return 1.2 * gradient

    stand_in(monkeypatch, "flash-attn-4", Ready(lambda q, k, v: reference(q, WrongGradient.apply(k), v), "a fake"))
    rows = {row["pass"]: row for row in rows_of(names="flash-attn-4")}
    assert [rows[kind]["status"] for kind in ("forward", "backward", "both")] == ["ok", "wrong", "wrong"]
    assert rows["both"]["note"].startswith("dk differs")


def test_an_implementation_that_fails_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("No available kernel.\nAborting execution.")

    stand_in(monkeypatch, "flash-attn-4", Ready(fail, "a fake"))
    rows = rows_of(names="flash-attn-4,torch")
    assert {row["status"] for row in rows if row["implementation"] == "torch"} == {"ok"}
    failed = [row for row in rows if row["implementation"] == "flash-attn-4"]
    assert {(row["status"], row["note"]) for row in failed} == {("failed", "RuntimeError: No available kernel.")}


def test_a_gpu_that_was_broken_costs_no_row_that_was_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    real, notes = attention.draw, []

    def draw_on_a_broken_gpu(shape: Shape, seed: int, device: torch.device) -> attention_accuracy.Inputs:
        if shape.seq == 16:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")
        return real(shape, seed, device)

    monkeypatch.setattr(attention, "draw", draw_on_a_broken_gpu)
    rows = rows_of("attention.seq=[8, 16, 24]", names="torch", on_note=notes.append)
    assert {row["seq"] for row in rows} == {8}
    assert notes == ["stopped at T=16, D=8: RuntimeError: CUDA error: an illegal memory access was encountered"]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rows_of("attention.seq=[16]", names="torch")


def test_one_that_cannot_go_backward_is_timed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash-attn-4", Ready(lambda q, k, v: reference(q, k, v).detach(), "a fake"))
    rows = {row["pass"]: row for row in rows_of(names="flash-attn-4")}
    assert rows["forward"]["status"] == "ok"
    assert rows["forward"]["error"] < 1e-5
    assert rows["backward"]["status"] == rows["both"]["status"] == "failed"
    assert "does not require grad" in rows["backward"]["note"]


def test_preparing_may_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash-attn-3", ValueError("built for another torch"))
    stand_in(monkeypatch, "flash-attn-4", UnavailableError("not today"))
    rows = {row["implementation"]: row for row in rows_of(names="flash-attn-3,flash-attn-4,torch")}
    assert (rows["flash-attn-3"]["status"], rows["flash-attn-3"]["note"]) == (
        "failed",
        "ValueError: built for another torch",
    )
    assert (rows["flash-attn-4"]["status"], rows["flash-attn-4"]["note"]) == ("unavailable", "not today")
    assert rows["torch"]["status"] == "ok"


def test_what_does_not_fit_is_rows_pass_by_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference(q, k, v)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has a total of ...")

    stand_in(monkeypatch, "torch-math", Ready(Large.apply, "a fake"))
    rows = {row["pass"]: row for row in rows_of(names="torch-math")}
    assert rows["forward"]["status"] == "ok"
    assert rows["forward"]["output_error"] < 1e-5
    for kind in ("backward", "both"):
        assert (rows[kind]["status"], rows[kind]["note"]) == ("out of memory", "64.00 GiB were refused")
        assert rows[kind]["median_ms"] is rows[kind]["tflops"] is rows[kind]["error"] is None


def test_too_many_scores_for_this_machine_are_refused_before_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 60_000)
    rows = {(row["pass"], row["implementation"]): row for row in rows_of(names="standard,torch")}
    assert rows["both", "standard"]["status"] == "out of memory"
    assert "GB are free" in rows["both", "standard"]["note"]
    assert rows["both", "torch"]["status"] == "ok"


def test_inputs_that_do_not_fit_are_rows_too() -> None:
    rows = rows_of("attention.seq=[24, 1000000000000]", names="standard,torch")
    assert {row["status"] for row in rows if row["seq"] == 24} == {"ok"}
    refused = [row for row in rows if row["seq"] > 24]
    assert {(row["status"], row["note"]) for row in refused} == {
        ("out of memory", "queries, keys, values and their gradients alone do not fit")
    }
    assert len(refused) == len(rows) / 2


def test_gradients_have_to_fit_beside_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = SMALL.input_numbers * SMALL.dtype.itemsize
    monkeypatch.setattr(measure, "free_bytes", lambda device: 3 * inputs)
    assert draw(SMALL, 0, CPU)
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2 * inputs - 1)
    with pytest.raises(MemoryError):
        draw(SMALL, 0, CPU)


def test_the_ceiling_is_measured_once_for_each_type() -> None:
    seen: list[str] = []
    rows = rows_of(
        'attention.dtypes=["float32", "bfloat16"]',
        "attention.seq=[8, 16]",
        names="torch",
        on_progress=lambda label, done, total: seen.append(label),
    )
    assert len([label for label in seen if label.startswith("matrix product of 1,024")]) == 2
    assert len({(row["dtype"], row["ceiling_tflops"]) for row in rows}) == 2


# Who takes part


def test_every_name_of_the_settings_is_known_without_torch() -> None:
    written = catalogue("lfs_cli.benchmarks", "IMPLEMENTATIONS")
    assert set(written) == set(IMPLEMENTATIONS.names())
    assert set(FASTEST) | set(EVERYWHERE) <= set(written)


@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS.names()) | set(ATTENTION.names())))
def test_everybody_who_can_computes_attention(name: str) -> None:
    try:
        ready = prepare(name, SMALL, CPU)
    except UnavailableError as error:
        pytest.skip(str(error))
    inputs = draw(SMALL, 0, CPU)
    q, k, v = (x if ready.layout == "BTHD" else x.transpose(1, 2).contiguous() for x in inputs[:3])
    output = ready.attend(q, k, v)
    torch.testing.assert_close(output if ready.layout == "BTHD" else output.transpose(1, 2), reference(*inputs[:3]))
    assert ready.is_ours == (name.split("-")[0] not in ("torch", "flex"))
    assert ready.kernel


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hopper", "has no attention backend `hopper`"),
        ("triton", "has no attention backend `triton`"),
        ("torch-cudnn", "needs a CUDA GPU, and this is cpu"),
        ("torch-efficient", "needs a CUDA GPU, and this is cpu"),
        ("flex", "its backward pass needs a CUDA GPU"),
        ("flash-attn-3", "needs a CUDA GPU"),
        ("flash-attn-4", "needs a CUDA GPU"),
    ],
)
def test_absent_ones_say_why(name: str, reason: str) -> None:
    if name in ATTENTION.names():
        pytest.skip("this version has it")
    with pytest.raises(UnavailableError, match=reason):
        prepare(name, SMALL, CPU)


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        ("no_such_package.cute", replace(SMALL, dtype=torch.bfloat16), "`a-package` is not installed"),
        ("json.no_such_part", replace(SMALL, dtype=torch.bfloat16), "`a-package` is not installed"),
        ("json", replace(SMALL, dtype=torch.bfloat16), "it cannot be imported: AttributeError"),
        ("json", SMALL, "it has no float32"),
    ],
)
def test_packages_that_cannot_be_used_say_why(module: str, shape: Shape, reason: str) -> None:
    with pytest.raises(UnavailableError, match=reason):
        implementations._flash_attn(module, "a-package", shape, GPU)


@pytest.mark.parametrize("returns_both", [True, False])
def test_flash_attn_packages_are_called_with_the_mask(monkeypatch: pytest.MonkeyPatch, returns_both: bool) -> None:
    calls = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: object) -> object:
        calls.append(options)
        return (q, k) if returns_both else q

    monkeypatch.setattr(json, "flash_attn_func", flash_attn_func, raising=False)
    ready = implementations._flash_attn("json", "torch", replace(SMALL, dtype=torch.float16, window=3), GPU)
    q, k, v, _ = draw(SMALL, 0, CPU)
    assert ready.attend(q, k, v) is q
    assert calls == [{"causal": True, "window_size": (2, 0)}]
    assert ready.kernel == f"torch {torch.__version__}: chosen by name" or ready.kernel.startswith("torch 2.")


def test_a_window_is_refused_by_those_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    windowed = replace(SMALL, window=5)
    monkeypatch.setitem(ATTENTION._entries, "mine", attend_mine)
    for name in ("torch", "torch-flash", "mine"):
        with pytest.raises(UnavailableError, match="no sliding window"):
            prepare(name, windowed, CPU)

    def attend_window(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None) -> Tensor:
        return q * window

    monkeypatch.setitem(ATTENTION._entries, "windowed", attend_window)
    q, k, v, _ = draw(windowed, 0, CPU)
    torch.testing.assert_close(prepare("windowed", windowed, CPU).attend(q, k, v), 5 * q)


def attend_mine(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    return ATTENTION.get("reference")(q, k, v, causal=causal)


def test_a_backend_of_a_plugin_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION._entries, "mine", attend_mine)
    assert {row["status"] for row in rows_of(names="mine,torch")} == {"ok"}


def test_the_version_of_cudnn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_902)
    ready = prepare("torch-cudnn", replace(SMALL, dtype=torch.bfloat16), GPU)
    assert (ready.kernel, ready.layout, ready.is_ours) == ("cuDNN 9.19.2: chosen by name", "BHTD", False)


def test_torch_says_what_it_chose() -> None:
    assert prepare("torch", SMALL, CPU).kernel == "flash attention: chosen by torch"
    assert prepare("torch", replace(SMALL, dtype=torch.float64), torch.device("mps")).kernel.startswith("a kernel")
