"""What could make two equal runs differ: the random states of a process, and the order in which a GPU sums.

Nothing in lfs draws from the random states while it trains: batches are functions of the seed and the step, and samples
have generators of their own. A plugin may, such as one with dropout, and then its numbers must go on too.

A GPU sums in whatever order its threads arrive where that is faster: the gradients of embeddings, and those of queries
in the fastest attention kernel. The rounding then differs from run to run.
"""

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lfs_cli.errors import DeviceError


def seed_everything(seed: int) -> None:
    """Start the generators of torch (on every device), Python and NumPy from ``seed``."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes no more


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all generators as numbers, texts and tensors on the host, without waiting for ``device``."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": name,
            "words": torch.tensor(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Undo what has been drawn since `random_states`. A generator that was not there then, such as a GPU's, stays.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError or RuntimeError: When ``states`` is not what
            `random_states` returned.
    """
    python, numpy = states["python"], states["numpy"]
    torch.set_rng_state(states["torch"])
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    words = numpy["words"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], words, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave all generators as they are now, whatever the block draws: looking at a model must not change its course."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)


@contextmanager
def fixed_order(is_asked: bool = True) -> Iterator[None]:
    """Choose for the block whether sums have a fixed order, on a GPU at some cost.

    cuBLAS promises one only with a workspace of fixed size, which it takes from the environment when it starts.

    Raises:
        DeviceError: When one is asked for, and an operation of the block knows none on its device.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    is_mild = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    was_filling = memory.fill_uninitialized_memory
    if is_asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_asked)
    memory.fill_uninitialized_memory = False  # it takes time, and all that is read was written
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise DeviceError(
            f"the operation `{found[1]}` sums in no fixed order here", hint="leave out `deterministic=true`"
        ) from None
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=is_mild)
        memory.fill_uninitialized_memory = was_filling
