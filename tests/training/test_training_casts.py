"""Weights that are cast once a step: the numbers are the same to the bit, and the casts fewer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_graphs import FakeRecorder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lfs_cli.config import ModelConfig, OptimizerGroup, TrainConfig, load_config
from lfs_cli.model import Transformer, feed_forward, layers
from lfs_cli.model.device import precision
from lfs_cli.optimizers import build_optimizers
from lfs_cli.runs.setup import training_loss
from lfs_cli.training import casts
from lfs_cli.training.casts import Casts
from lfs_cli.training.graphs import CudaRecorder, GraphedPass
from lfs_cli.training.randomness import fixed_order
from lfs_cli.training.step import train_step

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SHAPE = {"vocab_size": 300, "context_length": 12, "width": 32, "layers": 2, "heads": 4, "attention": "standard"}


class Experiment:
    """A small model that trains on batches of 8 sequences, and keeps copies of its weights or not."""

    def __init__(
        self,
        *,
        keeps: bool,
        dtype: torch.dtype = torch.bfloat16,
        compile: bool | str = False,
        device: torch.device = CPU,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.device, self.shape = device, ModelConfig(**{**SHAPE, **options})
        self.model = Transformer(self.shape).to(device)
        self.weights = list(self.model.parameters())
        self.optimizers = build_optimizers(self.model, [OptimizerGroup(name="adamw", lr=0.01)])
        self.casts = Casts(self.model, dtype)
        self.keeps, self.one_pass = keeps, None
        self.batches = torch.Generator().manual_seed(1)
        config = load_config(TrainConfig, options={"compile": compile})
        self.loss = training_loss(self.model, config, device, dtype)

    def step(self, passes: int) -> list[float]:
        tokens, targets = torch.randint(300, (2, 8, self.shape.context_length), generator=self.batches).to(self.device)
        with self.casts.kept(passes if self.keeps else 1):
            return train_step(
                self.loss,
                self.weights,
                self.optimizers,
                tokens,
                targets,
                passes=passes,
                clip=1.0,
                one_pass=self.one_pass,
            ).tolist()

    def steps(self, passes: int, count: int = 3) -> list[list[float]]:
        return [self.step(passes) for _ in range(count)]


class CastCounter(TorchDispatchMode):
    """Counts the casts of matrices that are weights, by the shapes of those."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.casts += bool({result.shape, result.shape[::-1]} & self.shapes)
        return result


@pytest.fixture
def stacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply by several matrices at once, as on a GPU."""
    for module in (layers, feed_forward, casts):
        monkeypatch.setattr(module, "pays_to_stack", lambda x: torch.is_grad_enabled())


OPTIONS = {
    "plain": {},
    "groups": {"kv_heads": 2},
    "tied": {"tied_head": True, "residual_dtype": "compute"},
    "soft cap": {"logit_softcap": 15.0},
    "full checkpointing": {"checkpointing": "full"},
    "selective checkpointing": {"checkpointing": "selective"},
    "float16": {"dtype": torch.float16},
    "everything": {"value_embeddings": 1, "embedding_skip": True, "zero_init": True, "feed_forward": "relu2"},
}


def assert_same(passes: int, prepare: Callable[[Experiment], None] = lambda _: None, **options: Any) -> None:
    with_copies, without = (Experiment(keeps=keeps, **options) for keeps in (True, False))
    prepare(with_copies)
    assert with_copies.steps(passes, 6) == without.steps(passes, 6)
    assert all(map(torch.equal, with_copies.weights, without.weights))


@pytest.mark.parametrize("passes", [2, 8])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_weights_are_the_same_to_the_bit(name: str, passes: int, stacking: None) -> None:
    assert_same(passes, **OPTIONS[name])


def test_layers_that_multiply_alone_are_the_same_too() -> None:
    assert_same(4)


def test_a_layer_of_a_stack_may_be_called_alone(stacking: None) -> None:
    experiment = Experiment(keeps=True)
    query, x = experiment.model.blocks[0].attention.query, torch.randn(2, 32)
    with precision(CPU, torch.bfloat16):
        right = query(x)
        with experiment.casts.kept(2):
            assert torch.equal(query(x), right)


def test_a_layer_that_multiplies_in_float32_does_so_within_a_step_too(stacking: None) -> None:
    experiment = Experiment(keeps=True)
    router, x = experiment.model.blocks[0].attention.output, torch.randn(2, 32)
    right = router(x)
    with precision(CPU, torch.bfloat16), experiment.casts.kept(2), torch.autocast("cpu", enabled=False):
        assert torch.equal(router(x), right)


def test_a_feed_forward_layer_of_a_plugin_may_stack_others(stacking: None) -> None:
    class Plugin(feed_forward.SwiGLU):
        def __init__(self) -> None:
            super().__init__(32, 64)
            self.other = layers.Linear(32, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return layers.stacked(x, (self.gate, self.other))

    experiment = Experiment(keeps=True)
    experiment.model.blocks[0].feed_forward = plugin = Plugin()
    x = torch.randn(2, 32)
    with precision(CPU, torch.bfloat16):
        right = plugin(x)
        with casts.Casts(experiment.model, torch.bfloat16).kept(2):
            assert torch.equal(plugin(x), right)


def test_without_memory_for_copies_it_is_asked_for_once_and_passes_cast_as_before(
    stacking: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(self: Tensor, shape: tuple[int, ...], **options: Any) -> Tensor:
        asked.append(shape)
        raise torch.OutOfMemoryError("40 GiB")

    without, experiment = Experiment(keeps=False).steps(2), Experiment(keeps=True)
    monkeypatch.setattr(Tensor, "new_empty", refuse)
    assert experiment.steps(2) == without
    assert len(asked) == 1


@pytest.mark.filterwarnings("ignore")  # a compiler has its own
@pytest.mark.parametrize("compile", ["blocks", True])
def test_compiled_steps_are_the_same(compile: bool | str, stacking: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager"))
    assert_same(4, compile=compile)


def test_replayed_steps_are_the_same(stacking: None) -> None:
    def prepare(experiment: Experiment) -> None:
        experiment.one_pass = GraphedPass(experiment.loss, experiment.model, FakeRecorder(experiment.model))

    assert_same(4, prepare)


def test_copies_stay_where_graphs_find_them() -> None:
    experiment, places = Experiment(keeps=True), []
    real = experiment.loss

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        places.append([buffer.data_ptr() for buffer in experiment.model.buffers()])
        return real(tokens, targets)

    experiment.loss = loss
    experiment.steps(2)
    assert len(places) == 6
    assert all(place == places[0] for place in places)


@pytest.mark.parametrize("options", [{}, {"tied_head": True}], ids=["head", "tied head"])
def test_each_matrix_is_cast_once_a_step(options: dict[str, Any], stacking: None) -> None:
    counts = []
    for keeps in (True, False):
        experiment = Experiment(keeps=keeps, **options)
        matrices = 2 * 7 + 1  # of two blocks, and the head
        experiment.step(4)  # makes the copies
        with CastCounter({weight.shape for weight in experiment.weights if weight.ndim == 2}) as counter:
            experiment.step(4)
        counts.append(counter.casts)
    assert counts == [0, 4 * matrices]  # copying into a copy is no cast of its own


def test_nothing_is_kept_between_steps() -> None:
    experiment = Experiment(keeps=True)
    names = set(experiment.model.state_dict())
    experiment.step(2)
    assert not [name for name, _ in experiment.model.named_buffers() if "cast" in name]
    with experiment.casts.kept(2):
        assert len([name for name, _ in experiment.model.named_buffers() if "cast" in name]) == 2 * 7 + 1
        assert set(experiment.model.state_dict()) == names
        with precision(CPU, torch.bfloat16), pytest.raises(ZeroDivisionError), experiment.casts.kept(2):
            _ = 1 / 0
    assert not [name for name, _ in experiment.model.named_buffers() if "cast" in name]


@pytest.mark.parametrize(("passes", "dtype"), [(1, torch.bfloat16), (4, torch.float32)], ids=str)
def test_nothing_is_copied_where_nothing_would_be_saved(passes: int, dtype: torch.dtype) -> None:
    experiment = Experiment(keeps=True, dtype=dtype)
    with experiment.casts.kept(passes):
        assert not [name for name, _ in experiment.model.named_buffers() if "cast" in name]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # a compiler has its own
@pytest.mark.parametrize("compile", [False, "blocks", True])
@pytest.mark.parametrize("is_graphed", [False, True])
def test_on_a_gpu_losses_and_weights_are_the_same_to_the_bit(is_graphed: bool, compile: bool | str) -> None:
    def prepare(experiment: Experiment) -> None:
        if is_graphed:
            experiment.one_pass = GraphedPass(experiment.loss, experiment.model, CudaRecorder(CUDA))

    options = {"context_length": 256, "width": 128, "heads": 2, "attention": "auto", "tied_head": True}
    with fixed_order():
        assert_same(4, prepare, compile=compile, device=CUDA, **options)
