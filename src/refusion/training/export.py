"""The finished model: `final` in hub layout, the adapter beside it for LoRA, and the way to the hub on request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from refusion.atomic import atomic_directory
from refusion.errors import CheckpointError
from refusion.training.base import BaseModel, load_base
from refusion.training.recipe import Recipe
from refusion.training.trainer import RefusionTrainer

_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)


def save_final_model(trainer: RefusionTrainer, base: BaseModel, recipe: Recipe, run_dir: Path) -> None:
    """Write `run_dir`/final in hub layout, and for LoRA `run_dir`/adapter beside it; each appears whole or not at all.

    All processes call it, because sharded weights are gathered from all; the first one writes.
    """
    state = trainer.gathered_state_dict()
    unset_hf_deepspeed_config()  # else transformers would shard what is built here, too
    if trainer.is_world_process_zero():
        if recipe.method.name == "full":
            model = trainer.network if state is None else _filled(trainer.network, state)
        else:
            with atomic_directory(run_dir / "adapter", replace=True) as draft:
                trainer.network.save_pretrained(draft, state_dict=state)
            model = _merged(recipe, run_dir / "adapter")
        _write_final(model, base, recipe, run_dir / "final")
    trainer.accelerator.wait_for_everyone()


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a finished model to `repository` (owner/name), which is created if it is missing; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model trained with refusion")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot push to {repository}: {reason}; the model lies in {folder}") from error
    return str(address)


def _filled(model: Any, state: dict[str, Any]) -> Any:
    """A model of its own with the gathered weights, for shards cannot be written as they are."""
    whole = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    whole.load_state_dict(state, strict=False)  # a tied head stands in it once
    whole.tie_weights()
    return whole


def _merged(recipe: Recipe, adapter: Path) -> Any:
    """The base in full precision with the adapter folded in; a 4-bit base would lose what the adapter learnt in rounding."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(recipe.model).model, adapter).merge_and_unload()  # pyright: ignore[reportCallIssue]


def _write_final(model: Any, base: BaseModel, recipe: Recipe, target: Path) -> None:
    config = model.config
    config.mask_token_id = base.mask_token_id
    block = dict(getattr(config, "refusion", None) or {})
    block["training"] = {"base": recipe.model.base, "objective": recipe.to_table()["objective"], "method": recipe.method.name}
    config.refusion = block
    config.use_cache = True  # the Trainer switches it off for training
    model.to(device="cpu", dtype=getattr(torch, recipe.run.final_dtype))
    with atomic_directory(target, replace=True) as draft:
        model.save_pretrained(draft)
        for name in _COPIED_FILES:
            if base.path is not None and (base.path / name).exists():
                shutil.copyfile(base.path / name, draft / name)
        if base.chat_template is not None:
            (draft / "chat_template.jinja").write_text(base.chat_template, encoding="utf-8")
