"""Vectors of tokens and the gradients of their tables against float64: PyTorch's steps, and the kernels interpreted."""

from collections.abc import Callable

import pytest
import torch
from fused_cases import DTYPES, HAS_KERNELS, Watch, assert_near, randn, stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfs_cli.config import ModelConfig
from lfs_cli.kernels import embedding as module
from lfs_cli.kernels.embedding import look_up, reference_look_up, unavailable
from lfs_cli.kernels.operation import as_on_gpu, as_written
from lfs_cli.model import Transformer

CHUNK = module.CHUNK
TEXTS = {
    "one token": [0],
    "all different": list(range(40)),
    "all the same": [3] * (CHUNK * (module.JOINED + 3) + 5),
    "a run to the end of a chunk": [1] * CHUNK + [2],
    "a run over one border": [1] * 5 + [2] * CHUNK + [39] * 3,
    "runs over many borders, one after the other": [1] * (3 * CHUNK + 1) + [2] * (2 * CHUNK) + [3] * (2 * CHUNK - 1),
    "as many chunks as are joined at once": [7] * (CHUNK * (module.JOINED + 1)) + [8],
    "nothing": [],
}


def differentiate(
    look: Callable[..., list[Tensor]], tokens: Tensor, weights: list[Tensor], dtypes: list[torch.dtype]
) -> list[Tensor]:
    """The vectors of all tables and the gradients of these."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    found = look(tokens, leaves, dtypes)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randint(-8, 9, y.shape, generator=generator).to(y.device, y.dtype) / 4 for y in found]
    return [*(y.detach() for y in found), *torch.autograd.grad(found, leaves, upstream)]


def by_definition(tokens: Tensor, weights: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """In float64, whatever ``dtypes`` say."""
    return [reference_look_up(tokens, weight, torch.float64) for weight in weights]


def assert_right(tokens: Tensor, widths: list[int], dtype: torch.dtype, device: str, rows: int = 40) -> None:
    weights = [randn(rows, C, dtype=torch.float32, device=device, seed=C) for C in widths]
    ours = differentiate(look_up, tokens, weights, [dtype] * len(widths))
    exact = differentiate(by_definition, tokens, [weight.double() for weight in weights], [])
    n = len(widths)
    assert_near(ours[:n], exact[:n], 2)
    assert_near(ours[n:], exact[n:], 4)
    assert {x.dtype for x in ours[:n]} == {dtype}
    assert {x.dtype for x in ours[n:]} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_vectors_and_gradients_match_float64(text: str, dtype: torch.dtype, device: str, poisoned: None) -> None:
    tokens = torch.tensor(TEXTS[text], dtype=torch.int64, device=device)
    mixed = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).to(device)]
    assert_right(mixed, [24, 1, 300], dtype, device)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=8), st.integers(1, 40))
def test_any_runs_are_summed(runs: list[tuple[int, int]], width: int) -> None:
    tokens = torch.tensor([t for t, length in runs for _ in range(length)], dtype=torch.int64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_right(tokens.to(device), [width], torch.float32, device, rows=10)


def test_tokens_of_any_shape(device: str) -> None:
    weight = randn(9, 5, dtype=torch.float32, device=device)
    for dtype in (torch.int32, torch.int64):
        tokens = torch.tensor([[8, 0], [3, 8], [1, 1]], dtype=dtype, device=device).T
        (found,) = look_up(tokens, [weight], [torch.float32])
        assert torch.equal(found, weight[tokens.long()])


def test_tables_that_get_no_gradient_have_none(device: str) -> None:
    weights = [randn(9, 5, dtype=torch.float32, device=device).requires_grad_() for _ in range(2)]
    first, _ = look_up(torch.tensor([1, 1], device=device), weights, [torch.float32] * 2)
    first.sum().backward()
    assert weights[0].grad is not None
    assert weights[0].grad[1].tolist() == [2.0] * 5
    assert weights[1].grad is None


def test_equal_runs_are_equal_to_the_bit(device: str) -> None:
    tokens = torch.randint(0, 6, (700,), generator=torch.Generator().manual_seed(0)).to(device)
    weights = [randn(6, 40, dtype=torch.float32, device=device)]
    runs = [differentiate(look_up, tokens, weights, [torch.float16]) for _ in range(3 if device == "cpu" else 100)]
    assert all(torch.equal(ours, first) for run in runs for ours, first in zip(run, runs[0], strict=True))


def test_tables_must_fit_together() -> None:
    with pytest.raises(ValueError, match="of one V"):
        look_up(torch.tensor([0]), [torch.ones(2, 3), torch.ones(3, 3)], [torch.float32] * 2)
    with pytest.raises(ValueError, match=r"int32 or int64, got torch\.int16"):
        look_up(torch.tensor([0], dtype=torch.int16), [torch.ones(2, 3)], [torch.float32])
    assert look_up(torch.tensor([0]), [], []) == []
    assert unavailable(torch.ones(2, 3, dtype=torch.float64)) == "it needs float32"


@pytest.mark.skipif(not HAS_KERNELS, reason="PyTorch refuses them")
def test_tokens_that_are_not_in_the_table_are_loud_and_touch_nothing(device: str) -> None:
    weight = randn(3 * 4, 5, dtype=torch.float32, device=device)[4:8].requires_grad_()  # others are on both sides
    tokens = torch.tensor([-1, 4, 2] * 20, device=device)
    (found,) = look_up(tokens, [weight], [torch.float32])
    assert found[0::3].isnan().all()
    assert found[1::3].isnan().all()
    assert torch.equal(found[2], weight[2])
    (gradient,) = torch.autograd.grad(found, weight, torch.ones_like(found))
    assert gradient.tolist() == [[0.0] * 5, [0.0] * 5, [20.0] * 5, [0.0] * 5]


@pytest.mark.skipif(not HAS_KERNELS, reason="the operations")
def test_the_operations_keep_the_rules_of_torch(device: str) -> None:
    weight = randn(9, 20, dtype=torch.float32, device=device)
    tokens = torch.tensor([[8, 0, 3], [8, 1, 1]], device=device)
    torch.library.opcheck(torch.ops.lfs.embedding.default, (tokens, weight, torch.float16))
    ordered = tokens.reshape(-1).int().sort()
    dy = randn(2, 3, 20, dtype=torch.float16, device=device)
    torch.library.opcheck(torch.ops.lfs.embedding_backward.default, (dy, *ordered, 9))


BROKEN = {
    "a wrong row": ("_launch_forward", lambda tokens, *how: reference_look_up(tokens ^ 1, *how)),
    "a run that is cut": ("_launch_backward", lambda dy, *how: 0.9 * module._reference_backward(dy, *how)),
    "not a number": ("_launch_backward", lambda dy, *how: module._reference_backward(dy, *how) * float("nan")),
    "no kernel": ("_launch_forward", lambda *how: [][0]),
}


@pytest.mark.parametrize("text", [[3, 3, 1], []], ids=str)
@pytest.mark.parametrize("fault", BROKEN)
def test_kernels_that_fail_their_check_are_passed_over_with_a_warning(
    fault: str, text: list[int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(module, monkeypatch, forward=reference_look_up)
    monkeypatch.setattr(module, *BROKEN[fault])
    tokens = torch.tensor(text, dtype=torch.int64, device=device)
    with pytest.warns(RuntimeWarning, match=f"the embedding kernel fails its self-check on {device}.* and is not used"):
        assert_right(tokens, [7], torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_that_are_right_are_used_without_a_word(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = stand_in(module, monkeypatch, forward=reference_look_up)
    assert_right(torch.tensor([3, 3, 1], device=device), [7, 9], dtype, device)
    assert launched == ["forward", "backward", "forward", "forward", "backward", "backward"]  # the check comes first


SHAPE = {"vocab_size": 23, "context_length": 12, "width": 32, "layers": 4, "heads": 4, "feed_forward": "relu2"}
OPTIONS = {"qk_norm": True, "embedding_norm": True, "embedding_skip": True, "value_embeddings": 2, "attention": "flash"}


def small_model(device: str, **more: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SHAPE, **OPTIONS, **more)).to(device)


def results(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """What the head reads, and the gradient of each weight."""
    hidden = model.hidden(tokens)
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)).sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"hidden": hidden.detach(), **found}


@pytest.mark.skipif(not HAS_KERNELS, reason="the operations")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", [(2, 9), (12,)], ids=str)
def test_a_model_in_training_takes_them_and_is_that_of_its_definition(
    shape: tuple[int, ...], checkpointing: str, device: str
) -> None:
    model = small_model(device, checkpointing=checkpointing)
    tokens = torch.randint(23, shape, generator=torch.Generator().manual_seed(1)).to(device)
    ours = {"lfs::embedding", "lfs::embedding_backward", "lfs::rms_norm", "lfs::rms_norm_backward"}
    with as_written(), Watch() as watch:
        plain = results(model, tokens)
    assert not ours & set(watch.names)
    with as_on_gpu(is_compiled=False), Watch() as watch:
        fused = results(model, tokens)
    assert ours <= set(watch.names)
    assert fused.keys() == plain.keys()
    for name, right in plain.items():
        torch.testing.assert_close(fused[name], right, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: name + said)


@pytest.mark.skipif(not HAS_KERNELS, reason="the operations")
def test_tables_that_are_watched_or_of_another_class_are_called(device: str) -> None:
    model, called = small_model(device), []
    model.value_embeddings[1].register_forward_hook(lambda *_: called.append("hook"))
    with as_on_gpu(is_compiled=False), Watch() as watch:
        model.hidden(torch.tensor([[1, 2]], device=device))
        with torch.no_grad():
            small_model(device).hidden(torch.tensor([[1, 2]], device=device))
    assert called == ["hook"]
    assert "lfs::embedding" not in watch.names
