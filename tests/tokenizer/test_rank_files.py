"""tiktoken's rank files: what lfs reads from them and writes into them, judged by tiktoken."""

import base64
import json
from pathlib import Path

import pytest
from awkward_texts import AWKWARD, for_all, texts
from hypothesis import strategies

from lfs_cli.errors import DataError
from lfs_cli.tokenizer import PATTERNS, Tokenizer, formats, learn_bpe
from lfs_cli.tokenizer.formats.checks import merge_down
from lfs_cli.tokenizer.formats.ranks import KNOWN, LONGEST_TOKEN, recover_merges
from lfs_cli.tokenizer.split import pattern_for

CORPUS = "the cat sat on the mat, the cat ate 100 cakes at the café 中文中文 it's\n\n  a_b <|endoftext|>" * 3
MANY_SCRIPTS = (
    "Straße ÀB中文\u3000x 漢字かな交じり文 한국어 हिन्दी पाठ العربية ไทย Ελληνικά 👩\u200d👧\n\n",
    "def f(x):\n\treturn {'a': x[0] ** 2}  # it's\r\n\r\n    pass\n  ",
    "12345678 3.14 don't DON'T I'LL it'S \u00a0\u2003 end   \n \n  \n",
    "".join(AWKWARD),
)
BYTES = {bytes([byte]): byte for byte in range(256)}


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def export(tokenizer: Tokenizer, folder: Path) -> Path:
    pattern = PATTERNS[tokenizer.pattern]
    return formats.EXPORTS["tiktoken"](folder, tokenizer.vocab, tokenizer.merges, tokenizer.special_ids, pattern)[0]


def tiktoken_of(path: Path):
    """The encoding that a reader of tiktoken's documentation would make of the two files."""
    tiktoken = pytest.importorskip("tiktoken")
    load = pytest.importorskip("tiktoken.load")
    arguments = json.loads(path.with_name(f"{path.name}.json").read_text())
    return tiktoken.Encoding(mergeable_ranks=load.load_tiktoken_bpe(str(path)), **arguments)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    specials = ["<|endoftext|>", "<|pad|>"]
    return Tokenizer(*learn_bpe(path, 310, specials), specials)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiktoken_gives_our_ids_for_our_file(learned: Tokenizer, tmp_path: Path, pattern: str) -> None:
    ours = Tokenizer(learned.vocab, learned.merges, learned.special_tokens, pattern=pattern)
    path = export(ours, tmp_path)
    theirs = tiktoken_of(path)
    for text in (CORPUS, *MANY_SCRIPTS):
        assert theirs.encode(text, allowed_special="all") == ours.encode(text)
    for name in (path, tmp_path):
        assert Tokenizer.load(name).hash == ours.hash


def test_a_token_without_merges_is_a_whole_word_there_too(tmp_path: Path) -> None:
    ours = Tokenizer.load(write(tmp_path / "cl100k_base.tiktoken", {**BYTES, b"abc": 256}))
    assert (ours.whole_words, ours.encode("abc abc")) == ((b"abc",), [256, 32, 97, 98, 99])
    path = formats.EXPORTS["tiktoken"](
        tmp_path / "out", ours.vocab, ours.merges, ours.special_ids, PATTERNS["cl100k"], ours.whole_words
    )[0]
    assert tiktoken_of(path).encode("abc abc") == ours.encode("abc abc")
    assert Tokenizer.load(path).hash == ours.hash


def test_gpt2_as_ranks_is_gpt2(gpt2: Tokenizer, tmp_path: Path) -> None:
    theirs = tiktoken_of(export(gpt2, tmp_path))
    for text in MANY_SCRIPTS:
        assert theirs.encode(text, allowed_special="all") == gpt2.encode(text)
    read = Tokenizer.load(tmp_path)
    assert read.merges == gpt2.merges
    assert read.hash == gpt2.hash


WHOLE = pattern_for(r"[\s\S]+")
words = strategies.lists(strategies.sampled_from([b"a", b"b", b"ab"]), min_size=1, max_size=8).map(b"".join)


@for_all(tokens=strategies.lists(words, max_size=12, unique=True), text=strategies.text("ab", max_size=30))
def test_recovered_merges_encode_as_ranks_do(tokens: list[bytes], text: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = dict(BYTES)
    for token in tokens:
        ranks.setdefault(token, len(ranks))
    merges, unreachable = recover_merges(ranks)
    theirs = tiktoken.Encoding("t", pat_str=WHOLE.expression, mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer({rank: token for token, rank in ranks.items()}, merges, pattern=WHOLE, whole_words=unreachable)
    assert ours.encode(text) == theirs.encode(text)


def test_a_token_that_merging_misses_is_told_apart() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"d": 3, b"bc": 4, b"ab": 5, b"cd": 6, b"abcd": 7}
    assert recover_merges(ranks) == ([(b"b", b"c"), (b"a", b"b"), (b"c", b"d")], [b"abcd"])


@for_all(text=texts)
def test_merging_down_is_encoding(learned: Tokenizer, text: str) -> None:
    places = {pair: place for place, pair in enumerate(learned.merges)}
    for word in PATTERNS["gpt2"].split(text):
        data = word.encode("utf-8", "replace")
        parts = merge_down(data, lambda left, right: places.get((left, right)), 1)
        ordinary = Tokenizer(learned.vocab, learned.merges)
        assert parts == [ordinary.vocab[id] for id in ordinary.encode(data.decode())]


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_name_tells_pattern_and_special_tokens(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / f"{name}.tiktoken", BYTES)
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.pattern, tokenizer.special_ids) == KNOWN[name]
    assert tokenizer.encode("a<|endoftext|>") == [97, KNOWN[name][1]["<|endoftext|>"]]


def test_the_known_names_are_those_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: BYTES)
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: BYTES)
    words = list(dict.fromkeys(w for text in MANY_SCRIPTS for name in PATTERNS for w in PATTERNS[name].split(text)))
    ranks = BYTES | {word.encode(): 256 + n for n, word in enumerate(w for w in words if len(w.encode()) > 1)}
    for name, (pattern, special_ids) in KNOWN.items():
        arguments = public.ENCODING_CONSTRUCTORS[name]()
        assert arguments["special_tokens"] == special_ids
        theirs = tiktoken.Encoding("t", pat_str=arguments["pat_str"], mergeable_ranks=ranks, special_tokens={})
        for text in MANY_SCRIPTS:  # a word that is a token as a whole is one id
            found = [theirs.decode_single_token_bytes(id).decode() for id in theirs.encode_ordinary(text)]
            assert found == list(PATTERNS[pattern].split(text))


def test_pattern_and_special_tokens_may_be_told(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.txt", {**BYTES, b"ab": 256})
    content = formats.read(path, pattern=PATTERNS["cl100k"], special_tokens=["<|x|>"])
    tokenizer = Tokenizer(content.vocab, content.merges, content.special_tokens, pattern=content.pattern)
    assert (tokenizer.pattern, tokenizer.encode("ab<|x|>")) == ("cl100k", [256, 257])
    known = write(tmp_path / "cl100k_base.tiktoken", BYTES)
    assert formats.read(known, special_tokens=["<|endofprompt|>"]).special_tokens == ["<|endofprompt|>"]
    assert formats.read(known, pattern=PATTERNS["gpt2"]).pattern.name == "gpt2"


LINE = base64.b64encode(b"ab").decode()
ALL_BYTES = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in BYTES.items())
BAD_FILES = {
    "not base64": ("!!!! 1\n", "line 1 of .* is not a token in base64 and its rank: `!!!! 1`"),
    "cut off": (f"{ALL_BYTES}{LINE}", "line 257 of .* is not a token in base64"),
    "three words": (f"{LINE} 1 2\n", "line 1 of .* is not a token in base64"),
    "a negative rank": (f"{LINE} -1\n", "line 1 of .* is not a token in base64 and its rank"),
    "a rank that is no number": (f"{LINE} x\n", "line 1 of .* is not a token in base64 and its rank"),
    "a huge rank": (f"{LINE} 99999999999\n", "beyond 16,777,215"),
    "a rank of 5000 digits": (f"{LINE} {'9' * 5000}\n", "line 1 of .* is not a token in base64"),
    "a token twice": (f"{LINE} 1\n{LINE} 2\n", "line 2 of .* a second time"),
    "a rank twice": (f"{LINE} 1\nYWM= 1\n", "line 2 of .* a second time"),
    "missing bytes": (f"{ALL_BYTES.splitlines()[0]}\n", "lacks 255 of the 256 single bytes"),
    "empty": ("", "lacks 256 of the 256 single bytes"),
    "a long token": (
        f"{ALL_BYTES}{base64.b64encode(bytes(LONGEST_TOKEN + 1)).decode()} 256\n",
        "line 257 of .* has a token of 4,097 bytes",
    ),
    "not text": (b"\xff\xfe\x00", "is not text in UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_is_explained(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(path)
    assert caught.value.hint
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "does not hold an object"),
        ({"special_tokens": {}}, "does not hold a text `pat_str`"),
        ({"pat_str": "(", "special_tokens": {}}, r"the pattern `\(` of .* cannot be used"),
        ({"pat_str": "(" * 5000, "special_tokens": {}}, "cannot be used"),
        ({"pat_str": "a", "special_tokens": {"x": "y"}}, 'the token `x` of .* has the id `"y"`'),
        ({"pat_str": "a", "special_tokens": {"<|x|>": 5}}, r"the special token .* has the id `5` of another token"),
    ],
)
def test_a_file_beside_it_that_cannot_be_used_is_explained(tmp_path: Path, tree: object, message: str) -> None:
    path = write(tmp_path / "a.tiktoken", BYTES)
    (tmp_path / "a.tiktoken.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message):
        Tokenizer.load(path)


def test_a_file_that_tells_no_pattern_is_refused_with_a_way_out(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.tiktoken", BYTES)
    with pytest.raises(DataError, match="does not say how text is cut into words") as caught:
        Tokenizer.load(path)
    assert f"lfs tokenize --tokenizer {path} --pattern cl100k --export huggingface" in str(caught.value.hint)


def test_a_tokenizer_that_ranks_cannot_hold_is_refused(tmp_path: Path) -> None:
    vocab = {id: bytes([id]) for id in range(256)}
    swapped = Tokenizer({**vocab, 257: b"ab", 256: b"abc"}, [(b"a", b"b"), (b"ab", b"c")])
    # merged by ids, `ab` and then `bc` can never be neighbours of each other: `abc` is made of `a` and `bc` alone
    other = Tokenizer({**vocab, 256: b"bc", 257: b"ab", 258: b"abc"}, [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")])
    for tokenizer in (swapped, other):
        with pytest.raises(DataError, match="tiktoken cannot have this tokenizer") as caught:
            export(tokenizer, tmp_path)
        assert "--export huggingface" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
