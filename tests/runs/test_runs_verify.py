"""A stopped and resumed run ends bit for bit like one that was not, with every optimizer and with parts that draw."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import Train, folder_of, tiny

from lfs_cli.config import TrainConfig
from lfs_cli.errors import DeviceError
from lfs_cli.generation.language_model import LanguageModel
from lfs_cli.model import FEED_FORWARDS, load_weights
from lfs_cli.model.feed_forward import SwiGLU
from lfs_cli.optimizers import OPTIMIZERS, SGD
from lfs_cli.runs import train as training
from lfs_cli.runs import verify
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.verify import verify_resume
from lfs_cli.training.step import train_step


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_resuming_is_exact(name: str, data: DataFolder) -> None:
    rows, error = verify_resume(tiny(optimizer__0__name=name, verify_steps=7), data=data)
    assert error is None
    assert [row["different"] for row in rows] == [0] * len(rows)
    assert all(row["compared"] for row in rows)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # a compiler has its own
@pytest.mark.parametrize("head", [32, 64], ids=["portable attention", "the fastest attention"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_resuming_is_exact_on_a_gpu(head: int, is_compiled: bool, data: DataFolder) -> None:
    shape = {"model__width": 2 * head, "model__heads": 2, "model__context_length": 128}
    rows, error = verify_resume(tiny(device="cuda", compile=is_compiled, **shape), data=data)
    assert error is None, rows


def test_the_check_asks_for_sums_in_a_fixed_order(data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(training, "train_step", lambda *a, **k: seen.append(asked()) or step(*a, **k))
    step, asked = train_step, torch.are_deterministic_algorithms_enabled
    assert verify_resume(tiny(verify_steps=3), data=data)[1] is None
    assert seen == [True] * 6
    assert not asked()


def test_sums_in_a_fixed_order_are_for_the_training_alone(train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(name: str) -> None:
        function = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *a, **k: seen.append((name, asked())) or function(*a, **k))

    seen, asked = [], torch.are_deterministic_algorithms_enabled
    for name in ("train_step", "evaluate"):
        look(name)
    stream = LanguageModel.stream
    monkeypatch.setattr(LanguageModel, "stream", lambda *a, **k: seen.append(("stream", asked())) or stream(*a, **k))
    ordered = train_tiny(tiny(deterministic=True))
    assert set(seen) == {("train_step", True), ("evaluate", True), ("stream", False)}
    seen.clear()
    free = train_tiny(tiny())
    assert set(seen) == {("train_step", False), ("evaluate", False), ("stream", False)}
    assert ordered.loss == free.loss  # a CPU has one order only


def test_a_part_that_knows_no_order_is_named(train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(*args: Any, **named: Any) -> torch.Tensor:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        return train_step(*args, **named)

    monkeypatch.setattr(training, "train_step", shuffled)
    assert train_tiny(tiny()).status == "finished"
    with pytest.raises(DeviceError, match="the operation `put_` sums in no fixed order here"):
        train_tiny(tiny(deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("steps", [3, 4, 12])
def test_resuming_is_exact_with_groups_and_any_number_of_steps(steps: int, data: DataFolder) -> None:
    groups = [{"match": "blocks.*.weight", "name": "muon", "lr": 0.01}, {"match": "*", "name": "adamw", "lr": 0.01}]
    rows, error = verify_resume(tiny(optimizer=groups, microbatch=2, verify_steps=steps), data=data)
    assert error is None, rows


@pytest.fixture
def noisy() -> str:
    """A feed-forward layer that draws from all three global generators."""

    class Noisy(SwiGLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + torch.rand(()) + random.random() + np.random.rand())

    name = "noisy"
    FEED_FORWARDS.register(name)(Noisy)
    yield name
    del FEED_FORWARDS._entries[name]


def noisy_config(name: str, **changes: Any) -> TrainConfig:
    return tiny(model__feed_forward=name, plugins=["json"], **changes)  # with a plugin any name may be registered


def test_random_numbers_go_on_where_they_were(noisy: str, data: DataFolder) -> None:
    rows, error = verify_resume(noisy_config(noisy), data=data)
    assert error is None, rows


def test_looking_at_a_model_draws_nothing(noisy: str, train_tiny: Train) -> None:
    weights = []
    for every in (1, 3):
        run = folder_of(train_tiny(noisy_config(noisy, eval_every=every)))
        weights.append(load_weights(run.checkpoint(8) / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("forgotten", ["torch", "python", "numpy"])
def test_a_forgotten_generator_is_found(
    forgotten: str, noisy: str, data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfs_cli.training import checkpoint, randomness

    def forget(states, device) -> None:
        now = randomness.random_states(device)
        randomness.restore_random_states(states | {forgotten: now[forgotten]}, device)

    monkeypatch.setattr(checkpoint, "restore_random_states", forget)
    rows, error = verify_resume(noisy_config(noisy), data=data)
    assert "a resumed run ends otherwise" in str(error)
    assert {row["what"] for row in rows if row["different"]} >= {"weights", "losses, norms and rates of each step"}


def test_an_optimizer_that_keeps_something_beside_its_state_is_found(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = SGD.update_many

    def update_many(self, weights, gradients, states, group) -> None:
        self.calls = getattr(self, "calls", 0) + 1
        plain(self, weights, [gradient * (1 + 0.01 * self.calls) for gradient in gradients], states, group)

    monkeypatch.setattr(SGD, "update_many", update_many)
    rows, error = verify_resume(tiny(optimizer__0__name="sgd"), data=data)
    assert str(error).startswith("a resumed run ends otherwise: weights differ, first `")
    assert "beside its state" in error.hint
    assert rows[0]["different"] > 0


def test_a_training_that_does_not_repeat_itself_is_told_apart(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, chance = SGD.update_many, random.Random(0)

    def update_many(self, weights, gradients, states, group) -> None:
        plain(self, weights, [gradient * (1 + chance.random()) for gradient in gradients], states, group)

    monkeypatch.setattr(SGD, "update_many", update_many)
    _, error = verify_resume(tiny(optimizer__0__name="sgd"), data=data)
    assert "does not repeat itself, stopped or not" in str(error)


def test_equal_is_equal_to_the_bit() -> None:
    assert not verify._is_same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not verify._is_same(torch.tensor([0.0]), torch.tensor([0.0], dtype=torch.float64))
    assert verify._is_same(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not verify._is_same(0.1 + 0.2, 0.3)
    assert not verify._is_same(None, 0)
