"""Head and cross-entropy in one: the loss of hidden states and its gradients, without ever holding all the logits.

Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867), Algorithm 3.
         Hsu et al., "Liger Kernel", 2024 (arXiv:2410.10989), section 3.2, for gradients in the forward pass.
         Gemma Team, "Gemma 2", 2024 (arXiv:2408.00118), section 2, for the soft cap.
         Chowdhery et al., "PaLM", 2022 (arXiv:2204.02311), section 5, for the z-loss.

Math, for a row h of hidden channels, its target y, and n targets that count:

    a  = h W^T                        z = a, or with a soft cap:  z = cap tanh(a / cap)
    s  = log(sum_v exp(z_v))
    loss = sum over rows of (s - z_y + zeta s^2) / n
    dz = softmax(z) (1 + 2 zeta s) - onehot(y)
    da = dz, or with a soft cap:  dz (1 - (z / cap)^2)
    dh = da W / n                     dW = sum over rows of da^T h / n

Order:    rows are taken in chunks. A chunk's logits are made by one matrix product, turned into da where they lie, and
          spent on two more products; then the next chunk takes their place. Backward only scales dh and dW, by 1 / n
          too, since da / n would be too small for float16.
Numerics: products in the type of the hidden states, or of autocast, accumulated in float32; a is rounded to that type
          once. All after it (cap, max, exp, sums, s, da before it is rounded for the products) in float32, or float64
          for such inputs. dW is summed over chunks in float32, on a GPU inside the product.
Memory:   dh in the type of the products, dW in float32, and one chunk of logits, `CHUNK_BYTES`. All the logits of
          16 x 1024 tokens of GPT-2 would be 3.3 GB in float32, and twice that with their gradients.
Layout:   one program of `_loss_and_gradient` owns one row, reads it once for max and sum, and again to write da
          over it. Rows are padded to a multiple of 64 numbers, so that any vocabulary is read 16 bytes
          at a time. No atomics: equal runs are bit-equal.
Where:    the kernel on CUDA GPUs; for `HOPPER_VOCABULARIES` on Hopper GPUs that of `hopper_cross_entropy.py`, which
          reads a row once; on other devices, without Triton and in float64 the same steps in PyTorch, where a CPU's
          chunk fits its cache. torch.compile sees one opaque operation.
Limits:   differentiable once. A target that is neither in the vocabulary nor ignored raises, or, in the kernel, makes
          the loss NaN rather than stop the GPU.
Measured: one H200, 2026-11-29, 32,768 rows of 50,304 logits in bfloat16: the kernel takes 2.6 ms, 3.8 TB/s with both
          readings, which the L2 cache does not save; 8,192 or more logits at once, or more warps, are slower. A step of
          gpt2_small.json with chunks of 2^27 to 2^31 bytes: 63.7, 62.3, 62.0, 61.8 and 61.5 ms. Of 9 2^26, 5,504 rows,
          2026-11-30: all products 36.0 ms, where 2^29, 4,736 rows, had 37.0. dh of such chunks is 22 x 6 tiles of
          cuBLAS, one for each of 132 processors.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import compute_dtype, no_hopper_reason, operation, unavailable_reason
from lfs_cli.kernels.self_check import is_trusted, relative_errors

IGNORED = -100
"""The target of a row that does not count, by default: that of torch's own cross-entropy."""

CHUNK_BYTES = {"cpu": 2**21, "cuda": 9 * 2**26, "mps": 2**26}
"""Logits held at once: on a CPU what stays in its cache, on a GPU enough rows to keep the products at full speed."""

LARGEST_ERROR = 0.03
"""Of the self-check, relative to the size of each result: some roundings of bfloat16."""

HOPPER_VOCABULARIES = {False: range(4096, 114_689), True: range(4096, 57_345)}
"""For which `hopper_cross_entropy.py` is taken, by whether logits are capped. Shared memory holds no longer rows, and
above 57,344 logits one a processor, whose exponentials then wait for its copies. For shorter ones it is slower."""

BLOCK_V = 4096
WARPS = 8
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _capped(a, softcap):
    """Return cap tanh(a / cap), by one exp2: the absolute error is that of one rounding of the cap."""
    e = tl.exp2(tl.abs(a) * (-2.0 * LOG2_E / softcap))
    size = softcap * (1.0 - e) / (1.0 + e)
    return tl.where(a < 0, -size, size)


@triton.jit
def _loss_and_gradient(
    logits_ptr,
    targets_ptr,
    counts_ptr,
    losses_ptr,
    stride,
    V,
    softcap,
    z_loss,
    BLOCK_V: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr,
):
    """Write the loss of one row, and da over its logits.

    `counts_ptr` holds whether the row counts. `softcap` is None without one. Rows are read and written up to `stride`,
    a multiple of 64: what lies behind V means nothing, and a mask that ends at V would split every access into single
    numbers.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    counts = tl.load(counts_ptr + row)
    is_known = (target >= 0) & (target < V)
    target_z = tl.load(logits_ptr + target, mask=is_known, other=float("nan")).to(tl.float32)
    if softcap is not None:
        target_z = _capped(target_z, softcap)

    m = tl.full([BLOCK_V], MINUS_INFINITY, tl.float32)  # every lane has a maximum and a sum of its own
    l = tl.zeros([BLOCK_V], tl.float32)  # noqa: E741  the paper's name
    for start in tl.range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + v, mask=v < stride, other=0.0).to(tl.float32)
        if softcap is not None:
            z = _capped(tl.where(v < V, z, 0.0), softcap)
        z = tl.where(v < V, z, MINUS_INFINITY)
        n = tl.maximum(m, z)
        shift = tl.where(n == MINUS_INFINITY, 0.0, n)  # a lane beyond a small vocabulary has seen nothing
        l = l * tl.exp2((m - shift) * LOG2_E) + tl.exp2((z - shift) * LOG2_E)  # noqa: E741
        m = n
    peak = tl.max(m, 0)
    s = peak + LN_2 * tl.log2(tl.sum(l * tl.exp2((m - peak) * LOG2_E), 0))
    tl.store(losses_ptr + row, tl.where(counts, s - target_z + z_loss * s * s, 0.0))

    if WRITES_GRADIENT:
        weight = 1.0 + 2.0 * z_loss * s
        for start in tl.range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + v, mask=v < stride, other=0.0).to(tl.float32)
            z = tl.where(v < V, z, 0.0)
            if softcap is not None:
                z = _capped(z, softcap)
            da = tl.exp2((z - s) * LOG2_E) * weight - tl.where(v == target, 1.0, 0.0)
            if softcap is not None:
                da *= 1.0 - (z / softcap) * (z / softcap)
            da = tl.where(counts, da, 0.0)
            tl.store(logits_ptr + v, da.to(logits_ptr.dtype.element_ty), mask=v < stride)


def chunk_bytes(device_type: str, dtype: torch.dtype, rows: int, vocab_size: int) -> int:
    """Return the bytes of the logits that are held at once for so many rows, which torch.compile does not see."""
    if device_type == "cuda":
        stride, itemsize, step = -(-vocab_size // 64) * 64, dtype.itemsize, 128
    else:
        stride, itemsize, step = vocab_size, torch.promote_types(dtype, torch.float32).itemsize, 16
    most = CHUNK_BYTES.get(device_type, CHUNK_BYTES["mps"]) // (stride * itemsize)
    return min(rows, _chunk_rows(rows, most, step)) * stride * itemsize


def linear_cross_entropy(
    hidden: Tensor,
    weight_VC: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    ignored: int = IGNORED,
    cast_VC: Tensor | None = None,
) -> Tensor:
    """Return the mean cross-entropy, in nats, of the logits ``hidden @ weight_VC.T``. Differentiable, once.

    Works under torch.compile as one opaque operation, and under autocast, whose type the products then have; the
    gradient of the weight is summed in float32 all the same.

    Args:
        hidden: (..., C), any floating type.
        weight_VC: (V, C), the head, in any floating type; cast to that of the products.
        targets: (...), integers below V, or ``ignored``.
        softcap: Logits are softcap tanh(logit / softcap), so never larger.
        z_loss: Weight of the mean squared log-sum-exp of the logits, which is added; it keeps them from drifting.
        ignored: Target of rows that do not count: they have no gradient and no part in the mean.
        cast_VC: ``weight_VC`` in the type of the products, where it is at hand; gradients go to ``weight_VC``.

    Returns:
        A scalar, float32 or better; 0 when no row counts.

    Raises:
        ValueError: For shapes that do not fit together, and a soft cap or z-loss that is negative.
    """
    if weight_VC.ndim != 2 or hidden.shape[-1:] != weight_VC.shape[1:] or hidden.shape[:-1] != targets.shape:
        shapes = f"{tuple(hidden.shape)}, {tuple(weight_VC.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"expected hidden (..., C), weight (V, C) and targets (...), got {shapes}")
    if cast_VC is not None and cast_VC.shape != weight_VC.shape:
        raise ValueError(f"expected cast as weight, {tuple(weight_VC.shape)}, got {tuple(cast_VC.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if z_loss < 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if not torch.is_grad_enabled():  # the head is a parameter, and would have its gradient computed in evaluations too
        hidden, weight_VC = hidden.detach(), weight_VC.detach()
    dtype = compute_dtype(hidden)
    return _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight_VC, cast_VC, targets.flatten(), dtype, softcap, z_loss, ignored
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_RC: Tensor,
        weight_VC: Tensor,
        cast_VC: Tensor | None,
        targets_R: Tensor,
        dtype: torch.dtype,
        softcap: float | None,
        z_loss: float,
        ignored: int,
    ) -> Tensor:
        is_traced = torch.compiler.is_compiling() or type(h_RC) not in (Tensor, nn.Parameter)
        compute = _operation if is_traced else _compute  # some 10 us less
        wanted = ctx.needs_input_grad[:2]
        read_VC = weight_VC if cast_VC is None else cast_VC
        loss, share, dh, dweight = compute(h_RC, read_VC, targets_R, dtype, softcap, z_loss, ignored, *wanted)
        ctx.types = [x.dtype if is_wanted else None for x, is_wanted in zip((h_RC, weight_VC), wanted, strict=True)]
        ctx.save_for_backward(share, dh, dweight)
        return loss

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        share, *unscaled = ctx.saved_tensors
        scale = (share * gradients[0]).view(1)  # one entry, no scalar: its type counts, so dh is scaled before rounded
        found = (None if dtype is None else (x * scale).to(dtype) for x, dtype in zip(unscaled, ctx.types, strict=True))
        return *found, *(None for _ in ctx.needs_input_grad[2:])


def _compute(
    h_RC: Tensor,
    weight_VC: Tensor,
    targets_R: Tensor,
    dtype: torch.dtype,
    softcap: float | None,
    z_loss: float,
    ignored: int,
    wants_h: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, 1 / n, and n dh and n dW, which are empty where they are not wanted."""
    h, weight = h_RC.to(dtype).contiguous(), weight_VC.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    counts_R = targets_R != ignored
    share = 1 / counts_R.sum().clamp(min=1).to(wide)
    dh = torch.empty(h.shape if wants_h else 0, dtype=dtype, device=h.device)
    dweight = torch.zeros(weight.shape if wants_weight else 0, dtype=wide, device=h.device)
    launch = _launcher(h.device, dtype, len(weight), softcap is not None)
    by = _by_torch if launch is None else partial(_by_kernel, launch=launch)
    into = dh if wants_h else None, dweight if wants_weight else None
    with torch.autocast(h.device.type, enabled=False):
        losses = by(h, weight, targets_R.where(counts_R, 0), counts_R, softcap, z_loss, *into)
    return losses * share, share, dh, dweight


_operation = operation("linear_cross_entropy")(_compute)


def _is_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel can run here and, on a small case, does what the steps in PyTorch do in float64."""
    if unavailable_reason(device.type, dtype) is not None:
        return False
    return is_trusted("cross-entropy", _errors, device, dtype, allowed=LARGEST_ERROR)


def _errors(device: torch.device, dtype: torch.dtype) -> list[float]:
    generator = torch.Generator(device).manual_seed(0)
    h, weight = (torch.randn(rows, 64, generator=generator, device=device) for rows in (40, 300))
    h, weight = h.to(dtype), (weight / 8).to(dtype)
    targets = torch.randint(300, (40,), generator=generator, device=device)
    counts = targets % 7 > 0

    def run(by: Callable[..., Tensor], h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dh = torch.empty(h.shape, dtype=h.dtype, device=device)
        dweight = torch.zeros(weight.shape, dtype=torch.promote_types(h.dtype, torch.float32), device=device)
        return by(h, weight, targets, counts, 30.0, 1e-4, dh, dweight), dh, dweight

    return relative_errors(
        run(partial(_by_kernel, launch=_launch), h, weight), run(_by_torch, h.double(), weight.double())
    )


@torch.library.register_fake("lfs::linear_cross_entropy")
def _(
    h_RC: Tensor,
    weight_VC: Tensor,
    _targets: Tensor,
    dtype: torch.dtype,
    _softcap: float | None,
    _z_loss: float,
    _ignored: int,
    wants_h: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    dh = h_RC.new_empty(h_RC.shape if wants_h else 0, dtype=dtype)
    dweight = h_RC.new_empty(weight_VC.shape if wants_weight else 0, dtype=wide)
    return h_RC.new_empty((), dtype=wide), h_RC.new_empty((), dtype=wide), dh, dweight


def _by_kernel(
    h_RC: Tensor,
    weight_VC: Tensor,
    targets_R: Tensor,
    counts_R: Tensor,
    softcap: float | None,
    z_loss: float,
    dh_RC: Tensor | None,
    dweight_VC: Tensor | None,
    *,
    launch: Callable[..., None],
) -> Tensor:
    """Return the sum of the losses, write dh and add to dW where they are given. ``launch`` turns logits into da."""
    R, V = len(h_RC), len(weight_VC)
    stride = -(-V // 64) * 64
    rows = _chunk_rows(R, CHUNK_BYTES["cuda"] // (stride * h_RC.element_size()), step=128)
    logits = torch.empty((min(rows, R), stride), dtype=h_RC.dtype, device=h_RC.device)
    losses_R = torch.empty(R, dtype=torch.float32, device=h_RC.device)
    for start in range(0, R, rows):
        chunk = slice(start, min(start + rows, R))
        h = h_RC[chunk]
        da = logits[: len(h), :V]
        torch.mm(h, weight_VC.T, out=da)
        launch(
            da,
            targets_R[chunk],
            counts_R[chunk],
            losses_R[chunk],
            softcap,
            z_loss,
            writes_gradient=dh_RC is not None or dweight_VC is not None,
        )
        _spend(da, h, weight_VC, None if dh_RC is None else dh_RC[chunk], dweight_VC)
    return losses_R.sum()


def _launcher(device: torch.device, dtype: torch.dtype, V: int, is_capped: bool) -> Callable[..., None] | None:
    """Return what launches the fastest kernel, of those that can run and are right, or None where there is none."""
    case = dtype, V, is_capped
    fits = dtype.itemsize == 2 and V in HOPPER_VOCABULARIES[is_capped] and no_hopper_reason(device) is None
    if fits and is_trusted("Hopper cross-entropy", _hopper_errors, device, *case, allowed=LARGEST_ERROR):
        return _hopper_launch()
    return _launch if _is_usable(device, dtype) else None


def _hopper_launch() -> Callable[..., None]:
    return import_module("lfs_cli.kernels.hopper_cross_entropy").loss_and_gradient


def _launch(
    logits_RV: Tensor,
    targets_R: Tensor,
    counts_R: Tensor,
    losses_R: Tensor,
    softcap: float | None,
    z_loss: float,
    *,
    writes_gradient: bool,
) -> None:
    """Launch the kernel above, on rows whose stride is a multiple of 64."""
    (R, V), stride = logits_RV.shape, logits_RV.stride(0)
    with torch.cuda.device_of(logits_RV):
        _loss_and_gradient[(R,)](
            logits_RV,
            targets_R,
            counts_R,
            losses_R,
            stride,
            V,
            softcap,
            z_loss,
            BLOCK_V=min(BLOCK_V, triton.next_power_of_2(stride)),
            WRITES_GRADIENT=writes_gradient,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def _hopper_errors(device: torch.device, dtype: torch.dtype, V: int, is_capped: bool) -> list[float]:
    """Compare the kernel for Hopper GPUs, on a few rows, with the steps in PyTorch in float64."""
    R, stride, softcap, z_loss = 8, -(-V // 64) * 64, 30.0 if is_capped else None, 1e-4
    generator = torch.Generator(device).manual_seed(0)
    padded = torch.randn(R, stride, generator=generator, device=device).to(dtype)
    padded[:, V:] = torch.nan
    targets = torch.randint(V, (R,), generator=generator, device=device)
    counts = torch.arange(R, device=device) != 1

    def parts(losses: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Apart: the target's da is near -1, and all others of a row together are a hundredth
        return losses, da.gather(1, targets[:, None]), da.scatter(1, targets[:, None], 0.0)

    da, losses = padded.clone()[:, :V], torch.empty(R, device=device)
    _hopper_launch()(da, targets, counts, losses, softcap, z_loss, writes_gradient=True)
    exact = _losses_and_da(padded[:, :V].double(), targets, counts, softcap, z_loss)
    return relative_errors(parts(losses, da), parts(*exact))


def _by_torch(
    h_RC: Tensor,
    weight_VC: Tensor,
    targets_R: Tensor,
    counts_R: Tensor,
    softcap: float | None,
    z_loss: float,
    dh_RC: Tensor | None,
    dweight_VC: Tensor | None,
) -> Tensor:
    """Do the same in PyTorch's own steps."""
    R, V, device = len(h_RC), len(weight_VC), h_RC.device.type
    wide = torch.promote_types(h_RC.dtype, torch.float32)
    rows = _chunk_rows(R, CHUNK_BYTES.get(device, CHUNK_BYTES["mps"]) // (V * wide.itemsize), step=16)
    loss = torch.zeros((), dtype=wide, device=h_RC.device)
    for start in range(0, R, rows):
        chunk = slice(start, min(start + rows, R))
        h = h_RC[chunk]
        a = (h @ weight_VC.T).to(wide)
        is_wanted = dh_RC is not None or dweight_VC is not None
        losses, da = _losses_and_da(a, targets_R[chunk], counts_R[chunk], softcap, z_loss, wants_gradient=is_wanted)
        loss += losses.sum()
        if is_wanted:
            _spend(da.to(h.dtype), h, weight_VC, None if dh_RC is None else dh_RC[chunk], dweight_VC)
    return loss


def _losses_and_da(
    a_RV: Tensor,
    targets_R: Tensor,
    counts_R: Tensor,
    softcap: float | None,
    z_loss: float,
    *,
    wants_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, 0 where it does not count, and da, which means nothing if it is not wanted.

    ``a`` may be written over.
    """
    z, slope, target, counts = a_RV, None, targets_R[:, None], counts_R[:, None]
    if softcap is not None:
        z = torch.tanh(z / softcap)
        slope = 1 - z.square()
        z.mul_(softcap)
    peak = z.amax(-1, keepdim=True)
    z.sub_(peak)
    target_z = z.gather(-1, target)
    total = z.exp_().sum(-1, keepdim=True)
    log_total = total.log()
    s = log_total + peak
    losses_R = (log_total - target_z + z_loss * s.square()).where(counts, 0)[:, 0]
    if not wants_gradient:
        return losses_R, z
    weight = (1 + 2 * z_loss * s) / total
    da = z.mul_(weight).scatter_add_(-1, target, torch.full_like(total, -1.0))
    if slope is not None:
        da.mul_(slope)
    return losses_R, da.masked_fill_(~counts, 0)


def _spend(da: Tensor, h: Tensor, weight_VC: Tensor, dh: Tensor | None, dweight_VC: Tensor | None) -> None:
    """Write the dh of a chunk, and add its part of dW: in float32, however narrow the numbers that are multiplied."""
    if dh is not None:
        torch.mm(da, weight_VC, out=dh)
    if dweight_VC is None:
        return
    if da.dtype == dweight_VC.dtype:
        dweight_VC.addmm_(da.T, h)
    elif not da.is_cuda:  # no product of narrow numbers is wide on other devices
        dweight_VC += da.T @ h
    elif _adds_wide(da.device, da.dtype):
        torch.addmm(dweight_VC, da.T, h, out_dtype=dweight_VC.dtype, out=dweight_VC)
    else:
        dweight_VC += torch.mm(da.T, h, out_dtype=dweight_VC.dtype)


@cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this version of torch can add a product of narrow numbers to wide ones: older ones want one type."""
    narrow = torch.ones(16, 16, dtype=dtype, device=device)
    wide = torch.ones(16, 16, device=device)
    try:
        torch.addmm(wide, narrow, narrow, out_dtype=wide.dtype, out=wide)
    except RuntimeError:
        return False
    return bool((wide == 17).all())


def _chunk_rows(R: int, most: int, step: int) -> int:
    """Return rows a chunk: multiples of ``step``, about ``most``, and as even as that allows."""
    chunks = max(1, -(-R // max(step, most)))
    return max(step, -(-R // (chunks * step)) * step)


def reference_linear_cross_entropy(
    hidden: Tensor,
    weight_VC: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    ignored: int = IGNORED,
) -> Tensor:
    """The definition, in float32 or better, with all the logits in memory. `linear_cross_entropy` has the arguments."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.flatten(0, -2).to(wide) @ weight_VC.to(wide).T
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    counts = targets.flatten() != ignored
    z, targets = z[counts], targets.flatten()[counts]
    s = z.logsumexp(-1)
    losses = s - z.gather(-1, targets[:, None])[:, 0] + z_loss * s.square()
    return losses.sum() / max(1, len(losses))
