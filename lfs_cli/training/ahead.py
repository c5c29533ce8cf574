"""Kernels compiled and checked by threads, while what comes before a run's first step is done.

With nothing compiled yet a run spends half of its start on its own kernels, one after the other as the first step comes
to them: Triton's compiler, ptxas, gcc, and the self-check of each. What it will need is known before: the model, its
backward pass and the optimizers, run on tensors without numbers, name their self-checks, and threads make them all at
once. The first step waits for what is not ready. Nothing depends on it: a check that was not foreseen is made as it
comes, and one too many costs a thread's time. A run that ends before its first step gives up what has not begun.
"""

from contextlib import suppress
from math import inf

import torch
from torch import nn

from lfs_cli.config import TrainConfig
from lfs_cli.model.device import as_on_gpu, choose_compile
from lfs_cli.model.foreseen_checks import Case, Check, Listed, begin_checks, checks_of, listed_checks
from lfs_cli.optimizers import OPTIMIZERS, AdamW, Muon, clip_scale, step_scaled
from lfs_cli.training.memory import resolved_for
from lfs_cli.training.trace import fake_model, no_tokens, run_pass

COMPILED_INSTEAD = ("RMSNorm", "embedding")
"""Kernels whose work torch.compile does itself, where it has the whole model."""

LAYERS = 4
"""Of the model that is asked, at most: two kinds of them, at either end, are all that a config can ask for."""

ROWS = 16
"""Sequences of a pass: a number that Triton treats as most others."""


def begin_kernels(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Let threads begin to compile and check the kernels that a run will use, and return.

    Args:
        config: The run; one with plugins is left alone, as they may do more than compute.
        device: Where it computes; off a GPU there is nothing to do.
        dtype: Of its matrix products.
    """
    if device.type == "cuda" and not config.plugins:
        with suppress(Exception):  # whatever it is, the first step comes to it, and says so
            begin_checks(foreseen_checks(config, device, dtype))


def foreseen_checks(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> dict[Case, Check]:
    """Return the self-checks that the first step of a run will ask for.

    Args:
        config: The run. Where attention keeps to documents, the kernels of the model are not foreseen.
        device: A CUDA GPU.
        dtype: Of the matrix products.
    """
    layers = min(config.model.layers, LAYERS)
    changes = {"value_embeddings": min(config.model.value_embeddings, layers // 2), "checkpointing": "none"}
    model_config = resolved_for(config.model, device.type).model_copy(update={"layers": layers} | changes)
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    checks = {}
    if config.data.documents != "packed":
        with as_on_gpu(is_compiled=False, is_hopper=is_hopper), fake_model(model_config) as model:
            checks = checks_of(lambda: run_pass(model, no_tokens(model, ROWS), dtype), device)
    if config.compile != "blocks" and choose_compile(config.compile, device):
        checks = {case: check for case, check in checks.items() if not check.kernel.startswith(COMPILED_INSTEAD)}
    return checks | _checks_of_optimizers(config, device, dtype)


def _checks_of_optimizers(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> dict[Case, Check]:
    """Return what clipping asks for, and the optimizers that have kernels, before a weight is moved."""
    scale = torch.ones((), device=device) if config.clip else None
    with listed_checks() as checks, suppress(Listed):
        clip_scale([_weight(device)], config.clip or inf)
    for group in config.optimizer:
        if OPTIMIZERS.get(group.name) not in (AdamW, Muon):
            continue
        weight = _weight(device)
        optimizer = OPTIMIZERS.create(group.name, [("weight", weight)], lr=group.lr, **group.options)
        with listed_checks() as found, suppress(Listed):
            step_scaled([optimizer], scale)
        checks |= found
        if isinstance(optimizer, AdamW) and dtype != torch.float32:  # of whose matrices `Casts` has copies
            optimizer.keep_up({weight: weight.detach().to(dtype)})
            with listed_checks() as found, suppress(Listed):
                step_scaled([optimizer], scale)
            checks |= found
    return checks


def _weight(device: torch.device) -> nn.Parameter:
    """Return one that has a gradient."""
    weight = nn.Parameter(torch.zeros(16, 16, device=device))
    weight.grad = torch.zeros_like(weight)
    return weight
