"""The options that all six commands share, so that they read and behave the same everywhere.

Numbers are read here and not by Typer, whose words for one that it cannot read change with its version.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lfs_cli.errors import ConfigError

_UNITS = {"": 1} | {
    unit + binary: base**power
    for power, unit in enumerate("KMGT", start=1)
    for binary, base in (("", 1000), ("I", 1024))
}

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


def whole_number(name: str, example: int, *, metavar: str = "N", help: str) -> Any:
    """Return an option that takes a whole number, such as ``example``."""
    return _numeric(name, int, "a whole number", str(example), metavar, help)


def number(name: str, example: float, *, metavar: str = "X", help: str) -> Any:
    """Return an option that takes a number, such as ``example``."""
    return _numeric(name, float, "a number", f"{example:g}", metavar, help)


def size_in_bytes(name: str, text: str | None, example: str = "20MB") -> int | None:
    """Return the bytes that a size such as `6000000`, `20MB` or `1.5 GiB` stands for, None for one that is not given.

    Raises ConfigError, which names the option ``name``.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]I?)?B?", text.strip().replace("_", "").upper())
    count = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count == 0:
        raise ConfigError(f"`{name} {text}` is not a size", hint=f"write bytes, or a unit: `{name} {example}`")
    return count


def _numeric(name: str, kind: type[int] | type[float], what: str, example: str, metavar: str, help: str) -> Any:
    def parse(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            problem = f"must be {what}, not `{text}`" if text.strip() else "needs a value"
            raise ConfigError(f"`{name}` {problem}", hint=f"write it in digits, such as `{name} {example}`") from None

    return typer.Option(name, metavar=metavar, help=help, parser=parse)
