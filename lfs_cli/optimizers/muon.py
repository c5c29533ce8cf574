"""Muon: momentum whose every step is made orthogonal, so that a matrix moves equally in all directions.

    m <- b m + g              u = b m + g (Nesterov)
    w <- w (1 - lr decay) - lr sqrt(max(1, rows / columns)) orthogonal(u)

The nearest orthogonal matrix to u = U S V^T is U V^T. Newton-Schulz iterations find it without a decomposition: from
x = u / |u|, each of

    x <- a x + b (x x^T) x + c (x x^T)^2 x

moves all singular values towards 1. These coefficients make small ones grow fastest and stop near 1, within about 0.3,
which is as good for training. Meant for the matrices inside the blocks; give norms, embedding and head to AdamW.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, for the rule and coefficients.
"""

import torch
from torch import Tensor

from lfs_cli.optimizers.base import OPTIMIZERS, Group, Optimizer, Params, State

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@OPTIMIZERS.register("muon")
class Muon(Optimizer):
    """Steps each matrix by its orthogonalized momentum. A vector counts as a matrix of one row.

    Args:
        params: Weights, or groups of weights with settings of their own.
        lr: Step size: about the size that each singular value of a step has.
        momentum: Share of the running gradient kept at each step.
        weight_decay: Share of the weight removed each step, as a multiple of ``lr``.
        iterations: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(params, settings)

    def start(self, weight: Tensor) -> State:
        return {"running": torch.zeros_like(weight)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        running = state["running"].mul_(group["momentum"]).add_(gradient)
        direction = gradient.add(running, alpha=group["momentum"])
        matrix = direction.view(-1, direction.shape[-1]) if direction.ndim else direction.view(1, 1)
        rows, columns = matrix.shape
        step = orthogonal(matrix, group["iterations"]).view_as(weight)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(step, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return a matrix with the singular vectors of ``matrix`` and singular values near 1, by Newton-Schulz iterations.

    Args:
        matrix: (rows, columns).
        iterations: More of them reach smaller singular values.
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller of the two products
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
