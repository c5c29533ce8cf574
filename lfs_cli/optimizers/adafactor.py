"""Adafactor: Adam's scaling of every entry, remembered as one number a row and one a column.

For a matrix of R x C weights AdamW keeps 2 R C numbers, this R + C: the squares are taken to be a product of a share
of their row and one of their column, which is the closest of all products by the I-divergence.

Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018 (arXiv:1804.04235),
Algorithms 4 and 5. What differs: the rate is the one that is given, and a schedule's, unless ``relative`` asks for
theirs in proportion to the weight.
"""

import torch
from torch import Tensor

from lfs_cli.optimizers.base import OPTIMIZERS, Group, Optimizer, Params, State

SQUARE_EPSILON = 1e-30
"""Added to each squared gradient, so that a row of zeros does not divide by zero."""

SMALLEST_SCALE = 1e-3
"""With ``relative``, a weight of zeros moves as if its entries had this size."""


@OPTIMIZERS.register("adafactor")
class Adafactor(Optimizer):
    """Steps each entry by its gradient over the root of its running square, which rows and columns share.

    b = 1 - t^-power                    averages over all steps at first, and forgets more slowly with time
    r <- b r + (1 - b) row means of g^2              c <- b c + (1 - b) column means of g^2
    u = g / sqrt(r c^T / mean(r))                    for a vector: v <- b v + (1 - b) g^2 and u = g / sqrt(v)
    u <- u / max(1, rms(u) / clip)
    w <- w (1 - lr decay) - lr u                     with momentum: lr times a running mean of u

    Args:
        params: Weights, or groups of weights with settings of their own.
        lr: Step size, in units of the weight; with ``relative``, as a share of the weight's root mean square.
        power: Of the step, in the rate of forgetting.
        clip: Largest root mean square of a step, as a multiple of ``lr``.
        momentum: Share of the running step that is kept; 0 keeps none and needs no memory.
        relative: Move large weights further.
        weight_decay: Share of the weight removed each step, as a multiple of ``lr``.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1e-3,
        power: float = 0.8,
        clip: float = 1.0,
        momentum: float = 0.0,
        relative: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        if not clip > 0:
            raise ValueError(f"`clip` must be above 0, and is {clip}")
        settings = {"lr": lr, "power": power, "clip": clip, "momentum": momentum, "relative": relative}
        super().__init__(params, settings | {"weight_decay": weight_decay})

    def start(self, weight: Tensor) -> State:
        if weight.ndim < 2:
            return {"square": torch.zeros_like(weight)}
        return {"rows": torch.zeros_like(weight[..., :1]), "columns": torch.zeros_like(weight[..., :1, :])}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        fresh = state["step"] ** -group["power"]
        square = gradient.square().add_(SQUARE_EPSILON)
        if weight.ndim < 2:
            root = state["square"].lerp_(square, fresh).sqrt()
        else:
            rows = state["rows"].lerp_(square.mean(-1, keepdim=True), fresh)
            columns = state["columns"].lerp_(square.mean(-2, keepdim=True), fresh)
            root = (rows / rows.mean(-2, keepdim=True)).sqrt_() * columns.sqrt()
        step = gradient / root
        step.div_(_root_mean_square(step).div_(group["clip"]).clamp_(min=1))
        if group["momentum"]:
            if "running" not in state:
                state["running"] = torch.zeros_like(weight)
            step = state["running"].lerp_(step, 1 - group["momentum"])
        if group["relative"]:
            step = step * _root_mean_square(weight).clamp_(min=SMALLEST_SCALE)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(step, alpha=group["lr"])


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt_()
