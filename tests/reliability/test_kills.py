"""A few kills of each kind; `python -m tests.reliability kill_tokenize` and its siblings make a hundred."""

from pathlib import Path

from tests.reliability import kill_download, kill_tokenize


def test_a_tokenization_survives_being_killed(tmp_path: Path) -> None:
    assert kill_tokenize.run(kills=3, seed=1, folder=tmp_path) >= 1


def test_a_download_survives_being_killed(tmp_path: Path) -> None:
    assert kill_download.run(kills=3, seed=1, folder=tmp_path) >= 1
