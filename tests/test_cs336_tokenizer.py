"""CS336's public behaviour of tokenizers, judged by counting and by tiktoken.

The rules are those of the handout of Stanford CS336, assignment 1. Nothing of lfs judges lfs.
"""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import lfs_cli as lfs


def learned(text: str, folder: Path, vocab_size: int, specials: list[str]) -> tuple[dict, list]:
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    return lfs.learn_bpe(folder / "corpus.txt", vocab_size, specials)


def test_the_handouts_example(tmp_path: Path) -> None:
    """Words apart by line ends, which are words of their own and too rare to be merged with a letter."""
    text = "low low low low low lower lower widest widest widest " + "newest " * 6
    vocab, merges = learned(text.replace(" ", "\n"), tmp_path, 256 + 1 + 6, ["<|endoftext|>"])
    expected = ["s t", "e st", "o w", "l ow", "w est", "n e"]
    assert merges == [tuple(part.encode() for part in pair.split()) for pair in expected]
    assert vocab[256 + 6] == b"<|endoftext|>"
    assert set(vocab.values()) == {
        *(bytes([byte]) for byte in range(256)),
        *(left + right for left, right in merges),
        b"<|endoftext|>",
    }


def test_of_equal_pairs_the_greater_is_merged(tmp_path: Path) -> None:
    _, merges = learned("BA\nZZ\nAB\nBA\nZZ\nAB", tmp_path, 256 + 3, [])
    assert merges[0] == max([(b"B", b"A"), (b"Z", b"Z"), (b"A", b"B")])
    _, merges = learned("AA\nA A\nB", tmp_path, 256 + 1, [])
    assert merges == [(b"A", b"A")]  # greater than (` `, `A`), which occurs as often


def test_specials_are_never_counted_nor_merged_across(tmp_path: Path) -> None:
    text = "<|endoftext|>".join(["the cat sat", "the hat ", "<|pad|>the|> <| bat", ""] * 40)
    vocab, merges = learned(text, tmp_path, 400, ["<|endoftext|>", "<|pad|>"])
    ordinary = [token for token in vocab.values() if token not in (b"<|endoftext|>", b"<|pad|>")]
    assert not [token for token in ordinary if b"endof" in token or b"pad" in token]
    assert not [token for token in ordinary if b"tthe" in token]  # `sat` and `the` meet at a special token only
    assert len(vocab) == 258 + len(merges) < 400  # the text has no more pairs
    assert {b"<|endoftext|>", b"<|pad|>"} < set(vocab.values())


SPEED = """
import sys, time, lfs_cli as lfs
start = time.perf_counter()
vocab, merges = lfs.learn_bpe(sys.argv[1], 500, ["<|endoftext|>"])
print(time.perf_counter() - start, len(merges), sum("numba" in name for name in sys.modules))
"""


def corpus(size: int) -> str:
    """Words of several alphabets with the frequencies that words have, so that learning has work to do."""
    random = np.random.default_rng(0)
    letters = np.array(list("eeeetttaaooiinnsshhrrddlluucmfwygpbvkéü"))
    words = ["".join(random.choice(letters, random.integers(1, 11))) for _ in range(4000)]
    ranks = np.minimum(random.zipf(1.2, size // 5) - 1, len(words) - 1)
    ends = random.choice([" ", " ", " ", " ", " ", " ", ", ", ".\n", "? ", "'s "], len(ranks))
    text = "".join(chain.from_iterable(zip((words[rank] for rank in ranks), ends, strict=True)))
    return text[: size - 1] + "\n"


def test_500_tokens_are_learned_from_130_kilobytes_in_a_second_and_a_half(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(corpus(130_000), encoding="utf-8")
    command = [sys.executable, "-c", SPEED, str(tmp_path / "corpus.txt")]
    shown = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert min(float(seconds) for seconds, *_ in shown) < 1.5
    assert {merges for _, merges, _ in shown} == {str(500 - 257)}
    assert {modules for *_, modules in shown} == {"0"}  # nothing was compiled for it


BYTES = {id: bytes([id]) for id in range(256)}
TEXTS = {
    "empty": "",
    "a character": "s",
    "an emoji": "🙃",
    "a sentence": "Hello, how are you?",
    "many alphabets": "Héllò hôw are ü? 🙃 Größe, 你好, привет, \u0301",
    "white space": "  a\t\tb \n\n c\r\n   ",
    "contractions": "I'm he's they'll we've you're 'sorry' I'M",
    "digits": "1234567890 3.14159 1,000",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> lfs.Tokenizer:
    """A tokenizer learned here, with one special token."""
    folder = tmp_path_factory.mktemp("small")
    return lfs.Tokenizer(*learned(corpus(20_000), folder, 600, ["<|endoftext|>"]), ["<|endoftext|>"])


@pytest.mark.parametrize("name", TEXTS)
def test_decoding_gives_the_text_back(small: lfs.Tokenizer, name: str) -> None:
    ids = small.encode(TEXTS[name])
    assert isinstance(ids, list)
    assert small.decode(ids) == TEXTS[name]
    assert list(small.encode_iterable(TEXTS[name])) == ids  # a character at a time
    assert list(small.encode_iterable([TEXTS[name]])) == ids


def test_a_special_token_is_one_id_wherever_it_stands(small: lfs.Tokenizer) -> None:
    text = "a <|endoftext|><|endoftext|> b🙃<|endoftext|>"
    parts = [small.decode([id]) for id in small.encode(text)]
    assert parts.count("<|endoftext|>") == 3
    assert "".join(small.decode(small.encode(text))) == text


def test_without_special_tokens_their_text_is_text(small: lfs.Tokenizer) -> None:
    plain = lfs.Tokenizer(small.vocab, small.merges)
    ids = plain.encode("<|endoftext|>")
    assert len(ids) > 1
    assert plain.decode(ids) == "<|endoftext|>"


@pytest.mark.parametrize("specials", [["<|e|>", "<|e|><|e|>"], ["<|e|><|e|>", "<|e|>"]], ids=["short", "long"])
def test_of_overlapping_special_tokens_the_longest_wins(specials: list[str]) -> None:
    tokenizer = lfs.Tokenizer(BYTES, [], specials)
    text = "how <|e|><|e|> are you?<|e|>"
    parts = [tokenizer.decode([id]) for id in tokenizer.encode(text)]
    assert parts.count("<|e|><|e|>") == 1
    assert parts.count("<|e|>") == 1
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert list(tokenizer.encode_iterable(text)) == tokenizer.encode(text)


def test_the_handouts_small_vocabulary_encodes_its_sentence() -> None:
    """A vocabulary may lack bytes that no text of it has."""
    tokens = [" ", "a", "c", "e", "h", "t", "th", " c", " a", "the", " at"]
    vocab = {id: token.encode() for id, token in enumerate(tokens)}
    merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    tokenizer = lfs.Tokenizer(vocab, merges)
    assert tokenizer.encode("the cat ate") == [9, 7, 1, 5, 10, 3]
    assert list(tokenizer.encode_iterable(["the c", "at ate"])) == [9, 7, 1, 5, 10, 3]
    assert tokenizer.decode([9, 7, 1, 5, 10, 3]) == "the cat ate"
    for encode in (tokenizer.encode, lambda text: list(tokenizer.encode_iterable([text]))):
        with pytest.raises(lfs.LfsError, match="no token for the byte `0x6f`"):
            encode("the cot")
    with pytest.raises(lfs.LfsError, match="no token for the byte `0x6f`"):
        tokenizer.encode("o" * 9_000_000)


@pytest.mark.parametrize("order", ["specials first", "reversed", "with gaps"])
def test_ids_may_come_in_any_order(small: lfs.Tokenizer, order: str) -> None:
    tokens = list(small.vocab.values())
    vocab = {
        "specials first": dict(enumerate([b"<|endoftext|>", *tokens[:-1]])),
        "reversed": dict(enumerate(reversed(tokens))),
        "with gaps": {7 * id + 3: token for id, token in enumerate(tokens)},
    }[order]
    other = lfs.Tokenizer(vocab, small.merges, ["<|endoftext|>"])
    text = TEXTS["many alphabets"] + "<|endoftext|>" + corpus(2000)
    assert [other.vocab[id] for id in other.encode(text)] == [small.vocab[id] for id in small.encode(text)]
    assert other.decode(other.encode(text)) == text


def test_bytes_that_are_no_text_become_replacement_characters(small: lfs.Tokenizer) -> None:
    assert small.decode(small.encode("🙃")[:1] + small.encode("a")) == "\ufffda"


def test_ids_may_be_a_tensor(small: lfs.Tokenizer) -> None:
    ids = small.encode("the sea")
    assert small.decode(torch.tensor(ids)) == "the sea"


def gpt2_files() -> tuple[Path, Path]:
    shared = Path(os.environ.get("LFS_SHARED") or Path(__file__).parents[2] / "shared")
    files = shared / "data" / "gpt2" / "gpt2_vocab.json", shared / "data" / "gpt2" / "gpt2_merges.txt"
    if not all(file.exists() for file in files):
        pytest.skip("GPT-2's files are not at hand: name the folder above data/gpt2 in LFS_SHARED")
    return files


@pytest.fixture(scope="module")
def gpt2() -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """GPT-2's vocabulary and merges as bytes, read without lfs."""
    vocab_path, merges_path = gpt2_files()
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in plain}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in plain)}
    named = json.loads(vocab_path.read_text(encoding="utf-8"))
    vocab = {id: bytes(byte_of[c] for c in token) for token, id in named.items()}
    lines = [line.split(" ") for line in merges_path.read_text(encoding="utf-8").splitlines()]
    pairs = [line for line in lines if len(line) == 2 and not line[0].startswith("#version")]
    return vocab, [(bytes(byte_of[c] for c in left), bytes(byte_of[c] for c in right)) for left, right in pairs]


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_those_of_tiktoken(gpt2: tuple, name: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    vocab, merges = gpt2
    ranks = {token: id for id, token in vocab.items() if token != b"<|endoftext|>"}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    judge = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    tokenizer = lfs.Tokenizer(vocab, merges, ["<|endoftext|>"])
    text = f"{TEXTS[name]}<|endoftext|>{TEXTS['many alphabets']} <|endoftext|> "
    assert tokenizer.encode(text) == judge.encode(text, allowed_special={"<|endoftext|>"})
    assert tokenizer.encode(TEXTS[name]) == judge.encode_ordinary(TEXTS[name])


MEMORY = """
import sys, tracemalloc, lfs_cli as lfs
tokenizer = lfs.Tokenizer.load(sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as file:
    for id in tokenizer.encode_iterable(file.readline() for _ in range(20)): pass
tracemalloc.start()
with open(sys.argv[2], encoding="utf-8") as file:
    count = sum(1 for _ in tokenizer.encode_iterable(file))
print(tracemalloc.get_traced_memory()[1], count)
"""


@pytest.mark.slow
def test_a_stream_of_five_megabytes_takes_less_than_one(small: lfs.Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "text.txt").write_text(corpus(5_000_000), encoding="utf-8")
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(tmp_path / "text.txt")]
    peak, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) > 1_000_000
    assert int(peak) < 1_000_000
