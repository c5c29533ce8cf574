"""tiktoken's rank files: a token in base64 and its rank, line by line.

    IQ== 0          the byte `!`
    ...
    IHRoZQ== 262    ` the`

The rank is both the id and the place in the list of merges: of all neighbours in a word that together are a token, the
pair whose token has the lowest rank is merged first. So the merges are not in the file, but they follow from it. The
last two tokens that are left when a token's own bytes are merged are the only pair that ever makes it: inside a longer
word the same merges happen among these bytes, in the same order, or the token does not arise at all.

The pattern and the special tokens are not in the file either. They are told by whoever asks, or by a second file that
lfs writes beside it, or by a name that OpenAI has given:

    <name>.tiktoken.json    {"name": ..., "pat_str": ..., "special_tokens": {...}}    arguments of `tiktoken.Encoding`

Source of the names and special tokens: `tiktoken_ext/openai_public.py` of tiktoken 0.14.
"""

import base64
import binascii
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lfs_cli.errors import DataError
from lfs_cli.tokenizer.blocks import reading, replace_file
from lfs_cli.tokenizer.formats.checks import (
    RELEARN,
    Content,
    Merges,
    check_id,
    check_merges,
    expect,
    merge_down,
    read_json,
    read_text,
    usable_pattern,
)
from lfs_cli.tokenizer.split import PATTERNS, Pattern

SUFFIX = ".tiktoken"

KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": ("gpt2", {"<|endoftext|>": 50256}),
    "r50k_base": ("gpt2", {"<|endoftext|>": 50256}),
    "p50k_base": ("gpt2", {"<|endoftext|>": 50256}),
    "cl100k_base": (
        "cl100k",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": ("o200k", {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
"""Name of an encoding -> its pattern and its special tokens."""

LONGEST_TOKEN = 4096
"""Bytes of a token beyond which a file is refused: finding its merges would take long, and no vocabulary has it."""

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2}[ \t]+[0-9]+[ \t]*(?:\r?\n|\Z)")


def is_rank_file(path: Path) -> bool:
    """Return whether a file is one of ranks, by its name or its first line. Raises DataError when it cannot be read."""
    if path.name.endswith(SUFFIX):
        return True
    if not path.is_file():
        return False
    with reading(path), path.open("rb") as file:
        return _LINE.match(file.read(2 * LONGEST_TOKEN)) is not None


def read_ranks(path: Path, pattern: Pattern | None, special_tokens: Sequence[str] | None) -> Content:
    """Return what a rank file says, with the merges that follow from it.

    Args:
        path: The file.
        pattern: How text is cut into words; None takes it from the file beside it or from a known name.
        special_tokens: Texts that become one token each, with the next free ids where they have none; None takes them
            from the same places.

    Raises:
        DataError: When the file is damaged, or nothing tells its pattern.
    """
    ranks = _ranks(path)
    told_pattern, special_ids = _told(path)
    pattern = pattern or told_pattern
    if pattern is None:
        raise DataError(
            f"`{path}` does not say how text is cut into words",
            hint=f"name the pattern, {' or '.join(f'`{name}`' for name in PATTERNS)}: "
            f"`lfs tokenize --tokenizer {path} --pattern cl100k --export huggingface`",
        )
    if special_tokens is not None:
        special_ids = {text: id for text, id in special_ids.items() if text in special_tokens}
    merges, unreachable = recover_merges(ranks)
    vocab = {rank: token for token, rank in ranks.items()}
    for text, id in special_ids.items():
        if vocab.setdefault(id, text.encode()) != text.encode():
            raise DataError(f"the special token `{text}` of `{path}` has the id `{id}` of another token", hint=RELEARN)
    check_merges(vocab, merges, path)
    special = list(special_ids if special_tokens is None else special_tokens)
    return Content(vocab, merges, special, pattern, tuple(unreachable))


def recover_merges(ranks: Mapping[bytes, int]) -> tuple[Merges, list[bytes]]:
    """Return the merges that ``ranks`` stand for, in order, and the tokens that merging never arrives at.

    >>> recover_merges({b"a": 0, b"b": 1, b"ab": 2, b"abab": 3})
    ([(b'a', b'b'), (b'ab', b'ab')], [])
    """
    merges: Merges = []
    unreachable = []
    look_up = ranks.get
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = merge_down(token, lambda left, right: look_up(left + right), 2)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            unreachable.append(token)
    return merges, unreachable


def export_ranks(
    folder: Path,
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_ids: Mapping[str, int],
    pattern: Pattern,
    whole_words: Collection[bytes] = (),
) -> list[Path]:
    """Write `tokenizer.tiktoken`, and the other arguments of `tiktoken.Encoding` beside it; return both paths.

    Raises:
        DataError: When ids are not in the order of the merges, as they are for all tokenizers that lfs learns, so that
            ranks would stand for other merges; or when the files cannot be written.
    """
    specials = set(special_ids.values())
    ranks = {token: id for id, token in sorted(vocab.items()) if id not in specials}
    longest = max(ranks, key=len)
    if len(longest) > LONGEST_TOKEN:
        _refuse(f"a token has {len(longest):,} bytes, more than {LONGEST_TOKEN:,}")
    made = [ranks.get(left + right, -1) for left, right in merges]
    if len(ranks) + len(specials) < len(vocab) or made != sorted(made) or min(made, default=0) < 0:
        _refuse("the ids of its tokens are not in the order of its merges")
    found, unreachable = recover_merges(ranks)
    if set(unreachable) != set(whole_words) or not set(found) <= set(merges):
        _refuse("its tokens, merged by their ids, do not give its merges")
    path = folder / f"tokenizer{SUFFIX}"
    lines = [f"{base64.b64encode(token).decode()} {id}\n" for token, id in ranks.items()]
    arguments = {"name": "tokenizer", "pat_str": pattern.expression, "special_tokens": dict(special_ids)}
    replace_file(path, "".join(lines))
    replace_file(_beside(path), json.dumps(arguments, ensure_ascii=False, indent=1) + "\n")
    return [path, _beside(path)]


def _refuse(why: str) -> None:
    raise DataError(
        f"tiktoken cannot have this tokenizer: {why}", hint="write `tokenizer.json` instead: `--export huggingface`"
    )


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _told(path: Path) -> tuple[Pattern | None, dict[str, int]]:
    """Return the pattern and the special tokens that another file or the name tells."""
    if _beside(path).exists():
        tree = expect(read_json(_beside(path)), dict, "an object", _beside(path))
        expression = expect(tree.get("pat_str"), str, "a text `pat_str`", _beside(path))
        named = expect(tree.get("special_tokens", {}), dict, "an object `special_tokens`", _beside(path))
        pattern = usable_pattern(expression, _beside(path))
        return pattern, {text: check_id(id, text, _beside(path)) for text, id in named.items() if text}
    name, special_ids = KNOWN.get(path.name.removesuffix(SUFFIX), (None, {}))
    return (PATTERNS[name] if name else None), dict(special_ids)


def _ranks(path: Path) -> dict[bytes, int]:
    """Return the ranks in a file. Raises DataError, naming the line that cannot be read."""
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        parts = line.split()
        if not parts:
            continue
        try:
            text, digits = parts
            token, rank = binascii.a2b_base64(text, strict_mode=True), int(digits)
            if rank < 0 or not token:
                raise ValueError
        except ValueError:
            raise DataError(
                f"line {number} of `{path}` is not a token in base64 and its rank: `{line[:40]}`", hint=RELEARN
            ) from None
        if len(token) > LONGEST_TOKEN:
            raise DataError(f"line {number} of `{path}` has a token of {len(token):,} bytes", hint=RELEARN)
        check_id(rank, text, path)
        if token in ranks or rank in seen:
            raise DataError(f"line {number} of `{path}` has a token or a rank a second time", hint=RELEARN)
        ranks[token] = rank
        seen.add(rank)
    return ranks
