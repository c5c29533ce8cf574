"""The Transformer, from token ids to logits and a loss, written from its definitions.

Reading order: layers, norm, rope, feed_forward, attention, transformer, loss; then cache and weights.
"""

from lfs_cli.model.attention import ATTENTION, Attend, Attention, resolve_attention, scaled_dot_product_attention
from lfs_cli.model.cache import KVCache
from lfs_cli.model.feed_forward import FEED_FORWARDS, ReLU2, SiLU, SwiGLU, silu
from lfs_cli.model.layers import Embedding, Linear, softmax
from lfs_cli.model.loss import cross_entropy, next_token_loss
from lfs_cli.model.norm import NORMS, NoNorm, RMSNorm
from lfs_cli.model.rope import RotaryEmbedding
from lfs_cli.model.transformer import Block, Transformer
from lfs_cli.model.weights import load_model, load_state, load_weights, replacing_weights, save_model, save_weights

__all__ = [
    "ATTENTION",
    "FEED_FORWARDS",
    "NORMS",
    "Attend",
    "Attention",
    "Block",
    "Embedding",
    "KVCache",
    "Linear",
    "NoNorm",
    "RMSNorm",
    "ReLU2",
    "RotaryEmbedding",
    "SiLU",
    "SwiGLU",
    "Transformer",
    "cross_entropy",
    "load_model",
    "load_state",
    "load_weights",
    "next_token_loss",
    "replacing_weights",
    "resolve_attention",
    "save_model",
    "save_weights",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
]
