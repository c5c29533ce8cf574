"""`lfs train` from a config to a run folder, a row of the table and a text, as a user calls it."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.cli.train import fit
from lfs_cli.config import TrainConfig, load_config
from lfs_cli.corpus.batches import BatchesOnDevice
from lfs_cli.model import ATTENTION
from lfs_cli.runs import plugins, setup
from lfs_cli.runs.folder import RunFolder

TINY = {
    "name": "tiny",
    "data": {"dataset": "sample", "sample_bytes": 60_000},
    "model": {"vocab_size": 300, "context_length": 16, "width": 16, "layers": 1, "heads": 2},
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


@pytest.fixture
def tiny(tmp_path: Path, data_folder: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def lfs(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def train_json(*args: object) -> dict[str, Any]:
    result = lfs("train", *args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_one_command_goes_from_nothing_to_a_model_a_text_and_a_row(tiny: Path, data_folder: Path) -> None:
    shown = train_json(tiny)
    run = Path(shown["rows"][0]["run"])

    assert run.parent == data_folder / "runs"
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "samples.md", "result.json", "checkpoints"}
    assert [record["step"] for record in records(run, "step")] == [1, 2, 3, 4]
    assert [record["step"] for record in records(run, "evaluation")] == [2, 4]
    assert shown["rows"][0]["best_val_loss"] == min(record["loss"] for record in records(run, "evaluation"))
    assert shown["sample"].startswith("Once")
    assert "> Once" in (run / "samples.md").read_text()
    assert (run / "checkpoints" / "latest").read_text() == "step-000004\n"

    table = (data_folder / "output.md").read_text().splitlines()
    header = next(line for line in table if line.startswith("| timestamp"))
    columns = "| timestamp | experiment_name | optimizer | attention_type | best_val_loss | params_M | tokens_M |"
    assert header.startswith(columns)
    assert any(f"| {run.name} |" in line and "| tiny | adamw | standard |" in line for line in table)


def test_the_saved_config_trains_the_same_again(tiny: Path, data_folder: Path) -> None:
    first = Path(train_json(tiny)["rows"][0]["run"])
    second = Path(train_json(first / "config.json")["rows"][0]["run"])
    losses = [[record["loss"] for record in records(run, "step")] for run in (first, second)]
    assert losses[0] == losses[1]
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(tiny: Path, data_folder: Path) -> None:
    whole = Path(train_json(tiny)["rows"][0]["run"])
    # the schedule depends on the number of steps, so the interrupted run must plan the same four
    part = Path(train_json(tiny, "--set", "schedule.name=constant", "--set", "steps=2")["rows"][0]["run"])
    straight = Path(train_json(tiny, "--set", "schedule.name=constant")["rows"][0]["run"])
    with (part / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "loss": 9.9}\n{"kind": "st')  # as a killed run leaves it
    result = lfs("train", "--resume", part.name, "--set", "steps=4", "--json")
    assert result.exit_code == 0, result.stderr

    assert records(whole, "step") != []
    assert [r["loss"] for r in records(part, "step")] == [r["loss"] for r in records(straight, "step")]
    assert [r["loss"] for r in records(part, "evaluation")] == [r["loss"] for r in records(straight, "evaluation")]
    weights = [run / "checkpoints" / "step-000004" / "model.safetensors" for run in (part, straight)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("override", ["model.width=32", "optimizer.0.name=sgd", "seed=1"])
def test_what_would_break_a_resumed_run_is_refused(tiny: Path, data_folder: Path, override: str) -> None:
    train_json(tiny)
    result = lfs("train", "--resume", "last", "--set", override)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: `{override.split('=')[0]}` cannot change when a run goes on: it was `")


def test_microbatches_give_the_same_losses(tiny: Path, data_folder: Path) -> None:
    runs = [Path(train_json(tiny, "--set", f"microbatch={n}")["rows"][0]["run"]) for n in (4, 2)]
    for kind in ("step", "evaluation"):
        first, second = ([record["loss"] for record in records(run, kind)] for run in runs)
        assert first == pytest.approx(second, rel=1e-5)


def test_a_text_that_lies_on_the_device_gives_the_same_losses(
    tiny: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = records(Path(train_json(tiny)["rows"][0]["run"]), "step")
    monkeypatch.setattr(setup, "_for_device", lambda batches, device: BatchesOnDevice(batches, device))
    quick = records(Path(train_json(tiny)["rows"][0]["run"]), "step")
    assert [line["loss"] for line in quick] == [line["loss"] for line in plain]


def test_the_best_and_the_last_checkpoint_are_kept(tiny: Path, data_folder: Path) -> None:
    settings = [
        "steps=8",
        "eval_every=1",
        "checkpoint_every=1",
        "keep_checkpoints=1",
        "optimizer.0.lr=3",
        "sample_tokens=0",
        "schedule.warmup=0",
    ]
    run = Path(train_json(tiny, *(word for setting in settings for word in ("--set", setting)))["rows"][0]["run"])
    losses = [record["loss"] for record in records(run, "evaluation")]
    best = losses.index(min(losses)) + 1
    kept = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert kept == sorted({f"step-{best:06d}", "step-000008"})
    assert (run / "checkpoints" / "best").read_text() == f"step-{best:06d}\n"


def test_a_dry_run_prints_the_cost_and_makes_nothing(tiny: Path, data_folder: Path) -> None:
    result = lfs("train", tiny, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)["rows"][0]
    assert facts["tokens"] == 4 * 4 * 16
    assert facts["peak_bytes"] == facts["weight_bytes"] + facts["optimizer_bytes"] + facts["step_bytes"]
    assert facts["optimizer_bytes"] == 2 * facts["weight_bytes"] == 8 * facts["parameters"]
    assert facts["fits"] is True
    assert facts["basis"] == "measured"
    assert facts["seconds"] == pytest.approx(4 * facts["step_seconds"])
    assert not data_folder.exists()


def test_a_dry_run_knows_that_time_may_end_a_run_first(tiny: Path) -> None:
    words = ["train", tiny, "--dry-run", "--on", "H100", "--set", "device=auto", "--set", "steps=1000000"]
    whole, short = (json.loads(lfs(*words, *more, "--json").stdout)["rows"][0] for more in ((), ("--max-time", "90s")))
    assert whole["steps"] == 1_000_000
    assert short["steps"] == round(90 / whole["step_seconds"])
    assert short["tokens"] == 4 * 16 * short["steps"]
    assert short["seconds"] == pytest.approx(90, rel=0.01)
    result = lfs(*words, "--max-time", "90s")
    assert f"\nsteps\tabout {short['steps']:,} of 1,000,000\n" in result.stdout
    assert "1m 30s, which is the `max_time`\n" in result.stdout


def test_max_epochs_is_foreseen_shown_and_asked_for_more(tiny: Path, data_folder: Path) -> None:
    words = ["train", tiny, "--set", "steps=1000000", "--set", "max_epochs=0.01"]
    unknown = lfs(*words, "--dry-run")
    assert "\nsteps\t1,000,000\n" in unknown.stdout
    assert "are not made yet: `max_epochs` may allow fewer steps" in unknown.stderr
    result = lfs(*words, "--json")
    assert result.exit_code == 0, result.stderr
    steps = json.loads(result.stdout)["rows"][0]["steps"]
    assert 1 < steps < 1_000
    assert f"{steps:,} of 1,000,000 steps: `max_epochs` is 0.01, and the text has " in result.stderr
    assert f"step {steps}/{steps}  " in result.stderr
    known = lfs(*words, "--dry-run")
    assert f"\nsteps\t{steps:,} of 1,000,000, as `max_epochs` is 0.01\n" in known.stdout
    again = lfs("train", "--resume", "last")
    assert f"its {steps:,} steps are done, as many as `max_epochs` allows, and saved in" in again.stderr
    enough = again.stderr.split(" --set max_epochs=")[1].split("`")[0]
    more = lfs("train", "--resume", "last", "--set", f"max_epochs={enough}", "--json")
    assert json.loads(more.stdout)["rows"][0]["steps"] >= 2 * steps
    less = lfs("train", "--resume", "last", "--set", "max_epochs=0.001", "--set", "steps=7")
    assert f"its {json.loads(more.stdout)['rows'][0]['steps']:,} steps are done, more than `max_epochs`" in less.stderr
    assert " --set steps=" in less.stderr
    assert " --set max_epochs=" in less.stderr


def test_a_dry_run_for_a_gpu_by_name_says_what_fits(tiny: Path, data_folder: Path) -> None:
    words = ["train", tiny, "--dry-run", "--set", "device=auto", "--set", "batch_size=4194304", "--on"]
    result = lfs(*words, "l4", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)["rows"][0]
    assert (facts["device"], facts["fits"], facts["basis"]) == ("L4", False, "roofline")
    assert facts["room_bytes"] == pytest.approx(0.9 * 24 * 2**30, rel=1e-6)
    most = facts["largest_microbatch"]

    result = lfs(*words, "NVIDIA L4", "--set", "microbatch=auto")
    assert result.exit_code == 0, result.stderr
    assert f"\nsequences at once\t{most:,} of 4,194,304\n" in result.stdout
    assert re.search(r"\nfits\tyes: [\d.]+ GB of 23\.2 GB\n", result.stdout)
    assert "`--on`, on a machine that has L4" in result.stderr
    result = lfs(*words, "l4", "--set", f"microbatch={2 * most}")
    assert f" of 23.2 GB; at most {most:,} at once\n" in result.stdout
    assert not data_folder.exists()


def test_explain_prints_every_setting(data_folder: Path) -> None:
    result = lfs("train", "--explain")
    assert "model.kv_heads\tderived\tKey/value heads (G)." in result.stdout


def test_a_loss_that_is_not_a_number_stops_the_run_with_the_step(tiny: Path, data_folder: Path) -> None:
    result = lfs("train", tiny, "--set", "optimizer.0.name=sgd", "--set", "optimizer.0.lr=1e38", "--set", "clip=0")
    assert result.exit_code == 1
    assert "is not a number at step " in result.stderr
    assert "hint: " in result.stderr
    assert "--set optimizer.0.lr=2.5e+37" in result.stderr


def test_without_a_terminal_progress_is_plain_lines(tiny: Path, data_folder: Path) -> None:
    result = lfs("train", tiny)
    assert result.exit_code == 0, result.stderr
    assert "step 1/4  loss " in result.stderr
    assert "step 2: validation loss " in result.stderr
    assert "next: `lfs generate --prompt" in result.stderr
    assert "\x1b" not in result.stderr + result.stdout
    assert result.stdout.startswith("run\tsteps\tloss\t")


def test_quiet_leaves_only_the_result(tiny: Path, data_folder: Path) -> None:
    result = lfs("train", tiny, "--quiet")
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 2


ERRORS = [
    (["trian"], 2, "unknown command `trian`", "did you mean `train`?"),
    (["train", "--sett", "x=1"], 2, "unknown option `--sett`", "did you mean `--set`?"),
    (
        ["train", "quikstart.json"],
        2,
        "no config `quikstart.json` here or in `configs/`",
        "did you mean `quickstart.json`?",
    ),
    (["train", "TINY", "--set", "model.layer=3"], 2, "unknown key `model.layer`", "did you mean `model.layers`?"),
    (["train", "TINY", "--set", "optimizer.0.name=adam"], 2, "unknown optimizer `adam`", "did you mean `adamw`?"),
    (["train", "TINY", "--set", "device=cuda"], 1, "no CUDA device on this machine", "set `device` to `auto` or `cpu`"),
    (["train", "TINY", "--set", "model.attention=flash"], 1, "flash", "model.attention"),
    (["train", "TINY", "--set", "data.dataset=mine"], 1, "no dataset `mine`", "lfs download --from FILE --name mine"),
    (["train", "TINY", "--set", "data.tokenizer=nowhere"], 1, "nowhere", ""),
    (["train", "TINY", "--resume", "nope"], 1, "no run `nope`", "lfs train quickstart.json"),
    (
        ["train", "TINY", "--set", 'plugins=["no_such_module"]'],
        2,
        "plugin `no_such_module` cannot be imported",
        "module",
    ),
    (["train", "TINY", "--on", "H100"], 2, "`--on` foresees a run and starts none", "add `--dry-run`"),
    (["train", "config.json", "--dry-run", "--on", "h20"], 2, "unknown GPU `h20`", "did you mean `H200`?"),
    (["train", "TINY", "--dry-run", "--on", "H100"], 2, "`device` is `cpu`", "add `--set device=auto`"),
    (["train", "config.json", "--dry-run", "--on", "L4", "--set", "dtype=float32"], 2, "`dtype`", "--set dtype=auto"),
    (["train", "TINY", "--set", "sample_prompt=" + "long " * 40], 2, "`sample_prompt` has", "shorten it"),
    (["train", "TINY", "--set", "model.context_length=50000"], 1, "50,000", ""),
]


@pytest.mark.parametrize(("args", "code", "message", "hint"), ERRORS, ids=[" ".join(row[0])[:60] for row in ERRORS])
def test_a_mistake_is_two_lines(
    tiny: Path, data_folder: Path, args: list[str], code: int, message: str, hint: str
) -> None:
    result = lfs(*(tiny if arg == "TINY" else arg for arg in args))
    assert result.exit_code == code, result.stderr
    error = result.stderr[result.stderr.index("error: ") :]
    assert message in error.split("\n\nhint: ")[0]
    assert hint in error.split("\n\nhint: ")[1]
    assert result.stdout == ""
    assert not list((data_folder / "runs").glob("*")) if (data_folder / "runs").exists() else True


def test_a_folder_that_cannot_be_written_is_named(tiny: Path, data_folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = lfs("train", tiny, "--out", blocked)
    assert result.exit_code == 1
    assert f"cannot create a run in {blocked}" in result.stderr


def start(tiny: Path, *args: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lfs_cli", "train", str(tiny), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_and_names_the_checkpoint(
    tiny: Path, data_folder: Path, number: int, code: int
) -> None:
    process = start(tiny, "--set", "steps=100000", "--set", "eval_every=100000", "--set", "checkpoint_every=100000")
    wait_for(lambda: any(path.stat().st_size > 2000 for path in data_folder.glob("runs/*/metrics.jsonl")))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    (run,) = (data_folder / "runs").iterdir()
    last = records(run, "step")[-1]["step"]
    assert f"stopped after step {last:,}, saved in {run}; next: `lfs train --resume {run.name}`" in stderr
    assert (run / "checkpoints" / f"step-{last:06d}" / "state.json").exists()
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
    assert run.name in (data_folder / "output.md").read_text()
    assert "\t" in stdout


def test_max_time_is_a_short_name_of_a_setting(tiny: Path, data_folder: Path) -> None:
    result = lfs("train", tiny, "--max-time", "1s", "--set", "steps=100000000", "--set", "eval_every=100000000")
    assert result.exit_code == 0, result.stderr
    run = RunFolder(*(data_folder / "runs").iterdir())
    assert '"max_time": "1s"' in run.config.read_text()
    assert re.search(r"step 1/100,000,000 .* [01]\.\ds left", result.stderr)
    assert json.loads(run.result.read_text())["status"] == "finished"


@pytest.mark.parametrize("text", ["", "10", "1h 30m", "m", "-5s", "1.5h", "0s", "5m3h"])
def test_what_is_no_duration_is_refused(text: str, tiny: Path, data_folder: Path) -> None:
    result = lfs("train", tiny, "--max-time", text)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: `max_time` (`{text}`) is not a duration\n\nhint: write it as `90s`, `10m` or `1h30m`\n"
    )


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h1s", 3601), (None, None)]
)
def test_a_duration_is_so_many_seconds(text: str | None, seconds: int | None) -> None:
    assert load_config(TrainConfig, options={"max_time": text}).max_seconds == seconds


def test_verify_resume_shows_what_was_compared_and_keeps_nothing(tiny: Path, data_folder: Path) -> None:
    result = lfs("train", tiny, "--verify-resume", "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["steps"], shown["is_equal"]) == (12, True)
    assert [row["different"] for row in shown["rows"]] == [0] * 6
    assert "a run of 12 steps with two stops ends bit for bit like one without" in result.stderr
    assert not (data_folder / "runs").exists()
    assert not (data_folder / "output.md").exists()


def test_a_resumed_run_that_differs_is_an_error(tiny: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfs_cli.runs import resume

    def forget(config, folder, setup, progress, observer) -> None:
        setup.model.norm.weight.data += 1e-7
        plain(config, folder, setup, progress, observer)
        setup.model.embedding.weight.data[0, 0] += 1

    plain = resume.load_checkpoint
    monkeypatch.setattr(resume, "load_checkpoint", forget)
    result = lfs("train", tiny, "--verify-resume")
    assert result.exit_code == 1
    assert "error: a resumed run ends otherwise: weights differ, first `" in result.stderr
    assert result.stdout.splitlines()[1].startswith("weights\t")


def test_divergence_is_a_result_and_an_error(tiny: Path, data_folder: Path) -> None:
    words = ["--set", "optimizer.0.name=sgd", "--set", "optimizer.0.lr=1e38", "--set", "clip=0"]
    result = lfs("train", tiny, *words, "--json")
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert shown["status"] == "diverged"
    assert re.match(r"error: \w+ is not a number at step \d; first to go wrong: ", result.stderr.splitlines()[-3])
    assert "| diverged |" in (data_folder / "output.md").read_text()
    assert "diverged" in lfs("report").stdout


def test_a_change_on_resume_is_shown(tiny: Path, data_folder: Path) -> None:
    train_json(tiny)
    result = lfs("train", "--resume", "last", "--set", "steps=5")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith(
        "`steps` is `5` from here on, and was `4`: the weights will not be those of the run as it began\n"
    )


def test_a_finished_run_says_so_and_how_to_train_it_for_longer(tiny: Path, data_folder: Path) -> None:
    run = Path(train_json(tiny)["rows"][0]["run"])
    result = lfs("train", "--resume", run.name)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"{run} is finished: its 4 steps are done and saved in {run}/checkpoints/step-000004; "
        f"next: `lfs train --resume {run.name} --set steps=8` for more of them, "
        f'or `lfs generate --run {run.name} --prompt "Once"`'
    )
    assert lfs("train", *re.search(r"`lfs train (.*?)`", result.stderr)[1].split(), "--quiet").exit_code == 0
    assert RunFolder(run).checkpoint_steps()[-1] == 8


def test_a_run_that_used_up_its_time_says_what_more_of_it_takes(tiny: Path, data_folder: Path) -> None:
    lfs("train", tiny, "--max-time", "1s", "--set", "steps=100000000", "--set", "eval_every=100000000")
    result = lfs("train", "--resume", "last")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"is finished: [\d,]+ steps were done in its 1s and .* --max-time 2s` for more", result.stderr)


def test_the_command_for_more_of_a_run_names_its_plugins(
    tiny: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_json(tiny, "--set", 'plugins=["json"]')
    result = lfs("train", "--resume", "last", "--set", 'plugins=["json"]')
    command = re.search(r"`lfs (train .*?)`", result.stderr.splitlines()[-1])[1]
    assert lfs(*shlex.split(command), "--quiet").exit_code == 0


PLUGIN = """
import torch
from lfs_cli.model import ATTENTION


@ATTENTION.register("raises")
def raises(q_BTHD, k_BSGD, v_BSGD, *, causal=True):
    return torch.bmm(q_BTHD, k_BSGD)


@ATTENTION.register("gives nothing")
def gives_nothing(q_BTHD, k_BSGD, v_BSGD, *, causal=True):
    return None
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `my_attention` in the current folder, which is forgotten after the test."""
    (tmp_path / "my_attention.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_PLUGINS", {})
    monkeypatch.setattr(ATTENTION, "_entries", dict(ATTENTION._entries))
    monkeypatch.delitem(sys.modules, "my_attention", raising=False)
    return tmp_path / "my_attention.py"


def test_what_a_plugin_raises_is_not_called_a_bug_in_lfs(tiny: Path, data_folder: Path, plugin: Path) -> None:
    result = lfs("train", tiny, "--set", 'plugins=["my_attention"]', "--set", "model.attention=raises")
    assert result.exit_code == 1
    error, hint, *traceback = result.stderr[result.stderr.index("error: ") :].split("\n\n")
    assert error.startswith(f"error: the plugin `my_attention` failed in {plugin}, line 8: RuntimeError: ")
    assert hint == "hint: mend it there; the traceback below tells what led to it"
    assert re.match(r'Traceback .*\n  File ".*my_attention.py", line 8, in raises\n', traceback[0])
    assert "bug in lfs" not in result.stderr


def test_a_bug_beside_a_plugin_may_be_the_plugins(tiny: Path, data_folder: Path, plugin: Path) -> None:
    result = lfs("train", tiny, "--set", 'plugins=["my_attention"]', "--set", "model.attention=gives nothing")
    assert isinstance(result.exception, AttributeError)
    assert "error: this is a bug in lfs, or in the plugin `my_attention`; the trace" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("width", "kept"), [(60, ["loss", "left"]), (80, ["loss", "norm", "tokens/s", "left"])])
def test_a_line_of_progress_fits_the_terminal(tiny: Path, data_folder: Path, width: int, kept: list[str]) -> None:
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    line = [sys.executable, "-m", "lfs_cli", "train", str(tiny), "--set", "steps=100000", "--max-time", "1s"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    output = b""
    with contextlib.suppress(OSError):  # how the end of a terminal reads on Linux
        while piece := os.read(leader, 65_536):
            output += piece
    os.close(leader)
    process.communicate()
    assert process.returncode == 0, output.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain)]
    steps, evaluations = ([one for one in lines if one.startswith(word)] for word in ("step ", "after step "))
    assert [word for word in kept if word not in steps[-1]] == []
    assert "validation loss" in evaluations[-1]
    assert max(map(len, steps + evaluations)) <= width
    assert not [one for one in lines if re.fullmatch(r"(MB|GB|[\d.]+s left|left|bits per byte|byte)", one)]


def test_a_line_leaves_out_what_matters_least() -> None:
    facts = [("loss 2.1", 0), ("lr 1e-3", 2), ("2h left", 1)]
    assert fit(facts, 80, before="step 1  ", between="  ") == "step 1  loss 2.1  lr 1e-3  2h left"
    assert fit(facts, 25, before="step 1  ", between="  ") == "step 1  loss 2.1  2h left"
    assert fit(facts, 24, before="step 1  ", between="  ") == "step 1  loss 2.1"
    assert fit(facts, 2, before="step 1  ", between="  ") == "step 1  loss 2.1"


def test_a_damaged_checkpoint_is_warned_of(tiny: Path, data_folder: Path) -> None:
    run = Path(train_json(tiny)["rows"][0]["run"])
    weights = run / "checkpoints" / "step-000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert "model.safetensors is damaged" in lfs("generate", "--prompt", "Once", "--run", run.name).stderr
    result = lfs("train", "--resume", "last", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == (
        f"warning: {weights} is damaged: its SHA-256 is not the one in SHA256SUMS; "
        "it is now damaged-step-000004, and the run goes on from step 2\n"
    )


def test_two_trainings_of_one_run_do_not_meet(tiny: Path, data_folder: Path) -> None:
    process = start(tiny, "--set", "steps=100000", "--set", "eval_every=100000", "--set", "checkpoint_every=5")
    wait_for(lambda: list(data_folder.glob("runs/*/checkpoints/step-*")))
    result = lfs("train", "--resume", "last")
    assert result.exit_code == 1
    assert f"is being trained by another process ({process.pid})\n\nhint: " in result.stderr
    process.kill()
    process.communicate()
    run = RunFolder(*(data_folder / "runs").iterdir())
    last = run.checkpoint_steps()[-1]
    assert lfs("train", "--resume", "last", "--set", f"steps={last + 2}", "--quiet").exit_code == 0


LIMITS = [
    ("RLIMIT_FSIZE", 20_000, "File too large"),  # a checkpoint's tensors are larger than that
    ("RLIMIT_NOFILE", 3, "Too many open files"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
@pytest.mark.parametrize(("name", "limit", "reason"), LIMITS, ids=[row[0] for row in LIMITS])
def test_a_limit_of_the_system_is_one_error(name: str, limit: int, reason: str, tiny: Path, data_folder: Path) -> None:
    train_json(tiny)
    run = RunFolder(*(data_folder / "runs").iterdir())
    script = (
        "import resource, sys\nfrom lfs_cli.cli.app import main\nfrom lfs_cli.runs import recorder\n"
        "plain = recorder.Recorder.take\n"
        "def take(self, step, *rest):\n"
        f"    if step == 5: resource.setrlimit(resource.{name}, ({limit}, {limit}))\n"
        "    plain(self, step, *rest)\n"
        "recorder.Recorder.take = take\n"
        f"sys.argv = ['lfs', 'train', '--resume', {run.name!r}, '--set', 'steps=8', '--quiet']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert reason in errors[0]
    assert "Traceback" not in done.stderr
    assert "\n\nhint: " in done.stderr
    assert run.checkpoint_steps() == [2, 4]
    assert lfs("train", "--resume", run.name, "--quiet").exit_code == 0
