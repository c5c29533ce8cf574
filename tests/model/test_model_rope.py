"""Rotary positions, against complex numbers and against what they are for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.model import RotaryEmbedding


def by_complex_numbers(x, positions, theta):
    """The definition in float64: pair i of position t times e^(i t theta^(-2i / D))."""
    D = x.shape[-1]
    angles = positions.double().unsqueeze(-1) * theta ** (-torch.arange(0, D, 2).double() / D)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_position_one_turns_the_first_pair_by_one_radian_and_the_second_by_less() -> None:
    rope = RotaryEmbedding(100.0, 4, 2)

    y = rope(torch.tensor([[1.0, 0, 1, 0], [1, 0, 1, 0]]))

    turned = [math.cos(1), math.sin(1), math.cos(0.1), math.sin(0.1)]
    torch.testing.assert_close(y, torch.tensor([[1.0, 0, 1, 0], turned]))


@settings(max_examples=20, deadline=None)
@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    length=st.integers(1, 6),
    pairs=st.integers(1, 4),
    has_own_positions=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_rotation_matches_complex_numbers(leading, length, pairs, has_own_positions, dtype) -> None:
    rope = RotaryEmbedding(10_000.0, 2 * pairs, 50)
    x = torch.randn(*leading, length, 2 * pairs).to(dtype)
    positions = torch.randint(50, (*leading, length)) if has_own_positions else torch.arange(length)

    y = rope(x, positions if has_own_positions else None)

    assert y.dtype == dtype
    tolerance = {"atol": 2e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(y.double(), by_complex_numbers(x, positions, 10_000.0), **tolerance)


def test_gradients_turn_back() -> None:
    rope = RotaryEmbedding(10_000.0, 6, 9).double()
    for x in (torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(9, 2, 6, dtype=torch.float64).transpose(0, 1)):
        assert torch.autograd.gradcheck(rope, x.requires_grad_())

    x = torch.randn(2, 9, 6, requires_grad=True)  # float32 goes another way
    dy = torch.randn(2, 9, 6)
    (dx,) = torch.autograd.grad(rope.float()(x), x, dy)
    (expected,) = torch.autograd.grad(by_complex_numbers(x, torch.arange(9), 10_000.0), x, dy.double())
    torch.testing.assert_close(dx, expected)


def test_similarity_depends_on_distance_only() -> None:
    rope = RotaryEmbedding(10_000.0, 8, 100)
    q, k = torch.randn(2, 1, 8)

    here = rope(q, torch.tensor([7])) @ rope(k, torch.tensor([3])).T
    there = rope(q, torch.tensor([97])) @ rope(k, torch.tensor([93])).T

    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


def test_start_counts_on_from_a_cache() -> None:
    rope = RotaryEmbedding(10_000.0, 8, 100)
    x = torch.randn(10, 8)

    torch.testing.assert_close(rope(x)[6:], rope(x[6:], start=6))


def test_a_position_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="position 8 is beyond the context of 8 tokens"):
        RotaryEmbedding(10_000.0, 4, 8)(torch.randn(3, 4), start=6)
    with pytest.raises(ValueError, match="odd"):
        RotaryEmbedding(10_000.0, 5, 8)


def test_the_tables_keep_their_digits_in_a_bfloat16_model_and_are_not_saved() -> None:
    rope = RotaryEmbedding(10_000.0, 4, 1000)
    before = rope.cos.clone()

    rope.to(torch.bfloat16)

    assert torch.equal(rope.cos, before)
    assert rope.state_dict() == {}


def test_the_tables_survive_the_meta_device() -> None:
    with torch.device("meta"):
        rope = RotaryEmbedding(10_000.0, 4, 10)

    rope.to_empty(device="cpu")

    torch.testing.assert_close(rope.sin, RotaryEmbedding(10_000.0, 4, 10).sin)
