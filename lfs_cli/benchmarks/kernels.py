"""Our fused kernels beside the same mathematics in eager PyTorch and under torch.compile.

    forward      with nothing kept for a backward pass
    backward     from an output that was kept
    both         one after the other, as in training
    step         of an optimizer

Most of them move bytes rather than multiply, so next to the time stand the GB/s of the fewest bytes that any
implementation must move, each input read once and each output written once, and the share of the rate that a large copy
reaches in the same run. The head with its loss and attention are arithmetic: they have TFLOP/s instead. The error is
that of outputs and gradients against float64, at no more than `JUDGED_ROWS` rows.

Attention that turns its queries and keys itself, or has the product before it turn them, has a plain version that turns
them in PyTorch and then calls our `flash_attention`, eager and compiled. So its ratio tells what fusing them saves;
whether the attention in it is fast is for `lfs bench attention` to say.

Without a GPU the kernels cannot run: then ours is the same steps in PyTorch, and a note says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lfs_cli.benchmarks.measure import BENCHMARKS, Bench, Candidate, Row, describe_failure
from lfs_cli.benchmarks.optimizer import weight_shapes
from lfs_cli.config import BenchConfig, KernelsBench
from lfs_cli.kernels import product
from lfs_cli.kernels.adamw import AdamWTensors
from lfs_cli.kernels.clip import length_and_factor, reference_length_and_factor
from lfs_cli.kernels.embedding import look_up, reference_look_up
from lfs_cli.kernels.flash_attention import flash_attention, unpacked
from lfs_cli.kernels.linear_cross_entropy import linear_cross_entropy
from lfs_cli.kernels.operation import unavailable_reason
from lfs_cli.kernels.reference_attention import reference_attention
from lfs_cli.kernels.rms_norm import add_rms_norm, reference_rms_norm, rms_norm
from lfs_cli.kernels.rope import qk_norm_rope, reference_qk_norm_rope
from lfs_cli.kernels.rotary_attention import project_and_attend, rotary_attention
from lfs_cli.kernels.self_check import relative_errors
from lfs_cli.kernels.swiglu import reference_activation, relu2, silu, swiglu
from lfs_cli.model.rope import RotaryEmbedding

HEAD_DIM = 64
JUDGED_ROWS = 512
SOFTCAP = 15.0
"""Of logits: that of configs/speedrun.json."""

Z_LOSS = 1e-4
"""That of PaLM (arXiv:2204.02311, section 5)."""

SAME_ATTENTION = "the baseline turns heads in PyTorch, then calls our flash_attention: the ratio is what fusing saves"
COPY_BYTES = {"cuda": 2**30, "cpu": 2**24}
"""Bytes of the tensor whose copy gives the memory bandwidth: far more than any cache, except on a CPU."""


@dataclass
class Case:
    """One operation on one shape.

    Args:
        ours: Called with ``inputs``; returns a tensor or several.
        plain: The same in plain PyTorch.
        inputs: Those that are differentiated.
        numbers: Numbers that forward and backward must move at least, all of the type that is measured.
        products: FLOPs of the matrix products of forward and backward.
        computes_early: Whether ours computes the gradients on the way forward, so that backward alone says nothing.
        plain_note: What a reader must know of ``plain``.
    """

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Sequence[Tensor]
    numbers: tuple[int, int] = (0, 0)
    products: tuple[int, int] = (0, 0)
    computes_early: bool = False
    plain_note: str = ""


Build = Callable[[KernelsBench, int, Callable[..., Tensor]], Case]
"""From the settings, a number of rows and a source of random tensors."""


def _norm(asked: KernelsBench, rows: int, randn: Callable[..., Tensor]) -> Case:
    size = rows * asked.width
    return Case(rms_norm, reference_rms_norm, [randn(rows, asked.width), randn(asked.width)], (2 * size, 3 * size))


def _add_norm(asked: KernelsBench, rows: int, randn: Callable[..., Tensor]) -> Case:
    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return reference_rms_norm(h, weight), h

    size = rows * asked.width
    inputs = [randn(rows, asked.width), randn(rows, asked.width), randn(asked.width)]
    return Case(add_rms_norm, plain, inputs, (4 * size, 4 * size))


def _embedding(asked: KernelsBench, rows: int, randn: Callable[..., Tensor]) -> Case:
    size, dtype = rows * asked.width, randn(1).dtype
    table = randn(asked.vocab_size, asked.width).detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    ranks = torch.arange(rows, 0, -1, device=table.device)
    tokens = (asked.vocab_size / ranks**0.8).long() * 7_919 % asked.vocab_size  # as in a text, few are most of them

    def ours(table: Tensor) -> Tensor:
        return look_up(tokens, [table], [dtype])[0]

    def plain(table: Tensor) -> Tensor:
        return reference_look_up(tokens, table, table.dtype if table.dtype == torch.float64 else dtype)

    item = dtype.itemsize
    moved = (size * (4 + item), size * item + 4 * table.numel())
    return Case(ours, plain, [table], (moved[0] // item, moved[1] // item))


def _lengths(rows: int) -> tuple[int, int]:
    """Return sequences and positions of each."""
    length = min(rows, 1_024)
    return rows // length, length


def _angles(length: int, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what gives cos and sin, (T, D / 2), in the type that belongs to a tensor."""
    rope = RotaryEmbedding(10_000.0, HEAD_DIM, length)
    cos, sin = (table.to(device) for table in (rope.cos, rope.sin))  # once: a copy is not what is timed

    def angles(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return cos.to(wide), sin.to(wide)

    return angles


def _rope(asked: KernelsBench, rows: int, randn: Callable[..., Tensor], *, norm: bool = False) -> Case:
    B, T = _lengths(rows)
    q, k = (randn(B, T, asked.width // HEAD_DIM, HEAD_DIM) for _ in range(2))
    angles = _angles(T, q.device)

    def call(function: Callable[..., Any], q: Tensor, k: Tensor, *weights: Tensor) -> Any:
        return function(q, k, *angles(q), *weights)

    weights = [randn(HEAD_DIM), randn(HEAD_DIM)] if norm else []
    size = q.numel() + k.numel()
    return Case(
        lambda *inputs: call(qk_norm_rope, *inputs),
        lambda *inputs: call(reference_qk_norm_rope, *inputs),
        [q, k, *weights],
        (2 * size, 3 * size if norm else 2 * size),
    )


def _rotary_attention(asked: KernelsBench, rows: int, randn: Callable[..., Tensor], *, norm: bool = False) -> Case:
    (B, T), H = _lengths(rows), asked.width // HEAD_DIM
    qkv_BTC = randn(B, T, 3 * H * HEAD_DIM)
    angles = _angles(T, qkv_BTC.device)

    def ours(qkv_BTC: Tensor, *weights: Tensor) -> Tensor:
        return rotary_attention(qkv_BTC, *angles(qkv_BTC), *weights, heads=H, kv_heads=H)

    def plain(qkv_BTC: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None) -> Tensor:
        q, k, v = unpacked(qkv_BTC.unflatten(2, (3 * H, HEAD_DIM)), H)
        # In float64 this is the judge, and by definition
        attend = reference_attention if qkv_BTC.dtype == torch.float64 else flash_attention
        return attend(*reference_qk_norm_rope(q, k, *angles(qkv_BTC), q_weight, k_weight), v)

    weights = [randn(HEAD_DIM), randn(HEAD_DIM)] if norm else []
    flops = 2 * B * H * T**2 * HEAD_DIM  # causal: half of both products, counted as in `attention_shapes.py`
    return Case(ours, plain, [qkv_BTC, *weights], products=(flops, 5 * flops // 2), plain_note=SAME_ATTENTION)


def _project_and_attend(asked: KernelsBench, rows: int, randn: Callable[..., Tensor]) -> Case:
    (B, T), H, C = _lengths(rows), asked.width // HEAD_DIM, asked.width
    angles = _angles(T, randn(1).device)

    def ours(x_BTC: Tensor, *weights: Tensor) -> Tensor:
        if product.unavailable_reason(x_BTC.device, x_BTC.dtype, C, 3 * C):  # what a layer does there
            return rotary_attention(x_BTC @ torch.cat(weights).T, *angles(x_BTC), heads=H, kv_heads=H)
        return project_and_attend(x_BTC, weights, None, *angles(x_BTC), heads=H)

    def plain(x_BTC: Tensor, *weights: Tensor) -> Tensor:
        q, k, v = (x_BTC @ torch.cat(weights).T).unflatten(2, (3, H, HEAD_DIM)).unbind(2)
        attend = reference_attention if x_BTC.dtype == torch.float64 else flash_attention
        return attend(*reference_qk_norm_rope(q, k, *angles(x_BTC)), v)

    weights = [_matrix(randn, H * HEAD_DIM, C) for _ in range(3)]
    projection, attention = 2 * rows * C * 3 * H * HEAD_DIM, 2 * B * H * T**2 * HEAD_DIM
    flops = projection + attention, 2 * projection + 5 * attention // 2
    return Case(ours, plain, [randn(B, T, C), *weights], products=flops, plain_note=SAME_ATTENTION)


def _gated_layer(asked: KernelsBench, rows: int, randn: Callable[..., Tensor]) -> Case:
    C, F = asked.width, _gates(asked.width)

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return reference_activation("swiglu", x @ torch.cat((gate, up)).T) @ down.T

    flops = 6 * rows * C * F
    weights = [_matrix(randn, *shape) for shape in ((F, C), (F, C), (C, F))]
    return Case(product.gated_layer, plain, [randn(rows, C), *weights], products=(flops, 2 * flops))


def _matrix(randn: Callable[..., Tensor], rows: int, columns: int) -> Tensor:
    """Return a matrix that keeps the size of what it multiplies."""
    return (randn(rows, columns) / columns**0.5).detach().requires_grad_()


def _gates(width: int) -> int:
    """Return the gates of a layer of so many channels."""
    return (8 * width // 3 // 64 or 1) * 64


def _activation(asked: KernelsBench, rows: int, randn: Callable[..., Tensor], *, kind: str) -> Case:
    width = _gates(asked.width) if kind == "swiglu" else 4 * asked.width
    inputs = 2 if kind == "swiglu" else 1
    return Case(
        {"swiglu": swiglu, "silu": silu, "relu2": relu2}[kind],
        lambda x: reference_activation(kind, x),
        [randn(rows, inputs * width)],
        ((inputs + 1) * rows * width, (2 * inputs + 1) * rows * width),
    )


def _loss(
    asked: KernelsBench, rows: int, randn: Callable[..., Tensor], *, softcap: float | None = None, z_loss: float = 0.0
) -> Case:
    hidden = randn(rows, asked.width)
    targets = torch.arange(rows, device=hidden.device) * 7_919 % asked.vocab_size

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        z = hidden @ weight.T  # in the type of the inputs, as ours multiplies
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        s = z.logsumexp(-1)
        losses = s - z.gather(-1, targets[:, None])[:, 0]
        return (losses + z_loss * s.square() if z_loss else losses).mean()

    flops = 2 * rows * asked.vocab_size * asked.width
    return Case(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, softcap=softcap, z_loss=z_loss),
        plain,
        [hidden, _matrix(randn, asked.vocab_size, asked.width)],
        products=(flops, 2 * flops),
        computes_early=True,
    )


KERNELS: dict[str, Build] = {
    "linear_cross_entropy": _loss,
    "linear_cross_entropy_softcap": partial(_loss, softcap=SOFTCAP),
    "linear_cross_entropy_z_loss": partial(_loss, z_loss=Z_LOSS),
    "embedding": _embedding,
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "rope": _rope,
    "qk_norm_rope": partial(_rope, norm=True),
    "rotary_attention": _rotary_attention,
    "qk_norm_rotary_attention": partial(_rotary_attention, norm=True),
    "project_and_attend": _project_and_attend,
    "gated_layer": _gated_layer,
    "swiglu": partial(_activation, kind="swiglu"),
    "silu": partial(_activation, kind="silu"),
    "relu2": partial(_activation, kind="relu2"),
}
"""What is differentiated; `adamw` and `clip` are measured besides."""


@BENCHMARKS.register("kernels")
def bench_kernels(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time every kernel, forward and backward, beside eager PyTorch and torch.compile; Muon's are in `optimizer`."""
    asked, on_gpu = settings.kernels, bench.device.type == "cuda"
    rows = asked.rows or (32_768 if on_gpu else 256)
    if not on_gpu:
        asked = asked.model_copy(update={"vocab_size": min(asked.vocab_size, 4_096)})
    reason = unavailable_reason(bench.device.type, bench.dtype)
    if reason is not None:
        bench.on_note(f"no kernel runs here: {reason}; `lfs` is the same steps in PyTorch")
    names = asked.names or (*KERNELS, "adamw", "clip")
    apart = product.unavailable_reason(bench.device, bench.dtype, asked.width, 3 * asked.width)
    if reason is None and apart is not None and not {"gated_layer", "project_and_attend"}.isdisjoint(names):
        bench.on_note(f"gated_layer and project_and_attend are separate operations here: {apart}")
    compiles = on_gpu if asked.compile == "auto" else asked.compile
    bandwidth = _bandwidth(bench)
    found: list[Row] = []
    for name in names:
        if name == "adamw":
            shown = _bench_adamw(asked, settings.seed, bench)
        elif name == "clip":
            shown = _bench_clip(asked, settings.seed, bench, compiles=compiles)
        else:
            shown = _bench_case(name, asked, rows, settings.seed, bench, compiles=compiles)
        for row in shown:
            rate = row["gigabytes_per_second"]
            row |= {
                "copy_gigabytes_per_second": bandwidth / 1e9 if bandwidth else None,
                "bandwidth_share": rate * 1e9 / bandwidth if rate and bandwidth else None,
                "dtype": str(bench.dtype).removeprefix("torch."),
            }
            found.append(row)
    return found


def _bench_case(name: str, asked: KernelsBench, rows: int, seed: int, bench: Bench, *, compiles: bool) -> list[Row]:
    errors = _errors(KERNELS[name](asked, min(rows, JUDGED_ROWS), _source(seed, bench)))
    case = KERNELS[name](asked, rows, _source(seed, bench))
    functions = {"eager": case.plain, "lfs": case.ours}
    if compiles:
        torch._dynamo.reset()  # kernels differ in what they are compiled for, and the compiler gives up after a few
        functions["compiled"] = torch.compile(case.plain, dynamic=False)
    table = []
    for kind in asked.passes:
        if kind == "backward" and case.computes_early:
            continue
        runs = {label: _Run(function, case.inputs) for label, function in functions.items()}
        results = bench.measure(
            f"{name} {kind}",
            [
                Candidate(label, getattr(run, kind), run.keep if kind == "backward" else run.forget, may_fail=True)
                for label, run in runs.items()
            ],
        )
        baseline = "compiled" if compiles and results["compiled"].timing else "eager"
        share = {"forward": (1, 0), "backward": (0, 1), "both": (1, 1)}[kind]
        moved = bench.dtype.itemsize * sum(a * b for a, b in zip(share, case.numbers, strict=True))
        flops = sum(a * b for a, b in zip(share, case.products, strict=True))
        for label, result in results.items():
            seconds = result.timing.median if result.timing else None
            if label != "lfs" and result.status == "ok":
                result = replace(result, note=case.plain_note)
            table.append(
                {
                    "kernel": name,
                    "rows": rows,
                    "width": asked.width,
                    "pass": kind,
                    "implementation": label,
                    "gigabytes_per_second": moved / seconds / 1e9 if seconds and moved else None,
                    "tflops": flops / seconds / 1e12 if seconds and flops else None,
                    "error": errors if label == "lfs" and result.timing else None,
                    **result.row(results[baseline], baseline),
                }
            )
    return table


@dataclass
class _Run:
    """A function, run forward, backward, or both."""

    function: Callable[..., Any]
    inputs: Sequence[Tensor]
    kept: list[list[Tensor]] = field(default_factory=list)
    upstream: list[Tensor] = field(default_factory=list)

    def _outputs(self) -> list[Tensor]:
        found = self.function(*self.inputs)
        return [found] if isinstance(found, Tensor) else list(found)

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return self._outputs()

    def forget(self) -> None:
        self.kept.clear()

    def keep(self) -> None:
        self.forget()
        self.kept.append(self._outputs())
        if not self.upstream:
            self.upstream = [torch.randn_like(x) for x in self.kept[0]]

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.kept.pop(), self.inputs, self.upstream)

    def both(self) -> tuple[Tensor, ...]:
        outputs = self._outputs()
        if not self.upstream:
            self.upstream = [torch.randn_like(x) for x in outputs]
        return torch.autograd.grad(outputs, self.inputs, self.upstream)


def _errors(case: Case) -> float | None:
    """Return the largest error of our outputs and gradients, relative to the size of each, or None where it failed."""
    exact = [x.detach().double().requires_grad_() for x in case.inputs]
    try:
        ours, right = _Run(case.ours, case.inputs), _Run(case.plain, exact)
        ours.keep()
        ours.upstream = [torch.ones_like(x) if x.ndim == 0 else x for x in ours.upstream]
        right.upstream = [x.double() for x in ours.upstream]
        right.kept.append(right._outputs())
        pairs = list(zip(ours.kept[0] + list(ours.backward()), right.kept[0] + list(right.backward()), strict=True))
    except RuntimeError as error:
        describe_failure(error)  # keeps the traceback in the log
        return None
    return max(float((mine.double() - exactly).detach().norm() / exactly.detach().norm()) for mine, exactly in pairs)


def _bench_adamw(asked: KernelsBench, seed: int, bench: Bench) -> list[Row]:
    count = asked.weights or (124_000_000 if bench.device.type == "cuda" else 1_000_000)
    randn = _source(seed, replace(bench, dtype=torch.float32))
    weights, gradients = ([randn(*shape).detach() for shape in weight_shapes(count)] for _ in range(2))
    zeros = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    ours = AdamWTensors([weight.clone() for weight in weights], *zeros)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    theirs, exact = {}, [weight.double().requires_grad_() for weight in weights[-1:]]
    for label, options in (("foreach", {"foreach": True}), ("fused", {"fused": True})):
        own = [weight.clone().requires_grad_() for weight in weights]
        for weight, gradient in zip(own, gradients, strict=True):
            weight.grad = gradient
        theirs[f"torch {label}"] = torch.optim.AdamW(own, **settings, **options).step
    exact[0].grad = gradients[-1].double()
    torch.optim.AdamW(exact, **settings).step()
    ours.step(gradients, 1, **settings)
    moved = (ours.weights[-1].double() - weights[-1].double()) - (exact[0].detach() - weights[-1].double())
    error = float(moved.norm() / exact[0].detach().norm())
    results = bench.measure(
        f"adamw, {count:,} weights",
        [
            *(Candidate(label, step, may_fail=True) for label, step in theirs.items()),
            Candidate("lfs", lambda: ours.step(gradients, 2, **settings)),
        ],
    )
    baseline = "torch fused" if results["torch fused"].timing else "torch foreach"
    return [
        {
            "kernel": "adamw",
            "rows": count,
            "width": 1,
            "pass": "step",
            "implementation": label,
            "gigabytes_per_second": 28 * count / result.timing.median / 1e9 if result.timing else None,
            "tflops": None,
            "error": error if label == "lfs" else None,
            **result.row(results[baseline], baseline),
        }
        for label, result in results.items()
    ]


def _bench_clip(asked: KernelsBench, seed: int, bench: Bench, *, compiles: bool) -> list[Row]:
    count = asked.weights or (124_000_000 if bench.device.type == "cuda" else 1_000_000)
    randn = _source(seed, replace(bench, dtype=torch.float32))
    gradients = [randn(*shape).detach() for shape in weight_shapes(count)]
    functions = {"eager": reference_length_and_factor, "lfs": length_and_factor}
    if compiles:
        torch._dynamo.reset()
        functions["compiled"] = torch.compile(reference_length_and_factor, dynamic=False)
    exact = reference_length_and_factor([x.double() for x in gradients], 1.0)
    errors = relative_errors(length_and_factor(gradients, 1.0), exact)
    results = bench.measure(
        f"clip, {count:,} weights",
        [Candidate(label, partial(run, gradients, 1.0), may_fail=True) for label, run in functions.items()],
    )
    baseline = "compiled" if compiles and results["compiled"].timing else "eager"
    return [
        {
            "kernel": "clip",
            "rows": count,
            "width": 1,
            "pass": "forward",
            "implementation": label,
            "gigabytes_per_second": 4 * count / result.timing.median / 1e9 if result.timing else None,
            "tflops": None,
            "error": max(errors) if label == "lfs" else None,
            **result.row(results[baseline], baseline),
        }
        for label, result in results.items()
    ]


def _bandwidth(bench: Bench) -> float | None:
    """Return the bytes per second that a large copy reads and writes here."""
    size = COPY_BYTES.get(bench.device.type, COPY_BYTES["cpu"])
    source, target = (torch.ones(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    timing = bench.measure("copy", [Candidate("copy", lambda: target.copy_(source))])["copy"].timing
    return 2 * size / timing.median if timing else None


def _source(seed: int, bench: Bench) -> Callable[..., Tensor]:
    """Return a function that draws tensors of a shape, which ask for gradients."""
    generator = torch.Generator(bench.device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=bench.device, dtype=bench.dtype)
        return drawn.requires_grad_()

    return randn
