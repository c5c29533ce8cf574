"""`lfs tokenize` as a way to look at tokenizers: `--text`, `--file`, `--compare`, `--export`, `--sample`."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.cli.pieces import escaped, marked
from lfs_cli.runs.pieces import differences
from lfs_cli.tokenizer import Tokenizer, learn_bpe

STORY = "Once upon a time there was a cat. The cat sat on the mat; it wasn't sad, because its friends brought apples."
BYTES = {id: bytes([id]) for id in range(256)}


def lfs(*arguments: object):
    result = CliRunner().invoke(app, ["tokenize", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def learned(data_folder: Path, tmp_path: Path) -> Tokenizer:
    """A tokenizer in the data folder, and the dataset that it was learned on."""
    raw = data_folder / "raw" / "tiny"
    raw.mkdir(parents=True)
    (raw / "train.txt").write_text(f"{STORY}<|endoftext|>\n" * 40)
    (raw / "valid.txt").write_text("The mat was upon a cat, once upon a time.<|endoftext|>\n" * 3)
    tokenizer = Tokenizer(*learn_bpe(raw / "train.txt", 300, ["<|endoftext|>"]), ["<|endoftext|>"])
    tokenizer.save(data_folder / "tokenizers" / "tiny-300")
    Tokenizer(BYTES, [], ["<|endoftext|>"]).save(tmp_path / "bytes")
    return tokenizer


def rows_of(stdout: str) -> list[list[str]]:
    return [line.split("\t") for line in stdout.splitlines()]


def test_a_pipe_gets_one_line_a_token(learned: Tokenizer, data_folder: Path) -> None:
    text = "The cat é\t\\n\n<|endoftext|>\x1b[31m\u202e"
    result = lfs("--text", text)
    header, *rows = rows_of(result.stdout)
    assert header == ["id", "text", "start", "stop", "special"]
    assert [int(row[0]) for row in rows] == learned.encode(text)
    assert [(int(row[2]), int(row[3])) for row in rows][-1][1] == len(text.encode())
    assert "".join(row[1] for row in rows) == r"The cat \xc3\xa9\t\\n\n<|endoftext|>\x1b[31m\xe2\x80\xae"
    assert [row[1] for row in rows if row[4]] == ["<|endoftext|>"]
    assert "\x1b" not in result.stdout
    assert f"{len(rows)} tokens, {len(text.encode())} bytes" in result.stderr
    assert str(data_folder / "tokenizers" / "tiny-300") in result.stderr


def test_json_holds_the_same(learned: Tokenizer) -> None:
    report = json.loads(lfs("--text", "The cat", "--json").stdout)
    assert [row["id"] for row in report["rows"]] == learned.encode("The cat")
    assert "".join(row["text"] for row in report["rows"]) == "The cat"
    assert (report["tokens"], report["bytes"]) == (len(report["rows"]), 7)
    assert report["bytes_per_token"] == 7 / len(report["rows"])


@pytest.mark.parametrize("content", [b"", b"caf\xe9 \xf0\x9f\n", b"\0\xff\xfe", "中文 ".encode() * 3000])
def test_a_file_of_any_bytes_is_shown(learned: Tokenizer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    report = json.loads(lfs("--file", tmp_path / "text", "--json").stdout)
    assert learned.decode_bytes(row["id"] for row in report["rows"]) == content
    assert report["bytes"] == len(content)
    shown = lfs("--file", tmp_path / "text").stdout.splitlines()
    assert len(shown) == (1 + len(report["rows"]) if content else 0)


def test_standard_input_is_a_file(learned: Tokenizer) -> None:
    line = [sys.executable, "-m", "lfs_cli", "tokenize", "--file", "-", "--quiet"]
    shown = subprocess.run(line, input="The cat", capture_output=True, text=True, check=True).stdout
    assert [int(row[0]) for row in rows_of(shown)[1:]] == learned.encode("The cat")


def on_terminal(*arguments: object, columns: int = 40, **environment: str) -> str:
    """Return what a terminal of so many columns is sent on stdout."""
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "lfs_cli", "tokenize", *map(str, arguments)]
    variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    variables |= {"COLUMNS": str(columns), "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(line, stdout=theirs, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=variables)
    os.close(theirs)
    output = io.BytesIO()
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        output.write(block)
    process.communicate()
    assert process.returncode == 0
    os.close(ours)
    return output.getvalue().decode().replace("\r\n", "\n")


def test_a_terminal_shows_tokens_above_their_ids(learned: Tokenizer) -> None:
    text = "The cat\n\tate · 中 \u0301x\x1b[2J<|endoftext|>" + "apples " * 20
    plain = on_terminal("--text", text, NO_COLOR="1")
    assert "\x1b" not in plain.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    plain = plain.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    pairs = [block.split("\n") for block in plain.rstrip("\n").split("\n\n")]
    ids, labels = [], []
    for label_line, id_line in pairs:
        assert max(len(label_line), len(id_line)) <= 40
        ids += map(int, id_line.split())
        labels += label_line.split()
    assert ids == learned.encode(text)
    assert len(labels) == len(ids)
    assert {"↵", "⇥", r"\x1b", "<|endoftext|>", r"\xc2", r"\xe4"} <= set(labels)
    assert pairs[0][0].endswith("↵")  # a line end ends the row
    coloured = on_terminal("--text", text)
    assert "\x1b[30;48" in coloured
    assert "\x1b[2J" not in coloured


def test_a_token_wider_than_the_terminal_goes_on_below(data_folder: Path, tmp_path: Path) -> None:
    wide = Tokenizer({**BYTES, 256: b"=" * 2}, [(b"=", b"=")], ["<|" + "a" * 50 + "|>"])
    wide.save(tmp_path / "wide")
    shown = on_terminal("--tokenizer", tmp_path / "wide", "--text", f"==<|{'a' * 50}|>==", columns=20, NO_COLOR="1")
    lines = shown.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "").split("\n")
    assert max(map(len, lines)) <= 20
    assert [int(id) for line in lines for id in line.split() if id.isdecimal()] == [256, 257, 256]
    assert sum(line.count("a") for line in lines) == 50


@pytest.mark.parametrize(
    ("token", "marks", "shown"),
    [
        (b" a\n\t", {}, r" a\n\t"),
        (b" a\n", {" ": "·", "\n": "↵"}, "·a↵"),
        ("·".encode(), {" ": "·"}, r"\xb7"),
        (b"_", {" ": "_"}, r"\x5f"),
        (b"\\n", {}, r"\\n"),
        (b"\xe4\xb8", {}, r"\xe4\xb8"),
        ("é\u200b\xa0\u2028".encode(), {}, r"é\u200b\xa0\u2028"),
        (b"\x1b[31m\x7f\x00", {}, r"\x1b[31m\x7f\x00"),
    ],
)
def test_what_cannot_be_seen_is_escaped(token: bytes, marks: dict[str, str], shown: str) -> None:
    assert escaped(token, marks) == shown


def test_a_mark_does_not_sit_on_the_token_before() -> None:
    assert marked("\u0301x".encode()) == "\u25cc\u0301x"
    assert marked(b" x") in ("·x", "_x")


def test_two_tokenizers_are_compared_on_the_validation_text(
    learned: Tokenizer, tmp_path: Path, data_folder: Path
) -> None:
    report = json.loads(lfs("tiny", "--compare", tmp_path / "bytes", "--json").stdout)
    text = (data_folder / "raw" / "tiny" / "valid.txt").read_text()
    first, second = report["rows"]
    assert (first["tokens"], second["tokens"]) == (len(learned.encode(text)), len(text) - 3 * len("<|endoftext|>") + 3)
    assert first["bytes/token"] == len(text) / first["tokens"]
    assert report["shared_tokens"] == 257
    assert first["shared %"] == pytest.approx(100 * 257 / 300)
    assert report["differences"][0]["times"] >= 3
    for row in report["differences"]:
        assert row["first"].replace("|", "") == row["second"].replace("|", "") == row["text"]
        assert len(row["second"].split("|")) > len(row["first"].split("|"))
    shown = lfs("tiny", "--compare", tmp_path / "bytes")
    assert "fewer tokens than" in shown.stderr
    table, examples = shown.stdout.split("\n\n")
    assert len(table.splitlines()) == 3
    assert len(examples.splitlines()) == 1 + len(report["differences"])


def test_the_same_tokenizer_has_no_differences(learned: Tokenizer, data_folder: Path) -> None:
    result = lfs("--text", "The cat", "--compare", data_folder / "tokenizers" / "tiny-300")
    assert result.stdout.count("\n") == 3
    assert "they cut this text alike" in result.stderr
    assert "both need" in result.stderr
    assert "the text is empty" in lfs("--text", "", "--compare", data_folder / "tokenizers" / "tiny-300").stderr


def test_differences_are_the_stretches_between_common_cuts() -> None:
    first = Tokenizer({**BYTES, 256: b"ab", 257: b"bc"}, [(b"a", b"b"), (b"b", b"c")])
    second = Tokenizer({**BYTES, 256: b"bc", 257: b"xa"}, [(b"b", b"c"), (b"x", b"a")])
    found = differences(first, second, "abc dabc")
    assert [(d.text, d.first, d.second, d.times) for d in found] == [(b"abc", (b"ab", b"c"), (b"a", b"bc"), 2)]


@pytest.mark.parametrize("format", ["gpt2", "huggingface", "tiktoken"])
def test_what_is_exported_is_the_same_tokenizer(
    learned: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lfs("--export", format)
    assert Tokenizer.load(tmp_path / f"tiny-300-{format}").hash == learned.hash
    assert "; next: `" in result.stderr
    report = json.loads(lfs("tiny", "--export", format, "--out", "other", "--json").stdout)
    assert Tokenizer.load(tmp_path / "other").hash == learned.hash
    assert all(Path(row["file"]).stat().st_size == row["bytes"] for row in report["rows"])


def test_pattern_and_specials_reach_a_file_that_does_not_say_them(learned: Tokenizer, tmp_path: Path) -> None:
    lfs("--export", "tiktoken", "--out", tmp_path / "t")
    (tmp_path / "t" / "tokenizer.tiktoken.json").unlink()
    path = tmp_path / "t" / "tokenizer.tiktoken"
    line = ("--tokenizer", path, "--pattern", "gpt2", "--special", "<|endoftext|>", "--text", STORY, "--json")
    assert [row["id"] for row in json.loads(lfs(*line).stdout)["rows"]] == learned.encode(STORY)


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["--text", "a", "--file", "b"], 2, "`text` and `file` are both given", "name one text"),
        (["--text", "a", "--export", "gpt2"], 2, "`export` and `text` are both given", "one after the other"),
        (["--out", "x"], 2, "`out` is given without `export`", "--export huggingface"),
        (["--export", "gpt-2"], 2, "`export` cannot be", "gpt2"),
        (["--sample", "lots"], 2, "`--sample lots` is not a size", "`--sample 2GB`"),
        (["--sample", "0"], 2, "`--sample 0` is not a size", "`--sample 2GB`"),
        (["--sample", "9" * 400], 2, "is not a size", "`--sample 2GB`"),
        (["--max-words", "many"], 2, "`--max-words` must be a whole number, not `many`", "`--max-words 10000000`"),
        (["--max-words", "0"], 2, "`max_words` must be at least 1", "the default is"),
        (["--file", "absent.txt"], 1, "no file `absent.txt`", "check the path"),
        (["--file", "."], 1, "`.` is a folder", "name a file in it"),
        (["--compare", "absent"], 1, "no tokenizer `absent`", "lfs tokenize"),
        (["other", "--text", "a"], 1, "no tokenizer of `other` in", "`lfs tokenize other`"),
        (["--tokenizer", "absent", "--text", "a"], 1, "no tokenizer `absent`", "lfs tokenize"),
        (["--text", "a", "--pattern", "gpt4", "--tokenizer", "."], 2, "unknown pattern `gpt4`", "gpt2"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.usefixtures("learned")
def test_a_slip_is_explained(arguments: list[str], code: int, error: str, hint: str) -> None:
    result = lfs(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert error in result.stderr.splitlines()[0]
    assert hint in result.stderr


def test_exporting_onto_the_tokenizer_itself_is_refused(learned: Tokenizer, data_folder: Path) -> None:
    folder = data_folder / "tokenizers" / "tiny-300"
    result = lfs("--export", "huggingface", "--out", folder)
    assert "is where the tokenizer comes from" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]


def test_a_comparison_reads_no_pipe(learned: Tokenizer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = lfs("--file", tmp_path / "pipe", "--compare", tmp_path / "bytes")
    assert "is not a regular file" in result.stderr


def test_limits_reach_learning(learned: Tokenizer) -> None:
    result = lfs("tiny", "--vocab", "290", "--sample", "1.5 kB", "--max-words", "5", "--json")
    report = json.loads(result.stdout)
    assert 0 < report["rows"][0]["bytes"] < 2000
    assert "rare words" in result.stderr
    assert "did not fit into `max_words` (5)" in result.stderr
    again = json.loads(lfs("tiny", "--vocab", "290", "--json").stdout)
    assert again["rows"][0]["made"] == "new"  # learned on all of the text, it is another tokenizer
    assert again["rows"][0]["bytes"] > 4000


def test_the_report_tells_time_memory_and_fallbacks(learned: Tokenizer, data_folder: Path) -> None:
    (data_folder / "raw" / "tiny" / "valid.txt").write_text("中 a")
    result = lfs("tiny", "--vocab", "290", "--json")
    report = json.loads(result.stdout)
    learn, train, valid = report["rows"]
    assert set(report["parts"]) == {"counting", "merging"}
    assert 0 < sum(report["parts"].values()) <= learn["seconds"]
    assert train["fallback_share"] == 0
    assert valid["fallback_share"] == pytest.approx(3 / valid["tokens"])
    assert all(row["peak_bytes"] is None or row["peak_bytes"] > 1e7 for row in report["rows"])
    assert report["pile_seconds"] == pytest.approx(825e3 / train["MB/s"])
    assert "825 GB, the size of The Pile, would take" in result.stderr
    again = json.loads(lfs("tiny", "--vocab", "290", "--json").stdout)
    assert again["rows"][2]["fallback_share"] == valid["fallback_share"]
    assert again["pile_seconds"] is None
