"""Pictures: every kind of file is valid, shows its spread, and the panels fit what was measured."""

import builtins
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lfs_cli.errors import ConfigError, DataError
from lfs_cli.reports.attention_plot import attention_caption, attention_panels, attention_title, draw_attention
from lfs_cli.reports.plot import SUFFIXES, Panel, Series, check_plot, draw

pytest.importorskip("matplotlib")

ENVIRONMENT = {
    "hardware": "A <GPU> & more",
    "versions": {"torch": "2.11.0", "triton": None},
    "date": "2026-11-25T01:02:03+00:00",
}
CURVES = Panel(
    "forward",
    "T, positions",
    "ms",
    [
        Series("flash", [1024, 2048], [1.0, 4.0], [0.9, 3.9], [1.2, 4.4], is_emphasized=True),
        Series("standard", [1024], [3.0], ending="out of memory"),
        Series("absent", [], []),
    ],
    is_log_x=True,
    is_log_y=True,
    levels=[(5.0, "a level")],
)
BARS = Panel(
    "", "", "TFLOP/s", [Series("a", ["x", "y"], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5]), Series("b", ["x"], [3.0])]
)


def row(name: str, seq: int, kind: str = "forward", status: str = "ok", **other) -> dict:
    good = status == "ok"
    return {
        "batch": 1, "heads": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", "causal": True, "window": 0,
        "seq": seq, "pass": kind, "implementation": name, "status": status, "ceiling_tflops": 800.0,
        "median_ms": 2.0 if good else None, "q1_ms": 1.0 if good else None, "q3_ms": 4.0 if good else None,
        "tflops": 100.0 if good else None, "runs": 10, "peak_bytes": 2**20 if good else None, **other,
    }  # fmt: skip


def is_valid(path: Path) -> bool:
    content = path.read_bytes()
    if path.suffix == ".png":
        width, height = struct.unpack(">II", content[16:24])
        return content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82") and width > height / 2
    if path.suffix == ".pdf":
        return content.startswith(b"%PDF") and content.rstrip().endswith(b"%%EOF")
    text = content.decode()
    if path.suffix == ".html":
        text = text[text.index("<svg") : text.index("</svg>") + 6]
    return ElementTree.fromstring(text).tag.endswith("svg")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("panel", [CURVES, BARS], ids=["curves", "bars"])
def test_every_kind_of_picture_is_valid_and_the_same_each_time(tmp_path: Path, suffix: str, panel: Panel) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        draw([panel, None, panel], path, title="A title & <more>", caption="where\nand when", columns=2)
        assert is_valid(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_page_escapes_its_title(tmp_path: Path) -> None:
    draw([CURVES], tmp_path / "a.html", title="A & <b>")
    assert "<title>A &amp; &lt;b&gt;</title>" in (tmp_path / "a.html").read_text()


def figure_of(monkeypatch: pytest.MonkeyPatch, panels: list, path: Path):
    from matplotlib.figure import Figure

    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    draw(panels, path, title="title", caption="caption")
    return figures[0]


def test_spread_endings_levels_and_scales_are_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = figure_of(monkeypatch, [CURVES, BARS], tmp_path / "a.svg")
    curves, bars = figure.axes
    assert len(curves.collections) == 1  # the band of the one series with a spread
    low, high = curves.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (0.9, 4.4)
    assert {text.get_text() for text in curves.texts} == {"out of memory", "a level"}
    assert (curves.get_xscale(), curves.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in curves.get_xticklabels()] == ["1k", "2k"]
    assert len(bars.containers) == 3  # two series and the whiskers of one of them
    assert bars.get_ylim()[0] == 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["flash", "standard", "a", "b"]
    assert {"title", "caption"} <= {text.get_text() for text in figure.texts}


def test_nothing_of_the_frame_lies_on_a_panel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = figure_of(monkeypatch, [CURVES] * 6, tmp_path / "a.png")
    frame = [text.get_window_extent() for text in figure.texts] + [figure.legends[0].get_window_extent()]
    for axes in figure.axes:
        panel = axes.get_tightbbox()
        assert not [box for box in frame if box.overlaps(panel)]
    assert not [1 for i, one in enumerate(frame) for other in frame[i + 1 :] if one.overlaps(other)]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("count", [1, 10, 20])
@pytest.mark.parametrize("length", [4, 25, 120])
def test_the_legend_of_many_runs_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, length: int, suffix: str
) -> None:
    names = [f"{'speedrun-WWW-' * 20}"[: length - 3] + f"{number:03}" for number in range(count)]
    panel = Panel("over time", "minutes", "nats", [Series(name, [1, 2], [3.0, 2.0]) for name in names])
    figure = figure_of(monkeypatch, [panel, panel], tmp_path / f"a{suffix}")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert len(boxes) == len({text.get_text() for text in legend.get_texts()}) == count
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not [axes for axes in figure.axes if axes.get_tightbbox().overlaps(legend.get_window_extent())]


def test_the_same_name_has_the_same_look_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    swapped = Panel("", "T", "ms", list(reversed(CURVES.series)))
    figure = figure_of(monkeypatch, [CURVES, swapped], tmp_path / "a.svg")
    looks = [{line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines} for axes in figure.axes]
    assert looks[0]["flash"] == looks[1]["flash"] != looks[1]["standard"]
    assert looks[0]["flash"][1] != looks[0]["standard"][1]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("rows.gif", "no picture can be written as `rows.gif`", "end its name in .svg, .png, .pdf or .html"),
        ("rows", "no picture can be written as `rows`", "such as `rows.svg`"),
        (".svg.d/folder.svg", "is a folder", "name a file, such as"),
    ],
)
def test_a_file_that_cannot_be_a_picture_is_refused(tmp_path: Path, name: str, message: str, hint: str) -> None:
    (tmp_path / ".svg.d" / "folder.svg").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        check_plot(tmp_path / name)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest):
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match="pictures need matplotlib") as caught:
        check_plot(tmp_path / "a.svg")
    assert caught.value.hint == "install it: `pip install 'lfs-cli[bench]'`"


def test_a_file_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        draw([CURVES], tmp_path / "file" / "a.svg", title="t")


# The panels of `lfs bench attention`


def test_one_configuration_over_lengths_is_time_speed_and_memory_for_each_pass() -> None:
    rows = [row(name, seq, kind) for name in ("flash", "torch") for seq in (8, 16) for kind in ("forward", "both")]
    panels, columns = attention_panels(rows)
    assert columns == 2
    assert [(panel.title, panel.y) for panel in panels] == [
        (kind, y) for y in ("ms", "TFLOP/s", "peak MiB beyond the inputs") for kind in ("forward", "both")
    ]
    assert panels[0].series[0] == Series("flash", [8, 16], [2.0, 2.0], [1.0, 1.0], [4.0, 4.0], is_emphasized=True)
    assert panels[2].series[1] == Series("torch", [8, 16], [100.0, 100.0], [50.0, 50.0], [200.0, 200.0])
    assert panels[2].levels == [(800.0, "matrix product")]
    assert panels[4].series[0].y == [1.0, 1.0]


def test_memory_that_no_one_knows_has_no_panels() -> None:
    rows = [row("flash", seq, peak_bytes=None) for seq in (8, 16)]
    assert [panel.y for panel in attention_panels(rows)[0]] == ["ms", "TFLOP/s"]


def test_what_ran_out_of_memory_says_so_where_its_curve_ends() -> None:
    rows = [row("standard", 8), row("standard", 16), row("standard", 32, status="out of memory"), row("flash", 32)]
    series = {one.label: one for one in attention_panels(rows)[0][0].series}
    assert series["standard"].x == [8, 16]
    assert series["standard"].ending == "out of memory"
    assert series["flash"].ending == ""
    assert "Not shown" not in attention_caption(rows, ENVIRONMENT)


def test_wrong_results_are_not_drawn_but_named() -> None:
    rows = [row("torch", 8), row("torch", 16), {**row("flash", 8), "status": "wrong"}, row("flex", 8, status="failed")]
    assert [one.label for one in attention_panels(rows)[0][0].series] == ["torch"]
    assert attention_caption(rows, ENVIRONMENT).endswith("Not shown: flash (wrong), flex (failed).")


def test_several_configurations_have_a_column_each() -> None:
    dims = (16, 32, 64, 128, 256)
    rows = [row("flash", seq, kind, head_dim=D) for D in dims for seq in (8, 16) for kind in ("forward", "both")]
    panels, columns = attention_panels(rows)
    assert columns == 4
    assert [panel.title for panel in panels[:4]] == ["D=16, both", "D=32, both", "D=64, both", "D=128, both"]
    assert [panel.title if panel else None for panel in panels[12:16]] == ["D=256, both", None, None, None]
    assert attention_title(rows) == "Attention: B = 1, H = 2, bfloat16, causal"


def test_single_lengths_are_bars_by_shape_and_a_single_shape_bars_by_pass() -> None:
    rows = [row("flash", seq, kind, heads=heads) for seq, heads in ((8, 2), (16, 4)) for kind in ("forward", "both")]
    panels, columns = attention_panels(rows)
    assert ([panel.title for panel in panels], columns) == (["forward", "both"], 1)
    assert panels[0].series[0].x == ["B1 H2\nT8 D64", "B1 H4\nT16 D64"]
    assert (panels[0].series[0].low, panels[0].series[0].high) == ([50.0, 50.0], [200.0, 200.0])
    (panel,), _ = attention_panels([row("flash", 8, kind) for kind in ("forward", "both")])
    assert panel.series[0].x == ["forward", "both"]
    missing = [row("flash", 8), row("standard", 8, status="out of memory")]
    assert attention_caption(missing, ENVIRONMENT).endswith("Not shown: standard (out of memory).")


def test_a_published_time_is_marked_and_has_no_spread() -> None:
    published = {**row("CS336 record", 8, "both"), "status": "published", "q1_ms": None, "q3_ms": None, "runs": 0}
    (panel,), _ = attention_panels([row("flash", 8, "both"), published])
    assert panel.series[1] == Series("CS336 record (published)", ["both"], [100.0])


def test_title_and_caption_say_what_where_and_when(tmp_path: Path) -> None:
    rows = [row("flash", 8, window=4, kv_heads=1), row("flash", 16, window=4, kv_heads=1, runs=3)]
    assert attention_title(rows) == "Attention: B = 1, H = 2, D = 64, G = 1, bfloat16, causal, window 4"
    caption = attention_caption(rows, ENVIRONMENT)
    assert caption.startswith("A <GPU> & more, torch 2.11.0, 2026-11-25. Medians of 3 to 10 runs")
    draw_attention(rows, ENVIRONMENT, tmp_path / "rows.svg")
    assert is_valid(tmp_path / "rows.svg")


def test_rows_without_a_single_time_still_make_a_picture(tmp_path: Path) -> None:
    rows = [row("flash", seq, status="unavailable") for seq in (8, 16)]
    draw_attention(rows, ENVIRONMENT, tmp_path / "rows.png")
    assert is_valid(tmp_path / "rows.png")
