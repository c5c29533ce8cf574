"""Cross-entropy: the surprise, in nats, at the token that came, averaged over all positions.

    loss = mean over rows of  log(sum_v exp(z_v)) - z_target          z = h W^T, h a row of hidden channels
    dz   = (softmax(z) - onehot(target)) / R         dh = dz W         dW = dz^T h

`next_token_loss` goes through the rows in chunks and computes a chunk's loss and gradients while its logits are at
hand, so the R x V logits are never all in memory (GPT-2, 16 x 1024 tokens: 3.3 GB in float32 for the logits alone).
Chunks are small enough for a CPU's cache, which makes it the faster way there as well.

Numerics: products in the type of the hidden states (under autocast, its type); exp, log and all sums over the
vocabulary or over rows in float32 at least.
Memory: dh and dW, which backward only scales; one chunk of logits, up to CHUNK_NUMBERS numbers.
Limits: differentiable once. Works under torch.compile, which unrolls the chunks.

Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867), for log-sum-exp;
         Hsu et al., "Liger Kernel", 2024 (arXiv:2410.10989), section 3.2, for gradients in the forward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = {"cpu": 2**19, "cuda": 2**26, "mps": 2**24}
"""Logits held at once: 2 MB that stay in a CPU's cache; on a GPU 256 MB, enough rows for full speed."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean surprise at ``targets``, in nats.

    Args:
        logits: (..., V). Computed on in float32 at least.
        targets: (...), integers below V.

    Returns:
        A scalar, float32 or better. At most log V for a model that has learned anything.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z - z.detach().amax(-1, keepdim=True)
    target_z = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (z.exp().sum(-1).log() - target_z).mean()


def next_token_loss(hidden: Tensor, weight_VC: Tensor, targets: Tensor) -> Tensor:
    """Return ``cross_entropy(hidden @ weight_VC.T, targets)``, a chunk of rows at a time.

    Args:
        hidden: (..., C). What the head reads.
        weight_VC: (V, C). The head.
        targets: (...), integers below V.

    Returns:
        A scalar, float32 or better.
    """
    if not torch.is_grad_enabled():  # the head is a parameter, and would have its gradient computed in evaluations too
        hidden, weight_VC = hidden.detach(), weight_VC.detach()
    return _NextTokenLoss.apply(hidden.flatten(0, -2), weight_VC, targets.flatten())


class _NextTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_RC: Tensor, weight_VC: Tensor, targets_R: Tensor) -> Tensor:
        device, R, V = h_RC.device.type, h_RC.shape[0], weight_VC.shape[0]
        h_type, weight_type = h_RC.dtype, weight_VC.dtype
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        if torch.is_autocast_enabled(device):
            h_RC, weight_VC = (x.to(torch.get_autocast_dtype(device)) for x in (h_RC, weight_VC))
        wide = torch.promote_types(h_RC.dtype, torch.float32)
        rows = max(16, CHUNK_NUMBERS.get(device, 2**24) // V)

        loss = torch.zeros((), dtype=wide, device=h_RC.device)
        dweight_VC = torch.zeros_like(weight_VC, dtype=wide) if wants_weight else None
        dh = []
        with torch.autocast(device, enabled=False):
            for start in range(0, R, rows):
                h, target = h_RC[start : start + rows], targets_R[start : start + rows, None]
                z = (h @ weight_VC.T).to(wide)
                z = z.sub_(z.amax(-1, keepdim=True))
                target_z = z.gather(-1, target)
                total = z.exp_().sum(-1, keepdim=True)
                loss += (total.log() - target_z).sum()
                if not (wants_h or wants_weight):
                    continue
                dz = z.div_(total * R).scatter_add_(-1, target, torch.full_like(total, -1 / R)).to(h.dtype)
                dh.append(dz @ weight_VC)
                if dweight_VC is not None and dz.dtype == wide:
                    dweight_VC.addmm_(dz.T, h)
                elif dweight_VC is not None:
                    dweight_VC += dz.T @ h
        ctx.save_for_backward(
            torch.cat(dh).to(h_type) if wants_h else None,
            dweight_VC.to(weight_type) if dweight_VC is not None else None,
        )
        return loss / R

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dh_RC, dweight_VC = ctx.saved_tensors
        (dloss,) = gradients
        return (
            None if dh_RC is None else dh_RC * dloss.to(dh_RC.dtype),
            None if dweight_VC is None else dweight_VC * dloss.to(dweight_VC.dtype),
            None,
        )
