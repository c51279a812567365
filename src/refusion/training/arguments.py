"""What the Trainer is told: optimizer, schedule, logging and saving of a recipe, and how several processes share the model."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from refusion.errors import ConfigError
from refusion.training.network import computes_in_bfloat16
from refusion.training.recipe import ParallelSettings, Recipe


def training_arguments(recipe: Recipe, run_dir: Path, model: Any) -> TrainingArguments:
    """The Trainer's arguments for this recipe on this machine; making them joins the process group where there is one."""
    has_gpu = torch.cuda.is_available()
    bfloat16 = computes_in_bfloat16(recipe, "cuda" if has_gpu else "cpu")
    optimizer, run = recipe.optimizer, recipe.run
    # TF32 for what autocast leaves in float32. Not by TrainingArguments(tf32=True): its API and the one that torch.compile asks differ.
    if has_gpu:
        torch.set_float32_matmul_precision("high")
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        max_steps=max(run.max_steps, 1),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.data.accumulation,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=optimizer.schedule if optimizer.schedule != "constant" else "constant_with_warmup",
        warmup_steps=optimizer.warmup_ratio,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        max_grad_norm=optimizer.max_grad_norm,
        optim="adamw_torch_fused" if has_gpu else "adamw_torch",
        bf16=bfloat16 and recipe.parallel.name != "deepspeed",  # which autocasts by itself
        use_cpu=not has_gpu,
        seed=run.seed,
        ignore_data_skip=True,  # the batches start at the right step themselves
        logging_steps=run.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would synchronise with the device in every step
        save_strategy="steps" if run.save_steps else "no",
        save_steps=run.save_steps or 500,
        save_total_limit=run.keep_checkpoints,
        dataloader_num_workers=recipe.data.num_workers,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        eval_strategy="steps" if run.validate_steps else "no",
        eval_steps=run.validate_steps or None,
        **_parallel_arguments(recipe, model, bfloat16),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used through torchrun, never by threads of one process
    unset_hf_deepspeed_config()  # with ZeRO-3 transformers would shard what it loads from here on, a teacher too
    return arguments


def _parallel_arguments(recipe: Recipe, model: Any, bfloat16: bool) -> dict[str, Any]:
    """FSDP2 over decoder layers or DeepSpeed ZeRO; with plain data parallelism nothing."""
    parallel = recipe.parallel
    if parallel.name == "fsdp":
        require_gpus_for_fsdp()
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": [type(model.base_model.layers[0]).__name__],
                "reshard_after_forward": parallel.reshard_after_forward,
                "cpu_offload": parallel.cpu_offload,
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }
    if parallel.name == "deepspeed":
        _require_deepspeed()
        # DeepSpeed 0.19 calls what torch 2.13 would like to be called otherwise, several times a step.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
        return {"deepspeed": _deepspeed_config(parallel, bfloat16)}
    return {}


def _deepspeed_config(parallel: ParallelSettings, bfloat16: bool) -> dict[str, Any]:
    """ZeRO with autocast over float32 weights, as in every other run; nothing is gathered or summed in bfloat16.

    DeepSpeed's `bf16` would round the weights, the final model among them, and make the Trainer round a batch's weights and normalisers.
    """
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = "auto"  # whole in every process: what has 10 x hidden size elements or fewer
    if parallel.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if parallel.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    autocast = {"enabled": bfloat16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    shared = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, "torch_autocast": autocast, **dict.fromkeys(shared, "auto")}


def _require_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        raise ConfigError("parallel.name = 'deepspeed' needs DeepSpeed; `pip install 'deepspeed>=0.19'`, or use 'fsdp'")
    if "WORLD_SIZE" not in os.environ:  # DeepSpeed would look for MPI
        raise ConfigError(
            "parallel.name = 'deepspeed' needs a launcher, for one process too: `torchrun --nproc-per-node 1 -m refusion train ...`"
        )


def require_gpus_for_fsdp() -> None:
    """accelerate would quietly train whole models on CPUs."""
    if not torch.cuda.is_available():
        raise ConfigError("parallel.name = 'fsdp' needs GPUs; leave it out to train on CPUs with the whole model in every process")
