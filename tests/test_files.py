import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from lfs_cli.files import append_lines, lock_of, locked, remove_drafts, replace_bytes, replace_text, replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a script that has imported `lfs_cli.files`; it reads lines from us and writes lines to us."""
    imports = "import os, signal, sys\nfrom pathlib import Path\nfrom lfs_cli.files import *\n"
    command = [sys.executable, "-c", imports + script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.txt"
    replace_text(path, "first\r\n\udcff")
    assert path.read_bytes() == b"first\r\n\xff"
    with replacing(path) as draft:
        draft.write_text("second")
        assert path.read_bytes() == b"first\r\n\xff"
        assert names(path.parent) == [draft.name, "notes.txt"]
    assert path.read_text() == "second"
    assert names(path.parent) == ["notes.txt"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_what_fails_leaves_the_file_before_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "notes.txt"
    replace_text(path, "first")

    def write() -> None:
        with replacing(path) as draft:
            draft.write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert path.read_text() == "first"
    assert names(tmp_path) == ["notes.txt"]


def test_a_file_and_its_name_are_on_the_disk_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').resolve().name}")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with replacing(tmp_path / "notes.txt") as draft:
        draft.write_text("all of it")
    assert done == [f"sync {draft.name}", "rename notes.txt", f"sync {tmp_path.name}"]


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("first")
    real.chmod(0o640)
    link.symlink_to(real)
    replace_bytes(link, b"second")
    assert link.is_symlink()
    assert real.read_text() == "second"
    assert real.stat().st_mode & 0o777 == 0o640


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "[notes].txt"
    script = (
        "with replacing(Path(sys.argv[1])) as draft: draft.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with python(script, path) as process:
        assert process.wait() == -signal.SIGKILL
    (left,) = names(tmp_path)
    others = ["other.txt.0.draft", "[notes].txt.draft"]
    for other in (*others, ".n.txt.0.draft"):
        (tmp_path / other).write_text("not of this file")

    with replacing(path) as draft:
        assert left not in names(tmp_path)
        assert ".n.txt.0.draft" in names(tmp_path)
        draft.write_text("whole")
        remove_drafts(tmp_path)  # as a second writer would
        assert draft.exists()
    assert names(tmp_path) == sorted([*others, path.name])
    assert path.read_text() == "whole"


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    texts = [character * 100_000 for character in "abcd"]

    def write(text: str) -> None:
        for _ in range(10):
            replace_text(path, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert names(tmp_path) == ["notes.txt"]


def test_processes_that_count_together_lose_nothing(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    script = (
        "for _ in range(100):\n"
        "    with locked(path := Path(sys.argv[1])): path.write_text(str(int(path.read_text()) + 1))"
    )
    with ExitStack() as stack:
        processes = [stack.enter_context(python(script, count)) for _ in range(4)]
        assert [process.wait() for process in processes] == [0] * 4
    assert count.read_text() == "400"
    assert names(tmp_path) == ["count"]


def test_half_a_line_of_a_killed_process_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_lines(path, "1\n2\n")
    with path.open("a") as file:
        file.write("hal")
    append_lines(path, "3\n")
    append_lines(path, "4\n")
    assert path.read_text() == "1\n2\nhal\n3\n4\n"


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    script = "for n in range(50): append_lines(Path(sys.argv[1]), sys.argv[2] * 9999 + '\\n')"
    with ExitStack() as stack:
        processes = [stack.enter_context(python(script, path, letter)) for letter in "abcd"]
        assert [process.wait() for process in processes] == [0] * 4
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(letter * 9999 for letter in "abcd" for _ in range(50))


HOLD = "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"


def test_a_lock_is_waited_for_and_ends_with_its_process(tmp_path: Path) -> None:
    waited = []
    with python(HOLD, tmp_path / "run") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        def kill() -> None:
            waited.append("waited")
            holder.kill()

        with locked(tmp_path / "run", on_wait=kill):
            assert holder.wait() == -signal.SIGKILL
    assert waited == ["waited"]
    assert names(tmp_path) == []


def test_who_will_not_wait_may_say_so(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ValueError("in use")

    with locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="in use"), locked(tmp_path / "run", on_wait=refuse):
            raise AssertionError
        with locked(tmp_path / "other", on_wait=refuse):
            pass
    with locked(tmp_path / "run", on_wait=refuse):
        pass


def test_where_nothing_can_be_written_nothing_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    entered = []
    for code in (errno.EROFS, errno.EACCES):
        with locked(tmp_path / "run"):
            entered.append(code)
    assert entered == [errno.EROFS, errno.EACCES]
    code = errno.EMFILE
    with pytest.raises(OSError, match="Too many open files"), locked(tmp_path / "run"):
        entered.append(code)


def test_a_disk_without_locks_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / "notes.txt"), replacing(tmp_path / "notes.txt") as draft:
        draft.write_text("whole")
        remove_drafts(tmp_path)  # which cannot tell whether it is in use
        assert draft.exists()
    assert names(tmp_path) == ["notes.txt"]


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    lock_of(tmp_path / "run").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "run"):
        pass
    assert precious.read_text() == "kept"
