"""Hugging Face's `tokenizer.json`, which is also what lfs itself writes.

    {"added_tokens": [{"id": 50256, "content": "<|endoftext|>", ...}],
     "pre_tokenizer": {"type": "ByteLevel", "use_regex": true, ...},         GPT-2's pattern
     "model": {"type": "BPE", "vocab": {...}, "merges": [["Ġ", "t"], ...]}, ...}

Another pattern is a sequence: a `Split` by its expression, then a `ByteLevel` without one, as in the files of Llama 3
and of GPT-4's conversions. Added tokens need not be in the vocabulary. A merge is `["a", "b"]`, or `"a b"` in older
files.

`ignore_merges` means that a word which is a token as a whole is not merged. That changes nothing where merges lead to
every token; those that they do not lead to are the tokenizer's `whole_words`.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lfs_cli.errors import DataError
from lfs_cli.tokenizer.blocks import replace_file
from lfs_cli.tokenizer.formats.checks import (
    RELEARN,
    Content,
    check_id,
    check_merges,
    expect,
    merge_down,
    parse_json,
    read_text,
    read_vocab,
    usable_pattern,
)
from lfs_cli.tokenizer.formats.seal import BLANK, check_seal, seal
from lfs_cli.tokenizer.formats.spelling import read_token, write_token
from lfs_cli.tokenizer.split import PATTERNS, Pattern

_log = logging.getLogger(__name__)


def read_huggingface(path: Path) -> Content:
    """Return what a `tokenizer.json` says. Raises DataError when it is damaged or asks for what lfs does not do."""
    text = read_text(path)
    check_seal(text, path)
    tree = expect(parse_json(text, path), dict, "an object", path)
    model = expect(tree.get("model"), dict, "a `model`", path)
    _refuse_foreign(tree, model, path)
    special_ids = _added_tokens(tree.get("added_tokens") or [], path)
    named = expect(model.get("vocab"), dict, "a vocabulary", path)
    ordinary = {text: id for text, id in named.items() if special_ids.get(text) != id}
    vocab = read_vocab(ordinary, path)
    merges = [_merge(item, path) for item in expect(model.get("merges"), list, "a list of merges", path)]
    for text, id in special_ids.items():
        if vocab.setdefault(id, text.encode()) != text.encode():
            raise DataError(f"two tokens of `{path}` have the id `{id}`", hint=RELEARN)
    check_merges(vocab, merges, path)
    whole_words = _unreachable(vocab, merges, set(special_ids.values())) if model.get("ignore_merges") else []
    pattern = _pattern(tree.get("pre_tokenizer"), path)
    added = _tokens_around(tree.get("post_processor"))
    if added:
        _log.info("%s puts %s around each text when asked to; lfs leaves that to the caller", path, " and ".join(added))
    return Content(vocab, merges, list(special_ids), pattern, tuple(whole_words))


def write_huggingface(
    folder: Path,
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_ids: Mapping[str, int],
    pattern: Pattern,
    *,
    ignore_merges: bool = False,
) -> Path:
    """Write `tokenizer.json` into ``folder`` and return its path. Raises DataError."""
    ids_of_specials = set(special_ids.values())
    named = {write_token(token): id for id, token in sorted(vocab.items()) if id not in ids_of_specials}
    next_id = len(named)
    for text, id in sorted(special_ids.items(), key=lambda item: item[1]):
        if id == next_id:  # `tokenizers` numbers added tokens after the vocabulary, in order
            next_id += 1
        else:
            named.setdefault(text, id)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern.expression}, "behavior": "Isolated", "invert": False}
    inner = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = sorted(special_ids.items(), key=lambda item: item[1])
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **flags} for text, id in added],
        "normalizer": None,
        "pre_tokenizer": byte_level if pattern.name == "gpt2" else inner,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "checksum": BLANK,
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(sorted(named.items(), key=lambda item: item[1])),
            "merges": [[write_token(left), write_token(right)] for left, right in merges],
        },
    }
    path = folder / "tokenizer.json"
    replace_file(path, seal(json.dumps(tree, ensure_ascii=False, indent=1) + "\n"))
    return path


def export_huggingface(
    folder: Path,
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_ids: Mapping[str, int],
    pattern: Pattern,
    whole_words: Collection[bytes] = (),
) -> list[Path]:
    """Write `tokenizer.json`, and `tokenizer_config.json` for `transformers.AutoTokenizer`; return their paths.

    Raises:
        DataError: When a special token is written like another token, which others would take for it; or when the
            files cannot be written.
    """
    ids_of_specials = set(special_ids.values())
    spelled = {write_token(token) for id, token in vocab.items() if id not in ids_of_specials}
    taken = [text for text in special_ids if text in spelled]
    if taken:
        raise DataError(
            f"the special token `{taken[0]}` is written like another token, which `tokenizers` would take for it",
            hint="learn the tokenizer with another special token, such as `<|endoftext|>`",
        )
    end = "<|endoftext|>" if "<|endoftext|>" in special_ids else None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "bos_token": end,
    }
    path = write_huggingface(folder, vocab, merges, special_ids, pattern, ignore_merges=bool(whole_words))
    config_path = folder / "tokenizer_config.json"
    replace_file(config_path, json.dumps(settings, indent=1) + "\n")
    return [path, config_path]


def _merge(item: Any, path: Path) -> tuple[bytes, bytes]:
    """Return one merge, which is written `["a", "b"]`, or `"a b"` by older versions."""
    parts = item.split(" ") if isinstance(item, str) else item
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise DataError(f"`{path}` has the merge `{json.dumps(item)[:40]}`, which is not two tokens", hint=RELEARN)
    return read_token(parts[0]), read_token(parts[1])


def _added_tokens(items: Any, path: Path) -> dict[str, int]:
    """Return the added tokens, which are found in the text before it is split, and their ids."""
    special_ids = {}
    for item in expect(items, list, "a list of added tokens", path):
        match item:
            case {"content": str(text), "id": id} if text and _is_utf8(text):
                for flag in ("lstrip", "rstrip", "single_word"):
                    if item.get(flag):
                        _refuse(f"`{flag}` for the token `{text}`", path)
                special_ids[text] = check_id(id, text, path)
            case _:
                raise DataError(f"`{path}` has the added token `{json.dumps(item)[:60]}`", hint=RELEARN)
    return dict(sorted(special_ids.items(), key=lambda item: item[1]))


def _refuse_foreign(tree: Mapping[str, Any], model: Mapping[str, Any], path: Path) -> None:
    """Raise DataError for anything that would change ids and that lfs does not do."""
    kind = model.get("type", "BPE")
    if kind != "BPE":
        _refuse(f"the model `{kind}`", path)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            _refuse(f"`{name}`", path)
    if tree.get("normalizer"):
        _refuse("a normalizer", path)


def _unreachable(vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]], specials: set[int]) -> list[bytes]:
    """Return the tokens that merging their own bytes does not give."""
    places: dict[tuple[bytes, bytes], int] = {}
    for place, pair in enumerate(merges):
        places.setdefault(pair, place)
    tokens = [token for id, token in sorted(vocab.items()) if id not in specials]
    return [token for token in tokens if len(merge_down(token, lambda left, right: places.get((left, right)), 1)) > 1]


def _tokens_around(tree: Any) -> list[str]:
    """Return the special tokens that a `post_processor` puts around a single text."""
    match tree:
        case {"type": "Sequence", "processors": [*processors]}:
            return [text for processor in processors for text in _tokens_around(processor)]
        case {"type": "TemplateProcessing", "single": [*parts]}:
            return [f"`{part['SpecialToken'].get('id')}`" for part in parts if _is_special_part(part)]
        case {"type": "RobertaProcessing" | "BertProcessing", "cls": cls, "sep": sep}:
            return [f"`{pair[0]}`" for pair in (cls, sep) if isinstance(pair, list) and pair]
    return []


def _is_special_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("SpecialToken"), dict)


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse(what: str, path: Path) -> None:
    raise DataError(
        f"`{path}` asks for {what}, which lfs does not do",
        hint="use a byte-level BPE tokenizer without it, such as GPT-2's",
    )


def _pattern(tree: Any, path: Path) -> Pattern:
    """Return the pattern that a `pre_tokenizer` describes."""
    match tree:
        case {"type": "ByteLevel", "add_prefix_space": True}:
            _refuse("`add_prefix_space`", path)
        case {"type": "ByteLevel", "use_regex": False}:
            _refuse("words that are whole texts", path)
        case {"type": "ByteLevel"}:
            return PATTERNS["gpt2"]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": behavior, **rest},
                {"type": "ByteLevel", "use_regex": False, **byte_level},
            ],
        } if not byte_level.get("add_prefix_space"):
            pattern = usable_pattern(expression, path)
            # To remove what is between the words is to keep the words; where they are all of the text, it is the same.
            if (behavior, bool(rest.get("invert"))) not in (("Isolated", False), ("Removed", True)) or (
                behavior == "Removed" and pattern.name not in PATTERNS
            ):
                _refuse(f"the behavior `{behavior}` of its pattern", path)
            return pattern
        case _:
            _refuse(f"the pre-tokenizer `{json.dumps(tree)[:60]}`", path)
    raise AssertionError("all cases return or raise")
