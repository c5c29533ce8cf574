"""Going on with a run: from its last checkpoint that is whole, with everything as it was then."""

import os
from pathlib import Path

from lfs_cli.config import TrainConfig, dump_config
from lfs_cli.errors import CheckpointError, DamageError, remedy
from lfs_cli.files import replace_text
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.progress import Progress
from lfs_cli.runs.setup import Setup
from lfs_cli.training.checkpoint import point_to, read_checkpoint, remove_checkpoint, tidy_checkpoints


def restore(config: TrainConfig, run: RunFolder, setup: Setup, observer: Observer) -> Progress:
    """Put the last whole checkpoint of ``run`` into ``setup``, and return how far the run was.

    A damaged checkpoint is named, set aside and passed over. A run that was killed before its first checkpoint begins
    again in its folder.

    Raises:
        CheckpointError: When there are checkpoints and none is whole, or the last one does not fit.
    """
    tidy_checkpoints(run.checkpoints)
    progress = Progress()
    damaged: list[tuple[Path, DamageError]] = []
    steps = run.checkpoint_steps()
    for step in reversed(steps):
        try:
            load_checkpoint(config, run.checkpoint(step), setup, progress, observer)
            break
        except DamageError as error:
            damaged.append((run.checkpoint(step), error))
    else:
        if damaged:
            raise CheckpointError(
                f"no checkpoint of {run.path} is whole: {damaged[0][1]}",
                hint=f"put back a copy of one, or start again: `lfs train {run.config}`",
            )
        observer.stage(f"{run.path} has no checkpoint yet: it begins again")
    for folder, error in damaged:
        aside = folder.with_name(f"damaged-{folder.name}")
        observer.warning(f"{error}; it is now {aside.name}, and the run goes on from step {progress.step:,}")
        _set_aside(folder, aside)
    if steps:
        _point_anew(run, progress)
    return progress


def load_checkpoint(config: TrainConfig, folder: Path, setup: Setup, progress: Progress, observer: Observer) -> None:
    """Put the checkpoint in ``folder`` into ``setup`` and ``progress``, with the rates of ``config``.

    Raises:
        DamageError: When a file of it is missing or damaged; nothing has changed then.
        CheckpointError: When it does not fit the model, the optimizers or the tokenizer.
    """
    state = read_checkpoint(folder, setup.model, setup.optimizers)
    if state.get("tokenizer_hash") != setup.tokenizer.hash:
        raise CheckpointError(
            f"the checkpoint {folder} was trained with another tokenizer than {config.data.dataset} has now",
            hint="go on with the tokenizer in the checkpoint: "
            f"`lfs train --resume {folder.parents[1]} --set data.tokenizer={folder / 'tokenizer.json'}`",
        )
    if state.get("text") != setup.identity["text"]:
        observer.warning(
            f"the text of `{config.data.dataset}` is not the one that {folder} was trained on: "
            "from here on the batches are others"
        )
    try:
        progress.go_back(state["progress"])
    except (KeyError, TypeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged: {error}"
        raise DamageError(f"the state in {folder} {what}", hint="resume from another checkpoint") from None
    for optimizer, settings in zip(setup.optimizers, config.optimizer, strict=True):
        for group in optimizer.param_groups:
            group["peak_lr"] = settings.lr


def keep_config(run: RunFolder, config: TrainConfig) -> None:
    """Make ``config`` the one that the run goes on with next time, too. Raises CheckpointError when it cannot be."""
    text = dump_config(config)
    try:
        if run.config.read_text(encoding="utf-8") != text:
            born = run.config.stat().st_mtime  # by which runs are ordered
            replace_text(run.config, text)
            os.utime(run.config, (born, born))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {run.config}: {error.strerror}", hint=remedy(error) or "check the disk"
        ) from None


def _set_aside(folder: Path, aside: Path) -> None:
    try:
        remove_checkpoint(aside)
        folder.rename(aside)
    except OSError as error:
        raise CheckpointError(
            f"cannot rename {folder}: {error.strerror}", hint=remedy(error) or "check the disk"
        ) from None


def _point_anew(run: RunFolder, progress: Progress) -> None:
    """Make `latest` and `best` name what they did when the checkpoint was written."""
    best = run.checkpoint(progress.best.get("step", -1))
    try:
        point_to(run.latest_pointer, run.checkpoint(progress.step))
        if best.is_dir():
            point_to(run.best_pointer, best)
        else:
            run.best_pointer.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {run.checkpoints}: {error.strerror}", hint=remedy(error) or "check the disk"
        ) from None
