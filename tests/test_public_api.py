"""The public names of `lfs_cli`, used as a stranger's script uses them: no command line, nothing from the inside."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lfs_cli as lfs
from lfs_cli.optimizers import Optimizer
from lfs_cli.runs.folder import RunFolder

TINY = {
    "name": "tiny",
    "data": {"dataset": "sample", "sample_bytes": 60_000},
    "model": {"vocab_size": 300, "context_length": 16, "width": 16, "layers": 2, "heads": 4},
    "optimizer": [{"name": "adamw", "lr": 0.01}],
    "steps": 4,
    "batch_size": 4,
    "eval_every": 2,
    "eval_batches": 2,
    "checkpoint_every": 2,
    "sample_prompt": "Once",
    "sample_tokens": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder for all tests of this file, so that its corpus is written and tokenized once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        patch.setenv("LFS_DATA", str(folder))
        yield folder


@pytest.fixture
def tiny(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def losses(run: Path, kind: str = "step") -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == kind]


def test_a_config_is_a_file_and_overrides(tiny: Path) -> None:
    config = lfs.load_config(lfs.TrainConfig, tiny, ["steps=10", "model.layers=3", 'optimizer.0.options={"eps": 1e-6}'])
    assert (config.steps, config.model.layers, config.optimizer[0].options) == (10, 3, {"eps": 1e-6})
    assert lfs.load_config(lfs.TrainConfig, str(tiny)).steps == 4
    assert lfs.load_config(lfs.TrainConfig) == lfs.TrainConfig()
    assert lfs.TrainConfig(steps=3, model=lfs.ModelConfig(width=32, heads=2)).model.feed_forward_width == 64
    with pytest.raises(lfs.LfsError, match="`steps` must be at least 1") as caught:
        lfs.load_config(lfs.TrainConfig, tiny, ["steps=0"])
    assert caught.value.hint


def test_train_writes_a_run_and_tells_how_it_went(tiny: Path, tmp_path: Path) -> None:
    result = lfs.train(lfs.load_config(lfs.TrainConfig, tiny), tmp_path / "runs")
    assert result.directory.parent == tmp_path / "runs"
    assert (result.status, result.signal, result.steps, result.tokens) == ("finished", 0, 4, 4 * 4 * 16)
    assert result.loss == losses(result.directory)[-1]
    assert result.best_val_loss == min(losses(result.directory, "evaluation"))
    assert result.perplexity == pytest.approx(math.exp(result.best_val_loss))
    assert 0 < result.bits_per_byte < 8 * result.best_val_loss
    assert 0 < result.unigram_entropy < math.log(300)
    assert result.parameters == sum(p.numel() for p in lfs.LanguageModel.load(result.directory).model.parameters())
    assert result.tokens_per_second > 0 < result.seconds
    assert result.sample.startswith("Once")
    assert dataclasses.asdict(result)["steps"] == 4

    loaded = lfs.load_config(lfs.TrainConfig, result.directory / "config.json")
    assert loaded == lfs.load_config(lfs.TrainConfig, tiny)

    first, second = (
        lfs.LanguageModel.load(folder).generate("Once upon", max_tokens=8, seed=3)
        for folder in (str(result.directory), result.directory / "checkpoints" / "step-000004")
    )
    assert isinstance(first, str)
    assert first == second or result.best_val_loss != losses(result.directory, "evaluation")[-1]


VARIANTS = {
    "every ablation": [
        "model.kv_heads=2", "model.qk_norm=true", "model.positions=none", "model.norm_position=post",
        "model.tied_head=true", "model.feed_forward=silu", "microbatch=2",
    ],
    "no norm": ["model.norm=none", "model.feed_forward=relu2", "optimizer.0.lr=0.001"],
    "bfloat16": ["dtype=bfloat16", "microbatch=1", "model.kv_heads=1"],
    "bfloat16 and every ablation": [
        "dtype=bfloat16", "model.kv_heads=2", "model.qk_norm=true", "model.positions=none",
        "model.norm_position=post", "model.tied_head=true", "model.attention=reference",
    ],
    "sgd": ["optimizer.0.name=sgd", "optimizer.0.lr=0.1", 'optimizer.0.options={"momentum":0.9,"nesterov":true}'],
    "no validation to speak of": ["eval_batches=100000", "batch_size=128", "microbatch=64"],
    "a tokenizer that runs out of pairs": ["model.vocab_size=60000"],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_learns_and_writes(name: str, tiny: Path, tmp_path: Path) -> None:
    steps = ["steps=12", "eval_every=6", "checkpoint_every=6", "schedule.name=constant"]
    config = lfs.load_config(lfs.TrainConfig, tiny, [*steps, *VARIANTS[name]])
    result = lfs.train(config, tmp_path / "runs")
    assert result.steps == 12
    found = losses(result.directory)
    assert all(map(math.isfinite, found))
    assert found[-1] < found[0]
    model = lfs.LanguageModel.load(result.directory)
    assert model.generate("Once upon", max_tokens=24, temperature=0) == model.generate(
        "Once upon", max_tokens=24, temperature=0, cache=False
    )
    again = lfs.train(config, tmp_path / "again")
    assert losses(again.directory) == found


GROUPS = (
    'optimizer=[{"match":"blocks.*","name":"sgd","lr":0.1,"options":{"momentum":0.9}},'
    '{"match":"*embedding*","name":"adamw","lr":0.01,"options":{"betas":[0.8,0.9]}},'
    '{"match":"*","name":"sgd","lr":0.05}]'
)


def test_a_run_with_several_optimizers_goes_on_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    settings = ["schedule.name=constant", "dtype=bfloat16", "microbatch=2", "model.tied_head=true", GROUPS]
    half, whole = (lfs.load_config(lfs.TrainConfig, tiny, [*settings, f"steps={steps}"]) for steps in (4, 8))
    straight = lfs.train(whole, tmp_path / "straight")
    begun = lfs.train(half, tmp_path / "begun")
    resumed = lfs.train(whole, resume=RunFolder(begun.directory))
    assert resumed.directory == begun.directory
    assert losses(resumed.directory) == losses(straight.directory)
    for name in ("model", "state"):
        files = [run.directory / "checkpoints" / "step-000008" / f"{name}.safetensors" for run in (straight, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses old parts of torch
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with a C++ compiler")
def test_a_compiled_run_learns_what_a_plain_one_learns(tiny: Path, tmp_path: Path) -> None:
    settings = ["model.kv_heads=2", "model.qk_norm=true", "microbatch=2", "eval_batches=100000"]
    plain, compiled = (
        lfs.train(lfs.load_config(lfs.TrainConfig, tiny, [*settings, f"compile={choice}"]), tmp_path / choice)
        for choice in ("false", "true")
    )
    for kind in ("step", "evaluation"):
        assert losses(compiled.directory, kind) == pytest.approx(losses(plain.directory, kind), rel=1e-4)


@pytest.fixture
def registered() -> Iterator[None]:
    """An optimizer and an attention backend of a user's own, as a script or a notebook registers them."""

    @lfs.OPTIMIZERS.register("sign")
    class Sign(Optimizer):
        def __init__(self, params, *, lr=1e-3, decay=0.0):
            super().__init__(params, {"lr": lr, "decay": decay})

        def update(self, weight, gradient, state, group):
            weight.mul_(1 - group["lr"] * group["decay"]).sub_(gradient.sign(), alpha=group["lr"])

    @lfs.ATTENTION.register("torch's own")
    def attend(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool = True) -> Tensor:
        attend.calls += 1
        mask = torch.ones(q_BTHD.shape[1], k_BSGD.shape[1], dtype=torch.bool).tril(k_BSGD.shape[1] - q_BTHD.shape[1])
        heads = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
        return F.scaled_dot_product_attention(*heads, mask if causal else None, enable_gqa=True).transpose(1, 2)

    attend.calls = 0
    lfs.OPTIMIZERS.register("torch's nadam")(torch.optim.NAdam)
    yield
    for table, name in ((lfs.OPTIMIZERS, "sign"), (lfs.OPTIMIZERS, "torch's nadam"), (lfs.ATTENTION, "torch's own")):
        del table._entries[name]


def test_what_a_script_registers_is_a_name_in_its_configs(registered: None, tiny: Path, tmp_path: Path) -> None:
    mine = ["optimizer.0.name=sign", 'optimizer.0.options={"decay":0.1}', "model.attention=torch's own"]
    result = lfs.train(lfs.load_config(lfs.TrainConfig, tiny, mine), tmp_path / "mine")
    usual = lfs.train(lfs.load_config(lfs.TrainConfig, tiny), tmp_path / "usual")
    assert lfs.ATTENTION.get("torch's own").calls > 4
    assert losses(result.directory)[0] == pytest.approx(losses(usual.directory)[0], rel=1e-5)
    assert lfs.LanguageModel.load(result.directory).generate("Once", max_tokens=2) is not None
    with pytest.raises(lfs.LfsError, match="optimizer `sign` has no option `decai`"):
        lfs.load_config(lfs.TrainConfig, tiny, ["optimizer.0.name=sign", 'optimizer.0.options={"decai":0.1}'])
    with pytest.raises(lfs.LfsError, match="unknown optimizer `sing`"):
        lfs.load_config(lfs.TrainConfig, tiny, ["optimizer.0.name=sing"])


def test_an_optimizer_of_torchs_serves_as_one_of_ours(registered: None, tiny: Path, tmp_path: Path) -> None:
    theirs = ["optimizer.0.name=torch's nadam", 'optimizer.0.options={"betas":[0.8,0.9],"weight_decay":0.001}']
    result = lfs.train(lfs.load_config(lfs.TrainConfig, tiny, [*theirs, "steps=20"]), tmp_path)
    assert result.loss < losses(result.directory)[0] - 0.5


def test_every_failure_is_an_lfs_error_with_a_hint(tiny: Path, tmp_path: Path) -> None:
    config = lfs.load_config(lfs.TrainConfig, tiny)
    failures = [
        lambda: lfs.load_config(lfs.TrainConfig, tmp_path / "missing.json"),
        lambda: lfs.load_config(lfs.TrainConfig, tiny, ["model.heads=3"]),
        lambda: lfs.ModelConfig(width=10, heads=3),
        lambda: lfs.Tokenizer.load(tmp_path),
        lambda: lfs.Tokenizer({0: b"a"}, [(b"a", b"b")]),
        lambda: lfs.learn_bpe(tmp_path / "missing.txt", 300, []),
        lambda: lfs.learn_bpe(tiny, 10, []),
        lambda: lfs.LanguageModel.load(tmp_path),
        lambda: lfs.OPTIMIZERS.get("adamm"),
        lambda: lfs.train(config.model_copy(update={"data": config.data.model_copy(update={"dataset": "mine"})})),
    ]
    for failure in failures:
        with pytest.raises(lfs.LfsError) as caught:
            failure()
        assert str(caught.value)
        assert caught.value.hint


def test_flash_attention_runs_anywhere_and_a_kernel_where_it_can() -> None:
    q, k, v = torch.randn(3, 1, 4, 2, 16).unbind()
    assert lfs.flash_attention(q, k, v).shape == q.shape
    with pytest.raises(ValueError, match=r"cannot run here: (head dimension 300 is above 256|Triton is not installed)"):
        lfs.flash_attention(*torch.randn(3, 1, 4, 2, 300).unbind(), implementation="triton")


@pytest.mark.parametrize(
    "changes", [{}, {"kv_heads": 2}, {"kv_heads": 1, "qk_norm": True, "positions": "none"}], ids=str
)
def test_a_model_reads_a_text_in_pieces_with_a_cache(changes: dict) -> None:
    torch.manual_seed(0)
    config = lfs.ModelConfig(vocab_size=50, context_length=12, width=32, layers=2, heads=4, **changes)
    model = lfs.Transformer(config)
    tokens_BT = torch.randint(50, (3, 12))
    cache = lfs.KVCache(config, 3, 12)
    pieces = [model(piece, cache) for piece in tokens_BT.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens_BT), atol=1e-5, rtol=1e-5)
    assert cache.length == 12
    with pytest.raises(ValueError, match="13 tokens are more than the model's context of 12"):
        model(tokens_BT[:, :1], cache)
    cache.truncate(5)
    torch.testing.assert_close(model(tokens_BT[:, 5:], cache), model(tokens_BT)[:, 5:], atol=1e-5, rtol=1e-5)


def test_a_plain_torch_loop_trains_the_model() -> None:
    torch.manual_seed(0)
    model = lfs.Transformer(lfs.ModelConfig(vocab_size=20, context_length=8, width=32, layers=1, heads=2))
    optimizer = lfs.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(9) % 5
    for _ in range(60):
        logits = model(tokens[None, :-1])
        loss = F.cross_entropy(logits[0], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
