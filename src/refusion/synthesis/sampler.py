"""A large-batch autoregressive sampler: thousands of sequences at once, for writing training text.

It is the opposite of the engine: throughput over a fixed list of prompts, nothing else (no requests, no slots, no streaming). Rows are
left padded so that every step appends one column to a preallocated cache; finished rows are compacted away. The noise of a row is keyed
by (seed, row, step), so the batch a row sits in does not choose its text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from refusion.errors import CheckpointError, ConfigError

# B = sequences, T = cached columns, H = query heads, N = key/value heads, G = H / N, D = head size, V = vocabulary

COLUMN_STEP = 64
"""The visible cache length is a multiple of this, so that the attention kernel sees few shapes."""
CHECK_EVERY = 16
"""Steps between two looks at the finished flags: each is a host synchronisation."""
COMPACT_ABOVE = 0.25
"""Share of finished rows above which the rest is copied together."""
PREFILL_TOKENS = 1 << 17
"""Prompt tokens per prefill forward; bounds the activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 0.95
    """Mass of the nucleus, (0, 1]."""
    top_k: int = 64
    """Number of most probable tokens the nucleus is taken from, >= 1."""
    max_length: int = 512
    """Prompt and new tokens together, >= 2."""
    max_new_tokens: int | None = None
    """Further bound on the new tokens; None leaves `max_length` alone."""
    seed: int = 0
    """Keys the noise together with row and step."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be >= 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be >= 1")
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; it must be >= 2")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be >= 1")


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer, query/key/value and gate/up fused."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(slots=True)
class Cache:
    """Keys and values per layer [B, N, columns, D]; column c of every row is written at the same time."""

    keys: list[Tensor]
    values: list[Tensor]


class Sampler:
    """The weights of one Llama- or Qwen3-type checkpoint and the loop that samples from them."""

    def __init__(self, path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise ConfigError(f"device is {device!r}; it must be cpu or cuda") from None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("no CUDA device is available to this torch; use the device cpu")
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        config = json.loads((Path(path) / "config.json").read_text())
        if config.get("model_type") not in ("llama", "qwen3"):
            raise CheckpointError(f"{path} is of type {config.get('model_type')}; the sampler knows llama and qwen3")
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        if scaling.get("rope_type", "default") != "default":
            raise CheckpointError(f"{path} uses rope scaling {scaling['rope_type']}, which the sampler does not know")
        self.num_drawn = 0
        """Tokens written so far, for speed reports."""
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config.get("num_key_value_heads") or self.num_heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.eps = config["rms_norm_eps"]
        self.max_positions = config["max_position_embeddings"]
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        inverse = theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=self.device) / self.head_dim)
        self.inverse_frequencies = inverse  # [D / 2]
        self._load(Path(path), tied=config.get("tie_word_embeddings", False))

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        eos_token_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        batch_size: int = 4096,
        row_ids: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """New tokens of every prompt, the EOS included where one was drawn; without it the row ran out of length.

        `row_ids` key the noise (default: the place in `prompts`); `banned_ids` are never drawn. Prompts that leave
        no room for a token give an empty list.
        """
        max_length = min(sampling.max_length, self.max_positions)
        row_ids = range(len(prompts)) if row_ids is None else row_ids
        eos, banned = list(eos_token_ids), list(banned_ids)
        outputs: list[list[int]] = [[] for _ in prompts]
        order = sorted((i for i, p in enumerate(prompts) if 0 < len(p) < max_length), key=lambda i: (len(prompts[i]), i))
        start = 0
        while start < len(order):
            chosen = order[start : start + batch_size]
            while len(chosen) > self._fitting_rows(len(prompts[chosen[-1]]) - len(prompts[chosen[0]]) + max_length):
                chosen = chosen[: max(1, min(len(chosen) - 1, self._fitting_rows(max_length)))]
            start += len(chosen)
            rows = [row_ids[i] for i in chosen]
            with self._kernels():
                batch = self._sample_batch([list(prompts[i]) for i in chosen], rows, sampling, max_length, eos, banned)
            for i, tokens in zip(chosen, batch, strict=True):
                outputs[i] = tokens
            self.num_drawn += sum(map(len, batch))
        return outputs

    def _fitting_rows(self, num_columns: int) -> int:
        """How many rows of that many cached columns fit in the free GPU memory, at least 1."""
        if self.device.type != "cuda":
            return 1 << 30
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        columns = -(-num_columns // COLUMN_STEP) * COLUMN_STEP
        cache = 2 * self.num_layers * self.num_kv_heads * columns * self.head_dim * self.dtype.itemsize
        logits = 4 * 3 * self.head.shape[0]  # float32, and what top-k and the comparisons hold beside it
        reserve = 6 << 30  # prefill activations and the allocator's slack
        return max(1, int((free - reserve) * 0.95) // (cache + logits))

    def _sample_batch(
        self, prompts: list[list[int]], row_ids: list[int], sampling: Sampling, max_length: int, eos: list[int], banned: list[int]
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        room = max_length if sampling.max_new_tokens is None else sampling.max_new_tokens
        limits = [min(max_length + width - len(p), width + room) for p in prompts]  # columns a row may fill
        columns = -(-max(limits) // COLUMN_STEP) * COLUMN_STEP
        tokens = torch.zeros(len(prompts), columns, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) : width] = torch.tensor(prompt)
        tokens = tokens.to(self.device)
        ends = torch.tensor(limits, device=self.device)  # [all rows] columns of the row's text
        eos_ids = torch.tensor(eos, device=self.device)
        banned_ids = torch.tensor(banned, dtype=torch.long, device=self.device)
        cache = self._empty_cache(len(prompts), columns)

        # The live rows; compaction cuts all of these together.
        active = torch.arange(len(prompts), device=self.device)  # [B] index into the batch as it started
        rows = torch.tensor(row_ids, device=self.device)
        padding = torch.tensor([width - len(p) for p in prompts], device=self.device)
        is_finished = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        bias = torch.full((len(prompts), columns), float("-inf"), dtype=self.dtype, device=self.device)  # each step opens its column
        bias[:, :width] = bias[:, :width].masked_fill(torch.arange(width, device=self.device) >= padding[:, None], 0.0)

        hidden = self._prefill(tokens[:, :width], padding, cache)
        for column in range(width, max(limits)):
            drawn = draw(self._logits(hidden, banned_ids), sampling, rows, column - padding)  # [B]
            tokens[active, column] = drawn
            ends[active] = torch.where(torch.isin(drawn, eos_ids) & ~is_finished, ends[active].clamp_max(column + 1), ends[active])
            is_finished |= ends[active] <= column + 1
            if column + 1 == max(limits):
                break
            if (column + 1 - width) % CHECK_EVERY == 0:
                num_finished = int(is_finished.sum())  # host sync: compaction saves whole rows of work
                if num_finished == len(active):
                    break
                if num_finished > COMPACT_ABOVE * len(active):
                    keep = (~is_finished).nonzero().squeeze(-1)
                    active, rows, padding, is_finished, bias, drawn = (x[keep] for x in (active, rows, padding, is_finished, bias, drawn))
                    compact(cache, keep, column)
            bias[:, column] = 0
            hidden = self._decode(drawn, column - padding, column, cache, bias)
        texts, lengths = tokens[:, width:].tolist(), (ends - width).tolist()
        return [text[:length] for text, length in zip(texts, lengths, strict=True)]

    def _prefill(self, tokens: Tensor, padding: Tensor, cache: Cache) -> Tensor:
        """Forwards the left-padded prompts [B, P], fills the first P columns, returns the last hidden states [B, hidden]."""
        width = tokens.shape[1]
        rows = max(1, PREFILL_TOKENS // width)
        columns = torch.arange(width, device=self.device)
        causal = columns[None, :] <= columns[:, None]  # [P, P]
        last = []
        for start in range(0, tokens.shape[0], rows):
            part = slice(start, start + rows)
            pad = padding[part]
            is_real = columns[None, :] >= pad[:, None]  # [b, P]
            # A padded query must see something or its softmax is NaN, and 0 * NaN would reach the real rows through the values.
            visible = (causal[None] & is_real[:, None, :]) | torch.eye(width, dtype=torch.bool, device=self.device)
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, float("-inf"))[:, None]
            positions = (columns[None, :] - pad[:, None]).clamp_min(0)  # [b, P]
            cos, sin = self._rotary(positions[:, None])  # [b, 1, P, D]
            x = F.embedding(tokens[part], self.embedding)
            for index, layer in enumerate(self.layers):
                q, k, v = self._project(layer, x, cos, sin)
                cache.keys[index][part, :, :width] = k
                cache.values[index][part, :, :width] = v
                group = self.num_heads // self.num_kv_heads
                k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._expand(mask, q, k))
                x = self._finish(layer, x, out.transpose(1, 2).flatten(2))
            last.append(x[:, -1])
        return torch.cat(last)

    def _decode(self, tokens: Tensor, positions: Tensor, column: int, cache: Cache, bias: Tensor) -> Tensor:
        """Appends one token per row [B] at `column`; returns hidden states [B, hidden]."""
        length = min(-(-(column + 1) // COLUMN_STEP) * COLUMN_STEP, bias.shape[1])
        cos, sin = self._rotary(positions[:, None, None])  # [B, 1, 1, D]
        mask = bias[:, None, None, :length]
        x = F.embedding(tokens, self.embedding)[:, None]  # [B, 1, hidden]
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cos, sin)
            keys, values = cache.keys[index], cache.values[index]
            keys[:, :, column] = k[:, :, 0]
            values[:, :, column] = v[:, :, 0]
            grouped = q.view(q.shape[0], self.num_kv_heads, -1, self.head_dim)  # [B, N, G, D]: the group reads its keys once
            keys, values = keys[:, :, :length], values[:, :, :length]
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._expand(mask, grouped, keys))
            x = self._finish(layer, x, out.reshape(x.shape[0], 1, -1))
        return x[:, 0]

    def _project(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, D], keys and values [B, N, T, D] of the normed input [B, T, hidden]."""
        qkv = F.linear(rms_norm(x, layer.input_norm, self.eps), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(x.shape[0], x.shape[1], self.num_heads + 2 * self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, self.eps), rms_norm(k, layer.k_norm, self.eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + F.linear(attended, layer.o_proj)
        gate, up = F.linear(rms_norm(x, layer.post_norm, self.eps), layer.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def _logits(self, hidden: Tensor, banned_ids: Tensor) -> Tensor:
        """Float32 logits [B, V] of the last hidden states; bf16 output would tie neighbours and make greedy text a coin toss."""
        normed = rms_norm(hidden, self.norm, self.eps)
        if self.device.type == "cuda" and self.dtype != torch.float32:
            logits = torch.mm(normed, self.head.t(), out_dtype=torch.float32)
        else:
            logits = F.linear(normed, self.head).float()
        return logits.index_fill_(1, banned_ids, float("-inf"))

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.inverse_frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _empty_cache(self, batch: int, columns: int) -> Cache:
        shape = (batch, self.num_kv_heads, columns, self.head_dim)
        # Zeros, not empty: a masked column still meets the values as 0 * value, and garbage may be NaN.
        tensors = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2 * self.num_layers)]
        return Cache(tensors[: self.num_layers], tensors[self.num_layers :])

    def _expand(self, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

    def _kernels(self):
        """On CUDA the memory-efficient kernel (masks, any stride, no per-shape planning); the others stay as a fallback."""
        if self.device.type != "cuda":
            return nullcontext()
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])

    def _load(self, path: Path, *, tied: bool) -> None:
        weights = read_weights(path, self.device, self.dtype)

        def take(name: str) -> Tensor:
            if name not in weights:
                raise CheckpointError(f"{path} has no tensor {name}; is it a complete checkpoint?")
            return weights[name]

        self.embedding = take("model.embed_tokens.weight")  # [V, hidden]
        self.head = self.embedding if tied or "lm_head.weight" not in weights else weights["lm_head.weight"]
        self.norm = take("model.norm.weight")
        self.layers = []
        for index in range(self.num_layers):
            prefix = f"model.layers.{index}."
            attention, mlp = prefix + "self_attn.", prefix + "mlp."
            biases = [weights.get(attention + f"{n}_proj.bias") for n in "qkv"]
            self.layers.append(
                Layer(
                    input_norm=take(prefix + "input_layernorm.weight"),
                    qkv=torch.cat([take(attention + f"{n}_proj.weight") for n in "qkv"]),
                    qkv_bias=None if biases[0] is None else torch.cat([b for b in biases if b is not None]),
                    q_norm=weights.get(attention + "q_norm.weight"),
                    k_norm=weights.get(attention + "k_norm.weight"),
                    o_proj=take(attention + "o_proj.weight"),
                    post_norm=take(prefix + "post_attention_layernorm.weight"),
                    gate_up=torch.cat([take(mlp + "gate_proj.weight"), take(mlp + "up_proj.weight")]),
                    down=take(mlp + "down_proj.weight"),
                )
            )


def draw(logits: Tensor, sampling: Sampling, rows: Tensor, steps: Tensor) -> Tensor:
    """One token per row [B] from the float32 logits [B, V]: the argmax, or a draw from top-p of top-k at the temperature."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    top, ids = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)  # [B, k], descending
    probs = torch.softmax(top / sampling.temperature, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    probs = probs * (before < sampling.top_p)  # the token that crosses the mass stays; the first always does
    total = probs.cumsum(dim=-1)
    threshold = uniform(sampling.seed, rows, steps)[:, None] * total[:, -1:]
    index = (total <= threshold).sum(dim=-1, keepdim=True).clamp_max(int(ids.shape[-1]) - 1)
    return ids.gather(-1, index).squeeze(-1)


def uniform(seed: int, rows: Tensor, steps: Tensor) -> Tensor:
    """Float32 noise in [0, 1) keyed by (seed, row, step): splitmix64 of the three, on any device the same."""
    state = mix(torch.full_like(rows, seed))
    state = mix(state ^ rows)
    state = mix(state ^ steps)
    return ((state >> 40) & 0xFFFFFF).float() / float(1 << 24)


def mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (wrapping products; shifts made logical by a mask)."""
    x = x + signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def compact(cache: Cache, keep: Tensor, length: int) -> None:
    """Moves the kept rows to the front, layer by layer, and forgets the rest."""
    for tensors in (cache.keys, cache.values):
        for index, tensor in enumerate(tensors):
            tensor[: len(keep), :, :length] = tensor[:, :, :length].index_select(0, keep)
            tensors[index] = tensor[: len(keep)]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def read_weights(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards its index names."""
    index = path / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (path / name).exists():
            raise CheckpointError(f"{path / name} is missing")
        with safe_open(path / name, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is not a dict
                weights[key] = file.get_tensor(key).to(device=device, dtype=dtype)
    return weights
