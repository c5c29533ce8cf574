"""Compiling this project's kernels while torch.compile is at work.

The first step of a compiled run waits for two compilers in turn. torch.compile traces and writes kernels, in Python;
then each kernel of this project is compiled and checked where it is first met, for which Python mostly waits: for LLVM,
and for the programs of others that end it. So another thread takes one sequence through the model at once, as it is
written, forward and back, and what it meets is ready when the first step comes to it. Who comes to a check that has
begun waits for it (`kernels.operation.is_trusted`).

It leaves no trace: gradients are returned, not added up, nothing is drawn, and what goes wrong is left to the first
step to tell.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from threading import Thread

import torch
from torch import nn

from lfs_cli.config import TrainConfig
from lfs_cli.model import Transformer
from lfs_cli.model.device import choose_compile
from lfs_cli.runs.setup import Setup, boundary_of, loss_as_written
from lfs_cli.training.step import LossFunction

FEWEST_ROWS = 4
"""Sequences of a pass from which on one more takes little memory beside them."""


@contextmanager
def rehearsed(config: TrainConfig, setup: Setup, rows: int) -> Iterator[None]:
    """Rehearse a pass beside the block, where that pays: for a run on a GPU that is compiled.

    Args:
        config: The run.
        setup: Its parts.
        rows: Sequences of its passes.
    """
    pays = setup.device.type == "cuda" and choose_compile(config.compile, setup.device) and rows >= FEWEST_ROWS
    if not pays or config.plugins:
        yield
        return
    model = twin(setup.model)
    loss_function = loss_as_written(model, setup.device, setup.dtype, boundary_of(config, setup.tokenizer))
    thread = Thread(target=rehearse, args=[model, loss_function, setup.device], name="rehearsal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def twin(model: Transformer) -> Transformer:
    """Return a model of the same weights, in the same memory, of which autograd knows nothing yet.

    What it remembers of a weight belongs to a stream, and that of the rehearsal is not that of the passes.
    """
    kept = {id(weight): nn.Parameter(weight.detach()) for weight in model.parameters()}
    return deepcopy(model, kept | {id(table): table for table in model.buffers()})


def rehearse(model: Transformer, loss_function: LossFunction, device: torch.device) -> None:
    """Take a sequence through the model and back: any, as the text is for the first step to read."""
    config = model.config
    with suppress(Exception):  # the first step meets it too, where someone is told
        tokens_BT = torch.arange(config.context_length, device=device)[None] % config.vocab_size
        loss = loss_function(tokens_BT, tokens_BT)
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
