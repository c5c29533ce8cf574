"""The tokens of the small experiment, made once, and how to train it."""

import os
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Train, tiny

from lfs_cli.config import TrainConfig
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.setup import prepare
from lfs_cli.runs.train import TrainResult, train


@pytest.fixture(autouse=True)
def impatient_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: thousands of times that would take a minute, and no test here pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = DataFolder(tmp_path_factory.mktemp("data"))
    prepare(tiny(), folder, Observer())
    return folder


@pytest.fixture(scope="session")
def whole(data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The small experiment, trained to its end without a stop. Not to be changed."""
    return RunFolder(train(tiny(), tmp_path_factory.mktemp("whole"), data=data).directory)


@pytest.fixture
def train_tiny(data: DataFolder, tmp_path: Path) -> Train:
    """Train the small experiment into a folder of this test: `train_tiny(config, observer=..., resume=...)`."""

    def run(config: TrainConfig, **options: Any) -> TrainResult:
        return train(config, tmp_path / "runs", data=data, **options)

    return run
