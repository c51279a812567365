"""An eager `transformers` model behind the same forward: the outside witness that our own transformer is right, and a speed yardstick.

Its K/V live in our cache between forwards; for each one they are handed over as a `DynamicCache` and the new rows are taken back.
"""

# transformers is typed only in part
# pyright: basic

import math

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from refusion.model.cache import KVCache
from refusion.model.config import ModelConfig
from refusion.model.segments import Segments


class TransformersNetwork:
    """A `LlamaForCausalLM` or `Qwen3ForCausalLM` as a `Network`."""

    def __init__(self, model: PreTrainedModel, config: ModelConfig) -> None:
        self.model, self.config = model.eval(), config

    def new_cache(self, num_requests: int, capacity: int) -> KVCache:
        return KVCache(self.config, num_requests, capacity, device=self.model.device, dtype=self.model.dtype)

    def forward(self, token_ids: Tensor, positions: Tensor, segments: Segments, cache: KVCache) -> Tensor:
        """Final hidden states [B, T, hidden]. The mask is given whole: `transformers` would otherwise infer packed sequences."""
        cache.reserve(token_ids.shape[1])
        among_new = segments.attn_mask()
        to_cache = cache.is_committed()[:, None, :].expand(-1, among_new.shape[1], -1)
        visible = torch.cat((to_cache, among_new), dim=-1)[:, None]
        bias = torch.zeros(visible.shape, device=visible.device, dtype=self.model.dtype).masked_fill_(~visible, -math.inf)
        past = DynamicCache()
        for layer in range(self.config.num_hidden_layers):
            past.update(cache.keys[layer, :, :, : cache.longest], cache.values[layer, :, :, : cache.longest], layer)
        hidden = self.model.get_decoder()(
            input_ids=token_ids, position_ids=positions, attention_mask=bias, past_key_values=past, use_cache=True
        ).last_hidden_state
        for index, layer in enumerate(past.layers):
            assert isinstance(layer, DynamicLayer), f"layer {index} attends fully, yet its cache is a {type(layer).__name__}"
            assert layer.keys is not None, "the layer has just run"
            assert layer.values is not None, "the layer has just run"
            cache.write(index, layer.keys[:, :, cache.longest :], layer.values[:, :, cache.longest :])
        return hidden

    def lm_head(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal model has a head"
        return head(hidden)
