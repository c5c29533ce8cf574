import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import Faults, Hub, serve
from typer.testing import CliRunner

from lfs_cli.cli.app import app
from lfs_cli.cli.console import size
from lfs_cli.corpus import sources, transfer

STORIES = "".join(f"Once upon a time there were {n} ducks.\n<|endoftext|>\n" for n in range(3000)).encode()
FEW = STORIES[: len(STORIES) // 20]


@dataclass
class Output:
    exit_code: int
    stdout: str
    stderr: str


def lfs(*arguments: str) -> Output:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Output(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    for name in ("LFS_DATA", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {
        "TinyStoriesV2-GPT4-train.txt": STORIES,
        "TinyStoriesV2-GPT4-valid.txt": FEW,
        "owt_train.txt.gz": gzip.compress(STORIES),
        "owt_valid.txt.gz": gzip.compress(FEW),
        "zeros": b"\0" * 5000,
    }
    with serve(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.mark.parametrize("name", ["tinystories", "owt"])
def test_a_dataset_is_brought_and_then_verified(name: str, hub: Hub) -> None:
    brought = lfs("download", name)
    again = lfs("download", name, "--json")

    assert brought.exit_code == 0, brought.stderr
    header, train, valid = (line.split("\t") for line in brought.stdout.splitlines())
    assert header[:3] == ["file", "bytes", "outcome"]
    assert train[:3] == [f"data/raw/{name}/train.txt", str(len(STORIES)), "downloaded"]
    assert valid[:3] == [f"data/raw/{name}/valid.txt", str(len(FEW)), "downloaded"]
    assert f"next: `lfs tokenize {name}`" in brought.stderr
    assert Path(f"data/raw/{name}/train.txt").read_bytes() == STORIES
    answer = json.loads(again.stdout)
    assert [row["outcome"] for row in answer["rows"]] == ["verified", "verified"]
    assert len(answer["rows"][0]["sha256"]) == 64
    assert "verified: " in again.stderr


def test_without_a_name_the_datasets_are_listed() -> None:
    Path("mine.txt").write_bytes(STORIES)
    lfs("download", "--from", "mine.txt", "--name", "mine", "--set", "licence=cc-by-4.0")

    listed = json.loads(lfs("download", "--json").stdout)["rows"]

    assert [(row["dataset"], row["here"], row["licence"]) for row in listed] == [
        ("tinystories", "no", "cdla-sharing-1.0"),
        ("owt", "no", listed[1]["licence"]),
        ("sample", "no", "MIT"),
        ("mine", "yes", "cc-by-4.0"),
    ]
    assert listed[0]["download bytes"] == 2_250_255_763


def test_the_sample_is_written_and_kept_unless_another_one_is_asked_for() -> None:
    first = json.loads(lfs("download", "sample", "--size", "50kB", "--json").stdout)["rows"]
    kept = json.loads(lfs("download", "sample", "--json").stdout)["rows"]
    other = json.loads(lfs("download", "sample", "--set", "seed=1", "--json").stdout)["rows"]

    assert [row["outcome"] for row in first + kept + other] == ["written"] * 2 + ["verified"] * 2 + ["written"] * 2
    assert kept[0]["sha256"] == first[0]["sha256"] != other[0]["sha256"]
    assert first[0]["bytes"] == pytest.approx(50_000, rel=0.1)
    assert other[0]["bytes"] == pytest.approx(50_000, rel=0.1)


def test_a_sample_that_is_replaced_is_told_and_can_be_had_again() -> None:
    first = json.loads(lfs("download", "sample", "--size", "50kB", "--set", "seed=1", "--json").stdout)
    assert first["replaced"] is None
    assert lfs("tokenize", "sample", "--vocab", "270").exit_code == 0
    assert lfs("tokenize", "sample", "--vocab", "270", "--pattern", "cl100k").exit_code == 0
    assert lfs("tokenize", "sample", "--tokenizer", "data/tokenizers/sample-270/tokenizer.json").exit_code == 0
    result = lfs("download", "sample", "--size", "60kB", "--set", "seed=0")

    lines = result.stderr.splitlines()
    assert lines[-4:-1] == [
        f"replaced {size(first['rows'][0]['bytes'])} of other stories: "
        "`lfs download sample --size 50000 --set seed=1` is the way back",
        "the tokens in data/tokens/sample-270 were made from them: run `lfs tokenize sample --vocab 270` again",
        "the tokens in data/tokens/sample-270-cl100k were made from them: "
        "run `lfs tokenize sample --vocab 270 --pattern cl100k` again",
    ]
    for line in (*lines[-3:-1], lines[-4]):
        assert lfs(*line.split("`lfs ")[1].split("`")[0].split()).exit_code == 0
    again = json.loads(lfs("download", "sample", "--json").stdout)
    assert (again["rows"][0]["sha256"], again["replaced"]) == (first["rows"][0]["sha256"], None)


def test_own_text_is_brought_from_a_file_and_from_the_web(hub: Hub) -> None:
    Path("mine.txt").write_bytes(STORIES)
    file = lfs("download", "--from", "mine.txt", "--name", "mine", "--valid-share", "0.2", "--json")
    web = lfs("download", "--from", hub.web("owt_train.txt.gz"), "--name", "web", "--valid-share", "0.2", "--json")

    assert file.exit_code == web.exit_code == 0, file.stderr + web.stderr
    rows = [json.loads(output.stdout)["rows"] for output in (file, web)]
    assert [row["sha256"] for row in rows[0]] == [row["sha256"] for row in rows[1]]
    assert rows[0][1]["bytes"] == pytest.approx(0.2 * len(STORIES), rel=0.01)
    assert json.loads(lfs("download", "mine", "--json").stdout)["rows"][0]["outcome"] == "verified"


def test_texts_put_where_the_hint_says_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    places = re.findall(r"`([^`]+\.txt)`", lfs("download", "tinystories").stderr)
    for place in places:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(FEW)

    result = lfs("download", "tinystories", "--json")

    assert len(places) == 2
    assert [row["outcome"] for row in json.loads(result.stdout)["rows"]] == ["put by hand", "put by hand"]


def test_settings_come_from_a_file_and_from_set_as_in_every_command() -> None:
    Path("text.txt").write_bytes(STORIES)
    Path("mine.json").write_text(json.dumps({"source": "text.txt", "name": "mine", "valid_share": 0.5}))

    result = lfs("download", "--config", "mine.json", "--set", "valid_share=0.25", "--json")

    assert json.loads(result.stdout)["rows"][1]["bytes"] == pytest.approx(0.25 * len(STORIES), rel=0.01)


# What can go wrong


def nothing() -> None:
    pass


def put_text(name: str, content: bytes) -> Callable[[], None]:
    def put() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)

    return put


def put_two() -> None:
    put_text("a.txt", FEW)()
    put_text("data/raw/b/train.txt", FEW)()


def bring_mine() -> None:
    Path("one.txt").write_bytes(STORIES)
    lfs("download", "--from", "one.txt", "--name", "mine")
    Path("two.txt").write_bytes(FEW)


def damage_manifest() -> None:
    bring_mine()
    Path("data/raw/mine/manifest.json").write_text('{"dataset": "mi')


def damage_mine() -> None:
    bring_mine()
    Path("data/raw/mine/train.txt").write_bytes(b"short")


def occupy_data() -> None:
    Path("data").write_text("a file, not a folder")


MISUSES = {
    "unknown dataset": (("tinystores",), nothing, "unknown dataset `tinystores`", "did you mean `tinystories`?"),
    "a path as dataset": (("../x",), nothing, "unknown dataset `../x`", "choose one of: owt, sample, tinystories"),
    "unknown option": (("--form", "x"), nothing, "unknown option `--form`", "did you mean `--from`?"),
    "unknown setting": (("--set", "sorce=x"), nothing, "unknown key `sorce`", "did you mean `source`?"),
    "no name": (("--from", "text.txt"), nothing, "`text.txt` has no name yet", "--from text.txt --name mine`"),
    "no text": (
        ("--name", "mine"),
        nothing,
        "`--name mine` names no text",
        "`lfs download --from FILE_OR_URL --name mine`",
    ),
    "two at once": (("owt", "--from", "a"), nothing, "both the dataset `owt` and", "one at a time"),
    "name outside": (("--from", "a", "--name", "../x"), nothing, "`../x` cannot name a folder", "letters"),
    "known name": (("--from", "a", "--name", "owt"), nothing, "`owt` is the name of a dataset", "`--name my-owt`"),
    "nothing held out": (
        ("--from", "a", "--name", "b", "--valid-share", "0"),
        nothing,
        "`valid_share` (0) leaves no text to validate on",
        "`--valid-share 0.05`",
    ),
    "no size": (("sample", "--size", "many"), nothing, "`--size many` is not a size", "`--size 20MB`"),
}
FAILURES = {
    "no file": (("--from", "tex.txt", "--name", "b"), put_text("text.txt", b""), "no file `tex.txt`", "`text.txt`?"),
    "a device": (("--from", "/dev/null", "--name", "b"), nothing, "is not a file on a disk", "save it first"),
    "a folder": (("--from", ".", "--name", "b"), nothing, "`.` is a folder", "`cat ./*.txt > text.txt`"),
    "an empty file": (("--from", "e.txt", "--name", "b"), put_text("e.txt", b""), "`e.txt` is empty", "holds text"),
    "a binary file": (
        ("--from", "b.bin", "--name", "b"),
        put_text("b.bin", bytes(range(256)) * 9),
        "b.bin` is a binary file",
        "UTF-8",
    ),
    "half a packed file": (
        ("--from", "h.gz", "--name", "b"),
        put_text("h.gz", gzip.compress(STORIES)[:5000]),
        "h.gz` is a damaged gzip file",
        "fetch it again",
    ),
    "taken": (("--from", "two.txt", "--name", "mine"), bring_mine, "`mine` is taken", "rm -r data/raw/mine"),
    "taken by hand": (
        ("--from", "a.txt", "--name", "b"),
        put_two,
        "put there by hand",
        "choose another `--name`",
    ),
    "damaged manifest": (("mine",), damage_manifest, "manifest.json is damaged", "`rm data/raw/mine/manifest.json`"),
    "damaged own text": (("mine",), damage_mine, "missing or damaged", "lfs download --from"),
    "empty by hand": (
        ("tinystories",),
        put_text("data/raw/tinystories/train.txt", b""),
        "train.txt is empty",
        "`rm data/raw/tinystories/train.txt`",
    ),
    "data is a file": (("sample",), occupy_data, "cannot use data/raw", "`LFS_DATA`"),
    "not encrypted": (
        ("--from", "http://example.com/a.txt", "--name", "b"),
        nothing,
        "`http://example.com/a.txt` is not encrypted",
        "`https://example.com/a.txt`",
    ),
    "not the web": (("--from", "ftp://a/b.txt", "--name", "b"), nothing, "is not a web address", "`https://`"),
    "no such port": (("--from", "https://a:99999/b", "--name", "b"), nothing, "is not a web address", "`https://`"),
}


@pytest.mark.parametrize("case", MISUSES | FAILURES)
def test_what_is_wrong_is_said_with_a_way_out(case: str) -> None:
    arguments, prepare, message, hint = (MISUSES | FAILURES)[case]
    prepare()

    result = lfs("download", *arguments)

    assert_failed(result, message, hint, exit_code=2 if case in MISUSES else 1)


SERVER_FAULTS = {
    "not found": (
        Faults(head_status=404, error_code="EntryNotFound"),
        "is not on 127.0.0.1, which answered 404",
        "owt",
    ),
    "no such repository": (Faults(head_status=401, error_code="RepoNotFound"), "answered 401", "`HF_TOKEN`"),
    "gated": (Faults(head_status=403, error_code="GatedRepo"), "needs a permission", "ask for access on its page"),
    "token": (Faults(token="another"), "needs a permission, or is not there", "`HF_TOKEN`"),
    "out of order": (Faults(head_status=503), "127.0.0.1 answered 503", "try again later"),
    "no hub": (Faults(commit=""), "does not answer like the hub", "`HF_ENDPOINT`"),
    "wrong checksum": (Faults(wrong_bytes=True), "has the wrong checksum", "it starts over"),
    "broken transfer": (Faults(cut_after=[100] * 50), "broke off after 100 of", "it continues where it stopped"),
    "busy": (Faults(statuses=[503] * 50), "broke off after 0 of", "run the same command again"),
    "gone": (Faults(statuses=[404]), "which answered 404", "lfs download sample"),
    "forbidden": (Faults(statuses=[403]), "answered 403", "`HF_TOKEN`"),
    "leads away": (Faults(redirect_to="http://example.com/x"), "is not encrypted", "https://example.com/x"),
}


@pytest.mark.parametrize("name", ["tinystories", "owt"])
@pytest.mark.parametrize("case", SERVER_FAULTS)
def test_what_the_hub_does_wrong_is_said_with_a_way_out(
    case: str, name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults, message, hint = SERVER_FAULTS[case]
    hub.faults = Faults(**vars(faults))
    hub.faults.cut_after, hub.faults.statuses = list(faults.cut_after), list(faults.statuses)
    if case == "broken transfer":
        monkeypatch.setattr(transfer, "RETRIES", -1)

    result = lfs("download", name)

    assert_failed(result, message, hint.replace("owt", name))
    if case != "leads away":
        assert "`lfs download sample`" in result.stderr
        assert f"`env -u HF_ENDPOINT lfs download {name}`" in result.stderr
        assert f"`data/raw/{name}/train.txt`" in result.stderr
    assert not list(Path("data/raw").glob("*/*.txt"))
    hub.faults = Faults()
    assert lfs("download", name).exit_code == 0
    assert Path(f"data/raw/{name}/train.txt").read_bytes() == STORIES


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    assert_failed(lfs("download", "tinystories"), "no connection to 127.0.0.1: ", "`lfs download sample`")
    assert not Path("data/raw/tinystories").exists()


@pytest.mark.parametrize("arguments", [(), ("owt",), ("sample",)])
def test_a_data_folder_without_permission_is_named(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)

    assert_failed(lfs("download", *arguments), "Permission denied", "`LFS_DATA=~/lfs-data`")


def test_a_strange_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")

    result = lfs("download", "owt")

    assert_failed(result, "`HF_ENDPOINT` cannot be used: `http://mirror.example`", "use `https://mirror.example`")


def test_a_token_is_never_printed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hf_secr\u00e9t", "hf_\tsecrt"):
        monkeypatch.setenv("HF_TOKEN", token)
        result = lfs("download", "tinystories")
        assert_failed(result, "`HF_TOKEN` holds a character that no token has", "set it again")
        assert "secr" not in result.stderr


def test_too_small_a_disk_is_found_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    Path("text.txt").write_bytes(STORIES)

    for arguments in (
        ("tinystories",),
        ("owt",),
        ("sample",),
        ("--from", "text.txt", "--name", "mine"),
        ("--from", hub.web("owt_train.txt.gz"), "--name", "mine"),
    ):
        assert_failed(lfs("download", *arguments), "1 kB are free", "set `LFS_DATA`")
    assert not list(Path("data").rglob("*.txt"))


def assert_failed(result: Output, message: str, hint: str, exit_code: int = 1) -> None:
    assert result.exit_code == exit_code, result.stderr
    assert result.stdout == ""
    error, blank, advice, *more = result.stderr.splitlines()[-3:]
    assert error.startswith("error: ")
    assert message in error
    assert (blank, more) == ("", [])
    assert advice.startswith("hint: ")
    assert hint in advice


# In a process of its own


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lfs_cli", "download", *arguments]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_offline_mode_is_respected(hub: Hub) -> None:
    process = start("tinystories", HF_HUB_OFFLINE="1")
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 1
    assert errors.startswith("error: offline mode is on (`HF_HUB_OFFLINE`)")
    assert "unset `HF_HUB_OFFLINE`" in errors
    assert hub.log == []


def test_an_interrupted_download_exits_with_130_and_continues(hub: Hub) -> None:
    hub.faults.bytes_per_second = 50_000
    process = start("tinystories")
    deadline = time.monotonic() + 60
    part = Path("data/raw/tinystories/TinyStoriesV2-GPT4-train.txt.part")
    while not (part.exists() and part.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert not Path("data/raw/tinystories/train.txt").exists()
    kept = part.stat().st_size
    hub.log.clear()
    hub.faults = Faults()
    assert lfs("download", "tinystories").exit_code == 0
    assert [request.get("range") for request in hub.transfers()] == [f"bytes={kept}-"]
    assert Path("data/raw/tinystories/train.txt").read_bytes() == STORIES
