"""Checkpoints: everything a run needs to go on, in safetensors and JSON. No pickle, so loading one runs no code.

A checkpoint folder is a complete model and a complete state:

    model.safetensors    weights                       config.json      the model's shape
    tokenizer.json       the tokenizer                 state.safetensors  tensors of optimizers and random generators
    state.json           step, best loss, tokenizer hash, and the numbers of optimizers with pointers to their tensors
    SHA256SUMS           a checksum of each of them, verified when the folder is read

It is made in two parts, so that training goes on while the disk is busy: `take_snapshot` copies all of it to the host,
and `write_snapshot` writes that copy, in another thread if need be. The folder is written under a temporary name,
brought to the disk and renamed when complete, so a checkpoint that can be seen is whole. Three hidden names can be left
by a process that was killed, and `tidy_checkpoints` sees to them:

    .step-000500.tmp     not complete yet: removed
    .step-000500.old     set aside for the new one of its name, which did not come: put back
    .step-000500.gone    being removed: removed

`save_checkpoint` and `load_checkpoint` do the same for any model and optimizer in one file or file object.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lfs_cli.config import ModelConfig, dump_config
from lfs_cli.errors import CheckpointError, DamageError, remedy
from lfs_cli.files import parse_json, read_json, replace_bytes, replace_text, sync
from lfs_cli.model import Transformer, load_state, load_weights, save_weights
from lfs_cli.model.checksums import CHECKSUMS, verify_checksums, write_checksums
from lfs_cli.optimizers import Optimizer
from lfs_cli.training.randomness import random_states, restore_random_states

FORMAT = 2
"""Version of state.json. 2 has the random states, and checksums beside it."""


@dataclass(frozen=True)
class Snapshot:
    """A model and its optimizers as they were at one moment, on the host.

    Args:
        config: Shape of the model.
        weights: Its tensors by name, each once.
        state: JSON values, such as the step.
        tree: The optimizers' states and the random states, with pointers into ``tensors``.
        tensors: Their tensors by name.
        copied: Marks on a GPU that all copies to the host are done; None where they are done already.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    state: dict[str, Any]
    tree: Any
    tensors: dict[str, Tensor]
    copied: torch.cuda.Event | None = None


def take_snapshot(model: Transformer, optimizers: Sequence[Optimizer], state: dict[str, Any]) -> Snapshot:
    """Copy all that a checkpoint holds to the host, where no later step changes it.

    On CUDA the copies go to pinned memory and are only put in the queue: they come after the work of this step and
    before that of the next one, and nothing waits for them here.

    Args:
        model: The model.
        optimizers: The optimizers, in the order of the config.
        state: JSON values to keep besides. They must not change later.
    """
    device = next(model.parameters()).device
    names: dict[int, str] = {}
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names.setdefault(id(tensor), name) == name:  # tied weights are kept once
            weights[name] = _to_host(tensor)
    content = {
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "random": random_states(device),
    }
    tree, tensors = _flatten(content, _to_host)
    copied = None
    if device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record()
    return Snapshot(model.config, weights, state, tree, tensors, copied)


def write_snapshot(folder: Path, snapshot: Snapshot, tokenizer: bytes) -> None:
    """Write a complete checkpoint folder, atomically; an older one of that name is replaced.

    Args:
        folder: Where it will be.
        snapshot: What to write.
        tokenizer: Content of the tokenizer's file.

    Raises:
        CheckpointError: When the disk is full or the folder cannot be written; what was there before is untouched.
    """
    temporary, replaced = _hidden(folder, "tmp"), _hidden(folder, "old")
    try:
        if snapshot.copied is not None:
            snapshot.copied.synchronize()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_weights(snapshot.weights, temporary / "model.safetensors")
        replace_text(temporary / "config.json", dump_config(snapshot.config))
        save_weights(snapshot.tensors, temporary / "state.safetensors")
        text = json.dumps({"format": FORMAT, **snapshot.state, **snapshot.tree}, indent=1) + "\n"
        replace_text(temporary / "state.json", text)
        replace_bytes(temporary / "tokenizer.json", tokenizer)
        write_checksums(temporary)
        sync(temporary)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        sync(folder.parent)
        remove_checkpoint(replaced)
    except (CheckpointError, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
        if isinstance(error, CheckpointError):  # a file of weights says so itself
            raise
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {error.strerror or error}",
            hint=f"{remedy(error) or 'check the disk'}; earlier checkpoints are whole",
        ) from None


def write_checkpoint(
    folder: Path, model: Transformer, optimizers: Sequence[Optimizer], state: dict[str, Any], tokenizer: bytes
) -> None:
    """Take a snapshot and write it: `take_snapshot` and `write_snapshot` in one."""
    write_snapshot(folder, take_snapshot(model, optimizers, state), tokenizer)


def read_checkpoint(folder: Path, model: Transformer, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint into ``model``, ``optimizers`` and the random generators, and return its other values.

    All files are verified first, so that a damaged checkpoint changes nothing.

    Raises:
        DamageError: When a file is missing or damaged.
        CheckpointError: When it does not fit the model, or another version of lfs wrote it.
    """
    if (folder / CHECKSUMS).exists() or not _is_first_version(folder):
        verify_checksums(folder)
    try:
        state = read_json(folder / "state.json")
        if (version := state.pop("format")) != FORMAT:
            raise CheckpointError(
                f"the checkpoint {folder} has version {version} of the format, not {FORMAT}",
                hint="start a new run, or use the version of lfs that wrote it",
            )
        tensors = load_weights(folder / "state.safetensors")
        trees, random = (_unflatten(state.pop(name), tensors) for name in ("optimizers", "random"))
        if not isinstance(trees, list):
            raise TypeError("`optimizers` is no list")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None
    if len(trees) != len(optimizers):
        raise CheckpointError(
            f"the checkpoint {folder} has {len(trees)} optimizers, and the config {len(optimizers)}",
            hint="resume with the optimizers of the run",
        )
    load_state(model, folder / "model.safetensors")
    for optimizer, tree in zip(optimizers, trees, strict=True):
        _load_optimizer(optimizer, tree, folder, keeps_settings=True)
    try:
        restore_random_states(random, next(model.parameters()).device)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise _damaged(folder, error) from None
    return state


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, under another name first: what is half removed must not look like a checkpoint."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name.removeprefix('.').removesuffix('.old')}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def tidy_checkpoints(checkpoints: Path) -> None:
    """Clear away what a killed process has left among ``checkpoints``. Only the run's one writer may do so.

    Raises:
        CheckpointError: When the folder cannot be written.
    """
    try:
        for path in sorted(checkpoints.glob(".step-*")):
            whole = path.with_name(path.stem.removeprefix("."))
            if path.suffix == ".old" and not whole.exists():
                path.rename(whole)
            else:
                shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {checkpoints}: {error.strerror}", hint=remedy(error) or "check the disk"
        ) from None


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
    tree, tensors = _flatten({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}, _copy)
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
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")].decode())
        content = parse_json(header["__metadata__"]["lfs"])
        tree = _unflatten(content["tree"], tensors)
        model.load_state_dict(tree["model"])
        _load_optimizer(optimizer, tree["optimizer"], name)
        return int(content["step"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{name} is not a checkpoint of this model: {error}", hint="name a file that `save_checkpoint` wrote"
        ) from None


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tree: dict[str, Any], name: object, *, keeps_settings: bool = False
) -> None:
    """Restore ``optimizer``; JSON has text keys where torch numbers the weights.

    Args:
        optimizer: What is restored.
        tree: Its `state_dict`, as read.
        name: Where that is from, for messages.
        keeps_settings: Whether settings stay those that it was made with, such as a run's config has them.
    """
    try:
        tree["state"] = {int(index): entry for index, entry in tree["state"].items()}
        if keeps_settings:
            for saved, own in zip(tree["param_groups"], optimizer.param_groups, strict=True):
                saved |= {key: value for key, value in own.items() if key in _settings(optimizer) and key != "lr"}
        _check_state(optimizer, tree)
        optimizer.load_state_dict(tree)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"the optimizer state in {name} does not fit: {error}", hint="resume with the config of the run"
        ) from None


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the settings that ``optimizer`` can be made with, and their defaults. What else a group has is counted."""
    parameters = signature(type(optimizer)).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "params"}


def _check_state(optimizer: torch.optim.Optimizer, tree: dict[str, Any]) -> None:
    """Raise ValueError when ``optimizer`` cannot have saved ``tree``: torch itself would notice at the next step."""
    groups = optimizer.state_dict()["param_groups"]
    for saved, own in zip(tree["param_groups"], groups, strict=True):
        strange = [name for name, value in own.items() if not _is_like(saved[name], value)]
        # No matter of degree: which weights they are, how often something is done, and what it is called
        fixed = ["params"]
        if isinstance(optimizer, Optimizer):
            fixed += [name for name, default in _settings(optimizer).items() if type(default) in (int, str)]
        strange += [name for name in fixed if repr(saved[name]) != repr(own[name])]
        if strange:
            raise ValueError(f"`{strange[0]}` is `{str(saved[strange[0]])[:40]}`")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, entry in tree["state"].items():
        if not isinstance(entry, dict):
            raise ValueError(f"the state of weight {index} has no parts")
        if not isinstance(optimizer, Optimizer) or not entry:
            continue
        weight = weights[index].to(torch.promote_types(weights[index].dtype, torch.float32))
        fresh = {**optimizer.start(weight), "step": 0}
        # What an optimizer makes later, as SGD its velocity, has the shape of the weight
        later = dict.fromkeys(entry.keys() - fresh.keys(), weight)
        if fresh.keys() - entry.keys() or not all(_is_like(x, (fresh | later)[name]) for name, x in entry.items()):
            raise ValueError(f"the state of weight {index} has other parts")
        if type(entry["step"]) is not int or entry["step"] < 1:  # a state is made by the first step
            raise ValueError(f"the state of weight {index} is of step `{entry['step']}`")


def _is_like(value: Any, own: Any) -> bool:
    """Whether a saved value can stand where ``own`` does: a tensor of that shape and type, a number, a text, ..."""
    if isinstance(own, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (own.shape, own.dtype)
    if isinstance(own, list | tuple):
        return type(value) is type(own) and len(value) == len(own) and all(map(_is_like, value, own))
    if isinstance(own, int | float) and not isinstance(own, bool):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return own is None or isinstance(value, type(own))


def _is_first_version(folder: Path) -> bool:
    """Whether lfs wrote ``folder`` before checkpoints had checksums."""
    try:
        return read_json(folder / "state.json")["format"] == 1
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _damaged(folder: Path, error: Exception) -> DamageError:
    return DamageError(f"the checkpoint {folder} is damaged: {error}", hint="resume from another checkpoint of the run")


def _hidden(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)  # safetensors refuses tied memory


def _to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the host. From CUDA it is only under way, until what is in the queue now is done."""
    if tensor.device.type == "cpu":
        return _copy(tensor)
    if tensor.device.type != "cuda":
        return tensor.detach().cpu().contiguous()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.detach(), non_blocking=True)


def _flatten(tree: Any, copy: Callable[[Tensor], Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists and tuples into JSON and the tensors, each of them as ``copy`` returns it.

    In the JSON, ``{"tensor": name}`` stands for a tensor and ``{"tuple": [...]}`` for a tuple: the settings of an
    optimizer that was loaded are then equal to those that were saved, `betas` included.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = copy(node)
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
