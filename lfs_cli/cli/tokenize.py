"""`lfs tokenize`: learn a tokenizer and turn a dataset into tokens."""

from typing import Annotated, Any

import typer

from lfs_cli.cli.console import Console, printable, size
from lfs_cli.cli.options import AsJson, ConfigFile, Explain, Overrides, Quiet, Verbose, whole_number


def command(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="Dataset in the data folder; by default the newest one.")
    ] = None,
    vocab: Annotated[
        int | None,
        whole_number(
            "--vocab", 10_000, metavar="TOKENS", help="Tokens to learn, 256 bytes and special tokens included."
        ),
    ] = None,
    special: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Special token; may be repeated, replaces the default.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(metavar="NAME", help="Pattern that cuts text into words.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Tokenizer to use instead of learning one: folder or file.")
    ] = None,
    workers: Annotated[
        int | None, whole_number("--workers", 2, metavar="THREADS", help="Threads; 0 for one on each core.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    explain: Explain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Learn a tokenizer on a dataset and encode it."""
    from lfs_cli.config import TokenizeConfig, load_config

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if explain:
        console.explain(TokenizeConfig)
        return
    options = {
        "dataset": dataset,
        "vocab_size": vocab,
        "special_tokens": special or None,
        "pattern": pattern,
        "tokenizer": tokenizer,
        "workers": workers,
    }
    settings = load_config(TokenizeConfig, config, overrides or [], options)
    from lfs_cli.runs.folder import DataFolder
    from lfs_cli.runs.tokenize import tokenize

    result = tokenize(settings, DataFolder.here(), console.observer)
    console.results(
        [_row(stage) for stage in result.stages],
        dataset=result.dataset,
        tokenizer=result.tokenizer,
        tokens=result.tokens,
        tokenizer_hash=result.tokenizer_hash,
        vocab_size=result.vocab_size,
        longest_tokens=result.longest_tokens,
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
    )
    console.note("longest tokens: " + " ".join(f"`{_one_line(token)}`" for token in result.longest_tokens))
    if result.peak_bytes is not None:
        console.note(f"peak memory: {size(result.peak_bytes)}")
    made = "wrote" if any(stage.seconds is not None for stage in result.stages) else "up to date:"
    plain = TokenizeConfig(dataset=settings.dataset, vocab_size=settings.vocab_size, workers=settings.workers)
    size_asked = settings.vocab_size if settings.tokenizer is None else result.vocab_size
    chosen = "" if settings == plain else f" --set data.tokenizer={result.tokenizer}"  # train learns a plain one itself
    console.next(
        f"{made} {result.tokenizer} and {result.tokens}; next: "
        f"`lfs train --set data.dataset={result.dataset} --set model.vocab_size={size_asked}{chosen}`"
    )


def _row(stage: Any) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "bytes": stage.bytes,
        "seconds": stage.seconds,
        "MB/s": stage.rate,
        "tokens": stage.tokens,
        "bytes/token": stage.bytes_per_token,
        "made": "new" if stage.seconds is not None else "kept",
    }


def _one_line(token: str) -> str:
    """Return ``token`` so that it stays on its line, with escapes for line ends and tabs."""
    return printable(token).replace("\n", "\\n").replace("\t", "\\t")
