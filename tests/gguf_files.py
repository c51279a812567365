"""A tiny GGUF file and the wheel around it, as the hub's downloads are made: tests of the hub need neither network nor the real model."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from torch import Tensor

from refusion.gguf_import import _NAMES, _OUTER_NAMES


def write_gguf(checkpoint: Path, tokenizer_dir: Path, target: Path, *, num_tokens: int) -> None:
    """The Llama checkpoint `checkpoint` as float32 GGUF, rows of q and k permuted as llama.cpp wants them, with a byte tokenizer."""
    config = json.loads((checkpoint / "config.json").read_text())
    settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    # GGUF knows no empty list of merges, so there is one, and its result.
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__)[: num_tokens - 1], "ab"]
    writer = GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(num_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index < 6 else 1 for index in range(num_tokens)])
    writer.add_token_merges(["a b"])
    for name, token_id in {"bos": 1, "eos": 2, "unk": 0, "pad": 0}.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_chat_template(settings["chat_template"])
    outer = {new: old for old, new in _OUTER_NAMES.items()}
    inner = {new: old for old, new in _NAMES.items()}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if "q_proj" in name:
            weight = _permute(weight, config["num_attention_heads"])
        elif "k_proj" in name:
            weight = _permute(weight, config["num_key_value_heads"])
        if name in outer:
            gguf_name = outer[name]
        else:
            _, _, layer, module = name.split(".", 3)
            gguf_name = f"blk.{layer}.{inner[module.removesuffix('.weight')]}.weight"
        writer.add_tensor(gguf_name, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(gguf: Path, target: Path) -> None:
    """A zip file that holds `gguf` as a wheel does."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, f"package/{gguf.name}")
        archive.writestr("package/__init__.py", "raise SystemExit('the package must not be imported')")


def _permute(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp's order: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return torch.stack([*weight.view(num_heads, 2, rows // num_heads // 2, columns).unbind(1)], 2).reshape(rows, columns)
