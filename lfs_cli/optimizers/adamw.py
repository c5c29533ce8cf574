"""AdamW: Adam whose weight decay acts on the weight itself, not through the gradient.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv:1711.05101), Algorithm 2, with the
decay before the step, as in torch.optim.AdamW and CS336 of 2026.
"""

import torch
from torch import Tensor

from lfs_cli.optimizers.base import OPTIMIZERS, Group, Optimizer, Params, State


@OPTIMIZERS.register("adamw")
class AdamW(Optimizer):
    """Steps each entry by its gradient's running mean over the root of its running square.

    w <- w (1 - lr decay)
    m <- b1 m + (1 - b1) g              v <- b2 v + (1 - b2) g^2
    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        params: Weights, or groups of weights with settings of their own.
        lr: Step size, in units of the weight: an entry moves by about ``lr`` each step.
        betas: Decay rates b1 and b2 of the two averages. 0.95 remembers about 20 steps.
        eps: Added to the root, so that an entry without gradient does not move.
        weight_decay: Share of the weight removed each step, as a multiple of ``lr``.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must be two numbers from 0 to below 1, and are {betas}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def start(self, weight: Tensor) -> State:
        return {"mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        mean, square, t = state["mean"], state["square"], state["step"]
        beta1, beta2 = group["betas"]

        weight.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
        weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**t))

    def update_many(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        means, squares = ([state[name] for state in states] for name in ("mean", "square"))
        (beta1, beta2), t = group["betas"], states[0]["step"]

        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_div(squares, 1 - beta2**t)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(weights, means, roots, -group["lr"] / (1 - beta1**t))
