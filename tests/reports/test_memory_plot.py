"""The picture of a step's memory: what lies on what, where phases begin, and how high it gets."""

from pathlib import Path

import pytest

from lfs_cli.errors import DataError
from lfs_cli.reports.memory_plot import KINDS, draw_memory, memory_panels
from lfs_cli.reports.plot import SUFFIXES

ENVIRONMENT = {
    "hardware": "A <GPU> & more",
    "device": "cuda",
    "versions": {"torch": "2.11.0"},
    "date": "2026-11-25T01:02:03+00:00",
}


def row(ms: float, phase: str, dtype: str = "float32", **amounts: int) -> dict:
    sizes = {f"{kind}_bytes": amounts.get(kind, 0) for kind in KINDS}
    about = {"size": "small", "seq": 1024, "batch": 4, "dtype": dtype}
    return {**about, "ms": ms, "phase": phase, **sizes, "total_bytes": sum(sizes.values())}


ROWS = [
    row(0.0, "forward", weights=2**30),
    row(1.0, "forward", weights=2**30, activations=2**30),
    row(2.0, "backward", weights=2**30, activations=2**30),
    row(3.0, "backward", weights=2**30, gradients=2**29),
    row(0.0, "forward", "bfloat16", weights=2**20),
]


def test_every_step_is_a_panel_of_areas_with_its_peak_and_phases() -> None:
    large, small = memory_panels(ROWS)
    assert (large.title, large.y) == ("small, T = 1,024, B = 4, float32", "GiB")
    assert [series.label for series in large.series] == list(KINDS.values())
    assert [list(series.y) for series in large.series][:1] == [[1.0, 1.0, 1.0, 1.0]]
    assert list(large.series[3].y) == [0.0, 1.0, 1.0, 0.0]
    assert large.levels == [(2.0, "peak 2 GiB")]
    assert large.borders == [(0.0, "forward"), (2.0, "backward")]
    assert (small.y, small.levels) == ("MiB", [(1.0, "peak 1 MiB")])
    assert all(panel.is_stacked for panel in (large, small))


def test_areas_reach_as_high_as_the_sum_and_borders_are_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from lfs_cli.reports import plot

    axes = Figure().subplots()
    (panel, _) = memory_panels(ROWS)
    plot._draw_panel(axes, panel, plot._styles([panel]))
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    assert tops == [1.0, 1.0, 1.5, 2.0, 2.0]
    activations = {tuple(vertex) for vertex in axes.collections[3].get_paths()[0].vertices.tolist()}
    assert (1.0, 2.0) in activations  # they begin at 1 ms, and hold until 3
    assert (3.0, 2.0) in activations
    assert (0.0, 2.0) not in activations
    assert {text.get_text() for text in axes.texts} == {"forward", "backward", "peak 2 GiB"}
    assert axes.get_xlim() == (0.0, 3.0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file_is_written(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_memory(ROWS[:4], ENVIRONMENT, tmp_path / f"memory{suffix}")
    assert (tmp_path / f"memory{suffix}").stat().st_size > 5_000


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no step could be profiled") as caught:
        draw_memory([], ENVIRONMENT, tmp_path / "memory.svg")
    assert caught.value.hint == "choose a size that fits"
