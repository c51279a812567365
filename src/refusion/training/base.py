"""The model that training starts from: weights, tokenizer, chat template and mask token, or a small toy model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from refusion import hub
from refusion.errors import CheckpointError, ConfigError
from refusion.tokenizer import Tokenizer
from refusion.training.recipe import ModelSettings

TOY_MASK_ID = 2
CHAT_TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
"""Templates that model.chat_template may name instead of a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """The model that training starts from; `path` is None for the toy model."""

    model: Any
    path: Path | None
    tokenizer: Tokenizer | None
    mask_token_id: int
    chat_template: str | None = None
    """The template of model.chat_template, which the final model takes over; None = the checkpoint's own."""

    @property
    def context_length(self) -> int:
        """Positions that the model has."""
        return int(self.model.config.max_position_embeddings)


def load_base(settings: ModelSettings, *, in_4_bit: bool = False) -> BaseModel:
    """Load model (float32, or 4-bit for QLoRA) and tokenizer and settle the mask token."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if settings.base == "toy":
        if in_4_bit:
            raise ConfigError("method.name = 'qlora' needs a checkpoint; the toy model is too small to quantise")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BaseModel(model=LlamaForCausalLM(toy_config()), path=None, tokenizer=None, mask_token_id=TOY_MASK_ID)
    path = hub.resolve(settings.base)
    model = load_weights(path, **(_four_bit_options() if in_4_bit else {}))
    tokenizer = Tokenizer.from_pretrained(path) if (path / "tokenizer.json").exists() else None
    mask_token_id = _mask_token_id(model, path, settings.mask_token)
    template = _chat_template(settings.chat_template)
    if template is not None:
        if tokenizer is None:
            raise ConfigError(f"model.chat_template has no effect: {path} has no tokenizer.json")
        tokenizer = tokenizer.with_chat_template(template)
    return BaseModel(model=model, path=path, tokenizer=tokenizer, mask_token_id=mask_token_id, chat_template=template)


def load_weights(path: Path, **options: Any) -> Any:
    """The `transformers` model of a directory, in float32 unless `options` say otherwise."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **({"dtype": torch.float32} | options))


def base_config(settings: ModelSettings) -> Any:
    """The configuration of the base alone, without its weights."""
    return toy_config() if settings.base == "toy" else AutoConfig.from_pretrained(hub.resolve(settings.base))


def toy_config() -> LlamaConfig:
    """A small Llama over 64 ids: 0 padding, 1 end, 2 mask, 3 begin, 4-6 tasks, 8-63 letters."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
        tie_word_embeddings=True,
    )


def _four_bit_options() -> dict[str, Any]:
    """NF4 with double quantisation, as in the QLoRA paper (arXiv 2305.14314)."""
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ConfigError("method.name = 'qlora' needs bitsandbytes; `pip install bitsandbytes`, or use 'lora'")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    # Left to itself, transformers loads 4-bit weights onto the first GPU in every process.
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": quantization, "dtype": torch.bfloat16, "device_map": {"": device}}


def _chat_template(name: str) -> str | None:
    if not name:
        return None
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(map(repr, CHAT_TEMPLATES))
        raise ConfigError(f"model.chat_template = {name!r} is unknown: neither a Jinja file nor one of {known}")
    return path.read_text(encoding="utf-8")


def _mask_token_id(model: Any, path: Path, mask_token: str) -> int:
    known = getattr(model.config, "mask_token_id", None)
    if known is None and mask_token:
        from tokenizers import Tokenizer as RawTokenizer

        known = RawTokenizer.from_file(str(path / "tokenizer.json")).token_to_id(mask_token)
        if known is None:
            raise CheckpointError(f"{path} has no token {mask_token!r}; choose another model.mask_token")
    if known is None:
        raise CheckpointError(f"{path} has no mask token; set model.mask_token or add one with `refusion convert`")
    if not 0 <= known < model.get_input_embeddings().num_embeddings:
        raise CheckpointError(f"{path}: mask token {known} is outside the embedding; add one with `refusion convert`")
    return known
