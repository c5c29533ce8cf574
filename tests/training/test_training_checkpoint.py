"""Checkpoints: what was saved comes back bit for bit, and what is damaged is named."""

import io
import json
import os
from pathlib import Path

import pytest
import torch

from lfs_cli.config import ModelConfig, OptimizerGroup
from lfs_cli.errors import CheckpointError
from lfs_cli.model import Transformer, cross_entropy
from lfs_cli.optimizers import OPTIMIZERS, AdamW, Optimizer, build_optimizers
from lfs_cli.training.checkpoint import load_checkpoint, point_to, read_checkpoint, save_checkpoint, write_checkpoint

SHAPE = ModelConfig(vocab_size=300, context_length=16, width=32, layers=2, heads=4, tied_head=True)


def trained(name: str, steps: int = 2, seed: int = 0) -> tuple[Transformer, list[Optimizer]]:
    torch.manual_seed(seed)
    model = Transformer(SHAPE)
    optimizers = build_optimizers(model, [OptimizerGroup(name=name, lr=1e-2)])
    for step in range(steps):
        move(model, optimizers, step)
    return model, optimizers


def move(model: Transformer, optimizers: list[Optimizer], step: int) -> float:
    tokens = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(step))
    loss = cross_entropy(model(tokens), tokens.roll(-1))
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    return path


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_training_goes_on_bit_for_bit(name: str, tmp_path: Path, tokenizer_file: Path) -> None:
    model, optimizers = trained(name)
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, model, optimizers, {"progress": {"step": 2}}, tokenizer_file)
    expected = [move(model, optimizers, step) for step in range(2, 6)]

    fresh, fresh_optimizers = trained(name, steps=0, seed=1)
    state = read_checkpoint(folder, fresh, fresh_optimizers)
    assert state["progress"] == {"step": 2}
    assert [move(fresh, fresh_optimizers, step) for step in range(2, 6)] == expected
    for weight, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path, tokenizer_file: Path) -> None:
    model, optimizers = trained("adamw")
    write_checkpoint(tmp_path / "step-000002", model, optimizers, {}, tokenizer_file)
    names = {path.name for path in (tmp_path / "step-000002").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "state.safetensors", "state.json"}
    assert json.loads((tmp_path / "step-000002" / "config.json").read_text())["width"] == 32


def test_an_older_checkpoint_of_that_name_is_replaced(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = tmp_path / "step-000002"
    for step in (1, 2):
        model, optimizers = trained("sgd", steps=step)
        write_checkpoint(folder, model, optimizers, {"step": step}, tokenizer_file)
    assert json.loads((folder / "state.json").read_text())["step"] == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizers = trained("sgd")
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, model, optimizers, {"step": 2}, tokenizer_file)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        write_checkpoint(folder, model, optimizers, {"step": 3}, tokenizer_file)
    assert caught.value.hint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "tokenizer.json"]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "model.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "flipped header"])
def test_damage_is_named(name: str, damage: str, tmp_path: Path, tokenizer_file: Path) -> None:
    model, optimizers = trained("adamw")
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, model, optimizers, {}, tokenizer_file)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "gone":
        kept = {"empty": b"", "cut": content[: len(content) // 2], "flipped header": b"\xff" + content[1:]}
        (folder / name).write_bytes(kept[damage])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, *trained("adamw", steps=0))
    assert "step-000002" in str(caught.value)
    assert caught.value.hint


def test_a_pointer_holds_a_name(tmp_path: Path) -> None:
    point_to(tmp_path / "latest", tmp_path / "step-000010")
    point_to(tmp_path / "latest", tmp_path / "step-000020")
    assert (tmp_path / "latest").read_text() == "step-000020\n"


@pytest.mark.parametrize("kind", ["path", "text", "file object"])
def test_one_file_holds_model_and_optimizer(kind: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    out = {"path": tmp_path / "x.safetensors", "text": str(tmp_path / "x.safetensors"), "file object": io.BytesIO()}[
        kind
    ]
    save_checkpoint(model, optimizer, 7, out)
    if isinstance(out, io.BytesIO):
        out.seek(0)

    fresh = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    fresh_optimizer = AdamW(fresh.parameters(), lr=0.3)
    assert load_checkpoint(out, fresh, fresh_optimizer) == 7
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[key])
    before, after = optimizer.state_dict(), fresh_optimizer.state_dict()
    assert before["param_groups"][0]["lr"] == after["param_groups"][0]["lr"] == 0.1
    for index, entry in before["state"].items():
        assert all(torch.equal(torch.as_tensor(entry[k]), torch.as_tensor(after["state"][index][k])) for k in entry)


def test_tied_weights_can_be_saved_in_one_file(tmp_path: Path) -> None:
    model, optimizers = trained("adamw")
    save_checkpoint(model, optimizers[0], 2, tmp_path / "x")
    fresh, fresh_optimizers = trained("adamw", steps=0, seed=1)
    assert load_checkpoint(tmp_path / "x", fresh, fresh_optimizers[0]) == 2
    assert torch.equal(fresh.embedding.weight, model.embedding.weight)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizers = trained("adamw", steps=0)
    (tmp_path / "x").write_bytes(b"not a checkpoint")
    for source in (tmp_path / "x", tmp_path / "missing", io.BytesIO(b"")):
        with pytest.raises(CheckpointError):
            load_checkpoint(source, model, optimizers[0])
