"""Checksums name the file that is not what was written, and read as `sha256sum` does."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lfs_cli.errors import DamageError
from lfs_cli.generation import LanguageModel
from lfs_cli.model.checksums import CHECKSUMS, verify_checksums, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000002"
    folder.mkdir()
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "b.json").write_text("{}")
    write_checksums(folder)
    return folder


def test_what_was_written_is_whole(folder: Path) -> None:
    verify_checksums(folder)
    verify_checksums(folder, ["b.json"])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_list(folder: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a.bin: OK\nb.json: OK\n")


@pytest.mark.parametrize("bit", [0, 1000, 2047])
def test_a_flipped_bit_is_named_only_where_it_is_read(bit: int, folder: Path) -> None:
    content = bytearray((folder / "a.bin").read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (folder / "a.bin").write_bytes(content)
    with pytest.raises(DamageError, match=r"a\.bin is damaged: its SHA-256 is not the one in SHA256SUMS"):
        verify_checksums(folder)
    verify_checksums(folder, ["b.json"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is no list of checksums"),
        ("00  ../a.bin\n", "is no list of checksums"),
        ("00  /etc/passwd\n", "is no list of checksums"),
        ("00  \n", "is no list of checksums"),
        ("00  c.bin\n", "cannot read"),
        ("00  a.bin\n", "a.bin is damaged"),
        ("\udcff", "it is not text"),
    ],
)
def test_a_list_that_cannot_be_is_damage(content: str, problem: str, folder: Path) -> None:
    (folder / CHECKSUMS).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamageError, match=problem):
        verify_checksums(folder)


def test_a_file_that_is_not_listed_is_damage_where_it_is_wanted(folder: Path) -> None:
    (folder / "c.bin").write_bytes(b"")
    verify_checksums(folder)
    with pytest.raises(DamageError, match=r"c\.bin is damaged"):
        verify_checksums(folder, ["c.bin"])


def test_the_hint_names_another_checkpoint(folder: Path) -> None:
    other = folder.with_name("step-000001")
    shutil.copytree(folder, other)
    (folder / "b.json").unlink()
    with pytest.raises(DamageError) as caught:
        verify_checksums(folder)
    assert caught.value.hint == "use another checkpoint, such as with `--set checkpoint=step-000001`"


def test_a_language_model_is_not_loaded_from_damage(tmp_path: Path) -> None:
    from lfs_cli.config import ModelConfig
    from lfs_cli.model import Transformer, save_model
    from lfs_cli.tokenizer import Tokenizer

    folder = tmp_path / "step-000001"
    save_model(Transformer(ModelConfig(vocab_size=300, context_length=8, width=16, layers=1, heads=2)), folder)
    Tokenizer({number: bytes([number]) for number in range(256)}, [], []).save(folder)
    LanguageModel.load(folder)
    write_checksums(folder)
    LanguageModel.load(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(DamageError, match=r"model\.safetensors is damaged"):
        LanguageModel.load(folder)
