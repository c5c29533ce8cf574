"""Weights on disk: safetensors files, and the folder that is a complete model.

A safetensors file is the length of a JSON header (8 bytes, little-endian), the header with the type, shape and place of
each tensor, and their raw bytes. It holds numbers only, so that reading one cannot run code.

A model folder is `model.safetensors` and `config.json`, a ModelConfig. Weights that are used twice are stored once.
Files are written under a temporary name, flushed to the disk and renamed: a file of that name is always whole.

Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from lfs_cli.config import ModelConfig, dump_config, load_config
from lfs_cli.errors import CheckpointError, ConfigError
from lfs_cli.model.transformer import Transformer

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_weights(weights: nn.Module | Mapping[str, Tensor], target: Path | str | BinaryIO) -> None:
    """Write tensors as safetensors, one at a time.

    Args:
        weights: A module, of which parameters and persistent buffers are saved, or tensors by name.
        target: A path, which is replaced when all is written, or a binary file to write into.

    Raises:
        CheckpointError: When the file cannot be written.
    """
    tensors = dict(weights) if isinstance(weights, Mapping) else _tensors_of(weights)
    if isinstance(target, str | Path):
        write_atomically(target, lambda file: _write(tensors, file))
    else:
        _write(tensors, target)


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
    write_atomically(folder / "config.json", lambda file: file.write(dump_config(model.config).encode()))


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
    with torch.device("meta"):  # no time spent on random numbers that are overwritten
        model = Transformer(config)
    model.to(dtype or next((tensor.dtype for tensor in tensors.values()), torch.float32))
    model.to_empty(device=device)
    _fill(model, tensors, folder)
    return model


def write_atomically(path: Path | str, write: Callable[[BinaryIO], object]) -> None:
    """Replace the file at ``path`` with what ``write`` puts into the file it is given, or leave all as it was.

    Raises:
        CheckpointError: When the disk is full, or the file cannot be written for another reason.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}",
            hint="free some space or choose another folder; what was there before is untouched",
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy ``tensors`` into ``module``, or raise CheckpointError that names those of ``source`` that do not fit."""
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
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module keeps, each tensor once, under the first of its names."""
    kept = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in kept.items():
        first.setdefault(id(tensor), name)
    return {name: tensor.detach() for name, tensor in kept.items() if first[id(tensor)] == name}


def _write(tensors: Mapping[str, Tensor], file: BinaryIO) -> None:
    # Widest types first, so that every tensor starts at a multiple of its type's size and a reader can map it
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(raw.numpy().data)
