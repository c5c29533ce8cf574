"""Checkpoints: everything a run needs to go on, in safetensors and JSON. No pickle, so loading one runs no code.

A checkpoint folder is a complete model and a complete state:

    model.safetensors    weights                       config.json      the model's shape
    tokenizer.json       the tokenizer                 state.safetensors  tensors of the optimizers
    state.json           step, best loss, tokenizer hash, and the optimizers' numbers with pointers to their tensors

It is written under a temporary name and renamed when complete, so a checkpoint that can be seen is whole.

`save_checkpoint` and `load_checkpoint` do the same for any model and optimizer in one file or file object.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lfs_cli.errors import CheckpointError
from lfs_cli.files import replace_bytes, replace_text
from lfs_cli.model import Transformer, load_state, load_weights, save_model, save_weights
from lfs_cli.optimizers import Optimizer

FORMAT = 1
"""Version of state.json."""


def write_checkpoint(
    folder: Path,
    model: Transformer,
    optimizers: Sequence[Optimizer],
    state: dict[str, Any],
    tokenizer_file: Path,
) -> None:
    """Write a complete checkpoint folder, atomically; an older one of that name is replaced.

    Args:
        folder: Where it will be.
        model: The model.
        optimizers: The optimizers, in the order of the config.
        state: JSON values to keep besides, such as the step.
        tokenizer_file: The tokenizer's file, copied in.

    Raises:
        CheckpointError: When the disk is full or the folder cannot be written; what was there before is untouched.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(model, temporary)
        tree, tensors = _flatten([optimizer.state_dict() for optimizer in optimizers])
        save_weights(tensors, temporary / "state.safetensors")
        text = json.dumps({"format": FORMAT, **state, "optimizers": tree}, indent=1) + "\n"
        replace_text(temporary / "state.json", text)
        replace_bytes(temporary / "tokenizer.json", tokenizer_file.read_bytes())
        replaced = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except CheckpointError:  # a file of weights says so itself
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {error.strerror or error}",
            hint="free some space or choose another folder with `--out`; earlier checkpoints are whole",
        ) from None


def read_checkpoint(folder: Path, model: Transformer, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint's weights and optimizer states into ``model`` and ``optimizers``, and return its state.

    Raises:
        CheckpointError: When a file is missing or damaged, or does not fit the model.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        trees = _unflatten(state.pop("optimizers"), load_weights(folder / "state.safetensors"))
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {error}", hint="resume from another checkpoint of the run"
        ) from None
    if state.get("format") != FORMAT or len(trees) != len(optimizers):
        raise CheckpointError(
            f"the checkpoint {folder} was written by another version or for other optimizers",
            hint="start a new run, or use the version of lfs that wrote it",
        )
    load_state(model, folder / "model.safetensors")
    for optimizer, tree in zip(optimizers, trees, strict=True):
        _load_optimizer(optimizer, tree, folder)
    return state


def point_to(pointer: Path, folder: Path) -> None:
    """Make the small file ``pointer`` hold the name of ``folder``, atomically."""
    replace_text(pointer, f"{folder.name}\n")


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, out: str | Path | BinaryIO) -> None:
    """Write the weights, the optimizer's state and the step to one safetensors file.

    Args:
        model: Any module.
        optimizer: Its optimizer.
        step: Steps done.
        out: A path, which is replaced atomically, or a binary file object.

    Source: Stanford CS336, assignment 1, "checkpointing".
    """
    tree, tensors = _flatten({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
    data = safetensors.torch.save(tensors, {"lfs": json.dumps({"format": FORMAT, "step": step, "tree": tree})})
    if isinstance(out, str | os.PathLike):
        replace_bytes(Path(out), data)
    else:
        out.write(data)


def load_checkpoint(source: str | Path | BinaryIO, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put what `save_checkpoint` wrote into ``model`` and ``optimizer``, and return the step.

    Raises:
        CheckpointError: When the file is missing, damaged, or does not fit the model.
    """
    name = str(source) if isinstance(source, str | os.PathLike) else "the file object"
    try:
        data = Path(source).read_bytes() if isinstance(source, str | os.PathLike) else source.read()
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"]["lfs"])
        tree = _unflatten(content["tree"], tensors)
        model.load_state_dict(tree["model"])
        _load_optimizer(optimizer, tree["optimizer"], name)
        return int(content["step"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{name} is not a checkpoint of this model: {error}", hint="name a file that `save_checkpoint` wrote"
        ) from None


def _load_optimizer(optimizer: torch.optim.Optimizer, tree: dict[str, Any], name: object) -> None:
    """Restore ``optimizer``; JSON has text keys where torch numbers the weights."""
    tree["state"] = {int(index): entry for index, entry in tree["state"].items()}
    try:
        optimizer.load_state_dict(tree)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the optimizer state in {name} does not fit: {error}", hint="resume with the config of the run"
        ) from None


def _flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists and tuples into JSON and the tensors.

    In the JSON, ``{"tensor": name}`` stands for a tensor and ``{"tuple": [...]}`` for a tuple: the settings of an
    optimizer that was loaded are then equal to those that were saved, `betas` included.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node.detach().clone().contiguous()  # a clone: safetensors refuses tied memory
            return {"tensor": name}
        if isinstance(node, dict):
            return {str(key): walk(value, f"{name}.{key}" if name else str(key)) for key, value in node.items()}
        if isinstance(node, list | tuple):
            items = [walk(value, f"{name}.{index}" if name else str(index)) for index, value in enumerate(node)]
            return {"tuple": items} if isinstance(node, tuple) else items
        return node

    return walk(tree, ""), tensors


def _unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `_flatten`."""
    match tree:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"tuple": list(items)}:
            return tuple(_unflatten(item, tensors) for item in items)
        case dict():
            return {key: _unflatten(value, tensors) for key, value in tree.items()}
        case list():
            return [_unflatten(value, tensors) for value in tree]
    return tree
