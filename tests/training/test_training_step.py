"""One step: microbatches change nothing, clipping holds, numbers come back."""

import pytest
import torch

from lfs_cli.config import ModelConfig, OptimizerGroup
from lfs_cli.model import Transformer, next_token_loss
from lfs_cli.optimizers import build_optimizers
from lfs_cli.training.step import Readback, StepRecord, train_step

SHAPE = ModelConfig(vocab_size=300, context_length=16, width=32, layers=2, heads=4, qk_norm=True)


def one_step(passes: int, clip: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Transformer(SHAPE).double()
    optimizers = build_optimizers(model, [OptimizerGroup(name="sgd", lr=0.5)])
    tokens_BT, targets_BT = torch.randint(300, (2, 8, 16))

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return next_token_loss(model.hidden(tokens), model.head_weight, targets)

    parameters = list(model.parameters())
    numbers = train_step(loss, parameters, optimizers, tokens_BT, targets_BT, passes=passes, clip=clip)
    return numbers, [weight.detach() for weight in parameters]


@pytest.mark.parametrize("passes", [2, 4, 8])
def test_microbatches_do_not_change_the_step(passes: int) -> None:
    numbers, weights = one_step(1)
    split_numbers, split_weights = one_step(passes)
    torch.testing.assert_close(split_numbers, numbers)
    torch.testing.assert_close(split_weights, weights)


def test_clipping_shortens_the_step_but_not_the_reported_norm() -> None:
    (loss, norm), _ = one_step(1, clip=0)
    (clipped_loss, clipped_norm), clipped = one_step(1, clip=norm.item() / 4)
    assert (clipped_loss, clipped_norm) == (loss, norm)
    torch.manual_seed(0)
    start = list(Transformer(SHAPE).double().parameters())
    _, free = one_step(1, clip=0)

    def moved(weights: list[torch.Tensor]) -> float:
        return sum((a - b).square().sum() for a, b in zip(weights, start, strict=True)).sqrt().item()

    assert moved(clipped) == pytest.approx(moved(free) / 4, rel=1e-3)


def test_clipping_holds_for_optimizers_of_torchs() -> None:
    moved, slope = [], torch.tensor([3.0, 4.0])
    for clip in (0.0, 0.5):
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        tokens_BT = torch.zeros(1, 1)
        train_step(lambda *_, w=weight: w @ slope, [weight], [optimizer], tokens_BT, tokens_BT, passes=1, clip=clip)
        moved.append(weight.detach())
    assert moved[0].tolist() == [-3, -4]
    assert moved[1].norm().item() == pytest.approx(0.5)


def test_a_step_leaves_no_gradients_behind() -> None:
    _, weights = one_step(2)
    assert all(weight.grad is None for weight in weights)


def test_numbers_come_back() -> None:
    assert Readback(torch.tensor([1.5, 2.5])).read() == [1.5, 2.5]


def test_a_record_is_one_line_of_metrics() -> None:
    record = StepRecord(3, 2.5, 1e-3, 0.5, 384, 1.0, 384.0, None, 10**6)
    assert record.line()["kind"] == "step"
    assert record.line()["step"] == 3


def test_a_step_that_is_not_accepted_leaves_everything_to_the_bit() -> None:
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    optimizers = build_optimizers(model, [OptimizerGroup(name="adamw", lr=0.1)])
    tokens_BT, targets_BT = torch.randint(300, (2, 8, 16))
    told = []

    def step(accept: bool) -> torch.Tensor:
        return train_step(
            lambda tokens, targets: next_token_loss(model.hidden(tokens), model.head_weight, targets),
            list(model.parameters()),
            optimizers,
            tokens_BT,
            targets_BT,
            passes=2,
            clip=1.0,
            accept=lambda *numbers: told.append(numbers) or accept,
        )

    def everything() -> list[torch.Tensor]:
        states = optimizers[0].state_dict()["state"].values()
        tensors = [torch.as_tensor(value) for state in states for value in state.values()]
        return [tensor.clone() for tensor in (*model.parameters(), *tensors)]

    step(True)
    before = everything()
    numbers = step(False)
    assert told[-1] == tuple(numbers.tolist())
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())
    step(True)
    assert not all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
