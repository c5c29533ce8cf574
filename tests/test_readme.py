"""The README stays true: its commands parse, its optimizer trains, its generated parts are current."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import lfs_cli as lfs
from lfs_cli.cli.app import app
from lfs_cli.config import TrainConfig, explain

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
READING = {
    "errors.py": 1,
    "registry.py": 1,
    "config/schema.py": 1,
    "config/loader.py": 1,
    "tokenizer/split.py": 2,
    "tokenizer/bpe.py": 2,
    "tokenizer/learn.py": 2,
    "tokenizer/loops_encode.py": 2,
    "corpus/sources.py": 3,
    "corpus/shards.py": 3,
    "corpus/batches.py": 3,
    "model/transformer.py": 4,
    "model/attention.py": 4,
    "model/feed_forward.py": 4,
    "model/norm.py": 4,
    "model/rope.py": 4,
    "model/cache.py": 4,
    "model/loss.py": 4,
    "kernels/tiled_attention.py": 5,
    "kernels/triton_attention.py": 5,
    "kernels/flash_attention.py": 5,
    "optimizers/base.py": 6,
    "optimizers/adamw.py": 6,
    "optimizers/sgd.py": 6,
    "optimizers/groups.py": 6,
    "optimizers/schedules.py": 6,
    "training/step.py": 7,
    "training/checkpoint.py": 7,
    "training/evaluate.py": 7,
    "generation/sample.py": 8,
    "generation/decode.py": 8,
    "generation/language_model.py": 8,
    "runs/folder.py": 9,
    "runs/journal.py": 9,
    "runs/train.py": 9,
}
ROOMS = [
    ".",
    "config",
    "tokenizer",
    "tokenizer/formats",
    "corpus",
    "model",
    "kernels",
    "optimizers",
    "training",
    "generation",
    "runs",
    "benchmarks",
    "reports",
    "cli",
]


def tree() -> str:
    """Return the annotated tree: every module with its first sentence, its length and its place in the reading."""
    rows = ["| file | what is in it | lines | read |", "|---|---|---|---|"]
    package = Path(lfs.__file__).parent
    for room in ROOMS:
        files = sorted((package / room).glob("*.py"), key=lambda file: (file.name != "__init__.py", file.name))
        for file in files:
            name = file.relative_to(package).as_posix()
            text = file.read_text(encoding="utf-8")
            docstring = ast.get_docstring(ast.parse(text)) or ""
            sentence = " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")
            star = f"*{READING[name]}" if name in READING else ""
            rows.append(f"| [{name}](lfs_cli/{name}) | {sentence} | {len(text.splitlines())} | {star} |")
    return "\n".join(rows) + "\n"


def settings() -> str:
    """Return the reference of all settings of `lfs train`, from the schema."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, default, meaning in explain(TrainConfig):
        shown = "derived" if default == "derived" else f"`{default}`"
        meaning = " ".join(meaning.split())  # a row of a table is one line
        rows.append(f"| `{name}` | {shown} | {meaning} |".replace("<|endoftext|>", "<\\|endoftext\\|>"))
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(("section", "render"), [("tree", tree), ("settings", settings)])
def test_a_generated_section_is_current(section: str, render, request: pytest.FixtureRequest) -> None:
    begin, end = f"<!-- {section}:begin -->\n", f"<!-- {section}:end -->"
    text = README.read_text(encoding="utf-8")
    if request.config.getoption("--update-golden"):
        head, rest = text.split(begin)
        text = head + begin + render() + end + rest.split(end)[1]
        README.write_text(text, encoding="utf-8")
    assert text.split(begin)[1].split(end)[0] == render(), "run `pytest --update-golden` and look at the difference"


def test_every_starred_file_exists() -> None:
    package = Path(lfs.__file__).parent
    assert [name for name in READING if not (package / name).exists()] == []


def commands() -> list[str]:
    lines = re.findall(r"^\$ (.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    inline = re.findall(r"`(lfs [a-z]+ [^`]+)`", README.read_text(encoding="utf-8"))
    found = [part.strip() for line in lines for part in line.split("&&")] + inline
    return sorted({command for command in found if command.startswith("lfs ")})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(command: str) -> None:
    words = shlex.split(re.sub(r"\[[A-Z.]+\]|\bCONFIG\b|\bPART\b|\bDATASET\b", "", command))[1:]
    group = typer.main.get_command(app)
    assert words[0] in group.commands
    group.commands[words[0]].make_context(words[0], words[1:])


def test_the_readme_names_every_public_name() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in lfs.__all__ if f"`{name}`" not in text] == []


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_optimizer_of_the_readme_trains(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "Signum" in block
    ]
    assert len(code[code.index("    def start") :].splitlines()) <= 10
    (tmp_path / "readme_signum.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "data": {"dataset": "sample", "sample_bytes": 60_000},
        "model": {"vocab_size": 300, "context_length": 16, "width": 16, "layers": 1, "heads": 2},
        "optimizer": [{"name": "signum", "lr": 0.003}],
        "steps": 30,
        "batch_size": 8,
        "sample_tokens": 0,
        "device": "cpu",
        "plugins": ["readme_signum"],
    }
    (tmp_path / "signum.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "signum.json"), "--json"])
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)["rows"][0]
    assert row["best_val_loss"] < 5.5  # log 300 is 5.7: where an untrained model starts
    lfs.OPTIMIZERS._entries.pop("signum")
    sys.modules.pop("readme_signum")
