"""The experiment table: rows are never lost, people's text is never touched."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.errors import DataError
from lfs_cli.reports.table import COLUMNS, append_row, format_cell, rewrite_table

ROW = {
    "timestamp": "2026-11-23 10:02",
    "experiment_name": "quickstart",
    "optimizer": "adamw",
    "attention_type": "standard",
    "best_val_loss": 1.23456,
    "params_M": 1.234,
    "tokens_M": 1234.5,
    "val_bits_per_byte": None,
    "tokens_per_second": 12345.6,
    "minutes": 2.06,
    "device": "cpu",
    "run": "2026-11-23-quickstart-a1b2",
    "status": "finished",
}
LINE = (
    "| 2026-11-23 10:02 | quickstart | adamw | standard | 1.2346 | 1.23 | 1,234.50 | - | 12,346 | 2.1 | cpu "
    "| 2026-11-23-quickstart-a1b2 | finished |"
)


def named(number: int, **changes: object) -> dict[str, object]:
    return {**ROW, "run": f"run-{number}", "timestamp": f"2026-11-23 10:{number:02d}", **changes}


def test_first_row_creates_the_file_with_the_agreed_columns(tmp_path: Path) -> None:
    path = tmp_path / "data" / "output.md"
    append_row(path, ROW)
    lines = path.read_text().splitlines()
    header = next(line for line in lines if line.startswith("|"))
    assert header.startswith(
        "| timestamp | experiment_name | optimizer | attention_type | best_val_loss | params_M | tokens_M | "
    )
    assert lines[0] == "# Experiments"
    assert lines[-1] == LINE


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("tokens_M", 327.68, "327.68"),
        ("tokens_M", 0.00128, "0.00128"),
        ("tokens_M", 0, "0.00"),
        ("tokens_per_second", 1234567.8, "1,234,568"),
        ("best_val_loss", float("nan"), "nan"),
        ("best_val_loss", None, "-"),
        ("best_val_loss", "n/a", "n/a"),
        ("device", "CPU,\t2 threads\n", "CPU, 2 threads"),
        ("status", "", "-"),
    ],
)
def test_cells_are_written_for_people(column: str, value: object, text: str) -> None:
    assert format_cell(column, value) == text


def test_text_around_the_table_is_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    append_row(path, ROW)
    table = path.read_text().split("\n\n")[-1]
    above, below = b"My *notes*\r\n| a | b |\r\n|--|--|\n\n\xff odd byte\n\n", b"\nbelow, no end of line"
    path.write_bytes(above + table.encode() + below)
    append_row(path, named(2))
    rewrite_table(path, [named(2), named(3)])
    content = path.read_bytes()
    assert content.startswith(above)
    assert content.endswith(below)
    assert content.count(b"run-") == 2


def test_a_file_without_a_table_gets_one_below_its_text(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    path.write_text("just a note")
    append_row(path, ROW)
    assert path.read_text().startswith("just a note\n\n| timestamp |")
    assert path.read_text().endswith(LINE + "\n")


def test_bars_and_line_breaks_in_names_stay_in_their_cell(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    append_row(path, {**ROW, "experiment_name": "a|b\nc\\|d"})
    append_row(path, named(2))
    rewrite_table(path, [])
    rewrite_table(path, [])
    assert path.read_text().count("\n|") == 4
    assert "| a\\|b c\\\\|d | adamw | standard |" in path.read_text()


def test_a_resumed_run_has_one_row(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    for row in ({**ROW, "status": "stopped"}, named(2), ROW):
        append_row(path, row)
    assert path.read_text().endswith(LINE + "\n")
    assert path.read_text().count(str(ROW["run"])) == 1


def test_rows_without_a_run_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    for _ in range(2):
        append_row(path, {"experiment_name": "by hand"})
    append_row(path, {})
    rewrite_table(path, [ROW])
    assert path.read_text().count("by hand") == 2
    assert len([line for line in path.read_text().splitlines() if line.startswith("|")]) == 6


def test_rewriting_replaces_keeps_adds_and_sorts(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    for number in (3, 1):
        append_row(path, named(number))
    assert rewrite_table(path, [named(3, best_val_loss=0.5), named(2)]) == 3
    rows = [line for line in path.read_text().splitlines() if "run-" in line]
    assert [line.split(" | ")[-2] for line in rows] == ["run-1", "run-2", "run-3"]
    assert "| 0.5000 |" in rows[2]


def test_rewriting_twice_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    rows = [named(2), named(1, experiment_name="x|y")]
    rewrite_table(path, rows)
    once = path.read_bytes()
    rewrite_table(path, rows)
    assert path.read_bytes() == once


def test_a_column_that_somebody_added_survives(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    append_row(path, ROW)
    text = path.read_text().replace("| status |", "| status | notes |").replace("| finished |", "| finished | good! |")
    path.write_text(text)
    rewrite_table(path, [{**ROW, "best_val_loss": 0.25}])
    last = path.read_text().splitlines()[-1]
    assert last.endswith("| finished | good! |")
    assert "| 0.2500 |" in last


def test_rows_of_a_shorter_table_are_kept_and_widened(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    first = list(COLUMNS)[:7]
    path.write_text(
        f"| {' | '.join(first)} |\n|{'---|' * 7}\n| 2026-01-01 09:00 | old | sgd | standard | 2 | 1 | 3 |\n"
    )
    rewrite_table(path, [ROW])
    lines = path.read_text().splitlines()
    assert lines[0] == f"| {' | '.join(COLUMNS)} |"
    assert lines[2].startswith("| 2026-01-01 09:00 | old | sgd | standard | 2 | 1 | 3 | ")
    assert lines[3] == LINE


def append_many(arguments: tuple[Path, int]) -> None:
    path, worker = arguments
    for number in range(10):
        append_row(path, {**ROW, "run": f"run-{worker}-{number}"})


def test_no_row_is_lost_when_many_processes_append(tmp_path: Path) -> None:
    path = tmp_path / "output.md"
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(append_many, [(path, worker) for worker in range(4)]))
    found = {line.split(" | ")[-2] for line in path.read_text().splitlines() if "| run-" in line}
    assert found == {f"run-{worker}-{number}" for worker in range(4) for number in range(10)}
    assert [file.name for file in tmp_path.iterdir()] == ["output.md"]


def test_a_full_disk_leaves_the_table_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "output.md"
    append_row(path, ROW)
    before = path.read_bytes()

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(DataError, match="No space left") as caught:
        append_row(path, named(2))
    assert "lfs report" in str(caught.value.hint)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["output.md"]


@settings(max_examples=50, deadline=None)
@given(name=st.text(max_size=20))
def test_any_name_makes_one_row_that_is_found_again(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("table") / "output.md"
    row = {**ROW, "run": name or "run"}
    append_row(path, row)
    once = path.read_bytes()
    assert rewrite_table(path, [row]) == 1
    assert path.read_bytes() == once
