"""`lfs bench` as a user calls it."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.cli.bench import COLUMNS, SETTINGS, rows_to_show
from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.step_tables import LONGEST_NAME, kernel_table, step_tables
from lfs_cli.config import BenchConfig, load_config
from lfs_cli.errors import DataError
from lfs_cli.model import ATTENTION
from lfs_cli.reports import plot
from lfs_cli.reports.plot import check_plot
from lfs_cli.runs import plugins
from lfs_cli.runs.bench import BenchResult
from lfs_cli.runs.bench_text import find_text

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
    assert kept[0]["settings"]["attention"]["heads"] == [2]
    assert {name: kept[0][name] for name in shown["rows"][0]} == shown["rows"][0]


def test_records_are_appended_and_quiet_is_quiet(data_folder: Path) -> None:
    for _ in range(2):
        result = lfs("optimizer", "--size", "600", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--quiet")
        assert result.stderr == ""
    (path,) = (data_folder / "benchmarks").glob("*.jsonl")
    assert len(path.read_text().splitlines()) == 2 * (len(result.stdout.splitlines()) - 1)


def test_what_a_good_row_says_of_itself_is_told_as_it_is(data_folder: Path) -> None:
    settings = ("--size", "600", "--repeats", "1", "--warmup", "0", "--device", "cpu")
    result = lfs("optimizer", *settings, "--set", 'optimizer.names=["lion"]')
    assert "\nlion beside torch.optim.AdamW: torch has no lion\n" in result.stderr


def test_options_and_settings_are_the_same_thing(data_folder: Path) -> None:
    result = lfs(*SMALL, "--seq", "4", "--set", 'attention.implementations=["torch"]', "--json")
    assert {(row["seq"], row["implementation"]) for row in json.loads(result.stdout)["rows"]} == {
        (8, "torch"),
        (16, "torch"),
        (4, "torch"),
    }


@pytest.mark.parametrize("suffix", ["svg", "png", "html"])
def test_a_picture_is_drawn_beside_the_rows(data_folder: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / "new" / f"rows.{suffix}"
    result = lfs(*SMALL, "--device", "cpu", "--passes", "forward", "--plot", picture)
    assert result.exit_code == 0, result.stderr
    assert f"wrote {picture}" in result.stderr
    assert len(result.stdout.splitlines()) == 1 + 2 * 4
    start = picture.read_bytes()[:16]
    assert start.startswith({"svg": b"<?xml", "png": b"\x89PNG\r\n", "html": b"<!doctype html>"}[suffix])


def test_a_picture_that_cannot_be_written_after_all_does_not_cost_the_rows(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plot, "replace_bytes", fill)
    result = lfs(*SMALL, "--device", "cpu", "--passes", "forward", "--plot", tmp_path / "rows.svg", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows"]
    assert "warning: cannot write" in result.stderr


@pytest.mark.parametrize("benchmark", ["attention", "tokenizer", "model"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    benchmark: str, data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = lfs(benchmark, "--plot", tmp_path / "file" / "rows.svg")
    assert (result.exit_code, result.stdout) == (1, "")
    error, hint = result.stderr.rstrip().split("\n\n")
    assert error == f"error: cannot write {tmp_path}/file/rows.svg: Not a directory"
    assert hint.startswith("hint: name a file in a folder that you can write, such as `")
    assert check_plot(Path(hint.split("`")[1])) is None


def test_presets_and_options_choose_what_is_measured(data_folder: Path) -> None:
    line = "attention --preset leaderboard --implementations torch,tiled --passes both --repeats 1 --warmup 0 --json"
    result = lfs(*line.split(), "--dtype", "float32", "--device", "cpu")
    rows = json.loads(result.stdout)["rows"]
    assert [(row["implementation"], row["pass"], row["dtype"]) for row in rows] == [
        ("torch", "both", "float32"),
        ("tiled", "both", "float32"),
    ]
    assert "no GPU: the shapes of `leaderboard` are cut to at most batch 1, heads 4, seq 512" in result.stderr


def test_who_chose_freely_says_what_ran(data_folder: Path) -> None:
    result = lfs(*SMALL, "--implementations", "torch,standard", "--device", "cpu")
    assert "torch ran flash attention: chosen by torch" in result.stderr
    assert "standard ran" not in result.stderr
    line = 'kernels --size 64 --passes forward --repeats 1 --warmup 0 --device cpu --set kernels.names=["silu"]'
    kernels = lfs(*line.split())
    assert kernels.exit_code == 0, kernels.stderr
    assert " ran " not in kernels.stderr  # there the kernel is what was asked for


def test_a_backend_of_a_plugin_takes_part(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_backend.py").write_text(
        "from lfs_cli.model import ATTENTION\n\n\n@ATTENTION.register('mine')\ndef mine(q, k, v, *, causal=True):\n"
        "    return ATTENTION.get('standard')(q, k, v, causal=causal)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_PLUGINS", {})
    monkeypatch.setattr(ATTENTION, "_entries", dict(ATTENTION._entries))
    line = (*SMALL, "--device", "cpu", "--passes", "forward", "--json", "--set", 'plugins=["my_backend"]')
    result = lfs(*line, "--implementations", "mine,standard")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert {(row["implementation"], row["status"]) for row in rows} == {("mine", "ok"), ("standard", "ok")}
    result = lfs(*line, "--implementations", "mien")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: unknown implementation of attention `mien`\n\nhint: did you mean `mine`?\n"


def test_the_tokenizer_benchmark_is_drawn(data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "speeds.svg"
    (tmp_path / "mine.txt").write_text("once upon a time " * 5000)
    shared = ("--file", tmp_path / "mine.txt", "--threads", "1", "--vocab", "270", "--repeats", "1")
    result = lfs("tokenizer", *shared, "--set", 'tokenizer.tasks=["shard"]', "--peer", "tiktoken", "--plot", plot)
    assert result.exit_code == 0, result.stderr
    assert f"wrote {plot}" in result.stderr
    assert "file to file of ids" not in result.stdout
    assert plot.stat().st_size > 10_000
    assert {line.split("\t")[5] for line in result.stdout.splitlines()[1:]} == {"lfs"}


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
CS336 = re.findall(r"\| `(--[^`]+)`", README.split("What assignment 2 of CS336 asks:")[1].split("\n\n")[1])


@pytest.mark.parametrize("line", CS336)
def test_every_question_of_cs336_has_a_command(line: str, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def instead(settings: Any, observer: Any) -> BenchResult:
        asked.append(settings)
        return BenchResult([], {}, None)

    monkeypatch.setattr("lfs_cli.runs.bench.bench", instead)
    result = lfs("model", *shlex.split(line), "--json")
    assert result.exit_code == 0, result.stderr
    assert asked[0].model.parts
    assert len(CS336) == 6


STEP = (
    "model",
    "--seq",
    "8",
    "--batch",
    "1",
    "--vocab",
    "300",
    "--parts",
    "forward",
    "--repeats",
    "1",
    "--warmup",
    "0",
)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from lfs_cli.benchmarks.model import SIZES

    monkeypatch.setitem(SIZES, "tiny", {"width": 16, "feed_forward_width": 32, "layers": 1, "heads": 2})


def test_a_profiled_step_is_told_to_programs_in_full(data_folder: Path, tiny_model: None) -> None:
    result = lfs(*STEP, "--device", "cpu", "--precision", "float32,bfloat16", "--kernels", "--memory", "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert {"rows", "kernels", "memory", "environment"} == set(shown)
    assert [row["dtype"] for row in shown["rows"]] == ["float32", "bfloat16"]
    for dtype in ("float32", "bfloat16"):
        assert sum(row["share"] for row in shown["kernels"] if row["dtype"] == dtype) == pytest.approx(1)
        assert any(row["activations_bytes"] for row in shown["memory"] if row["dtype"] == dtype)
    (path,) = (data_folder / "benchmarks").glob("*.jsonl")
    assert len(path.read_text().splitlines()) == 2


def test_tables_follow_each_other_in_a_pipe(data_folder: Path, tiny_model: None) -> None:
    result = lfs(*STEP, "--device", "cpu", "--kernels", "--quiet")
    rows, kernels = (part.splitlines() for part in result.stdout.split("\n\n"))
    assert (len(rows), rows[0].split("\t")[0]) == (2, "size")
    assert "kernel" in kernels[0].split("\t")
    assert len(kernels) > 40


def test_the_memory_of_a_step_is_drawn(data_folder: Path, tmp_path: Path, tiny_model: None) -> None:
    pytest.importorskip("matplotlib")
    result = lfs(*STEP, "--device", "cpu", "--plot", tmp_path / "memory.svg")
    assert result.exit_code == 0, result.stderr
    assert f"wrote {tmp_path / 'memory.svg'}" in result.stderr
    assert (tmp_path / "memory.svg").read_bytes().startswith(b"<?xml")


def test_a_step_that_does_not_fit_is_no_picture_and_costs_no_rows(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("lfs_cli.benchmarks.measure.free_bytes", lambda device: 8_000_000_000)
    result = lfs("model", "--size", "10b", "--device", "cpu", "--plot", tmp_path / "memory.svg", "--json")
    assert result.exit_code == 0
    assert {row["status"] for row in json.loads(result.stdout)["rows"]} == {"out of memory"}
    assert "warning: no step could be profiled, so there is no picture; choose a size that fits" in result.stderr
    assert not (tmp_path / "memory.svg").exists()


def test_a_profiled_step_is_summed_up_for_people() -> None:
    about = {"size": "tiny", "seq": 8, "batch": 1, "dtype": "float32"}
    kernels = [
        {**about, "module": module, "phase": phase, "kernel": name, "calls": 2, "total_ms": ms, "share": ms / 40}
        for module, phase, name, ms in [
            ("norm", "forward", "void a_very_long_template<" + "int, " * 20, 1.0),
            ("norm", "backward", "aten::mul", 4.0),
            ("norm", "forward", "aten::mul", 5.0),
            ("optimizer", "optimizer", "aten::add_", 30.0),
        ]
    ]
    bytes_of = {f"{kind}_bytes": 2**20 for kind in ("weights", "state", "gradients", "activations", "other")}
    memory = [
        {**about, "ms": ms, "phase": phase, **bytes_of, "total_bytes": total}
        for ms, phase, total in [(0.0, "forward", 1), (1.0, "forward", 3), (2.0, "forward", 2), (3.0, "loss", 5)]
    ]

    (by_module, modules), (_, rows), (by_phase, phases) = step_tables({"kernels": kernels, "memory": memory})

    assert by_module == "time by module, tiny, T 8, B 1, float32"
    assert modules == [
        {"module": "optimizer", "forward ms": None, "backward ms": None, "optimizer ms": 30.0, "%": 75.0},
        {"module": "norm", "forward ms": 6.0, "backward ms": 4.0, "optimizer ms": None, "%": 25.0},
    ]
    assert [row["ms"] for row in rows] == [30.0, 5.0, 4.0, 1.0]
    assert len(rows[-1]["kernel"]) == LONGEST_NAME
    assert by_phase.startswith("memory when each phase has most")
    assert [(row["phase"], row["fullest at ms"]) for row in phases] == [("forward", 1.0), ("loss", 3.0)]
    few = kernel_table(kernels, most=2)
    assert few[-1] == {
        "module": "(2 others)", "phase": "", "kernel": "", "calls": 4, "ms": 5.0, "%": 12.5
    }  # fmt: skip
    assert sum(row["%"] for row in few) == 100


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
        ([], 2, "no benchmark is named", "choose one of: attention, generation, kernels, model, optimizer, tokenizer"),
        (["atention"], 2, "unknown benchmark `atention`", "did you mean `attention`?"),
        (["model", "--heads", "3"], 2, "`lfs bench model` has no option `--heads`", "it has --seq, --batch, --size"),
        (["attention", "--seq", "0"], 2, "must be at least 1, not `0`", "see `attention.seq` in `lfs bench --explain`"),
        (["attention", "--seq", "long"], 2, "must be a whole number", "lfs bench --explain"),
        (["model", "--batch", "1,2"], 2, "`--batch` takes one value here, not 2", "name one"),
        (["attention", "--implementations", "flsh"], 2, "unknown implementation of attention `flsh`", "`flash`?"),
        (["attention", "--heads", "many"], 2, "must be a whole number", "[16]"),
        (["attention", "--preset", "cs337"], 2, "`attention.preset` cannot be", "choose one of: none, cs336,"),
        (["attention", "--preset", "cs336", "--seq", "8"], 2, "both set the shapes", "leave out one of them"),
        (["attention", "--passes", "back"], 2, "cannot be", "choose one of: forward, backward, both"),
        (["attention", "--tune", "--device", "cpu"], 1, "can only be tuned on a CUDA GPU", "leave out `--tune`"),
        (["attention", "--plot", "rows.gif"], 2, "`attention.plot` (`rows.gif`) does not say what", "in .svg, .png,"),
        (["attention", "--plot", "a.svg", "--tune"], 2, "makes no picture", "leave out `attention.plot`"),
        (
            ["attention", "--tune", "--implementations", "flex"],
            2,
            "cannot tune `flex`",
            "to `hopper`, `triton` or both",
        ),
        (["optimizer", "--plot", "rows.svg"], 2, "`lfs bench optimizer` has no option `--plot`", "it has --size"),
        (["model", "--plot", "rows.gif"], 2, "`model.plot` (`rows.gif`) does not say what to draw", "in .svg, .png,"),
        (["model", "--graphs", "--device", "cpu"], 1, "CUDA graphs are for CUDA GPUs, and this is cpu", "`--graphs`"),
        (["model", "--graphs", "--parts", "loss"], 2, "`model.parts` has neither", "leave out `--graphs`"),
        (["model", "--precision", "fp8"], 2, "cannot be", "bfloat16"),
        (["model", "--parts", "forwards"], 2, "cannot be", "forward"),
        (["model", "--precision", "tf32", "--dtype", "float32"], 2, "both set the type", "leave out one of them"),
        (["attention", "--kernels"], 2, "`lfs bench attention` has no option `--kernels`", "it has --seq"),
        (["model", "--tune"], 2, "`lfs bench model` has no option `--tune`", "it has --seq"),
        (["model", "--max-seconds", "soon"], 2, "`--max-seconds` must be a number", "--max-seconds 10"),
        (["model", "--size", "larg"], 2, "cannot be", "large"),
        (["model", "--device", "gpu"], 2, "`device` cannot be", "choose one of"),
        (["tokenizer", "--dataset", "novels"], 1, "no text for `novels`", "run `lfs download novels`"),
        (["tokenizer", "--file", "absent.txt"], 1, "cannot read absent.txt", "--file"),
        (["tokenizer", "--tokenizer", "absent"], 1, "no tokenizer `absent`", "lfs tokenize"),
        (["tokenizer", "--peer", "gigatokn"], 2, "`tokenizer.peers", "gigatoken"),
        (["tokenizer", "--threads", "0"], 2, "must be at least 1", "tokenizer.threads"),
        (["tokenizer", "--plot", "speeds.pdf"], 2, "does not say what to draw", ".svg, .png or .html"),
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


@pytest.mark.parametrize("args", [("--file", "absent.txt"), ("--dataset", "novels")])
def test_a_missing_text_costs_no_torch(args: tuple[str, str], data_folder: Path) -> None:
    script = (
        "import sys; from lfs_cli.cli.app import app\n"
        f"try: app(['bench', 'tokenizer', *{args}])\nfinally: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "torch" not in done.stdout.split()
    assert done.stderr.startswith("error: ")


def test_a_text_that_cannot_be_read_is_told_before_torch(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("once")
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: Is a directory"):
        find_text(load_config(BenchConfig, None, [], {"benchmark": "tokenizer", "tokenizer.file": str(tmp_path)}))
    with pytest.raises(DataError) as caught:
        find_text(BenchConfig(benchmark="tokenizer", tokenizer={"file": str(tmp_path / "mien.txt")}))
    assert caught.value.hint == f"did you mean `{tmp_path / 'mine.txt'}`?"


def tokenizer_row(library: str, ms: float | None, threads: int = 1, call: str = "encode_batch") -> dict[str, Any]:
    status = "ok" if ms else "unavailable"
    times = {"median_ms": ms, "q1_ms": ms, "q3_ms": ms, "runs": 5}
    named = {"task": "encode", "state": "process", "threads": threads, "implementation": library, "call": call}
    speed = {"megabytes_per_second": 1234.5 if ms else None, "speed_ratio": 1.234 if ms else None}
    memory = {"peak_bytes": 12_345_678, "process_peak_bytes": 1_234_567_890}
    return {**named, **times, **speed, **memory, "text_bytes": 10**7, "status": status, "dataset": "sample"}


def test_the_table_of_tokenizers_fits_80_characters_and_tells_its_rows_apart() -> None:
    rows = [
        tokenizer_row(library, ms, threads, call)
        for threads in (1, 2)
        for library, ms, call in [
            ("lfs", 123.4, "encode_arrays"),
            ("gigatoken", 23.4, "encode_batch"),
            ("gigatoken", 22.4, "encode"),
            ("tokenizers", 98765.4, "encode_batch_fast"),
            ("fastokens", None, "encode_batch_flat"),
        ]
    ]
    shown, _ = lay_out(rows_to_show(rows), COLUMNS["tokenizer"], width=80)
    assert list(shown[0]) == ["task", "threads", "state", "library", "ms", "MB/s", "speed ratio"]
    assert len({(row["threads"], row["library"]) for row in shown}) == len(shown) == 6
    assert shown[1]["ms"] == 22.4  # of two calls the faster one
    # One that fails at one task only has rows that say so, in place of its milliseconds
    rows.append({**tokenizer_row("lfs", None), "task": "shard"})
    shown, _ = lay_out(rows_to_show(rows), COLUMNS["tokenizer"], width=80)
    assert list(shown[0]) == ["task", "threads", "state", "library", "MB/s", "speed ratio", "status"]


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
        "batch": 1,
        "heads": 16,
        "kv_heads": 16,
        "head_dim": 64,
        "size": "medium",
        "part": "decode, no cache" if name == "generation" else "optimizer",
        "mode": "compiled",
        "task": "encode",
        "implementation": "fastokens" if name == "tokenizer" else "torch.optim",
        "state": "process",
        "call": "encode_batch_flat",
        "threads": 1,
        "process_peak_bytes": 1_234_567_890,
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
        "ceiling_share": 0.6789,
        "baseline": "flash-attn-4",
        "error": 0.001234,
        "peak_bytes": 12_345_678_901,
        "status": "ok",
    }
    rows, _ = lay_out([record, {**record, "seq": 8, "size": "small", "mode": "eager"}], COLUMNS[name], width=80)
    assert "ms" in rows[0]
    assert sum(max(len(header), 8) for header in rows[0]) < 100
