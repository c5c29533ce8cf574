"""The compiled scanners cut what `split.PATTERNS` cut."""

from collections.abc import Iterable

import numpy as np
import pytest
from awkward_texts import AWKWARD, any_bytes, for_all, texts
from hypothesis import strategies as st

from lfs_cli.tokenizer import PATTERNS, arrays, desk, machine_code
from lfs_cli.tokenizer.unicode_classes import CODE_POINTS, class_runs

CAPITALS = [
    "A",
    "AB",
    "É",
    "\u01c5",
    "aB",
    "'Ll",
    "'\u017f",
    "\u017f",
    "ª",
    "ʰ",
    "中A",
    "\u0301",
    "//",
    "/\n",
    "1234567",
    "\U00010400",
]


class Scanner:
    """Asks a compiled scanner for words, stretch by stretch, as the loops that use it do."""

    def __init__(self, name: str) -> None:
        self.pattern = PATTERNS[name]
        self.desk = arrays.Desk(f"scan_{name}", (5, 5, 5))
        self.loop = machine_code.load(f"scan_{name}")
        self.starts = self.desk.put(desk.STARTS, np.zeros(desk.STARTS_SIZE, np.int32))

    def starts_of(self, data: bytes) -> np.ndarray:
        fields, padded = self.desk.fields, np.frombuffer(data + bytes(desk.PAD), np.uint8)
        fields[desk.SCAN_STATE :] = 0
        fields[desk.VIEW], fields[desk.SIZE] = desk.address(padded), len(data)
        found = [np.zeros(0, np.int32)]
        for at in range(0, len(data), desk.STRETCH):
            fields[desk.AT] = at
            found.append(self.starts[: self.loop(self.desk.address)].copy())
        return np.concatenate(found)

    def words(self, data: bytes) -> list[bytes]:
        starts = self.starts_of(data).tolist()
        return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=False)]


@pytest.fixture(scope="module", params=PATTERNS)
def scanner(request: pytest.FixtureRequest) -> Scanner:
    return Scanner(request.param)


def plain(scanner: Scanner, text: str) -> list[bytes]:
    return [word.encode("utf-8", "surrogateescape") for word in scanner.pattern.split(text)]


@for_all(text=texts | st.lists(st.sampled_from(AWKWARD + CAPITALS), max_size=60).map("".join))
def test_words_of_texts(scanner: Scanner, text: str) -> None:
    assert scanner.words(text.encode()) == plain(scanner, text)


@for_all(data=any_bytes)
def test_words_of_any_bytes(scanner: Scanner, data: bytes) -> None:
    """A byte that is not UTF-8 is a character of its own; to `split` it is a lone surrogate."""
    assert scanner.words(data) == plain(scanner, data.decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    "bad",
    [
        b"\xed\xa0\x80",
        b"\xed\xbf\xbf",
        b"\xc1\x81",
        b"\xe0\x81\x81",
        b"\xf0\x80\x81\x81",
        b"\xf4\x90\x80\x80",
        b"\xe4\xb8",
    ],
)
def test_what_is_not_utf8_counts_byte_by_byte(scanner: Scanner, bad: bytes) -> None:
    for data in (bad, bad + b"A", b" " + bad + b"a", b"a" + bad + bad + b"'s", b"!" + bad[:1] + b"\n/"):
        assert scanner.words(data) == plain(scanner, data.decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("seed", range(8))
def test_words_of_long_texts(scanner: Scanner, seed: int) -> None:
    """With few different pieces in each part of the text, so that all of them meet, also where blocks meet."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(300):
        pieces = random.choice(AWKWARD + CAPITALS, random.integers(2, 9))
        parts.append("".join(random.choice(pieces, random.integers(1, 80))))
    text = "".join(parts)
    assert scanner.words(text.encode()) == plain(scanner, text)


@pytest.mark.parametrize("piece", ["a", "A", "中", "1", "\u0663", " ", "\n", "\u3000", "!", "/", "'", "\u0301", "\x80"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1023, 1024, 1025, 2000])
def test_words_of_runs_as_long_as_blocks(scanner: Scanner, piece: str, size: int) -> None:
    for before, after in (("", ""), ("a", "b"), (" ", " "), ("\n", "\n"), ("!", "!"), ("'s", "'s"), ("", "\nB")):
        text = before + piece * size + after
        assert scanner.words(text.encode()) == plain(scanner, text)


def with_neighbours(codes: Iterable[int], text: str) -> str:
    """Return ``text`` for each of some characters, with the character in place of each `_`."""
    return "".join(text.replace("_", chr(code)) for code in codes if not 0xD800 <= code < 0xE000)


def test_the_first_and_the_last_character_of_each_run_of_a_class(scanner: Scanner) -> None:
    """They stand next to letters, digits, spaces, line ends, punctuation and apostrophes."""
    starts, _ = class_runs()
    edges = sorted({*starts, *(start - 1 for start in starts[1:]), CODE_POINTS - 1})
    text = with_neighbours(edges, "a_a 1_1 _ A_A'_'s_\n_\t_!_.__!!_ a\n")
    assert scanner.words(text.encode()) == plain(scanner, text)


def test_every_character_has_its_class(scanner: Scanner) -> None:
    for start in range(0, CODE_POINTS, 0x8000):
        text = with_neighbours(range(start, start + 0x8000), "_a")
        assert scanner.words(text.encode()) == plain(scanner, text)


@pytest.mark.slow
def test_every_fourth_character_next_to_others(scanner: Scanner) -> None:
    for start in range(0, CODE_POINTS, 0x10000):
        text = with_neighbours(range(start, start + 0x10000, 4), "A_1_ _'_s\n_!!_")
        assert scanner.words(text.encode()) == plain(scanner, text)


def test_a_long_run_takes_linear_time(scanner: Scanner) -> None:
    for piece in (" ", "\n ", "中A", "\u3000", "!\u0301", "'s", "a\n"):
        data = piece.encode() * (3_000_000 // len(piece.encode()))
        assert len(scanner.starts_of(data)) >= 1  # in some milliseconds; quadratic time would take minutes
