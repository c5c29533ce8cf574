"""Checkpoints: what was saved comes back bit for bit, and what is damaged is named."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lfs_cli.config import ModelConfig, OptimizerGroup
from lfs_cli.errors import CheckpointError, DamageError
from lfs_cli.model import Transformer, cross_entropy
from lfs_cli.model.checksums import write_checksums
from lfs_cli.optimizers import OPTIMIZERS, AdamW, Optimizer, build_optimizers
from lfs_cli.training.checkpoint import (
    load_checkpoint,
    point_to,
    read_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    take_snapshot,
    tidy_checkpoints,
    write_checkpoint,
    write_snapshot,
)

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


TOKENIZER = b"{}"


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, optimizers = trained(name)
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, model, optimizers, {"progress": {"step": 2}}, TOKENIZER)
    expected = [move(model, optimizers, step) for step in range(2, 6)]

    fresh, fresh_optimizers = trained(name, steps=0, seed=1)
    state = read_checkpoint(folder, fresh, fresh_optimizers)
    assert state["progress"] == {"step": 2}
    assert [move(fresh, fresh_optimizers, step) for step in range(2, 6)] == expected
    for weight, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path) -> None:
    model, optimizers = trained("adamw")
    write_checkpoint(tmp_path / "step-000002", model, optimizers, {}, TOKENIZER)
    names = {path.name for path in (tmp_path / "step-000002").iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "state.safetensors",
        "state.json",
        "SHA256SUMS",
    }
    assert json.loads((tmp_path / "step-000002" / "config.json").read_text())["width"] == 32


def test_an_older_checkpoint_of_that_name_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "step-000002"
    for step in (1, 2):
        model, optimizers = trained("sgd", steps=step)
        write_checkpoint(folder, model, optimizers, {"step": step}, TOKENIZER)
    assert json.loads((folder / "state.json").read_text())["step"] == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = trained("sgd")
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, model, optimizers, {"step": 2}, TOKENIZER)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        write_checkpoint(folder, model, optimizers, {"step": 3}, TOKENIZER)
    assert caught.value.hint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


FILES = ["model.safetensors", "config.json", "tokenizer.json", "state.safetensors", "state.json", "SHA256SUMS"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "flipped bit", "longer"])
def test_damage_is_named_and_changes_nothing(name: str, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, *trained("adamw"), {}, TOKENIZER)
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    (folder / name).unlink()
    if damage != "gone":
        kept = {"empty": b"", "cut": content[:middle], "flipped bit": flipped, "longer": content + b"\0"}
        (folder / name).write_bytes(kept[damage])
    model, optimizers = trained("adamw", steps=0)
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(DamageError) as caught:
        read_checkpoint(folder, model, optimizers)
    assert str(folder / name) in str(caught.value) or (name == "SHA256SUMS" and str(folder) in str(caught.value))
    assert caught.value.hint
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_the_checkpoint_of_an_older_version_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, *trained("adamw"), {}, TOKENIZER)
    (folder / "SHA256SUMS").unlink()
    (folder / "state.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="version 1 of the format, not 2"):
        read_checkpoint(folder, *trained("adamw", steps=0))


class Killed(BaseException):
    """What a kill -9 is in a test: no handler of errors sees it."""


CALLS = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (os, "rmdir"), (os, "unlink")]


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[str]:
    """Let the call of that number to the file system raise ``error``, before or after its work in turn."""
    called: list[str] = []

    def failing(real, name: str):
        def call(*args, **options):
            called.append(name)
            if len(called) == number + 1:
                if number % 2:
                    real(*args, **options)
                raise error
            return real(*args, **options)

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), name))
    return called


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "full"])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_wherever_writing_ends_a_whole_checkpoint_is_there(
    error: BaseException, is_replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of them would take a minute
    model, optimizers = trained("sgd")
    earlier, folder = tmp_path / "step-000001", tmp_path / "step-000002"
    number, ended = 0, False
    while not ended:
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        write_checkpoint(folder if is_replaced else earlier, model, optimizers, {"mark": "old"}, TOKENIZER)
        with monkeypatch.context() as patch:
            called = fail_at(patch, number, error)
            try:
                write_checkpoint(folder, model, optimizers, {"mark": "new"}, TOKENIZER)
                ended = len(called) <= number
            except (Killed, CheckpointError):
                pass
        tidy_checkpoints(tmp_path)
        marks = {path.name: read_checkpoint(path, model, optimizers)["mark"] for path in tmp_path.iterdir()}
        allowed = (
            [{"step-000002": "old"}, {"step-000002": "new"}]
            if is_replaced
            else [{"step-000001": "old"}, {"step-000001": "old", "step-000002": "new"}]
        )
        assert marks in allowed, (number, called[number : number + 1])
        number += 1
    assert number > 20


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the names of open files")
def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: events.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1])
    write_checkpoint(tmp_path / "step-000002", *trained("sgd"), {}, TOKENIZER)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    draft = tmp_path / ".step-000002.tmp"
    assert before.count(str(draft)) > len(FILES)  # after each file, and once more for all
    assert before[-1] == str(draft)
    assert after == [str(tmp_path)]
    assert all(any(f".{name}." in path for path in before) for name in FILES)


def test_wherever_removing_ends_nothing_half_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = trained("sgd")
    folder = tmp_path / "step-000002"
    for number in range(10):
        write_checkpoint(folder, model, optimizers, {}, TOKENIZER)
        with monkeypatch.context() as patch:
            fail_at(patch, number, Killed())
            with contextlib.suppress(Killed):
                remove_checkpoint(folder)
        if folder.exists():
            read_checkpoint(folder, model, optimizers)
        tidy_checkpoints(tmp_path)
        assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_snapshot_is_not_changed_by_later_steps(tmp_path: Path) -> None:
    model, optimizers = trained("adamw")
    write_checkpoint(tmp_path / "step-000001", model, optimizers, {"step": 2}, TOKENIZER)
    state = {"step": 2}
    snapshot = take_snapshot(model, optimizers, state)
    for step in range(5):
        move(model, optimizers, step)
    torch.rand(7)
    write_snapshot(tmp_path / "step-000002", snapshot, TOKENIZER)
    sums = [(tmp_path / name / "SHA256SUMS").read_text() for name in ("step-000001", "step-000002")]
    assert [line.split()[1] for line in sums[0].splitlines()] == sorted(set(FILES) - {"SHA256SUMS"})
    for name in ("model.safetensors", "state.json"):
        assert [line for line in sums[0].splitlines() if name in line] == [
            line for line in sums[1].splitlines() if name in line
        ]


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


def _step_zero(tree: dict) -> None:
    tree["state"]["0"]["step"] = 0


def _state_that_is_a_tensor(tree: dict) -> None:
    tree["state"]["0"] = tree["state"]["0"]["mean"]


def _weights_that_are_tensors(tree: dict) -> None:
    tree["param_groups"][0]["params"][1] = tree["state"]["0"]["mean"]


@pytest.mark.parametrize("damage", [_step_zero, _state_that_is_a_tensor, _weights_that_are_tensors])
def test_a_state_that_no_optimizer_saves_is_refused(damage, tmp_path: Path) -> None:
    model, optimizers = trained("adamw")
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, model, optimizers, {"progress": {"step": 2}}, TOKENIZER)
    state = json.loads((folder / "state.json").read_text())
    damage(state["optimizers"][0])
    (folder / "state.json").write_text(json.dumps(state))
    write_checksums(folder)
    with pytest.raises(CheckpointError, match=r"the optimizer state in .* does not fit"):
        read_checkpoint(folder, *trained("adamw"))


def test_a_velocity_that_came_later_is_no_damage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    optimizers = build_optimizers(model, [OptimizerGroup(name="sgd", lr=1e-2, options={"momentum": 0.9})])
    move(model, optimizers, 0)
    write_checkpoint(tmp_path / "step-000001", model, optimizers, {}, TOKENIZER)
    fresh = build_optimizers(model, [OptimizerGroup(name="sgd", lr=1e-2, options={"momentum": 0.9})])
    read_checkpoint(tmp_path / "step-000001", model, fresh)
    velocities = [[state["velocity"] for state in some[0].state.values()] for some in (optimizers, fresh)]
    assert len(velocities[0]) == len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*velocities, strict=True))


def test_settings_of_a_run_are_those_of_its_config(tmp_path: Path) -> None:
    model, optimizers = trained("muon")
    folder = tmp_path / "step-000002"
    write_checkpoint(folder, model, optimizers, {"progress": {"step": 2}}, TOKENIZER)
    before = dict(optimizers[0].param_groups[0])
    state = json.loads((folder / "state.json").read_text())
    state["optimizers"][0]["param_groups"][0] |= {"scale": "", "iterations": 10**12, "momentum": 0.1}
    (folder / "state.json").write_text(json.dumps(state))
    write_checksums(folder)
    read_checkpoint(folder, model, optimizers)
    assert {**optimizers[0].param_groups[0], "params": ()} == {**before, "params": ()}


@pytest.mark.parametrize("setting", [{"scale": ""}, {"scale": "match_rms_adamw"}, {"iterations": 10**12}])
def test_a_lone_checkpoint_brings_rates_but_neither_counts_nor_names(setting: dict) -> None:
    model, (saved,) = trained("muon")
    saved.param_groups[0].update(setting, lr=0.5, weight_decay=0.0)
    save_checkpoint(model, saved, 2, whole := io.BytesIO())
    _, (fresh,) = trained("muon", steps=0)
    whole.seek(0)
    with pytest.raises(CheckpointError, match=f"`{next(iter(setting))}` is"):
        load_checkpoint(whole, model, fresh)
    saved.param_groups[0].update({name: fresh.param_groups[0][name] for name in setting})
    save_checkpoint(model, saved, 2, whole := io.BytesIO())
    whole.seek(0)
    load_checkpoint(whole, model, fresh)
    assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["weight_decay"]) == (0.5, 0.0)
