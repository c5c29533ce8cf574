"""Every knob of the six commands: one frozen model per part and per command.

A field has a type, a default and a sentence under it; that sentence is its help everywhere (`--explain`, the README's
table, the JSON Schema). Validators refuse combinations that cannot work and name a value that would. Whatever follows
from other settings is a property, so that it can never disagree with them.
"""

import math
import re
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lfs_cli.errors import ConfigError, did_you_mean
from lfs_cli.registry import catalogue, check_options

Count = Annotated[int, Field(ge=1, le=2**48)]  # widths derived from it must still fit 64 bits
Natural = Annotated[int, Field(ge=0, le=2**48)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Counts = Annotated[tuple[Count, ...], Field(strict=False)]
Grid = Annotated[Counts, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else (value,))]

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StepPart = Literal["inference", "forward", "loss", "backward", "forward+backward", "optimizer", "step"]
KernelName = Literal[
    "linear_cross_entropy",
    "linear_cross_entropy_softcap",
    "linear_cross_entropy_z_loss",
    "embedding",
    "rms_norm",
    "add_rms_norm",
    "rope",
    "qk_norm_rope",
    "rotary_attention",
    "qk_norm_rotary_attention",
    "project_and_attend",
    "gated_layer",
    "swiglu",
    "silu",
    "relu2",
    "adamw",
    "clip",
]

END_OF_TEXT = "<|endoftext|>"
"""The special token that stands between documents, and its one spelling in lfs."""


class Settings(BaseModel):
    """What all config models share: frozen, strict, no unknown keys, help under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    command: ClassVar[str] = "train"
    """The command that has these settings."""


def check_registered(kind: str, room: str, table: str, name: str) -> None:
    """Raise ConfigError that suggests the nearest name when no module of ``room`` registers ``name`` in ``table``."""
    known = catalogue(room, table)
    if name not in known:
        raise ConfigError(f"unknown {kind} `{name}`", hint=did_you_mean(name, known))


def _special_tokens(names: tuple[str, ...]) -> str:
    return f"{len(names)} special token{'' if len(names) == 1 else 's'}"


# A width is always that of all heads together, so 64 is the multiple that keeps matrix products fast on every device.
def _default_feed_forward_width(values: dict[str, Any]) -> int:
    width = values.get("width", 0)
    if values.get("feed_forward") == "swiglu":
        return max(64, round(8 * width / 3 / 64) * 64)
    return 4 * width


class ModelConfig(Settings):
    """Shape of the Transformer, and the parts it is made of."""

    vocab_size: Count = 10_000
    """Tokens the model can read and write (V)."""

    context_length: Annotated[int, Field(ge=2)] = 256
    """Longest sequence, in tokens, that training sees."""

    width: Count = 512
    """Channels of the residual stream (C)."""

    layers: Count = 4
    """Transformer blocks (L)."""

    heads: Count = 16
    """Query heads (H)."""

    kv_heads: Count = Field(default_factory=lambda values: values.get("heads", 1))
    """Key/value heads (G). Fewer than `heads` gives grouped-query attention; the default is `heads`."""

    feed_forward: str = "swiglu"
    """Kind of feed-forward layer: `swiglu`, `silu` or `relu2`."""

    feed_forward_width: Count = Field(default_factory=_default_feed_forward_width)
    """Hidden channels of the feed-forward layer (F); by default 8/3 of `width` for `swiglu`, else 4 times `width`."""

    attention: str = "auto"
    """Attention backend; `auto` picks the fastest one that this machine can run."""

    norm: str = "rms_norm"
    """Kind of normalization: `rms_norm` or `none`."""

    norm_position: Literal["pre", "post"] = "pre"
    """`pre` normalizes what enters each sub-layer, `post` the sum that leaves it."""

    norm_epsilon: Positive = 1e-5
    """Added to the mean square before its root is taken."""

    positions: Literal["rope", "none"] = "rope"
    """`rope` rotates queries and keys by their position; `none` leaves the order to the causal mask (NoPE)."""

    rope_theta: Positive = 10_000.0
    """Base of the rotary wavelengths, in positions."""

    qk_norm: bool = False
    """Normalize each query and key head before attention."""

    tied_head: bool = False
    """Use the token embedding as the output head too."""

    zero_init: bool = False
    """Start the output of each attention and feed-forward layer at zero, so that a block first adds nothing."""

    logit_softcap: Positive | None = None
    """Keep logits within this size, by a tangent: softcap tanh(logit / softcap). `null` leaves them."""

    z_loss: NonNegative = 0.0
    """Weight of (log Z)^2 in the loss of training, such as PaLM's 1e-4, where Z is the sum of e^logit: it keeps logits
    from drifting. 0 turns it off. Training losses include it; validation losses and bits per byte never do."""

    embedding_norm: bool = False
    """Normalize what enters the first block."""

    embedding_skip: bool = False
    """Let each block mix its input with the embedding of its token, by two learned weights that begin at 1 and 0."""

    value_embeddings: Natural = 0
    """Further tables of token vectors (of G x D channels), each mixed into the values of one of the first blocks and of
    one of the last."""

    window: Count | None = None
    """Latest positions that attention sees, in the layers that `window_pattern` says; `null` for all of them."""

    window_pattern: str = "S"
    """One letter a layer, repeated: `S` has the `window`, `L` sees the whole context, such as `SSSL`."""

    residual_dtype: Literal["float32", "compute"] = "float32"
    """Numbers that the residual stream is kept in between layers: `float32`, or those of the matrix products, which in
    bfloat16 halves the memory that norms and sums move. Norms compute in float32 either way."""

    checkpointing: Literal["none", "selective", "full"] = "none"
    """What training computes again on the way back, for less memory: nothing, all but matrix products and attention, or
    each block from its input. Losses and gradients are the same to the bit; with `selective` on a Hopper GPU, as far as
    two kernels round alike, which they did in all shapes tried."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        if self.width % self.heads:
            step = self.heads * (2 if self.positions == "rope" else 1)  # rotary positions pair the channels of a head
            above = -(-self.width // step) * step
            raise ConfigError(
                f"`model.width` ({self.width}) is not a multiple of `model.heads` ({self.heads})",
                hint=f"set `model.width` to {above}",
            )
        if self.heads % self.kv_heads:
            fitting = max(n for n in range(1, min(self.heads, self.kv_heads) + 1) if self.heads % n == 0)
            raise ConfigError(
                f"`model.heads` ({self.heads}) is not a multiple of `model.kv_heads` ({self.kv_heads})",
                hint=f"set `model.kv_heads` to {fitting}",
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ConfigError(
                f"rotary positions need an even number of channels per head, and `model.width` / `model.heads` "
                f"is {self.head_dim}",
                hint=f"set `model.width` to {self.heads * (self.head_dim + 1)}, or `model.positions` to `none`",
            )
        return self

    @model_validator(mode="after")
    def _layers_suffice(self) -> "ModelConfig":
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise ConfigError(
                f"`model.window_pattern` (`{self.window_pattern}`) must be written with `S` and `L` alone",
                hint="`--set model.window_pattern=SSSL` gives three layers of four the window",
            )
        if 2 * self.value_embeddings > self.layers:
            raise ConfigError(
                f"`model.value_embeddings` ({self.value_embeddings}) are used twice each, and `model.layers` is "
                f"{self.layers}",
                hint=f"set `model.value_embeddings` to {self.layers // 2}",
            )
        return self

    @property
    def head_dim(self) -> int:
        """Channels per head (D)."""
        return self.width // self.heads

    def layer_window(self, layer: int) -> int | None:
        """Return how many positions attention sees in a layer, or None for all before it."""
        is_short = self.window_pattern[layer % len(self.window_pattern)] == "S"
        return self.window if is_short and self.window is not None and self.window < self.context_length else None

    def value_table(self, layer: int) -> int | None:
        """Return which table of value embeddings a layer has: the first layers and the last ones have the same."""
        if layer < self.value_embeddings:
            return layer
        from_last = layer - (self.layers - self.value_embeddings)
        return from_last if from_last >= 0 else None


class OptimizerGroup(Settings):
    """Which weights an optimizer moves, and how. The first group whose pattern matches a weight takes it."""

    match: str | Names = "*"
    """Pattern of parameter names, such as `blocks.*.weight`, or several; `*` matches everything, `!` keeps out."""

    name: str = "adamw"
    """Registered optimizer."""

    lr: NonNegative = 1e-3
    """Learning rate at the peak of the schedule."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Further settings of that optimizer, such as `betas`, `weight_decay` or `momentum`."""


class ScheduleConfig(Settings):
    """How the learning rate changes over the run, as a factor on each group's `lr`."""

    name: str = "cosine"
    """Registered schedule."""

    warmup: Share = 0.02
    """Share of all steps over which the rate rises from zero to its peak."""

    warmup_steps: Natural | None = None
    """Steps over which it rises, instead of a share of them."""

    final: Share = 0.1
    """Share of the peak rate that is left at the last step."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Further settings of that schedule: `wsd` has `decay`, a share of all steps, and its `shape`."""


class DataConfig(Settings):
    """The text that a run learns from, and how it becomes tokens."""

    dataset: str = "tinystories"
    """Dataset in the data folder. A known one that is not there yet is downloaded first."""

    tokenizer: str | None = None
    """Folder or file of a tokenizer to use; by default one is learned on the training text."""

    special_tokens: Names = (END_OF_TEXT,)
    """Texts that become one token each and that nothing is merged across."""

    documents: Literal["joined", "packed"] = "joined"
    """`joined` reads on across the end of a document, `packed` lets attention see a token's own document only."""

    order: Literal["shuffled", "random"] = "shuffled"
    """`shuffled` trains on every window of the text once before any comes again, but for a rest at the ends; `random`
    draws them with replacement, as nanoGPT and CS336 do."""

    sample_bytes: Count = 6_000_000
    """Size in bytes of the built-in corpus, when `dataset` is `sample` and it has to be written."""


class SamplingConfig(Settings):
    """How the next token is chosen from the model's probabilities."""

    temperature: NonNegative = 0.8
    """Divides the logits: below 1 safer, above 1 wilder, 0 always the most likely token."""

    top_k: Natural = 0
    """Keep only this many of the most likely tokens; 0 keeps all."""

    top_p: Share = 0.95
    """Keep the fewest most likely tokens whose probabilities reach this sum; 1 keeps all."""

    min_p: Share = 0.0
    """Keep tokens at least this share as likely as the most likely one; 0 keeps all."""

    others: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further registered samplers with their settings, applied last; a temperature of 0 overrules all."""


def _check_duration(text: str) -> str:
    match = _DURATION.fullmatch(text)
    if match is None or not any(int(number or 0) for number in match.groups()):
        raise ConfigError(f"`max_time` (`{text}`) is not a duration", hint="write it as `90s`, `10m` or `1h30m`")
    return text


_DURATION = re.compile(r"(?=.)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?")
Duration = Annotated[str, AfterValidator(_check_duration)]


class AnomalyConfig(Settings):
    """What happens when the numbers of a step say that training has gone wrong."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """`stop` ends the run; `skip` leaves out that update, and waits for the GPU; `rollback` leaves out that batch."""

    spike: NonNegative = Field(default_factory=lambda values: 0.0 if values.get("policy", "stop") == "stop" else 10.0)
    """Spreads above the recent median of loss or norm that are a spike, 0 for none; by default 10, with `stop` 0."""

    window: Annotated[int, Field(ge=8)] = 100
    """Steps that a spike is measured against."""

    grace: Natural = 100
    """First steps of a run, in which nothing is called a spike."""

    repeats: Count = 5
    """Updates skipped in a row, or rollbacks to one checkpoint, after which the run ends all the same."""


class TrainConfig(Settings):
    """One experiment: data, model, optimizer and schedule, and what is recorded on the way."""

    name: str = ""
    """Name of the experiment in the table; by default that of the config file."""

    data: DataConfig = DataConfig()
    """The text, and how it becomes tokens."""

    model: ModelConfig = ModelConfig()
    """Shape and parts of the model."""

    optimizer: Annotated[tuple[OptimizerGroup, ...], Field(strict=False, min_length=1)] = (OptimizerGroup(),)
    """Groups of weights with their optimizers, in order: the first match wins."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over time."""

    steps: Count = 1_000
    """Optimizer steps."""

    max_time: Duration | None = None
    """Time of training, such as `1h30m`, that ends the run if `steps` do not; evaluations come on top."""

    max_epochs: Positive | None = None
    """Times that the run may read its text, such as 2, which ends it, and the schedule, if `steps` do not."""

    batch_size: Count = 64
    """Sequences in one optimizer step."""

    microbatch: Count | Literal["auto"] | None = None
    """Sequences in one forward and backward pass, to save memory; `auto` for as many as fit, `null` for all."""

    clip: NonNegative = 1.0
    """Largest norm of all gradients together; larger ones are scaled down to it. 0 turns this off."""

    seed: Seed = 0
    """Seed of the initial weights, the batches and the samples."""

    device: Device = "auto"
    """Where to compute: `auto` takes CUDA, then MPS, then the CPU."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; weights stay float32. `auto` is bfloat16 on CUDA, else float32."""

    compile: bool | Literal["auto", "blocks"] = "auto"
    """Compile the model with torch.compile: slower to start, faster to run. `auto` does so on CUDA. `blocks` compiles a
    block once for all layers, which starts many times sooner and runs a little slower: for runs of minutes."""

    cuda_graphs: bool | Literal["auto"] = "auto"
    """Launch a whole pass at once on CUDA, and keep its memory. `auto` does so up to 32 TFLOPs a pass."""

    deterministic: bool = False
    """Sum in a fixed order on a GPU too, so that equal runs are equal to the bit there as on a CPU; slower."""

    eval_every: Count = 250
    """Steps between evaluations; the last step is always evaluated."""

    eval_batches: Count = 20
    """Batches of validation text in one evaluation."""

    checkpoint_every: Count = 500
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: Count = 2
    """Latest checkpoints that are kept, of which one may be damaged; the best one is kept besides."""

    log_every: Count = 10
    """Steps between lines of progress where there is no terminal."""

    sample_prompt: str = "Once upon a time"
    """Prompt that the model continues at each evaluation."""

    sample_tokens: Natural = 100
    """Tokens written at each evaluation; 0 for none."""

    sampling: SamplingConfig = SamplingConfig()
    """How those tokens are chosen."""

    anomaly: AnomalyConfig = AnomalyConfig()
    """What happens when training goes wrong."""

    verify_steps: Annotated[int, Field(ge=3)] = 12
    """Steps of the short runs of `--verify-resume`."""

    plugins: Names = ()
    """Modules to import first, which may register parts of their own."""

    @model_validator(mode="after")
    def _parts_exist(self) -> "TrainConfig":
        parts = [
            ("attention backend", "lfs_cli.model", "ATTENTION", self.model.attention),
            ("feed-forward", "lfs_cli.model", "FEED_FORWARDS", self.model.feed_forward),
            ("norm", "lfs_cli.model", "NORMS", self.model.norm),
            ("schedule", "lfs_cli.optimizers", "SCHEDULES", self.schedule.name),
            *(("optimizer", "lfs_cli.optimizers", "OPTIMIZERS", group.name) for group in self.optimizer),
        ]
        if not self.plugins:  # a plugin may register any name: then the registries themselves have the last word
            for kind, room, table, name in parts:
                if (table, name) != ("ATTENTION", "auto"):
                    check_registered(kind, room, table, name)
            for group in self.optimizer:
                accepted = [key for key in catalogue("lfs_cli.optimizers", "OPTIMIZERS")[group.name] if key != "lr"]
                check_options("optimizer", group.name, group.options, accepted)
            known = catalogue("lfs_cli.optimizers", "SCHEDULES")[self.schedule.name]
            accepted = [key for key in known if key not in ("steps", "warmup", "final")]
            check_options("schedule", self.schedule.name, self.schedule.options, accepted)
        return self

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "TrainConfig":
        if self.batch_size % self.passes_size:
            fitting = max(n for n in range(1, min(self.batch_size, self.passes_size) + 1) if self.batch_size % n == 0)
            raise ConfigError(
                f"`batch_size` ({self.batch_size}) is not a multiple of `microbatch` ({self.microbatch})",
                hint=f"set `microbatch` to {fitting}",
            )
        if self.compile == "blocks" and self.model.checkpointing == "selective":
            raise ConfigError(
                "`model.checkpointing` is `selective`, and sees no products in blocks that `compile=blocks` compiles",
                hint="try `--set compile=auto`, or `--set model.checkpointing=full`",
            )
        smallest = 256 + len(self.data.special_tokens)
        if self.data.tokenizer is None and self.model.vocab_size < smallest:
            raise ConfigError(
                f"`model.vocab_size` ({self.model.vocab_size}) has no room for 256 bytes and "
                f"{_special_tokens(self.data.special_tokens)}",
                hint=f"set `model.vocab_size` to at least {smallest}",
            )
        return self

    @property
    def max_seconds(self) -> int | None:
        """Seconds in `max_time`."""
        match = _DURATION.fullmatch(self.max_time or "")
        return sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else None

    def steps_for(self, text_tokens: int) -> int:
        """Steps that a run does at most on a training text of so many tokens: `steps`, cut by `max_epochs`."""
        share = math.inf if self.max_epochs is None else self.max_epochs * text_tokens / self.batch_tokens
        return self.steps if share >= self.steps else max(1, int(share))

    def epochs_for(self, steps: int, text_tokens: int) -> float:
        """A `max_epochs` that allows so many steps on a training text of so many tokens, in thousandths."""
        return (int(1_000 * steps * self.batch_tokens / text_tokens) + 1) / 1_000

    @property
    def passes_size(self) -> int:
        """Sequences in one forward and backward pass; where they are yet to be chosen, the whole batch."""
        return self.microbatch if isinstance(self.microbatch, int) else self.batch_size

    @property
    def batch_tokens(self) -> int:
        """Tokens in one optimizer step."""
        return self.batch_size * self.model.context_length

    @property
    def total_tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return self.steps * self.batch_tokens


class DownloadConfig(Settings):
    """`lfs download`: bring a text dataset into the data folder."""

    command = "download"

    dataset: str = ""
    """Dataset to bring; none lists them."""

    source: str = ""
    """File or URL of your own text, instead of a known dataset (`--from`)."""

    name: str = ""
    """Name for the text of `source`."""

    valid_share: Share = 0.05
    """Share of your own text that is held out for validation, taken from its end."""

    licence: str = "unknown"
    """Licence of your own text, for its manifest."""

    sample_bytes: Count = 6_000_000
    """Size in bytes of the built-in corpus."""

    seed: Seed = 0
    """Seed of the built-in corpus."""


class TokenizeConfig(Settings):
    """`lfs tokenize`: learn a tokenizer on a dataset and encode it."""

    command = "tokenize"

    dataset: str = ""
    """Dataset in the data folder; by default the one that was brought last."""

    vocab_size: Count = 10_000
    """Tokens to learn, special tokens and the 256 bytes included."""

    special_tokens: Names = (END_OF_TEXT,)
    """Texts that become one token each and that nothing is merged across."""

    pattern: str = "gpt2"
    """Registered pre-tokenization pattern."""

    tokenizer: str | None = None
    """Folder or file of a tokenizer to use instead of learning one."""

    workers: Natural = 0
    """Threads; 0 takes one for each core."""

    max_words: Count | None = None
    """Different words that learning keeps in memory; when a text has more, rare ones are dropped. `null` keeps all."""

    sample_bytes: Count | None = None
    """Bytes of the training text to learn on, taken evenly from all of it; `null` takes the whole text (`--sample`)."""

    text: str | None = None
    """Text whose tokens are shown, instead of encoding a dataset."""

    file: str | None = None
    """File whose tokens are shown, instead of encoding a dataset; `-` reads standard input."""

    compare: str | None = None
    """Folder or file of another tokenizer, to compare on `text`, `file` or the validation text of `dataset`."""

    export: Literal["gpt2", "huggingface", "tiktoken"] | None = None
    """Format in which to write the tokenizer for other libraries, instead of encoding a dataset."""

    out: str | None = None
    """Folder that `export` writes to; by default one named after tokenizer and format, in the current folder."""

    @model_validator(mode="after")
    def _one_task(self) -> "TokenizeConfig":
        if self.text is not None and self.file is not None:
            raise ConfigError("`text` and `file` are both given", hint="name one text to show")
        for name in ("text", "file", "compare"):
            if self.export is not None and getattr(self, name) is not None:
                raise ConfigError(f"`export` and `{name}` are both given", hint="do one after the other")
        if self.out is not None and self.export is None:
            raise ConfigError("`out` is given without `export`", hint="name a format: `--export huggingface`")
        return self

    @model_validator(mode="after")
    def _vocabulary_fits(self) -> "TokenizeConfig":
        if any(not special for special in self.special_tokens):
            raise ConfigError("a special token is empty", hint=f"name a text, such as `{END_OF_TEXT}`")
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise ConfigError("a special token is given twice", hint="name each special token once")
        smallest = 256 + len(self.special_tokens)
        if self.tokenizer is None and self.vocab_size < smallest:
            raise ConfigError(
                f"`vocab_size` ({self.vocab_size}) has no room for 256 bytes and "
                f"{_special_tokens(self.special_tokens)}",
                hint=f"set `vocab_size` to at least {smallest}",
            )
        return self


class AttentionBench(Settings):
    """`lfs bench attention`: time, memory and accuracy of implementations of attention."""

    preset: Literal["none", "cs336", "leaderboard", "shapes", "memory"] = "none"
    """Shapes with a name, in place of `seq` to `window`: `cs336` (both grids of its assignment 2), `leaderboard` (that
    of its contest), `shapes` (six of training) or `memory` (up to 65,536 positions)."""

    seq: Grid = ()
    """Sequence lengths (T); by default 1024 to 16384 on a GPU, 256 to 1024 elsewhere."""

    batch: Annotated[Grid, Field(min_length=1)] = (1,)
    """Sequences (B), one or several."""

    heads: Annotated[Grid, Field(min_length=1)] = (16,)
    """Query heads (H), one or several."""

    kv_heads: Grid = ()
    """Key/value heads (G), one or several; by default as many as query heads."""

    head_dim: Annotated[Grid, Field(min_length=1)] = (64,)
    """Channels per head (D), one or several."""

    dtypes: Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...], Field(strict=False)] = ()
    """Types of the numbers, when several are to be compared; by default that of `dtype`."""

    causal: bool = True
    """Let each position see only those before it."""

    window: Natural = 0
    """Keys that each query sees, its own the last of them; 0 is all. Needs `causal`."""

    passes: Annotated[tuple[Literal["forward", "backward", "both"], ...], Field(strict=False, min_length=1)] = (
        "forward",
        "backward",
        "both",
    )
    """What is timed. `both` is a forward and a backward pass one after the other."""

    implementations: Names = ()
    """What to time: registered backends of `model.attention`, and those of other libraries. By default the fastest that
    this machine may have, and `standard`."""

    tune: bool = False
    """Search for faster tiles of our kernels in place of a comparison: of all, or of those of the `implementations`
    `hopper` and `triton`. Needs a GPU, and minutes; what was found when it is interrupted is kept."""

    plot: str | None = None
    """File to draw the results in: `.svg`, `.png`, `.pdf` or `.html`."""

    @model_validator(mode="after")
    def _fits_together(self) -> "AttentionBench":
        shape = ("seq", "batch", "heads", "kv_heads", "head_dim", "causal", "window")
        given = [name for name in shape if getattr(self, name) != type(self).model_fields[name].default]
        if self.preset != "none" and given:
            raise ConfigError(
                f"`attention.preset` and `attention.{given[0]}` both set the shapes",
                hint=f"leave out one of them, such as `attention.{given[0]}`",
            )
        if self.plot is not None and not self.plot.lower().endswith((".svg", ".png", ".pdf", ".html")):
            raise ConfigError(
                f"`attention.plot` (`{self.plot}`) does not say what to draw",
                hint="end its name in .svg, .png, .pdf or .html",
            )
        if self.plot is not None and self.tune:
            raise ConfigError("`attention.tune` makes no picture", hint="leave out `attention.plot`")
        if self.tune and (others := set(self.implementations) - {"hopper", "triton"}):
            raise ConfigError(
                f"`attention.tune` cannot tune `{min(others)}`",
                hint="set `attention.implementations` to `hopper`, `triton` or both, or leave it out",
            )
        if self.window and not self.causal:
            raise ConfigError("`attention.window` is for causal attention only", hint="set `attention.causal` to true")
        for heads, groups in product(self.heads, self.kv_heads):
            if heads % groups:
                fitting = max(n for n in range(1, min(heads, groups) + 1) if heads % n == 0)
                raise ConfigError(
                    f"`attention.heads` ({heads}) is not a multiple of `attention.kv_heads` ({groups})",
                    hint=f"set `attention.kv_heads` to {fitting}",
                )
        return self


class TokenizerBench(Settings):
    """`lfs bench tokenizer`: speed and memory of learning, encoding and writing shards, beside other libraries."""

    dataset: str = "sample"
    """Dataset whose training text is used; `sample` is made on the spot when it is not there."""

    file: str | None = None
    """Text file to use instead of a dataset."""

    text_bytes: Count = 10_000_000
    """Bytes of it that are used."""

    vocab_size: Annotated[int, Field(ge=257)] = 10_000
    """Tokens to learn, and those of the vocabulary that all encoders get."""

    tokenizer: str | None = None
    """Folder or file of another vocabulary for the encoders."""

    tasks: Annotated[tuple[Literal["learn", "encode", "shard"], ...], Field(strict=False, min_length=1)] = (
        "learn",
        "encode",
        "shard",
    )
    """What to time: learning, encoding texts in memory, turning a file into a file of ids."""

    peers: Annotated[
        tuple[Literal["tiktoken", "tokenizers", "rustbpe", "gigatoken", "fastokens"], ...], Field(strict=False)
    ] = ("gigatoken", "fastokens", "tiktoken", "tokenizers", "rustbpe")
    """Libraries to compare with, those of them that are installed."""

    threads: Counts = ()
    """Numbers of threads; by default 1 and one for each core."""

    plot: str | None = None
    """File to draw the results in: `.html`, `.svg` or `.png`."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> "TokenizerBench":
        if self.plot is not None and not self.plot.lower().endswith((".html", ".svg", ".png")):
            raise ConfigError(
                f"`tokenizer.plot` (`{self.plot}`) does not say what to draw",
                hint="end its name in .svg, .png or .html",
            )
        return self


class ModelBench(Settings):
    """`lfs bench model`: time and memory of a training step, by its parts."""

    sizes: Annotated[
        tuple[Literal["tiny", "small", "medium", "large", "xl", "2.7b", "10b"], ...], Field(strict=False)
    ] = ()
    """Sizes of CS336's table, `tiny`, which fits any laptop, and `10b`; by default all of the table on a GPU, else
    `tiny`."""

    seq: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(strict=False)] = ()
    """Sequence lengths (T); by default 512 on a GPU, 64 elsewhere."""

    batch: Count = 4
    """Sequences (B)."""

    vocab_size: Annotated[int, Field(ge=257)] = 10_000
    """Vocabulary (V)."""

    attention: str = "auto"
    """Attention backend."""

    parts: Annotated[tuple[StepPart, ...], Field(strict=False)] = ()
    """What is timed; by default all. `inference` keeps nothing for backward, `step` is all of training."""

    precisions: Annotated[tuple[Literal["float32", "tf32", "bfloat16", "float16"], ...], Field(strict=False)] = ()
    """Types of the matrix products to compare, ratios to the first; by default that of `dtype`."""

    compile: bool = False
    """Also compile the model with torch.compile."""

    graphs: bool = False
    """Also replay the passes of `forward+backward` and `step` as a CUDA graph, which shows what launches cost."""

    kernels: bool = False
    """Profile one more step, and tell its time by module, phase and kernel."""

    memory: bool = False
    """Profile one more step, and tell what is in its memory over its time."""

    plot: str | None = None
    """File to draw the memory of that step in: `.svg`, `.png`, `.pdf` or `.html`."""

    profile: str | None = None
    """Folder for a Chrome trace of that step, and on CUDA a snapshot of its memory."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelBench":
        if self.plot is not None and not self.plot.lower().endswith((".svg", ".png", ".pdf", ".html")):
            raise ConfigError(
                f"`model.plot` (`{self.plot}`) does not say what to draw",
                hint="end its name in .svg, .png, .pdf or .html",
            )
        if self.graphs and self.parts and not {"forward+backward", "step"}.intersection(self.parts):
            raise ConfigError(
                "`model.graphs` is for the parts `forward+backward` and `step`, and `model.parts` has neither",
                hint="add one of them to `--parts`, or leave out `--graphs`",
            )
        for name in ("parts", "precisions"):
            values = getattr(self, name)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ConfigError(
                    f"`model.{name}` has `{twice[0]}` twice", hint="name each once: every run is repeated anyway"
                )
        return self


class OptimizerBench(Settings):
    """`lfs bench optimizer`: time of one step of each optimizer."""

    names: Names = ()
    """Registered optimizers; by default all, and torch's own as baselines."""

    parameters: Counts = ()
    """Weights to update; by default 1M and 10M on a CPU, 100M on a GPU."""


class KernelsBench(Settings):
    """`lfs bench kernels`: fused kernels beside eager PyTorch and torch.compile."""

    names: Annotated[tuple[KernelName, ...], Field(strict=False)] = ()
    """Kernels to time; by default all."""

    rows: Natural = 0
    """Rows, or tokens, of the inputs; 0 takes 32,768 on a GPU and 256 elsewhere."""

    width: Count = 768
    """Channels of a row, a multiple of 64: rotary positions and attention see heads of 64."""

    vocab_size: Annotated[int, Field(ge=2)] = 50_304
    """Vocabulary of the head with its loss (V); at most 4,096 without a GPU."""

    weights: Natural = 0
    """Weights that AdamW moves; 0 takes 124M on a GPU and 1M elsewhere."""

    passes: Annotated[tuple[Literal["forward", "backward", "both"], ...], Field(strict=False, min_length=1)] = (
        "forward",
        "backward",
        "both",
    )
    """What is timed. `both` is a forward and a backward pass one after the other."""

    compile: bool | Literal["auto"] = "auto"
    """Also time torch.compile; `auto` does so on CUDA."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "KernelsBench":
        if self.width % 64:
            raise ConfigError(
                f"`kernels.width` ({self.width}) is not a multiple of 64",
                hint=f"set `kernels.width` to {-(-self.width // 64) * 64}",
            )
        return self


class GenerationBench(Settings):
    """`lfs bench generation`: speed of decoding."""

    run: str = ""
    """Run whose best checkpoint is used; by default a model with random weights."""

    batch: Counts = (1, 8)
    """Prompts decoded together."""

    prompt_tokens: Count = 32
    """Tokens read before writing."""

    max_tokens: Count = 64
    """Tokens written."""


class BenchConfig(Settings):
    """`lfs bench`: measure a part beside a baseline."""

    command = "bench"

    benchmark: str = ""
    """Registered benchmark."""

    device: Device = "auto"
    """Where to compute."""

    dtype: Dtype = "auto"
    """Type of the numbers; `auto` is bfloat16 on CUDA, else float32."""

    warmup: Natural = 3
    """Runs that are not counted."""

    repeats: Count = 10
    """Runs that are counted."""

    max_seconds: Positive = 10.0
    """Seconds after which one comparison stops early, with fewer runs; never before one has counted. Where it is set,
    `attention.tune` ends after as long for each shape, else after 120."""

    seed: Seed = 0
    """Seed of the random inputs."""

    attention: AttentionBench = AttentionBench()
    """Settings of `lfs bench attention`."""

    tokenizer: TokenizerBench = TokenizerBench()
    """Settings of `lfs bench tokenizer`."""

    model: ModelBench = ModelBench()
    """Settings of `lfs bench model`."""

    optimizer: OptimizerBench = OptimizerBench()
    """Settings of `lfs bench optimizer`."""

    kernels: KernelsBench = KernelsBench()
    """Settings of `lfs bench kernels`."""

    generation: GenerationBench = GenerationBench()
    """Settings of `lfs bench generation`."""

    plugins: Names = ()
    """Modules to import first, which may register parts of their own."""

    @model_validator(mode="after")
    def _fits_together(self) -> "BenchConfig":
        if not self.benchmark:
            known = ", ".join(sorted(catalogue("lfs_cli.benchmarks", "BENCHMARKS")))
            raise ConfigError("no benchmark is named", hint=f"choose one of: {known}")
        if not self.plugins:  # else it is up to who imports them: a plugin may register any name
            self.check_names()
        if self.benchmark == "model" and self.dtype != "auto" and self.model.precisions:
            raise ConfigError(
                "`dtype` and `model.precisions` both set the type of the numbers",
                hint="leave out one of them, such as `dtype`",
            )
        return self

    def check_names(self) -> None:
        """Raise ConfigError for the name of a part that nothing has registered."""
        check_registered("benchmark", "lfs_cli.benchmarks", "BENCHMARKS", self.benchmark)
        ours = catalogue("lfs_cli.model", "ATTENTION")
        implementations = {*catalogue("lfs_cli.benchmarks", "IMPLEMENTATIONS"), *ours}
        for name in self.attention.implementations:
            if name not in implementations:
                raise ConfigError(
                    f"unknown implementation of attention `{name}`", hint=did_you_mean(name, implementations)
                )
        if self.model.attention not in ("torch", "auto"):
            check_registered("attention backend", "lfs_cli.model", "ATTENTION", self.model.attention)
        for name in self.optimizer.names:
            check_registered("optimizer", "lfs_cli.optimizers", "OPTIMIZERS", name)


class GenerateConfig(Settings):
    """`lfs generate`: let a trained model continue a prompt."""

    command = "generate"

    prompts: Names = ()
    """Texts to continue; none on a terminal opens a small prompt loop."""

    run: str = ""
    """Run, run folder or checkpoint to use; by default the newest run."""

    checkpoint: str = "best"
    """Which checkpoint of the run: `best`, `latest` or the name of its folder, such as `step-000500`."""

    max_tokens: Count = 256
    """Tokens to write at most."""

    sampling: SamplingConfig = SamplingConfig()
    """How each token is chosen."""

    seed: Seed = 0
    """Seed of the choices: the same seed writes the same text."""

    stop: str | None = END_OF_TEXT
    """Special token that ends the text."""

    cache: bool = True
    """Keep the keys and values of earlier tokens instead of computing them again."""

    device: Device = "auto"
    """Where to compute."""

    dtype: Dtype = "auto"
    """Type of the weights and products; `auto` is bfloat16 on CUDA, else float32."""

    plugins: Names = ()
    """Modules to import first, which may register parts of their own."""

    @model_validator(mode="after")
    def _samplers_exist(self) -> "GenerateConfig":
        if not self.plugins:
            for name, settings in self.sampling.others.items():
                check_registered("sampler", "lfs_cli.generation", "SAMPLERS", name)
                check_options("sampler", name, settings, catalogue("lfs_cli.generation", "SAMPLERS")[name])
        return self


class ReportConfig(Settings):
    """`lfs report`: show, compare and tabulate runs."""

    command = "report"

    runs: Names = ()
    """Runs to compare; none shows all of them."""

    plot: str | None = None
    """File to draw their validation losses in, over time and tokens: `.svg`, `.png`, `.pdf` or `.html`."""
