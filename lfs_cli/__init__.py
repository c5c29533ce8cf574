"""A language model from scratch: tokenizer, Transformer, kernels, optimizers and training.

>>> import lfs_cli as lfs
>>> lfs.__version__
'0.1.0'

Names of tensors carry their dimensions after an underscore, in storage order: `q_BTHD` is (B, T, H, D).

    B  sequences in the batch                  H  query heads
    T  query positions                         G  key/value heads (groups)
    S  key positions; S = T + cached           D  channels per head
    C  channels of the residual stream         F  hidden channels of the feed-forward
    V  vocabulary                              L  layers
    R  rows: all leading dimensions at once    N  shards, ranks or programs, locally
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfs_cli.config import ModelConfig, TrainConfig, load_config
    from lfs_cli.errors import LfsError
    from lfs_cli.generation.language_model import LanguageModel
    from lfs_cli.kernels.flash_attention import flash_attention, flash_attention_packed
    from lfs_cli.model import ATTENTION, KVCache, Transformer
    from lfs_cli.optimizers import OPTIMIZERS, SGD, AdamW
    from lfs_cli.runs.train import train
    from lfs_cli.tokenizer import Tokenizer, learn_bpe

__version__ = "0.1.0"

_HOMES = {
    "ATTENTION": "lfs_cli.model",
    "AdamW": "lfs_cli.optimizers",
    "KVCache": "lfs_cli.model",
    "LanguageModel": "lfs_cli.generation.language_model",
    "LfsError": "lfs_cli.errors",
    "ModelConfig": "lfs_cli.config",
    "OPTIMIZERS": "lfs_cli.optimizers",
    "SGD": "lfs_cli.optimizers",
    "Tokenizer": "lfs_cli.tokenizer",
    "TrainConfig": "lfs_cli.config",
    "Transformer": "lfs_cli.model",
    "flash_attention": "lfs_cli.kernels.flash_attention",
    "flash_attention_packed": "lfs_cli.kernels.flash_attention",
    "learn_bpe": "lfs_cli.tokenizer",
    "load_config": "lfs_cli.config",
    "train": "lfs_cli.runs.train",
}
__all__ = [
    "ATTENTION",
    "OPTIMIZERS",
    "SGD",
    "AdamW",
    "KVCache",
    "LanguageModel",
    "LfsError",
    "ModelConfig",
    "Tokenizer",
    "TrainConfig",
    "Transformer",
    "flash_attention",
    "flash_attention_packed",
    "learn_bpe",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import lfs_cli` costs nothing (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module `lfs_cli` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
