"""Gradient descent, with momentum if asked for.

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, section 2, in the
form of torch.optim.SGD: the rate scales the velocity, and the first velocity is the first gradient.
"""

import torch
from torch import Tensor

from lfs_cli.optimizers.base import OPTIMIZERS, Group, Optimizer, Params, State


@OPTIMIZERS.register("sgd")
class SGD(Optimizer):
    """Steps against the gradient, or against a running sum of gradients.

    g <- g + decay w                    the decay is part of the gradient
    u <- momentum u + g                 velocity
    w <- w - lr u                       with nesterov: w - lr (g + momentum u)

    Args:
        params: Weights, or groups of weights with settings of their own.
        lr: Step size, in units of weight per unit of gradient.
        momentum: Share of the velocity that is kept each step; 0 keeps none and needs no memory.
        nesterov: Look ahead along the velocity.
        weight_decay: Pull towards zero, as a multiple of the weight that is added to its gradient.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        if nesterov and not momentum:
            raise ValueError("`nesterov` looks ahead along the velocity, and needs `momentum` above 0")
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        if group["weight_decay"]:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        if group["momentum"]:
            if "velocity" not in state:
                state["velocity"] = torch.zeros_like(weight)
            velocity = state["velocity"].mul_(group["momentum"]).add_(gradient)
            gradient = gradient.add(velocity, alpha=group["momentum"]) if group["nesterov"] else velocity
        weight.sub_(gradient, alpha=group["lr"])

    def update_many(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        steps: list[Tensor] | tuple[Tensor, ...] = gradients
        if group["weight_decay"]:
            steps = torch._foreach_add(steps, weights, alpha=group["weight_decay"])
        if group["momentum"]:
            for weight, state in zip(weights, states, strict=True):
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(weight)
            velocities = [state["velocity"] for state in states]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, steps)
            steps = torch._foreach_add(steps, velocities, alpha=group["momentum"]) if group["nesterov"] else velocities
        torch._foreach_sub_(weights, steps, alpha=group["lr"])
