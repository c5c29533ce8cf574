"""What checkpoints cost the training of the quickstart on this machine, in one process, in turns.

    python -m tests.reliability checkpoint_overhead

Steps are trained, a checkpoint is started as training does it, steps are trained again while it is written, and then
one is written with nothing beside it. Two things are measured of each: how long the loop stands still, and the
processor time of all threads. Their sum is more than a checkpoint can cost. It is shown as a share of the steps
between two checkpoints, whose time is the processor time of the fastest one for each thread, so that other work on the
machine does not flatter the result.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from lfs_cli.config import TrainConfig, load_config
from lfs_cli.model.checksums import verify_checksums, write_checksums
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.progress import Progress
from lfs_cli.runs.saver import Saver
from lfs_cli.runs.setup import Setup, set_up
from lfs_cli.training.step import train_step

NAME = "checkpoint_overhead"
HELP = "what checkpoints and their checksums cost the training of the quickstart"
ALLOWED = 0.02


def main(arguments: list[str]) -> int:
    """Measure and print a table; return 1 when checkpoints cost more than a fiftieth of the training."""
    parser = argparse.ArgumentParser(NAME, description=HELP)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="of training in each round")
    parser.add_argument("--short", action="store_true", help="five rounds")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lfs-overhead-") as folder:
        return _measure(Path(folder), 5 if options.short else options.rounds, options.steps)


def _measure(root: Path, rounds: int, steps: int) -> int:
    config = load_config(TrainConfig, "quickstart.json")
    setup = set_up(config, root, DataFolder(root / "data"), Observer())
    run = RunFolder(root / "run")
    saver = Saver(run, setup.model, setup.optimizers, identity=setup.identity, tokenizer=setup.tokenizer_file, keep=2)
    number = iter(range(1_000_000))

    def save() -> None:
        saver.save(Progress(step=next(number)))

    def save_and_wait() -> None:
        save()
        saver.wait()

    save_and_wait()
    plain, stalls, work = [], [], []
    for _ in range(rounds):
        plain += [_seconds(lambda: _step(config, setup, next(number)), time.process_time) for _ in range(steps)]
        stalls.append(_seconds(save))
        _step(config, setup, next(number))
        saver.wait()
        work.append(_seconds(save_and_wait, time.process_time))
    folder = run.checkpoint(run.checkpoint_steps()[-1])
    size = sum(path.stat().st_size for path in folder.iterdir())
    step = min(plain) / torch.get_num_threads()
    between = step * config.checkpoint_every
    print(
        f"a step takes {step * 1e3:.1f} ms, a checkpoint of {size / 1e6:.1f} MB is written every "
        f"{config.checkpoint_every} steps"
    )
    costs = {
        "the loop stands still": median(stalls),
        "processor time of all threads": median(work),
        "of which SHA-256": median(_seconds(lambda: write_checksums(folder), time.process_time) for _ in range(rounds)),
        "SHA-256 when it is read": median(_seconds(lambda: verify_checksums(folder)) for _ in range(rounds)),
    }
    for name, seconds in costs.items():
        print(f"{name:<32}{seconds * 1e3:>8.1f} ms {seconds / between:>9.3%} of training")
    return int((median(stalls) + median(work)) / between > ALLOWED)


def _step(config: TrainConfig, setup: Setup, number: int) -> None:
    train_step(
        setup.loss,
        list(setup.model.parameters()),
        setup.optimizers,
        *setup.batch(number),
        passes=config.batch_size // config.passes_size,
        clip=config.clip,
        accept=lambda loss, norm: True,
    )


def _seconds(work: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
