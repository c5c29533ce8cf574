"""Turned attention of packed heads against float64, and against the two operations that it is made of.

Without a GPU, and outside of Triton's interpreter, those two take its place. `test_fused_without_a_gpu.py` starts the
interpreter in a process of its own.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import recorded
from close import assert_as_accurate
from fused_cases import DTYPES, HAS_KERNELS, Watch, assert_near, differentiate, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lfs_cli.config import ModelConfig
from lfs_cli.kernels import flash_attention as flash
from lfs_cli.kernels import hopper_attention, reference_attention, self_check, short_attention, triton_attention
from lfs_cli.kernels.flash_attention import flash_attention
from lfs_cli.kernels.operation import as_on_gpu, as_written
from lfs_cli.kernels.reference_attention import document_spans
from lfs_cli.kernels.reference_attention import reference_attention as attend_by_definition
from lfs_cli.kernels.rope import qk_norm_rope, reference_qk_norm_rope
from lfs_cli.kernels.rotary_attention import not_short, rotary_attention
from lfs_cli.model import Attention, KVCache, RotaryEmbedding, Transformer, next_token_loss
from lfs_cli.model.checkpointing import checkpointed

SHAPES = [  # B, T, H, G, D
    (1, 1, 1, 1, 8),
    (3, 1, 2, 1, 16),
    (2, 37, 3, 1, 16),
    (1, 21, 4, 2, 32),
    (2, 5, 1, 1, 24),  # no power of two: two operations
]
SHAPE = (2, 21, 4, 2, 16)
OPTIONS = [{}, {"window": 5}, {"documents": (0, 9, 21, 30)}, {"causal": False}]
only_with_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="two operations take its place")


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest, device: str) -> str:
    if request.param == "triton" and triton_attention.unavailable_for(torch.device(device), torch.float32, 16):
        pytest.skip("the portable kernel cannot run in this process")
    return request.param


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, norm: bool = True) -> tuple[list[Tensor], dict]:
    """Packed heads, and norm weights if asked for; and what else the function takes."""
    B, T, H, G, D = shape
    rope = RotaryEmbedding(10_000.0, D, T + 3)
    weights = [1 + randn(D, dtype=torch.float32, device=device, seed=seed) / 4 for seed in (3, 4)] if norm else []
    how = {"cos": rope.cos[3:].to(device), "sin": rope.sin[3:].to(device), "heads": H, "kv_heads": G}
    return [randn(B, T, (H + 2 * G) * D, dtype=dtype, device=device), *weights], how


def in_two(turn: Callable, attend: Callable, qkv: Tensor, *weights: Tensor, heads: int, kv_heads: int, **how: Any):
    """The same by two operations on three parts."""
    options = {name: how[name] for name in ("causal", "window", "documents", "implementation") if name in how}
    q, k, v = qkv.unflatten(2, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 2)
    return attend(*turn(q, k, how["cos"], how["sin"], *weights), v, **options)


by_definition = partial(in_two, reference_qk_norm_rope, attend_by_definition)
separately = partial(in_two, qk_norm_rope, flash_attention)


def together(qkv: Tensor, *weights: Tensor, cos: Tensor, sin: Tensor, **how: Any) -> Tensor:
    return rotary_attention(qkv, cos, sin, *weights, **how)


def run(function: Callable, inputs: list[Tensor], **how: Any) -> list[Tensor]:
    """The output and every gradient."""
    return differentiate(partial(function, **how), inputs)


def exactly(inputs: list[Tensor], **how: Any) -> list[Tensor]:
    angles = {name: how.pop(name).double() for name in ("cos", "sin")}
    return run(by_definition, [x.double() for x in inputs], **angles, **how)


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm and rope"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_and_every_gradient_match_float64(shape, dtype, norm, device, poisoned) -> None:
    inputs, how = draw(shape, dtype, device, norm=norm)
    output, *gradients = run(together, inputs, **how)
    assert output.dtype == gradients[0].dtype == dtype
    assert {x.dtype for x in gradients[1:]} <= {torch.float32}
    assert_near([x.to(dtype) for x in (output, *gradients)], exactly(inputs, **how), 12)


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm and rope"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_two_operations_to_the_bit(options, norm, implementation, device, poisoned) -> None:
    inputs, how = draw(SHAPE, torch.float32, device, norm=norm)
    options = {name: torch.tensor(x, device=device) if name == "documents" else x for name, x in options.items()}
    how |= {**options, "implementation": implementation}
    for ours, theirs in zip(run(together, inputs, **how), run(separately, inputs, **how), strict=True):
        assert torch.equal(ours, theirs)


ADDED = [{}, {"window": 5}, {"documents": (0, 9, 21, 30)}]


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm and rope"])
@pytest.mark.parametrize("options", ADDED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_added_to_values_is_part_of_them(shape, dtype, options, norm, device, poisoned) -> None:
    B, T, _, G, D = shape
    inputs, how = draw(shape, dtype, device, norm=norm)
    if "documents" in options:
        options = {"documents": torch.tensor([0, B * T // 2, B * T], device=device)}
    how |= options
    inputs.insert(1, randn(B, T, G, D, dtype=dtype, device=device, seed=5))

    def with_added(function: Callable, qkv: Tensor, added: Tensor, *weights: Tensor, **how: Any) -> Tensor:
        if function is together:
            return together(qkv, *weights, added_BTGD=added, **how)
        rest, values = qkv.tensor_split([-G * D], 2)
        return function(torch.cat([rest, values + added.flatten(2)], 2), *weights, **how)

    ours = run(partial(with_added, together), inputs, **how)
    angles = {name: how.pop(name).double() for name in ("cos", "sin")}
    exact = run(partial(with_added, by_definition), [x.double() for x in inputs], **angles, **how)
    assert ours[2].dtype == dtype
    assert_near([x.to(dtype) for x in ours], exact, 20)  # sums are larger than their parts


def test_what_is_added_must_fit_the_values(device) -> None:
    (qkv, *weights), how = draw(SHAPE, torch.float32, device)
    with pytest.raises(ValueError, match="to add to values"):
        together(qkv, *weights, added_BTGD=torch.zeros(2, 21, 4, 16, device=device), **how)


def test_heads_need_not_be_side_by_side(device) -> None:
    inputs, how = draw(SHAPE, torch.float32, device)
    wide = torch.stack((inputs[0], inputs[0]), 3)[..., 0]
    assert not wide.is_contiguous()
    for ours, theirs in zip(run(together, [wide, *inputs[1:]], **how), run(together, inputs, **how), strict=True):
        assert torch.equal(ours, theirs)


@only_with_kernels
@pytest.mark.parametrize(("T", "H", "D"), [(1, 1, 64), (70, 3, 64), (130, 2, 128)])
def test_the_sum_of_a_gradient_is_rounded_and_turned_back_at_once(T: int, H: int, D: int, device, poisoned) -> None:
    total = randn(2 * H, T, D, dtype=torch.float32, device=device)
    rope = RotaryEmbedding(10_000.0, D, T).to(device)
    packed = torch.empty(2, T, H + 1, D, dtype=torch.float16, device=device)  # a part of what backward writes
    grid = (-(-T // hopper_attention.ROWS) * 2 * H,)
    dq = packed[:, :, :H]
    hopper_attention._round[grid](
        total, dq, rope.cos, rope.sin, dq.stride()[:3], T, H, 0.3, D=D, BLOCK_T=hopper_attention.ROWS
    )
    scaled = 0.3 * total.double().view(2, H, T, D).transpose(1, 2)
    exact, _ = reference_qk_norm_rope(scaled, scaled, rope.cos.double(), -rope.sin.double())
    assert_near([dq], [exact], 1)
    assert packed[:, :, H:].isnan().all()


@only_with_kernels
def test_what_a_kernel_turns_back_is_not_turned_again(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel in the place of the one for Hopper GPUs, made of the portable one."""

    def backward(*tensors: Tensor, turn: tuple[Tensor, Tensor], **how: Any) -> tuple[Tensor, ...]:
        found = triton_attention.backward(*tensors, **how)
        q, k = (x.double() for x in found[:2])
        for mine, back in zip(found, reference_qk_norm_rope(q, k, turn[0].double(), -turn[1].double()), strict=False):
            mine.copy_(back)
        return found

    monkeypatch.setattr(hopper_attention, "unavailable_reason", lambda *_, **__: None)
    monkeypatch.setattr(hopper_attention, "forward", triton_attention.forward)
    monkeypatch.setattr(hopper_attention, "backward", backward)
    monkeypatch.setattr(flash, "_self_check", lambda *_: None)
    monkeypatch.setattr(self_check, "_verdicts", {})
    inputs, how = draw(SHAPE, torch.float32, device, norm=False)
    assert_near(run(together, inputs, **how, implementation="hopper"), exactly(inputs, **how), 12)


@only_with_kernels
def test_backward_is_one_operation_and_moves_nothing_else(implementation, device) -> None:
    inputs, how = draw(SHAPE, torch.float32, device, norm=False)
    names = Watch().backward_of(together(inputs[0].requires_grad_(), **how, implementation=implementation))
    assert [name for name in names if name.startswith("lfs::")] == ["lfs::rotary_attention_backward"]
    assert not {"aten::cat", "aten::copy_", "aten::slice_backward", "aten::add"} & set(names)


@only_with_kernels
@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm and rope"])
def test_no_more_is_kept_than_by_the_two_operations(norm, device) -> None:
    inputs, how = draw(SHAPE, torch.float32, device, norm=norm)

    def kept(function: Callable) -> int:
        storages = {}
        with saved_tensors_hooks(lambda x: storages.update({x.data_ptr(): x.untyped_storage()}) or x, lambda x: x):
            function(*(x.requires_grad_() for x in inputs), **how)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages.values()}.values())

    assert 0 < kept(together) <= kept(separately)


@only_with_kernels
@pytest.mark.parametrize("norm", [False, True])
def test_the_operation_keeps_the_rules_of_torch(norm, implementation, device) -> None:
    (qkv, *weights), how = draw(SHAPE, torch.float32, device, norm=norm)
    B, T, H, G, D = SHAPE
    q, k, o = (randn(B, T, n, D, dtype=torch.float32, device=device, seed=n) for n in (H, G, H))
    v = randn(B, T, G, D, dtype=torch.float32, device=device, seed=9) if norm else None
    heads = (o, qkv.view(B, T, H + 2 * G, D), q, k, v, o, randn(B, H, T, dtype=torch.float32, device=device))
    spans = document_spans(torch.tensor([0, 9, 42], device=device), B, T)
    turn = (how["cos"], how["sin"], *(weights or (None, None)), 1e-5)
    options = (spans, True, 0.3, 5, None, False, implementation)
    opcheck(torch.ops.lfs.rotary_attention_backward.default, (*heads, *turn, *options))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
@pytest.mark.parametrize("options", [{}, {"window": 5, "documents": (0, 9, 21, 30)}], ids=str)
def test_torch_compile_sees_one_whole_graph(options, implementation, device) -> None:
    inputs, how = draw(SHAPE, torch.float32, device)
    documents = torch.tensor(options["documents"], device=device) if options else None
    how |= {**options, "documents": documents, "implementation": implementation}

    def mix(qkv: Tensor, *weights: Tensor) -> Tensor:
        return together(2 * qkv, *weights, **how).sin()

    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, inputs), run(mix, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_gives_the_same_gradients(implementation, device) -> None:
    inputs, how = draw(SHAPE, torch.float32, device)
    attend = partial(together, **how, implementation=implementation)
    again = run(lambda *x: checkpoint(attend, *x, use_reentrant=False), inputs)
    for ours, theirs in zip(again, run(attend, inputs), strict=True):
        assert torch.equal(ours, theirs)


@only_with_kernels
def test_selective_checkpointing_keeps_what_attention_computed(device) -> None:
    inputs, how = draw(SHAPE, torch.float32, device, norm=False)
    keep = checkpointed("selective")
    assert keep is not None
    names = Watch().backward_of(keep(partial(together, **how), inputs[0].requires_grad_()))
    assert "lfs::qk_norm_rope" in names
    assert "lfs::flash_attention" not in names


def test_autocast_decides_the_type(device) -> None:
    inputs, how = draw(SHAPE, torch.float32, device)
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autocast(device, dtype=torch.float16):
        o = together(*leaves, **how)
    assert o.dtype == torch.float16
    assert {x.dtype for x in torch.autograd.grad(o.sum(), leaves)} == {torch.float32}
    assert torch.equal(o, together(inputs[0].half(), *inputs[1:], **how))


def test_gradients_have_no_gradients(device) -> None:
    inputs, how = draw(SHAPE, torch.float32, device, norm=False)
    qkv = inputs[0].requires_grad_()
    (dqkv,) = torch.autograd.grad(together(qkv, **how).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        dqkv.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_BTC": torch.ones(1, 3, 4, 2)}, "expected qkv"),
        ({"kv_heads": 0}, "expected qkv"),
        ({"heads": 3, "kv_heads": 2}, "expected qkv"),
        ({"heads": 3, "kv_heads": 1}, "expected qkv"),
        ({"cos": torch.ones(2, 2)}, "expected cos and sin"),
        ({"q_weight": torch.ones(4)}, "given together"),
        ({"window": 0}, "window must be at least 1"),
        ({"implementation": "none"}, "unknown implementation"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(change, message) -> None:
    good = {"qkv_BTC": torch.ones(1, 3, 16), "cos": torch.ones(3, 2), "sin": torch.ones(3, 2), "heads": 2}
    with pytest.raises(ValueError, match=message):
        rotary_attention(**{**good, "kv_heads": 1, **change})


# Short sequences -----------------------------------------------------------------------------------------------------

SHORT = (2, 70, 3, 3, 32)  # B, T, H, G, D
HALF = torch.float16


def float32(x: Tensor) -> Tensor:
    return x.to(torch.float32)


def short_forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    assert all(map(hopper_attention.is_aligned, (q, k, v)))
    return reference_attention.forward(*reference_qk_norm_rope(q, k, cos, sin), v, causal=True, scale=scale)


def short_backward(q, k, v, o, L, do, cos, sin, scale, *, dq, dk, dv) -> None:
    assert all(map(hopper_attention.is_aligned, (q, k, v, o, do, dq, dk, dv)))
    heads = (*reference_qk_norm_rope(q, k, cos, sin), v, o)
    found = reference_attention.backward(*map(float32, heads), L, float32(do), causal=True, scale=scale)
    turned_back = (*reference_qk_norm_rope(*found[:2], cos, -sin), found[2])
    for into, x in zip((dq, dk, dv), turned_back, strict=True):
        into.copy_(x)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, forgets_checks: None) -> list[str]:
    """A machine with kernels for short sequences, made of the definitions; and which of them run, in order."""
    names: list[str] = []
    monkeypatch.setattr(short_attention, "no_hopper_reason_in_trace", lambda _: None)
    for name, kernel in (("forward", short_forward), ("backward", short_backward)):
        run = lambda *x, name=name, kernel=kernel, **how: names.append(name) or kernel(*x, **how)  # noqa: E731
        monkeypatch.setattr(short_attention, name, run)
    return names


REFUSED = [  # what is asked for, and why the kernels for short sequences do not do it
    ({}, None),
    ({"T": 65}, None),
    ({"T": 256, "H": 1, "G": 1}, None),
    ({"dtype": torch.bfloat16, "implementation": "hopper"}, None),
    ({"T": 64}, "it takes 65 to 256 positions, not 64"),
    ({"T": 257}, "it takes 65 to 256 positions, not 257"),
    ({"B": 0}, "there is nothing to compute"),
    ({"B": 2**24}, "there are more than 2^31 queries"),
    ({"D": 64}, "head dimension 64 is not 32"),
    ({"G": 1}, "query heads share key/value heads"),
    ({"dtype": torch.float32}, "the type is float32, not bfloat16 or float16"),
    ({"causal": False}, "it is for causal attention"),
    ({"window": 9}, "it has no windows"),
    ({"documents": torch.tensor([0, 70])}, "it has no documents"),
    ({"has_norm": True}, "it has no QK-norm"),
    ({"implementation": "triton"}, "another kernel is asked for by name"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=str)
def test_shapes_and_options_decide_whether_a_sequence_is_short(change: dict, reason: str | None, launched) -> None:
    sizes = dict(zip("BTHGD", SHORT, strict=True)) | {"dtype": HALF} | change
    B, T, H, G, D, dtype = (sizes.pop(name) for name in (*"BTHGD", "dtype"))
    with FakeTensorMode():
        q, k, v = (torch.empty(B, T, heads, D, dtype=dtype) for heads in (H, G, G))
    assert not_short(q, k, v, **sizes) == reason


def test_more_queries_than_keys_are_no_short_sequence(launched) -> None:
    q, k = (torch.empty(1, length, 1, 32, dtype=HALF) for length in (70, 71))
    assert not_short(q, k, k) == "there are not as many queries as keys"


def test_without_a_hopper_gpu_no_sequence_is_short() -> None:
    x = torch.empty(1, 70, 1, 32, dtype=HALF)
    assert not_short(x, x, x)
    with as_on_gpu(is_compiled=False, is_hopper=True):
        assert not_short(x, x, x) is None
    assert not_short(x, x, x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [SHORT, (1, 65, 1, 1, 32)], ids=str)
def test_a_short_sequence_is_turned_and_attended_to_by_one_kernel(shape, dtype, launched, device, poisoned) -> None:
    inputs, how = draw(shape, dtype, device, norm=False)
    assert_near(run(together, inputs, **how), exactly(inputs, **how), 8)
    assert launched == ["forward", "forward", "backward", "backward"]  # the check, then the call
    run(together, inputs, **how)
    assert launched[4:] == ["forward", "backward"]


def test_a_kernel_for_short_sequences_is_checked_for_each_type_and_number_of_blocks(launched, device) -> None:
    for T, checks in ((70, 1), (128, 0), (129, 1)):
        inputs, how = draw((1, T, 1, 1, 32), HALF, device, norm=False)
        before = len(launched)
        together(*inputs, **how)
        assert len(launched) - before == 1 + checks


def test_what_the_copy_engine_cannot_read_is_copied(launched, device) -> None:
    inputs, how = draw(SHORT, HALF, device, norm=False)
    right = run(together, inputs, **how)
    channels = inputs[0].shape[2]
    for wide in (torch.stack((inputs[0], inputs[0]), 3)[..., 0], torch.cat((inputs[0],) * 2, 2)[..., 1 : channels + 1]):
        wide.copy_(inputs[0])
        for ours, theirs in zip(run(together, [wide], **how), right, strict=True):
            assert torch.equal(ours, theirs)
    qkv = inputs[0].requires_grad_()
    together(qkv, **how).sum().backward()  # whose gradient has no memory of its own


def test_turned_queries_and_keys_are_not_kept(launched, device) -> None:
    inputs, how = draw(SHORT, HALF, device, norm=False)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        together(inputs[0].requires_grad_(), **how)
    B, T, H, _, D = SHORT
    angles = (T, D // 2)
    assert [tuple(x.shape) for x in kept] == [(B, T, 3 * H, D), (B, T, H, D), (B, H, T), angles, angles]
    assert kept[0].data_ptr() == inputs[0].data_ptr()


def test_forward_and_backward_of_a_short_sequence_are_an_operation_each(launched, device) -> None:
    inputs, how = draw(SHORT, HALF, device, norm=False)
    together(*inputs, **how).sum()  # the checks, and what they take
    watch = Watch()
    with watch:
        o = together(inputs[0].requires_grad_(), **how)
    assert [name for name in watch.names if name.startswith("lfs::")] == ["lfs::short_attention"]
    names = watch.backward_of(o)
    assert [name for name in names if name.startswith("lfs::")] == ["lfs::short_attention_backward"]
    assert not {"aten::cat", "aten::copy_", "aten::slice_backward", "aten::add"} & set(names)


def test_the_operations_for_short_sequences_keep_the_rules_of_torch(launched, device) -> None:
    (qkv,), how = draw(SHORT, HALF, device, norm=False)
    B, T, H, _, D = SHORT
    o, L = randn(B, T, H, D, dtype=HALF, device=device), randn(B, H, T, dtype=torch.float32, device=device)
    qkv = qkv.view(B, T, 3 * H, D)
    rest = H, how["cos"], how["sin"], 0.3, False, "auto"
    opcheck(torch.ops.lfs.short_attention.default, (qkv, *rest))
    opcheck(torch.ops.lfs.short_attention_backward.default, (o, qkv, o, L, *rest))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
def test_torch_compile_decides_as_a_call_does(launched, device) -> None:
    inputs, how = draw(SHORT, HALF, device, norm=False)

    def mix(qkv: Tensor) -> Tensor:
        return together(2 * qkv, **how).sin()

    torch._dynamo.reset()
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, inputs), run(mix, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert launched == ["forward", "forward", "backward", "backward", "forward", "backward"]


def test_selective_checkpointing_attends_to_a_short_sequence_once(launched, device) -> None:
    inputs, how = draw(SHORT, HALF, device, norm=False)
    keep = checkpointed("selective")
    assert keep is not None
    names = Watch().backward_of(keep(partial(together, **how), inputs[0].requires_grad_()))
    assert "lfs::short_attention_backward" in names
    assert "lfs::short_attention" not in names


def spoiled(kernel: Callable) -> Callable:
    """A kernel that gets a result wrong, by more than rounding explains."""

    def wrong(*tensors: Any, **how: Any) -> Any:
        result = kernel(*tensors, **how)
        (how["dk"] if result is None else result[0]).mul_(1.05)
        return result

    return wrong


def broken(_kernel: Callable) -> Callable:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("PassManager::run failed\nmore")

    return fail


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
@pytest.mark.parametrize("is_compiled", [False, True], ids=["as written", "compiled"])
@pytest.mark.parametrize(("fault", "problem"), [(spoiled, "it is off by"), (broken, "RuntimeError: PassManager")])
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_a_kernel_for_short_sequences_that_fails_its_check_is_replaced(
    step: str, fault: Callable, problem: str, is_compiled: bool, launched, device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_attention, step, fault(getattr(short_attention, step)))
    inputs, how = draw(SHORT, HALF, device, norm=False)
    torch._dynamo.reset()
    function = torch.compile(together, backend="aot_eager") if is_compiled else together
    with pytest.warns(RuntimeWarning, match=f"the short attention {step} kernel fails its self-check .*: {problem}"):
        ours = run(function, inputs, **how)
    assert_near(ours, exactly(inputs, **how), 12)
    other = "backward" if step == "forward" else "forward"
    assert launched.count(other) == 2  # the other step is as it was
    run(function, inputs, **how)  # without another warning, which would be an error


def test_a_kernel_asked_for_by_name_is_not_replaced_by_a_portable_one(launched, device, monkeypatch) -> None:
    monkeypatch.setattr(short_attention, "forward", broken(short_forward))
    inputs, how = draw(SHORT, HALF, device, norm=False)
    with (
        pytest.warns(RuntimeWarning, match="the short attention forward kernel fails"),
        pytest.raises(ValueError, match="cannot run here"),
    ):
        together(*inputs, **how, implementation="hopper")


# In the model --------------------------------------------------------------------------------------------------------

T, C = 6, 32


def layer(**how: Any) -> Attention:
    torch.manual_seed(0)
    rope = RotaryEmbedding(10_000.0, 8, T + 1)
    return Attention(C, 4, 2, **{"rope": rope, "qk_norm": True, "epsilon": 1e-6, "backend": "flash", **how})


def taken(
    how: dict,
    given: Callable[[], dict[str, Any]] = dict,
    *,
    grad: bool = True,
    attention: Attention | None = None,
    length: int = T,
    is_hopper: bool = False,
) -> list[str]:
    """The operations of a layer, forward and backward, for tensors without numbers on a GPU that need not be there."""
    attention, watch = attention or layer(**how), Watch()
    width = attention.query.weight.shape[1]
    tensors = FakeTensorMode(allow_non_fake_inputs=True)  # such as the weights
    with as_on_gpu(is_compiled=False, is_hopper=is_hopper), tensors, torch.set_grad_enabled(grad), watch:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_hopper):
            y = attention(torch.ones(2, length, width), **given())
        if grad:
            torch.autograd.grad(y.sum(), list(attention.parameters()), allow_unused=True)
    return watch.names


@pytest.mark.parametrize("how", [{}, {"window": 3}, {"qk_norm": False}, {"mixes_values": True}], ids=str)
def test_training_on_a_gpu_takes_it(how: dict) -> None:
    assert "lfs::rotary_attention_backward" in taken(how)
    assert "lfs::rotary_attention_backward" in taken(how, lambda: {"value_BTC": torch.ones(2, T, 16)})


@only_with_kernels
def test_a_mixed_layer_in_training_is_that_of_its_definition(device: str) -> None:
    attention = layer(mixes_values=True).to(device)
    assert attention.value_mix is not None
    attention.value_mix.data = torch.tensor([0.7, -0.3], device=device)
    inputs = [randn(2, T, width, dtype=torch.float32, device=device, seed=width) for width in (C, C // 2)]

    def layer_of(x: Tensor, value_BTC: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(dict(attention.named_parameters()), weights, strict=True))
        return torch.func.functional_call(attention, named, (x,), {"value_BTC": value_BTC})

    leaves = [*inputs, *(weight.detach() for weight in attention.parameters())]
    with as_written():
        plain = differentiate(layer_of, leaves)
    with as_on_gpu(is_compiled=False):
        fused = differentiate(layer_of, leaves)
    for ours, right in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "length", "is_short"),
    [
        ({}, 256, True),
        ({}, 300, False),
        ({"qk_norm": True}, 256, False),
        ({"window": 3}, 256, False),
        ({"mixes_values": True}, 256, False),
    ],
    ids=str,
)
def test_training_on_short_sequences_on_a_hopper_gpu_takes_the_kernels_for_them(how, length, is_short) -> None:
    attention = Attention(96, 3, rope=RotaryEmbedding(10_000.0, 32, 300), backend="flash", **how)
    given = (lambda: {"value_BTC": torch.ones(2, length, 96)}) if "mixes_values" in how else dict
    names = set(taken({}, given, attention=attention, length=length, is_hopper=True))
    short = {"lfs::short_attention", "lfs::short_attention_backward"}
    separate = {"lfs::qk_norm_rope", "lfs::flash_attention", "lfs::rotary_attention_backward"}
    assert names & (short | separate) == (short if is_short else separate)


ELSEWHERE = {
    "no rotation": ({"rope": None}, dict),
    "standard attention": ({"backend": "standard"}, dict),
    "given positions": ({}, lambda: {"positions": torch.arange(T)}),
    "a cache": ({}, lambda: {"cache": KVCache(ModelConfig(width=C, heads=4, kv_heads=2, layers=1), 2, T + 1)}),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_it_is_not_for_goes_the_other_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfs_cli.model.attention.rotary_attention", None)
    assert taken(*ELSEWHERE[case])


def test_without_gradients_or_a_gpu_all_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfs_cli.model.attention.rotary_attention", None)
    assert taken({}, grad=False)
    assert layer(backend="auto")(torch.ones(2, T, C)).shape == (2, T, C)


def loss_and_gradients(function: Callable[[], Tensor], model: torch.nn.Module) -> list[Tensor]:
    loss = function()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers take the two operations from here on."""
    monkeypatch.setattr(Attention, "_kernel_of_all", lambda *_: None)


@only_with_kernels
@pytest.mark.parametrize("how", [{}, {"window": 3, "qk_norm": False}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_the_layer_computes_the_same_either_way(how: dict, dtype, device, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = layer(**how).to(device)
    x = randn(2, T, C, dtype=torch.float32, device=device)
    documents = torch.tensor([0, 4, T, 2 * T], device=device)

    def loss() -> Tensor:
        with torch.autocast(device, dtype) if dtype else nullcontext():
            return attention(x, documents=documents).float().square().sum()

    with as_on_gpu(is_compiled=False):
        ours = loss_and_gradients(loss, attention)
        apart(monkeypatch)
        theirs = loss_and_gradients(loss, attention)
    for mine, right in zip(ours, theirs, strict=True):
        assert torch.equal(mine, right)


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm and rope"])
@pytest.mark.parametrize("implementation", ["auto", "triton"])  # auto: on a Hopper GPU, the kernel for it
@pytest.mark.parametrize("shape", [(2, 1000, 4, 4, 64), (1, 1024, 4, 2, 64), (1, 515, 4, 1, 128)], ids=str)
def test_in_bfloat16_it_is_as_accurate_as_the_two_operations(shape, implementation, norm, poisoned) -> None:
    inputs, how = draw(shape, torch.bfloat16, "cuda", norm=norm)
    kernel = {"implementation": implementation}
    results = run(together, inputs, **how, **kernel), run(separately, inputs, **how, **kernel), exactly(inputs, **how)
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs, exact in zip(*results, strict=True):
        assert_as_accurate(ours, theirs, exact)
        if implementation == "triton":
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # a compiler has its own
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_model_under_autocast_has_the_same_loss_and_gradients(
    head_dim: int, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"width": 4 * head_dim, "heads": 4, "kv_heads": 2, "layers": 2, "qk_norm": True}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=512, context_length=256, attention="flash", **shape)).cuda()
    tokens_BT = torch.randint(512, (4, 257), generator=torch.Generator().manual_seed(1)).cuda()

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return next_token_loss(model.hidden(tokens_BT), model.head_weight, targets_BT)

    def measured() -> list[Tensor]:
        torch.compiler.reset()
        function = torch.compile(loss) if is_compiled else loss
        return loss_and_gradients(lambda: function(tokens_BT[:, :-1], tokens_BT[:, 1:]), model)

    ours = measured()
    apart(monkeypatch)
    theirs = measured()
    for mine, right in zip(ours, theirs, strict=True):
        size = float(right.abs().max())
        torch.testing.assert_close(mine, right, rtol=0.02, atol=0.02 * size)  # atomics add in any order


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_gradients() -> None:
    inputs, how = draw((2, 256, 4, 2, 64), torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in inputs]
    how |= {"implementation": "triton"}  # whose gradients are equal to the bit

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(together(*leaves, **how).sum(), leaves)

    graph, replayed = recorded(gradients)
    with torch.no_grad():
        leaves[0].copy_(leaves[0].roll(1, 0))
    graph.replay()
    for ours, theirs in zip(replayed, gradients(), strict=True):
        assert torch.equal(ours, theirs)


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("B", "H"), [(2, 3), (40, 16)])  # fewer and more heads than fit at once
@pytest.mark.parametrize("T", [64, 65, 128, 129, 200, 256, 257])
def test_short_sequences_are_as_accurate_as_the_two_operations(T: int, B: int, H: int, dtype, poisoned) -> None:
    inputs, how = draw((B, T, H, H, 32), dtype, "cuda", norm=False)
    results = run(together, inputs, **how), run(separately, inputs, **how), exactly(inputs, **how)
    for ours, theirs, exact in zip(*results, strict=True):
        assert_as_accurate(ours, theirs, exact)
    watch = Watch()
    with watch:
        together(inputs[0].requires_grad_(), **how)
    assert ("lfs::short_attention" in watch.names) == (64 < T < 257)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("T", [65, 200, 256])
def test_a_hundred_runs_on_short_sequences_are_equal_to_the_bit(T: int) -> None:
    inputs, how = draw((20, T, 16, 16, 32), torch.bfloat16, "cuda", norm=False)
    first = run(together, inputs, **how)
    for _ in range(100):
        for again, before in zip(run(together, inputs, **how), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.filterwarnings("default")  # a compiler has its own
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_short_sequences_are_the_same_to_inductor_and_under_checkpointing(kind: str) -> None:
    inputs, how = draw((4, 200, 4, 4, 32), torch.bfloat16, "cuda", norm=False)
    keep = checkpointed(kind)
    attend = partial(together, **how)

    def mix(qkv: Tensor) -> Tensor:
        return (attend(qkv.clone()) if keep is None else keep(attend, qkv.clone())).clone()

    torch._dynamo.reset()
    for function in (mix, torch.compile(mix)):
        for ours, theirs in zip(run(function, inputs), run(attend, inputs), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@needs_hopper
def test_a_cuda_graph_replays_short_sequences() -> None:
    inputs, how = draw((8, 256, 4, 4, 32), torch.bfloat16, "cuda", norm=False)
    qkv = inputs[0].requires_grad_()

    def found() -> tuple[Tensor, Tensor]:
        o = together(qkv, **how)
        return o.detach(), torch.autograd.grad(o.sum(), qkv)[0]  # what lives on must not hold autograd's graph

    graph, replayed = recorded(found)
    with torch.no_grad():
        qkv.copy_(qkv.roll(1, 0))
    graph.replay()
    for ours, theirs in zip(replayed, found(), strict=True):
        assert torch.equal(ours, theirs)
