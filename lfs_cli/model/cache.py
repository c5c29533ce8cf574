"""Keys and values of the tokens already read, so that the next token costs one position and not all of them.

Layout: keys and values are (L, B, capacity, G, D), allocated once. Positions below `length` are filled. In a forward
pass every layer writes its new positions at `length`, and the model moves `length` when all layers are done.
"""

import torch
from torch import Tensor

from lfs_cli.config import ModelConfig


class KVCache:
    """Room for the keys and values of up to ``capacity`` positions.

    Args:
        config: Shape of the model.
        batch: Sequences (B).
        capacity: Positions there is room for.
        device: Where the model computes.
        dtype: Type in which keys and values are kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.layers, batch, capacity, config.kv_heads, config.head_dim)
        self.k_LBSGD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBSGD = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions of one layer behind those before them.

        Args:
            layer: Index of the block that calls.
            k_BTGD: (B, T, G, D). Keys of the new positions, already rotated.
            v_BTGD: (B, T, G, D). Their values.

        Returns:
            Keys and values of all positions so far, each (B, S, G, D), in the type of the new ones.

        Raises:
            ValueError: When the positions do not fit, or the batch is not the one of the cache.
        """
        B, T = k_BTGD.shape[:2]
        stop = self.length + T
        if stop > self.capacity:
            raise ValueError(f"{T} more positions do not fit behind {self.length} in a cache of {self.capacity}")
        if self.k_LBSGD.shape[1] != B:
            raise ValueError(f"{B} sequences meet a cache of {self.k_LBSGD.shape[1]}")
        self.k_LBSGD[layer, :, self.length : stop] = k_BTGD
        self.v_LBSGD[layer, :, self.length : stop] = v_BTGD
        k_BSGD, v_BSGD = self.k_LBSGD[layer, :, :stop], self.v_LBSGD[layer, :, :stop]
        return k_BSGD.to(k_BTGD.dtype), v_BSGD.to(v_BTGD.dtype)

    def advance(self, positions: int) -> None:
        """Count ``positions`` as filled, after every layer has appended them."""
        self.length += positions

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on; their room is written again."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} positions cannot be cut to {length}")
        self.length = length
