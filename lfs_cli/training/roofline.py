"""How long a training step takes on a GPU that need not be here: each operation by what bounds it.

    matrix product     2 M N K FLOPs at a share of the peak that grows with the smallest of M, N and K
    attention          its FLOPs at a share of the peak that grows with the head dimension, and for what the kernels for
                       Hopper GPUs can do with the length too
    anything else      the bytes that it reads and writes, at a share of the bandwidth
    step               the sum of these, or the time in which the host launches as many kernels, whichever is longer;
                       CUDA graphs leave the sum alone

The operations are those of the trace of the real model (`trace.py`), of two models of a few layers and a straight line
through both, as in `memory.py`. Where torch.compile is on, what lies between two products becomes one kernel: it reads
what comes from before and writes what is used later. The optimizer is launched as it is, operation by operation; but
AdamW is one kernel. Muon is counted as the operations that stand in for its kernels: too long by what those save.

Calibrated on one H100 80GB (SXM), 2026-11, torch 2.11: on matrix products of a GPT-2-small step (671 TFLOP/s, smallest
dimension 768, and 798 for 8192), the attention kernels of lfs alone (0.18 and 0.52 ms for 32 x 12 heads of 64 channels
and 1024 positions) and a copy (3.0 TB/s). On one H200: for products of config.json (677 TFLOP/s, smallest dimension
512; the constants are at most 4 % off all three), and for the host, on that config without graphs (14.2 ms a step; 12.2
since, and 11.8 foreseen). Other GPUs are scaled by their data sheets. Compared with whole steps of one H200,
2026-11-30, torch 2.11: gpt2_small.json with 32 sequences took 52.7 ms, and 51.1 are foreseen; config.json 8.1 and 9.1;
speedrun.json 36.6 and 40.8. Elsewhere no step was compared, and the precision is not known.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfs_cli.config import TrainConfig
from lfs_cli.model.device import as_on_gpu
from lfs_cli.optimizers import AdamW, Optimizer, build_optimizers, clip_scale, step_scaled
from lfs_cli.training.gpus import GPU
from lfs_cli.training.graphs import choose_graphs
from lfs_cli.training.memory import along_layers, resolved_for
from lfs_cli.training.trace import fake_model, no_tokens, run_pass

PRODUCT_SHARE, HALF_SPEED = 0.80, 110
"""A product whose smallest dimension is d runs at PRODUCT_SHARE d / (d + HALF_SPEED) of the peak."""

ATTENTION_SHARE, ATTENTION_DIM = 0.40, 213
"""Attention over heads of d channels runs at d / ATTENTION_DIM of the peak, but at most at ATTENTION_SHARE."""

HOPPER_SHARE, HOPPER_DIM, HOPPER_LENGTH = 0.8, 25, 800
"""On Hopper GPUs attention of T positions runs at HOPPER_SHARE d / (d + HOPPER_DIM) T / (T + HOPPER_LENGTH) of the peak
where that is more: within 5 % of what `lfs bench attention --preset shapes` measured on one H200, 2026-11-29."""

BANDWIDTH_SHARE = 0.9
"""Of the bandwidth on the data sheet, what a copy reaches."""

KERNEL_SECONDS = 3e-6
"""Least time of a kernel."""

LAUNCH_SECONDS = 125e-6
"""What the host takes for all that is counted as one kernel here, Python included, outside of a CUDA graph."""

LIST_KERNEL = 48
"""Tensors that one kernel takes of an operation on lists."""


@dataclass
class _Kernel:
    """An operation as a device sees it.

    Args:
        seconds: Of one that computes; 0 for one that only moves data.
        reads: Bytes by the number of the storage.
        writes: The same.
        count: Kernels that it takes.
    """

    seconds: float = 0.0
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    count: int = 1

    def busy(self, gpu: GPU) -> float:
        moved = sum(self.reads.values()) + sum(self.writes.values())
        return max(self.seconds, moved / (BANDWIDTH_SHARE * gpu.bandwidth), KERNEL_SECONDS * self.count)


def step_seconds(config: TrainConfig, gpu: GPU, dtype: torch.dtype, *, is_compiled: bool) -> float:
    """Return the seconds of one step of ``config`` on ``gpu``, as an estimate.

    Args:
        config: The run.
        gpu: Where.
        dtype: Of the matrix products: bfloat16, as the peak rates are of that.
        is_compiled: Whether torch.compile fuses what lies between the products.
    """
    model, rows = resolved_for(config.model, "cuda"), config.passes_size

    def one_pass(layers: int) -> tuple[float, float]:
        part = model.model_copy(update={"layers": layers})
        with as_on_gpu(is_compiled=is_compiled, is_hopper=is_hopper(gpu)), fake_model(part) as transformer:
            tokens_BT = no_tokens(transformer, rows)
            run_pass(transformer, tokens_BT, dtype)  # from the second pass on, gradients are added to
            kernels = _kernels_of(lambda: run_pass(transformer, tokens_BT, dtype), gpu, is_fused=is_compiled)
        return _times(kernels, gpu)

    busy, launching = along_layers(one_pass, model.layers)
    passes = config.batch_size // rows
    is_replayed, _ = choose_graphs(config, torch.device("cuda"), rows)
    return passes * (busy if is_replayed else max(busy, launching)) + max(_update_times(config, gpu))


def _update_times(config: TrainConfig, gpu: GPU) -> tuple[float, float]:
    """Return the seconds in which a GPU clips and updates, and in which the host launches that."""
    with as_on_gpu(is_compiled=False), fake_model(config.model) as model:
        optimizers = build_optimizers(model, config.optimizer)
        weights = list(model.parameters())
        for weight in weights:
            weight.grad = torch.empty(weight.shape)

        traced = [optimizer for optimizer in optimizers if type(optimizer) is not AdamW]

        def update() -> None:
            _, scale = clip_scale(weights, 1.0)
            step_scaled(traced, scale)

        update()  # which makes what they remember
        fused = [_adamw_kernel(optimizer) for optimizer in optimizers if type(optimizer) is AdamW]
        return _times(_kernels_of(update, gpu, is_fused=False) + fused, gpu)


def _adamw_kernel(optimizer: Optimizer) -> _Kernel:
    """Return AdamW's step: it reads weights, gradients and two means, and writes all but the gradients."""
    tensors = [weight for group in optimizer.param_groups for weight in group["params"]]
    bytes_each = 4 * sum(weight.numel() for weight in tensors)
    return _Kernel(reads={0: 4 * bytes_each}, writes={0: 3 * bytes_each}, count=2)  # one copies addresses


def _times(kernels: list[_Kernel], gpu: GPU) -> tuple[float, float]:
    busy = sum(kernel.busy(gpu) for kernel in kernels)
    return busy, LAUNCH_SECONDS * sum(kernel.count for kernel in kernels)


def _kernels_of(function: Callable[[], Any], gpu: GPU, *, is_fused: bool) -> list[_Kernel]:
    """Return what ``function`` asks a GPU to do. With ``is_fused``, what lies between two products is one kernel."""
    trace = _Trace(gpu)
    with trace:
        function()
    return trace.fused() if is_fused else trace.kernels


class _Trace(TorchDispatchMode):
    """Notes every operation that computes or moves data, and which storages it reads and writes."""

    def __init__(self, gpu: GPU) -> None:
        super().__init__()
        self.kernels: list[_Kernel] = []
        self._gpu = gpu
        self._numbers: dict[StorageWeakRef, int] = {}
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        reads = self._sizes(given)
        result = func(*args, **kwargs)
        changed = [
            x
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(value)
            if isinstance(x, Tensor)
        ]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        writes = {n: size for n, size in self._sizes(made).items() if n not in reads} | self._sizes(changed)
        if writes:  # else it is a view, or no tensor at all
            count = ceil(len(made or changed) / LIST_KERNEL) if "_foreach" in str(func) else 1
            self.kernels.append(_Kernel(_seconds(func, args, result, self._gpu), reads, writes, count))
        return result

    def fused(self) -> list[_Kernel]:
        """Return the kernels, with those between two that compute made one."""
        groups: list[list[_Kernel]] = []
        for kernel in self.kernels:
            if kernel.seconds or not groups or groups[-1][0].seconds:
                groups.append([])
            groups[-1].append(kernel)
        used_last = {n: index for index, group in enumerate(groups) for kernel in group for n in kernel.reads}
        alive = {number for storage, number in self._numbers.items() if not storage.expired()}
        return [
            _fuse(group, alive | {n for n, last in used_last.items() if last > index})
            for index, group in enumerate(groups)
        ]

    def _sizes(self, tensors: list[Tensor]) -> dict[int, int]:
        """Return the bytes that are touched of each storage, by its number."""
        sizes: dict[int, int] = {}
        for x in tensors:
            storage = StorageWeakRef(x.untyped_storage())
            if storage not in self._numbers or storage.expired():
                self._numbers[storage] = self._made = self._made + 1
            number = self._numbers[storage]
            sizes[number] = max(sizes.get(number, 0), min(x.numel() * x.element_size(), x.untyped_storage().nbytes()))
        return sizes


def _fuse(group: list[_Kernel], needed: set[int]) -> _Kernel:
    """Return one kernel for several, which reads what they did not make themselves, and writes what is ``needed``."""
    made: set[int] = set()
    whole = _Kernel(group[0].seconds)
    for kernel in group:
        for number, size in kernel.reads.items():
            if number not in made:
                whole.reads[number] = max(size, whole.reads.get(number, 0))
        made |= kernel.writes.keys()
        whole.writes |= {number: size for number, size in kernel.writes.items() if number in needed}
    return whole


def _seconds(func: Any, args: Any, result: Any, gpu: GPU) -> float:
    """Return the seconds for which ``func`` computes; 0 where what it moves decides."""
    name = func._schema.name
    if name in ("aten::mm", "aten::bmm", "aten::baddbmm"):
        left, right = (args[0], args[1]) if name != "aten::baddbmm" else (args[1], args[2])
        *stack, M, K = left.shape
        return _product_seconds(prod(stack), M, K, right.shape[-1], gpu)
    if name == "lfs::weight_gradient":
        (R, N), C = args[0].shape, args[1].shape[1]
        return _product_seconds(1, N, R, C, gpu)
    if name in ("lfs::gated_product", "lfs::turned_product"):
        (R, C), N = args[0].shape, len(args[1])
        return _product_seconds(1, R, C, N, gpu)
    if name == "lfs::gated_product_backward":
        (R, C), F = args[0].shape, args[1].shape[1]
        return _product_seconds(1, R, C, F, gpu)
    if name == "lfs::linear_cross_entropy":
        (R, C), V = args[0].shape, args[1].shape[0]
        # Logits are written, read twice and written, and read by two products
        logits = 6 * 2 * R * V / (BANDWIDTH_SHARE * gpu.bandwidth)
        return 3 * _product_seconds(1, R, C, V, gpu) + logits
    if name.startswith(("lfs::flash_attention", "lfs::short_attention")) or name == "lfs::rotary_attention_backward":
        is_backward = name.endswith("backward")
        B, T, H, D = (args[0] if is_backward else result[0]).shape
        is_short = name.startswith("lfs::short_attention")  # which has no such options
        documents, window, softcap = (None,) * 3 if is_short else (args[-7], *args[-4:-2])
        seen = min(window or T, T)
        pairs = B * H * T * (seen - seen**2 / (2 * T))
        is_plain = documents is None and window is None and softcap is None
        share = attention_share(T, D, is_plain and is_hopper(gpu))
        return (10 if is_backward else 4) * pairs * D / (share * gpu.flops)
    return 0.0


def is_hopper(gpu: GPU) -> bool:
    """Return whether a GPU runs the kernels for the Hopper generation."""
    return gpu.name.startswith(("H100", "H200"))


def attention_share(T: int, D: int, by_hopper: bool) -> float:
    """Return the share of the peak at which attention of T positions and heads of D channels runs, in any pass."""
    share = min(ATTENTION_SHARE, D / ATTENTION_DIM)
    if by_hopper and D in (64, 128):  # the only ones they take
        share = max(share, HOPPER_SHARE * D / (D + HOPPER_DIM) * T / (T + HOPPER_LENGTH))
    return share


def _product_seconds(stack: int, M: int, K: int, N: int, gpu: GPU) -> float:
    smallest = min(M, K, N)
    return 2 * stack * M * N * K / (PRODUCT_SHARE * smallest / (smallest + HALF_SPEED) * gpu.flops)
