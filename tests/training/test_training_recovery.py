"""Where memory runs out a step is done again on less at once, as if it had been so from the start."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lfs_cli.config import ModelConfig, OptimizerGroup
from lfs_cli.model import Transformer, next_token_loss
from lfs_cli.optimizers import build_optimizers
from lfs_cli.training.recovery import smaller_microbatch, with_less_at_once
from lfs_cli.training.step import train_step

CPU = torch.device("cpu")
SHAPE = ModelConfig(vocab_size=300, context_length=16, width=16, layers=1, heads=2)


@given(st.integers(1, 500), st.data())
def test_halving_ends_at_one_through_divisors(batch_size: int, data: st.DataObject) -> None:
    rows = [data.draw(st.sampled_from([n for n in range(1, batch_size + 1) if batch_size % n == 0]))]
    while rows[-1] > 1:
        rows.append(smaller_microbatch(rows[-1], batch_size))
    assert all(batch_size % n == 0 for n in rows)
    assert all(more <= less / 2 for less, more in pairwise(rows))


def run(
    limit: int, error: Exception, *, first: int, batch: int = 8, fails_at: int = 0
) -> tuple[list[int], list[Tensor]]:
    """Do one step whose loss draws random numbers, where passes of more than ``limit`` sequences have no memory.

    Returns:
        The numbers of sequences that it was told, and the loss, the norm and all weights after it.
    """
    torch.manual_seed(0)
    model, told, calls = Transformer(SHAPE), [], [0]
    optimizers = build_optimizers(model, [OptimizerGroup(name="adamw", lr=0.1)])
    tokens_BT, targets_BT = torch.randint(300, (2, batch, 16))

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = model.hidden(tokens) * (1 + torch.rand(()))
        calls[0] += 1
        if len(tokens) > limit and calls[0] > fails_at:
            raise error
        return next_token_loss(hidden, model.head_weight, targets)

    weights, passes = list(model.parameters()), batch // first
    numbers = train_step(
        loss, weights, optimizers, tokens_BT, targets_BT, passes=passes, clip=0.5, on_less=told.append, draws=True
    )
    return told, [numbers, *weights]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("first", "limit", "told"), [(8, 4, [4]), (8, 2, [4, 2]), (4, 1, [2, 1])])
def test_a_step_without_memory_is_to_the_bit_one_with_smaller_passes(
    error: Exception, first: int, limit: int, told: list[int]
) -> None:
    found, after = run(limit, error, first=first)
    never, expected = run(limit, error, first=limit)
    assert (found, never) == (told, [])
    assert all(torch.equal(one, other) for one, other in zip(after, expected, strict=True))


def test_gradients_of_the_passes_before_it_do_not_count_twice() -> None:
    found, after = run(2, ERRORS[0], first=4, fails_at=1)
    assert found == [2]
    assert all(torch.equal(one, other) for one, other in zip(after, run(2, ERRORS[0], first=2)[1], strict=True))


def test_other_errors_and_a_lack_for_one_sequence_are_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run(4, RuntimeError("shapes do not fit"), first=8)
    with pytest.raises(torch.OutOfMemoryError):
        run(0, ERRORS[0], first=8)


def test_memory_that_runs_out_in_the_update_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, *args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lfs_cli.optimizers.AdamW.update_many", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        run(8, ERRORS[0], first=8)


def test_what_a_failed_attempt_held_is_released_before_the_next() -> None:
    held: list[object] = []

    class Held:
        def __del__(self) -> None:
            held.remove(self.number)

        def __init__(self, number: int) -> None:
            self.number = number
            held.append(number)

    def attempt(rows: int) -> int:
        kept = Held(rows)
        if rows > 1:
            raise MemoryError
        return kept.number

    seen: list[list[object]] = []
    last = with_less_at_once(attempt, 8, 8, CPU, undo=lambda: seen.append(list(held)), on_less=lambda rows: None)
    assert last == 1
    assert seen == [[], [], []]
