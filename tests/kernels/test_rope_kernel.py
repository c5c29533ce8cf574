"""QK-norm and RoPE against float64: PyTorch's steps, and the kernels in Triton's interpreter."""

from typing import Any

import pytest
import torch
from fused_cases import DTYPES, HAS_KERNELS, assert_near, differentiate, randn, stand_in
from torch import Tensor

from lfs_cli.kernels import rope as module
from lfs_cli.kernels.rope import qk_norm_rope, reference_qk_norm_rope
from lfs_cli.model.rope import RotaryEmbedding

SHAPES = [  # B, T, H, G, D
    (1, 1, 1, 1, 2),
    (2, 5, 3, 1, 8),
    (1, 37, 4, 2, 64),
    (3, 33, 2, 2, 16),
    (1, 3, 1, 1, 24),  # no power of two: PyTorch's steps
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    B, T, H, G, D = shape
    rope = RotaryEmbedding(10_000.0, D, T + 3)
    heads = [randn(B, T, n, D, dtype=dtype, device=device, seed=n) for n in (H, G)]
    weights = [randn(D, dtype=torch.float32, device=device, seed=seed) for seed in (3, 4)]
    return [*heads, *weights], (rope.cos[3:].to(device), rope.sin[3:].to(device))


def run(function: Any, inputs: list[Tensor], angles: tuple[Tensor, Tensor], *, norm: bool) -> list[Tensor]:
    if not norm:
        return differentiate(lambda q, k: function(q, k, *angles), inputs[:2])
    return differentiate(lambda q, k, q_weight, k_weight: function(q, k, *angles, q_weight, k_weight), inputs)


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm and rope"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_and_gradients_match_float64(shape, dtype, norm, device, poisoned) -> None:
    inputs, angles = draw(shape, dtype, device)

    ours = run(qk_norm_rope, inputs, angles, norm=norm)
    exact = run(reference_qk_norm_rope, [x.double() for x in inputs], tuple(x.double() for x in angles), norm=norm)

    assert {x.dtype for x in ours[:4]} == {dtype}
    assert_near(ours, exact, 8)


def test_the_rotation_is_that_of_the_model(device) -> None:
    inputs, angles = draw((2, 5, 3, 1, 8), torch.float32, device)
    rope = RotaryEmbedding(10_000.0, 8, 8).to(device)

    q, k = qk_norm_rope(*inputs[:2], *angles)

    for ours, head in ((q, inputs[0]), (k, inputs[1])):
        torch.testing.assert_close(ours, rope(head.transpose(1, 2), start=3).transpose(1, 2))


def test_heads_are_read_where_they_lie(device) -> None:
    _, angles = draw((2, 9, 3, 1, 8), torch.float32, device)
    packed = randn(2, 9, 5, 8, dtype=torch.float32, device=device)
    weights = [torch.ones(8, device=device)] * 2

    def turn(packed: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(packed[:, :, :3], packed[:, :, 3:4], *angles, *weights)

    ours = differentiate(turn, [packed])
    q, k, dq, dk = run(
        qk_norm_rope, [packed[:, :, :3].clone(), packed[:, :, 3:4].clone(), *weights], angles, norm=True
    )[:4]

    for mine, right in zip(ours, (q, k, torch.cat((dq, dk, torch.zeros_like(dk)), 2)), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("T", [1, 5])
def test_heads_that_come_first_are_turned_too(T, device) -> None:
    inputs, angles = draw((2, T, 3, 1, 8), torch.float32, device)
    q, k = (
        torch.empty(2, n, T, 8, device=device).transpose(1, 2).copy_(x) for n, x in ((3, inputs[0]), (1, inputs[1]))
    )
    assert all(map(torch.equal, qk_norm_rope(q, k, *angles), qk_norm_rope(*inputs[:2], *angles)))


@pytest.mark.skipif(not HAS_KERNELS, reason="the operations")
@pytest.mark.parametrize("norm", [False, True])
def test_the_operations_keep_the_rules_of_torch(norm, device) -> None:
    (q, k, *weights), angles = draw((2, 5, 3, 1, 8), torch.float32, device)
    weights, saved = (weights, (q, k)) if norm else ((None, None), (None, None))
    torch.library.opcheck(torch.ops.lfs.qk_norm_rope.default, (q, k, *angles, *weights, 1e-5))
    torch.library.opcheck(torch.ops.lfs.qk_norm_rope_backward.default, (q, k, *saved, *angles, *weights, 1e-5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(1, 3, 1, 4)}, "expected q"),
        ({"k": torch.ones(1, 2, 1, 6)}, "of one even number"),
        ({"k": torch.ones(1, 2, 1, 4, dtype=torch.float16)}, "differ in type"),
        ({"cos": torch.ones(3, 2)}, "expected cos and sin"),
        ({"q_weight": torch.ones(4)}, "given together"),
        ({"q_weight": torch.ones(4), "k_weight": torch.ones(3)}, "expected weights"),
    ],
)
def test_what_cannot_work_is_refused(change, message) -> None:
    good = {"q": torch.ones(1, 2, 2, 4), "k": torch.ones(1, 2, 1, 4), "cos": torch.ones(2, 2), "sin": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*{**good, **change}.values())


def test_what_has_no_kernel_says_so() -> None:
    x = torch.ones(1, 1, 1, 24)
    assert (module.unavailable(x, x) or "").startswith("it needs a power of two")


def spoil(step: str, which: int) -> tuple[str, Any]:
    """Let a kernel get one of its results wrong."""
    definition = {"forward": reference_qk_norm_rope, "backward": module._reference_backward}[step]

    def launch(*inputs: Any) -> tuple[Tensor, ...]:
        results = definition(*inputs)
        return tuple(1.001 * x if number == which else x for number, x in enumerate(results))

    return f"_launch_{step}", launch


BROKEN = {
    "queries": spoil("forward", 0),
    "keys": spoil("forward", 1),
    "gradients of queries": spoil("backward", 0),
    "gradients of keys": spoil("backward", 1),
    "gradients of weights": spoil("backward", 2),
    "no kernel": ("_launch_forward", lambda *_: [][0]),
}


@pytest.mark.parametrize("is_compiled", [False, True], ids=["as written", "compiled"])
@pytest.mark.parametrize("fault", BROKEN)
def test_kernels_that_fail_their_check_are_passed_over_with_a_warning(
    fault: str, is_compiled: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(module, monkeypatch, forward=reference_qk_norm_rope)
    monkeypatch.setattr(module, *BROKEN[fault])
    torch._dynamo.reset()
    function = torch.compile(qk_norm_rope, backend="aot_eager") if is_compiled else qk_norm_rope
    inputs, angles = draw((2, 5, 3, 1, 8), torch.float32, device)

    with pytest.warns(RuntimeWarning, match=f"the rotation kernel fails its self-check on {device}.* and is not used"):
        ours = run(function, inputs, angles, norm=True)

    wide = [x.double() for x in inputs], tuple(x.double() for x in angles)
    assert_near(ours, run(reference_qk_norm_rope, *wide, norm=True))
    run(function, inputs, angles, norm=True)  # without another warning, which would be an error


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm and rope"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [2, 64])
def test_kernels_that_are_right_are_used_without_a_word(
    D: int, dtype: torch.dtype, norm: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = stand_in(module, monkeypatch, forward=reference_qk_norm_rope)
    inputs, angles = draw((1, 3, 2, 1, D), dtype, device)
    run(qk_norm_rope, inputs, angles, norm=norm)
    assert launched == ["forward", "backward"] * 2  # the check, then the call


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm and rope"])
def test_heads_without_a_kernel_that_is_right_are_turned_by_the_definition(
    norm: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(module, monkeypatch, forward=reference_qk_norm_rope)
    monkeypatch.setattr(module, "is_trusted", lambda *_, **__: False)
    inputs, angles = draw((2, 5, 3, 1, 8), torch.float32, device)
    wide = [x.double() for x in inputs], tuple(x.double() for x in angles)
    assert_near(run(qk_norm_rope, inputs, angles, norm=norm), run(reference_qk_norm_rope, *wide, norm=norm))
