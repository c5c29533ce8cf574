from pathlib import Path

import pytest
from awkward_texts import for_all, texts
from hypothesis import strategies as st

from lfs_cli.errors import DataError
from lfs_cli.tokenizer import PATTERNS
from lfs_cli.tokenizer.blocks import Specials, blocks_of, read_blocks, replace_file, to_utf8, utf8_pieces

SPECIALS = ["<|endoftext|>", "<|endoftext|><|endoftext|>", "a b", "\n"]


def words(data: bytes, name: str, specials: Specials) -> list[bytes]:
    """Split at special tokens, then into words."""
    found: list[bytes] = []
    for start, end, special in specials.split(data):
        parts = [data[start:end]] if special else [w.encode() for w in PATTERNS[name].split(data[start:end].decode())]
        found += parts
    return found


@pytest.mark.parametrize("name", PATTERNS)
@for_all(text=texts, size=st.integers(1, 9), least=st.integers(0, 30), special_tokens=st.sampled_from([[], SPECIALS]))
def test_blocks_have_the_words_of_the_whole(
    name: str, text: str, size: int, least: int, special_tokens: list[str]
) -> None:
    data, specials = text.encode(), Specials(special_tokens)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    blocks = list(blocks_of(pieces, PATTERNS[name], specials, least))
    assert b"".join(blocks) == data
    assert [word for block in blocks for word in words(block, name, specials)] == words(data, name, specials)


def test_a_long_text_is_cut_into_many_blocks() -> None:
    data = b"one two three four. " * 5000
    blocks = list(
        blocks_of([data[i : i + 100] for i in range(0, len(data), 100)], PATTERNS["gpt2"], Specials([]), 1000)
    )
    assert max(map(len, blocks)) < 1200


def test_a_text_without_a_cut_is_one_block_in_linear_time() -> None:
    pieces = [b"x"] * 300_000
    assert list(map(len, blocks_of(pieces, PATTERNS["gpt2"], Specials(["<|e|>"]), 0))) == [300_000]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_no_block_ends_inside_a_special_token(size: int) -> None:
    data, specials = b"za b1a bc a b" * 9, Specials(["a b"])
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    blocks = list(blocks_of(pieces, PATTERNS["gpt2"], specials, 0))
    assert len(blocks) > 9
    assert [word for block in blocks for word in words(block, "gpt2", specials)] == words(data, "gpt2", specials)


def test_overlapping_specials_take_the_leftmost_then_the_longest() -> None:
    specials = Specials(["ab", "abab", "bababa"])
    assert [part for *_, part in specials.split(b"ababab")] == [b"abab", b"ab"]


def test_lone_surrogates_become_the_replacement_character() -> None:
    assert to_utf8("a\ud800b").decode() == "a\ufffdb"
    assert to_utf8("\ud83d\ude00").decode() == "😀"
    assert b"".join(utf8_pieces(["x\ud83d", "\ude00y", "\ud83d"])).decode() == "x😀y\ufffd"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file `.*absent\.txt`"):
        list(read_blocks(tmp_path / "absent.txt", PATTERNS["gpt2"], Specials([])))
    with pytest.raises(DataError, match="is a folder"):
        list(read_blocks(tmp_path, PATTERNS["gpt2"], Specials([])))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    replace_file(path, "first")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "second \ud800")
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="cannot write in"):
        replace_file(tmp_path / "taken" / "file.txt", "text")
