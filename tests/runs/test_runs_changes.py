"""Which settings may change when a run goes on: each of them is classified, and each class is kept."""

import json
from pathlib import Path

import pytest
from tiny_run import Train, Watcher, folder_of, tiny

from lfs_cli.config import TrainConfig, explain
from lfs_cli.errors import ConfigError
from lfs_cli.model import load_weights
from lfs_cli.runs.changes import CHANGES, Change, change_of, resumed_config
from lfs_cli.runs.folder import RunFolder

REFUSED = {"data", "model", "optimizer.match", "optimizer.name", "batch_size", "seed"}
HARMLESS = {
    "name",
    "data.tokenizer",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "sample_prompt",
    "sample_tokens",
    "sampling",
    "verify_steps",
    "cuda_graphs",
    "model.checkpointing",
}
FELT = {
    "model.attention",
    "model.residual_dtype",
    "model.z_loss",
    "optimizer.lr",
    "optimizer.options",
    "schedule",
    "steps",
    "max_time",
    "max_epochs",
    "microbatch",
    "clip",
    "device",
    "dtype",
    "compile",
    "deterministic",
    "anomaly",
    "plugins",
}
SETTINGS = [name for name, _, _ in explain(TrainConfig)]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_classified_here_and_there(name: str) -> None:
    plain = name.replace(".0", "")
    matches = [
        (len(prefix), change)
        for names, change in ((REFUSED, Change.REFUSED), (HARMLESS, Change.HARMLESS), (FELT, Change.FELT))
        for prefix in names
        if plain == prefix or plain.startswith(f"{prefix}.")
    ]
    assert matches, f"say in this test what a change of `{name}` does to a run that goes on"
    assert change_of(name) is max(matches)[1]


def test_no_rule_is_left_over() -> None:
    plain = {name.replace(".0", "") for name in SETTINGS}
    assert not [rule for rule in CHANGES if not any(name == rule or name.startswith(f"{rule}.") for name in plain)]


def written(tmp_path: Path) -> RunFolder:
    (tmp_path / "config.json").write_text(tiny().model_dump_json())
    return RunFolder(tmp_path)


@pytest.mark.parametrize(
    "override",
    ["model.layers=2", "model.rope_theta=5", "data.dataset=other", "batch_size=8", "seed=1", "optimizer.0.name=sgd"],
)
def test_what_would_break_the_run_is_refused(override: str, tmp_path: Path) -> None:
    name = override.split("=")[0]
    with pytest.raises(ConfigError, match=f"`{name}` cannot change when a run goes on: it was `"):
        resumed_config(written(tmp_path), [override])


def test_another_number_of_optimizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`optimizer\.0\.match` cannot change"):
        resumed_config(written(tmp_path), ['optimizer=[{"match": "blocks.*"}, {"match": "*"}]'])


def test_everything_else_changes_with_a_note(tmp_path: Path) -> None:
    config, notes = resumed_config(written(tmp_path), ["optimizer.0.lr=0.5", "log_every=7"], {"max_time": "5m"})
    assert (config.optimizer[0].lr, config.log_every, config.max_seconds) == (0.5, 7, 300)
    assert notes == [
        "`optimizer.0.lr` is `0.5` from here on, and was `0.01`: the weights will not be those of the run as it began",
        "`max_time` is `5m` from here on, and was `None`: the weights will not be those of the run as it began",
        "`log_every` is `7` from here on, and was `10`: the weights do not depend on it",
    ]


def test_nothing_changed_is_no_note(tmp_path: Path) -> None:
    assert resumed_config(written(tmp_path), ["steps=8"], {"max_time": None})[1] == []


def test_a_run_from_before_there_was_an_order_goes_on_in_the_one_it_had(tmp_path: Path) -> None:
    run = written(tmp_path)
    assert resumed_config(run)[0].data.order == "shuffled"
    config = json.loads(run.config.read_text(encoding="utf-8"))
    del config["data"]["order"]
    run.config.write_text(json.dumps(config), encoding="utf-8")
    config, notes = resumed_config(run, ["log_every=7"])
    assert config.data.order == "random"
    assert len(notes) == 1
    with pytest.raises(ConfigError, match=r"`data\.order` cannot change when a run goes on: it was `random`"):
        resumed_config(run, ["data.order=shuffled"])


def weights_of(run: RunFolder) -> dict:
    return load_weights(run.checkpoint(8) / "model.safetensors")


@pytest.mark.parametrize(
    ("override", "is_felt"),
    [
        ("optimizer.0.lr=0.02", True),
        ('optimizer.0.options={"weight_decay": 0.5}', True),
        ("clip=0.001", True),
        ("model.z_loss=0.1", True),
        ("schedule.final=0.9", True),
        ("eval_every=3", False),
        ("eval_batches=1", False),
        ("checkpoint_every=3", False),
        ("sample_tokens=0", False),
        ("name=other", False),
        ("keep_checkpoints=1", False),
    ],
)
def test_a_change_is_felt_where_it_says_so(override: str, is_felt: bool, train_tiny: Train, whole: RunFolder) -> None:
    stopped = folder_of(train_tiny(tiny(steps=8), observer=(watcher := Watcher())))
    for step in (6, 8):  # as if it had been killed after step 4
        for path in stopped.checkpoint(step).iterdir():
            path.unlink()
        stopped.checkpoint(step).rmdir()
    config, notes = resumed_config(stopped, [override])
    train_tiny(config, resume=stopped, observer=watcher)
    one, other = weights_of(whole), weights_of(stopped)
    assert any((one[name] != other[name]).any() for name in one) == is_felt
    assert all(("do not depend" in note) != is_felt for note in notes)
    assert resumed_config(stopped)[0] == config  # the next time it goes on like this
