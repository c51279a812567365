"""The arms of `recipe_ablations.py`: what of the base recipe each changes."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNTRAINED = "before training"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One change of the base recipe."""

    label: str
    changes: tuple[str, ...] = ()
    """Overrides as `--set` takes them."""
    against: str = "base"
    """The arm from which it differs in one thing."""
    length: float = 1.0
    """Steps over those of the others."""

    @property
    def name(self) -> str:
        """The label as a name of files."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")


def arms() -> list[Arm]:
    """All of them, one of each kind first. LoRA has the learning rate of its own recipe, and alpha / rank stays 2."""
    paper = ("objective.serial_share=0",)
    distilled = ("objective.distill=0.7",)
    few_masks = ("objective.serial_share=1", "objective.serial_groups=2")  # recipes/comparison/refusion_few.toml
    lora = ("method.name=lora", "method.freeze_embeddings=false", "optimizer.learning_rate=1e-3")
    lora_64 = (*lora, "method.rank=64", "method.alpha=128")
    return [
        Arm(label="base"),
        Arm(label="distilled, 0.7", changes=distilled),
        Arm(label="no border targets", changes=("objective.serial_borders=false",)),
        Arm(label="the paper's rows alone", changes=paper),
        Arm(label="the paper's rows, cosine noise", changes=(*paper, "objective.noise=cosine"), against="the paper's rows alone"),
        Arm(label="slots of 16", changes=("objective.slot_sizes=[16]",)),
        Arm(label="AR weight 4", changes=("objective.ar_weight=4.0",)),
        Arm(label="learning rate 1.2e-3", changes=("optimizer.learning_rate=1.2e-3",)),
        Arm(label="LoRA, rank 64", changes=lora_64),
        Arm(label="serial rows alone", changes=("objective.serial_share=1",)),
        Arm(label="slots of 4, 8, 16 and 32", changes=("objective.slot_sizes=[4, 8, 16, 32]",)),
        Arm(label="learning rate 3e-4", changes=("optimizer.learning_rate=3e-4",)),
        Arm(label="LoRA, rank 256", changes=(*lora, "method.rank=256", "method.alpha=512"), against="LoRA, rank 64"),
        Arm(label="LoRA, rank 16", changes=(*lora, "method.rank=16", "method.alpha=32"), against="LoRA, rank 64"),
        Arm(label="half the steps", length=0.5),
        Arm(label="slots of 4", changes=("objective.slot_sizes=[4]",)),
        Arm(label="AR weight 1", changes=("objective.ar_weight=1.0",)),
        Arm(label="the paper's rows, clipped noise", changes=(*paper, "objective.noise=clipped"), against="the paper's rows alone"),
        Arm(label="twice the steps", length=2.0),
        Arm(label="targets beyond the end", changes=("objective.pad_answers=16",)),
        Arm(label="distilled, 0.7, LoRA, rank 64", changes=(*distilled, *lora_64), against="LoRA, rank 64"),
        Arm(label="distilled, 0.7, few masks", changes=(*distilled, *few_masks), against="distilled, 0.7"),
    ]
