"""Hostile files: what a stranger could send, one case each, and that nothing of it runs, leaves its folder or lies.

A case gets a folder with a run, a dataset and a tokenizer in `data/`, is the current folder's only user, and asserts
what must hold. Whatever it does, nothing may appear beside the folder: `outside` is compared before and after.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import torch
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.cli.console import Console
from lfs_cli.cli.generate import TextView
from lfs_cli.config import ReportConfig, TrainConfig, load_config
from lfs_cli.corpus import shards
from lfs_cli.corpus.sources import read_manifest
from lfs_cli.corpus.text import BLOCK_BYTES, unpack
from lfs_cli.errors import LfsError
from lfs_cli.generation.language_model import LanguageModel, Piece, find_checkpoint
from lfs_cli.model.checksums import write_checksums
from lfs_cli.reports.table import append_row
from lfs_cli.runs.changes import resumed_config
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.journal import Journal, Samples
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.report import report
from lfs_cli.runs.train import train
from lfs_cli.tokenizer import Tokenizer
from tests.reliability import formats
from tests.reliability.formats import RUN

NAME = "hostile"
HELP = "files that a stranger could send: none runs code, leaves its folder, fills the memory or steers a terminal"

SECONDS = 30
CHECKPOINT = Path("data/runs") / RUN / "checkpoints" / "step-000004"
TERMINAL = "\x1b[2J\x1b]52;c;cm0gLXJm\x07\r\x9b31m\u202egnp.exe\u2066\x7f\x00"
"""Clears the screen, fills the clipboard, goes back to the line's start, colors by one character, turns text around."""

MARKUP = """<script>alert(1)</script>"'><img src=x onerror=alert(2)><svg/onload=alert(3)></pre></table><!--"""


class Case(NamedTuple):
    """What a stranger tries, and the function that lets him."""

    name: str
    run: Callable[[], None]


CASES: list[Case] = []


def case(name: str, /, **choices: list[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds a case, or one for each of the values of its one argument in ``choices``."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for argument, values in choices.items():
            CASES.extend(
                Case(
                    f"{name}: {getattr(value, '__name__', value)}",
                    lambda value=value, argument=argument: function(**{argument: value}),
                )
                for value in values
            )
        if not choices:
            CASES.append(Case(name, function))
        return function

    return add


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """Require an LfsError that has each of ``words`` in its message or hint."""
    try:
        yield
    except LfsError as error:
        told = f"{error} {error.hint}"
        assert all(word in told for word in words), told
    else:
        raise AssertionError("it was accepted")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal() -> Iterator[tuple[Terminal, Terminal]]:
    """Yield stdout and stderr, both terminals."""
    out, error = Terminal(), Terminal()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield out, error


def assert_tame(text: str) -> None:
    """Require that nothing in ``text`` steers a terminal, but for the colors and styles that lfs itself writes."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    bad = {character for character in text if character in TERMINAL and not character.isprintable()}
    assert not bad, (bad, text)
    assert text.strip()


# Code in place of data


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


READERS: dict[str, Callable[[], Any]] = {
    f"{CHECKPOINT}/model.safetensors": lambda: LanguageModel.load(CHECKPOINT, device="cpu"),
    f"{CHECKPOINT}/config.json": lambda: LanguageModel.load(CHECKPOINT, device="cpu"),
    f"{CHECKPOINT}/tokenizer.json": lambda: LanguageModel.load(CHECKPOINT, device="cpu"),
    f"{CHECKPOINT}/state.json": lambda: formats.read_whole_checkpoint(Path()),
    f"{CHECKPOINT}/state.safetensors": lambda: formats.read_whole_checkpoint(Path()),
    f"data/runs/{RUN}/config.json": lambda: resumed_config(RunFolder(Path("data/runs") / RUN)),
    "data/raw/mine/manifest.json": lambda: read_manifest(Path("data/raw/mine")),
    "data/tokens/mine-270/train-00000.bin": lambda: shards.Tokens.open(Path("data/tokens/mine-270"), "train"),
    "data/tokenizers/mine-270/tokenizer.json": lambda: Tokenizer.load("data/tokenizers/mine-270"),
    "mine.json": lambda: load_config(TrainConfig, "mine.json"),
}
"""File -> what reads it, for files without which nothing goes on."""

TOLERATED: dict[str, Callable[[], Any]] = {
    "data/tokens/mine-270/manifest.json": lambda: formats.read_tokens(Path()),
    f"data/runs/{RUN}/metrics.jsonl": lambda: formats.read_report(Path()),
    f"data/runs/{RUN}/environment.json": lambda: formats.read_report(Path()),
    f"data/runs/{RUN}/result.json": lambda: formats.read_report(Path()),
    f"data/runs/{RUN}/samples.md": lambda: formats.read_report(Path()),
    f"data/runs/{RUN}/checkpoints/best": lambda: find_checkpoint(Path("data/runs") / RUN),
}
"""The same for files that are made again, or left out with a warning."""


def put(file: str, content: bytes) -> None:
    """Put ``content`` in place of a file, with checksums that fit it."""
    Path(file).unlink(missing_ok=True)
    Path(file).write_bytes(content)
    write_checksums(CHECKPOINT)


@case("a pickle instead of", file=list(READERS))
def _(file: str) -> None:
    for content in (pickle.dumps(Bomb()), _torch_file()):
        put(file, content)
        with refused():
            READERS[file]()
        assert not Path("exploded").exists()


@case("a pickle instead of", file=["save_checkpoint's file"])
def _(file: str) -> None:
    Path("checkpoint").write_bytes(_torch_file())
    with refused("not a checkpoint"):
        formats.read_one_file(Path())
    assert not Path("exploded").exists()


@case("that would work: the bomb of these cases explodes when it is unpickled")
def _() -> None:
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("exploded").exists()


def _torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Bomb()}, buffer)
    return buffer.getvalue()


@case("an object of a class named in JSON, in", file=[file for file in READERS if file.endswith(".json")])
def _(file: str) -> None:
    put(file, b'{"__class__": "pathlib.Path.touch", "py/object": "os.system", "__reduce__": ["exploded"]}')
    with refused():
        READERS[file]()
    assert not Path("exploded").exists()


@case("JSON nested 200,000 deep in", file=[file for file in READERS if file.endswith(".json")])
def _(file: str) -> None:
    for content in (b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 300 + b"1" + b"}" * 300):
        put(file, content)
        with refused():
            READERS[file]()


# Sizes and devices


@case("a terabyte of nothing in", file=[file for file in READERS if not file.endswith((".safetensors", ".bin"))])
def _(file: str) -> None:
    Path(file).unlink(missing_ok=True)
    with Path(file).open("wb") as hole:
        hole.truncate(1 << 40)
    with refused():
        _without_checksums(file)


@case("a terabyte of nothing in", file=list(TOLERATED))
def _(file: str) -> None:
    Path(file).unlink(missing_ok=True)
    with Path(file).open("wb") as hole:
        hole.truncate(1 << 40)
    TOLERATED[file]()


def _without_checksums(file: str) -> None:
    """Read a file; of a checkpoint as one that has no checksums, which would take long to compare."""
    (CHECKPOINT / "SHA256SUMS").unlink(missing_ok=True)
    READERS[file]()


@case("a pipe that nobody writes to in place of", file=list(READERS))
def _(file: str) -> None:
    Path(file).unlink(missing_ok=True)
    os.mkfifo(file)
    with refused():
        READERS[file]()
    with refused():
        _without_checksums(file)


@case("a pipe that nobody writes to in place of", file=list(TOLERATED))
def _(file: str) -> None:
    Path(file).unlink(missing_ok=True)
    os.mkfifo(file)
    TOLERATED[file]()


@case("an endless device in place of", file=[*READERS, *TOLERATED])
def _(file: str) -> None:
    Path(file).unlink(missing_ok=True)
    Path(file).symlink_to("/dev/zero")
    if file in TOLERATED:
        TOLERATED[file]()
    else:
        with refused():
            READERS[file]()


@case("weights that claim", claim=["a header of 2^63 bytes", "a tensor of 2^62 numbers", "2^40 bytes of data"])
def _(claim: str) -> None:
    entry = {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64 - 1]}
    if "data" in claim:
        entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    header = json.dumps({"embedding.weight": entry}).encode()
    size = 2**63 if "header" in claim else len(header)
    put(f"{CHECKPOINT}/model.safetensors", size.to_bytes(8, "little") + header + bytes(64))
    with refused():
        READERS[f"{CHECKPOINT}/model.safetensors"]()


@case("a model config that claims", setting=["layers", "context_length", "width", "vocab_size", "heads"])
def _(setting: str) -> None:
    path = CHECKPOINT / "config.json"
    put(str(path), json.dumps({**json.loads(path.read_text()), setting: 10**9}).encode())
    began = time.perf_counter()
    with refused():
        READERS[str(path)]()
    assert time.perf_counter() - began < 5


@case("a shard that claims 2^60 ids")
def _() -> None:
    path = Path("data/tokens/mine-270/train-00000.bin")
    raw = bytearray(path.read_bytes())
    raw[16:24] = (2**60).to_bytes(8, "little")
    path.write_bytes(raw)
    with refused(str(path)):
        READERS[str(path)]()


@case("100 MB of text packed into 100 kB: it is read a piece at a time")
def _() -> None:
    packed = gzip.compress(b"once " * 20_000_000)
    assert len(packed) < 200_000
    sizes = [len(block) for block in unpack([packed], "bomb.gz")]
    assert sum(sizes) == 100_000_000
    assert max(sizes) <= BLOCK_BYTES


# Names and links that lead elsewhere


@case("a pointer that leads out of the run", name=["../../other", "/", "..", "../../../../secret", "step-000004/.."])
def _(name: str) -> None:
    shutil.copytree(CHECKPOINT, "../secret", dirs_exist_ok=True)
    try:
        for pointer in ("best", "latest"):
            Path(f"data/runs/{RUN}/checkpoints/{pointer}").write_text(name)
            assert find_checkpoint(Path("data/runs") / RUN, pointer).resolve() == CHECKPOINT.resolve()
            assert RunFolder(Path("data/runs") / RUN).best().resolve() == CHECKPOINT.resolve()
    finally:
        shutil.rmtree("../secret")


@case("a checkpoint asked for by a name that leads elsewhere")
def _() -> None:
    with refused("no checkpoint"):
        find_checkpoint(Path("data/runs") / RUN, "../../../raw")


@case("a dataset called", name=["../../outside", "/tmp/outside", "..", ".hidden", "a/b", "a\0b", "-rf"])
def _(name: str) -> None:
    for arguments in (["download", "--from", "story.txt", "--name", name], ["tokenize", "--set", f"dataset={name}"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code in (1, 2), result.output
        assert result.stderr.startswith("error: "), result.stderr


@case("a run called ../../outside")
def _() -> None:
    run = RunFolder.create(Path("data/runs"), "../../outside")
    assert run.path.resolve().parent == Path("data/runs").resolve()


@case("checksums of files elsewhere")
def _() -> None:
    (CHECKPOINT / "SHA256SUMS").write_text(f"{'0' * 64}  ../../../../secret\n")
    with refused("SHA256SUMS"):
        READERS[f"{CHECKPOINT}/model.safetensors"]()


@case("a manifest that names files elsewhere: they are neither read nor removed")
def _() -> None:
    path = Path("data/raw/mine/manifest.json")
    tree = json.loads(path.read_text())
    tree["files"]["../../../story.txt"] = tree["files"]["train.txt"]
    path.write_text(json.dumps(tree))
    before = Path("story.txt").read_bytes()
    assert CliRunner().invoke(app, ["download", "mine"]).exit_code == 0
    assert Path("story.txt").read_bytes() == before


LINKS = [
    "metrics.jsonl",
    "samples.md",
    "result.json",
    "config.json",
    ".training.lock",
    "checkpoints",
    "checkpoints/latest",
]


@case(
    "a run that goes on, of which this is a link elsewhere", name=[*LINKS, "checkpoints/step-000004/model.safetensors"]
)
def _(name: str) -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        target, link = Path(elsewhere) / "target", Path("data/runs") / RUN / name
        if link.is_dir():
            shutil.move(link, target)
        elif link.exists():
            link.rename(target)
        else:
            target.write_text("mine")
        link.symlink_to(target)
        before = _files(Path(elsewhere))
        with refused("link", str(link)):
            train(TrainConfig(), resume=RunFolder(Path("data/runs") / RUN))
        assert _files(Path(elsewhere)) == before


@case(
    "a run that goes on, of which this is a pipe",
    name=["metrics.jsonl", "samples.md", ".training.lock", "checkpoints/x"],
)
def _(name: str) -> None:
    path = Path("data/runs") / RUN / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with refused("neither a file nor a folder"):
        train(TrainConfig(), resume=RunFolder(Path("data/runs") / RUN))


@case("a run that goes on, of which this is a terabyte of nothing", kind=[Journal, Samples])
def _(kind: type[Journal | Samples]) -> None:
    with Path("hole").open("wb") as hole:
        hole.truncate(1 << 40)
    with refused("large"):
        kind(Path("hole")).trim(4)


@case("a run whose report is a link elsewhere: it is not written")
def _() -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        target = Path(elsewhere) / "precious"
        target.write_text("mine")
        (Path("data/runs") / RUN / "report.html").symlink_to(target)
        seen = _Seen()
        result = report(ReportConfig(runs=(RUN,)), DataFolder(Path("data")), seen)
        assert target.read_text() == "mine"
        assert result.pages == []
        assert "link" in seen.warnings[-1]


class _Seen(Observer):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@case("an archive with names that lead elsewhere", kind=["zip", "tar"])
def _(kind: str) -> None:
    if kind == "zip":
        with zipfile.ZipFile("text.zip", "w") as archive:
            archive.writestr("../outside.txt", "once")
    else:
        with tarfile.open("text.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("../outside.txt"))
    result = CliRunner().invoke(app, ["download", "--from", f"text.{kind}", "--name", "packed"])
    assert result.exit_code == 1
    assert "unpack it first" in result.stderr


# Plugins of strangers


def _name_a_plugin() -> Path:
    Path("evil_plugin.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    path = Path("data/runs") / RUN / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "plugins": ["evil_plugin"]}))
    return path.parent


@case("a run that names a plugin", command=["train --resume", "generate --run", "report"])
def _(command: str) -> None:
    run = _name_a_plugin()
    result = CliRunner().invoke(app, [*command.split(), str(run)], input="Once")
    assert not Path("exploded").exists()
    if "train" in command:
        assert result.exit_code == 2, result.output
        assert "`evil_plugin`" in result.stderr
        assert """--set 'plugins=["evil_plugin"]'""" in result.stderr
    else:
        assert result.exit_code == 0, result.output


@case("a plugin that the user names himself is imported")
def _() -> None:
    run = RunFolder(_name_a_plugin())
    assert resumed_config(run, ['plugins=["evil_plugin"]'])[0].plugins == ("evil_plugin",)
    assert resumed_config(run, ["plugins=[]"])[0].plugins == ()
    with refused("evil_plugin"):
        resumed_config(run, ["steps=30"])


# HTML, Markdown


class _Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.text += data


TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "pre", "svg", "line",
    "text", "polyline", "circle", "tspan",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "content", "http-equiv", "class", "viewbox", "role", "aria-label", "x", "x1", "x2", "y",
    "y1", "y2", "text-anchor", "points", "cx", "cy", "r",
}  # fmt: skip


@case("tags in the page of a run, by its", place=["config", "samples", "environment", "result", "folder"])
def _(place: str) -> None:
    run = Path("data/runs") / RUN
    if place == "folder":
        run = run.rename(run.with_name(MARKUP.replace("/", "-")))
    elif place == "samples":
        (run / "samples.md").write_text(MARKUP)
    else:
        tree = {"name": MARKUP, MARKUP: MARKUP, "data": {"dataset": [MARKUP]}, "status": MARKUP, "device": MARKUP}
        (run / f"{place}.json").write_text(json.dumps(tree))
    report(ReportConfig(runs=(run.name,)), DataFolder(Path("data")))
    page = _Page((run / "report.html").read_text())
    assert page.tags <= TAGS, page.tags - TAGS
    assert page.attributes <= ATTRIBUTES, page.attributes - ATTRIBUTES
    assert "alert(1)" in page.text
    assert "default-src 'none'" in (run / "report.html").read_text()


@case("bars, line ends and tags in a row of the experiment table")
def _() -> None:
    table = Path("data/output.md")
    rows = sum(line.startswith("|") for line in table.read_text().splitlines())
    name = f"a | b \\| c\n| d | e |\r\n\u2028| {MARKUP} ![x](javascript:alert(4))"
    append_row(table, {"run": "2026-11-25-evil-0000", "experiment_name": name, "timestamp": "|"})
    append_row(table, {"run": "2026-11-25-good-0000", "experiment_name": "good"})
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == rows + 2
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "<script" not in table.read_text()


# Terminals


@case("a terminal: text that a model wrote")
def _() -> None:
    with terminal() as (out, _):
        view = TextView(Console(), (TERMINAL, "x"))
        view.show(Piece(0, TERMINAL, 1, "end of text"))
        view.show(Piece(1, f"\n{TERMINAL}", 1, "end of text"))
    assert_tame(out.getvalue())


@case("a terminal: tables, titles, notes, warnings and progress")
def _() -> None:
    with terminal() as (out, error):
        console = Console()
        console.results([{TERMINAL: TERMINAL, "b": [TERMINAL]}], title=TERMINAL)
        console.note(TERMINAL)
        console.warning(TERMINAL)
        os.environ["TERM"] = "dumb"
        console.observer.stage(TERMINAL)
        console.observer.warning(TERMINAL)
        Console(as_json=True).results([{TERMINAL: TERMINAL}])
    assert_tame(out.getvalue())
    assert_tame(error.getvalue())
    assert json.loads(out.getvalue().splitlines()[-1])["rows"] == [{TERMINAL: TERMINAL}]


@case("a terminal: an error about", what=["a config", "a setting", "a file name", "a tokenizer", "an option"])
def _(what: str) -> None:
    Path("config.json").write_text(json.dumps({TERMINAL: 1}))
    Path("tokenizer.json").write_text(json.dumps({"model": {"type": TERMINAL}}))
    arguments = {
        "a config": ["train", "config.json"],
        "a setting": ["train", "--set", f"{TERMINAL}={TERMINAL}"],
        "a file name": ["train", f"{TERMINAL}.json"],
        "a tokenizer": ["tokenize", "--text", "x", "--tokenizer", "tokenizer.json"],
        "an option": ["train", f"--{TERMINAL}"],
    }[what]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("error: ")
    assert_tame(result.stderr)


@case("a terminal: tokens with escapes in them")
def _() -> None:
    tokenizer = Tokenizer({id: bytes([id]) for id in range(256)}, [], [TERMINAL])
    tokenizer.save("evil")
    Path("evil.txt").write_text(f"Once {TERMINAL} upon", newline="")
    with terminal() as (out, error), contextlib.suppress(SystemExit):
        app(["tokenize", "--file", "evil.txt", "--tokenizer", "evil"])
    assert_tame(out.getvalue())
    assert_tame(error.getvalue())


@case("a terminal: a run whose every text steers it")
def _() -> None:
    run = Path("data/runs") / RUN
    tree = {"name": TERMINAL, "optimizer": TERMINAL, "attention_type": TERMINAL, "device": TERMINAL, "status": TERMINAL}
    (run / "result.json").write_text(json.dumps(tree))
    (run / "config.json").write_text(json.dumps({TERMINAL: TERMINAL}))
    (run / "environment.json").write_text(f"{{{TERMINAL}")
    with terminal() as (out, error), contextlib.suppress(SystemExit):
        app(["report", RUN, "2026-11-25-other-c3d4"])
    assert_tame(out.getvalue())
    assert_tame(error.getvalue())


# Patterns that never end


@case("a tokenizer whose pattern", pattern=["(?:a|aa)+c", r"(\w|\w\w)+$", "(?:é|éé)+c"])
def _(pattern: str) -> None:
    path = Tokenizer.load("data/tokenizers/mine-270").save("slow")
    tree = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    del tree["model"]["checksum"]
    path.write_text(json.dumps(tree))
    began = time.perf_counter()
    with refused("takes too long"):
        tokenizer = Tokenizer.load("slow")
        for text in ("a" * 60, "é" * 60, "xy" * 40):
            tokenizer.encode(text)
    assert time.perf_counter() - began < 12


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare(folder: Path) -> None:
    """Put what every case finds into ``folder``."""
    formats.write_run(folder)
    formats.write_dataset(folder)
    (folder / "mine.json").write_text(json.dumps(formats.SETTINGS))


def run_case(chosen: Case, template: Path, folder: Path) -> None:
    """Run one case in a copy of ``template`` made in ``folder``. Raises AssertionError when a promise is broken."""

    def give_up(number: int, frame: Any) -> None:
        raise AssertionError(f"it took more than {SECONDS} seconds")

    home = folder / "home" / "work"
    shutil.copytree(template, home, symlinks=True)
    before, terminal_kind = Path.cwd(), os.environ.get("TERM")
    alarm = signal.signal(signal.SIGALRM, give_up)
    os.chdir(home)
    signal.alarm(SECONDS)
    try:
        chosen.run()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        os.chdir(before)
        os.environ.pop("TERM", None) if terminal_kind is None else os.environ.update(TERM=terminal_kind)
        beside = sorted(path.name for path in home.parent.iterdir())
        shutil.rmtree(home.parent)
    assert beside == ["work"], f"written outside of its folder: {beside}"


def main(arguments: list[str]) -> int:
    """Run all cases, print what became of each and return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.reliability {NAME}", description=HELP)
    parser.add_argument("--short", action="store_true", help="no difference: it takes a minute")
    parser.parse_args(arguments)
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template"
        template.mkdir()
        prepare(template)
        for chosen in CASES:
            try:
                run_case(chosen, template, Path(folder))
            except Exception:
                broken += 1
                print(f"broken\t{chosen.name}\n{traceback.format_exc()}", flush=True)
            else:
                print(f"kept\t{chosen.name}", flush=True)
    print(f"{len(CASES)} cases, {len(CASES) - broken} kept, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
