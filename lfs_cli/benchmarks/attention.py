"""Attention backends side by side: forward, backward and both, beside torch's own scaled_dot_product_attention.

FLOPs are those of the two products q k^T and p v, of which a causal mask needs half:

    forward  = 4 B H T^2 D, halved when causal        backward = 2.5 forward (five products instead of two)

The error beside each backend is the largest difference from float64 over the last queries of the first head: of the
output for `forward`, of the queries' gradient for the others.

Source: Dao, "FlashAttention-2", 2023 (arXiv:2307.08691), section 4.1, for the count of FLOPs.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lfs_cli.benchmarks.measure import (
    BENCHMARKS,
    Bench,
    Candidate,
    Measurement,
    Row,
    is_out_of_memory,
    memory_refusal,
)
from lfs_cli.config import AttentionBench, BenchConfig
from lfs_cli.kernels.flash_attention import unavailable_reason
from lfs_cli.model import ATTENTION, Attend

PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""What is timed, with its FLOPs as a multiple of those of forward."""

BASELINE = "torch"
"""Name of torch's own attention among the backends."""

CHECKED_QUERIES = 64
"""Queries whose results are compared with float64; few, because each of them costs S x D."""

_SCORE_TENSORS = {"forward": 3, "backward": 4, "both": 4}
"""Tensors of the size of all scores that a backend which stores them holds at once, rounded up: `standard` was seen to
hold 1.3 and 2.4."""


@BENCHMARKS.register("attention")
def bench_attention(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time every backend at every sequence length."""
    asked = settings.attention
    lengths = asked.seq or ((1_024, 2_048, 4_096, 8_192, 16_384) if bench.device.type == "cuda" else (256, 512, 1_024))
    rows: list[Row] = []
    for length in lengths:
        rows += _bench_length(asked, length, settings.seed, bench)
    return rows


def _bench_length(asked: AttentionBench, length: int, seed: int, bench: Bench) -> list[Row]:
    baseline = BASELINE if BASELINE in asked.backends else asked.backends[0]
    cases: dict[str, _Case] = {}
    try:
        inputs = _Inputs.draw(asked, length, seed, bench)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        refused = Measurement(status="out of memory", note="queries, keys and values alone do not fit")
        measured = {kind: dict.fromkeys(asked.backends, refused) for kind in PASSES}
    else:
        cases = {name: _Case(name, inputs, causal=asked.causal) for name in asked.backends}
        measured = {
            kind: bench.measure(
                f"attention T={length:,} {kind}", [case.candidate(kind, bench) for case in cases.values()]
            )
            for kind in PASSES
        }
    flops = 4 * asked.batch * asked.heads * length**2 * asked.head_dim / (2 if asked.causal else 1)
    rows = []
    for kind, results in measured.items():
        for name, result in results.items():
            work = PASSES[kind] * flops
            rows.append(
                {
                    "seq": length,
                    "batch": asked.batch,
                    "heads": asked.heads,
                    "kv_heads": asked.kv_heads,
                    "head_dim": asked.head_dim,
                    "causal": asked.causal,
                    "dtype": str(bench.dtype).removeprefix("torch."),
                    "pass": kind,
                    "backend": name,
                    "tflops": work / result.timing.median / 1e12 if result.timing else None,
                    "max_error": cases[name].error(kind) if result.timing else None,
                    **result.row(results[baseline], baseline),
                }
            )
    return rows


@dataclass(frozen=True)
class _Inputs:
    """What attention is given, drawn from N(0, 1): (B, T, H, D), and (B, T, G, D) for keys and values."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    output_gradient: Tensor

    @classmethod
    def draw(cls, asked: AttentionBench, length: int, seed: int, bench: Bench) -> "_Inputs":
        """Raises MemoryError where the tensors would not fit in the memory of a CPU, which else swaps or kills."""
        generator = torch.Generator(bench.device).manual_seed(seed)
        numbers = 2 * asked.batch * length * (asked.heads + asked.kv_heads) * asked.head_dim
        refusal = memory_refusal(numbers * bench.dtype.itemsize, bench.device)
        if refusal is not None:
            raise MemoryError(refusal)

        def draw(heads: int) -> Tensor:
            shape = (asked.batch, length, heads, asked.head_dim)
            return torch.randn(shape, generator=generator, device=bench.device, dtype=bench.dtype)

        return cls(
            draw(asked.heads).requires_grad_(),
            draw(asked.kv_heads).requires_grad_(),
            draw(asked.kv_heads).requires_grad_(),
            draw(asked.heads),
        )


@dataclass
class _Case:
    """One backend on its inputs."""

    name: str
    inputs: _Inputs
    causal: bool
    outputs: list[Tensor] = field(default_factory=list)
    checked: dict[str, Tensor] = field(default_factory=dict)

    def candidate(self, kind: str, bench: Bench) -> Candidate:
        q = self.inputs.queries
        B, T, H, D = q.shape
        stores_scores = self.name not in ("flash", BASELINE)
        return Candidate(
            self.name,
            run={"forward": self.forward, "backward": self.backward, "both": self.both}[kind],
            prepare=self.prepare_backward if kind == "backward" else self.outputs.clear,
            needs_bytes=_SCORE_TENSORS[kind] * B * H * T * T * q.element_size() if stores_scores else 0,
            unavailable=unavailable_reason(bench.device.type, bench.dtype, D) if self.name == "flash" else None,
        )

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.attend()

    def prepare_backward(self) -> None:
        self.outputs.clear()
        self.outputs.append(self.attend())

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.outputs.pop(), self._leaves(), self.inputs.output_gradient)

    def both(self) -> tuple[Tensor, ...]:
        output = self.attend()
        gradients = torch.autograd.grad(output, self._leaves(), self.inputs.output_gradient)
        if not self.checked:  # the first run, which is not timed
            self.checked = {"output": _last_queries(output), "gradient": _last_queries(gradients[0])}
        return gradients

    def attend(self) -> Tensor:
        attend: Attend = attend_torch if self.name == BASELINE else ATTENTION.get(self.name)
        return attend(*self._leaves(), causal=self.causal)

    def error(self, kind: str) -> float | None:
        """Return the largest difference from float64, or None where the device has no float64 or nothing was kept."""
        if not self.checked or self.inputs.queries.device.type == "mps":
            return None
        q, k, v = (tensor[:1, :, :1].detach().double() for tensor in self._leaves())
        q = q[:, -CHECKED_QUERIES:].requires_grad_()
        output = ATTENTION.get("reference")(q, k, v, causal=self.causal)
        if kind == "forward":
            return (self.checked["output"] - output).abs().max().item()
        (gradient,) = torch.autograd.grad(output, q, _last_queries(self.inputs.output_gradient))
        return (self.checked["gradient"] - gradient).abs().max().item()

    def _leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs.queries, self.inputs.keys, self.inputs.values


def _last_queries(x_BTHD: Tensor) -> Tensor:
    return x_BTHD[:1, -CHECKED_QUERIES:, :1].detach().double()


def attend_torch(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool = True) -> Tensor:
    """The baseline: torch's scaled_dot_product_attention with whichever kernel torch chooses."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
