"""Any Qwen3 or Llama checkpoint to one that can be trained and decoded here: a mask token, plain layout, adapter merged.

Shards are read, changed and written one at a time, so memory holds one of them. Nothing is executed: no pickle, no remote code. The
mask token's row is not trained by this; that is what training is for.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refusion.adapter import read_adapter
from refusion.atomic import atomic_directory
from refusion.checkpoint import INDEX, read_json, read_tensors, side_files, weight_files, write_json
from refusion.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

MODEL_TYPES = ("llama", "qwen3")
DTYPES = ("float32", "bfloat16", "float16")
NEW_MASK_TOKEN = "<|mask|>"

_MASK_TEXTS = (NEW_MASK_TOKEN, "<mask>", "[MASK]")
_UNUSED = re.compile(r"<empty_output>|<\|?reserved_special_token_\d+\|?>|<\|?(?:unused|extra|dummy)_?\d+\|?>|\[unused\d+\]")
_ROW_MULTIPLE = 8  # matrix units want the vocabulary in multiples of this

Origin = Literal["kept", "named", "mask token of the tokenizer", "spare row", "unused special", "new row"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskToken:
    """The mask token of a converted checkpoint; `text` is None where the tokenizer does not know it (or there is none)."""

    token_id: int
    text: str | None
    origin: Origin
    is_new: bool
    """Whether the tokenizer has to learn it."""


def convert(source: Path, target: Path, *, mask_token: str = "auto", adapter: Path | None = None, dtype: str | None = None) -> MaskToken:
    """Write `source` to the new directory `target` with a mask token, and with a PEFT adapter merged if one is given.

    `mask_token` is "auto" or the text of a token. Weights keep their dtype unless `dtype` names another. Raises CheckpointError if
    the checkpoint cannot be used or `target` cannot be written; then nothing is left there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, allowed are {', '.join(DTYPES)}")
    config = read_json(source / "config.json")
    _check_supported(config, source)
    tokenizer = _read_tokenizer(source)
    mask = choose_mask_token(config, tokenizer, _tokenizer_config(source), mask_token, source)
    packed, lora_scale = read_adapter(adapter) if adapter is not None else ({}, 1.0)
    num_rows = _grown(config["vocab_size"], mask.token_id)
    with atomic_directory(target, replace=_is_empty_directory(target)) as directory:
        _write_weights(source, directory, packed, lora_scale=lora_scale, num_rows=num_rows, dtype=dtype)
        write_json(directory / "config.json", _new_config(config, mask, num_rows, dtype))
        for file in side_files(source):
            shutil.copyfile(file, directory / file.name)
        _write_tokenizer(directory, tokenizer, mask)
        (directory / "README.md").write_text(_model_card(source, adapter, mask), encoding="utf-8")
    return mask


def choose_mask_token(
    config: dict[str, Any], tokenizer: Tokenizer | None, tokenizer_config: dict[str, Any], wanted: str, source: Path
) -> MaskToken:
    """The mask token that the checkpoint has, or the cheapest one it can be given.

    In this order: the one of config.json, the tokenizer's own, an embedding row that no token uses, a special token that was never
    trained, a new row. A text other than "auto" is taken at its word.
    """
    if wanted == "auto" and config.get("mask_token_id") is not None:
        token_id = config["mask_token_id"]
        text = None if tokenizer is None else tokenizer.id_to_token(token_id)
        return MaskToken(token_id=token_id, text=text, origin="kept", is_new=False)
    if tokenizer is None:
        raise CheckpointError(f"{source} has no tokenizer.json, so no mask token can be chosen; add the tokenizer first")
    if wanted == "auto":
        own = _own_mask_token(tokenizer, tokenizer_config)
        if own is not None:
            return own
        if _num_tokens(tokenizer) < config["vocab_size"]:
            return _new_token(config, tokenizer, NEW_MASK_TOKEN)
        return _unused_special(tokenizer, tokenizer_config, source) or _new_token(config, tokenizer, NEW_MASK_TOKEN)
    token_id = tokenizer.token_to_id(wanted)
    if token_id is None:
        return _new_token(config, tokenizer, wanted)
    added = tokenizer.get_added_tokens_decoder()
    if token_id not in added or not added[token_id].special:
        raise ConfigError(f"--mask-token {wanted!r} is an ordinary token; choose a special one or a text that is not in the vocabulary")
    if wanted in {_text(tokenizer_config.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}:
        raise ConfigError(f"--mask-token {wanted!r} has another meaning in this checkpoint; choose one that is not used")
    return MaskToken(token_id=token_id, text=wanted, origin="named", is_new=False)


def _own_mask_token(tokenizer: Tokenizer, tokenizer_config: dict[str, Any]) -> MaskToken | None:
    """The mask token that the tokenizer names, or a special token that is one by its text."""
    specials = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for text in (_text(tokenizer_config.get("mask_token")), *_MASK_TEXTS):
        if text in specials:
            return MaskToken(token_id=specials[text], text=text, origin="mask token of the tokenizer", is_new=False)
    return None


def _new_token(config: dict[str, Any], tokenizer: Tokenizer, text: str) -> MaskToken:
    """A token behind the last one: in a row that is there already, or in a new one."""
    token_id = _num_tokens(tokenizer)
    origin: Origin = "spare row" if token_id < config["vocab_size"] else "new row"
    return MaskToken(token_id=token_id, text=text, origin=origin, is_new=True)


def _unused_special(tokenizer: Tokenizer, tokenizer_config: dict[str, Any], source: Path) -> MaskToken | None:
    """A special token that by its name was never trained and that neither the named specials nor the chat template use."""
    template = source / "chat_template.jinja"
    used = [template.read_text(encoding="utf-8") if template.is_file() else "", str(tokenizer_config.get("chat_template", ""))]
    used += [_text(token) or "" for name, token in tokenizer_config.items() if name.endswith("_token") and isinstance(token, str | dict)]
    for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        if token.special and _UNUSED.fullmatch(token.content) and not any(token.content in text for text in used):
            return MaskToken(token_id=token_id, text=token.content, origin="unused special", is_new=False)
    return None


def _num_tokens(tokenizer: Tokenizer) -> int:
    """One more than the highest id: ids may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _check_supported(config: dict[str, Any], source: Path) -> None:
    if config.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(f"{source} is of type {config.get('model_type')!r}; supported are {', '.join(MODEL_TYPES)}")
    if config.get("quantization_config"):
        raise CheckpointError(f"{source} is quantised; convert the full-precision checkpoint instead")
    if not isinstance(config.get("vocab_size"), int):
        raise CheckpointError(f"{source / 'config.json'} lacks vocab_size; fetch the checkpoint again")


def _read_tokenizer(source: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    file = source / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise CheckpointError(f"{file} cannot be read: {error}; fetch the checkpoint again") from error


def _tokenizer_config(source: Path) -> dict[str, Any]:
    file = source / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _grown(vocab_size: int, token_id: int) -> int:
    """Rows of the embedding once `token_id` has one."""
    return vocab_size if token_id < vocab_size else math.ceil((token_id + 1) / _ROW_MULTIPLE) * _ROW_MULTIPLE


# ---- writing ----


def _write_weights(
    source: Path, directory: Path, packed: dict[str, Tensor], *, lora_scale: float, num_rows: int, dtype: str | None
) -> None:
    import torch
    from safetensors.torch import save_file

    from refusion.deltas import apply_delta, check_fits

    weight_map: dict[str, str] = {}
    num_bytes = 0
    for file in weight_files(source):
        tensors = read_tensors(file)
        for name, tensor in tensors.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensor = _with_rows(tensor, num_rows)
            tensor = apply_delta(name, tensor, packed, lora_scale=lora_scale)
            tensors[name] = tensor.to(getattr(torch, dtype) if dtype else tensor.dtype).contiguous()
            weight_map[name] = file.name
            num_bytes += tensors[name].nbytes
        save_file(tensors, directory / file.name, metadata={"format": "pt"})
    check_fits(weight_map, packed)
    if (source / INDEX).is_file():
        write_json(directory / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))})


def _with_rows(table: Tensor, num_rows: int) -> Tensor:
    """[V, hidden] with the mean row appended until there are `num_rows`: a new token starts where the others are centred."""
    import torch

    if len(table) >= num_rows:
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(num_rows - len(table), -1)])


def _new_config(config: dict[str, Any], mask: MaskToken, num_rows: int, dtype: str | None) -> dict[str, Any]:
    new = {key: value for key, value in config.items() if key != "auto_map"}  # auto_map asks for code of the checkpoint's authors
    new |= {"vocab_size": num_rows, "mask_token_id": mask.token_id}
    if dtype is not None:
        new["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return new


def _write_tokenizer(directory: Path, tokenizer: Tokenizer | None, mask: MaskToken) -> None:
    """Teach the tokenizer its mask token: tokenizer.json if it is new, and the name in tokenizer_config.json."""
    from tokenizers import AddedToken

    if tokenizer is None or mask.text is None:
        return
    settings = _tokenizer_config(directory)
    if mask.is_new:
        tokenizer.add_special_tokens([AddedToken(mask.text, special=True, normalized=False)])
        given = tokenizer.token_to_id(mask.text)
        if given != mask.token_id:
            raise CheckpointError(f"the tokenizer gives {mask.text} the id {given}, not {mask.token_id}; its ids have holes")
        tokenizer.save(str(directory / "tokenizer.json"))
        if "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"][str(mask.token_id)] = {
                "content": mask.text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
            }  # fmt: skip
    if settings:
        write_json(directory / "tokenizer_config.json", {**settings, "mask_token": mask.text})


def _model_card(source: Path, adapter: Path | None, mask: MaskToken) -> str:
    """README.md of the result; names, not paths, so that it can be published as it is."""
    name = source.resolve().name
    token = f"`{mask.text}` (id {mask.token_id})" if mask.text else f"id {mask.token_id}"
    state = "was there already" if mask.origin == "kept" else f"was added by the conversion ({mask.origin}) and is untrained"
    merged = f"\nThe adapter {adapter.resolve().name} is merged into the weights.\n" if adapter is not None else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [refusion]
---

# {name}, with a mask token

Converted by `refusion convert` from {name}. The licence of {name} applies to it.
{merged}
- Mask token: {token}; it {state}.
- Layout: plain `transformers`, no remote code. `config.json` names the mask token as `mask_token_id`.

Train it to decode by plan and infill with `refusion train`, then:

```python
from refusion import LLM

llm = LLM.from_pretrained("path/to/this/directory")
print(llm.generate([[{{"role": "user", "content": "Hello"}}]])[0].text)
```
"""
