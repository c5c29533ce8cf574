import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lfs_cli.cli.app import app
from lfs_cli.cli.console import Console
from lfs_cli.cli.generate import TextView, _ask
from lfs_cli.config import GenerateConfig, ModelConfig, TrainConfig, dump_config
from lfs_cli.errors import ConfigError
from lfs_cli.generation.language_model import LanguageModel, Piece
from lfs_cli.model import Transformer, save_model
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.generate import open_model
from lfs_cli.tokenizer import Tokenizer

END = "<|endoftext|>"


def write_run(data: Path, name: str, model_seed: int = 0) -> Path:
    """A run with one checkpoint: random weights, one token a byte."""
    run = RunFolder(data / "runs" / name)
    torch.manual_seed(model_seed)
    shape = {"width": 32, "layers": 1, "heads": 4, "feed_forward_width": 48}
    save_model(Transformer(ModelConfig(vocab_size=257, context_length=32, **shape)), run.checkpoint(7))
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], [END])
    tokenizer.save(run.checkpoint(7))
    (run.checkpoint(7) / "state.json").write_text(json.dumps({"tokenizer_hash": tokenizer.hash}))
    for pointer in ("best", "latest"):
        (run.checkpoints / pointer).write_text("step-000007\n")
    run.config.write_text(dump_config(TrainConfig()))
    return run.path


def lfs(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *args], input=stdin)


def text_of(result: Result) -> str:
    """What stdout got, with the carriage returns that `result.stdout` leaves out."""
    return result.stdout_bytes.decode()


@pytest.fixture
def run(data_folder: Path) -> Path:
    return write_run(data_folder, "2026-11-22-tiny-a1b2")


def written(run: Path, prompt: str, **options: Any) -> str:
    return LanguageModel.load(run, device="cpu").generate(prompt, **options)


def test_stdout_is_the_prompt_and_its_continuation(run: Path) -> None:
    result = lfs("--prompt", "Once", "--max-tokens", "8", "--seed", "3")

    assert result.exit_code == 0
    assert text_of(result) == "Once" + written(run, "Once", max_tokens=8, seed=3) + "\n"
    assert "step-000007" in result.stderr
    assert "8 tokens in " in result.stderr
    assert " tokens/s; next: `--seed 4` writes another text\n" in result.stderr


def test_quiet_leaves_the_text_alone(run: Path) -> None:
    result = lfs("--prompt", "Once", "--max-tokens", "8", "--quiet")

    assert result.stdout.startswith("Once")
    assert result.stderr == ""


def test_several_prompts_are_separated_as_in_a_corpus(run: Path) -> None:
    result = lfs("--prompt", "Once", "--prompt", "A", "--prompt", "The end", "--max-tokens", "40")

    texts = LanguageModel.load(run).generate_batch(["Once", "A", "The end"], max_tokens=40)
    expected = [f"{prompt}{text}" for prompt, text in zip(["Once", "A", "The end"], texts, strict=True)]
    assert text_of(result) == f"{END}\n".join(text if text.endswith("\n") else f"{text}\n" for text in expected)


def test_options_are_names_for_settings(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"prompts": ["Once"], "max_tokens": 9, "sampling": {"temperature": 1.5, "top_k": 7}}))
    options = ["--prompt", "Once", "--max-tokens", "9", "--temperature", "1.5", "--top-k", "7"]
    further = ["--top-p", "0.5", "--min-p", "0.01", "--seed", "2", "--no-cache"]
    settings = ["sampling.top_p=0.5", "sampling.min_p=0.01", "seed=2", "cache=false"]

    by_options = lfs(*options, *further)
    by_settings = lfs("--config", str(file), *[word for setting in settings for word in ("--set", setting)])

    expected = written(run, "Once", max_tokens=9, temperature=1.5, top_k=7, top_p=0.5, min_p=0.01, seed=2)
    assert text_of(by_options) == text_of(by_settings) == f"Once{expected}\n"


def test_the_newest_run_with_a_checkpoint_is_the_default(run: Path, data_folder: Path) -> None:
    newest = write_run(data_folder, "2026-11-22-tiny-0000", model_seed=1)
    unfinished = RunFolder(data_folder / "runs" / "2026-11-23-tiny-ffff")
    unfinished.path.mkdir()
    unfinished.config.write_text(dump_config(TrainConfig()))
    for age, path in enumerate([unfinished.path, newest, run]):
        os.utime(path / "config.json", (time.time() - age, time.time() - age))

    result = lfs("--prompt", "Once", "--max-tokens", "9")

    assert text_of(result) == f"Once{written(newest, 'Once', max_tokens=9)}\n"
    assert lfs("--prompt", "Once", "--run", "last", "--max-tokens", "9").stdout == result.stdout


@pytest.mark.parametrize(
    "named",
    [
        lambda run: run.name,
        lambda run: "tiny-a1",
        str,
        lambda run: str(run / "checkpoints" / "step-000007"),
    ],
    ids=["name", "part of the name", "run folder", "checkpoint folder"],
)
def test_a_run_is_found_by(named: Callable[[Path], str], run: Path, data_folder: Path) -> None:
    write_run(data_folder, "2026-11-22-other-0000", model_seed=1)

    result = lfs("--prompt", "Once", "--run", named(run), "--max-tokens", "9")

    assert text_of(result) == f"Once{written(run, 'Once', max_tokens=9)}\n"


def test_json_is_one_object(run: Path) -> None:
    result = lfs("--prompt", "Once", "--prompt", "", "--max-tokens", "5", "--json", "--set", "stop=null")

    shown = json.loads(result.stdout)
    assert shown["run"] == run.name
    assert shown["checkpoint"].endswith("step-000007")
    assert [row.pop("tokens_per_second") > 0 for row in shown["rows"]] == [True, True]
    texts = LanguageModel.load(run).generate_batch(["Once", ""], max_tokens=5, stop=None)
    assert shown["rows"] == [
        {"prompt": prompt, "text": text, "tokens": 5, "stopped": "max_tokens"}
        for prompt, text in zip(["Once", ""], texts, strict=True)
    ]


@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [("Once\n", "Once"), ("Once\r\n", "Once"), ("two\nlines\n\n", "two\nlines\n"), ("", ""), ("\ufeffé", "é")],
)
def test_a_prompt_comes_through_a_pipe(run: Path, stdin: str, prompt: str) -> None:
    expected = prompt + written(run, prompt, max_tokens=6, stop=None)

    result = lfs("--max-tokens", "6", "--set", "stop=null", stdin=stdin.encode())

    assert text_of(result) == expected + ("" if expected.endswith("\n") else "\n")


def test_a_prompt_option_leaves_the_pipe_alone(run: Path) -> None:
    assert lfs("--prompt", "Once", stdin="never read").stdout.startswith("Once")


def test_explain_lists_the_settings() -> None:
    result = lfs("--explain")

    assert result.exit_code == 0
    assert "sampling.min_p\t0.0\t" in result.stdout


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message", "hint"),
    [
        (["--run", "nothing"], "a", 1, "no run `nothing` in ", "choose one of: 2026-11-22-tiny-a1b2"),
        (["--run", "tiny-b2"], "a", 1, "no run `tiny-b2` in ", "2026-11-22-tiny-a1b2"),
        (["--set", "checkpoint=step-9"], "a", 1, "no checkpoint `step-9` in ", "step-000007"),
        ([], "many words " * 9, 2, "has 99 tokens, and the model reads at most 32", "shorten it by 67 tokens"),
        ([], b"caf\xe9", 2, "the prompt on stdin is not UTF-8 text (byte 3)", "`iconv -t utf-8`"),
        (["--prompt", "caf\udce9"], None, 2, "a prompt is not UTF-8 text (character 3)", "UTF-8"),
        (["--temperature", "-1"], "a", 2, "`sampling.temperature` must be at least 0", "default is `0.8`"),
        (["--top-p", "1.5"], "a", 2, "`sampling.top_p` must be at most 1", "default is `0.95`"),
        (["--max-tokens", "0"], "a", 2, "`max_tokens` must be at least 1", "default is `256`"),
        (["--max-tokens", "few"], "a", 2, "`--max-tokens` must be a whole number, not `few`", "`--max-tokens 100`"),
        (["--set", "samplng.top_k=1"], "a", 2, "unknown key `samplng`", "did you mean `sampling`?"),
        (["--set", "sampling.others.topk.k=1"], "a", 2, "unknown sampler `topk`", "did you mean `top_k`?"),
        (["--set", "stop=<|end|>"], "a", 2, "`stop` is `<|end|>`, which is no special token", "<|endoftext|>"),
        (["--set", 'plugins=["no_such_module"]'], "a", 2, "plugin `no_such_module`", "name a module"),
        (["--promt", "a"], None, 2, "unknown option `--promt`", "did you mean `--prompt`?"),
    ],
)
def test_bad_input_gets_an_error_and_a_hint(
    run: Path, args: list[str], stdin: str | bytes | None, code: int, message: str, hint: str
) -> None:
    result = lfs(*args, stdin=stdin)

    error, _, rest = result.stderr.partition("\n\nhint: ")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert hint in rest


def test_without_any_run_the_hint_says_how_to_get_one(data_folder: Path) -> None:
    result = lfs("--prompt", "Once")

    assert result.exit_code == 1
    assert result.stderr == (
        f"error: no trained run in {data_folder / 'runs'}\n\nhint: run `lfs train quickstart.json` first\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO, prompts: tuple[str, ...], pieces: list[Piece], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a stdout such as ``out`` gets to see."""
    monkeypatch.setattr(sys, "stdout", out)
    view = TextView(Console(), prompts)
    for piece in pieces:
        view.show(piece)
    return out.getvalue()


def test_texts_written_side_by_side_are_shown_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [
        Piece(1, "b", 1),
        Piece(0, "a", 1),
        Piece(2, "c\n", 1, "end of text"),
        Piece(1, "b", 2, "end of text"),
        Piece(0, "a", 2, "max_tokens"),
    ]

    text = shown(io.StringIO(), ("1:", "2:", "3:"), pieces, monkeypatch)

    assert text == f"1:aa\n{END}\n2:bb\n{END}\n3:c\n"


def test_a_terminal_shows_a_dim_prompt_and_no_escapes_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    pieces = [Piece(0, "\x1b[2J\x9b1m\ta\r\n", 3, "max_tokens")]

    text = shown(Terminal(), ("Once\x1b]0;owned\x07",), pieces, monkeypatch)

    assert text == "\x1b[2mOnce�]0;owned�\x1b[22m�[2J�1m\ta\n"


def test_no_color_leaves_the_prompt_undimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    assert shown(Terminal(), ("Once",), [Piece(0, " more", 3, "max_tokens")], monkeypatch) == "Once more\n"


def ask(run: Path, answers: list[Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Run the prompt loop with a person who gives these answers; an exception is what the keyboard raises."""
    waiting = iter(answers)

    def answer(question: str = "") -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    config = GenerateConfig(run=str(run), **{"max_tokens": 6, "stop": None, **settings})
    _ask(Console(), open_model(config, DataFolder(run.parent.parent)), config)
    assert next(waiting, None) is None


@pytest.mark.parametrize("goodbye", ["", EOFError()], ids=["empty line", "end of input"])
def test_the_prompt_loop_continues_each_line_with_a_seed_of_its_own(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], goodbye: Any
) -> None:
    ask(run, ["Once", "Once", goodbye], monkeypatch, seed=5)

    texts = [written(run, "Once", max_tokens=6, stop=None, seed=seed) for seed in (5, 6)]
    assert capsys.readouterr().out == "".join(f"Once{text}\n" for text in texts)
    assert texts[0] != texts[1]


def test_the_prompt_loop_survives_a_line_that_does_not_fit(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(run, ["x" * 40, "Once"], monkeypatch)

    shown = capsys.readouterr()
    assert "has 40 tokens, and the model reads at most 32; shorten it by 8 tokens" in shown.err
    assert shown.out.startswith("Once")


def test_ctrl_c_stops_the_text_and_not_the_prompt_loop(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = TextView.show, []

    def show(view: TextView, piece: Piece) -> None:
        real(view, piece)
        calls.append(piece)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TextView, "show", show)
    ask(run, ["Once", "Again"], monkeypatch)

    assert "\nAgain" in capsys.readouterr().out
    assert len(calls) == 3 + 6


def test_json_and_the_prompt_loop_exclude_each_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfs_cli.cli.generate import command

    monkeypatch.setattr(sys, "stdin", Terminal())

    with pytest.raises(ConfigError, match="`--json` needs a prompt"):
        command(as_json=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_session_at_a_terminal(run: Path, data_folder: Path) -> None:
    import pty

    outside, inside = pty.openpty()
    environment = {**os.environ, "LFS_DATA": str(data_folder), "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "lfs_cli", "generate", "--max-tokens", "5", "--set", "stop=null"]
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, env=environment)
    os.close(inside)
    shown = b""
    try:
        os.write(outside, b"Once\n\n")
        while chunk := _read(outside):
            shown += chunk
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(outside)

    assert b"an empty line or Ctrl-D leaves" in shown
    assert b"5 tokens in " in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so when the other side is closed
        return b""


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(run: Path, data_folder: Path) -> None:
    environment = {**os.environ, "LFS_DATA": str(data_folder)}
    line = f"{sys.executable} -m lfs_cli generate --prompt Once --max-tokens 2000 --set stop=null | head -c 20"
    result = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, check=False)

    assert len(result.stdout) == 20
    assert b"Traceback" not in result.stderr
