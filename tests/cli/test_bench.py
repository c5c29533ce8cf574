"""`lfs bench` as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.cli.bench import COLUMNS, SETTINGS
from lfs_cli.cli.columns import Column, field, lay_out

SMALL = ("attention", "--seq", "8,16", "--heads", "2", "--head-dim", "8", "--repeats", "1", "--warmup", "0")


def lfs(*args: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_json_holds_rows_and_environment_and_both_are_kept(data_folder: Path) -> None:
    result = lfs(*SMALL, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert {row["seq"] for row in shown["rows"]} == {8, 16}
    assert shown["environment"]["versions"]["torch"]
    (path,) = (data_folder / "benchmarks").glob("*.jsonl")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(kept) == len(shown["rows"])
    assert kept[0]["benchmark"] == "attention"
    assert kept[0]["environment"] == shown["environment"]
    assert kept[0]["settings"]["attention"]["heads"] == 2
    assert {name: kept[0][name] for name in shown["rows"][0]} == shown["rows"][0]


def test_records_are_appended_and_quiet_is_quiet(data_folder: Path) -> None:
    for _ in range(2):
        result = lfs("optimizer", "--size", "600", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--quiet")
        assert result.stderr == ""
    (path,) = (data_folder / "benchmarks").glob("*.jsonl")
    assert len(path.read_text().splitlines()) == 2 * (len(result.stdout.splitlines()) - 1)


def test_options_and_settings_are_the_same_thing(data_folder: Path) -> None:
    result = lfs(*SMALL, "--seq", "4", "--set", 'attention.backends=["torch"]', "--json")
    assert {(row["seq"], row["backend"]) for row in json.loads(result.stdout)["rows"]} == {
        (8, "torch"),
        (16, "torch"),
        (4, "torch"),
    }


def test_what_cannot_be_kept_is_still_shown(data_folder: Path) -> None:
    data_folder.parent.mkdir(exist_ok=True)
    data_folder.write_text("a file, not a folder")
    result = lfs("optimizer", "--size", "600", "--repeats", "1", "--warmup", "0", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows"]
    assert "warning: cannot write" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message", "hint"),
    [
        ([], 2, "no benchmark is named", "choose one of: attention, generation, model, optimizer, tokenizer"),
        (["atention"], 2, "unknown benchmark `atention`", "did you mean `attention`?"),
        (["model", "--heads", "3"], 2, "`lfs bench model` has no option `--heads`", "it has --seq, --batch, --size"),
        (["attention", "--seq", "0"], 2, "must be at least 1, not `0`", "see `attention.seq` in `lfs bench --explain`"),
        (["attention", "--seq", "long"], 2, "must be a whole number", "lfs bench --explain"),
        (["attention", "--batch", "1,2"], 2, "`--batch` takes one value here, not 2", "name one"),
        (["attention", "--backend", "flsh"], 2, "unknown attention backend `flsh`", "did you mean `flash`?"),
        (["model", "--size", "larg"], 2, "cannot be", "large"),
        (["model", "--device", "gpu"], 2, "`device` cannot be", "choose one of"),
        (["tokenizer", "--dataset", "novels"], 1, "no text for `novels`", "run `lfs download novels`"),
        (["generation", "--run", "mine"], 1, "no run `mine`", "lfs train quickstart.json"),
    ],
)
def test_bad_input_is_answered_in_two_lines(
    args: list[str], code: int, message: str, hint: str, data_folder: Path
) -> None:
    result = lfs(*args)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("bench ")]
    assert (result.exit_code, result.stdout) == (code, "")
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[2].startswith("hint: ")
    assert hint in lines[2]


def test_a_slip_costs_no_torch() -> None:
    script = (
        "import sys; from lfs_cli.cli.app import app\ntry: app(['bench', 'atention'])\nfinally: print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
    assert "lfs_cli.cli.bench" in loaded
    assert "torch" not in loaded.split()


def test_every_option_has_a_setting_and_every_benchmark_has_columns() -> None:
    from lfs_cli.benchmarks import BENCHMARKS
    from lfs_cli.config import BenchConfig

    assert sorted(SETTINGS) == sorted(COLUMNS) == BENCHMARKS.names()
    for name, options in SETTINGS.items():
        section = BenchConfig.model_fields[name].annotation
        assert set(options.values()) <= set(section.model_fields)


def test_the_least_important_columns_go_first_and_the_same_values_into_the_title() -> None:
    columns = (
        Column("name", field("name")),
        Column("ms", field("ms"), rank=2),
        Column("rather wide", field("wide"), rank=5),
        Column("B", field("batch"), is_detail=True),
        Column("empty", field("empty")),
    )
    records = [{"name": "a", "ms": 1.0, "wide": 1, "batch": 4}, {"name": "b", "ms": 22.5, "wide": 2, "batch": 4}]
    rows, title = lay_out(records, columns, width=80)
    assert rows == [{"name": "a", "ms": 1.0, "rather wide": 1}, {"name": "b", "ms": 22.5, "rather wide": 2}]
    assert title == "B 4"
    assert list(lay_out(records, columns, width=14)[0][0]) == ["name", "ms"]
    assert list(lay_out(records, columns, width=5)[0][0]) == ["name"]


@pytest.mark.parametrize("name", COLUMNS)
def test_tables_fit_a_terminal_of_80_characters(name: str) -> None:
    record = {
        "seq": 16_384,
        "pass": "backward",
        "backend": "standard",
        "size": "medium",
        "part": "decode, no cache" if name == "generation" else "optimizer",
        "mode": "compiled",
        "task": "encode",
        "implementation": "lfs, plain Python",
        "optimizer": "adamw",
        "median_ms": 1234.5,
        "q1_ms": 1200.1,
        "q3_ms": 1300.2,
        "runs": 10,
        "tflops": 123.4,
        "megabytes_per_second": 12.34,
        "tokens_per_second": 1234567.0,
        "mfu": 0.4321,
        "speed_ratio": 1.234,
        "peak_bytes": 12_345_678_901,
        "status": "ok",
    }
    rows, _ = lay_out([record, {**record, "seq": 8, "size": "small", "mode": "eager"}], COLUMNS[name], width=80)
    assert "ms" in rows[0]
    assert sum(max(len(header), 8) for header in rows[0]) < 100
