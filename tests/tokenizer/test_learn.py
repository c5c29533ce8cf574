import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import regex
from awkward_texts import any_bytes, for_all, texts
from hypothesis import strategies as st

from lfs_cli.errors import ConfigError, DataError
from lfs_cli.tokenizer import PATTERNS, LearnStats, blocks, learn, learn_bpe, learner
from lfs_cli.tokenizer.blocks import Specials
from lfs_cli.tokenizer.formats import write_token
from lfs_cli.tokenizer.learn import Source, count_words, huggingface_order, learn_pairs, learn_reference
from lfs_cli.tokenizer.split import GPT2

vocabularies = st.dictionaries(
    st.text("ab", min_size=1, max_size=9).map(str.encode) | any_bytes, st.integers(1, 5), max_size=25
)


def silent(phase: str, done: int, total: int) -> None:
    """Report to nobody."""


def counted(path: Path, name: str = "gpt2", specials: Sequence[str] = ()) -> Counter[bytes]:
    return count_words(Source([path], PATTERNS[name], Specials(specials), None), None, silent)[0]


def counted_by_loops(path: Path, name: str = "gpt2", specials: Sequence[str] = ()) -> dict[bytes, int]:
    epochs = Source([path], PATTERNS[name], Specials(specials), None).epochs(None)
    table, _ = learner.count_words(epochs, f"scan_{name}", 1, None, [], lambda done: None)
    letters, ends, counts = (array.tolist() for array in table.words())
    return {bytes(letters[start:end]): n for start, end, n in zip([0, *ends], ends, counts, strict=False)}


def merges_of_loops(words: dict[bytes, int], wanted: int, order: list[int] | None = None) -> list[tuple[bytes, bytes]]:
    words = {word: count for word, count in words.items() if word} or {b"x": 1}
    ends = np.cumsum([*map(len, words)], dtype=np.int64)
    letters = np.frombuffer(b"".join(words), np.uint8)
    return learner.make_merges(letters, ends, np.array(list(words.values()), np.int64), wanted, order, silent)


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


@for_all(words=vocabularies, wanted=st.integers(0, 40))
def test_ties_by_ids_are_the_same_for_both(words: dict[bytes, int], wanted: int) -> None:
    assert merges_of_loops(words, wanted, huggingface_order()) == learn_pairs(words, wanted, ties="ids")


@pytest.mark.usefixtures("compiled")
def test_merges_with_ties_by_ids_are_those_of_tokenizers(corpus: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1256, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(corpus.read_text(encoding="utf-8").split("<|endoftext|>"), trainer)
    theirs = [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    _, merges = learn_bpe(corpus, 1257, ["<|endoftext|>"], ties="ids")
    assert [(write_token(left), write_token(right)) for left, right in merges] == theirs


@pytest.mark.parametrize("text", [b"a" * 300_000, b"ab" * 150_000, bytes(range(97, 123)) * 12_000], ids=len)
def test_one_long_word_is_learned_in_near_linear_time(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "word.txt"
    path.write_bytes(text)
    started = time.process_time()
    merges = merges_of_loops(counted_by_loops(path), 40)
    assert time.process_time() - started < 2
    assert merges[:9] == learn_reference({text[:2600]: 1}, 9)


def test_all_rows_of_the_tables_of_merges_grow() -> None:
    random = np.random.default_rng(0)
    words = {random.integers(0, 256, 200).astype(np.uint8).tobytes(): 1 for _ in range(300)}
    assert merges_of_loops(words, 300) == learn_pairs(words, 300)


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
    assert counted(path, "gpt2", specials) == expected
    assert counted_by_loops(path, "gpt2", specials) == expected


@pytest.mark.parametrize("name", PATTERNS)
@for_all(data=any_bytes)
def test_words_of_any_bytes_are_counted(tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "counted.bin"
    path.write_bytes(data)
    assert counted_by_loops(path, name) == counted(path, name)


def test_a_table_of_words_grows(tmp_path: Path) -> None:
    numbers = map(str, range(80_000))
    longer = ("w" * (i % 60) + "x" * (i // 60) + "yz" for i in range(3_000))  # of all three tables
    path = tmp_path / "many.txt"
    path.write_bytes(" ".join([*numbers, *longer, "x" * 400_000, *map(str, range(9_000))]).encode())
    assert counted_by_loops(path) == counted(path)


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
    plain = learn_pairs(counted(corpus, pattern, ["<|endoftext|>"]), 200)
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


@pytest.mark.usefixtures("compiled")
def test_statistics_tell_what_was_counted(corpus: Path) -> None:
    found: list[LearnStats] = []
    learn_bpe(corpus, 300, ["<|endoftext|>"], on_stats=found.append)
    words = counted(corpus, "gpt2", ["<|endoftext|>"])
    (stats,) = found
    assert (stats.bytes, stats.words, stats.distinct_words) == (corpus.stat().st_size, words.total(), len(words))
    assert (stats.dropped_words, stats.dropped_share) == (0, 0.0)
    assert stats.count_seconds > 0 < stats.merge_seconds


def test_the_rarest_words_are_dropped_with_a_warning(corpus: Path) -> None:
    words = counted(corpus, "gpt2", ["<|endoftext|>"])
    least = sorted(words.values())[-501]
    kept = {word: count for word, count in words.items() if count > least}
    with pytest.warns(UserWarning, match=rf"{len(words) - len(kept):,} rare words, .*% of the text, did not fit"):
        _, merges = learn_bpe(corpus, 400, ["<|endoftext|>"], max_words=500)
    assert merges == learn_pairs(kept, 143)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_drop_the_same_words(corpus: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(learn, "EPOCH_BYTES", 20_000)
    found: list[LearnStats] = []
    with warnings.catch_warnings():
        _, merges = learn_bpe(corpus, 400, ["<|e|>"], max_words=200, workers=workers, on_stats=found.append)
    monkeypatch.setattr(learn, "COMPILED_BYTES", 1 << 30)
    _, plain = learn_bpe(corpus, 400, ["<|e|>"], max_words=200, on_stats=found.append)
    assert merges == plain
    assert found[0].dropped_words == found[1].dropped_words > 1000
    assert 0 < found[0].dropped_share == found[1].dropped_share < 1


@pytest.mark.usefixtures("compiled")
def test_several_files_are_learned_as_texts_of_their_own(tmp_path: Path) -> None:
    for number, text in enumerate(("ab ab a", "b cd cd")):  # `ab` at the border of the two would be a pair
        (tmp_path / f"{number}.txt").write_text(text)
    _, merges = learn_bpe([tmp_path / "0.txt", tmp_path / "1.txt"], 300, [])
    assert merges == learn_reference({b"ab": 1, b" ab": 1, b" a": 1, b"b": 1, b" cd": 2}, 44)


@pytest.mark.usefixtures("compiled")
def test_a_sample_is_taken_evenly_and_has_whole_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SAMPLE_BYTES", 10_000)
    sizes = (300_000, 100_000)
    for number, size in enumerate(sizes):
        words = (f"{'xy'[number]}{i:06}<|e|>" if i % 50 == 0 else f"{'xy'[number]}{i:06}" for i in range(size // 8))
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    paths, specials = [tmp_path / "0.txt", tmp_path / "1.txt"], Specials(["<|e|>"])
    source = Source(paths, PATTERNS["cl100k"], specials, 40_000)
    sample = [bytes(block.data[: block.size]) for block in source.blocks()]
    taken = [sum(len(part) for part in sample if letter in part) for letter in (b"x", b"y")]
    assert taken[0] == pytest.approx(30_000, rel=0.15)
    assert taken[1] == pytest.approx(10_000, rel=0.15)
    words = count_words(source, None, silent)[0]
    assert {len(word) for word in words if word.strip(b" xy")} == {3}  # `x` and groups of three digits
    assert max(words, key=lambda word: word.count(b"x")).count(b"x") == 1
    found: list[LearnStats] = []
    learn_bpe(paths, 300, ["<|e|>"], pattern="cl100k", sample_bytes=40_000, on_stats=found.append)
    assert found[0].words == words.total()
