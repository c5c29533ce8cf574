"""The loops are compiled once on a machine, and whatever is wrong with what was kept, they work."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lfs_cli.tokenizer import machine_code, will_compile

SCRIPT = """
import logging, sys, time
logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
import numpy as np
from lfs_cli.tokenizer import desk, machine_code
fields = desk.new_desk()
pairs, rows = np.full(256, 2**64 - 1, np.uint64), np.array([[1, 2, 7]], np.uint32)
bits = np.zeros(desk.FILTER_BYTES, np.uint8)
fields[desk.PAIRS], fields[desk.PAIR_BITS], fields[desk.PAIR_FILTER] = desk.address(pairs), 8, desk.address(bits)
fields[desk.PAIR_LIST], fields[desk.PAIR_COUNT] = desk.address(rows), 1
machine_code.load("fill_pairs")(desk.address(fields))
assert bits.any() and np.count_nonzero(pairs == (1 << 44 | 2 << 24 | 7)) == 1
print("numba" in sys.modules)
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run a loop in a fresh process that keeps machine code below a new folder; returns what it says."""

    def run(script: str = SCRIPT, cache: Path = tmp_path / "cache") -> str:
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "LOCALAPPDATA": str(cache)}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    return run


def kept(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "lfs" / "loops").iterdir()
    return path


def test_a_loop_is_compiled_once_and_then_loaded_without_numba(run: Callable[..., str]) -> None:
    first, second = run(), run()
    assert first.startswith("compiled fill_pairs in ")
    assert first.endswith("True\n")
    assert second == "False\n"


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 5000], ids=["empty", "short", "zeros"])
def test_a_damaged_file_is_made_again(run: Callable[..., str], tmp_path: Path, damage: bytes) -> None:
    run()
    path = kept(tmp_path)
    good = path.read_bytes()
    path.write_bytes(damage)
    assert run().startswith("compiled fill_pairs")
    assert run() == "False\n"
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert run().startswith("compiled fill_pairs")


@pytest.mark.skipif(sys.platform == "win32", reason="the user's profile is the user's own there")
def test_code_that_others_could_have_written_is_not_run(run: Callable[..., str], tmp_path: Path) -> None:
    run()
    path = kept(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)
    assert run().startswith("compiled fill_pairs")
    assert path.stat().st_mode & 0o777 == 0o600
    assert run() == "False\n"


def test_only_the_last_versions_of_a_loop_are_kept(tmp_path: Path) -> None:
    other = tmp_path / "encode_texts-00.o"
    other.write_bytes(b"")
    for i in range(6):
        path = tmp_path / f"fill_pairs-{i}.o"
        machine_code._write(path, "symbol", b"code")
        os.utime(path, (i, i))
    assert {path.name for path in tmp_path.iterdir()} == {other.name, *(f"fill_pairs-{i}.o" for i in range(2, 6))}
    assert machine_code._read(path) == ("symbol", b"code")


def test_it_works_where_nothing_can_be_kept(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = run(cache=tmp_path / "file")
    assert "cannot keep machine code in" in said
    assert said.endswith("True\n")


def test_code_that_cannot_be_linked_is_used_as_numba_made_it(run: Callable[..., str]) -> None:
    broken = SCRIPT.replace("fields = desk", "machine_code._link = lambda *_: 1 / 0\nfields = desk")
    assert "cannot keep the machine code of fill_pairs: division by zero" in run(broken)


def test_other_sources_have_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code._key.cache_clear()
    key = machine_code._key()
    monkeypatch.setattr(machine_code, "_SOURCES", machine_code._SOURCES[1:])
    machine_code._key.cache_clear()
    assert machine_code._key() != key
    monkeypatch.undo()
    machine_code._key.cache_clear()
    assert machine_code._key() == key


def test_what_compiles_is_said_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine_code, "folder", lambda: tmp_path)
    monkeypatch.setattr(machine_code, "_loaded", {})
    assert will_compile("encoding", 10_000_000, "gpt2")
    assert will_compile("learning", 10_000_000, "gpt2")
    assert not will_compile("learning", 1_000, "gpt2")
    assert not will_compile("encoding", 10_000_000, r"\w+|\W")
    with caplog.at_level(logging.INFO):
        machine_code.announce("encoding", "scan_gpt2")
    assert caplog.messages == [f"compiling the loops for encoding; later runs find them in {tmp_path}"]


def test_all_loops_are_ready_when_their_files_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_code, "folder", lambda: tmp_path)
    monkeypatch.setattr(machine_code, "_loaded", {})
    for name in machine_code.LOOPS:
        assert not all(machine_code.is_ready(task, "scan_o200k") for task in machine_code.TASKS)
        machine_code._path(name).touch()
    assert all(machine_code.is_ready(task, "scan_o200k") for task in machine_code.TASKS)
