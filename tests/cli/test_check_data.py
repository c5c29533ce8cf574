"""`lfs train --check-data`: what it reads, what it finds, and that the hint mends it."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.corpus.shards import HEADER_BYTES, Header, write_shards

TRAIN = "the cat sat on the mat. the dog sat on the log.\n" * 800
VALID = "the cat sat on the log.\n" * 40
CHECK = ("train", "quickstart.json", "--set", "data.dataset=mine", "--set", "model.vocab_size=280", "--check-data")


def lfs(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def data(data_folder: Path, tmp_path: Path) -> Path:
    """A data folder with one dataset, tokenized."""
    (tmp_path / "mine.txt").write_text(TRAIN + VALID)
    assert lfs("download", "--from", str(tmp_path / "mine.txt"), "--name", "mine").exit_code == 0
    assert lfs("tokenize", "mine", "--vocab", "280").exit_code == 0
    return data_folder


def test_whole_data_is_read_to_the_last_byte_and_left_as_it_is(data: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in data.rglob("*") if path.is_file()}
    result = lfs(*CHECK, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [(row["what"], row["outcome"]) for row in report["rows"]] == [
        ("text", "whole"),
        ("text", "whole"),
        ("tokenizer", "whole"),
        ("tokens", "whole"),
        ("tokens", "whole"),
    ]
    ids = sum(Header.read(path).count for path in data.glob("tokens/mine-280/*.bin"))
    tokenizer = (data / "tokenizers" / "mine-280" / "tokenizer.json").stat().st_size
    assert report["bytes"] == len(TRAIN) + len(VALID) + tokenizer + 2 * ids
    assert "are whole, read in" in result.stderr
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert {path for path in data.rglob("*") if path.is_file()} == set(before)


def flip(name: str, place: int = -20) -> Callable[[Path], None]:
    def damage(data: Path) -> None:
        raw = bytearray((data / name).read_bytes())
        raw[place] ^= 1
        (data / name).write_bytes(raw)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda data: (data / name).write_bytes((data / name).read_bytes()[:-7]) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda data: (data / name).unlink()


def as_version_1(data: Path) -> None:
    path = data / TOKENS
    raw = path.read_bytes()
    ids = raw[HEADER_BYTES : HEADER_BYTES + 2 * Header.read(path).count]
    path.write_bytes(raw[:8] + b"\x01\x00" + raw[10:64] + ids)


def with_an_unknown_id(data: Path) -> None:
    header = Header.read(data / TOKENS)
    write_shards(
        data / "tokens" / "mine-280",
        "train",
        [np.array([5, 280, 7])],
        vocab_size=300,
        tokenizer_hash=header.tokenizer_hash,
    )


def of_another_tokenizer(data: Path) -> None:
    path = data / TOKENS
    header = replace(Header.read(path), tokenizer_hash="ab" * 32)
    path.write_bytes(header.to_bytes() + path.read_bytes()[HEADER_BYTES:])


TEXT, TOKENS, TOKENIZER = "raw/mine/train.txt", "tokens/mine-280/train-00000.bin", "tokenizers/mine-280/tokenizer.json"
DAMAGE = {
    "a bit of the text": (flip(TEXT), f"{TEXT}` is not what its manifest names: its sha256 is another"),
    "the end of the text": (cut(TEXT), f"{TEXT}` is not what its manifest names: it has "),
    "a bit of the ids": (flip(TOKENS), f"{TOKENS}` is damaged: block "),
    "a bit of the header": (flip(TOKENS, 40), f"{TOKENS}` is damaged: its header does not fit its checksum"),
    "the end of the ids": (cut(TOKENS), f"{TOKENS}` is cut short"),
    "no ids": (remove(TOKENS), "no tokens for `train` in"),
    "ids of version 1": (as_version_1, f"{TOKENS}` has version 1 of the format, not 2"),
    "an id beyond the vocabulary": (with_an_unknown_id, "has the id 280, and its tokenizer has only "),
    "another tokenizer's ids": (of_another_tokenizer, "was made by the tokenizer abababababab, not by"),
    "a bit of the tokenizer": (flip(TOKENIZER, 2500), f"{TOKENIZER}` is damaged or was changed"),
    "no tokenizer": (remove(TOKENIZER), "no tokenizer in"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_mended_by_the_hint(data: Path, damage: str) -> None:
    inflict, message = DAMAGE[damage]
    inflict(data)
    result = lfs(*CHECK)
    assert result.exit_code == 1
    assert message in result.stderr.split("\n")[0]
    assert "damaged" in result.stdout
    steps = 0
    while result.exit_code:  # for a text, `lfs download` says in turn from where it can be had
        result, steps = lfs(*shlex.split(result.stderr.split("hint: ")[1].split("`")[1])[1:]), steps + 1
        assert steps <= 2
    assert lfs("tokenize", "mine", "--vocab", "280").exit_code == 0
    assert lfs(*CHECK).exit_code == 0


def test_all_damage_is_found_at_once(data: Path) -> None:
    for inflict in (flip(TEXT), flip(TOKENS), flip(TOKENIZER, 2500)):
        inflict(data)
    result = lfs(*CHECK, "--json")
    assert [row["what"] for row in json.loads(result.stdout)["rows"] if row["problem"]] == [
        "text",
        "tokenizer",
        "tokens",
    ]
    assert ", and 2 more\n" in result.stderr


def test_what_has_no_checksum_or_is_not_there_is_said(data: Path) -> None:
    (data / "raw" / "mine" / "manifest.json").unlink()
    (data / "raw" / "mine" / "valid.txt").unlink()
    result = lfs(*CHECK)
    assert result.exit_code == 0
    rows = [line.split("\t") for line in result.stdout.splitlines()[1:]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("text", "no checksum"),
        ("tokenizer", "whole"),
        *[("tokens", "whole")] * 2,
    ]


def test_without_tokens_the_command_that_makes_them_is_named(data: Path) -> None:
    result = lfs(*CHECK, "--set", "model.vocab_size=290")
    assert result.exit_code == 1
    assert "no tokens `mine-290` in" in result.stderr
    assert "hint: make them: `lfs tokenize mine --vocab 290`" in result.stderr
