"""Where files lie: the names of everything in the data folder and in the folder of one run.

No other module spells these names. The data folder is `data/` in the current folder, or what `LFS_DATA` names.

    data/raw/<dataset>/            train.txt, valid.txt, manifest.json
    data/tokenizers/<name>/        tokenizer.json
    data/tokens/<name>/            train-00000.bin, valid-00000.bin, manifest.json
    data/runs/<run>/               config.json, environment.json, metrics.jsonl, samples.md, result.json, checkpoints/
    data/benchmarks/               <machine>.jsonl, tuned_attention.json
    data/output.md                 one row a run
"""

import os
import re
import secrets
import shlex
import stat
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from lfs_cli.errors import CheckpointError, ConfigError, did_you_mean
from lfs_cli.files import leads_out, read_name

_STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class DataFolder:
    """The folder that all commands read and write.

    Args:
        root: Its path. It need not exist yet.
    """

    root: Path

    @classmethod
    def here(cls) -> "DataFolder":
        """Return the folder that the environment variable `LFS_DATA` names, else `data` in the current folder."""
        return cls(Path(os.environ.get("LFS_DATA") or "data"))

    def raw(self, dataset: str) -> Path:
        """Return the folder of a dataset's text."""
        return self.root / "raw" / check_name(dataset)

    def tokenizer(self, name: str) -> Path:
        """Return the folder of a learned tokenizer."""
        return self.root / "tokenizers" / check_name(name)

    def tokens(self, name: str) -> Path:
        """Return the folder of a dataset's token shards."""
        return self.root / "tokens" / check_name(name)

    @property
    def runs(self) -> Path:
        """Folder of all runs."""
        return self.root / "runs"

    @property
    def benchmarks(self) -> Path:
        """Folder of all benchmark records."""
        return self.root / "benchmarks"

    @property
    def table(self) -> Path:
        """The experiment table."""
        return self.root / "output.md"

    def all_runs(self) -> list["RunFolder"]:
        """Return every run, the oldest first."""
        if not self.runs.is_dir():
            return []
        folders = [path for path in self.runs.iterdir() if (path / "config.json").is_file()]
        return [RunFolder(path) for path in sorted(folders, key=lambda path: (_born(path), path.name))]

    def find_run(self, name: str = "", *, is_trained: bool = True) -> "RunFolder":
        """Return the run called ``name``, or the newest one.

        Args:
            name: Path of a run folder, or its name in this data folder, or a part that only one name has. No name and
                `last` are the newest run.
            is_trained: Whether the newest one must have a checkpoint.

        Raises:
            CheckpointError: When there is no such run, or the part fits several.
        """
        runs = self.all_runs()
        if name in ("", "last"):
            trained = [run for run in runs if run.checkpoint_steps() or not is_trained]
            if not trained:
                raise CheckpointError(f"no trained run in {self.runs}", hint="run `lfs train quickstart.json` first")
            return trained[-1]
        for path in (Path(name), self.runs / name):
            if _is_file(path / "config.json"):
                return RunFolder(path)
        fitting = [run for run in runs if name in run.name]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = ", ".join(run.name for run in fitting)
            raise CheckpointError(f"`{name}` fits {len(fitting)} runs", hint=f"choose one of: {names}")
        hint = did_you_mean(name, [run.name for run in runs]) if runs else "run `lfs train quickstart.json` first"
        raise CheckpointError(f"no run `{name}` in {self.runs}", hint=hint)

    def name_of(self, run: "RunFolder") -> str:
        """Return what names ``run`` on a command line: its path when it is not in this data folder."""
        is_here = run.path.resolve().parent == self.runs.resolve()
        return run.name if is_here else shlex.quote(str(run.path))


@dataclass(frozen=True)
class RunFolder:
    """All files of one run. It explains itself, with no code at hand.

    Args:
        path: The run's folder.
    """

    path: Path

    @classmethod
    def create(cls, runs: Path, name: str) -> "RunFolder":
        """Create and return an empty run folder in ``runs``, called `<date>-<name>-<4 hex digits>`."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
        while True:
            path = runs / f"{date.today().isoformat()}-{name}-{secrets.token_hex(2)}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(path)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """The whole resolved config; loads back as itself."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Command line, git commit, versions and hardware."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One record a line, appended; safe to tail."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model wrote at each evaluation."""
        return self.path / "samples.md"

    @property
    def result(self) -> Path:
        """The run's row of the experiment table."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The page that `lfs report` writes."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, with `latest` and `best`, which hold the name of one each."""
        return self.path / "checkpoints"

    def refuse_traps(self) -> None:
        """Raise CheckpointError for what a stranger may have put there: to go on with the run would write and wait.

        That is a link which leads out of the folder, and a pipe or device.
        """
        # Passes over what a run that trains there takes away meanwhile
        for folder, folders, files in os.walk(self.path):
            for path in (Path(folder, name) for name in (*folders, *files)):
                if path.is_symlink() and leads_out(path, self.path):
                    raise CheckpointError(
                        f"{path} is a link that leads out of the run",
                        hint="put what it names in its place, or copy the run with `cp -rL`",
                    )
                try:
                    kind = path.stat().st_mode
                except OSError:
                    continue
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    raise CheckpointError(
                        f"{path} is neither a file nor a folder", hint=f"move it away: `mv {path} {path}.kept`"
                    )

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after ``step`` steps."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order."""
        if not self.checkpoints.is_dir():
            return []
        matches = [_STEP.fullmatch(path.name) for path in self.checkpoints.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    @property
    def latest_pointer(self) -> Path:
        """The file that names the newest checkpoint."""
        return self.checkpoints / "latest"

    @property
    def best_pointer(self) -> Path:
        """The file that names the checkpoint with the lowest validation loss."""
        return self.checkpoints / "best"

    def best(self) -> Path:
        """Return the checkpoint with the lowest validation loss, or the newest one. Raises CheckpointError for none."""
        steps = self.checkpoint_steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.path}", hint="choose another run: `lfs report` lists them")
        best = read_name(self.best_pointer)
        return next((path for path in map(self.checkpoint, steps) if path.name == best), self.checkpoint(steps[-1]))

    def prunable(self, keep: int) -> list[Path]:
        """Return all checkpoints but the last ``keep`` and the best one."""
        steps = self.checkpoint_steps()
        return [path for path in map(self.checkpoint, steps[:-keep]) if path != self.best()]


def check_name(name: str) -> str:
    """Return ``name`` when it can be a folder of its own, else raise ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"`{name}` cannot name a folder",
            hint="use letters, digits, `.`, `_` and `-`, beginning with a letter or digit",
        )
    return name


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be read
        return False


def _born(path: Path) -> float:
    """Return when a run began: its config is written once, at the start."""
    return (path / "config.json").stat().st_mtime
