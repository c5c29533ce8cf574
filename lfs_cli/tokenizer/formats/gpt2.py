"""GPT-2's two files: a vocabulary and a list of merges.

    vocab.json    {"!": 0, ..., "Ġthe": 262, ..., "<|endoftext|>": 50256}
    merges.txt    #version: 0.2
                  Ġ t
                  h e

They have no place for the pattern, which is taken to be GPT-2's, and do not mark special tokens: a token that is
neither a byte nor made by a merge is one.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lfs_cli.errors import DataError
from lfs_cli.tokenizer.blocks import replace_file
from lfs_cli.tokenizer.formats.checks import (
    RELEARN,
    Content,
    Merges,
    Vocab,
    check_merges,
    read_json,
    read_text,
    read_vocab,
)
from lfs_cli.tokenizer.formats.spelling import read_token, write_token
from lfs_cli.tokenizer.split import PATTERNS, Pattern


def read_gpt2(vocab_path: Path, merges_path: Path) -> tuple[Vocab, Merges]:
    """Return vocabulary and merges of GPT-2's two files. Raises DataError."""
    vocab = read_vocab(read_json(vocab_path), vocab_path)
    merges: Merges = []
    for number, line in enumerate(read_text(merges_path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise DataError(f"line {number} of `{merges_path}` is not two tokens: `{line[:40]}`", hint=RELEARN)
        merges.append((read_token(parts[0]), read_token(parts[1])))
    check_merges(vocab, merges, merges_path)
    return vocab, merges


def read_gpt2_with_specials(
    vocab_path: Path, merges_path: Path, pattern: Pattern | None, special_tokens: Sequence[str] | None
) -> Content:
    """Return what the two files say, with the special tokens among the vocabulary unless others are given."""
    vocab, merges = read_gpt2(vocab_path, merges_path)
    made = {left + right for left, right in merges}
    found = []
    for id, token in sorted(vocab.items()):
        if len(token) > 1 and token not in made:
            try:
                found.append(token.decode())
            except UnicodeDecodeError:
                raise DataError(
                    f"token {id} of `{vocab_path}` is not made by any merge of `{merges_path}`",
                    hint="use the two files of one tokenizer",
                ) from None
    return Content(vocab, merges, list(special_tokens or found), pattern or PATTERNS["gpt2"])


def write_gpt2(
    folder: Path, vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]], special_ids: Mapping[str, int]
) -> tuple[Path, Path]:
    """Write `vocab.json` and `merges.txt` into ``folder`` and return their paths. Raises DataError."""
    texts = {id: text for text, id in special_ids.items()}
    named: dict[str, int] = {}
    for id, token in sorted(vocab.items()):
        text = texts.get(id) or write_token(token)
        if named.setdefault(text, id) != id:
            raise DataError(
                f"two tokens are both written `{text}` in GPT-2's files, those with the ids {named[text]} and {id}",
                hint="keep this tokenizer as `tokenizer.json`",
            )
    misread = [text for text in special_ids if read_token(text) != text.encode()]
    if misread:  # such as `éé`, which spells the bytes 0xE9 0xE9 there
        raise DataError(
            f"GPT-2's files cannot have the special token `{misread[0]}`: it spells other bytes there",
            hint="write `tokenizer.json` instead: `--export huggingface`",
        )
    lines = ["#version: 0.2", *(f"{write_token(left)} {write_token(right)}" for left, right in merges)]
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    replace_file(vocab_path, json.dumps(named, ensure_ascii=False) + "\n")
    replace_file(merges_path, "\n".join(lines) + "\n")
    return vocab_path, merges_path


def export_gpt2(
    folder: Path,
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_ids: Mapping[str, int],
    pattern: Pattern,
    whole_words: Collection[bytes] = (),
) -> list[Path]:
    """Write the two files for others to read. Raises DataError where they would give other ids."""
    if pattern.expression != PATTERNS["gpt2"].expression:
        raise DataError(
            f"GPT-2's files have no place for the pattern `{pattern.name}`",
            hint="write `tokenizer.json` instead: `--export huggingface`",
        )
    if whole_words:
        raise DataError(
            f"GPT-2's files have no place for {len(whole_words):,} tokens that no merges lead to",
            hint="write `tokenizer.json` instead: `--export huggingface`",
        )
    return list(write_gpt2(folder, vocab, merges, special_ids))
