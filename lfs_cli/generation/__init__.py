"""A trained model writes: from logits to a token, from a prompt to tokens, from text to text."""

from lfs_cli.generation.decode import generate_tokens
from lfs_cli.generation.language_model import LanguageModel, Piece, Score
from lfs_cli.generation.sample import SAMPLERS, build_sampler, draw

__all__ = ["SAMPLERS", "LanguageModel", "Piece", "Score", "build_sampler", "draw", "generate_tokens"]
