"""FlashAttention-2 in plain PyTorch: the algorithm of `triton_attention.py`, to be read first, on any device.

Softmax needs the largest score of a row and the sum of all its exponentials before it can weigh a single value. The
trick: take the keys a tile at a time, keep the largest score and the sum *so far*, and whenever a larger score turns
up, scale down what was accumulated. No more than one tile of scores exists at any moment.

Source: Dao, "FlashAttention-2", 2023 (arXiv:2307.08691), Algorithms 1 and 2. Here the tiles of all heads and sequences
are worked on at once, as PyTorch likes it; a GPU gives each its own program.

Math, with the scale 1 / sqrt(D), for a tile of queries Q and tiles K_j, V_j of keys and values:

    forward, from m = -inf, l = 0, a = 0:
        S_j = scale Q K_j^T                       masked scores are -inf
        n   = max(m, rowmax(S_j))                 P_j = exp(S_j - n)
        l   = exp(m - n) l + rowsum(P_j)          a = exp(m - n) a + P_j V_j          m = n
    O = a / l                                     L = m + ln(l), the log-sum-exp of the row

    backward, recomputing S_j from Q, K_j and P_j = exp(S_j - L), which is the softmax itself:
        delta = rowsum(dO * O)                    equals rowsum(dP * P) over all keys
        dV_j += P_j^T dO
        dS_j  = P_j * (dO V_j^T - delta)          dQ += scale dS_j K_j          dK_j += scale dS_j^T Q

Numerics: everything is accumulated in float32 or wider. Memory: saves q, k, v, o and L.
Speed:    none intended. A tile is a few small operations; use it to learn, and to judge the fast one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 64  # queries and keys at a time


def tiled_attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Mix values by the similarity of queries to keys: softmax(scale q k^T) v, head by head. Differentiable, once.

    Args:
        q_BTHD: (B, T, H, D), any floating type.
        k_BSGD: (B, S, G, D). Query head h reads key/value head h G / H.
        v_BSGD: (B, S, G, D).
        causal: Query t sees keys up to t + S - T, the last query all. Else every query sees every key.
        scale: Factor of the scores; `None` is 1 / sqrt(D).

    Returns:
        (B, T, H, D), in the type of `q_BTHD`.
    """
    group = q_BTHD.shape[2] // k_BSGD.shape[2]
    k_BHSD, v_BHSD = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k_BSGD, v_BSGD))
    return TiledAttention.apply(q_BTHD.transpose(1, 2), k_BHSD, v_BHSD, causal, scale).transpose(1, 2)


class TiledAttention(torch.autograd.Function):
    """Attention over the last two dimensions, tile by tile: the interface of Stanford CS336, assignment 2.

    >>> o = TiledAttention.apply(q, k, v, is_causal)      # q: (..., T, D); k and v: (..., S, D)

    Saves q, k, v, o and L, which is (..., T).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, scale: float | None = None
    ) -> Tensor:
        (T, D), S = q.shape[-2:], k.shape[-2]
        if is_causal and T > S:
            raise ValueError(f"{T} queries need {T} or more keys, got {S}: some query would see nothing")
        ctx.causal, ctx.scale = is_causal, D**-0.5 if scale is None else scale
        o = torch.empty_like(q)
        L = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            for rows in _tiles(T):
                q_i = _read(q, rows)
                m = torch.full_like(L[..., rows], float("-inf"))
                l = torch.zeros_like(m)  # noqa: E741  the paper's name
                a = torch.zeros_like(q_i)
                for keys in _tiles(_keys_seen(rows, T, S, is_causal)):
                    score = _masked(ctx.scale * q_i @ _read(k, keys).mT, rows, keys, T, S, is_causal)
                    n = torch.maximum(m, score.amax(-1))
                    p = torch.exp(score - n[..., None])
                    w = torch.exp(m - n)
                    l = w * l + p.sum(-1)  # noqa: E741
                    a = w[..., None] * a + p @ _read(v, keys)
                    m = n
                o[..., rows, :] = a / l[..., None]
                L[..., rows] = m + l.log()
        ctx.save_for_backward(q, k, v, o, L)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, L = ctx.saved_tensors
        T, S = q.shape[-2], k.shape[-2]
        dq, dk, dv = (torch.zeros_like(x, dtype=L.dtype) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            for rows in _tiles(T):
                q_i, do_i = _read(q, rows), _read(do, rows)
                delta = (do_i * _read(o, rows)).sum(-1)
                for keys in _tiles(_keys_seen(rows, T, S, ctx.causal)):
                    k_j, v_j = _read(k, keys), _read(v, keys)
                    score = _masked(ctx.scale * q_i @ k_j.mT, rows, keys, T, S, ctx.causal)
                    p = torch.exp(score - L[..., rows, None])
                    ds = p * (do_i @ v_j.mT - delta[..., None])
                    dv[..., keys, :] += p.mT @ do_i
                    dq[..., rows, :] += ctx.scale * ds @ k_j
                    dk[..., keys, :] += ctx.scale * ds.mT @ q_i
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _tiles(length: int) -> Iterator[slice]:
    """Cut `length` positions into slices of TILE; the last may be shorter."""
    for start in range(0, length, TILE):
        yield slice(start, min(start + TILE, length))


def _read(x: Tensor, positions: slice) -> Tensor:
    """One tile, in float32 or wider: what a GPU brings from its large memory into its fast one."""
    return x[..., positions, :].to(torch.promote_types(x.dtype, torch.float32))


def _keys_seen(rows: slice, T: int, S: int, causal: bool) -> int:
    """How many keys the last of these queries sees; the tiles after that are skipped."""
    return rows.stop + S - T if causal else S


def _masked(score: Tensor, rows: slice, keys: slice, T: int, S: int, causal: bool) -> Tensor:
    """Put -inf where query t may not see key s."""
    if not causal:
        return score
    t = torch.arange(rows.start, rows.stop, device=score.device)[:, None]
    s = torch.arange(keys.start, keys.stop, device=score.device)
    return score.masked_fill(s > t + S - T, float("-inf"))
