"""Kill `lfs tokenize` at random moments: what was there stays readable, and the end is the same as without a kill.

Each round begins with a dataset that is tokenized. Its text then changes, `lfs tokenize` is to make all anew, and is
killed, up to three times in a row. After each kill the tokenizer and both splits must be whole: the ones from before or
the ones that are to come. Then it may run to its end, and every file must be what an undisturbed process has written.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lfs_cli.corpus.shards import Tokens
from lfs_cli.tokenizer import Tokenizer
from tests.reliability.killing import Lfs, blamed_on, files_in, run_command

NAME = "kill_tokenize"
HELP = "kill `lfs tokenize` 100 times at random moments: nothing is lost, and the result is the same"

TEXTS = {
    "before": ("The owl sat in the oak. " * 700 + "<|endoftext|>\n") * 4,
    "after": ("A small fox ran to the old mill, and back again. " * 400 + "<|endoftext|>\n") * 6,
}
COMMAND = ("tokenize", "stories", "--vocab", "290")


def main(arguments: Sequence[str]) -> int:
    """Run the command `kill_tokenize` and return its exit code."""
    with tempfile.TemporaryDirectory(prefix="lfs-kill-") as folder:
        return run_command("lfs tokenize", run, arguments, Path(folder))


def run(kills: int, seed: int, folder: Path) -> int:
    """Kill so many times, and return how many rounds that were. Raises AssertionError when something was lost."""
    chance = random.Random(seed)
    data = folder / "data"
    lfs = Lfs(COMMAND, data, {})
    states = {}
    for name in TEXTS:
        _put(data, TEXTS[name])
        seconds, steps = lfs.finish()
        states[name] = files_in(data)
        if name == "before":
            shutil.copytree(data, folder / "before")
    assert sum("train-0" in name for name in states["after"]) > 1

    rounds = done = 0
    while done < kills:
        shutil.rmtree(data)
        shutil.copytree(folder / "before", data)  # with its times of change: what is there is up to date
        _put(data, TEXTS["after"])
        for _ in range(chance.randint(1, 3)):
            where = lfs.kill(chance, seconds, steps)
            with blamed_on(f"kill {done + 1} (seed {seed}), {where}"):
                _check_readable(data, states)
            done += where is not None
        with blamed_on(f"round {rounds + 1} (seed {seed})"):
            lfs.finish()
            _check_same(files_in(data), states["after"])
        rounds += 1
    return rounds


def _put(data: Path, text: str) -> None:
    """Let ``text`` be the dataset, as if it had been put there by hand."""
    folder = data / "raw" / "stories"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(text)
    (folder / "valid.txt").write_text(text[-len(text) // 3 :])


def _check_same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert found.keys() == wanted.keys(), f"other files, {sorted(found.keys() ^ wanted.keys())}"
    for name in wanted:
        assert _without_times(name, found[name]) == _without_times(name, wanted[name]), f"{name} differs"


def _check_readable(data: Path, states: dict[str, dict[str, bytes]]) -> None:
    """Raise AssertionError unless the tokenizer and each split are whole, and one of the two that there may be."""
    tokenizers = [state["tokenizers/stories-290/tokenizer.json"] for state in states.values()]
    Tokenizer.load(data / "tokenizers" / "stories-290")
    assert (data / "tokenizers" / "stories-290" / "tokenizer.json").read_bytes() in tokenizers
    for split in ("train", "valid"):
        tokens = Tokens.open(data / "tokens" / "stories-290", split)
        tokens.verify()
        checksums = [_checksum(state, split) for state in states.values()]
        assert tokens.checksum in checksums, f"{split} is of neither text"
    for manifest in ("tokenizers/stories-290/manifest.json", "tokens/stories-290/manifest.json"):
        json.loads((data / manifest).read_bytes())


def _checksum(state: dict[str, bytes], split: str) -> int:
    return int.from_bytes(state[f"tokens/stories-290/{split}-00000.bin"][12:16], "little")


def _without_times(name: str, content: bytes) -> object:
    """Return the content of a file, of a manifest without what is never the same twice."""
    if not name.endswith("manifest.json"):
        return content
    return _cleaned(json.loads(content))


def _cleaned(value: object) -> object:
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items() if key not in ("seconds", "modified_ns")}
    return value
