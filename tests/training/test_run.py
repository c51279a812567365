"""Whole runs of a tiny model: accumulation, resuming, methods, saving, and what a finished run leaves behind."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from refusion.errors import CheckpointError, ConfigError
from refusion.training.recipe import Recipe
from refusion.training.run import TOY_MASK_ID, TrainingReport, load_base, train

Build = Callable[..., Recipe]
Weights = Callable[[Path], dict[str, Tensor]]


def test_a_finished_run_opens_in_transformers_with_its_mask_token(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    report = _train(small_recipe(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(report.model)
    assert model.config.mask_token_id == TOY_MASK_ID
    assert model.config.use_cache
    assert model.config.refusion["training"]["objective"]["slot_sizes"] == [4, 8]
    assert torch.equal(model.model.norm.weight, final_weights(tmp_path)["model.norm.weight"])
    assert report.steps == report.max_steps == 4
    assert json.loads((tmp_path / "report.json").read_text())["model"] == report.model


def test_training_learns_the_toy_tasks_a_little(tmp_path: Path, small_recipe: Build) -> None:
    lines: list[str] = []
    report = train(small_recipe(run={"max_steps": 30}), output=tmp_path, report=lines.append)
    assert report.loss < 0.95 * float(lines[2].split("loss ")[1].split()[0])
    assert report.loss == pytest.approx(report.loss_ar + report.loss_mdm, rel=1e-4)


def test_seeds_reproduce_a_run_and_another_seed_gives_another(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    runs = [_train(small_recipe(run={"seed": seed}), tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))]
    first, again, other = (final_weights(Path(run.output)) for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("objective", [{}, {"distill": 0.5}, {"name": "autoregressive", "serial_share": 0.0, "text_order_share": 0.0}])
def test_accumulated_micro_batches_equal_one_big_batch(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, objective: dict[str, object]
) -> None:
    """The normalisers run over the whole step. Epsilon is large because Adam blows rounding up where gradients are near 0."""
    optimizer = {"epsilon": 1e-3, "schedule": "constant"}
    for parts in (1, 4):
        _train(small_recipe(data={"accumulation": parts}, objective=objective, optimizer=optimizer), tmp_path / str(parts))
    whole, split = final_weights(tmp_path / "1"), final_weights(tmp_path / "4")
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, atol=2e-5, rtol=1e-4)


def test_loader_processes_do_not_change_a_run(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    for workers in (0, 2):
        _train(small_recipe(data={"num_workers": workers, "accumulation": 2}), tmp_path / str(workers))
    alone, with_workers = final_weights(tmp_path / "0"), final_weights(tmp_path / "2")
    assert all(torch.equal(alone[name], with_workers[name]) for name in alone)


@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "full", "freeze_embeddings": True}, {"name": "lora", "rank": 4}])
def test_a_resumed_run_gives_the_weights_of_an_unbroken_one(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, method: dict[str, object]
) -> None:
    recipe = small_recipe(method=method, run={"max_steps": 6, "save_steps": 3, "keep_checkpoints": 2}, data={"accumulation": 2})
    _train(recipe, tmp_path / "unbroken")
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-3", broken / "checkpoint-3")
    shutil.copy(tmp_path / "unbroken" / "recipe.json", broken)
    report = train(recipe, output=broken, resume=True, report=lambda line: None)
    unbroken, resumed = final_weights(tmp_path / "unbroken"), final_weights(broken)
    assert report.steps == 6
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_resuming_a_finished_run_only_saves_the_model_again(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    recipe = small_recipe(run={"save_steps": 2})
    _train(recipe, tmp_path)
    before = final_weights(tmp_path)
    shutil.rmtree(tmp_path / "final")
    train(recipe, output=tmp_path, resume=True, report=lambda line: None)
    after = final_weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resuming_with_a_changed_recipe_names_the_change(tmp_path: Path, small_recipe: Build) -> None:
    _train(small_recipe(run={"save_steps": 2}), tmp_path)
    changed = small_recipe(run={"save_steps": 2, "log_steps": 2}, optimizer={"learning_rate": 1e-3})
    with pytest.raises(ConfigError, match=r"the recipe has changed in optimizer\.learning_rate;"):
        train(changed, output=tmp_path, resume=True, report=lambda line: None)


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path, small_recipe: Build) -> None:
    recipe = small_recipe(run={"save_steps": 2})
    _train(recipe, tmp_path)
    with pytest.raises(ConfigError, match="--resume"):
        _train(recipe, tmp_path)


def test_a_time_limit_saves_a_checkpoint_to_go_on_from(tmp_path: Path, small_recipe: Build) -> None:
    report = _train(small_recipe(run={"time_limit_minutes": 1e-9}), tmp_path)
    assert (report.steps, report.model) == (1, "")
    assert train(small_recipe(), output=tmp_path, resume=True, report=lambda line: None).steps == 4


def test_frozen_embeddings_move_in_the_mask_row_alone(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    recipe = small_recipe(method={"freeze_embeddings": True}, optimizer={"weight_decay": 0.1})
    before = load_base(recipe.model).model.state_dict()
    _train(recipe, tmp_path)
    after = final_weights(tmp_path)
    assert _moved_rows(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]) == [TOY_MASK_ID]
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_lora_moves_every_linear_layer_and_the_mask_row_alone(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    recipe = small_recipe(method={"name": "lora", "rank": 4, "alpha": 8.0})
    before = load_base(recipe.model).model.state_dict()
    report = _train(recipe, tmp_path)
    after = final_weights(tmp_path)
    assert _moved_rows(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]) == [TOY_MASK_ID]
    for name, value in before.items():
        assert name not in after or torch.equal(value, after[name]) == ("norm" in name), name
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(report.model)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "the head stays tied, so the mask row is one"


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(
    tmp_path: Path, small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = torch.save

    def full(value: object, path: object, *args: object, **kwargs: object) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(value, path, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-4: No space left on device"):
        _train(small_recipe(run={"save_steps": 2}), tmp_path)
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train(small_recipe(run={"save_steps": 2}), output=tmp_path, resume=True, report=lambda line: None).steps == 4


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path: Path, small_recipe: Build) -> None:
    with pytest.raises(ConfigError, match=r"lower optimizer\.learning_rate"):
        _train(small_recipe(optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0}, run={"max_steps": 10}), tmp_path)


def test_a_base_without_mask_token_is_refused(tmp_path: Path, small_recipe: Build) -> None:
    model = load_base(small_recipe().model).model
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"has no mask token; set model\.mask_token or add one with `refusion convert`"):
        _train(small_recipe(model={"base": str(tmp_path / "base")}), tmp_path / "run")


def _train(recipe: Recipe, run_dir: Path) -> TrainingReport:
    return train(recipe, output=run_dir, report=lambda line: None)


def _moved_rows(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(-1).nonzero().flatten().tolist()
