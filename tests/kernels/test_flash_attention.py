"""The public functions, whatever computes them; and the choice of what does, with kernels that are made up.

What is said of every implementation is tested with the definition here, and with the portable kernel too where it can
run: on a GPU, or in the process with Triton's interpreter that `test_kernels_without_a_gpu.py` starts.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import assert_matches_reference, draw, recorded, run
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lfs_cli.kernels.flash_attention as module
from lfs_cli.kernels import hopper_attention, self_check, triton_attention
from lfs_cli.kernels import reference_attention as reference
from lfs_cli.kernels.flash_attention import FlashAttention, choose, flash_attention, flash_attention_packed
from lfs_cli.kernels.reference_attention import document_spans, reference_attention, visible
from lfs_cli.kernels.rope import reference_qk_norm_rope
from lfs_cli.training.randomness import fixed_order

SHAPE = (2, 21, 21, 4, 2, 16)  # B, T, S, H, G, D


@pytest.fixture(params=["reference", "triton"])
def attend(request: pytest.FixtureRequest, device: str) -> Callable[..., Tensor]:
    if request.param == "triton" and triton_attention.unavailable_for(torch.device(device), torch.float32, 16):
        pytest.skip("the portable kernel cannot run in this process")
    return partial(flash_attention, implementation=request.param)


@pytest.fixture
def attend_packed(attend: partial) -> Callable[..., Tensor]:
    return partial(flash_attention_packed, **attend.keywords)


def assert_same(ours: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, right, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


OPTIONS = [
    {},
    {"causal": False, "scale": 0.3},
    {"window": 5, "softcap": 2.0},
    {"documents": (0, 9, 21, 30)},
    {"documents": (3, 9, 30), "window": 4, "softcap": 3.0, "causal": False},
]


@pytest.mark.parametrize("how", OPTIONS, ids=str)
def test_every_option_means_what_the_definition_says(attend: Callable, how: dict, device: str, poisoned: None) -> None:
    inputs, do = draw(SHAPE, torch.float32, device)
    how = {name: torch.tensor(x, device=device) if name == "documents" else x for name, x in how.items()}
    assert_same(run(attend, inputs, do, **how), run(reference_attention, inputs, do, **how))


@pytest.mark.parametrize("how", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_packed_heads_give_the_same_bits_and_one_gradient(
    attend: Callable, attend_packed: Callable, kv_heads: int | None, how: dict, device: str, poisoned: None
) -> None:
    (q, k, v), do = draw((2, 21, 21, 4, kv_heads or 4, 16), torch.float32, device)
    qkv = torch.stack([q, k, v], dim=2) if kv_heads is None else torch.cat([q, k, v], dim=2)
    o = attend_packed(qkv.requires_grad_(), kv_heads=kv_heads, **how)
    (dqkv,) = torch.autograd.grad(o, qkv, do)
    o_alone, *gradients = run(attend, [q, k, v], do, **how)
    expected = torch.stack(gradients, dim=2) if kv_heads is None else torch.cat(gradients, dim=2)
    assert dqkv.is_contiguous()
    assert_same([o, dqkv], [o_alone, expected], rtol=0, atol=0)


def test_packed_heads_are_not_copied(attend_packed: Callable, device: str) -> None:
    qkv = torch.randn(2, 21, 3, 4, 16, device=device, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend_packed(qkv)
    assert [tuple(x.shape) for x in kept] == [(2, 21, 12, 16), (2, 21, 4, 16), (2, 4, 21)]
    assert kept[0].data_ptr() == qkv.data_ptr()


@pytest.mark.parametrize(
    ("shape", "kv_heads"), [((2, 3, 4, 16), None), ((2, 3, 4, 16), 2), ((2, 3, 2, 4, 16), None), ((2, 3, 3, 4, 16), 2)]
)
def test_packed_heads_that_do_not_fit_are_refused(shape: tuple, kv_heads: int | None) -> None:
    with pytest.raises(ValueError, match="expected qkv"):
        flash_attention_packed(torch.zeros(shape), kv_heads=kv_heads)


def test_q_k_v_o_and_one_number_a_query_are_kept_for_backward(attend: Callable, device: str) -> None:
    inputs, _ = draw(SHAPE, torch.float32, device)
    leaves = [x.requires_grad_() for x in inputs]
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o = attend(*leaves)
    assert [x.data_ptr() for x in kept[:4]] == [x.data_ptr() for x in (*leaves, o)]
    assert [(x.shape, x.dtype) for x in kept[4:]] == [((2, 4, 21), torch.float32)]


def test_heads_that_lie_first_are_not_copied(attend: Callable, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), do = draw(SHAPE, torch.float32, device)
    expected = run(attend, [q, k, v], do)
    first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert all(triton_attention._readable(x) is x for x in first)
    assert_same(run(attend, first, do), expected)


@pytest.mark.parametrize("leading", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_the_interface_of_cs336(causal: bool, leading: tuple[int, ...], device: str) -> None:
    q, k, v, do = (torch.randn(*leading, 40, 16, device=device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = FlashAttention.apply(*leaves, causal)
    saved = [x for x in o.grad_fn.saved_tensors if x.shape == (*leading, 40)]
    score = q @ k.mT / 4
    if causal:
        score = score.masked_fill(torch.ones(40, 40, dtype=torch.bool, device=device).triu(1), float("-inf"))
    plain = score.softmax(-1) @ v
    assert len(saved) == 1
    assert len(o.grad_fn.saved_tensors) == 5
    torch.testing.assert_close(saved[0], score.logsumexp(-1))
    torch.testing.assert_close(o, plain)
    expected = torch.autograd.grad(plain, leaves, do)
    assert_same(list(torch.autograd.grad(o, leaves, do)), list(expected))


def test_cs336s_interface_is_not_causal_unless_told(device: str) -> None:
    q, k, v = torch.randn(3, 1, 5, 16, device=device)
    assert torch.equal(FlashAttention.apply(q, k, v), FlashAttention.apply(q, k, v, False))
    assert not torch.equal(FlashAttention.apply(q, k, v), FlashAttention.apply(q, k, v, True))


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 3), (2, 0, 0)])
def test_nothing_in_gives_nothing_out(attend: Callable, B: int, T: int, S: int, device: str, poisoned: None) -> None:
    inputs, do = draw((B, T, S, 2, 1, 16), torch.float32, device)
    o, dq, dk, dv = run(attend, inputs, do)
    assert o.shape == dq.shape == (B, T, 2, 16)
    assert torch.equal(dk, torch.zeros_like(dk))
    assert torch.equal(dv, torch.zeros_like(dv))


HEADS = (2, 3, 2, 16)
REFUSALS = [  # shapes of q, k and v, options, what the message says
    ((2, 3, 16), (2, 3, 16), (2, 3, 16), {}, "expected q"),
    ((2, 3, 1, 16), (2, 3, 1, 16), (2, 4, 1, 16), {}, "expected q"),
    ((2, 3, 1, 16), (1, 3, 1, 16), (1, 3, 1, 16), {}, "differ in batch or head dimension"),
    ((2, 3, 1, 16), (2, 3, 1, 8), (2, 3, 1, 8), {}, "differ in batch or head dimension"),
    ((2, 3, 4, 16), (2, 3, 3, 16), (2, 3, 3, 16), {}, "4 query heads cannot share 3 key/value heads"),
    ((2, 3, 2, 0), (2, 3, 2, 0), (2, 3, 2, 0), {}, "at least one channel"),
    (HEADS, HEADS, HEADS, {"scale": 0.0}, "scale must be above 0"),
    (HEADS, HEADS, HEADS, {"window": 0}, "window must be at least 1"),
    (HEADS, HEADS, HEADS, {"softcap": 0.0}, "softcap must be above 0"),
    (HEADS, HEADS, HEADS, {"documents": torch.zeros(2, 3)}, r"documents must be \(N \+ 1,\) integers"),
    (HEADS, HEADS, HEADS, {"documents": torch.tensor([0.0, 6.0])}, r"documents must be \(N \+ 1,\) integers"),
    (HEADS, HEADS, HEADS, {"documents": torch.tensor([0, 6], device="meta")}, "documents are on meta"),
    (HEADS, (2, 4, 2, 16), (2, 4, 2, 16), {"documents": torch.tensor([0, 6])}, "as many queries as keys, got 3 and 4"),
    (HEADS, HEADS, HEADS, {"implementation": "hoper"}, "unknown implementation 'hoper'"),
]


@pytest.mark.parametrize(("q", "k", "v", "options", "message"), REFUSALS)
def test_what_does_not_fit_is_refused(
    q: tuple, k: tuple, v: tuple, options: dict[str, Any], message: str, device: str
) -> None:
    options = {name: x.to(device) if isinstance(x, Tensor) and x.is_cpu else x for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        flash_attention(*(torch.zeros(shape, device=device) for shape in (q, k, v)), **options)


def test_mixed_types_are_refused(device: str) -> None:
    (q, k, v), _ = draw(SHAPE, torch.float32, device)
    with pytest.raises(ValueError, match="differ in type"):
        flash_attention(q, k.half(), v)


def test_mixed_devices_are_refused(device: str) -> None:
    (q, k, v), _ = draw(SHAPE, torch.float32, device)
    with pytest.raises(ValueError, match="different devices"):
        flash_attention(q, k.to("meta"), v)


def test_the_gradient_of_a_sum_has_no_memory_of_its_own(attend: Callable, device: str) -> None:
    inputs, _ = draw(SHAPE, torch.float32, device)
    expanded = torch.ones((), device=device).expand(inputs[0].shape)
    assert_same(run(attend, inputs, expanded), run(reference_attention, inputs, expanded))


def test_gradients_have_no_gradients(attend: Callable, attend_packed: Callable, device: str) -> None:
    q, k, v = (x.requires_grad_() for x in draw((1, 5, 5, 2, 2, 16), torch.float32, device)[0])
    for o in (attend(q, k, v), attend_packed(torch.stack([q, k, v], dim=2))):
        (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            dq.sum().backward()


def test_only_needed_gradients_come_back(attend: Callable, device: str) -> None:
    (q, k, v), _ = draw(SHAPE, torch.float32, device)
    attend(q.requires_grad_(), k, v).sum().backward()
    assert q.grad is not None
    assert k.grad is None


def test_checkpointing_gives_the_same_gradients(attend: Callable, device: str) -> None:
    inputs, do = draw(SHAPE, torch.float32, device)
    recomputed = run(lambda *qkv: checkpoint(attend, *qkv, use_reentrant=False), inputs, do)
    assert_same(recomputed, run(attend, inputs, do), rtol=0, atol=0)


def test_autocast_decides_the_type(attend: Callable, attend_packed: Callable, device: str) -> None:
    (q, k, v), do = draw(SHAPE, torch.float32, device)
    leaves = [q.requires_grad_(), k.half().requires_grad_(), v.requires_grad_()]
    with torch.autocast(device, dtype=torch.float16):
        mixed = attend(*leaves)
        packed = attend_packed(torch.cat([q, k, v], dim=2), kv_heads=2)
    expected = run(attend, [x.half() for x in (q, k, v)], do.half())
    assert mixed.dtype == packed.dtype == torch.float16
    assert torch.equal(mixed, expected[0])
    assert torch.equal(packed, expected[0])
    gradients = torch.autograd.grad(mixed, leaves, do.half())
    assert [x.dtype for x in gradients] == [torch.float32, torch.float16, torch.float32]
    assert_same([x.half() for x in gradients], expected[1:], rtol=0, atol=0)


def test_autocast_decides_the_type_of_heads_that_lie_first_too(device: str) -> None:
    (q, k, v), do = draw((2, 24, 24, 2, 2, 16), torch.float32, device)
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    with torch.autocast(device, dtype=torch.float16):
        mixed = FlashAttention.apply(*leaves, True)
    expected = run(flash_attention, [x.half() for x in (q, k, v)], do.half(), causal=True)
    assert mixed.dtype == torch.float16
    assert torch.equal(mixed, expected[0].transpose(1, 2))
    gradients = torch.autograd.grad(mixed, leaves, do.half().transpose(1, 2))
    assert [x.dtype for x in gradients] == [torch.float32] * 3
    assert_same([x.half().transpose(1, 2) for x in gradients], expected[1:], rtol=0, atol=0)


def test_float64_stays_float64_under_autocast() -> None:
    inputs, do = draw(SHAPE, torch.float64, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(flash_attention, inputs, do)
    assert_same(ours, run(reference_attention, inputs, do), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", [{}, {"window": 5, "softcap": 3.0, "documents": (0, 9, 21, 30)}], ids=str)
def test_torch_compile_sees_one_whole_graph(attend: Callable, attend_packed: Callable, how: dict, device: str) -> None:
    inputs, do = draw(SHAPE, torch.float32, device)
    documents = torch.tensor(how["documents"], device=device) if how else None

    def mix(q: Tensor, k: Tensor, v: Tensor, attend: Callable = attend) -> Tensor:
        plain = attend(2 * q, k, v, **how | {"documents": documents}).sin()
        return plain + attend_packed(torch.cat([q, k, v], dim=2), kv_heads=2)

    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, inputs, do), run(mix, inputs, do))


def test_the_operations_keep_the_promises_of_custom_operations(attend: Callable, device: str) -> None:
    (q, k, v), _ = draw(SHAPE, torch.float32, device)
    documents = document_spans(torch.tensor([0, 9, 42], device=device), 2, 21)
    options = (documents, True, 0.3, 5, None, False, attend.keywords["implementation"])
    torch.library.opcheck(torch.ops.lfs.flash_attention.default, (q.requires_grad_(), k, v.requires_grad_(), *options))
    packed = torch.cat([q, k, v], dim=2).detach().requires_grad_()
    torch.library.opcheck(torch.ops.lfs.flash_attention_packed.default, (packed, 4, *options))


def test_document_spans_cut_at_the_ends_of_rows() -> None:
    spans = document_spans(torch.tensor([0, 2, 2, 7, 9]), 2, 5)
    assert spans.dtype == torch.int32
    assert spans[0].tolist() == [[0, 0, 2, 2, 2], [0, 0, 2, 2, 5]]
    assert spans[1].tolist() == [[2, 2, 5, 5, 5], [2, 2, 4, 4, 5]]


def test_the_mask_is_the_one_in_the_books() -> None:
    def drawn(**how: Any) -> list[str]:
        return ["".join(map(str, row)) for row in visible(2, 5, torch.device("cpu"), **how)[0].int().tolist()]

    assert drawn() == ["11110", "11111"]
    assert drawn(window=3) == ["01110", "00111"]
    assert drawn(causal=False) == ["11111", "11111"]
    assert drawn(causal=False, window=2) == ["00111", "00011"]
    spans = document_spans(torch.tensor([0, 2, 5]), 1, 5)
    seen = visible(5, 5, torch.device("cpu"), spans=spans)[0]
    assert torch.equal(seen, torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool())


# The choice, with kernels that are made up ---------------------------------------------------------------------------


class MadeUp:
    """A Hopper kernel: the definition, unless told otherwise, that counts its calls and the tiles it was asked for.

    Args:
        spoil: Given the name of a step and its results, returns others.
    """

    def __init__(self, spoil: Callable[[str, tuple], tuple] = lambda step, results: results) -> None:
        self.calls: list[str] = []
        self.tiles: list[object] = []
        self.spoil = spoil

    def unavailable_reason(self, q: Tensor, k: Tensor, v: Tensor, *, causal, window, softcap, documents) -> str | None:
        return "it has no windows" if window is not None else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, programs=None, tile=None
    ) -> tuple:
        self.calls.append(f"forward {q.shape[1]}")
        self.tiles.append(tile)
        return self.spoil("forward", reference.forward(q, k, v, causal=causal, scale=scale))

    def backward(self, q, k, v, o, L, do, *, causal: bool, scale: float, programs=None, **into: Tensor) -> tuple:
        self.calls.append(f"backward {q.shape[1]}")
        return self.spoil("backward", reference.backward(q, k, v, o, L, do, causal=causal, scale=scale, **into))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., MadeUp]]:
    """Put a made-up kernel in the place of the one for Hopper, and forget what earlier checks found."""

    def put(*spoil: Callable) -> MadeUp:
        kernel = MadeUp(*spoil)
        for name in ("unavailable_reason", "forward", "backward"):
            monkeypatch.setattr(hopper_attention, name, getattr(kernel, name))
        return kernel

    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(module, "CHECKED_LENGTH", 64)
    monkeypatch.setattr(triton_attention, "unavailable_reason", lambda *_, **__: "it is not wanted here")
    return put


def wrong(step: str, how: Callable[[Tensor], Tensor]) -> Callable[[str, tuple], tuple]:
    """Spoil the last result of one step."""
    return lambda at, results: (*results[:-1], how(results[-1])) if at == step else results


def test_the_best_that_can_run_is_chosen_and_the_reason_given(hopper: Callable) -> None:
    hopper()
    (q, k, v), _ = draw(SHAPE, torch.float32, "cpu")
    refused = "not hopper: it has no windows; not triton: it is not wanted here"
    assert choose(q, k, v) == ("hopper", "the fastest here")
    assert choose(q, k, v, window=3) == ("reference", refused)
    assert choose(q, k, v, implementation="reference") == ("reference", "chosen by name")
    with pytest.raises(ValueError, match="cannot run here: it has no windows"):
        choose(q, k, v, window=3, implementation="hopper")


def test_a_fixed_order_is_asked_of_the_gradients_alone(hopper: Callable) -> None:
    hopper()
    (q, k, v), _ = draw(SHAPE, torch.float32, "cpu")
    ordered = ("hopper", "the fastest here; another for gradients, summed in a fixed order")
    assert choose(q, k, v, deterministic=True) == ordered
    with fixed_order():
        assert choose(q, k, v) == ordered
        assert choose(q, k, v, deterministic=False) == ("hopper", "the fastest here")
    assert choose(q, k, v, deterministic=True, implementation="reference") == ("reference", "chosen by name")
    with pytest.raises(ValueError, match="cannot run here: its gradients are summed in no fixed order"):
        choose(q, k, v, deterministic=True, implementation="hopper")


def test_a_kernel_is_checked_once_for_each_step_type_and_head_dimension(hopper: Callable) -> None:
    kernel = hopper()
    inputs, do = draw(SHAPE, torch.float32, "cpu")
    run(flash_attention, inputs, do)
    assert kernel.calls == ["forward 64", "forward 21", "backward 64", "backward 21"]
    run(flash_attention, inputs, do)
    assert kernel.calls[4:] == ["forward 21", "backward 21"]
    flash_attention(*(x.bfloat16() for x in inputs))
    flash_attention(*(x[..., :8] for x in inputs))
    assert kernel.calls[6:] == ["forward 64", "forward 21", "forward 64", "forward 21"]


OTHER_KERNELS = {  # than that of SHAPE: changes of B, T, S, H, G, D, and options
    "of more heads a group": ((2, 21, 21, 4, 1, 16), {}),
    "that masks nothing": (SHAPE, {"causal": False}),
    "that works in other tiles": ((2, 40, 40, *SHAPE[3:]), {}),
}


@pytest.mark.parametrize("other", OTHER_KERNELS)
def test_a_kernel_is_checked_again_where_it_is_another_one(
    other: str, hopper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = hopper_attention.SHORT, hopper_attention.LONG
    monkeypatch.setattr(hopper_attention, "forward_tile", lambda T, D, *, causal: long if T > 30 else short)
    kernel = hopper()
    inputs, _ = draw(SHAPE, torch.float32, "cpu")
    flash_attention(*inputs)
    shape, options = OTHER_KERNELS[other]
    others, _ = draw(shape, torch.float32, "cpu")
    kernel.spoil = FAULTS["a wrong output"]
    with pytest.warns(RuntimeWarning, match="not used: forward: it is off by"):
        o = flash_attention(*others, **options)
    assert_same([o], [reference_attention(*others, **options)])
    assert choose(*inputs)[0] == "hopper"
    assert kernel.calls == ["forward 64", "forward 21", "forward 64"]
    assert kernel.tiles[2] == (long if shape[1] > 30 else short)


FAULTS = {
    "a wrong log-sum-exp": wrong("forward", lambda L: L / 2),
    "numbers that are none": wrong("forward", lambda L: L.clone().fill_(float("nan"))),
    "a wrong output": lambda at, results: (results[0] * 1.01, results[1]) if at == "forward" else results,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_forward_that_is_wrong_is_passed_over_with_a_warning(hopper: Callable, fault: str) -> None:
    kernel = hopper(FAULTS[fault])
    inputs, _ = draw(SHAPE, torch.float32, "cpu")
    with pytest.warns(RuntimeWarning, match="the hopper attention kernel fails its self-check on cpu and is not used"):
        o = flash_attention(*inputs)
    assert_same([o], [reference_attention(*inputs)])
    assert choose(*inputs)[0] == "reference"
    assert "not hopper: forward: it is off by" in choose(*inputs)[1]
    flash_attention(*inputs)
    assert kernel.calls == ["forward 64"]


def test_a_backward_that_is_wrong_is_passed_over_alone(hopper: Callable) -> None:
    kernel = hopper(wrong("backward", lambda dv: dv.flip(1)))
    inputs, do = draw(SHAPE, torch.float32, "cpu")
    with pytest.warns(RuntimeWarning, match="not used: backward: it is off by"):
        ours = run(flash_attention, inputs, do)
    assert_same(ours, run(reference_attention, inputs, do))
    assert kernel.calls == ["forward 64", "forward 21", "backward 64"]


@pytest.mark.parametrize("wrong_one", [None, "dq", "dk"])
def test_a_backward_that_turns_wrongly_is_passed_over(
    wrong_one: str | None, hopper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper()

    def backward(*tensors: Tensor, turn: tuple[Tensor, Tensor], programs: int | None = None, **how: Any) -> tuple:
        dq, dk, dv = reference.backward(*tensors, **how)
        cos, sin = turn
        right, further = (reference_qk_norm_rope(dq, dk, cos, sign * sin) for sign in (-1, 1))
        return *(further[i] if name == wrong_one else right[i] for i, name in enumerate(("dq", "dk"))), dv

    monkeypatch.setattr(hopper_attention, "backward", backward)
    (q, k, v), do = draw(SHAPE, torch.float32, "cpu")
    how = {"causal": True, "scale": 0.25}
    o, L = reference.forward(q, k, v, **how)
    angles = torch.rand(q.shape[1], q.shape[3] // 2)
    turn = angles.cos(), angles.sin()
    fault = pytest.warns(RuntimeWarning, match="not used: turned backward: it is off by")
    with fault if wrong_one else nullcontext():
        ours = module.run_backward(do, q, k, v, o, L, None, True, 0.25, None, None, False, "auto", turn=turn)
    dq, dk, dv = reference.backward(q, k, v, o, L, do, **how)
    assert_same(ours, (*reference_qk_norm_rope(dq, dk, turn[0], -turn[1]), dv))


def test_a_kernel_that_does_not_compile_is_passed_over(hopper: Callable) -> None:
    def fail(step: str, results: tuple) -> tuple:
        raise NotImplementedError("no such layout\nand a page of notes")

    hopper(fail)
    inputs, _ = draw(SHAPE, torch.float32, "cpu")
    with pytest.warns(RuntimeWarning, match="not used: forward: NotImplementedError: no such layout$"):
        flash_attention(*inputs)


@pytest.mark.parametrize("option", [{"window": 1}, {"softcap": 1e-6}, {"scale": 1e-9}, {"scale": 1e9}], ids=str)
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_options_that_leave_no_gradient_do_not_disturb_the_check(
    step: str, option: dict[str, float], hopper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(reference, step)

    def noisy(*tensors: Tensor, programs: int, tile: object = None, **how: Any) -> tuple[Tensor, ...]:
        return tuple(x + 1e-6 for x in real(*tensors, **how))

    monkeypatch.setattr(hopper_attention, step, noisy)
    q, k, _ = draw(SHAPE, torch.float32, "cpu")[0]
    how = {"causal": True, "scale": 0.25, "window": None, "softcap": None, "spans": None} | option
    assert module._self_check(step, "hopper", q, k, how) is None


def test_no_memory_is_not_a_fault_of_the_kernel(hopper: Callable) -> None:
    def fail(step: str, results: tuple) -> tuple:
        raise torch.OutOfMemoryError("40 GiB")

    hopper(fail)
    inputs, _ = draw(SHAPE, torch.float32, "cpu")
    with pytest.raises(torch.OutOfMemoryError):
        flash_attention(*inputs)
    assert not self_check._verdicts


def test_a_kernel_asked_for_by_name_is_not_replaced(hopper: Callable) -> None:
    hopper(FAULTS["a wrong output"])
    inputs, _ = draw(SHAPE, torch.float32, "cpu")
    with (
        pytest.warns(RuntimeWarning, match="fails its self-check"),
        pytest.raises(ValueError, match="flash_attention cannot run here: forward: it is off by"),
    ):
        flash_attention(*inputs, implementation="hopper")


def test_nothing_is_checked_while_a_graph_is_recorded(hopper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = hopper()
    inputs, _ = draw(SHAPE, torch.float32, "cpu")
    monkeypatch.setattr(self_check, "_is_capturing", lambda _: True)
    flash_attention(*inputs)
    assert kernel.calls == ["forward 21"]
    monkeypatch.setattr(self_check, "_is_capturing", lambda _: False)
    flash_attention(*inputs)
    assert kernel.calls[1:] == ["forward 64", "forward 21"]


@pytest.mark.parametrize(("needs", "deterministic"), [(False, False), (True, False), (True, True)])
def test_the_check_of_gradients_begins_beside_that_of_the_output(
    hopper: Callable, needs: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = hopper()
    monkeypatch.setattr(self_check, "_under_way", {})
    monkeypatch.setattr(module, "_may_begin", lambda _: True)
    (q, k, v), _ = draw(SHAPE, torch.float32, "cpu")
    flash_attention(q.requires_grad_(needs), k, v, deterministic=deterministic, implementation="hopper")
    begun = list(self_check._under_way.values())
    assert [future.result(timeout=30) for future in begun] == [None] * (needs and not deterministic)
    assert ("backward 64" in kernel.calls) == bool(begun)
    flash_attention(q, k, v, implementation="hopper")
    assert list(self_check._under_way.values()) == begun


@pytest.mark.parametrize("as_setting", [True, False])
def test_deterministic_gradients_are_summed_by_a_kernel_that_keeps_the_order(hopper: Callable, as_setting) -> None:
    kernel = hopper()
    inputs, do = draw(SHAPE, torch.float32, "cpu")
    torch.use_deterministic_algorithms(as_setting)
    try:
        run(flash_attention, inputs, do, deterministic=None if as_setting else True)
        assert kernel.calls == ["forward 64", "forward 21"]
        run(flash_attention, inputs, do, deterministic=False)
        assert kernel.calls[2:] == ["forward 21", "backward 64", "backward 21"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_check_happens_at_run_time_not_while_torch_compiles(hopper: Callable) -> None:
    kernel = hopper()
    inputs, do = draw(SHAPE, torch.float32, "cpu")
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, inputs, do), run(reference_attention, inputs, do))
    assert kernel.calls == ["forward 64", "forward 21", "backward 64", "backward 21"]


def test_packed_gradients_are_written_by_the_kernel_itself(hopper: Callable) -> None:
    kernel = hopper()
    qkv = torch.randn(2, 21, 3, 4, 16, requires_grad=True)
    flash_attention_packed(qkv).sum().backward()
    expected = qkv.detach().requires_grad_()
    reference_attention(*expected.unbind(2)).sum().backward()
    assert kernel.calls[-1] == "backward 21"
    assert_same([qkv.grad], [expected.grad])


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
def test_a_cuda_graph_replays_the_gradients_of_packed_documents() -> None:
    qkv = torch.randn(2, 256, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    documents = torch.tensor([0, 100, 300, 512], device="cuda")

    def gradient() -> Tensor:
        return torch.autograd.grad(flash_attention_packed(qkv, documents=documents).sum(), qkv)[0]

    graph, replayed = recorded(gradient)
    with torch.no_grad():
        qkv.copy_(qkv.roll(1, 0))
    documents[1] = 50
    graph.replay()
    assert torch.equal(replayed, gradient())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # a compiler has its own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_around_it(mode: str) -> None:
    inputs, do = draw((2, 256, 256, 4, 2, 64), torch.bfloat16, "cuda")
    compiled = torch.compile(lambda q, k, v: flash_attention(2 * q, k, v).sin(), fullgraph=True, mode=mode)
    hopper_attention._forward_order.cache_clear()  # what is kept from call to call is made under the compiler too
    hopper_attention._backward_order.cache_clear()
    found = [[x.clone() for x in run(compiled, inputs, do)] for _ in range(3)]  # a replay writes over the one before
    expected = run(lambda q, k, v: flash_attention(2 * q, k, v).sin(), inputs, do)
    for results in found:
        assert_same(results, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_programs_go_from_tile_to_tile(D: int) -> None:
    inputs, do = draw((16, 500, 500, 12, 12, D), torch.bfloat16, "cuda")  # 768 tiles
    assert_matches_reference(inputs, do, implementation="hopper")


ON_HOPPER = {  # B, T, S, H, G, and options
    "one query": ((2, 1, 1, 2, 2), {}),
    "one query of many keys": ((2, 1, 333, 4, 2), {}),
    "ragged": ((2, 333, 333, 4, 2), {}),
    "fewer queries than keys": ((2, 100, 333, 2, 2), {}),
    "nothing masked": ((2, 333, 300, 4, 2), {"causal": False}),
    "long": ((1, 4500, 4500, 2, 1), {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", ON_HOPPER)
def test_the_kernel_for_hopper_gpus_matches_the_definition(case: str, D: int, dtype: torch.dtype) -> None:
    shape, options = ON_HOPPER[case]
    inputs, do = draw((*shape, D), dtype, "cuda")
    assert_matches_reference(inputs, do, implementation="hopper", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("D", [32, 64, 128])
def test_a_hundred_runs_are_equal_to_the_bit(D: int, heads: tuple[int, int]) -> None:
    inputs, do = draw((2, 1000, 1000, *heads, D), torch.bfloat16, "cuda")
    first = run(flash_attention, inputs, do, deterministic=True)
    for _ in range(100):
        assert torch.equal(flash_attention(*inputs), first[0])  # forward has one order, whatever is asked for
        for again, before in zip(run(flash_attention, inputs, do, deterministic=True), first, strict=True):
            assert torch.equal(again, before)
