"""`lfs download`: bring text into the data folder, or say what could be brought."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from lfs_cli.config import DownloadConfig, TokenizeConfig
from lfs_cli.config.schema import END_OF_TEXT
from lfs_cli.corpus.sources import (
    DATASETS,
    SPLITS,
    FileRecord,
    Manifest,
    bring,
    bring_own,
    bring_sample,
    dataset_folder,
    explained,
    here,
    inspect,
    read_manifest,
)
from lfs_cli.errors import ConfigError, DataError, did_you_mean
from lfs_cli.files import read_json
from lfs_cli.runs.folder import DataFolder, check_name
from lfs_cli.runs.observer import Observer


@dataclass(frozen=True)
class DownloadedFile:
    """One text of a dataset folder.

    Args:
        path: Where it lies.
        outcome: What was done about it: "downloaded", "written", "verified" or "put by hand".
        record: What the manifest says of it.
    """

    path: Path
    outcome: str
    record: FileRecord


@dataclass(frozen=True)
class Replaced:
    """A built-in corpus that has made way for another one.

    Args:
        bytes: Size of its training text.
        command: What brings it back: the same size and seed give the same stories.
        outdated: Folders of tokens that were made from it, with the command that makes each anew.
    """

    bytes: int
    command: str
    outdated: tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class DownloadResult:
    """A dataset that is here, whole.

    Args:
        dataset: Its name.
        folder: Where it lies.
        files: Its training and validation text, in this order.
        replaced: What was there under this name, if that was another text.
    """

    dataset: str
    folder: Path
    files: tuple[DownloadedFile, ...]
    replaced: Replaced | None = None


@dataclass(frozen=True)
class Listing:
    """A dataset that could be brought or is here.

    Args:
        dataset: Its name.
        bytes: Size of its text; None when that is up to the user.
        download_bytes: What has to be fetched for it.
        licence: Its licence.
        here: "yes", "no", or "unfinished" for a transfer that can be continued.
        summary: What it is.
    """

    dataset: str
    bytes: int | None
    download_bytes: int | None
    licence: str
    here: str
    summary: str


def download(config: DownloadConfig, data: DataFolder, observer: Observer | None = None) -> DownloadResult:
    """Bring one dataset into the data folder, or verify it when it is there.

    Args:
        config: Which one. `dataset` names a known dataset or one in the data folder; `source` is the user's own text.
        data: The data folder.
        observer: Is told of progress.

    Raises:
        ConfigError: For a name that lfs does not know, or settings that do not go together.
        DownloadError: When the text cannot be fetched or written.
        DataError: When the user's file is no text, or the name stands for another text.
    """
    observer = observer or Observer()
    name = _checked_name(config, data)
    folder = data.raw(name)
    try:
        with dataset_folder(folder, observer):
            before = read_manifest(folder) if name == "sample" else None  # others are never replaced
            outcomes = _bring(config, name, folder, observer)
            manifest = read_manifest(folder)
    except KeyboardInterrupt:
        if here(folder) == "unfinished":
            observer.warning("stopped; the same command continues where this one was")
        raise
    finally:
        observer.finish_progress()
    assert manifest is not None
    files = tuple(DownloadedFile(folder / split, outcomes[split], manifest.files[split]) for split in SPLITS)
    return DownloadResult(name, folder, files, _replaced(before, manifest, data))


def _replaced(before: Manifest | None, now: Manifest, data: DataFolder) -> Replaced | None:
    """Return what there was before the sample was written, with what it takes to have it again."""
    if before is None or "train.txt" not in before.files or before.settings in ({}, now.settings):
        return None
    text_bytes, seed = before.files["train.txt"].bytes, before.settings.get("seed", 0)
    command = f"lfs download sample --size {before.settings.get('size_bytes', text_bytes)}"
    if seed != now.settings.get("seed"):
        command += f" --set seed={seed}"
    outdated = []
    for path in sorted(data.root.glob("tokens/sample-*/manifest.json")):
        name = path.parent.name
        if _dataset_of(path) != "sample":  # but `sample-mine`
            continue
        learned = re.fullmatch(r"sample-(\d+)(?:-(.+))?", name)
        how = f"--tokenizer {shlex.quote(str(data.tokenizer(name)))}"
        if learned:
            how = f"--vocab {learned[1]}" + (f" --pattern {learned[2]}" if learned[2] else "") + _special(data, name)
        outdated.append((path.parent, f"lfs tokenize sample {how}"))
    return Replaced(text_bytes, command, tuple(outdated))


def _special(data: DataFolder, name: str) -> str:
    """Return the option that gives a tokenizer the special tokens of ``name``, where they are not the usual ones."""
    try:
        tokens = read_json(data.tokenizer(name) / "manifest.json")["special_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    usual = list(TokenizeConfig().special_tokens)
    return "" if tokens == usual else f" --set {shlex.quote(f'special_tokens={json.dumps(tokens)}')}"


def _dataset_of(manifest: Path) -> str:
    """Return the dataset that tokens were made from; an empty text where their manifest does not tell."""
    try:
        return read_json(manifest)["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def list_datasets(data: DataFolder) -> list[Listing]:
    """Return the datasets that lfs knows, then those of the user in the data folder."""
    raw = data.root / "raw"
    with explained(raw):
        known = [_known_listing(name, data.raw(name)) for name in DATASETS]
        folders = sorted(path for path in raw.iterdir() if path.is_dir()) if raw.is_dir() else []
        return known + [_own_listing(path) for path in folders if path.name not in DATASETS and here(path) != "no"]


def _checked_name(config: DownloadConfig, data: DataFolder) -> str:
    """Return the name of the dataset that ``config`` asks for. Raises ConfigError when it asks for none or for two."""
    if not config.source:
        if config.name:
            raise ConfigError(
                f"`--name {config.name}` names no text of its own",
                hint=f"say which: `lfs download --from FILE_OR_URL --name {config.name}`",
            )
        known = [*DATASETS, *(listing.dataset for listing in list_datasets(data))]
        if config.dataset not in known:
            raise ConfigError(f"unknown dataset `{config.dataset}`", hint=did_you_mean(config.dataset, set(known)))
        return config.dataset
    if config.dataset:
        raise ConfigError(
            f"both the dataset `{config.dataset}` and the text `{config.source}` are asked for",
            hint=f"bring one at a time: `lfs download --from {config.source} --name {config.name or config.dataset}`",
        )
    if not config.name:
        raise ConfigError(
            f"`{config.source}` has no name yet", hint=f"add one: `lfs download --from {config.source} --name mine`"
        )
    if config.name in DATASETS:
        raise ConfigError(
            f"`{config.name}` is the name of a dataset that lfs knows",
            hint=f"choose another, such as `--name my-{config.name}`",
        )
    if not 0 < config.valid_share < 1:
        use = "train" if config.valid_share else "validate"
        raise ConfigError(
            f"`valid_share` ({config.valid_share:g}) leaves no text to {use} on",
            hint="hold out a small share, such as `--valid-share 0.05`",
        )
    return check_name(config.name)


def _bring(config: DownloadConfig, name: str, folder: Path, observer: Observer) -> dict[str, str]:
    if config.source:
        return bring_own(
            config.source,
            name,
            folder,
            valid_share=config.valid_share,
            licence=config.licence,
            separator=END_OF_TEXT,
            watcher=observer,
        )
    if name == "sample":
        return bring_sample(folder, *_sample_settings(config, folder), observer)
    if name in DATASETS:
        return bring(name, folder, observer)
    return _verify_own(name, folder, config.licence, observer)


def _sample_settings(config: DownloadConfig, folder: Path) -> tuple[int, int]:
    """Return the size and seed of the sample: as set, else those of the one that is here, else the defaults."""
    manifest = read_manifest(folder)
    before = manifest.settings if manifest else {}
    size_bytes = config.sample_bytes if "sample_bytes" in config.model_fields_set else before.get("size_bytes")
    seed = config.seed if "seed" in config.model_fields_set else before.get("seed")
    return size_bytes or config.sample_bytes, config.seed if seed is None else seed


def _verify_own(name: str, folder: Path, licence: str, observer: Observer) -> dict[str, str]:
    outcomes = inspect(name, folder, observer, licence=licence)
    lacking = [str(folder / split) for split in SPLITS if split not in outcomes]
    if lacking:
        manifest = read_manifest(folder)
        source = manifest.settings.get("source") if manifest else None
        again = f"bring it again: `lfs download --from {source} --name {name}`" if source else "put it there again"
        raise DataError(f"{' and '.join(lacking)} cannot be used: missing or damaged", hint=again)
    return outcomes


def _known_listing(name: str, folder: Path) -> Listing:
    dataset = DATASETS[name]
    text_bytes = dataset.text_bytes or _bytes_here(folder)
    download_bytes = sum(file.bytes for file in dataset.files.values())
    return Listing(name, text_bytes, download_bytes, dataset.licence, here(folder), dataset.summary)


def _own_listing(folder: Path) -> Listing:
    try:
        manifest = read_manifest(folder)
    except DataError:
        manifest = None
    licences = {record.licence for record in manifest.files.values()} if manifest else set()
    source = manifest.settings.get("source") if manifest else None
    licence = ", ".join(sorted(licences)) or "unknown"
    return Listing(folder.name, _bytes_here(folder), None, licence, here(folder), source or "your own text")


def _bytes_here(folder: Path) -> int | None:
    return sum((folder / split).stat().st_size for split in SPLITS if (folder / split).is_file()) or None
