"""Text to ids and back: byte-level BPE, learned from a file, exact and fast.

Imports no torch, and numba only to compile.

Read in this order: `split` cuts text into words, `bpe` encodes and decodes, `learn` finds the merges; the files
`loops_` do the same compiled: `loops_scan` finds words, `loops_encode` merges them, `loops_learn` learns. Below them,
`loops_words` is their table of words, `desk` says what lies where, `vectors` are single instructions, `machine_code`
compiles once and keeps the result. `fast` holds the arrays for the loops, `blocks` reads files, `formats` other
people's files.
"""

from lfs_cli.tokenizer.bpe import Special, TextStream, Tokenizer, will_compile
from lfs_cli.tokenizer.learn import LearnStats, learn_bpe
from lfs_cli.tokenizer.split import PATTERNS, find_pattern

__all__ = [
    "PATTERNS", "LearnStats", "Special", "TextStream", "Tokenizer", "find_pattern", "learn_bpe", "will_compile",
]  # fmt: skip
