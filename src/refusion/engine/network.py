"""The transformer over flat rows: the same weights as `refusion.model.Transformer`, run through a set of operations that can be exchanged.

Plain torch operations are the reference; Triton kernels, prepacked CPU products and quantised weights are other sets of the same
functions. Nothing here depends on data: shapes are those of the given rows, so a forward can be captured in a CUDA graph.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from refusion.decoding.forward import Readout
from refusion.decoding.params import MAX_SLOT_SIZE
from refusion.model.config import ModelConfig
from refusion.model.rows import Rows, Spans, Tiles
from refusion.model.transformer import Attention, DecoderLayer, Transformer

# T = rows of the forward, L = layers, R = rows of the page pool, H = key/value heads, G = query heads per key/value head
# D = head dimension, V = vocabulary

Weight = Any  # a Tensor [N, K], or what `Ops.prepare` made of one


class Ops(Protocol):
    """Operations of the network; `refusion.model.ops` and `refusion.model.attention_ops` say what each computes."""

    def prepare(self, weight: Tensor) -> Weight: ...

    def norm_linear(self, x: Any, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor: ...

    def norm_gated(self, x: Any, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor: ...

    def linear_add(self, x: Tensor, weight: Weight, residual: Any, bias: Tensor | None = None) -> Any:
        """The result may take the place of `residual`, and may be owed: only operations of the same set and `paid` can read it."""
        ...

    def paid(self, hidden: Any) -> Tensor:
        """[T, N] what `linear_add` returned, as a tensor."""
        ...

    def rotate_and_store(
        self,
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
    ) -> Tensor: ...

    def plan_attention(self, rows: Rows, spans: Spans, tiles: Tiles) -> Any:
        """What all layers of one forward share: a mask, a workspace."""
        ...

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
    ) -> Tensor: ...

    def readout(
        self, x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias_banned: Tensor, given_ids: Tensor, num_runner_ups: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    def store_rows(self, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None: ...


@runtime_checkable
class JoinedOps(Ops, Protocol):
    """Operations that can rotate and attend in one."""

    def joins_rotation(self, num_rows: int, tile_rows: int) -> bool:
        """Whether that is better in a forward of so many rows, in query tiles of `tile_rows`."""
        ...

    def rotate_and_attend(
        self,
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
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        spans: Spans,
        tiles: Tiles,
        plan: Any,
    ) -> Tensor:
        """`attend` of what `rotate_and_store` returns; the result may take the place of the queries."""
        ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer, its matrices as the operations want them."""

    input_norm: Tensor
    qkv: Weight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Weight
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Weight
    down: Weight


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Keys and values of all layers: the page pool [L, R, H, D], or the rows of one forward [L, T, H, D]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, config: ModelConfig, num_rows: int, device: torch.device, dtype: torch.dtype) -> "KeyValues":
        """Zeros, so that rows nobody has written yet are finite."""
        shape = (config.num_hidden_layers, num_rows, config.num_key_value_heads, config.head_dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def first(self, num_rows: int) -> "KeyValues":
        """Views of the first rows."""
        return KeyValues(self.keys[:, :num_rows], self.values[:, :num_rows])


class FlatNetwork:
    """Embedding, layers and head over flat rows."""

    def __init__(self, model: Transformer, ops: Ops) -> None:
        """The network shares the weights of `model`, but for those that `ops.prepare` replaces."""
        self.config, self.ops = model.config, ops
        self._joined_ops = ops if isinstance(ops, JoinedOps) else None
        self.device, self.dtype = model.device, model.dtype
        self.embedding = model.embed_tokens.weight
        self.layers = [_layer_weights(layer, ops.prepare) for layer in model.layers if isinstance(layer, DecoderLayer)]
        self.final_norm = model.norm.weight
        self.head = ops.prepare(model.lm_head.weight)
        # The last slot of an answer may reach past the last token that is wanted, and so past the context.
        positions = torch.arange(model.config.max_position_embeddings + MAX_SLOT_SIZE, device=self.device)
        angles = positions.float()[:, None] * model.inv_freq
        self.cos, self.sin = angles.cos(), angles.sin()  # [positions, D / 2] float32

    def shallow(self) -> "FlatNetwork":
        """Only the first layer, which does what every layer does; weights are shared."""
        network = copy.copy(self)
        network.layers = self.layers[:1]
        return network

    @torch.no_grad()
    def forward(self, rows: Rows, spans: Spans, tiles: Tiles, pool: KeyValues, new: KeyValues) -> Tensor:
        """Hidden states [T, hidden] before the final norm; the K/V of the rows are left in `new`."""
        config, ops = self.config, self.ops
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        eps = config.rms_norm_eps
        plan = ops.plan_attention(rows, spans, tiles)
        joined = self._joined_ops if self._joined_ops and self._joined_ops.joins_rotation(rows.num_rows, tiles.block) else None
        hidden = torch.nn.functional.embedding(rows.token_ids, self.embedding)
        for index, layer in enumerate(self.layers):
            qkv = ops.norm_linear(hidden, layer.input_norm, eps, layer.qkv, layer.qkv_bias)
            turned = rows.positions, self.cos, self.sin, layer.q_norm, layer.k_norm, eps, *heads, new.keys[index], new.values[index]
            pages = pool.keys[index], pool.values[index]
            if joined is not None:
                mixed = joined.rotate_and_attend(qkv, *turned, *pages, rows, spans, tiles, plan)
            else:
                query = ops.rotate_and_store(qkv, *turned)
                mixed = ops.attend(query, new.keys[index], new.values[index], *pages, rows, spans, tiles, plan)
            hidden = ops.linear_add(mixed, layer.output, hidden, layer.output_bias)
            gated = ops.norm_gated(hidden, layer.post_norm, eps, layer.gate_up)
            hidden = ops.linear_add(gated, layer.down, hidden)
        return ops.paid(hidden)

    @torch.no_grad()
    def readout(self, hidden: Tensor, bias_banned: Tensor, given_ids: Tensor, num_runner_ups: int = 0) -> Readout:
        """Greedy readout [T] of hidden states [T, hidden]; bias_banned [V] float32 is 0 or -inf."""
        eps = self.config.rms_norm_eps
        return Readout(*self.ops.readout(hidden, self.final_norm, eps, self.head, bias_banned, given_ids, num_runner_ups))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] float32 logits of hidden states [T, hidden], for drawing."""
        return self.ops.norm_linear(hidden, self.final_norm, self.config.rms_norm_eps, self.head).float()


def _layer_weights(layer: DecoderLayer, prepare: Callable[[Tensor], Weight]) -> LayerWeights:
    attention: Attention = layer.self_attn
    has_qk_norm = attention.config.has_qk_norm
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        qkv=prepare(attention.qkv_proj.weight),
        qkv_bias=attention.qkv_proj.bias,
        q_norm=attention.q_norm.weight if has_qk_norm else None,
        k_norm=attention.k_norm.weight if has_qk_norm else None,
        output=prepare(attention.o_proj.weight),
        output_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=prepare(layer.mlp.gate_up_proj.weight),
        down=prepare(layer.mlp.down_proj.weight),
    )
