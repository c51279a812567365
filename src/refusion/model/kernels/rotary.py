"""Norm of the heads (Qwen3), rotary position embedding and the new rows' K/V in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait

# T = rows, H = key/value heads, G = query heads per key/value head, D = head dimension

HEADS = 8  # heads of a program: a lone row still spreads over several multiprocessors, and many rows make no swarm of tiny programs


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    new_keys: Tensor,
    new_values: Tensor,
) -> Tensor:
    """Normalise and rotate queries and keys of qkv [T, (HG + 2H) * D]; returns the queries [T, HG, D].

    Keys and values go to `new_keys`, `new_values` [T, H, D], which may be slices. The tables `cos`, `sin` [positions, D / 2] are float32.
    """
    num_rows = qkv.shape[0]
    assert all(tensor.is_contiguous() for tensor in (qkv, cos, sin)), "rows and tables must be contiguous"
    assert new_keys.stride() == new_values.stride(), "keys and values must be laid out alike"
    assert new_keys.stride(2) == 1, "the numbers of a head must be neighbours"
    assert (q_norm is None) == (k_norm is None), "queries and keys are normalised together"
    query = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    launch(
        _rotate_and_store,
        (-(-(num_heads + 2 * num_kv_heads) // HEADS), num_rows),
        qkv,
        positions,
        cos,
        sin,
        q_norm,
        k_norm,
        query,
        new_keys,
        new_values,
        eps,
        new_keys.stride(0),
        new_keys.stride(1),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        HEADS=HEADS,
        HAS_NORM=q_norm is not None,
        num_warps=4,
    )
    return query


@triton.jit
def _rotate_and_store(
    qkv,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    query,
    new_keys,
    new_values,
    eps,
    new_row_stride,
    new_head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    TOTAL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, HALF)
    is_query = head < NUM_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < TOTAL)
    wait(PDL)

    source = qkv + (row * TOTAL + head)[:, None] * D + dim[None, :]
    first = tl.load(source, mask=(head < TOTAL)[:, None], other=0.0)  # [HEADS, D / 2]
    second = tl.load(source + HALF, mask=(head < TOTAL)[:, None], other=0.0)
    position = tl.load(positions + row)
    turn = tl.load(cos + position * HALF + dim)[None, :]
    lift = tl.load(sin + position * HALF + dim)[None, :]

    left, right = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:  # float32, rounded, then times the weight, and rounded: as the model was trained
        dtype = first.dtype
        squares = tl.sum(left * left, 1) + tl.sum(right * right, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        left = (left * scale).to(dtype).to(tl.float32) * _gain(q_norm, k_norm, dim, is_query, is_key)
        right = (right * scale).to(dtype).to(tl.float32) * _gain(q_norm, k_norm, dim + HALF, is_query, is_key)
        left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
    new_first = (left * turn - right * lift).to(first.dtype)
    new_second = (right * turn + left * lift).to(first.dtype)

    target = query + (row * NUM_HEADS + head)[:, None] * D + dim[None, :]
    tl.store(target, new_first, mask=is_query[:, None])
    tl.store(target + HALF, new_second, mask=is_query[:, None])
    target = new_keys + row * new_row_stride + (head - NUM_HEADS)[:, None] * new_head_stride + dim[None, :]
    tl.store(target, new_first, mask=is_key[:, None])
    tl.store(target + HALF, new_second, mask=is_key[:, None])
    target = new_values + row * new_row_stride + (head - NUM_HEADS - NUM_KV_HEADS)[:, None] * new_head_stride + dim[None, :]
    tl.store(target, first, mask=is_value[:, None])
    tl.store(target + HALF, second, mask=is_value[:, None])


@triton.jit
def _gain(q_norm, k_norm, dim, is_query, is_key):
    """[HEADS, D / 2] norm weights: those of the queries, of the keys, and nothing for the values."""
    of_query = tl.load(q_norm + dim).to(tl.float32)
    of_key = tl.load(k_norm + dim).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], tl.where(is_key[:, None], of_key[None, :], 0.0))
