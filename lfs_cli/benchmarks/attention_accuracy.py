"""How wrong an implementation of attention is: its output and every gradient beside float64.

The exact answer is worked out for all queries of some heads, a block of queries at a time, so that it fits at any
length: for the query heads that share the first key/value head of the first sequence, and those of the last of the
last. An index that runs over, a tile that was forgotten and a mask that is off by one all show there.

    s = q k^T / sqrt(D)          p = softmax(s)          o = p v
    dv = p^T do        ds = p (do v^T - rowsum(p do v^T)) / sqrt(D)        dq = ds k        dk = ds^T q

    relative error = |x - exact| / |exact|, in the Euclidean norm over all checked numbers of a tensor

What an implementation leaves unwritten must not pass for a zero: the memory that it will be given holds NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lfs_cli.benchmarks.attention_shapes import Shape
from lfs_cli.benchmarks.measure import is_out_of_memory, release_memory

TENSORS = ("output", "dq", "dk", "dv")
"""What is compared: the output, then the gradients of queries, keys and values."""

WRONG = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Relative errors above which a result is not rounded but wrong. Rounding costs 1e-6 in float32, 0.01 in bfloat16."""

SCORE_BYTES = 256 * 2**20
"""Memory of one block of float64 scores; about four of them exist at once."""


class Inputs(NamedTuple):
    """Queries, keys, values and the gradient of the output: (B, T, H, D), keys and values (B, T, G, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor


class Error(NamedTuple):
    """How far a tensor is from the exact one.

    Args:
        relative: Euclidean norm of the difference over that of the exact tensor; None when the latter is zero.
        largest: Largest difference of one number.
    """

    relative: float | None
    largest: float


@dataclass(frozen=True)
class Verdict:
    """What the judge found, by the names of `TENSORS`; a tensor that could not be computed is absent."""

    errors: dict[str, Error]

    def worst(self, names: tuple[str, ...]) -> float | None:
        """Return the largest relative error among ``names``, NaN first; None when none of them was compared."""
        found = [self.errors[name].relative for name in names if name in self.errors]
        found = [error for error in found if error is not None]
        return max(found, key=lambda error: (error != error, error), default=None)

    def complaint(self, dtype: torch.dtype) -> str | None:
        """Return what is wrong beyond rounding, or None."""
        limit = WRONG[dtype]
        for name, (relative, largest) in self.errors.items():
            error = largest if relative is None else relative
            if not error <= limit:  # also for what is not a number
                return f"{name} differs from float64 by {error:.2g} of its size, and rounding explains {limit:g}"
        return None


class Judge:
    """Knows the exact answer to one problem; computes it when it is first asked.

    Args:
        shape: The problem.
        inputs: Its numbers.
    """

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        self.shape, self.inputs = shape, inputs
        self._exact: list[dict[str, Tensor]] | None = None
        groups = {(0, 0), (shape.batch - 1, shape.kv_heads - 1)}
        self.groups = sorted(groups)

    def compare(self, run: Callable[[], dict[str, Tensor]]) -> Verdict:
        """Run an implementation once and compare.

        Args:
            run: Returns tensors by the names of `TENSORS`, or some of them, as (B, T, heads, D).
        """
        _leave_nan_behind(self.inputs)
        found = run()
        if self._exact is None:
            self._exact = [self._exact_group(batch, group) for batch, group in self.groups]
        errors = {}
        for name, tensor in found.items():
            ours = [self._select(tensor, batch, group) for batch, group in self.groups]
            exact = [answers[name] for answers in self._exact]
            difference = torch.stack([(one - other).norm() for one, other in zip(ours, exact, strict=True)]).norm()
            size = torch.stack([other.norm() for other in exact]).norm().item()
            largest = max((one - other).abs().max().item() for one, other in zip(ours, exact, strict=True))
            errors[name] = Error(difference.item() / size if size else None, largest)
        return Verdict(errors)

    def _select(self, x_BTHD: Tensor, batch: int, group: int) -> Tensor:
        """Return the heads of one group as float64, (heads, T, D)."""
        count = x_BTHD.shape[2] // self.shape.kv_heads
        heads_HTD = x_BTHD[batch, :, group * count : (group + 1) * count].detach().transpose(0, 1)
        device = "cpu" if heads_HTD.device.type == "mps" else heads_HTD.device  # which has no float64
        return heads_HTD.to(device).double()

    def _exact_group(self, batch: int, group: int) -> dict[str, Tensor]:
        q, k, v, do = (self._select(x, batch, group) for x in self.inputs)
        return dict(zip(TENSORS, exact_attention(q, k[0], v[0], do, self.shape.causal, self.shape.window), strict=True))


def exact_attention(
    q_HTD: Tensor, k_SD: Tensor, v_SD: Tensor, do_HTD: Tensor, causal: bool, window: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, dq (H, T, D), dk and dv (1, S, D) of query heads that share one key/value head, block by block.

    Args:
        q_HTD: Queries, in float64.
        k_SD: Keys; as many as queries.
        v_SD: Values.
        do_HTD: Gradient of the output.
        causal: Whether query t sees keys up to t only.
        window: How many keys it sees then; 0 is all.
    """
    (H, T, D), S = q_HTD.shape, k_SD.shape[0]
    scale = D**-0.5
    rows = max(1, SCORE_BYTES // (8 * H * S))
    o_HTD, dq_HTD = torch.empty_like(q_HTD), torch.empty_like(q_HTD)
    dk_SD, dv_SD = torch.zeros_like(k_SD), torch.zeros_like(v_SD)
    for start in range(0, T, rows):
        t = slice(start, min(start + rows, T))
        s = slice(max(0, start - window + 1) if window else 0, t.stop if causal else S)
        q, do, k, v = q_HTD[:, t], do_HTD[:, t], k_SD[s], v_SD[s]
        score = q @ k.mT * scale
        if causal:
            query = torch.arange(t.start, t.stop, device=q.device)[:, None]
            key = torch.arange(s.start, s.stop, device=q.device)
            hidden = (key > query) | (key <= query - window) if window else key > query
            score.masked_fill_(hidden, float("-inf"))
        p = score.softmax(-1)
        dp = do @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        o_HTD[:, t], dq_HTD[:, t] = p @ v, ds @ k
        dk_SD[s] += ds.flatten(0, 1).mT @ q.flatten(0, 1)
        dv_SD[s] += p.flatten(0, 1).mT @ do.flatten(0, 1)
    return o_HTD, dq_HTD, dk_SD[None], dv_SD[None]


def _leave_nan_behind(inputs: Inputs) -> None:
    """Fill memory with NaN and free it: the allocator gives it to whoever next asks for tensors of these sizes."""
    try:
        blocks = [
            torch.full(x.shape, float("nan"), dtype=dtype, device=x.device)
            for dtype in {inputs.q.dtype, torch.float32}
            for x in inputs
        ]
        del blocks
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release_memory(inputs.q.device)
