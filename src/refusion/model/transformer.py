"""The inference transformer: Qwen3 and Llama by configuration, attention over segments, K/V in commit order.

Small on purpose: one forward over new tokens and a cache. Which token wins is decided elsewhere (`refusion.decoding`). It is tested
logit by logit against `transformers`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refusion.model.cache import KVCache
from refusion.model.config import ModelConfig
from refusion.model.segments import Segments
from refusion.model.weights import load_weights

# B = requests, T = new tokens, C = cache columns, V = vocabulary
# H = key/value heads, G = query heads per key/value head, D = head dimension


@dataclass(frozen=True, slots=True)
class Attending:
    """What every layer of one forward shares: rotations and who sees whom."""

    cos: Tensor  # [B, 1, T, D]
    sin: Tensor  # [B, 1, T, D]
    bias: Tensor  # [B, 1, G * T, C + T], 0 where visible and -inf elsewhere


class Attention(nn.Module):
    """Grouped-query attention; the query heads of a group are rows of one product, so K/V are read once and never repeated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.num_attention_heads * config.head_dim, *[config.num_key_value_heads * config.head_dim] * 2)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(widths), bias=config.attention_bias)
        self.o_proj = nn.Linear(widths[0], config.hidden_size, bias=config.attention_bias)
        self.widths = widths
        if config.has_qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, attending: Attending, cache: KVCache, layer: int) -> Tensor:
        num_requests, num_tokens, _ = hidden.shape
        config = self.config
        query, key, value = self.qkv_proj(hidden).split(self.widths, dim=-1)
        query = query.view(num_requests, num_tokens, -1, config.head_dim).transpose(1, 2)  # [B, H * G, T, D]
        key = key.view(num_requests, num_tokens, -1, config.head_dim).transpose(1, 2)  # [B, H, T, D]
        value = value.view(num_requests, num_tokens, -1, config.head_dim).transpose(1, 2)  # [B, H, T, D]
        if config.has_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = _rotate(query, attending), _rotate(key, attending)
        keys, values = cache.write(layer, key, value)
        folded = query.reshape(num_requests, config.num_key_value_heads, -1, config.head_dim)  # [B, H, G * T, D]
        mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=attending.bias)
        mixed = mixed.reshape(num_requests, -1, num_tokens, config.head_dim).transpose(1, 2).flatten(2)  # [B, T, H * G * D]
        return self.o_proj(mixed)


class MLP(nn.Module):
    """Gated feed-forward with SiLU, gate and up projection in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, attending: Attending, cache: KVCache, layer: int) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), attending, cache, layer)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Transformer(nn.Module):
    """A Qwen3 or Llama model for inference."""

    inv_freq: Tensor  # [D / 2] float32

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("inv_freq", _inverse_frequencies(config), persistent=False)

    @classmethod
    def from_pretrained(cls, path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Transformer":
        """Load a hub-layout checkpoint (one safetensors file or shards). Raises `CheckpointError` if something is missing."""
        config = ModelConfig.from_pretrained(path)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, path, device=torch.device(device), dtype=dtype)
        model.inv_freq = _inverse_frequencies(config).to(device)  # float32 whatever the dtype of the weights
        return model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def new_cache(self, num_requests: int, capacity: int) -> KVCache:
        """An empty cache for requests of at most `capacity` tokens, new rows of a forward included."""
        return KVCache(self.config, num_requests, capacity, device=self.device, dtype=self.dtype)

    def forward(self, token_ids: Tensor, positions: Tensor, segments: Segments, cache: KVCache) -> Tensor:
        """Final hidden states [B, T, hidden] of new tokens [B, T] behind the cache, whose new rows the caller may `keep`."""
        cache.reserve(token_ids.shape[1])
        attending = self._attending(positions, segments, cache)
        hidden = self.embed_tokens(token_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, attending, cache, index)
        return self.norm(hidden)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Plain causal logits [B, T, V] in float32 of right-padded rows [B, T], position = column."""
        cache = self.new_cache(input_ids.shape[0], input_ids.shape[1])
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        is_token = torch.ones_like(input_ids, dtype=torch.bool)
        return self.lm_head(self(input_ids, positions, Segments.causal(is_token), cache)).float()

    def _attending(self, positions: Tensor, segments: Segments, cache: KVCache) -> Attending:
        angles = positions[:, None, :, None].float() * self.inv_freq  # [B, 1, T, D / 2]
        angles = torch.cat((angles, angles), dim=-1)
        among_new = segments.attn_mask()  # [B, T, T]
        to_cache = cache.is_committed()[:, None, :].expand(-1, among_new.shape[1], -1)  # [B, T, C]
        visible = torch.cat((to_cache, among_new), dim=-1)
        bias = torch.zeros(visible.shape, device=visible.device, dtype=self.dtype).masked_fill_(~visible, -math.inf)
        num_groups = self.config.num_attention_heads // self.config.num_key_value_heads
        bias = bias.repeat(1, num_groups, 1)[:, None]  # the same rows for every query head of a group
        return Attending(angles.cos().to(self.dtype), angles.sin().to(self.dtype), bias)


def _rotate(states: Tensor, attending: Attending) -> Tensor:
    """Rotary position embedding, halves paired as in Hugging Face checkpoints."""
    first, second = states.chunk(2, dim=-1)
    return states * attending.cos + torch.cat((-second, first), dim=-1) * attending.sin


def _inverse_frequencies(config: ModelConfig) -> Tensor:
    """[D / 2] rotation speeds, with Llama 3's scaling of the slow ones where the checkpoint asks for it."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # full turns over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)  # 0: slow, scaled by `factor`; 1: fast, kept
    return (1 - blend) * plain / scaling.factor + blend * plain
