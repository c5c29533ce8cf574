"""The options that all six commands share, so that they read and behave the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="JSON file of settings, found as given or in `configs/`."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set one setting; may be repeated, the last one wins."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also print diagnostics.")]
Explain = Annotated[bool, typer.Option("--explain", help="Print every setting with its default and meaning, and stop.")]
