"""Recipes: every setting of a training run as frozen dataclasses, filled from TOML and from `--set key=value`.

Each default is written once, here; a recipe file names only what differs. An unknown key is an error that suggests one that looks alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from refusion.errors import ConfigError
from refusion.slots import DEFAULT_SLOT_SIZES, Noise


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `optimizer.learning_rate=1e-3` (or `learning_rate=1e-3` where that is unambiguous)."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}; see recipes/ for examples") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not a readable TOML recipe: {error}") from error
    for override in overrides:
        _apply_override(table, override)
    return recipe_from_table(table)


def recipe_from_table(table: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested tables; ConfigError on an unknown key, a wrong type or a value out of range."""
    return _build(Recipe, table, "")


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of settings that differ between two `Recipe.to_table()` results."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            names += changed_settings(before, after, f"{prefix}{key}.")
        elif before != after:
            names.append(f"{prefix}{key}")
    return names


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """The model that training starts from and how it is run."""

    base: str
    """Named model, directory in the Hugging Face layout, or "toy" for a small random model over toy ids."""
    mask_token: str = ""
    """Token that becomes the mask token where the checkpoint's config.json has no mask_token_id."""
    chat_template: str = ""
    """Jinja file, or "chatml", that takes the place of the checkpoint's chat template and goes into the final model."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """bfloat16 = autocast over float32 master weights; auto = bfloat16 on a GPU, float32 elsewhere."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Type of the hidden states between layers under autocast; bfloat16 = less memory and traffic, but every layer's sum is rounded."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """sdpa = dense masks; flex = FlexAttention block masks that skip what packed documents do not see (GPU)."""
    compile: bool = False
    """Compile every decoder layer and the loss; worth it for runs over a few minutes on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute layer activations in the backward pass: less memory, a third more arithmetic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One set of rows ({"query", "response"}, {"messages"} or {"prompt_ids", "answer_ids"}), from files or toy rows."""

    path: str = ""
    """File or glob: .jsonl, .json (both also .gz) or .parquet, relative to the working directory."""
    weight: float = 1.0
    """How often an epoch repeats the source; 2.5 = twice, and half of the rows a third time, drawn anew each epoch."""
    limit: int = 0
    """Use only the first rows; 0 = all."""
    distill: bool = True
    """Whether objective.distill reaches this source; false where the base model does not know the answers."""
    query: str = "query"
    """Column of the prompt."""
    response: str = "response"
    """Column of the answer."""
    toy: int = 0
    """Number of toy rows (string tasks over ids) to make instead of reading `path`."""

    def __post_init__(self) -> None:
        _require(bool(self.path) != bool(self.toy), "data.sources", self.path or self.toy, "exactly one of path and toy")
        _require(self.weight > 0, "data.sources.weight", self.weight, "above 0")
        _require(self.limit >= 0, "data.sources.limit", self.limit, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """What is trained on and how it is batched."""

    sources: tuple[Source, ...]
    """The mixture; a plain string is a path."""
    exclude: tuple[str, ...] = ()
    """JSONL files whose queries must not be trained on; rows with the same query are dropped."""
    max_skipped: int = 0
    """How many malformed rows may be skipped before training refuses the data."""
    validation: tuple[Source, ...] = ()
    """Rows that are only scored, never trained on."""
    validation_rows: int = 0
    """So many examples of `sources`, drawn by run.seed, are held out for validation instead."""
    cache: str = ""
    """Directory where token ids are kept and memory-mapped, for sets larger than memory and for several processes; empty = in memory."""
    pack_length: int = 1024
    """Tokens in a packed row; longer rows are dropped and counted."""
    rows_per_step: int = 32
    """Packed rows in one optimizer step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches that a process splits its part of a step into."""
    num_workers: int = 0
    """Processes that corrupt and pack; 0 = in the training process."""

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "data.sources", self.sources, "at least one source")
        for name in ("pack_length", "rows_per_step", "accumulation"):
            _require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "above 0")
        _require(self.pack_length % 8 == 0, "data.pack_length", self.pack_length, "a multiple of 8")
        _require(self.rows_per_step % self.accumulation == 0, "data.rows_per_step", self.rows_per_step, "a multiple of data.accumulation")
        for name in ("num_workers", "max_skipped", "validation_rows"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "0 or more")
        reason = "0: data.validation names the rows already"
        _require(not (self.validation and self.validation_rows), "data.validation_rows", self.validation_rows, reason)


_USED_BY = {
    "slot_sizes": ("refusion",),
    "serial_share": ("refusion",),
    "serial_groups": ("refusion",),
    "serial_borders": ("refusion",),
    "text_order_share": ("refusion",),
    "noise": ("refusion",),
    "distill": ("refusion", "autoregressive"),
    "teacher": ("refusion", "autoregressive"),
    "ar_weight": ("refusion",),
    "block_size": ("block_diffusion",),
    "pad_answers": ("refusion", "masked_diffusion", "block_diffusion"),
}
"""Settings that not every objective reads, and those that do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSettings:
    """What the network learns from a row."""

    name: Literal["refusion", "autoregressive", "masked_diffusion", "block_diffusion"] = "refusion"
    """refusion = slots by diffusion, inside a slot left to right; autoregressive = plain fine-tuning; masked_diffusion = LLaDA;
    block_diffusion = BD3-LM."""
    slot_sizes: tuple[int, ...] = DEFAULT_SLOT_SIZES
    """Slot sizes, drawn uniformly per example."""
    serial_share: float = 0.0
    """Probability of the serial layout (clean answer in text order + a mask group per slot) instead of the paper's; 0 = paper."""
    serial_groups: int = 0
    """At most so many mask groups in a serial row; 0 = every slot."""
    serial_borders: bool = True
    """Whether the next-token head learns the first token of each slot in a serial row, from the last one before it."""
    text_order_share: float = 0.0
    """Probability that clean slots of the paper's layout keep text order; 0 = paper."""
    noise: Noise = "uniform"
    """How the paper's layout draws its masking probability from u ~ U(0, 1): uniform = u, the paper's; cosine = cos(pi / 2 u), more masks;
    clipped = 0.3 + 0.5 u. The weight of a masked token is 1 / (p * answer length) with each of them."""
    distill: float = 0.0
    """Share in [0, 1] of the teacher's softmax in the target of clean tokens and of each serial group's first mask."""
    teacher: str = ""
    """Named model or directory that objective.distill learns from, with the vocabulary of the base; empty = the base itself. To go on
    training a finished model, name it as the base and what it came from as the teacher."""
    ar_weight: float = 1.0
    """Factor of the AR term in the loss; 1 = paper."""
    block_size: int = 32
    """Answer tokens in a block of block_diffusion."""
    pad_answers: int = 0
    """Answers of masked_diffusion and block_diffusion are padded with their EOS to a multiple of so many tokens, which are learnt like any
    others (LLaDA): decoding fills regions of fixed size. In refusion masked slots reach behind the end and learn it, of a clean one there
    only the first EOS stands; a multiple of slot_sizes leaves no slot short. 0 = no padding."""
    chunk_size: int = 4096
    """Targets that go through the output head at once."""

    def __post_init__(self) -> None:
        _require(len(self.slot_sizes) > 0 and min(self.slot_sizes) > 0, "objective.slot_sizes", self.slot_sizes, "positive sizes")
        for name in ("serial_share", "text_order_share", "distill"):
            _require(0 <= getattr(self, name) <= 1, f"objective.{name}", getattr(self, name), "in [0, 1]")
        _require(self.serial_groups >= 0, "objective.serial_groups", self.serial_groups, "0 or more")
        has_serial, is_paper_noise = self.serial_share > 0, self.noise == "uniform"
        _require(has_serial or self.serial_borders, "objective.serial_borders", False, "left out: there are no serial rows")
        _require(self.serial_share < 1 or is_paper_noise, "objective.noise", self.noise, "left out: all rows are serial, without a draw")
        _require(not self.teacher or self.distill > 0, "objective.teacher", self.teacher, "left out where objective.distill is 0")
        _require(self.ar_weight > 0, "objective.ar_weight", self.ar_weight, "above 0")
        _require(self.chunk_size > 0, "objective.chunk_size", self.chunk_size, "above 0")
        _require(self.block_size > 0, "objective.block_size", self.block_size, "above 0")
        _require(self.pad_answers >= 0, "objective.pad_answers", self.pad_answers, "0 or more")
        for f in dataclasses.fields(self):
            is_used = self.name in _USED_BY.get(f.name, (self.name,))
            value = getattr(self, f.name)
            reason = f"left out: it has no effect on the {self.name} objective"
            _require(is_used or value == f.default, f"objective.{f.name}", value, reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSettings:
    """Which weights move."""

    name: Literal["full", "lora", "qlora"] = "full"
    """full = every weight (see freeze_embeddings); lora = low-rank adapter on all linear layers + the mask row; qlora = the same over a
    4-bit base (GPU, bitsandbytes)."""
    freeze_embeddings: bool = False
    """Full fine-tuning that leaves embedding and tied head alone, except for the mask token's row."""
    rank: int = 64
    """Adapter rank."""
    alpha: float = 128.0
    """Adapter scale: the update is alpha / rank * B A."""
    dropout: float = 0.0
    """Adapter dropout in [0, 1)."""

    def __post_init__(self) -> None:
        _require(self.rank > 0, "method.rank", self.rank, "above 0")
        _require(self.alpha > 0, "method.alpha", self.alpha, "above 0")
        _require(0 <= self.dropout < 1, "method.dropout", self.dropout, "in [0, 1)")
        _require(self.name == "full" or not self.freeze_embeddings, "method.freeze_embeddings", True, "false: lora freezes them anyway")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    learning_rate: float
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and linear end at 0."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay of the gradient average."""
    beta2: float = 0.95
    """Decay of the squared gradient average."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 = never."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "above 0")
        _require(0 <= self.warmup_ratio < 1, "optimizer.warmup_ratio", self.warmup_ratio, "in [0, 1)")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "max_grad_norm", "epsilon"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Length, seed, logging and saving."""

    output: str
    """Directory of the run: checkpoint-*, tensorboard/, recipe.json, report.json and final/ (the model in hub layout)."""
    epochs: float = 1.0
    """Passes over the mixture; ignored where max_steps is set."""
    max_steps: int = 0
    """Optimizer steps; 0 = as many as `epochs` needs."""
    time_limit_minutes: float = 0.0
    """Save a checkpoint and stop after so long; the schedule still counts steps. 0 = no limit."""
    seed: int = 0
    """Seed of data order, corruption and adapter initialisation."""
    log_steps: int = 10
    """Steps between log lines."""
    save_steps: int = 0
    """Steps between checkpoints to resume from; 0 = none but the final model."""
    keep_checkpoints: int = 1
    """How many checkpoints stay on disk."""
    final_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the final model's weights on disk."""
    tensorboard: bool = True
    """Write TensorBoard events under the output directory."""
    validate_steps: int = 0
    """Steps between scores of the validation rows; 0 = only at the end."""
    probe_steps: int = 0
    """Steps between probes: answers to validation prompts, their tokens per forward and agreement with the base; 0 = none."""
    probe_rows: int = 16
    """Validation prompts that a probe answers."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "run.epochs", self.epochs, "above 0")
        for name in ("max_steps", "time_limit_minutes", "seed", "save_steps", "validate_steps", "probe_steps"):
            _require(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "0 or more")
        for name in ("log_steps", "keep_checkpoints", "probe_rows"):
            _require(getattr(self, name) > 0, f"run.{name}", getattr(self, name), "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSettings:
    """How the processes of `torchrun` or `accelerate launch` share the model."""

    name: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp = the whole model in every process; fsdp = FSDP2, weights sharded by decoder layer; deepspeed = ZeRO, if installed."""
    reshard_after_forward: bool = True
    """fsdp: free a layer's weights between forward and backward; false = more memory, less traffic."""
    cpu_offload: bool = False
    """fsdp, deepspeed: keep what is sharded in the memory of the host; with zero_stage = 2 the gradients stay on the device."""
    zero_stage: int = 2
    """deepspeed: 1 = optimizer sharded, 2 = gradients too, 3 = weights too."""

    def __post_init__(self) -> None:
        _require(self.zero_stage in (1, 2, 3), "parallel.zero_stage", self.zero_stage, "1, 2 or 3")
        for name in {"ddp": ("reshard_after_forward", "cpu_offload", "zero_stage"), "fsdp": ("zero_stage",)}.get(self.name, ()):
            default = next(f.default for f in dataclasses.fields(self) if f.name == name)
            value = getattr(self, name)
            _require(value == default, f"parallel.{name}", value, f"left out: it has no effect on {self.name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole training run."""

    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    run: RunSettings
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    def __post_init__(self) -> None:
        is_fsdp = self.parallel.name == "fsdp"
        _require(not (is_fsdp and self.method.freeze_embeddings), "method.freeze_embeddings", True, "false with parallel.name = 'fsdp'")
        is_sharded = is_fsdp or self.parallel.zero_stage == 3
        what = "parallel.name = 'fsdp'" if is_fsdp else "parallel.zero_stage = 3"
        _require(not (is_sharded and self.method.name != "full"), "method.name", self.method.name, f"'full' with {what}")
        _require(not (is_sharded and self.run.probe_steps), "run.probe_steps", self.run.probe_steps, f"0 with {what}")
        is_compiled = self.parallel.zero_stage == 3 and self.model.compile  # DeepSpeed's hooks would be compiled anew for every weight
        _require(not is_compiled, "model.compile", True, "false with parallel.zero_stage = 3")
        is_quantised = self.method.name == "qlora"
        _require(not (is_quantised and self.objective.distill), "objective.distill", self.objective.distill, "0 with method.name = 'qlora'")

    def to_table(self) -> dict[str, Any]:
        """Nested plain values, as JSON would hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r} must be {allowed}")


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set optimizer.learning_rate=1e-3")
    path = _full_key(key.strip()).split(".")
    for part in path[:-1]:
        table = table.setdefault(part, {})
    table[path[-1]] = _parse_value(text.strip())


def _full_key(key: str) -> str:
    """A bare field name is completed with its section where only one section has it."""
    if "." in key:
        return key
    owners = [name for name, kind in typing.get_type_hints(Recipe).items() if key in _field_names(kind)]
    if len(owners) > 1:
        raise ConfigError(f"--set {key}: say which one, {' or '.join(f'{owner}.{key}' for owner in owners)}")
    return f"{owners[0]}.{key}" if owners else key


def _parse_value(text: str) -> Any:
    """A TOML value; text that is none is taken as a string, so that paths and names need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(kind: Any, table: Any, prefix: str) -> Any:
    """Fill the dataclass `kind` from a table, converting lists to tuples and ints to floats where the field asks for it."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the recipe'} must be a table, got {table!r}")
    known = _field_names(kind)
    for key in table:
        if key not in known:
            raise ConfigError(f"unknown setting {prefix}{key}; {_suggestion(key, prefix)}")
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in table and _is_required(f)]
    if missing:
        raise ConfigError(f"the recipe lacks {prefix}{missing[0]}")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in table.items()})


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if kind is Source and isinstance(value, str):
            value = {"path": value}
        return _build(kind, value, f"{name}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            nearest = _nearest(str(value), [str(a) for a in arguments])
            hint = f"; did you mean {nearest!r}?" if nearest else ""
            raise ConfigError(f"{name} = {value!r} must be one of {', '.join(map(repr, arguments))}{hint}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{name} = {value!r} must be a list")
        return tuple(_convert(arguments[0], item, name) for item in items)
    assert not isinstance(kind, types.UnionType), kind
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} = {value!r} must be of type {kind.__name__}")
    return value


def _suggestion(key: str, prefix: str) -> str:
    """Point to the known dotted name that looks like `key`, one of the same section first; where none does, to what the section has."""
    for names in ([name for name in _all_names() if name.startswith(prefix)], _all_names()):
        by_field = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        nearest = _nearest(key, list(by_field))
        if nearest:
            return f"did you mean {by_field[nearest]}?"
    known = [name.removeprefix(prefix) for name in _all_names() if name.startswith(prefix)]
    return f"known here are {', '.join(name for name in known if '.' not in name)}"


def _nearest(word: str, known: list[str]) -> str | None:
    """The known word that `word` is a slip of, if any: 0.75 passes two wrong letters of a dozen, not another word of the same length."""
    return next(iter(difflib.get_close_matches(word, known, 1, 0.75)), None)


def _all_names() -> list[str]:
    sections = typing.get_type_hints(Recipe)
    names = [f"{section}.{name}" for section, kind in sections.items() for name in _field_names(kind)]
    return [*sections, *names, *(f"data.sources.{name}" for name in _field_names(Source))]


def _field_names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
