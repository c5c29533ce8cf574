"""The Transformer: an embedding, L blocks that each add to the residual stream, a norm and a head.

    pre-norm block     x <- x + attention(norm(x))          x <- x + feed_forward(norm(x))
    post-norm block    x <- norm(x + attention(x))          x <- norm(x + feed_forward(x))
    logits             head(norm(x))

Every part is named by a ModelConfig, so each ablation of CS336 is a config: `norm=none`, `norm_position=post`,
`positions=none`, `feed_forward=silu`.

Options that speed training up, each off by default and a value in the config:

    zero_init          W_output = W_down = 0 at the start, so that x passes through every block unchanged
    logit_softcap      logits c tanh(logits / c): no token ever gets more than c
    embedding_norm     x <- norm(x) before the first block
    embedding_skip     x <- a x + b embedding, at the head of each block, with a = 1 and b = 0 to begin with
    value_embeddings   n more tables of token vectors; the values of block i < n, and of block L - n + i, become
                       a v + b table_i[token], with a = b = 1/2 to begin with
    residual_dtype     x in the type of the matrix products between layers, not in float32
    window             blocks see the latest positions only (`attention.py`)

A tied head is the embedding itself. Its entries then start from N(0, 1 / C) instead of N(0, 1): what the last norm
gives out has unit size, so the logits start with unit size too and the first loss is near log V.

Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762), as Stanford's CS336 builds it, 2026:
pre-norm (Xiong et al., arXiv:2002.04745), RMSNorm, RoPE, SwiGLU, no biases. The soft cap is Gemma 2's (2024,
arXiv:2408.00118, section 2); a zero output is in Zhang et al., "Fixup Initialization", 2019 (arXiv:1901.09321), rule 1;
norm, skip and tables of the embedding are from the records of Jordan et al., modded-nanoGPT, 2024.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lfs_cli.config import ModelConfig
from lfs_cli.kernels.operation import compute_dtype
from lfs_cli.model.attention import Attention, resolve_attention
from lfs_cli.model.cache import KVCache
from lfs_cli.model.checkpointing import checkpointed
from lfs_cli.model.feed_forward import FEED_FORWARDS, SwiGLU
from lfs_cli.model.layers import Embedding, Linear, look_up_together
from lfs_cli.model.norm import NORMS
from lfs_cli.model.rope import RotaryEmbedding


class Block(nn.Module):
    """Attention, then a feed-forward layer, each adding its result to what came in.

    Args:
        config: Shape and parts of the model.
        layer: Index of this block.
        rope: Rotary positions shared with other blocks; made from ``config`` when it asks for them and none are given.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, rope: RotaryEmbedding | None = None) -> None:
        super().__init__()
        self.is_pre_norm = config.norm_position == "pre"
        self.attention_norm = NORMS.create(config.norm, config.width, config.norm_epsilon)
        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            rope=rope or _rope(config),
            qk_norm=config.qk_norm,
            epsilon=config.norm_epsilon,
            backend=config.attention,
            layer=layer,
            window=config.layer_window(layer),
            mixes_values=config.value_table(layer) is not None,
        )
        self.feed_forward_norm = NORMS.create(config.norm, config.width, config.norm_epsilon)
        self.feed_forward = FEED_FORWARDS.create(config.feed_forward, config.width, config.feed_forward_width)
        if isinstance(self.feed_forward, SwiGLU):
            self.feed_forward.is_joined = config.checkpointing != "selective"  # which keeps products, and no gates
        self.skip_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_skip else None
        if config.zero_init:
            nn.init.zeros_(self.attention.output.weight)
            nn.init.zeros_(self.feed_forward.down.weight)

    def forward(
        self,
        x_BTC: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        documents: Tensor | None = None,
        embedding_BTC: Tensor | None = None,
        value_BTC: Tensor | None = None,
    ) -> Tensor:
        if self.skip_mix is not None and embedding_BTC is not None:
            stream, skip = self.skip_mix.to(x_BTC.dtype)
            x_BTC = stream * x_BTC + skip * embedding_BTC
        attend = partial(self.attention, positions=positions, cache=cache, documents=documents, value_BTC=value_BTC)
        if self.is_pre_norm:
            x_BTC = x_BTC + attend(self.attention_norm(x_BTC))
            return x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))
        x_BTC = self.attention_norm(x_BTC + attend(x_BTC))
        return self.feed_forward_norm(x_BTC + self.feed_forward(x_BTC))


class Transformer(nn.Module):
    """A decoder-only language model: for each token, logits of the one that follows.

    Args:
        config: Shape and parts of the model.

    Attributes:
        head_cast: `head_weight` in the type of the products, within a step that casts it once (`training/casts.py`).
    """

    head_cast: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rope = _rope(config)
        self.embedding = Embedding(config.vocab_size, config.width, config.width**-0.5 if config.tied_head else 1.0)
        self.blocks = nn.ModuleList(Block(config, layer, rope) for layer in range(config.layers))
        self.norm = NORMS.create(config.norm, config.width, config.norm_epsilon)
        self.head = None if config.tied_head else Linear(config.width, config.vocab_size)
        self.register_buffer("head_cast", None, persistent=False)
        self.embedding_norm = None
        if config.embedding_norm:
            self.embedding_norm = NORMS.create(config.norm, config.width, config.norm_epsilon)
        value_width = config.kv_heads * config.head_dim
        self.value_embeddings = nn.ModuleList(
            Embedding(config.vocab_size, value_width) for _ in range(config.value_embeddings)
        )

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None, *, documents: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) for the token after each of ``tokens_BT``; see `hidden` for the arguments."""
        return self.logits(self.hidden(tokens_BT, cache, documents=documents))

    def hidden(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None = None,
        *,
        documents: Tensor | None = None,
        call: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Compute what the head reads.

        Args:
            tokens_BT: (B, T), integers below V.
            cache: Keys and values of the tokens before these; it grows by T positions.
            documents: (N + 1,), cumulative lengths of the documents in the batch, as `document_lengths` finds them, for
                attention within each. Not with a cache.
            call: Calls a block, its first argument, with the others: a compiled function, say. Not with a cache.

        Returns:
            (B, T, C), after the final norm.

        Raises:
            ValueError: When the tokens reach beyond the context, do not fit the cache, or a cache meets documents.
        """
        if documents is not None and cache is not None:
            raise ValueError("documents in one batch cannot be told apart in a cache")
        start, T = cache.length if cache else 0, tokens_BT.shape[-1]
        if start + T > self.config.context_length:
            raise ValueError(f"{start + T} tokens are more than the model's context of {self.config.context_length}")
        weight_VC = self.embedding.weight
        stream = weight_VC.dtype if self.config.residual_dtype == "float32" else compute_dtype(weight_VC)
        tables = [self.embedding, *self.value_embeddings]
        dtypes = [stream] + [compute_dtype(weight_VC)] * len(self.value_embeddings)
        x_BTC, *values = look_up_together(tokens_BT, tables, dtypes)
        if self.embedding_norm is not None:
            x_BTC = self.embedding_norm(x_BTC)
        embedding_BTC = None
        if self.config.embedding_skip:  # two inputs that are one would make of the first block another kind to compile
            embedding_BTC = x_BTC if call is None else x_BTC.clone()
        run = checkpointed(self.config.checkpointing) if cache is None else None
        for layer, block in enumerate(self.blocks):
            table = self.config.value_table(layer)
            value_BTC = None if table is None else values[table]
            more = {"documents": documents, "embedding_BTC": embedding_BTC, "value_BTC": value_BTC}
            called = block if call is None else partial(call, block)
            x_BTC = run(called, x_BTC, **more) if run else called(x_BTC, None, cache, **more)
        if cache:
            cache.advance(T)
        return self.norm(x_BTC)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden vectors (..., C)."""
        logits, cap = hidden @ self.head_weight.T, self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, C): that of the embedding when the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def attention_name(self, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
        """Return the attention backend used on such a device with such numbers, and why."""
        return resolve_attention(self.config.attention, device_type, dtype, self.config.head_dim)

    def parameter_count(self) -> int:
        """Return the number of weights; a tied head counts once."""
        return sum(weight.numel() for weight in self.parameters())


def _rope(config: ModelConfig) -> RotaryEmbedding | None:
    if config.positions == "none":
        return None
    return RotaryEmbedding(config.rope_theta, config.head_dim, config.context_length)
