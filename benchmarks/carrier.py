"""A trained small Llama inside the shape of an 8B model: forwards cost what they cost at 8B, and the texts are still real.

    python benchmarks/carrier.py --device cuda --data heldout.jsonl.gz          # build, compare with the small model, write the result
    python benchmarks/carrier.py --device cuda --exact                          # the same in float32: logits must be equal
    python benchmarks/carrier.py --device cuda --save runs/carrier              # a hub-layout checkpoint (16 GB)

`load_llm` builds the carrier straight into memory. How the embedding keeps the function (d small width, D large width, c = sqrt(D / d)):

- The hidden state h becomes c Q h with random orthonormal columns Q [D, d], so every entry of activations and weights is dense. The root
  mean square stays the same, gains are folded into the projections that follow, and RMSNorm commutes with Q.
- One axis, the *anchor*, is not rotated. It holds a constant; what it adds to the mean square is taken off eps. The head gives every added
  vocabulary row a huge negative weight there, so that its logit is far below all others.
- A rotary pair i of a head becomes pair r i of a head that is r times longer, which turns at the same speed; queries take the factor
  sqrt(r) that the larger divisor of the scores takes away. Values are rotated at random inside their longer head.
- Heads and feed-forward units are repeated until they fill the shape; what they write is shared out with random weights that sum to one.
- Layers that are left over are random and write nothing.

No tensor is sparse: where an exact zero would do (unused rotary pairs of keys, what idle layers write, the anchor's row and column), there
stand random numbers around 1e-30, too small to change any sum in float32 or bfloat16 and as dense in their bits as any other.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import torch
from safetensors.torch import save_file
from torch import Tensor

from refusion import LLM, SamplingParams, hub
from refusion.atomic import atomic_directory
from refusion.checkpoint import INDEX, read_json, read_state_dict, side_files, write_json
from refusion.engine.build import quantized_network
from refusion.errors import CheckpointError, ConfigError
from refusion.evaluation.results import Figure, Run, to_plain
from refusion.evaluation.statistics import pooled_ratio
from refusion.llm import EngineSettings, RequestOutput
from refusion.model.config import ModelConfig
from refusion.model.quantize import Kind
from refusion.model.transformer import Transformer
from refusion.model.transformer import _inverse_frequencies as inverse_frequencies
from refusion.model.weights import FUSED
from refusion.tokenizer import Tokenizer

if TYPE_CHECKING:
    import argparse

    from transformers import PreTrainedModel

# d, D = small and large width, V = vocabulary rows, I = feed-forward units, P = rows of a head, N = rows or columns of any projection

TINY = 1e-30
"""Size of entries that stand where a zero would do."""
BANNED_WEIGHT = -(2.0**27)
"""Head weight of added vocabulary rows on the anchor, which after the norm is about 0.1 / rms: logits of -1e3 and far below."""
CACHE_TOKENS = 65536
"""What the engines of the two models hold that are compared in one process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the carrier looks like from outside; by default Qwen3-8B."""

    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`8b`, or fields that differ from it: `hidden_size=1024,num_hidden_layers=12`. Raises ConfigError."""
        known = [field.name for field in fields(cls)]
        given: dict[str, int] = {}
        for item in [] if text == "8b" else text.split(","):
            name, _, value = item.partition("=")
            if name not in known or not value.isdigit():
                raise ConfigError(f"{item!r} is no part of a shape; write 8b or NAME=NUMBER with a name of {', '.join(known)}")
            given[name] = int(value)
        return cls(**given)


EIGHT_BILLION = Shape()


# ---- using a carrier ----


def add_flag(parser: argparse.ArgumentParser) -> None:
    """`--carrier [SHAPE]` for scripts that may run the model inside a larger one."""
    parser.add_argument(
        "--carrier", nargs="?", const="8b", default=None, metavar="SHAPE", help="run the model inside this shape: 8b or NAME=N,..."
    )


def load(args: argparse.Namespace, engine: EngineSettings | None = None) -> LLM:
    """The model of the flags, inside its carrier if one is asked for."""
    if args.carrier is None:
        return LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype, engine=engine)
    return load_llm(args.model, Shape.parse(args.carrier), device=args.device, dtype=args.dtype, engine=engine)


def load_llm(
    name_or_path: str | Path,
    shape: Shape = EIGHT_BILLION,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    engine: EngineSettings | None = None,
    quantization: Kind | None = None,
) -> LLM:
    """A named model or directory inside `shape`, ready to answer; nothing touches the disk. dtype: bfloat16 unless said otherwise.

    With quantization (on a GPU) the exact model lies in host memory and only its 8-bit matrices on the device.
    """
    path, target = hub.resolve(str(name_or_path)), torch.device(device)
    exact_dtype = getattr(torch, dtype or "bfloat16")
    tokenizer = Tokenizer.from_pretrained(path) if (path / "tokenizer.json").exists() else None
    if quantization is None:
        return LLM(path, build(path, shape, device=target, dtype=exact_dtype), tokenizer, engine)
    model = build(path, shape, device=target, dtype=exact_dtype, keep_on=torch.device("cpu"))
    return LLM(path, model, tokenizer, engine, quantized_network(model, target, quantization, engine))


def build(
    path: Path, shape: Shape, *, device: torch.device, dtype: torch.dtype, seed: int = 0, keep_on: torch.device | None = None
) -> Transformer:
    """The checkpoint in `path` inside `shape`, computed on `device` a layer at a time and kept there or on `keep_on`.

    Raises CheckpointError if it does not fit.
    """
    carrier = Carrier(path, shape, device=device, dtype=dtype, seed=seed)
    with torch.device("meta"):
        model = Transformer(carrier.config)
    for part in carrier.parts():
        kept = {name: tensor.to(keep_on or device) for name, tensor in fused(part).items()}
        model.load_state_dict(kept, strict=False, assign=True)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"the carrier made no {left}"
    model.inv_freq = inverse_frequencies(carrier.config).to(keep_on or device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the making took is for the KV cache
    return model.eval().requires_grad_(False)


def save(path: Path, shape: Shape, target: Path, *, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Write the carrier as a hub-layout checkpoint, a shard a layer, tokenizer and settings included."""
    carrier = Carrier(path, shape, device=device, dtype=dtype, seed=seed)
    num_shards = shape.num_hidden_layers + 1
    weight_map: dict[str, str] = {}
    num_bytes = 0
    with atomic_directory(target) as directory:
        for index, part in enumerate(carrier.parts(), 1):
            shard = f"model-{index:05d}-of-{num_shards:05d}.safetensors"
            save_file({name: tensor.cpu() for name, tensor in part.items()}, directory / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
            num_bytes += sum(tensor.nbytes for tensor in part.values())
        write_json(directory / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
        write_json(directory / "config.json", carrier.hub_config())
        for file in side_files(path):
            shutil.copyfile(file, directory / file.name)


def fused(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of our transformer from those of a checkpoint."""
    found = {name.removeprefix("model."): tensor for name, tensor in part.items()}
    for whole, pieces in FUSED.items():
        for name in [name for name in found if f".{pieces[0]}." in name]:
            found[name.replace(pieces[0], whole)] = torch.cat([found.pop(name.replace(pieces[0], piece)) for piece in pieces])
    return found


def to_transformers(model: Transformer, attention: str = "sdpa") -> PreTrainedModel:
    """The same model as an eager `LlamaForCausalLM` or `Qwen3ForCausalLM` on the same memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = model.config
    names = [*(field.name for field in fields(Shape)), "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "attention_bias"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3"} | asdict(config.rope_scaling)
    shape = {name: getattr(config, name) for name in names}
    theirs = AutoConfig.for_model(config.model_type, **shape, rope_parameters=rope)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(theirs, attn_implementation=attention, dtype=model.dtype)
    made.load_state_dict(dict(unfused(model)), assign=True)
    rotary = made.get_decoder().rotary_emb
    made.get_decoder().rotary_emb = type(rotary)(config=theirs).to(model.device)  # buffers are not part of the state
    made.tie_weights()
    return made.eval().requires_grad_(False)


def unfused(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name in a checkpoint, as a view."""
    config = model.config
    heads, rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {"qkv_proj": (heads, rows, rows), "gate_up_proj": (config.intermediate_size,) * 2}
    for name, tensor in model.state_dict().items():
        whole = next((whole for whole in FUSED if f".{whole}." in name), None)
        prefix = "" if name.startswith("lm_head") else "model."
        if whole is None:
            yield prefix + name, tensor
            continue
        for piece, view in zip(FUSED[whole], tensor.split(sizes[whole]), strict=True):
            yield prefix + name.replace(whole, piece), view


# ---- the embedding ----


class Carrier:
    """Makes the weights of one carrier, layer by layer, in float64 on `device`; the draws depend on the seed and the kind of device."""

    def __init__(self, path: Path, shape: Shape, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.path, self.shape, self.device, self.dtype = path, shape, device, dtype
        self.small = ModelConfig.from_pretrained(path)
        refuse_misfits(self.small, shape, path)
        self.anchor = anchor_value(self.small.rms_norm_eps, shape.hidden_size)
        eps = self.small.rms_norm_eps - self.anchor**2 / shape.hidden_size
        self.config = replace(self.small, **asdict(shape), rms_norm_eps=eps, tie_word_embeddings=False)
        self.weights = read_state_dict(path)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.scale = math.sqrt(shape.hidden_size / self.small.hidden_size)
        basis = self._orthonormal(shape.hidden_size - 1, self.small.hidden_size)
        self.basis = torch.cat((basis, torch.zeros_like(basis[:1])))  # [D, d] Q; the last axis is the anchor

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """Weights under their checkpoint names: vocabulary and last norm, then layer after layer."""
        yield self._finished(self._vocabulary())
        # Real layers spread evenly: small layer i stands at floor(i * large / small).
        places = {i * self.shape.num_hidden_layers // self.small.num_hidden_layers: i for i in range(self.small.num_hidden_layers)}
        for layer in range(self.shape.num_hidden_layers):
            made = self._layer(places[layer]) if layer in places else self._idle_layer()
            yield self._finished({f"model.layers.{layer}.{name}": tensor for name, tensor in made.items()})

    def hub_config(self) -> dict[str, Any]:
        """`config.json`: that of the small model in the new shape."""
        shape = asdict(self.shape) | {"rms_norm_eps": self.config.rms_norm_eps, "tie_word_embeddings": False}
        return read_json(self.path / "config.json") | shape | {"torch_dtype": str(self.dtype).removeprefix("torch.")}

    def _vocabulary(self) -> dict[str, Tensor]:
        rows = self._small("model.embed_tokens.weight")  # [V, d]
        head = rows if self.small.tie_word_embeddings else self._small("lm_head.weight")
        embedded = self._with_added_rows(self._writes(rows.T).T)
        embedded[:, -1] = self.anchor
        read = self._with_added_rows(self._reads(head, self._small("model.norm.weight")))
        read[len(rows) :, -1] = BANNED_WEIGHT
        return {"model.embed_tokens.weight": embedded, "lm_head.weight": read, "model.norm.weight": self._ones()}

    def _layer(self, index: int) -> dict[str, Tensor]:
        def small(name: str) -> Tensor:
            return self._small(f"model.layers.{index}.{name}.weight")

        gain, mlp_gain = small("input_layernorm"), small("post_attention_layernorm")
        query, key, value, out = (small(f"self_attn.{name}_proj") for name in "qkvo")
        return {
            **self._attention(query, key, value, out, gain),
            **self._mlp(small("mlp.gate_proj"), small("mlp.up_proj"), small("mlp.down_proj"), mlp_gain),
            "input_layernorm.weight": self._ones(),
            "post_attention_layernorm.weight": self._ones(),
        }

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, gain: Tensor) -> dict[str, Tensor]:
        """Every small head, repeated until the heads are full; key/value head i is a copy of small head i mod H."""
        small, shape = self.small, self.shape
        ratio = shape.head_dim // small.head_dim
        kv_heads = torch.arange(shape.num_key_value_heads, device=self.device) % small.num_key_value_heads
        heads = self._query_heads()
        shares = self._shares(heads)
        turns = torch.stack([self._orthonormal(shape.head_dim, small.head_dim) for _ in kv_heads])  # [heads, P, P of the small one]

        def split(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (-1, small.head_dim))

        wide_query = self._reads(self._spread(split(query)) * math.sqrt(ratio), gain)[heads]  # [heads, P, D]
        wide_key = self._reads(self._spread(split(key)), gain)[kv_heads]
        is_unused = torch.arange(shape.head_dim, device=self.device) % (shape.head_dim // 2) % ratio != 0
        wide_query[:, is_unused] = self._random(len(heads), int(is_unused.sum()), shape.hidden_size, like=wide_query[:, ~is_unused])
        wide_key[:, is_unused] = self._tiny(len(kv_heads), int(is_unused.sum()), shape.hidden_size)
        wide_value = self._reads(turns @ split(value)[kv_heads], gain)
        group = shape.num_attention_heads // shape.num_key_value_heads
        columns = split(out.T)[heads].transpose(1, 2) @ turns.repeat_interleave(group, 0).transpose(1, 2)  # [heads, d, P]
        wide_out = self._writes((columns * shares[:, None, None]).transpose(0, 1).flatten(1))  # [D, heads * P]
        projections = {"q": wide_query.flatten(0, 1), "k": wide_key.flatten(0, 1), "v": wide_value.flatten(0, 1), "o": wide_out}
        return {f"self_attn.{name}_proj.weight": tensor for name, tensor in projections.items()}

    def _query_heads(self) -> Tensor:
        """Which small query head each large one is: those of its key/value head in turn, over all copies of that head."""
        small, shape = self.small, self.shape
        old, new = small.num_attention_heads // small.num_key_value_heads, shape.num_attention_heads // shape.num_key_value_heads
        head = torch.arange(shape.num_attention_heads, device=self.device)
        copy, owner = head // new // small.num_key_value_heads, head // new % small.num_key_value_heads
        return owner * old + (copy * new + head % new) % old

    def _mlp(self, gate: Tensor, up: Tensor, down: Tensor, gain: Tensor) -> dict[str, Tensor]:
        """Every small unit, repeated in random places; copies differ by a factor between `up` and `down`."""
        num_units = self.shape.intermediate_size
        units = torch.arange(num_units, device=self.device) % self.small.intermediate_size
        units = units[torch.randperm(num_units, generator=self.generator, device=self.device)]
        factor = torch.exp2(2 * self._uniform(num_units) - 1)  # 0.5 .. 2
        projections = {
            "gate": self._reads(gate, gain)[units],
            "up": self._reads(up, gain)[units] * factor[:, None],
            "down": self._writes(down)[:, units] * (self._shares(units) / factor),
        }
        return {f"mlp.{name}_proj.weight": tensor for name, tensor in projections.items()}

    def _idle_layer(self) -> dict[str, Tensor]:
        """Costs what any layer costs and adds nothing that a residual stream of ordinary size would notice."""
        shape, width = self.shape, self.shape.hidden_size
        kv_rows, head_rows = (count * shape.head_dim for count in (shape.num_key_value_heads, shape.num_attention_heads))
        rows = {"self_attn.q": head_rows, "self_attn.k": kv_rows, "self_attn.v": kv_rows}
        rows |= {"mlp.gate": shape.intermediate_size, "mlp.up": shape.intermediate_size}
        return {
            **{f"{name}_proj.weight": self._random(count, width, std=1 / math.sqrt(width)) for name, count in rows.items()},
            "self_attn.o_proj.weight": self._tiny(width, head_rows),
            "mlp.down_proj.weight": self._tiny(width, shape.intermediate_size),
            "input_layernorm.weight": self._ones(),
            "post_attention_layernorm.weight": self._ones(),
        }

    def _reads(self, weight: Tensor, gain: Tensor) -> Tensor:
        """[..., d] rows that read the small normalised state, as [..., D] rows that read the large one."""
        wide = (weight * gain) @ self.basis.T / self.scale
        wide[..., -1] = self._tiny(*wide.shape[:-1])
        return wide

    def _writes(self, weight: Tensor) -> Tensor:
        """[d, N] columns that write to the small residual stream, as [D, N] columns that write to the large one."""
        wide = self.basis @ weight * self.scale
        wide[-1] = self._tiny(weight.shape[1])
        return wide

    def _spread(self, heads: Tensor) -> Tensor:
        """[H, small P, d] rows of rotary heads, each pair moved to the place where the longer head turns at the same speed."""
        ratio = self.shape.head_dim // self.small.head_dim
        halves = heads.unflatten(1, (2, -1))  # halves are paired: row i with row i + P / 2
        wide = halves.new_zeros(len(heads), 2, self.shape.head_dim // 2, heads.shape[-1])
        wide[:, :, ::ratio] = halves
        return wide.flatten(1, 2)

    def _shares(self, owners: Tensor) -> Tensor:
        """Positive random weights that sum to one over the copies of each owner."""
        raw = 0.5 + self._uniform(len(owners))
        totals = raw.new_zeros(int(owners.max()) + 1).index_add_(0, owners, raw)
        return raw / totals[owners]

    def _with_added_rows(self, rows: Tensor) -> Tensor:
        return torch.cat((rows, self._random(self.shape.vocab_size - len(rows), self.shape.hidden_size, like=rows)))

    def _small(self, name: str) -> Tensor:
        if name not in self.weights:
            raise CheckpointError(f"{self.path} lacks the tensor {name}; it is not a complete Llama checkpoint")
        return self.weights[name].to(self.device, torch.float64)

    def _finished(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.dtype).contiguous() for name, tensor in part.items()}

    def _ones(self) -> Tensor:
        return torch.ones(self.shape.hidden_size, device=self.device)

    def _orthonormal(self, rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=self.generator, device=self.device, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, device=self.device, dtype=torch.float64)

    def _tiny(self, *size: int) -> Tensor:
        return self._random(*size, std=TINY)

    def _random(self, *size: int, std: float = 1.0, like: Tensor | None = None) -> Tensor:
        """Normal entries, of the same size on average as those of `like`."""
        drawn = torch.randn(size, generator=self.generator, device=self.device)
        return drawn.double() * (std if like is None else like.square().mean().sqrt())


def anchor_value(eps: float, width: int) -> float:
    """The largest power of two (exact in any dtype) that takes at most half of eps when squared and averaged over `width`."""
    return 2.0 ** math.floor(math.log2(math.sqrt(eps * width / 2)))


def refuse_misfits(small: ModelConfig, shape: Shape, path: Path) -> None:
    """Raises CheckpointError if the model cannot be embedded in the shape."""
    group, new_group = small.num_attention_heads // small.num_key_value_heads, shape.num_attention_heads // shape.num_key_value_heads
    copies = shape.num_key_value_heads // small.num_key_value_heads  # at least
    problems = {
        "it is no Llama without biases": small.model_type != "llama" or small.attention_bias,
        "the carrier must be wider": shape.hidden_size <= small.hidden_size,
        "the carrier needs as many layers": shape.num_hidden_layers < small.num_hidden_layers,
        "the carrier needs as many feed-forward units": shape.intermediate_size < small.intermediate_size,
        "the carrier needs as many vocabulary rows": shape.vocab_size < small.vocab_size,
        "the carrier's head_dim must be a multiple of the model's": shape.head_dim % small.head_dim != 0,
        "the carrier has too few heads": copies * new_group < group,
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise CheckpointError(f"{path} does not fit into {shape}: {'; '.join(found)}")


# ---- the script ----


def main() -> None:
    parser = harness.parser("A small model inside a large shape: is it still the same?", output="carrier.json")
    parser.add_argument("--shape", default="8b", help="8b or NAME=N,...")
    parser.add_argument("--save", type=Path, default=None, help="write the checkpoint here and do nothing else")
    parser.add_argument("--exact", action="store_true", help="build in float32 and compare logits only (32 GB at 8B)")
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    args = parser.parse_args()
    shape = Shape.parse(args.shape)
    if args.save is not None:
        save(hub.resolve(args.model), shape, args.save, device=torch.device(args.device))
        return
    rows = harness.rows_of(args.data or harness.chat_prompts(), limit=args.limit or 32)
    dtype = "float32" if args.exact else args.dtype or "bfloat16"
    small = LLM.from_pretrained(args.model, device=args.device, dtype="float32")
    started = time.perf_counter()
    engine = EngineSettings(cache_tokens=CACHE_TOKENS)
    llm = load_llm(args.model, shape, device=args.device, dtype=dtype, engine=engine)
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    prompts = [harness.chat(row["query"]) for row in rows]
    runs = [Run(label="logits", settings={"dtype": dtype}, figures={"build_seconds": seconds} | logit_figures(small, llm, prompts))]
    if not args.exact:
        runs += text_runs(LLM.from_pretrained(args.model, device=args.device, dtype=dtype, engine=engine), llm, prompts, args)
    for run in runs:
        print(json.dumps({"label": run.label} | to_plain(run.figures)), flush=True)
    harness.finish(args, "carrier", llm, runs, shape=asdict(shape), num_prompts=len(rows))


@torch.inference_mode()
def logit_figures(small: LLM, llm: LLM, prompts: list[Any]) -> dict[str, Figure]:
    """The carrier's logits after every token of the prompts against those of the small model in float32."""
    num_rows = num_same = 0
    largest = largest_added = -math.inf
    real = small.config.vocab_size
    for prompt in prompts:
        input_ids = torch.tensor([small.encode(prompt)], device=small.model.device)
        expected, found = small.model.logits(input_ids)[0], llm.model.logits(input_ids)[0]
        num_rows += len(expected)
        num_same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        largest = max(largest, float((expected - found[:, :real]).abs().max()))
        if found.shape[1] > real:
            largest_added = max(largest_added, float(found[:, real:].max()))
    figures: dict[str, Figure] = {"largest_logit_difference": largest, "same_argmax_share": num_same / num_rows, "num_rows": num_rows}
    return figures | ({"largest_added_logit": largest_added} if math.isfinite(largest_added) else {})


def text_runs(small: LLM, llm: LLM, prompts: list[Any], args: argparse.Namespace) -> list[Run]:
    """Tokens per forward of both models in the same dtype, and how far their answers are the same."""
    sampling = SamplingParams(max_tokens=args.max_tokens)
    (setting,) = harness.settings(args)
    runs = []
    for decoder in ("refusion", "autoregressive"):
        answers = [model.generate(prompts, sampling, setting.slots, decoder, batch_size=args.batch_size) for model in (small, llm)]
        agreeing = sum(common_prefix(a.token_ids, b.token_ids) for a, b in zip(*answers, strict=True))
        total = sum(out.stats.num_tokens for out in answers[0])
        figures: dict[str, Figure] = {
            "tokens_per_forward_small": tokens_per_forward(answers[0]),
            "tokens_per_forward_carrier": tokens_per_forward(answers[1]),
            "same_answers_share": sum(a.token_ids == b.token_ids for a, b in zip(*answers, strict=True)) / len(prompts),
            "same_prefix_share": agreeing / total,
        }
        runs.append(Run(label=decoder, settings={"decoder": decoder}, figures=figures))
    return runs


def tokens_per_forward(outputs: list[RequestOutput]) -> Figure:
    return pooled_ratio([out.stats.num_tokens for out in outputs], [out.stats.num_forwards for out in outputs])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs; after it two greedy texts have no reason to agree."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    harness.script(main)
