"""Vectors of tokens from several tables at once, and the gradients of those tables by sorting, without atomics.

Math:     y_n = w[t_n]          dw[v] = sum of dy_n over all n with t_n = v

Numerics: y is rounded once to its type; sums are float32. Their order is fixed, so equal runs are equal to the bit,
          which sums by atomics are not. What is not finite in a dy makes all sums of its chunk NaN.
Memory:   saves the tokens sorted and where each of them was, for all tables together: 12 bytes a token.
Layout:   sorted, equal tokens lie side by side, as runs. A program of `_sum_runs` owns CHUNK tokens and BLOCK_C
          channels of one table, gathers their dy and adds up each run by a product with the matrix of zeros and ones
          that says which tokens are equal: exact, as the tensor cores add in float32 what is 0 or dy. A run that lies
          in its chunk is a row of dw and is written there. Of the others each chunk writes its part: slot 1 of the
          chunk where the run begins, slot 0 of those that it goes on in, of which a chunk has one each at most.
          `_join_runs` adds them up, in the program of the chunk where the run begins. So a token that is a twentieth of
          the text costs no more than any other.
Traffic:  reads dy once and writes each row of dw that occurs, after zeros in all of them; forward reads and writes
          once.
Limits:   float32 tables of one vocabulary, on a GPU. PyTorch does the rest: other devices and types, no Triton, and
          whatever the kernels do wrong in the self-check, once a process for each type.
Measured: one H200, 2026-11-30, five tables of 16,384 x 768 in a step of speedrun.json under torch's profiler, bfloat16,
          32,768 tokens, before what is not in a table was masked: look-ups 0.028 ms each, and `_sum_runs`, `_join_runs`
          and zeros 0.033, 0.011 and 0.008, which were 0.12 and 0.27 by PyTorch's index_select, index_add and casts.
          Sorting is once for all. One table of 50,304 x 768 by `lfs bench kernels`, the same day: forward 0.075 ms,
          the sort in it, backward 0.103; torch.compile's 0.025 and 0.154.
Source:   sorting and then summing runs is how PyTorch's own embedding does it; a product in place of the loop over a
          run, and all tables in one sort, are ours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import operation, unavailable_reason
from lfs_cli.kernels.self_check import LARGEST_ERROR, is_trusted, relative_errors

CHUNK = 16
"""Tokens that one program sums: as many rows as a tensor core multiplies."""

MOST_CHANNELS = 256
"""Channels that a program works on: 16 tokens of these are 32 numbers a thread."""

JOINED = 8
"""Chunks that `_join_runs` reads at once."""


@triton.jit
def _look_up(tokens_ptr, weight_ptr, y_ptr, N, V, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write BLOCK_N rows of y, BLOCK_C channels of them; those of tokens that are not in the table are NaN."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.load(tokens_ptr + n, mask=n < N, other=0).to(tl.int64)
    inside = (n < N)[:, None] & (c < C)[None, :]
    known = inside & ((t >= 0) & (t < V))[:, None]
    w = tl.load(weight_ptr + (t * C)[:, None] + c[None, :], mask=known, other=float("nan"))
    tl.store(y_ptr + (n * C)[:, None] + c[None, :], w.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_runs(sorted_ptr, order_ptr, dy_ptr, dw_ptr, parts_ptr, N, V, C, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write the rows of dw whose runs lie in this chunk, and this chunk's parts of the others."""
    chunk = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    n = chunk * CHUNK + i
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.load(sorted_ptr + n, mask=n < N, other=-1)
    before = tl.load(sorted_ptr + n - 1, mask=(n > 0) & (n <= N), other=-1)
    place = tl.load(order_ptr + n, mask=n < N, other=0).to(tl.int64)
    dy = tl.load(dy_ptr + (place * C)[:, None] + c[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
    equal = t[:, None] == t[None, :]
    sums = tl.dot(equal.to(dy.dtype), dy, input_precision="ieee", out_dtype=tl.float32)

    is_first = (t >= 0) & (t < V) & ((i == 0) | (t != before))  # of its run, in this chunk
    goes_on_before = (i == 0) & (t == before)
    behind = tl.load(sorted_ptr + (chunk + 1) * CHUNK, mask=(chunk + 1) * CHUNK < N, other=-1)
    is_split = goes_on_before | (t == behind)
    written = (is_first & (is_split == 0))[:, None] & (c < C)[None, :]
    tl.store(dw_ptr + (t.to(tl.int64) * C)[:, None] + c[None, :], sums, mask=written)
    slot = 2 * chunk + tl.where(goes_on_before, 0, 1)
    parted = (is_first & is_split)[:, None] & (c < C)[None, :]
    tl.store(parts_ptr + (slot.to(tl.int64) * C)[:, None] + c[None, :], sums, mask=parted)


@triton.jit
def _join_runs(
    sorted_ptr, dw_ptr, parts_ptr, N, V, C, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, JOINED: tl.constexpr
):
    """Write the row of dw whose run begins in this chunk and goes on in the next, if there is one."""
    chunk = tl.program_id(0)
    behind = (chunk + 1) * CHUNK
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.load(sorted_ptr + behind - 1, mask=behind < N, other=-1)
    t_behind = tl.load(sorted_ptr + behind, mask=behind < N, other=-2)
    # Where the chunk is all of one run that began before, another program joins it
    is_whole = tl.load(sorted_ptr + behind - CHUNK) == t
    t_before = tl.load(sorted_ptr + behind - CHUNK - 1, mask=chunk > 0, other=-1)
    if (t == t_behind) & (t >= 0) & (t < V) & ((is_whole & (t_before == t)) == 0):
        total = tl.load(parts_ptr + (2 * chunk + 1).to(tl.int64) * C + c, mask=c < C, other=0.0)
        k = chunk + 1
        goes_on = True
        while goes_on:
            ks = k + tl.arange(0, JOINED)
            same = tl.load(sorted_ptr + ks * CHUNK, mask=ks * CHUNK < N, other=-2) == t
            at = (2 * ks.to(tl.int64) * C)[:, None] + c[None, :]
            total += tl.sum(tl.load(parts_ptr + at, mask=same[:, None] & (c < C)[None, :], other=0.0), 0)
            goes_on = tl.sum(same.to(tl.int32), 0) == JOINED
            k += JOINED
        tl.store(dw_ptr + t.to(tl.int64) * C + c, total, mask=c < C)


def look_up(tokens: Tensor, weights: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return ``weight[tokens].to(dtype)`` for each table and type. Differentiable by the tables, once.

    Works under torch.compile, in CUDA graphs and under activation checkpointing.

    Args:
        tokens: (...), int32 or int64, below V.
        weights: (V, C) each, for one V and any C.
        dtypes: Of the results.

    Returns:
        (..., C) each.

    Raises:
        ValueError: For tokens of another type, and when the tables are not matrices with as many rows each.
    """
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expected tokens of int32 or int64, got {tokens.dtype}")
    if any(weight.ndim != 2 or len(weight) != len(weights[0]) for weight in weights):
        raise ValueError(f"expected tables (V, C) of one V, got {[tuple(weight.shape) for weight in weights]}")
    pairs = list(zip(weights, dtypes, strict=True))
    if any(unavailable(weight) or unavailable_reason(weight.device.type, dtype) for weight, dtype in pairs):
        return [reference_look_up(tokens, weight, dtype) for weight, dtype in pairs]
    return list(_LookUp.apply(tokens, tuple(dtypes), *weights)) if weights else []


def unavailable(weight: Tensor) -> str | None:
    """Say why the kernels cannot read this table, or None when they can. PyTorch takes their place then."""
    if weight.dtype != torch.float32:
        return "it needs float32"
    return unavailable_reason(weight.device.type, weight.dtype)


def reference_look_up(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition: (..., C)."""
    # index_select, since its backward (index_add) is faster than that of weight[tokens] on a CPU
    return weight.index_select(0, tokens.reshape(-1)).view(*tokens.shape, weight.shape[1]).to(dtype)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, dtypes: tuple[torch.dtype, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        ordered = tokens.reshape(-1).int().sort()
        ctx.save_for_backward(*ordered)
        ctx.rows = len(weights[0])
        ctx.set_materialize_grads(False)
        return tuple(_forward_operation(tokens, *each) for each in zip(weights, dtypes, strict=True))

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ordered = ctx.saved_tensors
        found = (None if dy is None else _backward_operation(dy, *ordered, ctx.rows) for dy in gradients)
        return None, None, *found


@operation("embedding")
def _forward_operation(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (_launch_forward if _is_right(weight.device, dtype) else reference_look_up)(tokens, weight, dtype)


@torch.library.register_fake("lfs::embedding")
def _(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((*tokens.shape, weight.shape[1]), dtype=dtype)


@operation("embedding_backward")
def _backward_operation(dy: Tensor, ordered_N: Tensor, order_N: Tensor, rows: int) -> Tensor:
    """Return the gradient of a table, (rows, C), float32, by the tokens in order and the places that they had."""
    run = _launch_backward if _is_right(dy.device, dy.dtype) else _reference_backward
    return run(dy, ordered_N, order_N, rows)


@torch.library.register_fake("lfs::embedding_backward")
def _(dy: Tensor, _ordered: Tensor, _order: Tensor, rows: int) -> Tensor:
    return dy.new_empty((rows, dy.shape[-1]), dtype=torch.float32)


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels are to be used, as they do on a small case what the definitions do."""
    return is_trusted("embedding", _errors, device, dtype, allowed=LARGEST_ERROR[dtype])


def _errors(device: torch.device, dtype: torch.dtype) -> list[float]:
    """Return errors of a look-up and its gradient, where runs lie in a chunk, cross one border, and many.

    Sizes are multiples of 16, as in a call: Triton would compile other kernels for other numbers.
    """
    generator = torch.Generator(device).manual_seed(0)
    runs = [1, 3 * CHUNK, 2, CHUNK - 1, (JOINED + 2) * CHUNK, 5, 9, 0]
    tokens = torch.cat([torch.full((length,), 2 * t, device=device) for t, length in enumerate(runs)])
    tokens = tokens[torch.randperm(len(tokens), generator=generator, device=device)]
    rows, C = 2 * len(runs), MOST_CHANNELS + 16
    weight, dy = (
        torch.randn(n, C, generator=generator, device=device, dtype=torch.float32) for n in (rows, len(tokens))
    )
    dy = dy.to(dtype)
    ordered = tokens.int().sort()
    right = reference_look_up(tokens, weight.double(), torch.float64), _reference_backward(dy.double(), *ordered, rows)
    return relative_errors((_launch_forward(tokens, weight, dtype), _launch_backward(dy, *ordered, rows)), right)


def _reference_backward(dy: Tensor, ordered_N: Tensor, order_N: Tensor, rows: int) -> Tensor:
    """The gradient of `reference_look_up`, in float32 or better."""
    dy_NC = dy.reshape(len(order_N), dy.shape[-1])[order_N].to(torch.promote_types(dy.dtype, torch.float32))
    return dy_NC.new_zeros((rows, dy_NC.shape[1])).index_add_(0, ordered_N, dy_NC)


def _launch_forward(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    N, (V, C) = tokens.numel(), weight.shape
    y = torch.empty((*tokens.shape, C), dtype=dtype, device=weight.device)
    block_c = _block_c(C)
    if y.numel():
        with torch.cuda.device_of(weight):
            grid = triton.cdiv(N, CHUNK), triton.cdiv(C, block_c)
            _look_up[grid](
                tokens.contiguous(), weight.contiguous(), y, N, V, C, BLOCK_N=CHUNK, BLOCK_C=block_c, num_warps=4
            )
    return y


def _launch_backward(dy: Tensor, ordered_N: Tensor, order_N: Tensor, rows: int) -> Tensor:
    N, C = len(ordered_N), dy.shape[-1]
    dw = torch.zeros((rows, C), device=dy.device, dtype=torch.float32)
    if not N * C:
        return dw
    chunks, block_c = triton.cdiv(N, CHUNK), _block_c(C)
    parts = torch.empty((2 * chunks, C), device=dy.device, dtype=torch.float32)
    grid, how = (chunks, triton.cdiv(C, block_c)), {"CHUNK": CHUNK, "BLOCK_C": block_c, "num_warps": 4}
    with torch.cuda.device_of(dy):
        _sum_runs[grid](ordered_N, order_N, dy.contiguous(), dw, parts, N, rows, C, **how)
        _join_runs[grid](ordered_N, dw, parts, N, rows, C, JOINED=JOINED, **how)
    return dw


def _block_c(C: int) -> int:
    """Return how many channels a program works on."""
    return max(16, min(MOST_CHANNELS, triton.next_power_of_2(C)))
