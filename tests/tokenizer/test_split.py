import numpy as np
import pytest
import regex
from awkward_texts import for_all, texts
from hypothesis import strategies as st

from lfs_cli.errors import ConfigError, DataError
from lfs_cli.tokenizer import PATTERNS
from lfs_cli.tokenizer.split import Pattern, find_pattern, pattern_for
from lfs_cli.tokenizer.unicode_classes import (
    _PACKED,
    CODE_POINTS,
    LETTER,
    LOWER,
    MARK,
    NUMBER,
    OTHER,
    SPACE,
    UPPER,
    class_of,
    class_runs,
    pack_classes,
)

PINNED_REGEX = "2026.11"


def classes_of_regex() -> np.ndarray:
    """Ask the installed `regex` for the class of every character; surrogates are OTHER."""
    codes = [code for code in range(CODE_POINTS) if not 0xD800 <= code < 0xE000]
    text = "".join(map(chr, codes))
    found = np.zeros(len(codes), np.uint8)
    expressions = {
        UPPER: r"[\p{Lu}\p{Lt}]+", LOWER: r"\p{Ll}+", LETTER: r"[\p{Lm}\p{Lo}]+",
        MARK: r"\p{M}+", NUMBER: r"\p{N}+", SPACE: r"\s+",
    }  # fmt: skip
    for kind, expression in expressions.items():
        for match in regex.finditer(expression, text):
            found[match.start() : match.end()] = kind
    return np.insert(found, 0xD800, np.zeros(0x800, np.uint8))


def test_the_pinned_table_is_what_regex_says() -> None:
    starts, kinds = class_runs()
    pinned = np.repeat(np.array(kinds, np.uint8), np.diff([*starts, CODE_POINTS]))
    installed = classes_of_regex()
    differing = np.flatnonzero(pinned != installed)
    if regex.__version__.startswith(PINNED_REGEX):
        assert not len(differing)
    newer = pinned[differing] == OTHER  # a later version gives a class to what had none
    assert newer.all() or (installed[differing] == OTHER).all()


def test_packing_the_table_gives_the_text_in_the_source() -> None:
    starts, kinds = class_runs()
    classes = np.repeat(np.array(kinds, np.uint8), np.diff([*starts, CODE_POINTS])).tobytes()
    assert pack_classes(classes) == _PACKED


def test_white_space_is_unicode_s_and_not_isspace() -> None:
    assert [class_of(code) for code in (0x1C, 0x1F, 0x200B, 0xFEFF, 0xD800)] == [OTHER] * 5
    assert [class_of(code) for code in (0x20, 0x85, 0xA0, 0x3000)] == [SPACE] * 4


@pytest.mark.parametrize("name", PATTERNS)
@for_all(text=texts)
def test_words_are_those_of_the_expression(name: str, text: str) -> None:
    assert list(PATTERNS[name].split(text)) == regex.findall(PATTERNS[name].expression, text)


@pytest.mark.parametrize("name", PATTERNS)
@for_all(text=texts)
def test_words_together_are_the_text(name: str, text: str) -> None:
    assert "".join(PATTERNS[name].split(text)) == text


def test_the_example_of_the_docstring() -> None:
    words = ["I", "'ll", " take", " 22", " ", " apples", "."]
    assert list(PATTERNS["gpt2"].split("I'll take 22  apples.")) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a  b", ["a", " ", " b"]),
        ("a\n\nb", ["a", "\n", "\n", "b"]),
        ("a\n\n", ["a", "\n\n"]),
        (" 's", [" '", "s"]),
        ("it's'LL", ["it", "'s", "'", "LL"]),
        ("a\u3000b", ["a", "\u3000", "b"]),
        ("x\x1cy", ["x", "\x1c", "y"]),
    ],
)
def test_gpt2_words_of_edge_cases(text: str, words: list[str]) -> None:
    assert list(PATTERNS["gpt2"].split(text)) == words


@pytest.mark.parametrize("name", ["cl100k", "o200k"])
@for_all(text=texts)
def test_gpt4_words_are_those_of_tiktoken(name: str, text: str) -> None:
    expressions = pytest.importorskip("tiktoken_ext.openai_public")
    theirs = _tiktoken_words(expressions, name)
    assert list(PATTERNS[name].split(text)) == theirs(text)


def _tiktoken_words(module, name: str):
    """Return tiktoken's own splitting: an encoding whose tokens are single bytes is asked through its expression."""
    import inspect
    import re

    source = inspect.getsource(getattr(module, f"{name}_base"))
    if name == "cl100k":
        expression = re.search(r'r"""(.*?)"""', source)[1]
    else:
        expression = "|".join(re.findall(r'r"""(.*?)"""', source))
    return regex.compile(expression.replace("$", r"\Z")).findall


@pytest.mark.parametrize("name", PATTERNS)
@for_all(text=texts, stop=st.integers(0, 200))
def test_a_cut_changes_no_word(name: str, text: str, stop: int) -> None:
    pattern, data = PATTERNS[name], text.encode()
    cut = pattern.find_cut(data, min(stop, len(data) - 1))
    left, right = data[:cut].decode(), data[cut:].decode()
    assert [*pattern.split(left), *pattern.split(right)] == list(pattern.split(text))


def test_a_cut_is_found_far_back() -> None:
    data = b"word next" + b"x" * 100_000
    assert PATTERNS["gpt2"].find_cut(data, len(data) - 1) == 4


@pytest.mark.parametrize(
    "text",
    ["a\n", "a ", "it'", "中\u3000", "a\xa0", "!"],
    ids=["newline", "space", "apostrophe", "wide", "nbsp", "solid"],
)
def test_no_cut_behind_white_space_or_an_apostrophe(text: str) -> None:
    data = (text + "b").encode()
    assert PATTERNS["gpt2"].find_cut(data, len(data) - 1) != len(data) - 1


def test_a_misspelled_pattern_is_named_and_corrected() -> None:
    with pytest.raises(ConfigError, match="unknown pattern `gpt3`") as caught:
        find_pattern("gpt3")
    assert caught.value.hint == "did you mean `gpt2`?"


def test_a_known_expression_is_its_pattern_and_another_has_its_own_name() -> None:
    spelled = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert pattern_for(spelled).name == "gpt2"
    assert pattern_for(r"\w+|\W").name == r"\w+|\W"
    assert list(pattern_for("b+").split("abbc")) == ["a", "bb", "c"]


def test_an_expression_that_cannot_be_compiled_is_named() -> None:
    with pytest.raises(DataError, match=r"the pattern `\(` cannot be used"):
        list(Pattern("(", "(").split("x"))
