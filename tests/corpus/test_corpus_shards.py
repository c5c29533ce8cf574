import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.corpus.shards import HEADER, Header, Tokens, write_shards
from lfs_cli.errors import DataError

OURS = "ab" * 32
OTHERS = "cd" * 32


def write(folder: Path, ids, split: str = "train", **options) -> list[Path]:
    options = {"vocab_size": 1000, "tokenizer_hash": OURS, "shard_tokens": 4} | options
    return write_shards(folder, split, [np.asarray(ids)], **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=6),
    shard_tokens=st.integers(1, 40),
    vocab_size=st.sampled_from([300, 65_536, 65_537, 2**32]),
    data=st.data(),
)
def test_reading_returns_what_was_written(tmp_path_factory, lengths, shard_tokens, vocab_size, data) -> None:
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(sum(lengths))
    arrays = [random.integers(0, vocab_size, length) for length in lengths]
    expected = np.concatenate([*arrays, np.empty(0, np.int64)])

    paths = write_shards(folder, "train", arrays, vocab_size=vocab_size, tokenizer_hash=OURS, shard_tokens=shard_tokens)
    tokens = Tokens.open(folder, "train", tokenizer_hash=OURS)

    assert len(paths) == max(1, -(-len(expected) // shard_tokens))
    assert tokens.dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)
    assert tokens.tokenizer_hash == OURS
    assert len(tokens) == len(expected)
    ends = st.none() | st.integers(-len(expected) - 3, len(expected) + 3)
    for _ in range(5):
        span = slice(data.draw(ends), data.draw(ends))
        assert tokens[span].tolist() == expected[span].tolist()
        assert tokens[span].dtype == tokens.dtype


def test_the_bytes_of_a_shard_are_the_documented_ones(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [1, 2, 515])
    ids = bytes([1, 0, 2, 0, 3, 2])
    assert path.name == "train-00000.bin"
    assert path.read_bytes() == (
        b"LFSTOKEN\x01\x00\x02\x00" + struct.pack("<I", zlib.crc32(ids)) + b"\x03" + bytes(11) + b"\x01\0\0\0"
        + bytes.fromhex(OURS) + ids
    )  # fmt: skip


def test_splits_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    write(tmp_path, range(5), "train")
    write(tmp_path, range(9), "train-large")
    write(tmp_path, [7], "valid")
    assert [len(Tokens.open(tmp_path, split)) for split in ("train", "train-large", "valid")] == [5, 9, 1]


def test_a_slice_within_one_shard_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    write(tmp_path, range(8))
    tokens = Tokens.open(tmp_path, "train")
    assert not tokens[1:3].flags.owndata
    assert tokens[3:5].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tokens[1:3][0] = 1


def test_tokens_of_an_array_share_its_memory() -> None:
    array = np.arange(10, dtype=np.uint16)
    tokens = Tokens.of(array)
    assert np.shares_memory(tokens[2:5], array)
    assert Tokens.of(tokens) is tokens
    assert (len(tokens), tokens.tokenizer_hash, tokens.checksum) == (10, "", None)


def test_a_step_in_a_slice_is_refused() -> None:
    with pytest.raises(ValueError, match="without a step"):
        Tokens.of(np.arange(4))[::2]


@pytest.mark.parametrize("ids", [[1000], [-1], [3, 70_000]])
def test_ids_beyond_the_vocabulary_are_refused_and_leave_nothing(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.999"):
        write(tmp_path, ids)
    assert names(tmp_path) == []


def test_a_tokenizer_hash_has_64_digits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        write(tmp_path, [1], tokenizer_hash="ab")


def test_a_shorter_write_removes_what_a_longer_one_left(tmp_path: Path) -> None:
    write(tmp_path, range(12))
    write(tmp_path, range(100, 105))
    assert names(tmp_path) == ["train-00000.bin", "train-00001.bin"]
    assert Tokens.open(tmp_path, "train")[:].tolist() == [100, 101, 102, 103, 104]


def test_the_checksum_names_the_ids_however_they_are_cut(tmp_path: Path) -> None:
    checksums = []
    for shard_tokens, ids in [(4, range(9)), (100, range(9)), (4, range(1, 10))]:
        write(tmp_path, ids, shard_tokens=shard_tokens)
        checksums.append(Tokens.open(tmp_path, "train").checksum)
    assert checksums[0] == checksums[1] != checksums[2]


def test_an_interrupted_write_changes_nothing(tmp_path: Path) -> None:
    def arrays():
        yield np.arange(10)
        raise KeyboardInterrupt

    write(tmp_path, range(3))
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "train", arrays(), vocab_size=1000, tokenizer_hash=OURS, shard_tokens=4)
    assert names(tmp_path) == ["train-00000.bin"]
    assert Tokens.open(tmp_path, "train")[:].tolist() == [0, 1, 2]


def test_a_killed_write_is_invisible_and_cleared_by_the_next(tmp_path: Path) -> None:
    script = f"""
import os, signal, pathlib, numpy
from lfs_cli.corpus.shards import write_shards
def killed():
    yield numpy.arange(10)
    os.kill(os.getpid(), signal.SIGKILL)
write_shards(pathlib.Path({str(tmp_path)!r}), "train", killed(), vocab_size=1000, tokenizer_hash="{OURS}")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".train.draft"]
    with pytest.raises(DataError, match="no tokens for `train`"):
        Tokens.open(tmp_path, "train")

    write(tmp_path, range(3))
    assert names(tmp_path) == ["train-00000.bin"]


def test_a_writer_killed_between_two_renames_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(8))
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if self.name == "train-00001.bin":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, range(1, 9))
    with pytest.raises(DataError, match="two different writes") as caught:
        Tokens.open(tmp_path, "train")
    assert caught.value.hint == "run `lfs tokenize` again"


def test_a_full_disk_is_explained_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path, range(3))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        write(tmp_path, range(50))
    assert caught.value.hint.startswith("free some space")
    assert names(tmp_path) == ["train-00000.bin"]


def test_a_write_that_the_system_cuts_short_is_explained(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match="File too large"):
            write(tmp_path, np.zeros(100_000, np.int64), shard_tokens=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Not a directory") as caught:
        write(tmp_path / "file" / "tokens", [1])
    assert caught.value.hint == "check the folder, then run `lfs tokenize` again"


def patched(offset: int, new: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "train-00001.bin"
        raw = path.read_bytes()
        path.write_bytes(raw[:offset] + new + raw[offset + len(new) :])

    return damage


def cut(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / "train-00001.bin", size)


def copied(source: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / target).write_bytes((folder / source).read_bytes()) and None


def removed(*shards: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / shard).unlink() for shard in shards] and None


SIZE = HEADER.size + 8
DAMAGE = {
    "empty": (cut(0), "is cut short: 0 of 64 bytes of header"),
    "half a header": (cut(40), "is cut short: 40 of 64 bytes of header"),
    "header only": (cut(HEADER.size), "is cut short: 64 bytes, 72 expected"),
    "one byte missing": (cut(SIZE - 1), "is cut short: 71 bytes, 72 expected"),
    "one byte too many": (patched(SIZE, b"x"), "is longer than its header says: 73 bytes, 72 expected"),
    "another count": (patched(16, b"\x03"), "is longer than its header says: 72 bytes, 70 expected"),
    "a text": (patched(0, b"Once upon a time"), "is not a token shard"),
    "a short text": (lambda folder: (folder / "train-00001.bin").write_text("Once"), "is not a token shard"),
    "a later version": (patched(8, b"\x02"), "has version 2 of the format, not 1"),
    "an unknown type": (patched(10, b"\x08"), "has ids of the unknown type 8"),
    "another checksum": (patched(12, b"...."), "come from two different writes"),
    "another tokenizer": (patched(32, bytes.fromhex(OTHERS)), "by the tokenizer cdcdcdcdcdcd, and `"),
    "renamed": (copied("train-00000.bin", "train-00001.bin"), "is shard 0 by its header"),
    "first missing": (removed("train-00000.bin"), "shards are missing: `"),
    "middle missing": (removed("train-00001.bin"), "shards are missing: `"),
    "last missing": (removed("train-00002.bin"), "shards are missing: `"),
    "two missing": (removed("train-00000.bin", "train-00001.bin"), "/train-00000.bin`, `"),
    "a folder": (lambda folder: (folder / "train-00003.bin").mkdir(), "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_file_and_a_way_out(tmp_path: Path, damage: str) -> None:
    write(tmp_path, range(11))
    inflict, message = DAMAGE[damage]
    inflict(tmp_path)
    with pytest.raises(DataError) as caught:
        Tokens.open(tmp_path, "train")
    assert message in str(caught.value)
    assert f"{tmp_path}/train-0000" in str(caught.value)
    assert caught.value.hint


def test_a_shard_beyond_the_last_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(8))
    raw = (tmp_path / "train-00001.bin").read_bytes()
    (tmp_path / "train-00002.bin").write_bytes(raw[:24] + b"\x02" + raw[25:])
    with pytest.raises(DataError, match=r"train-00002\.bin` is beyond the 2 shards"):
        Tokens.open(tmp_path, "train")


def test_another_tokenizer_than_expected_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    with pytest.raises(DataError, match="made by the tokenizer abababababab, not by cdcdcdcdcdcd"):
        Tokens.open(tmp_path, "train", tokenizer_hash=OTHERS)


@pytest.mark.parametrize("folder", ["", "absent"])
def test_missing_tokens_say_how_to_make_them(tmp_path: Path, folder: str) -> None:
    with pytest.raises(DataError, match="no tokens for `train` in `") as caught:
        Tokens.open(tmp_path / folder, "train")
    assert caught.value.hint == "run `lfs tokenize`"


def test_a_header_reads_back_as_itself(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [1, 2, 3])
    header = Header.read(path)
    assert header.to_bytes() == path.read_bytes()[: HEADER.size]
    assert (header.count, header.number, header.shards) == (3, 0, 1)
