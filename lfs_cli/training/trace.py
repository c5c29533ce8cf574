"""A training step on tensors that have no numbers: what it would do and hold, found before there is one.

PyTorch's fake tensors have shapes, types and lifetimes, but no contents. So the real model, loss, backward pass and
optimizers run on them in a fraction of a second, whatever the size, and whoever watches the operations sees what a
device would be asked to do. It knows every option, as it runs the model; nothing has to be kept in step with it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfs_cli.config import ModelConfig, TrainConfig
from lfs_cli.errors import ConfigError
from lfs_cli.model import Transformer, next_token_loss
from lfs_cli.model.device import precision
from lfs_cli.optimizers import build_optimizers
from lfs_cli.training.cost import parameter_count


class UnforeseenError(ConfigError):
    """What a run takes depends on numbers that are not there yet."""


@contextmanager
def fake_model(config: ModelConfig) -> Iterator[Transformer]:
    """Within the block, new tensors have no numbers; nor has the model that it is given.

    Raises:
        UnforeseenError: When a part, of a plugin perhaps, asks tensors for numbers.
    """
    try:
        # Addresses would be 0, and a kernel that is launched with them would take the GPU down
        with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
            mode = FakeTensorMode()
        with mode:
            yield filled_model(config, torch.empty)
    except RuntimeError as error:
        raise UnforeseenError(
            f"what this run takes cannot be foreseen: {str(error).splitlines()[0]}",
            hint="a part of it asks tensors for their numbers; set `microbatch` to a number, and leave `--dry-run` out",
        ) from None


def filled_model(config: ModelConfig, fill: Callable[[torch.Size], Tensor]) -> Transformer:
    """Return a model whose weights and buffers are what ``fill`` returns for their shapes, without drawing any."""
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fill(weight.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fill(buffer.shape))
    return model


def run_pass(model: Transformer, tokens_BT: Tensor, dtype: torch.dtype) -> None:
    """Take tokens through ``model`` and back, adding to the gradients.

    Args:
        model: Of any numbers, or none.
        tokens_BT: (B, T), of which each is also what it is to predict.
        dtype: Of the matrix products.
    """
    with precision(tokens_BT.device, dtype):
        hidden_BTC = model.hidden(tokens_BT)
        config = model.config
        how = {"softcap": config.logit_softcap, "z_loss": config.z_loss, "cast_VC": model.head_cast}
        loss = next_token_loss(hidden_BTC, model.head_weight, tokens_BT, **how)
    loss.backward()


def no_tokens(model: Transformer, rows: int) -> Tensor:
    """Return tokens_BT (B, T) for so many sequences, on a CPU: autocast knows no GPU where there is none."""
    return torch.zeros(rows, model.config.context_length, dtype=torch.int64)


def optimizer_bytes(config: TrainConfig) -> tuple[int, int]:
    """Return the bytes that the optimizers of ``config`` remember, and the most that an update holds besides.

    Where a part of a plugin asks for numbers, that is as much as AdamW remembers.
    """
    try:
        with fake_model(config.model) as model:
            optimizers = build_optimizers(model, config.optimizer)
            for weight in model.parameters():
                weight.grad = torch.empty(weight.shape)

            def update() -> None:
                for optimizer in optimizers:
                    optimizer.step()

            update()
            states = [state for optimizer in optimizers for state in optimizer.state.values()]
            held = [x for state in states for x in state.values() if isinstance(x, Tensor)]
            return sum(x.untyped_storage().nbytes() for x in held), peak_bytes(update)
    except UnforeseenError:
        return 2 * 4 * parameter_count(config.model), 0


def peak_bytes(function: Callable[[], Any], inside: dict[Any, int] | None = None) -> int:
    """Return the most bytes of new tensors that lived at once while ``function`` ran. They may be fake.

    Args:
        function: What is watched.
        inside: Bytes that single operations hold while they run, beside their results.
    """
    watch = _Watch(inside or {})
    with watch:
        function()
    return watch.peak


class _Watch(TorchDispatchMode):
    """Notes every storage that an operation makes, and the most bytes that lived after any of them."""

    def __init__(self, inside: dict[Any, int]) -> None:
        super().__init__()
        self.inside = inside
        self.living: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and _storage(x) not in known:
                self.living[_storage(x)] = x.untyped_storage().nbytes()
        self.living = {storage: size for storage, size in self.living.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.living.values()) + self.inside.get(func, 0))
        return result


def _storage(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())
