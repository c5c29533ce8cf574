"""`lfs report` as a user calls it: on runs whose folders were written by hand, whole and broken."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lfs_cli.cli.app import app


def lfs(*args: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, args)])


def write_run(data: Path, name: str, loss: float, *, lr: float = 0.001, ended: bool = True) -> Path:
    folder = data / "runs" / name
    folder.mkdir(parents=True)
    label = name[11:-5]
    (folder / "config.json").write_text(json.dumps({"name": label, "optimizer": [{"name": "adamw", "lr": lr}]}))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu"}))
    lines = []
    for step in range(1, 5):
        lines.append({"kind": "step", "step": step, "loss": loss, "tokens": 64 * step, "seconds": 0.5 * step})
        if step % 2 == 0:
            lines.append({"kind": "evaluation", "step": step, "loss": loss + 1 / step, "bits_per_byte": loss / 4})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "samples.md").write_text("Once upon a time")
    if ended:
        row = {"timestamp": "2026-11-23 10:02", "experiment_name": label, "best_val_loss": loss + 0.25}
        (folder / "result.json").write_text(json.dumps({**row, "val_bits_per_byte": loss / 4, "status": "finished"}))
    return folder


@pytest.fixture
def runs(data_folder: Path) -> Path:
    write_run(data_folder, "2026-11-23-first-aaaa", 2.0)
    write_run(data_folder, "2026-11-23-second-bbbb", 1.0, lr=0.002)
    write_run(data_folder, "2026-11-23-third-cccc", 3.0, ended=False)
    return data_folder


def test_all_runs_best_first(runs: Path) -> None:
    result = lfs("--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert [row["experiment_name"] for row in shown["rows"]] == ["second", "first", "third"]
    assert [row["status"] for row in shown["rows"]] == ["finished", "finished", "running or killed"]
    assert (shown["settings"], shown["losses"]) == ([], [])
    assert shown["table"] == str(runs / "output.md")


def test_the_table_follows_the_run_folders_and_loses_nothing(runs: Path) -> None:
    table = runs / "output.md"
    lfs()
    assert [name in table.read_text() for name in ("first-aaaa", "second-bbbb", "third-cccc")] == [True] * 3
    once = table.read_bytes()
    lfs()
    assert table.read_bytes() == once
    (runs / "runs" / "2026-11-23-first-aaaa").rename(runs / "elsewhere")
    lfs()
    assert table.read_bytes() == once


def test_what_is_next_works_for_a_run_that_is_elsewhere(runs: Path, tmp_path: Path) -> None:
    best, other = (tmp_path / "else where" / name for name in ("2026-11-23-second-bbbb", "2026-11-23-third-cccc"))
    best.parent.mkdir()
    (runs / "runs" / best.name).rename(best)
    (runs / "runs" / other.name).rename(other)
    last = lfs(best).stderr.splitlines()[-1]
    assert last == f"wrote {runs}/output.md (1 rows) and {best}/report.html"  # it has no checkpoint to write with
    (best / "checkpoints" / "step-000004").mkdir(parents=True)
    for named in ([best], [best, "first"], [best, other]):
        assert lfs(*named).stderr.splitlines()[-1].endswith(f"; next: `lfs generate --run '{best}'`")
    (best / "metrics.jsonl").unlink()
    (other / "metrics.jsonl").unlink()
    last = lfs(best, other).stderr.splitlines()[-1]
    assert last.endswith(f"; next: `lfs report '{best}' '{other}'`")
    assert lfs(*shlex.split(last.split("`")[1])[2:]).exit_code == 0


def test_a_run_elsewhere_is_reported_without_a_run_here(data_folder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "other", "2026-11-23-second-bbbb", 1.0)
    result = lfs(run)
    assert (result.exit_code, result.stderr) == (0, f"wrote {run}/report.html\n")


@pytest.mark.parametrize("place", ["/proc/x.svg", "/proc/new/x.svg", "/nowhere/../proc/x.svg", "output.md/x.svg"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_read(runs: Path, place: str) -> None:
    (runs / "output.md").write_text("")
    result = lfs("--plot", runs / place)  # an absolute path is not in `runs`
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: cannot write {runs / place}: ")
    assert "\n\nhint: name a file in a folder that you can write, such as `" in result.stderr
    assert (runs / "output.md").read_text() == ""


def test_comparing_two_runs(runs: Path) -> None:
    result = lfs("first", "second", "--json")
    shown = json.loads(result.stdout)
    assert [row["run"] for row in shown["rows"]] == ["2026-11-23-second-bbbb", "2026-11-23-first-aaaa"]
    assert shown["settings"] == [
        {"setting": "name", "first-aaaa": "first", "second-bbbb": "second"},
        {"setting": "optimizer.0.lr", "first-aaaa": 0.001, "second-bbbb": 0.002},
    ]
    assert shown["losses"][:2] == [
        {"axis": "step", "at": 2, "first-aaaa": 2.5, "second-bbbb": 1.5},
        {"axis": "step", "at": 4, "first-aaaa": 2.25, "second-bbbb": 1.25},
    ]
    assert {row["axis"] for row in shown["losses"]} == {"step", "tokens", "seconds"}
    assert shown["unit"] == "nats per token"
    assert shown["costs"][0] == {"axis": "step", "loss": 2.25, "first-aaaa": 4, "second-bbbb": 2}
    assert (runs / "output.md").read_text().count("third-cccc") == 1


def test_compared_runs_get_a_page_each(runs: Path) -> None:
    lfs("first", "second")
    pages = sorted(path.parent.name for path in runs.glob("runs/*/report.html"))
    assert pages == ["2026-11-23-first-aaaa", "2026-11-23-second-bbbb"]
    page = (runs / "runs" / pages[0] / "report.html").read_text()
    assert "Once upon a time" in page
    assert "second-bbbb: validation" in page


def test_the_picture_of_runs(runs: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = runs / "race.svg"
    result = lfs("first", "second", "--plot", str(picture))
    assert f"and {picture}" in result.stderr
    assert picture.read_text().count("<svg") == 1
    shown = json.loads(lfs("--json", "--plot", str(picture)).stdout)
    assert shown["plot"] == str(picture)


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_written(runs: Path) -> None:
    result = lfs("--plot", "race.docx")
    assert result.exit_code == 2
    assert "hint: end its name in .svg" in result.stderr
    assert not (runs / "output.md").exists()


def test_pages_are_written_again_when_a_run_went_on(runs: Path) -> None:
    assert len(json.loads(lfs("--json").stdout)["pages"]) == 3
    assert json.loads(lfs("--json").stdout)["pages"] == []


def test_a_pipe_gets_tab_separated_blocks(runs: Path) -> None:
    blocks = lfs("first", "second", "--quiet").stdout.split("\n\n")
    assert [block.split("\t")[0].split("\n")[0] for block in blocks] == ["timestamp", "setting", "axis", "axis"]


def test_broken_runs_are_named_and_never_crash(runs: Path) -> None:
    (runs / "runs" / "2026-11-23-first-aaaa" / "metrics.jsonl").write_bytes(b'{"kind": "st\n\xff\xfe')
    (runs / "runs" / "2026-11-23-second-bbbb" / "result.json").write_text("")
    (runs / "runs" / "2026-11-23-third-cccc" / "config.json").write_text("{")
    (runs / "runs" / "empty").mkdir()
    result = lfs()
    assert result.exit_code == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    for part in ("line 1 and 1 more", "result.json does not hold", "config.json does not hold", "empty has no config"):
        assert any(part in line for line in warnings), part
    assert result.stdout.count("2026-11-23") >= 3


def test_a_run_that_ends_meanwhile_is_not_shown_as_running(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lfs_cli.runs.report as body

    def end_then_rewrite(path: Path, rows: Any) -> int:
        result = {"timestamp": "2026-11-23 10:09", "best_val_loss": 0.125, "status": "finished"}
        (runs / "runs" / "2026-11-23-third-cccc" / "result.json").write_text(json.dumps(result))
        return rewrite(path, rows)

    rewrite = body.rewrite_table
    monkeypatch.setattr(body, "rewrite_table", end_then_rewrite)
    lfs()
    row = next(line for line in (runs / "output.md").read_text().splitlines() if "third-cccc" in line)
    assert "| 0.1250 |" in row
    assert row.endswith("| finished |")


def test_no_runs_is_no_error(data_folder: Path) -> None:
    result = lfs()
    assert (result.exit_code, result.stdout) == (0, "")
    assert "lfs train quickstart.json" in result.stderr
    assert not (data_folder / "output.md").exists()
    assert json.loads(lfs("--json").stdout)["rows"] == []


@pytest.mark.parametrize(
    ("args", "code", "message", "hint"),
    [
        (["frist"], 1, "no run `frist`", "first"),
        (["2026"], 1, "`2026` fits 3 runs", "2026-11-23-first-aaaa"),
        (["--set", "run=x"], 2, "unknown key `run`", "did you mean `runs`?"),
    ],
)
def test_bad_input_is_answered_in_two_lines(args: list[str], code: int, message: str, hint: str, runs: Path) -> None:
    result = lfs(*args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert hint in result.stderr.split("hint: ")[1]


def test_reporting_imports_nothing_heavy(runs: Path) -> None:
    script = "import sys; from lfs_cli.cli.app import app\ntry: app(['report', '-q'])\nfinally: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
    assert "lfs_cli.reports.page" in loaded
    assert not {"torch", "numpy", "numba", "triton", "safetensors", "huggingface_hub"} & set(loaded.split())
