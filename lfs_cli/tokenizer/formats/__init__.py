"""Tokenizers in the files of others: GPT-2's two files, Hugging Face's `tokenizer.json`, tiktoken's rank files.

    gpt2           vocab.json, merges.txt          `gpt2.py`
    huggingface    tokenizer.json                  `huggingface.py`; what lfs itself writes
    tiktoken       <name>.tiktoken                 `ranks.py`

Anything that would change ids and that lfs does not do (a normalizer, byte fallback, a prefix space, ...) is refused,
in reading and in writing: a tokenizer that is almost the right one ruins a model without a message. What only adds
tokens around a text, such as a `TemplateProcessing` that begins it with one, is logged and left to the caller.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from lfs_cli.errors import DataError
from lfs_cli.tokenizer.blocks import reading
from lfs_cli.tokenizer.formats.checks import Content
from lfs_cli.tokenizer.formats.gpt2 import export_gpt2, read_gpt2, read_gpt2_with_specials, write_gpt2
from lfs_cli.tokenizer.formats.huggingface import export_huggingface, read_huggingface, write_huggingface
from lfs_cli.tokenizer.formats.ranks import SUFFIX, export_ranks, is_rank_file, read_ranks
from lfs_cli.tokenizer.formats.spelling import byte_to_character, read_token, write_token
from lfs_cli.tokenizer.split import Pattern

__all__ = [
    "EXPORTS",
    "Content",
    "byte_to_character",
    "read",
    "read_gpt2",
    "read_token",
    "write_gpt2",
    "write_huggingface",
    "write_token",
]

Export = Callable[
    [Path, Mapping[int, bytes], Sequence[tuple[bytes, bytes]], Mapping[str, int], Pattern, Collection[bytes]],
    list[Path],
]

EXPORTS: dict[str, Export] = {"gpt2": export_gpt2, "huggingface": export_huggingface, "tiktoken": export_ranks}
"""Format -> function that writes a tokenizer for other libraries into a folder and returns the paths.

Each raises DataError where its format cannot hold the tokenizer so that every text gets the same ids.
"""


def read(path: Path, *, pattern: Pattern | None = None, special_tokens: Sequence[str] | None = None) -> Content:
    """Return what the tokenizer at ``path`` consists of (see `Tokenizer.load` for what may be named).

    Args:
        path: A file in one of the formats, or a folder with one tokenizer.
        pattern: How text is cut into words, for files that do not say it: those of GPT-2 and tiktoken.
        special_tokens: The special tokens, for the same files. Those that the vocabulary lacks get new ids.

    Raises:
        DataError: When there is no tokenizer, or it is damaged, of a kind that lfs does not know, or says itself
            another pattern or other special tokens.
    """
    if path.is_dir():
        path = _the_file_in(path)
    elif not path.exists():
        raise DataError(f"no tokenizer `{path}`", hint="name a folder or file, or learn one with `lfs tokenize`")
    for ending, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if path.name.endswith(ending):
            partner = path.with_name(path.name.removesuffix(ending) + other)
            vocab_path, merges_path = (path, partner) if ending == "vocab.json" else (partner, path)
            return read_gpt2_with_specials(vocab_path, merges_path, pattern, special_tokens)
    if is_rank_file(path):
        return read_ranks(path, pattern, special_tokens)
    content = read_huggingface(path)
    if pattern is not None and pattern.expression != content.pattern.expression:
        raise DataError(
            f"`{path}` has the pattern `{content.pattern.name}`, not `{pattern.name}`", hint="leave out the pattern"
        )
    others = [text for text in special_tokens or () if text not in content.special_tokens]
    if others:
        raise DataError(
            f"`{path}` has no special token `{others[0]}`",
            hint="leave it out, or learn a tokenizer with it: `lfs tokenize --special TEXT`",
        )
    return content


def _the_file_in(folder: Path) -> Path:
    """Return the file that stands for the one tokenizer in ``folder``; of GPT-2's two the vocabulary."""
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json"
    with reading(folder):
        names = sorted(folder.iterdir())
    found = [file for file in names if file.name.endswith("vocab.json")]
    found = [file for file in found if file.with_name(file.name.removesuffix("vocab.json") + "merges.txt").exists()]
    found += [file for file in names if file.name.endswith(SUFFIX)]
    if not found:
        raise DataError(
            f"no tokenizer in `{folder}`",
            hint="it should hold `tokenizer.json`, or `vocab.json` and `merges.txt`; `lfs tokenize` makes the first",
        )
    if len(found) > 1:
        raise DataError(f"{len(found)} tokenizers in `{folder}`", hint=f"name one of them, such as `{found[0]}`")
    return found[0]
