"""Cross-entropy: the surprise, in nats, at the token that came, averaged over all positions.

    loss = mean over rows of  log(sum_v exp(z_v)) - z_target          z = h W^T, h a row of hidden channels

With a z-loss of zeta, zeta log(sum_v exp(z_v))^2 is added to each row: softmax does not notice when all its logits grow
together, and this holds their normalizer near 1.

`cross_entropy` is the definition, for logits that are at hand. `next_token_loss` is what training calls: the same from
the hidden states, without ever holding all the logits; how, `kernels/linear_cross_entropy.py` tells.

Source: Shannon, "A Mathematical Theory of Communication", 1948, section 6, for surprise as -log p; Chowdhery
et al., "PaLM", 2022 (arXiv:2204.02311), section 5, for the z-loss.
"""

import torch
from torch import Tensor

from lfs_cli.kernels.linear_cross_entropy import chunk_bytes, linear_cross_entropy

__all__ = ["chunk_bytes", "cross_entropy", "next_token_loss"]


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


def next_token_loss(
    hidden: Tensor,
    weight_VC: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    cast_VC: Tensor | None = None,
) -> Tensor:
    """Return ``cross_entropy(hidden @ weight_VC.T, targets)``, a chunk of rows at a time, and a z-loss if asked for.

    Args:
        hidden: (..., C). What the head reads.
        weight_VC: (V, C). The head.
        targets: (...), integers below V, or -100 for positions that do not count.
        softcap: Logits are softcap tanh(logit / softcap), so never larger; None leaves them.
        z_loss: Weight of the mean squared log-sum-exp of the logits, after the soft cap, which is added.
        cast_VC: ``weight_VC`` in the type of the products, where it is at hand.

    Returns:
        A scalar, float32 or better.
    """
    return linear_cross_entropy(hidden, weight_VC, targets, softcap=softcap, z_loss=z_loss, cast_VC=cast_VC)
