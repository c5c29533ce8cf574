"""`lfs bench model`: its parts and variants, and a profile that puts time and memory where they belong."""

import json
import os
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from fake_graphs import FakeRecorder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lfs_cli.benchmarks import BENCHMARKS, Bench, Candidate, measure, model, model_profile, model_step
from lfs_cli.benchmarks.model_profile import StepProfile, profile_step
from lfs_cli.benchmarks.model_step import PARTS, Training, Variant, multiplying_as
from lfs_cli.benchmarks.model_trace import BETWEEN, KINDS, PHASES, kernel_rows, memory_rows, thinned
from lfs_cli.config import BenchConfig, ModelConfig, load_config
from lfs_cli.errors import ConfigError, DeviceError
from lfs_cli.training.graphs import WARM_UPS, GraphedPass
from lfs_cli.training.step import LossFunction

CPU = torch.device("cpu")
SMALL = ModelConfig(vocab_size=300, context_length=16, width=32, layers=2, heads=2, feed_forward_width=64)
FLOAT32 = Variant("float32")


def rows_of(*overrides: str, device: torch.device = CPU, **bench) -> list[dict]:
    tiny = ["benchmark=model", "model.seq=[4]", "model.batch=1", "model.vocab_size=300"]
    config = load_config(BenchConfig, None, [*tiny, *overrides])
    return BENCHMARKS.get("model")(config, Bench(device, warmup=0, repeats=1, **bench))


def profiled(config: ModelConfig = SMALL, training: Training | None = None, **how) -> StepProfile:
    training = training or Training(config, 2, 0, CPU)
    training.start_optimizer()
    return profile_step(training, FLOAT32, **how)


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.SIZES, "tiny", {"width": 16, "feed_forward_width": 32, "layers": 1, "heads": 2})


@pytest.fixture(scope="module")
def seen() -> StepProfile:
    return profiled()


def test_model_parts_and_the_whole_step() -> None:
    rows = rows_of('model.sizes=["tiny"]', "model.seq=[4, 6]")
    assert [(row["seq"], row["part"]) for row in rows] == [(T, part) for T in (4, 6) for part in PARTS]
    step = rows[len(PARTS) - 1]
    assert step["tokens_per_second"] == pytest.approx(4 / step["median_ms"] * 1e3)
    assert step["tflops"] is not None


@pytest.mark.parametrize("option", ["logit_softcap", "z_loss"])
def test_the_loss_is_that_of_the_model(option: str) -> None:
    plain, changed = (Training(SMALL.model_copy(update=update), 2, 0, CPU) for update in ({}, {option: 0.5}))
    hidden_BTC = plain.hidden(plain.tokens_BT, torch.float32)
    one, other = (x.head_loss(hidden_BTC, x.targets_BT, torch.float32).item() for x in (plain, changed))
    assert abs(one - other) > 1e-3


def test_only_the_parts_asked_for_are_timed() -> None:
    rows = rows_of('model.parts=["forward", "forward+backward"]')
    assert [row["part"] for row in rows] == ["forward", "forward+backward"]


def test_precisions_are_compared_with_the_first() -> None:
    rows = rows_of('model.precisions=["float32", "bfloat16", "tf32"]', 'model.parts=["forward", "step"]')
    assert [(row["dtype"], row["part"]) for row in rows] == [
        (name, part) for name in ("float32", "bfloat16", "tf32") for part in ("forward", "step")
    ]
    assert {row["baseline"] for row in rows} == {"float32"}
    assert [row["speed_ratio"] for row in rows[:2]] == [1.0, 1.0]
    assert rows[3]["speed_ratio"] == pytest.approx(rows[1]["median_ms"] / rows[3]["median_ms"])
    assert {(row["status"], row["note"]) for row in rows[4:]} == {
        ("unavailable", "tf32 is for CUDA GPUs, and this is cpu")
    }


def test_precisions_and_modes_make_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, run_before = [], []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    monkeypatch.setattr(model, "_compile", lambda candidate, device: run_before.append(candidate.name))
    rows = rows_of('model.precisions=["float32", "bfloat16"]', "model.compile=true", 'model.parts=["inference"]')
    assert run_before == ["float32 compiled inference", "bfloat16 compiled inference"]
    assert [(row["dtype"], row["mode"], row["baseline"]) for row in rows] == [
        (name, mode, "float32 eager") for name in ("float32", "bfloat16") for mode in ("eager", "compiled")
    ]
    assert sorted(compiled) == ["hidden", "hidden", "loss", "loss", "whole", "whole"]
    rows = rows_of("model.compile=true", 'model.parts=["inference"]')
    assert {row["baseline"] for row in rows} == {"eager"}


def test_compiling_runs_once_and_leaves_a_lack_of_memory_to_the_measurement() -> None:
    calls: list[str] = []

    def fail(error: Exception) -> None:
        raise error

    steps = {name: lambda name=name: calls.append(name) for name in ("prepare", "run", "finish")}
    model._compile(Candidate("a", **steps), CPU)
    assert calls == ["prepare", "run", "finish"]
    model._compile(Candidate("b", lambda: fail(MemoryError())), CPU)
    with pytest.raises(RuntimeError, match="no compiler"):
        model._compile(Candidate("c", lambda: fail(RuntimeError("no compiler"))), CPU)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    """Let passes be replayed on a CPU; collects what they are recorded by."""
    made: list[FakeRecorder] = []

    def graphed(loss: LossFunction, model: nn.Module, _recorder: None) -> GraphedPass:
        made.append(FakeRecorder(model))
        return GraphedPass(loss, model, made[-1])

    monkeypatch.setattr(model_step, "CudaRecorder", lambda device: None)
    monkeypatch.setattr(model_step, "GraphedPass", graphed)
    return made


def replayed_rows(*overrides: str) -> list[dict]:
    """Rows of the smallest size, on a CPU that is taken for a GPU by none but who asks for graphs."""
    settings = ["benchmark=model", "model.batch=1", "model.vocab_size=300", "model.graphs=true", *overrides]
    asked = load_config(BenchConfig, None, settings).model
    return model._bench_size("tiny", 4, asked, 0, Bench(CPU, warmup=0, repeats=2))


def test_whole_passes_are_replayed_too(recorders: list[FakeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    rows = replayed_rows("model.compile=true", 'model.parts=["forward", "forward+backward", "step"]')
    whole = ["forward+backward", "step"]
    assert [(row["mode"], row["part"]) for row in rows] == [
        (mode, part)
        for mode, parts in [
            ("eager", ["forward", *whole]),
            ("eager+graph", whole),
            ("compiled", ["forward", *whole]),
            ("compiled+graph", whole),
        ]
        for part in parts
    ]
    assert {row["baseline"] for row in rows} == {"eager"}
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["peak_bytes"] is None for row in rows] == [row["mode"].endswith("graph") for row in rows]
    assert {graph.replays for recorder in recorders for graph in recorder.graphs} == {2}  # recorded, then timed


@pytest.mark.parametrize("part", ["forward+backward", "step"])
def test_what_is_timed_is_one_replay(part: str, recorders: list[FakeRecorder]) -> None:
    training = Training(SMALL, 1, 0, CPU)
    (candidate,) = training.candidates(Variant("float32", "eager+graph"), [part], 0)
    for run in (1, 2):
        candidate.prepare()
        assert (recorders[-1].asides, [graph.replays for graph in recorders[-1].graphs]) == (WARM_UPS, [1])
        candidate.run()
        assert (recorders[-1].asides, [graph.replays for graph in recorders[-1].graphs]) == (WARM_UPS, [2])
        candidate.finish()
        assert (training.graphs, [weight.grad for weight in training.weights if weight.grad is not None]) == ([], [])
        assert len(recorders) == run


def test_a_replayed_step_moves_the_weights_as_the_step_does(recorders: list[FakeRecorder]) -> None:
    moved = []
    for mode in ("eager", "eager+graph"):
        training = Training(SMALL, 1, 0, CPU)
        (candidate,) = training.candidates(Variant("float32", mode), ["step"], 0)
        for _ in range(2):
            candidate.prepare()
            candidate.run()
            candidate.finish()
        moved.append(training.weights)
    assert all(map(torch.equal, *moved))


def test_what_cannot_be_recorded_is_a_row_that_says_so(
    recorders: list[FakeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(FakeRecorder, "record", refuse)
    rows = replayed_rows("model.compile=true", 'model.parts=["step"]')
    assert [row["status"] for row in rows] == ["ok", "failed"] * 2
    assert "a pass cannot be recorded as a CUDA graph" in rows[1]["note"]
    assert "not permitted when stream is capturing" in rows[3]["note"]


def test_graphs_are_for_cuda_gpus_and_whole_passes() -> None:
    with pytest.raises(DeviceError, match="CUDA graphs are for CUDA GPUs, and this is cpu") as caught:
        rows_of("model.graphs=true")
    assert caught.value.hint == "leave out `--graphs`"
    with pytest.raises(ConfigError, match=r"`model\.parts` has neither") as refused:
        rows_of("model.graphs=true", 'model.parts=["forward"]')
    assert "`--graphs`" in refused.value.hint


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_precision_is_that_of_the_matrix_products(name: str, dtype: torch.dtype) -> None:
    found = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                found.update(x.dtype for x in args)
            return func(*args, **(kwargs or {}))

    training = Training(SMALL, 1, 0, CPU)
    (candidate,) = training.candidates(Variant(name), ["forward"], 0)
    with Watch():
        candidate.run()
    assert found == {dtype}
    assert {weight.dtype for weight in training.weights} == {torch.float32}


def test_tf32_is_on_while_its_parts_run_and_off_after(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    training = Training(SMALL, 1, 0, CPU)
    monkeypatch.setattr(training.model, "hidden", lambda _: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    for name in ("tf32", "float32"):
        training.candidates(Variant(name), ["forward"], 0)[0].run()
    assert seen == ["high", "highest"]
    with pytest.raises(KeyError), multiplying_as("tf32"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_no_part_leaves_gradients_or_a_graph() -> None:
    training = Training(SMALL, 1, 0, CPU)
    for candidate in training.candidates(FLOAT32, PARTS, 0):
        candidate.prepare()
        candidate.run()
        candidate.finish()
        assert all(weight.grad is None for weight in training.weights), candidate.name
        assert (training.losses, training.hidden_BTC) == ([], None), candidate.name


def test_the_peak_of_a_step_counts_what_stays_and_that_of_a_part_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.PeakMemory, "peak_bytes", lambda _: 1000)
    rows = rows_of('model.parts=["forward", "optimizer", "step"]')
    weights = round(rows[0]["params_M"] * 1e6)
    assert [row["peak_bytes"] for row in rows] == [1000, 1000, 1000 + 3 * 4 * weights]


def test_a_model_too_large_for_this_machine_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1_000_000_000)
    rows = rows_of('model.sizes=["tiny", "2.7b"]', "model.kernels=true", on_table=lambda name, rows: None)
    assert {(row["size"], row["status"]) for row in rows} == {("tiny", "ok"), ("2.7b", "out of memory")}
    assert "GB are free" in rows[-1]["note"]


def test_ten_billion_weights_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 24_000_000_000)
    monkeypatch.setattr(model, "Training", lambda *_: pytest.fail("allocated"))
    began = time.monotonic()
    rows = rows_of('model.sizes=["10b"]', "model.seq=[512]", "model.vocab_size=10000")
    assert {row["status"] for row in rows} == {"out of memory"}
    assert rows[0]["note"] == "needs about 155.9 GB, and 24.0 GB are free"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("size", "parts", "note"),
    [
        ("2.7b", "step", None),
        ("10b", "step", "weights, gradients and optimizer need 155.9 GB, and 60.0 GB are free"),
        ("10b", "inference", None),
        ("10b", "forward", None),
        ("10b", "forward+backward", "weights and gradients need 78.0 GB, and 60.0 GB are free"),
    ],
)
def test_what_cannot_fit_depends_on_the_parts(
    size: str, parts: str, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "free_bytes", lambda device: 60_000_000_000)
    monkeypatch.setattr(model, "Training", lambda *_: pytest.fail("allocated") if note else MissingModel())
    asked = load_config(BenchConfig, None, ["benchmark=model", f'model.parts=["{parts}"]']).model
    started = model._start(model.model_config(size, 512, asked), asked, 0, torch.device("cuda"))
    assert (started if isinstance(started, str) else None) == note


class MissingModel:
    def start_optimizer(self) -> None:
        pass


def test_a_part_that_runs_out_of_memory_is_a_row_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 bytes.")

    monkeypatch.setattr("lfs_cli.benchmarks.model_step.train_step", refuse)
    rows = rows_of()
    assert {row["part"]: row["status"] for row in rows} == {**dict.fromkeys(PARTS, "ok"), "step": "out of memory"}
    monkeypatch.setattr("lfs_cli.benchmarks.model_step.Transformer", refuse)
    rows = rows_of()
    assert {(row["status"], row["note"]) for row in rows} == {
        ("out of memory", "the weights and what belongs to them do not fit")
    }


def test_sizes_of_the_table_have_the_shapes_of_cs336() -> None:
    shapes = {name: tuple(size.values()) for name, size in model.SIZES.items() if name not in ("tiny", "10b")}
    assert shapes == {
        "small": (768, 3072, 12, 12),
        "medium": (1024, 4096, 24, 16),
        "large": (1280, 5120, 36, 20),
        "xl": (1600, 6400, 48, 25),
        "2.7b": (2560, 10240, 32, 32),
    }


def test_a_profile_names_the_parts_of_a_step(tmp_path: Path) -> None:
    notes: list[str] = []
    rows_of(f"model.profile={tmp_path / 'new'}", 'model.parts=["forward"]', on_note=notes.append)

    (trace,) = (tmp_path / "new").iterdir()
    assert notes == [f"wrote {trace}"]
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {*PHASES, "module blocks.0.attention"} <= names


def test_profiling_leaves_nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    profiled()
    assert tuple(capfd.readouterr()) == ("", "")


def test_errors_pass_where_notices_of_the_profiler_do_not(capfd: pytest.CaptureFixture[str]) -> None:
    class Noisy:
        def __enter__(self) -> None:
            os.write(2, b"ERROR:2026-11-29 9:9 a.cpp:1] one\nUSDT:2026-11-29 9:9 b.cpp:2] profiler_start\n")

        def __exit__(self, *error: object) -> None:
            os.write(2, b"62%USDT:2026-11-29 9:9 b.cpp:2] profiler_stop\nanother\n")

    with pytest.raises(MemoryError), model_profile._quietly(Noisy()):
        raise MemoryError
    assert capfd.readouterr().err == "ERROR:2026-11-29 9:9 a.cpp:1] one\n62%another\n"


def test_every_precision_is_profiled_and_tells_so() -> None:
    tables = defaultdict(list)
    rows_of(
        'model.precisions=["float32", "bfloat16", "tf32"]',
        'model.parts=["forward"]',
        "model.kernels=true",
        "model.memory=true",
        on_table=lambda name, rows: tables[name].extend(rows),
    )
    assert set(tables) == {"kernels", "memory"}
    for rows in tables.values():
        assert {(row["size"], row["seq"], row["dtype"]) for row in rows} == {
            ("tiny", 4, "float32"),
            ("tiny", 4, "bfloat16"),
        }
    json.dumps(tables, allow_nan=False)


def test_times_of_the_host_in_place_of_kernels_are_told(seen: StepProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    bench = Bench(torch.device("cuda"), on_note=notes.append)
    asked = load_config(BenchConfig, None, ["benchmark=model", "model.kernels=true"]).model
    for events in (seen.events, [*seen.events, {"cat": "kernel", "name": "k", "dur": 1, "args": {"correlation": 1}}]):
        found = StepProfile(events, seen.held, seen.gradients, "cuda")
        monkeypatch.setattr(model, "profile_step", lambda *_, found=found: found)
        model._profile(Training(SMALL, 1, 0, CPU), FLOAT32, "model small T=4", {}, asked, bench)
    assert notes == [
        "model small T=4: no kernels were seen, as another profiler has the GPU; `kernels` has the host's times"
    ]


def test_a_device_that_cannot_be_profiled_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be profiled on mps") as caught:
        rows_of("model.kernels=true", device=torch.device("mps"))
    assert "--device cpu" in caught.value.hint


def test_times_add_up_to_what_the_profiler_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = []

    class Kept(torch.profiler.profile):
        def __enter__(self):
            profiles.append(self)
            return super().__enter__()

    monkeypatch.setattr(model_profile, "profile", Kept)
    rows = profiled().kernels
    judge = {event.key: event for event in profiles[0].key_averages()}

    assert sum(row["share"] for row in rows) == pytest.approx(1)
    total = sum(judge[name].cpu_time_total for name in PHASES) / 1e3
    assert sum(row["total_ms"] for row in rows) == pytest.approx(total, rel=1e-3)
    assert total == pytest.approx(sum(event.self_cpu_time_total for event in judge.values()) / 1e3, rel=1e-3)
    for name in ("aten::mm", "aten::bmm", "_SiLU", "MmBackward0", "aten::_foreach_lerp_"):
        mine = [row for row in rows if row["kernel"] == name]
        nodes = f"autograd::engine::evaluate_function: {name}"
        events = [judge[key] for key in (name, nodes) if key in judge]
        assert sum(row["calls"] for row in mine) == sum(event.count for event in events)
        expected = sum(event.self_cpu_time_total for event in events) / 1e3
        assert sum(row["total_ms"] for row in mine) == pytest.approx(expected, rel=1e-2)


def test_every_module_has_its_time_in_both_directions(seen: StepProfile) -> None:
    places = {(row["module"], row["phase"]) for row in seen.kernels if row["kernel"] != BETWEEN}
    modules = {
        "embedding",
        "blocks.*.attention_norm",
        "blocks.*.attention",
        "blocks.*.feed_forward_norm",
        "blocks.*.feed_forward",
        "norm",
        "head+loss",
    }
    both = {(module, phase) for module in modules for phase in ("forward", "backward")}
    assert both | {("clip", "optimizer"), ("optimizer", "optimizer")} <= places
    assert {phase for _, phase in places} == {"forward", "backward", "optimizer"}
    assert {row["module"] for row in seen.kernels if row["kernel"] == "_StandardAttentionBackward"} == {
        "blocks.*.attention"
    }
    stored = {row["module"] for row in seen.kernels if row["kernel"] == "torch::autograd::AccumulateGrad"}
    assert stored == modules


@pytest.mark.parametrize("path", ["embedding", "blocks.1.attention", "blocks.0.feed_forward_norm"])
def test_a_large_product_appears_where_it_was_put(path: str, seen: StepProfile) -> None:
    training = Training(SMALL, 2, 0, CPU)
    weight = nn.Parameter(torch.randn(900, 900))
    training.model.get_submodule(path).register_forward_hook(lambda module, _, out: out + (weight @ weight).mean())
    products = {
        (row["module"], row["phase"]): row for row in profiled(training=training).kernels if row["kernel"] == "aten::mm"
    }

    usual = {(row["module"], row["phase"]): row["calls"] for row in seen.kernels if row["kernel"] == "aten::mm"}
    place = path.replace("0", "*").replace("1", "*")
    for phase, calls in (("forward", 1), ("backward", 2)):
        usual[place, phase] = usual.get((place, phase), 0) + calls
        assert products[place, phase]["total_ms"] > calls * 2e3 * 900**3 / 5e12  # no CPU does 5 TFLOP/s
    assert {key: row["calls"] for key, row in products.items()} == usual


def test_what_is_computed_again_is_backward_work_of_its_module() -> None:
    again = profiled(SMALL.model_copy(update={"checkpointing": "full"})).kernels
    places = {(row["module"], row["phase"]): row["calls"] for row in again if row["kernel"] == "_SiLU"}
    assert places == {("blocks.*.feed_forward", phase): SMALL.layers for phase in ("forward", "backward")}


def span(name: str, start: float, end: float, category: str = "cpu_op", thread: int = 1, **args) -> dict:
    return {
        "ph": "X", "name": name, "cat": category, "ts": 5e9 + start, "dur": end - start, "tid": thread, "args": args
    }  # fmt: skip


PHASE_SPANS = [
    span(name, 100 * n, 100 * n + 90, "user_annotation") for n, name in enumerate(PHASES)
]  # forward 0, loss 100, backward 200, optimizer 300


def test_kernels_of_a_gpu_belong_where_they_were_launched() -> None:
    node = "autograd::engine::evaluate_function: "
    events = [
        *PHASE_SPANS,
        span("module blocks.0.attention", 10, 40, "user_annotation"),
        span("aten::mm", 10, 20, **{"Sequence number": 7}),
        span("cudaLaunchKernel", 14, 16, "cuda_runtime", correlation=1),
        span("cuLaunchKernelEx", 30, 31, "cuda_driver", correlation=2),  # Triton: in no operation
        span("module blocks.1.attention", 50, 60, "user_annotation"),
        span("aten::mm", 52, 58, **{"Sequence number": 8}),
        span("cudaLaunchKernel", 54, 55, "cuda_runtime", correlation=3),
        span("cudaMemcpyAsync", 110, 111, "cuda_runtime", correlation=4),
        # another thread, on which the range of backward is not open, and which has numbers of its own
        span(f"{node}MulBackward0", 202, 208, thread=2, **{"Sequence number": 8}),
        span("module norm", 203, 207, "user_annotation", 2),
        span("aten::mul", 204, 206, thread=2, **{"Sequence number": 7}),
        span(f"{node}MmBackward0", 210, 220, thread=2, **{"Sequence number": 7}),
        span("cudaLaunchKernel", 212, 213, "cuda_runtime", 2, correlation=5),
        span(f"{node}torch::autograd::AccumulateGrad", 230, 240, thread=2),
        span("cudaLaunchKernel", 232, 233, "cuda_runtime", 2, correlation=6),
        span("cudaLaunchKernel", 310, 311, "cuda_runtime", correlation=8),
        span("cudaLaunchKernel", 395, 396, "cuda_runtime", correlation=9),  # after the step
    ]
    ends = [1, 1, 2, 2, 4, 8, 16, 32, 64, 128]
    kernels = [
        span("Memcpy DtoH" if n == 4 else f"kernel {min(n, 2)}", 1000 + n, 1000 + n + ends[n],
             "gpu_memcpy" if n == 4 else "kernel", 99, correlation=n)
        for n in (1, 2, 3, 4, 5, 6, 7, 8, 9)
    ]  # fmt: skip
    ranges = [span("forward", 1000, 2000, "gpu_user_annotation", 99)]

    rows = kernel_rows([*events, *kernels, *ranges])

    assert {(row["module"], row["phase"], row["kernel"]): (row["calls"], row["total_ms"]) for row in rows} == {
        ("blocks.*.attention", "forward", "kernel 1"): (1, 1e-3),
        ("blocks.*.attention", "forward", "kernel 2"): (2, 4e-3),
        ("head+loss", "forward", "Memcpy DtoH"): (1, 4e-3),
        ("blocks.*.attention", "backward", "kernel 2"): (2, 24e-3),
        ("unknown", "", "kernel 2"): (1, 32e-3),
        ("optimizer", "optimizer", "kernel 2"): (1, 64e-3),
    }
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows == sorted(rows, key=lambda row: -row["total_ms"])


def test_a_node_belongs_to_the_last_operation_with_its_number() -> None:
    events = [
        *PHASE_SPANS,
        span("module norm", 10, 20, "user_annotation"),
        span("aten::detach", 12, 14, **{"Sequence number": 7}),  # makes no node: the number is still free
        span("module embedding", 30, 40, "user_annotation"),
        span("aten::mul", 32, 34, **{"Sequence number": 7}),
        span("autograd::engine::evaluate_function: MulBackward0", 210, 220, **{"Sequence number": 7}),
        span("aten::_foreach_norm", 310, 320, **{"Sequence number": 7}),
    ]
    rows = kernel_rows(events)
    (found,) = (row for row in rows if row["kernel"] == "MulBackward0")
    assert (found["module"], found["phase"]) == ("embedding", "backward")
    assert sum(row["total_ms"] for row in rows) == pytest.approx(4 * 90e-3)


def test_memory_begins_and_ends_with_weights_and_state(seen: StepProfile) -> None:
    training = Training(SMALL, 2, 0, CPU)
    weights = sum(weight.nbytes for weight in training.weights)
    first, last = seen.memory[0], seen.memory[-1]
    for row in (first, last):
        assert [row[f"{kind}_bytes"] for kind in KINDS] == [weights, 2 * weights, 0, 0, 0]
    update = next(row for row in seen.memory if row["phase"] == "optimizer")
    assert update["gradients_bytes"] == weights
    assert update["activations_bytes"] == 0
    assert list(dict.fromkeys(row["phase"] for row in seen.memory)) == list(PHASES)
    assert all(row["total_bytes"] == sum(row[f"{kind}_bytes"] for kind in KINDS) for row in seen.memory)
    assert [row["ms"] for row in seen.memory] == sorted(row["ms"] for row in seen.memory)


def test_memory_changes_by_what_the_allocator_says(seen: StepProfile) -> None:
    told = [event["args"] for event in seen.events if event["name"] == "[memory]"]
    most = max(row["total_bytes"] for row in seen.memory) - seen.memory[0]["total_bytes"]
    start = told[0]["Total Allocated"] - told[0]["Bytes"]
    assert most == pytest.approx(max(args["Total Allocated"] for args in told) - start, abs=64)


def test_activations_are_what_autograd_saves() -> None:
    training = Training(SMALL, 2, 0, CPU)
    known = {weight.untyped_storage().data_ptr() for weight in training.weights}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in known | {training.tokens_BT.untyped_storage().data_ptr()}:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = training.head_loss(
            training.hidden(training.tokens_BT, torch.float32), training.targets_BT, torch.float32
        )
    saved = sum(x.untyped_storage().nbytes() for x in kept.values())
    del loss
    backward = next(row for row in profiled(training=training).memory if row["phase"] == "backward")
    assert backward["activations_bytes"] == pytest.approx(saved, rel=0.03)


def test_memory_is_sorted_by_what_becomes_of_it() -> None:
    def change(moment: float, size: int, address: int, device: int = 1) -> dict:
        args = {"Bytes": size, "Addr": address, "Device Type": device}
        return {"ph": "i", "name": "[memory]", "cat": "cpu_instant_event", "ts": 5e9 + moment, "tid": 1, "args": args}

    events = [
        *PHASE_SPANS,
        change(5, 8, 100),  # passes through
        change(6, -8, 100),
        change(10, 16, 100),  # kept for backward, at the same address
        change(20, 999, 100, device=0),  # of another device
        change(110, 32, 200),  # a gradient that the loss computes already
        change(150, -64, 999),  # was there before the step
        change(210, 4, 300),  # a gradient
        change(220, -16, 100),
        change(230, 2, 400),  # passes through backward
        change(240, -2, 400),
        change(250, 128, 500),  # left behind, and not a gradient
        change(310, 1, 300 + 1),
        change(320, -4, 300),
        change(321, -32, 200),
    ]
    rows = memory_rows(events, {1: ("weights", 1000), 2: ("state", 2000)}, {200, 300}, "cuda")

    assert rows == memory_rows(events[::-1], {1: ("weights", 1000), 2: ("state", 2000)}, {200, 300}, "cuda")
    assert [(round(1e3 * row["ms"]), row["phase"], *(row[f"{kind}_bytes"] for kind in KINDS[2:])) for row in rows] == [
        (0, "forward", 0, 0, 0),
        (5, "forward", 0, 0, 8),
        (6, "forward", 0, 0, 0),
        (10, "forward", 0, 16, 0),
        (100, "loss", 0, 16, 0),
        (110, "loss", 32, 16, 0),
        (200, "backward", 32, 16, 0),
        (210, "backward", 36, 16, 0),
        (220, "backward", 36, 0, 0),
        (230, "backward", 36, 0, 2),
        (240, "backward", 36, 0, 0),
        (250, "backward", 36, 0, 128),
        (300, "optimizer", 36, 0, 128),
        (310, "optimizer", 36, 0, 129),
        (320, "optimizer", 32, 0, 129),
        (321, "optimizer", 0, 0, 129),
    ]
    assert {(row["weights_bytes"], row["state_bytes"]) for row in rows} == {(1000, 2000)}


def test_thinning_keeps_peaks_and_borders(seen: StepProfile) -> None:
    few = thinned(seen.memory, 20)
    assert len(few) <= 20 + len(PHASES) + 2
    assert max(row["total_bytes"] for row in few) == max(row["total_bytes"] for row in seen.memory)
    assert (few[0], few[-1]) == (seen.memory[0], seen.memory[-1])
    for phase in PHASES:
        assert next(row for row in few if row["phase"] == phase) is next(
            row for row in seen.memory if row["phase"] == phase
        )
    assert thinned(seen.memory[:5], 20) == seen.memory[:5]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default:Warning. Profiler clears events:UserWarning")  # torch 2.11's, at every start
def test_a_profile_of_a_gpu_puts_kernels_and_memory_where_they_belong() -> None:
    device = torch.device("cuda")
    training = Training(SMALL, 2, 0, device)
    training.start_optimizer()
    seen = profile_step(training, Variant("bfloat16"))
    on_gpu = [event for event in seen.events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    assert sum(row["calls"] for row in seen.kernels) == len(on_gpu)
    assert sum(row["total_ms"] for row in seen.kernels) == pytest.approx(sum(event["dur"] for event in on_gpu) / 1e3)
    places = {(row["module"], row["phase"]) for row in seen.kernels}
    for module in ("blocks.*.attention", "blocks.*.feed_forward", "head+loss", "embedding"):
        assert {(module, "forward"), (module, "backward")} <= places
    assert "unknown" not in {module for module, _ in places}
    weights = sum(weight.nbytes for weight in training.weights)
    update = next(row for row in seen.memory if row["phase"] == "optimizer")
    assert update["gradients_bytes"] == pytest.approx(weights, rel=0.2, abs=512 * len(training.weights))
    assert update["activations_bytes"] < 0.1 * weights


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # a compiler has its own
def test_whole_passes_are_replayed_on_a_gpu() -> None:
    rows = rows_of('model.sizes=["tiny"]', "model.graphs=true", "model.compile=true", device=torch.device("cuda"))
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["part"] for row in rows if row["mode"] == "compiled+graph"] == ["forward+backward", "step"]
