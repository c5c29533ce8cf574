"""Kill `lfs download` at random moments: what has arrived is not fetched again, and the end is the same.

Each round is one way to bring a text: plain and packed files of a hub, a file of the web, a file of the user, and the
built-in stories in place of other ones. The server is the one of the tests, on loopback. The command is killed up to
three times in a row. After each kill a text that has its name must be whole, and a manifest must be readable. Then it
may run to its end: it must ask the server only for what is not here, and every file must be what an undisturbed process
has written.
"""

import gzip
import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.hub_server import Hub, serve
from tests.reliability.killing import Lfs, blamed_on, files_in, run_command

NAME = "kill_download"
HELP = "kill `lfs download` 100 times at random moments: nothing is fetched twice, and the result is the same"

TEXTS = {
    name: "".join(f"{random.Random(n).random()} of story {n}.\n<|endoftext|>\n" for n in range(size)).encode()
    for name, size in (("train", 12_000), ("valid", 1_000))
}
FILES = {
    "TinyStoriesV2-GPT4-train.txt": TEXTS["train"],
    "TinyStoriesV2-GPT4-valid.txt": TEXTS["valid"],
    "owt_train.txt.gz": gzip.compress(TEXTS["train"]),
    "owt_valid.txt.gz": gzip.compress(TEXTS["valid"]),
    "mine.txt": TEXTS["train"],
}
BYTES_PER_SECOND = 1_500_000


def main(arguments: Sequence[str]) -> int:
    """Run the command `kill_download` and return its exit code."""
    with tempfile.TemporaryDirectory(prefix="lfs-kill-") as folder:
        return run_command("lfs download", run, arguments, Path(folder))


def run(kills: int, seed: int, folder: Path) -> int:
    """Kill so many times, and return how many rounds that were. Raises AssertionError when something was lost."""
    chance = random.Random(seed)
    data = folder / "data"
    (folder / "own.txt").write_bytes(TEXTS["train"])
    with serve(dict(FILES)) as hub:
        hub.faults.bytes_per_second = BYTES_PER_SECOND
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN_PATH": str(folder / "none")}
        ways = {
            "tinystories": ("tinystories",),
            "owt": ("owt",),
            "web": ("--from", hub.web("mine.txt"), "--name", "web"),
            "own": ("--from", str(folder / "own.txt"), "--name", "own"),
            "sample": ("sample", "--size", "400kB", "--set", "seed=1"),
        }
        Lfs(("download", "sample", "--size", "400kB"), data, environment).finish()
        data.rename(folder / "before")  # stories of another seed are there
        undisturbed = {}
        rounds = done = 0
        while done < kills:
            name = chance.choice(list(ways))
            if name not in undisturbed:
                lfs = Lfs(("download", *ways[name]), data, environment)
                shutil.copytree(folder / "before", data)
                undisturbed[name] = (lfs, *lfs.finish(), files_in(data))
                shutil.rmtree(data)
            lfs, seconds, steps, wanted = undisturbed[name]
            shutil.copytree(folder / "before", data)
            older = files_in(data)
            for _ in range(chance.randint(1, 3)):
                where = lfs.kill(chance, seconds, steps)
                with blamed_on(f"kill {done + 1} (seed {seed}), of {name}, {where}"):
                    _check_readable(data, older, wanted)
                done += where is not None
            with blamed_on(f"round {rounds + 1} (seed {seed}), {name}"):
                _check_end(hub, lfs, data, wanted)
            shutil.rmtree(data)
            rounds += 1
    return rounds


def _check_readable(data: Path, older: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> None:
    """Raise AssertionError unless each text is whole, of before or of after, and each manifest can be read."""
    now = files_in(data)
    for name, content in now.items():
        if name.endswith("manifest.json"):
            json.loads(content)
        elif name.endswith(("train.txt", "valid.txt")):
            assert content in (older.get(name), wanted[name]), f"{name} is not whole"
    lost = older.keys() - now.keys()
    assert not lost, f"{sorted(lost)} is gone"


def _check_end(hub: Hub, lfs: Lfs, data: Path, wanted: Mapping[str, bytes]) -> None:
    """Let the command run to its end. Raises AssertionError unless it fetches the rest and all is as it should be."""
    kept = {
        path.name.removesuffix(".part"): path.stat().st_size
        for path in data.rglob("*.part")
        if path.with_name(f"{path.name}.json").exists()
    }
    hub.log.clear()
    lfs.finish()
    for request in hub.transfers():
        name = request["path"].split("?")[0].rpartition("/")[2]
        start = kept.pop("source" if name == "mine.txt" else name, 0)
        wished = f"bytes={start}-" if start else None
        assert request.get("range") == wished, f"asked for {request.get('range')} of {name}, not {wished}"
    found = files_in(data)
    assert found.keys() == wanted.keys(), f"other files, {sorted(found.keys() ^ wanted.keys())}"
    for name in wanted:
        assert _without_dates(name, found[name]) == _without_dates(name, wanted[name]), f"{name} differs"


def _without_dates(name: str, content: bytes) -> object:
    """Return the content of a file, of a manifest without its dates."""
    if not name.endswith("manifest.json"):
        return content
    manifest = json.loads(content)
    for record in manifest["files"].values():
        del record["date"]
    return manifest
