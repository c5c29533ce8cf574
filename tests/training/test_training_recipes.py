"""Recipes as a whole: fast ways equal plain ones over 200 steps, a seed gives the same losses, and configs train."""

import json
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.config import ModelConfig, OptimizerGroup, ScheduleConfig
from lfs_cli.corpus.batches import document_lengths
from lfs_cli.model import Transformer, cross_entropy, next_token_loss
from lfs_cli.model.device import as_written, precision
from lfs_cli.optimizers import Optimizer, adamw, build_optimizers, build_schedule
from lfs_cli.training.graphs import CudaRecorder, GraphedPass
from lfs_cli.training.step import train_step

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 200
PLAIN = ModelConfig(vocab_size=40, context_length=16, width=16, layers=2, heads=2, feed_forward_width=24)
EVERYTHING = PLAIN.model_copy(
    update={
        "qk_norm": True,
        "zero_init": True,
        "logit_softcap": 15.0,
        "embedding_norm": True,
        "embedding_skip": True,
        "value_embeddings": 1,
        "window": 6,
        "window_pattern": "SL",
        "feed_forward": "relu2",
    }
)
ADAMW = [OptimizerGroup(lr=0.01)]
RECIPE = [
    OptimizerGroup(match=("blocks.*.weight", "!*norm*"), name="muon", lr=0.02, options={"momentum_warmup": 50}),
    OptimizerGroup(match=("*norm*", "*mix"), lr=0.01, options={"weight_decay": 0.0}),
    OptimizerGroup(lr=0.01),
]


def losses_of(model: Transformer, groups: list[OptimizerGroup], *, compiles=False, one_by_one=False) -> list[float]:
    """Train on a text with a rule to learn, documents included, and return the loss of each step."""
    torch.manual_seed(0)
    model.load_state_dict(Transformer(model.config).state_dict())
    optimizers = build_optimizers(model, groups)
    if one_by_one:
        for optimizer, plain in zip(optimizers, build_optimizers(model, groups), strict=True):
            optimizer.update_many = partial(Optimizer.update_many, plain)
    schedule = build_schedule(ScheduleConfig(name="wsd", final=0.0, warmup_steps=10, options={"shape": "sqrt"}), STEPS)

    def loss(tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTC = model.hidden(tokens_BT, documents=document_lengths(tokens_BT, 0))
        return next_token_loss(hidden_BTC, model.head_weight, targets_BT, softcap=model.config.logit_softcap)

    function = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiles else loss
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = schedule(step) * optimizer.param_groups[0]["peak_lr"]
        starts_B1 = torch.randint(40, (8, 1), generator=generator)
        text = (starts_B1 + 7 * torch.arange(17)) % 40
        parameters = list(model.parameters())
        numbers = train_step(function, parameters, optimizers, text[:, :-1], text[:, 1:], passes=2, clip=1.0)
        losses.append(numbers[0].item())
    return losses


@cache
def plain_losses(is_recipe: bool) -> list[float]:
    return losses_of(Transformer(EVERYTHING if is_recipe else PLAIN), RECIPE if is_recipe else ADAMW)


def test_the_same_seed_gives_the_same_losses() -> None:
    assert losses_of(Transformer(EVERYTHING), RECIPE) == plain_losses(True)
    assert plain_losses(True)[-1] < 0.1 * plain_losses(True)[0]


def test_updates_of_many_weights_give_the_losses_of_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = losses_of(Transformer(EVERYTHING), RECIPE, one_by_one=True)
    monkeypatch.setattr(adamw, "on_gpu", lambda _: True)  # on lists
    many = losses_of(Transformer(EVERYTHING), RECIPE)
    assert alone == pytest.approx(many, rel=2e-3, abs=1e-3)  # stacked products round in another order
    assert losses_of(Transformer(PLAIN), ADAMW, one_by_one=True) == losses_of(Transformer(PLAIN), ADAMW)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
def test_the_compiled_step_gives_the_losses_of_the_plain_one() -> None:
    compiled = losses_of(Transformer(EVERYTHING), RECIPE, compiles=True)
    assert compiled == pytest.approx(plain_losses(True), rel=2e-3, abs=1e-3)


def losses_by(path: str, device: torch.device) -> torch.Tensor:
    """Train a model of another size in bfloat16 for 200 steps, and return their losses.

    Args:
        path: `fast` for kernels, stacked products, compiler, graphs and the update in one launch; `plain` for none.
        device: Where.
    """
    shape = {"vocab_size": 512, "context_length": 128, "width": 128, "layers": 3, "heads": 2, "qk_norm": True}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape, attention="auto" if path == "fast" else "reference")).to(device)
    (optimizer,) = build_optimizers(model, [OptimizerGroup(lr=0.003)])
    if path == "plain":
        optimizer.update_many = partial(Optimizer.update_many, optimizer)

    def loss(tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        with precision(device, torch.bfloat16):
            if path == "fast":
                return next_token_loss(model.hidden(tokens_BT), model.head_weight, targets_BT)
            return cross_entropy(model(tokens_BT), targets_BT)

    function, one_pass = loss, None
    if path == "fast" and device.type == "cuda":
        function = torch.compile(loss)
        one_pass = GraphedPass(function, model, CudaRecorder(device))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        starts_B1 = torch.randint(512, (16, 1), generator=generator)
        text = (starts_B1 + 7 * torch.arange(129)) % 512
        noise = torch.randint(512, text.shape, generator=generator)  # so that there is a loss to the end
        text = torch.where(torch.rand(text.shape, generator=generator) < 0.3, noise, text).to(device)
        batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        with nullcontext() if path == "fast" else as_written():
            numbers = train_step(
                function, list(model.parameters()), [optimizer], *batch, passes=2, clip=1.0, one_pass=one_pass
            )
        losses.append(numbers[0])
    return torch.stack(losses).cpu()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of compilers
def test_the_fast_path_of_a_gpu_gives_the_losses_of_the_plain_one() -> None:
    fast, plain = (losses_by(path, torch.device("cuda")) for path in ("fast", "plain"))
    assert plain[-10:].mean() < 0.8 * plain[:10].mean()
    torch.testing.assert_close(fast, plain, rtol=0.01, atol=0.01)  # a few roundings of bfloat16


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_every_config_trains_at_a_small_size(name: str, data_folder: Path) -> None:
    small = {"vocab_size": 300, "context_length": 32, "width": 32, "heads": 2, "feed_forward_width": 32, "layers": 4}
    given = json.loads((CONFIGS / name).read_text())["model"]
    small |= {"value_embeddings": min(2, given.get("value_embeddings", 0))}
    settings = {f"model.{key}": value for key, value in small.items()}
    settings |= {"data.dataset": "sample", "data.sample_bytes": 60_000, "device": "cpu", "sample_prompt": "One"}
    settings |= {"steps": 3, "batch_size": 4, "microbatch": 2, "eval_batches": 1, "sample_tokens": 3, "compile": False}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]

    result = CliRunner().invoke(app, ["train", str(CONFIGS / name), "--json", *sets])

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"][0]["best_val_loss"] < 6.5  # log 300 is 5.7
