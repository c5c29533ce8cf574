"""The Transformer: an embedding, L blocks that each add to the residual stream, a norm and a head.

    pre-norm block     x <- x + attention(norm(x))          x <- x + feed_forward(norm(x))
    post-norm block    x <- norm(x + attention(x))          x <- norm(x + feed_forward(x))
    logits             head(norm(x))

Every part is named by a ModelConfig, so each ablation of CS336 is a config: `norm=none`, `norm_position=post`,
`positions=none`, `feed_forward=silu`.

A tied head is the embedding itself. Its entries then start from N(0, 1 / C) instead of N(0, 1): what the last norm
gives out has unit size, so the logits start with unit size too and the first loss is near log V.

Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762), as Stanford's CS336 builds it, 2026:
pre-norm (Xiong et al., arXiv:2002.04745), RMSNorm, RoPE, SwiGLU, no biases.
"""

import torch
from torch import Tensor, nn

from lfs_cli.config import ModelConfig
from lfs_cli.model.attention import Attention, resolve_attention
from lfs_cli.model.cache import KVCache
from lfs_cli.model.feed_forward import FEED_FORWARDS
from lfs_cli.model.layers import Embedding, Linear
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
        )
        self.feed_forward_norm = NORMS.create(config.norm, config.width, config.norm_epsilon)
        self.feed_forward = FEED_FORWARDS.create(config.feed_forward, config.width, config.feed_forward_width)

    def forward(self, x_BTC: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        if self.is_pre_norm:
            x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), positions, cache)
            return x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))
        x_BTC = self.attention_norm(x_BTC + self.attention(x_BTC, positions, cache))
        return self.feed_forward_norm(x_BTC + self.feed_forward(x_BTC))


class Transformer(nn.Module):
    """A decoder-only language model: for each token, logits of the one that follows.

    Args:
        config: Shape and parts of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rope = _rope(config)
        self.embedding = Embedding(config.vocab_size, config.width, config.width**-0.5 if config.tied_head else 1.0)
        self.blocks = nn.ModuleList(Block(config, layer, rope) for layer in range(config.layers))
        self.norm = NORMS.create(config.norm, config.width, config.norm_epsilon)
        self.head = None if config.tied_head else Linear(config.width, config.vocab_size)

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return logits (B, T, V) for the token after each of ``tokens_BT``; see `hidden` for the arguments."""
        return self.logits(self.hidden(tokens_BT, cache))

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Compute what the head reads.

        Args:
            tokens_BT: (B, T), integers below V.
            cache: Keys and values of the tokens before these; it grows by T positions.

        Returns:
            (B, T, C), after the final norm.

        Raises:
            ValueError: When the tokens reach beyond the model's context, or do not fit the cache.
        """
        start, T = cache.length if cache else 0, tokens_BT.shape[-1]
        if start + T > self.config.context_length:
            raise ValueError(f"{start + T} tokens are more than the model's context of {self.config.context_length}")
        x_BTC = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, None, cache)
        if cache:
            cache.advance(T)
        return self.norm(x_BTC)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden vectors (..., C)."""
        return hidden @ self.head_weight.T

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
