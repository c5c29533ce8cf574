"""The portable kernels against the definition: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and other tests want Triton as it is. So without a GPU these
tests run in a process of their own, started by `test_kernels_without_a_gpu.py`, or by hand:

    TRITON_INTERPRET=1 pytest tests/kernels
"""

import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from attention_cases import assert_matches_reference, draw, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lfs_cli.kernels.triton_attention as kernels
from lfs_cli.kernels.flash_attention import flash_attention, unavailable_reason
from lfs_cli.kernels.reference_attention import reference_attention
from lfs_cli.kernels.triton_attention import TILES, TILES_WITH_MORE, Tile, tile_for

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels_without_a_gpu.py in a process of its own", allow_module_level=True)

attend = partial(flash_attention, implementation="triton")
assert_right = partial(assert_matches_reference, implementation="triton")

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [  # B, T, S, H, G, D, causal
    (1, 2, 2, 1, 1, 16, True),
    (2, 64, 64, 1, 1, 32, True),  # whole tiles
    (1, 64, 65, 1, 1, 16, True),  # the last key is alone in its tile
    (1, 71, 71, 3, 1, 24, True),  # a prime, one key head for all, a head dimension that is padded
    (1, 1, 77, 4, 2, 16, True),  # decoding: one query on a cache
    (2, 5, 36, 2, 1, 16, True),  # a few queries on a cache
    (1, 33, 97, 1, 1, 80, True),
    (1, 80, 37, 2, 1, 16, True),  # the first queries see nothing
    (1, 50, 50, 2, 1, 16, False),
    (2, 67, 13, 2, 2, 16, False),  # more queries than keys
    (1, 40, 72, 1, 1, 128, False),
]
MASKS = [  # B, T, S, H, G, D and options
    ((1, 100, 100, 2, 1, 16), {"window": 2}),
    ((1, 100, 100, 2, 1, 16), {"window": 33}),
    ((1, 70, 131, 2, 2, 16), {"window": 40}),  # a window that slides over a cache
    ((1, 131, 70, 1, 1, 16), {"window": 9, "causal": False}),  # the first queries are too far from any key
    ((1, 90, 90, 2, 1, 24), {"window": 17, "causal": False}),
    ((1, 70, 70, 1, 1, 16), {"window": 1000}),  # sees all
    ((1, 70, 90, 2, 1, 16), {"softcap": 1.5}),
    ((1, 70, 90, 2, 1, 16), {"softcap": 30.0, "causal": False}),
    ((2, 70, 70, 2, 1, 16), {"documents": (0, 20, 20, 71, 96, 140)}),  # one is empty, one passes the end of a row
    ((2, 70, 70, 2, 1, 16), {"documents": (0, 64, 70, 140), "causal": False}),
    ((1, 100, 100, 1, 1, 16), {"documents": (5, 40, 61, 61, 61)}),  # positions that belong to none, at both ends
    ((1, 100, 100, 1, 1, 16), {"documents": (0,)}),  # no documents at all
    ((2, 66, 66, 2, 1, 16), {"window": 20, "softcap": 2.0, "documents": (0, 33, 100, 131)}),
    ((2, 66, 66, 2, 1, 16), {"window": 20, "softcap": 2.0, "documents": (0, 33, 100, 131), "causal": False}),
]


def with_documents(how: dict[str, Any], device: str) -> dict[str, Any]:
    """The options, with documents as a tensor."""
    return how | ({"documents": torch.tensor(how["documents"], device=device)} if how.get("documents") else {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_match_reference(shape: tuple, dtype: torch.dtype, device: str, poisoned: None) -> None:
    assert_right(*draw(shape, dtype, device), causal=shape[6])


@pytest.mark.parametrize(("shape", "how"), MASKS, ids=str)
def test_every_mask_and_cap_matches_reference(shape: tuple, how: dict[str, Any], device: str, poisoned: None) -> None:
    assert_right(*draw(shape, torch.float32, device), **with_documents(how, device))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_all_masks_at_once_in_half_precision(dtype: torch.dtype, device: str, poisoned: None) -> None:
    how = with_documents({"window": 20, "softcap": 2.0, "documents": (0, 33, 60, 75)}, device)
    assert_right(*draw((1, 75, 75, 2, 1, 24), dtype, device), **how)


@st.composite
def problems(draw_from: st.DrawFn) -> tuple[tuple, dict[str, Any]]:
    """Any small shape with any options that go with it."""
    T, S, G = draw_from(st.integers(1, 75)), draw_from(st.integers(0, 75)), draw_from(st.integers(1, 2))
    group, D = draw_from(st.integers(1, 2)), draw_from(st.integers(1, 33))
    how = {
        "causal": draw_from(st.booleans()),
        "window": draw_from(st.none() | st.integers(1, 80)),
        "softcap": draw_from(st.none() | st.floats(0.5, 50)),
        "scale": draw_from(st.none() | st.floats(0.01, 1)),
    }
    borders = draw_from(st.none() | st.lists(st.integers(0, 2 * T), min_size=1, max_size=6).map(sorted))
    if borders is not None:
        return (2, T, T, G, 1, D), how | {"documents": tuple(borders)}
    return (1, T, S, G * group, G, D), how


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(), seed=st.integers(0, 99))
def test_any_small_problem_matches_reference(problem: tuple[tuple, dict], seed: int, device: str) -> None:
    shape, how = problem[0], with_documents(problem[1], device)
    inputs, do = draw(shape, torch.float32, device, seed)
    expected = run(reference_attention, inputs, do, torch.float64, **how)
    for ours, exact in zip(run(attend, inputs, do, **how), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_one_query_of_one_key_is_its_value(causal: bool, device: str, poisoned: None) -> None:
    inputs, do = draw((1, 1, 1, 1, 1, 16), torch.float32, device)
    o, dq, dk, dv = run(attend, inputs, do, causal=causal)
    assert torch.equal(o, inputs[2])
    assert torch.equal(dv, do)
    torch.testing.assert_close(torch.stack([dq, dk]), torch.zeros(2, *dq.shape, device=device), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tile", [Tile(128, 64, 4, 2), Tile(32, 64, 4, 2), Tile(16, 16, 4, 1)], ids=str)
@pytest.mark.parametrize("how", [{}, {"causal": False}, {"window": 21}, {"window": 21, "causal": False}], ids=str)
def test_every_proportion_of_tiles_matches_reference(
    tile: Tile, how: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setattr(kernels, "_tile", lambda *_, **__: tile)
    assert_right(*draw((1, 70, 100, 1, 1, 16), torch.float32, device), **how)


def test_a_tuner_may_bring_its_own_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), do = draw((1, 40, 40, 2, 1, 16), torch.float32, device)
    how = {"causal": True, "scale": 0.25}
    o, L = kernels.forward(q, k, v, **how)
    expected = kernels.backward(q, k, v, o, L, do, **how)
    asked = []
    real = kernels._options
    monkeypatch.setattr(kernels, "_options", lambda tile: asked.append(tile) or real(tile))
    mine = {"forward": Tile(16, 16, 4, 1), "dq": Tile(16, 32, 4, 1), "dkdv": Tile(32, 16, 4, 1)}
    torch.testing.assert_close(kernels.forward(q, k, v, **how, tiles=mine), (o, L))
    torch.testing.assert_close(kernels.backward(q, k, v, o, L, do, **how, tiles=mine), expected)
    assert asked == list(mine.values())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_large_scores_do_not_overflow(softcap: float | None, device: str) -> None:
    (q, k, v), do = draw((1, 50, 50, 1, 1, 16), torch.float32, device)
    inputs = [q * 100, k * 100, v]
    expected = run(reference_attention, inputs, do, torch.float64, softcap=softcap)
    for ours, exact in zip(run(attend, inputs, do, softcap=softcap), expected, strict=True):
        # Scores of 30,000 have no more digits in float32 than that, and exp turns their error into a relative one
        torch.testing.assert_close(ours.double(), exact, rtol=0.03, atol=0.03)


def test_a_soft_cap_far_above_the_scores_changes_nothing(device: str) -> None:
    inputs, do = draw((1, 50, 50, 1, 1, 16), torch.float32, device)
    for capped, plain in zip(run(attend, inputs, do, softcap=1e4), run(attend, inputs, do), strict=True):
        torch.testing.assert_close(capped, plain, rtol=1e-5, atol=1e-5)


def test_the_saved_normalizer_is_the_natural_log_sum_exp(device: str, poisoned: None) -> None:
    (q, k, v), _ = draw((2, 37, 53, 4, 2, 16), torch.float32, device)
    _, L_BHT = kernels.forward(q, k, v, causal=False, scale=0.25, softcap=3.0)
    score_BHTS = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(2, dim=2)) * 0.25
    torch.testing.assert_close(L_BHT, (3 * torch.tanh(score_BHTS / 3)).logsumexp(-1).float())


def test_the_soft_cap_has_all_digits_of_float32(device: str) -> None:
    x = torch.cat([torch.linspace(-3, 3, 61), torch.logspace(-6, 1, 40)]).to(device)
    q, one = x.view(-1, 1, 1, 1), torch.ones(len(x), 1, 1, 1, device=device)
    _, L = kernels.forward(q, one, one, causal=True, scale=1.0, softcap=1.0)  # of one key, so L is its score
    torch.testing.assert_close(L.flatten().double(), torch.tanh(x.double()), rtol=1e-6, atol=1e-12)


NOTHING_SEEN = [  # T, S, options, which queries see nothing
    (50, 20, {}, slice(0, 30)),
    (90, 40, {"causal": False, "window": 5}, slice(0, 46)),
    (50, 50, {"documents": (7, 40)}, slice(40, 50)),
    (3, 0, {}, slice(0, 3)),
]


@pytest.mark.parametrize(("T", "S", "how", "blind"), NOTHING_SEEN, ids=str)
def test_queries_that_see_nothing_are_zero(
    T: int, S: int, how: dict[str, Any], blind: slice, device: str, poisoned: None
) -> None:
    inputs, do = draw((1, T, S, 2, 1, 16), torch.float32, device)
    how = with_documents(how, device)
    o, dq, dk, dv = run(attend, inputs, do, **how)
    spans = torch.tensor([[[0] * 7 + [7] * 33 + [50] * 10], [[0] * 7 + [40] * 33 + [50] * 10]], dtype=torch.int32)
    how = {"causal": True, "scale": 0.25} | how | ({"spans": spans.to(device)} if "documents" in how else {})
    how.pop("documents", None)
    L_BHT = kernels.forward(*inputs, **how)[1]
    assert not o[:, blind].any()
    assert not dq[:, blind].any()
    assert L_BHT[..., blind].isneginf().all()
    assert L_BHT.isneginf().sum() == 2 * (T - L_BHT.isfinite().sum() // 2)
    assert not torch.cat([o.flatten(), dq.flatten(), dk.flatten(), dv.flatten()]).isnan().any()


def test_documents_are_as_if_each_were_alone(device: str) -> None:
    inputs, do = draw((1, 100, 100, 2, 1, 16), torch.float32, device)
    borders = [0, 31, 64, 100]
    packed = run(attend, inputs, do, documents=torch.tensor(borders, device=device))
    for start, end in pairwise(borders):
        alone = run(attend, [x[:, start:end] for x in inputs], do[:, start:end])
        for ours, expected in zip(packed, alone, strict=True):
            torch.testing.assert_close(ours[:, start:end], expected, rtol=1e-5, atol=1e-5)


def test_nothing_leaks_from_document_to_document(device: str) -> None:
    (q, k, v), do = draw((2, 70, 70, 1, 1, 16), torch.float32, device)
    documents = torch.tensor([0, 50, 75, 140], device=device)
    before = run(attend, [q, k, v], do, documents=documents)
    for x in (q, k, v, do):
        x.view(140, 1, 16)[50:75] = 1e3
    for ours, expected in zip(run(attend, [q, k, v], do, documents=documents), before, strict=True):
        flat, expected = ours.view(140, 16), expected.view(140, 16)
        assert torch.equal(flat[:50], expected[:50])
        assert torch.equal(flat[75:], expected[75:])


@pytest.mark.filterwarnings("ignore:All-NaN")  # NumPy's, in the interpreter, for the blocks that are rightly read
@pytest.mark.parametrize(
    ("how", "near", "far"),
    [
        ({}, slice(0, 64), slice(64, 128)),
        ({"window": 20}, slice(64, 128), slice(0, 32)),
        ({"window": 20, "causal": False}, slice(64, 128), slice(0, 32)),
        ({"documents": (0, 64, 128)}, slice(64, 128), slice(0, 64)),
        ({"documents": (0, 64, 128), "causal": False}, slice(0, 64), slice(64, 128)),
    ],
    ids=str,
)
def test_blocks_out_of_sight_are_never_read(how: dict[str, Any], near: slice, far: slice, device: str) -> None:
    (q, k, v), do = draw((1, 128, 128, 1, 1, 16), torch.float32, device)
    how = with_documents(how, device)
    plain = run(attend, [q, k, v], do, **how)

    def spoilt(x: Tensor, place: slice) -> Tensor:
        x = x.clone()
        x[:, place] = float("nan")
        return x

    o, dq, _, _ = run(attend, [q, spoilt(k, far), spoilt(v, far)], do, **how)
    assert torch.equal(o[:, near], plain[0][:, near])
    assert torch.equal(dq[:, near], plain[1][:, near])
    _, _, dk, dv = run(attend, [spoilt(q, near), k, v], spoilt(do, near), **how)
    assert torch.equal(dk[:, far], plain[2][:, far])
    assert torch.equal(dv[:, far], plain[3][:, far])


def test_memory_around_the_inputs_is_never_used(device: str) -> None:
    inputs, do = draw((1, 37, 53, 2, 1, 24), torch.float32, device)
    surrounded = []
    for x in inputs:
        B, rows, heads, D = x.shape
        room = torch.full((B, rows + 9, heads + 1, D + 16), float("nan"), device=device)
        room[:, 4:-5, :-1, 8:-8] = x
        surrounded.append(room[:, 4:-5, :-1, 8:-8])
    assert not any(x.is_contiguous() for x in surrounded)
    for alone, inside in zip(run(attend, inputs, do), run(attend, surrounded, do), strict=True):
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
    expected = run(attend, inputs, do)
    for result, plain in zip(run(attend, moved, layouts()[layout](do)), expected, strict=True):
        torch.testing.assert_close(result, plain, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["heads first", "positions first", "packed"])
def test_gradients_are_written_into_any_layout(layout: str, device: str) -> None:
    (q, k, v), do = draw((2, 19, 35, 2, 1, 16), torch.float32, device)
    how = {"causal": True, "scale": 0.25}
    o, L = kernels.forward(q, k, v, **how)
    into = {name: layouts()[layout](torch.full_like(x, float("nan"))) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    written = kernels.backward(q, k, v, o, L, do, **how, **into)
    for result, given_, plain in zip(written, into.values(), kernels.backward(q, k, v, o, L, do, **how), strict=True):
        assert result is given_
        torch.testing.assert_close(result, plain, rtol=0, atol=0)


def test_only_rows_too_far_apart_for_32_bits_are_copied() -> None:
    near = torch.empty(2, 8, 4, 3, 16, device="meta")[:, :, :, 1]
    far = torch.empty_strided((2, 8, 4, 16), (64, 2**23 + 16, 16, 1), device="meta")
    assert kernels._readable(near) is near
    assert kernels._readable(far).is_contiguous()


def test_equal_runs_are_equal_to_the_bit(device: str) -> None:
    inputs, do = draw((1, 40, 40, 2, 1, 16), torch.float32, device)
    for first, second in zip(run(attend, inputs, do), run(attend, inputs, do), strict=True):
        assert torch.equal(first, second)


def test_the_past_does_not_see_the_future(device: str) -> None:
    (q, k, v), _ = draw((1, 70, 70, 2, 2, 16), torch.float32, device)
    before = attend(q, k, v)
    k[:, 40:], v[:, 40:] = 1e3, -1e3
    torch.testing.assert_close(attend(q, k, v)[:, :40], before[:, :40], rtol=0, atol=0)


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
    keys = set(product(("forward", "dq", "dkdv"), (2, 4), (32, 64, 128, 256)))
    assert set(TILES) == keys
    assert set(TILES_WITH_MORE) < keys
    assert all(tiles != TILES[key] for key, tiles in TILES_WITH_MORE.items())
    assert tile_for("dkdv", 2, 96, is_hopper=True) == TILES["dkdv", 2, 128][1]
    assert tile_for("dkdv", 2, 96, is_hopper=False, has_more=True) == TILES_WITH_MORE["dkdv", 2, 128][0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("how", [{}, {"causal": False}, {"window": 70, "softcap": 3.0, "documents": (0, 99, 600)}])
def test_every_tile_of_the_table_is_right_on_this_gpu(
    D: int, dtype: torch.dtype, how: dict[str, Any], poisoned: None
) -> None:
    how = with_documents(how, "cuda")
    assert_right(*draw((2, 384, 384, 4, 2, D), dtype, "cuda"), **how)
    assert_right(*draw((2, 301, 301, 2, 2, D), dtype, "cuda"), **how)


@pytest.mark.gpu
def test_more_heads_than_a_grid_has_columns() -> None:
    inputs, do = draw((9000, 4, 4, 8, 8, 16), torch.float16, "cuda")
    assert_right(inputs, do)


@pytest.mark.gpu
def test_memory_grows_with_the_length_not_with_its_square() -> None:
    inputs, do = draw((1, 32_768, 32_768, 4, 4, 64), torch.bfloat16, "cuda")
    run(attend, inputs, do)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(attend, inputs, do)
    assert torch.cuda.max_memory_allocated() - before < 12 * inputs[0].nbytes


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_pass_two_billion() -> None:
    T, H, D = 300_000, 64, 128  # 2.46e9 numbers in q
    q = torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16)
    k = q[:, :64, :8]
    ours = attend(q, k, k, causal=False)[:, -500:]
    torch.testing.assert_close(ours, reference_attention(q[:, -500:], k, k, causal=False), rtol=2e-2, atol=2e-2)
