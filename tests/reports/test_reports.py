"""Reading run folders with care, comparing runs, and the page of a run."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.reports.compare import (
    BITS_PER_BYTE,
    LOSS,
    best_first,
    costs_of_equal_loss,
    differing_settings,
    equal_losses,
    labels,
    measure_of,
    thin,
    validation_curve,
)
from lfs_cli.reports.page import loss_curves, run_page, ticks
from lfs_cli.reports.records import UNFINISHED, Run, flatten, read_run


def write_run(folder: Path, **files: str) -> Run:
    names = {"config": "json", "environment": "json", "metrics": "jsonl", "samples": "md", "result": "json"}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.{kind}" for name, kind in names.items()}
    for name, text in files.items():
        paths[name].write_text(text, encoding="utf-8")
    return read_run(folder.name, **paths)


def step(number: int, loss: float = 2.0, seconds_each: float = 0.5, tokens_each: int = 100) -> dict:
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "tokens": number * tokens_each,
        "seconds": number * seconds_each,
        "tokens_per_second": tokens_each / seconds_each,
    }


def evaluation(number: int, loss: float, bits: float | None = None) -> dict:
    return {"kind": "evaluation", "step": number, "loss": loss, "bits_per_byte": bits, "tokens": 7, "seconds": 1.0}


def run(name: str, evaluations: list[dict], *, config: dict | None = None, seconds_each: float = 0.5, **rest) -> Run:
    last = max((record["step"] for record in evaluations), default=0)
    values = {
        "environment": {"device": "cpu"},
        "steps": [step(number, 3.0 - number / 10, seconds_each) for number in range(1, last + 1)],
        "result": None,
        "samples": "",
        "started": "2026-11-23 10:02",
    }
    return Run(name=name, config=config or {}, evaluations=evaluations, **{**values, **rest})


def test_what_a_run_keeps_for_itself_is_no_problem(tmp_path: Path) -> None:
    kept = [{"kind": "microbatch", "step": 0, "rows": 2}, step(1), {"kind": "anomaly", "step": 1, "action": "skip"}]
    metrics = "".join(json.dumps(record) + "\n" for record in kept)
    found = write_run(tmp_path / "r", config="{}", environment="{}", metrics=metrics)
    assert found.problems == ()
    assert [record["step"] for record in found.steps] == [1]


def test_half_a_last_line_is_skipped_and_named(tmp_path: Path) -> None:
    whole = "".join(json.dumps(record) + "\n" for record in (step(1), evaluation(1, 2.5)))
    found = write_run(tmp_path / "r", config="{}", environment="{}", metrics=whole + '{"kind":"step","ste')
    assert [record["step"] for record in found.steps] == [1]
    assert [record["loss"] for record in found.evaluations] == [2.5]
    assert found.problems == ("r: metrics.jsonl: line 3 is not a record, skipped",)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "config.json is missing"),
        ({"config": "[1]", "environment": "{}", "metrics": ""}, "config.json does not hold one JSON object"),
        ({"config": "{}", "environment": "{", "metrics": ""}, "environment.json does not hold one JSON object"),
        ({"config": "{}", "environment": "{}"}, "metrics.jsonl is missing"),
        ({"config": "{}", "environment": "{}", "metrics": "x\n\n1\n{}"}, "metrics.jsonl: line 1 and 2 more are not"),
        (
            {"config": "{}", "environment": "{}", "metrics": '{"kind":"step","step":true,"loss":"x"}'},
            "metrics.jsonl: line 1 is not a record",
        ),
        ({"config": "{}", "environment": "{}", "metrics": "", "result": "nu"}, "result.json does not hold"),
    ],
)
def test_damage_is_a_problem_and_not_an_exception(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    found = write_run(tmp_path / "r", **files)
    assert problem in " ".join(found.problems)
    assert found.row()["status"] == UNFINISHED
    assert run_page(found)


@settings(max_examples=40, deadline=None)
@given(damage=st.binary(max_size=60), place=st.sampled_from(["config", "environment", "metrics", "result", "samples"]))
def test_no_bytes_break_a_report(damage: bytes, place: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run") / "r"
    good = {"config": '{"a": 1}', "environment": "{}", "metrics": json.dumps(evaluation(3, 2.0)) + "\n"}
    write_run(folder, **good)
    name = {"metrics": "metrics.jsonl", "samples": "samples.md"}.get(place, f"{place}.json")
    with (folder / name).open("ab") as file:
        file.write(damage)
    found = write_run(folder)
    run_page(found)
    best_first([found])
    equal_losses([found, found])


def test_a_killed_run_is_shown_from_its_metrics() -> None:
    config = {"name": "mine", "optimizer": [{"name": "muon"}, {"name": "adamw"}], "model": {"attention": "flash"}}
    row = run("r", [evaluation(2, 2.5, 1.0), evaluation(4, 2.0, 0.8), evaluation(6, math.nan)], config=config).row()
    assert row == {
        "timestamp": "2026-11-23 10:02",
        "experiment_name": "mine",
        "optimizer": "muon+adamw",
        "attention_type": "flash",
        "best_val_loss": 2.0,
        "params_M": None,
        "tokens_M": 600 / 1e6,
        "val_bits_per_byte": 0.8,
        "tokens_per_second": 200.0,
        "minutes": 3.0 / 60,
        "device": "cpu",
        "run": "r",
        "status": UNFINISHED,
    }


def test_the_lowest_bits_per_byte_come_first_and_unvalidated_runs_last() -> None:
    runs = [run("none", []), run("b", [evaluation(1, 1.0, 2.0)]), run("a", [evaluation(1, 5.0, 1.0)])]
    assert [found.name for found in best_first(runs)] == ["a", "b", "none"]


def test_without_bits_per_byte_the_loss_decides() -> None:
    runs = [run("c", [evaluation(1, math.inf)]), run("b", [evaluation(1, 5.0, 1.0)]), run("a", [evaluation(1, 1.0)])]
    assert [found.name for found in best_first(runs)] == ["a", "b", "c"]


def test_only_settings_that_differ_are_listed() -> None:
    one = run("2026-11-23-a", [], config={"steps": 5, "optimizer": [{"lr": 1.0}], "same": [1, 2]})
    two = run("2026-11-23-b", [], config={"steps": 5, "optimizer": [{"lr": 2.0}, {"lr": 3.0}], "same": [1, 2]})
    assert differing_settings([one, two]) == [
        {"setting": "optimizer.0.lr", "a": 1.0, "b": 2.0},
        {"setting": "optimizer.1.lr", "a": None, "b": 3.0},
    ]


def test_labels_keep_the_date_where_they_would_clash() -> None:
    runs = [run(name, []) for name in ("2026-11-23-a", "2026-11-24-a", "2026-11-24-b", "notes")]
    assert list(labels(runs).values()) == ["2026-11-23-a", "2026-11-24-a", "b", "notes"]


def test_losses_are_compared_at_equal_steps_tokens_and_seconds() -> None:
    slow = run("slow", [evaluation(2, 3.0), evaluation(4, 2.0)], seconds_each=1.0)
    fast = run("fast", [evaluation(4, 2.5), evaluation(8, 1.5)], seconds_each=0.5)
    assert equal_losses([slow, fast]) == [
        {"axis": "step", "at": 4, "slow": 2.0, "fast": 2.5},
        {"axis": "tokens", "at": 400, "slow": 2.0, "fast": 2.5},
        {"axis": "seconds", "at": 2.0, "slow": 3.0, "fast": 2.5},
        {"axis": "seconds", "at": 4.0, "slow": 2.0, "fast": 1.5},
    ]


def test_between_evaluations_a_loss_lies_on_the_line() -> None:
    sparse = run("sparse", [evaluation(0, 4.0), evaluation(10, 2.0)])
    dense = run("dense", [evaluation(number, 1.0) for number in range(0, 10, 2)])
    rows = [row for row in equal_losses([sparse, dense]) if row["axis"] == "step"]
    assert rows == [
        {"axis": "step", "at": 0, "sparse": 4.0, "dense": 1.0},
        {"axis": "step", "at": 8, "sparse": pytest.approx(2.4), "dense": 1.0},
    ]


def test_runs_that_never_overlap_have_no_common_points() -> None:
    early, late = run("early", [evaluation(2, 3.0)]), run("late", [evaluation(9, 1.0)])
    assert not [row for row in equal_losses([early, late]) if row["axis"] == "step"]


def test_what_each_took_to_the_lowest_loss_that_all_reach() -> None:
    slow = run("slow", [evaluation(2, 3.0), evaluation(4, 2.5)], seconds_each=1.0)
    fast = run("fast", [evaluation(2, 4.0), evaluation(4, 2.0), evaluation(6, 2.5)], seconds_each=0.5)
    assert costs_of_equal_loss([slow, fast]) == [
        {"axis": "step", "loss": 2.5, "slow": 4, "fast": 3.5},
        {"axis": "tokens", "loss": 2.5, "slow": 400, "fast": 350},
        {"axis": "seconds", "loss": 2.5, "slow": 4.0, "fast": 1.75},
    ]
    early = run("early", [evaluation(1, 2.0)])
    assert [row["early"] for row in costs_of_equal_loss([slow, early])] == [1, 100, 0.5]
    assert costs_of_equal_loss([slow, run("none", [])]) == []


def test_runs_with_other_tokens_are_compared_in_bits_per_byte() -> None:
    small, large, unknown = (
        run(name, [evaluation(2, loss, bits)], config={"model": {"vocab_size": size}})
        for name, size, loss, bits in (("small", 300, 1.5, 2.0), ("large", 9000, 3.0, 1.0), ("unknown", 9, 3.0, None))
    )
    assert measure_of([small, large]) == BITS_PER_BYTE
    assert measure_of([small, small]) == measure_of([small, unknown]) == LOSS
    assert equal_losses([small, large])[0] == {"axis": "step", "at": 2, "small": 2.0, "large": 1.0}
    assert "bits per byte over steps<" in loss_curves([small, large])
    assert "nats per token over seconds of training<" in loss_curves([small, unknown], "seconds")


def test_nonsense_in_a_journal_is_not_drawn() -> None:
    found = run("r", [evaluation(1, 2.0), evaluation(2, -1e308), evaluation(3, 1.0)])
    found.steps.append(step(10**300, 1e308))
    assert validation_curve(found, "step") == [(1, 2.0), (3, 1.0)]
    assert loss_curves([found]).count("<circle") == 2


def test_a_curve_leaves_out_what_is_not_a_number() -> None:
    found = run("r", [evaluation(1, 2.0), evaluation(2, math.nan), evaluation(3, 1.0)])
    assert validation_curve(found, "step") == [(1, 2.0), (3, 1.0)]


@given(count=st.integers(0, 50), most=st.integers(2, 20))
def test_thinning_keeps_the_ends(count: int, most: int) -> None:
    points = list(range(count))
    kept = thin(points, most)
    assert len(kept) == min(count, most)
    assert kept[:1] + kept[-1:] == points[:1] + points[-1:]
    assert kept == sorted(set(kept))


@settings(deadline=None)
@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e6), most=st.integers(2, 10))
def test_ticks_are_few_and_enclose_the_range(low: float, size: float, most: int) -> None:
    values = ticks(low, low + size, most)
    assert values[0] <= low + 1e-6
    assert values[-1] >= low + size - 1e-6
    assert 2 <= len(values) <= most + 3


def test_lists_of_objects_are_flattened_by_number_and_other_lists_kept() -> None:
    assert flatten({"a": [{"b": 1}], "c": [1, 2], "d": {}}) == {"a.0.b": 1, "c": [1, 2]}


def example() -> Run:
    name = "2026-11-23-<b>tiny</b>-a1b2"
    return run(
        name,
        [evaluation(2, 2.75, 1.5), evaluation(4, 2.5, 1.25)],
        config={
            "name": "<b>tiny</b>",
            "steps": 4,
            "model": {"layers": 2},
            "optimizer": [{"name": "adamw", "lr": 0.001}],
        },
        environment={"command": ["lfs", "train", "tiny.json"], "git": None, "device": "CPU, 2 threads"},
        samples='## after 4 steps\n\n"Hello," said <script>alert(1)</script> & left.\n',
        problems=(f"{name}: metrics.jsonl: line 9 is not a record, skipped",),
    )


def test_the_page_of_a_run(golden) -> None:
    other = run("2026-11-23-other-ffff", [evaluation(2, 3.0), evaluation(3, 2.6)])
    golden("report.html", run_page(example(), [other]))


def test_nothing_of_a_run_becomes_markup() -> None:
    page = run_page(example())
    assert "<script" not in page
    assert "<b>" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_run_without_losses_has_a_page() -> None:
    assert "no losses were recorded" in run_page(run("empty", []))


def test_a_long_run_makes_a_small_page() -> None:
    long = run("long", [evaluation(number, 2.0 + 1 / number) for number in range(1, 20_000)])
    assert len(run_page(long)) < 60_000
