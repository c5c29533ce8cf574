"""Reading the files of strangers: what is missing, damaged or hostile becomes a message, never a crash or a hang."""

import json
from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import regex

from lfs_cli.errors import DataError
from lfs_cli.tokenizer.blocks import reading
from lfs_cli.tokenizer.formats.spelling import read_token
from lfs_cli.tokenizer.split import PATTERNS, Pattern, pattern_for

Vocab = dict[int, bytes]
Merges = list[tuple[bytes, bytes]]

RELEARN = "fetch the file again, or learn a tokenizer with `lfs tokenize`"

LARGEST_FILE = 1 << 26
"""Bytes beyond which a file is not read, since what it holds may take thirty times that in memory. The largest
tokenizers in use take half of it."""

LARGEST_ID = (1 << 24) - 1
"""The largest id that is believed: every array with a row for each id has to fit into memory."""


PROBES = tuple(
    start * 100 + end for start in ("a", "A", "ab", "1", " ", "\n", "!", "\u00e9") for end in ("", "x", "!", " ")
)
"""Texts on which a foreign pattern has to be quick: runs, which make a careless expression try everything."""

PROBE_SECONDS = 0.5


class Content(NamedTuple):
    """What a tokenizer consists of, in the order of `Tokenizer`'s arguments."""

    vocab: Vocab
    merges: Merges
    special_tokens: list[str]
    pattern: Pattern
    whole_words: tuple[bytes, ...] = ()


def read_text(path: Path) -> str:
    """Return the text of a file. Raises DataError when it is none, or not a file, or too large."""
    with reading(path):
        size = path.stat().st_size
        if not path.is_file() and not path.is_dir():
            raise DataError(f"`{path}` is not a regular file", hint="copy it into one first")
        if size > LARGEST_FILE:
            raise DataError(f"`{path}` has {size:,} bytes, which no tokenizer has", hint="name a tokenizer's file")
        data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not text in UTF-8 (byte {error.start})", hint=RELEARN) from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises DataError when it is none."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path) -> Any:
    """Return what the JSON ``text`` of the file ``path`` holds. Raises DataError when it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"`{path}` is not JSON: {error.msg.lower()} in line {error.lineno}, column {error.colno}", hint=RELEARN
        ) from None
    except (RecursionError, ValueError):
        raise DataError(f"`{path}` is not the JSON of a tokenizer", hint=RELEARN) from None


def expect(value: Any, kind: type, what: str, path: Path) -> Any:
    """Return ``value`` when it is of the right kind. Raises DataError."""
    if not isinstance(value, kind):
        raise DataError(f"`{path}` does not hold {what}", hint=RELEARN)
    return value


def check_id(id: Any, token: str, path: Path) -> int:
    """Return the id that a file gives to ``token``. Raises DataError when it is none."""
    if type(id) is not int or id < 0:
        raise DataError(f"the token `{token[:40]}` of `{path}` has the id `{json.dumps(id)[:40]}`", hint=RELEARN)
    if id > LARGEST_ID:
        raise DataError(f"`{path}` has the id `{str(id)[:40]}`, which is beyond {LARGEST_ID:,}", hint=RELEARN)
    return id


def read_vocab(named: Any, path: Path) -> Vocab:
    """Return id -> bytes for an object of tokens, spelled as GPT-2 does, and their ids. Raises DataError."""
    vocab: Vocab = {}
    for text, id in expect(named, dict, "an object of tokens and ids", path).items():
        if not text:
            raise DataError(f"`{path}` has a token without text", hint=RELEARN)
        if check_id(id, text, path) in vocab:
            raise DataError(f"two tokens of `{path}` have the id `{id}`", hint=RELEARN)
        vocab[id] = read_token(text)
    if not vocab:
        raise DataError(f"`{path}` has an empty vocabulary", hint=RELEARN)
    return vocab


def usable_pattern(expression: str, path: Path) -> Pattern:
    """Return the pattern of an expression in a file. Raises DataError when it cannot be compiled or is too slow."""
    pattern = pattern_for(expression)
    if pattern.name in PATTERNS:
        return pattern
    try:
        compiled = regex.compile(expression)
        for probe in PROBES:
            compiled.findall(probe, timeout=PROBE_SECONDS)
    except regex.error as error:
        problem = f"cannot be used: {error}"
    except TimeoutError:
        problem = "takes too long on a run of equal characters"
    except (RecursionError, OverflowError, MemoryError, ValueError):
        problem = "cannot be used"
    else:
        return pattern
    raise DataError(f"the pattern `{expression[:60]}` of `{path}` {problem}", hint=RELEARN)


def check_merges(vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]], path: Path) -> None:
    """Raise DataError, naming the file, when bytes or the tokens of a merge are not in the vocabulary."""
    tokens = set(vocab.values())
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise DataError(
            f"`{path}` lacks {len(missing)} of the 256 single bytes, such as `0x{missing[0]:02x}`",
            hint="use a byte-level BPE tokenizer, such as one learned by `lfs tokenize`",
        )
    for number, (left, right) in enumerate(merges, start=1):
        if left not in tokens or right not in tokens or left + right not in tokens:
            raise DataError(
                f"merge {number} of `{path}`, {left[:40]!r} and {right[:40]!r}, has a token that the vocabulary lacks",
                hint="use the vocabulary and the merges of one tokenizer",
            )


def merge_down(token: bytes, rank_of: Callable[[bytes, bytes], int | None], parts: int) -> list[bytes]:
    """Return the parts of ``token`` as byte-level BPE leaves it, the merges of lowest rank first.

    Args:
        token: Bytes of one word.
        rank_of: Place of the merge of two neighbours, None when they are none.
        parts: Stop when this many are left, which may be never.

    In O(n log n) for n bytes: a heap of (rank, place) over a linked list, in which an entry that no longer holds is
    dropped when it comes up.
    """
    pieces = [token[i : i + 1] for i in range(len(token))]
    after, before = list(range(1, len(pieces) + 1)), list(range(-1, len(pieces) - 1))
    heap = [(rank, i) for i, pair in enumerate(pairwise(pieces)) if (rank := rank_of(*pair)) is not None]
    heapify(heap)
    left = len(pieces)
    while heap and left > parts:
        rank, i = heappop(heap)
        j = after[i]
        if not pieces[i] or j >= len(pieces) or rank_of(pieces[i], pieces[j]) != rank:
            continue
        pieces[i], pieces[j] = pieces[i] + pieces[j], b""
        after[i] = after[j]
        if after[i] < len(pieces):
            before[after[i]] = i
        left -= 1
        for start, end in ((before[i], i), (i, after[i])):
            if start >= 0 and end < len(pieces) and (rank := rank_of(pieces[start], pieces[end])) is not None:
                heappush(heap, (rank, start))
    return [piece for piece in pieces if piece]
