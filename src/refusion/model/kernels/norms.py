"""The small elementwise kernels around a product the library computes: RMS norm of rows, SiLU gating."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import normalise, sum_of_squares, wait

# T = rows, K = features, I = intermediate features


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """[T, K] as `ops.rms_norm`, one program a row."""
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    launch(
        rms_norm_kernel,
        (num_rows,),
        x,
        norm_weight,
        out,
        x.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        num_warps=8 if block > 2048 else 4,
    )
    return out


def silu_multiply(gate_up: Tensor) -> Tensor:
    """[T, I] = silu(gate) * up of [T, 2I]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, -(-width // 1024))
    launch(
        silu_multiply_kernel,
        grid,
        gate_up,
        out,
        gate_up.stride(0),
        WIDTH=width,
        BLOCK=1024,
        num_warps=4,
    )
    return out


@triton.jit
def rms_norm_kernel(
    x,
    norm_weight,
    out,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    gains = tl.load(norm_weight + columns, mask=is_inside, other=0.0)  # nobody wrote the weights: before the wait
    wait(PDL)
    values = tl.load(x + row * x_stride + columns, mask=is_inside, other=0.0)[None, :]
    values = normalise(values, gains, sum_of_squares(values) / WIDTH, eps)
    tl.store(out + row * WIDTH + columns[None, :], values, mask=is_inside[None, :])


@triton.jit
def silu_multiply_kernel(
    gate_up,
    out,
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < WIDTH
    wait(PDL)
    gate = tl.load(gate_up + row * stride + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + columns, mask=is_column, other=0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty)  # rounded where the plain version rounds
    tl.store(out + row * WIDTH + columns, activated.to(tl.float32) * up, mask=is_column)
