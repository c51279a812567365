"""One GGUF file of the Llama type to a plain Hugging Face directory.

Reads weights, tokenizer and chat template straight from the file: neither `transformers` nor a network is needed. Three things
differ from a naive copy. llama.cpp stores the rows of q_proj and k_proj in another order, which is undone here; block-quantised
tensors are expanded in float32 before they are rounded to bfloat16; and the digit split that the tokenizer family needs, which
GGUF only names ("smollm"), is put in front of the byte-level split. Where the file comes from is the hub's business.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusion.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3  # llama.cpp's token type for specials


def convert_gguf(source: Path, target: Path, *, mask_token: str) -> None:
    """Write config, weights, tokenizer and generation config of the GGUF file `source` into the existing directory `target`.

    `mask_token` is the text of an existing special token; its id goes into `config.json` as `mask_token_id`.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{source} holds a model of type {architecture!r}; only 'llama' can be converted")
    config = _config(reader, mask_token)
    tensors = read_tensors(reader, config["num_attention_heads"], config["num_key_value_heads"])
    if "lm_head.weight" not in tensors:
        config["tie_word_embeddings"] = True
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    _write_tokenizer(reader, target)


def read_tensors(reader: GGUFReader, num_heads: int, num_key_value_heads: int) -> dict[str, Tensor]:
    """All weights under their Hugging Face names, bfloat16, linear weights as [out, in]."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))  # float32
        if ".attn_q." in tensor.name:
            weight = _unpermute(weight, num_heads)
        elif ".attn_k." in tensor.name:
            weight = _unpermute(weight, num_key_value_heads)
        tensors[_to_hub_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return tensors


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Rows interleaved in pairs (llama.cpp's rotary layout) back to two halves per head; [out, in] -> [out, in]."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _to_hub_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.{kind}"


def _config(reader: GGUFReader, mask_token: str) -> dict[str, Any]:
    hidden_size = _field(reader, "llama.embedding_length")
    num_heads = _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "mask_token_id": _field(reader, "tokenizer.ggml.tokens").index(mask_token),
        "head_dim": _field(reader, "llama.attention.key_length", default=hidden_size // num_heads),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": hidden_size**-0.5,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        # Stored as float32: 9.999999747378752e-06 means 1e-05.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": _field(reader, "llama.vocab_size"),
    }


def _write_tokenizer(reader: GGUFReader, target: Path) -> None:
    """tokenizer.json as the model's authors publish it, and the chat template beside the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tokenizer.save(str(target / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    _write_json(
        target / "tokenizer_config.json",
        {
            # Not GPT2Tokenizer: that class rebuilds its own pre-tokenizer and loses the digit split.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": _field(reader, "llama.context_length"),
            **{key: tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")] for key, name in names.items()},
            "chat_template": _field(reader, "tokenizer.chat_template"),
        },
    )


def _field(reader: GGUFReader, key: str, *, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is None and default is None:
        raise CheckpointError(f"the GGUF file lacks the field {key}; download it again")
    if field is None:
        return default
    return field.contents()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
