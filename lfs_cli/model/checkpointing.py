"""Activation checkpointing: forget what a block computed, and compute it again when backward needs it.

    none        keep everything
    selective   keep the results of matrix products and of attention; norms, rotations and gates are computed again
    full        keep the input of each block only: about a third more work

The second computation is the first one repeated, so losses and gradients are the same to the bit. On Hopper GPUs
`selective` has other kernels for gates, as those of `product.py` keep or forget a product and its gates together: their
sums were the same to the bit in all shapes that were tried.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (arXiv:1604.06174), section 3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lfs_cli.kernels.operation import under_same_assumptions

KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.lfs.turned_product.default,
    torch.ops.lfs.flash_attention.default,
    torch.ops.lfs.short_attention.default,
)
"""Operations whose results selective checkpointing keeps: they cost more than they weigh, unlike scores."""


def checkpointed(kind: str) -> Callable[..., Tensor] | None:
    """Return a function that runs a block on its inputs under checkpointing, or None where nothing is to be forgotten.

    Args:
        kind: ``none``, ``selective`` or ``full``.
    """
    if kind == "none" or not torch.is_grad_enabled():
        return None
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # blocks draw no random numbers
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(KEPT))
    return partial(_run, options)


def _run(options: dict[str, Any], block: Callable[..., Tensor], x_BTC: Tensor, **more: Tensor | None) -> Tensor:
    return checkpoint(under_same_assumptions(partial(block, **more)), x_BTC, **options)
