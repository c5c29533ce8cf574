"""Weights on disk: safetensors files, and the folder that is a complete model.

A safetensors file is the length of a JSON header (8 bytes, little-endian), the header with the type, shape and place of
each tensor, and their raw bytes. It holds numbers only, so that reading one cannot run code.

A model folder is `model.safetensors` and `config.json`, a ModelConfig. Weights that are used twice are stored once.
Files are written under a temporary name, flushed to the disk and renamed: a file of that name is always whole.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from lfs_cli.config import ModelConfig, dump_config, load_config
from lfs_cli.errors import CheckpointError, ConfigError
from lfs_cli.files import replacing
from lfs_cli.model.transformer import Transformer

LARGEST_TABLES = 1 << 28
"""Bytes of rotary tables that any model may have; a larger one is allowed 16 times what its weights take."""


def save_weights(weights: nn.Module | Mapping[str, Tensor], target: Path | str | BinaryIO) -> None:
    """Write tensors as safetensors.

    Args:
        weights: A module, of which parameters and persistent buffers are saved, or tensors by name.
        target: A path, which is replaced when all is written, or a binary file to write into.

    Raises:
        CheckpointError: When the file cannot be written.
    """
    tensors = dict(weights) if isinstance(weights, Mapping) else _tensors_of(weights)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if isinstance(target, str | Path):
        with replacing_weights(target) as draft:
            save_file(tensors, draft)
    else:
        target.write(save(tensors))


def load_weights(source: Path | str | BinaryIO, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        source: A path or a binary file.
        device: Where the tensors are put.

    Raises:
        CheckpointError: When the file is missing, cannot be read or is not a whole safetensors file.
    """
    try:
        if isinstance(source, str | Path):
            return load_file(source, device=str(device))
        return {name: tensor.to(device) for name, tensor in load(source.read()).items()}
    except OSError as error:
        raise CheckpointError(
            f"cannot read {source}: {error.strerror or error}", hint="check the path, or choose another checkpoint"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{source} is not a whole safetensors file: {error}", hint="choose another checkpoint of the run"
        ) from None


def load_state(module: nn.Module, source: Path | str | BinaryIO) -> None:
    """Read weights that `save_weights` wrote into ``module``: all of them, or none.

    Args:
        module: What receives them, in its own type and on its own device.
        source: A path or a binary file.

    Raises:
        CheckpointError: When the file cannot be read, or a tensor is missing, left over or has another shape.
    """
    _fill(module, load_weights(source), source)


def save_model(model: Transformer, folder: Path | str) -> None:
    """Write ``model`` as a folder that `load_model` reads: `model.safetensors` and `config.json`."""
    folder = Path(folder)
    save_weights(model, folder / "model.safetensors")
    with replacing_weights(folder / "config.json") as draft:
        draft.write_text(dump_config(model.config), encoding="utf-8")


def load_model(folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Read a model folder.

    Args:
        folder: Holds `model.safetensors` and `config.json`.
        device: Where the model is put.
        dtype: Type of its weights; by default the one they were saved in.

    Returns:
        The model, in training mode as a new one is.

    Raises:
        CheckpointError: When a file is missing or damaged, or the two do not fit each other.
    """
    folder = Path(folder)
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a model folder: {' and '.join(f'`{name}`' for name in missing)} missing",
            hint="name a folder such as `data/runs/<run>/checkpoints/step-000500`",
        )
    try:
        config = load_config(ModelConfig, folder / "config.json")
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not a model config: {error}", hint=error.hint) from None
    tensors = load_weights(folder / "model.safetensors")
    _check_size(config, tensors, folder)
    try:
        with torch.device("meta"):  # no time spent on random numbers that are overwritten
            model = Transformer(config)
    except ConfigError as error:
        raise CheckpointError(
            f"the model in {folder} has a part that is not here: {error}",
            hint="name the module that registers it, such as `--set 'plugins=[\"my_module\"]'`",
        ) from None
    _check_fit(model, tensors, folder)  # before any memory is taken for what a config only claims
    model.to(dtype or next((tensor.dtype for tensor in tensors.values()), torch.float32))
    model.to_empty(device=device)
    _fill(model, tensors, folder)
    return model


@contextmanager
def replacing_weights(path: Path | str) -> Iterator[Path]:
    """Yield a name to write to that becomes ``path`` when the block ends well (`lfs_cli.files.replacing`).

    Raises:
        CheckpointError: When the disk is full, or the file cannot be written for another reason.
    """
    try:
        with replacing(Path(path)) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"cannot write {path}: {reason}",
            hint="free some space or choose another folder; what was there before is untouched",
        ) from None


def _check_size(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError when ``config`` claims layers without weights, or positions beyond all proportion."""
    weights = sum(tensor.nbytes for tensor in tensors.values())
    tables = 8 * config.context_length * config.head_dim if config.positions == "rope" else 0
    if config.layers > len(tensors) or tables > max(LARGEST_TABLES, 16 * weights):
        what = f"{config.layers:,} layers and {config.context_length:,} positions"
        raise CheckpointError(
            f"{folder / 'config.json'} tells of {what}, which do not fit the {len(tensors)} tensors of the weights",
            hint="use the `config.json` that was saved beside the weights",
        )


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy ``tensors`` into ``module``, or raise CheckpointError as `_check_fit` does."""
    _check_fit(module, tensors, source)
    with torch.no_grad():
        for name, tensor in _tensors_of(module).items():
            tensor.copy_(tensors[name])


def _check_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise CheckpointError that names the tensors of ``source`` that do not fit ``module``."""
    wanted = _tensors_of(module)
    complaints = [f"`{name}` is missing" for name in wanted if name not in tensors]
    complaints += [f"`{name}` is unknown" for name in tensors if name not in wanted]
    complaints += [
        f"`{name}` has shape {list(tensors[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if complaints:
        shown = "; ".join(complaints[:5]) + (f"; and {len(complaints) - 5} more" if len(complaints) > 5 else "")
        raise CheckpointError(
            f"weights of {source} do not fit the model: {shown}",
            hint="use the `config.json` that was saved beside the weights",
        )


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module keeps, each tensor once, under the first of its names."""
    kept = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in kept.items():
        first.setdefault(id(tensor), name)
    return {name: tensor.detach() for name, tensor in kept.items() if first[id(tensor)] == name}
