"""What `recipe_ablations.py` measures a trained arm by."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import chat
import comparison
import harness
import torch
from recipe_arms import UNTRAINED, Arm

from refusion import LLM, SamplingParams, SlotParams, hub
from refusion.atomic import atomic_directory
from refusion.decoding.params import SlotSettings
from refusion.errors import ConfigError
from refusion.evaluation.results import Figure, Run, to_plain
from refusion.llm import EngineSettings
from refusion.training.base import load_base, load_weights
from refusion.training.batches import Corruption, PackedBatches, validation_schedule
from refusion.training.objectives import LossSettings, packed_loss
from refusion.training.recipe import Recipe, Source
from refusion.training.run import load_data

MEASURING_SECONDS = 12.0
"""An arm's measurement, until one has been timed."""
NOT_COMPARED = {"run.output", "data.num_workers", "data.cache"}
"""Settings in which two runs of the same arm may differ."""


class Bench:
    """Everything an arm is measured by."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe) -> None:
        self.args, self.recipe = args, recipe
        self.is_cuda = args.device.startswith("cuda")
        self.data = args.data or harness.chat_prompts()
        self.rows = harness.rows_of(self.data, args.rows)
        if not self.rows:
            raise ConfigError(f"--rows {args.rows} names no row of {self.data}")
        self.batch_size = args.batch_size or (64 if self.is_cuda else 4)
        self.slots = SlotParams(**args.slots) if args.slots else comparison.SLOTS
        self.sampling = SamplingParams(max_tokens=args.max_tokens)
        self.is_warm = not self.is_cuda
        self.seconds = MEASURING_SECONDS
        """What the last measurement took."""

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for measurements to stand in one file."""
        counts = {
            "num_prompts": len(self.rows),
            "validation_rows": self.args.validation_rows,
            "batch_size": self.batch_size,
            "dtype": self.args.dtype or ("bfloat16" if self.is_cuda else None),
        }
        return counts | {"base": Path(self.recipe.model.base).name, "data": self.data, "slots": self.slots, "sampling": self.sampling}

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """Recipe and measurement, without the places of files."""
        table = recipe.to_table()
        for name in NOT_COMPARED:
            section, _, key = name.partition(".")
            del table[section][key]
        sources = [{**source, "path": Path(source["path"]).name} for source in table["data"]["sources"]]
        table["data"] |= {"sources": sources, "exclude": [Path(path).name for path in table["data"]["exclude"]]}
        table["model"]["base"] = Path(table["model"]["base"]).name
        return to_plain({"recipe": table, "measured": {**self.settings, "rows": self.args.rows}})

    def known(self, file: Path, recipe: Recipe) -> Run | None:
        """The run of an earlier measurement; None if there is none, or of something else."""
        if not file.exists():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return Run(**found["run"]) if found["identity"] == self.identity(recipe) else None

    def measure(self, arm: Arm, final: Path) -> tuple[dict[str, Figure], dict[str, float]]:
        """Figures of a model, and how long each part of measuring them took."""
        clock = Clock()
        path = self.untrained if arm.label == UNTRAINED else final
        llm = self.load(path)
        clock.lap("load")
        if not self.is_warm:  # compiles on all cores, together; trainings have their own compiling to do at that time
            llm.warm_up(("refusion",), batch_size=self.seats, sampling=self.sampling, slots=self.whole(llm), prompt_tokens=256)
            llm.warm_up(("autoregressive",), batch_size=self.batch_size, sampling=self.sampling, prompt_tokens=256)
            self.is_warm = True
            clock.lap("warm-up")
        figures: dict[str, Figure] = {}
        by_slots = self.answers(llm, "refusion", self.seats)
        clock.lap("slots")
        one_by_one = self.answers(llm, "autoregressive", self.batch_size)
        clock.lap("one by one")
        names = ("tokens_per_forward", "agreement", "base_nll", "mean_tokens", "repetitive_share", "stopped_share")
        found = chat.figures(llm, self.base, by_slots, self.score_batch)
        figures |= {name: found[name] for name in names}
        found = chat.figures(llm, self.base, one_by_one, self.score_batch)
        figures |= {f"{name}_one_by_one": found[name] for name in names[1:]}
        clock.lap("agreement")
        del llm
        self.free()
        figures |= self.losses(path)
        self.free()
        clock.lap("losses")
        if arm.label != UNTRAINED:
            figures |= report_figures(final.parent / "report.json")
        self.seconds = sum(seconds for part, seconds in clock.parts.items() if part != "warm-up")
        return figures, clock.parts

    def load(self, path: Path) -> LLM:
        rows = comparison.ROOM * comparison.DECODE_ROWS if self.is_cuda else None
        room = self.batch_size * comparison.ROOM  # trainings share the memory
        engine = EngineSettings(max_num_seqs=self.batch_size, cache_tokens=room, max_decode_rows=rows, prefix_caching=False)
        return LLM.from_pretrained(path, device=self.args.device, dtype=self.args.dtype, engine=engine)

    @property
    def seats(self) -> int:
        """Prompts of slot decoding together: so many can prepare all their lengths in every forward."""
        return min(self.batch_size, comparison.SLOT_SEATS)

    @property
    def score_batch(self) -> int:
        return 32 if self.is_cuda else 4

    def whole(self, llm: LLM) -> SlotParams:
        """The slots with every length prepared, so that tokens per forward do not depend on what forwards cost."""
        settings: SlotSettings = llm.resolve_slots(self.slots)
        return replace(self.slots, max_candidates=settings.candidates())

    def answers(self, llm: LLM, decoder: str, batch_size: int) -> harness.Outcome:
        prompts: list[Any] = [harness.chat(row["query"]) for row in self.rows]
        slots, began = self.whole(llm), time.perf_counter()
        outputs = llm.generate(prompts, self.sampling, slots, decoder, batch_size=batch_size)
        return harness.Outcome(harness.Setting(decoder=decoder, slots=slots), outputs, time.perf_counter() - began)

    def losses(self, path: Path) -> dict[str, Figure]:
        """Both terms over the validation rows, corrupted as in the base recipe; in the type that answers are made in."""
        batches, dtype = self.validation, torch.bfloat16 if self.is_cuda else torch.float32
        model = load_weights(path, dtype=dtype).to(self.args.device).eval()
        settings = LossSettings(chunk_size=self.recipe.objective.chunk_size)
        sums, counts = {"ar": 0.0, "mdm": 0.0}, {"ar": 0.0, "mdm": 0.0}
        for batch in batches:
            moved = {name: value.to(self.args.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            moved |= {f"{term}_normaliser": torch.tensor(1.0, device=self.args.device) for term in sums}
            with torch.no_grad():
                terms = packed_loss(model, moved, settings)
            for term, count in (("ar", "num_ar"), ("mdm", "num_units")):
                sums[term] += terms[term].item()  # one synchronisation a batch
                counts[term] += batch[count]
        return {f"validation_{term}": sums[term] / max(counts[term], 1.0) for term in sums}

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """Batches of the rows whose losses are scored."""
        base = load_base(self.recipe.model)
        rows = replace(self.recipe.data, sources=(Source(path=str(self.data), limit=self.args.validation_rows),), exclude=())
        held_out, _ = load_data(replace(self.recipe, data=rows), base, lambda line: None)
        corruption = Corruption(
            examples=held_out,
            objective=self.recipe.objective,
            mask_token_id=base.mask_token_id,
            seed=self.recipe.run.seed,
            pack_length=self.recipe.data.pack_length,
        )
        schedule = validation_schedule(corruption, rows_per_step=4)
        return list(PackedBatches(schedule, chunk_size=self.recipe.objective.chunk_size))

    @cached_property
    def base(self) -> LLM:
        """The judge of agreement."""
        return LLM.from_pretrained(self.recipe.model.base, device=self.args.device, dtype="float32")

    @cached_property
    def untrained(self) -> Path:
        """The base with the mask token it is trained with."""
        found, target = hub.resolve(self.recipe.model.base), self.args.work / "untrained"
        if not target.exists():
            with atomic_directory(target) as draft:
                for file in found.iterdir():
                    if file.is_file():
                        shutil.copyfile(file, draft / file.name)
                config = json.loads((found / "config.json").read_text(encoding="utf-8"))
                config["mask_token_id"] = load_base(self.recipe.model).mask_token_id
                (draft / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return target

    def free(self) -> None:
        """Engines hold themselves in cycles; graphs and caches go with them."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


class Clock:
    """Seconds of the parts of something."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part], self._since = now - self._since, now


def report_figures(path: Path) -> dict[str, Figure]:
    """What the training itself said."""
    report = json.loads(path.read_text(encoding="utf-8"))
    names = ("examples", "loss_ar", "loss_mdm", "peak_memory_gb")
    return {f"training_{name}": report[name] for name in names if report[name] is not None}
