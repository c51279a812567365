"""Sums that a product leaves to whoever reads them next: the residual stream plus the parts of a split K, added up by the norm behind."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from refusion.model.kernels.launch import launch
from refusion.model.kernels.norms import rms_norm
from refusion.model.kernels.stream import normalise, sum_of_squares, wait

# T = rows, K = features, P = parts


@dataclass(slots=True)
class Owed:
    """[T, K] residual + the sum of its parts; the residual takes the sum when somebody asks for it, and nothing is owed any more."""

    residual: Tensor
    parts: Tensor | None
    """[P, T, K] float32."""

    @property
    def shape(self) -> torch.Size:
        return self.residual.shape

    def paid(self) -> Tensor:
        """[T, K] the sum."""
        if self.parts is not None:
            _add(self, None, 0.0)
        return self.residual

    def normed(self, norm_weight: Tensor, eps: float) -> Tensor:
        """[T, K] `rms_norm` of the sum, which is kept as well."""
        return rms_norm(self.residual, norm_weight, eps) if self.parts is None else _add(self, norm_weight, eps)


def paid(hidden: Tensor | Owed) -> Tensor:
    """[T, K] rows, added up where they are owed."""
    return hidden.paid() if isinstance(hidden, Owed) else hidden


def normed(x: Tensor | Owed, norm_weight: Tensor, eps: float) -> Tensor:
    """[T, K] `rms_norm` of rows, whether they are owed or not."""
    return x.normed(norm_weight, eps) if isinstance(x, Owed) else rms_norm(x, norm_weight, eps)


def _add(owed: Owed, norm_weight: Tensor | None, eps: float) -> Tensor:
    """The sum goes to the residual; returns its norm, or the residual without a `norm_weight`."""
    residual, parts = owed.residual, owed.parts
    assert parts is not None, "nothing is owed"
    assert parts.is_contiguous(), "parts are read as rows of K"
    num_rows, width = residual.shape
    block = triton.next_power_of_2(width)
    out = residual if norm_weight is None else torch.empty((num_rows, width), dtype=residual.dtype, device=residual.device)
    launch(
        add_norm_kernel,
        (num_rows,),
        parts,
        residual,
        residual if norm_weight is None else norm_weight,
        out,
        residual.stride(0),
        num_rows,
        eps,
        WIDTH=width,
        PARTS=parts.shape[0],
        HAS_NORM=norm_weight is not None,
        BLOCK=block,
        num_warps=8 if block > 2048 else 4,
    )
    owed.parts = None
    return out


@triton.jit(do_not_specialize=["num_rows"])
def add_norm_kernel(
    parts,
    residual,
    norm_weight,
    out,
    residual_stride,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row. The sum is rounded as the residual stream is, and the norm is that of the rounded one, as in the plain twin."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    if HAS_NORM:
        gains = tl.load(norm_weight + columns, mask=is_inside, other=0.0)  # nobody wrote the weights: before the wait
    wait(PDL)
    place = residual + row * residual_stride + columns
    total = tl.load(place, mask=is_inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):  # in their order, so results repeat bit by bit
        total += tl.load(parts + (part * num_rows.to(tl.int64) + row) * WIDTH + columns, mask=is_inside, other=0.0)
    rounded = total.to(residual.dtype.element_ty)
    tl.store(place, rounded, mask=is_inside)
    if HAS_NORM:
        values = rounded[None, :]
        values = normalise(values, gains, sum_of_squares(values) / WIDTH, eps)
        tl.store(out + row * WIDTH + columns[None, :], values, mask=is_inside[None, :])
