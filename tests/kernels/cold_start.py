"""Time the first attention of a process, forward and backward: compiling, the self-check, and the launch.

    TRITON_CACHE_DIR=$(mktemp -d) python -m tests.kernels.cold_start 32 1024 12 64

The numbers are B, T, H and D. Without a folder of its own for the compiled kernels, those of an earlier run are taken.
"""

import sys
import time

import torch

from lfs_cli.kernels.flash_attention import flash_attention


def main(B: int, T: int, H: int, D: int) -> None:
    """Print the seconds of each pass."""
    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    started = time.perf_counter()
    torch.ones((), device="cuda", requires_grad=True).backward()  # the first one of a process makes torch import sympy
    torch.cuda.synchronize()
    print(f"the first backward pass of torch: {time.perf_counter() - started:.2f} s; then attention:")
    started = time.perf_counter()
    o = flash_attention(q, k, v)
    torch.cuda.synchronize()
    forward = time.perf_counter() - started
    o.backward(torch.randn_like(o))
    torch.cuda.synchronize()
    both = time.perf_counter() - started
    print(f"forward {forward:.2f} s, backward {both - forward:.2f} s, both {both:.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
