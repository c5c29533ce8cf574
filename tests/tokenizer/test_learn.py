import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import regex
from awkward_texts import any_bytes, for_all, texts
from hypothesis import strategies as st

from lfs_cli.errors import ConfigError, DataError
from lfs_cli.tokenizer import PATTERNS, blocks, fast, learn_bpe
from lfs_cli.tokenizer.learn import count_words, learn_pairs, learn_reference
from lfs_cli.tokenizer.split import GPT2

vocabularies = st.dictionaries(
    st.text("ab", min_size=1, max_size=9).map(str.encode) | any_bytes, st.integers(1, 5), max_size=25
)


def silent(phase: str, done: int, total: int) -> None:
    """Report to nobody."""


def merges_of_loops(words: dict[bytes, int], wanted: int) -> list[tuple[bytes, bytes]]:
    words = {word: count for word, count in words.items() if word} or {b"x": 1}
    ends = np.cumsum([0, *map(len, words)])
    letters = np.frombuffer(b"".join(words), np.uint8)
    return fast.make_merges(letters, ends, np.array(list(words.values()), np.int64), wanted, silent)


def test_the_example_of_the_docstring() -> None:
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    assert learn_reference(words, 3) == [(b"s", b"t"), (b"e", b"st"), (b"o", b"w")]


def test_ties_go_to_the_greater_pair_of_bytes() -> None:
    words = {b"A B": 1, b"BAD": 1}
    assert learn_reference({b"ab": 1, b"ba": 1}, 1) == [(b"b", b"a")]
    assert learn_pairs(words, 9) == learn_reference(words, 9)


def test_the_merges_of_a_small_text(golden: Callable[[str, str], None], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("She sells sea shells by the sea shore; the shells she sells are sea shells, I'm sure.<|e|>She" * 2)
    _, merges = learn_bpe(path, 287, ["<|e|>"])
    golden("merges.txt", "".join(f"{left.decode()}|{right.decode()}\n" for left, right in merges))


@for_all(words=vocabularies, wanted=st.integers(0, 40))
def test_kept_counts_make_the_merges_of_the_reference(words: dict[bytes, int], wanted: int) -> None:
    assert learn_pairs(words, wanted) == learn_reference(words, wanted)


@for_all(words=vocabularies, wanted=st.integers(0, 40))
def test_compiled_loops_make_the_merges_of_the_reference(words: dict[bytes, int], wanted: int) -> None:
    assert merges_of_loops(words, wanted) == learn_reference(words, wanted)


def test_both_make_the_same_merges_of_many_words() -> None:
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"eeeetttaaoinshrdlu", np.uint8)
    words = {random.choice(letters, size).tobytes(): int(n) for size, n in random.integers(1, 12, (5000, 2))}
    merges = learn_pairs(words, 600)
    assert len(merges) == 600
    assert merges_of_loops(words, 600) == merges


@for_all(text=texts)
def test_words_are_counted_between_special_tokens(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "counted.txt"
    path.write_bytes(text.encode())
    parts = regex.split(r"<\|endoftext\|>|\n\n", text)
    expected = Counter(word.encode() for part in parts for word in regex.findall(GPT2, part))
    specials = ["<|endoftext|>", "\n\n"]
    assert count_words(path, PATTERNS["gpt2"], specials, silent) == expected
    assert fast.count_words(path, PATTERNS["gpt2"], specials, 1, silent).words() == expected


@for_all(data=any_bytes)
def test_words_of_any_bytes_are_counted(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "counted.bin"
    path.write_bytes(data)
    expected = count_words(path, PATTERNS["gpt2"], [], silent)
    assert fast.count_words(path, PATTERNS["gpt2"], [], 1, silent).words() == expected


def test_a_table_of_words_grows(tmp_path: Path) -> None:
    data = " ".join(map(str, range(80_000))).encode() + b" " + b"x" * 400_000
    path = tmp_path / "many.txt"
    path.write_bytes(data)
    assert fast.count_words(path, PATTERNS["gpt2"], [], 1, silent).words() == count_words(
        path, PATTERNS["gpt2"], [], silent
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 kB of invented words in documents, with line ends, digits and text beyond ASCII."""
    random = np.random.default_rng(0)
    syllables = ["ka", "lo", "mi", "the", "ren", "é", "so", "ing", "un", "ta", "ß", "中"]
    words = ["".join(random.choice(syllables, size)) for size in random.integers(1, 5, 3000)]
    documents = [" ".join(random.choice(words, 200)) + ".\n" for _ in range(75)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("<|endoftext|>\r\n".join(documents), encoding="utf-8", newline="")
    return path


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("workers", "block_bytes"), [(1, 1 << 20), (2, 5000), (5, 99)])
def test_threads_and_blocks_change_no_merge(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, workers: int, block_bytes: int
) -> None:
    plain = learn_pairs(count_words(corpus, PATTERNS[pattern], ["<|endoftext|>"], silent), 200)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    vocab, merges = learn_bpe(corpus, 457, ["<|endoftext|>"], pattern=pattern, workers=workers)
    assert merges == plain
    assert len(vocab) == 457


def test_ids_are_bytes_then_merges_then_special_tokens(corpus: Path) -> None:
    vocab, merges = learn_bpe(corpus, 300, ["<|endoftext|>", "<|pad|>"])
    assert [vocab[id] for id in range(256)] == [bytes([byte]) for byte in range(256)]
    assert [vocab[256 + n] for n in range(42)] == [left + right for left, right in merges]
    assert [vocab[298], vocab[299]] == [b"<|endoftext|>", b"<|pad|>"]


def test_nothing_is_learned_of_special_tokens(corpus: Path) -> None:
    vocab, _ = learn_bpe(corpus, 1000, ["<|endoftext|>"])
    assert [token for token in vocab.values() if b"<|" in token] == [b"<|endoftext|>"]


def test_merges_do_not_cross_a_special_token(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab<|x|>cd" * 50)
    _, merges = learn_bpe(path, 1000, ["<|x|>"])
    assert merges == [(b"c", b"d"), (b"a", b"b"), (b"cd", b"ab")]


def test_a_text_that_runs_out_of_pairs_gives_fewer_tokens(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abc abc")
    vocab, merges = learn_bpe(path, 5000, ["<|endoftext|>"])
    assert (len(vocab), len(merges)) == (256 + 3 + 1, 3)


def test_an_empty_text_gives_bytes_and_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("")
    assert learn_bpe(path, 300, ["<|endoftext|>"])[1] == []


def test_a_vocabulary_without_room_is_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"`vocab_size` \(256\) has no room") as caught:
        learn_bpe(corpus, 256, ["<|endoftext|>"])
    assert caught.value.hint == "set `vocab_size` to at least 257"


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file `.*absent.txt`"):
        learn_bpe(tmp_path / "absent.txt", 300, [])


def test_progress_is_reported(corpus: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    learn_bpe(corpus, 300, ["<|endoftext|>"], on_progress=lambda *report: reports.append(report))
    size = corpus.stat().st_size
    assert ("counting", size, size) in reports
    assert reports[-1] == ("merging", 43, 43)


def test_a_small_text_is_learned_at_once_in_a_fresh_process(corpus: Path) -> None:
    script = (
        "import sys, time; from lfs_cli.tokenizer import learn_bpe; started = time.process_time(); "
        f"vocab, merges = learn_bpe({str(corpus)!r}, 757, ['<|endoftext|>']); "
        "assert len(merges) == 500 and 'numba' not in sys.modules; print(time.process_time() - started)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.5
