"""The picture of `lfs bench tokenizer`."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lfs_cli.errors import ConfigError, DataError
from lfs_cli.reports import speeds
from lfs_cli.reports.speeds import draw_speeds, panels_of


def row(
    task: str, threads: int, state: str, library: str, speed: float | None, peak: int | None = None
) -> dict[str, Any]:
    return {
        "task": task,
        "threads": threads,
        "state": state,
        "implementation": library,
        "megabytes_per_second": speed,
        "process_peak_bytes": peak,
    }


ROWS = [
    row("encode", 1, "cold", "lfs", 140.0),
    row("encode", 1, "cold", "gigatoken", 119.0),
    row("encode", 1, "cold", "gigatoken", 80.0),
    row("encode", 1, "cold", "tokenizers", 1.4),
    row("encode", 1, "warm", "lfs", 390.0),
    row("encode", 1, "warm", "gigatoken", 295.0),
    row("encode", 1, "warm", "tokenizers", None),
    row("encode", 2, "cold", "lfs", 190.0),
    row("shard", 1, "cold", "lfs", 217.0, 204_000_000),
    row("shard", 1, "cold", "gigatoken", 89.0, None),
    row("shard", 1, "process", "lfs", 180.0, 204_000_000),
]


def test_the_fastest_call_of_each_library_counts() -> None:
    (one, two), (shard,) = panels_of(ROWS)
    assert (one.title, two.title) == ("encoding, 1 thread", "encoding, 2 threads")
    assert one.libraries == ("lfs", "gigatoken", "tokenizers")
    assert one.speeds == {"cold": (140.0, 119.0, 1.4), "warm": (390.0, 295.0, None)}
    assert two.speeds == {"cold": (190.0,), "warm": (None,)}
    assert shard.labels == ("lfs, 204 MB", "gigatoken")


def test_a_page_of_plotly_holds_all_it_needs(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    draw_speeds(ROWS, "my machine", tmp_path / "speeds.html")
    page = (tmp_path / "speeds.html").read_text(encoding="utf-8")
    assert "my machine" in page
    assert "encoding, 1 thread" in page
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=", page)


@pytest.mark.parametrize("name", ["speeds.svg", "speeds.PNG"])
def test_pictures_need_no_browser(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    draw_speeds(ROWS, "my machine", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    if name.endswith("svg"):
        ElementTree.fromstring(content)
    else:
        assert content.startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_cannot_be_drawn_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="nothing was measured"):
        draw_speeds([row("encode", 1, "cold", "lfs", None)], "", tmp_path / "a.svg")
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*/taken/a.svg: Not a directory"):
        draw_speeds(ROWS, "", tmp_path / "taken" / "a.svg")
    monkeypatch.setattr(speeds, "find_spec", lambda name: None)
    for name, library in (("a.svg", "matplotlib"), ("a.html", "plotly")):
        with pytest.raises(ConfigError, match=f"needs {library}") as caught:
            draw_speeds(ROWS, "", tmp_path / name)
        assert "pip install 'lfs-cli[bench]'" in str(caught.value.hint)
