import errno
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.corpus import shards
from lfs_cli.corpus.shards import BLOCK_BYTES, HEADER_BYTES, Header, Tokens, settle, write_shards
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
    first, second = write(tmp_path, [1, 2, 515, 4], shard_tokens=3)
    ids, last = bytes([1, 0, 2, 0, 3, 2]), bytes([4, 0])
    after_first, after_last = zlib.crc32(ids), zlib.crc32(ids + last)
    shards = [(first, 3, 0, ids, (0, after_first)), (second, 1, 1, last, (after_first, after_last))]
    for path, count, number, content, entries in shards:
        table = struct.pack("<2I", *entries)
        fields = b"LFSTOKEN" + struct.pack("<HHIQII", 2, 2, after_last, count, number, 2) + bytes.fromhex(OURS)
        fields += struct.pack("<I", zlib.crc32(table))
        header = (fields + struct.pack("<I", zlib.crc32(fields))).ljust(128, b"\0")
        assert path.name == f"train-0000{number}.bin"
        assert path.read_bytes() == header + content + table


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


@pytest.mark.parametrize(("old", "new"), [(8, 8), (4, 11), (11, 4)], ids=["as long", "longer", "shorter"])
def test_a_writer_killed_at_any_step_of_its_end_leaves_one_whole_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: int, new: int
) -> None:
    """Kill it before the first, the second, ... rename or removal, until one write ends unharmed."""
    calls = {name: getattr(Path, name) for name in ("replace", "unlink", "rmdir")}
    outcomes = []
    while not outcomes or outcomes[-1] != "ended":
        folder = tmp_path / str(len(outcomes))
        write(folder, range(old))
        left = [len(outcomes)]

        def killing(real, left=left):
            def step(self: Path, *rest):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(self, *rest)

            return step

        with monkeypatch.context() as patch:
            for name, real in calls.items():
                patch.setattr(Path, name, killing(real))
            try:
                write(folder, range(100, 100 + new))
                outcomes.append("ended")
            except KeyboardInterrupt:
                outcomes.append("killed")

        tokens = Tokens.open(folder, "train")
        tokens.verify()
        ids = tokens[:].tolist()
        assert ids in (list(range(old)), list(range(100, 100 + new)))
        settle(folder, "train")
        assert Tokens.open(folder, "train")[:].tolist() == ids
        assert len(names(folder)) == -(-len(ids) // 4)
        assert not [name for name in names(folder) if name.startswith(".")]
    assert outcomes.count("killed") >= 3


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
    assert caught.value.hint == (
        "move that file away, or set `LFS_DATA` to another folder, then run `lfs tokenize` again"
    )


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


def changed(**fields) -> Callable[[Path], None]:
    """Give a shard other fields in its header, and the right checksum of it."""

    def damage(folder: Path) -> None:
        path = folder / "train-00001.bin"
        header = replace(Header.read(path), **fields)
        path.write_bytes(header.to_bytes() + path.read_bytes()[HEADER_BYTES:])

    return damage


SIZE = HEADER_BYTES + 8 + 8
DAMAGE = {
    "empty": (cut(0), "is cut short: 0 of 128 bytes of header"),
    "half a header": (cut(40), "is cut short: 40 of 128 bytes of header"),
    "header only": (cut(HEADER_BYTES), "is cut short: 128 bytes, 144 expected"),
    "one byte missing": (cut(SIZE - 1), "is cut short: 143 bytes, 144 expected"),
    "one byte too many": (patched(SIZE, b"x"), "is longer than its header says: 145 bytes, 144 expected"),
    "another count": (patched(16, b"\x03"), "is damaged: its header does not fit its checksum"),
    "a byte after the header's end": (patched(127, b"x"), "is damaged: its header does not fit its checksum"),
    "a damaged table": (patched(SIZE - 1, b"x"), "is damaged: its table does not fit its checksum"),
    "a text": (patched(0, b"Once upon a time"), "is not a token shard"),
    "a short text": (lambda folder: (folder / "train-00001.bin").write_text("Once"), "is not a token shard"),
    "an earlier version": (patched(8, b"\x01"), "has version 1 of the format, not 2"),
    "a later version": (patched(8, b"\x03"), "has version 3 of the format, not 2"),
    "an unknown type": (changed(dtype=np.dtype("u1")), "has ids of the unknown type 1"),
    "another checksum": (changed(checksum=7), "come from two different writes"),
    "another tokenizer": (changed(tokenizer_hash=OTHERS), "by the tokenizer cdcdcdcdcdcd, and `"),
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


def test_a_shard_that_is_cut_short_while_it_is_read_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    write(tmp_path, range(11))
    tokens = Tokens.open(tmp_path, "train")
    assert tokens[4:6].tolist() == [4, 5]
    cut(SIZE - 1)(tmp_path)
    for span in (slice(4, 6), slice(0, 11)):
        with pytest.raises(DataError, match=r"train-00001\.bin` was changed while it was read"):
            tokens[span]
    assert tokens[0:4].tolist() == [0, 1, 2, 3]


def test_a_shard_beyond_the_last_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, range(8))[1]
    header = replace(Header.read(path), number=2)
    (tmp_path / "train-00002.bin").write_bytes(header.to_bytes() + path.read_bytes()[HEADER_BYTES:])
    with pytest.raises(DataError, match=r"train-00002\.bin` is beyond the 2 shards"):
        Tokens.open(tmp_path, "train")


def test_a_claim_of_billions_of_shards_costs_no_time(tmp_path: Path) -> None:
    (path,) = write(tmp_path, range(4))
    header = replace(Header.read(path), shards=2**32 - 1)
    path.write_bytes(header.to_bytes() + path.read_bytes()[HEADER_BYTES:])
    with pytest.raises(DataError, match=r"shards are missing: .*train-00003\.bin` and 4,294,967,291 more"):
        Tokens.open(tmp_path, "train")


@pytest.mark.parametrize("place", [3, 40], ids=["no shard at all", "a damaged header"])
def test_a_complete_write_that_was_damaged_before_it_was_moved_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    write(tmp_path, range(11))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_publish", lambda folder, split: None)
        write(tmp_path, range(50, 60))
    flipped(tmp_path / ".train.complete", "train-00001.bin", place)
    settle(tmp_path, "train")
    assert Tokens.open(tmp_path, "train")[:].tolist() == list(range(11))


def test_shards_that_do_not_follow_each_other_are_refused(tmp_path: Path) -> None:
    """Every file is whole by its own checksums, but one has been written on its own."""
    path = write(tmp_path, range(8))[1]
    table = struct.pack("<2I", 0, zlib.crc32(np.arange(4, 8, dtype="<u2").tobytes()))
    header = replace(Header.read(path), table_checksum=zlib.crc32(table))
    path.write_bytes(header.to_bytes() + path.read_bytes()[HEADER_BYTES:-8] + table)
    with pytest.raises(DataError, match=r"train-00001\.bin` does not continue the shard before it"):
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
    assert header.to_bytes() == path.read_bytes()[:HEADER_BYTES]
    assert (header.count, header.number, header.shards) == (3, 0, 1)


BLOCK = BLOCK_BYTES // 2  # ids


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Two shards, of three and a half blocks each."""
    folder = tmp_path_factory.mktemp("large")
    ids = np.random.default_rng(0).integers(0, 1000, 7 * BLOCK)
    write(folder, ids, shard_tokens=len(ids) // 2)
    return folder, ids


def flipped(folder: Path, name: str, offset: int) -> None:
    raw = bytearray((folder / name).read_bytes())
    raw[offset] ^= 0x10
    (folder / name).write_bytes(raw)


def test_a_damaged_block_is_found_when_it_is_read_and_not_before(large, tmp_path: Path) -> None:
    folder, ids = Path(shutil.copytree(large[0], tmp_path / "copy")), large[1]
    flipped(folder, "train-00001.bin", HEADER_BYTES + 2 * BLOCK_BYTES + 5)
    tokens = Tokens.open(folder, "train")
    start = len(ids) // 2 + 2 * BLOCK
    assert tokens[:start].tolist() == ids[:start].tolist()
    assert tokens[start + BLOCK :].tolist() == ids[start + BLOCK :].tolist()
    for span in (slice(start, start + 1), slice(start + BLOCK - 1, start + BLOCK), slice(0, None)):
        with pytest.raises(DataError) as caught:
            tokens[span]
        assert str(caught.value) == (
            f"`{folder}/train-00001.bin` is damaged: block 2, bytes {HEADER_BYTES + 2 * BLOCK_BYTES:,} to "
            f"{HEADER_BYTES + 3 * BLOCK_BYTES - 1:,}, does not fit its checksum"
        )
        assert caught.value.hint == "run `lfs tokenize` again"
    with pytest.raises(DataError, match="block 2"):
        tokens.verify()


def test_a_block_is_read_once(large, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, read = Tokens.open(large[0], "train"), []
    monkeypatch.setattr(
        zlib, "crc32", lambda data, start=0, real=zlib.crc32: read.append(len(data)) or real(data, start)
    )
    assert len(tokens[5:6]) == len(tokens[BLOCK - 1 : BLOCK]) == 1
    assert read == [BLOCK_BYTES]
    assert tokens[9:9].tolist() == []
    assert len(tokens[BLOCK - 1 : BLOCK + 1]) == 2
    assert read == [BLOCK_BYTES] * 2
    tokens.verify()
    tokens.verify()
    assert read == [BLOCK_BYTES] * 3 + [BLOCK_BYTES // 2] + [BLOCK_BYTES] * 3 + [BLOCK_BYTES // 2]


def test_verifying_tells_how_far_it_is(large, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(shards, "_VERIFIED_AT_ONCE", 3 * BLOCK)
    Tokens.open(large[0], "train").verify(told.append)
    assert told == [3 * BLOCK, 6 * BLOCK, 7 * BLOCK]


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), number=st.integers(0, 1))
def test_any_flipped_bit_is_found(large, place: float, bit: int, number: int) -> None:
    """One bit of a shard is turned in place, and turned back after."""
    path = large[0] / f"train-0000{number}.bin"
    offset = int(place * path.stat().st_size)
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        try:
            file.seek(offset)
            file.write(bytes([byte ^ 1 << bit]))
            with pytest.raises(DataError, match=path.name):
                Tokens.open(large[0], "train").verify()
        finally:
            file.seek(offset)
            file.write(bytes([byte]))
    Tokens.open(large[0], "train").verify()


def test_a_reader_that_meets_a_writer_at_its_end_reads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is between making its write count and moving it when the reader lists the shards, and done after."""
    write(tmp_path, range(11))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_publish", lambda folder, split: None)
        write(tmp_path, range(50, 60))
    real = Header.read.__func__
    opened = []

    def read(cls, path: Path) -> Header:
        opened.append(path)
        if len(opened) == 3:
            settle(tmp_path, "train")
        return real(cls, path)

    monkeypatch.setattr(Header, "read", classmethod(read))
    assert Tokens.open(tmp_path, "train")[:].tolist() == list(range(50, 60))
