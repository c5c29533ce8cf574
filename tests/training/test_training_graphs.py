"""Passes as CUDA graphs: what is recorded and when, and that a replay leaves what the pass itself would have left."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_graphs import FakeRecorder
from torch import Tensor

from lfs_cli.config import ModelConfig, OptimizerGroup, TrainConfig, load_config
from lfs_cli.errors import ConfigError, DeviceError
from lfs_cli.model import Transformer, next_token_loss
from lfs_cli.model.device import precision
from lfs_cli.optimizers import build_optimizers
from lfs_cli.training.graphs import (
    LARGEST_FLOPS,
    WARM_UPS,
    CudaRecorder,
    GraphedPass,
    check_graphs,
    choose_graphs,
)
from lfs_cli.training.randomness import fixed_order
from lfs_cli.training.step import plain_pass, train_step

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SHAPE = ModelConfig(vocab_size=300, context_length=16, width=32, layers=2, heads=4, qk_norm=True)


class Experiment:
    """A small model that trains on batches of 8 sequences, with graphs or without."""

    def __init__(self, *, graphed: bool = True) -> None:
        torch.manual_seed(0)
        self.model = Transformer(SHAPE)
        self.optimizers = build_optimizers(self.model, [OptimizerGroup(name="adamw", lr=0.01)])
        self.batches = torch.Generator().manual_seed(1)
        self.recorder = FakeRecorder(self.model)
        self.rows: list[int] = []
        self.most_rows = 8
        self.graphs = GraphedPass(self.loss, self.model, self.recorder) if graphed else None

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if len(tokens) > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return next_token_loss(self.model.hidden(tokens), self.model.head_weight, targets)

    def step(self, passes: int = 1) -> list[float]:
        tokens, targets = torch.randint(300, (2, 8, 16), generator=self.batches)
        weights = list(self.model.parameters())
        return train_step(
            self.loss,
            weights,
            self.optimizers,
            tokens,
            targets,
            passes=passes,
            clip=1.0,
            on_less=self.rows.append,
            one_pass=self.graphs,
        ).tolist()

    def steps(self, count: int, passes: int = 1) -> list[list[float]]:
        return [self.step(passes) for _ in range(count)]

    def same_weights(self, other: "Experiment") -> bool:
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_replayed_steps_are_the_plain_ones(passes: int) -> None:
    plain, graphed = Experiment(graphed=False), Experiment()
    assert graphed.steps(7, passes) == plain.steps(7, passes)
    assert graphed.same_weights(plain)
    assert graphed.recorder.asides == WARM_UPS * passes
    assert [graph.replays for graph in graphed.recorder.graphs] == [7 - WARM_UPS, (7 - WARM_UPS) * (passes - 1)][
        : min(passes, 2)
    ]
    assert all(weight.grad is None for weight in graphed.model.parameters())


def test_both_graphs_of_a_shape_share_their_memory() -> None:
    experiment = Experiment()
    experiment.steps(5, passes=4)
    experiment.steps(5, passes=2)
    one, same, other, too = experiment.recorder.pools
    assert one is same
    assert other is too
    assert one is not other


def test_tokens_are_read_where_they_were_recorded() -> None:
    model = Transformer(SHAPE)
    places = set()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        places.add((tokens.data_ptr(), targets.data_ptr()))
        return next_token_loss(model.hidden(tokens), model.head_weight, targets)

    one_pass = GraphedPass(loss, model, FakeRecorder(model))
    batches = [torch.randint(300, (2, 4, 16)) for _ in range(6)]
    losses = []
    for tokens, targets in batches:
        losses.append(one_pass(tokens, targets, 1).item())
        model.zero_grad()
    assert len(places) == 1
    assert not places & {(tokens.data_ptr(), targets.data_ptr()) for tokens, targets in batches}
    assert losses == [plain_pass(loss, *batch, 1).item() for batch in batches]


def test_each_shape_has_graphs_of_its_own() -> None:
    plain, graphed = Experiment(graphed=False), Experiment()
    numbers = [
        experiment.steps(5, 1) + experiment.steps(5, 2) + experiment.steps(2, 1) for experiment in (plain, graphed)
    ]
    assert numbers[0] == numbers[1]
    assert [graph.replays for graph in graphed.recorder.graphs] == [2 + 2, 2, 2]


def test_a_batch_that_begins_without_a_graph_ends_without_one() -> None:
    """Gradients that are not those of the first graph are never added to by the second."""
    experiment = Experiment()
    experiment.steps(5, passes=2)
    assert experiment.graphs is not None
    tokens, targets = torch.randint(300, (2, 4, 16))
    for weight in experiment.model.parameters():
        weight.grad = torch.ones_like(weight)
    replays = [graph.replays for graph in experiment.recorder.graphs]
    experiment.graphs(tokens, targets, 2)
    found = [weight.grad for weight in experiment.model.parameters()]
    assert [graph.replays for graph in experiment.recorder.graphs] == replays
    for weight in experiment.model.parameters():
        weight.grad = torch.ones_like(weight)
    plain_pass(experiment.loss, tokens, targets, 2)
    assert all(torch.equal(one, weight.grad) for one, weight in zip(found, experiment.model.parameters(), strict=True))


@pytest.mark.parametrize("recorded", [0, 1])
def test_what_cannot_be_recorded_runs_without_and_says_so_once(recorded: int) -> None:
    """Either graph may fail: the second leaves the gradients of the first as they are."""
    plain, graphed = Experiment(graphed=False), Experiment()
    graphed.recorder.failure = recorded, RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.warns(
        RuntimeWarning, match="cannot be recorded as a CUDA graph.*: operation not permitted.*capturing$"
    ) as told:
        numbers = graphed.steps(8, passes=2)
    assert numbers == plain.steps(8, passes=2)
    assert graphed.same_weights(plain)
    assert len(told) == 1
    assert len(graphed.recorder.graphs) == recorded
    assert graphed.recorder.asides == WARM_UPS * 2


def test_an_error_of_the_model_is_not_taken_for_one_of_recording() -> None:
    model = Transformer(SHAPE)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("the model is wrong")

    tokens, targets = torch.randint(300, (2, 4, 16))
    one_pass = GraphedPass(loss, model, FakeRecorder(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="the model is wrong"):
            one_pass(tokens, targets, 1)


class InvalidatedError(RuntimeError):
    """How torch.cuda.graph ends when the recording was cut off."""


def cut_off() -> Exception:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise InvalidatedError("operation failed due to a previous error during capture")
    except InvalidatedError as error:
        return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), cut_off()], ids=["bare", "cut off"])
def test_a_lack_of_memory_drops_all_graphs_and_goes_on_with_smaller_passes(error: Exception) -> None:
    plain, graphed = Experiment(graphed=False), Experiment()
    graphed.recorder.failure = 0, error
    numbers = graphed.steps(WARM_UPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers.append(graphed.step())
    graphed.recorder.failure = None
    assert graphed.rows == [4]
    assert graphed.graphs is not None
    assert [shape.tokens.shape for shape in graphed.graphs._shapes.values()] == [(4, 16)]
    numbers += graphed.steps(5, passes=2)
    assert numbers == plain.steps(WARM_UPS) + plain.steps(6, passes=2)
    assert len(graphed.recorder.graphs) == 2


def test_a_lack_of_memory_outside_of_a_recording_frees_the_graphs_too() -> None:
    experiment = Experiment()
    experiment.steps(5)
    assert experiment.graphs is not None
    assert len(experiment.graphs._shapes) == 1
    experiment.most_rows = 4
    tokens, targets = torch.randint(300, (2, 6, 16))
    with pytest.raises(torch.OutOfMemoryError):
        experiment.graphs(tokens, targets, 1)
    assert not experiment.graphs._shapes


def test_weights_changed_in_place_are_seen_and_keep_the_graphs() -> None:
    plain, graphed = Experiment(graphed=False), Experiment()
    numbers = []
    for experiment in (plain, graphed):
        found = experiment.steps(5)
        with torch.no_grad():
            for weight in experiment.model.parameters():
                weight.copy_(weight * 1.5)
        numbers.append(found + experiment.steps(2))
    assert numbers[0] == numbers[1]
    assert [graph.replays for graph in graphed.recorder.graphs] == [4]


def move_weight(model: Transformer) -> None:
    model.head_weight.data = model.head_weight.data.clone()


def move_table(model: Transformer) -> None:
    rope = model.blocks[0].attention.rope
    rope.cos = rope.cos.clone()


@pytest.mark.parametrize("move", [move_weight, move_table])
def test_weights_that_moved_are_recorded_anew(move: Callable[[Transformer], None]) -> None:
    """A graph reads the old place, which may hold anything by now; so may tables such as those of the positions."""
    experiment = Experiment()
    experiment.steps(5)
    old, asides = experiment.recorder.graphs[0], experiment.recorder.asides
    kept = [weight.data for weight in experiment.model.parameters()] + list(experiment.model.buffers())
    move(experiment.model)
    experiment.steps(5)
    assert old.replays == 2
    assert experiment.recorder.asides == asides + WARM_UPS
    assert experiment.recorder.graphs[-1].replays == 2
    assert kept


class FakeCuda:
    """The few names of torch.cuda that a recording uses; notes what is called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.current = self.main = FakeStream("main", self)
        self.is_called_off = False
        fake = self

        class Graph:
            def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
                fake.calls.append(f"begin on {fake.current.name} in {pool}, {capture_error_mode}")

            def capture_end(self) -> None:
                fake.calls.append(f"end on {fake.current.name}")
                if fake.is_called_off:
                    raise RuntimeError("operation failed due to a previous error during capture")

        class Generator:
            def clone_state(self) -> str:
                return "clone"

            def graphsafe_set_state(self, state: str) -> None:
                fake.calls.append(f"generator = {state}")

        @contextmanager
        def stream(other: "FakeStream") -> Iterator[None]:
            before, self.current = self.current, other
            try:
                yield
            finally:
                self.current = before

        for name, value in {
            "Stream": lambda device: FakeStream("side", self),
            "current_stream": lambda: self.current,
            "stream": stream,
            "CUDAGraph": Graph,
            "empty_cache": lambda: self.calls.append("empty cache"),
            "current_device": lambda: 0,
            "default_generators": (Generator(),),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("endAllocateToPool", "releasePool"):
            monkeypatch.setattr(
                torch._C, f"_cuda_{name}", lambda _, pool, name=name: self.calls.append(f"{name} {pool}"), raising=False
            )


class FakeStream:
    def __init__(self, name: str, cuda: FakeCuda) -> None:
        self.name, self._cuda = name, cuda

    def wait_stream(self, other: "FakeStream") -> None:
        self._cuda.calls.append(f"{self.name} waits for {other.name}")


def test_a_recording_is_made_on_the_stream_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(CUDA)
    assert recorder.aside(lambda: torch.tensor(float(cuda.current.name == "side"))) == 1
    assert cuda.calls == ["side waits for main", "main waits for side"]
    cuda.calls.clear()
    _, result = recorder.record(lambda: torch.tensor(float(cuda.current.name == "side")), "pool")
    assert result == 1
    assert cuda.calls == [
        "empty cache",
        "side waits for main",
        "begin on side in pool, thread_local",
        "end on side",
        "main waits for side",
    ]
    assert cuda.current is cuda.main


def test_a_recording_that_was_called_off_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.is_called_off = True
    with pytest.raises(RuntimeError, match="operation failed") as caught:
        CudaRecorder(CUDA).record(lambda: torch.zeros(1)[3], "pool")
    assert isinstance(caught.value.__context__, IndexError)
    assert cuda.calls[-4:] == ["end on side", "endAllocateToPool pool", "releasePool pool", "generator = clone"]
    assert cuda.current is cuda.main


def test_an_error_of_python_ends_a_recording_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with pytest.raises(IndexError):
        CudaRecorder(CUDA).record(lambda: torch.zeros(1)[3], "pool")
    assert cuda.calls[-1] == "end on side"
    assert cuda.current is cuda.main


def config(**options: Any) -> TrainConfig:
    return load_config(TrainConfig, None, options={name.replace("__", "."): value for name, value in options.items()})


def test_small_passes_are_replayed_and_large_ones_are_not() -> None:
    def chosen(rows: int) -> tuple[bool, str]:
        return choose_graphs(config(), CUDA, rows)

    assert chosen(1)[0]
    assert not chosen(10**6)[0]
    rows = next(rows for rows in range(1, 10**6) if not chosen(rows)[0])
    tokens = rows * config().model.context_length
    weights = LARGEST_FLOPS / 6 / tokens
    assert 0.5 < weights / sum(w.numel() for w in Transformer(config().model).parameters()) < 2
    assert "TFLOPs of a pass" in chosen(1)[1]
    assert choose_graphs(config(cuda_graphs=True), CUDA, 10**6)[0]
    assert not choose_graphs(config(cuda_graphs=False), CUDA, 1)[0]


@pytest.mark.parametrize(
    ("options", "device", "kind", "message"),
    [
        ({}, CPU, DeviceError, "for CUDA GPUs, and this is cpu"),
        ({"data__documents": "packed"}, CUDA, ConfigError, "packed documents"),
        ({"plugins": ("json",)}, CUDA, ConfigError, "plugin `json`"),
    ],
)
def test_graphs_are_refused_where_they_cannot_be(
    options: dict[str, Any], device: torch.device, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        check_graphs(config(cuda_graphs=True, **options), device)
    assert "`cuda_graphs`" in (caught.value.hint or "")
    check_graphs(config(**options), device)
    is_used, why = choose_graphs(config(**options), device, 1)
    assert not is_used
    assert message in why


def train_on_gpu(passes: int, *, is_compiled: bool, has_graphs: bool) -> tuple[list[list[float]], list[Tensor]]:
    torch.manual_seed(0)
    shape = ModelConfig(**{**SHAPE.model_dump(), "width": 128, "heads": 2, "kv_heads": 2, "context_length": 256})
    model = Transformer(shape).to(CUDA)
    optimizers = build_optimizers(model, [OptimizerGroup(name="adamw", lr=0.003)])
    batches = torch.randint(300, (30, 2, 8, 256)).to(CUDA)

    def plain(tokens: Tensor, targets: Tensor) -> Tensor:
        with precision(CUDA, torch.bfloat16):
            return next_token_loss(model.hidden(tokens), model.head_weight, targets)

    torch._dynamo.reset()
    loss = torch.compile(plain) if is_compiled else plain
    graphs = GraphedPass(loss, model, CudaRecorder(CUDA)) if has_graphs else None
    numbers = []
    with fixed_order():
        for tokens, targets in batches:
            numbers.append(
                train_step(
                    loss,
                    list(model.parameters()),
                    optimizers,
                    tokens,
                    targets,
                    passes=passes,
                    clip=1.0,
                    one_pass=graphs,
                )
            )
    if graphs is not None:
        (kept,) = graphs._shapes.values()
        assert kept.first is not None
        assert (kept.further is None) == (passes == 1)
    return torch.stack(numbers).tolist(), [weight.detach() for weight in model.parameters()]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # a compiler has its own
@pytest.mark.parametrize("is_compiled", [False, True], ids=["as written", "compiled"])
@pytest.mark.parametrize("passes", [1, 4])
def test_on_a_gpu_replayed_steps_are_the_plain_ones_to_the_bit(passes: int, is_compiled: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(cannot be recorded|AccumulateGrad).*")
        numbers, weights = train_on_gpu(passes, is_compiled=is_compiled, has_graphs=True)
    plain_numbers, plain_weights = train_on_gpu(passes, is_compiled=is_compiled, has_graphs=False)
    assert numbers == plain_numbers
    assert all(torch.equal(one, other) for one, other in zip(weights, plain_weights, strict=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_on_a_gpu_what_asks_for_a_number_runs_without_a_graph() -> None:
    torch.manual_seed(0)
    model = Transformer(SHAPE).to(CUDA)
    optimizers = build_optimizers(model, [OptimizerGroup(name="sgd", lr=0.1)])

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        mean = next_token_loss(model.hidden(tokens), model.head_weight, targets)
        return mean * (1 if mean.item() > 0 else 2)

    graphs = GraphedPass(loss, model, CudaRecorder(CUDA))
    tokens, targets = torch.randint(300, (2, 8, 16)).to(CUDA)
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="cannot be recorded as a CUDA graph"):
        numbers = [
            train_step(loss, list(model.parameters()), optimizers, tokens, targets, passes=2, clip=1.0, one_pass=graphs)
            for _ in range(8)
        ]
    losses = torch.stack(numbers)[:, 0].tolist()
    assert losses == sorted(losses, reverse=True)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(1000, device=CUDA).std() > 0.2  # the generator draws again


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_on_a_gpu_dropped_graphs_give_their_memory_back() -> None:
    model = Transformer(SHAPE).to(CUDA)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(model.hidden(tokens), model.head_weight, targets)

    graphs = GraphedPass(loss, model, CudaRecorder(CUDA))
    tokens, targets = torch.randint(300, (2, 64, 16)).to(CUDA)
    for _ in range(WARM_UPS):
        graphs(tokens, targets, 1)
        model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graphs(tokens, targets, 1)
    model.zero_grad()
    assert torch.cuda.memory_reserved() > before
    graphs.drop()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
