"""The smallest parts: a matrix product, a table of vectors, and softmax.

Initialization, sigma = standard deviation; draws beyond the limits are drawn again:

    Linear      N(0, 2 / (in + out)) within 3 sigma      keeps the size of what flows forward and of what flows back
    Embedding   N(0, 1) within [-3, 3]                   the residual stream starts with unit size

Source: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 16.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lfs_cli.kernels.embedding import look_up, reference_look_up
from lfs_cli.kernels.operation import compute_dtype, on_gpu
from lfs_cli.kernels.product import as_rows, matrix_for, weight_gradient


def truncated_normal(weight: Tensor, sigma: float) -> None:
    """Fill ``weight`` in place with draws from N(0, sigma^2) that lie within 3 sigma."""
    nn.init.trunc_normal_(weight, std=sigma, a=-3 * sigma, b=3 * sigma)


class Linear(nn.Module):
    """Multiplies by a matrix: y = x W^T. There is no bias.

    Args:
        in_features: Channels of x.
        out_features: Channels of y.

    Attributes:
        cast: Within a step that casts weights once (`training/casts.py`), the weight in the type of the products, with
            below it those of the layers that it is stacked with.
    """

    cast: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("cast", None, persistent=False)
        truncated_normal(self.weight, (2 / (in_features + out_features)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if sums_wide(x):
            return _wide_product(x, (self,))
        cast = cast_before(x, (self,))
        return x @ (self.weight if cast is None else cast).T


def multiply_together(x: Tensor, layers: Sequence[Linear]) -> Sequence[Tensor]:
    """Return what each of several layers makes of the same ``x``: on a GPU in training, by one product for all.

    The matrices are stacked in the type of the products, in the pass that casts them. Backward gains most: one product
    makes the gradient of ``x``, where several would each write one to be added up.

    Args:
        x: (..., C).
        layers: Layers that read C channels.

    Returns:
        One result for each layer, (..., its channels out): views of one tensor, where there was one product.
    """
    if not pays_to_stack(x):
        return [layer(x) for layer in layers]
    return stacked(x, layers).split([len(layer.weight) for layer in layers], -1)


def stacked(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    """Return what each of several layers makes of the same ``x``, (..., all their channels out), side by side."""
    return _wide_product(x, layers) if sums_wide(x) else x @ stacked_matrix(x, layers).T


def _wide_product(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    """Do what `stacked` does, by `_Product`."""
    return _Product.apply(x.to(compute_dtype(x)), kept_cast(x, layers), *(layer.weight for layer in layers))


def stacked_matrix(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    """Return the matrices of several layers, one below the other, in the type that ``x`` is multiplied in."""
    matrix = cast_before(x, layers)
    if matrix is None:
        dtype = compute_dtype(x)
        matrix = torch.cat([layer.weight.to(dtype) for layer in layers])
    return matrix


def cast_before(x: Tensor, layers: Sequence[Linear]) -> Tensor | None:
    """Return the stacked matrices of layers, if this step has cast them to the type that ``x`` is multiplied in.

    Gradients go to the weights all the same.
    """
    cast = layers[0].cast
    return _Cast.apply(cast, *(layer.weight for layer in layers)) if _fits(cast, x, layers) else None


def _fits(cast: Tensor | None, x: Tensor, layers: Sequence[Linear]) -> bool:
    """Return whether ``cast`` holds the matrices of these layers, in the type that ``x`` is multiplied in."""
    rows = sum(len(layer.weight) for layer in layers)
    return cast is not None and cast.dtype == compute_dtype(x) and len(cast) == rows


class _Cast(torch.autograd.Function):
    """``torch.cat(weights).to(cast.dtype)`` that was computed before."""

    @staticmethod
    def forward(ctx: Any, cast: Tensor, *weights: Tensor) -> Tensor:
        ctx.rows, ctx.dtype = [len(weight) for weight in weights], weights[0].dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(part.to(ctx.dtype) for part in gradients[0].split(ctx.rows))


class _Product(torch.autograd.Function):
    """``x @ torch.cat(weights).to(x.dtype).T``, by what was cast before if that is at hand.

    Gradients of the weights come in float32 from the product that sums them: they are not rounded to the type of
    ``x`` in between, and no kernel is spent on widening them again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: Tensor | None, *weights: Tensor) -> Tensor:
        matrix = matrix_for(x, cast, weights)
        ctx.save_for_backward(x, matrix)
        ctx.rows = [len(weight) for weight in weights]
        return x @ matrix.T

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, matrix) = gradients, ctx.saved_tensors
        dx = dy @ matrix if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return dx, None, *(None for _ in ctx.rows)
        dmatrix = weight_gradient(as_rows(dy), as_rows(x))
        return dx, None, *dmatrix.split(ctx.rows)


def kept_cast(x: Tensor, layers: Sequence[Linear]) -> Tensor | None:
    """Return the matrices of layers as this step has cast them before, if it has: without a way for gradients."""
    return layers[0].cast if _fits(layers[0].cast, x, layers) else None


def sums_wide(x: Tensor) -> bool:
    """Return whether gradients of matrices that ``x`` is multiplied by come in float32: a GPU makes them so by itself.

    Only in training, and where products are in a narrower type.
    """
    return pays_to_stack(x) and compute_dtype(x) in (torch.bfloat16, torch.float16)


def pays_to_stack(x: Tensor) -> bool:
    """Return whether to multiply by several matrices at once: elsewhere, their copy costs more than it saves."""
    return on_gpu(x) and torch.is_grad_enabled()


class Embedding(nn.Module):
    """Looks up one vector for each token.

    Args:
        vocab_size: Number of vectors.
        width: Channels of each.
        sigma: Standard deviation of the entries at the start.
    """

    def __init__(self, vocab_size: int, width: int, sigma: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        truncated_normal(self.weight, sigma)

    def forward(self, tokens: Tensor) -> Tensor:
        return reference_look_up(tokens, self.weight, self.weight.dtype)


def look_up_together(tokens: Tensor, tables: Sequence[nn.Module], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return what each of several tables has for the same tokens, in these types: (..., its width) each.

    On a GPU in training kernels do it, which sort the tokens once for the gradients of all tables. They do not call
    the tables, so not where a table is of another class or is watched by hooks; nor where torch.compile makes its own.
    """
    plain = [x for x in tables if type(x) is Embedding and not (x._forward_hooks or x._forward_pre_hooks)]
    if len(plain) == len(tables) and pays_to_stack(plain[0].weight) and not torch.compiler.is_compiling():
        return look_up(tokens, [table.weight for table in plain], dtypes)
    return [table(tokens).to(dtype) for table, dtype in zip(tables, dtypes, strict=True)]


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Turn scores into shares that add up to one along ``dim``: exp(x) / sum exp(x).

    The largest score is subtracted first, which changes nothing but keeps exp from overflowing.

    Args:
        x: Any shape; -inf gives a share of zero.
        dim: Dimension to normalize.

    Returns:
        Shares, in the shape and type of ``x``.
    """
    return _Softmax.apply(x, dim)


class _Softmax(torch.autograd.Function):
    """Softmax that keeps only its result: dx = y (dy - sum dy y)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        y = (x - x.amax(dim, keepdim=True)).exp_()
        y.div_(y.sum(dim, keepdim=True))
        ctx.dim = dim
        ctx.save_for_backward(y)
        return y.view_as(y)  # for torch 2.11, whose compiler takes the gradient of what was changed in place for zero

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dy,), (y,) = gradients, ctx.saved_tensors
        dx = dy * y
        return dx.addcmul_(y, dx.sum(ctx.dim, keepdim=True), value=-1), None
