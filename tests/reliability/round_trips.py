"""Round trips of text: every code point of Unicode and random bytes, encoded and decoded in every way there is.

The ways are the Python loop, the compiled loops, the stream of a text that is being written and a file; the
vocabularies are learned ones, and GPT-2's where its files are given.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

from lfs_cli.tokenizer import Tokenizer, learn_bpe
from tests.reliability.formats import STORY

NAME = "round_trips"
HELP = "every code point and 8 MB of random bytes, encoded and decoded in Python and compiled, whole and streamed"

SURROGATES = range(0xD800, 0xE000)
CHUNK = 4_096
"""Characters encoded at once: enough for the compiled loops, few enough to show where a difference is."""


def learned(pattern: str = "gpt2") -> Tokenizer:
    """Return a tokenizer learned on a story, with tokens of half a character as all learned ones may have."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(STORY + "\u00e9\u00e8\u4e2d\u4e2e\U0001f600\U0001f601" * 50, encoding="utf-8")
        vocab, merges = learn_bpe(path, 400, [], pattern=pattern)
    return Tokenizer(vocab, merges, ["<|endoftext|>"], pattern=pattern)


def every_character(stride: int = 1) -> Iterator[str]:
    """Yield texts that together hold every ``stride``-th code point but the surrogates, which no UTF-8 holds."""
    codes = [code for code in range(0, sys.maxunicode + 1, stride) if code not in SURROGATES]
    for start in range(0, len(codes), CHUNK):
        yield "".join(map(chr, codes[start : start + CHUNK]))


def complaints_about_text(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return which ways of encoding and decoding ``text`` do not give it back or do not agree."""
    plain = [id for ids in tokenizer._encode_words(text.encode(), tokenizer._specials) for id in ids]
    found = []
    if tokenizer.decode(plain) != text:
        found.append("Python")
    if (
        tokenizer._can_compile
        and tokenizer._compiled().encode_texts([text], tokenizer._specials, tokenizer._special_bytes, 1)[0].tolist()
        != plain
    ):
        found.append("compiled")
    if list(tokenizer.encode_iterable([text[:7], text[7:]])) != plain:
        found.append("iterable")
    stream = tokenizer.stream()
    pieces = [*(stream.feed(id) for id in plain), stream.flush()]
    if "".join(pieces) != text or ("\ufffd" not in text and any("\ufffd" in piece for piece in pieces)):
        found.append("stream")
    return found


def complaints_about_bytes(tokenizer: Tokenizer, data: bytes, folder: Path) -> list[str]:
    """Return which ways of encoding ``data``, which need not be UTF-8, do not give it back."""
    path = folder / "bytes"
    path.write_bytes(data)
    from_file = [id for ids in tokenizer.encode_file(path, workers=1) for id in ids.tolist()]
    plain = [id for ids in tokenizer._encode_words(data, tokenizer._specials) for id in ids]
    found = []
    if tokenizer.decode_bytes(from_file) != data:
        found.append("file")
    if tokenizer.decode_bytes(tokenizer.encode_array(data)) != data:
        found.append("array")
    if tokenizer.decode_bytes(plain) != data:
        found.append("Python")
    stream = tokenizer.stream()
    text = "".join([*map(stream.feed, plain), stream.flush()])
    if text != data.decode("utf-8", "replace"):
        found.append("stream")
    return found


def main(arguments: list[str]) -> int:
    """Try them all, print how many and return 1 when one was lost."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.reliability {NAME}", description=HELP)
    parser.add_argument("--short", action="store_true", help="every 61st code point and 1 MB")
    parser.add_argument("--tokenizer", action="append", default=[], help="another one, such as GPT-2's files")
    options = parser.parse_args(arguments)
    stride, megabytes = (61, 1) if options.short else (1, 8)
    tokenizers = {pattern: learned(pattern) for pattern in ("gpt2", "cl100k", "o200k")}
    tokenizers |= {name: Tokenizer.load(name) for name in options.tokenizer}
    random, broken = Random(0), 0
    print("tokenizer\tcode points\tMB of bytes\tbroken")
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in tokenizers.items():
            characters, lost = 0, []
            for text in every_character(stride):
                characters += len(text)
                lost += complaints_about_text(tokenizer, text)
            for _ in range(megabytes):
                lost += complaints_about_bytes(tokenizer, random.randbytes(1_000_000), Path(folder))
            print(name, f"{characters:,}", megabytes, f"{len(lost)} {sorted(set(lost))}", sep="\t", flush=True)
            broken += len(lost)
    return 1 if broken else 0
