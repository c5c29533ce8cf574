"""The whole model: parts and names, every ablation, causality, the cache, precision and compilation."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.config import ModelConfig
from lfs_cli.model import Block, KVCache, RMSNorm, Transformer, cross_entropy, next_token_loss
from lfs_cli.model.device import compiled_call

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
    "windows": {"window": 5, "window_pattern": "SL"},
    "soft cap": {"logit_softcap": 1.5},
    "value embeddings": {"value_embeddings": 1, "kv_heads": 2},
    "embedding": {"embedding_norm": True, "embedding_skip": True, "norm_position": "post"},
}


def build(seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**SMALL, **changes}))


def loss_of(model: Transformer, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    return next_token_loss(model.hidden(tokens_BT), model.head_weight, targets_BT, softcap=model.config.logit_softcap)


def tokens(B: int = 2, T: int = 16, seed: int = 1):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request) -> Transformer:
    model = build(**request.param)
    for name, weight in model.named_parameters():
        if name.endswith("mix"):  # as if learned: at the start some of them let nothing through
            weight.data += torch.tensor([-0.2, 0.3])
    return model


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_residual_stream_can_be_kept_in_the_type_of_the_products(changes: dict) -> None:
    wide, narrow = (build(**changes, residual_dtype=dtype) for dtype in ("float32", "compute"))
    assert torch.equal(wide.hidden(tokens()), narrow.hidden(tokens()))  # without autocast they are one type

    found = {}
    for model in (wide, narrow):
        seen = set()
        for block in model.blocks:
            block.register_forward_hook(lambda _block, _inputs, x_BTC, seen=seen: seen.add(x_BTC.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens(), tokens(seed=2))
        loss.backward()
        found[model.config.residual_dtype] = seen, loss.detach(), model.embedding.weight.grad
    assert found["compute"][0] == {torch.bfloat16}
    assert found["float32"][0] == {torch.float32}
    torch.testing.assert_close(found["compute"][1], found["float32"][1], atol=0.05, rtol=0)
    error = (found["compute"][2] - found["float32"][2]).norm() / found["float32"][2].norm()
    assert found["compute"][2].dtype == torch.float32
    assert error < 0.05


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
    products, cap = model.hidden(tokens()) @ model.head_weight.T, model.config.logit_softcap
    torch.testing.assert_close(logits, products if cap is None else cap * (products / cap).tanh())


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
    loss_of(model, tokens(), tokens(seed=2)).backward()

    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_the_loss_of_the_hidden_states_is_that_of_the_logits(model) -> None:
    ours = loss_of(model, tokens(), tokens(seed=2))
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
        mixed = loss_of(model, tokens(), tokens(seed=2))
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
        ({"window": 3, "logit_softcap": 2.0, "value_embeddings": 1, "embedding_skip": True}, False),
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
            return loss_of(model, tokens_BT, targets_BT)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, plain = (function(tokens(), tokens(seed=2)) for function in (compiled, loss))

    torch.testing.assert_close(ours, plain, atol=0.01 if is_mixed else 1e-5, rtol=1e-4)
    weights = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.02 if is_mixed else 1e-6, rtol=0.05 if is_mixed else 1e-4)


def test_a_block_with_zero_outputs_first_passes_its_input_on() -> None:
    model, plain = build(zero_init=True), build()

    assert torch.equal(model.hidden(tokens()), model.norm(model.embedding(tokens())))
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        is_output = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        assert torch.equal(weight, torch.zeros_like(weight) if is_output else other)
    loss_of(model, tokens(), tokens(seed=2)).backward()
    assert all(block.attention.output.weight.grad.any() for block in model.blocks)  # from where the others learn next


def test_no_logit_is_above_the_soft_cap() -> None:
    model = build(logit_softcap=0.5)
    model.head.weight.data.mul_(100)

    assert model(tokens()).abs().max() <= 0.5
    assert (model.hidden(tokens()) @ model.head_weight.T).abs().max() > 5


def test_the_embedding_goes_around_the_blocks_as_its_weights_say() -> None:
    model = build(embedding_norm=True, embedding_skip=True)
    plain = build()
    plain.load_state_dict(model.state_dict(), strict=False)
    embedding = model.embedding_norm(model.embedding(tokens()))

    def by_hand(first: list[float], second: list[float]) -> torch.Tensor:
        x = embedding
        for block, (stream, skip) in zip(plain.blocks, (first, second), strict=True):
            x = block(stream * x + skip * embedding)
        return model.norm(x)

    torch.testing.assert_close(model.hidden(tokens()), by_hand([1, 0], [1, 0]))
    for block, mix in zip(model.blocks, ([0.5, 0.25], [-1.0, 2.0]), strict=True):
        block.skip_mix.data = torch.tensor(mix)
    torch.testing.assert_close(model.hidden(tokens()), by_hand([0.5, 0.25], [-1.0, 2.0]))


def test_value_embeddings_are_mixed_into_the_values_of_the_first_and_last_layers() -> None:
    model = build(value_embeddings=2, layers=5)
    assert [model.config.value_table(layer) for layer in range(5)] == [0, 1, None, 0, 1]
    assert [block.attention.value_mix is None for block in model.blocks] == [False, False, True, False, False]
    attention, x = model.blocks[0].attention, torch.randn(2, 16, 16)
    vectors = torch.randn(2, 16, 16)

    attention.value_mix.data = torch.tensor([1.0, 0.0])
    own = attention(x, value_BTC=vectors)
    attention.value_mix.data = torch.tensor([0.0, 1.0])
    other = attention(x, value_BTC=vectors)
    attention.value_mix.data = torch.tensor([0.5, 0.25])

    torch.testing.assert_close(attention(x, value_BTC=vectors), 0.5 * own + 0.25 * other)
    plain = build(layers=5).blocks[0].attention
    plain.load_state_dict(attention.state_dict(), strict=False)
    torch.testing.assert_close(own, plain(x))
    assert not torch.allclose(own, other)


def test_a_window_hides_what_is_too_far_away() -> None:
    model = build(window=4, window_pattern="SSL", layers=3)
    assert [model.config.layer_window(layer) for layer in range(3)] == [4, 4, None]
    short = build(window=4)
    changed = tokens().clone()
    changed[:, 2] = (changed[:, 2] + 1) % 50

    reach = 2 + 2 * (4 - 1)  # each of two layers looks 3 positions back
    before, after = short(tokens()), short(changed)
    torch.testing.assert_close(before[:, reach + 1 :], after[:, reach + 1 :])
    assert not torch.allclose(before[:, reach], after[:, reach], atol=1e-5)
    assert not torch.allclose(model(tokens())[:, -1], model(changed)[:, -1], atol=1e-5)


def test_a_window_of_the_whole_context_changes_nothing() -> None:
    assert torch.equal(build(window=16)(tokens()), build()(tokens()))
    assert build(window=16).config.layer_window(0) is None


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"attention": "reference"}, {"kv_heads": 2}], ids=str)
def test_packed_documents_are_read_as_if_each_were_alone(changes) -> None:
    model = build(**changes)
    lengths = [5, 4, 7, 3, 13]  # two rows of 16, the third document ending the first
    documents = torch.tensor([0, *lengths]).cumsum(0)

    together = model(tokens(), documents=documents).view(32, 50)

    for start, stop in pairwise(documents.tolist()):
        alone = model(tokens().view(1, 32)[:, start:stop])
        torch.testing.assert_close(together[start:stop], alone[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together, model(tokens()).view(32, 50), atol=1e-3)


def test_one_document_a_row_is_what_there_is_without_documents() -> None:
    documents = torch.tensor([0, 16, 32, 32])
    torch.testing.assert_close(build()(tokens(), documents=documents), build()(tokens()))


def test_documents_and_a_cache_do_not_go_together() -> None:
    model = build()
    with pytest.raises(ValueError, match="cannot be told apart in a cache"):
        model(tokens(), KVCache(model.config, 2, 16), documents=torch.tensor([0, 32]))


def test_the_training_golden() -> None:
    """Ten losses of a tiny model on fixed tokens: a change of any definition shows here, and none of torch's draws."""
    model, text = build(kv_heads=2), (torch.arange(68) ** 2 % 50).view(4, 17)
    for number, weight in enumerate(weight for weight in model.parameters() if weight.ndim > 1):
        waves = (0.7 * torch.arange(weight.numel()) + number).sin().view_as(weight)
        weight.data = waves * (1 if number == 0 else (4 / sum(weight.shape)) ** 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(10):
        loss = next_token_loss(model.hidden(text[:, :-1]), model.head_weight, text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses == pytest.approx(
        [4.2109, 3.8872, 3.7914, 3.5258, 3.3440, 3.1933, 3.0772, 3.1285, 3.0106, 2.8513], abs=1e-4
    )


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(kind) -> None:
    config = ModelConfig(vocab_size=50, context_length=16, width=32, layers=3, heads=4, qk_norm=True)
    plain = Transformer(config)
    other = Transformer(config.model_copy(update={"checkpointing": kind}))
    other.load_state_dict(plain.state_dict())
    text = torch.randint(50, (2, 16))

    losses = []
    for model in (plain, other):
        losses.append(next_token_loss(model.hidden(text), model.head_weight, text))
        losses[-1].backward()

    assert torch.equal(*losses)
    for mine, right in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, right.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those that torch.compile causes while it traces, and hides
def test_blocks_alike_are_compiled_once() -> None:
    model = build(layers=5, value_embeddings=1, window=5, window_pattern="SL", embedding_skip=True)
    torch._dynamo.reset()
    compiled = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        compile_with = torch.compile
        patch.setattr(torch, "compile", lambda function: compile_with(function, backend=backend))
        call = compiled_call()
    plain, ours = (model.hidden(tokens(), call=by) for by in (None, call))
    torch.testing.assert_close(ours, plain)
    assert len(compiled) == 3  # a table and a window, no window, a window; the first block is as the last
    model.hidden(tokens(seed=5), call=call)
    assert len(compiled) == 3
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(tokens(), call=call), plain)
    assert len(compiled) == 6
