"""Attention: every backend against the reference, the reference against torch, and the layer around them."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfs_cli.config import ModelConfig
from lfs_cli.corpus.batches import document_lengths
from lfs_cli.errors import ConfigError, DeviceError
from lfs_cli.kernels import flash_attention as flash
from lfs_cli.model import (
    ATTENTION,
    Attention,
    KVCache,
    RotaryEmbedding,
    attention,
    resolve_attention,
    scaled_dot_product_attention,
)
from lfs_cli.model.attention import _resolve_once, attend_reference


def heads(B: int, T: int, S: int, H: int, G: int, D: int, dtype=torch.float32, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * T + S)
    shapes = [(B, T, H, D), (B, S, G, D), (B, S, G, D)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def output_and_gradients(attend, inputs: list[Tensor], causal: bool) -> list[Tensor]:
    output = attend(*inputs, causal=causal)
    dy = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    return [output, *torch.autograd.grad(output, inputs, dy.to(output.dtype))]


def by_torch(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    if mask is None and causal:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 7), st.integers(0, 5), st.integers(1, 3), st.integers(1, 2), st.integers(1, 8)
)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, causal=st.booleans())
def test_the_reference_and_standard_match_torch(shape, causal) -> None:
    B, T, cached, G, shared, D = shape
    inputs = heads(B, T, T + cached, G * shared, G, D, torch.float64)

    expected = output_and_gradients(by_torch, inputs, causal)

    for name in ("reference", "standard"):
        for ours, theirs in zip(output_and_gradients(ATTENTION.get(name), inputs, causal), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, causal=st.booleans(), window=st.integers(1, 9))
def test_windows_match_torchs_masks(shape, causal, window) -> None:
    B, T, cached, G, shared, D = shape
    S = T + cached
    inputs = heads(B, T, S, G * shared, G, D, torch.float64)
    distance_TS = torch.arange(cached, S)[:, None] - torch.arange(S)
    mask_TS = (distance_TS < window) & (distance_TS >= 0 if causal else distance_TS > -window)

    expected = output_and_gradients(partial(by_torch, mask=mask_TS), inputs, causal)

    for name in ("reference", "standard"):
        ours = output_and_gradients(partial(ATTENTION.get(name), window=window), inputs, causal)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, causal=st.booleans(), window=st.integers(1, 9), cuts=st.sets(st.integers(1, 20)))
def test_documents_match_torchs_masks(shape, causal, window, cuts) -> None:
    B, T, _, G, shared, D = shape
    inputs = heads(B, T, T, G * shared, G, D, torch.float64)
    starts = [0, *sorted(cut for cut in cuts if cut < B * T)]
    number_BT = torch.bucketize(torch.arange(B * T), torch.tensor(starts), right=True).view(B, T)
    distance_TS = torch.arange(T)[:, None] - torch.arange(T)
    mask_TS = (distance_TS.abs() < window) & (distance_TS >= 0 if causal else distance_TS == distance_TS)
    mask_B1TS = (mask_TS & (number_BT[:, :, None] == number_BT[:, None, :]))[:, None]

    expected = output_and_gradients(partial(by_torch, mask=mask_B1TS), inputs, causal)

    how = {"window": window, "documents": torch.tensor([*starts, B * T])}
    for name in ("reference", "standard"):
        ours = output_and_gradients(partial(ATTENTION.get(name), **how), inputs, causal)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernels_take_the_documents_of_a_batch_and_windows(window, device) -> None:
    tokens_BT = torch.tensor([[5, 0, 7, 7, 0, 0, 1], [3, 3, 3, 3, 3, 3, 0]], device=device)
    how = {"documents": document_lengths(tokens_BT, end_of_text=0), "window": window}
    inputs = heads(2, 7, 7, 4, 2, 16, device=device)

    ours = output_and_gradients(partial(ATTENTION.get("flash"), **how), inputs, True)
    exact = output_and_gradients(partial(attend_reference, **how), [x.double() for x in inputs], True)

    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, atol=2e-5, rtol=2e-5)


def test_a_backend_without_a_mask_is_refused_where_one_is_asked_for(monkeypatch) -> None:
    def plain(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool = True) -> Tensor:
        return attend_reference(q_BTHD, k_BSGD, v_BSGD, causal=causal)

    ATTENTION.names()
    monkeypatch.setattr(ATTENTION, "_entries", {**ATTENTION._entries, "plain": plain})

    assert resolve_attention("plain", "cpu", torch.float32, 8)[0] == "plain"
    for mask, setting in (({"window": 4}, "model.window"), ({"has_documents": True}, "data.documents")):
        with pytest.raises(ConfigError, match=f"attention `plain` has no .*, which `{setting}` asks for") as caught:
            resolve_attention("plain", "cpu", torch.float32, 8, **mask)
        assert "`auto`, `flash`, `reference`, `standard`, `triton`" in caught.value.hint
        assert resolve_attention("auto", "cpu", torch.float32, 8, **mask)[0] == "standard"
    with pytest.raises(ConfigError, match=r"which `model\.window` asks for"):
        Attention(16, 2, backend="plain", window=4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 16), (2, 33, 33, 4, 2, 32), (2, 5, 40, 4, 1, 16)], ids=str)
@pytest.mark.parametrize("name", ATTENTION.names())
def test_every_backend_equals_the_reference(name, shape, causal, device) -> None:
    try:
        resolve_attention(name, device, torch.float32, shape[-1])
    except DeviceError as error:
        pytest.skip(str(error))
    inputs = heads(*shape, device=device)

    ours = output_and_gradients(ATTENTION.get(name), inputs, causal)
    exact = output_and_gradients(attend_reference, [x.double() for x in inputs], causal)

    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["reference", "standard"])
def test_bfloat16_goes_in_and_comes_out(name) -> None:
    inputs = heads(2, 9, 9, 4, 2, 8, torch.bfloat16)

    ours = output_and_gradients(ATTENTION.get(name), inputs, True)
    exact = output_and_gradients(attend_reference, [x.double() for x in inputs], True)

    for mine, right in zip(ours, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), right, atol=5e-2, rtol=5e-2)


def test_the_reference_keeps_its_digits_under_autocast() -> None:
    q, k, v = torch.randn(3, 1, 40, 2, 16).unbind()
    exact = attend_reference(*(x.double() for x in (q, k, v)))
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend_reference(q, k, v)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), exact, atol=1e-5)


def test_standard_reads_heads_in_any_memory_layout() -> None:
    inputs = heads(2, 5, 5, 4, 2, 8)
    moved = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]

    for a, b in zip(*(output_and_gradients(ATTENTION.get("standard"), x, True) for x in (inputs, moved)), strict=True):
        torch.testing.assert_close(a, b)


def test_huge_scores_do_not_overflow() -> None:
    q, k, v = (x.detach() * 100 for x in heads(1, 4, 4, 1, 1, 8))

    torch.testing.assert_close(ATTENTION.get("standard")(q, k, v), by_torch(q, k, v, causal=True))


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (1, 2, 3)], ids=str)
def test_scaled_dot_product_attention_takes_any_leading_dimensions_and_mask(leading) -> None:
    q, k, v = torch.randn(*leading, 4, 8), torch.randn(*leading, 6, 8), torch.randn(*leading, 6, 5)
    mask = torch.rand(*leading, 4, 6) > 0.5
    mask[..., 0] = True

    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), attend(q, k, v, attn_mask=mask))
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), attend(q, k, v))


def test_auto_takes_standard_where_there_is_no_gpu_and_says_why() -> None:
    assert resolve_attention("auto", "cpu", torch.float32, 32) == (
        "standard",
        "`flash` is for CUDA GPUs, and this is cpu",
    )


@pytest.fixture
def gpu(monkeypatch) -> Iterator[None]:
    """A machine on which the portable kernel runs, and the Hopper kernel for 64 channels."""

    def hopper(q, k, v, **_mask):
        return None if q.shape[-1] == 64 else f"head dimension {q.shape[-1]} is not 64"

    monkeypatch.setattr(flash, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr("lfs_cli.kernels.triton_attention.unavailable_reason", lambda *_, **__: None)
    monkeypatch.setattr("lfs_cli.kernels.hopper_attention.unavailable_reason", hopper)
    _resolve_once.cache_clear()
    yield
    _resolve_once.cache_clear()


def test_auto_takes_flash_on_a_gpu_and_names_the_kernel(gpu) -> None:
    assert resolve_attention("auto", "cuda", torch.bfloat16, 64) == ("flash", "hopper kernel; the fastest here")
    assert resolve_attention("flash", "cuda", torch.bfloat16, 96, heads=4, kv_heads=2) == (
        "flash",
        "triton kernel; not hopper: head dimension 96 is not 64",
    )


SHORT = "short kernel, rotation included; without gradients triton kernel; not hopper: head dimension 32 is not 64"


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("auto", {}, SHORT),
        ("auto", {"length": 512}, "{portable}; not short: it takes 65 to 256 positions, not 512"),
        ("auto", {"kv_heads": 2}, "{portable}; not short: query heads share key/value heads"),
        ("auto", {"qk_norm": True}, "{portable}; not short: it has no QK-norm"),
        ("auto", {"window": 9}, "{portable}; not short: it has no windows"),
        ("auto", {"rotates": False}, "{portable}"),
        ("triton", {}, "triton kernel; chosen by name"),
    ],
    ids=str,
)
def test_the_kernel_for_short_sequences_is_named_or_why_it_is_not_taken(gpu, monkeypatch, name, how, reason) -> None:
    monkeypatch.setattr("lfs_cli.kernels.short_attention.no_hopper_reason_in_trace", lambda _: None)
    how = {"heads": 4, "length": 256, "rotates": True, **how}
    backend, why = resolve_attention(name, "cuda", torch.bfloat16, 32, **how)
    portable = "triton kernel; not hopper: head dimension 32 is not 64"
    assert (backend, why) == (name.replace("auto", "flash"), reason.format(portable=portable))


def test_one_reason_against_two_kernels_is_given_once(gpu, monkeypatch) -> None:
    for name in ("hopper", "short"):
        monkeypatch.setattr(
            f"lfs_cli.kernels.{name}_attention.unavailable_reason", lambda *_, **__: "it is another GPU"
        )
    found = resolve_attention("auto", "cuda", torch.bfloat16, 32, length=256, rotates=True)
    assert found == ("flash", "triton kernel; not hopper: it is another GPU")


def test_auto_takes_standard_on_a_gpu_that_cannot_run_flash(monkeypatch) -> None:
    monkeypatch.setattr(flash, "unavailable_reason", lambda *_: "head dimension 999 is above 256")
    _resolve_once.cache_clear()
    assert resolve_attention("auto", "cuda", torch.bfloat16, 999) == ("standard", "head dimension 999 is above 256")
    _resolve_once.cache_clear()


@pytest.mark.parametrize("name", ["hopper", "triton"])
def test_a_kernel_by_name_is_that_kernel_or_refused(gpu, name) -> None:
    assert resolve_attention(name, "cuda", torch.bfloat16, 64) == (name, f"{name} kernel; chosen by name")
    if name == "hopper":
        with pytest.raises(DeviceError, match="attention `hopper` cannot run here: head dimension 96 is not 64"):
            resolve_attention(name, "cuda", torch.bfloat16, 96)


@pytest.mark.parametrize("name", ["flash", "hopper", "triton"])
def test_kernels_are_refused_where_they_cannot_run(name) -> None:
    if torch.cuda.is_available():
        pytest.skip("they can")
    with pytest.raises(DeviceError, match=f"attention `{name}` cannot run here: ") as caught:
        resolve_attention(name, "cpu", torch.float32, 32)
    assert "model.attention=auto" in caught.value.hint


def test_a_misspelled_backend_is_corrected() -> None:
    with pytest.raises(ConfigError, match="unknown attention backend `standart`") as caught:
        resolve_attention("standart", "cpu", torch.float32, 32)
    assert caught.value.hint == "did you mean `standard`?"
    with pytest.raises(ConfigError, match="unknown attention backend `standart`"):
        Attention(8, 2, backend="standart")


def layer_by_torch(layer: Attention, x: Tensor, heads: int, rope: RotaryEmbedding | None, positions: Tensor) -> Tensor:
    """The same layer written out, one position list for all sequences."""

    def split(name: str) -> Tensor:
        return torch.nn.functional.linear(x, getattr(layer, name).weight).unflatten(-1, (heads, -1)).transpose(-3, -2)

    q, k, v = split("query"), split("key"), split("value")
    if rope is not None:
        q, k = rope(q, positions), rope(k, positions)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.nn.functional.linear(mixed.transpose(-3, -2).flatten(-2), layer.output.weight)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("has_rope", [True, False])
def test_the_layer_matches_its_formula_for_any_leading_dimensions(leading, has_rope) -> None:
    rope = RotaryEmbedding(10_000.0, 4, 20) if has_rope else None
    layer = Attention(12, 3, rope=rope)
    x = torch.randn(*leading, 5, 12)
    positions = torch.tensor([3, 1, 4, 15, 9])

    torch.testing.assert_close(layer(x), layer_by_torch(layer, x, 3, rope, torch.arange(5)))
    torch.testing.assert_close(layer(x, positions), layer_by_torch(layer, x, 3, rope, positions))
    torch.testing.assert_close(layer(x, positions.expand(*leading, 5)), layer(x, positions))


def test_each_sequence_may_have_its_own_positions() -> None:
    layer = Attention(8, 2, rope=RotaryEmbedding(10_000.0, 4, 20))
    x, positions = torch.randn(2, 3, 8), torch.tensor([[0, 1, 2], [7, 3, 11]])

    alone = torch.stack([layer(x[row], positions[row]) for row in range(2)])

    torch.testing.assert_close(layer(x, positions), alone)


def test_no_position_sees_a_later_one() -> None:
    layer = Attention(8, 2, 1, rope=RotaryEmbedding(10_000.0, 4, 20), qk_norm=True)
    x = torch.randn(1, 6, 8, requires_grad=True)

    (gradient,) = torch.autograd.grad(layer(x)[0, 3].sum(), x)

    assert (gradient[0, :4].abs().sum(-1) > 0).all()
    assert torch.equal(gradient[0, 4:], torch.zeros(2, 8))


def test_qk_norm_makes_the_size_of_the_input_irrelevant_to_the_shares() -> None:
    layer = Attention(8, 2, qk_norm=True, epsilon=1e-12)
    x = torch.randn(1, 6, 8)

    torch.testing.assert_close(layer(3 * x), 3 * layer(x))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_norm_and_rotation_in_one_are_the_same_layer(monkeypatch, qk_norm: bool, kv_heads: int) -> None:
    layer = Attention(64, 4, kv_heads, rope=RotaryEmbedding(100.0, 16, 24), qk_norm=qk_norm, epsilon=1e-3)
    for norm in (layer.query_norm, layer.key_norm):
        if norm is not None:
            norm.weight.data = torch.randn(16)
    x_BTC = torch.randn(2, 9, 64, requires_grad=True)
    config = ModelConfig(vocab_size=9, context_length=24, width=64, layers=1, heads=4, kv_heads=kv_heads)
    cache = KVCache(config, batch=2, capacity=24)
    found = []
    for by_kernel in (False, True):
        monkeypatch.setattr(attention, "_turns_by_kernel", lambda _q, by_kernel=by_kernel: by_kernel)
        y_BTC = layer(x_BTC)
        cache.length = 5  # as if there had been so many before
        with torch.no_grad():
            later_BTC = layer(x_BTC, None, cache)
        found.append([y_BTC, later_BTC, *torch.autograd.grad(y_BTC.sin().sum(), [x_BTC, *layer.parameters()])])
    for apart, in_one in zip(*found, strict=True):
        torch.testing.assert_close(in_one, apart, atol=1e-5, rtol=1e-4)
