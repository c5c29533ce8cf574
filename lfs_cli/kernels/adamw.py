"""AdamW for all tensors of a model in one launch.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv:1711.05101), Algorithm 2, with the
decay before the step, as in torch.optim.AdamW.

Math, for one weight w with gradient g, at its step t:

    g <- scale g                            scale: what clipping left, read on the device; 1 without it
    w <- w (1 - lr decay)
    m <- b1 m + (1 - b1) g                  v <- b2 v + (1 - b2) g^2
    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Numerics: everything between loading and storing is float32, and so are m and v. A bfloat16 weight forgets updates below
          1/256 of its size; with a master, a float32 weight is moved and the narrow one is its rounding: what a model
          computes with is cast once a step, in the pass that has the number at hand anyway.
Layout:   a table made once names for each program a tensor and the first of its `BLOCK` numbers; another holds the
          tensors' addresses. So one launch serves all tensors, whatever their number and sizes. Addresses of gradients
          are copied to the GPU at every step, as gradients are new tensors there.
Traffic:  reads w, g, m, v and writes w, m, v: 28 bytes a weight in float32, 2 more with a bfloat16 copy. Clipping costs
          none of it: the norm is taken before, and gradients are scaled as they are read.
Waiting:  nothing here waits for the GPU. lr and the bias corrections are numbers of the host, so a CUDA graph would
          repeat those of the step that it recorded.
Limits:   contiguous tensors on one GPU; weights of one type, gradients of one type. PyTorch does the rest.
Unknown:  whether it beats torch.optim.AdamW(fused=True); `lfs bench kernels` tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import unavailable_reason

BLOCK = 2048


@triton.jit
def _tensor(addresses_ptr, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the first number of a tensor whose address the table holds."""
    pointer = tl.load(addresses_ptr + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:  # told to the compiler, which then reads 16 bytes at once
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _move(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    master_ptr,
    inside,
    scale,
    lr,
    beta1,
    beta2,
    eps,
    keep,
    mean_correction,
    square_correction,
):
    """Move the weights at these pointers, of which `inside`, or with None all, exist."""
    g = tl.load(g_ptr, mask=inside).to(tl.float32) * scale
    m = tl.load(m_ptr, mask=inside)
    v = tl.load(v_ptr, mask=inside)
    w = tl.load(w_ptr if master_ptr is None else master_ptr, mask=inside).to(tl.float32)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    w = w * keep - lr * (m * mean_correction) / (tl.sqrt(v * square_correction) + eps)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    tl.store(w_ptr, w.to(w_ptr.dtype.element_ty), mask=inside)
    if master_ptr is not None:
        tl.store(master_ptr, w, mask=inside)


@triton.jit
def _step(
    weights_ptr,
    gradients_ptr,
    means_ptr,
    squares_ptr,
    masters_ptr,
    sizes_ptr,
    tensor_of_ptr,
    block_of_ptr,
    scale_ptr,
    lr,
    beta1,
    beta2,
    eps,
    keep,
    mean_correction,
    square_correction,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move BLOCK weights of one tensor. `masters_ptr` and `scale_ptr` are None without them; keep is 1 - lr decay."""
    tensor = tl.load(tensor_of_ptr + tl.program_id(0))
    start = tl.load(block_of_ptr + tl.program_id(0)) * BLOCK
    size = tl.load(sizes_ptr + tensor)
    at = start + tl.arange(0, BLOCK)
    w_ptr = _tensor(weights_ptr, tensor, WEIGHT, ALIGNED) + at
    g_ptr = _tensor(gradients_ptr, tensor, GRADIENT, ALIGNED) + at
    m_ptr = _tensor(means_ptr, tensor, tl.float32, ALIGNED) + at
    v_ptr = _tensor(squares_ptr, tensor, tl.float32, ALIGNED) + at
    master_ptr = None
    if masters_ptr is not None:
        master_ptr = _tensor(masters_ptr, tensor, tl.float32, ALIGNED) + at
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    numbers = (scale, lr, beta1, beta2, eps, keep, mean_correction, square_correction)
    if start + BLOCK <= size:  # a mask would make every access a single number
        _move(w_ptr, g_ptr, m_ptr, v_ptr, master_ptr, None, *numbers)
    else:
        _move(w_ptr, g_ptr, m_ptr, v_ptr, master_ptr, at < size, *numbers)


@dataclass(frozen=True)
class AdamWTensors:
    """Weights and what AdamW remembers of them: lists of one length, of tensors of one shape each.

    Args:
        weights: What moves, in place: all float32, all bfloat16 or all float16.
        means: Running means of the gradients, float32; zeros before the first step.
        squares: Running means of their squares, likewise.
        masters: Float32 weights that are moved in place of ``weights``, which become their rounding; or None.

    Raises:
        ValueError: When the lists do not fit together.
    """

    weights: Sequence[Tensor]
    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    masters: Sequence[Tensor] | None = None
    _tables: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _addresses: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes = [weight.shape for weight in self.weights]
        for name, tensors in (("means", self.means), ("squares", self.squares), ("masters", self.masters)):
            if tensors is not None and [x.shape for x in tensors] != shapes:
                raise ValueError(f"{name} and weights differ in number or shape")

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor],
        step: int,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        scale: Tensor | None = None,
    ) -> None:
        """Move all weights once.

        Args:
            gradients: One for each weight, in its shape.
            step: Number of this step, from 1.
            lr: Step size.
            betas: Decay rates of the two averages.
            eps: Added to the root.
            weight_decay: Share of the weight removed, as a multiple of ``lr``.
            scale: (), float32, on the device: factor of all gradients; None for 1.

        Raises:
            ValueError: When ``gradients`` do not fit the weights, or ``step`` is below 1.
        """
        if [x.shape for x in gradients] != [x.shape for x in self.weights]:
            raise ValueError("gradients and weights differ in number or shape")
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        numbers = (lr, *betas, eps, 1 - lr * weight_decay, 1 / (1 - betas[0] ** step), 1 / (1 - betas[1] ** step))
        if unavailable(self, gradients):
            _reference_step(self, gradients, scale, *numbers)
        elif self.weights:
            self._launch(gradients, scale, numbers)

    def _launch(self, gradients: Sequence[Tensor], scale: Tensor | None, numbers: Sequence[float]) -> None:
        device = self.weights[0].device
        if not self._tables:
            self._tables.update(_tables(self, device))
            self._addresses.extend(address for group in _addresses(self).values() for address in group)
        gradients = [gradient.contiguous() for gradient in gradients]
        tables, gradient_addresses = self._tables, [gradient.data_ptr() for gradient in gradients]
        types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        with torch.cuda.device_of(self.weights[0]):
            _step[(len(tables["tensor_of"]),)](
                tables["weights"],
                _on_device(gradient_addresses, device),
                tables["means"],
                tables["squares"],
                tables.get("masters"),
                tables["sizes"],
                tables["tensor_of"],
                tables["block_of"],
                scale,
                *numbers,
                WEIGHT=types[self.weights[0].dtype],
                GRADIENT=types[gradients[0].dtype],
                ALIGNED=not any(address % 16 for address in (*gradient_addresses, *self._addresses)),
                BLOCK=BLOCK,
                num_warps=8,
                enable_fp_fusion=True,
            )


def unavailable(tensors: AdamWTensors, gradients: Sequence[Tensor]) -> str | None:
    """Say why the kernel cannot run on these tensors, or None when it can. PyTorch takes its place then."""
    state = [*tensors.means, *tensors.squares, *(tensors.masters or ())]
    if any(x.dtype != torch.float32 for x in state):
        return "it keeps its state in float32"
    if not all(x.is_contiguous() for x in [*tensors.weights, *state]):
        return "it needs contiguous tensors"
    everything = [*tensors.weights, *gradients, *state]
    if len({x.device for x in everything}) > 1:
        return "the tensors are on several devices"
    for group, name in ((tensors.weights, "weights"), (gradients, "gradients")):
        if len({x.dtype for x in group}) > 1:
            return f"the {name} are of several types"
    reasons = (unavailable_reason(x.device.type, x.dtype) for x in (*tensors.weights[:1], *gradients[:1]))
    return next((reason for reason in reasons if reason), None)


def _reference_step(
    tensors: AdamWTensors,
    gradients: Sequence[Tensor],
    scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    keep: float,
    mean_correction: float,
    square_correction: float,
) -> None:
    """The definition, tensor by tensor, in the type of the state."""
    for i, (weight, gradient) in enumerate(zip(tensors.weights, gradients, strict=True)):
        mean, square = tensors.means[i], tensors.squares[i]
        g = gradient.to(mean.dtype) * (1 if scale is None else scale)
        mean += (1 - beta1) * (g - mean)
        square.mul_(beta2).add_((1 - beta2) * g * g)
        w = (weight if tensors.masters is None else tensors.masters[i]).to(mean.dtype)
        w = w * keep - lr * (mean * mean_correction) / ((square * square_correction).sqrt() + eps)
        if tensors.masters is not None:
            tensors.masters[i].copy_(w)
        weight.copy_(w)


def _tables(tensors: AdamWTensors, device: torch.device) -> dict[str, Tensor]:
    """Return what does not change from step to step: where the tensors lie, and which numbers each program takes."""
    sizes = [weight.numel() for weight in tensors.weights]
    blocks = [(i, block) for i, size in enumerate(sizes) for block in range(-(-size // BLOCK))]
    return {name: _on_device(addresses, device) for name, addresses in _addresses(tensors).items()} | {
        "sizes": torch.tensor(sizes, dtype=torch.int64, device=device),
        "tensor_of": torch.tensor([i for i, _ in blocks], dtype=torch.int32, device=device),
        "block_of": torch.tensor([block for _, block in blocks], dtype=torch.int64, device=device),
    }


def _addresses(tensors: AdamWTensors) -> dict[str, list[int]]:
    lists = {"weights": tensors.weights, "means": tensors.means, "squares": tensors.squares}
    if tensors.masters is not None:
        lists["masters"] = tensors.masters
    return {name: [x.data_ptr() for x in group] for name, group in lists.items()}


def _on_device(addresses: Sequence[int], device: torch.device) -> Tensor:
    """Return a table on the device, without waiting for it."""
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)
