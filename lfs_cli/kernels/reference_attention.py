"""Attention by its definition, in plain PyTorch with all T x S scores in memory: the judge of every kernel.

    score_ts = scale q_t . k_s            or softcap tanh(scale q_t . k_s / softcap)
    p_ts     = softmax over the keys s that query t sees            o_t = sum_s p_ts v_s

Query t stands at key place(t) = t + S - T: the last query at the last key. It sees key s when all of these hold:

    causal       s <= place(t)
    window       |s - place(t)| < window; with causal, these are the `window` latest keys up to its own
    documents    s and t are positions of the same document

For T = 2, S = 5, causal, the second with a window of 3:

    1 1 1 1 0        0 1 1 1 0
    1 1 1 1 1        0 0 1 1 1

A query that sees no key has o = 0 and passes no gradient on. Everything is computed in float32 or wider.

`reference_attention` leaves gradients to autograd. `forward` and `backward` are the same in the form that
`flash_attention.py` asks of an implementation, for the machines where no kernel can run.
"""

import torch
from torch import Tensor


def reference_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The definition of `flash_attention`, with its arguments, for any floating type on any device."""
    (B, T, H, D), S = q_BTHD.shape, k_BSGD.shape[1]
    scale = D**-0.5 if scale is None else scale
    spans = None if documents is None else document_spans(documents, B, T)
    visible_NTS = visible(T, S, q_BTHD.device, causal=causal, window=window, spans=spans)
    with torch.autocast(q_BTHD.device.type, enabled=False):
        q_BHTD, k_BHSD, v_BHSD = _wide_heads(q_BTHD, H), _wide_heads(k_BSGD, H), _wide_heads(v_BSGD, H)
        score_BHTS = _capped(q_BHTD @ k_BHSD.mT * scale, softcap)
        sees_N1T1 = visible_NTS.any(-1)[:, None, :, None]
        score_BHTS = score_BHTS.masked_fill(~visible_NTS[:, None] & sees_N1T1, float("-inf"))
        p_BHTS = score_BHTS.softmax(-1).masked_fill(~sees_N1T1, 0.0)
        return (p_BHTS @ v_BHSD).transpose(1, 2).to(q_BTHD.dtype)


def document_spans(documents: Tensor, B: int, T: int) -> Tensor:
    """Say for each position where its document starts and where it ends, without asking the GPU for a number.

    >>> document_spans(torch.tensor([0, 2, 5]), 1, 6)
    tensor([[[0, 0, 2, 2, 2, 6]], [[2, 2, 5, 5, 5, 6]]], dtype=torch.int32)

    Args:
        documents: (N + 1,), integers that do not fall. Cumulative lengths of N documents that lie one after another in
            B rows of T positions, row after row. A document may be empty, so a list can be padded to a fixed N by
            repeating its last number. One that passes the end of a row is cut in two there.
        B: Rows.
        T: Positions in a row.

    Returns:
        (2, B, T), int32: the first position of the document, and the one after its last, counted within the row.
        Positions before the first document or after the last belong to none: both numbers are equal.
    """
    total = B * T
    position = torch.arange(total, device=documents.device, dtype=documents.dtype)
    number = torch.searchsorted(documents, position, right=True)  # 0 before all documents, N + 1 after them
    before, after = documents.new_zeros(1), documents.new_full((1,), total)
    starts = torch.cat([before, documents[:-1], after])[number]
    ends = torch.cat([before, documents[1:], after])[number]
    row_start_B1 = torch.arange(B, device=documents.device, dtype=documents.dtype)[:, None] * T
    return (torch.stack([starts, ends]).view(2, B, T) - row_start_B1).clamp(0, T).int()


def visible(
    T: int,
    S: int,
    device: torch.device,
    *,
    causal: bool = True,
    window: int | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    """Return the mask: (1, T, S), or (B, T, S) with `spans` of documents. True where a query sees a key."""
    place_T1 = torch.arange(S - T, S, device=device)[:, None]
    s = torch.arange(S, device=device)
    seen = (s <= place_T1) if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    if window is not None:
        seen = seen & ((s - place_T1).abs() < window)
    if spans is None:
        return seen[None]
    starts_BT1, ends_BT1 = spans[..., None]
    return seen & (starts_BT1 <= s) & (s < ends_BT1)


def unavailable_reason(*_tensors: Tensor, **_mask: object) -> None:
    """Nothing keeps the definition from running."""


def forward(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, D), contiguous, and L (B, H, T), the natural log-sum-exp of scores, in float32 or wider."""
    H = q_BTHD.shape[2]
    with torch.autocast(q_BTHD.device.type, enabled=False):
        score_BHTS, _ = _masked_scores(q_BTHD, k_BSGD, causal, scale, window, softcap, spans)
        L_BHT = score_BHTS.logsumexp(-1)
        p_BHTS = torch.exp(score_BHTS - _normalizer(L_BHT)[..., None])
        o_BTHD = (p_BHTS @ _wide_heads(v_BSGD, H)).transpose(1, 2)
    return o_BTHD.to(q_BTHD.dtype).contiguous(), L_BHT


def backward(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    do_BTHD: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    spans: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv in the shapes of q, k and v, written into the tensors of these names where given."""
    H = q_BTHD.shape[2]
    with torch.autocast(q_BTHD.device.type, enabled=False):
        score_BHTS, slope_BHTS = _masked_scores(q_BTHD, k_BSGD, causal, scale, window, softcap, spans)
        p_BHTS = torch.exp(score_BHTS - _normalizer(L_BHT)[..., None])
        q_BHTD, k_BHSD, v_BHSD, o_BHTD, do_BHTD = (_wide_heads(x, H) for x in (q_BTHD, k_BSGD, v_BSGD, o_BTHD, do_BTHD))
        delta_BHT1 = (do_BHTD * o_BHTD).sum(-1, keepdim=True)
        ds_BHTS = p_BHTS * (do_BHTD @ v_BHSD.mT - delta_BHT1) * slope_BHTS * scale
        return (
            _sum_shared(ds_BHTS @ k_BHSD, q_BTHD, dq),
            _sum_shared(ds_BHTS.mT @ q_BHTD, k_BSGD, dk),
            _sum_shared(p_BHTS.mT @ do_BHTD, v_BSGD, dv),
        )


def _sum_shared(gradient_BHTD: Tensor, like_BTGD: Tensor, into: Tensor | None) -> Tensor:
    """Add up the query heads that share a head, in the shape and type of that head."""
    summed = gradient_BHTD.transpose(1, 2).unflatten(2, (like_BTGD.shape[2], -1)).sum(3)
    if into is None:
        into = torch.empty(like_BTGD.shape, dtype=like_BTGD.dtype, device=like_BTGD.device)
    return into.copy_(summed)


def _masked_scores(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    spans: Tensor | None,
) -> tuple[Tensor, Tensor | float]:
    """Scores (B, H, T, S), -inf where nothing is seen, and their slope in scale q.k, which a softcap flattens."""
    T, H, S = q_BTHD.shape[1], q_BTHD.shape[2], k_BSGD.shape[1]
    score_BHTS = _capped(_wide_heads(q_BTHD, H) @ _wide_heads(k_BSGD, H).mT * scale, softcap)
    slope = 1.0 if softcap is None else 1 - (score_BHTS / softcap).square()
    seen_NTS = visible(T, S, q_BTHD.device, causal=causal, window=window, spans=spans)
    return score_BHTS.masked_fill(~seen_NTS[:, None], float("-inf")), slope


def _normalizer(L_BHT: Tensor) -> Tensor:
    """L, with +inf for a query that sees nothing: then exp(score - L) is 0, not exp(-inf + inf)."""
    return L_BHT.masked_fill(L_BHT.isneginf(), float("inf"))


def _capped(score: Tensor, softcap: float | None) -> Tensor:
    return score if softcap is None else softcap * torch.tanh(score / softcap)


def _wide_heads(x_BTGD: Tensor, heads: int) -> Tensor:
    """(B, heads, T, D) in float32 or wider: each head repeated for the query heads that share it."""
    wide = x_BTGD.to(torch.promote_types(x_BTGD.dtype, torch.float32))
    return wide.repeat_interleave(heads // x_BTGD.shape[2], dim=2).transpose(1, 2)
