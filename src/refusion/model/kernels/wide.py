"""Products of a hundred rows and more with big weights, where tensor cores and shared memory count as much as the weights' bytes.

A tile can have two pieces of weight rows beside its two pieces of rows of x: 128 + 64 of each make tiles that no power of two makes, so
that all multiprocessors have one and none has two. K can be shared out without adding the parts up: a tile's last program would do that
alone while all others wait, so it is left to the norm that reads all of them anyway (`owed`).
"""

import triton
import triton.language as tl

from refusion.model.kernels.epilogue import finish
from refusion.model.kernels.stream import load_rows, multiply, prefetch, release, rows_of_weight, settle_sums, wait, zeros

# T, E = rows of x of the two pieces of a tile; N, M = weight rows of its two pieces; K = in features


@triton.jit(do_not_specialize=["num_rows"])
def wide_kernel(
    x,  # normalised where there is a norm
    weight,
    bias,
    residual,
    out,  # [SPLIT_K, T, N] float32 where the parts are not added up
    num_rows,
    x_stride,
    residual_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXTRA_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TURNED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    # Row tiles run fastest: the programs that share weights run together, so only the first of them reads the weights from memory.
    first_row = tl.program_id(0) * (BLOCK_T + EXTRA_T)
    first_weight = tl.program_id(1) * (BLOCK_N + EXTRA_N)
    part = tl.program_id(2)
    weight_rows = rows_of_weight(first_weight, N, IS_GATED, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    weights = weight + weight_rows.to(tl.int64)[:, None] * K + columns[None, :]
    if EXTRA_N > 0:
        more_rows = rows_of_weight(first_weight + BLOCK_N, N, IS_GATED, EXTRA_N)
        more_weights = weight + more_rows.to(tl.int64)[:, None] * K + columns[None, :]
    # The parts take turns at the blocks of K; what reaches past K is masked, so even splits need no mask.
    stride: tl.constexpr = BLOCK_K * SPLIT_K
    num_blocks: tl.constexpr = (K + stride - 1) // stride
    is_even: tl.constexpr = num_blocks * stride == K
    begin = part * BLOCK_K
    if PDL:
        prefetch(weight, weight_rows, begin, K, BLOCK_K, stride, NUM_STAGES if num_blocks > NUM_STAGES else num_blocks)
    wait(PDL, LATE)
    acc = zeros(1, TURNED, BLOCK_N, BLOCK_T)
    if EXTRA_T > 0:
        acc_e = zeros(1, TURNED, BLOCK_N, EXTRA_T)
    if EXTRA_N > 0:
        acc_m = zeros(1, TURNED, EXTRA_N, BLOCK_T)
        if EXTRA_T > 0:
            acc_me = zeros(1, TURNED, EXTRA_N, EXTRA_T)
    for block in tl.range(num_blocks):
        start = begin + block * stride
        codes = load_weights(weights + start, start + columns, K, is_even)
        rows = load_rows(x, x_stride, num_rows, first_row, start + columns, K, is_even, BLOCK_T)
        acc = multiply(codes, rows, acc, TURNED)
        if EXTRA_T > 0:
            rows_e = load_rows(x, x_stride, num_rows, first_row + BLOCK_T, start + columns, K, is_even, EXTRA_T)
            acc_e = multiply(codes, rows_e, acc_e, TURNED)
        if EXTRA_N > 0:
            more_codes = load_weights(more_weights + start, start + columns, K, is_even)
            acc_m = multiply(more_codes, rows, acc_m, TURNED)
            if EXTRA_T > 0:
                acc_me = multiply(more_codes, rows_e, acc_me, TURNED)
    release(PDL, LATE)
    target = out + part.to(tl.int64) * num_rows * N
    column = first_weight // 2 if IS_GATED else first_weight
    finish_piece(acc, first_row, weight_rows, column, bias, residual, target, num_rows, residual_stride,
                 N, K, HAS_BIAS, HAS_RESIDUAL, IS_GATED, TURNED, BLOCK_T, BLOCK_N)  # fmt: skip
    if EXTRA_T > 0:
        finish_piece(acc_e, first_row + BLOCK_T, weight_rows, column, bias, residual, target, num_rows, residual_stride,
                     N, K, HAS_BIAS, HAS_RESIDUAL, IS_GATED, TURNED, EXTRA_T, BLOCK_N)  # fmt: skip
    if EXTRA_N > 0:
        column += BLOCK_N // 2 if IS_GATED else BLOCK_N
        finish_piece(acc_m, first_row, more_rows, column, bias, residual, target, num_rows, residual_stride,
                     N, K, HAS_BIAS, HAS_RESIDUAL, IS_GATED, TURNED, BLOCK_T, EXTRA_N)  # fmt: skip
        if EXTRA_T > 0:
            finish_piece(acc_me, first_row + BLOCK_T, more_rows, column, bias, residual, target, num_rows, residual_stride,
                         N, K, HAS_BIAS, HAS_RESIDUAL, IS_GATED, TURNED, EXTRA_T, EXTRA_N)  # fmt: skip


@triton.jit
def load_weights(pointers, columns, K: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=columns[None, :] < K, other=0.0)


@triton.jit
def finish_piece(
    acc, first_row, weight_rows, first_column, bias, residual, out, num_rows, residual_stride,
    N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_GATED: tl.constexpr, TURNED: tl.constexpr,
    NUM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`finish` of what owes no norm and no scale."""
    sums = settle_sums(acc, 1, TURNED)
    finish(sums, first_row, first_row, weight_rows, first_column, bias, bias, residual, out, num_rows, residual_stride, 0.0,
           N, K, False, False, HAS_BIAS, HAS_RESIDUAL, IS_GATED, NUM, BLOCK_N)  # fmt: skip
