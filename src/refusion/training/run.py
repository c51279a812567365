"""A training run from recipe to finished model: `train`. It puts data, model, objective and Trainer together and saves the result."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from refusion import hub
from refusion.atomic import atomic_directory, atomic_file
from refusion.errors import CheckpointError, ConfigError
from refusion.tokenizer import Tokenizer
from refusion.training.attention import FLEX_NAME
from refusion.training.batches import Corruption, PackedBatches, make_schedule
from refusion.training.data import Examples, load_examples
from refusion.training.objectives import LossSettings, bind_objective, inner_causal_lm
from refusion.training.recipe import MethodSettings, ModelSettings, Recipe, changed_settings
from refusion.training.trainer import ProgressLine, RefusionTrainer, TimeLimit, checkpoints

TOY_MASK_ID = 2
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
_FREE_TO_CHANGE = {
    "run.output",
    "run.time_limit_minutes",
    "run.log_steps",
    "run.save_steps",
    "run.keep_checkpoints",
    "run.final_dtype",
    "run.tensorboard",
    "data.num_workers",
}
"""Settings that a resumed run may change: they leave the weights as they would have been."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingReport:
    """What a run did; also written to report.json."""

    output: str
    model: str
    """Directory of the final model, empty if the run stopped before its last step."""
    steps: int
    max_steps: int
    examples: int
    too_long: int
    skipped: int
    excluded: int
    loss: float
    loss_ar: float
    loss_mdm: float
    tokens_per_second: float
    """Tokens of the last log interval, padding not counted."""
    seconds: float


def train(recipe: Recipe, *, output: Path | None = None, resume: bool = False, report: Callable[[str], None] = print) -> TrainingReport:
    """Train as the recipe says and leave the model in `output`/final, in hub layout.

    With `resume` the newest checkpoint under `output` is taken up (a fresh run starts where there is none); its recipe must agree.
    """
    started = time.perf_counter()
    run_dir = Path(output or recipe.run.output)
    checkpoint = _prepare_run_dir(run_dir, recipe, resume)
    base = load_base(recipe.model)
    report(f"reading {len(recipe.data.sources)} source(s)")
    examples = load_examples(
        recipe.data,
        tokenizer=base.tokenizer,
        mask_token_id=base.mask_token_id,
        vocab_size=base.model.get_input_embeddings().num_embeddings,
        report=report,
    )
    trainer = build_trainer(recipe, base, examples, run_dir, checkpoint, report)
    steps_done = trainer.batches.start_step
    num_steps = trainer.batches.schedule.num_steps
    report(_describe(recipe, examples, trainer, steps_done))
    if steps_done < num_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        steps_done = trainer.state.global_step
    else:
        trainer._load_from_checkpoint(str(checkpoint))
    is_finished = steps_done >= num_steps
    if is_finished and trainer.is_world_process_zero():
        save_final_model(trainer.model, base, recipe, run_dir)
    result = _summarise(trainer, run_dir, examples, steps_done, is_finished, time.perf_counter() - started)
    if trainer.is_world_process_zero():
        with atomic_file(run_dir / "report.json") as draft:
            draft.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """The model that training starts from; `path` is None for the toy model."""

    model: Any
    path: Path | None
    tokenizer: Tokenizer | None
    mask_token_id: int


def load_base(settings: ModelSettings) -> BaseModel:
    """Load model (float32) and tokenizer and settle the mask token."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if settings.base == "toy":
        config = toy_config()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        return BaseModel(model=model, path=None, tokenizer=None, mask_token_id=TOY_MASK_ID)
    path = hub.resolve(settings.base)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = Tokenizer.from_pretrained(path) if (path / "tokenizer.json").exists() else None
    mask_token_id = _mask_token_id(model, path, settings.mask_token)
    return BaseModel(model=model, path=path, tokenizer=tokenizer, mask_token_id=mask_token_id)


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


def build_trainer(
    recipe: Recipe, base: BaseModel, examples: Examples, run_dir: Path, checkpoint: Path | None, report: Callable[[str], None]
) -> RefusionTrainer:
    """Everything of a run up to the point where it starts."""
    arguments = _training_arguments(recipe, run_dir)
    num_processes = arguments.world_size
    if recipe.data.rows_per_step % (recipe.data.accumulation * num_processes):
        raise ConfigError(
            f"data.rows_per_step = {recipe.data.rows_per_step} must be a multiple of accumulation x processes = "
            f"{recipe.data.accumulation} x {num_processes}"
        )
    corruption = Corruption(
        examples=examples,
        objective=recipe.objective,
        mask_token_id=base.mask_token_id,
        seed=recipe.run.seed,
        pack_length=recipe.data.pack_length,
    )
    schedule = make_schedule(corruption, rows_per_step=recipe.data.rows_per_step, max_steps=recipe.run.max_steps, epochs=recipe.run.epochs)
    arguments.max_steps = schedule.num_steps
    batches = PackedBatches(
        schedule,
        start_step=_checkpoint_step(checkpoint),
        accumulation=recipe.data.accumulation,
        process=arguments.process_index,
        num_processes=num_processes,
        chunk_size=recipe.objective.chunk_size,
    )
    model, frozen = prepare_model(base, recipe, arguments.device)
    callbacks: list[Any] = [ProgressLine(report)]
    if recipe.run.time_limit_minutes:
        callbacks.append(TimeLimit(recipe.run.time_limit_minutes))
    if recipe.run.tensorboard and arguments.process_index == 0:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(log_dir=str(run_dir / "tensorboard"))))
    trainer = RefusionTrainer(model=model, args=arguments, batches=batches, frozen_parameters=frozen, callbacks=callbacks)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def prepare_model(base: BaseModel, recipe: Recipe, device: torch.device) -> tuple[Any, frozenset[str]]:
    """Bind objective, method, attention and compilation to the base model; also the names of parameters of which one row is trained."""
    model = base.model
    # transformers gives the embedding pad_token_id as padding_idx, which stops that row's gradient; pad is often EOS.
    model.get_input_embeddings().padding_idx = None
    if recipe.model.attention == "flex":
        model.config._attn_implementation = FLEX_NAME
    teacher = _frozen_copy(model, device, recipe) if recipe.objective.distill > 0 else None
    frozen: frozenset[str] = frozenset()
    only_row = None
    if recipe.method.name == "lora":
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
            for layer in [] if network is None else network.base_model.layers:
                layer.compile(dynamic=False)
    loss = LossSettings(
        chunk_size=recipe.objective.chunk_size,
        distill=recipe.objective.distill,
        ar_weight=recipe.objective.ar_weight,
        only_row=only_row,
        compiled=recipe.model.compile,
    )
    bind_objective(model, loss, teacher)
    return model, frozen


def save_final_model(model: Any, base: BaseModel, recipe: Recipe, run_dir: Path) -> None:
    """Write `run_dir`/final in hub layout, and for LoRA `run_dir`/adapter beside it; each appears whole or not at all."""
    if recipe.method.name == "lora":
        with atomic_directory(run_dir / "adapter", replace=True) as draft:
            model.save_pretrained(draft)
        model = model.merge_and_unload()
    config = model.config
    config.mask_token_id = base.mask_token_id
    block = dict(getattr(config, "refusion", None) or {})
    block["training"] = {"base": recipe.model.base, "objective": recipe.to_table()["objective"], "method": recipe.method.name}
    config.refusion = block
    config.use_cache = True  # the Trainer switches it off for training
    model.to(device="cpu", dtype=getattr(torch, recipe.run.final_dtype))
    with atomic_directory(run_dir / "final", replace=True) as draft:
        model.save_pretrained(draft)
        for name in _COPIED_FILES:
            if base.path is not None and (base.path / name).exists():
                shutil.copyfile(base.path / name, draft / name)


def _prepare_run_dir(run_dir: Path, recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint to resume from, if any. Refuses to mix two different runs in one directory."""
    table = recipe.to_table()
    found = checkpoints(run_dir)
    recipe_file = run_dir / "recipe.json"
    if found and not resume:
        raise ConfigError(f"{run_dir} holds an unfinished run ({found[-1].name}); use --resume to go on, or another --output")
    if found and recipe_file.exists():
        changed = changed_settings(json.loads(recipe_file.read_text(encoding="utf-8")), table)
        changed = [name for name in changed if name not in _FREE_TO_CHANGE]
        if changed:
            raise ConfigError(
                f"cannot resume {run_dir}: the recipe has changed in {', '.join(changed)}; restore it or use another --output"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", "0")) == 0:
        with atomic_file(recipe_file) as draft:
            draft.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return found[-1] if found else None


def _checkpoint_step(checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _training_arguments(recipe: Recipe, run_dir: Path) -> TrainingArguments:
    has_gpu = torch.cuda.is_available()
    bfloat16 = recipe.model.precision == "bfloat16" or (recipe.model.precision == "auto" and has_gpu)
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
        bf16=bfloat16,
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
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used through torchrun, never by threads of one process
    return arguments


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


def _frozen_copy(model: Any, device: torch.device, recipe: Recipe) -> Any:
    """The teacher: the base model as it is, in bfloat16 where the student computes in it."""
    bfloat16 = recipe.model.precision == "bfloat16" or (recipe.model.precision == "auto" and device.type == "cuda")
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    return teacher.to(device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)


def _with_adapter(model: Any, mask_token_id: int, method: MethodSettings, seed: int) -> Any:
    """LoRA on every linear layer of the decoder, and the mask token's row of the embedding."""
    from peft import LoraConfig, get_peft_model

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


def _describe(recipe: Recipe, examples: Examples, trainer: RefusionTrainer, steps_done: int) -> str:
    trained = _num_trained_weights(trainer.model, trainer.frozen_parameters)
    left_out = [
        f"{count} {reason}"
        for count, reason in (
            (examples.num_too_long, f"longer than {recipe.data.pack_length} tokens"),
            (examples.num_skipped, "malformed"),
            (examples.num_excluded, "excluded"),
        )
        if count
    ]
    return (
        f"{len(examples):,} examples, {len(examples.tokens):,} tokens"
        + (f" (left out: {', '.join(left_out)})" if left_out else "")
        + f"; {trainer.batches.schedule.num_steps:,} steps of {recipe.data.rows_per_step} x {recipe.data.pack_length} tokens"
        + f"; {trained:,} weights trained"
        + (f"; resuming after step {steps_done}" if steps_done else "")
    )


def _num_trained_weights(model: Any, frozen: frozenset[str]) -> int:
    """Weights that move; of a frozen embedding that is the mask token's row."""
    return sum(p.shape[1] if name in frozen else p.numel() for name, p in model.named_parameters() if p.requires_grad)


def _summarise(
    trainer: RefusionTrainer, run_dir: Path, examples: Examples, steps_done: int, is_finished: bool, seconds: float
) -> TrainingReport:
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss_ar" in entry), {})
    return TrainingReport(
        output=str(run_dir),
        model=str(run_dir / "final") if is_finished else "",
        steps=steps_done,
        max_steps=trainer.batches.schedule.num_steps,
        examples=len(examples),
        too_long=examples.num_too_long,
        skipped=examples.num_skipped,
        excluded=examples.num_excluded,
        loss=last.get("loss", 0.0),
        loss_ar=last.get("loss_ar", 0.0),
        loss_mdm=last.get("loss_mdm", 0.0),
        tokens_per_second=last.get("tokens_per_second", 0.0),
        seconds=seconds,
    )
