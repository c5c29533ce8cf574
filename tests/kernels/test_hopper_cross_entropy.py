"""The cross-entropy kernel for Hopper GPUs where there is none: run by a strict interpreter, and compiled offline."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gluon_interpreter import HazardError, Interpreter, Pointer, value
from test_kernels_without_a_gpu import python

from lfs_cli.kernels import linear_cross_entropy as module

TILE = 1024  # one number of each of the interpreter's threads, eight wide
R = 6
IGNORED = 4  # the row
CASES = [  # V, softcap, z-loss
    (1, None, 0.0),
    (3, 2.0, 0.1),
    (1000, None, 0.0),
    (1024, None, 0.0),
    (1025, 5.0, 0.0),
    (5001, None, 0.3),
    (5001, 3.0, 0.3),
    (8 * TILE, None, 0.0),
    (50_257, None, 1e-4),
    (50_257, 15.0, 1e-4),
]


def draw(V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits up to their stride, with NaN behind the vocabulary; targets; which rows count."""
    generator = np.random.default_rng(V)
    logits = np.full((R, -(-V // 64) * 64), np.nan, np.float16)
    logits[:, :V] = 3 * generator.standard_normal((R, V))
    targets = generator.integers(V, size=R)
    targets[:2] = 0, V - 1
    return logits, targets, np.arange(R) != IGNORED


def exact(
    logits: np.ndarray, targets: np.ndarray, counts: np.ndarray, softcap: float | None, z_loss: float
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and da by the definition, in float64."""
    a = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    z = a if softcap is None else softcap * torch.tanh(a / softcap)
    s = z.logsumexp(-1)
    losses = (s - z[torch.arange(R), torch.tensor(targets)] + z_loss * s.square()).where(torch.tensor(counts), 0.0)
    (da,) = torch.autograd.grad(losses.sum(), a)
    return losses.detach().numpy(), da.numpy()


def run(
    logits: np.ndarray,
    targets: np.ndarray,
    counts: np.ndarray,
    V: int,
    softcap: float | None = None,
    z_loss: float = 0.0,
    *,
    writes_gradient: bool = True,
    tile: int = TILE,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses, and what lies where the logits were."""
    da, losses = logits.copy(), np.full(R, np.nan, np.float32)
    Interpreter("hopper_cross_entropy").launch(
        "_loss_and_gradient",
        R,
        *map(Pointer, (da, targets, counts, losses)),
        value(logits.shape[1]),
        value(V),
        None if softcap is None else np.float32(softcap),
        np.float32(z_loss),
        TILE=tile,
        TILES=-(-V // tile),
        WRITES_GRADIENT=writes_gradient,
    )
    return losses, da


@pytest.mark.parametrize("tile", [TILE, 4 * TILE])
@pytest.mark.parametrize(("V", "softcap", "z_loss"), CASES)
def test_losses_and_gradients_match_the_definition(V: int, softcap: float | None, z_loss: float, tile: int) -> None:
    drawn = draw(V)
    losses, da = run(*drawn, V, softcap, z_loss, tile=tile)
    true_losses, true_da = exact(drawn[0][:, :V], *drawn[1:], softcap, z_loss)
    np.testing.assert_allclose(losses, true_losses, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(da[:, :V], true_da, rtol=1e-3, atol=1e-7)  # rounded to float16, which has subnormals
    assert losses[IGNORED] == 0
    assert not da[IGNORED, :V].any()


def test_large_logits_and_some_that_are_minus_infinity() -> None:
    V = 3 * TILE + 5
    logits, *rest = draw(V)
    logits *= 1000
    logits[:, : TILE + 8] = -np.inf  # all that some threads see at first
    rest[0][:] = V - 1
    losses, da = run(logits, *rest, V)
    true_losses, true_da = exact(logits[:, :V], *rest, None, 0.0)
    np.testing.assert_allclose(losses, true_losses, rtol=1e-5)
    np.testing.assert_allclose(da[:, :V], true_da, rtol=3e-3, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 5001, 5050])
def test_an_unknown_target_makes_the_loss_not_a_number(target: int) -> None:
    logits, targets, counts = draw(5001)
    targets[2] = target
    losses, _ = run(logits, targets, counts, 5001)
    assert np.isnan(losses).tolist() == [row == 2 for row in range(R)]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_without_a_gradient_logits_stay_and_losses_are_the_same(softcap: float | None) -> None:
    drawn = draw(5001)
    losses, logits = run(*drawn, 5001, softcap, 0.1, writes_gradient=False)
    np.testing.assert_array_equal(logits, drawn[0])
    np.testing.assert_array_equal(losses, run(*drawn, 5001, softcap, 0.1)[0])


BREAKS = {  # how the kernel could be broken
    "one group is not waited for": ("wait_for_copies(GROUPS - 1 - group)", "wait_for_copies(GROUPS - group)"),
    "nothing is waited for": ("        wait_for_copies(GROUPS - 1 - group)\n", ""),
    "the last tile is not committed": (
        "        commit_copies()\n",
        "        if group < GROUPS - 1:\n" + 12 * " " + "commit_copies()\n",
    ),
    "the last tile has no mask": ("gl.where(v_last < V, z, MINUS_INFINITY)", "z"),
    "sums are not corrected": ("l * gl.exp2((m - shift) * LOG2_E)", "l"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_interpreter_notices_a_broken_kernel(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, broken = BREAKS[name]
    source = Path(module.__file__).with_name("hopper_cross_entropy.py").read_text()
    assert whole in source
    (tmp_path / "hopper_cross_entropy.py").write_text(source.replace(whole, broken, 1))
    monkeypatch.setattr("gluon_interpreter.KERNELS", tmp_path)
    drawn = draw(5001)
    try:
        losses, da = run(*drawn, 5001, 3.0)
    except HazardError:
        return
    true_losses, true_da = exact(drawn[0][:, :5001], *drawn[1:], 3.0, 0.0)
    is_right = np.allclose(losses, true_losses, rtol=1e-5) and np.allclose(da[:, :5001], true_da, rtol=1e-3, atol=1e-7)
    assert not is_right


def launch(*tensors: Any, writes_gradient: bool) -> None:
    """Do what the kernels do, in PyTorch."""
    logits, targets, counts, losses, softcap, z_loss = tensors
    assert writes_gradient
    a = logits.double().requires_grad_()
    z = a if softcap is None else softcap * torch.tanh(a / softcap)
    s = z.logsumexp(-1)
    true_losses = (s - z.gather(-1, targets[:, None])[:, 0] + z_loss * s.square()).where(counts, 0)
    with torch.enable_grad():
        (da,) = torch.autograd.grad(true_losses.sum(), a)
    losses.copy_(true_losses.detach())
    logits.copy_(da)


def launch_one_tile_wrong(logits: torch.Tensor, *tensors: Any, **how: Any) -> None:
    launch(logits, *tensors, **how)
    logits[:, 4096:8192] *= 1.5


def launch_wrong_beside_targets(logits: torch.Tensor, targets: torch.Tensor, *others: Any, **how: Any) -> None:
    launch(logits, targets, *others, **how)
    target_da = logits.gather(1, targets[:, None])
    logits.mul_(1.1).scatter_(1, targets[:, None], target_da)


def launch_broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("PassManager::run failed\nmore")


def choose(monkeypatch: pytest.MonkeyPatch, kernel: Any, V: int = 20_001, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What is launched on a Hopper GPU whose kernel is this one."""
    monkeypatch.setattr(module, "_launch", launch)
    monkeypatch.setattr(module, "_is_usable", lambda *_: True)
    monkeypatch.setattr(module, "no_hopper_reason", lambda _: None)
    fake = SimpleNamespace(loss_and_gradient=kernel)
    monkeypatch.setitem(sys.modules, "lfs_cli.kernels.hopper_cross_entropy", fake)
    return [module._launcher(torch.device("cpu"), dtype, V, is_capped) for is_capped in (False, True)]


@pytest.mark.usefixtures("forgets_checks")
def test_a_right_kernel_is_taken_for_vocabularies_in_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*tensors: Any, **how: Any) -> None:
        launch(*tensors, **how)

    assert choose(monkeypatch, kernel) == [kernel] * 2
    assert choose(monkeypatch, kernel, V=module.HOPPER_VOCABULARIES[False].stop) == [launch] * 2
    assert choose(monkeypatch, kernel, V=module.HOPPER_VOCABULARIES[False].start - 1) == [launch] * 2
    assert choose(monkeypatch, kernel, dtype=torch.float32) == [launch] * 2


@pytest.mark.usefixtures("forgets_checks")
@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (launch_one_tile_wrong, "it is off by .*, 0.2"),
        (launch_wrong_beside_targets, "it is off by .*, 0.1,"),
        (launch_broken, "RuntimeError: PassManager::run failed"),
    ],
)
def test_a_kernel_that_fails_its_self_check_is_not_taken(
    kernel: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(RuntimeWarning, match=f"Hopper cross-entropy kernel .* is not used: {problem}") as caught:
        assert choose(monkeypatch, kernel) == [launch] * 2
    assert len(caught) == 2
    assert choose(monkeypatch, kernel) == [launch] * 2  # without another warning, which would be an error


def test_without_a_hopper_gpu_it_is_not_asked_for() -> None:
    has_kernel = module.unavailable_reason("cpu", torch.float16) is None
    assert module._launcher(torch.device("cpu"), torch.float16, 20_001, False) is (
        module._launch if has_kernel else None
    )


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    script = str(Path(__file__).with_name("compile_cross_entropy_offline.py"))
    return [json.loads(line) for line in python(script).splitlines()]


def test_the_compiler_spills_nothing_and_rows_fit(reports: list[dict[str, Any]]) -> None:
    assert len(reports) == 9
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["registers"] <= 128, report  # 65,536 of a processor, for two programs
        # 228 KB of a processor, of which each program takes 1 KB more
        assert report["shared"] <= (115_712 if report["V"] <= 57_344 else 232_448), report


def test_sixteen_bytes_are_copied_read_and_written_at_once(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["copies"] > 0, report
        assert report["narrow_copies"] == 0, report
        assert report["wide_readings"] > 0, report
        assert report["narrow_stores"] == 1, report  # the loss
        assert (report["wide_stores"] > 0) == report["writes_gradient"], report


def test_a_logit_costs_two_exponentials(reports: list[dict[str, Any]]) -> None:
    """They are the next limit after memory. A thread has n logits of a tile, and one more to correct its sum."""
    for report in reports:
        if not report["capped"]:
            # Code for each group of whole tiles, and for the last tile; and for the gradients of both
            n, sums, gradients = report["logits"], min(4, report["tiles"] - 1) + 1, 2 * report["writes_gradient"]
            assert report["exponentials"] == sums * (n + 1) + 1 + gradients * n, report
