"""GPT-2's own files where they are at hand, and the compiled loops for texts of any size."""

import os
from pathlib import Path

import pytest

from lfs_cli.tokenizer import Tokenizer, bpe, learn

SHARED = Path(os.environ.get("LFS_SHARED") or Path(__file__).parents[3] / "shared")


@pytest.fixture(scope="session")
def gpt2_files() -> tuple[Path, Path]:
    """GPT-2's vocabulary and merges, in `data/gpt2` of the folder LFS_SHARED, or of `shared` beside the checkout."""
    folder = SHARED / "data" / "gpt2"
    if not (folder / "gpt2_vocab.json").exists():
        pytest.skip("GPT-2's files are not at hand: name the folder above data/gpt2 in LFS_SHARED")
    return folder / "gpt2_vocab.json", folder / "gpt2_merges.txt"


@pytest.fixture(scope="session")
def gpt2(gpt2_files: tuple[Path, Path]) -> Tokenizer:
    return Tokenizer.from_files(*gpt2_files, special_tokens=["<|endoftext|>"])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the compiled loops for texts of any size."""
    monkeypatch.setattr(bpe, "COMPILED_BYTES", 0)
    monkeypatch.setattr(learn, "COMPILED_BYTES", 0)
