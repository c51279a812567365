"""Products of few rows with big weights, fused with what stands before and after them in a transformer layer.

One kernel serves all: `stream` reads each weight once, the epilogue scales, adds and gates in float32 and rounds once, where the plain
twins in `refusion.model.ops` round after each step. Where cuBLAS is faster (many rows) or exact float32 is wanted, `choose_config` says
so and the library multiplies, between small elementwise kernels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from refusion.model.kernels.config import Config, Kind, choose_config, invariant_config
from refusion.model.kernels.epilogue import finish
from refusion.model.kernels.launch import NUM_COUNTERS, counters, launch, overlap
from refusion.model.kernels.norms import silu_multiply
from refusion.model.kernels.owed import Owed, normed, paid
from refusion.model.kernels.stream import release, rows_of_weight, stream
from refusion.model.kernels.wide import wide_kernel
from refusion.model.quantize import QuantizedWeight

# T = rows, K = in features, N = out features, I = intermediate features

Weight = Tensor | QuantizedWeight
Hidden = Tensor | Owed
"""Rows of the residual stream."""

AUTO = Config(0, 0, 0, 0, 0, 0)
"""Stands for `choose_config`; a benchmark names a config of its own, or None for the library."""

INVARIANT = Config(-1, 0, 0, 0, 0, 0)
"""Stands for `invariant_config`: a row of the result does not depend, bit for bit, on how many rows there are."""

_DTYPES = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


def norm_linear(
    x: Hidden,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    config: Config | None = AUTO,
) -> Tensor:
    """[T, N] = rms_norm(x) @ weight.T (+ bias)."""
    config = resolve(config, x, weight, "norm_linear")
    if config is None:
        return F.linear(normed(x, norm_weight, eps), as_plain(weight), bias)
    return _run(x, weight, config, norm=(norm_weight, eps), bias=bias)


def norm_gated(x: Hidden, norm_weight: Tensor, eps: float, weight: Weight, *, config: Config | None = AUTO) -> Tensor:
    """[T, I] = silu(rms_norm(x) @ gate.T) * (rms_norm(x) @ up.T); `weight` [2I, K] holds the rows of gate, then those of up."""
    config = resolve(config, x, weight, "norm_gated")
    if config is None:
        return silu_multiply(F.linear(normed(x, norm_weight, eps), as_plain(weight)))
    return _run(x, weight, config, norm=(norm_weight, eps), is_gated=True)


def linear_add(
    x: Tensor,
    weight: Weight,
    residual: Hidden,
    bias: Tensor | None = None,
    *,
    in_place: bool = False,
    config: Config | None = AUTO,
) -> Tensor:
    """[T, N] = residual + x @ weight.T (+ bias). in_place: the result may take the place of the residual, which spares a copy of it."""
    hidden = linear_add_owed(x, weight, residual if in_place else paid(residual).clone(), bias, config=config)
    return paid(hidden)


def linear_add_owed(x: Tensor, weight: Weight, residual: Hidden, bias: Tensor | None = None, *, config: Config | None = AUTO) -> Hidden:
    """`linear_add` in place, whose sum may be left to the next norm: see `Owed`. A product with a bias owes nothing."""
    residual, config = paid(residual), resolve(config, x, weight, "linear_add")
    if config is not None and config.owes_sum and bias is None:
        return Owed(residual, _run(x, weight, config))
    if config is not None and not config.owes_sum:
        return _run(x, weight, config, residual=residual, bias=bias)
    plain = as_plain(weight)
    if bias is not None:
        return F.linear(x, plain, bias).add_(residual)
    return residual.addmm_(x, plain.T)  # in the library's epilogue; `torch.addmm` copies the residual first


def resolve(config: Config | None, x: Hidden, weight: Weight, kind: Kind) -> Config | None:
    """The config to use: the one given, or for AUTO and INVARIANT the chosen one."""
    assert x.shape[1] == weight.shape[1], f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}"
    assert isinstance(x, Owed) or x.stride(1) == 1, f"rows of x must be contiguous, not strided by {x.stride()}"
    if config is INVARIANT:
        return invariant_config(weight.shape[0], weight.shape[1], x.shape[0], kind)
    if config is not AUTO:
        return config
    data = weight.data if isinstance(weight, QuantizedWeight) else weight
    return choose_config(weight.shape[0], weight.shape[1], x.shape[0], kind, _DTYPES[data.dtype])


def as_plain(weight: Weight) -> Tensor:
    """The library multiplies plain weights only; `choose_config` never sends it quantised ones."""
    assert isinstance(weight, Tensor), "a quantised weight needs a kernel config"
    return weight


class Operand(NamedTuple):
    """A weight as the kernels take it."""

    data: Tensor
    scale: Tensor | None


def operand(weight: Weight) -> Operand:
    made = Operand(weight.data, weight.scale) if isinstance(weight, QuantizedWeight) else Operand(weight, None)
    assert made.data.is_contiguous(), "weights are read as rows of K"
    return made


def _run(
    x: Hidden,
    weight: Weight,
    config: Config,
    *,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """The product by the kernel that the config is for; [SPLIT_K, T, N] float32 parts if it owes the sum."""
    assert not (config.owes_sum and norm is not None), f"only what is added to the residual stream can be owed: {config}"
    if norm is not None and config.prenorm:
        x, norm = normed(x, *norm), None
    x = paid(x)
    if config.is_wide:
        assert norm is None, f"the kernel for many rows takes no norm: {config}"
        return _run_wide(x, as_plain(weight), config, bias, residual, is_gated)
    data, scale = operand(weight)
    (num_rows, num_in), num_out = x.shape, data.shape[0]
    assert config.split_k == 1 or config.block_k < num_in, f"one block of {num_in} columns cannot be split: {config}"
    tiles = config.tiles(num_rows, num_out)
    width = num_out // 2 if is_gated else num_out
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    partials, arrivals = (out, out) if config.split_k == 1 else _workspace(x, tiles, config)
    norm_weight, eps = norm or (x, 0.0)
    order = overlap().order(data.nbytes)
    launch(
        linear_kernel,
        (*tiles, config.split_k),
        x,
        data,
        norm_weight,
        x if scale is None else scale,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        partials,
        arrivals,
        num_rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        N=num_out,
        K=num_in,
        HAS_NORM=norm is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        IS_GATED=is_gated,
        SPLIT_K=config.split_k,
        LANES=config.lanes,
        LATE=order == "late",
        is_dependent=order != "off",
        **config.constants(),
    )
    return out


def _run_wide(x: Tensor, weight: Tensor, config: Config, bias: Tensor | None, residual: Tensor | None, is_gated: bool) -> Tensor:
    (num_rows, num_in), num_out = x.shape, weight.shape[0]
    assert weight.is_contiguous(), "weights are read as rows of K"
    assert config.lanes == 1, f"the kernel of many rows knows no lanes: {config}"
    assert config.owes_sum or config.split_k == 1, f"the kernel of many rows adds no parts up: {config}"
    assert not (config.owes_sum and (is_gated or residual is not None or bias is not None)), "parts are sums and nothing else"
    shape = (config.split_k, num_rows, num_out) if config.owes_sum else (num_rows, num_out // 2 if is_gated else num_out)
    out = torch.empty(shape, dtype=torch.float32 if config.owes_sum else x.dtype, device=x.device)
    order = overlap().order(weight.nbytes)
    launch(
        wide_kernel,
        (*config.tiles(num_rows, num_out), config.split_k),
        x,
        weight,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        num_rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        N=num_out,
        K=num_in,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        IS_GATED=is_gated,
        EXTRA_N=config.extra_n,
        SPLIT_K=config.split_k,
        LATE=order == "late",
        is_dependent=order != "off",
        **config.constants(),
    )
    return out


def _workspace(x: Tensor, tiles: tuple[int, int], config: Config) -> tuple[Tensor, Tensor]:
    """Room for the partial products and partial sums of squares of every part, and the arrival counters of the tiles."""
    num_tiles = tiles[0] * tiles[1]
    assert num_tiles <= NUM_COUNTERS, f"{num_tiles} tiles to split, {NUM_COUNTERS} counters"
    size = num_tiles * config.split_k * config.rows * (config.block_n + 1)
    return torch.empty(size, dtype=torch.float32, device=x.device), counters(x.device)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x,
    weight,
    norm_weight,
    scale,
    bias,
    residual,
    out,
    partials,
    counters,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXTRA_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    LANES: tl.constexpr,
    TURNED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    # Row tiles run fastest: the programs that share weights run together, so only the first of them reads the weights from memory.
    first_row = tl.program_id(0) * (BLOCK_T + EXTRA_T)
    tile_n = tl.program_id(1)
    part = tl.program_id(2) if SPLIT_K > 1 else 0
    weight_rows = rows_of_weight(tile_n * BLOCK_N, N, IS_GATED, BLOCK_N)
    acc, extra, squares, extra_squares = stream(  # pyright: ignore[reportGeneralTypeIssues]: a call inside a kernel, not Python's
        x,
        x_stride,
        num_rows,
        first_row,
        weight,
        weight_rows,
        norm_weight,
        eps,
        part,
        K,
        HAS_NORM,
        BLOCK_T,
        EXTRA_T,
        BLOCK_N,
        BLOCK_K,
        SPLIT_K,
        LANES,
        TURNED,
        NUM_STAGES,
        PDL,
        LATE,
    )
    release(PDL, LATE)
    owes_norm: tl.constexpr = HAS_NORM and K > BLOCK_K
    first_column = tile_n * (BLOCK_N // 2 if IS_GATED else BLOCK_N)
    if SPLIT_K > 1:
        tile = tl.program_id(0) * tl.num_programs(1) + tile_n
        part_size: tl.constexpr = (BLOCK_T + EXTRA_T) * (BLOCK_N + 1)
        parts = partials + tile * SPLIT_K * part_size
        put_part(parts + part * part_size, acc, squares, owes_norm, BLOCK_T, BLOCK_N)
        if EXTRA_T > 0:
            put_part(parts + part * part_size + BLOCK_T * (BLOCK_N + 1), extra, extra_squares, owes_norm, EXTRA_T, BLOCK_N)
        tl.debug_barrier()  # all warps have written; the release below then covers their writes
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT_K - 1:
            tl.store(counters + tile, 0)  # for the next kernel, and for the next replay of a graph
            acc, squares = add_parts(parts, part_size, owes_norm, SPLIT_K, BLOCK_T, BLOCK_N)
            finish(acc, squares, first_row, weight_rows, first_column, scale, bias, residual, out, num_rows, residual_stride, eps,
                   N, K, owes_norm, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED, BLOCK_T, BLOCK_N)  # fmt: skip
            if EXTRA_T > 0:
                extra, extra_squares = add_parts(parts + BLOCK_T * (BLOCK_N + 1), part_size, owes_norm, SPLIT_K, EXTRA_T, BLOCK_N)
                finish(extra, extra_squares, first_row + BLOCK_T, weight_rows, first_column, scale, bias, residual, out, num_rows,
                       residual_stride, eps, N, K, owes_norm, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED, EXTRA_T, BLOCK_N)  # fmt: skip
    else:
        finish(acc, squares, first_row, weight_rows, first_column, scale, bias, residual, out, num_rows, residual_stride, eps,
               N, K, owes_norm, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED, BLOCK_T, BLOCK_N)  # fmt: skip
        if EXTRA_T > 0:
            finish(extra, extra_squares, first_row + BLOCK_T, weight_rows, first_column, scale, bias, residual, out, num_rows,
                   residual_stride, eps, N, K, owes_norm, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED, EXTRA_T, BLOCK_N)  # fmt: skip


@triton.jit
def put_part(target, acc, squares, OWES_NORM: tl.constexpr, NUM: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leave the sums of one part for whoever comes last."""
    rows = tl.arange(0, NUM)
    tl.store(target + tl.arange(0, BLOCK_N)[:, None] * NUM + rows[None, :], acc)
    if OWES_NORM:
        tl.store(target + NUM * BLOCK_N + rows, squares)


@triton.jit
def add_parts(parts, part_size: tl.constexpr, OWES_NORM: tl.constexpr, SPLIT_K: tl.constexpr, NUM: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums over all parts, in their order whoever came last, so results repeat bit by bit; read from L2, where the others wrote."""
    rows = tl.arange(0, NUM)
    acc = tl.zeros([BLOCK_N, NUM], dtype=tl.float32)
    squares = tl.zeros([NUM], dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        source = parts + part * part_size
        acc += tl.load(source + tl.arange(0, BLOCK_N)[:, None] * NUM + rows[None, :], cache_modifier=".cg")
        if OWES_NORM:
            squares += tl.load(source + NUM * BLOCK_N + rows, cache_modifier=".cg")
    return acc, squares
