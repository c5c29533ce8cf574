"""Two trainings never write into one run folder, and a process that dies leaves no lock."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import Train, Watcher, folder_of, tiny

from lfs_cli.errors import CheckpointError
from lfs_cli.files import lock_of
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.lock import TRAINING, only_trainer

HOLD = """
import sys, time
from pathlib import Path
from lfs_cli.runs.lock import only_trainer
with only_trainer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(CheckpointError, match=f"is being trained by another process \\({holder.pid}\\)"),
            only_trainer(tmp_path),
        ):
            pass
        holder.kill()
        holder.wait()
    assert lock_of(tmp_path / TRAINING).exists()
    with only_trainer(tmp_path):
        assert lock_of(tmp_path / TRAINING).read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_an_error_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), only_trainer(tmp_path):
        raise KeyError
    with only_trainer(tmp_path):
        pass


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    lock_of(tmp_path / TRAINING).mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*: Is a directory"), only_trainer(tmp_path):
        pass


def test_a_run_that_trains_cannot_be_resumed(train_tiny: Train) -> None:
    refused = []

    def resume_too() -> None:
        (run,) = [path.parent for path in folder.glob(f"*/{lock_of(Path(TRAINING))}")]
        with pytest.raises(CheckpointError, match="is being trained") as caught:
            train_tiny(tiny(), resume=RunFolder(run))
        refused.append(caught.value)

    first = folder_of(train_tiny(tiny()))
    folder = first.path.parent
    second = train_tiny(tiny(), observer=Watcher({3: resume_too}))
    assert len(refused) == 1
    assert second.status == "finished"
    assert not list(folder.glob(f"*/{lock_of(Path(TRAINING))}"))


def test_a_checkpoint_that_moves_while_a_second_one_looks_is_no_trap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints" / ".step-000002.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000002.tmp" / "model.safetensors").touch()
    (tmp_path / "checkpoints" / "latest").touch()
    scandir, status = os.scandir, Path.stat

    def gone(place: str | Path) -> None:
        if str(place).endswith((".tmp", "latest")):
            raise FileNotFoundError(errno.ENOENT, "it is gone", str(place))

    monkeypatch.setattr(os, "scandir", lambda place: gone(place) or scandir(place))
    monkeypatch.setattr(Path, "stat", lambda path, **how: gone(path) or status(path, **how))
    RunFolder(tmp_path).refuse_traps()
    monkeypatch.undo()
    os.mkfifo(tmp_path / "checkpoints" / "pipe")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        RunFolder(tmp_path).refuse_traps()
