"""`lfs download`: bring text into the data folder, or list what could be brought."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.console import Console, size
from lfs_cli.cli.options import AsJson, ConfigFile, Explain, Overrides, Quiet, Verbose, number, size_in_bytes

COLUMNS = (
    Column("dataset", field("dataset")),
    Column("here", field("here")),
    Column("text", lambda row: size(row["text bytes"]) if row["text bytes"] else None),
    Column("download", lambda row: size(row["download bytes"]) if row["download bytes"] else None, rank=1),
    Column("licence", field("licence")),
    Column("what", field("what"), rank=2),
)


def command(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="What to bring; none lists what there is.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="FILE_OR_URL", help="Your own text, plain or as .gz, .xz or .bz2.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What to call that text.")] = None,
    valid_share: Annotated[
        float | None, number("--valid-share", 0.05, help="Share of that text held out for validation.")
    ] = None,
    sample_bytes: Annotated[
        str | None, typer.Option("--size", metavar="BYTES", help="Size of the built-in stories, such as 20MB.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    explain: Explain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Bring a text dataset into the data folder, or verify that it is there whole."""
    from lfs_cli.config import DownloadConfig, load_config

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if explain:
        console.explain(DownloadConfig)
        return
    options = {
        "dataset": dataset,
        "source": source,
        "name": name,
        "valid_share": valid_share,
        "sample_bytes": size_in_bytes("--size", sample_bytes),
    }
    settings = load_config(DownloadConfig, config, overrides or [], options)
    from lfs_cli.runs.download import download, list_datasets
    from lfs_cli.runs.folder import DataFolder

    data = DataFolder.here()
    if not (settings.dataset or settings.source or settings.name):
        rows = [
            {
                "dataset": listing.dataset,
                "here": listing.here,
                "text bytes": listing.bytes,
                "download bytes": listing.download_bytes,
                "licence": listing.licence,
                "what": listing.summary,
            }
            for listing in list_datasets(data)
        ]
        console.results(rows if as_json or not sys.stdout.isatty() else lay_out(rows, COLUMNS)[0])
        console.next("next: `lfs download DATASET`, or `lfs download --from FILE_OR_URL --name NAME` for your own text")
        return
    result = download(settings, data, console.observer)
    console.results(
        [
            {
                "file": file.path,
                "bytes": file.record.bytes,
                "outcome": file.outcome,
                "sha256": file.record.sha256 if as_json else file.record.sha256[:12],
                "licence": file.record.licence,
                **({"source": file.record.source, "revision": file.record.revision} if as_json else {}),
            }
            for file in result.files
        ],
        dataset=result.dataset,
        folder=result.folder,
        replaced=asdict(result.replaced) if result.replaced else None,
    )
    if result.replaced:
        console.note(
            f"replaced {size(result.replaced.bytes)} of other stories: `{result.replaced.command}` is the way back"
        )
        for tokens, command in result.replaced.outdated:
            console.note(f"the tokens in {tokens} were made from them: run `{command}` again")
    train, valid = result.files
    amounts = f"{size(train.record.bytes)} to train on and {size(valid.record.bytes)} to validate on"
    state = "verified: " if {train.outcome, valid.outcome} == {"verified"} else ""
    console.next(f"{state}{result.folder} holds {amounts}; next: `lfs tokenize {result.dataset}`")
