"""The judge of kernels: an error is allowed when plain PyTorch in the same type makes about as much."""

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Require that ``ours`` is at most ``factor`` times as wrong as ``plain`` is.

    The rule is that of the flash-attention package's own tests: absolute tolerances are either too loose for small
    inputs or too tight for large ones.

    Args:
        ours: Result of the kernel, in low precision.
        plain: Result of the reference in that same low precision.
        exact: Result of the reference in float64.
        factor: How many times the error of ``plain``, plus that of a few roundings in its type, is still accepted. Of
            few numbers, those of ``plain`` may be right by chance, and on one processor but not on another.
    """
    assert ours.shape == exact.shape
    assert ours.dtype == plain.dtype
    if not exact.numel():
        return
    rounded = exact.to(ours.dtype)
    noise = (rounded + 0.3 - 0.3 - rounded).abs().max().double()  # what one addition in this type costs
    noise += 2 * torch.finfo(ours.dtype).eps * exact.abs().max()
    allowed = factor * ((plain.double() - exact).abs().max() + noise)
    error = (ours.double() - exact).abs().max()
    assert error <= allowed, f"largest error {error:.2e} exceeds {allowed:.2e}"
