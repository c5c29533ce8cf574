"""The readable Flash Attention against its definition, and as CS336's assignment calls it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lfs_cli.kernels import tiled_attention as module
from lfs_cli.kernels.reference_attention import reference_attention
from lfs_cli.kernels.tiled_attention import TiledAttention, tiled_attention

SHAPES = [  # B, T, S, H, G, D, causal
    (1, 1, 1, 1, 1, 1, True),
    (2, 64, 64, 2, 2, 16, True),
    (1, 131, 131, 3, 1, 5, True),
    (1, 1, 77, 4, 2, 8, True),
    (2, 67, 130, 2, 1, 8, True),
    (2, 67, 13, 4, 4, 8, False),
]


def run(function: Callable, inputs: list[Tensor], do: Tensor, **how) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = function(*leaves, **how)
    return [o, *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_definition_in_float64(shape: tuple, poisoned: None) -> None:
    B, T, S, H, G, D, causal = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (B, T, H, D), (B, S, G, D), (B, S, G, D), (B, T, H, D)
    *inputs, do = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    for how in ({"causal": causal}, {"causal": causal, "scale": 0.3}):
        expected = run(reference_attention, inputs, do, **how)
        for ours, exact in zip(run(tiled_attention, inputs, do, **how), expected, strict=True):
            torch.testing.assert_close(ours, exact)


def test_the_size_of_tiles_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, do = torch.randn(4, 2, 50, 3, 8, dtype=torch.float64)
    expected = run(tiled_attention, [q, k, v], do)
    monkeypatch.setattr(module, "TILE", 7)
    for ours, other in zip(run(tiled_attention, [q, k, v], do), expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_half_precision_is_accumulated_in_float32() -> None:
    q, k, v, do = torch.randn(4, 1, 200, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for ours, plain in zip(run(tiled_attention, [q, k, v], do), run(reference_attention, [q, k, v], do), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("function", [tiled_attention, reference_attention])
def test_autocast_takes_no_digits(function: Callable) -> None:
    q, k, v, do = torch.randn(4, 1, 70, 2, 16, generator=torch.Generator().manual_seed(0))

    def mixed(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs)

    for ours, plain in zip(run(mixed, [q, k, v], do), run(function, [q, k, v], do), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_the_interface_of_cs336(causal: bool) -> None:
    q, k, v, do = torch.randn(4, 2, 80, 16, generator=torch.Generator().manual_seed(0))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = TiledAttention.apply(*leaves, causal)
    saved = [x for x in o.grad_fn.saved_tensors if x.shape == (2, 80)]
    score_BTS = q @ k.mT / 4
    if causal:
        score_BTS = score_BTS.masked_fill(torch.ones(80, 80, dtype=torch.bool).triu(1), float("-inf"))
    plain = score_BTS.softmax(-1) @ v
    assert len(saved) == 1
    torch.testing.assert_close(saved[0], score_BTS.logsumexp(-1))
    torch.testing.assert_close(o, plain)
    for ours, expected in zip(torch.autograd.grad(o, leaves, do), torch.autograd.grad(plain, leaves, do), strict=True):
        torch.testing.assert_close(ours, expected)


def test_not_causal_is_the_default() -> None:
    q, k, v = torch.randn(3, 1, 5, 4)
    assert torch.equal(TiledAttention.apply(q, k, v), TiledAttention.apply(q, k, v, False))


def test_queries_that_would_see_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="3 queries need 3 or more keys, got 2"):
        tiled_attention(torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
