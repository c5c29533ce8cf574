"""The short version of the kill harness."""

from pathlib import Path

import pytest
from kill_train import Tally, kill


@pytest.mark.slow
def test_a_training_survives_being_killed(tmp_path: Path) -> None:
    tally = Tally()
    kill(3, seed=0, folder=tmp_path, tally=tally)
    assert tally.broken == []
    assert sum(tally.kills.values()) == 3
    assert tally.runs >= 1
