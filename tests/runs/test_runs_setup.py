"""What training decides before its first step."""

from collections.abc import Iterator

import pytest
import torch
from tiny_run import tiny

from lfs_cli.kernels import flash_attention
from lfs_cli.model.attention import _resolve_once
from lfs_cli.runs import setup


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with two kernels, of which the faster has no windows."""

    def hopper(*_: object, window: int | None, **__: object) -> str | None:
        return None if window is None else "it has no windows"

    monkeypatch.setattr(setup, "choose_device", torch.device)
    monkeypatch.setattr(flash_attention, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr("lfs_cli.kernels.triton_attention.unavailable_reason", lambda *_, **__: None)
    monkeypatch.setattr("lfs_cli.kernels.hopper_attention.unavailable_reason", hopper)
    _resolve_once.cache_clear()
    yield
    _resolve_once.cache_clear()


FULL = "hopper kernel; the fastest here"
WINDOWED = "triton kernel; not hopper: it has no windows"


@pytest.mark.parametrize(
    ("pattern", "window", "reason"),
    [
        ("S", None, FULL),
        ("S", 4, WINDOWED),
        ("SSL", 4, f"layers with a window: {WINDOWED}, layers without a window: {FULL}"),
        ("LS", 4, f"layers without a window: {FULL}, layers with a window: {WINDOWED}"),
        ("SSL", 99, FULL),
    ],
)
def test_the_reason_tells_of_layers_with_and_without_a_window(
    gpu: None, pattern: str, window: int | None, reason: str
) -> None:
    changes = {"model__layers": 3, "model__window": window, "model__window_pattern": pattern}
    config = tiny(device="cuda", dtype="bfloat16", **changes)
    assert setup.resolve(config)[2:] == ("flash", reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, f"short kernel, rotation included; without gradients {FULL}"),
        ({"model__qk_norm": True}, f"{FULL}; not short: it has no QK-norm"),
        ({"model__positions": "none"}, FULL),
    ],
    ids=str,
)
def test_the_reason_tells_whether_one_kernel_turns_and_attends(
    gpu: None, monkeypatch: pytest.MonkeyPatch, change: dict, reason: str
) -> None:
    monkeypatch.setattr("lfs_cli.kernels.short_attention.no_hopper_reason_in_trace", lambda _: None)
    sizes = {"model__width": 64, "model__heads": 2, "model__context_length": 128}
    assert setup.resolve(tiny(device="cuda", dtype="bfloat16", **sizes, **change))[2:] == ("flash", reason)


def test_layers_with_and_without_a_window_have_one_reason_where_they_agree() -> None:
    config = tiny(model__layers=2, model__window=4, model__window_pattern="SL")
    assert setup.resolve(config)[2:] == ("standard", "`flash` is for CUDA GPUs, and this is cpu")
