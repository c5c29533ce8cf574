"""The shapes that `lfs bench attention` measures: a grid of one's own, or one of those that others have measured too.

    pairs   = T^2, T^2 / 2 when causal, T w - w^2 / 2 within a window of w keys
    forward = 4 B H D pairs FLOPs: two products, two FLOPs for each number that is multiplied and added
    backward = 2.5 forward: five products, whatever an implementation really computes

These are the counts of the FlashAttention papers and of cuDNN's benchmarks, so that TFLOP/s can be compared. Softmax
and the masked half of the tiles on the diagonal do not count.

Sources: Dao, "FlashAttention-2", 2023 (arXiv:2307.08691), section 4.1, for the count of FLOPs.
         Stanford CS336, spring 2025, assignment 2 (systems), problems "pytorch_attention" and "flash_benchmarking", for
         the grids; https://github.com/stanford-cs336/assignment2-systems-leaderboard for the contest and its record.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch

from lfs_cli.config import AttentionBench

PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""What is timed, with its FLOPs as a multiple of those of forward."""

MOST_WITHOUT_GPU = {"batch": 1, "heads": 4, "seq": 512}
"""To what a preset is cut where there is no GPU, so that it ends within minutes."""


@dataclass(frozen=True)
class Shape:
    """One problem: sizes by the letters of the legend, type and mask.

    Args:
        batch: Sequences (B).
        heads: Query heads (H).
        kv_heads: Key/value heads (G).
        seq: Positions of queries and of keys (T).
        head_dim: Channels per head (D).
        dtype: Type of the numbers.
        causal: Whether each position sees only those before it.
        window: Keys that each query sees; 0 is all.
    """

    batch: int
    heads: int
    kv_heads: int
    seq: int
    head_dim: int
    dtype: torch.dtype
    causal: bool = True
    window: int = 0

    @property
    def forward_flops(self) -> float:
        """FLOPs of the forward pass."""
        pairs = self.seq**2 / 2 if self.causal else self.seq**2
        if 0 < self.window < self.seq:
            pairs = self.seq * self.window - self.window**2 / 2
        return 4 * self.batch * self.heads * self.head_dim * pairs

    @property
    def input_numbers(self) -> int:
        """How many numbers queries, keys, values and the gradient of the output are."""
        return 2 * self.batch * self.seq * (self.heads + self.kv_heads) * self.head_dim


def describe(shape: Shape, kind: str) -> dict[str, Any]:
    """Return ``shape`` and the pass as the first fields of a row."""
    return {
        "seq": shape.seq,
        "batch": shape.batch,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "causal": shape.causal,
        "window": shape.window,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "pass": kind,
    }


class Published(NamedTuple):
    """A time that somebody else has measured, elsewhere: shown beside ours, never mixed with it."""

    name: str
    milliseconds: float
    note: str


RECORDS = {
    Shape(1, 16, 16, 16_384, 64, torch.bfloat16): Published(
        "CS336 record",
        5.364,
        "fastest verified entry of spring 2025, on an H100: github.com/stanford-cs336/assignment2-systems-leaderboard",
    )
}
"""Published times of a forward and a backward pass."""


class Job(NamedTuple):
    """A shape with what is to be timed on it; None leaves that to the settings."""

    shape: Shape
    implementations: tuple[str, ...] | None = None


def jobs_of(asked: AttentionBench, dtype: torch.dtype, device: torch.device, *, is_named: bool = False) -> list[Job]:
    """Return what the settings ask for, in order and without repetitions.

    Args:
        asked: A preset, or a grid.
        dtype: Type of the numbers where ``asked`` names none.
        device: Without a GPU, grids start smaller and presets are cut (see `MOST_WITHOUT_GPU`).
        is_named: Whether somebody chose ``dtype``, which then holds for presets too.
    """
    dtypes = tuple(getattr(torch, name) for name in asked.dtypes) or ((dtype,) if is_named else ())
    if asked.preset == "none":
        return list(_grid(asked, dtypes or (dtype,), device))
    jobs = _PRESETS[asked.preset](dtypes)
    if device.type != "cuda":
        jobs = (job._replace(shape=_cut(job.shape)) for job in jobs)
    return list(dict.fromkeys(jobs))


def _grid(asked: AttentionBench, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Iterator[Job]:
    lengths = asked.seq or ((1_024, 2_048, 4_096, 8_192, 16_384) if device.type == "cuda" else (256, 512, 1_024))
    for dtype, head_dim, batch, heads in product(dtypes, asked.head_dim, asked.batch, asked.heads):
        for kv_heads, seq in product(asked.kv_heads or (heads,), lengths):
            yield Job(Shape(batch, heads, kv_heads, seq, head_dim, dtype, asked.causal, asked.window))


def _cs336(dtypes: tuple[torch.dtype, ...]) -> Iterator[Job]:
    """Both grids of assignment 2: plain attention in batches of 8 single heads, then flash beside it, causal."""
    for dtype, head_dim, seq in product(
        dtypes or (torch.float32,), (16, 32, 64, 128), (256, 1_024, 4_096, 8_192, 16_384)
    ):
        yield Job(Shape(8, 1, 1, seq, head_dim, dtype), ("standard",))
    lengths = [2**power for power in range(7, 17)]
    for dtype, head_dim, seq in product(dtypes or (torch.bfloat16, torch.float32), (16, 32, 64, 128), lengths):
        yield Job(Shape(1, 1, 1, seq, head_dim, dtype), ("flash", "standard"))


def _leaderboard(dtypes: tuple[torch.dtype, ...]) -> Iterator[Job]:
    """The contest of CS336: one layer of a model of width 1,024, causal."""
    for dtype in dtypes or (torch.bfloat16,):
        yield Job(Shape(1, 16, 16, 16_384, 64, dtype))


def _six(dtypes: tuple[torch.dtype, ...]) -> Iterator[Job]:
    """From long to short sequences, with the head dimensions that Hopper's tensor cores are fed with most."""
    sizes = [
        (1, 16, 16_384, 64),
        (8, 16, 2_048, 64),
        (32, 12, 1_024, 64),
        (2, 16, 8_192, 128),
        (1, 16, 16_384, 128),
        (8, 16, 2_048, 128),
    ]
    for dtype, (batch, heads, seq, head_dim) in product(dtypes or (torch.bfloat16,), sizes):
        yield Job(Shape(batch, heads, heads, seq, head_dim, dtype))


def _memory(dtypes: tuple[torch.dtype, ...]) -> Iterator[Job]:
    """Four times the positions are four times the memory, or sixteen times."""
    for dtype, seq in product(dtypes or (torch.bfloat16,), (4_096, 16_384, 65_536)):
        yield Job(Shape(1, 16, 16, seq, 64, dtype))


_PRESETS = {"cs336": _cs336, "leaderboard": _leaderboard, "shapes": _six, "memory": _memory}


def _cut(shape: Shape) -> Shape:
    batch, heads, seq = (min(getattr(shape, name), most) for name, most in MOST_WITHOUT_GPU.items())
    return replace(shape, batch=batch, heads=heads, kv_heads=heads, seq=seq)
