"""What each token of a packed row sees, from (start, visible, group): as a dense mask for SDPA, or as block masks for FlexAttention.

The dense form is the plain one; the block form skips tiles that no document needs. transformers uses a ready 4-D mask as it is, which
also keeps it from inferring packed sequences out of permuted position ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

# R = packed rows, L = tokens in a row

FLEX_NAME = "refusion_flex"


def visibility(start: Tensor, visible: Tensor, group: Tensor) -> Tensor:
    """[R, L, L] bool: token i sees token j if start[i] <= j and (j < visible[i], or both are in one group: > 0 and j <= i, or < 0)."""
    key = torch.arange(start.shape[1], device=start.device)
    query = key.unsqueeze(-1)
    mine = group.unsqueeze(-1)
    in_group = (mine == group.unsqueeze(-2)) & ((mine < 0) | ((mine > 0) & (key <= query)))
    return (start.unsqueeze(-1) <= key) & ((key < visible.unsqueeze(-1)) | in_group)


def dense_mask(start: Tensor, visible: Tensor, group: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, L, L] additive mask in `dtype`, built once so that SDPA need not turn a boolean one into it in every layer."""
    seen = visibility(start, visible, group)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf")).unsqueeze(1)


def block_mask(start: Tensor, visible: Tensor, group: Tensor) -> BlockMask:
    """The same visibility as FlexAttention block masks."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mine = group[row, query]
        in_group = (mine == group[row, key]) & ((mine < 0) | ((mine > 0) & (key <= query)))
        return (start[row, query] <= key) & ((key < visible[row, query]) | in_group)

    rows, length = start.shape
    return create_block_mask(sees, rows, None, length, length, device=start.device.type)


def flex_attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """FlexAttention in the form transformers calls: query [R, heads, L, D] and fewer key heads in, [R, L, heads, D] out.

    Autocast does not reach FlexAttention: rotary embeddings leave query and key in float32, so they are brought to value's type here.
    """
    attend = flex_attention if torch.compiler.is_compiling() or query.device.type == "cpu" else _compiled_flex_attention()
    output = attend(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), type(output)
    return output.transpose(1, 2).contiguous(), None


_compiled: Any = None


def _compiled_flex_attention() -> Any:
    """Uncompiled FlexAttention would build the whole score matrix."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(flex_attention, dynamic=False)
    return _compiled


AttentionInterface.register(FLEX_NAME, flex_attention_forward)
