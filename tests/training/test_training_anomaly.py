"""Anomalies are found, healthy runs are left alone, and the layer where it began is named."""

from math import exp, inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lfs_cli.config import ModelConfig
from lfs_cli.model import Transformer, next_token_loss
from lfs_cli.model.device import as_on_gpu
from lfs_cli.training.anomaly import LEAST_SPREAD, Watch, first_bad_layer


def watch(spike: float = 10.0, window: int = 50, grace: int = 20) -> Watch:
    return Watch(spike=spike, window=window, grace=grace, losses=[], norms=[])


def fed(watch: Watch, losses: list[float], norm: float = 1.0) -> list[str | None]:
    verdicts = []
    for step, loss in enumerate(losses, start=1):
        verdicts.append(watch.judge(step, loss, norm))
        if verdicts[-1] is None:
            watch.remember(loss, norm)
    return verdicts


@pytest.mark.parametrize("spike", [0.0, 10.0])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_is_an_anomaly_from_the_first_step(bad: float, spike: float) -> None:
    assert watch(spike).judge(1, bad, 1.0) == "loss is not a number"
    assert watch(spike).judge(1, 1.0, bad) == "gradient is not a number"
    assert watch(spike).judge(1, 1.0, 1.0) is None


def test_a_spike_is_an_anomaly_after_the_grace_only() -> None:
    assert fed(watch(grace=20), [3.0] * 10 + [9.0] + [3.0] * 9 + [9.0])[-1].startswith("loss 9 is ")
    assert fed(watch(grace=20), [3.0] * 10 + [9.0])[-1] is None
    assert fed(watch(spike=0.0), [3.0] * 30 + [1e9])[-1] is None


def test_a_spike_of_the_gradient_norm_is_an_anomaly_too() -> None:
    judge = watch()
    fed(judge, [3.0] * 30)
    assert judge.judge(31, 3.0, 500.0).startswith("gradient norm 500 is ")


def test_the_distance_is_what_the_formula_says() -> None:
    judge = watch(spike=10.0)
    fed(judge, [3.0] * 30)  # a calm window, so the least spread counts
    assert judge.judge(31, 3.0 * exp(10.5 * LEAST_SPREAD), 1.0) == (
        f"loss {3.0 * exp(10.5 * LEAST_SPREAD):.4g} is 10 spreads above its recent median 3"
    )
    assert judge.judge(31, 3.0 * exp(9.5 * LEAST_SPREAD), 1.0) is None


@given(st.integers(0, 2**32), st.floats(0.0, 0.3))
def test_a_noisy_loss_that_falls_is_healthy(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = (noise * torch.randn(200, generator=generator)).exp().tolist()
    losses = [(2 + 6 * exp(-step / 60)) * factor for step, factor in enumerate(factors)]
    assert fed(watch(), losses) == [None] * 200


def test_spikes_in_the_window_do_not_hide_the_next_one() -> None:
    judge = watch(window=20)
    fed(judge, [3.0 + 0.1 * (step % 3) for step in range(30)])
    for _ in range(5):
        judge.remember(1e6, 1.0)
    assert judge.judge(40, 1e6, 1.0) is not None


def test_the_window_has_a_length_and_is_only_kept_where_it_is_used() -> None:
    losses, norms = [], []
    fed(Watch(spike=10.0, window=8, grace=2, losses=losses, norms=norms), [3.0] * 30)
    assert len(losses) == len(norms) == 8
    fed(Watch(spike=0.0, window=8, grace=2, losses=(unused := []), norms=[]), [3.0] * 30)
    assert unused == []


class Explode(nn.Module):
    """Multiplies what goes forward and, by a factor of its own, what comes back."""

    def __init__(self, forward: float = 1.0, backward: float = 1.0) -> None:
        super().__init__()
        self.forward_factor, self.backward_factor = forward, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.backward_factor != 1.0:
            x = x.clone()
            x.register_hook(lambda gradient: gradient * self.backward_factor)
        return x * self.forward_factor


def layers(**explosion: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), Explode(**explosion)), nn.Linear(4, 4))


def named(model: nn.Module, passes: int = 1, factor: float = 1.0) -> str | None:
    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (model(tokens) - targets).square().mean() * factor

    return first_bad_layer(model, loss, torch.ones(4, 4), torch.zeros(4, 4), passes=passes)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_first_layer_that_goes_bad_is_named(passes: int) -> None:
    assert named(layers(), passes) is None
    assert named(layers(forward=inf), passes) == "the output of `1.1`"
    assert named(layers(backward=inf), passes) == "the gradient of `1.0.bias`"
    assert named(layers(), passes, factor=nan) == "the logits or the loss"
    broken = layers(forward=inf)
    with torch.no_grad():
        broken[2].weight[1, 2] = nan
    assert named(broken, passes) == "the weight `2.weight`"


def test_looking_changes_nothing() -> None:
    model = layers(backward=inf)
    before = [weight.clone() for weight in model.parameters()]
    named(model)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["attention.query", "attention.key_norm", "feed_forward.up", "feed_forward.down"])
def test_the_layer_is_named_also_where_a_gpu_computes_several_at_once(name: str) -> None:
    model = Transformer(ModelConfig(vocab_size=50, context_length=8, width=16, layers=2, heads=2, qk_norm=True))
    layer = model.blocks[1].get_submodule(name)
    real = layer.forward
    layer.forward = lambda x: real(x) * nan
    tokens_BT = torch.randint(50, (2, 8))

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(model.hidden(tokens), model.head_weight, targets)

    with as_on_gpu(is_compiled=False):
        found = first_bad_layer(model, loss, tokens_BT, tokens_BT, passes=1)
    assert found == f"the output of `blocks.1.{name}`"


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_gradients_are_looked_at_where_blocks_are_computed_twice(checkpointing: str) -> None:
    shape = {"vocab_size": 50, "context_length": 8, "width": 16, "layers": 2, "heads": 2}
    model = Transformer(ModelConfig(**shape, checkpointing=checkpointing))
    model.blocks[0].feed_forward.up.weight.register_hook(lambda gradient: gradient * nan)
    tokens_BT = torch.randint(50, (2, 8))

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(model.hidden(tokens), model.head_weight, targets)

    with as_on_gpu(is_compiled=False):
        found = first_bad_layer(model, loss, tokens_BT, tokens_BT, passes=2)
    assert found == "the gradient of `blocks.0.feed_forward.up.weight`"
