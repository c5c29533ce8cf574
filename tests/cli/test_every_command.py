"""What all six commands have in common: help, settings, errors, `--explain`, `--json`, `--quiet`."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lfs_cli
from lfs_cli import config as schemas
from lfs_cli.cli.app import app
from lfs_cli.config import explain

COMMANDS = ["download", "tokenize", "train", "bench", "generate", "report"]
TINY = {
    "data": {"dataset": "sample", "sample_bytes": 60_000},
    "model": {"vocab_size": 300, "context_length": 16, "width": 16, "layers": 1, "heads": 2},
    "steps": 2,
    "batch_size": 2,
    "eval_batches": 1,
    "sample_tokens": 2,
    "sample_prompt": "Once",
    "device": "cpu",
}
WORKING = {
    "download": "download sample",
    "tokenize": "tokenize sample --vocab 300",
    "train": "train tiny.json",
    "bench": "bench optimizer --size 600 --repeats 1 --warmup 0 --device cpu",
    "generate": "generate --prompt Once --max-tokens 4",
    "report": "report",
}


def lfs(line: str) -> Any:
    return CliRunner().invoke(app, shlex.split(line))


def schema_of(command: str) -> Any:
    return getattr(schemas, f"{command.title()}Config")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("LFS_DATA", raising=False)
        assert lfs("train tiny.json").exit_code == 0
    return folder


@pytest.fixture
def home(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and a trained run, as the current folder; each test may add to it."""
    monkeypatch.chdir(prepared)
    monkeypatch.delenv("LFS_DATA", raising=False)
    return prepared


def plain_help(command: str) -> str:
    """The help without rich's panels, whose shape changes with its version."""
    group = typer.main.get_command(app)
    context = group.make_context("lfs", ["report"], resilient_parsing=True)
    target: Any = group
    if command:
        target = group.commands[command]
        context = typer.Context(target, info_name=command, parent=context)
    context.terminal_width = context.max_content_width = 100
    target.rich_markup_mode = None
    without_types = re.sub(r"^(  \S+) <[\w\[\]]+>", r"\1", target.get_help(context), flags=re.MULTILINE)
    return without_types.rstrip() + "\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_is_reviewed(command: str, golden: Callable[[str, str], None]) -> None:
    golden(f"help/{command or 'lfs'}.txt", plain_help(command))


def test_the_help_of_a_real_process_holds_every_option_and_no_color() -> None:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    line = [sys.executable, "-m", "lfs_cli", "train", "--help"]
    shown = subprocess.run(line, capture_output=True, text=True, check=True, env=environment).stdout
    options = [name for param in typer.main.get_command(app).commands["train"].params for name in param.opts]
    assert [name for name in options if name.startswith("-") and name not in shown] == []
    assert "\x1b" not in shown


def test_the_version_is_printed() -> None:
    assert lfs("--version").stdout == f"lfs {lfs_cli.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_explain_prints_every_setting_and_does_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = lfs(f"{command} --explain")
    rows = json.loads(lfs(f"{command} --explain --json").stdout)["rows"]
    names = [name for name, _, _ in explain(schema_of(command))]
    assert [line.split("\t")[0] for line in shown.stdout.splitlines()[1:]] == names
    assert [row["setting"] for row in rows] == names
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("settings", "error", "hint"),
    [
        ("--set frobnicate=1", "unknown key `frobnicate`", "choose one of: "),
        ("--set frobnicate", "`--set frobnicate` is not a setting", "`--set name=value`"),
        ("--config zzzzzzzz", "no config `zzzzzzzz` here or in `configs/`", "quickstart.json"),
        ("--config broken.json", "broken.json is not JSON: line 1, column 2", "write one object"),
        ("--config list.json", "list.json does not hold a JSON object", "write one"),
        ("--config unknown.json", "unknown key `frobnicate`", "choose one of: "),
        ("--frobnicate", "unknown option `--frobnicate`", "choose one of: --"),
        ("--set", "`--set` needs a value", "`--set NAME=VALUE`; see `lfs {} --help`"),
        ("--json=1", "`--json` takes no value", "write `--json` alone"),
    ],
)
def test_settings_are_checked_alike(command: str, settings: str, error: str, hint: str, home: Path) -> None:
    Path("broken.json").write_text("{,}")
    Path("list.json").write_text("[1]")
    Path("unknown.json").write_text('{"frobnicate": 1}')
    result = lfs(f"{command} {settings}")
    shown, _, way_out = result.stderr.partition("\n\nhint: ")
    assert (result.exit_code, result.stdout) == (2, "")
    assert shown.startswith("error: ")
    assert error in shown
    assert hint.format(command) in way_out


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_and_quiet_is_quiet(command: str, home: Path) -> None:
    result = lfs(f"{WORKING[command]} --json --quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout, parse_constant=pytest.fail)
    assert shown["rows"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_end_says_what_to_do_next(command: str, home: Path) -> None:
    result = lfs(WORKING[command])
    assert result.exit_code == 0, result.stderr
    assert "next: `" in result.stderr.splitlines()[-1]
    assert "next: " not in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_130(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lfs_cli.config.load_config", interrupt)
    result = lfs(WORKING[command])
    assert result.exit_code == 130
    assert result.stderr.splitlines()[0] == "error: interrupted"


def test_json_has_no_numbers_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    from lfs_cli.cli.console import Console

    Console(as_json=True).results([{"a": float("nan"), "b": [float("inf")], "c": "caf\udce9"}])
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["rows"] == [
        {"a": None, "b": [None], "c": "caf?"}
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk to write to")
def test_a_stdout_that_is_full_is_an_error() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123  a device
        line = [sys.executable, "-m", "lfs_cli", "train", "--explain"]
        result = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot write: No space left on device\n\nhint: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("closed", ["2>&-", "<&-", ">&-"])
@pytest.mark.parametrize("command", ["train tiny.json", "bench optimizer --size 600 --repeats 1 --warmup 0"])
def test_a_closed_stream_is_no_reason_to_fail(command: str, closed: str, prepared: Path) -> None:
    line = f"{shlex.quote(sys.executable)} -m lfs_cli {command} --set device=cpu {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=prepared, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stdout + done.stderr
    assert (done.stdout == "") == (closed == ">&-")
