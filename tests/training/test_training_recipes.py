"""Recipes as a whole: fast ways equal plain ones over 200 steps, a seed gives the same losses, and configs train."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.config import ModelConfig, OptimizerGroup, ScheduleConfig, TrainConfig, load_config
from lfs_cli.corpus.batches import document_lengths
from lfs_cli.kernels import product, self_check
from lfs_cli.model import Transformer, cross_entropy, feed_forward, next_token_loss
from lfs_cli.model.device import as_written, precision
from lfs_cli.optimizers import Optimizer, adamw, build_optimizers, build_schedule, muon
from lfs_cli.runs import setup
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.train import train
from lfs_cli.training.casts import Casts
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


def optimizers_one_by_one(model: Transformer, groups: list[OptimizerGroup]) -> list[Optimizer]:
    """Build optimizers that move one weight after the other, each by PyTorch's operations."""
    optimizers = build_optimizers(model, groups)
    for optimizer in optimizers:
        optimizer.update_many = partial(Optimizer.update_many, optimizer)
        optimizer._has_kernel = lambda *_: False  # those of AdamW and Muon come before it hands over all weights
    return optimizers


def losses_of(model: Transformer, groups: list[OptimizerGroup], *, compiles=False, one_by_one=False) -> list[float]:
    """Train on a text with a rule to learn, documents included, and return the loss of each step."""
    torch.manual_seed(0)
    model.load_state_dict(Transformer(model.config).state_dict())
    optimizers = build_optimizers(model, groups)
    if one_by_one:
        optimizers = optimizers_one_by_one(model, groups)
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


def losses_by(path: str, device: torch.device, *, qk_norm: bool = True) -> torch.Tensor:
    """Train a model of another size in bfloat16 for 200 steps, and return their losses.

    Args:
        path: `fast` for kernels, stacked products, compiler, graphs and the update in one launch; `plain` for none.
        device: Where.
        qk_norm: As in a config; with it no product turns queries and keys.
    """
    shape = {"vocab_size": 512, "context_length": 128, "width": 128, "layers": 3, "heads": 2, "qk_norm": qk_norm}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape, attention="auto" if path == "fast" else "reference")).to(device)
    build = build_optimizers if path == "fast" else optimizers_one_by_one
    (optimizer,) = build(model, [OptimizerGroup(lr=0.003)])

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


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of compilers
def test_on_a_hopper_gpu_products_that_gate_and_turn_train_as_separate_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    if product.unavailable_reason(torch.device("cuda"), torch.bfloat16, 128, 384):
        pytest.skip("there is no Hopper GPU")
    for name in ("_verdicts", "_under_way"):  # so that what is used here is seen
        monkeypatch.setattr(self_check, name, {})
    found = []
    for is_joined in (True, False):
        for module in (product, feed_forward):  # whatever the size
            monkeypatch.setattr(module, "pays", lambda *_, answer=is_joined: answer)
        torch._dynamo.reset()
        found.append(losses_by("fast", torch.device("cuda"), qk_norm=False))
    joined, apart = found
    assert apart[-10:].mean() < 0.8 * apart[:10].mean()
    torch.testing.assert_close(joined, apart, rtol=0.01, atol=0.01)
    assert {"gated product", "gated product backward", "turned product"} <= {case[0] for case in self_check._verdicts}


SPEEDRUN = {
    "data.dataset": "sample",
    "data.sample_bytes": 1_000_000,
    "model.context_length": 128,
    "model.width": 128,  # 64 channels a head, as the attention kernels for Hopper GPUs take them
    "model.heads": 2,
    "model.layers": 4,  # each of: with and without a window, with and without a table of values
    "model.value_embeddings": 1,
    "model.window": 48,
    "model.window_pattern": "SL",
    "model.z_loss": 1e-3,
    "batch_size": 16,
    "microbatch": 8,  # two passes, so that weights are cast once for both
    "eval_every": 1_000,
    "eval_batches": 1,
    "sample_tokens": 0,
}
WAYS = {
    "fast": {"dtype": "bfloat16"},
    "plain": {"dtype": "bfloat16", "model.attention": "standard", "compile": False, "cuda_graphs": False},
    "exact": {"dtype": "float32", "model.attention": "reference", "compile": False, "cuda_graphs": False},
}
"""Of training the speedrun: as `lfs train` does it, and by the definitions in two types."""


@pytest.fixture(scope="module")
def speedrun_data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return DataFolder(tmp_path_factory.mktemp("speedrun"))


class Stages(Observer):
    """Keeps what a run says of itself."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


@contextmanager
def by_definition(dtype: str) -> Iterator[None]:
    """Within the block, train without a kernel, list, stack or copy of ours; and in ``dtype`` alone, Muon too."""

    def loss(hidden, weight_VC, targets, *, softcap, z_loss, cast_VC):
        logits = softcap * torch.tanh((hidden @ weight_VC.T).float() / softcap)
        return cross_entropy(logits, targets) + z_loss * logits.logsumexp(-1).square().mean()

    with as_written(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "next_token_loss", loss)
        patch.setattr(setup, "build_optimizers", optimizers_one_by_one)
        patch.setattr(Casts, "kept", lambda casts, passes: nullcontext())
        patch.setattr(muon, "_iteration_type", lambda matrices: getattr(torch, dtype))
        yield


def speedrun_losses(way: str, data: DataFolder, folder: Path, **settings: Any) -> tuple[torch.Tensor, str]:
    """Train configs/speedrun.json at a small size in one of `WAYS`; return its losses and what it said of itself."""
    given = SPEEDRUN | settings | WAYS[way]
    config = load_config(TrainConfig, "speedrun", ["max_time=null"], given)  # rates would follow the clock
    watcher = Stages()
    with nullcontext() if way == "fast" else by_definition(config.dtype):
        result = train(config, folder, data=data, observer=watcher)
    records = map(json.loads, RunFolder(result.directory).metrics.read_text(encoding="utf-8").splitlines())
    return torch.tensor([record["loss"] for record in records if record["kind"] == "step"]), "; ".join(watcher.stages)


def assert_as_exact(fast: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Require that ``fast`` is at most twice as far from ``exact`` as ``plain`` is, at the start, then, and later.

    The rule is that of `assert_as_accurate`, for losses of a training. No bound on the difference of two losses would
    do: Muon makes each step orthogonal in bfloat16, which lifts small singular values, rounding and all, to the size of
    the large ones, and training spreads what differs. So the bound is what the same rounding does to the plain run, in
    the root mean square over many steps, whose size does not depend on chance as that of a single step does.

    Measured on a CPU, in bfloat16 and three sizes, where other sizes of a pass, another attention or iterations of Muon
    in float32 stand for another way: 5e-4 to 7e-4 in the first 20 steps, 3e-4 to 6e-4 in the next 30, 3e-3 to 5e-3
    later, at most 1.4 times those of the plain run. What is wrong shows: a window shorter by one position has 4 to 5
    times those in the second part; a soft cap of 18 for 15, 5 times; a rate of Muon lower by 3%, 10 to 13 times, and a
    z-loss lower by a fifth, 14 times those in the first.
    """
    parts = [slice(0, 20), slice(20, 50), slice(50, None)]
    errors, allowed = (
        [(losses[part] - exact[part]).square().mean().sqrt().item() for part in parts] for losses in (fast, plain)
    )
    assert all(error <= 2 * bound for error, bound in zip(errors, allowed, strict=True)), (errors, allowed)


def test_a_speedrun_in_bfloat16_is_as_exact_as_its_definition(speedrun_data: DataFolder, tmp_path: Path) -> None:
    """The paths of a CPU; the same on a GPU is the next test."""
    small = {"device": "cpu", "compile": False, "model.vocab_size": 300, "model.context_length": 64, "batch_size": 4}
    small |= {"data.documents": "packed", "microbatch": 2, "steps": 60}
    fast, plain, exact = (speedrun_losses(way, speedrun_data, tmp_path, **small)[0] for way in WAYS)
    assert exact[-10:].mean() < 0.8 * exact[:10].mean()
    assert_as_exact(fast, plain, exact)
    assert not torch.equal(fast, plain)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("documents", "passes"), [("joined", "with CUDA graphs"), ("packed", "without CUDA graphs")])
def test_the_fast_path_of_a_gpu_trains_a_speedrun_as_exactly_as_the_plain_one(
    documents: str, passes: str, speedrun_data: DataFolder, tmp_path: Path
) -> None:
    # From 4,096 tokens on, Hopper GPUs have a kernel of their own for the loss
    settings = {"device": "cuda", "data.documents": documents, "model.vocab_size": 4_096, "steps": STEPS}
    with warnings.catch_warnings(action="ignore"):  # those of compilers
        warnings.filterwarnings("error", message=".*(self-check|cannot be recorded)")
        (fast, said), (plain, _), (exact, _) = (
            speedrun_losses(way, speedrun_data, tmp_path, **settings) for way in WAYS
        )
    assert passes in said
    assert exact[-10:].mean() < 0.5 * exact[:10].mean()
    assert_as_exact(fast, plain, exact)


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
