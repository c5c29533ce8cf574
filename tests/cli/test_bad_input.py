"""What a user can get wrong, one real command line each: what is said of it, and that doing what the hint says works.

Whatever is refused leaves the folder as it was, byte for byte.
"""

import base64
import json
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lfs_cli.cli.app import app

TINY = {
    "data": {"dataset": "sample"},
    "model": {"vocab_size": 300, "context_length": 16, "width": 16, "layers": 1, "heads": 2},
    "steps": 2,
    "batch_size": 2,
    "eval_batches": 1,
    "sample_tokens": 2,
    "sample_prompt": "Once",
    "device": "cpu",
}
SHARD = "data/tokens/sample-300/train-00000.bin"


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, the sample corpus, its tokens and a trained run."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("LFS_DATA", raising=False)
        assert lfs("download", "sample", "--size", "60kB").exit_code == 0
        trained = lfs("train", "tiny.json")
    assert trained.exit_code == 0, trained.stderr
    return folder


@pytest.fixture
def home(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(prepared, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.delenv("LFS_DATA", raising=False)
    return tmp_path / "home"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(name: str, content: str | bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def put_dataset(name: str, train: str | bytes, valid: str | bytes | None = None) -> None:
    put(f"data/raw/{name}/train.txt", train)
    put(f"data/raw/{name}/valid.txt", train if valid is None else valid)


def the_run() -> Path:
    (run,) = Path("data/runs").iterdir()
    return run


def other_tokenizer(place: Path) -> None:
    """Put a whole tokenizer of the same size there, which is not the one that the model was trained with."""
    tree = json.loads(place.read_text())
    del tree["model"]["checksum"]  # as others write it
    vocab = tree["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    place.write_text(json.dumps(tree))


def tokenize_anew() -> None:
    """Let the sample have another tokenizer than the one that the run was trained with."""
    put("data/raw/sample/train.txt", "another text, which gives other pairs. " * 400)
    assert lfs("tokenize", "sample", "--vocab", "300").exit_code == 0


def tokenize_with(pattern: str) -> None:
    """Let the sample have a newer tokenizer with another pattern."""
    assert lfs("tokenize", "sample", "--vocab", "300", "--pattern", pattern).exit_code == 0


RANKS = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))


@dataclass(frozen=True)
class Case:
    """A mistake, what is said, and what the hint tells to do: further command lines, and the same one after them.

    Args:
        line: Command line, without `lfs`.
        code: Exit code.
        error: A part of the error.
        hint: A part of the hint.
        cure: The command line that follows the hint; None when the same one works after ``shell``.
        shell: What to do before.
        prepare: How the mistake comes about.
    """

    line: str
    code: int
    error: str
    hint: str
    cure: str | None = None
    shell: str = ""
    prepare: Callable[[], None] = lambda: None


CASES = {
    "misspelled command": Case(
        "trian tiny.json", 2, "unknown command `trian`", "did you mean `train`?", "train tiny.json"
    ),
    "misspelled option": Case(
        "train tiny.json --sett steps=1",
        2,
        "unknown option `--sett`",
        "did you mean `--set`?",
        "train tiny.json --set steps=1",
    ),
    "setting as option": Case(
        "train tiny.json --steps 3",
        2,
        "unknown option `--steps`",
        "did you mean `--set steps=3`?",
        "train tiny.json --set steps=3",
    ),
    "option before command": Case(
        "--quiet train tiny.json",
        2,
        "unknown option `--quiet`",
        "`lfs train --quiet`",
        "train --quiet tiny.json",
    ),
    "misspelled config": Case(
        "train tinny.json", 2, "no config `tinny.json`", "did you mean `tiny.json`?", "train tiny.json"
    ),
    "misspelled shipped config": Case(
        "train quikstart.json --dry-run",
        2,
        "no config `quikstart.json`",
        "did you mean `quickstart.json`?",
        "train quickstart.json --dry-run",
    ),
    "run folder as config": Case(
        "train RUN", 2, "`data/runs/", "name the file in it: `data/runs/", "train RUN/config.json"
    ),
    "misspelled key": Case(
        "train tiny.json --set model.layer=2",
        2,
        "unknown key `model.layer`",
        "did you mean `model.layers`?",
        "train tiny.json --set model.layers=2",
    ),
    "key without its section": Case(
        "train tiny.json --set layers=2",
        2,
        "unknown key `layers`",
        "did you mean `model.layers`?",
        "train tiny.json --set model.layers=2",
    ),
    "blocks compiled around what is to be kept": Case(
        "train tiny.json --set compile=blocks --set model.checkpointing=selective",
        2,
        "`model.checkpointing` is `selective`, and sees no products in blocks that `compile=blocks` compiles",
        "try `--set compile=auto`, or `--set model.checkpointing=full`",
        "train tiny.json --set compile=auto --set model.checkpointing=selective",
    ),
    "misspelled registered name": Case(
        "train tiny.json --set optimizer.0.name=adam",
        2,
        "unknown optimizer `adam`",
        "did you mean `adamw`?",
        "train tiny.json --set optimizer.0.name=adamw",
    ),
    "misspelled option of a registered name": Case(
        "train tiny.json --set optimizer.0.options.weightdecay=0.1",
        2,
        "optimizer `adamw` has no option `weightdecay`",
        "did you mean `weight_decay`?",
        "train tiny.json --set optimizer.0.options.weight_decay=0.1",
    ),
    "misspelled dataset": Case(
        "tokenize sampel --vocab 300",
        1,
        "no dataset `sampel`",
        "did you mean `sample`?",
        "tokenize sample --vocab 300",
    ),
    "wrong type": Case(
        "train tiny.json --set eval_batches=few",
        2,
        '`eval_batches` must be a whole number, not `"few"`',
        "the default is `20`",
        "train tiny.json --set eval_batches=20",
    ),
    "wrong type of an option": Case(
        "tokenize sample --vocab many",
        2,
        "`--vocab` must be a whole number, not `many`",
        "`--vocab 10000`",
        "tokenize sample --vocab 10000",
    ),
    "number for a text": Case(
        "train tiny.json --set name=7",
        2,
        "`name` must be a text in quotes, not `7`",
        "`--set 'name=\"7\"'`",
        "train tiny.json --set 'name=\"7\"'",
    ),
    "seed beyond 64 bits": Case(
        "train tiny.json --set seed=18446744073709551616",
        2,
        "`seed` must be at most 9223372036854775807",
        "the default is `0`",
        "train tiny.json --set seed=0",
    ),
    "a number with 5000 digits": Case(
        f"train tiny.json --set seed={'1' * 5000}",
        2,
        "`seed` must be a whole number",
        "the default is `0`",
        "train tiny.json --set seed=0",
    ),
    "impossible shape": Case(
        "train tiny.json --set model.heads=3",
        2,
        "`model.width` (16) is not a multiple of `model.heads` (3)",
        "set `model.width` to 18",
        "train tiny.json --set model.heads=3 --set model.width=18",
    ),
    "odd width of a head": Case(
        "train tiny.json --set model.width=6",
        2,
        "rotary positions need an even number of channels per head",
        "set `model.width` to 8",
        "train tiny.json --set model.width=8",
    ),
    "impossible key/value heads": Case(
        "train tiny.json --set model.kv_heads=3",
        2,
        "`model.heads` (2) is not a multiple of `model.kv_heads` (3)",
        "set `model.kv_heads` to 2",
        "train tiny.json --set model.kv_heads=2",
    ),
    "impossible microbatch": Case(
        "train tiny.json --set microbatch=3",
        2,
        "`batch_size` (2) is not a multiple of `microbatch` (3)",
        "set `microbatch` to 2",
        "train tiny.json --set microbatch=2",
    ),
    "context of one token": Case(
        "train tiny.json --set model.context_length=1",
        2,
        "`model.context_length` must be at least 2, not `1`",
        "the default is `256`",
        "train tiny.json --set model.context_length=256",
    ),
    "absent device": Case(
        "train tiny.json --set device=mps --set model.vocab_size=310",
        1,
        "no MPS device on this machine",
        "set `device` to `auto` or `cpu`",
        "train tiny.json --set device=cpu --set model.vocab_size=310",
    ),
    "not JSON": Case(
        "train bad.json --dry-run",
        2,
        "bad.json is not JSON: line 1, column 14",
        'write one object, such as `{"steps": 100}`',
        shell="echo '{\"steps\": 100}' > bad.json",
        prepare=lambda: put("bad.json", '{"steps": 1, }'),
    ),
    "two configs": Case(
        "train tiny.json --config tiny.json", 2, "two configs are named", "name one of them", "train tiny.json"
    ),
    "empty corpus": Case(
        "train tiny.json --set data.dataset=none",
        1,
        "`data/raw/none/train.txt` is empty",
        "bring a text: `lfs download --from FILE --name NAME`",
        "download --from data/raw/sample/train.txt --name NAME",
        prepare=lambda: put_dataset("none", ""),
    ),
    "empty file": Case(
        "download --from none.txt --name mine",
        1,
        "`none.txt` is empty",
        "give a file that holds text",
        "download --from data/raw/sample/train.txt --name mine",
        prepare=lambda: put("none.txt", ""),
    ),
    "corpus shorter than a context": Case(
        "train tiny.json --set data.dataset=short",
        1,
        "has 12 tokens, and a context of 16 needs at least 17",
        "`--set model.context_length=11`",
        "train tiny.json --set data.dataset=short --set model.context_length=11",
        prepare=lambda: put_dataset("short", "a1b2c3d4e5f6"),
    ),
    "validation text shorter than a context": Case(
        "train tiny.json --set data.dataset=short",
        1,
        "`valid` in `data/tokens/short-300` has 12 tokens",
        "`--set model.context_length=11`",
        "train tiny.json --set data.dataset=short --set model.context_length=11",
        prepare=lambda: put_dataset("short", "a1b2c3d4e5f6" * 9, "a1b2c3d4e5f6"),
    ),
    "binary file": Case(
        "download --from photo.jpg --name mine",
        1,
        "`photo.jpg` is a binary file, not text",
        "give plain text in UTF-8",
        "download --from data/raw/sample/train.txt --name mine",
        prepare=lambda: put("photo.jpg", bytes(range(256)) * 50),
    ),
    "binary file in place": Case(
        "train tiny.json --set data.dataset=photo",
        1,
        "`data/raw/photo/train.txt` is a binary file, not text",
        "give plain text in UTF-8",
        "train tiny.json",
        prepare=lambda: put_dataset("photo", bytes(range(256)) * 50),
    ),
    "another encoding": Case(
        "tokenize cyrillic --vocab 300",
        1,
        "`data/raw/cyrillic/train.txt` is not text in UTF-8",
        "`iconv -f ENCODING -t UTF-8 data/raw/cyrillic/train.txt > text.txt`",
        "download --from text.txt --name text",
        shell="iconv -f KOI8-R -t UTF-8 data/raw/cyrillic/train.txt > text.txt",
        prepare=lambda: put_dataset(
            "cyrillic", "\u0434\u044b\u043c \u0438 \u043b\u0443\u0436\u0438. ".encode("koi8-r") * 50
        ),
    ),
    "vocabulary without room": Case(
        "tokenize sample --vocab 100",
        2,
        "`vocab_size` (100) has no room for 256 bytes and 1 special token",
        "set `vocab_size` to at least 257",
        "tokenize sample --vocab 257",
    ),
    "vocabulary of a model without room": Case(
        "train tiny.json --set model.vocab_size=256",
        2,
        "`model.vocab_size` (256) has no room for 256 bytes and 1 special token",
        "set `model.vocab_size` to at least 257",
        "train tiny.json --set model.vocab_size=257",
    ),
    "foreign shard": Case(
        "train tiny.json",
        1,
        f"`{SHARD}` is not a token shard",
        f"`mv {SHARD} {SHARD}.kept`",
        shell=f"mv {SHARD} {SHARD}.kept",
        prepare=lambda: put(SHARD, b"tokens of another program"),
    ),
    "given tokenizer that is too large": Case(
        "train tiny.json --set model.vocab_size=280 --set data.tokenizer=data/tokenizers/sample-300",
        2,
        "the tokenizer has 300 tokens and the model 280",
        "`--set model.vocab_size=300`",
        "train tiny.json --set data.tokenizer=data/tokenizers/sample-300 --set model.vocab_size=300",
    ),
    "missing tokenizer": Case(
        "tokenize sample --tokenizer nowhere", 1, "no tokenizer `nowhere`", "lfs tokenize", "tokenize --vocab 300"
    ),
    "checkpoint with another tokenizer": Case(
        "generate --prompt Once",
        1,
        "is not the one its model was trained with",
        "put that one back as data/runs/",
        shell="cp data/tokenizers/sample-300/tokenizer.json RUN/checkpoints/step-000002/tokenizer.json",
        prepare=lambda: other_tokenizer(the_run() / "checkpoints" / "step-000002" / "tokenizer.json"),
    ),
    "resumed with another tokenizer": Case(
        "train --resume last --set steps=3",
        1,
        "was trained with another tokenizer than sample has now",
        "`lfs train --resume RUN --set data.tokenizer=RUN/checkpoints/step-000002/tokenizer.json`",
        "train --resume RUN --set data.tokenizer=RUN/checkpoints/step-000002/tokenizer.json --set steps=3",
        prepare=tokenize_anew,
    ),
    "missing run": Case(
        "generate --run tniy --prompt Once",
        1,
        "no run `tniy` in data/runs",
        "choose one of: NAME",
        "generate --run NAME --prompt Once",
    ),
    "missing run to resume": Case(
        "train --resume tniy", 1, "no run `tniy` in data/runs", "choose one of: NAME", "train --resume NAME"
    ),
    "missing run to report": Case("report tniy", 1, "no run `tniy` in data/runs", "choose one of: NAME", "report NAME"),
    "missing checkpoint": Case(
        "generate --prompt Once --set checkpoint=step-9",
        1,
        "no checkpoint `step-9` in data/runs/",
        "choose one of: best, latest, step-000002",
        "generate --prompt Once --set checkpoint=step-000002",
    ),
    "prompt longer than the context": Case(
        "generate --prompt 012345678901234567",
        2,
        "has 18 tokens, and the model reads at most 16",
        "shorten it by 2 tokens: leave out about 2 of its characters",
        "generate --prompt 0123456789012345",
    ),
    "sample prompt longer than the context": Case(
        "train tiny.json --set sample_prompt=Once-upon-a-time-there-was",
        2,
        "`sample_prompt` has ",
        "`--set sample_tokens=0`",
        "train tiny.json --set sample_prompt=Once-upon-a-time-there-was --set sample_tokens=0",
    ),
    "prompt without its option": Case(
        "generate Once",
        2,
        "`Once` is more than `lfs generate` takes",
        "`lfs generate --prompt Once`",
        "generate --prompt Once",
    ),
    "ranks that tell no pattern": Case(
        "tokenize --tokenizer mine.tiktoken --text Once",
        1,
        "`mine.tiktoken` does not say how text is cut into words",
        "`lfs tokenize --tokenizer mine.tiktoken --pattern cl100k --export huggingface`",
        "tokenize --tokenizer mine.tiktoken --pattern cl100k --export huggingface",
        prepare=lambda: put("mine.tiktoken", RANKS),
    ),
    "ranks that are damaged": Case(
        "tokenize --tokenizer cl100k_base.tiktoken --text Once",
        1,
        "line 256 of `cl100k_base.tiktoken` is not a token in base64 and its rank: `/w==`",
        "fetch the file again, or learn a tokenizer with `lfs tokenize`",
        "tokenize sample --vocab 300",
        prepare=lambda: put("cl100k_base.tiktoken", RANKS[:-5]),
    ),
    "a pattern that a format cannot hold": Case(
        "tokenize sample --export gpt2",
        1,
        "GPT-2's files have no place for the pattern `o200k`",
        "`--export huggingface`",
        "tokenize sample --export huggingface",
        prepare=lambda: tokenize_with("o200k"),
    ),
    "exporting onto itself": Case(
        "tokenize sample --export huggingface --out data/tokenizers/sample-300",
        1,
        "`data/tokenizers/sample-300` is where the tokenizer comes from",
        "name another folder with `--out`",
        "tokenize sample --export huggingface --out another",
    ),
    "misspelled format": Case(
        "tokenize sample --export hugging-face",
        2,
        "`export` cannot be",
        "huggingface",
        "tokenize sample --export huggingface",
    ),
    "a size that is none": Case(
        "tokenize sample --vocab 300 --sample 2,5GB",
        2,
        "`--sample 2,5GB` is not a size",
        "`--sample 2GB`",
        "tokenize sample --vocab 300 --sample 2GB",
    ),
    "text and file": Case(
        "tokenize --text Once --file tiny.json",
        2,
        "`text` and `file` are both given",
        "name one text to show",
        "tokenize --file tiny.json",
    ),
    "a file that is not there": Case(
        "tokenize --file tinny.json", 1, "no file `tinny.json`", "check the path", "tokenize --file tiny.json"
    ),
    "a tokenizer to compare with that is not there": Case(
        "tokenize --compare data/tokenizers",
        1,
        "no tokenizer in `data/tokenizers`",
        "it should hold `tokenizer.json`",
        "tokenize --compare data/tokenizers/sample-300",
    ),
    "a picture of no known kind": Case(
        "bench tokenizer --plot speeds.jpg --vocab 270",
        2,
        "does not say what to draw",
        "end its name in .svg, .png or .html",
        "bench tokenizer --plot speeds.svg --vocab 270 --file tiny.json --threads 1 --repeats 1 --peer tokenizers "
        "--set 'tokenizer.tasks=[\"shard\"]'",
    ),
    "unknown benchmark": Case(
        "bench optimiser --size 600 --repeats 1",
        2,
        "unknown benchmark `optimiser`",
        "did you mean `optimizer`?",
        "bench optimizer --size 600 --repeats 1",
    ),
}


def spelled_out(text: str) -> str:
    """Return ``text`` with the run of the prepared folder in the place of RUN, its path, and NAME, its name."""
    run = the_run()
    return re.sub(r"\bRUN\b", str(run), text).replace("choose one of: NAME", f"choose one of: {run.name}")


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_and_the_hint_works(case: str, home: Path) -> None:
    mistake = CASES[case]
    mistake.prepare()
    before = files(home)

    result = lfs(*shlex.split(spelled_out(mistake.line)))

    error, _, hint = result.stderr[result.stderr.index("error: ") :].partition("\n\nhint: ")
    assert (result.exit_code, result.stdout) == (mistake.code, "")
    assert spelled_out(mistake.error) in error
    assert spelled_out(mistake.hint) in hint
    assert "invalid" not in result.stderr.lower()
    after = files(home)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.endswith((".tmp", ".draft", ".part"))]

    subprocess.run(spelled_out(mistake.shell), shell=True, check=True)
    cured = lfs(*shlex.split(spelled_out(mistake.cure or mistake.line).replace(" NAME", f" {the_run().name}")))
    assert cured.exit_code == 0, cured.stderr


def test_a_truncated_shard_is_found_and_made_again(home: Path) -> None:
    whole = Path(SHARD).read_bytes()
    Path(SHARD).write_bytes(whole[:-3])
    result = lfs("train", "tiny.json")
    assert result.exit_code == 0, result.stderr
    assert "encoding data/raw/sample/train.txt" in result.stderr
    assert Path(SHARD).read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    [b"One line.\r\nAnother one.\r\n" * 200, b"\xef\xbb\xbfcaf\xe9, not UTF-8. " * 200, b"qwertyuiop" * 30_000],
    ids=["CRLF", "invalid UTF-8", "one long line without spaces"],
)
def test_an_odd_text_is_kept_as_it_is_and_trained_on(text: bytes, home: Path) -> None:
    Path("odd.txt").write_bytes(text)
    assert lfs("download", "--from", "odd.txt", "--name", "odd", "--valid-share", "0.2").exit_code == 0
    settings = ["data.dataset=odd", "model.vocab_size=260", "model.context_length=8"]
    result = lfs("train", "tiny.json", *(word for setting in settings for word in ("--set", setting)))
    assert result.exit_code == 0, result.stderr
    folder = Path("data/raw/odd")
    assert (folder / "train.txt").read_bytes() + (folder / "valid.txt").read_bytes() == text


@pytest.mark.slow
def test_a_line_of_50_megabytes_without_spaces(home: Path) -> None:
    letters = b"abcdefghijklmnop"
    line = bytes(letters[byte & 15] for byte in random.Random(0).randbytes(50_000)) * 1_000
    put_dataset("line", line, line[:100_000])
    result = lfs("tokenize", "line", "--vocab", "280", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["rows"][1]["bytes"] == 50_000_000
    assert report["peak_bytes"] < 6e9


@pytest.fixture
def disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 2 MB that holds the data folder."""
    place = home.parent / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        shutil.copytree("data", place / "data")
        monkeypatch.setenv("LFS_DATA", str(place / "data"))
        yield place
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("download sample --size 70kB", "needs 140 kB and"),
        ("tokenize sample --vocab 310", "No space left"),
        ("train tiny.json", "a checkpoint in "),
        ("train tiny.json --resume last --set steps=3", "a checkpoint in "),
        ("report", "No space left"),
    ],
)
def test_a_full_disk_loses_nothing(line: str, error: str, disk: Path) -> None:
    filler = disk / "filler"
    before = files(disk)
    filler.write_bytes(bytes(shutil.disk_usage(disk).free))
    result = lfs(*shlex.split(line))
    assert (result.exit_code, result.stdout) == (1, "")
    assert error in result.stderr
    assert "\n\nhint: " in result.stderr
    filler.unlink()
    after = files(disk)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.endswith((".tmp", ".draft", ".part"))]
    assert lfs(*shlex.split(line)).exit_code == 0
