"""A part of a plugin that cannot be traced is an error that names the way out, or is guessed."""

from collections.abc import Iterator

import pytest
import torch

from lfs_cli.config import ModelConfig, TrainConfig
from lfs_cli.errors import ConfigError
from lfs_cli.model import FEED_FORWARDS, Transformer
from lfs_cli.model.feed_forward import SwiGLU
from lfs_cli.optimizers import OPTIMIZERS, SGD
from lfs_cli.training.cost import parameter_count
from lfs_cli.training.memory import predict_memory
from lfs_cli.training.trace import fake_model, optimizer_bytes, run_pass

SMALL = {"vocab_size": 300, "context_length": 16, "width": 16, "layers": 1, "heads": 2}


@pytest.fixture
def curious() -> Iterator[str]:
    """The name of a feed-forward layer and of an optimizer that ask tensors for their numbers."""
    name = "curious"

    @FEED_FORWARDS.register(name)
    class Layer(SwiGLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2 if x.mean().item() > 0 else 1)

    @FEED_FORWARDS.register(f"{name} from the start")
    class Drawn(SwiGLU):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.scale = torch.rand(()).item()

    @OPTIMIZERS.register(name)
    class Rule(SGD):
        def update_many(self, weights, gradients, states, group) -> None:
            if gradients[0].norm().item() > 0:
                super().update_many(weights, gradients, states, group)

    yield name
    del FEED_FORWARDS._entries[name], FEED_FORWARDS._entries[f"{name} from the start"], OPTIMIZERS._entries[name]


def test_a_model_that_asks_for_numbers_cannot_be_foreseen(curious: str) -> None:
    config = TrainConfig(model=ModelConfig(**SMALL, feed_forward=curious), plugins=("json",))
    with pytest.raises(ConfigError, match="what this run takes cannot be foreseen: ") as caught:
        predict_memory(config, "cpu", torch.float32)
    assert "set `microbatch` to a number" in caught.value.hint


@pytest.mark.parametrize("part", ["optimizer", "layer"])
def test_a_plugin_that_asks_for_numbers_is_taken_to_remember_as_much_as_adamw(part: str, curious: str) -> None:
    model = ModelConfig(**SMALL, feed_forward=f"{curious} from the start" if part == "layer" else "swiglu")
    group = {"name": curious if part == "optimizer" else "lion"}
    guessed = optimizer_bytes(TrainConfig(model=model, optimizer=(group,), plugins=("json",)))
    assert guessed == (2 * 4 * parameter_count(model), 0)


def test_a_group_without_a_weight_is_still_an_error() -> None:
    groups = ({"match": "nothing", "name": "adamw"}, {"match": "*", "name": "adamw"})
    with pytest.raises(ConfigError, match="nothing"):
        optimizer_bytes(TrainConfig(model=ModelConfig(**SMALL), optimizer=groups))


@pytest.mark.parametrize("option", ["logit_softcap", "z_loss"])
def test_the_pass_that_is_traced_has_the_loss_of_the_config(option: str) -> None:
    gradients = []
    for options in ({}, {option: 0.5}):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**SMALL, **options))
        run_pass(model, torch.arange(16)[None], torch.float32)
        gradients.append(model.head_weight.grad)
    assert not torch.allclose(*gradients)


def test_no_kernel_can_be_launched_with_the_addresses_of_nothing() -> None:
    with fake_model(ModelConfig(vocab_size=10, context_length=2, width=4, layers=1, heads=1)):
        x = torch.empty(1)
        with pytest.raises(RuntimeError, match="data pointer"):
            x.data_ptr()
