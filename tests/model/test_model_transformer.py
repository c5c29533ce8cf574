"""The whole model: parts and names, every ablation, causality, the cache, precision and compilation."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.config import ModelConfig
from lfs_cli.model import Block, KVCache, RMSNorm, Transformer, cross_entropy, next_token_loss

SMALL = {"vocab_size": 50, "context_length": 16, "width": 16, "layers": 2, "heads": 4, "feed_forward_width": 24}
VARIANTS = {
    "default": {},
    "grouped": {"kv_heads": 2},
    "one key head": {"kv_heads": 1, "qk_norm": True},
    "tied": {"tied_head": True},
    "no norm": {"norm": "none"},
    "post-norm": {"norm_position": "post"},
    "no positions": {"positions": "none"},
    "silu": {"feed_forward": "silu"},
    "relu2": {"feed_forward": "relu2"},
    "reference": {"attention": "reference"},
}


def build(seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**SMALL, **changes}))


def tokens(B: int = 2, T: int = 16, seed: int = 1):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request) -> Transformer:
    return build(**request.param)


def test_names_of_the_weights() -> None:
    names = [name for name, _ in build(qk_norm=True).named_parameters()]

    attention = [f"attention.{part}.weight" for part in ("query", "key", "value", "output", "query_norm", "key_norm")]
    feed_forward = [f"feed_forward.{part}.weight" for part in ("gate", "up", "down")]
    block = ["attention_norm.weight", *attention, "feed_forward_norm.weight", *feed_forward]
    blocks = [f"blocks.{layer}.{name}" for layer in (0, 1) for name in block]
    assert sorted(names) == sorted(["embedding.weight", *blocks, "norm.weight", "head.weight"])
    assert set(build(qk_norm=True).state_dict()) == set(names)


def test_the_parameter_count_of_cs336s_base_model() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig())

    # 2 x 10,000 x 512 at both ends, 4 x (4 x 512^2 + 3 x 512 x 1344 + 2 x 512) in the blocks, 512 in the last norm
    assert model.parameter_count() == 22_696_448


def test_a_tied_head_has_no_weights_of_its_own_and_starts_near_even_odds() -> None:
    model = build(tied_head=True)

    assert "head.weight" not in model.state_dict()
    assert build().parameter_count() - model.parameter_count() == 50 * 16
    assert model.head_weight is model.embedding.weight
    assert cross_entropy(model(tokens(64)), tokens(64, seed=5)).item() == pytest.approx(math.log(50), abs=0.7)


def test_the_pre_norm_block_is_its_formula() -> None:
    block = Block(ModelConfig(**SMALL))
    x = torch.randn(2, 5, 16)

    y = x + block.attention(block.attention_norm(x))
    torch.testing.assert_close(block(x), y + block.feed_forward(block.feed_forward_norm(y)))


def test_the_post_norm_block_is_its_formula() -> None:
    block = Block(ModelConfig(**SMALL, norm_position="post"))
    x = torch.randn(2, 5, 16)

    y = block.attention_norm(x + block.attention(x))
    torch.testing.assert_close(block(x), block.feed_forward_norm(y + block.feed_forward(y)))


def test_logits_are_the_head_of_the_hidden_states(model) -> None:
    logits = model(tokens())

    assert logits.shape == (2, 16, 50)
    torch.testing.assert_close(logits, model.hidden(tokens()) @ model.head_weight.T)


def test_the_ablations_have_the_parts_they_say() -> None:
    assert not any("norm" in name for name in build(norm="none").state_dict())
    assert build(positions="none").blocks[0].attention.rope is None
    assert isinstance(build().norm, RMSNorm)
    assert set(build(feed_forward="silu").blocks[0].feed_forward.state_dict()) == {"up.weight", "down.weight"}


def test_without_positions_order_is_known_only_from_the_mask() -> None:
    swapped = tokens()[:, [1, 0, *range(2, 16)]]
    last = {name: build(positions=name, layers=1)(swapped)[:, -1] for name in ("none", "rope")}

    torch.testing.assert_close(last["none"], build(positions="none", layers=1)(tokens())[:, -1])
    assert not torch.allclose(last["rope"], build(layers=1)(tokens())[:, -1], atol=1e-4)


def test_no_logit_depends_on_a_later_token(model) -> None:
    changed = tokens().clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 50

    before, after = model(tokens()), model(changed)

    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-4)


def test_sequences_of_a_batch_do_not_mix(model) -> None:
    torch.testing.assert_close(model(tokens())[1:], model(tokens()[1:]), atol=1e-5, rtol=1e-4)


def test_every_weight_gets_a_gradient(model) -> None:
    next_token_loss(model.hidden(tokens()), model.head_weight, tokens(seed=2)).backward()

    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_the_loss_of_the_hidden_states_is_that_of_the_logits(model) -> None:
    ours = next_token_loss(model.hidden(tokens()), model.head_weight, tokens(seed=2))
    plain = cross_entropy(model(tokens()), tokens(seed=2))

    torch.testing.assert_close(ours, plain)
    weights = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_cached_and_uncached_decoding_agree(model) -> None:
    for chunks in ([16], [1] * 16, [5, 1, 1, 9], [1, 15]):
        cache = KVCache(model.config, 2, 16)
        cached = torch.cat([model(part, cache) for part in tokens().split(chunks, 1)], 1)

        assert cache.length == 16
        torch.testing.assert_close(cached, model(tokens()), atol=1e-5, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 15)), rewind=st.integers(0, 16))
def test_any_chunks_and_any_rewind_agree_with_no_cache(cuts, rewind) -> None:
    model, cache = build(kv_heads=2), KVCache(ModelConfig(**SMALL, kv_heads=2), 2, 20)
    edges = [0, *sorted(cuts), 16]

    for start, stop in pairwise(edges):
        model(tokens()[:, start:stop], cache)
    cache.truncate(rewind)
    cache.truncate(min(rewind, 15))
    rest = model(tokens()[:, cache.length :], cache)

    torch.testing.assert_close(rest, model(tokens())[:, min(rewind, 15) :], atol=1e-5, rtol=1e-4)


def test_a_cache_refuses_what_does_not_fit() -> None:
    model = build()
    cache = KVCache(model.config, 2, 6)
    model(tokens(T=5), cache)

    with pytest.raises(ValueError, match="2 more positions do not fit behind 5 in a cache of 6"):
        model(tokens(T=2), cache)
    with pytest.raises(ValueError, match="3 sequences meet a cache of 2"):
        model(tokens(3, 1), cache)
    with pytest.raises(ValueError, match="a cache of 5 positions cannot be cut to 6"):
        cache.truncate(6)
    model(tokens(T=1), cache)
    assert cache.length == 6


def test_text_longer_than_the_context_is_refused() -> None:
    model = build(positions="none")

    with pytest.raises(ValueError, match="17 tokens are more than the model's context of 16"):
        model(tokens(T=17))
    cache = KVCache(model.config, 2, 20)
    model(tokens(), cache)
    with pytest.raises(ValueError, match="17 tokens are more"):
        model(tokens(T=1), cache)


def test_the_same_seed_builds_the_same_model() -> None:
    assert all(torch.equal(a, b) for a, b in zip(build().parameters(), build().parameters(), strict=True))


def test_bfloat16_autocast_stays_close_to_float32(model) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = next_token_loss(model.hidden(tokens()), model.head_weight, tokens(seed=2))
    mixed.backward()

    exact = cross_entropy(model(tokens()), tokens(seed=2))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, atol=0.05, rtol=0.02)
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())


def test_a_bfloat16_model_computes_and_caches_in_bfloat16() -> None:
    model = build(qk_norm=True).to(torch.bfloat16)
    cache = KVCache(model.config, 2, 16, dtype=torch.bfloat16)

    logits = torch.cat([model(part, cache) for part in tokens().split([7, 9], 1)], 1)

    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), build(qk_norm=True)(tokens()), atol=0.2, rtol=0.1)


def test_autocast_may_use_a_cache_of_another_type() -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(model.config, 2, 16, dtype=torch.float32)
        cached = torch.cat([model(part, cache) for part in tokens().split([7, 9], 1)], 1)
        torch.testing.assert_close(cached.float(), model(tokens()).float(), atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
@pytest.mark.parametrize(
    ("changes", "is_mixed"),
    [
        ({"tied_head": True, "kv_heads": 2, "qk_norm": True}, True),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param(
            {"norm_position": "post", "feed_forward": "silu", "positions": "none"}, True, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_the_loss_compiles_into_one_graph(changes, is_mixed) -> None:
    model = build(**changes)

    def loss(tokens_BT, targets_BT):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            return next_token_loss(model.hidden(tokens_BT), model.head_weight, targets_BT)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, plain = (function(tokens(), tokens(seed=2)) for function in (compiled, loss))

    torch.testing.assert_close(ours, plain, atol=0.01 if is_mixed else 1e-5, rtol=1e-4)
    weights = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.02 if is_mixed else 1e-6, rtol=0.05 if is_mixed else 1e-4)


def test_the_training_golden() -> None:
    """Ten losses of a tiny model on fixed tokens: a change of any definition shows here."""
    model, text = build(kv_heads=2), tokens(4, 17, seed=3)[:, :17]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(10):
        loss = next_token_loss(model.hidden(text[:, :-1]), model.head_weight, text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses == pytest.approx(
        [4.1706, 3.8475, 3.5822, 3.3491, 3.1228, 2.8983, 2.6777, 2.4638, 2.2754, 2.1668], abs=1e-4
    )
