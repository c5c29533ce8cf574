"""Comparing all of a dataset with what was written down of it: texts with their manifest, tokens with their checksums.

Each of these is also checked where it is used, as far as it is used. Here all of it is read.
"""

from collections.abc import Callable
from pathlib import Path

from lfs_cli.corpus.shards import WRITE_AGAIN, Tokens
from lfs_cli.corpus.sources import SPLITS, Watcher, hash_file, read_manifest
from lfs_cli.errors import DataError

IDS_AT_ONCE = 1 << 20


def check_text(path: Path, watcher: Watcher) -> bool:
    """Compare a text with the manifest beside it.

    Args:
        path: A text of a dataset's folder.
        watcher: Is told of progress.

    Returns:
        Whether the manifest has a record of it. One that was put there by hand has none before `lfs download` sees it.

    Raises:
        DataError: When the text is not the one of the record.
    """
    assert path.name in SPLITS
    manifest = read_manifest(path.parent)
    record = manifest.files.get(path.name) if manifest else None
    if record is None:
        return False
    hint = f"run `lfs download {path.parent.name}`: it mends what it can, and says what it cannot"
    size = path.stat().st_size
    if size != record.bytes:
        raise DataError(
            f"`{path}` is not what its manifest names: it has {size:,} bytes, not {record.bytes:,}", hint=hint
        )
    if hash_file(path, f"verifying {path.name}", watcher) != record.sha256:
        raise DataError(f"`{path}` is not what its manifest names: its sha256 is another", hint=hint)
    return True


def check_tokens(tokens: Tokens, vocab_size: int, on_progress: Callable[[int], None] | None = None) -> None:
    """Compare all ids of a split with their checksums and with the vocabulary.

    Args:
        tokens: The split, as `Tokens.open` returns it.
        vocab_size: Ids are below this.
        on_progress: Called now and then with the ids done so far.

    Raises:
        DataError: At the first damage, or for an id that the tokenizer does not have.
    """
    for start in range(0, len(tokens), IDS_AT_ONCE):
        ids = tokens[start : start + IDS_AT_ONCE]
        largest = int(ids.max())
        if largest >= vocab_size:
            raise DataError(
                f"{tokens.source} has the id {largest:,}, and its tokenizer has only {vocab_size:,}", hint=WRITE_AGAIN
            )
        if on_progress is not None:
            on_progress(start + len(ids))
