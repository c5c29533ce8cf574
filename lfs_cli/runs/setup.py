"""Everything that training needs before its first step: device, text, tokens, batches, model and optimizers."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfs_cli.config import DownloadConfig, TokenizeConfig, TrainConfig
from lfs_cli.config.schema import END_OF_TEXT
from lfs_cli.corpus.batches import Batches, BatchesAhead, BatchesOnDevice, document_lengths
from lfs_cli.corpus.shards import Tokens
from lfs_cli.corpus.sources import DATASETS
from lfs_cli.errors import CheckpointError, ConfigError, DataError, DeviceError, did_you_mean
from lfs_cli.generation.language_model import LanguageModel
from lfs_cli.model import Transformer, next_token_loss, resolve_attention
from lfs_cli.model.device import choose_compile, choose_device, choose_dtype, compiled_call, precision
from lfs_cli.optimizers import Optimizer, build_optimizers, build_schedule
from lfs_cli.runs.download import download
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.plugins import import_plugins
from lfs_cli.runs.tokenize import TokenizeResult, made_before, tokenize
from lfs_cli.tokenizer import Tokenizer
from lfs_cli.training.ahead import begin_kernels
from lfs_cli.training.cost import parameter_count
from lfs_cli.training.evaluate import unigram_entropy
from lfs_cli.training.graphs import check_graphs
from lfs_cli.training.randomness import seed_everything
from lfs_cli.training.step import LossFunction
from lfs_cli.training.trace import optimizer_bytes

MOST_TEXT_BYTES = 2 << 30
"""Ids up to which a text is copied to the GPU whole: a billion tokens of two bytes."""


@dataclass(frozen=True)
class Setup:
    """The parts of a run, fresh as its seed makes them.

    Args:
        device: Where it computes.
        dtype: Type of the matrix products.
        attention: Attention backend.
        reason: Why that one.
        tokenizer: The tokenizer.
        tokenizer_file: Content of its file, which each checkpoint gets.
        bytes_per_token: Of the validation text.
        entropy: Loss in nats of a model that knows only how frequent each token of that text is.
        batches: The training text.
        valid_batches: The validation text.
        model: The model.
        optimizers: Together they move each weight of it.
        plain_loss: The forward pass, from tokens to their mean loss; with the z-loss while ``model`` is training.
        loss: The same, compiled where the config asks for it.
        identity: What the text and its tokens are known by, in each checkpoint.
    """

    device: torch.device
    dtype: torch.dtype
    attention: str
    reason: str
    tokenizer: Tokenizer
    tokenizer_file: bytes
    bytes_per_token: float | None
    entropy: float
    batches: Batches
    valid_batches: Batches
    model: Transformer
    optimizers: list[Optimizer]
    plain_loss: LossFunction
    loss: LossFunction
    identity: dict[str, Any]

    def writer(self) -> LanguageModel:
        """Return the model as it is at any time, ready to write."""
        return LanguageModel(self.model, self.tokenizer, device=self.device, dtype=self.dtype)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Return tokens_BT and targets_BT of a training batch on the device; on CUDA they are only under way."""
        tokens_BT, targets_BT = self.batches.at(number)
        return tokens_BT.to(self.device, non_blocking=True), targets_BT.to(self.device, non_blocking=True)


def set_up(config: TrainConfig, folder: Path, data: DataFolder, observer: Observer) -> Setup:
    """Return the parts of the run of ``config``, first bringing the text and learning the tokenizer if need be.

    Args:
        config: The experiment.
        folder: Where the run will be, on whose disk there must be room.
        data: Data folder.
        observer: Is told what happens.

    Raises:
        ConfigError: When settings do not fit each other or the tokenizer.
        DataError: When the text or its tokens cannot be used.
        DeviceError: When the device cannot do what was asked, or is too small.
        CheckpointError: When the disk is too small.
    """
    device, dtype, attention, reason = resolve(config)
    _check_room(config, device, folder)
    prepared = prepare(config, data, observer)
    tokenizer = Tokenizer.load(prepared.tokenizer)
    _check_tokenizer(config, tokenizer)
    train_tokens, valid_tokens = (
        Tokens.open(prepared.tokens, split, tokenizer_hash=tokenizer.hash) for split in ("train", "valid")
    )
    shape = {"batch_size": config.batch_size, "context_length": config.model.context_length, "seed": config.seed}
    batches, valid_batches = (
        _for_device(Batches(tokens, **shape, order=config.data.order), device)
        for tokens in (train_tokens, valid_tokens)
    )

    begin_kernels(config, device, dtype)  # not before the text: what it lacks is said at once
    seed_everything(config.seed)
    model = Transformer(config.model).to(device)
    end_of_text = tokenizer.special_ids[END_OF_TEXT] if config.data.documents == "packed" else None
    return Setup(
        device=device,
        dtype=dtype,
        attention=attention,
        reason=reason,
        tokenizer=tokenizer,
        tokenizer_file=(prepared.tokenizer / "tokenizer.json").read_bytes(),
        bytes_per_token=prepared.bytes_per_token("valid"),
        entropy=unigram_entropy(valid_tokens),
        batches=batches,
        valid_batches=valid_batches,
        model=model,
        optimizers=build_optimizers(model, config.optimizer),
        plain_loss=_loss_function(model, device, dtype, end_of_text),
        loss=training_loss(model, config, device, dtype, end_of_text),
        identity={
            "tokenizer_hash": tokenizer.hash,
            "text": {"tokens": len(train_tokens), "checksum": train_tokens.checksum},
        },
    )


def text_tokens(config: TrainConfig, data: DataFolder) -> int | None:
    """Return how many tokens the training text of ``config`` has, or None when they have not been made yet."""
    made = made_before(_wanted(config), data)
    return None if made is None else next(stage.tokens for stage in made.stages if stage.name == "train")


def _wanted(config: TrainConfig) -> TokenizeConfig:
    """Return what is to be asked of `lfs tokenize`."""
    return TokenizeConfig(
        dataset=config.data.dataset,
        vocab_size=config.model.vocab_size,
        special_tokens=config.data.special_tokens,
        tokenizer=config.data.tokenizer,
    )


def prepare(config: TrainConfig, data: DataFolder, observer: Observer) -> TokenizeResult:
    """Return the tokens that ``config`` trains on, first bringing the text and learning the tokenizer if need be."""
    dataset, wanted = config.data.dataset, _wanted(config)
    if not (data.raw(dataset) / "train.txt").exists():
        if (made := made_before(wanted, data)) is not None:
            observer.stage(f"using the tokens in {made.tokens}; their text is no longer here")
            return made
        if dataset not in DATASETS:
            raise DataError(
                f"no dataset `{dataset}` in {data.root / 'raw'}",
                hint=f"bring it with `lfs download --from FILE --name {dataset}`, or "
                + did_you_mean(dataset, DATASETS).removesuffix("?"),
            )
        observer.stage(f"no text for `{dataset}` yet: `lfs download {dataset}`")
        settings = {"dataset": dataset, "sample_bytes": config.data.sample_bytes}
        download(DownloadConfig(**settings), data, observer)
    return tokenize(wanted, data, observer)


def resolve(config: TrainConfig) -> tuple[torch.device, torch.dtype, str, str]:
    """Return device, dtype, attention backend and why that one: all that can be refused before anything is made."""
    import_plugins(config.plugins)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    check_graphs(config, device)
    build_schedule(config.schedule, config.steps)
    model = config.model
    choices = {
        window: resolve_attention(
            model.attention,
            device.type,
            dtype,
            model.head_dim,
            heads=model.heads,
            kv_heads=model.kv_heads,
            length=model.context_length,
            window=window,
            has_documents=config.data.documents == "packed",
            rotates=model.positions == "rope" and not model.value_embeddings,  # whose layers mix values in between
            qk_norm=model.qk_norm,
        )
        for window in map(model.layer_window, range(model.layers))
    }
    (attention, reason), *others = dict.fromkeys(choices.values())
    if others:  # the same backend with another kernel
        reason = ", ".join(
            f"layers {'with' if window else 'without'} a window: {why}" for window, (_, why) in choices.items()
        )
    return device, dtype, attention, reason


def _check_room(config: TrainConfig, device: torch.device, folder: Path) -> None:
    """Raise an error when the weights cannot fit the memory of the device, or a checkpoint the disk."""
    kept = 4 * parameter_count(config.model) + optimizer_bytes(config)[0]
    needs = kept + 4 * parameter_count(config.model)
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _machine_bytes()
    if total and needs > total:
        raise DeviceError(
            f"weights, gradients and optimizer need {needs / 2**30:,.1f} GiB of memory, and there are "
            f"{total / 2**30:,.1f}",
            hint="make the model smaller, such as with `--set model.width=512`; `--dry-run` shows what it needs",
        )
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
    if kept > free:
        raise CheckpointError(
            f"a checkpoint in {folder} needs about {kept / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free",
            hint="free some space, or name a folder on a larger disk with `--out`",
        )


def _for_device(batches: Batches, device: torch.device) -> Batches:
    """Return ``batches`` so that no GPU waits for them: cut on it where the text takes little of it, or read ahead."""
    if device.type != "cuda":
        return batches
    most = min(MOST_TEXT_BYTES, torch.cuda.mem_get_info(device)[0] // 10)
    if BatchesOnDevice.bytes_of(batches.tokens) <= most:
        return BatchesOnDevice(batches, device)
    return BatchesAhead(batches, pins=True)


def _machine_bytes() -> int:
    """Return the memory of this machine in bytes, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, among others
        return 0


def _check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError when the tokenizer has ids that the model lacks, or the sample's prompt is too long."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {config.model.vocab_size:,}",
            hint=f"try `--set model.vocab_size={tokenizer.vocab_size}`",
        )
    if config.data.documents == "packed" and END_OF_TEXT not in tokenizer.special_ids:
        raise ConfigError(
            f"the tokenizer has no `{END_OF_TEXT}`, by which packed documents are told apart",
            hint="use `--set data.documents=joined`, or a tokenizer that has it",
        )
    prompt = len(tokenizer.encode(config.sample_prompt))
    if config.sample_tokens and prompt >= config.model.context_length:
        raise ConfigError(
            f"`sample_prompt` has {prompt} tokens and the context {config.model.context_length}",
            hint="shorten it, or turn samples off with `--set sample_tokens=0`",
        )


def training_loss(
    model: Transformer, config: TrainConfig, device: torch.device, dtype: torch.dtype, end_of_text: int | None = None
) -> LossFunction:
    """Return the forward pass from tokens to their mean loss, compiled as far as ``config`` asks for it.

    Args:
        model: The model.
        config: The run.
        device: Where it is.
        dtype: Type of the matrix products.
        end_of_text: Token that attention does not look across; None lets it.
    """
    if not choose_compile(config.compile, device):
        return _loss_function(model, device, dtype, end_of_text)
    if config.compile == "blocks":
        return _loss_function(model, device, dtype, end_of_text, call=compiled_call())
    return torch.compile(_loss_function(model, device, dtype, end_of_text))


def _loss_function(
    model: Transformer,
    device: torch.device,
    dtype: torch.dtype,
    end_of_text: int | None,
    *,
    call: Callable[..., Tensor] | None = None,
) -> LossFunction:
    """Return it as it is written; ``call`` calls a block, as `Transformer.hidden` has it."""

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        documents = None if end_of_text is None else document_lengths(tokens_BT, end_of_text)
        with precision(device, dtype):
            hidden_BTC = model.hidden(tokens_BT, documents=documents, call=call)
            return next_token_loss(
                hidden_BTC,
                model.head_weight,
                targets_BT,
                softcap=model.config.logit_softcap,
                z_loss=model.config.z_loss if model.training else 0.0,  # evaluations tell the plain cross-entropy
                cast_VC=model.head_cast,
            )

    return loss
