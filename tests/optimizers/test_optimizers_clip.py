"""Gradient clipping, against CS336's formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lfs_cli.optimizers import OPTIMIZERS, SGD, AdamW, clip_gradients, clip_scale, step_scaled


def weights_with(*gradients: torch.Tensor | None) -> list[nn.Parameter]:
    weights = []
    for gradient in gradients:
        weight = nn.Parameter(torch.zeros(1) if gradient is None else torch.zeros_like(gradient))
        weight.grad = gradient
        weights.append(weight)
    return weights


def test_a_long_gradient_keeps_its_direction() -> None:
    weights = weights_with(torch.tensor([3.0]), None, torch.tensor([[0.0, -4.0]]))

    norm = clip_gradients((weight for weight in weights), 1.0)

    assert norm.item() == 5
    assert weights[0].grad.item() == pytest.approx(3 / (5 + 1e-6), rel=1e-7)
    assert weights[2].grad.tolist() == [[0, pytest.approx(-4 / (5 + 1e-6), rel=1e-7)]]


def test_a_short_gradient_is_left_alone() -> None:
    weights = weights_with(torch.tensor([3.0, 4.0]))

    for limit in (5.0, 6.0, float("inf")):
        assert clip_gradients(weights, limit).item() == 5
        assert torch.equal(weights[0].grad, torch.tensor([3.0, 4.0]))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), scale=st.floats(0.01, 100))
def test_clipping_matches_torchs(sizes, scale) -> None:
    gradients = [torch.randn(size) * scale for size in sizes]
    ours, theirs = (weights_with(*(gradient.clone() for gradient in gradients)) for _ in range(2))

    norm = clip_gradients(ours, 1.0)

    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, right.grad)


def test_low_precision_gradients_are_measured_in_float32() -> None:
    weights = weights_with(torch.full((1000,), 200.0, dtype=torch.float16))

    norm = clip_gradients(weights, 1.0)

    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(200 * 1000**0.5)
    assert weights[0].grad[0].item() == pytest.approx(1000**-0.5, rel=1e-3)


def test_a_gradient_that_is_not_a_number_is_reported() -> None:
    assert clip_gradients(weights_with(torch.tensor([1.0, float("nan")])), 1.0).isnan()


def test_no_gradients_have_no_length() -> None:
    assert clip_gradients([], 1.0).item() == 0
    assert clip_gradients(weights_with(None), 1.0).item() == 0


def test_the_scale_alone_leaves_gradients_as_they_are() -> None:
    weights = weights_with(torch.tensor([3.0]), torch.tensor([[0.0, -4.0]]))

    (norm, scale), (_, longer), (_, none) = (clip_scale(weights, limit) for limit in (1.0, 6.0, float("inf")))

    assert (norm.item(), scale.item(), longer.item(), none) == (5, pytest.approx(1 / (5 + 1e-6)), 1, None)
    assert weights[1].grad.tolist() == [[0, -4]]
    assert clip_scale([], 1.0) == (torch.zeros(()), None)


class OwnStep(SGD):
    """As a plugin may write it: its `step` takes no scale."""

    def step(self, closure=None):
        return super().step(closure)


KINDS = [*map(OPTIMIZERS.get, OPTIMIZERS.names()), torch.optim.SGD, torch.optim.NAdam, OwnStep]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_any_optimizer_steps_by_clipped_gradients(kind) -> None:
    """To the bit as after `clip_gradients`, in step with others, and with a weight that has no gradient."""
    ours, theirs = ([nn.Parameter(torch.ones(4, 3)) for _ in range(3)] for _ in range(2))
    mine, right = ([kind(w[:2], lr=0.1), AdamW(w[2:], lr=0.1)] for w in (ours, theirs))
    for step in range(1, 4):
        gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for weights in (ours, theirs):
            weights[0].grad, weights[2].grad = step * gradient, gradient.T.reshape(4, 3).clone()
        norm, scale = clip_scale(ours, 1.0)
        step_scaled(mine, scale)
        assert torch.equal(norm, clip_gradients(theirs, 1.0))
        for optimizer in right:
            optimizer.step()

    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[0], ours[1])


def test_an_optimizer_that_has_nothing_to_move_does_not_mind_a_scale() -> None:
    for kind in (torch.optim.SGD, SGD):
        weight = nn.Parameter(torch.ones(2))
        step_scaled([kind([weight], lr=0.1)], torch.tensor(0.5))
        assert weight.tolist() == [1, 1]
