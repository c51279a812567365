"""What the inference transformer needs to know of a checkpoint, read from its `config.json`.

Only Qwen3 and Llama shapes are understood; everything else is refused here, before a weight is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusion.checkpoint import read_json
from refusion.errors import CheckpointError

MODEL_TYPES = ("llama", "qwen3")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3 frequency scaling (Llama 3.1 report, appendix on long context)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only transformer, in the words of `config.json`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mask_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def has_qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys per head before the rotation."""
        return self.model_type == "qwen3"

    @classmethod
    def from_pretrained(cls, path: Path) -> "ModelConfig":
        """Read `config.json` (and the EOS list of `generation_config.json`) of a checkpoint directory.

        Raises `CheckpointError` if the file is missing, malformed or describes another architecture.
        """
        raw = read_json(path / "config.json")
        _refuse_other_shapes(raw, path)
        try:
            return cls(
                model_type=raw["model_type"],
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=raw["num_attention_heads"],
                num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
                head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=_rope(raw).get("rope_theta", 10000.0),
                rope_scaling=_rope_scaling(_rope(raw), path),
                max_position_embeddings=raw["max_position_embeddings"],
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                attention_bias=raw.get("attention_bias", False),
                mask_token_id=raw.get("mask_token_id"),
                eos_token_ids=_eos_token_ids(raw, path),
            )
        except KeyError as error:
            raise CheckpointError(f"{path / 'config.json'} lacks {error.args[0]!r}; it is not a complete model configuration") from error


def _refuse_other_shapes(raw: dict[str, Any], path: Path) -> None:
    """What would load and compute something else."""
    if raw.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(f"{path}: model_type {raw.get('model_type')!r} is not supported; use one of {', '.join(MODEL_TYPES)}")
    if raw.get("use_sliding_window"):
        raise CheckpointError(f"{path}: sliding-window attention is not supported; use a checkpoint with full attention")
    if raw.get("quantization_config"):
        raise CheckpointError(f"{path}: quantised weights are not supported; use the checkpoint in bfloat16 or float32")
    if raw.get("mlp_bias") or raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: a feed-forward layer with biases or another activation than silu is not supported")


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Rotation settings: one table in `transformers` 5 (`rope_parameters`), two keys before."""
    if raw.get("rope_parameters"):
        return raw["rope_parameters"]
    return {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or {})}


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{path}: rope scaling {kind!r} is not supported; use a checkpoint with default or llama3 scaling")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(**{name: rope[name] for name in names})


def _eos_token_ids(raw: dict[str, Any], path: Path) -> tuple[int, ...]:
    """EOS means any id of the generation config's list; without that file, of the model's."""
    generation = path / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = raw.get("eos_token_id") if eos is None else eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
