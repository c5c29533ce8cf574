import bz2
import errno
import gzip
import hashlib
import json
import lzma
import random
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, Hub, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.corpus import sources, transfer
from lfs_cli.corpus.sources import DATASETS, Dataset, HubFile, bring, bring_own, dataset_folder, here, read_manifest
from lfs_cli.corpus.text import Inspector, find_cut, unpack
from lfs_cli.errors import DataError, DownloadError

END = "<|endoftext|>"
TRAIN_TEXT = "".join(f"Story {n}. {random.Random(n).random()}\n{END}\n" for n in range(4000)).encode()
VALID_TEXT = "".join(f"Tale {n}.\n{END}\n" for n in range(300)).encode()


class Watcher:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.seen: list[tuple[str, int, int]] = []

    def stage(self, text: str) -> None:
        pass

    def progress(self, label: str, done: int, total: int, unit: str = "B") -> None:
        self.seen.append((label, done, total))

    def finish_progress(self) -> None:
        pass

    def warning(self, text: str) -> None:
        self.warnings.append(text)


FILES = {
    "far_train.txt": TRAIN_TEXT,
    "far_valid.txt": VALID_TEXT,
    "far_train.txt.gz": gzip.compress(TRAIN_TEXT),
    "far_valid.txt.gz": gzip.compress(VALID_TEXT),
}


def dataset(ending: str) -> Dataset:
    files = {
        split: HubFile(f"far_{split}{ending}", len(FILES[f"far_{split}{ending}"]), len(text), sha256(text))
        for split, text in (("train.txt", TRAIN_TEXT), ("valid.txt", VALID_TEXT))
    }
    return Dataset("for tests", "cc0-1.0", "somebody/stories", files)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setitem(DATASETS, "plain", dataset(""))
    monkeypatch.setitem(DATASETS, "packed", dataset(".gz"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(dict(FILES)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def fetch(name: str, folder: Path, watcher: Watcher | None = None) -> dict[str, str]:
    watcher = watcher or Watcher()
    with dataset_folder(folder, watcher):
        return bring(name, folder, watcher)


def own(source: object, folder: Path, watcher: Watcher | None = None, valid_share: float = 0.1) -> dict[str, str]:
    watcher = watcher or Watcher()
    with dataset_folder(folder, watcher):
        return bring_own(
            str(source),
            "mine",
            folder,
            valid_share=valid_share,
            licence="unknown",
            separator=END,
            watcher=watcher,
        )


def texts(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "train.txt").read_bytes(), (folder / "valid.txt").read_bytes()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


WHOLE = {"train.txt", "valid.txt", "manifest.json"}


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_a_dataset_of_the_hub_arrives_whole_with_its_manifest(name: str, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "raw" / name

    outcomes = fetch(name, folder)

    assert outcomes == {"train.txt": "downloaded", "valid.txt": "downloaded"}
    assert texts(folder) == (TRAIN_TEXT, VALID_TEXT)
    assert names(folder) == WHOLE
    record = json.loads((folder / "manifest.json").read_text())["files"]["train.txt"]
    assert record["sha256"] == sha256(TRAIN_TEXT)
    assert record["bytes"] == len(TRAIN_TEXT)
    assert record["revision"] == COMMIT
    assert record["licence"] == "cc0-1.0"
    assert record["source"].startswith(f"{hub.url}/datasets/somebody/stories/resolve/{COMMIT}/far_train.txt")
    assert record["checked"] == "the sha256 that the hub declares"


def test_the_token_goes_to_the_hub_and_not_to_the_host_that_it_redirects_to(hub: Hub, tmp_path: Path) -> None:
    hub.faults.token = "hf_secret"

    fetch("plain", tmp_path / "plain")

    assert {r.get("authorization") for r in hub.log if r["path"].startswith("/datasets/")} == {"Bearer hf_secret"}
    assert {r.get("authorization") for r in hub.transfers()} == {None}


def test_a_second_call_verifies_without_the_network(hub: Hub, tmp_path: Path) -> None:
    fetch("plain", tmp_path / "plain")
    hub.log.clear()

    assert fetch("plain", tmp_path / "plain") == {"train.txt": "verified", "valid.txt": "verified"}
    assert hub.log == []


@pytest.mark.parametrize(
    ("damage", "what"),
    [(b"other", "it has 5 bytes instead of"), (TRAIN_TEXT[:-1] + b"?", "its sha256 is not")],
    ids=["size", "content"],
)
def test_a_damaged_file_is_named_and_fetched_again(damage: bytes, what: str, hub: Hub, tmp_path: Path) -> None:
    folder, watcher = tmp_path / "plain", Watcher()
    fetch("plain", folder)
    (folder / "train.txt").write_bytes(damage)

    outcomes = fetch("plain", folder, watcher)

    assert outcomes == {"train.txt": "downloaded", "valid.txt": "verified"}
    assert texts(folder) == (TRAIN_TEXT, VALID_TEXT)
    assert f"{folder / 'train.txt'} is damaged: {what}" in watcher.warnings[0]


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_a_connection_cut_in_the_middle_is_taken_up_at_the_same_byte(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.faults.cut_after = [10**9, 9_000, 20_000]

    fetch(name, tmp_path / name)

    assert texts(tmp_path / name) == (TRAIN_TEXT, VALID_TEXT)
    ranges = [request.get("range") for request in hub.transfers()]
    assert ranges[:2] == [None, None]
    first, second = (int(wanted[6:-1]) for wanted in ranges[2:])
    assert 0 < first <= 9_000
    assert first < second <= first + 20_000


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_a_download_that_was_stopped_continues_in_the_next_call(
    name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    monkeypatch.setattr(transfer, "RETRIES", -1)  # the first break ends the call
    hub.faults.cut_after = [10**9, 30_000]

    with pytest.raises(DownloadError, match=r"broke off after [\d,]+ of [\d,]+ bytes") as failed:
        fetch(name, folder)

    assert "run the same command again" in str(failed.value.hint)
    assert here(folder) == "unfinished"
    assert len(WHOLE & names(folder)) == 2  # one text and its record; the other has no name yet
    assert not any(path.name.endswith(".tmp") for path in folder.iterdir())
    part = next(folder.glob("*.part"))
    kept = part.stat().st_size
    assert 0 < kept <= 30_000
    hub.log.clear()
    fetch(name, folder)
    assert texts(folder) == (TRAIN_TEXT, VALID_TEXT)
    assert names(folder) == WHOLE
    assert [r.get("range") for r in hub.transfers()] == [f"bytes={kept}-"]


def test_what_was_fetched_of_an_older_version_is_not_continued(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plain"
    monkeypatch.setattr(transfer, "RETRIES", -1)
    hub.faults.cut_after = [10**9, 30_000]
    with pytest.raises(DownloadError):
        fetch("plain", folder)
    newer = TRAIN_TEXT.replace(b"Story", b"Fable")
    hub.files.update({"far_train.txt": newer, "far_valid.txt": VALID_TEXT})
    hub.log.clear()
    watcher = Watcher()

    fetch("plain", folder, watcher)

    assert newer in texts(folder)
    assert [r.get("range") for r in hub.transfers()] == [None]
    assert "not the text that this version of lfs knows" in watcher.warnings[0]


def test_a_server_without_ranges_sends_all_again_and_the_text_is_right(hub: Hub, tmp_path: Path) -> None:
    hub.faults.ignore_ranges = True
    hub.faults.cut_after = [9_000, 20_000, 40_000]

    fetch("plain", tmp_path / "plain")

    assert texts(tmp_path / "plain") == (TRAIN_TEXT, VALID_TEXT)


def test_only_attempts_without_a_new_byte_count_as_failures(hub: Hub, tmp_path: Path) -> None:
    hub.faults.cut_after = [10**9] + [9_000] * (3 * transfer.RETRIES)

    fetch("plain", tmp_path / "plain")

    assert texts(tmp_path / "plain") == (TRAIN_TEXT, VALID_TEXT)


def test_a_server_that_sends_other_bytes_than_it_was_asked_for_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.faults.cut_after = [10**9, 9_000]
    hub.faults.wrong_range = True

    with pytest.raises(DownloadError, match="sent other bytes than it was asked for"):
        fetch("plain", tmp_path / "plain")


def test_a_server_that_has_another_size_than_declared_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.faults.extra_size = 7

    with pytest.raises(DownloadError, match=r"has [\d,]+ bytes on the server instead of"):
        fetch("plain", tmp_path / "plain")

    assert not (tmp_path / "plain").exists()


def test_a_part_that_is_too_long_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "far_train.txt.part").write_bytes(TRAIN_TEXT + b"more")
    note = {"url": "", "identity": sha256(TRAIN_TEXT), "bytes": len(TRAIN_TEXT)}
    (folder / "far_train.txt.part.json").write_text(json.dumps(note))
    hub.faults.ignore_ranges = True

    fetch("plain", folder)

    assert texts(folder) == (TRAIN_TEXT, VALID_TEXT)


@pytest.mark.parametrize("name", ["plain", "mine"])
def test_a_part_that_was_damaged_meanwhile_is_not_continued(
    name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring_it() -> None:
        fetch(name, tmp_path / name) if name == "plain" else own(hub.web("far_train.txt"), tmp_path / name)

    monkeypatch.setattr(transfer, "RETRIES", -1)
    hub.faults.cut_after = [60_000] if name == "mine" else [10**9, 60_000]
    with pytest.raises(DownloadError, match="broke off after 60,000"):
        bring_it()
    (part,) = (tmp_path / name).glob("*.part")
    with part.open("r+b") as file:
        file.seek(59_990)
        file.write(b"\0")

    with pytest.raises(DownloadError, match=r"is damaged: .* does not fit its checksum"):
        bring_it()
    assert not part.exists()
    bring_it()
    assert TRAIN_TEXT in (b"".join(texts(tmp_path / name)), texts(tmp_path / name)[0])


NOTES = [
    "",
    "[]",
    "{}",
    '{"url": 1}',
    '{"identity": 7}',
    '{"bytes": "9"}',
    '{"kept": "x"}',
    '{"crc32": null}',
    '{"kept": -9}',
]


@pytest.mark.parametrize("note", NOTES)
def test_a_strange_note_beside_a_part_does_no_harm(
    note: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "RETRIES", -1)
    hub.faults.cut_after = [60_000]
    with pytest.raises(DownloadError):
        own(hub.web("far_train.txt"), tmp_path / "mine")
    path = tmp_path / "mine" / "source.part.json"
    try:
        path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(note)))
    except (ValueError, TypeError):
        path.write_text(note)

    own(hub.web("far_train.txt"), tmp_path / "mine")

    assert b"".join(texts(tmp_path / "mine")) == TRAIN_TEXT


def test_a_busy_server_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults.statuses = [503, 429, 500]

    fetch("plain", tmp_path / "plain")

    assert texts(tmp_path / "plain") == (TRAIN_TEXT, VALID_TEXT)


def test_a_small_file_is_checked_against_its_git_hash(hub: Hub, tmp_path: Path) -> None:
    hub.faults.small = True

    fetch("plain", tmp_path / "plain")

    manifest = read_manifest(tmp_path / "plain")
    assert manifest is not None
    assert manifest.files["train.txt"].checked == "the sha1 that the hub declares"


@pytest.mark.parametrize("name", ["plain", "packed"])
@pytest.mark.parametrize("small", [False, True])
def test_wrong_bytes_never_become_a_dataset(name: str, small: bool, hub: Hub, tmp_path: Path) -> None:
    hub.faults.small = small
    hub.faults.wrong_bytes = True

    with pytest.raises(DownloadError, match="wrong checksum"):
        fetch(name, tmp_path / name)

    assert not (tmp_path / name).exists()


def test_a_packed_file_that_cannot_be_unpacked_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    right = hub.files["far_valid.txt.gz"]
    hub.files["far_valid.txt.gz"] = right[:-1] + bytes([right[-1] ^ 1])

    with pytest.raises(DownloadError, match="damaged gzip file") as failed:
        fetch("packed", tmp_path / "packed")

    assert "it starts over" in str(failed.value.hint)
    assert not (tmp_path / "packed").exists()


def test_progress_is_shown_while_a_slow_server_sends(hub: Hub, tmp_path: Path) -> None:
    hub.faults.bytes_per_second = 1_000_000
    watcher = Watcher()

    fetch("plain", tmp_path / "plain", watcher)

    steps = [(done, total) for label, done, total in watcher.seen if label == "fetching far_train.txt"]
    assert len(steps) > 3
    assert steps == sorted(steps)
    assert steps[-1] == (len(TRAIN_TEXT), len(TRAIN_TEXT))


def test_two_processes_do_not_write_one_dataset_at_once(hub: Hub, tmp_path: Path) -> None:
    folder, outcomes = tmp_path / "plain", []
    threads = [threading.Thread(target=lambda: outcomes.append(fetch("plain", folder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcome["train.txt"] for outcome in outcomes) == ["downloaded", "verified"]
    assert len(hub.transfers()) == 2


def test_a_redirect_to_an_unencrypted_server_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.faults.redirect_to = "http://example.com/far_train.txt"

    with pytest.raises(DownloadError, match="is not encrypted"):
        fetch("plain", tmp_path / "plain")


def test_a_redirect_from_elsewhere_to_this_machine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stranger's server must not make us ask what only this machine may be asked."""
    asked = []

    class Session:
        @contextmanager
        def stream(self, method: str, url: str, **options: object) -> Iterator[SimpleNamespace]:
            asked.append(url)
            location = "http://127.0.0.1:631/admin" if len(asked) > 1 else "https://cdn.example/text.txt"
            yield SimpleNamespace(has_redirect_location=True, headers={"Location": location})

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    with pytest.raises(DownloadError, match=r"`https://example\.com/text\.txt` leads to this machine itself"):
        own("https://example.com/text.txt", tmp_path / "mine")
    assert asked == ["https://example.com/text.txt", "https://cdn.example/text.txt"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://localhost:{port}/datasets/a/b/resolve/main/far_train.txt", "leads in a circle"),
        ("/datasets/a/b/resolve/main/far_train.txt", "Exceeded 20 redirects"),
        ("ftp://example.com/x", "is not a web address"),
        ("https://", "is not a web address"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_refused(hub: Hub, tmp_path: Path, target: str, message: str) -> None:
    hub.faults.redirect_to = target.format(port=hub.port)
    with pytest.raises(DownloadError, match=message):
        fetch("plain", tmp_path / "plain")
    assert len(hub.log) < 30
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_a_server_that_sends_more_than_it_announced_is_refused(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.faults.extra_body = 10_000_000
    with pytest.raises(DownloadError, match=r"sends more than the [\d,]+ bytes") as caught:
        fetch(name, tmp_path / name)
    assert "it starts over" in caught.value.hint
    assert not (tmp_path / name).exists()


def disk_of(size: int, folder: Path) -> Callable[[object], SimpleNamespace]:
    """Return a `shutil.disk_usage` of a disk of ``size`` bytes that holds what is in ``folder``."""

    def usage(_: object) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return SimpleNamespace(total=size, free=size - used)

    return usage


def test_a_server_without_a_length_cannot_fill_the_disk(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.extra_body = 12_000_000
    monkeypatch.setattr(shutil, "disk_usage", disk_of(10_000_000, tmp_path))
    with pytest.raises(DownloadError, match=r"has more than .* bytes, for which .* has no room"):
        own(hub.web("far_train.txt"), tmp_path / "mine")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 10_000_000


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress], ids=["gz", "xz", "bz2"])
def test_a_bomb_cannot_fill_the_disk(pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb"
    bomb.write_bytes(pack(b"all work and no play\n" * 200_000))
    monkeypatch.setattr(shutil, "disk_usage", disk_of(2_000_000, tmp_path))
    with pytest.raises(DownloadError, match=r"bomb` has more than [\d,]+ bytes, for which .* has no room") as caught:
        own(bomb, tmp_path / "mine")
    assert "do not trust the file" in caught.value.hint
    assert not (tmp_path / "mine").exists()


def test_packed_text_that_asks_for_too_much_memory_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}]
    (tmp_path / "mine.xz").write_bytes(lzma.compress(b"small", filters=filters))
    with pytest.raises(DataError, match="asks for more than 268,435,456 bytes of memory"):
        own(tmp_path / "mine.xz", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress], ids=["gz", "xz", "bz2"])
def test_damage_in_the_second_stream_of_a_packed_text_is_found(pack, tmp_path: Path) -> None:
    first, second = pack(TRAIN_TEXT), pack(VALID_TEXT)
    assert b"".join(unpack([first + bytes(8) + second], "text")) == TRAIN_TEXT + VALID_TEXT
    middle = len(second) // 2
    for damaged in (second[:middle], second[:middle] + b"nonsense" + second[middle:], second[:2], second[:8] + b"x"):
        for chunks in ([first, damaged], [first + damaged]):
            with pytest.raises(DataError, match="is a damaged"):
                list(unpack(chunks, "text"))


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_a_text_whose_process_was_killed_before_the_last_rename_is_not_fetched_again(
    name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = tmp_path / name, Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == "train.txt":
            kept.append(shutil.copytree(folder, tmp_path / "kept"))  # before the cleaning up that a killed one lacks
        return replace(self, target)

    kept: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        fetch(name, folder)
    shutil.rmtree(folder)
    kept[0].rename(folder)
    assert not (folder / "train.txt").exists()
    hub.log.clear()

    fetch(name, folder)

    assert hub.transfers() == []
    assert texts(folder) == (TRAIN_TEXT, VALID_TEXT)
    assert names(folder) == WHOLE


def test_own_text_that_was_complete_when_its_process_was_killed_is_taken(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first rename, between the two, and before the part is thrown away."""
    folder, replace = tmp_path / "mine", Path.replace
    states: list[Path] = []

    def keep() -> None:
        states.append(shutil.copytree(folder, tmp_path / f"state-{len(states)}"))

    def kept_replace(self: Path, target: Path) -> Path:
        if target.suffix == ".txt":
            keep()
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kept_replace)
        patch.setattr(sources, "discard", lambda part: keep())
        own(hub.web("far_train.txt"), folder)
    assert len(states) == 3
    hub.log.clear()
    for state in states:
        shutil.rmtree(folder)
        state.rename(folder)
        assert own(hub.web("far_train.txt"), folder) == {"train.txt": "verified", "valid.txt": "verified"}
        assert b"".join(texts(folder)) == TRAIN_TEXT
        assert names(folder) == WHOLE
    assert hub.log == []


def test_what_a_killed_process_left_is_cleared_away(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("train.txt.tmp", "far_train.txt.part", "manifest.json.tmp"):
        (folder / name).write_bytes(b"half")

    fetch("plain", folder)

    assert texts(folder) == (TRAIN_TEXT, VALID_TEXT)
    assert names(folder) == WHOLE
    (folder / "train.txt.tmp").write_bytes(b"half")
    fetch("plain", folder)
    assert names(folder) == WHOLE


def test_files_put_by_hand_are_accepted_and_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "train.txt").write_bytes(TRAIN_TEXT)
    (folder / "valid.txt").write_bytes(b"something else")

    assert fetch("plain", folder) == {"train.txt": "put by hand", "valid.txt": "put by hand"}
    assert fetch("plain", folder) == {"train.txt": "verified", "valid.txt": "verified"}
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.files["train.txt"].checked == "sha256 that lfs knows"
    assert manifest.files["valid.txt"].checked == "nothing: put here by hand"


def test_both_forms_of_a_packed_file_must_fit_on_the_disk(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = sum(len(FILES[f"far_{split}"]) + len(FILES[f"far_{split}.gz"]) for split in ("train.txt", "valid.txt"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage._replace(free=both - 1))

    with pytest.raises(DownloadError, match=r"needs .* are free"):
        fetch("packed", tmp_path / "packed")

    assert hub.transfers() == []
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage._replace(free=both))
    fetch("packed", tmp_path / "packed")


def test_what_is_here_already_needs_no_room(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RETRIES", -1)
    hub.faults.cut_after = [10**9, 50_000]
    with pytest.raises(DownloadError):
        fetch("plain", tmp_path / "plain")
    rest = len(TRAIN_TEXT) - (tmp_path / "plain" / "far_train.txt.part").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage._replace(free=rest))

    assert fetch("plain", tmp_path / "plain")["train.txt"] == "downloaded"


def test_text_from_the_web_needs_room_twice(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage._replace(free=2 * len(TRAIN_TEXT) - 1))

    with pytest.raises(DownloadError, match=r"needs .* are free"):
        own(hub.web("far_train.txt"), tmp_path / "mine")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    code: int, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(sources, "write_manifest", fail)

    with pytest.raises(DownloadError, match=r"the disk is full|cannot use"):
        fetch("packed", tmp_path / "packed")

    assert not WHOLE & names(tmp_path / "packed")


# The user's own text


def test_own_text_is_cut_at_a_document_boundary(tmp_path: Path) -> None:
    source = tmp_path / "mine.txt"
    source.write_bytes(TRAIN_TEXT)

    assert own(source, tmp_path / "mine") == {"train.txt": "written", "valid.txt": "written"}

    train, valid = texts(tmp_path / "mine")
    assert train + valid == TRAIN_TEXT
    assert train.endswith(f"{END}\n".encode())
    assert valid.startswith(b"Story ")
    assert abs(len(valid) / len(TRAIN_TEXT) - 0.1) < 0.001
    manifest = read_manifest(tmp_path / "mine")
    assert manifest is not None
    assert manifest.files["valid.txt"].source == str(source)
    assert own(source, tmp_path / "mine") == {"train.txt": "verified", "valid.txt": "verified"}


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress], ids=["gz", "xz", "bz2"])
def test_packed_text_is_told_by_its_first_bytes_and_unpacked(pack, tmp_path: Path) -> None:
    source = tmp_path / "mine.dat"
    source.write_bytes(pack(TRAIN_TEXT[:50_000]) + pack(TRAIN_TEXT[50_000:]))

    own(source, tmp_path / "mine")

    assert b"".join(texts(tmp_path / "mine")) == TRAIN_TEXT


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress], ids=["gz", "xz", "bz2"])
def test_a_packed_file_that_ends_early_or_is_damaged_is_refused(pack, tmp_path: Path) -> None:
    whole = pack(TRAIN_TEXT)
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + b"nonsense" + whole[middle:]):
        source = tmp_path / "mine.dat"
        source.write_bytes(damaged)
        with pytest.raises(DataError, match="is a damaged"):
            own(source, tmp_path / "mine")
        assert not (tmp_path / "mine").exists()


def test_bytes_behind_a_packed_text_are_read_too(tmp_path: Path) -> None:
    data = bz2.compress(TRAIN_TEXT) + b"\xff" * 3_000_000
    (tmp_path / "mine.bz2").write_bytes(data)

    own(tmp_path / "mine.bz2", tmp_path / "mine")

    manifest = read_manifest(tmp_path / "mine")
    assert manifest is not None
    assert manifest.settings["source_sha256"] == sha256(data)


def test_crlf_and_a_byte_order_mark_are_kept(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + b"One line.\r\nAnother.\r\n\r\n" * 50
    source = tmp_path / "mine.txt"
    source.write_bytes(text)

    own(source, tmp_path / "mine")

    train, valid = texts(tmp_path / "mine")
    assert train + valid == text
    assert train.endswith(b"\r\n\r\n")


def test_invalid_utf8_is_kept_and_its_first_place_named(tmp_path: Path) -> None:
    text = b"word " * 300_000 + b"caf\xe9 " + b"word " * 1000 + b"\xff"
    source, watcher = tmp_path / "mine.txt", Watcher()
    source.write_bytes(text)

    own(source, tmp_path / "mine", watcher)

    assert b"".join(texts(tmp_path / "mine")) == text
    assert "not UTF-8 at byte 1,500,003" in watcher.warnings[0]


REFUSED = {
    "empty": (b"", "is empty"),
    "packed empty": (gzip.compress(b""), "is empty"),
    "one byte": (b"x", "cannot be cut"),
    "zeros": (b"text\0text", "binary file"),
    "random": (random.Random(0).randbytes(5000), "binary file"),
    "controls": (bytes(range(1, 32)) * 20, "binary file"),
    "UTF-16": ("text".encode("utf-16"), "UTF-16"),
    "PDF": (b"%PDF-1.7 ...", "is a PDF"),
    "packed zeros": (gzip.compress(b"\0" * 1000), "binary file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    source = tmp_path / "mine"
    source.write_bytes(content)

    with pytest.raises(DataError, match=message) as refused:
        own(source, tmp_path / "raw")

    assert refused.value.hint
    assert not (tmp_path / "raw").exists()


def test_a_zip_archive_is_named_as_such(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        archive.writestr("text.txt", "text")

    with pytest.raises(DataError, match="zip archive") as refused:
        own(tmp_path / "mine.zip", tmp_path / "raw")

    assert refused.value.hint == f"unpack it first: `unzip -p {tmp_path / 'mine.zip'} > text.txt`"


def test_a_name_that_stands_for_other_text_is_not_overwritten(tmp_path: Path) -> None:
    source, other, folder = tmp_path / "mine.txt", tmp_path / "other.txt", tmp_path / "raw"
    source.write_bytes(TRAIN_TEXT)
    other.write_bytes(VALID_TEXT)
    own(source, folder)
    before = texts(folder)

    for change in (lambda: own(other, folder), lambda: own(source, folder, valid_share=0.2)):
        with pytest.raises(DataError, match="`mine` is taken"):
            change()
    source.write_bytes(VALID_TEXT)
    with pytest.raises(DataError, match="an earlier state of"):
        own(source, folder)

    assert texts(folder) == before


def test_own_text_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    source, folder, watcher = tmp_path / "mine.txt", tmp_path / "raw", Watcher()
    source.write_bytes(TRAIN_TEXT)
    own(source, folder)
    before = texts(folder)
    (folder / "valid.txt").unlink()
    (folder / "train.txt").write_bytes(b"broken")

    assert own(source, folder, watcher) == {"train.txt": "written", "valid.txt": "written"}
    assert texts(folder) == before
    assert "is damaged" in watcher.warnings[0]


@pytest.mark.parametrize("name", ["far_train.txt", "far_train.txt.gz"])
def test_own_text_from_the_web_continues_after_a_break(
    name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    monkeypatch.setattr(transfer, "RETRIES", -1)
    hub.faults.cut_after = [30_000]
    with pytest.raises(DownloadError, match="broke off"):
        own(hub.web(name), folder)
    assert names(folder) == {"source.part", "source.part.json"}
    kept = (folder / "source.part").stat().st_size

    own(hub.web(name), folder)

    assert b"".join(texts(folder)) == TRAIN_TEXT
    assert names(folder) == WHOLE
    again = hub.transfers()[-1]
    assert again["range"] == f"bytes={kept}-"
    assert again["if-range"] == f'"{hashlib.md5(hub.files[name]).hexdigest()}"'
    assert own(hub.web(name), folder) == {"train.txt": "verified", "valid.txt": "verified"}


def test_a_file_that_changed_on_the_web_is_fetched_from_its_start(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "RETRIES", -1)
    hub.faults.cut_after = [30_000]
    with pytest.raises(DownloadError, match="broke off"):
        own(hub.web("far_train.txt"), tmp_path / "mine")
    hub.files["far_train.txt"] = newer = TRAIN_TEXT.replace(b"Story", b"Fable")

    own(hub.web("far_train.txt"), tmp_path / "mine")

    assert b"".join(texts(tmp_path / "mine")) == newer


def test_a_file_that_changes_on_the_web_meanwhile_is_not_mixed(hub: Hub, tmp_path: Path) -> None:
    hub.faults.cut_after = [30_000]

    def change(label: str, done: int, total: int, unit: str = "B") -> None:
        hub.files["far_train.txt"] = TRAIN_TEXT.replace(b"Story", b"Fable")

    watcher = Watcher()
    watcher.progress = change
    with pytest.raises(DownloadError, match="changed on the server"):
        own(hub.web("far_train.txt"), tmp_path / "mine", watcher)

    assert not (tmp_path / "mine").exists()


def test_a_file_that_shrank_on_the_web_is_fetched_from_its_start(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "RETRIES", -1)
    hub.faults.cut_after = [30_000]
    with pytest.raises(DownloadError, match="broke off"):
        own(hub.web("far_train.txt"), tmp_path / "mine")
    monkeypatch.setattr(transfer, "RETRIES", 1)
    hub.files["far_train.txt"] = VALID_TEXT
    hub.faults.ignore_if_range = True

    own(hub.web("far_train.txt"), tmp_path / "mine")

    assert b"".join(texts(tmp_path / "mine")) == VALID_TEXT


def test_what_is_no_text_on_the_web_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.files["zeros"] = b"\0" * 100_000

    with pytest.raises(DataError, match="binary file"):
        own(hub.web("zeros"), tmp_path / "mine")

    assert not (tmp_path / "mine").exists()


def test_a_server_that_tells_neither_length_nor_version_is_enough(hub: Hub, tmp_path: Path) -> None:
    hub.faults.no_length = hub.faults.no_etag = True

    own(hub.web("far_train.txt"), tmp_path / "mine")

    assert b"".join(texts(tmp_path / "mine")) == TRAIN_TEXT


def test_such_a_server_is_not_trusted_to_continue(hub: Hub, tmp_path: Path) -> None:
    hub.faults.no_length = hub.faults.no_etag = True
    hub.faults.cut_after = [30_000]

    with pytest.raises(DownloadError, match="broke off") as failed:
        own(hub.web("far_train.txt"), tmp_path / "mine")

    assert "starts over" in str(failed.value.hint)
    assert len(hub.transfers()) == 1
    own(hub.web("far_train.txt"), tmp_path / "mine")
    assert b"".join(texts(tmp_path / "mine")) == TRAIN_TEXT


# Properties


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "é", "漢", " ", "\n", "\r\n", "\n\n", END]), min_size=2, max_size=60),
    valid_share=st.floats(0.01, 0.99),
)
def test_a_cut_keeps_every_byte_and_tears_no_character(tmp_path_factory, words: list[str], valid_share: float) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    data = "".join(words).encode()
    path.write_bytes(data)

    cut = find_cut(path, valid_share, END)

    assert 0 < cut < len(data)
    assert data[:cut].decode() + data[cut:].decode() == "".join(words)


def test_one_long_line_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_bytes("漢".encode() * 100_000)

    cut = find_cut(path, 0.1, END)

    assert cut % 3 == 0
    assert cut == pytest.approx(270_000, abs=3)


def test_a_far_away_separator_does_not_make_a_lopsided_cut(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"short\n" + END.encode() + b"\n" + b"a line of text\n" * 1000)

    cut = find_cut(path, 0.1, END)

    assert cut == pytest.approx(0.9 * path.stat().st_size, abs=20)


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=40), sizes=st.lists(st.integers(1, 5), min_size=1))
def test_the_first_invalid_byte_is_the_one_that_python_names(data: bytes, sizes: list[int]) -> None:
    inspector = Inspector("text")
    inspector.bytes = base = 100  # not at the start, where binary files are refused
    place = 0
    while place < len(data):
        size = sizes[place % len(sizes)]
        inspector.look(data[place : place + size])
        place += size
    inspector.finish()

    try:
        data.decode()
        expected = None
    except UnicodeDecodeError as error:
        expected = base + error.start
    assert inspector.first_invalid == expected


@settings(max_examples=30, deadline=None)
@given(
    data=st.binary(max_size=200),
    size=st.integers(1, 50),
    pack=st.sampled_from([gzip.compress, lzma.compress, bz2.compress]),
)
def test_unpacking_does_not_depend_on_how_the_bytes_arrive(data: bytes, size: int, pack) -> None:
    packed = pack(data)
    chunks = [packed[i : i + size] for i in range(0, len(packed), size)]

    assert b"".join(unpack(chunks, "text")) == data


def test_a_small_packed_file_of_a_large_text_takes_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    chunks = [gzip.compress(b"all work and no play\n" * 2_000_000, compresslevel=1)]  # 42 MB from some 200 kB
    tracemalloc.start()

    assert sum(len(block) for block in unpack(chunks, "text")) == 42_000_000

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000
