"""Commit: the K/V of the rows worth keeping move from the scratch of a forward to the pages, all layers in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait

# L = layers, T = rows, M = rows to copy, H = key/value heads, D = head dimension

PROGRAMS = 1024  # about eight per multiprocessor: more of them only queue
MAX_LAYERS = 8  # layers of a program; its bytes pass through registers


def store_rows(new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy new rows `source` [M] (-1: none) of all layers [L, T, H, D] to the rows `target` of the pages [L, cache rows, H, D].

    A row of the pages may be the target of one source only.
    """
    num_layers, _, num_kv_heads, head_dim = new_keys.shape
    assert (new_keys.stride(), keys.stride()) == (new_values.stride(), values.stride()), "keys and values must be laid out alike"
    assert new_keys.stride()[2:] == keys.stride()[2:] == (head_dim, 1), "the heads of a row must be contiguous"
    width = num_kv_heads * head_dim
    layers = layers_of_program(source.shape[0], num_layers)
    launch(
        _store_rows,
        (source.shape[0], -(-num_layers // layers)),
        new_keys,
        new_values,
        keys,
        values,
        source,
        target,
        num_layers,
        new_keys.stride(0),
        new_keys.stride(1),
        keys.stride(0),
        keys.stride(1),
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
        LAYERS=layers,
        num_warps=4,
    )


def layers_of_program(num_rows: int, num_layers: int) -> int:
    """One layer while rows are few, so that a lone row spreads over the GPU; a power of two."""
    needed = -(-num_rows * num_layers // PROGRAMS)
    return min(MAX_LAYERS, 1 << (needed - 1).bit_length())


@triton.jit
def _store_rows(
    new_keys,
    new_values,
    keys,
    values,
    source,
    target,
    num_layers,
    new_layer_stride,
    new_row_stride,
    page_layer_stride,
    page_row_stride,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    LAYERS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    row = tl.load(source + tl.program_id(0)).to(tl.int64)
    place = tl.load(target + tl.program_id(0)).to(tl.int64)  # beside the look-up of the source, not after it
    if row < 0:
        return
    layer = (tl.program_id(1) * LAYERS + tl.arange(0, LAYERS)).to(tl.int64)[:, None]
    inside = tl.arange(0, WIDTH_PADDED)[None, :]
    is_real = (layer < num_layers) & (inside < WIDTH)
    old = layer * new_layer_stride + row * new_row_stride + inside
    new = layer * page_layer_stride + place * page_row_stride + inside
    # Both loads before the stores: two rows' worth of bytes in flight.
    key = tl.load(new_keys + old, mask=is_real)
    value = tl.load(new_values + old, mask=is_real)
    tl.store(keys + new, key, mask=is_real)
    tl.store(values + new, value, mask=is_real)
