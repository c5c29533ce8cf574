"""`lfs bench`: time and memory of one part of lfs, beside a baseline."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.console import Console
from lfs_cli.cli.options import AsJson, ConfigFile, Explain, Overrides, Quiet, Verbose, number, whole_number
from lfs_cli.cli.step_tables import step_tables
from lfs_cli.errors import ConfigError

if TYPE_CHECKING:
    from lfs_cli.runs.bench import BenchResult

SHARED = ("device", "dtype", "repeats", "warmup", "max_seconds")
"""Options that every benchmark has, under the same names as the settings."""

SETTINGS: dict[str, dict[str, str]] = {
    "attention": {
        "seq": "seq",
        "batch": "batch",
        "heads": "heads",
        "kv_heads": "kv_heads",
        "head_dim": "head_dim",
        "preset": "preset",
        "implementations": "implementations",
        "passes": "passes",
        "tune": "tune",
        "plot": "plot",
    },
    "tokenizer": {
        "vocab": "vocab_size",
        "dataset": "dataset",
        "file": "file",
        "tokenizer": "tokenizer",
        "threads": "threads",
        "peer": "peers",
        "plot": "plot",
    },
    "model": {
        "seq": "seq",
        "batch": "batch",
        "size": "sizes",
        "parts": "parts",
        "precision": "precisions",
        "compile": "compile",
        "graphs": "graphs",
        "kernels": "kernels",
        "memory": "memory",
        "plot": "plot",
        "profile": "profile",
        "vocab": "vocab_size",
    },
    "optimizer": {"size": "parameters"},
    "kernels": {"size": "rows", "vocab": "vocab_size", "passes": "passes", "compile": "compile"},
    "generation": {"batch": "batch", "run": "run"},
}
"""Which setting of each benchmark an option stands for. Those that a benchmark lacks are refused."""

LISTS = {
    "attention.seq",
    "attention.batch",
    "attention.heads",
    "attention.kv_heads",
    "attention.head_dim",
    "attention.implementations",
    "attention.passes",
    "tokenizer.threads",
    "tokenizer.peers",
    "model.seq",
    "model.sizes",
    "model.parts",
    "model.precisions",
    "optimizer.parameters",
    "kernels.passes",
    "generation.batch",
}
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
        Column("B", field("batch"), is_detail=True),
        Column("H", field("heads"), is_detail=True),
        Column("G", lambda row: row["kv_heads"] if row.get("kv_heads") != row.get("heads") else None, is_detail=True),
        Column("D", field("head_dim"), is_detail=True),
        Column("dtype", field("dtype"), is_detail=True, rank=9),
        Column("causal", field("causal"), is_detail=True, rank=9),
        Column("pass", field("pass")),
        Column("implementation", field("implementation")),
        *_TIMES,
        Column("TFLOP/s", field("tflops"), rank=1),
        Column("% of matmul", lambda row: _percent(row.get("ceiling_share")), rank=6),
        Column("speed ratio", field("speed_ratio"), rank=1),
        Column("baseline", field("baseline"), rank=7),
        *_REST,
        Column("error", field("error"), rank=5),
    ),
    "tokenizer": (
        Column("dataset", field("dataset"), is_detail=True, rank=9),
        Column("vocabulary", field("vocab_size"), is_detail=True, rank=9),
        Column("MB", field("text_bytes", 1e-6), is_detail=True, rank=9),
        Column("task", field("task")),
        Column("threads", field("threads"), is_detail=True),
        Column("state", field("state")),
        Column("library", field("implementation")),
        Column("call", field("call"), rank=7),
        Column("ms", field("median_ms"), rank=2),  # which MB/s says as well
        Column("spread %", lambda row: _spread(row), rank=6),
        Column("MB/s", field("megabytes_per_second")),
        _RATIO,
        *_REST,
        Column("process MiB", field("process_peak_bytes", _MIB), rank=4),
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
    "kernels": (
        Column("kernel", field("kernel")),
        Column("rows", field("rows"), rank=8),
        Column("width", field("width"), is_detail=True, rank=9),
        Column("dtype", field("dtype"), is_detail=True, rank=9),
        Column("pass", field("pass")),
        Column("implementation", field("implementation")),
        *_TIMES,
        Column("GB/s", field("gigabytes_per_second"), rank=1),
        Column("% of copy", lambda row: _percent(row.get("bandwidth_share")), rank=1),
        Column("TFLOP/s", field("tflops"), rank=4),
        _RATIO,
        *_REST,
        Column("error", field("error"), rank=5),
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

TUNING_COLUMNS = (
    Column("T", field("seq"), is_detail=True),
    Column("D", field("head_dim"), is_detail=True),
    Column("dtype", field("dtype"), is_detail=True),
    Column("kernel", field("kernel")),
    Column("choice", lambda row: ", ".join(f"{name} {value}" for name, value in row["choice"].items())),
    *_TIMES,
    Column("TFLOP/s", field("tflops"), rank=1),
    _RATIO,
    Column("status", lambda row: "best" if row["is_best"] else row["status"]),
)
"""The columns of `lfs bench attention --tune`."""


def command(
    benchmark: Annotated[
        str | None, typer.Argument(metavar="BENCHMARK", help=f"One of: {', '.join(COLUMNS)}.", show_default=False)
    ] = None,
    seq: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Sequence lengths: attention, model.")] = None,
    batch: Annotated[
        list[str] | None, typer.Option(metavar="N,...", help="Sequences at once: attention, model, generation.")
    ] = None,
    heads: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Query heads: attention.")] = None,
    kv_heads: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Key/value heads: attention.")] = None,
    head_dim: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Channels per head: attention.")] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Shapes of attention: cs336, leaderboard, shapes or memory.")
    ] = None,
    implementations: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="Ours and others' attention, such as flash,torch-cudnn."),
    ] = None,
    passes: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Of attention, kernels: forward, backward, both.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Search for faster tiles of our attention kernels.")] = False,
    parts: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Of a step: inference to step, see --explain: model.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="float32, tf32, bfloat16, float16 compared: model.")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Compare with torch.compile: model, kernels.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Compare with passes as CUDA graphs: model.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time of a step by module, phase and kernel: model.")
    ] = False,
    memory: Annotated[bool, typer.Option("--memory", help="What is in memory over a step: model.")] = False,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Draw as .svg, .png or .html: results of attention, tokenizer, memory of model."
        ),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write traces of a step, and of its memory: model.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE,...", help="Model sizes, tiny to 10b; weights: optimizer; rows: kernels."),
    ] = None,
    vocab: Annotated[int | None, whole_number("--vocab", 10_000, help="Vocabulary: tokenizer, model, kernels.")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Text to encode: tokenizer.")] = None,
    file: Annotated[str | None, typer.Option(metavar="FILE", help="Text to encode: tokenizer.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="PATH", help="Vocabulary: tokenizer.")] = None,
    threads: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Numbers of threads: tokenizer.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Libraries to compare with: tokenizer.")
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Model that writes: generation.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = None,
    repeats: Annotated[int | None, whole_number("--repeats", 10, help="Runs that are counted.")] = None,
    warmup: Annotated[int | None, whole_number("--warmup", 3, help="Runs that are not.")] = None,
    max_seconds: Annotated[
        float | None, number("--max-seconds", 10, help="Seconds after which a comparison has runs enough.")
    ] = None,
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
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "preset": preset,
        "implementations": implementations,
        "passes": passes,
        "tune": tune or None,
        "parts": parts,
        "precision": precision,
        "compile": compile_ or None,
        "graphs": graphs or None,
        "kernels": kernels or None,
        "memory": memory or None,
        "plot": plot,
        "profile": profile,
        "size": size,
        "vocab": vocab,
        "dataset": dataset,
        "file": file,
        "tokenizer": tokenizer,
        "threads": threads,
        "peer": peer,
        "run": run,
    }
    shared = {"device": device, "dtype": dtype, "repeats": repeats, "warmup": warmup, "max_seconds": max_seconds}
    options = {"benchmark": benchmark, **shared, **_named(benchmark, own)}
    settings = load_config(BenchConfig, config, overrides or [], options)

    from lfs_cli.runs.bench_text import find_text

    find_text(settings)  # before torch: a slip must not cost three seconds
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
    if console.as_json:
        extra: dict[str, Any] = {**result.tables, "environment": result.environment}
        console.results(result.rows, **extra)
    elif not sys.stdout.isatty():
        console.results(result.rows)
        for rows in result.tables.values():
            console.text("\n")
            console.results(rows)
    else:
        _show_tables(console, benchmark, result)
    for note in _notes(benchmark, result.rows):
        console.note(note)
    for other in result.others:
        console.note(f"wrote {other}")
    if result.path is not None:
        others = [name for name in COLUMNS if name != benchmark]
        console.next(f"added {len(result.rows)} records to {result.path}; next: `lfs bench {others[0]}`")


def _show_tables(console: Console, benchmark: str, result: "BenchResult") -> None:
    columns = COLUMNS.get(benchmark, _plain_columns(result.rows))
    if result.rows and "choice" in result.rows[0]:
        columns = TUNING_COLUMNS
    rows, same = lay_out(rows_to_show(result.rows) if benchmark == "tokenizer" else result.rows, columns)
    versions = result.environment["versions"]
    where = f"{result.environment['hardware']}, torch {versions['torch']}"
    console.results(rows, title="; ".join(part for part in (benchmark, same, where) if part))
    for title, more in step_tables(result.tables):
        console.results(more, title=title)


def rows_to_show(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the benchmark of tokenizers that a person sees: of each library the fastest call.

    One that did not run at all, as it is not installed, has none: a note tells of it.
    """
    ran = {row["implementation"] for row in rows if row["status"] == "ok"}
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        if row["implementation"] in ran or not ran:
            key = tuple(row[name] for name in ("task", "threads", "state", "implementation"))
            best[key] = min(best.get(key, row), row, key=lambda one: one["median_ms"] or float("inf"))
    return list(best.values())


def _notes(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a reader of the table needs to know: ratios to what, and what a row says of itself."""
    baselines = dict.fromkeys(row["baseline"] for row in rows if row.get("speed_ratio") and row.get("baseline"))
    notes = [f"speed ratio: 2 is twice as fast as the baseline, {' or '.join(baselines)}"] if baselines else []
    notes += dict.fromkeys(
        f"{row['implementation']} ran {row['kernel']}"
        for row in rows
        if benchmark == "attention" and "implementation" in row and row["status"] == "ok"
        if not row.get("kernel", "by name").endswith("by name")
    )
    reasons: dict[str, None] = {}
    for row in rows:
        if row.get("note"):
            name = row.get("implementation") or row.get("kernel") or row.get("size") or row.get("part")
            is_ok = row["status"] == "ok"
            reasons[row["note"] if is_ok else f"{name}: {row['status']}, {row['note']}"] = None
    return [*notes, *reasons]


def _spread(row: Mapping[str, Any]) -> float | None:
    """Return the middle half of the runs as a percentage of the median."""
    if not row["median_ms"] or row["runs"] < 2:
        return None
    return round(100 * (row["q3_ms"] - row["q1_ms"]) / row["median_ms"], 1)


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 1)


def _plain_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Return every field as a column, for a benchmark that this file does not know."""
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(Column(name, field(name), rank=index) for index, name in enumerate(names))
