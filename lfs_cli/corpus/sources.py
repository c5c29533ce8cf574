"""Where text comes from: known datasets, the built-in stories, the user's own files.

Wherever it comes from, a dataset is a folder with `train.txt`, `valid.txt` and `manifest.json`. The manifest says for
each of the two files where it came from, which revision, its sha256, bytes, licence and date, so that a later call
can tell a whole file from a damaged one without a network.

Nothing half-written is ever called `train.txt` or `valid.txt`: a file has a temporary name until its checksum is right.
The manifest is written just before the file takes its name, so that a process killed in between leaves a record whose
file is complete under its temporary name, which the next call puts in its place, and never a file without its record:
that is one put by hand.

To add a dataset, add an entry to `DATASETS`.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lfs_cli.corpus.sample import SAMPLE_LICENCE, write_sample
from lfs_cli.corpus.text import BLOCK_BYTES, Inspector, find_cut, unpack
from lfs_cli.corpus.transfer import (
    MIRROR,
    Remote,
    check_url,
    discard,
    find_on_hub,
    kept_bytes,
    receive,
    while_disk_has_room,
)
from lfs_cli.errors import DataError, DownloadError, remedy
from lfs_cli.files import locked, read_json, remove_drafts, replace_text, sync

TRAIN, VALID, MANIFEST = "train.txt", "valid.txt", "manifest.json"
SPLITS = (TRAIN, VALID)


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset on the hub, as it was when its entry was written.

    Args:
        name: Its path in the repository.
        bytes: Its size there.
        text_bytes: Its size when unpacked.
        sha256: Checksum of the unpacked text.
    """

    name: str
    bytes: int
    text_bytes: int
    sha256: str

    @property
    def is_packed(self) -> bool:
        """Whether the file holds its text gzipped."""
        return self.name.endswith(".gz")


@dataclass(frozen=True)
class Dataset:
    """A dataset that lfs knows.

    Args:
        summary: What it is, in a few words.
        licence: Its licence, as its source states it.
        repository: Of the Hugging Face hub; empty when lfs writes the text itself.
        files: What becomes `train.txt` and `valid.txt`.
    """

    summary: str
    licence: str
    repository: str = ""
    files: Mapping[str, HubFile] = field(default_factory=dict)

    @property
    def text_bytes(self) -> int:
        """Size of its text."""
        return sum(file.text_bytes for file in self.files.values())


DATASETS: dict[str, Dataset] = {
    "tinystories": Dataset(  # Eldan & Li, "TinyStories", 2023 (arXiv:2305.07759), version 2
        summary="short stories in simple words, by GPT-4",
        licence="cdla-sharing-1.0",
        repository="roneneldan/TinyStories",
        files={
            TRAIN: HubFile(
                name="TinyStoriesV2-GPT4-train.txt",
                bytes=2_227_753_162,
                text_bytes=2_227_753_162,
                sha256="6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
            ),
            VALID: HubFile(
                name="TinyStoriesV2-GPT4-valid.txt",
                bytes=22_502_601,
                text_bytes=22_502_601,
                sha256="6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
            ),
        },
    ),
    "owt": Dataset(
        summary="web pages, a sample of OpenWebText",
        licence="not stated (OpenWebText: cc0-1.0)",
        repository="stanford-cs336/owt-sample",
        files={
            TRAIN: HubFile(
                name="owt_train.txt.gz",
                bytes=4_590_000_000,  # as the hub's page rounds it
                text_bytes=11_920_511_059,
                sha256="bbeb7f291a981ecfd5cf44b84d0f654b9e96c53dff99f2556b7d2cccaf8c1918",
            ),
            VALID: HubFile(
                name="owt_valid.txt.gz",
                bytes=111_785_382,
                text_bytes=289_998_753,
                sha256="2406f278e71829d273b315e9b403285baea7022b26a96d2728dd8b776ea40660",
            ),
        },
    ),
    "sample": Dataset(summary="short stories that lfs writes itself", licence=SAMPLE_LICENCE),
}


class Watcher(Protocol):
    """Whoever is told how the work goes (`runs.observer.Observer` fits)."""

    def stage(self, text: str) -> None: ...

    def progress(self, label: str, done: int, total: int, unit: str = "B") -> None: ...

    def finish_progress(self) -> None: ...

    def warning(self, text: str) -> None: ...


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file.

    Args:
        source: URL or path that it came from, or how else it came to be.
        revision: Commit of the source; None when it has none.
        sha256: Checksum of the text, 64 hex digits.
        bytes: Size of the text.
        licence: Licence of the text.
        date: When it was brought, UTC, ISO 8601.
        checked: What it was compared with when it was brought.
    """

    source: str
    revision: str | None
    sha256: str
    bytes: int
    licence: str
    date: str
    checked: str


@dataclass(frozen=True)
class Manifest:
    """The record of a dataset folder.

    Args:
        dataset: Name of the dataset.
        files: Records by file name.
        settings: What the text was made with, where lfs made or cut it.
    """

    dataset: str
    files: dict[str, FileRecord] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a dataset folder, or None when it has none. Raises DataError when it is damaged."""
    path = folder / MANIFEST
    try:
        tree = read_json(path)
        files = {name: FileRecord(**record) for name, record in tree["files"].items()}
        manifest = Manifest(tree["dataset"], files, tree.get("settings", {}))
        _check_manifest(manifest)
        return manifest
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", hint=f"move it away: `mv {path} {path}.kept`"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"{path} is damaged: it does not hold the record of a dataset",
            hint=f"delete it (`rm {path}`): the texts beside it then count as put there by hand",
        ) from None


def _check_manifest(manifest: Manifest) -> None:
    """Raise TypeError when a value is of another kind than what `write_manifest` was given."""
    records, settings = manifest.files.values(), manifest.settings
    texts = [manifest.dataset, settings.get("source", "")]
    texts += [text for record in records for text in (record.source, record.sha256, record.licence, record.checked)]
    sizes = [settings.get("size_bytes", 1), settings.get("seed", 0), *(record.bytes for record in records)]
    if not all(isinstance(text, str) for text in texts) or not all(type(size) is int and size >= 0 for size in sizes):
        raise TypeError("a record has values of other kinds")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a dataset folder, whole or not at all."""
    replace_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def dataset_folder(folder: Path, watcher: Watcher) -> Generator[None]:
    """Make ``folder`` and keep it for this process; a second process waits. Failures of the disk become errors.

    Args:
        folder: A dataset's folder.
        watcher: Is told when another process has it.

    Raises:
        DownloadError: When the folder cannot be written or the disk is full.
    """
    with explained(folder), contextlib.ExitStack() as stack:
        wait = partial(watcher.stage, f"waiting for another process that is writing {folder}")
        stack.enter_context(locked(folder, on_wait=wait))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _settle(folder, watcher)
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only an empty one goes: nothing was brought


def _settle(folder: Path, watcher: Watcher) -> None:
    """Give the texts of a killed process that are complete by the manifest their names, and remove its other drafts."""
    remove_drafts(folder)
    for temporary in folder.glob("*.tmp"):
        if temporary.name.removesuffix(".tmp") in SPLITS and _is_recorded(temporary, watcher):
            temporary.replace(folder / temporary.name.removesuffix(".tmp"))
            sync(folder)
        else:
            temporary.unlink()


def _is_recorded(temporary: Path, watcher: Watcher) -> bool:
    """Return whether a text under its temporary name is the one that the manifest means."""
    try:
        manifest = read_manifest(temporary.parent)
    except DataError:
        return False
    record = manifest.files.get(temporary.name.removesuffix(".tmp")) if manifest else None
    if record is None or record.bytes != temporary.stat().st_size:
        return False
    return hash_file(temporary, f"checking {temporary.name}", watcher) == record.sha256


@contextlib.contextmanager
def explained(folder: Path) -> Generator[None]:
    """Turn failures of the disk into errors that say what can be done about ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = _size(shutil.disk_usage(folder if folder.exists() else ".").free)
            raise DownloadError(
                f"the disk is full: {folder} needs more than the {free} that are free there",
                hint="free some space, or set `LFS_DATA` to a folder on a larger disk, and run the same command again",
            ) from None
        otherwise = "set `LFS_DATA` to a folder that you can read and write, such as `LFS_DATA=~/lfs-data`"
        is_special = error.errno in (errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)
        raise DownloadError(
            f"cannot use {error.filename or folder}: {error.strerror or error}",
            hint=(is_special and remedy(error)) or otherwise,
        ) from None


def bring(name: str, folder: Path, watcher: Watcher) -> dict[str, str]:
    """Bring the files of a known dataset from the hub, each that is not here whole already.

    Args:
        name: A key of `DATASETS` that has a repository.
        folder: The dataset's folder, inside `dataset_folder`.
        watcher: Is told of progress and of damaged files.

    Returns:
        What was done about each file: "verified", "put by hand" or "downloaded".
    """
    dataset = DATASETS[name]
    outcomes = inspect(name, folder, watcher, licence=dataset.licence)
    wanted = {split: file for split, file in dataset.files.items() if split not in outcomes}
    ways = _other_ways(name, folder, list(wanted))
    remotes = {split: find_on_hub(dataset.repository, file.name, ways) for split, file in wanted.items()}
    check_disk(folder, sum(_bytes_to_write(folder, wanted[split], remotes[split]) for split in wanted))
    for split in sorted(wanted, key=lambda split: wanted[split].bytes):
        draft, record = _bring_file(wanted[split], remotes[split], dataset, folder / split, watcher)
        _file_away(name, folder, {split: (draft, record)})
        outcomes[split] = "downloaded"
    for file in dataset.files.values():
        discard(_part(folder, file.name))
    return outcomes


def inspect(name: str, folder: Path, watcher: Watcher, *, licence: str) -> dict[str, str]:
    """Compare the texts of a dataset folder with its manifest, and record those put there by hand.

    Args:
        name: The dataset.
        folder: Its folder.
        watcher: Is warned of each damaged file.
        licence: Licence to record for a file put by hand.

    Returns:
        "verified" or "put by hand" for each text that is here whole; a missing or damaged one is left out.
    """
    manifest = read_manifest(folder) or Manifest(name)
    outcomes = {}
    for split in SPLITS:
        path, record = folder / split, manifest.files.get(split)
        if not path.is_file():
            continue
        size = path.stat().st_size
        if record is None:
            if size == 0:
                raise DataError(f"{path} is empty", hint=f"put its text there, or delete it: `rm {path}`")
            digest = hash_file(path, f"checking {split}", watcher)
            known = DATASETS[name].files.get(split) if name in DATASETS else None
            is_known = known is not None and known.sha256 == digest
            checked = "sha256 that lfs knows" if is_known else "nothing: put here by hand"
            record = FileRecord("put here by hand", None, digest, size, licence, _now(), checked)
            manifest.files[split] = record
            write_manifest(folder, manifest)
            outcomes[split] = "put by hand"
        elif size != record.bytes:
            watcher.warning(f"{path} is damaged: it has {size:,} bytes instead of {record.bytes:,}")
        elif hash_file(path, f"checking {split}", watcher) != record.sha256:
            watcher.warning(f"{path} is damaged: its sha256 is not {record.sha256[:12]}..., which the manifest names")
        else:
            outcomes[split] = "verified"
    return outcomes


def bring_sample(folder: Path, size_bytes: int, seed: int, watcher: Watcher) -> dict[str, str]:
    """Write the built-in stories, or verify them when the same ones are here.

    Args:
        folder: The dataset's folder, inside `dataset_folder`.
        size_bytes: Size of the training text; that for validation comes on top (see `write_sample`).
        seed: The same seed gives the same stories.
        watcher: Is told of progress.

    Returns:
        "verified", "put by hand" or "written" for each file.
    """
    settings = {"size_bytes": size_bytes, "seed": seed}
    manifest = read_manifest(folder)
    if manifest is None or manifest.settings in ({}, settings):
        outcomes = inspect("sample", folder, watcher, licence=SAMPLE_LICENCE)
        if len(outcomes) == len(SPLITS):
            return outcomes
    check_disk(folder, 2 * size_bytes)
    train, valid = (_temporary(folder / split) for split in SPLITS)
    with _removed_on_failure(train, valid):
        write_sample(
            train,
            valid,
            size_bytes,
            seed,
            on_progress=lambda done, total: watcher.progress("writing stories", done, total),
        )
        source = f"written by lfs with seed {seed}"
        records = {
            split: (path, _record(path, source, SAMPLE_LICENCE, "nothing: written here", watcher))
            for split, path in zip(SPLITS, (train, valid), strict=True)
        }
    _file_away("sample", folder, records, settings)
    return dict.fromkeys(SPLITS, "written")


def bring_own(
    source: str, name: str, folder: Path, *, valid_share: float, licence: str, separator: str, watcher: Watcher
) -> dict[str, str]:
    """Bring the user's own text, plain or packed, and cut off its end for validation.

    Args:
        source: Path of a file, or a URL.
        name: What the dataset is to be called.
        folder: The dataset's folder, inside `dataset_folder`.
        valid_share: Share of the text that is held out, more than 0 and less than 1.
        licence: Its licence, for the manifest.
        separator: What stands between its documents.
        watcher: Is told of progress and warned of what is odd.

    Returns:
        "verified" or "written" for each file.

    Raises:
        DataError: When the source is no text, or the name stands for another text already.
        DownloadError: When a URL cannot be fetched whole.
    """
    given = source  # what messages call it
    if _is_url(source):
        check_url(source)
    else:
        source = str(_own_file(source))
    settings, part = {"source": source, "valid_share": valid_share}, _part(folder, "source")
    if _is_here_from(source, settings, name, folder, watcher):
        outcomes = inspect(name, folder, watcher, licence=licence)
        if len(outcomes) == len(SPLITS):
            discard(part)  # of a process that was killed at its very end
            return outcomes

    train, valid = (_temporary(folder / split) for split in SPLITS)
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        for chunk in _own_chunks(source, folder, watcher):
            digest.update(chunk)
            yield chunk

    with _removed_on_failure(train, valid):
        inspector = Inspector(given)
        try:
            with train.open("wb") as file:
                for block in while_disk_has_room(unpack(chunks(), given), folder, given):
                    inspector.look(block)
                    file.write(block)
            inspector.finish()
            cut = find_cut(train, valid_share, separator)
        except DataError:
            discard(part)  # these bytes would fail again
            raise
        if inspector.first_invalid is not None:
            watcher.warning(
                f"`{given}` is not UTF-8 at byte {inspector.first_invalid:,}; its bytes are kept as they are "
                "(if it has another encoding, convert it with `iconv` and bring it under another name)"
            )
        _cut_off(train, valid, cut)
        records = {
            split: (path, _record(path, source, licence, "nothing: the sha256 was taken here", watcher))
            for split, path in zip(SPLITS, (train, valid), strict=True)
        }
    _file_away(name, folder, records, {**settings, "source_sha256": digest.hexdigest()})
    discard(part)
    return dict.fromkeys(SPLITS, "written")


def here(folder: Path) -> str:
    """Return whether a dataset folder holds its texts: "yes", "no", or "unfinished" for a transfer to continue."""
    if all((folder / split).is_file() for split in SPLITS):
        return "yes"
    unfinished = any(folder.glob("*.part")) or any((folder / split).is_file() for split in SPLITS)
    return "unfinished" if unfinished else "no"


def check_disk(folder: Path, needed: int) -> None:
    """Raise DownloadError when fewer than ``needed`` bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder} needs {_size(needed)} and {_size(free)} are free",
            hint=f"free {_size(needed - free)}, or set `LFS_DATA` to a folder on a larger disk",
        )


def hash_file(path: Path, label: str, watcher: Watcher) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            watcher.progress(label, done, total)
    watcher.finish_progress()
    return digest.hexdigest()


def _bring_file(
    file: HubFile, remote: Remote, dataset: Dataset, path: Path, watcher: Watcher
) -> tuple[Path, FileRecord]:
    """Fetch one file of the hub, check it, and return where its text is and its record.

    Plain text stays where it has arrived: should this process be killed, it does not have to be fetched again.
    """
    part, temporary = _part(path.parent, file.name), _temporary(path)
    arrived, declared = _declared_hash(remote)
    text = hashlib.sha256()
    again = f"run the same command again: it starts over; or {remote.other_ways}"

    def show(done: int, total: int, *, is_new: bool) -> None:
        watcher.progress(f"{'fetching' if is_new else 'reading what is here of'} {file.name}", done, total)

    def chunks() -> Iterator[bytes]:
        for chunk in receive(remote, part, show):
            arrived.update(chunk)
            yield chunk
        watcher.finish_progress()
        if declared and arrived.hexdigest() != declared:
            discard(part)  # no continuation could mend it
            raise DownloadError(
                f"`{file.name}` has the wrong checksum: {arrived.hexdigest()[:12]}... instead of {declared[:12]}...",
                hint=again,
            )

    with _removed_on_failure(temporary):
        if file.is_packed:
            try:
                with temporary.open("wb") as unpacked:
                    blocks = unpack(chunks(), file.name)
                    for block in while_disk_has_room(blocks, path.parent, file.name, announced=file.text_bytes):
                        text.update(block)
                        unpacked.write(block)
            except DataError as error:
                discard(part)
                raise DownloadError(str(error), hint=again) from None
        else:
            for chunk in chunks():
                text.update(chunk)
    if text.hexdigest() != file.sha256:
        watcher.warning(
            f"`{file.name}` is whole, but not the text that this version of lfs knows: "
            "results on it do not compare with those of others"
        )
    checked = f"the {arrived.name} that the hub declares" if declared else "the size that the server declares"
    draft = temporary if file.is_packed else part
    size = draft.stat().st_size
    return draft, FileRecord(remote.url, remote.revision, text.hexdigest(), size, dataset.licence, _now(), checked)


def _declared_hash(remote: Remote) -> tuple[Any, str]:
    """Return a hash to feed with the bytes of ``remote`` and what it must become, empty when that is not known.

    The hub's ETag is the sha256 of a large file and git's blob hash, a sha1 of "blob <size>", a zero byte and the
    content, of a small one.
    """
    identity = remote.identity or ""
    if re.fullmatch(r"[0-9a-f]{64}", identity):
        return hashlib.sha256(), identity
    git = hashlib.sha1(b"blob %d\0" % (remote.bytes or 0), usedforsecurity=False)
    return git, identity if re.fullmatch(r"[0-9a-f]{40}", identity) and remote.bytes is not None else ""


def _is_here_from(source: str, settings: dict[str, Any], name: str, folder: Path, watcher: Watcher) -> bool:
    """Return whether the dataset folder holds text from ``source``. Raises DataError when it holds other text."""
    manifest = read_manifest(folder)
    if manifest is None:
        if any((folder / split).exists() for split in SPLITS):
            raise _name_taken(name, folder, "texts that were put there by hand")
        return False
    before = {key: manifest.settings.get(key) for key in settings}
    if before != settings:
        raise _name_taken(name, folder, f"text of `{before['source']}`, of which {before['valid_share']} is held out")
    digest = manifest.settings.get("source_sha256")
    if not _is_url(source) and digest != hash_file(Path(source), "comparing", watcher):
        raise _name_taken(name, folder, f"an earlier state of `{source}`")
    return True


def _is_url(source: str) -> bool:
    return "://" in source


def _own_chunks(source: str, folder: Path, watcher: Watcher) -> Iterator[bytes]:
    """Yield the bytes of the user's file or URL, after a look at the free disk."""
    name = source.rsplit("/", 1)[-1]
    checked_totals: list[int] = []

    def show(done: int, total: int, *, is_new: bool = False) -> None:
        if not checked_totals:
            checked_totals.append(total)
            check_disk(folder, 2 * total if _is_url(source) else total)  # what is fetched, and the text in it
        watcher.progress(f"{'fetching' if is_new else 'reading'} {name}", done, total)

    if _is_url(source):
        ways = "fetch it by other means and give the file: `lfs download --from FILE --name NAME`"
        remote = Remote(url=source, label=source, other_ways=ways)
        yield from receive(remote, _part(folder, "source"), show)
    else:
        done = 0
        with Path(source).open("rb") as file:
            before = os.fstat(file.fileno())
            while block := file.read(BLOCK_BYTES):
                done += len(block)
                show(done, before.st_size)
                yield block
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or done != after.st_size:
            raise DataError(
                f"`{source}` was changed while it was read", hint="run the same command again when it is complete"
            )
    watcher.finish_progress()


def _own_file(source: str) -> Path:
    """Return the whole path of the user's file. Raises DataError when it cannot be read."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"`{source}` is a folder", hint=f"join its texts to one file: `cat {path}/*.txt > text.txt`")
    if path.exists() and not path.is_file():
        raise DataError(f"`{source}` is not a file on a disk", hint=f"save it first: `cat {source} > text.txt`")
    try:
        with path.open("rb"):
            return path.resolve()
    except FileNotFoundError:
        siblings = [str(path.with_name(other.name)) for other in path.parent.glob("*") if other.is_file()]
        near = get_close_matches(str(path), siblings, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "give the path of a text file, or a URL"
        raise DataError(f"no file `{source}`", hint=hint) from None
    except OSError as error:
        raise DataError(f"cannot read `{source}`: {error.strerror}", hint="check the file's permissions") from None


def _cut_off(path: Path, end: Path, cut: int) -> None:
    """Move what follows the first ``cut`` bytes of a file to another file."""
    with path.open("rb+") as whole, end.open("wb") as file:
        whole.seek(cut)
        shutil.copyfileobj(whole, file, BLOCK_BYTES)
        whole.truncate(cut)


def _file_away(
    name: str, folder: Path, files: Mapping[str, tuple[Path, FileRecord]], settings: dict[str, Any] | None = None
) -> None:
    """Write the records of new files, then give the files their names: from then on they are the dataset's."""
    for temporary, _ in files.values():
        sync(temporary)
    sync(folder)
    manifest = read_manifest(folder) or Manifest(name)
    records = manifest.files | {split: record for split, (_, record) in files.items()}
    write_manifest(folder, Manifest(name, records, manifest.settings if settings is None else settings))
    for split, (temporary, _) in files.items():
        temporary.replace(folder / split)
    sync(folder)


def _record(path: Path, source: str, licence: str, checked: str, watcher: Watcher) -> FileRecord:
    digest = hash_file(path, f"checking {path.stem}", watcher)
    return FileRecord(source, None, digest, path.stat().st_size, licence, _now(), checked)


def _bytes_to_write(folder: Path, file: HubFile, remote: Remote) -> int:
    """Return how much more disk a file of the hub will take, its packed and its unpacked form together."""
    arriving = remote.bytes if remote.bytes is not None else file.bytes
    text = round(arriving * file.text_bytes / file.bytes) if file.is_packed else 0
    return arriving - kept_bytes(_part(folder, file.name), remote) + text


def _other_ways(name: str, folder: Path, splits: list[str]) -> str:
    """Return how else the user can get at the texts of a dataset: the end of every hint about the hub."""
    places = " and ".join(f"`{folder / split}`" for split in splits)
    setting = "env -u HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else f"HF_ENDPOINT={MIRROR}"
    return (
        f"try another server: `{setting} lfs download {name}`; or do without a network: `lfs download sample`; "
        f"or put the plain text at {places} by hand and run `lfs download {name}` again"
    )


def _name_taken(name: str, folder: Path, by: str) -> DataError:
    return DataError(
        f"`{name}` is taken: {folder} holds {by}",
        hint=f"choose another `--name`, or remove that text first: `rm -r {folder}`",
    )


@contextlib.contextmanager
def _removed_on_failure(*paths: Path) -> Generator[None]:
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def _part(folder: Path, name: str) -> Path:
    return folder / f"{name}.part"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1_000:
            return f"{count:.3g} {unit}"
        count /= 1_000
    return f"{count:.3g} TB"
