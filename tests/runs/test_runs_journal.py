"""The journal and the samples of a run are cut back to a step, whatever a killed process has left behind it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfs_cli.errors import CheckpointError
from lfs_cli.runs.journal import Journal, Samples

TAILS = [
    "",
    "{",
    '{"kind": "step", "step": 3',
    "\n\n",
    '{"step": "1"}\n',
    "[1]\n",
    '{"step": null}\n',
    "[" * 100_000,
    "\udcff",
]


@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: repr(tail[:20]))
@pytest.mark.parametrize("step", [0, 2, 9])
def test_records_after_the_step_go(step: int, tail: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    lines = [{"kind": kind, "step": n} for n in (1, 2, 3) for kind in ("step", "evaluation")]
    for line in lines:
        journal.append(line)
    with journal.path.open("ab") as file:
        file.write(tail.encode("utf-8", "surrogateescape"))
    assert journal.trim(step) == [line for line in lines if line["step"] <= step]
    journal.append({"kind": "step", "step": step + 1})
    assert [json.loads(line)["step"] for line in journal.path.read_text().splitlines()][-1] == step + 1


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    """A form feed where one was is damage, though Python would end a line there: no line then holds two records."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\x0c{"step": 3}\n')
    assert Journal(path).trim(5) == [{"step": 1}]
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_journal_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert Journal(tmp_path / "metrics.jsonl").trim(5) == []
    Samples(tmp_path / "samples.md").trim(5)
    assert list(tmp_path.iterdir()) == []


@given(texts=st.lists(st.text(), max_size=4), cut=st.integers(0, 60), step=st.integers(0, 4000))
def test_sections_after_the_step_go(texts: list[str], cut: int, step: int, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("samples") / "samples.md"
    samples, expected = Samples(path), ""
    for number, text in enumerate(texts, start=1):
        before = path.read_text() if path.exists() else ""
        samples.append(1000 * number, f"## Step 1\n{text}")
        expected += path.read_text()[len(before) :] if 1000 * number <= step else ""
    samples.append(9000, "cut by a kill")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - min(cut, 20)])
    samples.trim(step)
    assert path.read_text() == expected


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "run"
    blocked.write_text("a file")
    for write in (
        lambda: Journal(blocked / "metrics.jsonl").append({}),
        lambda: Samples(blocked / "samples.md").append(1, "x"),
    ):
        with pytest.raises(CheckpointError, match=r"cannot write .*: Not a directory") as caught:
            write()
        assert caught.value.hint.endswith(f"then `lfs train --resume {blocked}`")
