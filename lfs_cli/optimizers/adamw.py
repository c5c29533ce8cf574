"""AdamW: Adam whose weight decay acts on the weight itself, not through the gradient.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv:1711.05101), Algorithm 2, with the
decay before the step, as in torch.optim.AdamW and CS336 of 2026.

On a GPU one kernel (`kernels/adamw.py`) moves all weights of a group that have done as many steps: it reads every
number once, and multiplies gradients by clipping's factor on the way. Where that kernel cannot run, the same steps are
PyTorch's operations on lists, and on a CPU on one weight after the other. All remember the same, so one goes on where
another stopped.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lfs_cli.kernels.adamw import AdamWTensors, is_usable
from lfs_cli.kernels.operation import on_gpu
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
        self._fused: dict[int, AdamWTensors] = {}
        self._copies: dict[Tensor, Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over another's state, as torch does in loading and copying: what the kernel knew is of other tensors."""
        self._fused = {}
        self._copies = self.__dict__.get("_copies", {})
        super().__setstate__(state)

    def keep_up(self, copies: Mapping[Tensor, Tensor]) -> set[Tensor]:
        """Let the kernel write weights to these narrow copies too, as it moves them: it has the numbers at hand.

        Where it cannot run, PyTorch's operations move the weight alone, and count up its version, which the kernel
        leaves as it is.

        Args:
            copies: From float32 weights to contiguous tensors of their shape, all of one type. Weights that another
                optimizer moves are passed over. They take the place of those of an earlier call.

        Returns:
            The weights whose copies will be kept.
        """
        if type(self) is not AdamW:
            return set()
        ours = {weight for group in self.param_groups for weight in group["params"]}
        self._copies = {weight: copy for weight, copy in copies.items() if weight in ours and on_gpu(weight)}
        return set(self._copies)

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
        if not on_gpu(weights[0]):  # one by one, each stays in a CPU's cache: 10M weights take half the time or less
            super().update_many(weights, gradients, states, group)
            return
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

    def _move(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group, scale: Tensor | None
    ) -> None:
        kept = [weight in self._copies for weight in weights]
        if len(set(kept)) > 1:  # a launch for those with copies, and one for the others
            found = list(zip(weights, gradients, states, strict=True))
            for each in (True, False):
                parts = [one for one, is_kept in zip(found, kept, strict=True) if is_kept is each]
                self._move([w for w, _, _ in parts], [g for _, g, _ in parts], [s for _, _, s in parts], group, scale)
            return
        copies = [self._copies[weight] for weight in weights] if kept[0] else None
        if self._has_kernel(weights[0], gradients[0], scale, copies):
            tensors = self._tensors(weights, states, copies)
            if tensors.reason is None:
                settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
                tensors.step(gradients, states[0]["step"], **settings, scale=scale)
                return
        super()._move(weights, gradients, states, group, scale)

    def _has_kernel(self, weight: Tensor, gradient: Tensor, scale: Tensor | None, copies: list[Tensor] | None) -> bool:
        if type(self) is not AdamW or type(weight) not in (Tensor, nn.Parameter):
            return False  # another rule, or a tensor that is not simply numbers in memory
        if scale is not None and scale.device != weight.device:
            return False
        dtype = weight.dtype if copies is None else copies[0].dtype
        how = {"is_scaled": scale is not None, "has_masters": copies is not None}
        return is_usable(weight.device, dtype, gradient.dtype, **how)

    def _tensors(self, weights: list[Tensor], states: list[State], copies: list[Tensor] | None) -> AdamWTensors:
        """Return what the kernel knows of these weights, made anew when any of them is another or lies elsewhere."""
        means, squares = ([state[name] for state in states] for name in ("mean", "square"))
        moved, masters = (weights, None) if copies is None else (copies, weights)
        known = self._fused.get(id(weights[0]))
        if known is None or not known.holds(moved, means, squares, masters):
            known = self._fused[id(weights[0])] = AdamWTensors(moved, means, squares, masters)
        return known
