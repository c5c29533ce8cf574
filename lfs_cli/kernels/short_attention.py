"""Rotation and attention of short sequences for Hopper GPUs: what surrounds the kernels of `hopper_short.py`.

Here is when they can run, and the launches. `rotary_attention.py` takes them where it can. Importing this file imports
neither Gluon nor a GPU's libraries.

Why:      a head of 256 positions and 32 channels is so small that programs of 64 queries are mostly beginnings and
          ends: each waits for its own copies, and reads keys and values that its neighbours read too. A program that
          takes the whole head waits once, turns queries and keys on the way, and turns their gradients back: none of
          these are ever in memory between the two.
Measured: one H200, 2026-11-29, bfloat16, B, T, H, D = 128, 256, 16, 32, milliseconds, rotation included:

                                                                            forward    backward
              these kernels                                                 0.081      0.181
              `rope.py`, then `triton_attention.py`                         0.137      0.275
              the same with the tiles that those had before                 0.144      0.296

          What was tried for backward, in the same run; the last two in runs of their own, beside what is said:

              one walk over the pairs, two programs a processor             0.192
              the same, the next scores begun before ds is stored           0.192
              the same, dq of a block written as soon as it is whole        0.197
              two walks, registers for 2 and for 4 programs a processor     0.208, 0.207
              one walk, programs that take one head after another, the
              next head copied into buffers that are free                   0.227, beside 0.273
              one walk in plain Triton (forward: 0.095)                     0.217, beside 0.296
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lfs_cli.kernels.hopper_attention import LOG2_E, describe, no_hopper_reason_in_trace, pairs_layout

HEAD_DIM = 32
SHORTEST, LONGEST = 65, 256
"""Positions of a sequence: two to four blocks."""

BLOCK = 64
REGISTERS = 168
"""Of each thread, so that three programs fit a processor."""


def unavailable_reason(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    _v_BSGD: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
) -> str | None:
    """Say why these kernels cannot run on such tensors, or `None` when they can.

    Reads types, shapes and devices alone, so the tensors may be fake, and torch.compile may trace it. Strides do not
    count, as those of a trace may be others than those of the call: what is not `hopper_attention.is_aligned` has to be
    copied.
    """
    reason = no_hopper_reason_in_trace(q_BTHD.device)
    if reason is not None:
        return reason
    asked = {"windows": window, "soft cap": softcap, "documents": documents}
    if missing := [name for name, value in asked.items() if value is not None]:
        return f"it has no {' and no '.join(missing)}"
    return "it is for causal attention" if not causal else _unfit(q_BTHD, k_BSGD)


def _unfit(q_BTHD: Tensor, k_BSGD: Tensor) -> str | None:
    """Say why tensors of such types and shapes do not fit the kernels, or None when they do."""
    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    if q_BTHD.dtype not in (torch.bfloat16, torch.float16):
        return f"the type is {str(q_BTHD.dtype).removeprefix('torch.')}, not bfloat16 or float16"
    if D != HEAD_DIM:
        return f"head dimension {D} is not {HEAD_DIM}"
    if G != H:
        return "query heads share key/value heads"
    if T != S:
        return "there are not as many queries as keys"
    if not SHORTEST <= T <= LONGEST:
        return f"it takes {SHORTEST} to {LONGEST} positions, not {T}"
    if B * H == 0:
        return "there is nothing to compute"
    if B * H * T >= 2**31:
        return "there are more than 2^31 queries"
    return None


def forward(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with queries and keys that are turned on the way.

    Args:
        q_BTHD: (B, T, H, D), not yet turned. `unavailable_reason` has nothing against it, and it is aligned.
        k_BTHD: The same.
        v_BTHD: The same.
        cos: (T, D / 2), float32.
        sin: (T, D / 2), float32.
        scale: Factor of the scores.

    Returns:
        o (B, T, H, D), contiguous, and L (B, H, T), the natural log-sum-exp of the scores, float32.
    """
    B, T, H, D = q_BTHD.shape
    o_BTHD = torch.empty((B, T, H, D), dtype=q_BTHD.dtype, device=q_BTHD.device)
    L_BHT = torch.empty((B, H, T), dtype=torch.float32, device=q_BTHD.device)
    with torch.cuda.device_of(q_BTHD):
        _kernels().forward[(B * H,)](
            *(describe(x, 1, BLOCK, 1, D) for x in (q_BTHD, k_BTHD, v_BTHD, o_BTHD)),
            L_BHT,
            cos.contiguous(),
            sin.contiguous(),
            T,
            H,
            scale * LOG2_E,
            D=D,
            BLOCKS=blocks_of(T),
            PAIRS=layouts()["PAIRS"],
            num_warps=4,
            maxnreg=REGISTERS,
            enable_fp_fusion=True,
        )
    return o_BTHD, L_BHT


def backward(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    do_BTHD: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients of queries, keys and values as they came to `forward`.

    Args:
        q_BTHD: As in `forward`, like what is not named here.
        k_BTHD: The same.
        v_BTHD: The same.
        o_BTHD: What `forward` returned.
        L_BHT: The same, contiguous.
        do_BTHD: (B, T, H, D). Gradient of the output, aligned once it is contiguous.
        cos: (T, D / 2), float32.
        sin: (T, D / 2), float32.
        scale: Factor of the scores.
        dq: Written, like the next two: (B, T, H, D), aligned.
        dk: Of the keys.
        dv: Of the values.
    """
    B, T, H, D = q_BTHD.shape
    o_BTHD, do_BTHD = o_BTHD.contiguous(), do_BTHD.contiguous()
    tensors = q_BTHD, k_BTHD, v_BTHD, do_BTHD, dq, dk, dv
    with torch.cuda.device_of(q_BTHD):
        _kernels().backward[(B * H,)](
            *(describe(x, 1, BLOCK, 1, D) for x in tensors),
            o_BTHD,
            do_BTHD,
            L_BHT,
            cos.contiguous(),
            sin.contiguous(),
            T,
            H,
            scale * LOG2_E,
            scale,
            D=D,
            BLOCKS=blocks_of(T),
            **layouts(),
            num_warps=4,
            maxnreg=REGISTERS,
            enable_fp_fusion=True,
        )


@cache
def _kernels() -> Any:
    return import_module("lfs_cli.kernels.hopper_short")


def blocks_of(T: int) -> int:
    """Return the blocks of a sequence, for each number of which there is a kernel."""
    return -(-T // BLOCK)


@cache
def layouts() -> dict[str, Any]:
    """Return how blocks lie in registers: `PAIRS` and `READ` of the kernels.

    `PAIRS` is `hopper_attention.pairs_layout`. `READ` is that of a block that is read row by row, 16 bytes at once.
    """
    from lfs_cli.kernels.gluon_compatibility import gl

    return {"PAIRS": pairs_layout(HEAD_DIM), "READ": gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])}
