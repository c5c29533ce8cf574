import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import regex
from awkward_texts import any_bytes, for_all, texts
from hypothesis import strategies as st

from lfs_cli.errors import DataError
from lfs_cli.tokenizer import Tokenizer, blocks, bpe, learn_bpe
from lfs_cli.tokenizer.bpe import merge_ids, merge_word
from lfs_cli.tokenizer.learn import learn_reference
from lfs_cli.tokenizer.split import GPT2

BYTES = {id: bytes([id]) for id in range(256)}
CORPUS = (
    "It's a small world, isn't it? We'll see the sea, they've said; I'd say so.\n\n"
    "café naïve Straße 中文字符 中文 日本語 😀😀 1234 12 1999\n  indented\tcode = 'x'\r\n"
    "aaaaaaaa bababab the then there theatre other mother <|endoftext|> once upon a time"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(CORPUS * 2, encoding="utf-8", newline="")
    return Tokenizer(*learn_bpe(path, 400, ["<|endoftext|>"]), ["<|endoftext|>"])


def encode_by_definition(tokenizer: Tokenizer, text: str) -> list[int]:
    """Special tokens, then the words of the expression, then `merge_word`."""
    ids = {token: id for id, token in reversed(tokenizer.vocab.items())}
    specials = sorted(tokenizer.special_tokens, key=len, reverse=True)
    found: list[int] = []
    for part in regex.split("(" + "|".join(map(regex.escape, specials)) + ")", text) if specials else [text]:
        if part in tokenizer.special_ids:
            found.append(tokenizer.special_ids[part])
        else:
            found += [
                ids[token]
                for word in regex.findall(GPT2, part)
                for token in merge_word(word.encode(), tokenizer.merges)
            ]
    return found


def in_plain_python(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [id for ids in tokenizer._encode_words(data) for id in ids]


def test_the_example_of_the_docstring() -> None:
    assert merge_word(b"hello", [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll")]) == [b"hell", b"o"]


@for_all(text=texts)
def test_encoding_is_the_definition(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == encode_by_definition(tokenizer, text)


@for_all(text=texts)
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@for_all(data=any_bytes)
def test_a_file_of_any_bytes_decodes_to_itself(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(data)
    ids = np.concatenate([*tokenizer.encode_file(path), np.zeros(0, np.uint16)])
    assert tokenizer.decode_bytes(ids) == data


@for_all(text=texts, sizes=st.lists(st.integers(0, 7), min_size=1, max_size=20))
def test_a_stream_has_the_ids_of_the_joined_text(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    pieces.append(text[start:])
    assert list(tokenizer.encode_iterable(pieces)) == tokenizer.encode(text)


@for_all(text=texts)
def test_streamed_decoding_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    shown = [stream.feed(id) for id in tokenizer.encode(text)]
    assert "".join(shown) + stream.flush() == text


def test_an_unfinished_character_is_shown_as_such(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.feed(0xE2), stream.feed(0x82), stream.flush()] == ["", "", "�"]


def of_letters(length: int, seed: int) -> bytes:
    return np.random.default_rng(seed).choice(np.frombuffer(b"abc", np.uint8), length).tobytes()


@pytest.fixture(scope="module")
def crowded() -> Tokenizer:
    """A tokenizer with so many merges of so few letters that they compete for each of them."""
    merges = learn_reference({of_letters(12, seed): 1 for seed in range(100)}, 80)
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    return Tokenizer(dict(enumerate(tokens)), merges)


@for_all(length=st.integers(65, 150), seed=st.integers(0, 2**32 - 1))
def test_long_words_are_merged_as_short_ones_are(crowded: Tokenizer, length: int, seed: int) -> None:
    letters = of_letters(length, seed)
    ids = {token: id for id, token in crowded.vocab.items()}
    expected = [ids[token] for token in merge_word(letters, crowded.merges)]
    assert merge_ids(list(letters), crowded._ranks) == expected


def test_special_tokens_are_one_id_and_text_when_not_asked_for(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_ids["<|endoftext|>"]
    assert tokenizer.encode("a<|endoftext|>b") == [97, end, 98]
    plain = Tokenizer(BYTES, [])
    assert plain.encode("<|endoftext|>") == list(b"<|endoftext|>")


def test_overlapping_special_tokens_take_the_longest() -> None:
    tokenizer = Tokenizer(BYTES, [], ["<|e|>", "<|e|><|e|>"])
    assert tokenizer.special_ids == {"<|e|>": 256, "<|e|><|e|>": 257}
    assert tokenizer.encode("x<|e|><|e|><|e|>") == [ord("x"), 257, 256]


def test_new_special_tokens_get_the_next_free_ids() -> None:
    tokenizer = Tokenizer({**BYTES, 300: b"<|a|>"}, [], ["<|b|>", "<|a|>"])
    assert tokenizer.special_ids == {"<|b|>": 301, "<|a|>": 300}
    assert tokenizer.vocab_size == 302


def test_white_space_before_a_special_token_ends_a_text() -> None:
    tokenizer = Tokenizer({**BYTES, 256: b"  "}, [(b" ", b" ")], ["<|e|>"])
    assert tokenizer.encode("a  <|e|>") == [97, 256, 257]
    assert tokenizer.encode("a  b") == [97, 32, 32, 98]


def test_lone_surrogates_are_read_as_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\udc80b") == tokenizer.encode("a\ufffdb")


@pytest.mark.parametrize(
    "text", ["", "a\r\nb", "\ufeffa", "a\0b", "\0"], ids=["empty", "crlf", "bom", "nul", "only nul"]
)
def test_nothing_is_changed_on_the_way(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_ids_may_be_of_numpy(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(np.array(tokenizer.encode("the sea"), np.uint16)) == "the sea"


def test_an_unknown_id_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no token has the id `999999`"):
        tokenizer.decode([97, 999_999])


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({}, [], "the vocabulary is empty"),
        ({97: b"a"}, [(b"a", b"b")], "merge 1 needs the token b'b'"),
        (BYTES, [(b"a", b"b")], "merge 1 needs the token b'ab'"),
        ({**BYTES, -1: b"ab"}, [], "the id `-1`"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(vocab: dict, merges: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Tokenizer(vocab, merges)


def test_an_empty_special_token_is_refused() -> None:
    with pytest.raises(DataError, match="a special token is empty"):
        Tokenizer(BYTES, [], [""])


def test_the_hash_tells_tokenizers_apart(tokenizer: Tokenizer) -> None:
    same = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    others = [
        Tokenizer(tokenizer.vocab, tokenizer.merges),
        Tokenizer(tokenizer.vocab, tokenizer.merges[:-1], tokenizer.special_tokens),
        Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, pattern="cl100k"),
    ]
    assert same.hash == tokenizer.hash
    assert len({tokenizer.hash, *(other.hash for other in others)}) == 4


def test_a_stream_gives_ids_before_it_ends(tokenizer: Tokenizer) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "the sea\n"

    assert list(islice(tokenizer.encode_iterable(endless()), 5)) == tokenizer.encode("the sea\n" * 9)[:5]


def test_a_stream_takes_no_more_memory_for_more_text(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    lines = [" ".join(map(str, random.integers(0, 10**6, 12))) + "\n" for _ in range(2_000)]  # as many words as can be
    list(tokenizer.encode_iterable(lines[:20]))
    tracemalloc.start()
    count = sum(1 for _ in tokenizer.encode_iterable(iter(lines * 2)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 10_000
    assert peak < 1_000_000


def test_a_long_word_costs_near_linear_time(tokenizer: Tokenizer) -> None:
    started = time.process_time()
    assert tokenizer.decode(tokenizer.encode("ab" * 50_000)) == "ab" * 50_000
    assert time.process_time() - started < 5


def test_short_texts_need_neither_numba_nor_torch() -> None:
    script = (
        "import sys; from lfs_cli.tokenizer import Tokenizer; "
        "Tokenizer({i: bytes([i]) for i in range(256)}, []).encode('hello'); "
        "print(sorted({'numba', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_file_reports_its_progress(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(CORPUS, encoding="utf-8", newline="")
    reports: list[tuple[int, int]] = []
    arrays = list(tokenizer.encode_file(path, on_progress=lambda done, total: reports.append((done, total))))
    assert np.concatenate(arrays).tolist() == tokenizer.encode(CORPUS)
    assert arrays[0].dtype == np.uint16
    assert reports[-1] == (len(CORPUS.encode()), len(CORPUS.encode()))


@pytest.mark.usefixtures("compiled")
class TestCompiled:
    """The same ids from the compiled loops."""

    @for_all(text=texts)
    def test_texts(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.encode(text) == in_plain_python(tokenizer, bpe.to_utf8(text))

    @for_all(words=st.lists(st.text("ab", min_size=1, max_size=16), max_size=60))
    def test_words_that_share_a_slot(self, crowded: Tokenizer, words: list[str]) -> None:
        fresh = Tokenizer(crowded.vocab, crowded.merges)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lfs_cli.tokenizer.fast.CACHE_SLOTS", 1)
            text = "".join(f" wonderful{word} wonderful{word[:1]}" for word in words)
            assert fresh.encode(text) == in_plain_python(crowded, text.encode())

    @for_all(data=any_bytes)
    def test_any_bytes(self, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "any.bin"
        path.write_bytes(data)
        ids = np.concatenate([*tokenizer.encode_file(path, workers=1), np.zeros(0, np.uint16)])
        assert ids.tolist() == in_plain_python(tokenizer, data)

    @for_all(length=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
    def test_long_words(self, crowded: Tokenizer, length: int, seed: int) -> None:
        text = of_letters(length, seed).decode()
        assert crowded.encode(text) == in_plain_python(crowded, text.encode())

    @pytest.mark.parametrize("workers", [1, 2, 5])
    @pytest.mark.parametrize("block_bytes", [1, 50, 333, 4096, 1 << 20])
    def test_threads_and_blocks_change_nothing(
        self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, block_bytes: int
    ) -> None:
        path = tmp_path / "text.txt"
        text = (CORPUS + "<|endoftext|>\n\n  'tis   ") * 20
        path.write_text(text, encoding="utf-8", newline="")
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        ids = np.concatenate(list(tokenizer.encode_file(path, workers=workers)))
        assert ids.tolist() == in_plain_python(tokenizer, text.encode())

    def test_a_word_of_many_megabytes(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = tmp_path / "line.txt"
        path.write_bytes(b"abathe" * 500_000)
        started = time.process_time()
        ids = np.concatenate(list(tokenizer.encode_file(path)))
        assert tokenizer.decode_bytes(ids) == b"abathe" * 500_000
        assert time.process_time() - started < 20

    def test_large_vocabularies_have_wider_ids(self, tmp_path: Path) -> None:
        path = tmp_path / "text.txt"
        path.write_text("a<|e|>")
        (ids,) = Tokenizer({**BYTES, 70_000: b"<|e|>"}, [], ["<|e|>"]).encode_file(path)
        assert (ids.dtype, ids.tolist()) == (np.uint32, [97, 70_000])


@for_all(text=texts)
def test_gpt2_ids_are_those_of_tiktoken(gpt2: Tokenizer, tiktoken_gpt2, text: str) -> None:
    assert gpt2.encode(text) == tiktoken_gpt2.encode(text, allowed_special="all")


@pytest.mark.parametrize("text", ["a\ud800b", "\ud83d\ude00", "x" * 5000, "\n" * 300, " " * 301 + "y"])
def test_gpt2_ids_of_odd_texts_are_those_of_tiktoken(gpt2: Tokenizer, tiktoken_gpt2, text: str) -> None:
    assert gpt2.encode(text) == tiktoken_gpt2.encode(text, allowed_special="all")


@pytest.fixture(scope="module")
def tiktoken_gpt2(gpt2_files: tuple[Path, Path]):
    """tiktoken's GPT-2, built from the vocabulary with GPT-2's table of bytes, written here once more."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken_ext import openai_public

    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ids = json.loads(gpt2_files[0].read_text(encoding="utf-8"))
    end = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    ranks = {bytes(byte_of[character] for character in token): id for token, id in ids.items()}
    return tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=end)
