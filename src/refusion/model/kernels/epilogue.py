"""What is left to do to the finished sums of a product: norm, scale, bias, gate, residual, and the one rounding."""

import triton
import triton.language as tl

# T = rows of x in a tile, N = weight rows of a tile, K = in features


@triton.jit
def finish(
    acc,  # [N, T]
    squares,  # [T]
    first_row,
    weight_rows,  # [N]
    first_column,  # of `out`
    scale,
    bias,
    residual,
    out,
    num_rows,
    residual_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    OWES_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    NUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is left to do to finished sums, all in float32, and the one rounding to the dtype of `out`."""
    if OWES_NORM:
        acc *= tl.rsqrt(squares / K + eps)[None, :]
    if HAS_SCALE:
        acc *= tl.load(scale + weight_rows)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + weight_rows).to(tl.float32)[:, None]
    width: tl.constexpr = N // 2 if IS_GATED else N
    block: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    if IS_GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [block, 2, NUM]), [0, 2, 1]))
        acc = gate * tl.sigmoid(gate) * up
    rows = first_row + tl.arange(0, NUM)[None, :]
    columns = first_column + tl.arange(0, block)[:, None]
    is_inside = (rows < num_rows) & (columns < width)
    if HAS_RESIDUAL:
        acc += tl.load(residual + rows.to(tl.int64) * residual_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + rows.to(tl.int64) * width + columns, acc.to(out.dtype.element_ty), mask=is_inside)
