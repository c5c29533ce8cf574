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
from awkward_texts import AWKWARD, any_bytes, for_all, texts
from hypothesis import strategies as st

from lfs_cli.errors import DataError
from lfs_cli.tokenizer import PATTERNS, Tokenizer, arrays, blocks, bpe, encoder, learn_bpe
from lfs_cli.tokenizer.bpe import merge_ids, merge_word
from lfs_cli.tokenizer.learn import learn_reference
from lfs_cli.tokenizer.split import GPT2, Pattern

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
    return [id for ids in tokenizer._encode_words(data, tokenizer._specials) for id in ids]


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


SPECIALS = ["<|e|>", "<|e|><|e|>", "<|pad|>", "zz"]


@pytest.fixture(scope="module")
def special() -> Tokenizer:
    """A tokenizer with four special tokens from 256 on."""
    return Tokenizer(BYTES, [], SPECIALS)


def test_special_tokens_may_be_ignored(special: Tokenizer) -> None:
    assert special.encode("a<|e|>zz", special="ignore") == list(b"a<|e|>zz")


def test_special_tokens_may_be_forbidden(special: Tokenizer) -> None:
    assert special.encode("a<|e |>z", special="forbid") == list(b"a<|e |>z")
    with pytest.raises(DataError, match=r"the special token `<\|e\|><\|e\|>` at character 2$") as caught:
        special.encode("é <|e|><|e|>", special="forbid")
    assert 'special="ignore"' in (caught.value.hint or "")


def test_some_special_tokens_may_be_allowed(special: Tokenizer) -> None:
    text = "<|e|><|e|>zz<|pad|>"
    assert special.encode(text, special=["<|e|>", "zz"]) == [256, 256, 259, *b"<|pad|>"]
    assert special.encode(text, special=()) == list(text.encode())


def test_an_unknown_special_token_is_named(special: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"`<\|pat\|>` is no special token") as caught:
        special.encode("a", special=["<|pat|>"])
    assert caught.value.hint == "did you mean `<|pad|>`?"


@pytest.mark.parametrize("policy", ["allow", "ignore", ["<|e|>"], []], ids=str)
def test_special_tokens_are_chosen_as_tiktoken_does(special: Tokenizer, policy: str | list[str]) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: id for id, token in BYTES.items()}
    ids = dict(special.special_ids)
    theirs = tiktoken.Encoding("specials", pat_str=GPT2, mergeable_ranks=ranks, special_tokens=ids)
    allowed = {"allow": "all", "ignore": set()}.get(str(policy), policy)
    for text in ("<|e|>", "a<|e|> <|e|>zz <|pad|>", "zzz<|e|", "<<|e|>>", "  <|e|>  "):
        chosen = allowed if allowed == "all" else set(allowed)
        assert special.encode(text, special=policy) == theirs.encode(
            text, allowed_special=chosen, disallowed_special=()
        )


@for_all(pieces=st.lists(st.sampled_from([*SPECIALS, "<|", "<", "z", "é", " "]), max_size=20))
def test_parts_are_found_alike_with_and_without_loops(special: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    for policy in ("allow", "ignore", ["<|e|><|e|>", "zz"]):
        expected = special.encode(text, special=policy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe, "COMPILED_BYTES", 0)
            assert special.encode(text, special=policy) == expected


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


@for_all(text=texts)
def test_offsets_are_where_the_tokens_stand(tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(offsets)
    data, at = text.encode(), 0
    for id, (start, stop) in zip(ids, offsets, strict=True):
        token = tokenizer.vocab[id]
        first, last = at, at + len(token) - 1  # bytes of the token; the span has all characters that they are part of
        assert len(text[:start].encode()) <= first < len(text[: start + 1].encode())
        assert len(text[: stop - 1].encode()) <= last < len(text[:stop].encode())
        at += len(token)
    assert at == len(data)


def test_offsets_count_surrogates_as_str_does() -> None:
    ids, offsets = Tokenizer(BYTES, []).encode_with_offsets("a\ud83d\ude00\ud800é")
    assert bytes(ids) == "a😀\ufffdé".encode()
    assert offsets == [(0, 1), *[(1, 3)] * 4, *[(3, 4)] * 3, *[(4, 5)] * 2]


def test_offsets_of_words_are_those_of_tokenizers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    text = CORPUS.replace("😀", "")  # where tokens are whole characters both say the same
    whole = [(start, stop) for start, stop in tokenizer.encode_with_offsets(text)[1] if text[start:stop].isascii()]
    found = [(start, stop) for start, stop in theirs.encode(text).offsets if text[start:stop].isascii()]
    assert whole == found


def test_arrays_of_many_texts(tokenizer: Tokenizer) -> None:
    documents = [CORPUS, "", "the sea", b"caf\xc3\xa9 \xff", "<|endoftext|>", ""]
    ids, ends = tokenizer.encode_arrays(documents)
    starts = [0, *ends[:-1]]
    each = [ids[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    assert ids.dtype == np.uint16
    assert each[:3] + each[4:] == [tokenizer.encode(text) for text in (CORPUS, "", "the sea", "<|endoftext|>", "")]
    assert tokenizer.decode_bytes(each[3]) == b"caf\xc3\xa9 \xff"
    assert tokenizer.encode_batch([CORPUS, "", "a"]) == [tokenizer.encode(text) for text in (CORPUS, "", "a")]
    assert tokenizer.encode_batch([]) == []


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

    @pytest.mark.parametrize("most", [6, 9])
    def test_tables_of_words_grow_and_are_emptied(
        self, crowded: Tokenizer, monkeypatch: pytest.MonkeyPatch, most: int
    ) -> None:
        """With tables so small that words share slots, and everything is full again and again."""
        for name in ("SHORT_BITS", "MIDDLE_BITS", "LONG_BITS"):
            monkeypatch.setattr(encoder, name, (5, most))
        for module in (arrays, encoder):
            monkeypatch.setattr(module, "ARENA_BYTES", (1 << 12, 1 << 13))
        monkeypatch.setattr(encoder, "POOL_IDS", (1 << 12, 1 << 13))
        fresh, random = Tokenizer(crowded.vocab, crowded.merges), np.random.default_rng(0)
        words = [of_letters(size, seed).decode() for seed, size in enumerate(random.integers(1, 70, 400))]
        text = " ".join(random.choice(words, 20_000))
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

    @for_all(length=st.integers(65, 3000), seed=st.integers(0, 2**32 - 1))
    def test_long_words_of_a_token_numbered_0(self, crowded: Tokenizer, length: int, seed: int) -> None:
        vocab = {**crowded.vocab, 0: crowded.vocab[256], 256: b"\0"}
        text, own = of_letters(length, seed).decode(), Tokenizer(vocab, crowded.merges)
        assert own.encode(text) == in_plain_python(own, text.encode())

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

    def test_threads_do_not_write_where_others_do(self) -> None:
        """Every byte is one id here, so that each part of the ids is full."""
        plain = Tokenizer(BYTES, [], ["<|e|>"])
        texts = ["abc\x00" * 9, "", "<|e|><|e|>", "é" * 50, "x"] * 40
        ids, ends = plain.encode_arrays(texts, threads=7)
        assert ids.tolist() == [id for text in texts for id in in_plain_python(plain, text.encode())]
        assert ends.tolist() == np.cumsum([len(plain.encode(text)) for text in texts]).tolist()

    @pytest.mark.parametrize("name", PATTERNS)
    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_arrays_are_the_same_for_all_patterns_and_threads(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, threads: int
    ) -> None:
        monkeypatch.setattr(encoder, "PIECE_BYTES", (70, 70))
        own = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, pattern=name)
        random = np.random.default_rng(0)
        documents = ["".join(random.choice(AWKWARD, size)) for size in random.integers(0, 300, 40)]
        documents += ["x" * 3000, "中" * 500, CORPUS * 3, "<|endoftext|>" * 9, ""]
        expected = [in_plain_python(own, text.encode()) for text in documents]
        assert own.encode_batch(documents, threads=threads) == expected
        assert own.encode_array("".join(documents), threads=threads).tolist() == in_plain_python(
            own, "".join(documents).encode()
        )

    def test_large_ids_take_more_room(self, tokenizer: Tokenizer) -> None:
        """Ids of four bytes, of which a word has less room before they go to the pool."""
        shift = 90_000
        vocab = {id if id < 256 else id + shift: token for id, token in tokenizer.vocab.items()}
        large = Tokenizer(vocab, tokenizer.merges, tokenizer.special_tokens)
        text = (CORPUS + "zqxjk" * 30 + " antidisestablishmentarianism " + "qwertzuiop" * 2) * 3
        ids = large.encode_array(text)
        assert ids.dtype == np.uint32
        assert [id if id < 256 else id - shift for id in ids.tolist()] == tokenizer.encode(text)
        assert ids.tolist() == in_plain_python(large, text.encode())

    def test_any_other_pattern_gives_arrays_too(self, tokenizer: Tokenizer) -> None:
        own = Tokenizer(tokenizer.vocab, tokenizer.merges, pattern=Pattern("letters", r"[a-z]+|."))
        ids, ends = own.encode_arrays([CORPUS, "the sea"], threads=2)
        assert (ids.dtype, ids[: ends[0]].tolist()) == (np.uint16, own.encode(CORPUS))
        own.prepare()
        assert own._encoder is None

    def test_prepared_desks_are_used(self, tokenizer: Tokenizer) -> None:
        own = Tokenizer(tokenizer.vocab, tokenizer.merges)
        own.prepare(threads=2)
        assert own.encode("the sea" * 1000) == in_plain_python(own, b"the sea" * 1000)

    def test_nothing_behind_a_text_is_read(self, tokenizer: Tokenizer) -> None:
        """Words at the end of a text, with something else behind it in memory that must not matter."""
        for size in (*range(1, 40), 63, 64, 65, 1000, 1023, 1024, 1087, 1088, 1089, 1150):
            data = (b"the other, then 12 \xe4\xb8\xad's  " * 60)[:size]
            for behind in (b"", b"s", b"'s", b" ", b"\x80\x80"):
                rows = np.array([[arrays.text_at(whole := data + behind)[0], size]], np.int64)
                assert tokenizer._compiled().encode(rows)[0].tolist() == in_plain_python(tokenizer, data), (
                    size,
                    behind,
                    whole,
                )

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


def test_gpt2_ids_of_all_its_tokens_are_those_of_tiktoken(gpt2: Tokenizer, tiktoken_gpt2) -> None:
    """Each token in words of all lengths, with all merges in the tables of the loops."""
    random = np.random.default_rng(0)
    tokens = [token.decode("utf-8", "ignore") for token in gpt2.vocab.values()]
    text = "".join(random.permutation(tokens)) + " ".join(random.permutation(tokens))
    assert len(text) > bpe.KEPT_BYTES / 2
    gpt2.prepare()
    assert gpt2.encode_array(text).tolist() == tiktoken_gpt2.encode(text, allowed_special="all")


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
