"""`lfs tokenize` and `lfs download` when a signal, a limit of the system or another process gets in their way.

What was there before must be there after, whole, and the answer is one error that says how to go on.
"""

import errno
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import serve
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.config import TokenizeConfig
from lfs_cli.corpus import sources
from lfs_cli.corpus.shards import Tokens
from lfs_cli.errors import DataError, DownloadError
from lfs_cli.files import locked
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.tokenize import tokenize

TRAIN = "Once upon a time there was an owl. It sat in the oak.\n<|endoftext|>\n"
STORIES = "".join(f"Once upon a time there were {n} ducks.\n<|endoftext|>\n" for n in range(20_000)).encode()
PATIENCE_SECONDS = 60


def put(data: Path, times: int) -> Path:
    """Let the dataset `owls` have so much text. Returns its folder."""
    folder = data / "raw" / "owls"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(TRAIN * times)
    (folder / "valid.txt").write_text(TRAIN * 20)
    return folder


@pytest.fixture
def owls(data_folder: Path) -> Path:
    """A data folder with a dataset that is tokenized, and that has changed since."""
    put(data_folder, 300)
    assert tokenize_owls().exit_code == 0
    put(data_folder, 20_000)
    return data_folder


def tokenize_owls():
    return CliRunner().invoke(app, ["tokenize", "owls", "--vocab", "280"])


def start(*arguments: str, first: str = "") -> subprocess.Popen[str]:
    """Start `lfs` in a process of its own, which does something else ``first``."""
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", f"{first}\nfrom lfs_cli.cli.app import main\nmain()", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ids(data: Path, split: str = "train") -> bytes:
    return Tokens.open(data / "tokens" / "owls-280", split)[:].tobytes()


def hidden(folder: Path) -> list[str]:
    """Return the files that nobody should have to see: drafts, locks, halves."""
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".") or path.suffix in (".tmp", ".draft")]


INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from lfs_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["lfs_cli.cli.app", "typer", "lfs_cli.cli.train"])
def test_ctrl_c_while_modules_are_imported_says_nothing(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT, module], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_command_is_the_module_that_can_be_interrupted() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"lfs": "lfs_cli.__main__:main"}


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_tokenization_in_good_order(owls: Path, number: int, word: str) -> None:
    put(owls, 200_000)
    before = ids(owls)
    process = start("tokenize", "owls", "--vocab", "280", "--workers", "2")
    draft, deadline = owls / "tokens" / "owls-280" / ".train.draft", time.monotonic() + PATIENCE_SECONDS
    while not draft.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)

    assert process.returncode == 128 + number
    assert errors.endswith(f"error: {word}\n\nhint: run the same command again: what is complete is kept\n")
    assert "Traceback" not in errors
    assert output == ""
    assert ids(owls) == before
    assert hidden(owls) == []
    assert tokenize_owls().exit_code == 0
    assert len(ids(owls)) > len(before)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_download_in_good_order(data_folder: Path, number: int, word: str) -> None:
    process = start("download", "sample", "--size", "50MB")
    raw, deadline = data_folder / "raw" / "sample", time.monotonic() + PATIENCE_SECONDS
    while not list(raw.glob(".*.draft")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)

    assert process.returncode == 128 + number
    assert errors.endswith(f"error: {word}\n\nhint: run the same command again: what is complete is kept\n")
    assert not raw.exists()
    assert hidden(data_folder) == []


SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"


def test_a_file_that_may_not_grow_is_one_error(owls: Path) -> None:
    before = ids(owls)
    process = start("tokenize", "owls", "--vocab", "280", first=SMALL_FILES)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert (
        f"error: cannot write token shards in `{owls}/tokens/owls-280`: File too large\n\nhint: allow larger" in errors
    )
    assert ids(owls) == before
    assert hidden(owls) == []


def test_a_download_that_may_not_grow_is_one_error(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(STORIES)
    with serve({"text.txt": STORIES}) as hub:
        for source in (str(tmp_path / "text.txt"), hub.web("text.txt")):
            process = start("download", "--from", source, "--name", "mine", first=SMALL_FILES)
            _, errors = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 1
            assert "File too large\n\nhint: allow larger files (`ulimit -f unlimited`)" in errors
            assert not list(data_folder.glob("raw/mine/*.txt"))
    assert hidden(data_folder) == []


@pytest.mark.parametrize("command", [("tokenize", "owls", "--vocab", "280"), ("download", "sample", "--set", "seed=4")])
def test_too_few_file_handles_are_one_error(owls: Path, command: tuple[str, ...]) -> None:
    """The process takes them all itself, and leaves one more to lfs each time, until none is missing."""
    take_all = (
        "import os, resource, sys\n"
        "import lfs_cli.cli.app, lfs_cli.runs.tokenize, lfs_cli.runs.download\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "left, taken = int(sys.argv.pop(1)), []\n"
        "try:\n"
        "    while True: taken.append(os.open(os.devnull, os.O_RDONLY))\n"
        "except OSError: pass\n"
        "for handle in taken[:left]: os.close(handle)\n"
    )
    missing = 0
    for left in range(12):
        process = start(str(left), *command, first=take_all)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        if process.returncode == 0:
            break
        assert "Traceback" not in errors, errors
        assert "hint: allow more open files: `ulimit -n 4096`" in errors
        Tokens.open(owls / "tokens" / "owls-280", "train").verify()
        missing += 1
    assert process.returncode == 0
    assert missing


def unwritable(tmp_path: Path) -> Path:
    """Return a folder that not even the administrator may write to."""
    folder = tmp_path / "unwritable"
    folder.symlink_to("/sys/kernel")
    return folder


def test_a_folder_that_cannot_be_written_is_one_error(data_folder: Path, tmp_path: Path) -> None:
    put(data_folder, 10)
    (data_folder / "tokens").symlink_to(unwritable(tmp_path))
    result = tokenize_owls()
    assert result.exit_code == 1
    assert "error: cannot write" in result.stderr
    assert "hint: check the permissions, or set `LFS_DATA` to a folder that you can read and write" in result.stderr


class Meddler(Observer):
    """Does something when a stage of the work has begun, as somebody else might."""

    def __init__(self, stage: str, act: Callable[[], object]) -> None:
        self.stage_name, self.act = stage, act

    def progress(self, label: str, done: int, total: int, unit: str = "B") -> None:
        if label == self.stage_name:
            self.stage_name = ""
            self.act()


@pytest.mark.parametrize("stage", ["counting", "encoding train", "encoding valid"])
@pytest.mark.parametrize("deed", ["changed", "removed", "cut short"])
def test_a_text_that_changes_while_it_is_read_replaces_nothing(owls: Path, stage: str, deed: str) -> None:
    put(owls, 500)
    text = owls / "raw" / "owls" / ("valid.txt" if stage == "encoding valid" else "train.txt")
    deeds = {
        "changed": lambda: text.write_text(text.read_text().replace("owl", "elk")),
        "removed": text.unlink,
        "cut short": lambda: os.truncate(text, 500),
    }
    before = ids(owls, text.stem)
    with pytest.raises(DataError, match="was changed or removed while it was read") as caught:
        tokenize(TokenizeConfig(dataset="owls", vocab_size=280), DataFolder(owls), Meddler(stage, deeds[deed]))
    assert str(text) in str(caught.value)
    assert "run the same command again" in str(caught.value.hint)
    assert ids(owls, text.stem) == before
    assert hidden(owls) == []


def test_a_text_that_is_gone_when_its_turn_comes_is_named(owls: Path) -> None:
    text = owls / "raw" / "owls" / "valid.txt"
    with pytest.raises(DataError, match=r"no file `.*valid\.txt`"):
        tokenize(
            TokenizeConfig(dataset="owls", vocab_size=280), DataFolder(owls), Meddler("encoding train", text.unlink)
        )
    assert hidden(owls) == []


def bring(source: Path, folder: Path, watcher: Observer) -> dict[str, str]:
    with sources.dataset_folder(folder, watcher):
        return sources.bring_own(
            str(source), "mine", folder, valid_share=0.1, licence="mine", separator="\n", watcher=watcher
        )


def test_a_file_that_changes_while_it_is_brought_leaves_nothing(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(STORIES * 3)
    meddler = Meddler("reading text.txt", lambda: text.write_bytes(STORIES * 4))
    with pytest.raises(DataError, match=r"text.txt` was changed while it was read"):
        bring(text, tmp_path / "raw" / "mine", meddler)
    assert not (tmp_path / "raw" / "mine").exists()
    assert bring(text, tmp_path / "raw" / "mine", Observer()) == {"train.txt": "written", "valid.txt": "written"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_the_very_end_loses_nothing(
    owls: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    put(owls, 500)
    before = ids(owls)

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    result = tokenize_owls()
    assert result.exit_code == 1
    assert os.strerror(code) in result.stderr
    assert "hint: " in result.stderr
    assert ids(owls) == before
    assert hidden(owls) == []
    with pytest.raises(DownloadError, match=r"disk is full|cannot use"):
        bring(owls / "raw" / "owls" / "train.txt", owls / "raw" / "mine", Observer())
    assert not list(owls.glob("raw/mine/*.txt"))


@pytest.mark.parametrize(
    ("place", "command"),
    [("tokens/owls-280", ("tokenize", "owls", "--vocab", "280")), ("raw/sample", ("download", "sample"))],
)
def test_a_second_process_waits_for_the_first(data_folder: Path, place: str, command: tuple[str, ...]) -> None:
    put(data_folder, 10)
    with locked(data_folder / place):
        process = start(*command)
        assert process.stderr is not None
        assert process.stderr.readline() == f"waiting for another process that is writing {data_folder / place}\n"
        assert not list((data_folder / place).glob("*"))
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert hidden(data_folder) == []


def test_two_at_once_do_the_work_once(data_folder: Path) -> None:
    put(data_folder, 20_000)
    processes = [start("tokenize", "owls", "--vocab", "280") for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    made = sorted(output.splitlines()[2].split("\t")[-1] for output, _ in outputs)
    assert made == ["kept", "new"]
    assert hidden(data_folder) == []
