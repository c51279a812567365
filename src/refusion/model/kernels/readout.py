"""Greedy readout fused with the language-model head: logits stay in the accumulators of the program that computes them.

The first kernel streams the head once; each program reduces its tile of the vocabulary to four numbers per row, and two more for each
runner-up. The second adds up the tiles of a row. Ties go to the lowest id, as `torch.argmax` does it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refusion.model.kernels.config import Config
from refusion.model.kernels.launch import launch, overlap
from refusion.model.kernels.linear import AUTO, operand, resolve
from refusion.model.kernels.norms import rms_norm
from refusion.model.kernels.stream import release, stream, wait
from refusion.model.ops import Readout
from refusion.model.quantize import QuantizedWeight

# T = rows, K = in features, V = vocabulary, M = vocabulary tiles, R = runner-ups


def readout(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor | QuantizedWeight,
    bias_banned: Tensor,
    given_ids: Tensor,
    num_runner_ups: int = 0,
    *,
    config: Config | None = AUTO,
) -> Readout:
    """Greedy readout of rms_norm(x) @ weight.T + bias_banned, logits in float32.

    bias_banned [V] float32, 0 or -inf, some 0; given_ids [T] integer, negative where nothing is given.
    """
    config = resolve(config, x, weight, "readout")
    assert config is not None, "the library has no fused readout"
    assert config.split_k == 1, f"a readout reduces whole logits, not those of {config}"
    assert not config.is_wide, f"a readout has tiles of one piece, not those of {config}"
    if config.prenorm:
        x = rms_norm(x, norm_weight, eps)
    data, scale = operand(weight)
    (num_rows, num_in), vocabulary = x.shape, data.shape[0]
    tiles = config.tiles(num_rows, vocabulary)
    peaks = torch.empty((1 + num_runner_ups, num_rows, tiles[1]), dtype=torch.float32, device=x.device)
    peak_ids = torch.empty((1 + num_runner_ups, num_rows, tiles[1]), dtype=torch.int32, device=x.device)
    sums = torch.empty((num_rows, tiles[1]), dtype=torch.float32, device=x.device)
    given_logits = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    order = overlap().order(data.nbytes)
    launch(
        readout_tiles_kernel,
        tiles,
        x,
        data,
        norm_weight,
        x if scale is None else scale,
        bias_banned,
        given_ids,
        peaks,
        peak_ids,
        sums,
        given_logits,
        num_rows,
        x.stride(0),
        eps,
        V=vocabulary,
        K=num_in,
        R=num_runner_ups,
        HAS_NORM=not config.prenorm,
        HAS_SCALE=scale is not None,
        LANES=config.lanes,
        LATE=order == "late",
        is_dependent=order != "off",
        **config.constants(),
    )
    return _add_tiles(peaks, peak_ids, sums, given_logits, given_ids, vocabulary)


def _add_tiles(peaks: Tensor, peak_ids: Tensor, sums: Tensor, given_logits: Tensor, given_ids: Tensor, vocabulary: int) -> Readout:
    num_planes, num_rows, num_tiles = peaks.shape
    result = Readout(
        torch.empty(num_rows, dtype=torch.int64, device=peaks.device),
        torch.empty(num_rows, dtype=torch.float32, device=peaks.device),
        torch.empty(num_rows, dtype=torch.float32, device=peaks.device),
        torch.empty(num_rows, dtype=torch.bool, device=peaks.device),
        torch.empty((num_rows, num_planes - 1), dtype=torch.int64, device=peaks.device),
    )
    block = triton.next_power_of_2(num_tiles)
    launch(
        readout_rows_kernel,
        (num_rows,),
        peaks,
        peak_ids,
        sums,
        given_logits,
        given_ids,
        *result,
        V=vocabulary,
        M=num_tiles,
        R=num_planes - 1,
        R_PADDED=triton.next_power_of_2(num_planes),
        BLOCK=block,
        num_warps=min(16, max(4, block // 256)),  # 8 tiles a thread: all loads are on their way at once
    )
    return result


@triton.jit(do_not_specialize=["num_rows"])
def readout_tiles_kernel(
    x,
    weight,
    norm_weight,
    scale,
    bias_banned,
    given_ids,
    peaks,  # [1 + R, T, M] largest logits of the tile
    peak_ids,  # [1 + R, T, M] their tokens
    sums,  # [T, M] sum of exp(logit - peak)
    given_logits,  # [T], written by the tile that holds the given token, if there is one
    num_rows,
    x_stride,
    eps,
    V: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXTRA_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
    TURNED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    # Row tiles run fastest, so that all of them find a tile of the head in the L2 cache.
    first_row = tl.program_id(0) * (BLOCK_T + EXTRA_T)
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows = tl.minimum(tokens, V - 1)
    acc, extra, squares, extra_squares = stream(  # pyright: ignore[reportGeneralTypeIssues]: a call inside a kernel, not Python's
        x, x_stride, num_rows, first_row, weight, weight_rows, norm_weight, eps, 0,
        K, HAS_NORM, BLOCK_T, EXTRA_T, BLOCK_N, BLOCK_K, 1, LANES, TURNED, NUM_STAGES, PDL, LATE,
    )  # fmt: skip
    release(PDL, LATE)
    owes_norm: tl.constexpr = HAS_NORM and K > BLOCK_K
    reduce_tile(acc, squares, first_row, tokens, scale, bias_banned, given_ids, peaks, peak_ids, sums, given_logits,
                num_rows, eps, V, K, R, owes_norm, HAS_SCALE, BLOCK_T)  # fmt: skip
    if EXTRA_T > 0:
        reduce_tile(extra, extra_squares, first_row + BLOCK_T, tokens, scale, bias_banned, given_ids, peaks, peak_ids, sums, given_logits,
                    num_rows, eps, V, K, R, owes_norm, HAS_SCALE, EXTRA_T)  # fmt: skip


@triton.jit
def reduce_tile(
    logits,  # [N, T] products, norm still owed
    squares,  # [T]
    first_row,
    tokens,
    scale,
    bias_banned,
    given_ids,
    peaks,
    peak_ids,
    sums,
    given_logits,
    num_rows,
    eps,
    V: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    OWES_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NUM: tl.constexpr,
):
    if OWES_NORM:
        logits *= tl.rsqrt(squares / K + eps)[None, :]
    if HAS_SCALE:
        logits *= tl.load(scale + tokens, mask=tokens < V, other=0.0)[:, None]
    logits += tl.load(bias_banned + tokens, mask=tokens < V, other=float("-inf"))[:, None]
    rows = first_row + tl.arange(0, NUM)
    is_row = rows < num_rows
    peak = tl.max(logits, axis=0)
    peak_id = tl.min(tl.where(logits == peak[None, :], tokens[:, None], V), axis=0)
    # A tile may be banned as a whole; -inf minus -inf would be no number.
    floor = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(logits - floor[None, :]), axis=0)
    place = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks + place, peak, mask=is_row)
    tl.store(peak_ids + place, peak_id, mask=is_row)
    tl.store(sums + place, total, mask=is_row)
    given = tl.load(given_ids + rows, mask=is_row, other=-1)
    is_given = tokens[:, None] == given[None, :]
    is_here = tl.max(is_given.to(tl.int32), axis=0) == 1
    tl.store(given_logits + rows, tl.max(tl.where(is_given, logits, float("-inf")), axis=0), mask=is_row & is_here)
    for rank in tl.static_range(1, R + 1):
        logits = tl.where(tokens[:, None] == peak_id[None, :], float("-inf"), logits)
        peak = tl.max(logits, axis=0)
        peak_id = tl.min(tl.where(logits == peak[None, :], tokens[:, None], V), axis=0)
        plane = rank * num_rows.to(tl.int64) * tl.num_programs(1)
        tl.store(peaks + plane + place, peak, mask=is_row)
        tl.store(peak_ids + plane + place, peak_id, mask=is_row)


@triton.jit
def readout_rows_kernel(
    peaks,
    peak_ids,
    sums,
    given_logits,
    given_ids,
    token_ids,
    confidence,
    given_probability,
    given_is_argmax,
    runner_ups,  # [T, R]
    V: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    tiles = tl.arange(0, BLOCK)
    place = row.to(tl.int64) * M + tiles
    wait(PDL)
    peak = tl.load(peaks + place, mask=tiles < M, other=float("-inf"))
    peak_id = tl.load(peak_ids + place, mask=tiles < M, other=V)
    tile_sum = tl.load(sums + place, mask=tiles < M, other=0.0)
    given = tl.load(given_ids + row).to(tl.int64)
    given_logit = tl.load(given_logits + row)  # nobody wrote it where nothing is given; loaded all the same, not to wait for `given`
    highest = tl.max(peak, axis=0)
    token = tl.min(tl.where(peak == highest, peak_id, V), axis=0)
    total = tl.sum(tl.exp(peak - highest) * tile_sum, axis=0)
    is_given = (given >= 0) & (given < V)
    given_logit = tl.where(is_given, given_logit, float("-inf"))
    # A network that says no numbers names nothing; what it is taken to say must still be a token.
    tl.store(token_ids + row, tl.minimum(token, V - 1).to(tl.int64))
    tl.store(confidence + row, 1.0 / total)
    tl.store(given_probability + row, tl.exp(given_logit - highest) / total)
    tl.store(given_is_argmax + row, token == given)
    if R > 0:
        plane = tl.arange(0, R_PADDED)[:, None]
        is_there = (plane <= R) & (tiles < M)[None, :]
        each = plane * tl.num_programs(0).to(tl.int64) * M + place[None, :]
        logits = tl.load(peaks + each, mask=is_there, other=float("-inf"))  # [1 + R, M]
        ids = tl.load(peak_ids + each, mask=is_there, other=V)
        for rank in tl.static_range(R):
            logits = tl.where(ids == token, float("-inf"), logits)
            highest = tl.max(tl.max(logits, axis=1), axis=0)
            token = tl.min(tl.min(tl.where(logits == highest, ids, V), axis=1), axis=0)
            tl.store(runner_ups + row.to(tl.int64) * R + rank, tl.minimum(token, V - 1).to(tl.int64))
