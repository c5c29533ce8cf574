"""`lfs tokenize`: learn a tokenizer and turn a dataset into tokens, or look at what a tokenizer does to a text."""

import shlex
import sys
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.console import Console, duration, size
from lfs_cli.cli.options import (
    AsJson,
    ConfigFile,
    Explain,
    Overrides,
    Quiet,
    Verbose,
    size_in_bytes,
    whole_number,
)
from lfs_cli.cli.pieces import draw, escaped, marked, piece_row

if TYPE_CHECKING:
    from lfs_cli.config import TokenizeConfig
    from lfs_cli.runs.pieces import Comparison, Difference, Side

DRAWN = 300
"""Tokens that are drawn on a terminal; a pipe gets all of them."""

SIDES = (
    Column("tokenizer", field("tokenizer")),
    Column("vocabulary", field("vocabulary")),
    Column("shared %", lambda row: round(row["shared %"], 1), rank=2),
    Column("pattern", lambda row: row["pattern"] if len(row["pattern"]) <= 12 else "its own", rank=4, is_detail=True),
    Column("tokens", field("tokens")),
    Column("bytes/token", field("bytes/token")),
    Column("fallback %", field("fallback %"), rank=3),
)
COLUMNS = (
    Column("stage", field("stage")),
    Column("MB", field("bytes", 1e-6), rank=3),
    Column("seconds", field("seconds")),
    Column("MB/s", field("MB/s")),
    Column("tokens", field("tokens")),
    Column("bytes/token", field("bytes/token")),
    Column("fallback %", field("fallback_share", 100), rank=4),
    Column("peak MB", field("peak_bytes", 1e-6), rank=1),
    Column("made", field("made"), rank=2),
)


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
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="BYTES", help="Learn on this much of the text, such as 2GB.")
    ] = None,
    max_words: Annotated[
        int | None,
        whole_number("--max-words", 10_000_000, metavar="WORDS", help="Different words kept while learning."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Tokenizer to use instead of learning one: folder or file.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Show the tokens of this text.")] = None,
    file: Annotated[str | None, typer.Option(metavar="FILE", help="Show the tokens of this file; - is stdin.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="PATH", help="Compare with this tokenizer, on the same text.")
    ] = None,
    export: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Write the tokenizer as gpt2, huggingface or tiktoken.")
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where to export to.")] = None,
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
    """Learn a tokenizer on a dataset and encode it, or show what a tokenizer does."""
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
        "sample_bytes": size_in_bytes("--sample", sample, "2GB"),
        "max_words": max_words,
        "tokenizer": tokenizer,
        "text": text,
        "file": file,
        "compare": compare,
        "export": export,
        "out": out,
        "workers": workers,
    }
    settings = load_config(TokenizeConfig, config, overrides or [], options)
    if settings.export is not None:
        _export(console, settings)
    elif settings.compare is not None:
        _compare(console, settings)
    elif settings.text is not None or settings.file is not None:
        _show_pieces(console, settings)
    else:
        _encode_dataset(console, settings)


def _encode_dataset(console: Console, settings: "TokenizeConfig") -> None:
    from lfs_cli.config import TokenizeConfig
    from lfs_cli.runs.folder import DataFolder
    from lfs_cli.runs.tokenize import tokenize

    result = tokenize(settings, DataFolder.here(), console.observer, verify=True)
    rows = [_stage_row(stage) for stage in result.stages]
    console.results(
        rows if console.as_json or not sys.stdout.isatty() else lay_out(rows, COLUMNS)[0],
        dataset=result.dataset,
        tokenizer=result.tokenizer,
        tokens=result.tokens,
        tokenizer_hash=result.tokenizer_hash,
        vocab_size=result.vocab_size,
        longest_tokens=result.longest_tokens,
        parts={name: seconds for stage in result.stages for name, seconds in stage.parts},
        pile_seconds=result.pile_seconds,
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
    )
    console.note("longest tokens: " + " ".join(f"`{_one_line(token)}`" for token in result.longest_tokens))
    parts = [f"{name} {duration(seconds)}" for stage in result.stages for name, seconds in stage.parts]
    if parts:
        console.note(f"time of learning: {', '.join(parts)}")
    if result.peak_bytes is not None:
        console.note(f"peak memory: {size(result.peak_bytes)}")
    if result.pile_seconds is not None:
        console.note(f"at this rate 825 GB, the size of The Pile, would take {duration(result.pile_seconds)}")
    made = "wrote" if any(stage.seconds is not None for stage in result.stages) else "up to date:"
    plain = TokenizeConfig(dataset=settings.dataset, vocab_size=settings.vocab_size, workers=settings.workers)
    size_asked = settings.vocab_size if settings.tokenizer is None else result.vocab_size
    chosen = "" if settings == plain else f" --set data.tokenizer={result.tokenizer}"  # train learns a plain one itself
    console.next(
        f"{made} {result.tokenizer} and {result.tokens}; next: "
        f"`lfs train --set data.dataset={result.dataset} --set model.vocab_size={size_asked}{chosen}`"
    )


def _stage_row(stage: Any) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "bytes": stage.bytes,
        "seconds": stage.seconds,
        "MB/s": stage.rate,
        "tokens": stage.tokens,
        "bytes/token": stage.bytes_per_token,
        "fallback_share": stage.fallback_share,
        "peak_bytes": stage.peak_bytes,
        "made": "new" if stage.seconds is not None else "kept",
    }


def _show_pieces(console: Console, settings: "TokenizeConfig") -> None:
    from lfs_cli.runs.folder import DataFolder
    from lfs_cli.runs.pieces import find_tokenizer, pieces_of

    name, tokenizer = find_tokenizer(settings, DataFolder.here())
    totals = _Totals()
    pieces = totals.counting(pieces_of(tokenizer, settings))
    if console.as_json:
        rows = [piece_row(piece) for piece in pieces]
        console.results(
            rows, tokenizer=name, tokens=totals.tokens, bytes=totals.bytes, bytes_per_token=totals.bytes_per_token
        )
    elif sys.stdout.isatty():
        draw(islice(pieces, DRAWN))
        for _ in pieces:  # the rest is counted
            pass
        if totals.tokens > DRAWN:
            source = f"--file {shlex.quote(settings.file)}" if settings.file else "--text ..."
            console.note(f"the first {DRAWN} tokens are shown; all of them: `lfs tokenize {source} > tokens.tsv`")
    else:
        console.lines(map(piece_row, pieces))
    rate = f", {totals.bytes_per_token:.3g} bytes per token" if totals.bytes_per_token else ""
    console.note(f"{totals.tokens:,} tokens, {totals.bytes:,} bytes{rate}; tokenizer {name}")


class _Totals:
    """Counts the pieces that pass."""

    def __init__(self) -> None:
        self.tokens = self.bytes = 0

    def counting(self, pieces: Any) -> Any:
        for piece in pieces:
            self.tokens += 1
            self.bytes = piece.stop
            yield piece

    @property
    def bytes_per_token(self) -> float | None:
        return self.bytes / self.tokens if self.tokens else None


def _compare(console: Console, settings: "TokenizeConfig") -> None:
    from lfs_cli.runs.folder import DataFolder
    from lfs_cli.runs.pieces import compare

    result = compare(settings, DataFolder.here(), console.observer)
    sides = (result.first, result.second)
    rows = [_side_row(side, result) for side in sides]
    examples = [_difference_row(difference) for difference in result.differences]
    if console.as_json:
        console.results(
            rows, source=result.source, bytes=result.bytes, shared_tokens=result.shared, differences=examples
        )
        return
    if sys.stdout.isatty():
        table, same = lay_out(_short_names(rows), SIDES)
        console.results(table, title=", ".join(filter(None, (result.source, size(result.bytes), same))))
        shown = [_marked_row(difference, [row["tokenizer"] for row in table]) for difference in result.differences]
        console.results(shown, title="where they differ most" if shown else "")
    else:
        console.results(rows)
        console.text("\n" if examples else "")
        console.results(examples)
    if not examples:
        console.note("they cut this text alike")
    console.note(_verdict(result))


def _side_row(side: "Side", result: "Comparison") -> dict[str, Any]:
    return {
        "tokenizer": side.name,
        "vocabulary": side.vocab_size,
        "shared %": 100 * result.shared / side.vocab_size,
        "pattern": side.pattern,
        "tokens": side.tokens,
        "bytes/token": side.bytes_per_token,
        "fallback %": None if side.fallback_share is None else 100 * side.fallback_share,
    }


def _short_names(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the last parts of the paths as names, where these differ."""
    names = [row["tokenizer"].rstrip("/").rsplit("/", 1)[-1] for row in rows]
    if len(set(names)) < len(names):
        return list(rows)
    return [{**row, "tokenizer": name} for row, name in zip(rows, names, strict=True)]


def _difference_row(difference: "Difference") -> dict[str, Any]:
    return {
        "times": difference.times,
        "text": escaped(difference.text),
        "first": "|".join(map(escaped, difference.first)),
        "second": "|".join(map(escaped, difference.second)),
    }


def _marked_row(difference: "Difference", names: Sequence[str]) -> dict[str, Any]:
    """Return the same with blanks between the tokens and marks for white space inside them."""
    first, second = names if len(set(names)) == 2 else ("first", "second")
    return {
        "times": difference.times,
        first: " ".join(map(marked, difference.first)),
        second: " ".join(map(marked, difference.second)),
    }


def _verdict(result: "Comparison") -> str:
    first, second = result.first, result.second
    if not first.tokens or not second.tokens:
        return "there is nothing to compare: the text is empty"
    more = second.tokens / first.tokens - 1
    if more == 0:
        return f"both need {first.tokens:,} tokens"
    fewer, other = (first, second) if more > 0 else (second, first)
    saved = 1 - fewer.tokens / other.tokens
    return f"{fewer.name} needs {saved:.1%} fewer tokens than {other.name}"


def _export(console: Console, settings: "TokenizeConfig") -> None:
    from lfs_cli.runs.folder import DataFolder
    from lfs_cli.runs.pieces import export

    name, paths = export(settings, DataFolder.here())
    console.results([{"file": path, "bytes": path.stat().st_size} for path in paths], tokenizer=name)
    console.next(f"wrote {paths[0].parent} from {name}; next: {_use(settings.export or '', paths[0])}")


def _use(format: str, path: Any) -> str:
    """Return how another library reads what was written."""
    if format == "huggingface":
        return f'`transformers.AutoTokenizer.from_pretrained("{path.parent}")` in Python'
    if format == "tiktoken":
        return f"`lfs tokenize --tokenizer {shlex.quote(str(path))} --text TEXT`, or `tiktoken.Encoding` in Python"
    return f"`lfs tokenize --tokenizer {shlex.quote(str(path.parent))} --text TEXT`"


def _one_line(token: str) -> str:
    """Return ``token`` so that it stays on its line, with escapes for what is not printable."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
