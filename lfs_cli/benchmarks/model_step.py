"""A model in training, of which each part can be called alone, in every precision, as written, compiled or replayed.

    inference          forward and loss, keeping nothing: what an evaluation does
    forward            embedding, blocks and final norm, keeping what backward needs
    loss               head and cross-entropy, and their gradients, which the chunked loss computes on the way
    backward           the rest of the gradients
    forward+backward   these three: all but the update
    optimizer          clipping and AdamW
    step               all of it as training runs it: the number that counts

Weights and the optimizer's state are float32 in every precision, and all variants work on the same:

    float32     matrix products in float32
    tf32        the same numbers, multiplied by tensor cores with 10 bits of mantissa; CUDA only
    bfloat16    matrix products in it, by autocast; sums, norms and the loss in float32
    float16     the same in float16. The loss is not scaled, as training in it would have to, so that small gradients
                do not become 0: times are those of a step without that

Replayed, the passes of `forward+backward` and `step` are one CUDA graph, as in training (`training/graphs.py`): what
they take less is what it costs to launch their kernels one by one. A graph is recorded before each run and dropped
after, so that its memory is not in the way of others; how much that is cannot be told, as the allocator counts none of
it once recorded.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lfs_cli.benchmarks.measure import Candidate
from lfs_cli.config import ModelConfig
from lfs_cli.model import Transformer, next_token_loss
from lfs_cli.model.device import precision
from lfs_cli.optimizers import AdamW, clip_scale
from lfs_cli.training.graphs import WARM_UPS, CudaRecorder, GraphedPass
from lfs_cli.training.step import LossFunction, Pass, train_step

PARTS = ("inference", "forward", "loss", "backward", "forward+backward", "optimizer", "step")

UPDATES = ("optimizer", "step")
"""Parts that need the optimizer's state."""

REPLAYED = ("forward+backward", "step")
"""Parts that a CUDA graph can hold: whole passes."""

KEEPS_NO_ACTIVATIONS = ("inference", "optimizer")

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Types of the matrix products by the names of the setting."""

CLIP = 1.0

Runs = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]
"""What is timed of each part, and what is done before."""


@dataclass(frozen=True)
class Variant:
    """A way to compute the same step.

    Args:
        precision: Name in `PRECISIONS`.
        mode: ``eager`` or ``compiled``; with ``+graph`` behind, replayed as a CUDA graph.
    """

    precision: str
    mode: str = "eager"

    @property
    def dtype(self) -> torch.dtype:
        """Type that the matrix products read."""
        return PRECISIONS[self.precision]

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile makes its kernels."""
        return self.mode.startswith("compiled")

    @property
    def is_replayed(self) -> bool:
        """Whether its passes are CUDA graphs."""
        return self.mode.endswith("+graph")

    def parts(self, asked: Sequence[str]) -> list[str]:
        """Return those of the parts that are asked for which this variant has."""
        return [part for part in asked if part in REPLAYED or not self.is_replayed]


def candidate_name(variant: Variant, part: str) -> str:
    """Return what a part of a variant is called where all of a size are measured together."""
    return f"{variant.precision} {variant.mode} {part}"


@contextmanager
def multiplying_as(precision_name: str) -> Iterator[None]:
    """Multiply float32 matrices in full inside, or by tensor cores where ``precision_name`` is tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision_name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Training:
    """A model with random weights, a batch of random tokens and an optimizer.

    Args:
        config: The model.
        batch: Sequences (B).
        seed: Of weights and tokens.
        device: Where to compute.
    """

    def __init__(self, config: ModelConfig, batch: int, seed: int, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(seed)
        with device:  # drawn where they stay: 2.7 billion weights take a CPU minutes
            self.model = Transformer(config)
            tokens = torch.randint(config.vocab_size, (batch, config.context_length + 1))
        self.tokens_BT, self.targets_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.weights = list(self.model.parameters())
        self.optimizer = AdamW(self.weights)
        self.losses: list[Tensor] = []
        self.hidden_BTC: Tensor | None = None
        self.graphs: list[GraphedPass] = []

    def start_optimizer(self) -> None:
        """Make the optimizer's state, which is there from the first update on."""
        self._invent_gradients()
        self.update()
        self.forget()

    def state(self) -> list[Tensor]:
        """Return what the optimizer remembers."""
        return [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]

    def held_bytes(self) -> int:
        """Return the bytes that stay from step to step."""
        return sum(x.nbytes for x in (*self.weights, *self.state()))

    def candidates(self, variant: Variant, parts: Sequence[str], step_bytes: int) -> list[Candidate]:
        """Return each of ``parts`` that the variant has, named by `candidate_name`.

        Args:
            variant: How to compute.
            parts: Of `PARTS`.
            step_bytes: What a step is predicted to hold beside weights and optimizer.
        """
        compiled: Callable[..., Any] = torch.compile if variant.is_compiled else lambda function: function

        @compiled
        def hidden(tokens_BT: Tensor) -> Tensor:
            return self.hidden(tokens_BT, variant.dtype)

        @compiled
        def loss(hidden_BTC: Tensor, targets_BT: Tensor) -> Tensor:
            return self.head_loss(hidden_BTC, targets_BT, variant.dtype)

        @compiled
        def whole(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
            return self.head_loss(self.hidden(tokens_BT, variant.dtype), targets_BT, variant.dtype)

        def infer() -> Tensor:
            with torch.no_grad():
                return whole(self.tokens_BT, self.targets_BT)

        def prepare_loss() -> None:
            with torch.no_grad():
                hidden_BTC = self.hidden(self.tokens_BT, variant.dtype)
            self.hidden_BTC = hidden_BTC.requires_grad_()

        def prepare_backward() -> None:
            self.losses.append(whole(self.tokens_BT, self.targets_BT))

        runs: Runs = {
            "inference": (infer, _nothing),
            "forward": (lambda: hidden(self.tokens_BT), _nothing),
            "loss": (lambda: loss(self.hidden_BTC, self.targets_BT), prepare_loss),
            "backward": (lambda: self.losses.pop().backward(), prepare_backward),
            "forward+backward": (lambda: whole(self.tokens_BT, self.targets_BT).backward(), _nothing),
            "optimizer": (self.update, self._invent_gradients),
            "step": (lambda: self._step(whole), _nothing),
        }
        if variant.is_replayed:
            runs = self._replayed(whole)
        return [
            Candidate(
                candidate_name(variant, part),
                *(_within(variant.precision, call) for call in runs[part]),
                finish=partial(self._forget_graphs, whole) if variant.is_replayed else self.forget,
                needs_bytes=0 if part in KEEPS_NO_ACTIVATIONS else step_bytes,
                may_fail=variant.is_replayed,
            )
            for part in variant.parts(parts)
        ]

    def _replayed(self, loss: LossFunction) -> Runs:
        """Return the parts whose passes are a CUDA graph, which is recorded before each run and forgotten after."""
        recorder = CudaRecorder(self.device)

        def record() -> None:
            graph = GraphedPass(loss, self.model, recorder)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "a pass cannot be recorded")  # it would run, but not as a graph
                for _ in range(WARM_UPS + 1):
                    graph(self.tokens_BT, self.targets_BT, 1)
                    self.forget()
            self.graphs.append(graph)

        return {
            "forward+backward": (lambda: self.graphs[-1](self.tokens_BT, self.targets_BT, 1), record),
            "step": (lambda: self._step(loss, self.graphs[-1]), record),
        }

    def _forget_graphs(self, loss: LossFunction) -> None:
        """Forget, and leave the allocator as it was: recording gave back what it keeps, which others would wait for."""
        self.forget()
        loss(self.tokens_BT, self.targets_BT).backward()
        self.forget()

    def _step(self, loss: LossFunction, one_pass: Pass | None = None) -> None:
        batch = self.tokens_BT, self.targets_BT
        train_step(loss, self.weights, [self.optimizer], *batch, passes=1, clip=CLIP, one_pass=one_pass)

    def hidden(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the head reads, (B, T, C)."""
        with precision(self.device, dtype):
            return self.model.hidden(tokens_BT)

    def head_loss(self, hidden_BTC: Tensor, targets_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mean loss."""
        with precision(self.device, dtype):
            how = {"softcap": self.model.config.logit_softcap, "z_loss": self.model.config.z_loss}
            return next_token_loss(hidden_BTC, self.model.head_weight, targets_BT, **how)

    def clip(self) -> Tensor | None:
        """Return what scales the gradients down to the largest norm that training allows."""
        return clip_scale(self.weights, CLIP)[1]

    def update(self) -> None:
        """Move the weights."""
        self.optimizer.step(scale=self.clip())

    def forget(self) -> None:
        """Drop what a part leaves, so that each begins with the same memory."""
        self.losses.clear()
        self.graphs.clear()
        self.hidden_BTC = None
        self.optimizer.zero_grad(set_to_none=True)

    def _invent_gradients(self) -> None:
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.full_like(weight, 1e-3)


def _nothing() -> None:
    pass


def _within(precision_name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with multiplying_as(precision_name):
            return call()

    return run
