"""LanguageModel: weights and a tokenizer, ready to write, to stream and to judge text.

>>> import lfs_cli as lfs
>>> model = lfs.LanguageModel.load("data/runs/2026-11-22-tinystories-a1b2")
>>> print("Once upon a time" + model.generate("Once upon a time", temperature=0.5, seed=7))

An empty prompt starts a new text: it stands for the token `<|endoftext|>`, after which every text began in training.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from lfs_cli.config import GenerateConfig, SamplingConfig, load_config
from lfs_cli.config.schema import END_OF_TEXT
from lfs_cli.errors import CheckpointError, ConfigError, did_you_mean
from lfs_cli.files import read_json, read_name
from lfs_cli.generation.decode import generate_tokens, products_in, window_start
from lfs_cli.model import Transformer, load_model
from lfs_cli.model.checksums import CHECKSUMS, verify_checksums
from lfs_cli.model.device import choose_device, choose_dtype
from lfs_cli.tokenizer import Tokenizer

CHECKPOINT_FILES = ("model.safetensors", "config.json", "tokenizer.json")


class WriteOptions(TypedDict, total=False):
    """How to continue a prompt. Defaults and meanings are those of `GenerateConfig` and `SamplingConfig`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    others: dict[str, dict[str, Any]]
    seed: int
    stop: str | None
    cache: bool


@dataclass(frozen=True)
class Piece:
    """What one more token adds to one of several texts.

    Args:
        row: Which prompt it continues.
        text: Characters that are now complete; often empty while a character of several bytes is being written.
        tokens: Tokens written for this prompt so far, the one that ended the text not counted.
        stopped: Why this text ended here: `end of text` or `max_tokens`; None when it goes on.
    """

    row: int
    text: str
    tokens: int
    stopped: str | None = None


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Args:
        nats: Negative log-likelihood of all predicted tokens together.
        tokens: Predicted tokens.
        bytes: Bytes of UTF-8 that they stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """The loss that training reports."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Tokens that the model hesitates between, on average."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """The one number that compares models with different tokenizers."""
        return self.nats / math.log(2) / self.bytes


class LanguageModel:
    """A Transformer with its tokenizer: text in, text out, deterministic for a seed.

    Args:
        model: Stays as it is, but for being moved to ``device``; its mode is restored after each use.
        tokenizer: The one that the model was trained with.
        device: Where to compute; by default where the weights are.
        dtype: Type of the matrix products; by default that of the weights.

    Raises:
        CheckpointError: When the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model only {model.config.vocab_size:,}",
                hint="use the tokenizer that the model was trained with",
            )
        if device is not None and torch.device(device).type != next(model.parameters()).device.type:
            model.to(device)
        weight = next(model.parameters())
        self.model = model
        self.tokenizer = tokenizer
        self.device = weight.device
        self.dtype = dtype or weight.dtype

    @classmethod
    def load(
        cls, path: Path | str, device: str = "auto", dtype: str = "auto", *, checkpoint: str = "best"
    ) -> "LanguageModel":
        """Return the model of a run folder or of a checkpoint folder.

        Args:
            path: Folder of a run, or of one of its checkpoints.
            device: `auto` takes CUDA, then MPS, then the CPU.
            dtype: Type of the weights: `auto` is bfloat16 on CUDA, else float32.
            checkpoint: Which one of a run: `best`, `latest` or the name of its folder.

        Raises:
            CheckpointError: When there is no such checkpoint, it is incomplete or damaged, or its parts do not belong
                together.
            DeviceError: When this machine does not have the device.
        """
        folder = find_checkpoint(Path(path), checkpoint)
        place = choose_device(device)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        _check_tokenizer(folder, tokenizer)
        if (folder / CHECKSUMS).is_file():  # a folder that `save_model` wrote has none
            verify_checksums(folder, CHECKPOINT_FILES)
        model = load_model(folder, place, choose_dtype(dtype, place))
        return cls(model.eval(), tokenizer)

    def generate(self, prompt: str, **options: Unpack[WriteOptions]) -> str:
        """Return what the model writes after ``prompt``, without the prompt."""
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: str, **options: Unpack[WriteOptions]) -> Iterator[str]:
        """Yield what the model writes after ``prompt``, as it comes, in whole characters."""
        for piece in self.write([prompt], _settings(options)):
            if piece.text:
                yield piece.text

    def generate_batch(self, prompts: Sequence[str], **options: Unpack[WriteOptions]) -> list[str]:
        """Return what the model writes after each of ``prompts``, decoded together."""
        texts = [""] * len(prompts)
        for piece in self.write(prompts, _settings(options)):
            texts[piece.row] += piece.text
        return texts

    def write(self, prompts: Sequence[str], config: GenerateConfig) -> Iterator[Piece]:
        """Continue ``prompts`` together, yielding a piece for each token of each text.

        Args:
            prompts: Texts to continue. An empty one stands for `<|endoftext|>`.
            config: How to write: all but `prompts`, `run`, `checkpoint`, `device` and `dtype` is used.

        Raises:
            ConfigError: When a prompt is longer than the model's context, or the tokenizer lacks the stop token.
        """
        stop_id = self._stop_id(config.stop)
        ids = [self._read_prompt(prompt) for prompt in prompts]
        steps = generate_tokens(
            self.model,
            ids,
            max_tokens=config.max_tokens,
            sampling=config.sampling,
            seed=config.seed,
            stop_id=stop_id,
            vocab_size=self.tokenizer.vocab_size,
            dtype=self.dtype,
            cache=config.cache,
        )
        streams = [self.tokenizer.stream() for _ in prompts]
        counts = [0] * len(prompts)
        with self._evaluating():
            for tokens in steps:
                for row, token in enumerate(tokens):
                    if token is None:
                        continue
                    if token == stop_id:
                        yield Piece(row, streams[row].flush(), counts[row], "end of text")
                        continue
                    counts[row] += 1
                    text = streams[row].feed(token)
                    if counts[row] < config.max_tokens:
                        yield Piece(row, text, counts[row])
                    else:
                        yield Piece(row, text + streams[row].flush(), counts[row], "max_tokens")

    @torch.inference_mode()
    def score(self, text: str) -> Score:
        """Return how well the model predicts ``text``, read as a whole document.

        Each token is predicted from the same window of tokens before it that writing would use. The first one is
        predicted from `<|endoftext|>`, and left out where the tokenizer has no such token.

        Raises:
            ConfigError: When the text has nothing to predict.
        """
        ids = self.tokenizer.encode(text)
        end = self.tokenizer.special_ids.get(END_OF_TEXT)
        tokens = ids if end is None else [end, *ids]
        if len(tokens) < 2:
            raise ConfigError("there is no token to predict", hint="score a longer text")
        context_length = self.model.config.context_length

        nats, first = 0.0, 1
        with self._evaluating(), products_in(self.model, self.dtype):
            while first < len(tokens):  # tokens first..last - 1 are predicted from one window
                start = window_start(first, context_length)
                last = min(start + context_length + 1, len(tokens))
                window_BT = torch.tensor([tokens[start : last - 1]], device=self.device)
                hidden_RC = self.model.hidden(window_BT)[0, first - 1 - start :]
                logits_RV = self.model.logits(hidden_RC)[:, : self.tokenizer.vocab_size].float()
                target_R1 = torch.tensor(tokens[first:last], device=self.device)[:, None]
                nats -= logits_RV.log_softmax(-1).gather(-1, target_R1).double().sum().item()
                first = last
        return Score(nats, len(tokens) - 1, len(self.tokenizer.decode_bytes(tokens[1:])))

    def _read_prompt(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode(prompt)
        if not ids:
            if END_OF_TEXT not in self.tokenizer.special_ids:
                raise ConfigError(
                    f"an empty prompt needs the token `{END_OF_TEXT}`, which this tokenizer does not have",
                    hint="give a prompt of at least one character",
                )
            return [self.tokenizer.special_ids[END_OF_TEXT]]
        excess = len(ids) - self.model.config.context_length
        if excess > 0:
            characters = len(self.tokenizer.decode(ids[:excess]))
            raise ConfigError(
                f"the prompt that begins `{prompt[:20]}` has {len(ids):,} tokens, and the model reads at most "
                f"{self.model.config.context_length:,}",
                hint=f"shorten it by {excess:,} tokens: leave out about {characters:,} of its characters",
            )
        return ids

    def _stop_id(self, stop: str | None) -> int | None:
        specials = self.tokenizer.special_ids
        if stop is None or (stop == END_OF_TEXT and stop not in specials):
            return None
        if stop not in specials:
            raise ConfigError(f"`stop` is `{stop}`, which is no special token", hint=did_you_mean(stop, specials))
        return specials[stop]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode, and back into the one it was in."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is the folder of a checkpoint, though perhaps not a complete one, and not that of a run."""
    return (path / "model.safetensors").is_file() or (path / "tokenizer.json").is_file()


def find_checkpoint(path: Path, checkpoint: str = "best") -> Path:
    """Return the checkpoint folder that ``path`` is, or the one of the run folder ``path`` that ``checkpoint`` names.

    The files `checkpoints/best` and `checkpoints/latest` of a run hold the name of a folder beside them. Before the
    first evaluation there is no best one, and the latest is taken.

    Raises:
        CheckpointError: When there is none, or it lacks a file.
    """
    if not path.is_dir():
        raise CheckpointError(f"no run or checkpoint at {path}", hint="run `lfs report` to see all runs")
    folder = path if is_checkpoint(path) else _named_checkpoint(path / "checkpoints", checkpoint)
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: {' and '.join(missing)} missing",
            hint="choose another one, such as `--set checkpoint=latest`",
        )
    return folder


def _named_checkpoint(checkpoints: Path, checkpoint: str) -> Path:
    names = sorted(folder.name for folder in checkpoints.glob("step-*") if folder.is_dir())
    if not names:
        raise CheckpointError(
            f"no checkpoint in {checkpoints.parent} yet", hint="choose another run: `lfs report` shows them all"
        )
    wanted = [checkpoint, "latest"] if checkpoint == "best" else [checkpoint]
    for name in wanted:
        pointer = checkpoints / name
        target = read_name(pointer) if pointer.is_file() else name
        if target in names:  # so that no pointer leads out of the folder
            return checkpoints / target
    if checkpoint in {"best", "latest"}:
        return checkpoints / names[-1]
    raise CheckpointError(
        f"no checkpoint `{checkpoint}` in {checkpoints}", hint=did_you_mean(checkpoint, ["best", "latest", *names])
    )


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer with the hash that training wrote beside the weights, where it did."""
    state = folder / "state.json"
    if not state.is_file():
        return
    try:
        trained_with = read_json(state).get("tokenizer_hash", tokenizer.hash)
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(f"{state} does not hold a JSON object", hint="choose another checkpoint") from None
    if trained_with != tokenizer.hash:
        raise CheckpointError(
            f"the tokenizer of {folder} ({tokenizer.hash[:12]}) is not the one its model was trained with "
            f"({str(trained_with)[:12]})",
            hint=f"put that one back as {folder / 'tokenizer.json'}, or choose another checkpoint",
        )


def _settings(options: WriteOptions) -> GenerateConfig:
    """Check options as the command line checks its own."""
    unknown = options.keys() - WriteOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"no option `{min(unknown)}`: there are {', '.join(WriteOptions.__annotations__)}")
    in_sampling = SamplingConfig.model_fields.keys()
    settings = {f"sampling.{name}" if name in in_sampling else name: value for name, value in options.items()}
    without_stop = {"stop": None} if options.get("stop", END_OF_TEXT) is None else {}
    return load_config(GenerateConfig, options=settings).model_copy(update=without_stop)
