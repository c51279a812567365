"""The network as it is trained: which weights move (all, or an adapter and the mask row), teacher, attention and compilation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from refusion import hub
from refusion.errors import ConfigError
from refusion.training.attention import FLEX_NAME
from refusion.training.base import BaseModel, load_weights
from refusion.training.objectives import LossSettings, bind_objective, inner_causal_lm
from refusion.training.recipe import MethodSettings, Recipe


def prepare_model(base: BaseModel, recipe: Recipe, device: torch.device) -> tuple[Any, frozenset[str]]:
    """Bind objective, method, attention and compilation to the base model; also the names of parameters of which one row is trained."""
    model = base.model
    # transformers gives the embedding pad_token_id as padding_idx, which stops that row's gradient; pad is often EOS.
    model.get_input_embeddings().padding_idx = None
    if recipe.model.attention == "flex":
        if device.type == "cpu":
            raise ConfigError("model.attention = 'flex' has no backward pass on a CPU; use 'sdpa'")
        model.config._attn_implementation = FLEX_NAME
    if recipe.model.residual == "bfloat16":
        _round_embeddings(model, recipe, device)
    teacher = _frozen(_teacher(model, recipe), device, recipe) if recipe.objective.distill > 0 else None
    frozen: frozenset[str] = frozenset()
    only_row = None
    if recipe.method.name != "full":
        model, only_row = _with_adapter(model, base.mask_token_id, recipe.method, recipe.run.seed), base.mask_token_id
    elif recipe.method.freeze_embeddings:
        frozen, only_row = _freeze_embeddings(model, base.mask_token_id), base.mask_token_id
    causal_lm = inner_causal_lm(model)
    if recipe.model.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        causal_lm.enable_input_require_grads()
    if recipe.model.compile:
        torch._dynamo.config.cache_size_limit = 64
        for network in (causal_lm, teacher):
            for module in [] if network is None else [*network.base_model.layers, network.base_model.norm]:
                module.compile(dynamic=False)
    loss = LossSettings(
        chunk_size=recipe.objective.chunk_size,
        distill=recipe.objective.distill,
        ar_weight=recipe.objective.ar_weight,
        only_row=only_row,
        compiled=recipe.model.compile,
    )
    bind_objective(model, loss, teacher)
    return model, frozen


def num_trained_weights(model: Any, frozen: frozenset[str]) -> int:
    """Weights that move; of a frozen embedding that is the mask token's row."""
    return sum(p.shape[1] if name in frozen else p.numel() for name, p in model.named_parameters() if p.requires_grad)


def computes_in_bfloat16(recipe: Recipe, device_type: str) -> bool:
    """Whether training autocasts to bfloat16 there."""
    return recipe.model.precision == "bfloat16" or (recipe.model.precision == "auto" and device_type == "cuda")


def _round_embeddings(model: Any, recipe: Recipe, device: torch.device) -> None:
    """Start the residual stream in bfloat16: autocast leaves an embedding in its weight's type, and every layer adds to what comes in."""
    if not computes_in_bfloat16(recipe, device.type):
        raise ConfigError("model.residual = 'bfloat16' has no effect in float32; leave it out or set model.precision = 'bfloat16'")

    def rounded(module: Any, inputs: Any, output: Tensor) -> Tensor:
        # Outside autocast (a probe that calls the layers themselves) the weights of the next layer are float32.
        return output.to(torch.bfloat16) if torch.is_autocast_enabled(output.device.type) else output

    model.get_input_embeddings().register_forward_hook(rounded)


def _teacher(model: Any, recipe: Recipe) -> Any:
    """What `objective.teacher` names, or a copy of the base model as it is."""
    if not recipe.objective.teacher:
        return copy.deepcopy(model)
    teacher = load_weights(hub.resolve(recipe.objective.teacher))
    theirs, ours = teacher.config.vocab_size, model.config.vocab_size
    if theirs != ours:
        raise ConfigError(f"objective.teacher = {recipe.objective.teacher!r} has {theirs} tokens, the base {ours}; it must share them all")
    teacher.config._attn_implementation = model.config._attn_implementation
    return teacher


def _frozen(teacher: Any, device: torch.device, recipe: Recipe) -> Any:
    """In bfloat16 where the student computes in it."""
    teacher = teacher.eval().requires_grad_(False)
    return teacher.to(device=device, dtype=torch.bfloat16 if computes_in_bfloat16(recipe, device.type) else torch.float32)


def _with_adapter(model: Any, mask_token_id: int, method: MethodSettings, seed: int) -> Any:
    """LoRA on every linear layer of the decoder, and the mask token's row of the embedding."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if method.name == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,  # pyright: ignore[reportArgumentType]  (PEFT only divides by it)
        lora_dropout=method.dropout,
        target_modules="all-linear",
        trainable_token_indices=[mask_token_id],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _freeze_embeddings(model: Any, mask_token_id: int) -> frozenset[str]:
    """Leave embedding and head alone but for one row: the gradient of the others is cut to 0, and AdamW without decay leaves them."""
    weight = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    if head is not weight:
        head.requires_grad_(False)

    def only_mask_row(grad: Tensor) -> Tensor:
        kept = torch.zeros_like(grad)
        kept[mask_token_id] = grad[mask_token_id]
        return kept

    weight.register_hook(only_mask_row)
    return frozenset(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight)
