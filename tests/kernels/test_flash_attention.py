"""The Triton kernel against its reference: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and other tests want Triton as it is. So without a GPU these
tests run in a process of their own, started by `test_kernels_without_a_gpu.py`, or by hand:

    TRITON_INTERPRET=1 pytest tests/kernels
"""

import os
from collections.abc import Callable
from itertools import product

import pytest
import torch
from close import assert_as_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lfs_cli.kernels.flash_attention as module
from lfs_cli.kernels.flash_attention import (
    TILES,
    FlashAttention,
    Tile,
    flash_attention,
    flash_attention_reference,
    unavailable_reason,
)

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels_without_a_gpu.py in a process of its own", allow_module_level=True)

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [  # B, T, S, H, G, D, causal
    (1, 2, 2, 1, 1, 16, True),
    (2, 64, 64, 1, 1, 32, True),  # whole tiles
    (1, 64, 65, 1, 1, 16, True),  # the last key is alone in its tile
    (1, 71, 71, 3, 1, 24, True),  # a prime, one key head for all, a head dimension that is padded
    (1, 1, 77, 4, 2, 16, True),  # decoding: one query on a cache
    (2, 5, 36, 2, 1, 16, True),  # a few queries on a cache
    (1, 33, 97, 1, 1, 80, True),
    (1, 50, 50, 2, 1, 16, False),
    (2, 67, 13, 2, 2, 16, False),  # more queries than keys
    (1, 40, 72, 1, 1, 128, False),
]


def draw(shape: tuple, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values for B, T, S, H, G, D, and the gradient of the output."""
    B, T, S, H, G, D = shape[:6]
    generator = torch.Generator().manual_seed(seed)
    sizes = (B, T, H, D), (B, S, G, D), (B, S, G, D), (B, T, H, D)
    *inputs, do = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    return inputs, do


def run(function: Callable, inputs: list[Tensor], do: Tensor, dtype: torch.dtype | None = None, **how) -> list[Tensor]:
    """The output and the three gradients."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    o = function(*leaves, **how)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def assert_matches_reference(inputs: list[Tensor], do: Tensor, **how) -> None:
    ours = run(flash_attention, inputs, do, **how)
    plain = run(flash_attention_reference, inputs, do, **how)
    exact = run(flash_attention_reference, inputs, do, torch.float64, **how)
    for result in zip(ours, plain, exact, strict=True):
        assert_as_accurate(*result, factor=3)  # gradients are sums over tiles: their order is not the reference's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_match_reference(shape: tuple, dtype: torch.dtype, device: str, poisoned: None) -> None:
    assert_matches_reference(*draw(shape, dtype, device), causal=shape[6])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 40),
    cached=st.integers(0, 40),
    G=st.integers(1, 2),
    group=st.integers(1, 3),
    D=st.integers(1, 33),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_small_shape_matches_reference(
    T: int, cached: int, G: int, group: int, D: int, causal: bool, seed: int, device: str
) -> None:
    inputs, do = draw((1, T, T + cached, G * group, G, D), torch.float32, device, seed)
    expected = run(flash_attention_reference, inputs, do, torch.float64, causal=causal)
    for ours, exact in zip(run(flash_attention, inputs, do, causal=causal), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_one_query_of_one_key_is_its_value(causal: bool, device: str, poisoned: None) -> None:
    inputs, do = draw((1, 1, 1, 1, 1, 16), torch.float32, device)
    o, dq, dk, dv = run(flash_attention, inputs, do, causal=causal)
    assert torch.equal(o, inputs[2])
    assert torch.equal(dv, do)
    torch.testing.assert_close(torch.stack([dq, dk]), torch.zeros(2, *dq.shape, device=device), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tile", [Tile(128, 64, 4, 2), Tile(32, 64, 4, 2), Tile(16, 16, 4, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_every_proportion_of_tiles_matches_reference(
    tile: Tile, causal: bool, device: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setattr(module, "_tile", lambda kernel, q_BTHD: tile)
    assert_matches_reference(*draw((1, 70, 100, 1, 1, 16), torch.float32, device), causal=causal)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_the_scale_can_be_chosen(scale: float, device: str) -> None:
    assert_matches_reference(*draw((1, 20, 20, 1, 1, 16), torch.float32, device), scale=scale)


def test_large_scores_do_not_overflow(device: str) -> None:
    (q, k, v), do = draw((1, 50, 50, 1, 1, 16), torch.float32, device)
    inputs = [q * 100, k * 100, v]
    expected = run(flash_attention_reference, inputs, do, torch.float64)
    for ours, exact in zip(run(flash_attention, inputs, do), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_saved_normalizer_is_the_natural_log_sum_exp(device: str, poisoned: None) -> None:
    (q, k, v), _ = draw((2, 37, 53, 4, 2, 16), torch.float32, device)
    _, L_BHT = torch.ops.lfs.flash_attention(q, k, v, False, 0.25)
    score_BHTS = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(2, dim=2)) * 0.25
    torch.testing.assert_close(L_BHT, score_BHTS.logsumexp(-1).float())


def test_memory_around_the_inputs_is_never_used(device: str) -> None:
    inputs, do = draw((1, 37, 53, 2, 1, 24), torch.float32, device)
    surrounded = []
    for x in inputs:
        B, rows, heads, D = x.shape
        room = torch.full((B, rows + 9, heads + 1, D + 16), float("nan"), device=device)
        room[:, 4:-5, :-1, 8:-8] = x
        surrounded.append(room[:, 4:-5, :-1, 8:-8])
    assert not any(x.is_contiguous() for x in surrounded)
    for alone, inside in zip(run(flash_attention, inputs, do), run(flash_attention, surrounded, do), strict=True):
        torch.testing.assert_close(inside, alone, rtol=0, atol=0)


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "positions first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda x: x.mT.contiguous().mT,  # its last dimension is not contiguous: copied
        "packed": lambda x: torch.stack([x, x], dim=2)[:, :, 1],
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_layout_gives_the_same_bits(layout: str, device: str) -> None:
    inputs, do = draw((2, 19, 35, 2, 1, 16), torch.float32, device)
    moved = [layouts()[layout](x) for x in inputs]
    expected = run(flash_attention, inputs, do)
    for result, plain in zip(run(flash_attention, moved, layouts()[layout](do)), expected, strict=True):
        torch.testing.assert_close(result, plain, rtol=0, atol=0)


def test_only_rows_too_far_apart_for_32_bits_are_copied() -> None:
    near = torch.empty(2, 8, 4, 3, 16, device="meta")[:, :, :, 1]
    far = torch.empty_strided((2, 8, 4, 16), (64, 2**23 + 16, 16, 1), device="meta")
    assert module._readable(near) is near
    assert module._readable(far).is_contiguous()


def test_the_gradient_of_a_sum_has_no_memory_of_its_own(device: str) -> None:
    (q, k, v), _ = draw((1, 19, 19, 2, 2, 16), torch.float32, device)
    expanded = torch.ones((), device=device).expand(q.shape)
    for ours, plain in zip(
        run(flash_attention, [q, k, v], expanded), run(flash_attention_reference, [q, k, v], expanded), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_equal_runs_are_equal_to_the_bit(device: str) -> None:
    inputs, do = draw((1, 40, 40, 2, 1, 16), torch.float32, device)
    for first, second in zip(run(flash_attention, inputs, do), run(flash_attention, inputs, do), strict=True):
        assert torch.equal(first, second)


def test_the_past_does_not_see_the_future(device: str) -> None:
    (q, k, v), _ = draw((1, 70, 70, 2, 2, 16), torch.float32, device)
    before = flash_attention(q, k, v)
    k[:, 40:], v[:, 40:] = 1e3, -1e3
    torch.testing.assert_close(flash_attention(q, k, v)[:, :40], before[:, :40], rtol=0, atol=0)


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 3), (2, 0, 0)])
def test_nothing_in_gives_nothing_out(B: int, T: int, S: int, device: str, poisoned: None) -> None:
    inputs, do = draw((B, T, S, 2, 1, 16), torch.float32, device)
    o, dq, dk, dv = run(flash_attention, inputs, do)
    assert o.shape == dq.shape == (B, T, 2, 16)
    assert torch.equal(dk, torch.zeros_like(dk))
    assert torch.equal(dv, torch.zeros_like(dv))


REFUSALS = [  # shapes of q, k and v, options, what the message says
    ((2, 3, 16), (2, 3, 16), (2, 3, 16), {}, "expected q"),
    ((2, 3, 1, 16), (2, 3, 1, 16), (2, 4, 1, 16), {}, "expected q"),
    ((2, 3, 1, 16), (1, 3, 1, 16), (1, 3, 1, 16), {}, "differ in batch or head dimension"),
    ((2, 3, 1, 16), (2, 3, 1, 8), (2, 3, 1, 8), {}, "differ in batch or head dimension"),
    ((2, 3, 4, 16), (2, 3, 3, 16), (2, 3, 3, 16), {}, "4 query heads cannot share 3 key/value heads"),
    ((2, 4, 1, 16), (2, 3, 1, 16), (2, 3, 1, 16), {}, "4 queries need 4 or more keys, got 3"),
    ((2, 4, 1, 16), (2, 0, 1, 16), (2, 0, 1, 16), {"causal": False}, "4 queries need 1 or more keys, got 0"),
    ((2, 3, 1, 16), (2, 3, 1, 16), (2, 3, 1, 16), {"scale": 0.0}, "scale must be above 0"),
    ((2, 3, 1, 300), (2, 3, 1, 300), (2, 3, 1, 300), {}, "head dimension 300 is above 256"),
]


@pytest.mark.parametrize(("q", "k", "v", "options", "message"), REFUSALS)
def test_shapes_that_do_not_fit_are_refused(
    q: tuple, k: tuple, v: tuple, options: dict, message: str, device: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(*(torch.zeros(shape, device=device) for shape in (q, k, v)), **options)


def test_mixed_types_are_refused(device: str) -> None:
    (q, k, v), _ = draw((1, 3, 3, 1, 1, 16), torch.float32, device)
    with pytest.raises(ValueError, match="differ in type"):
        flash_attention(q, k.half(), v)


def test_mixed_devices_are_refused(device: str) -> None:
    (q, k, v), _ = draw((1, 3, 3, 1, 1, 16), torch.float32, device)
    with pytest.raises(ValueError, match="different devices"):
        flash_attention(q, k.to("meta"), v)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 64, None),
        (torch.float16, 256, None),
        (torch.float64, 64, "the type is float64, not float32, bfloat16 or float16"),
        (torch.float32, 257, "head dimension 257 is above 256"),
        (torch.float32, 0, "head dimension 0 is not positive"),
    ],
)
def test_the_reason_names_what_does_not_fit(dtype: torch.dtype, head_dim: int, reason: str | None, device: str) -> None:
    assert unavailable_reason(device, dtype, head_dim) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
def test_the_interpreter_takes_the_cpu_but_not_bfloat16() -> None:
    assert unavailable_reason("cpu", torch.float16, 64) is None
    assert unavailable_reason("cpu", torch.bfloat16, 64) == "Triton's interpreter cannot multiply bfloat16"


def test_every_kernel_type_and_head_dimension_has_its_tiles() -> None:
    assert set(TILES) == set(product(("forward", "dq", "dkdv"), (2, 4), (32, 64, 128, 256)))


def test_torch_compile_sees_one_whole_graph(device: str) -> None:
    inputs, do = draw((1, 21, 40, 2, 1, 16), torch.float32, device)
    compiled = torch.compile(lambda q, k, v: flash_attention(2 * q, k, v).sin(), fullgraph=True, backend="aot_eager")
    expected = run(lambda q, k, v: flash_attention_reference(2 * q, k, v).sin(), inputs, do)
    for ours, plain in zip(run(compiled, inputs, do), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_the_operation_keeps_the_promises_of_custom_operations(device: str) -> None:
    (q, k, v), _ = draw((1, 21, 21, 2, 1, 16), torch.float32, device)
    torch.library.opcheck(torch.ops.lfs.flash_attention.default, (q.requires_grad_(), k, v.requires_grad_(), True, 0.3))


def test_only_needed_gradients_come_back(device: str) -> None:
    (q, k, v), _ = draw((1, 21, 21, 2, 2, 16), torch.float32, device)
    flash_attention(q.requires_grad_(), k, v).sum().backward()
    assert q.grad is not None
    assert k.grad is None


def test_checkpointing_gives_the_same_gradients(device: str) -> None:
    inputs, do = draw((1, 21, 21, 2, 2, 16), torch.float32, device)
    recomputed = run(lambda *qkv: checkpoint(flash_attention, *qkv, use_reentrant=False), inputs, do)
    for ours, plain in zip(recomputed, run(flash_attention, inputs, do), strict=True):
        assert torch.equal(ours, plain)


def test_autocast_decides_the_type(device: str) -> None:
    (q, k, v), _ = draw((1, 21, 21, 2, 2, 16), torch.float32, device)
    with torch.autocast(device, dtype=torch.float16):
        mixed = flash_attention(q, k.half(), v)
    assert mixed.dtype == torch.float16
    assert torch.equal(mixed, flash_attention(q.half(), k.half(), v.half()))


@pytest.mark.parametrize("causal", [True, False])
def test_the_interface_of_cs336(causal: bool, device: str) -> None:
    (q, k, v), do = draw((2, 40, 40, 1, 1, 16), torch.float32, device)
    flat = [x.squeeze(2).requires_grad_() for x in (q, k, v)]
    o = FlashAttention.apply(*flat, causal)
    saved = [x for x in o.grad_fn.saved_tensors if x.shape == (2, 40)]
    score_BTS = flat[0] @ flat[1].mT / 4
    if causal:
        score_BTS = score_BTS.masked_fill(torch.ones(40, 40, dtype=torch.bool, device=device).triu(1), float("-inf"))
    assert len(saved) == 1
    torch.testing.assert_close(saved[0], score_BTS.logsumexp(-1))
    expected = run(flash_attention_reference, [q, k, v], do, causal=causal)
    ours = [o, *torch.autograd.grad(o, flat, do.squeeze(2))]
    for result, plain in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, plain.squeeze(2), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_every_tile_of_the_table_is_right_on_this_gpu(D: int, dtype: torch.dtype, causal: bool, poisoned: None) -> None:
    assert_matches_reference(*draw((2, 384, 384, 4, 2, D), dtype, "cuda"), causal=causal)
    assert_matches_reference(*draw((1, 301, 333, 2, 2, D), dtype, "cuda"), causal=causal)


@pytest.mark.gpu
def test_more_heads_than_a_grid_has_columns() -> None:
    inputs, do = draw((9000, 4, 4, 8, 8, 16), torch.float16, "cuda")
    assert_matches_reference(inputs, do)


@pytest.mark.gpu
def test_memory_grows_with_the_length_not_with_its_square() -> None:
    inputs, do = draw((1, 32_768, 32_768, 4, 4, 64), torch.bfloat16, "cuda")
    run(flash_attention, inputs, do)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(flash_attention, inputs, do)
    assert torch.cuda.max_memory_allocated() - before < 12 * inputs[0].nbytes


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_pass_two_billion() -> None:
    T, H, D = 300_000, 64, 128  # 2.46e9 numbers in q
    q = torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16)
    k = q[:, :64, :8]
    ours = flash_attention(q, k, k, causal=False)[:, -500:]
    torch.testing.assert_close(ours, flash_attention_reference(q[:, -500:], k, k, causal=False), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    (q, k, v), _ = draw((2, 256, 256, 4, 4, 64), torch.bfloat16, "cuda")
    flash_attention(q, k, v)  # compiles outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = flash_attention(q, k, v)
    q.copy_(q.roll(1, 0))
    graph.replay()
    assert torch.equal(o, flash_attention(q, k, v))


@pytest.mark.gpu
@pytest.mark.slow
def test_inductor_compiles_around_it() -> None:
    inputs, do = draw((2, 256, 256, 4, 2, 64), torch.bfloat16, "cuda")
    compiled = torch.compile(lambda q, k, v: flash_attention(2 * q, k, v).sin(), fullgraph=True)
    expected = run(lambda q, k, v: flash_attention(2 * q, k, v).sin(), inputs, do)
    for ours, plain in zip(run(compiled, inputs, do), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
