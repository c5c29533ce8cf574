"""Pre-tokenization: a pattern cuts text into words, and byte pairs are merged only inside a word.

Without it the most frequent pairs would span words (`of the`), and learning would have to treat a text of gigabytes as
one long string. With it, learning needs only each different word and how often it occurs.

    >>> list(PATTERNS["gpt2"].split("I'll take 22  apples."))
    ['I', "'ll", ' take', ' 22', ' ', ' apples', '.']

A space belongs to the word after it, so that `apple` in the middle of a sentence is one token, space included. Of
several spaces only the last one does.

A pattern is data: an expression for the `regex` module, which defines the words, and rules that say where a text may
be cut in two so that both parts have the words that the whole has. Files are read and worked on in such parts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import regex

from lfs_cli.errors import ConfigError, DataError, did_you_mean
from lfs_cli.tokenizer.unicode_classes import LETTER, LOWER, MARK, NUMBER, OTHER, SPACE, UPPER, class_of

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's words. From left to right, the first alternative that fits:

    '(?:[sdmt]|ll|ve|re)    the end of a contraction: 's 'd 'm 't 'll 've 're
    ' ?\\p{L}+'              letters, with the space before them
    ' ?\\p{N}+'              numbers, with the space before them
    ' ?[^\\s\\p{L}\\p{N}]+'    anything else that is not white space, with the space before it
    '\\s+(?!\\S)'            white space, but its last character when a word follows
    '\\s+'                  that last character, when it is not a plain space

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.
"""

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"
)
"""GPT-4's words: numbers in groups of three, line ends apart or with the punctuation before them.

tiktoken writes possessive quantifiers and `$`, which other engines read in other ways; this spelling cuts the same.
"""

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""GPT-4o's words: those of GPT-4, cut before a capital inside a word, with contractions left on their word."""

_NO_SPACE_BEFORE = (
    rb"(?<=[!-~\x80-\xff])(?<!\xc2\x85)(?<!\xc2\xa0)(?<!\xe1\x9a\x80)"
    rb"(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)"
)
_LETTER_AND_DIGIT = rb"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"

CUT_GPT2 = _NO_SPACE_BEFORE + rb"(?=[\t-\r ])|" + _LETTER_AND_DIGIT
"""Where GPT-2's words always end: before white space after anything else, and between a letter and a digit."""

CUT_GPT4 = rb"(?<=[A-Za-z0-9])(?=[\t-\r ])|(?<=[\r\n])(?=[A-Za-z0-9])|" + _LETTER_AND_DIGIT
"""The same for GPT-4 and GPT-4o, where punctuation takes the line ends that follow it."""


PATIENCE_SECONDS = 2.0
SLOWEST_CHARACTERS = 20_000
"""Time that a foreign pattern may take for a text: so many seconds, and one for each so many characters."""

LONG_S = 0x017F
"""The long s, the one letter beyond ASCII that ends a contraction when case does not count."""


@dataclass(frozen=True)
class Pattern:
    """A rule that cuts text into words.

    Args:
        name: Its name in configs; for a foreign pattern without one, its expression.
        expression: What a word is, for the `regex` module.
        cut: Expression over UTF-8 bytes that matches, with no width, only where the text may be cut in two without
            changing a word. None when no such places are known: then only special tokens divide a text.
        spellings: Other expressions, found in files of other libraries, that cut the same words.
        scanner: Name of the compiled loop that cuts the same words (`loops_scan.py`), None when there is none.
    """

    name: str
    expression: str
    cut: bytes | None = None
    spellings: tuple[str, ...] = ()
    scanner: str | None = None

    def split(self, text: str) -> Iterator[str]:
        """Yield the words of ``text``, which together are all of it: what no word matches is one, too."""
        last = 0
        for match in self._matches(text):
            if match.start() > last:
                yield text[last : match.start()]
            if match.end() > match.start():
                yield match.group()
            last = match.end()
        if last < len(text):
            yield text[last:]

    def _matches(self, text: str) -> Iterator["regex.Match[str]"]:
        """Yield the matches in ``text``. Raises DataError when the expression, perhaps a stranger's, is too slow."""
        seconds = PATIENCE_SECONDS + len(text) / SLOWEST_CHARACTERS
        matches = self._words.finditer(text, timeout=seconds)
        while True:
            began = perf_counter()
            try:
                match = next(matches, None)
            except TimeoutError:
                match, seconds = None, 0
            seconds -= perf_counter() - began  # what the caller does with a match does not count
            if seconds <= 0:
                raise DataError(
                    f"the pattern `{self.expression[:60]}` takes too long on this text",
                    hint=f"use a tokenizer with another pattern, such as {' or '.join(PATTERNS)}",
                )
            if match is None:
                return
            yield match

    def find_cut(self, data: bytes | bytearray | memoryview, stop: int, start: int = 1) -> int:
        """Return the last place, from ``start`` to ``stop``, where ``data`` may be cut; 0 when there is none.

        Args:
            data: UTF-8 bytes, with at least one more byte after ``stop`` unless the text ends there.
            stop: Index into ``data``.
            start: The same, at least 1.
        """
        if self._cuts is None:
            return 0
        window = 64  # the nearest cut is some letters away, but for text without spaces
        while True:
            first, found = max(start, stop - window), 0
            for match in self._cuts.finditer(data, first, stop + 1):
                found = match.start() if match.start() <= stop else found
            if found or first == start:
                return found
            window *= 8

    @cached_property
    def _words(self) -> "regex.Pattern[str]":
        try:
            return regex.compile(self.expression)
        except regex.error as error:
            raise DataError(
                f"the pattern `{self.expression}` cannot be used: {error}", hint=f"choose one of: {', '.join(PATTERNS)}"
            ) from None

    @cached_property
    def _cuts(self) -> re.Pattern[bytes] | None:
        return re.compile(self.cut) if self.cut is not None else None


class _PinnedPattern(Pattern):
    """A pattern over the pinned classes, so that its words do not depend on the installed `regex`.

    Each character beyond ASCII is replaced by a fixed one of its class before the expression looks at it.
    """

    def split(self, text: str) -> Iterator[str]:
        stand_ins = text if text.isascii() else text.translate(_STAND_INS)
        for match in self._words.finditer(stand_ins):
            yield text[match.start() : match.end()]


class _StandIns(dict[int, int]):
    """Code point -> one that every version of Unicode puts into the same class; filled as characters are met."""

    def __missing__(self, code: int) -> int:
        stand_in = code if code < 0x80 or code == LONG_S else _REPRESENTATIVES[class_of(code)]
        if len(self) < 4096:
            self[code] = stand_in
        return stand_in


_REPRESENTATIVES = {
    OTHER: 0x00A1, UPPER: 0x00C9, LOWER: 0x00E9, LETTER: 0x4E2D, MARK: 0x0301, NUMBER: 0x00B2, SPACE: 0x00A0,
}  # fmt: skip
_STAND_INS = _StandIns()

PATTERNS: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        _PinnedPattern(
            "gpt2",
            GPT2,
            CUT_GPT2,
            spellings=(
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
                r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            ),
            scanner="scan_gpt2",
        ),
        _PinnedPattern(
            "cl100k",
            CL100K,
            CUT_GPT4,
            spellings=(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
                r"|\s*[\r\n]|\s+(?!\S)|\s",
            ),
            scanner="scan_cl100k",
        ),
        _PinnedPattern("o200k", O200K, CUT_GPT4, scanner="scan_o200k"),
    )
}
"""Patterns by the names that a config uses."""


def find_pattern(name: str) -> Pattern:
    """Return the registered pattern called ``name``. Raises ConfigError that suggests the nearest name."""
    if name not in PATTERNS:
        raise ConfigError(f"unknown pattern `{name}`", hint=did_you_mean(name, PATTERNS))
    return PATTERNS[name]


def pattern_for(expression: str) -> Pattern:
    """Return the registered pattern that ``expression`` spells, or a new one that may only be cut at special tokens."""
    for pattern in PATTERNS.values():
        if expression in (pattern.expression, *pattern.spellings):
            return pattern
    return Pattern(expression, expression)
