"""Every knob of the six commands: one frozen model per part and per command.

A field has a type, a default and a sentence under it; that sentence is its help everywhere (`--explain`, the README's
table, the JSON Schema). Validators refuse combinations that cannot work and name a value that would. Whatever follows
from other settings is a property, so that it can never disagree with them.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lfs_cli.errors import ConfigError, did_you_mean
from lfs_cli.registry import catalogue, check_options

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Counts = Annotated[tuple[Count, ...], Field(strict=False)]

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

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

    @property
    def head_dim(self) -> int:
        """Channels per head (D)."""
        return self.width // self.heads


class OptimizerGroup(Settings):
    """Which weights an optimizer moves, and how. The first group whose pattern matches a weight takes it."""

    match: str = "*"
    """Pattern of parameter names, such as `blocks.*.weight`; `*` matches everything."""

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

    final: Share = 0.1
    """Share of the peak rate that is left at the last step."""


class DataConfig(Settings):
    """The text that a run learns from, and how it becomes tokens."""

    dataset: str = "tinystories"
    """Dataset in the data folder. A known one that is not there yet is downloaded first."""

    tokenizer: str | None = None
    """Folder or file of a tokenizer to use; by default one is learned on the training text."""

    special_tokens: Names = (END_OF_TEXT,)
    """Texts that become one token each and that nothing is merged across."""

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

    batch_size: Count = 64
    """Sequences in one optimizer step."""

    microbatch: Count | None = None
    """Sequences in one forward and backward pass, for less memory; by default the whole batch."""

    clip: NonNegative = 1.0
    """Largest norm of all gradients together; larger ones are scaled down to it. 0 turns this off."""

    seed: Seed = 0
    """Seed of the initial weights, the batches and the samples."""

    device: Device = "auto"
    """Where to compute: `auto` takes CUDA, then MPS, then the CPU."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; weights stay float32. `auto` is bfloat16 on CUDA, else float32."""

    compile: bool = False
    """Compile the model with torch.compile: slower to start, faster to run."""

    eval_every: Count = 250
    """Steps between evaluations; the last step is always evaluated."""

    eval_batches: Count = 20
    """Batches of validation text in one evaluation."""

    checkpoint_every: Count = 500
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: Count = 1
    """Latest checkpoints that are kept; the best one is kept besides."""

    log_every: Count = 10
    """Steps between lines of progress where there is no terminal."""

    sample_prompt: str = "Once upon a time"
    """Prompt that the model continues at each evaluation."""

    sample_tokens: Natural = 100
    """Tokens written at each evaluation; 0 for none."""

    sampling: SamplingConfig = SamplingConfig()
    """How those tokens are chosen."""

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
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> "TrainConfig":
        if self.batch_size % self.passes_size:
            fitting = max(n for n in range(1, min(self.batch_size, self.passes_size) + 1) if self.batch_size % n == 0)
            raise ConfigError(
                f"`batch_size` ({self.batch_size}) is not a multiple of `microbatch` ({self.microbatch})",
                hint=f"set `microbatch` to {fitting}",
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
    def passes_size(self) -> int:
        """Sequences in one forward and backward pass."""
        return self.microbatch or self.batch_size

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
    """`lfs bench attention`: time and memory of the attention backends."""

    seq: Counts = ()
    """Sequence lengths (T); by default 1024 to 16384 on a GPU, 256 to 1024 elsewhere."""

    batch: Count = 1
    """Sequences (B)."""

    heads: Count = 16
    """Query heads (H)."""

    kv_heads: Count = Field(default_factory=lambda values: values.get("heads", 1))
    """Key/value heads (G); the default is `heads`."""

    head_dim: Count = 64
    """Channels per head (D)."""

    causal: bool = True
    """Let each position see only those before it."""

    backends: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("standard", "flash", "torch")
    """What to time: registered backends, and `torch` for torch's own scaled_dot_product_attention, the baseline."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "AttentionBench":
        if self.heads % self.kv_heads:
            fitting = max(n for n in range(1, min(self.heads, self.kv_heads) + 1) if self.heads % n == 0)
            raise ConfigError(
                f"`attention.heads` ({self.heads}) is not a multiple of `attention.kv_heads` ({self.kv_heads})",
                hint=f"set `attention.kv_heads` to {fitting}",
            )
        return self


class TokenizerBench(Settings):
    """`lfs bench tokenizer`: speed of learning and encoding."""

    dataset: str = "sample"
    """Dataset whose training text is used; `sample` is made on the spot when it is not there."""

    text_bytes: Count = 10_000_000
    """Bytes of it that are used. From 8 MB on, lfs uses its compiled loops."""

    vocab_size: Annotated[int, Field(ge=257)] = 1_000
    """Tokens to learn."""


class ModelBench(Settings):
    """`lfs bench model`: time of forward, backward and optimizer step."""

    sizes: Annotated[tuple[Literal["tiny", "small", "medium", "large", "xl", "2.7b"], ...], Field(strict=False)] = ()
    """Sizes of CS336's table, and `tiny`, which fits any laptop; by default all of the table on a GPU, else `tiny`."""

    seq: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(strict=False)] = ()
    """Sequence lengths (T); by default 512 on a GPU, 64 elsewhere."""

    batch: Count = 4
    """Sequences (B)."""

    vocab_size: Annotated[int, Field(ge=257)] = 10_000
    """Vocabulary (V)."""

    attention: str = "auto"
    """Attention backend."""

    compile: bool = False
    """Also compile the model with torch.compile."""


class OptimizerBench(Settings):
    """`lfs bench optimizer`: time of one step of each optimizer."""

    names: Names = ()
    """Registered optimizers; by default all, and torch's own as baselines."""

    parameters: Counts = ()
    """Weights to update; by default 1M and 10M on a CPU, 100M on a GPU."""


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
    """Seconds after which one comparison stops early, with fewer runs; never before one has counted."""

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

    generation: GenerationBench = GenerationBench()
    """Settings of `lfs bench generation`."""

    @model_validator(mode="after")
    def _parts_exist(self) -> "BenchConfig":
        if not self.benchmark:
            known = ", ".join(sorted(catalogue("lfs_cli.benchmarks", "BENCHMARKS")))
            raise ConfigError("no benchmark is named", hint=f"choose one of: {known}")
        check_registered("benchmark", "lfs_cli.benchmarks", "BENCHMARKS", self.benchmark)
        for backend in (*self.attention.backends, self.model.attention):
            if backend not in ("torch", "auto"):
                check_registered("attention backend", "lfs_cli.model", "ATTENTION", backend)
        for name in self.optimizer.names:
            check_registered("optimizer", "lfs_cli.optimizers", "OPTIMIZERS", name)
        return self


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
