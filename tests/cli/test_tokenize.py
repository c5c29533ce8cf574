import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.config import TokenizeConfig
from lfs_cli.corpus.shards import Tokens
from lfs_cli.errors import DataError
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.tokenize import tokenize
from lfs_cli.tokenizer import Tokenizer, blocks

STORY = "Once upon a time there was a cat. The cat sat on the mat; it wasn't sad, because its friends brought apples."
TRAIN = f"{STORY}<|endoftext|>\n" * 40
VALID = "The mat was upon a cat, once upon a time.<|endoftext|>\n" * 3


@dataclass
class Output:
    exit_code: int
    stdout: str
    stderr: str


def lfs(*arguments: str) -> Output:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Output(result.exit_code, result.stdout, result.stderr)


def bring(data_folder: Path, name: str, train: bytes = TRAIN.encode(), valid: bytes = VALID.encode()) -> Path:
    """Put a dataset into the data folder, as `lfs download` would."""
    folder = data_folder / "raw" / name
    folder.mkdir(parents=True)
    (folder / "train.txt").write_bytes(train)
    (folder / "valid.txt").write_bytes(valid)
    return folder


@pytest.fixture
def tiny(data_folder: Path) -> Path:
    return bring(data_folder, "tiny")


@pytest.mark.usefixtures("tiny")
def test_a_dataset_becomes_a_tokenizer_and_shards(data_folder: Path) -> None:
    result = lfs("tokenize", "tiny", "--vocab", "300", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    tokenizer = Tokenizer.load(report["tokenizer"])
    assert tokenizer.vocab_size == report["vocab_size"] == 300
    for split, text in (("train", TRAIN), ("valid", VALID)):
        tokens = Tokens.open(Path(report["tokens"]), split, tokenizer_hash=tokenizer.hash)
        assert tokenizer.decode(tokens[0 : len(tokens)]) == text
        row = next(row for row in report["rows"] if row["stage"] == split)
        assert row["tokens"] == len(tokens)
        assert row["bytes/token"] == pytest.approx(len(text) / len(tokens))
    manifest = json.loads((data_folder / "tokens" / "tiny-300" / "manifest.json").read_text())
    assert manifest["splits"]["valid"]["bytes"] == len(VALID)
    assert manifest["tokenizer_hash"] == tokenizer.hash
    assert report["longest_tokens"][0] == "friends"
    assert report["peak_bytes"] is None or report["peak_bytes"] > 1e7
    assert "next: `lfs train --set data.dataset=tiny --set model.vocab_size=300`" in result.stderr


@pytest.mark.usefixtures("tiny")
def test_what_is_up_to_date_is_used_again(data_folder: Path) -> None:
    lfs("tokenize", "--vocab", "300")
    shard = data_folder / "tokens" / "tiny-300" / "train-00000.bin"
    made = shard.stat().st_mtime_ns
    again = lfs("tokenize", "--vocab", "300")
    assert again.stderr.count("using the") == 3
    assert "up to date:" in again.stderr
    assert shard.stat().st_mtime_ns == made
    assert "new" not in again.stdout


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ("other text", ["new", "new", "new"]),
        ("other valid text", ["kept", "kept", "new"]),
        ("other specials", ["new", "new", "new"]),
        ("damaged tokenizer", ["new", "kept", "kept"]),
        ("damaged shard", ["kept", "new", "kept"]),
        ("missing shard", ["kept", "kept", "new"]),
        ("damaged manifest", ["kept", "new", "new"]),
        ("strange manifest", ["kept", "new", "new"]),
    ],
)
def test_what_is_out_of_date_is_made_again(data_folder: Path, tiny: Path, change: str, made: list[str]) -> None:
    lfs("tokenize", "--vocab", "300")
    tokens = data_folder / "tokens" / "tiny-300"
    arguments = []
    match change:
        case "other text":
            (tiny / "train.txt").write_text("entirely different text, though " * 30)
        case "other valid text":
            (tiny / "valid.txt").write_text("different text")
        case "other specials":
            arguments = ["--special", "<|end|>", "--special", "<|endoftext|>"]
        case "damaged tokenizer":
            (data_folder / "tokenizers" / "tiny-300" / "tokenizer.json").write_text("{")
        case "damaged shard":
            shard = tokens / "train-00000.bin"
            shard.write_bytes(shard.read_bytes()[:-2])
        case "missing shard":
            (tokens / "valid-00000.bin").unlink()
        case "damaged manifest":
            (tokens / "manifest.json").write_text("{")
        case "strange manifest":
            manifest = json.loads((tokens / "manifest.json").read_text())
            (tokens / "manifest.json").write_text(json.dumps({**manifest, "splits": [1]}))
    report = json.loads(lfs("tokenize", "--vocab", "300", "--json", *arguments).stdout)
    assert [row["made"] for row in report["rows"]] == made
    tokenizer = Tokenizer.load(report["tokenizer"])
    text = (tiny / "train.txt").read_text()
    ids = Tokens.open(Path(report["tokens"]), "train", tokenizer_hash=tokenizer.hash)
    assert tokenizer.decode(ids[0 : len(ids)]) == text


def test_the_newest_dataset_is_the_default(data_folder: Path) -> None:
    for age, name in enumerate(["newest", "older", "oldest"]):
        folder = bring(data_folder, name)
        (folder / "manifest.json").write_text("{}")
        os.utime(folder / "manifest.json", (1e9 - age, 1e9 - age))
    assert json.loads(lfs("tokenize", "--vocab", "260", "--json").stdout)["dataset"] == "newest"


@pytest.mark.usefixtures("tiny")
def test_a_given_tokenizer_is_used_and_kept(data_folder: Path, tmp_path: Path) -> None:
    given = Tokenizer({id: bytes([id]) for id in range(256)}, [], ["<|endoftext|>"])
    given.save_gpt2(tmp_path / "my bytes!")
    result = lfs("tokenize", "tiny", "--tokenizer", str(tmp_path / "my bytes!"), "--json")
    report = json.loads(result.stdout)
    assert Path(report["tokens"]).name == Path(report["tokenizer"]).name == "tiny-my-bytes"
    assert [row["stage"] for row in report["rows"]] == ["train", "valid"]
    assert report["tokenizer_hash"] == given.hash == Tokenizer.load(report["tokenizer"]).hash
    assert f"--set data.tokenizer={report['tokenizer']}`" in result.stderr
    again = lfs("tokenize", "tiny", "--tokenizer", report["tokenizer"], "--json")
    assert json.loads(again.stdout)["tokens"] == report["tokens"]
    assert "up to date:" in again.stderr


@pytest.mark.usefixtures("tiny")
def test_another_pattern_has_a_name_of_its_own() -> None:
    report = json.loads(lfs("tokenize", "--vocab", "300", "--pattern", "o200k", "--json").stdout)
    assert Path(report["tokens"]).name == "tiny-300-o200k"
    assert Tokenizer.load(report["tokenizer"]).pattern == "o200k"


@pytest.mark.usefixtures("tiny")
def test_options_are_names_for_settings(tmp_path: Path) -> None:
    config = tmp_path / "tokenize.json"
    config.write_text('{"vocab_size": 290, "special_tokens": ["<|x|>"]}')
    set_too = lfs("tokenize", "--config", str(config), "--set", "vocab_size=280", "--json")
    assert json.loads(set_too.stdout)["vocab_size"] == 280
    options = lfs("tokenize", "--config", str(config), "--vocab", "285", "--special", "<|y|>", "--json")
    assert Tokenizer.load(json.loads(options.stdout)["tokenizer"]).special_tokens == ("<|y|>",)


@pytest.mark.usefixtures("tiny")
def test_too_few_pairs_are_a_warning() -> None:
    result = lfs("tokenize", "--vocab", "5000", "--quiet")
    assert result.exit_code == 0
    assert "warning: the text has only" in result.stderr


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"", "error: `{}` is empty"),
        (b"text\0" * 50, "error: `{}` is a binary file, not text"),
        (bytes(range(128, 256)) * 40, "error: `{}` is not text in UTF-8"),
    ],
    ids=["empty", "binary", "not UTF-8"],
)
def test_a_file_that_is_no_text_is_refused(data_folder: Path, train: bytes, message: str) -> None:
    path = bring(data_folder, "bad", train) / "train.txt"
    result = lfs("tokenize", "bad", "--vocab", "300")
    assert result.exit_code == 1
    assert message.format(path) in result.stderr
    assert "\nhint: " in result.stderr
    assert not list(data_folder.glob("tokens/*"))


@pytest.mark.parametrize(
    ("train", "warning"),
    [
        (b"caf\xe9 text " * 20, "is not UTF-8 at byte 3; such bytes are kept"),
        (b"\xef\xbb\xbfline\r\nline\r\n" * 20, ""),
        (b"ab" * 30_000, ""),
    ],
    ids=["some bad bytes", "CRLF and BOM", "one long word"],
)
def test_odd_texts_are_kept_byte_for_byte(data_folder: Path, train: bytes, warning: str) -> None:
    bring(data_folder, "odd", train)
    result = lfs("tokenize", "odd", "--vocab", "262", "--json")
    report = json.loads(result.stdout)
    tokens = Tokens.open(Path(report["tokens"]), "train")
    assert Tokenizer.load(report["tokenizer"]).decode_bytes(tokens[0 : len(tokens)]) == train
    assert warning in result.stderr
    assert ("warning:" in result.stderr) == bool(warning)


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["tinny"], 1, "no dataset `tinny`", "did you mean `tiny`?"),
        (["tiny", "--vocab", "100"], 2, "`vocab_size` (100) has no room", "set `vocab_size` to at least 257"),
        (["tiny", "--vocab", "many"], 2, "`--vocab`", ""),
        (["tiny", "--vocabulary", "300"], 2, "unknown option `--vocabulary`", "did you mean `--vocab`?"),
        (["tiny", "--pattern", "gpt-2"], 2, "unknown pattern `gpt-2`", "did you mean `gpt2`?"),
        (["tiny", "--set", "vocab=300"], 2, "unknown key `vocab`", "did you mean `vocab_size`?"),
        (["tiny", "--special", ""], 2, "a special token is empty", "name a text"),
        (["tiny", "--special", "a", "--special", "a"], 2, "given twice", "name each special token once"),
        (["tiny", "--workers", "-1"], 2, "workers", ""),
        (["tiny", "--tokenizer", "absent"], 1, "no tokenizer `absent`", "lfs tokenize"),
        (["../tiny"], 2, "`../tiny` cannot name a folder", "use letters"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.usefixtures("tiny")
def test_a_slip_is_explained(arguments: list[str], code: int, error: str, hint: str) -> None:
    result = lfs("tokenize", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert error in result.stderr.splitlines()[0]
    assert hint in result.stderr


def test_a_missing_dataset_or_split_is_named(data_folder: Path) -> None:
    assert "error: no dataset in" in lfs("tokenize").stderr
    assert "hint: run `lfs download owt`" in lfs("tokenize", "owt").stderr
    (bring(data_folder, "half") / "valid.txt").unlink()
    assert "lacks `" in lfs("tokenize", "half").stderr


class FullDisk(Observer):
    """A disk that fills up while ids are written."""

    def progress(self, label: str, done: int, total: int, unit: str = "B") -> None:
        if label == "encoding valid":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_encoding_leaves_no_half_file(data_folder: Path) -> None:
    config = TokenizeConfig(dataset="tiny", vocab_size=300)
    with pytest.raises(OSError, match="No space left"):
        tokenize(config, DataFolder(data_folder), FullDisk())
    assert sorted(path.name for path in (data_folder / "tokens" / "tiny-300").iterdir()) == [
        "manifest.json",
        "train-00000.bin",
    ]
    result = tokenize(config, DataFolder(data_folder))
    assert [stage.seconds is None for stage in result.stages] == [True, True, False]
    assert result.bytes_per_token("valid") == pytest.approx(len(VALID) / result.stages[-1].tokens)


@pytest.mark.usefixtures("tiny")
def test_a_full_disk_is_explained(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_arguments, **_options) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blocks.Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"cannot write in .*No space left") as caught:
        tokenize(TokenizeConfig(dataset="tiny", vocab_size=300), DataFolder(data_folder))
    assert caught.value.hint is not None
    assert "LFS_DATA" in caught.value.hint
    assert list((data_folder / "tokenizers" / "tiny-300").iterdir()) == []


def test_workers_change_nothing(data_folder: Path) -> None:
    bring(data_folder, "one")
    hashes, ids = set(), []
    for workers in (1, 3):
        result = tokenize(TokenizeConfig(dataset="one", vocab_size=300, workers=workers), DataFolder(data_folder))
        hashes.add(result.tokenizer_hash)
        tokens = Tokens.open(result.tokens, "train")
        ids.append(tokens[0 : len(tokens)])
        (result.tokens / "manifest.json").unlink()
        (result.tokenizer / "manifest.json").unlink()
    assert len(hashes) == 1
    assert np.array_equal(*ids)


@pytest.mark.usefixtures("tiny")
def test_it_runs_in_a_process_of_its_own_without_torch() -> None:
    script = (
        "import sys; from lfs_cli.cli.app import app\n"
        "try: app(['tokenize', 'tiny', '--vocab', '300', '--quiet'])\n"
        "finally: print(sorted({'torch', 'numba'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_explain_lists_the_settings() -> None:
    result = lfs("tokenize", "--explain")
    assert result.stdout.splitlines()[2].startswith("vocab_size\t10000\t")
