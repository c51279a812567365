"""Whole runs of a tiny model: accumulation, resuming, methods, saving, and what a finished run leaves behind."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from refusion.errors import CheckpointError, ConfigError
from refusion.llm import LLM, SamplingParams
from refusion.tokenizer import Tokenizer
from refusion.training.base import TOY_MASK_ID, BaseModel, _four_bit_options, load_base, toy_config
from refusion.training.data import Examples
from refusion.training.recipe import Recipe
from refusion.training.run import TrainingReport, train
from refusion.training.trainer import Probe

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


@pytest.mark.parametrize(
    "objective",
    [{}, {"distill": 0.5, "pad_answers": 16}, {"name": "autoregressive"}, {"name": "block_diffusion", "block_size": 8}],
)
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


def test_a_teacher_of_another_name_teaches_in_place_of_the_base(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    base = load_base(small_recipe().model).model
    base.save_pretrained(tmp_path / "itself")
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    base.save_pretrained(tmp_path / "other")
    for name, teacher in {"none": "", "itself": str(tmp_path / "itself"), "other": str(tmp_path / "other")}.items():
        recipe = small_recipe(objective={"distill": 0.5, "teacher": teacher}, data={"validation_rows": 5})
        _train(recipe, tmp_path / "runs" / name)
    none, itself, other = (final_weights(tmp_path / "runs" / name) for name in ("none", "itself", "other"))
    assert all(torch.equal(none[name], itself[name]) for name in none)
    assert not all(torch.equal(none[name], other[name]) for name in none)


def test_a_teacher_with_other_tokens_is_refused(tmp_path: Path, small_recipe: Build) -> None:
    small = LlamaForCausalLM(toy_config())
    small.resize_token_embeddings(32)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="has 32 tokens, the base 64; it must share them all"):
        _train(small_recipe(objective={"distill": 0.5, "teacher": str(tmp_path / "small")}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"objective.teacher = 'x' must be left out where objective.distill is 0"):
        small_recipe(objective={"teacher": "x"})


def test_gradient_checkpointing_changes_no_weight(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    for again in (False, True):
        _train(small_recipe(model={"gradient_checkpointing": again}, objective={"distill": 0.5}), tmp_path / str(again))
    kept, computed = final_weights(tmp_path / "False"), final_weights(tmp_path / "True")
    assert all(torch.equal(kept[name], computed[name]) for name in kept)


@pytest.mark.parametrize("objective", [{"distill": 0.5}, {"name": "block_diffusion", "block_size": 8}], ids=["refusion", "block diffusion"])
def test_a_compiled_run_has_the_weights_of_a_plain_one_and_compiles_every_part_once(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, monkeypatch: pytest.MonkeyPatch, objective: dict[str, object]
) -> None:
    """What is traced is that of a GPU; only the code generation is left out, for it takes a minute."""
    plain_compile = torch.compile

    def compile_without_code(function: object, **options: object) -> object:
        return plain_compile(function, **{**options, "backend": "aot_eager_decomp_partition"})  # pyright: ignore

    optimizer = {"epsilon": 1e-3, "schedule": "constant"}  # Adam blows rounding up where gradients are near 0
    _train(small_recipe(objective=objective, optimizer=optimizer, run={"max_steps": 6}), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", compile_without_code)
    monkeypatch.setattr("refusion.training.cross_entropy._compiled", None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _train(small_recipe(model={"compile": True}, objective=objective, optimizer=optimizer, run={"max_steps": 6}), tmp_path / "compiled")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain, compiled = final_weights(tmp_path / "plain"), final_weights(tmp_path / "compiled")
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=2e-5, rtol=1e-4)
    # Layer, final norm and loss chunk; with a teacher its layer and norm, and the chunk with its logits.
    assert graphs <= (9 if "distill" in objective else 3), graphs


def test_residuals_in_bfloat16_train_nearly_the_same_and_need_bfloat16(tmp_path: Path, small_recipe: Build) -> None:
    losses = [
        _train(small_recipe(model={"precision": "bfloat16", "residual": residual}, run={"max_steps": 10}), tmp_path / residual).loss
        for residual in ("float32", "bfloat16")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    with pytest.raises(ConfigError, match=r"model\.residual = 'bfloat16' has no effect in float32"):
        _train(small_recipe(model={"residual": "bfloat16"}), tmp_path / "refused")


def test_the_report_says_how_full_the_packed_rows_are(tmp_path: Path, small_recipe: Build) -> None:
    """Documents of 3 tokens fill rows of 8 with two each: 6 of 8, and the last of five has a row alone."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_ids": [3], "answer_ids": [10, 1]}\n' * 5)
    recipe = small_recipe(data={"sources": [str(rows)], "pack_length": 8, "rows_per_step": 1}, objective={"name": "autoregressive"})
    assert _train(recipe, tmp_path / "run").packed_share == pytest.approx(15 / 24)


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
    with pytest.raises(ConfigError, match="holds a finished run; choose another --output"):
        _train(recipe, tmp_path)
    shutil.rmtree(tmp_path / "final")  # as if it had been killed on the way
    with pytest.raises(ConfigError, match="--resume"):
        _train(recipe, tmp_path)


def test_resuming_needs_a_checkpoint(tmp_path: Path, small_recipe: Build) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
        train(small_recipe(), output=tmp_path, resume=True, report=lambda line: None)


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


def test_changed_data_under_the_same_name_is_named_on_resume(tmp_path: Path, small_recipe: Build) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_ids": [3, 9], "answer_ids": [10, 11, 1]}\n' * 8)
    recipe = small_recipe(data={"sources": [str(rows)]}, run={"save_steps": 2})
    _train(recipe, tmp_path / "run")
    rows.write_text('{"prompt_ids": [3, 9], "answer_ids": [10, 12, 1]}\n' * 8)
    with pytest.raises(ConfigError, match=r"the data has changed \(checksum \d+ -> \d+\)"):
        train(recipe, output=tmp_path / "run", resume=True, report=lambda line: None)


def test_a_recipe_of_an_older_version_resumes_with_the_defaults_of_new_settings(tmp_path: Path, small_recipe: Build) -> None:
    recipe = small_recipe(run={"save_steps": 2})
    _train(recipe, tmp_path)
    table = recipe.to_table()
    del table["parallel"], table["run"]["validate_steps"]
    (tmp_path / "recipe.json").write_text(json.dumps(table))
    assert train(recipe, output=tmp_path, resume=True, report=lambda line: None).steps == 4


def test_validation_scores_both_terms_without_changing_the_training(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    lines: list[str] = []
    data = {"validation_rows": 10, "accumulation": 2}
    recipe = small_recipe(data=data, run={"validate_steps": 2}, objective={"distill": 0.5}, method={"name": "lora", "dropout": 0.1})
    report = train(recipe, output=tmp_path / "often", report=lines.append)
    scored = [line for line in lines if "eval_loss_ar" in line]
    assert len(scored) == 3, "after steps 2 and 4, and at the end"
    assert scored[1] == scored[2], "the corruption is the same each time"
    assert report.validation_ar is not None
    assert f"eval_loss_ar {report.validation_ar:.4f}  eval_loss_mdm {report.validation_mdm:.4f}" in scored[2]
    seldom = small_recipe(data=data, objective={"distill": 0.5}, method={"name": "lora", "dropout": 0.1})
    again = _train(seldom, tmp_path / "seldom")
    assert (again.validation_ar, again.validation_mdm) == (report.validation_ar, report.validation_mdm)
    first, second = final_weights(tmp_path / "often"), final_weights(tmp_path / "seldom")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_validation_rows_of_their_own_have_the_loss_that_training_on_them_reports(tmp_path: Path, small_recipe: Build) -> None:
    """A constant learning rate of nearly 0: what training reports as its loss is the loss of the base."""
    toy = {"sources": [{"toy": 6}], "pack_length": 512, "rows_per_step": 1}
    objective = {"name": "autoregressive"}
    optimizer = {"learning_rate": 1e-12}
    report = _train(
        small_recipe(data={**toy, "validation": [{"toy": 6}]}, objective=objective, optimizer=optimizer, run={"max_steps": 1}), tmp_path
    )
    assert report.validation_ar == pytest.approx(report.loss_ar, rel=1e-5)
    assert report.validation_mdm == 0


def test_a_probe_measures_on_schedule_and_leaves_no_trace(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    lines: list[str] = []
    asked: list[int] = []

    def factory(recipe: Recipe, base: BaseModel, validation: Examples) -> Probe:
        asked.append(len(validation))

        def probe(model: torch.nn.Module) -> dict[str, float]:
            torch.rand(5)
            assert not model.training
            return {"tpf": 1.5}

        return probe

    recipe = small_recipe(data={"validation_rows": 9}, run={"probe_steps": 3, "probe_rows": 5}, method={"name": "lora", "dropout": 0.1})
    train(recipe, output=tmp_path / "probed", probe_factory=factory, report=lines.append)
    assert [line.split()[1] for line in lines if "probe_tpf 1.5000" in line] == ["3/4", "4/4"]
    assert asked == [5]
    _train(small_recipe(data={"validation_rows": 9}, method={"name": "lora", "dropout": 0.1}), tmp_path / "plain")
    probed, plain = final_weights(tmp_path / "probed"), final_weights(tmp_path / "plain")
    assert all(torch.equal(probed[name], plain[name]) for name in plain)
    with pytest.raises(ConfigError, match="must pass probe_factory"):
        _train(recipe, tmp_path / "none")
    with pytest.raises(ConfigError, match=r"set data\.validation_rows"):
        train(small_recipe(run={"probe_steps": 3}), output=tmp_path / "no-rows", probe_factory=factory, report=lambda line: None)


def test_a_chat_template_of_the_recipe_goes_into_the_final_model(tmp_path: Path, small_recipe: Build, tiny_model_dir: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "a", "response": "b"}\n' * 4)
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    data = {"sources": [str(rows)]}
    report = _train(small_recipe(model={"base": str(base), "chat_template": str(template)}, data=data), tmp_path / "run")
    assert Tokenizer.from_pretrained(report.model).render_chat([{"role": "user", "content": "a"}]) == "[a]"
    with pytest.raises(ConfigError, match=r"model\.chat_template = 'alpaca' is unknown: neither a Jinja file nor one of 'chatml'"):
        _train(small_recipe(model={"base": str(base), "chat_template": "alpaca"}, data=data), tmp_path / "other")


def test_a_finished_model_is_pushed_on_request(tmp_path: Path, small_recipe: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    class Api:
        def create_repo(self, repository: str, *, exist_ok: bool) -> str:
            calls.append((repository, exist_ok))
            return f"https://hub.example/{repository}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    report = train(small_recipe(), output=tmp_path, push="me/model", report=lambda line: None)
    assert report.pushed_to == "https://hub.example/me/model"
    assert calls[0] == ("me/model", True)
    assert "model.safetensors" in str(calls[1])


def test_a_push_that_fails_says_where_the_model_lies(tmp_path: Path, small_recipe: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"cannot push to me/model: .*; the model lies in .*final"):
        train(small_recipe(), output=tmp_path, push="me/model", report=lambda line: None)
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_qlora_without_bitsandbytes_says_what_to_install(
    tmp_path: Path, small_recipe: Build, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes; `pip install bitsandbytes`, or use 'lora'"):
        _train(small_recipe(model={"base": str(tiny_model_dir)}, method={"name": "qlora"}), tmp_path)


def test_each_process_quantises_on_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda **_: None)
    assert _four_bit_options()["device_map"] == {"": 0 if torch.cuda.is_available() else "cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _four_bit_options()["device_map"] == {"": 1}


needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (pip install bitsandbytes)"
)


@needs_bitsandbytes
@pytest.mark.parametrize("is_tied", [True, False])
def test_qlora_trains_over_four_bits_and_leaves_a_whole_model(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, is_tied: bool
) -> None:
    base = tmp_path / "base"
    config = toy_config()
    config.mask_token_id = TOY_MASK_ID
    config.tie_word_embeddings = is_tied
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(base)
    lora, qlora = ({"name": name, "rank": 4, "dropout": 0.1} for name in ("lora", "qlora"))
    loss = {
        method["name"]: _train(small_recipe(model={"base": str(base)}, method=method), tmp_path / str(method["name"])).loss
        for method in (lora, qlora)
    }
    assert loss["qlora"] == pytest.approx(loss["lora"], rel=0.02)  # what four bits take from a random model
    before, after = model.state_dict(), final_weights(tmp_path / "qlora")
    assert _moved_rows(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]) == [TOY_MASK_ID]
    if not is_tied:
        assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    for name, value in before.items():
        if "_proj" in name:  # over the base in full precision; over four bits the difference would have every rank
            assert torch.linalg.matrix_rank(after[name] - value, atol=1e-5) == 4, name
    AutoModelForCausalLM.from_pretrained(tmp_path / "qlora" / "final")


@needs_bitsandbytes
def test_qlora_resumes_to_the_weights_of_an_unbroken_run(tmp_path: Path, small_recipe: Build, final_weights: Weights) -> None:
    base = tmp_path / "base"
    config = toy_config()
    config.mask_token_id = TOY_MASK_ID
    LlamaForCausalLM(config).save_pretrained(base)
    method = {"name": "qlora", "rank": 4, "dropout": 0.1}
    recipe = small_recipe(model={"base": str(base)}, method=method, run={"save_steps": 2, "keep_checkpoints": 2})
    _train(recipe, tmp_path / "run")
    unbroken = final_weights(tmp_path / "run")
    for name in ("checkpoint-4", "final", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    train(recipe, output=tmp_path / "run", resume=True, report=lambda line: None)
    resumed = final_weights(tmp_path / "run")
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


@needs_bitsandbytes
def test_a_model_trained_by_qlora_answers(tmp_path: Path, small_recipe: Build, tiny_model_dir: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "a", "response": "b"}\n' * 8)
    report = _train(small_recipe(model={"base": str(tiny_model_dir)}, method={"name": "qlora"}, data={"sources": [str(rows)]}), tmp_path)
    assert LLM.from_pretrained(report.model).generate(["a"], SamplingParams(max_tokens=8))[0].token_ids


def test_deepspeed_that_is_not_installed_says_what_to_do(tmp_path: Path, small_recipe: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refusion.training.arguments.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs DeepSpeed; `pip install 'deepspeed>=0.19'`, or use 'fsdp'"):
        _train(small_recipe(parallel={"name": "deepspeed"}), tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path: Path, small_recipe: Build) -> None:
    with pytest.raises(ConfigError, match=r"lower optimizer\.learning_rate"):
        _train(small_recipe(optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0}, run={"max_steps": 10}), tmp_path)


def test_flex_attention_on_a_cpu_is_refused(tmp_path: Path, small_recipe: Build) -> None:
    with pytest.raises(ConfigError, match="'flex' has no backward pass on a CPU; use 'sdpa'"):
        _train(small_recipe(model={"attention": "flex"}), tmp_path)


def test_a_base_without_mask_token_is_refused(tmp_path: Path, small_recipe: Build) -> None:
    model = load_base(small_recipe().model).model
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"has no mask token; set model\.mask_token or add one with `refusion convert`"):
        _train(small_recipe(model={"base": str(tmp_path / "base")}), tmp_path / "run")


def test_a_mask_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path, small_recipe: Build, tiny_model_dir: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = json.loads((base / "config.json").read_text())
    del config["mask_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has no token '<blank>'; choose another model\.mask_token"):
        load_base(small_recipe(model={"base": str(base), "mask_token": "<blank>"}).model)


def test_resuming_unpickles_nothing(tmp_path: Path, small_recipe: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(run={"save_steps": 2, "keep_checkpoints": 2})
    _train(recipe, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    loaded: list[str] = []
    load = torch.load

    def checked(path: object, *args: object, **kwargs: object) -> object:
        assert kwargs.get("weights_only", True) is not False, path
        loaded.append(Path(str(path)).name)
        return load(path, *args, **{**kwargs, "weights_only": True})  # pyright: ignore

    monkeypatch.setattr(torch, "load", checked)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    assert train(recipe, output=tmp_path, resume=True, report=lambda line: None).steps == 4
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(loaded)


def _train(recipe: Recipe, run_dir: Path) -> TrainingReport:
    return train(recipe, output=run_dir, report=lambda line: None)


def _moved_rows(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(-1).nonzero().flatten().tolist()
