"""Muon: momentum whose every step is made orthogonal, so that a matrix moves equally in all directions.

    m <- b m + g              u = g + b m (Nesterov), or m
    w <- w (1 - lr decay) - lr scale orthogonal(u)

The nearest orthogonal matrix to u = U S V^T is U V^T. Newton-Schulz iterations find it without a decomposition: from
x = u / |u|, each of

    x <- a x + b (x x^T) x + c (x x^T)^2 x

moves all singular values towards 1. These coefficients make small ones grow fastest and stop near 1, within about 0.3,
which is as good for training. Meant for the matrices inside the blocks; give norms, embedding and head to AdamW.

An orthogonal step of R x C has the root mean square 1 / sqrt(max(R, C)), so shapes need a scale:

    original           sqrt(max(1, R / C))         the same change of what comes out, for what comes in
    match_rms_adamw    0.2 sqrt(max(R, C))         entries move as far as AdamW moves them: its rates and decays serve

Cost: iterations are products of matrices alone. Those of one shape go through them in one stack, in bfloat16 on a GPU,
whose rounding is far below the 0.3 that the iterations leave. There, kernels (`kernels/muon.py`) do all but the
products, in 28 bytes a weight, and multiply gradients by clipping's factor on the way.
Where those cannot run, the same steps are PyTorch's operations. Both remember the same, so one goes on where the other
stopped.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, for the rule, coefficients,
bfloat16 and the first scale; Liu et al., "Muon is Scalable for LLM Training", 2025 (arXiv:2502.16982), section 2.2, for
the second and the decay; the names of both are those of torch.optim.Muon. Jordan's modded-nanoGPT for the momentum
that rises at the start.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lfs_cli.kernels.muon import EPSILON, MuonTensors, is_usable, unavailable
from lfs_cli.optimizers.base import OPTIMIZERS, Group, Optimizer, Params, State

COEFFICIENTS = (3.4445, -4.7750, 2.0315)

SCALES = {
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}
"""Size of a step's singular values, as a multiple of `lr`."""

FIRST_MOMENTUM = 0.85
"""Where the momentum starts when it rises."""


@OPTIMIZERS.register("muon")
class Muon(Optimizer):
    """Steps each matrix by its orthogonalized momentum.

    The last two dimensions are the matrix, and those before them a stack of several. A vector is a matrix of one row.

    Args:
        params: Weights, or groups of weights with settings of their own.
        lr: Step size: with the scale `original`, about the size that each singular value of a step has.
        momentum: Share of the running gradient kept at each step.
        momentum_warmup: Steps over which that share rises to its value, from 0.85 or from where it is if lower.
        nesterov: Look ahead along the running gradient.
        weight_decay: Share of the weight removed each step, as a multiple of ``lr``.
        scale: How a step's size depends on the shape: `original` or `match_rms_adamw`.
        iterations: Newton-Schulz iterations.
        parts: Matrices that a weight holds one below the other, each made orthogonal by itself: 3 where queries, keys
            and values are one product.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        momentum_warmup: int = 0,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: str = "original",
        iterations: int = 5,
        parts: int = 1,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "momentum_warmup": momentum_warmup, "nesterov": nesterov}
        settings |= {"weight_decay": weight_decay, "scale": scale, "iterations": iterations, "parts": parts}
        super().__init__(params, settings)
        for group in self.param_groups:
            if (name := group["scale"]) not in SCALES:
                raise ValueError(f"`scale` must be {' or '.join(f'`{known}`' for known in SCALES)}, and is `{name}`")
            for weight in group["params"]:
                rows = weight.shape[-2] if weight.ndim > 1 else 1
                if not group["parts"] or rows % group["parts"]:
                    raise ValueError(f"{rows} rows cannot be cut into {group['parts']} `parts`")
        self._fused: dict[int, MuonTensors] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over another's state, as torch does in loading and copying: the kernels knew other tensors."""
        self._fused = {}
        super().__setstate__(state)

    def start(self, weight: Tensor) -> State:
        return {"running": torch.zeros_like(weight)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        Muon.update_many(self, [weight], [gradient], [state], group)

    def update_many(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        momentum, running = _momentum(states[0]["step"], group), [state["running"] for state in states]
        torch._foreach_mul_(running, momentum)
        torch._foreach_add_(running, gradients)
        directions = torch._foreach_add(gradients, running, alpha=momentum) if group["nesterov"] else running

        same_shape: dict[torch.Size, list[int]] = {}
        for index, weight in enumerate(weights):
            same_shape.setdefault(weight.shape, []).append(index)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for shape, indices in same_shape.items():
            stack = torch.stack([_matrices(directions[index], group["parts"]) for index in indices])
            steps = orthogonal(stack, group["iterations"])
            size = SCALES[group["scale"]](*stack.shape[-2:])
            moved = [weights[index] for index in indices]
            torch._foreach_sub_(moved, [step.reshape(shape) for step in steps], alpha=group["lr"] * size)

    def _move(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group, scale: Tensor | None
    ) -> None:
        if self._has_kernel(weights[0], group, scale):
            tensors = self._tensors(weights, states, group["parts"])
            if unavailable(tensors, gradients) is None:
                settings = {name: group[name] for name in ("lr", "nesterov", "weight_decay")}
                iterate = partial(iterated, iterations=group["iterations"])
                momentum = _momentum(states[0]["step"], group)
                tensors.step(gradients, iterate, SCALES[group["scale"]], momentum=momentum, **settings, scale=scale)
                return
        super()._move(weights, gradients, states, group, scale)

    def _has_kernel(self, weight: Tensor, group: Group, scale: Tensor | None) -> bool:
        if type(self) is not Muon or type(weight) not in (Tensor, nn.Parameter) or weight.dtype != torch.float32:
            return False  # another rule, or a tensor that is not simply float32 numbers in memory
        if scale is not None and scale.device != weight.device:
            return False
        stack_type = _iteration_type(weight)
        return is_usable(weight.device, stack_type, is_nesterov=group["nesterov"], is_scaled=scale is not None)

    def _tensors(self, weights: list[Tensor], states: list[State], parts: int) -> MuonTensors:
        """Return what the kernels know of these weights, made anew when any of them is another or lies elsewhere."""
        running = [state["running"] for state in states]
        known = self._fused.get(id(weights[0]))
        if known is None or not known.holds(weights, running, parts):
            known = MuonTensors(weights, running, parts=parts, stack_type=_iteration_type(weights[0]))
            self._fused[id(weights[0])] = known
        return known


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return matrices with the singular vectors of ``matrices`` and singular values near 1.

    Args:
        matrices: (..., rows, columns), in float32 or wider; the iterations compute in bfloat16 on a GPU.
        iterations: Newton-Schulz iterations; more of them reach smaller singular values.

    Returns:
        (..., rows, columns), in the type of ``matrices``.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # the smaller of the two products
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + EPSILON)).to(_iteration_type(matrices))
    x = iterated(x.reshape(-1, *x.shape[-2:]), iterations)
    return (x.mT if is_tall else x).reshape(matrices.shape).to(matrices.dtype)


def iterated(x: Tensor, iterations: int) -> Tensor:
    """Return what Newton-Schulz iterations make of ``x``: (matrices, rows, columns), none with singular values above 1.

    They cost least where there are no more rows than columns.
    """
    if x.is_cuda:  # there a sum within a product begins with a copy: 15 % of what Muon took on an H200, 2026-11-29
        return by_squares(x, iterations)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):  # sums within the product: half the time of separate ones on a CPU
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def by_squares(x: Tensor, iterations: int) -> Tensor:
    """Return what `iterated` does, by products that nothing is added to but a multiple of the identity.

    With A = x x^T, the square is completed: a + b A + c A^2 = (sqrt(c) A + b / (2 sqrt(c)))^2 + a - b^2 / (4 c). The
    factor of A goes into x, which is c^(1/4) times as large from the first product to the last.
    """
    a, b, c = COEFFICIENTS
    x = c**0.25 * x
    for _ in range(iterations):
        shifted = x @ x.mT
        shifted.diagonal(dim1=-2, dim2=-1).add_(b / (2 * c**0.5))
        polynomial = shifted @ shifted
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a - b**2 / (4 * c))
        x = polynomial @ x
    return c**-0.25 * x


def _iteration_type(matrices: Tensor) -> torch.dtype:
    return torch.bfloat16 if matrices.is_cuda else matrices.dtype


def _matrices(direction: Tensor, parts: int) -> Tensor:
    """View a weight as a stack of matrices, (stack, rows, columns)."""
    rows, columns = (1, 1, *direction.shape)[-2:]
    return direction.reshape(-1, rows // parts, columns)


def _momentum(step: int, group: Group) -> float:
    start, end = min(FIRST_MOMENTUM, group["momentum"]), group["momentum"]
    return start + (end - start) * min(1.0, step / group["momentum_warmup"]) if group["momentum_warmup"] else end
