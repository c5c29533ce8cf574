"""Who takes part in `lfs bench attention`: our backends, and attention in torch and in the flash-attn packages.

An entry is a function of a problem and a device. It returns how to compute it there, or raises `UnavailableError` that
says why not. Each gets its inputs in the memory layout it was made for: ours and flash-attn's (B, T, H, D), torch's
(B, H, T, D), all contiguous. A backend that is registered in `model.ATTENTION` elsewhere, such as by a plugin, takes
part under its name without an entry here.

    flash          the best kernel of ours for the problem; the column `kernel` says which, and why
    triton         ours in Triton, for all GPUs since Ampere            hopper    ours in Gluon, for Hopper
    standard       ours, textbook, all scores in memory                 tiled     ours, the same tiles in plain PyTorch
    torch          torch's scaled_dot_product_attention, free to choose
    torch-flash, torch-cudnn, torch-efficient, torch-math               the same, held to one of its kernels
    flex           torch's FlexAttention, compiled: half a minute for each problem
    flash-attn-3, flash-attn-4                                          packages of the FlashAttention authors
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lfs_cli.benchmarks.attention_shapes import Shape
from lfs_cli.errors import LfsError
from lfs_cli.kernels.compatibility import INTERPRETED
from lfs_cli.kernels.tiled_attention import tiled_attention
from lfs_cli.model import ATTENTION
from lfs_cli.model.attention import resolve_attention
from lfs_cli.registry import Registry

FASTEST = ("flash", "triton", "standard", "torch-flash", "torch-cudnn", "flash-attn-4")
"""What is timed on a GPU when nothing is asked for."""

EVERYWHERE = ("flash", "standard", "tiled", "torch")
"""The same elsewhere."""


class UnavailableError(Exception):
    """An implementation cannot compute the problem on this device; the message says why."""


@dataclass(frozen=True)
class Ready:
    """An implementation that was prepared for one problem.

    Args:
        attend: Function of queries, keys and values in ``layout`` that returns the output in the same.
        kernel: What runs, and why it was chosen.
        layout: Order of the dimensions.
        stores_scores: Whether it holds all B x H x T x T scores.
        is_ours: Whether it is of lfs, and so no baseline.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    kernel: str
    layout: Literal["BTHD", "BHTD"] = "BTHD"
    stores_scores: bool = False
    is_ours: bool = False


class Prepare(Protocol):
    """Gets an implementation ready for a problem."""

    def __call__(self, shape: Shape, device: torch.device) -> Ready:
        """Return how to compute it. Raises UnavailableError."""
        ...


IMPLEMENTATIONS: Registry[Prepare] = Registry("implementation of attention", room="lfs_cli.benchmarks")


def prepare(name: str, shape: Shape, device: torch.device) -> Ready:
    """Return the implementation called ``name``, ready for ``shape``.

    Raises:
        UnavailableError: When it cannot compute that here.
    """
    if name in IMPLEMENTATIONS.names():
        return IMPLEMENTATIONS.get(name)(shape, device)
    return _ours(name, shape, device)


@IMPLEMENTATIONS.register("flash")
def prepare_flash(shape: Shape, device: torch.device) -> Ready:
    """The best kernel of ours."""
    return _ours("flash", shape, device)


@IMPLEMENTATIONS.register("triton")
def prepare_triton(shape: Shape, device: torch.device) -> Ready:
    """Our portable kernel."""
    return _ours("triton", shape, device)


@IMPLEMENTATIONS.register("hopper")
def prepare_hopper(shape: Shape, device: torch.device) -> Ready:
    """Our kernel for Hopper."""
    return _ours("hopper", shape, device)


@IMPLEMENTATIONS.register("standard")
def prepare_standard(shape: Shape, device: torch.device) -> Ready:
    """Our attention that stores the scores."""
    return _ours("standard", shape, device)


@IMPLEMENTATIONS.register("tiled")
def prepare_tiled(shape: Shape, device: torch.device) -> Ready:
    """Our readable FlashAttention-2."""
    _refuse_window(shape)
    return Ready(
        lambda q, k, v: tiled_attention(q, k, v, causal=shape.causal),
        "plain PyTorch, tile by tile, in float32: chosen by name",
        is_ours=True,
    )


def _ours(name: str, shape: Shape, device: torch.device) -> Ready:
    """Prepare what is registered in `ATTENTION`: the judge of whether it can run here is `resolve_attention`."""
    if name not in ATTENTION.names():
        raise UnavailableError(f"this version of lfs has no attention backend `{name}`")
    try:
        sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "length": shape.seq}
        chosen, why = resolve_attention(name, device.type, shape.dtype, shape.head_dim, **sizes)
    except LfsError as error:
        raise UnavailableError(str(error)) from None
    attend: Callable[..., Tensor] = ATTENTION.get(name)
    options: dict[str, Any] = {"causal": shape.causal}
    if shape.window:
        if "window" not in inspect.signature(attend).parameters:
            raise UnavailableError("it has no sliding window")
        options["window"] = shape.window
    interpreted = INTERPRETED and chosen not in ("standard", "reference")
    return Ready(
        lambda q, k, v: attend(q, k, v, **options),
        f"{chosen}: {why}" + (", interpreted on the CPU: no measure of speed" if interpreted else ""),
        stores_scores=chosen in ("standard", "reference"),
        is_ours=True,
    )


@IMPLEMENTATIONS.register("torch")
def prepare_torch(shape: Shape, device: torch.device) -> Ready:
    """Torch's attention with whichever kernel it chooses."""
    _refuse_window(shape)
    shared = shape.kv_heads != shape.heads
    choice = _choice_of_torch(shape, device)
    return Ready(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=shared),
        f"{choice.name.lower().replace('_', ' ') if choice else 'a kernel'}: chosen by torch",
        layout="BHTD",
        stores_scores=choice == SDPBackend.MATH,
    )


def _choice_of_torch(shape: Shape, device: torch.device) -> SDPBackend | None:
    """Ask torch which kernel it would take; only on CPUs and NVIDIA GPUs it has several to choose from."""
    if device.type not in ("cpu", "cuda"):
        return None
    q, k = (
        torch.empty((1, heads, shape.seq, shape.head_dim), dtype=shape.dtype, device=device, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads)
    )
    shared = shape.kv_heads != shape.heads
    return SDPBackend(torch._fused_sdp_choice(q, k, k, None, 0.0, shape.causal, scale=None, enable_gqa=shared))


@IMPLEMENTATIONS.register("torch-flash")
def prepare_torch_flash(shape: Shape, device: torch.device) -> Ready:
    """FlashAttention-2, as torch ships it."""
    return _held_to(SDPBackend.FLASH_ATTENTION, "FlashAttention-2 of torch", shape, device)


@IMPLEMENTATIONS.register("torch-cudnn")
def prepare_torch_cudnn(shape: Shape, device: torch.device) -> Ready:
    """NVIDIA's cuDNN."""
    found = (torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None) or 0
    major, rest = divmod(found, 10_000)  # 91900 is 9.19.0, since version 9
    name = f"cuDNN {major}.{rest // 100}.{rest % 100}"
    return _held_to(SDPBackend.CUDNN_ATTENTION, name, shape, device)


@IMPLEMENTATIONS.register("torch-efficient")
def prepare_torch_efficient(shape: Shape, device: torch.device) -> Ready:
    """Memory-efficient attention of xFormers."""
    return _held_to(SDPBackend.EFFICIENT_ATTENTION, "memory-efficient attention of torch", shape, device)


@IMPLEMENTATIONS.register("torch-math")
def prepare_torch_math(shape: Shape, device: torch.device) -> Ready:
    """Separate operations."""
    return _held_to(SDPBackend.MATH, "separate operations of torch", shape, device)


def _held_to(backend: SDPBackend, kernel: str, shape: Shape, device: torch.device) -> Ready:
    _refuse_window(shape)
    on_gpu_only = backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if on_gpu_only and device.type != "cuda":
        raise UnavailableError(f"it needs a CUDA GPU, and this is {device.type}")
    shared = shape.kv_heads != shape.heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=shared)

    return Ready(attend, f"{kernel}: chosen by name", layout="BHTD", stores_scores=backend == SDPBackend.MATH)


@IMPLEMENTATIONS.register("flex")
def prepare_flex(shape: Shape, device: torch.device) -> Ready:
    """Torch's FlexAttention, compiled for this shape and mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type != "cuda":
        raise UnavailableError(f"its backward pass needs a CUDA GPU, and this is {device.type}")
    torch.compiler.reset()  # torch stops compiling a function at its eighth shape
    compiled = torch.compile(flex_attention, dynamic=False)

    def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        return seen & (query - key < shape.window) if shape.window else seen

    mask = create_block_mask(is_seen, None, None, shape.seq, shape.seq, device=device) if shape.causal else None
    shared = shape.kv_heads != shape.heads
    return Ready(
        lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=shared),
        "FlexAttention: compiled for this shape",
        layout="BHTD",
    )


@IMPLEMENTATIONS.register("flash-attn-3")
def prepare_flash_attn_3(shape: Shape, device: torch.device) -> Ready:
    """FlashAttention-3, hand-written for Hopper in CUDA."""
    return _flash_attn("flash_attn_interface", "flash-attn-3", shape, device)


@IMPLEMENTATIONS.register("flash-attn-4")
def prepare_flash_attn_4(shape: Shape, device: torch.device) -> Ready:
    """FlashAttention-4, in the CuTe language."""
    return _flash_attn("flash_attn.cute", "flash-attn-4", shape, device)


def _flash_attn(module: str, package: str, shape: Shape, device: torch.device) -> Ready:
    if device.type != "cuda":
        raise UnavailableError(f"it needs a CUDA GPU, and this is {device.type}")
    if shape.dtype == torch.float32:
        raise UnavailableError("it has no float32")
    try:
        function = import_module(module).flash_attn_func
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0] == module.partition(".")[0]
        raise UnavailableError(
            f"`{package}` is not installed" if missing else f"it cannot be imported: {error}"
        ) from None
    except Exception as error:  # a package built for another version of torch fails in its own way
        raise UnavailableError(f"it cannot be imported: {type(error).__name__}: {error}") from None
    window = {"window_size": (shape.window - 1, 0)} if shape.window else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(q, k, v, causal=shape.causal, **window)
        return found[0] if isinstance(found, tuple) else found  # some versions return the log-sum-exp too

    return Ready(attend, f"{package} {_version_of(package)}: chosen by name".replace("  ", " "))


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _refuse_window(shape: Shape) -> None:
    if shape.window:
        raise UnavailableError("it has no sliding window")
