"""Self-checks that are foreseen are those that a first step asks for."""

from typing import Any

import pytest
import torch
from torch import nn

from lfs_cli.config import TrainConfig, load_config
from lfs_cli.kernels import hopper_attention, operation, self_check
from lfs_cli.model import Transformer
from lfs_cli.optimizers import OPTIMIZERS
from lfs_cli.training import ahead
from lfs_cli.training.ahead import begin_kernels, foreseen_checks

CUDA = torch.device("cuda", 0)


@pytest.fixture
def forgets_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be checked anew in this test, and no other test see what is found."""
    for name in ("_verdicts", "_under_way"):
        monkeypatch.setattr(self_check, name, {})


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a Hopper GPU, as far as anyone asks who launches nothing."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(operation, "_no_hopper_reason", lambda device: None if device.type == "cuda" else "it is none")
    monkeypatch.setattr(hopper_attention, "is_aligned", lambda _: True)
    monkeypatch.setattr(ahead, "_checks_of_optimizers", lambda *_: {})  # they need memory


def config_of(name: str, **changes: Any) -> TrainConfig:
    return load_config(TrainConfig, name, [f"{key}={value}" for key, value in changes.items()])


@pytest.mark.usefixtures("hopper", "forgets_checks")
@pytest.mark.parametrize(
    ("name", "changes", "kernels"),
    [
        (
            "speedrun.json",
            {"compile": '"blocks"'},
            "Hopper cross-entropy, RMSNorm backward, RMSNorm forward, embedding, hopper attention, rotation",
        ),
        (
            "gpt2_small.json",
            {},
            "Hopper cross-entropy, gated product, gated product backward, hopper attention, turned product",
        ),
        (
            "config.json",
            {},
            "Hopper cross-entropy, gated product, gated product backward, short attention backward, "
            "short attention forward",
        ),
        (
            "config.json",
            {"model.context_length": 1024, "model.heads": 8, "model.checkpointing": "full"},
            "Hopper cross-entropy, gated product, gated product backward, hopper attention, turned product",
        ),
        (
            "config.json",
            {"model.vocab_size": 500, "compile": "false"},
            "RMSNorm backward, RMSNorm forward, cross-entropy, embedding, gated product, gated product backward, "
            "short attention backward, short attention forward",
        ),
        ("config.json", {"data.documents": "packed"}, ""),
    ],
    ids=str,
)
def test_the_kernels_of_a_run_are_foreseen(name: str, changes: dict[str, Any], kernels: str) -> None:
    state = torch.get_rng_state()
    config = config_of(name, **{"compile": "true"} | changes)
    checks = foreseen_checks(config, CUDA, torch.bfloat16)
    assert ", ".join(sorted({check.kernel for check in checks.values()})) == kernels
    assert {check.device for check in checks.values()} <= {CUDA}
    assert len({case[0] for case in checks if "attention" in checks[case].kernel}) == (2 if kernels else 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not self_check._verdicts


@pytest.mark.usefixtures("hopper", "forgets_checks")
def test_what_cannot_be_foreseen_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(ahead, "begin_checks", begun.append)
    begin_kernels(config_of("config.json"), torch.device("cpu"), torch.float32)
    assert not begun
    begin_kernels(config_of("config.json"), CUDA, torch.bfloat16)
    assert len(begun.pop()) == 5
    with_plugin = config_of("config.json").model_copy(update={"plugins": ("plugin.py",)})
    begin_kernels(with_plugin, CUDA, torch.bfloat16)
    assert not begun
    monkeypatch.setattr(Transformer, "hidden", lambda *_, **__: 1 / 0)
    begin_kernels(config_of("config.json"), CUDA, torch.bfloat16)
    assert not begun


@pytest.mark.gpu
@pytest.mark.usefixtures("forgets_checks")
def test_threads_find_nothing_wrong() -> None:
    config = config_of("speedrun.json")
    begin_kernels(config, CUDA, torch.bfloat16)
    found = {case: future.result(timeout=120) for case, future in self_check._under_way.items()}
    assert len(found) >= 8
    assert not any(found.values())
    weight = nn.Parameter(torch.ones(16, 16, device=CUDA))
    weight.grad = torch.ones_like(weight)
    OPTIMIZERS.create("adamw", [("weight", weight)], lr=0.1).step(scale=torch.ones((), device=CUDA))
    assert not any(self_check._verdicts.values())
