"""The kernels for short sequences where there is no Hopper GPU: run by a strict interpreter, against float64."""

import numpy as np
import pytest
from gluon_interpreter import Descriptor, Interpreter, Pointer, value
from test_hopper_kernels import WIDE, draw, draw_turn, exact, turned

LOG2_E = 1.4426950408889634
D = 32
SHAPES = [(1, 256, 2), (2, 128, 3), (1, 200, 5), (1, 130, 1), (1, 65, 3)]  # B, T, H


def describe(x: np.ndarray) -> Descriptor:
    return Descriptor(x, (1, 64, 1, D))


def forward(q, k, v, turn, kernels=None):
    B, T, H, _ = q.shape
    o, L = np.full_like(q, np.nan), np.full((B, H, T), np.nan, np.float32)
    (kernels or Interpreter("hopper_short")).launch(
        "forward",
        B * H,
        *(describe(x) for x in (q, k, v, o)),
        Pointer(L),
        *map(Pointer, turn),
        *(value(n) for n in (T, H)),
        np.float32(D**-0.5 * LOG2_E),
        D=D,
        BLOCKS=-(-T // 64),
        PAIRS=None,
    )
    return o, L


def backward(q, k, v, o, L, do, turn, kernels=None):
    B, T, H, _ = q.shape
    gradients = [np.full_like(q, np.nan) for _ in range(3)]
    (kernels or Interpreter("hopper_short")).launch(
        "backward",
        B * H,
        *(describe(x) for x in (q, k, v, do, *gradients)),
        *map(Pointer, (o, do, L)),
        *map(Pointer, turn),
        *(value(n) for n in (T, H)),
        np.float32(D**-0.5 * LOG2_E),
        np.float32(D**-0.5),
        D=D,
        BLOCKS=-(-T // 64),
        PAIRS=None,
        READ=None,
    )
    return gradients


@pytest.mark.parametrize(("B", "T", "H"), SHAPES)
def test_a_whole_head_matches_the_definition(B: int, T: int, H: int) -> None:
    q, k, v, do = draw(B, T, T, H, H, D)
    turn = draw_turn(T, D)
    q_turned, k_turned = (turned(x, *turn).astype(np.float16) for x in (q, k))
    o, L, dq, dk, dv = exact(q_turned, k_turned, v, do, True)
    dq, dk = (turned(x, turn[0], -turn[1]) for x in (dq, dk))
    ours = forward(q, k, v, turn)
    np.testing.assert_allclose(ours[0], o, **WIDE)
    np.testing.assert_allclose(ours[1], L, atol=1e-3)
    found = backward(q, k, v, o.astype(np.float16), L.astype(np.float32), do, turn)
    for name, x, y in zip(("dq", "dk", "dv"), found, (dq, dk, dv), strict=True):
        np.testing.assert_allclose(x, y, atol=6e-3, rtol=6e-3, err_msg=name)
