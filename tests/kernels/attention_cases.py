"""What the tests of attention share: how inputs are drawn, a function is differentiated and a result is judged."""

from collections.abc import Callable
from typing import Any

import torch
from close import assert_as_accurate
from torch import Tensor

from lfs_cli.kernels.flash_attention import flash_attention
from lfs_cli.kernels.reference_attention import reference_attention


def draw(shape: tuple, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values for B, T, S, H, G, D, and the gradient of the output."""
    B, T, S, H, G, D = shape[:6]
    generator = torch.Generator().manual_seed(seed)
    sizes = (B, T, H, D), (B, S, G, D), (B, S, G, D), (B, T, H, D)
    *inputs, do = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    return inputs, do


def run(
    function: Callable, inputs: list[Tensor], do: Tensor, dtype: torch.dtype | None = None, **how: Any
) -> list[Tensor]:
    """The output and the three gradients."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    o = function(*leaves, **how)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def recorded(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run ``function`` outside of a CUDA graph, record it in one, and return the graph and what it will write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = function()
    return graph, written


def assert_matches_reference(inputs: list[Tensor], do: Tensor, **how: Any) -> None:
    """Require that the output and the gradients are as near to float64 as plain PyTorch in their type is."""
    ours = run(flash_attention, inputs, do, **how)
    how.pop("implementation", None)
    plain = run(reference_attention, inputs, do, **how)
    exact = run(reference_attention, inputs, do, torch.float64, **how)
    for result in zip(ours, plain, exact, strict=True):
        assert_as_accurate(*result, factor=3)  # gradients are sums over tiles: their order is not the reference's
