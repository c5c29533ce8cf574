"""Products with something behind them, for Hopper GPUs, where there is none: a strict interpreter, against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gluon_interpreter import DeadlockError, Descriptor, HazardError, Interpreter, Pointer, value

from lfs_cli.kernels import product
from lfs_cli.kernels.rope import reference_qk_norm_rope
from lfs_cli.kernels.swiglu import reference_activation, swiglu_gradient

NEAR = {"atol": 4e-3, "rtol": 4e-3}  # sums are rounded to float16
SHAPES = [
    (128, 64, 128, 1),
    (300, 200, 136, 3),
    (70, 72, 520, 2),
    (400, 128, 384, 5),
    (129, 8, 264, 1),
]  # R, C, F, programs


def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(np.float16)


def launch(
    kernels: Interpreter, kernel: str, programs: int, x: np.ndarray, *arguments, width: int, columns: int, **more
):
    (R, C), across = x.shape, -(-columns // width)
    tiles = -(-R // 128) * across
    sizes = (value(n) for n in (tiles, across, -(-C // 64), R))
    options = {"COLUMNS": columns, "STAGES": product.STAGES, "SUMS": None} | more
    registers = {"REGISTERS": 0, "FINISHER_REGISTERS": 0, "LOADER_REGISTERS": 0}
    kernels.launch(kernel, min(programs, tiles), Descriptor(x, (64, 64)), *arguments, *sizes, **options, **registers)


def gated(x: np.ndarray, matrix: np.ndarray, programs: int, kernels: Interpreter | None = None) -> list[np.ndarray]:
    F = len(matrix) // 2
    gate_up, y = np.full((len(x), 2 * F), np.nan, np.float16), np.full((len(x), F), np.nan, np.float16)
    matrices = (Descriptor(part, (128, 64)) for part in np.split(matrix, 2))
    results = (Descriptor(part, (64, 128)) for part in np.split(gate_up, 2, axis=1))
    kernels = kernels or Interpreter("hopper_swiglu")
    launch(kernels, "forward", programs, x, *matrices, *results, Pointer(y), width=128, columns=F)
    return [gate_up, y]


def gated_backward(
    do: np.ndarray, down: np.ndarray, gate_up: np.ndarray, programs: int, kernels: Interpreter | None = None
) -> list[np.ndarray]:
    found = np.full_like(gate_up, np.nan)
    matrices = (Descriptor(part, (64, 128)) for part in (down, down[:, 128:]))
    arguments = *matrices, Pointer(gate_up), Pointer(found)
    kernels = kernels or Interpreter("hopper_swiglu")
    launch(kernels, "backward", programs, do, *arguments, width=256, columns=down.shape[1])
    return [found]


def turned(
    x: np.ndarray,
    matrix: np.ndarray,
    turn: list[np.ndarray],
    heads: int,
    programs: int,
    kernels: Interpreter | None = None,
) -> list[np.ndarray]:
    y = np.full((len(x), len(matrix)), np.nan, np.float16)
    matrices = (Descriptor(part, (128, 64)) for part in (matrix, matrix[128:]))
    (T, half), N = turn[0].shape, len(matrix)
    arguments = *matrices, Pointer(y), *map(Pointer, turn), value(T), value(2 * heads * half)
    kernels = kernels or Interpreter("hopper_turned")
    launch(kernels, "forward", programs, x, *arguments, width=256, columns=N, D=2 * half)
    return [y]


def wide(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=torch.float64) for x in arrays]


def exact_gated(x: np.ndarray, matrix: np.ndarray) -> list[np.ndarray]:
    x, matrix = wide(x, matrix)
    a = x @ matrix.T
    return [a.numpy(), reference_activation("swiglu", a).numpy()]


def exact_backward(do: np.ndarray, down: np.ndarray, gate_up: np.ndarray) -> list[np.ndarray]:
    do, down, gate_up = wide(do, down, gate_up)
    return [swiglu_gradient(do @ down, gate_up).numpy()]


def exact_turned(x: np.ndarray, matrix: np.ndarray, turn: list[np.ndarray], heads: int) -> list[np.ndarray]:
    x, matrix, cos, sin = wide(x, matrix, *turn)
    a = (x @ matrix.T).view(-1, len(cos), len(matrix) // (2 * cos.shape[1]), 2 * cos.shape[1])
    q, _ = reference_qk_norm_rope(a[:, :, :heads], a[:, :, :0], cos, sin)
    return [torch.cat((q, a[:, :, heads:]), 2).flatten(2).flatten(0, 1).numpy()]


def draw_turn(T: int, D: int) -> list[np.ndarray]:
    angles = 6.3 * np.random.default_rng(0).random((T, D // 2)).astype(np.float32)
    return [np.cos(angles), np.sin(angles)]


def assert_close(ours: list[np.ndarray], right: list[np.ndarray]) -> None:
    for mine, true in zip(ours, right, strict=True):
        np.testing.assert_allclose(mine, true, **NEAR)


@pytest.mark.parametrize(("R", "C", "F", "programs"), SHAPES)
def test_a_product_and_swiglu_match_the_definition(R: int, C: int, F: int, programs: int) -> None:
    x, matrix = draw(R, C), draw(2 * F, C, scale=C**-0.5)
    assert_close(gated(x, matrix, programs), exact_gated(x, matrix))


@pytest.mark.parametrize(("R", "C", "F", "programs"), SHAPES)
def test_its_gradient_matches_the_definition(R: int, C: int, F: int, programs: int) -> None:
    case = draw(R, C), draw(C, F, scale=C**-0.5), draw(R, 2 * F)
    assert_close(gated_backward(*case, programs), exact_backward(*case))


@pytest.mark.parametrize(
    ("R", "C", "T", "D", "heads", "all_heads", "programs"),
    [
        (128, 64, 64, 64, 2, 3, 1),
        (300, 72, 100, 64, 4, 6, 3),
        (260, 128, 130, 128, 2, 3, 2),
        (200, 8, 200, 16, 7, 19, 4),
    ],
)
def test_a_product_that_turns_matches_the_definition(
    R: int, C: int, T: int, D: int, heads: int, all_heads: int, programs: int
) -> None:
    case = draw(R, C), draw(all_heads * D, C, scale=C**-0.5), draw_turn(T, D), heads
    assert_close(turned(*case, programs), exact_turned(*case))


BREAKS = {
    "products are not awaited": ("hopper_product.py", "warpgroup_mma_wait(0,", "warpgroup_mma_wait(2,"),
    "factors are released before they are read": (
        "hopper_product.py",
        "            first = warpgroup_mma(x,",
        "            mbarrier.arrive(work.empty.index(stage), count=1)\n            first = warpgroup_mma(x,",
    ),
    "factors are never released": ("hopper_product.py", "mbarrier.arrive(work.empty.index(stage), count=1)", "pass"),
    "factors are not awaited": (
        "hopper_product.py",
        "mbarrier.wait(work.full.index(stage), phase",
        "(lambda *_: 0)(0, phase",
    ),
    "sums are overwritten before they are read": ("hopper_product.py", "(turn & 1) ^ 1)", "turn & 1 if turn else 1)"),
    "sums are read before they are there": (
        "hopper_product.py",
        "mbarrier.wait(work.ready.index(c), turn & 1)",
        "pass",
    ),
    "sums are never released": ("hopper_product.py", "mbarrier.arrive(work.free.index(c), count=1)", "pass"),
    "the warpgroups change places": ("hopper_product.py", "2 * stage + C)", "2 * stage + 1 - C)"),
    "the second matrix is the first": ("hopper_product.py", "_factor(work, 2 * stage + 1)", "_factor(work, 2 * stage)"),
    "sums are copied without a fence": ("hopper_product.py", "fence_async_shared()", "pass"),
    "sums are released while they are copied": (
        "hopper_swiglu.py",
        "            tma.store_wait(0)",
        "            pass",
    ),
    "y is of the factors": ("hopper_swiglu.py", "x / (1.0 + gl", "u / (1.0 + gl"),
    "a row past the end is written": (
        "hopper_swiglu.py",
        "(row < R - r)[:, None] & (column < F - f_start)",
        "(row >= 0)[:, None] & (column < F - f_start)",
    ),
    "gates of the part before": ("hopper_swiglu.py", "part + 4, R", "part + 3, R"),
    "parts of the next tile are those of this one": (
        "hopper_swiglu.py",
        "_part(x_ptr, next_r, next_f",
        "_part(x_ptr, r, f",
    ),
    "dx without the derivative of its gate": ("hopper_swiglu.py", "x * (1.0 - s)", "0.0 * x"),
    "values are turned": ("hopper_turned.py", "(n + column < TURNED)", "(n + column >= 0)"),
    "half of the queries keep their place": (
        "hopper_turned.py",
        "turns = n_start < TURNED",
        "turns = n_start + 256 < TURNED",
    ),
    "positions go on from one sequence to the next": (
        "hopper_turned.py",
        "((r + pair_row) % T)",
        "gl.minimum(r + pair_row, T - 1)",
    ),
    "a head is turned by the angles of the next": ("hopper_turned.py", "pair % (D // 2)", "(pair + 1) % (D // 2)"),
    "a pair is turned the other way": ("hopper_turned.py", "even * sin + odd * cos", "odd * cos - even * sin"),
}


def is_right(run, right: list[np.ndarray]) -> bool:
    try:
        return all(np.allclose(mine, true, **NEAR) for mine, true in zip(run(), right, strict=True))
    except (DeadlockError, HazardError, IndexError):
        return False


def all_are_right(slowest: int) -> bool:
    """Whether the three kernels are, with this one of their partitions the slowest."""
    x, matrix, down, a = draw(400, 128), draw(272, 128, scale=0.1), draw(128, 264, scale=0.1), draw(400, 528)
    heads, turn = draw(320, 128, scale=0.1), draw_turn(100, 64)
    swiglu, turning = (
        lambda name=name: Interpreter(name, slowest=slowest) for name in ("hopper_swiglu", "hopper_turned")
    )
    return (
        is_right(lambda: gated(x, matrix, 1, swiglu()), exact_gated(x, matrix))
        and is_right(lambda: gated_backward(x, down, a, 1, swiglu()), exact_backward(x, down, a))
        and is_right(lambda: turned(x, heads, turn, 3, 1, turning()), exact_turned(x, heads, turn, 3))
    )


def test_whoever_is_the_slowest() -> None:
    assert all(map(all_are_right, range(4)))


@pytest.mark.parametrize("name", BREAKS)
def test_the_interpreter_notices_a_broken_kernel(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, whole, broken = BREAKS[name]
    folder = Path(product.__file__).parent
    for kernel in folder.glob("hopper_*.py"):
        source = kernel.read_text()
        assert kernel.name != file or whole in source
        (tmp_path / kernel.name).write_text(source.replace(whole, broken) if kernel.name == file else source)
    monkeypatch.setattr("gluon_interpreter.KERNELS", tmp_path)
    assert not all(map(all_are_right, range(4)))
