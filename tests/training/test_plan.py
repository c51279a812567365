"""The plan of a run against what a run really holds: parameters, gradients, optimizer, and what autograd keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from refusion.errors import ConfigError
from refusion.training import trainer
from refusion.training.activations import COMPILED_SHARE, activation_bytes, kept_storages
from refusion.training.base import load_base, toy_config
from refusion.training.network import num_trained_weights, prepare_model
from refusion.training.plan import (
    Hardware,
    flops_per_token,
    format_plan,
    hardware_at_hand,
    make_plan,
    matrix_weights,
    memory_advice,
)
from refusion.training.recipe import Recipe, load_recipe
from refusion.training.run import train

Build = Callable[..., Recipe]
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CPU = Hardware(device="cpu", memory_bytes=10**10, flops=1e11, bytes_per_second=1e10)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_activations_are_those_that_a_real_forward_keeps(small_recipe: Build, kind: str, precision: str) -> None:
    shape = {**toy_config().to_dict(), "num_hidden_layers": 4, "head_dim": 32}
    config: Any = toy_config() if kind == "llama" else Qwen3Config(**{**shape, "layer_types": None})
    config.num_hidden_layers = 4
    if kind == "qwen3":
        config.layer_types = ["full_attention"] * 4
    model = (LlamaForCausalLM if kind == "llama" else Qwen3ForCausalLM)(config)
    model.config._attn_implementation = "sdpa"
    ids = torch.zeros(2, 256, dtype=torch.long)
    mask = torch.zeros(2, 1, 256, 256, dtype=getattr(torch, precision))
    with kept_storages() as kept, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        model.base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    measured = sum(size for storage, (size, _) in kept.items() if storage not in own)
    recipe = small_recipe(data={"pack_length": 256})
    planned = activation_bytes(recipe, 2, 2 if precision == "bfloat16" else 4, config)
    assert planned == pytest.approx(measured, rel=0.1)


def test_compiled_layers_keep_the_share_that_the_plan_assumes() -> None:
    """The partition that torch.compile makes of a layer of SmolLM2-135M's width, without code generation."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config: Any = type(toy_config())(**{**toy_config().to_dict(), **shape, "num_hidden_layers": 1, "head_dim": 64})
    model = LlamaForCausalLM(config)
    layer = model.model.layers[0]
    hidden = torch.randn(1, 256, 576, requires_grad=True)
    rotation = model.model.rotary_emb(hidden, torch.arange(256).unsqueeze(0))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept_bytes = {}
    for backend in ("eager", "aot_eager_decomp_partition"):
        torch._dynamo.reset()
        compiled = torch.compile(layer, dynamic=False, backend=backend)
        with kept_storages() as kept, torch.autocast("cpu", torch.bfloat16):
            compiled(hidden, position_embeddings=rotation)
        tensors = [(size, tensor) for storage, (size, tensor) in kept.items() if storage not in own]
        kept_bytes[backend] = sum(size for size, tensor in tensors if not (tensor.dim() == 2 and 256 not in tensor.shape))  # but weights
    assert kept_bytes["aot_eager_decomp_partition"] / kept_bytes["eager"] == pytest.approx(COMPILED_SHARE, abs=0.04)


def test_weights_gradients_and_optimizer_are_those_of_a_real_step(small_recipe: Build, tmp_path: Path) -> None:
    held: dict[str, int] = {}
    recipe = small_recipe(run={"max_steps": 2})
    plan = make_plan(recipe, CPU)

    class Look(trainer.TimeLimit):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
            held["weights"] = sum(p.nbytes for p in model.parameters())
            held["gradients"] = sum(p.grad.nbytes for p in model.parameters())
            tensors = [t for values in optimizer.state.values() for t in values.values() if t.dim() > 0]
            held["optimizer"] = sum(t.nbytes for t in tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refusion.training.run.TimeLimit", Look)
        train(small_recipe(run={"max_steps": 2, "time_limit_minutes": 100}), output=tmp_path, report=lambda line: None)
    assert held == {"weights": plan.weights_bytes, "gradients": plan.gradient_bytes, "optimizer": plan.optimizer_bytes}


@pytest.mark.parametrize("method", [{}, {"freeze_embeddings": True}, {"name": "lora", "rank": 4}])
def test_trained_weights_are_those_that_training_reports(small_recipe: Build, method: dict[str, object]) -> None:
    recipe = small_recipe(method=method)
    model, frozen = prepare_model(load_base(recipe.model), recipe, torch.device("cpu"))
    assert make_plan(recipe, CPU).trained == num_trained_weights(model, frozen)


def test_flops_are_counted_as_the_marks_say() -> None:
    config = toy_config()
    layer = 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 192
    assert matrix_weights(config) == 2 * layer + 64 * 64
    # Scores and values are 2 * 2 * length * width a token forward, three times that with backward, half of it causal.
    assert flops_per_token(config, 100) == 6 * matrix_weights(config) + 3 * 2 * (2 * 2 * 100 * 64) / 2


def test_checkpointing_and_accumulation_lower_the_activations(small_recipe: Build) -> None:
    plain = make_plan(small_recipe(data={"rows_per_step": 8}), CPU)
    split = make_plan(small_recipe(data={"rows_per_step": 8, "accumulation": 4}), CPU)
    again = make_plan(small_recipe(data={"rows_per_step": 8}, model={"gradient_checkpointing": True}), CPU)
    assert split.activation_bytes == pytest.approx(plain.activation_bytes / 4, rel=0.01)
    assert again.activation_bytes < plain.activation_bytes
    assert again.seconds_per_step > plain.seconds_per_step


def test_what_to_lower_is_named_until_it_fits(small_recipe: Build) -> None:
    recipe = small_recipe(data={"rows_per_step": 64, "pack_length": 1024})
    small = Hardware(device="cpu", memory_bytes=760_000_000, flops=1e11, bytes_per_second=1e10)
    plan = make_plan(recipe, small)
    advice = memory_advice(recipe, small)
    assert not plan.fits
    assert advice[0].startswith("data.accumulation = 2")
    assert advice[-1].endswith("which fits")
    text = format_plan(recipe, plan, advice)
    assert "this does not fit; what would help:" in text
    assert "GB" in text


def test_too_little_memory_while_training_says_what_to_lower(small_recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.RefusionTrainer, "compute_loss", full)
    advice = r"out of memory: raise data\.accumulation .*model\.gradient_checkpointing.*`--plan`"
    with pytest.raises(ConfigError, match=advice):
        train(small_recipe(), output=tmp_path, report=lambda line: None)
    monkeypatch.setattr("refusion.training.run.prepare_model", full)  # when the model does not even fit the device
    with pytest.raises(ConfigError, match=advice):
        train(small_recipe(), output=tmp_path / "other", report=lambda line: None)


def test_the_recipe_for_eight_gpus_fits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    config = Qwen3Config(**shape, num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=False)
    monkeypatch.setattr("refusion.training.plan.base_config", lambda settings: config)
    recipe = load_recipe(RECIPES / "qwen3-8b.toml")
    h100 = Hardware(device="cuda", memory_bytes=80 * 10**9, flops=7.8e14, bytes_per_second=2.8e12, num_processes=8)
    plan = make_plan(recipe, h100)
    assert plan.parameters == pytest.approx(8.19e9, rel=0.01)
    assert plan.fits, format_plan(recipe, plan, [])
    alone = make_plan(recipe, Hardware(device="cuda", memory_bytes=80 * 10**9, flops=7.8e14, bytes_per_second=2.8e12))
    assert not alone.fits


def test_the_hardware_at_hand_is_found() -> None:
    found = hardware_at_hand()
    assert found.memory_bytes > 10**8
    assert found.flops > 10**8
    assert found.bytes_per_second > 10**8


@pytest.mark.parametrize(
    ("parallel", "weights", "gradients", "optimizer"),
    [
        ({}, 4, 4, 8),
        ({"name": "fsdp"}, 2, 2, 4),
        ({"name": "fsdp", "cpu_offload": True}, 0, 0, 0),
        ({"name": "deepspeed", "zero_stage": 1}, 4, 4, 6),
        ({"name": "deepspeed", "zero_stage": 2}, 4, 2, 6),
        ({"name": "deepspeed", "zero_stage": 2, "cpu_offload": True}, 4, 2, 0),
        ({"name": "deepspeed", "zero_stage": 3}, 2, 2, 6),
    ],
    ids=str,
)
def test_two_processes_share_bytes_of_a_weight(
    small_recipe: Build, parallel: dict[str, Any], weights: int, gradients: int, optimizer: int
) -> None:
    plan = make_plan(small_recipe(parallel=parallel), dataclasses.replace(CPU, num_processes=2))
    planned = (plan.weights_bytes, plan.gradient_bytes, plan.optimizer_bytes)
    assert planned == tuple(share * plan.parameters for share in (weights, gradients, optimizer))
