"""Training: data, packed batches, objectives, the Trainer and recipes. It stands on slots, tokenizer, hub and deltas alone."""

from refusion.slots import permute_slots
from refusion.training.objectives import LossTerms, hybrid_loss

__all__ = ["LossTerms", "hybrid_loss", "permute_slots"]
