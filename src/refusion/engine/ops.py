"""Sets of operations for `FlatNetwork`: plain torch (the reference), and Triton kernels."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from refusion.engine.shapes import TILE_ROWS
from refusion.model import attention_ops, ops
from refusion.model.config import ModelConfig
from refusion.model.quantize import Kind, quantize
from refusion.model.rows import Rows, Spans, Tiles

LARGEST_TILE = 32  # rows of a query tile
JOINED_ROWS = 512
"""Up to so many rows attention turns queries and keys of narrow heads itself. Above, too many tiles turn the same keys."""
JOINED_TILE = 16
"""The same of the rows of a query tile: a program that turns many has too few registers left, as one that turns wide heads has."""


class PlainOps:
    """Operation by operation in torch, on any device."""

    norm_linear = staticmethod(ops.norm_linear)
    norm_gated = staticmethod(ops.norm_gated)
    linear_add = staticmethod(ops.linear_add)
    readout = staticmethod(ops.readout)
    rotate_and_store = staticmethod(attention_ops.rotate_and_store)
    store_rows = staticmethod(attention_ops.store_rows)

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.num_groups, self.dtype = config.num_attention_heads // config.num_key_value_heads, dtype

    def prepare(self, weight: Tensor) -> Tensor:
        return weight

    def paid(self, hidden: Tensor) -> Tensor:
        return hidden

    def plan_attention(self, rows: Rows, spans: Spans, tiles: Tiles) -> Any:
        return attention_ops.prepare(rows, spans, self.num_groups, self.dtype)

    def attend(
        self,
        query: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        spans: Spans,
        tiles: Tiles,
        plan: Any,
    ) -> Tensor:
        return attention_ops.attend(query, new_keys, new_values, keys, values, rows, spans, plan=plan)


class TritonOps:
    """Kernels of `refusion.model.kernels`; with `quantization` the matrices are held in 8 bits and the activations are not."""

    def __init__(
        self, config: ModelConfig, device: torch.device, quantization: Kind | None = None, *, invariant_tiles: int | None = None
    ) -> None:
        """invariant_tiles: with it no row depends on how many others there are, in forwards of at most so many tiles of TILE_ROWS rows."""
        # Imported here: a machine without Triton runs everything else.
        from refusion.model.kernels import attention, linear, owed, readout, rotary, store
        from refusion.model.kernels.attention_config import NARROW_HEAD, invariant_config, padded_rows

        self.quantization: Kind | None = quantization
        self.is_batch_invariant = invariant_tiles is not None
        cut = linear.INVARIANT if self.is_batch_invariant else linear.AUTO
        self.norm_linear, self.norm_gated = partial(linear.norm_linear, config=cut), partial(linear.norm_gated, config=cut)
        self.linear_add, self.paid = partial(linear.linear_add_owed, config=cut), owed.paid
        self.readout, self.rotate_and_store = partial(readout.readout, config=cut), rotary.rotate_and_store
        self.store_rows, self.rotate_and_attend = store.store_rows, attention.rotate_and_attend
        self.joined_rows = JOINED_ROWS if config.head_dim <= NARROW_HEAD and not self.is_batch_invariant else 0
        self.joined_tile = JOINED_TILE
        num_groups = config.num_attention_heads // config.num_key_value_heads
        if invariant_tiles is None:
            self._attend = attention.attend
            self.workspace = attention.Workspace.for_device(LARGEST_TILE, num_groups, config.head_dim, device)
        else:
            tile_rows = padded_rows(TILE_ROWS, num_groups)
            alike = invariant_config()
            self._attend = partial(attention.attend, config=alike)
            num_parts = invariant_tiles * config.num_key_value_heads * alike.splits
            self.workspace = attention.Workspace(num_parts, tile_rows, config.head_dim, device)

    def prepare(self, weight: Tensor) -> Any:
        return weight if self.quantization is None else quantize(weight, self.quantization)

    def joins_rotation(self, num_rows: int, tile_rows: int) -> bool:
        return num_rows <= self.joined_rows and tile_rows <= self.joined_tile

    def plan_attention(self, rows: Rows, spans: Spans, tiles: Tiles) -> Any:
        return self.workspace

    def attend(
        self,
        query: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        spans: Spans,
        tiles: Tiles,
        plan: Any,
    ) -> Tensor:
        return self._attend(query, new_keys, new_values, keys, values, rows, spans, tiles, plan, in_place=True)
