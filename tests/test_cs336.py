"""CS336's public behaviour, judged by formulas written here and by torch: layers, losses, optimizers and files.

The definitions are those of the handouts of Stanford CS336, assignments 1 and 2. Nothing of lfs judges lfs.
"""

import io
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lfs_cli as lfs
from lfs_cli.corpus.batches import sample_batch
from lfs_cli.model import (
    Attention,
    Block,
    Embedding,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    SiLU,
    SwiGLU,
    cross_entropy,
    next_token_loss,
    scaled_dot_product_attention,
    silu,
    softmax,
)
from lfs_cli.optimizers import clip_gradients, cosine_schedule
from lfs_cli.training.checkpoint import load_checkpoint, save_checkpoint

B, T, C, H, F_WIDTH, V, LAYERS, THETA = 4, 12, 64, 4, 128, 311, 3, 10_000.0
CONFIG = lfs.ModelConfig(
    vocab_size=V, context_length=16, width=C, layers=LAYERS, heads=H, feed_forward_width=F_WIDTH, rope_theta=THETA
)
TO_LFS = {  # the handout's names of weights, and ours
    "token_embeddings": "embedding",
    "layers": "blocks",
    "attn.q_proj": "attention.query",
    "attn.k_proj": "attention.key",
    "attn.v_proj": "attention.value",
    "attn.output_proj": "attention.output",
    "ln1": "attention_norm",
    "ffn.w1": "feed_forward.gate",
    "ffn.w2": "feed_forward.down",
    "ffn.w3": "feed_forward.up",
    "ln2": "feed_forward_norm",
    "ln_final": "norm",
    "lm_head": "head",
}


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give weights with the handout's names ours."""
    renamed = {}
    for name, weight in weights.items():
        for theirs, ours in TO_LFS.items():
            name = name.replace(f"{theirs}.", f"{ours}.")
        renamed[name] = weight
    return renamed


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights of a small model under the handout's names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embeddings.weight": (V, C)}
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            shapes[f"layers.{layer}.attn.{name}.weight"] = (C, C)
        shapes[f"layers.{layer}.ffn.w1.weight"] = shapes[f"layers.{layer}.ffn.w3.weight"] = (F_WIDTH, C)
        shapes[f"layers.{layer}.ffn.w2.weight"] = (C, F_WIDTH)
        shapes[f"layers.{layer}.ln1.weight"] = shapes[f"layers.{layer}.ln2.weight"] = (C,)
    shapes |= {"ln_final.weight": (C,), "lm_head.weight": (V, C)}
    return {
        name: 1 + numbers(*shape, seed=seed) / 4 if len(shape) == 1 else numbers(*shape, seed=seed) / shape[-1] ** 0.5
        for seed, (name, shape) in enumerate(shapes.items())
    }


def filled(module: nn.Module, *values: Tensor) -> nn.Module:
    """Put ``values`` into the weights of ``module``, in the order of its parameters."""
    for weight, value in zip(module.parameters(), values, strict=True):
        weight.data.copy_(value)
    return module


def close(ours: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(ours.detach(), expected.detach(), atol=atol, rtol=1e-4)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions by 2 x 2 matrices, one for each position and pair of channels."""
    D = x.shape[-1]
    out = torch.empty_like(x)
    for place, position in enumerate(positions.tolist()):
        for i in range(D // 2):
            angle = position * THETA ** (-2 * i / D)
            turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            out[..., place, 2 * i : 2 * i + 2] = x[..., place, 2 * i : 2 * i + 2] @ turn.T
    return out


def attention_of(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, positions: Tensor | None) -> Tensor:
    """Causal self-attention of the handout, with torch's own attention between its four matrices."""
    heads = [F.linear(x, weight).unflatten(-1, (H, -1)).transpose(-2, -3) for weight in (q, k, v)]
    if positions is not None:
        heads[:2] = [rotated(head, positions) for head in heads[:2]]
    mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
    return F.linear(mixed.transpose(-2, -3).flatten(-2), o)


def block_of(x: Tensor, weights: dict[str, Tensor], layer: int) -> Tensor:
    """One pre-norm block of the handout."""
    w = {
        name.removeprefix(f"layers.{layer}."): weight
        for name, weight in weights.items()
        if name.startswith(f"layers.{layer}.")
    }
    projections = (w[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output"))
    x = x + attention_of(F.rms_norm(x, (C,), w["ln1.weight"], 1e-5), *projections, torch.arange(x.shape[-2]))
    h = F.rms_norm(x, (C,), w["ln2.weight"], 1e-5)
    return x + F.linear(F.silu(F.linear(h, w["ffn.w1.weight"])) * F.linear(h, w["ffn.w3.weight"]), w["ffn.w2.weight"])


@pytest.mark.parametrize("leading", [(), (T,), (B, T), (2, 3, 5)], ids=str)
def test_linear(leading: tuple[int, ...]) -> None:
    x, weight = numbers(*leading, C), numbers(F_WIDTH, C, seed=1)
    close(filled(Linear(C, F_WIDTH), weight)(x), torch.einsum("...i,oi->...o", x, weight), 1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(), (T,), (B, T), (0, T)], ids=str)
def test_embedding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table, tokens = numbers(V, C), torch.randint(V, shape)
    assert torch.equal(filled(Embedding(V, C), table)(tokens.to(dtype)), table[tokens])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(scale: float) -> None:
    x, weight = scale * numbers(B, T, C), numbers(C, seed=1)
    close(filled(RMSNorm(C, 1e-5), weight)(x), x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * weight)


def test_rms_norm_of_large_numbers_in_half_precision() -> None:
    x = torch.full((2, C), 1000.0, dtype=torch.float16)  # the square of 1000 is beyond float16
    normed = RMSNorm(C).to(torch.float16)(x)
    assert normed.dtype == torch.float16
    close(normed.float(), torch.ones(2, C), 1e-3)


def test_silu() -> None:
    x = torch.cat([numbers(5, 7).flatten(), torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0])])
    close(silu(x), F.silu(x))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    close(*(torch.autograd.grad(f(z).sum(), z)[0] for f, z in ((silu, ours), (F.silu, theirs))))


def test_swiglu_and_its_ablation() -> None:
    x, w1, w2, w3 = (
        numbers(B, T, C),
        numbers(F_WIDTH, C, seed=1),
        numbers(C, F_WIDTH, seed=2),
        numbers(F_WIDTH, C, seed=3),
    )
    swiglu = SwiGLU(C, F_WIDTH)
    swiglu.load_state_dict({"gate.weight": w1, "down.weight": w2, "up.weight": w3})
    close(swiglu(x), F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2), 1e-3)
    plain = SiLU(C, F_WIDTH)
    plain.load_state_dict({"up.weight": w1, "down.weight": w2})
    close(plain(x), F.linear(F.silu(F.linear(x, w1)), w2), 1e-3)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shift", [0.0, 100.0, 1e4, -1e4])
def test_softmax(dim: int, shift: float) -> None:
    x = numbers(3, 5, 7)
    close(softmax(x + shift, dim), (x + shift).softmax(dim))
    assert torch.isfinite(softmax(1e30 * x, dim)).all()


@pytest.mark.parametrize("leading", [(B,), (B, H), ()], ids=str)
@pytest.mark.parametrize("is_masked", [False, True])
def test_scaled_dot_product_attention(leading: tuple[int, ...], is_masked: bool) -> None:
    S, D = 16, 24
    q, k, v = (numbers(*leading, n, d, seed=n + d) for n, d in ((T, D), (S, D), (S, 10)))
    mask = numbers(*leading, T, S, seed=5) > 0.5 if is_masked else None
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    close(scaled_dot_product_attention(q, k, v, mask), expected)


def test_a_mask_of_two_dimensions_is_for_all_heads() -> None:
    q, k, v = (numbers(B, H, T, 8, seed=seed) for seed in range(3))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    close(scaled_dot_product_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("shape", [(T, C), (B, T, C), (B, H, T, 16)], ids=str)
@pytest.mark.parametrize("has_positions", [False, True])
def test_rope(shape: tuple[int, ...], has_positions: bool) -> None:
    x = numbers(*shape)
    rope = RotaryEmbedding(THETA, shape[-1], 40)
    positions = torch.randint(40, (T,), generator=torch.Generator().manual_seed(1)) if has_positions else None
    expected = rotated(x, torch.arange(T) if positions is None else positions)
    close(rope(x, positions), expected, 1e-5)
    if positions is not None and len(shape) > 2:
        close(rope(x, positions.expand(B, *[1] * (len(shape) - 3), T)), expected, 1e-5)


@pytest.mark.parametrize("layout", ["rows apart by an odd number", "channels apart", "an odd start"])
def test_rope_turns_numbers_wherever_they_lie(layout: str) -> None:
    x = {
        "rows apart by an odd number": numbers(T, 17)[:, :16],
        "channels apart": numbers(16, T).T,
        "an odd start": numbers(T * 16 + 1)[1:].view(T, 16),
    }[layout]
    rope = RotaryEmbedding(THETA, 16, T)
    assert torch.equal(rope(x), rope(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("has_rope", [False, True])
@pytest.mark.parametrize("leading", [(), (B,), (2, 3)], ids=str)
def test_multi_head_self_attention(weights: dict[str, Tensor], has_rope: bool, leading: tuple[int, ...]) -> None:
    projections = [weights[f"layers.0.attn.{name}_proj.weight"] for name in ("q", "k", "v", "output")]
    x = numbers(*leading, T, C)
    rope = RotaryEmbedding(THETA, C // H, 40) if has_rope else None
    attention = filled(Attention(C, H, rope=rope), *projections)
    expected = attention_of(x, *projections, torch.arange(T) if has_rope else None)
    close(attention(x), expected)
    close(attention(x, torch.arange(T)), expected)
    close(attention(x, torch.arange(T)[None]), expected) if len(leading) == 1 else None
    if has_rope:
        moved = torch.arange(3, 3 + 2 * T, 2)
        close(attention(x, moved), attention_of(x, *projections, moved))


def test_transformer_block(weights: dict[str, Tensor]) -> None:
    block = Block(CONFIG)
    mine = {name: weight for name, weight in rename(weights).items() if name.startswith("blocks.0.")}
    block.load_state_dict({name.removeprefix("blocks.0."): weight for name, weight in mine.items()})
    x = numbers(B, T, C)
    close(block(x), block_of(x, weights, 0), 1e-5)


@pytest.mark.parametrize("length", [T, T // 2, 1, 16])
def test_transformer_language_model(weights: dict[str, Tensor], length: int) -> None:
    model = lfs.Transformer(CONFIG)
    model.load_state_dict(rename(weights))
    tokens = torch.randint(V, (B, length), generator=torch.Generator().manual_seed(6))
    x = weights["token_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        x = block_of(x, weights, layer)
    expected = F.linear(F.rms_norm(x, (C,), weights["ln_final.weight"], 1e-5), weights["lm_head.weight"])
    close(model(tokens), expected, 1e-4)


def test_every_weight_starts_from_the_handouts_distribution() -> None:
    torch.manual_seed(0)
    model = lfs.Transformer(lfs.ModelConfig(vocab_size=2000, width=128, layers=1, heads=4, context_length=8))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        sigma = 1.0 if name == "embedding.weight" else (2 / sum(weight.shape)) ** 0.5
        assert weight.abs().max() <= 3 * sigma
        assert weight.std().item() == pytest.approx(0.9866 * sigma, rel=0.02)  # of a normal cut at 3 sigma
        assert weight.mean().abs() < 0.02 * sigma


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("leading", [(8,), (2, 4), (2, 2, 2)], ids=str)
def test_cross_entropy(scale: float, leading: tuple[int, ...]) -> None:
    logits = (scale * numbers(*leading, V)).requires_grad_()
    targets = torch.randint(V, leading, generator=torch.Generator().manual_seed(1))
    ours, theirs = cross_entropy(logits, targets), F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    close(ours, theirs, 1e-4)
    close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0])


def test_the_loss_in_chunks_is_the_loss(weights: dict[str, Tensor]) -> None:
    hidden, head = numbers(B, T, C).requires_grad_(), weights["lm_head.weight"].clone().requires_grad_()
    targets = torch.randint(V, (B, T))
    ours = next_token_loss(hidden, head, targets)
    theirs = F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten())
    close(ours, theirs)
    for mine, other in zip(*(torch.autograd.grad(z, (hidden, head)) for z in (ours, theirs)), strict=True):
        close(mine, other)


@pytest.mark.parametrize("max_norm", [1e-2, 1.0, 1e4])
def test_gradient_clipping_equals_torchs(max_norm: float) -> None:
    values = [numbers(5, 5, seed=seed) for seed in range(6)]
    clipped = []
    for clip in (clip_gradients, nn.utils.clip_grad_norm_):
        parameters = [nn.Parameter(value.clone()) for value in values]
        parameters[-1].requires_grad_(False)
        torch.cat(parameters).square().sum().backward()
        norm = clip((parameter for parameter in parameters), max_norm)
        clipped.append([norm, *(parameter.grad for parameter in parameters[:-1])])
    for ours, theirs in zip(*clipped, strict=True):
        close(ours, theirs)


def fitted(kind: type[torch.optim.Optimizer], **options: object) -> Tensor:
    """Weights of a small regression after 300 steps."""
    torch.manual_seed(42)
    model = nn.Linear(3, 2, bias=False)
    optimizer = kind(model.parameters(), **options)
    for _ in range(300):
        x = torch.rand(3)
        loss = ((model(x) - torch.stack([x[0] + x[1], -x[2]])) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.weight.detach()


def test_adamw_equals_torchs() -> None:
    options = {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    close(fitted(lfs.AdamW, **options), fitted(torch.optim.AdamW, **options))


def test_adamw_decays_before_it_steps() -> None:
    """The order of 2026: the decay acts on the weight as it was, and the step is added to what is left."""
    weight = nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.tensor([3.0])
    lfs.AdamW([weight], lr=0.1, weight_decay=0.5, betas=(0.9, 0.999), eps=0.0).step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_sgd_equals_torchs(options: dict) -> None:
    close(fitted(lfs.SGD, lr=1e-2, **options), fitted(torch.optim.SGD, lr=1e-2, **options))


def test_torchs_schedulers_drive_our_optimizers() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = lfs.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(3):
        weight.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    close(weight, torch.full((2,), 1 - 1 - 0.5 - 0.25))


def test_the_cosine_schedule() -> None:
    rates = [cosine_schedule(step, 1.0, 0.1, 7, 21) for step in range(25)]
    falling = [0.1 + 0.45 * (1 + math.cos(math.pi * (step - 7) / 14)) for step in range(7, 22)]
    assert rates == pytest.approx([*(step / 7 for step in range(7)), *falling, 0.1, 0.1, 0.1])
    assert rates[14] == pytest.approx(0.55)
    assert rates[8] == pytest.approx(0.9887175604818206)


def test_windows_are_drawn_uniformly_and_targets_follow_by_one() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    counts: Counter[int] = Counter()
    draws, rows, length = 1000, 32, 7
    for _ in range(draws):
        tokens_BT, targets_BT = sample_batch(np.arange(100), rows, length, "cpu")
        assert tokens_BT.shape == targets_BT.shape == (rows, length)
        assert tokens_BT.dtype == targets_BT.dtype == torch.int64
        assert torch.equal(tokens_BT + 1, targets_BT)
        counts.update(tokens_BT[:, 0].tolist())
    starts = 100 - length
    assert set(counts) == set(range(starts))
    share = 1 / starts
    spread = 5 * math.sqrt(draws * rows * share * (1 - share))
    assert all(abs(count - draws * rows * share) < spread for count in counts.values())


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        sample_batch(np.arange(100), 2, 7, "cuda:99")


def test_windows_come_from_a_file_in_memory_of_any_type(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens_BT, targets_BT = sample_batch(np.memmap(tmp_path / "tokens.bin", np.uint16, "r"), 8, 10, "cpu")
    assert torch.equal(tokens_BT + 1, targets_BT)


class Net(nn.Module):
    """Three layers of torch's own, since a checkpoint takes any module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(10, 20), nn.Linear(20, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


OPTIMIZERS = {
    "our AdamW": lambda parameters: lfs.AdamW(parameters, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8),
    "our SGD": lambda parameters: lfs.SGD(parameters, lr=1e-2, momentum=0.9),
    "torch's AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98)),
}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(10, generator=generator)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["path", "text", "file object", "open file"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_restores_model_optimizer_and_step(name: str, kind: str, tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    stepped(model, optimizer, 10)
    fresh = Net()
    fresh_optimizer = OPTIMIZERS[name](fresh.parameters())
    path, memory = tmp_path / "checkpoint.pt", io.BytesIO()
    if kind == "file object":
        save_checkpoint(model, optimizer, 10, memory)
        memory.seek(0)
        assert load_checkpoint(memory, fresh, fresh_optimizer) == 10
    elif kind == "open file":
        with path.open("wb") as file:
            save_checkpoint(model, optimizer, 10, file)
        with path.open("rb") as file:
            assert load_checkpoint(file, fresh, fresh_optimizer) == 10
    else:
        place = str(path) if kind == "text" else path
        save_checkpoint(model, optimizer, 10, place)
        assert load_checkpoint(place, fresh, fresh_optimizer) == 10

    for weight, loaded in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(weight, loaded)
    before, after = optimizer.state_dict(), fresh_optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]  # numbers and kinds: a pair does not become a list
    assert before["state"].keys() == after["state"].keys()
    for index, state in before["state"].items():
        assert state.keys() == after["state"][index].keys()
        for key, value in state.items():
            assert type(value) is type(after["state"][index][key])
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][index][key]))
    stepped(model, optimizer, 3, seed=1)
    stepped(fresh, fresh_optimizer, 3, seed=1)
    for weight, loaded in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(weight, loaded)


@pytest.mark.parametrize("name", ["tensor", "tuple", "weight"])
def test_a_weight_may_have_any_name(name: str, tmp_path: Path) -> None:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.arange(3.0)))
    optimizer = lfs.AdamW(model.parameters())
    save_checkpoint(model, optimizer, 1, tmp_path / "x")
    getattr(model, name).data.zero_()
    load_checkpoint(tmp_path / "x", model, optimizer)
    assert getattr(model, name).tolist() == [0.0, 1.0, 2.0]
