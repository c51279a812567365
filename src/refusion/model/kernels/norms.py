"""The small elementwise kernels around a product the library computes: RMS norm of rows, SiLU gating."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refusion.model.kernels.launch import interpreted, launch
from refusion.model.kernels.prefetch import prefetch_share, slab_of
from refusion.model.kernels.stream import scale_columns, sum_of_squares, wait
from refusion.model.quantize import QuantizedWeight

# T = rows, K = features, I = intermediate features


PREFETCH_PROGRAMS = 132  # at least, where the kernel also prefetches: a lone row would leave all lines to one multiprocessor


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float, *, prefetch: Tensor | QuantizedWeight | None = None) -> Tensor:
    """[T, K] as `ops.rms_norm`, one program a row. `prefetch` is the weight of the next product."""
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    slab = slab_of(prefetch, x)
    has_prefetch = slab.num_lines > 0
    launch(
        rms_norm_kernel,
        (max(num_rows, PREFETCH_PROGRAMS) if has_prefetch and not interpreted() else num_rows,),
        x,
        norm_weight,
        out,
        num_rows,
        x.stride(0),
        eps,
        *slab,
        WIDTH=width,
        BLOCK=block,
        HAS_PREFETCH=has_prefetch,
        num_warps=8 if block > 2048 else 4,
    )
    return out


def silu_multiply(gate_up: Tensor, *, prefetch: Tensor | QuantizedWeight | None = None) -> Tensor:
    """[T, I] = silu(gate) * up of [T, 2I]. `prefetch` is the weight of the next product."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, -(-width // 1024))
    slab = slab_of(prefetch, gate_up)
    launch(
        silu_multiply_kernel,
        grid,
        gate_up,
        out,
        gate_up.stride(0),
        *slab,
        WIDTH=width,
        BLOCK=1024,
        HAS_PREFETCH=slab.num_lines > 0,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["num_rows", "next_rows", "next_lines", "next_row_bytes"])
def rms_norm_kernel(
    x,
    norm_weight,
    out,
    num_rows,
    x_stride,
    eps,
    next_weight,
    next_rows,
    next_lines,
    next_row_bytes,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if HAS_PREFETCH:  # nobody wrote the weights: before the wait
        prefetch_share(next_weight, next_rows, next_lines, next_row_bytes, tl.program_id(0), tl.num_programs(0), 256)
    gains = tl.load(norm_weight + columns, mask=columns < WIDTH, other=0.0)
    wait(PDL)
    is_inside = (columns < WIDTH) & (row < num_rows)
    values = tl.load(x + row * x_stride + columns, mask=is_inside, other=0.0)[None, :]
    inverse = tl.rsqrt(sum_of_squares(values) / WIDTH + eps)
    values = scale_columns((values.to(tl.float32) * inverse[:, None]).to(values.dtype), gains)
    tl.store(out + row * WIDTH + columns[None, :], values, mask=is_inside[None, :])


@triton.jit(do_not_specialize=["next_rows", "next_lines", "next_row_bytes"])
def silu_multiply_kernel(
    gate_up,
    out,
    stride,
    next_weight,
    next_rows,
    next_lines,
    next_row_bytes,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < WIDTH
    if HAS_PREFETCH:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        prefetch_share(next_weight, next_rows, next_lines, next_row_bytes, program, tl.num_programs(0) * tl.num_programs(1), 128)
    wait(PDL)
    gate = tl.load(gate_up + row * stride + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + columns, mask=is_column, other=0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty)  # rounded where the plain version rounds
    tl.store(out + row * WIDTH + columns, activated.to(tl.float32) * up, mask=is_column)
