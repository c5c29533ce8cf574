"""Texts that are awkward to tokenize, for property tests."""

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings, strategies

AWKWARD = [
    "'", "'s", "'t", "'ll", "'ve", "'re", "'S", "l", "v", "re", "a", "Zb", "é", "ß", "中文", "\u01c5", "a\u0304\u0301",
    "1", "23", "\u00b2", "\u2167", "\u0663", " ", "  ", "\t", "\n", "\r\n", "\n\n", "\x0b", "\x1c", "\x85", "\xa0",
    "\u2003", "\u2028", "\u3000", "\u200b", "\ufeff", "!", "...", "_", "€", "😀", "\U0001f469\u200d\U0001f467", "\x00",
    "\ufffd", "<|endoftext|>", "<|endo", "|>", "ABCabc", "/", "a b", "wonderful", "wonderfully",
]  # fmt: skip

texts = strategies.one_of(
    strategies.lists(strategies.sampled_from(AWKWARD), max_size=40).map("".join),
    strategies.text(max_size=60),
)
NOT_UTF8 = [
    b"\xe0\x81\x81",
    b"\xc1\x81",
    b"\xf0\x80\x81\x81",
    b"\xed\xa1\x81",
    b"\xf4\x90\x80\x80",
    b"\xe4\xb8",
    b"\x81",
]
any_bytes = strategies.one_of(
    strategies.binary(max_size=60),
    strategies.lists(
        strategies.one_of(
            strategies.sampled_from([text.encode() for text in AWKWARD] + 3 * NOT_UTF8), strategies.binary(max_size=2)
        ),
        max_size=30,
    ).map(b"".join),
)


def for_all(**values: strategies.SearchStrategy) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a test on a few dozen drawn values, however long each takes."""
    return lambda test: settings(max_examples=60, deadline=None)(given(**values)(test))
