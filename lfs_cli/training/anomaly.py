"""Anomalies: numbers of a step that say that training has gone wrong, and where in the model it began.

A loss or gradient norm that is not finite is always one. A spike is one where `Watch` is told how far is too far: the
logarithm of the loss or of the norm lies more than `spike` spreads above the median of the last `window` steps. The
spread is 1.4826 times the median distance from that median, which for normal noise is its standard deviation and which
the spikes themselves cannot widen, and at least `LEAST_SPREAD`, so that a calm run does not stumble over a ripple.
Logarithms, since what is usual in a norm is a factor and not a difference.

Source: Iglewicz & Hoaglin, "How to Detect and Handle Outliers", 1993, for the median distance (MAD) and its factor.
"""

from math import exp, isfinite, log
from statistics import median
from typing import TypeAlias

from torch import Tensor, nn

from lfs_cli.model.device import as_written
from lfs_cli.training.step import LossFunction

LEAST_SPREAD = 0.02
"""Spread, as a share of the value, that is never called large, however calm the window was."""

Numbers: TypeAlias = list[float]


class AnomalyError(Exception):
    """Ends a loop at a step whose numbers cannot be right; whoever runs the loop decides what becomes of the run.

    Args:
        step: The step.
        what: What is wrong, such as `loss is not a number`.
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"{what} at step {step}")
        self.step = step
        self.what = what


class Watch:
    """Judges the numbers of each step by those of the steps before.

    Args:
        spike: Spreads above the median from which on a number is an anomaly; 0 judges only whether it is finite.
        window: Steps that are compared with.
        grace: First steps of a run, in which nothing finite is an anomaly.
        losses: Logarithms of the losses in the window, the last one last. Changed in place, to be kept by the caller.
        norms: The same of the gradient norms.
    """

    def __init__(self, *, spike: float, window: int, grace: int, losses: Numbers, norms: Numbers) -> None:
        self._spike, self._window, self._grace = spike, window, grace
        self._losses, self._norms = losses, norms

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """Return what is wrong with the numbers of ``step``, or None when nothing is."""
        for name, value in (("loss", loss), ("gradient", norm)):
            if not isfinite(value):
                return f"{name} is not a number"
        if not self._spike or step <= self._grace:
            return None
        for name, value, recent in (("loss", loss, self._losses), ("gradient norm", norm, self._norms)):
            if len(recent) < min(self._window, self._grace) or value <= 0:
                continue
            center = median(recent)
            spread = max(1.4826 * median(abs(number - center) for number in recent), LEAST_SPREAD)
            distance = (log(value) - center) / spread
            if distance > self._spike:
                return f"{name} {value:.4g} is {distance:.0f} spreads above its recent median {exp(center):.4g}"
        return None

    def remember(self, loss: float, norm: float) -> None:
        """Let later steps be compared with these numbers."""
        if self._spike:
            for value, recent in ((loss, self._losses), (norm, self._norms)):
                recent.append(log(max(value, 1e-30)))
                del recent[: -self._window]


def first_bad_layer(
    model: nn.Module, loss_function: LossFunction, tokens_BT: Tensor, targets_BT: Tensor, *, passes: int
) -> str | None:
    """Run a batch again and return what first has numbers that are not finite, in words; None when all are.

    The order is that of the computation: weights, outputs of layers on the way forward, gradients on the way back.
    The weights stay as they are.

    Args:
        model: Whose layers are watched.
        loss_function: The forward pass, not compiled.
        tokens_BT: (B, T) input tokens, on the device.
        targets_BT: (B, T) the tokens that follow them.
        passes: Parts that the batch is run in.
    """
    for name, weight in model.named_parameters():
        if not _is_finite(weight):
            return f"the weight `{name}`"
    found: list[str] = []
    names = {module: name for name, module in model.named_modules() if name}

    def look(module: nn.Module, _: object, output: object) -> None:
        if not found and isinstance(output, Tensor) and not _is_finite(output):
            found.append(f"the output of `{names[module]}`")

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        for tokens, targets in zip(tokens_BT.chunk(passes), targets_BT.chunk(passes), strict=True):
            with as_written():
                loss = loss_function(tokens, targets) / passes
            if found:
                return found[0]
            if not loss.isfinite():
                return "the logits or the loss"
            loss.backward()
        bad = [n for n, weight in model.named_parameters() if weight.grad is not None and not _is_finite(weight.grad)]
        return f"the gradient of `{bad[-1]}`" if bad else None  # the way back meets the last one first
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
