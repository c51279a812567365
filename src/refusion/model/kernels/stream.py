"""The loop all dense kernels share: a tile of weights streamed once past all rows of x, with the RMS norm of x on the way.

Weights are the left operand, so that 64 or more of them feed Hopper's warp-group instructions however few the rows are; accumulators
are [weights, rows] and turned round where they are stored. With many rows of 8-bit weights it can be the other way round: a left operand
that is computed passes through registers in pieces of two bytes, a right one is converted in wide pieces and lies in shared memory.
What becomes of the products is the caller's epilogue.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import cuda

# T = rows of x in a tile, E = rows of the second accumulator (0 = none), N = weight rows of a tile, K = in features

# The interpreter multiplies bfloat16 as if they were integers; float32 holds the same products exactly.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def stream(
    x,
    x_stride,
    num_rows,
    first_row,
    weight,
    weight_rows,  # [N] which rows of the weight, all of them valid
    norm_weight,
    eps,
    part,  # of SPLIT_K
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXTRA_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    LANES: tl.constexpr,
    TURNED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
    LATE: tl.constexpr,
):
    """Products [N, T] and [N, E] of this part of K in float32, and the sums of squares [T] and [E] of x over it.

    With one block of K the norm is applied exactly as `ops.rms_norm` does. Otherwise x * norm_weight is multiplied, rounded to the dtype
    once where the plain version rounds twice, and the caller owes the factor 1 / rms of each row: x is then read only once. Without E the
    second results repeat the first.

    With LANES > 1 a block of K is cut into as many parts side by side, a leading axis of every tile: each warp multiplies its own part, so
    a small tile keeps all warps busy and the chain of dependent tensor core instructions is that much shorter. Added up at the end.

    The parts of a split K take turns at its blocks. With LATE the next kernel may start when the loop is done, otherwise as soon as this
    one has begun.
    """
    columns = tl.arange(0, BLOCK_K // LANES)
    if LANES > 1:
        columns = tl.arange(0, LANES)[:, None] * (BLOCK_K // LANES) + columns[None, :]
    # Ranks follow from `columns`: broadcasting puts the axis of the lanes in front.
    weights = weight + weight_rows.to(tl.int64)[:, None] * K + tl.expand_dims(columns, -2)
    if K <= BLOCK_K:
        codes = tl.load(weights, mask=tl.expand_dims(columns, -2) < K, other=0.0)  # nobody wrote the weights: before the wait
        wait(PDL, LATE)
        gains = tl.load(norm_weight + columns, mask=columns < K, other=0.0) if HAS_NORM else columns
        rows = normed_rows(x, x_stride, num_rows, first_row, columns, gains, eps, K, HAS_NORM, LANES, BLOCK_T)
        acc = settle_sums(multiply(codes, rows, zeros(LANES, TURNED, BLOCK_N, BLOCK_T), TURNED), LANES, TURNED)
        squares = tl.zeros([BLOCK_T], dtype=tl.float32)
        if EXTRA_T > 0:
            extra_rows = normed_rows(x, x_stride, num_rows, first_row + BLOCK_T, columns, gains, eps, K, HAS_NORM, LANES, EXTRA_T)
            extra = settle_sums(multiply(codes, extra_rows, zeros(LANES, TURNED, BLOCK_N, EXTRA_T), TURNED), LANES, TURNED)
            return acc, extra, squares, tl.zeros([EXTRA_T], dtype=tl.float32)
        else:
            return acc, acc, squares, squares
    else:
        # The number of rounds is the same for every part; what reaches past K is masked, so even splits need no mask.
        num_blocks: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
        is_even: tl.constexpr = num_blocks * BLOCK_K * SPLIT_K == K
        stride: tl.constexpr = BLOCK_K * SPLIT_K
        begin = part * BLOCK_K
        if PDL:
            prefetch(weight, weight_rows, begin, K, BLOCK_K, stride, NUM_STAGES if num_blocks > NUM_STAGES else num_blocks)
        wait(PDL, LATE)
        acc = zeros(LANES, TURNED, BLOCK_N, BLOCK_T)
        squares = tl.zeros([LANES, BLOCK_T] if LANES > 1 else [BLOCK_T], dtype=tl.float32)
        if EXTRA_T > 0:
            extra = zeros(LANES, TURNED, BLOCK_N, EXTRA_T)
            extra_squares = tl.zeros([LANES, EXTRA_T] if LANES > 1 else [EXTRA_T], dtype=tl.float32)
        if HAS_NORM:
            next_gains = load_gains(norm_weight, begin + columns, K)
        for block in tl.range(num_blocks):
            start = begin + block * stride
            if is_even:
                codes = tl.load(weights + start)
            else:
                codes = tl.load(weights + start, mask=tl.expand_dims(start + columns, -2) < K, other=0.0)
            rows = load_rows(x, x_stride, num_rows, first_row, start + columns, K, is_even, BLOCK_T)
            if EXTRA_T > 0:
                extra_rows = load_rows(x, x_stride, num_rows, first_row + BLOCK_T, start + columns, K, is_even, EXTRA_T)
            if HAS_NORM:
                # Too narrow for the asynchronous copies of the pipeline, so it is carried: loaded one round ahead of its use.
                gains = next_gains
                next_gains = load_gains(norm_weight, start + stride + columns, K)
                squares += sum_of_squares(rows)
                rows = scale_columns(rows, gains)
                if EXTRA_T > 0:
                    extra_squares += sum_of_squares(extra_rows)
                    extra_rows = scale_columns(extra_rows, gains)
            acc = multiply(codes, rows, acc, TURNED)
            if EXTRA_T > 0:
                extra = multiply(codes, extra_rows, extra, TURNED)
        acc, squares = settle_sums(acc, LANES, TURNED), add_lanes(squares, LANES)
        if EXTRA_T > 0:
            return acc, settle_sums(extra, LANES, TURNED), squares, add_lanes(extra_squares, LANES)
        else:
            return acc, acc, squares, squares


@triton.jit
def zeros(LANES: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.static_assert(LANES == 1 or not TURNED)
    if LANES > 1:
        return tl.zeros([LANES, ROWS, COLUMNS], dtype=tl.float32)
    elif TURNED:
        return tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    else:
        return tl.zeros([ROWS, COLUMNS], dtype=tl.float32)


@triton.jit
def settle_sums(sums, LANES: tl.constexpr, TURNED: tl.constexpr):
    """[weights, rows] of what was summed up."""
    if TURNED:
        return tl.trans(sums)
    else:
        return add_lanes(sums, LANES)


@triton.jit
def add_lanes(sums, LANES: tl.constexpr):
    if LANES > 1:
        return tl.sum(sums, axis=0)
    else:
        return sums


@triton.jit
def wait(PDL: tl.constexpr, LATE: tl.constexpr = False):  # pyright: ignore[reportArgumentType]: Triton makes it a constexpr
    """Everything launched before is complete from here on; unless LATE, the next kernel may take the multiprocessors that are free."""
    if PDL:
        cuda.gdc_wait()
        if not LATE:
            cuda.gdc_launch_dependents()


@triton.jit
def release(PDL: tl.constexpr, LATE: tl.constexpr):
    """The next kernel may start, if it could not before."""
    if PDL and LATE:
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch(weight, weight_rows, begin, K: tl.constexpr, BLOCK_K: tl.constexpr, STRIDE: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Ask the L2 cache for the first blocks of the weight rows: what the pipeline loads first, while the previous kernel ends."""
    elements: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # of a line of 128 bytes
    per_block: tl.constexpr = (BLOCK_K + elements - 1) // elements
    line = tl.arange(0, triton.next_power_of_2(NUM_BLOCKS * per_block))
    columns = tl.minimum(begin + line // per_block * STRIDE + line % per_block * elements, K - 1)
    ask((weight + weight_rows.to(tl.int64)[:, None] * K + columns[None, :]).to(tl.int64))


@triton.jit
def ask(addresses):
    """Ask the L2 cache for the lines at these addresses, int64: nothing is loaded, so nobody waits."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def rows_of_weight(first, N: tl.constexpr, IS_GATED: tl.constexpr, NUM: tl.constexpr):
    """[NUM] rows of the weight from `first` on; gate and up rows take turns, so that a pair ends up in one program.

    Past the end the last one is read again and not stored: a load without a mask is a plain asynchronous copy.
    """
    place = first + tl.arange(0, NUM)
    if IS_GATED:
        return tl.minimum(place // 2, N // 2 - 1) + place % 2 * (N // 2)
    else:
        return tl.minimum(place, N - 1)


@triton.jit
def load_rows(x, x_stride, num_rows, first_row, columns, K: tl.constexpr, EVEN: tl.constexpr, NUM: tl.constexpr):
    """[NUM, columns] of x; rows past the last are zeros and cost no traffic."""
    rows = first_row + tl.arange(0, NUM)
    is_row = rows[:, None] < num_rows
    columns = tl.expand_dims(columns, -2)
    pointers = x + rows.to(tl.int64)[:, None] * x_stride + columns
    return tl.load(pointers, mask=is_row if EVEN else is_row & (columns < K), other=0.0)


@triton.jit
def normed_rows(
    x, x_stride, num_rows, first_row, columns, gains, eps,
    K: tl.constexpr, HAS_NORM: tl.constexpr, LANES: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """[NUM, columns] whole rows of x, normalised if wanted with the roundings of `ops.rms_norm`."""
    rows = load_rows(x, x_stride, num_rows, first_row, columns, K, False, NUM)
    if HAS_NORM:
        rows = normalise(rows, gains, add_lanes(sum_of_squares(rows), LANES) / K, eps)
    return rows


@triton.jit
def normalise(rows, gains, mean_squares, eps):
    """Rows [NUM, columns] over their root mean square, times the gains, with the roundings of `ops.rms_norm`."""
    inverse = tl.rsqrt(mean_squares + eps)
    return scale_columns((rows.to(tl.float32) * inverse[:, None]).to(rows.dtype), gains)


@triton.jit
def load_gains(norm_weight, columns, K: tl.constexpr):
    return tl.load(norm_weight + columns, mask=columns < K, other=0.0)


@triton.jit
def sum_of_squares(rows):
    wide = rows.to(tl.float32)
    return tl.sum(wide * wide, axis=-1)


@triton.jit
def scale_columns(rows, gains):
    return (rows.to(tl.float32) * tl.expand_dims(gains, -2).to(tl.float32)).to(rows.dtype)


@triton.jit
def multiply(codes, rows, acc, TURNED: tl.constexpr):
    """acc + codes @ rows.T, or the other way round; quantised codes take the dtype of the rows in registers."""
    if INTERPRETED:
        codes, rows = codes.to(tl.float32), rows.to(tl.float32)
    elif codes.dtype == tl.float8e4nv and rows.dtype == tl.bfloat16:
        codes = bfloat16_of_float8(codes)
    else:
        codes = codes.to(rows.dtype)
    if TURNED:
        return tl.dot(rows, tl.trans(codes), acc, input_precision="ieee")
    else:
        return tl.dot(codes, tl.trans(rows), acc, input_precision="ieee")


@triton.jit
def bfloat16_of_float8(codes):
    """Exactly, four numbers at a time: the conversions of the hardware, one number at a time, are slower than the memory.

    Sign, exponent and fraction move to their places in a bfloat16, whose exponent counts from 127 instead of 7: hence 2**120, 0x7b80.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high, moved, scale;
        mov.b32 scale, 0x7b807b80;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.u32 moved, low, 4;
        and.b32 moved, moved, 0x07f007f0;
        lop3.b32 low, low, 0x80008000, moved, 0xea;
        shr.u32 moved, high, 4;
        and.b32 moved, moved, 0x07f007f0;
        lop3.b32 high, high, 0x80008000, moved, 0xea;
        mul.rn.bf16x2 $0, low, scale;
        mul.rn.bf16x2 $1, high, scale;
        }
        """,
        "=r,=r,r",
        [codes],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )
