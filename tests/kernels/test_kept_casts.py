"""Copies of weights that AdamW's kernel keeps up: always fresh, and losses and weights are the same to the bit."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fused_cases import HAS_KERNELS, INTERPRETED
from torch import Tensor, nn

from lfs_cli.config import ModelConfig, OptimizerGroup, TrainConfig, load_config
from lfs_cli.kernels.operation import as_on_gpu
from lfs_cli.model import Transformer
from lfs_cli.optimizers import AdamW, Lion, build_optimizers
from lfs_cli.runs.setup import training_loss
from lfs_cli.training.casts import Casts
from lfs_cli.training.step import train_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = {"vocab_size": 96, "context_length": 8, "width": 32, "layers": 2, "heads": 2}
ADAMW = OptimizerGroup(name="adamw", lr=0.01)
pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    """Take the paths of a GPU: here the interpreter runs the kernels."""
    with as_on_gpu(is_compiled=False) if INTERPRETED else nullcontext():
        yield


class Experiment:
    """A small model that trains on batches of 4 sequences."""

    def __init__(
        self, *groups: OptimizerGroup, keeps_up: bool = True, dtype: Any = torch.float16, **shape: Any
    ) -> None:
        torch.manual_seed(0)
        config = load_config(TrainConfig, options={"compile": False})
        self.model = Transformer(ModelConfig(**{**SHAPE, **shape, "attention": "flash"})).to(DEVICE)
        self.optimizers = build_optimizers(self.model, groups or [ADAMW])
        self.dtype = dtype
        self.casts = Casts(self.model, dtype, self.optimizers if keeps_up else ())
        self.loss = training_loss(self.model, config, DEVICE, dtype)
        self.batches = torch.Generator().manual_seed(1)

    def step(self, passes: int = 1) -> list[float]:
        tokens, targets = torch.randint(96, (2, 4, 8), generator=self.batches).to(DEVICE)
        with self.casts.kept(passes):
            parts = self.loss, list(self.model.parameters()), self.optimizers
            return train_step(*parts, tokens, targets, passes=passes, clip=1.0).tolist()

    def given(self, passes: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
        """The copies that a step would have, and what they are copies of."""
        with self.casts.kept(passes):
            found = {
                name: (module.cast, module.weight)
                for name, module in self.model.named_modules()
                if getattr(module, "cast", None) is not None
            }
            if self.model.head_cast is not None:
                found["head"] = (self.model.head_cast, self.model.head_weight)
        return found

    def is_fresh(self) -> bool:
        return all(torch.equal(copy[: len(w)], w.to(self.dtype)) for copy, w in self.given().values())


def counted_cats(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the stacks that are cast apart from the kernel, from now on."""
    sizes: list[int] = []
    cat = torch.cat

    def counted(tensors: Sequence[Tensor], *more: Any, **how: Any) -> Tensor:
        if "out" in how:
            sizes.append(len(tensors))
        return cat(tensors, *more, **how)

    monkeypatch.setattr(torch, "cat", counted)
    return sizes


@pytest.mark.parametrize("shape", [{}, {"tied_head": True}, {"feed_forward": "relu2", "value_embeddings": 1}], ids=str)
@pytest.mark.parametrize("passes", [1, 2])
def test_losses_and_weights_are_the_same_to_the_bit(shape, passes, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, without = (Experiment(keeps_up=keeps_up, **shape) for keeps_up in (True, False))
    casts = counted_cats(monkeypatch)
    first = kept.step(passes)
    assert sorted(casts) == sorted(map(len, kept.casts._matrices()))
    casts.clear()
    losses = [first, *(kept.step(passes) for _ in range(2))]
    assert not casts
    assert losses == [without.step(passes) for _ in range(3)]
    assert all(map(torch.equal, kept.model.parameters(), without.model.parameters()))
    assert kept.is_fresh()
    assert len(kept.given()) == len(kept.casts._stacks) + 1


def test_a_weight_that_something_else_moves_is_cast_anew() -> None:
    experiment = Experiment()
    experiment.step()
    layer = experiment.model.blocks[0].attention.query
    with torch.no_grad():
        layer.weight.mul_(2)
    assert experiment.is_fresh()
    layer.weight.data = torch.ones_like(layer.weight)
    assert experiment.is_fresh()
    experiment.step()
    experiment.optimizers[0].load_state_dict(experiment.optimizers[0].state_dict())
    experiment.step()
    assert experiment.is_fresh()


def test_where_the_kernel_is_not_used_copies_are_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment()
    experiment.step()
    monkeypatch.setattr("lfs_cli.optimizers.adamw.is_usable", lambda *_, **__: False)
    experiment.step()
    assert experiment.is_fresh()


def test_only_what_adamw_moves_is_kept_up_and_has_room() -> None:
    groups = [OptimizerGroup(match="*query*", name="lion", lr=0.001), ADAMW]
    experiment = Experiment(*groups)
    assert isinstance(experiment.optimizers[0], Lion)
    experiment.step()
    names = experiment.given()
    assert not [name for name in names if "query" in name]  # its stack is cast by the pass
    assert {"head", "blocks.0.attention.output", "blocks.1.feed_forward.gate"} <= set(names)
    held = sum(copy.nbytes for copy in experiment.casts._copies.values())
    assert held == experiment.casts.bytes_held(1) < experiment.casts.bytes_held(2)
    assert any("query" in name for name in experiment.given(passes=2))
    assert experiment.is_fresh()


@pytest.mark.parametrize(
    "experiment",
    [{"dtype": torch.float32}, {"checkpointing": "full"}, {"keeps_up": False}],
    ids=["in float32", "checkpointed", "told of no optimizer"],
)
def test_a_single_pass_has_no_copies_elsewhere(experiment: dict[str, Any]) -> None:
    run = Experiment(**experiment)
    run.step()
    assert not run.given()
    assert run.casts.bytes_held(1) == 0
    assert not any(isinstance(each, AdamW) and each._copies for each in run.optimizers)


def test_the_bytes_of_copies_are_told() -> None:
    experiment = Experiment()
    matrices = sum(w.numel() for name, w in experiment.model.named_parameters() if w.ndim == 2 and "emb" not in name)
    assert experiment.casts.bytes_held(1) == experiment.casts.bytes_held(2) == 2 * matrices


def test_copies_of_a_narrow_type_are_roundings_of_what_is_moved() -> None:
    """AdamW alone: weights with and without copies in one group, and one that has no gradient yet."""
    weights = [nn.Parameter(torch.randn(n, 5, device=DEVICE)) for n in (3, 4, 6)]
    alone = [nn.Parameter(w.detach().clone()) for w in weights]
    copy = torch.zeros(4, 5, dtype=torch.float16, device=DEVICE)
    ours, right = AdamW(weights, lr=0.1), AdamW(alone, lr=0.1)
    assert ours.keep_up({weights[1]: copy, alone[0]: copy}) == {weights[1]}
    for step in range(3):
        for w, other in zip(weights[: 2 + step // 2], alone, strict=False):
            w.grad = torch.randn_like(w)
            other.grad = w.grad.clone()
        for optimizer in (ours, right):
            optimizer.step()
    assert all(map(torch.equal, weights, alone))
    assert torch.equal(copy, weights[1].half())
