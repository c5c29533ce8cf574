"""Text to ids and back: byte-level BPE, learned from a file, exact and fast.

Imports no torch, and numba only for large texts.

Read in this order: `split` cuts text into words, `bpe` encodes and decodes, `learn` finds the merges, `loops` does the
same compiled. `fast` holds the arrays for the loops, `blocks` reads files, `formats` other people's files.
"""

from lfs_cli.tokenizer.bpe import Tokenizer, will_compile
from lfs_cli.tokenizer.learn import learn_bpe
from lfs_cli.tokenizer.split import PATTERNS, find_pattern

__all__ = ["PATTERNS", "Tokenizer", "find_pattern", "learn_bpe", "will_compile"]
