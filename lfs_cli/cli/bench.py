"""`lfs bench`: time and memory of one part of lfs, beside a baseline."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.console import Console
from lfs_cli.cli.options import AsJson, ConfigFile, Explain, Overrides, Quiet, Verbose, whole_number
from lfs_cli.errors import ConfigError

if TYPE_CHECKING:
    from lfs_cli.runs.bench import BenchResult

SHARED = ("device", "dtype", "repeats", "warmup")
"""Options that every benchmark has, under the same names as the settings."""

SETTINGS: dict[str, dict[str, str]] = {
    "attention": {
        "seq": "seq",
        "batch": "batch",
        "heads": "heads",
        "head_dim": "head_dim",
        "backend": "backends",
    },
    "tokenizer": {"vocab": "vocab_size", "dataset": "dataset"},
    "model": {"seq": "seq", "batch": "batch", "size": "sizes", "vocab": "vocab_size"},
    "optimizer": {"size": "parameters"},
    "generation": {"batch": "batch", "run": "run"},
}
"""Which setting of each benchmark an option stands for. Those that a benchmark lacks are refused."""

LISTS = {"attention.seq", "attention.backends", "model.seq", "model.sizes", "optimizer.parameters", "generation.batch"}
"""Settings that take several values; the options of the others take one."""

_MIB = 1 / 2**20
_TIMES = (
    Column("ms", field("median_ms")),
    Column("spread %", lambda row: _spread(row), rank=2),
)
_RATIO = Column("speed ratio", field("speed_ratio"), rank=1)
_REST = (
    Column("peak MiB", field("peak_bytes", _MIB), rank=3),
    Column("runs", field("runs"), rank=8, is_detail=True),
    Column("status", lambda row: "" if row["status"] == "ok" else row["status"]),
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "attention": (
        Column("T", field("seq"), is_detail=True),
        Column("B", field("batch"), is_detail=True, rank=9),
        Column("H", field("heads"), is_detail=True, rank=9),
        Column("D", field("head_dim"), is_detail=True, rank=9),
        Column("dtype", field("dtype"), is_detail=True, rank=9),
        Column("pass", field("pass")),
        Column("backend", field("backend")),
        *_TIMES,
        Column("TFLOP/s", field("tflops"), rank=4),
        _RATIO,
        *_REST,
        Column("error", field("max_error"), rank=5),
    ),
    "tokenizer": (
        Column("dataset", field("dataset"), is_detail=True, rank=9),
        Column("vocabulary", field("vocab_size"), is_detail=True, rank=9),
        Column("task", field("task")),
        Column("implementation", field("implementation")),
        Column("MB", field("text_bytes", 1e-6), rank=6),
        Column("threads", field("threads"), rank=6),
        *_TIMES,
        Column("MB/s", field("megabytes_per_second")),
        _RATIO,
        *_REST,
    ),
    "model": (
        Column("size", field("size"), is_detail=True),
        Column("M params", field("params_M"), rank=6, is_detail=True),
        Column("T", field("seq"), is_detail=True),
        Column("B", field("batch"), is_detail=True, rank=9),
        Column("dtype", field("dtype"), is_detail=True, rank=9),
        Column("attention", field("attention"), is_detail=True, rank=9),
        Column("mode", field("mode"), is_detail=True),
        Column("part", field("part")),
        *_TIMES,
        Column("mean ms", field("mean_ms"), rank=4),
        Column("std ms", field("std_ms"), rank=4),
        Column("tokens/s", field("tokens_per_second"), rank=1),
        Column("MFU %", field("mfu", 100), rank=1),
        _RATIO,
        *_REST,
    ),
    "optimizer": (
        Column("weights", field("parameters"), is_detail=True),
        Column("optimizer", field("optimizer")),
        Column("implementation", field("implementation")),
        *_TIMES,
        Column("M weights/s", field("weights_per_second", 1e-6), rank=4),
        _RATIO,
        *_REST,
    ),
    "generation": (
        Column("model", field("model"), is_detail=True, rank=9),
        Column("M params", field("params_M"), is_detail=True, rank=9),
        Column("dtype", field("dtype"), is_detail=True, rank=9),
        Column("prompt tokens", field("prompt_tokens"), is_detail=True, rank=9),
        Column("tokens", field("max_tokens"), is_detail=True, rank=9),
        Column("prompts", field("batch"), is_detail=True),
        Column("part", field("part")),
        *_TIMES,
        Column("tokens/s", field("tokens_per_second")),
        _RATIO,
        *_REST,
    ),
}


def command(
    benchmark: Annotated[
        str | None, typer.Argument(metavar="BENCHMARK", help=f"One of: {', '.join(COLUMNS)}.", show_default=False)
    ] = None,
    seq: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Sequence lengths: attention, model.")] = None,
    batch: Annotated[
        list[str] | None, typer.Option(metavar="N", help="Sequences at once: attention, model, generation.")
    ] = None,
    heads: Annotated[int | None, whole_number("--heads", 16, help="Query heads: attention.")] = None,
    head_dim: Annotated[int | None, whole_number("--head-dim", 64, help="Channels per head: attention.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Attention backends; `torch` is the baseline.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="SIZE,...", help="Model sizes, tiny to 2.7b; optimizer: weights.")
    ] = None,
    vocab: Annotated[int | None, whole_number("--vocab", 10_000, help="Vocabulary: tokenizer, model.")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Text to encode: tokenizer.")] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Model that writes: generation.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = None,
    repeats: Annotated[int | None, whole_number("--repeats", 10, help="Runs that are counted.")] = None,
    warmup: Annotated[int | None, whole_number("--warmup", 3, help="Runs that are not.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    explain: Explain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure time and memory of one part, beside a baseline."""
    from lfs_cli.config import BenchConfig, load_config

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if explain:
        console.explain(BenchConfig)
        return
    own = {
        "seq": seq,
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
        "backend": backend,
        "size": size,
        "vocab": vocab,
        "dataset": dataset,
        "run": run,
    }
    shared = {"device": device, "dtype": dtype, "repeats": repeats, "warmup": warmup}
    options = {"benchmark": benchmark, **shared, **_named(benchmark, own)}
    settings = load_config(BenchConfig, config, overrides or [], options)

    from lfs_cli.runs.bench import bench

    try:
        result = bench(settings, observer=console.observer)
    finally:
        console.observer.finish_progress()
    _show(console, settings.benchmark, result)


def _named(benchmark: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the given options of ``benchmark`` stand for."""
    given = {name: value for name, value in options.items() if value not in (None, [], "")}
    if benchmark not in SETTINGS:  # a plugin's, or a misspelled one: the schema knows
        return {}
    settings = {}
    for name, value in given.items():
        if name not in SETTINGS[benchmark]:
            raise ConfigError(
                f"`lfs bench {benchmark}` has no option `{_dashed(name)}`",
                hint=f"it has {', '.join(_dashed(known) for known in (*SETTINGS[benchmark], *SHARED))}",
            )
        setting = f"{benchmark}.{SETTINGS[benchmark][name]}"
        settings[setting] = _parsed(name, value, takes_many=setting in LISTS)
    return settings


def _parsed(name: str, value: Any, *, takes_many: bool) -> Any:
    """Return one value, or the list that a repeated option with commas makes."""
    if not isinstance(value, list):
        return value
    items = [item.strip() for part in value for item in part.split(",") if item.strip()]
    values = [int(item) if item.isdecimal() else item for item in items]
    if takes_many:
        return values
    if len(values) != 1:
        raise ConfigError(f"`{_dashed(name)}` takes one value here, not {len(values)}", hint="name one")
    return values[0]


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _show(console: Console, benchmark: str, result: "BenchResult") -> None:
    if console.as_json or not sys.stdout.isatty():
        console.results(result.rows, environment=result.environment)
    else:
        rows, same = lay_out(result.rows, COLUMNS.get(benchmark, _plain_columns(result.rows)))
        versions = result.environment["versions"]
        where = f"{result.environment['hardware']}, torch {versions['torch']}"
        console.results(rows, title="; ".join(part for part in (benchmark, same, where) if part))
    for note in _notes(result.rows):
        console.note(note)
    if result.path is not None:
        others = [name for name in COLUMNS if name != benchmark]
        console.next(f"added {len(result.rows)} records to {result.path}; next: `lfs bench {others[0]}`")


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a reader of the table needs to know: ratios to what, and why something was not measured."""
    baselines = dict.fromkeys(row["baseline"] for row in rows if row.get("speed_ratio") and row.get("baseline"))
    notes = [f"speed ratio: 2 is twice as fast as the baseline, {' or '.join(baselines)}"] if baselines else []
    reasons: dict[str, None] = {}
    for row in rows:
        if row.get("note"):
            name = row.get("backend") or row.get("implementation") or row.get("size") or row.get("part")
            reasons[f"{name}: {row['status']}, {row['note']}"] = None
    return [*notes, *reasons]


def _spread(row: Mapping[str, Any]) -> float | None:
    """Return the middle half of the runs as a percentage of the median."""
    if not row["median_ms"] or row["runs"] < 2:
        return None
    return round(100 * (row["q3_ms"] - row["q1_ms"]) / row["median_ms"], 1)


def _plain_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Return every field as a column, for a benchmark that this file does not know."""
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(Column(name, field(name), rank=index) for index, name in enumerate(names))
