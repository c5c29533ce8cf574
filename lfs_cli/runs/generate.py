"""The body of `lfs generate`: find a run, load its model, let it continue prompts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lfs_cli.config import GenerateConfig
from lfs_cli.generation.language_model import LanguageModel, Piece, find_checkpoint, is_checkpoint
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.plugins import import_plugins


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to write, and where it comes from.

    Args:
        run: Name of the run, or of the checkpoint folder when that was named.
        checkpoint: Folder that was read.
        model: What was in it.
    """

    run: str
    checkpoint: Path
    model: LanguageModel


@dataclass(frozen=True)
class Continuation:
    """What one prompt became.

    Args:
        prompt: What was given.
        text: What was written after it.
        tokens: Tokens of ``text``.
        tokens_per_second: Those over the time until this text ended, reading the prompt included.
        stopped: Why it ended: `end of text` or `max_tokens`.
    """

    prompt: str
    text: str
    tokens: int
    tokens_per_second: float
    stopped: str


@dataclass(frozen=True)
class GenerateResult:
    """All texts of one call.

    Args:
        run: Name of the run.
        checkpoint: Folder of the checkpoint.
        rows: One for each prompt, in their order.
        tokens: Tokens written in all.
        seconds: Time it took, without loading the model.
    """

    run: str
    checkpoint: Path
    rows: tuple[Continuation, ...]
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all texts together, over the time."""
        return self.tokens / max(self.seconds, 1e-9)


def generate(
    config: GenerateConfig,
    data: DataFolder,
    observer: Observer | None = None,
    on_piece: Callable[[Piece], None] | None = None,
) -> GenerateResult:
    """Continue the prompts of ``config`` with a trained model.

    Args:
        config: What to write and how; without prompts, one text is written from nothing.
        data: Where the runs are.
        observer: Is told which checkpoint is used.
        on_piece: Is called with each piece of text as soon as it is written.

    Raises:
        CheckpointError: When there is no such run or checkpoint, or it cannot be used.
        ConfigError: When a prompt does not fit the model.
        DeviceError: When this machine cannot do what was asked.
    """
    return write(open_model(config, data, observer), config, on_piece)


def open_model(config: GenerateConfig, data: DataFolder, observer: Observer | None = None) -> OpenModel:
    """Load the model that ``config`` names; see `generate`."""
    import_plugins(config.plugins)
    if config.run and is_checkpoint(Path(config.run)):
        run, folder = Path(config.run).resolve().name, Path(config.run)
    else:
        found = data.find_run(config.run)
        run, folder = found.name, find_checkpoint(found.path, config.checkpoint)
    (observer or Observer()).stage(f"using {folder}")
    return OpenModel(run, folder, LanguageModel.load(folder, config.device, config.dtype))


def write(opened: OpenModel, config: GenerateConfig, on_piece: Callable[[Piece], None] | None = None) -> GenerateResult:
    """Continue the prompts of ``config`` with a model that is already open; see `generate`."""
    prompts = config.prompts or ("",)
    rows: list[Continuation | None] = [None] * len(prompts)
    texts = [""] * len(prompts)
    began = time.perf_counter()
    for piece in opened.model.write(prompts, config):
        texts[piece.row] += piece.text
        if on_piece is not None:
            on_piece(piece)
        if piece.stopped is not None:
            rate = piece.tokens / max(time.perf_counter() - began, 1e-9)
            rows[piece.row] = Continuation(
                prompts[piece.row], texts[piece.row], piece.tokens, round(rate, 1), piece.stopped
            )
    done = tuple(row for row in rows if row is not None)
    return GenerateResult(
        opened.run, opened.checkpoint, done, sum(row.tokens for row in done), time.perf_counter() - began
    )
