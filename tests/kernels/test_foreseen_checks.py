"""The self-checks that a run begins ahead are those that its first step asks for, no fewer and no more."""

from contextlib import nullcontext

import pytest
import torch
from fused_cases import HAS_KERNELS, INTERPRETED

from lfs_cli.config import TrainConfig, load_config
from lfs_cli.kernels import flash_attention, self_check
from lfs_cli.kernels.operation import as_on_gpu
from lfs_cli.model import Transformer
from lfs_cli.optimizers import build_optimizers
from lfs_cli.runs.setup import training_loss
from lfs_cli.training.ahead import foreseen_checks
from lfs_cli.training.casts import Casts
from lfs_cli.training.memory import resolved_for
from lfs_cli.training.step import train_step

CUDA = torch.device("cuda", 0)


@pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")
@pytest.mark.usefixtures("forgets_checks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("speedrun.json", {"heads": 2}),
        ("gpt2_small.json", {"heads": 4}),
        ("config.json", {"heads": 8}),
        ("config.json", {"heads": 8, "window": 8}),
    ],
    ids=str,
)
def test_a_first_step_asks_for_just_that(
    name: str, options: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with its kernels, and elsewhere with those for any GPU, interpreted."""
    device, width, T = (torch.device("cpu"), 32, 16) if INTERPRETED else (CUDA, 256, 256)
    shape = {"width": width, "layers": 5, "vocab_size": 300, "context_length": T, **options}
    config = load_config(
        TrainConfig, name, ["compile=false", *(f"model.{key}={value}" for key, value in shape.items())]
    )
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        monkeypatch.setattr(flash_attention, "_self_check", lambda *_: None)  # the interpreter takes its time
        monkeypatch.setattr(self_check, "fault_of", lambda *_: None)
    config = config.model_copy(update={"model": resolved_for(config.model, "cuda")})
    with as_on_gpu(is_compiled=False) if INTERPRETED else nullcontext():
        checks = foreseen_checks(config, device, dtype)
        assert not self_check._verdicts
        model = Transformer(config.model).to(device)
        loss, weights = training_loss(model, config, device, dtype), list(model.parameters())
        optimizers = build_optimizers(model, config.optimizer)
        tokens, targets = torch.randint(300, (2, 2, T), device=device)
        with Casts(model, dtype, optimizers).kept(1):
            train_step(loss, weights, optimizers, tokens, targets, passes=1, clip=config.clip)
    assert set(self_check._verdicts) == set(checks)
    assert len(checks) >= 6
    assert not any(self_check._verdicts.values())
